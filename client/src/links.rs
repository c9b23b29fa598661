//! Direct connections to workers: one per worker, shared by all its attempts, dialled by either side. Owns sockets and
//! the async tasks that read them. Never: the meaning of the messages.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use mesh_transport::{Admitted, Context, DialError, Dialer, Door, Limits, Outlet, dial_first};
use proto_msgs::{AttemptId, Digest, Frame, Grant, PeerId, PublicKey, WorkerId, limits};
use tokio::{sync::mpsc, task::AbortHandle};

use crate::happened::{Happened, LinkId};

/// A link unused for this long is closed: it costs the worker a socket.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Time that queued messages get to leave when a link closes.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Longest delay of a message that nobody waits for, until others join it. Closed loops open their next attempt sooner.
const LATER_WAIT: Duration = Duration::from_millis(10);

/// Delayed messages that are sent at once, without waiting for more.
const LATER_MAX: usize = 64;

#[derive(Debug)]
enum State {
    /// The connection is being made; these attempts wait for it.
    Dialling(Vec<AttemptId>),
    Up(Outlet),
}

#[derive(Debug)]
struct Link {
    worker: WorkerId,
    state: State,
    /// Reads the connection, or makes it. `None` if the worker dialled: the driver reads the listener.
    task: Option<AbortHandle>,
    used: Instant,
    /// Speed measured under load; 0 if unknown.
    bytes_per_s: u64,
    /// Models that the worker was seen to have. The broker learns of them one heartbeat later.
    delivered: BTreeSet<Digest>,
    /// Messages that are sent with the next one.
    later: Vec<Frame>,
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// The state of the link to a worker, for an attempt.
pub(crate) enum Way {
    /// The link is up.
    Up(LinkId, Outlet),
    /// The link is being made. [`Links::dialled`] will name the attempt when it is up or has failed.
    Coming,
    /// There is no link.
    None,
}

#[derive(Debug)]
pub(crate) struct Links {
    context: Context,
    happened: mpsc::Sender<Happened>,
    door: Option<Door>,
    admitted: Admitted,
    made: u64,
    links: BTreeMap<LinkId, Link>,
    by_worker: BTreeMap<WorkerId, LinkId>,
    by_peer: BTreeMap<PeerId, LinkId>,
    later_due: Option<Instant>,
}

impl Link {
    fn say_all(&mut self) {
        let State::Up(outlet) = &self.state else { return };
        for frame in self.later.drain(..) {
            if let Err(error) = outlet.try_send(frame) {
                tracing::debug!(worker = %self.worker, %error, "message to the worker dropped");
            }
        }
    }
}

impl Links {
    pub(crate) fn new(
        context: Context,
        happened: mpsc::Sender<Happened>,
        door: Option<Door>,
        admitted: Admitted,
    ) -> Self {
        let (links, by_worker, by_peer) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { context, happened, door, admitted, made: 0, links, by_worker, by_peer, later_due: None }
    }

    /// The link to the worker for this attempt.
    pub(crate) fn way(&mut self, worker: WorkerId, id: AttemptId) -> Way {
        let Some(link_id) = self.by_worker.get(&worker).copied() else { return Way::None };
        let Some(link) = self.links.get_mut(&link_id) else { return Way::None };
        link.used = Instant::now();
        match &mut link.state {
            State::Up(outlet) => Way::Up(link_id, outlet.clone()),
            State::Dialling(waiting) => {
                if !waiting.contains(&id) {
                    waiting.push(id);
                }
                Way::Coming
            }
        }
    }

    /// Starts dialling the grant's worker. The result arrives as [`Happened::Dialled`].
    pub(crate) fn dial(&mut self, grant: &Grant, within: Duration) {
        let link_id = self.next_id();
        let (context, happened) = (self.context.clone(), self.happened.clone());
        let (endpoints, key) = (grant.endpoints.clone(), grant.worker_key);
        let task = tokio::spawn(async move {
            let result = dial_first(&context, &endpoints, key, Limits::DIRECT, within).await;
            // If the driver is gone, the connection is not needed.
            let _ = happened.send(Happened::Dialled { link: link_id, result }).await;
        });
        let state = State::Dialling(vec![grant.id]);
        self.put(
            link_id,
            Link {
                worker: grant.worker,
                state,
                task: Some(task.abort_handle()),
                used: Instant::now(),
                bytes_per_s: 0,
                delivered: BTreeSet::new(),
                later: Vec::new(),
            },
        );
    }

    /// Handles the result of dialling. Returns the attempts that waited for the link.
    pub(crate) fn dialled(
        &mut self,
        link_id: LinkId,
        result: Result<Dialer, DialError>,
    ) -> Option<(Vec<AttemptId>, Result<(), DialError>)> {
        let link = self.links.get_mut(&link_id)?;
        let dialer = match result {
            Ok(dialer) => dialer,
            Err(error) => {
                let State::Dialling(waiting) = &mut link.state else { return None };
                let waiting = std::mem::take(waiting);
                self.drop_link(link_id);
                return Some((waiting, Err(error)));
            }
        };
        let (outlet, mut inbox) = dialer.spawn();
        let happened = self.happened.clone();
        let task = tokio::spawn(async move {
            while let Some(heard) = inbox.recv().await {
                if happened.send(Happened::Heard { link: link_id, heard }).await.is_err() {
                    return;
                }
            }
        });
        link.task = Some(task.abort_handle());
        match std::mem::replace(&mut link.state, State::Up(outlet)) {
            State::Dialling(waiting) => Some((waiting, Ok(()))),
            State::Up(_) => None,
        }
    }

    /// Stores the speed that an upload has measured.
    pub(crate) fn measured(&mut self, link_id: LinkId, bytes_per_s: u64) {
        if let Some(link) = self.links.get_mut(&link_id).filter(|_| bytes_per_s > 0) {
            link.bytes_per_s = bytes_per_s;
        }
    }

    /// The link's speed under load in bytes per second; 0 if unknown.
    pub(crate) fn bytes_per_s(&self, link_id: LinkId) -> u64 {
        self.links.get(&link_id).map_or(0, |link| link.bytes_per_s)
    }

    /// Notes that the worker has this model. If the worker drops it later, it asks for it.
    pub(crate) fn delivered(&mut self, link_id: LinkId, model: Digest) {
        if let Some(link) = self.links.get_mut(&link_id) {
            if link.delivered.len() >= limits::HELD_MAX {
                link.delivered.clear();
            }
            link.delivered.insert(model);
        }
    }

    /// Whether the worker was seen to have this model.
    pub(crate) fn has_delivered(&self, link_id: LinkId, model: Digest) -> bool {
        self.links.get(&link_id).is_some_and(|link| link.delivered.contains(&model))
    }

    /// Admits the worker's key at the listener.
    pub(crate) fn expect(&self, key: Option<PublicKey>) {
        if let Some(key) = key {
            self.admitted.insert(key);
        }
    }

    /// Registers a worker that dialled in. Its connection replaces any other to the same worker.
    pub(crate) fn dialled_in(&mut self, worker: WorkerId, peer: PeerId) -> Option<(LinkId, Outlet)> {
        let outlet = self.door.as_ref()?.to(peer);
        if let Some(old) = self.by_worker.get(&worker).copied() {
            self.drop_link(old);
        }
        let link_id = self.next_id();
        self.put(
            link_id,
            Link {
                worker,
                state: State::Up(outlet.clone()),
                task: None,
                used: Instant::now(),
                bytes_per_s: 0,
                delivered: BTreeSet::new(),
                later: Vec::new(),
            },
        );
        self.by_peer.insert(peer, link_id);
        Some((link_id, outlet))
    }

    /// The link of a peer at the listener.
    pub(crate) fn of_peer(&self, peer: PeerId) -> Option<LinkId> {
        self.by_peer.get(&peer).copied()
    }

    /// Sends without waiting. A message that cannot be sent is lost, as any message may be.
    pub(crate) fn send(&mut self, link_id: LinkId, frame: Frame) {
        let Some(link) = self.links.get_mut(&link_id) else { return };
        link.used = Instant::now();
        link.later.push(frame);
        link.say_all();
    }

    /// Sends a message with the next one, or at [`Self::later_due`]: it is not worth its own packet.
    pub(crate) fn send_later(&mut self, link_id: LinkId, frame: Frame) {
        let Some(link) = self.links.get_mut(&link_id) else { return };
        link.later.push(frame);
        if link.later.len() >= LATER_MAX {
            link.say_all();
        } else {
            self.later_due.get_or_insert_with(|| Instant::now() + LATER_WAIT);
        }
    }

    /// When to call [`Self::say_later`].
    pub(crate) fn later_due(&self) -> Option<Instant> {
        self.later_due
    }

    /// Sends the messages that still wait.
    pub(crate) fn say_later(&mut self) {
        self.later_due = None;
        self.links.values_mut().for_each(Link::say_all);
    }

    /// Forgets a link and closes it.
    pub(crate) fn drop_link(&mut self, link_id: LinkId) {
        if let Some(link) = self.links.remove(&link_id)
            && self.by_worker.get(&link.worker) == Some(&link_id)
        {
            self.by_worker.remove(&link.worker);
        }
        self.by_peer.retain(|_, of| *of != link_id);
    }

    /// Closes links that have been idle too long; `busy` tells whether attempts use a link.
    pub(crate) fn retire_idle(&mut self, busy: impl Fn(LinkId) -> bool) {
        let idle = |(id, link): (&LinkId, &Link)| {
            (link.used.elapsed() > IDLE_MAX && matches!(link.state, State::Up(_)) && !busy(*id)).then_some(*id)
        };
        let idle: Vec<LinkId> = self.links.iter().filter_map(idle).collect();
        for link_id in idle {
            self.drop_link(link_id);
        }
    }

    /// Closes all links after their queued messages have left.
    pub(crate) async fn close(&mut self) {
        self.say_later();
        let outlets = self.links.values().filter_map(|link| match &link.state {
            State::Up(outlet) => Some(outlet.clone()),
            State::Dialling(_) => None,
        });
        let closing: Vec<_> = outlets.map(|outlet| tokio::spawn(async move { outlet.close().await })).collect();
        let all = async {
            for task in closing {
                let _ = task.await;
            }
            if let Some(door) = &self.door {
                door.close().await;
            }
        };
        // A worker that does not read by now will notice the silence.
        let _ = tokio::time::timeout(CLOSE_WAIT, all).await;
        self.links.clear();
    }

    fn put(&mut self, link_id: LinkId, link: Link) {
        self.by_worker.insert(link.worker, link_id);
        self.links.insert(link_id, link);
    }

    fn next_id(&mut self) -> LinkId {
        self.made += 1;
        LinkId(self.made)
    }
}
