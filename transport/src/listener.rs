//! A listening socket in its direct form: owned by one task, no hop, no lock.

use proto_msgs::{Frame, PeerId, PublicKey};

use crate::{Door, Inbox, SendError};

/// A bound ROUTER.
#[derive(Debug)]
pub struct Listener {}

/// Something a peer sent.
#[derive(Clone, Debug)]
pub struct Received {
    /// The connection it came on.
    pub peer: PeerId,
    /// The key that the peer proved to hold; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// What it sent; not decoded yet.
    pub frame: Frame,
}

/// Why nobody can be listened to at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another program has it.
    #[error("{endpoint} is in use: stop the program that listens there, or choose another port")]
    InUse {
        /// The address.
        endpoint: String,
    },
    /// Not an address of this machine, or no address at all.
    #[error("cannot listen on {endpoint}: {reason}")]
    BadAddress {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Counters of a socket since its start.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    /// Messages received.
    pub received: u64,
    /// Messages handed to libzmq.
    pub sent: u64,
    /// Messages dropped because a peer's queue was full.
    pub dropped_full: u64,
    /// Messages dropped because the peer was gone.
    pub dropped_gone: u64,
    /// Messages received that had no peer name, or too many parts.
    pub malformed: u64,
    /// Gauge: messages waiting here for slow peers.
    pub waiting: u64,
}

impl Listener {
    /// The address bound, with the real port.
    pub fn endpoint(&self) -> &str {
        unimplemented!()
    }

    /// The next message. Also carries on with what waits for slow peers. Safe to drop (in a `select!`).
    pub async fn recv(&mut self) -> Received {
        unimplemented!()
    }

    /// The next message if it is here already: after [`Self::recv`], take up to some tens of these before anything else, then
    /// come back to `recv`, so that neither messages nor other work starve.
    pub fn try_recv(&mut self) -> Option<Received> {
        unimplemented!()
    }

    /// Sends without ever blocking; what a slow peer cannot take yet waits in that peer's own bounded queue.
    ///
    /// # Errors
    /// `Gone` if there is no such connection any more, `Full` if that queue is full. The message is dropped and counted.
    pub fn send(&mut self, _peer: PeerId, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }

    /// Counters.
    pub fn traffic(&self) -> Traffic {
        unimplemented!()
    }

    /// Hands the socket to a task of its own. The inbox is bounded: while nobody reads it, peers are not read either.
    /// The socket closes when the inbox is dropped.
    pub fn spawn(self) -> (Door, Inbox<Received>) {
        unimplemented!()
    }

    /// Gives what is queued a moment to leave, then closes the socket.
    pub async fn close(self) {
        unimplemented!()
    }
}
