//! A TCP proxy between two nodes: on the test's command it counts, cuts, stalls and throttles.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};
use proto_msgs::{AttemptId, Frame, Phase, WorkerToClient};

use super::zmtp::{Passed, Reader};

/// Bytes read from a socket at once; also the granularity of [`Proxy::cut_after`].
const PIECE_BYTES: usize = 64 * 1024;

/// A side of the proxied connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// The side that connected.
    Dialler,
    /// The side that was connected to.
    Listener,
}

/// A message that went through.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Time at which its last byte arrived here.
    pub at: Instant,
    /// The side that sent it.
    pub from: Side,
    /// The message itself.
    pub message: Passed,
}

struct State {
    target: Option<SocketAddr>,
    stalled: bool,
    closed: bool,
    /// Limit of each side's messages.
    bytes_per_s: [Option<u64>; 2],
    /// All connections are cut when the dialler has sent this many bytes in total.
    cut_at: Option<u64>,
    /// The listener's messages are held back; ZeroMQ's own handshake is not.
    withholds: bool,
    /// New connections are refused.
    refuses: bool,
    sent: [u64; 2],
    seen: Vec<Seen>,
    streams: Vec<TcpStream>,
    connections: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }
}

/// A listener that forwards every connection to its target.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy({})", self.address)
    }
}

impl Proxy {
    /// A proxy on a free port of the loopback. Its target is set later.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback has a free port");
        let address = listener.local_addr().expect("just bound");
        let state = State {
            target: None,
            stalled: false,
            closed: false,
            bytes_per_s: [None; 2],
            cut_at: None,
            withholds: false,
            refuses: false,
            sent: [0, 0],
            seen: Vec::new(),
            streams: Vec::new(),
            connections: 0,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, &of_thread));
        Self { address, shared }
    }

    /// A proxy before `target` (`127.0.0.1:5555`, also with `tcp://` before it).
    pub fn before(target: &str) -> Self {
        let proxy = Self::start();
        proxy.lead_to(target);
        proxy
    }

    /// Sets the target. Connections that came earlier wait for it.
    pub fn lead_to(&self, target: &str) {
        let target = target.trim_start_matches("tcp://").parse().expect("an address and a port");
        self.shared.change(|state| state.target = Some(target));
    }

    /// The proxy's own address, `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// The proxy's own address as ZeroMQ writes it.
    pub fn endpoint(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Cuts all connections now. New ones are accepted.
    pub fn cut(&self) {
        self.shared.change(cut);
    }

    /// Cuts all connections once the dialling side has sent `bytes` more in total. New ones are accepted.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.change(|state| state.cut_at = Some(state.sent[Side::Dialler as usize] + bytes));
    }

    /// Whether a [`Self::cut_after`] has happened.
    pub fn has_cut(&self) -> bool {
        self.shared.state().cut_at.is_none()
    }

    /// Lets nothing through, without closing connections: a pulled cable.
    pub fn stall(&self) {
        self.shared.change(|state| state.stalled = true);
    }

    /// Undoes [`Self::stall`].
    pub fn resume(&self) {
        self.shared.change(|state| state.stalled = false);
    }

    /// Holds back the listener's messages until called with false. Connections can still be made.
    pub fn withhold_answers(&self, withholds: bool) {
        self.shared.change(|state| state.withholds = withholds);
    }

    /// Cuts all connections and refuses new ones, until called with false.
    pub fn refuse(&self, refuses: bool) {
        self.shared.change(|state| {
            state.refuses = refuses;
            if refuses {
                cut(state);
            }
        });
    }

    /// Limits each direction of each connection to this many bytes per second.
    pub fn throttle(&self, bytes_per_s: Option<u64>) {
        self.shared.change(|state| state.bytes_per_s = [bytes_per_s; 2]);
    }

    /// Limits only what comes from this side.
    pub fn throttle_from(&self, side: Side, bytes_per_s: u64) {
        self.shared.change(|state| state.bytes_per_s[side as usize] = Some(bytes_per_s));
    }

    /// Bytes that went through from this side.
    pub fn bytes_from(&self, side: Side) -> u64 {
        self.shared.state().sent[side as usize]
    }

    /// Number of connections so far.
    pub fn connections(&self) -> usize {
        self.shared.state().connections
    }

    /// The messages that went through, oldest first.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// The worker's messages to clients that went through, if this proxy stands before a worker's door.
    pub fn worker_said(&self) -> Vec<WorkerToClient> {
        let decode = |seen: &Seen| {
            let frame = Frame { head: seen.message.head.clone(), payload: Bytes::new() };
            WorkerToClient::from_frame(&frame).ok()
        };
        self.shared.state().seen.iter().filter(|seen| seen.from == Side::Listener).filter_map(decode).collect()
    }

    /// Whether the worker behind this proxy has reported this phase. It reports none that lasts less than 50 ms.
    pub fn worker_reached(&self, phase: Phase) -> bool {
        !self.attempts_in(phase).is_empty()
    }

    /// The attempts of which the worker behind this proxy has reported this phase.
    pub fn attempts_in(&self, phase: Phase) -> HashSet<AttemptId> {
        let id = |said: &WorkerToClient| match said {
            WorkerToClient::Progress(at) if at.phase == phase => Some(at.id),
            _ => None,
        };
        self.worker_said().iter().filter_map(id).collect()
    }

    /// Number of messages of this kind that went through.
    pub fn count(&self, kind: u16) -> usize {
        self.shared.state().seen.iter().filter(|seen| seen.message.kind == Some(kind)).count()
    }

    /// Payload bytes of all messages of this kind, for example of chunks.
    pub fn payload_bytes(&self, kind: u16) -> u64 {
        let state = self.shared.state();
        state.seen.iter().filter(|seen| seen.message.kind == Some(kind)).map(|seen| seen.message.payload_bytes).sum()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.closed = true;
            cut(state);
        });
        // Wakes the accepting thread, which then sees `closed`.
        drop(TcpStream::connect(self.address));
    }
}

fn cut(state: &mut State) {
    for stream in state.streams.drain(..) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for dialler in listener.incoming().flatten() {
        let mut state = shared.state();
        if state.closed {
            return;
        }
        if state.refuses {
            continue;
        }
        shared.changed.wait_while(&mut state, |state| state.target.is_none() && !state.closed);
        let target = state.target;
        drop(state);
        // If nobody listens, the dialler's connection ends at once.
        let Some(Ok(target)) = target.map(TcpStream::connect) else { continue };
        let _ = (dialler.set_nodelay(true), target.set_nodelay(true));
        let (Ok(dialler_too), Ok(target_too)) = (dialler.try_clone(), target.try_clone()) else { continue };
        shared.change(|state| {
            state.connections += 1;
            state.streams.extend([dialler.try_clone(), target.try_clone()].into_iter().flatten());
        });
        let (there, back) = (Arc::clone(shared), Arc::clone(shared));
        std::thread::spawn(move || pump(&there, Side::Dialler, dialler, target));
        std::thread::spawn(move || pump(&back, Side::Listener, target_too, dialler_too));
    }
}

/// Carries one direction of one connection until either end closes.
fn pump(shared: &Shared, from: Side, mut source: TcpStream, mut sink: TcpStream) {
    let mut reader = Reader::default();
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(length @ 1..) = source.read(&mut piece) {
        let mut state = shared.state();
        shared.changed.wait_while(&mut state, |state| state.stalled && !state.closed);
        let pause = state.bytes_per_s[from as usize].map(|rate| Duration::from_secs_f64(length as f64 / rate as f64));
        state.sent[from as usize] += length as u64;
        let at = Instant::now();
        let messages = reader.feed(&piece[..length]);
        if from == Side::Listener && !messages.is_empty() {
            shared.changed.wait_while(&mut state, |state| state.withholds && !state.closed);
        }
        state.seen.extend(messages.into_iter().map(|message| Seen { at, from, message }));
        if state.cut_at.is_some_and(|limit| state.sent[Side::Dialler as usize] >= limit) {
            state.cut_at = None;
            cut(&mut state);
        }
        drop(state);
        if let Some(pause) = pause {
            // Not a wait: this is the slow cable itself.
            std::thread::sleep(pause);
        }
        if sink.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    let _ = (source.shutdown(Shutdown::Both), sink.shutdown(Shutdown::Both));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo_server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut { stream }));
            }
        });
        address
    }

    #[test]
    fn passes_counts_and_cuts() {
        let proxy = Proxy::before(&echo_server().to_string());
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        stream.write_all(b"there and back").unwrap();
        let mut back = [0; 14];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"there and back");
        assert_eq!((proxy.bytes_from(Side::Dialler), proxy.bytes_from(Side::Listener)), (14, 14));

        proxy.cut();
        assert!(!matches!(stream.read(&mut back), Ok(1..)), "the connection should be gone");
    }
}
