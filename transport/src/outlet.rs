//! A socket in its many-task form: a bounded queue per peer in front, a bounded inbox behind, one task that owns the
//! socket.
//!
//! Owns that task (the pump) and the state that it shares with [`Outlet`]s. Never: messages' meanings.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::pin,
    sync::Arc,
    time::Instant,
};

use parking_lot::{Mutex, MutexGuard};
use proto_msgs::{Frame, PeerId};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

use crate::{
    Limits, Traffic,
    direct::{CLOSE_WAIT, Direct},
    queue::Queue,
    socket::the_peer,
};

/// Messages taken from a socket, or sent to one peer, before others have their turn.
const BATCH: usize = 64;

/// Messages that wait in an inbox before peers are no longer read.
const INBOX_FRAMES: usize = 64;

/// Why a message was not sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SendError {
    /// The connection no longer exists.
    #[error("the peer is gone")]
    Gone,
    /// The peer is too slow: its queue is full.
    #[error("the peer's queue is full")]
    Full,
}

/// A listener that is run by its own task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Door {
    endpoint: Arc<str>,
    shared: Arc<Shared>,
}

impl Door {
    pub(crate) fn new(endpoint: String, shared: Arc<Shared>) -> Self {
        Self { endpoint: endpoint.into(), shared }
    }

    /// The bound address with the actual port.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// An outlet to one of the listener's peers.
    pub fn to(&self, peer: PeerId) -> Outlet {
        Outlet::new(&self.shared, peer, false)
    }

    /// Counters of this socket.
    pub fn traffic(&self) -> Traffic {
        self.shared.traffic()
    }

    /// Waits a moment for queued messages to leave, then closes the socket.
    pub async fn close(&self) {
        self.shared.close().await;
    }
}

/// The sending side of a connection to one peer, whichever side dialled. Cheap to clone.
#[derive(Debug)]
pub struct Outlet {
    shared: Arc<Shared>,
    peer: PeerId,
    room: Arc<Notify>,
    dialled: bool,
}

impl Outlet {
    pub(crate) fn new(shared: &Arc<Shared>, peer: PeerId, dialled: bool) -> Self {
        let room = {
            let mut state = shared.state();
            let entry = state.entries.entry(peer).or_default();
            entry.outlets += 1;
            Arc::clone(&entry.room)
        };
        Self { shared: Arc::clone(shared), peer, room, dialled }
    }

    /// Sends without waiting.
    ///
    /// # Errors
    /// `Full` if the peer's queue is full, `Gone` if the peer or the socket is gone.
    pub fn try_send(&self, frame: Frame) -> Result<(), SendError> {
        let mut state = self.shared.state();
        let sent = state.push(self.peer, frame, &self.shared.limits);
        match sent {
            Ok(()) => self.shared.wake.notify_one(),
            Err(SendError::Full) => state.traffic.dropped_full += 1,
            Err(SendError::Gone) => state.traffic.dropped_gone += 1,
        }
        sent
    }

    /// Sends, and waits for room in this peer's queue. Other peers are not delayed.
    ///
    /// # Errors
    /// `Gone` if the peer or the socket is gone.
    pub async fn send(&self, frame: Frame) -> Result<(), SendError> {
        loop {
            // Registered before looking, so that room made in between is not missed.
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            {
                let mut state = self.shared.state();
                if state.has_room(self.peer, &frame, &self.shared.limits) {
                    let sent = state.push(self.peer, frame, &self.shared.limits);
                    self.shared.wake.notify_one();
                    return sent;
                }
            }
            room.await;
        }
    }

    /// Waits a moment for this peer's queued messages to leave. If the peer was dialled, closes the socket.
    pub async fn close(&self) {
        if self.dialled {
            return self.shared.close().await;
        }
        let emptied = async {
            loop {
                let mut room = pin!(self.room.notified());
                room.as_mut().enable();
                if self.shared.state().is_idle(self.peer) {
                    return;
                }
                room.await;
            }
        };
        let _ = timeout(CLOSE_WAIT, emptied).await; // A slow peer loses the rest.
    }
}

impl Clone for Outlet {
    fn clone(&self) -> Self {
        Self::new(&self.shared, self.peer, self.dialled)
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(entry) = state.entries.get_mut(&self.peer) {
            entry.outlets -= 1;
        }
        state.forget_if_unused(self.peer);
    }
}

/// Messages that arrive at a socket run by its own task. Dropping it closes the socket.
#[derive(Debug)]
pub struct Inbox<T>(mpsc::Receiver<T>);

impl<T> Inbox<T> {
    /// The next item; `None` once the socket is closed.
    pub async fn recv(&mut self) -> Option<T> {
        self.0.recv().await
    }

    /// The next item if it has already arrived.
    pub fn try_recv(&mut self) -> Option<T> {
        self.0.try_recv().ok()
    }
}

/// A socket as the pump sees it.
pub(crate) trait End: Send + 'static {
    /// Type of the arriving items.
    type Item: Send + 'static;

    /// The next item if it has already arrived.
    fn take(&mut self) -> Option<Self::Item>;

    /// The direct form, from before the pump. The pump uses its socket, and never its queues.
    fn direct(&mut self) -> &mut Direct;

    /// Waits until `take` (if `wanted`) may return an item or, with messages `blocked`, the socket may accept one.
    fn ready(&mut self, wanted: bool, blocked: bool) -> impl Future<Output = ()> + Send;
}

/// State that the pump shares with its outlets.
#[derive(Debug)]
pub(crate) struct Shared {
    limits: Limits,
    state: Mutex<State>,
    /// Notified when the pump has something to do.
    wake: Notify,
    /// Notified when the pump has ended.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<PeerId, Entry>,
    /// Peers with waiting messages, each once, in turn.
    waiting: VecDeque<PeerId>,
    traffic: Traffic,
    closing: bool,
    closed: bool,
}

/// State of one peer.
#[derive(Debug, Default)]
struct Entry {
    queue: Queue,
    outlets: usize,
    gone: bool,
    room: Arc<Notify>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn traffic(&self) -> Traffic {
        let state = self.state();
        let waiting = state.entries.values().map(|entry| entry.queue.len() as u64).sum();
        Traffic { waiting, ..state.traffic }
    }

    async fn close(&self) {
        self.state().closing = true;
        self.wake.notify_one();
        loop {
            let mut ended = pin!(self.ended.notified());
            ended.as_mut().enable();
            if self.state().closed {
                return;
            }
            ended.await;
        }
    }
}

impl State {
    fn push(&mut self, peer: PeerId, frame: Frame, limits: &Limits) -> Result<(), SendError> {
        if self.closed || self.closing {
            return Err(SendError::Gone);
        }
        let entry = self.entries.entry(peer).or_default();
        if entry.gone {
            return Err(SendError::Gone);
        }
        let first = entry.queue.is_empty();
        entry.queue.push(frame, limits)?;
        if first {
            self.waiting.push_back(peer);
        }
        Ok(())
    }

    /// Whether `push` would not return `Full`.
    fn has_room(&self, peer: PeerId, frame: &Frame, limits: &Limits) -> bool {
        let entry = self.entries.get(&peer);
        self.closed || self.closing || entry.is_none_or(|entry| entry.gone || entry.queue.has_room(frame, limits))
    }

    fn is_idle(&self, peer: PeerId) -> bool {
        self.closed || self.entries.get(&peer).is_none_or(|entry| entry.queue.is_empty())
    }

    fn forget_if_unused(&mut self, peer: PeerId) {
        if self.entries.get(&peer).is_some_and(|entry| entry.outlets == 0 && entry.queue.is_empty()) {
            self.entries.remove(&peer);
        }
    }

    /// Gives each waiting peer its turn. Returns whether messages are left that libzmq has no room for, and whether
    /// peers are left that used up their turn.
    fn carry(&mut self, end: &mut impl End) -> (bool, bool) {
        let (mut blocked, mut unfinished) = (false, false);
        for _ in 0..self.waiting.len() {
            let Some(peer) = self.waiting.pop_front() else { break };
            let Some(entry) = self.entries.get_mut(&peer) else { continue };
            match entry.queue.drain(BATCH, |frame| end.direct().socket.offer(&peer, frame)) {
                Ok(sent) => {
                    self.traffic.sent += sent as u64;
                    if !entry.queue.is_empty() {
                        self.waiting.push_back(peer);
                        blocked |= sent < BATCH;
                        unfinished |= sent == BATCH;
                    }
                    if sent > 0 {
                        entry.room.notify_waiters();
                    }
                }
                Err(_) => {
                    self.traffic.dropped_gone += entry.queue.len() as u64;
                    entry.queue = Queue::default();
                    entry.gone = true;
                    entry.room.notify_waiters();
                }
            }
            self.forget_if_unused(peer);
        }
        (blocked, unfinished)
    }
}

/// Marks the end of the pump, however it ends.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        state.waiting.clear();
        for entry in state.entries.values_mut() {
            entry.queue = Queue::default();
            entry.room.notify_waiters();
        }
        self.0.ended.notify_waiters();
    }
}

/// Starts the pump, the task that owns the socket.
pub(crate) fn spawn<E: End>(mut end: E) -> (Arc<Shared>, Inbox<E::Item>) {
    let direct = end.direct();
    let (limits, mut state) = (direct.limits, State { traffic: direct.traffic, ..State::default() });
    for (peer, queue) in direct.take_waiting() {
        state.waiting.push_back(peer);
        state.entries.insert(peer, Entry { queue, ..Entry::default() });
    }
    let shared = Arc::new(Shared { limits, state: Mutex::new(state), wake: Notify::new(), ended: Notify::new() });
    let (sender, receiver) = mpsc::channel(INBOX_FRAMES);
    tokio::spawn(pump(end, Arc::clone(&shared), sender));
    (shared, Inbox(receiver))
}

/// Starts the pump of a dialer's socket.
pub(crate) fn spawn_dialled<E: End>(end: E) -> (Outlet, Inbox<E::Item>) {
    let (shared, inbox) = spawn(end);
    (Outlet::new(&shared, the_peer(), true), inbox)
}

async fn pump<E: End>(mut end: E, shared: Arc<Shared>, inbox: mpsc::Sender<E::Item>) {
    let ending = Ending(Arc::clone(&shared));
    loop {
        let taken = take_batch(&mut end, &inbox);
        let (blocked, unfinished) = {
            let mut state = shared.state();
            state.traffic.received += taken as u64;
            state.traffic.malformed = end.direct().traffic.malformed;
            if state.closing || inbox.is_closed() {
                break;
            }
            state.carry(&mut end)
        };
        if taken == BATCH || unfinished {
            tokio::task::yield_now().await;
            continue;
        }
        let full = inbox.capacity() == 0;
        tokio::select! {
            () = shared.wake.notified() => {}
            () = end.ready(!full, blocked), if !full || blocked => {}
            _ = inbox.reserve(), if full => {}
            () = inbox.closed(), if !full => {}
        }
    }
    send_the_rest(&mut end, &shared).await;
    // Messages that libzmq has taken leave in the background.
    end.direct().socket.linger();
    drop(end);
    drop(ending);
}

/// Moves arrived items into the inbox while it has room. Returns their number.
fn take_batch<E: End>(end: &mut E, inbox: &mpsc::Sender<E::Item>) -> usize {
    for taken in 0..BATCH {
        let Ok(place) = inbox.try_reserve() else { return taken };
        let Some(item) = end.take() else { return taken };
        place.send(item);
    }
    BATCH
}

/// Sends queued messages before the socket closes, if the peers take them soon.
async fn send_the_rest<E: End>(end: &mut E, shared: &Shared) {
    shared.state().closing = true;
    let until = Instant::now() + CLOSE_WAIT;
    loop {
        let (blocked, unfinished) = shared.state().carry(end);
        let left = until.saturating_duration_since(Instant::now());
        if !(blocked || unfinished) || left.is_zero() || timeout(left, end.ready(false, true)).await.is_err() {
            return;
        }
    }
}
