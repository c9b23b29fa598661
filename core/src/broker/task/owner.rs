//! A task's client as the broker hears it.

use std::time::Duration;

use proto_msgs::{Attempt, Locate, PeerId, PublicKey, limits::ENDPOINTS_MAX};

use crate::{Census, MonoTime};

/// The client side of a task.
#[derive(Debug)]
pub(crate) struct Owner {
    /// The connection on which the client last spoke; `None` after a restart, and after long silence.
    pub(crate) peer: Option<PeerId>,
    /// When the client last spoke.
    pub(crate) heard: MonoTime,
    /// Where the client can be dialled; empty if it cannot.
    pub(crate) endpoints: Vec<String>,
    /// The newest attempt that the client has named. A message that names an earlier one is late.
    pub(crate) named: Attempt,
    /// The last client that asked for a detached task's result before there was one. It is told the way when there is
    /// one.
    pub(crate) awaited_by: Option<Box<Awaiting>>,
}

/// A client that waits for a result.
#[derive(Debug)]
pub(crate) struct Awaiting {
    pub(crate) peer: PeerId,
    pub(crate) key: Option<PublicKey>,
    pub(crate) locate: Locate,
}

impl Owner {
    pub(super) fn new(now: MonoTime) -> Self {
        Self { peer: None, heard: now, endpoints: Vec::new(), named: Attempt(0), awaited_by: None }
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { peer: _, heard: _, endpoints, named: _, awaited_by: _ } = self;
        census.passing("endpoints of a task's client", endpoints.len(), ENDPOINTS_MAX);
    }

    /// Whether the client would hear of a grant: it has spoken of late. Not so after a restart, until it speaks.
    pub(crate) fn hears(&self, now: MonoTime, quiet: Duration) -> bool {
        self.peer.is_some() && now < self.heard + quiet
    }

    /// The client speaks over this connection.
    pub(crate) fn speaks(&mut self, now: MonoTime, peer: PeerId) {
        (self.heard, self.peer) = (now, Some(peer));
    }
}
