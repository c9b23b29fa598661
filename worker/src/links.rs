//! Connections to clients, whichever side dialled, under numbers that the machine knows them by.
//!
//! A listener never hears that a peer has gone, so links that nobody uses are forgotten by age.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use mesh_core::worker::LinkId;
use mesh_transport::{Door, Outlet};
use proto_msgs::{AttemptId, Frame, PeerId, PublicKey};
use tokio::task::AbortHandle;

/// Links remembered before old ones are looked for.
const LINKS_MAX: usize = 1024;

/// A client speaks every second while it has an attempt here; one this old has none, or opens again.
const FORGET_AFTER: Duration = Duration::from_secs(120);

/// Attempts for which one dialled link is told again after it broke: more than one client process ever has at one worker.
const DIALLED_FOR_MAX: usize = 256;

/// All links.
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

impl Links {
    /// No links yet; those of clients that dial come through `door`.
    pub(crate) fn new(door: Option<Door>) -> Self {
        Self { door, links: HashMap::new(), peers: HashMap::new(), next: 0 }
    }

    /// The link of a peer of the door, which has just spoken.
    pub(crate) fn of_peer(&mut self, peer: PeerId, key: Option<PublicKey>) -> Option<LinkId> {
        if let Some(id) = self.peers.get(&peer) {
            if let Some(link) = self.links.get_mut(id) {
                link.heard = Instant::now();
            }
            return Some(*id);
        }
        let outlet = self.door.as_ref()?.to(peer);
        let id = self.add(Link { outlet, key, heard: Instant::now(), from: From::Door(peer) });
        self.peers.insert(peer, id);
        Some(id)
    }

    /// The number that the next dialled link will have.
    pub(crate) fn reserve(&mut self) -> LinkId {
        self.next += 1;
        LinkId(self.next)
    }

    /// A dialled link, whose frames `reader` passes on.
    pub(crate) fn add_dialled(
        &mut self,
        id: LinkId,
        outlet: Outlet,
        endpoints: Vec<String>,
        key: Option<PublicKey>,
        reader: AbortHandle,
    ) {
        let from = From::Dialled { endpoints, attempts: Vec::new(), lost: false, reader };
        self.links.insert(id, Link { outlet, key, heard: Instant::now(), from });
    }

    /// A dialled link to the same client that stands.
    pub(crate) fn dialled_to(&self, wanted: &[String], wanted_key: Option<PublicKey>) -> Option<LinkId> {
        self.links.iter().find_map(|(id, link)| match &link.from {
            From::Dialled { endpoints, lost: false, .. } if endpoints == wanted && link.key == wanted_key => Some(*id),
            _ => None,
        })
    }

    /// This attempt's client was told over this link that the worker has arrived.
    pub(crate) fn dialled_for(&mut self, id: LinkId, attempt: AttemptId) {
        if let Some(Link { from: From::Dialled { attempts, .. }, .. }) = self.links.get_mut(&id) {
            attempts.retain(|known| *known != attempt);
            if attempts.len() == DIALLED_FOR_MAX {
                attempts.remove(0);
            }
            attempts.push(attempt);
        }
    }

    /// The connection of a dialled link broke, or stands again. Returns the attempts to be named to the client again.
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

    /// An attempt is over: dialled links that are broken and served only it go.
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

    /// The key that the other side of this link has proven to hold.
    pub(crate) fn key(&self, id: LinkId) -> Option<PublicKey> {
        self.links.get(&id)?.key
    }

    /// The way to the client.
    pub(crate) fn outlet(&self, id: LinkId) -> Option<&Outlet> {
        Some(&self.links.get(&id)?.outlet)
    }

    /// Sends now or not at all: what must arrive is said again.
    pub(crate) fn send(&self, id: LinkId, frame: Frame) {
        if let Some(link) = self.links.get(&id) {
            let _ = link.outlet.try_send(frame);
        }
    }

    /// Drops a link.
    pub(crate) fn remove(&mut self, id: LinkId) {
        match self.links.remove(&id).map(|link| link.from) {
            Some(From::Door(peer)) => drop(self.peers.remove(&peer)),
            Some(From::Dialled { reader, .. }) => reader.abort(),
            None => {}
        }
    }

    /// Gives what is queued for clients a moment to leave, then closes everything.
    pub(crate) async fn close(self) {
        for link in self.links.values().filter(|link| matches!(link.from, From::Dialled { .. })) {
            link.outlet.close().await;
        }
        if let Some(door) = &self.door {
            door.close().await;
        }
    }

    fn add(&mut self, link: Link) -> LinkId {
        if self.links.len() >= LINKS_MAX {
            let old = |link: &Link| matches!(link.from, From::Door(_)) && link.heard.elapsed() > FORGET_AFTER;
            let olds: Vec<LinkId> = self.links.iter().filter(|(_, link)| old(link)).map(|(id, _)| *id).collect();
            for id in olds {
                self.remove(id);
            }
        }
        let id = self.reserve();
        self.links.insert(id, link);
        id
    }
}
