//! A connecting socket: one peer, dialled by us.

use std::time::Duration;

use proto_msgs::{Frame, PublicKey};

use crate::{Context, Inbox, Limits, Outlet, SendError, Traffic};

/// A connected DEALER.
#[derive(Debug)]
pub struct Dialer {}

/// Something that happened on a dialled connection.
#[derive(Clone, Debug)]
pub enum Heard {
    /// The peer sent this.
    Frame(Frame),
    /// The connection stands. After a [`Heard::Lost`] the peer sees a new connection that it knows nothing of.
    Connected,
    /// The connection broke; it is being made again. What was queued and not sent may be lost.
    Lost,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody answers.
    #[error(
        "no answer from {endpoint} within {} ms ({detail}): check that the program runs there and that no firewall is between",
        within.as_millis()
    )]
    Unreachable {
        /// The address tried.
        endpoint: String,
        /// How long.
        within: Duration,
        /// What was seen meanwhile.
        detail: String,
    },
    /// The peer does not let this key in, or does not hold the key that it should.
    #[error("{endpoint} refused the connection: this node's key is not authorized there, or the peer has another key")]
    KeyRefused {
        /// The address tried.
        endpoint: String,
    },
    /// Something answers, but it is no node of this mesh.
    #[error("{endpoint} is not a node of this mesh, or one side uses keys and the other does not ({detail})")]
    NotMesh {
        /// The address tried.
        endpoint: String,
        /// What was seen.
        detail: String,
    },
    /// Not an address.
    #[error("{endpoint} cannot be dialled: {reason}")]
    BadAddress {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No address to dial.
    #[error("the peer has no address to dial")]
    NoAddress,
    /// This node has keys and was told none of the peer's, or the other way round.
    #[error("{endpoint} cannot be dialled: {reason}")]
    KeyMissing {
        /// The address.
        endpoint: String,
        /// Which key is missing where.
        reason: String,
    },
}

impl Dialer {
    /// The address dialled.
    pub fn endpoint(&self) -> &str {
        unimplemented!()
    }

    /// Waits until the connection stands (handshake included).
    ///
    /// # Errors
    /// If it does not within this time; at once if the peer refuses.
    pub async fn connected(&mut self, _within: Duration) -> Result<(), DialError> {
        unimplemented!()
    }

    /// The next message or change of the connection. Safe to drop (in a `select!`).
    pub async fn recv(&mut self) -> Heard {
        unimplemented!()
    }

    /// The next message if it is here already.
    pub fn try_recv(&mut self) -> Option<Frame> {
        unimplemented!()
    }

    /// Sends without ever blocking; what the peer cannot take yet waits in a bounded queue.
    ///
    /// # Errors
    /// `Full` if that queue is full. The message is dropped and counted.
    pub fn send(&mut self, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }

    /// Counters.
    pub fn traffic(&self) -> Traffic {
        unimplemented!()
    }

    /// Hands the socket to a task of its own. The socket closes when the inbox is dropped.
    pub fn spawn(self) -> (Outlet, Inbox<Heard>) {
        unimplemented!()
    }

    /// Gives what is queued a moment to leave, then closes the socket.
    pub async fn close(self) {
        unimplemented!()
    }
}

/// Dials several addresses of one peer, the best (first) a little ahead of the next, and keeps the first that connects.
/// The dialer returned is connected.
///
/// # Errors
/// If none connects within this time: the error of the best address.
pub async fn dial_first(
    _context: &Context,
    _endpoints: &[String],
    _their_key: Option<PublicKey>,
    _limits: Limits,
    _within: Duration,
) -> Result<Dialer, DialError> {
    unimplemented!()
}
