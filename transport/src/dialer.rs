//! Owns a connecting socket: one peer, dialled by this node.

use std::time::Duration;

use proto_msgs::{Frame, PublicKey};
use tokio::{
    net::TcpStream,
    task::{JoinSet, coop::consume_budget},
    time::{sleep, timeout},
};

use crate::{
    Context, Inbox, Limits, Outlet, SendError, Traffic, address,
    direct::Direct,
    monitor::{Monitor, Refusal},
    outlet::{self, End},
    raw,
    socket::{self, Socket, the_peer},
};

/// Head start of an address before the next one is tried, too: longer than a connection within one site takes.
const HEAD_START: Duration = Duration::from_millis(200);

/// Time for the system to say why an address cannot be reached.
const PROBE_WAIT: Duration = Duration::from_millis(300);

/// What is said of a peer whose system accepts connections, but which does not take part in the handshake.
const SILENT: &str = "it accepts connections but does not answer; check that a program of the mesh listens there, and is not paused or overloaded";

/// A connected DEALER.
#[derive(Debug)]
pub struct Dialer {
    direct: Direct,
    monitor: Monitor,
    endpoint: String,
    encrypted: bool,
    /// The last reported change was `Connected`.
    told_connected: bool,
    /// `Refused` was reported since the last connection.
    told_refused: bool,
}

/// An event on a dialled connection.
#[derive(Clone, Debug)]
pub enum Heard {
    /// The peer sent this message.
    Frame(Frame),
    /// The connection is up. After a [`Heard::Lost`] this is a new connection, and the peer knows nothing about it.
    Connected,
    /// The connection broke and is being made again, unless the peer broke the protocol or a limit: such a peer is cut
    /// off and not dialled again by this dialer. Queued messages that were not sent may be lost.
    Lost,
    /// The peer was found again and refuses this node's key, or does not hold the expected one. libzmq does not dial a
    /// peer again whose door-keeper has refused the key: who wants to come back needs a new dialer.
    Refused,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// No answer came in time.
    #[error("no answer from {endpoint} within {} ms: {detail}", within.as_millis())]
    Unreachable {
        /// The address tried.
        endpoint: String,
        /// How long was waited.
        within: Duration,
        /// What was seen meanwhile, and what to check.
        detail: String,
    },
    /// The peer does not admit this node's key, or does not hold the expected key.
    #[error("{endpoint} refused the connection: this node's key is not authorized there, or the peer has another key")]
    KeyRefused {
        /// The address tried.
        endpoint: String,
    },
    /// A program answers, but it is not a node of this mesh.
    #[error("{endpoint} is not a node of this mesh, or one side uses keys and the other does not ({detail})")]
    NotMesh {
        /// The address tried.
        endpoint: String,
        /// What was seen.
        detail: String,
    },
    /// The endpoint is not an address.
    #[error("{endpoint} cannot be dialled: {reason}")]
    BadAddress {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The peer has no address.
    #[error("the peer has no address to dial")]
    NoAddress,
    /// Only one side has a key.
    #[error("{endpoint} cannot be dialled: {reason}")]
    KeyMissing {
        /// Which side lacks the key.
        endpoint: String,
        /// Which key is missing where.
        reason: String,
    },
}

impl Dialer {
    pub(crate) fn connect(
        context: &Context,
        endpoint: &str,
        their_key: Option<PublicKey>,
        limits: Limits,
    ) -> Result<Self, DialError> {
        let bad = |reason: String| DialError::BadAddress { endpoint: endpoint.to_owned(), reason };
        let missing = |reason: &str| DialError::KeyMissing { endpoint: endpoint.to_owned(), reason: reason.into() };
        let system = |error: zmq::Error| bad(error.to_string());
        if !address::can_be_dialled(endpoint) {
            return Err(bad(address::FORM.into()));
        }
        let mut inner = context.inner().socket(zmq::DEALER).map_err(system)?;
        socket::configure(&inner, &limits).map_err(system)?;
        socket::configure_dialer(&inner, &limits).map_err(system)?;
        match (context.protection(), their_key) {
            (None, None) => {}
            (Some((keys, _)), Some(theirs)) => socket::protect_dialer(&inner, keys, &theirs).map_err(system)?,
            (Some(_), None) => return Err(missing("this node has keys, but the peer's public key is not known")),
            (None, Some(_)) => return Err(missing("the peer has a key, but this node was started without one")),
        }
        let monitor = Monitor::of(context, &inner).map_err(|error| bad(error.to_string()))?;
        socket::connect(&mut inner, endpoint).map_err(|errno| bad(raw::text_of(errno)))?;
        let socket = Socket::new(inner).map_err(|error| bad(error.to_string()))?;
        Ok(Self {
            direct: Direct::new(socket, limits),
            monitor,
            endpoint: endpoint.to_owned(),
            encrypted: their_key.is_some(),
            told_connected: false,
            told_refused: false,
        })
    }

    /// The address dialled.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Waits until the connection is up, handshake included.
    ///
    /// # Errors
    /// If it is not up within this time; at once if the peer refuses.
    pub async fn connected(&mut self, within: Duration) -> Result<(), DialError> {
        let waited = timeout(within, async {
            loop {
                self.monitor.look();
                match self.monitor.verdict(self.encrypted) {
                    Some(verdict) => return verdict,
                    None => self.monitor.ready().await,
                }
            }
        });
        let detail = match waited.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(Refusal::Key)) => return Err(DialError::KeyRefused { endpoint: self.endpoint.clone() }),
            Ok(Err(Refusal::Protocol(detail))) => detail,
            Err(_) => {
                let (endpoint, detail) =
                    (self.endpoint.clone(), why_unreachable(&self.endpoint, self.monitor.answered).await);
                return Err(DialError::Unreachable { endpoint, within, detail });
            }
        };
        Err(DialError::NotMesh { endpoint: self.endpoint.clone(), detail })
    }

    /// The next message or change of the connection. Cancel-safe: may be dropped in a `select!`.
    pub async fn recv(&mut self) -> Heard {
        loop {
            consume_budget().await;
            if let Some(heard) = self.hear() {
                return heard;
            }
            self.direct.flush();
            let blocked = self.direct.is_blocked();
            self.wait(true, blocked).await;
        }
    }

    /// The next message if it has already arrived.
    pub fn try_recv(&mut self) -> Option<Frame> {
        self.direct.take().map(|(_, _, frame)| frame)
    }

    /// Sends without blocking. If the peer is slow, the message waits in a bounded queue.
    ///
    /// # Errors
    /// `Full` if that queue is full. The message is dropped and counted.
    pub fn send(&mut self, frame: Frame) -> Result<(), SendError> {
        self.direct.send(the_peer(), frame)
    }

    /// Counters of this socket.
    pub fn traffic(&self) -> Traffic {
        self.direct.traffic
    }

    /// Hands the socket to its own task. The socket closes when the inbox is dropped.
    pub fn spawn(self) -> (Outlet, Inbox<Heard>) {
        outlet::spawn_dialled(self)
    }

    /// Waits a moment for queued messages to leave, then closes the socket.
    pub async fn close(mut self) {
        self.direct.close().await;
    }

    /// Reports changes of the connection before messages: a message arrives on a connection that is up.
    fn hear(&mut self) -> Option<Heard> {
        self.monitor.look();
        if self.told_connected && self.monitor.losses > 0 {
            self.monitor.losses = 0;
            self.told_connected = false;
            return Some(Heard::Lost);
        }
        if !self.told_connected && self.monitor.connected {
            self.monitor.losses = 0;
            (self.told_connected, self.told_refused) = (true, false);
            return Some(Heard::Connected);
        }
        let verdict = || self.monitor.verdict(self.encrypted);
        if !self.told_connected && !self.told_refused && matches!(verdict(), Some(Err(Refusal::Key))) {
            self.told_refused = true;
            return Some(Heard::Refused);
        }
        self.try_recv().map(Heard::Frame)
    }

    async fn wait(&mut self, wanted: bool, blocked: bool) {
        tokio::select! {
            () = self.direct.socket.ready(wanted, blocked) => self.monitor.due = true,
            () = self.monitor.ready() => {}
        }
    }
}

impl End for Dialer {
    type Item = Heard;

    fn take(&mut self) -> Option<Heard> {
        self.hear()
    }

    fn direct(&mut self) -> &mut Direct {
        &mut self.direct
    }

    async fn ready(&mut self, wanted: bool, blocked: bool) {
        self.wait(wanted, blocked).await;
    }
}

impl Drop for Dialer {
    /// Stops the events before their reader goes. libzmq's thread writes events with a send that blocks for ever
    /// without a reader, and with it every socket of the context.
    fn drop(&mut self) {
        self.direct.socket.unwatch();
    }
}

/// Why there is no connection in time. libzmq does not tell: a plain TCP connect gives the system's reason.
async fn why_unreachable(endpoint: &str, has_answered: bool) -> String {
    let seen = match timeout(PROBE_WAIT, TcpStream::connect(address::host_and_port(endpoint))).await {
        // A process that stands still is connected by its system.
        Ok(Ok(_)) => return SILENT.to_owned(),
        _ if has_answered => return SILENT.to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no packet comes back".to_owned(),
    };
    format!("{seen}; check that the program runs there and that no firewall is between")
}

/// Dials several addresses of one peer, each a little ahead of the next, and keeps the first that connects. The
/// returned dialer is connected.
///
/// # Errors
/// If no address connects within this time: the error of the first address.
pub async fn dial_first(
    context: &Context,
    endpoints: &[String],
    their_key: Option<PublicKey>,
    limits: Limits,
    within: Duration,
) -> Result<Dialer, DialError> {
    let mut attempts = JoinSet::new();
    for (place, endpoint) in endpoints.iter().enumerate() {
        let (context, endpoint) = (context.clone(), endpoint.clone());
        attempts.spawn(async move {
            let head_start = HEAD_START * place as u32;
            sleep(head_start).await;
            let connected = async {
                let mut dialer = context.dial(&endpoint, their_key, limits)?;
                dialer.connected(within.saturating_sub(head_start)).await?;
                Ok(dialer)
            };
            (place, connected.await)
        });
    }
    let mut best_error: Option<(usize, DialError)> = None;
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok((_, Ok(dialer))) => return Ok(dialer),
            Ok((place, Err(error))) if best_error.as_ref().is_none_or(|(best, _)| place < *best) => {
                best_error = Some((place, error));
            }
            _ => {}
        }
    }
    Err(best_error.map_or(DialError::NoAddress, |(_, error)| error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nonsense_is_no_address() {
        let context = Context::new(crate::Security::None).expect("a context");
        for nonsense in ["localhost:1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:99999"] {
            let dialled = context.dial(nonsense, None, Limits::CONTROL);
            assert!(matches!(dialled, Err(DialError::BadAddress { .. })), "{nonsense}: {dialled:?}");
        }
        let nowhere = dial_first(&context, &[], None, Limits::CONTROL, Duration::from_secs(1)).await;
        assert!(matches!(nowhere, Err(DialError::NoAddress)));
    }
}
