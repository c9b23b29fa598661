//! Links: connections to clients, whichever side dialled, under ids that the machine knows.
//!
//! A listener never learns that a peer is gone, so unused links make way for new ones, the longest silent first.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use mesh_core::worker::LinkId;
use mesh_transport::{Door, Outlet};
use proto_msgs::{AttemptId, Frame, PeerId, PublicKey};
use tokio::task::AbortHandle;

use super::dials::Callee;

/// Links kept, beside those that carry an attempt: many more than clients that speak at the same time.
const LINKS_MAX: usize = 1024;

/// Dialled links kept, beside those that carry an attempt: each has three sockets and a task of its own.
const DIALLED_MAX: usize = 256;

/// Attempts announced again on one dialled link after it broke: more than one client process ever has at one worker.
const DIALLED_FOR_MAX: usize = 256;

/// All links of the worker.
pub(crate) struct Links {
    door: Option<Door>,
    links: HashMap<LinkId, Link>,
    peers: HashMap<PeerId, LinkId>,
    next: u64,
}

struct Link {
    outlet: Outlet,
    key: Option<PublicKey>,
    heard: Instant,
    from: From,
}

enum From {
    /// The client dialled.
    Door(PeerId),
    /// The worker dialled.
    Dialled { endpoints: Vec<String>, attempts: Vec<AttemptId>, lost: bool, reader: AbortHandle },
}

impl From {
    const fn is_of_door(&self) -> bool {
        matches!(self, Self::Door(_))
    }

    const fn is_dialled_for_nobody(&self) -> bool {
        matches!(self, Self::Dialled { attempts, .. } if attempts.is_empty())
    }
}

impl Links {
    /// An empty set of links. Clients that dial come through `door`.
    pub(crate) fn new(door: Option<Door>) -> Self {
        Self { door, links: HashMap::new(), peers: HashMap::new(), next: 0 }
    }

    /// The link of a peer of the door that has just spoken. A new link may replace an unused old one; `used` is called
    /// only then, once.
    pub(crate) fn of_peer(
        &mut self,
        peer: PeerId,
        key: Option<PublicKey>,
        used: impl FnOnce() -> HashSet<LinkId>,
    ) -> Option<LinkId> {
        if let Some(id) = self.peers.get(&peer) {
            if let Some(link) = self.links.get_mut(id) {
                link.heard = Instant::now();
            }
            return Some(*id);
        }
        let outlet = self.door.as_ref()?.to(peer);
        if self.links.len() >= LINKS_MAX {
            self.forget_oldest_unused(From::is_of_door, &used());
        }
        let id = self.reserve();
        self.links.insert(id, Link { outlet, key, heard: Instant::now(), from: From::Door(peer) });
        self.peers.insert(peer, id);
        Some(id)
    }

    /// Reserves the id of the next link.
    pub(crate) fn reserve(&mut self) -> LinkId {
        self.next += 1;
        LinkId(self.next)
    }

    /// Adds a dialled link. One of many replaces the oldest that no attempt needs. The task `reader` passes its frames on.
    pub(super) fn add_dialled(
        &mut self,
        id: LinkId,
        (outlet, reader): (Outlet, AbortHandle),
        Callee { endpoints, key }: Callee,
        used: impl FnOnce() -> HashSet<LinkId>,
    ) {
        if self.links.values().filter(|link| !link.from.is_of_door()).count() >= DIALLED_MAX {
            self.forget_oldest_unused(From::is_dialled_for_nobody, &used());
        }
        let from = From::Dialled { endpoints, attempts: Vec::new(), lost: false, reader };
        self.links.insert(id, Link { outlet, key, heard: Instant::now(), from });
    }

    /// The intact dialled link to this client, if there is one.
    pub(super) fn dialled_to(&self, callee: &Callee) -> Option<LinkId> {
        let is_key = |link: &Link| link.key == callee.key;
        self.links.iter().find_map(|(id, link)| match &link.from {
            From::Dialled { endpoints, lost: false, .. } if *endpoints == callee.endpoints && is_key(link) => Some(*id),
            _ => None,
        })
    }

    /// Notes that the worker announced itself on this link to the attempt's client: from now on the attempt needs no
    /// other dialled link.
    pub(crate) fn dialled_for(&mut self, id: LinkId, attempt: AttemptId) {
        self.forget_attempt(attempt);
        if let Some(Link { from: From::Dialled { attempts, .. }, .. }) = self.links.get_mut(&id) {
            if attempts.len() == DIALLED_FOR_MAX {
                attempts.remove(0);
            }
            attempts.push(attempt);
        }
    }

    /// Notes that a dialled link broke, or is connected again. Returns the attempts to announce to the client again.
    pub(crate) fn set_lost(&mut self, id: LinkId, is_lost: bool) -> Vec<AttemptId> {
        let Some(Link { from: From::Dialled { attempts, lost, .. }, .. }) = self.links.get_mut(&id) else {
            return Vec::new();
        };
        *lost = is_lost;
        if !is_lost {
            return attempts.clone();
        }
        if attempts.is_empty() {
            self.remove(id);
        }
        Vec::new()
    }

    /// Forgets an attempt that is over, or is announced on another link. Removes dialled links that are broken and served
    /// only this attempt.
    pub(crate) fn forget_attempt(&mut self, attempt: AttemptId) {
        let mut useless = Vec::new();
        for (id, link) in &mut self.links {
            if let From::Dialled { attempts, lost, .. } = &mut link.from {
                attempts.retain(|known| *known != attempt);
                if *lost && attempts.is_empty() {
                    useless.push(*id);
                }
            }
        }
        for id in useless {
            self.remove(id);
        }
    }

    /// The public key that the link's peer has proven to hold.
    pub(crate) fn key(&self, id: LinkId) -> Option<PublicKey> {
        self.links.get(&id)?.key
    }

    /// The outlet to the link's client.
    pub(crate) fn outlet(&self, id: LinkId) -> Option<&Outlet> {
        Some(&self.links.get(&id)?.outlet)
    }

    /// Sends a frame now or drops it: important messages are repeated.
    pub(crate) fn send(&self, id: LinkId, frame: Frame) {
        if let Some(link) = self.links.get(&id) {
            let _ = link.outlet.try_send(frame);
        }
    }

    /// Removes a link.
    pub(crate) fn remove(&mut self, id: LinkId) {
        match self.links.remove(&id).map(|link| link.from) {
            Some(From::Door(peer)) => drop(self.peers.remove(&peer)),
            Some(From::Dialled { reader, .. }) => reader.abort(),
            None => {}
        }
    }

    /// Gives queued frames a moment to leave, then closes all links.
    pub(crate) async fn close(self) {
        for link in self.links.values().filter(|link| matches!(link.from, From::Dialled { .. })) {
            link.outlet.close().await;
        }
        if let Some(door) = &self.door {
            door.close().await;
        }
    }

    fn forget_oldest_unused(&mut self, is_meant: fn(&From) -> bool, used: &HashSet<LinkId>) {
        let unused = self.links.iter().filter(|(id, link)| is_meant(&link.from) && !used.contains(*id));
        if let Some(oldest) = unused.min_by_key(|(_, link)| link.heard).map(|(id, _)| *id) {
            self.remove(oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_transport::{Admit, Context, Limits, Security};

    use super::*;

    #[tokio::test]
    async fn strangers_without_number_do_not_push_out_a_client_with_an_attempt() {
        let context = Context::new(Security::None).expect("a context");
        let listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::DIRECT).expect("a free port");
        let (door, _inbox) = listener.spawn();
        let mut links = Links::new(Some(door));
        let mut next = 0_u32;
        let mut knock = |links: &mut Links, used: Option<LinkId>| {
            next += 1;
            let peer = PeerId::from_slice(&next.to_be_bytes()).expect("a name");
            links.of_peer(peer, None, || used.into_iter().collect()).expect("a link")
        };
        let client = knock(&mut links, None);
        let idle = knock(&mut links, None);
        for _ in 0..2 * LINKS_MAX {
            knock(&mut links, Some(client));
        }
        assert_eq!((links.links.len(), links.peers.len()), (LINKS_MAX, LINKS_MAX));
        assert!(links.outlet(client).is_some());
        assert!(links.outlet(idle).is_none());
    }

    #[tokio::test]
    async fn clients_without_number_that_are_dialled_fill_no_memory() {
        let context = Context::new(Security::None).expect("a context");
        let listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::DIRECT).expect("a free port");
        let (door, _inbox) = listener.spawn();
        let outlet = door.to(PeerId::from_slice(b"one").expect("a name"));
        let mut links = Links::new(None);
        let dial = |links: &mut Links, used: Option<LinkId>| {
            let (id, reader) = (links.reserve(), tokio::spawn(std::future::pending::<()>()).abort_handle());
            let to = Callee { endpoints: vec![format!("tcp://127.0.0.1:{}", id.0)], key: None };
            links.add_dialled(id, (outlet.clone(), reader), to, || used.into_iter().collect());
            id
        };
        let (client, idle) = (dial(&mut links, None), dial(&mut links, None));
        for _ in 0..2 * DIALLED_MAX {
            dial(&mut links, Some(client));
        }
        assert_eq!(links.links.len(), DIALLED_MAX);
        assert!(links.outlet(client).is_some() && links.outlet(idle).is_none());

        // Addresses without number that one attempt is announced at are no different.
        let attempt = AttemptId { task: proto_msgs::TaskId::from_bytes([1; 16]), attempt: proto_msgs::Attempt(1) };
        let mut last = client;
        for _ in 0..2 * DIALLED_MAX {
            let before = std::mem::replace(&mut last, dial(&mut links, Some(client)));
            links.dialled_for(last, attempt);
            links.set_lost(before, true);
        }
        assert!(links.links.len() <= DIALLED_MAX, "{}", links.links.len());
        links.set_lost(last, true);
        assert_eq!(links.set_lost(last, false), [attempt], "it is announced again where it was last");
    }
}
