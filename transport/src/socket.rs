//! A libzmq socket that waits through tokio.
//!
//! libzmq's descriptor means "look again", not "readable". It signals once (an edge), and *any* send, receive or look
//! may consume that edge. The rule that loses no message: sleep only if the very last operation was a look that found
//! nothing (an empty receive counts), and look again after waking.
//!
//! Owns that rule, the assembly of a frame from parts, socket options. Never: queues, who is admitted.

use std::{ffi::CString, io, os::fd::RawFd, time::Duration};

use proto_msgs::{Frame, PeerId, PublicKey};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    KeyPair, Limits, SendError, keys,
    raw::{self, Errno, Part},
};

/// How long a message to one slow peer of a ROUTER may be overlooked. `ZMQ_EVENTS` says only that *some* peer can take
/// a message, so a send to another peer may consume this one's edge. That is rare, so a slow retry costs nothing.
const BLOCKED_RETRY: Duration = Duration::from_millis(2);

/// Time for a new connection to complete its handshake: three round trips of a bad link and the door-keeper's answer.
pub(crate) const HANDSHAKE_MS_MAX: i32 = 3000;

/// First and longest pause between attempts to reconnect. With two seconds a returning broker is found before anyone
/// gives it up, and ten thousand nodes do not overrun it.
const RECONNECT_MS: (i32, i32) = (100, 2000);

/// Time after which an unanswered attempt to connect is ended and repeated.
const CONNECT_MS_MAX: i32 = 3000;

/// Connections that may wait to be accepted: a whole mesh may come back at once.
const BACKLOG: i32 = 1024;

/// Time for messages that libzmq has taken to leave in the background after a proper close.
const LINGER_MS: i32 = 500;

/// A received message, or what came instead.
pub(crate) enum Taken {
    /// A whole message.
    Frame { peer: PeerId, key: Option<PublicKey>, frame: Frame },
    /// Parts that are not a message of the mesh.
    Malformed,
}

pub(crate) struct Socket {
    // Dropped first: the descriptor belongs to the socket.
    fd: AsyncFd<RawFd>,
    inner: zmq::Socket,
    router: bool,
    /// Peers are admitted by key, and each message carries its peer's key.
    keyed: bool,
    /// The last operation was a receive that found nothing, so the descriptor's next edge is still to come.
    looked: bool,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("router", &self.router).finish_non_exhaustive()
    }
}

impl Socket {
    /// Registers the socket with tokio.
    pub(crate) fn new(inner: zmq::Socket) -> io::Result<Self> {
        let router = inner.get_socket_type()? == zmq::ROUTER;
        let fd = inner.get_fd()?;
        // SAFETY: the descriptor is open as long as `inner` is, and is deregistered before (order of the fields).
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        let keyed = inner.is_curve_server()?;
        Ok(Self { fd, inner, router, keyed, looked: false })
    }

    /// The next message if it has already arrived.
    pub(crate) fn take(&mut self) -> Option<Taken> {
        let mut part = self.take_part()?;
        let peer = if self.router {
            let peer = PeerId::from_slice(part.as_ref());
            if !part.more() {
                return Some(Taken::Malformed);
            }
            // The parts of one message arrive together.
            if part.recv(&mut self.inner).is_err() {
                return Some(Taken::Malformed);
            }
            peer
        } else {
            Some(the_peer())
        };
        let key = if self.keyed { part.user_id().and_then(|text| keys::parse(text).ok()) } else { None };
        let mut more = part.more();
        let head = part.into_bytes();
        let mut payload = bytes::Bytes::new();
        if more {
            let mut part = Part::new();
            if part.recv(&mut self.inner).is_err() {
                return Some(Taken::Malformed);
            }
            more = part.more();
            payload = part.into_bytes();
        }
        match peer {
            Some(peer) if !more => Some(Taken::Frame { peer, key, frame: Frame { head, payload } }),
            _ => {
                self.skip_parts(more);
                Some(Taken::Malformed)
            }
        }
    }

    /// Reads a message to its end and drops it.
    fn skip_parts(&mut self, mut more: bool) {
        let mut part = Part::new();
        while more && part.recv(&mut self.inner).is_ok() {
            more = part.more();
        }
    }

    /// The next part, whatever it is; for the monitor.
    pub(crate) fn take_part(&mut self) -> Option<Part> {
        let mut part = Part::new();
        let taken = part.recv(&mut self.inner).is_ok();
        self.looked = !taken;
        taken.then_some(part)
    }

    /// Sends a message if the peer's queue has room.
    pub(crate) fn offer(&mut self, peer: &PeerId, frame: &Frame) -> Result<(), SendError> {
        self.looked = false;
        let mut head = Part::sharing(&frame.head).ok_or(SendError::Full)?;
        let payload = match frame.payload.is_empty() {
            true => None,
            false => Some(Part::sharing(&frame.payload).ok_or(SendError::Full)?),
        };
        if self.router {
            let mut name = Part::copy_of(peer.as_slice()).ok_or(SendError::Full)?;
            self.send_first(&mut name, true)?;
            head.send(&mut self.inner, payload.is_some()).map_err(refusal)?;
        } else {
            self.send_first(&mut head, payload.is_some())?;
        }
        match payload {
            Some(mut payload) => payload.send(&mut self.inner, false).map_err(refusal),
            None => Ok(()),
        }
    }

    /// Sends the first part, which decides whether libzmq takes the message.
    fn send_first(&mut self, part: &mut Part, more: bool) -> Result<(), SendError> {
        match part.send(&mut self.inner, more) {
            Err(libc::EAGAIN) => {
                // libzmq checks for new room only now and then while it sends; `get_events` makes it check.
                let _ = self.inner.get_events();
                part.send(&mut self.inner, more).map_err(refusal)
            }
            sent => sent.map_err(refusal),
        }
    }

    /// Waits until [`Self::take`] (if `wanted`) may return a message or, with messages `blocked`, [`Self::offer`] may
    /// accept one.
    pub(crate) async fn ready(&mut self, wanted: bool, blocked: bool) {
        loop {
            if wanted && !blocked {
                if self.looked {
                    self.edge().await;
                }
                return;
            }
            self.looked = false;
            let events = self.inner.get_events().unwrap_or(zmq::PollEvents::empty());
            let can_take = wanted && events.contains(zmq::POLLIN);
            if can_take || (blocked && !self.router && events.contains(zmq::POLLOUT)) {
                return;
            }
            if blocked && self.router {
                let _ = timeout(BLOCKED_RETRY, self.edge()).await; // The caller tries again in any case.
                return;
            }
            self.edge().await;
        }
    }

    /// Waits for the descriptor.
    async fn edge(&mut self) {
        match self.fd.readable().await {
            Ok(mut guard) => guard.clear_ready(),
            // Only during the runtime's shutdown: this task will not be polled again.
            Err(_) => std::future::pending().await,
        }
        self.looked = false;
    }

    /// Lets messages that libzmq has taken leave in the background after the socket is dropped.
    pub(crate) fn linger(&self) {
        let _ = self.inner.set_linger(LINGER_MS); // If it fails, the old value stays.
    }

    /// Stops the events of this socket's connections.
    pub(crate) fn unwatch(&mut self) {
        raw::unwatch(&mut self.inner);
    }
}

/// The name of a DEALER's only peer.
pub(crate) fn the_peer() -> PeerId {
    PeerId::from_slice(&[]).expect("an empty name is short enough")
}

fn refusal(errno: Errno) -> SendError {
    if errno == libc::EHOSTUNREACH { SendError::Gone } else { SendError::Full }
}

/// Sets the options of both kinds of sockets.
pub(crate) fn configure(socket: &zmq::Socket, limits: &Limits) -> zmq::Result<()> {
    socket.set_linger(0)?;
    socket.set_ipv6(true)?;
    // For each part. How many parts a message may have is built into libzmq (`transport/zeromq-src`).
    socket.set_maxmsgsize(limits.part_bytes_max as i64)?;
    socket.set_rcvhwm(limits.queue_frames.into())?;
    socket.set_sndhwm(limits.queue_frames.into())?;
    socket.set_handshake_ivl(HANDSHAKE_MS_MAX)?;
    socket.set_heartbeat_timeout(limits.silence_ms_max.into())?;
    // The other side also closes when it hears nothing for this long, without having to ping.
    socket.set_heartbeat_ttl(limits.silence_ms_max.into())?;
    socket.set_tcp_keepalive(1)?;
    socket.set_tcp_keepalive_idle(30)?;
    Ok(())
}

/// Sets the options of a listener.
pub(crate) fn configure_listener(socket: &zmq::Socket) -> zmq::Result<()> {
    socket.set_router_mandatory(true)?;
    socket.set_router_handover(false)?;
    socket.set_backlog(BACKLOG)
}

/// Sets the options of a dialer.
pub(crate) fn configure_dialer(socket: &zmq::Socket, limits: &Limits) -> zmq::Result<()> {
    // No queue before the connection is up, and none that outlives it: messages are meant for one connection.
    socket.set_immediate(true)?;
    // Dialers ping, listeners answer: half the traffic, and both notice a dead connection.
    socket.set_heartbeat_ivl(limits.ping_every_ms.into())?;
    socket.set_connect_timeout(CONNECT_MS_MAX)?;
    socket.set_reconnect_ivl(RECONNECT_MS.0)?;
    socket.set_reconnect_ivl_max(RECONNECT_MS.1)
}

/// Makes the socket a CURVE server.
pub(crate) fn protect_listener(socket: &zmq::Socket, keys: &KeyPair, domain: &str) -> zmq::Result<()> {
    socket.set_curve_server(true)?;
    socket.set_curve_secretkey(keys.secret())?;
    socket.set_zap_domain(domain)
}

/// Makes the socket a CURVE client of the server that holds `their_key`.
pub(crate) fn protect_dialer(socket: &zmq::Socket, keys: &KeyPair, their_key: &PublicKey) -> zmq::Result<()> {
    socket.set_curve_publickey(&keys.public().0)?;
    socket.set_curve_secretkey(keys.secret())?;
    socket.set_curve_serverkey(&their_key.0)
}

/// Calls `zmq_bind`. (The `zmq` crate panics on some of the system's errors.)
pub(crate) fn bind(socket: &mut zmq::Socket, endpoint: &str) -> Result<(), Errno> {
    let endpoint = CString::new(endpoint).map_err(|_| libc::EINVAL)?;
    // SAFETY: both pointers are valid for the call.
    let bound = unsafe { zmq_sys::zmq_bind(socket.as_mut_ptr(), endpoint.as_ptr()) };
    if bound < 0 { Err(raw::errno()) } else { Ok(()) }
}

/// Calls `zmq_connect`.
pub(crate) fn connect(socket: &mut zmq::Socket, endpoint: &str) -> Result<(), Errno> {
    let endpoint = CString::new(endpoint).map_err(|_| libc::EINVAL)?;
    // SAFETY: both pointers are valid for the call.
    let connected = unsafe { zmq_sys::zmq_connect(socket.as_mut_ptr(), endpoint.as_ptr()) };
    if connected < 0 { Err(raw::errno()) } else { Ok(()) }
}
