//! The ticket: it lets a client in at a worker that never heard of the client.
//!
//! A keyed BLAKE3 over the ticket's bytes, under a key that the worker made at its start and told only the broker. A
//! client that presents the ticket may do what it says until it expires. In a mesh with keys the client must also hold
//! `client_key`.

use bincode::{Decode, Encode};

use crate::{Attempt, AttemptId, ClientId, Demands, Epoch, Lane, PublicKey, TaskId, WorkerId};

/// The secret that a worker shares with the broker, made new at each start of the worker.
#[derive(Clone, Copy, Decode, Encode, Eq, PartialEq)]
pub struct TicketKey(pub [u8; 32]);

impl std::fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TicketKey(secret)")
    }
}

/// What the bearer may do.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Purpose {
    /// Send the model and inputs, have them run, take the result.
    Run,
    /// Take the result of a detached task.
    Fetch,
}

/// The signed statements of a ticket.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct TicketBody {
    /// What the bearer may do.
    pub purpose: Purpose,
    /// The task.
    pub task: TaskId,
    /// Which placement of the task.
    pub attempt: Attempt,
    /// The worker that honours it.
    pub worker: WorkerId,
    /// The life of that worker.
    pub epoch: Epoch,
    /// The client that owns the task.
    pub client: ClientId,
    /// The key the bearer must hold; `None` in a mesh without keys.
    pub client_key: Option<PublicKey>,
    /// Largest size of model and inputs together.
    pub bytes_max: u64,
    /// User priority, 0 to 100, after the tenant's cap.
    pub priority: u8,
    /// The lane whose slots the task may use.
    pub lane: Lane,
    /// Number of items that the client may bring.
    pub items: u32,
    /// The task goes on when the client leaves.
    pub detached: bool,
    /// What the run may use.
    pub demands: Demands,
    /// The worker's GPU whose memory is promised; `None` if the task asks for none.
    pub gpu: Option<u8>,
    /// Deadline after which the result is worthless, in the broker's wall clock (milliseconds since 1970).
    pub deadline_unix_ms: Option<u64>,
    /// Time from the grant after which the task misses its service level, milliseconds; `None` without one.
    pub slo_ms: Option<u32>,
    /// When the ticket expires, in the broker's wall clock. Heartbeat answers tell the worker that clock.
    pub expires_unix_ms: u64,
}

/// A signed ticket.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Ticket {
    /// The statements.
    pub body: TicketBody,
    /// Keyed BLAKE3 of the encoded body.
    pub mac: [u8; 32],
}

/// Why a worker does not honour a ticket.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TicketError {
    /// The MAC does not match: signed with another key, or changed since.
    #[error("the ticket is not from this worker's broker, or from before the worker's last start")]
    Forged,
    /// It is for another worker, or for another life of this one.
    #[error("the ticket is for another worker")]
    OtherWorker,
    /// Its time is over.
    #[error("the ticket expired {late_ms} ms ago")]
    Expired {
        /// Milliseconds since it expired.
        late_ms: u64,
    },
    /// Its bearer holds another key.
    #[error("the ticket belongs to another client's key")]
    OtherClient,
}

impl TicketBody {
    /// The attempt that the ticket opens.
    pub fn attempt_id(&self) -> AttemptId {
        AttemptId { task: self.task, attempt: self.attempt }
    }
}

impl Ticket {
    /// Signs a ticket's statements.
    pub fn sign(body: TicketBody, key: &TicketKey) -> Self {
        let mac = mac(&body, key);
        Self { body, mac }
    }

    /// Checks MAC, worker, bearer and time, in this order.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn verify(
        &self,
        key: &TicketKey,
        worker: (WorkerId, Epoch),
        bearer: Option<PublicKey>,
        broker_unix_ms: u64,
    ) -> Result<(), TicketError> {
        // blake3::Hash compares in constant time.
        if blake3::Hash::from_bytes(mac(&self.body, key)) != self.mac {
            return Err(TicketError::Forged);
        }
        if (self.body.worker, self.body.epoch) != worker {
            return Err(TicketError::OtherWorker);
        }
        if self.body.client_key != bearer {
            return Err(TicketError::OtherClient);
        }
        if broker_unix_ms > self.body.expires_unix_ms {
            return Err(TicketError::Expired { late_ms: broker_unix_ms - self.body.expires_unix_ms });
        }
        Ok(())
    }
}

fn mac(body: &TicketBody, key: &TicketKey) -> [u8; 32] {
    // Encoded first: one hash of a few hundred bytes costs less than forty small updates.
    let bytes = bincode::encode_to_vec(body, bincode::config::standard()).expect("a ticket has no unencodable field");
    *blake3::keyed_hash(&key.0, &bytes).as_bytes()
}
