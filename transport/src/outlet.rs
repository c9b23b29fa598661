//! The many-task form of a socket: bounded queue per peer in front, bounded inbox behind, one task that owns the socket.

use std::marker::PhantomData;

use proto_msgs::{Frame, PeerId};

use crate::Traffic;

/// Why a message was not sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SendError {
    /// There is no such connection any more.
    #[error("the peer is gone")]
    Gone,
    /// The peer is too slow.
    #[error("the peer's queue is full")]
    Full,
}

/// A listener in the care of its own task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Door {}

impl Door {
    /// The address bound, with the real port.
    pub fn endpoint(&self) -> &str {
        unimplemented!()
    }

    /// The way to one of its peers.
    pub fn to(&self, _peer: PeerId) -> Outlet {
        unimplemented!()
    }

    /// Counters.
    pub fn traffic(&self) -> Traffic {
        unimplemented!()
    }

    /// Gives what is queued a moment to leave, then closes the socket.
    pub async fn close(&self) {
        unimplemented!()
    }
}

/// The way to one peer, whichever side dialled. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outlet {}

impl Outlet {
    /// Sends without waiting.
    ///
    /// # Errors
    /// `Full` if the peer's queue is full, `Gone` if the peer or the socket is.
    pub fn try_send(&self, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }

    /// Sends, waiting for room in this peer's queue. Other peers do not feel it.
    ///
    /// # Errors
    /// `Gone` if the peer or the socket is.
    pub async fn send(&self, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }

    /// Gives what is queued for this peer a moment to leave and, if the peer was dialled, closes the socket.
    pub async fn close(&self) {
        unimplemented!()
    }

    /// Both lead to the same peer over the same connection.
    pub fn same_peer(&self, _other: &Self) -> bool {
        unimplemented!()
    }
}

/// What arrives at a socket in the care of its own task. Dropping it closes the socket.
#[derive(Debug)]
pub struct Inbox<T> {
    _unfinished: PhantomData<T>,
}

impl<T> Inbox<T> {
    /// The next one; `None` once the socket is closed.
    pub async fn recv(&mut self) -> Option<T> {
        unimplemented!()
    }

    /// The next one if it is here already.
    pub fn try_recv(&mut self) -> Option<T> {
        unimplemented!()
    }
}
