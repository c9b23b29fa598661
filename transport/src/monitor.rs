//! Owns what libzmq reports about a dialled connection: when it is up, when it breaks, why it fails.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::{
    Context,
    socket::{HANDSHAKE_MS_MAX, Socket},
};

/// Attempts after which hanging up during the handshake counts as a refusal. A single one may be a peer that just ends.
const HANG_UPS: u32 = 2;

/// Length of a handshake from which on its end means that this side gave it up: the peer said nothing. It is less than
/// the limit that libzmq keeps, since the two events of a handshake may be read with different delays.
const SILENCE_MIN: Duration = Duration::from_millis(HANDSHAKE_MS_MAX as u64 / 2);

/// Why a peer that was reached cannot be used.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The key was refused.
    Key,
    /// The protocol differs; the text says what was seen.
    Protocol(String),
}

#[derive(Debug)]
pub(crate) struct Monitor {
    events: Socket,
    /// Whether there may be events to read.
    pub(crate) due: bool,
    /// Whether the connection is up.
    pub(crate) connected: bool,
    /// Number of lost connections; the reader resets it.
    pub(crate) losses: u32,
    /// Whether TCP connected, whatever came of the handshake.
    pub(crate) answered: bool,
    /// The time at which the last TCP connection was made.
    answered_at: Option<Instant>,
    /// Handshakes that the peer ended without a reason.
    hang_ups: u32,
    refusal: Option<Refused>,
}

#[derive(Clone, Copy, Debug)]
enum Refused {
    /// The peer's door-keeper does not admit the key.
    ByDoorkeeper,
    /// libzmq's number of a protocol error.
    Protocol(u32),
}

impl Monitor {
    /// Starts to watch a socket that is not connected yet.
    pub(crate) fn of(context: &Context, socket: &zmq::Socket) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let endpoint = format!("inproc://mesh.monitor.{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let watched = [
            zmq::SocketEvent::CONNECTED,
            zmq::SocketEvent::DISCONNECTED,
            zmq::SocketEvent::HANDSHAKE_SUCCEEDED,
            zmq::SocketEvent::HANDSHAKE_FAILED_NO_DETAIL,
            zmq::SocketEvent::HANDSHAKE_FAILED_PROTOCOL,
            zmq::SocketEvent::HANDSHAKE_FAILED_AUTH,
        ];
        socket.monitor(&endpoint, watched.iter().fold(0, |mask, event| mask | i32::from(event.to_raw())))?;
        let events = context.inner().socket(zmq::PAIR)?;
        events.set_linger(0)?;
        // Unbounded, since a full queue would stop libzmq's thread. A connection makes a few events per second at most.
        events.set_rcvhwm(0)?;
        events.connect(&endpoint)?;
        Ok(Self {
            events: Socket::new(events)?,
            due: true,
            connected: false,
            losses: 0,
            answered: false,
            answered_at: None,
            hang_ups: 0,
            refusal: None,
        })
    }

    /// Reads all events if there may be any.
    pub(crate) fn look(&mut self) {
        while self.due {
            // First number and value of the event, then the address, which is known.
            let Some(event) = self.events.take_part() else {
                self.due = false;
                return;
            };
            let (true, &[a, b, c, d, e, f]) = (event.more(), event.as_ref()) else { continue };
            self.note(u16::from_ne_bytes([a, b]), u32::from_ne_bytes([c, d, e, f]));
        }
    }

    /// Waits until there may be events to read.
    pub(crate) async fn ready(&mut self) {
        self.events.ready(true, false).await;
        self.due = true;
    }

    /// The result of the attempts to connect; `None` while they may still succeed.
    pub(crate) fn verdict(&self, encrypted: bool) -> Option<Result<(), Refusal>> {
        if self.connected {
            return Some(Ok(()));
        }
        match self.refusal {
            Some(Refused::ByDoorkeeper) => Some(Err(Refusal::Key)),
            Some(Refused::Protocol(number)) => Some(Err(Refusal::Protocol(format!("protocol error {number:#x}")))),
            // A listener that cannot open what was sealed for another key hangs up without a reason.
            None if self.hang_ups >= HANG_UPS && encrypted => Some(Err(Refusal::Key)),
            None if self.hang_ups >= HANG_UPS => {
                Some(Err(Refusal::Protocol("it hangs up during the handshake".into())))
            }
            None => None,
        }
    }

    fn note(&mut self, event: u16, value: u32) {
        const CONNECTED: u16 = zmq::SocketEvent::CONNECTED as u16;
        const DISCONNECTED: u16 = zmq::SocketEvent::DISCONNECTED as u16;
        const SUCCEEDED: u16 = zmq::SocketEvent::HANDSHAKE_SUCCEEDED as u16;
        const NO_DETAIL: u16 = zmq::SocketEvent::HANDSHAKE_FAILED_NO_DETAIL as u16;
        const PROTOCOL: u16 = zmq::SocketEvent::HANDSHAKE_FAILED_PROTOCOL as u16;
        const AUTH: u16 = zmq::SocketEvent::HANDSHAKE_FAILED_AUTH as u16;
        match event {
            CONNECTED => {
                self.answered = true;
                self.answered_at = Some(Instant::now());
            }
            SUCCEEDED => {
                self.connected = true;
                self.hang_ups = 0;
                self.refusal = None;
            }
            DISCONNECTED if self.connected => {
                self.connected = false;
                self.losses += 1;
            }
            // A peer that says nothing may stand still: it is waited for.
            NO_DETAIL if self.answered_at.is_some_and(|at| at.elapsed() >= SILENCE_MIN) => {}
            NO_DETAIL => self.hang_ups += 1,
            PROTOCOL => self.refusal = Some(Refused::Protocol(value)),
            AUTH => self.refusal = Some(Refused::ByDoorkeeper),
            _ => {}
        }
        tracing::trace!(event, value, "connection event");
    }
}
