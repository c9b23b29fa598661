//! The ticket: what lets a client in at a worker that never heard of it.
//!
//! A keyed BLAKE3 over the ticket's bytes, under a key that the worker made at its start and told the broker alone.
//! Whoever presents it and, where the mesh has keys, proves to hold `client_key`, may do what it says until it expires.

use bincode::{Decode, Encode};

use crate::{Attempt, ClientId, Demands, Epoch, Lane, PublicKey, TaskId, WorkerId};

/// The secret a worker shares with the broker. Made new at each start of the worker.
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

/// The ticket's statements.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct TicketBody {
    /// What for.
    pub purpose: Purpose,
    /// The task.
    pub task: TaskId,
    /// Which placement of the task.
    pub attempt: Attempt,
    /// At which worker.
    pub worker: WorkerId,
    /// In which of the worker's lives.
    pub epoch: Epoch,
    /// Whose task.
    pub client: ClientId,
    /// The key the bearer must hold; `None` in a mesh without keys.
    pub client_key: Option<PublicKey>,
    /// Model and inputs together may not be larger.
    pub bytes_max: u64,
    /// User priority, 0 to 100, after the tenant's cap.
    pub priority: u8,
    /// The lane whose slots it may use.
    pub lane: Lane,
    /// Items it may bring.
    pub items: u32,
    /// The task goes on when the client leaves.
    pub detached: bool,
    /// What the run may use.
    pub demands: Demands,
    /// When the task's answer becomes worthless, in the broker's wall clock (milliseconds since 1970).
    pub deadline_unix_ms: Option<u64>,
    /// The door closes for this ticket, in the broker's wall clock. Heartbeat answers tell the worker that clock.
    pub expires_unix_ms: u64,
}

/// A signed ticket.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Ticket {
    /// What it says.
    pub body: TicketBody,
    /// Keyed BLAKE3 of the encoded body.
    pub mac: [u8; 32],
}

/// Why a ticket is not honoured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TicketError {
    /// Not signed with this worker's key, or changed since.
    #[error("the ticket is not from this worker's broker, or from before the worker's last start")]
    Forged,
    /// For another worker or another life of this one.
    #[error("the ticket is for another worker")]
    OtherWorker,
    /// Its time is over.
    #[error("the ticket expired {late_ms} ms ago")]
    Expired {
        /// Milliseconds since.
        late_ms: u64,
    },
    /// Presented by somebody else.
    #[error("the ticket belongs to another client's key")]
    OtherClient,
}

impl Ticket {
    /// Signs the statements.
    pub fn sign(body: TicketBody, key: &TicketKey) -> Self {
        let mac = mac(&body, key);
        Self { body, mac }
    }

    /// Checks signature, addressee, bearer and time, in this order.
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
    // At once: the hash of a few hundred bytes costs less than forty small updates.
    let bytes = bincode::encode_to_vec(body, bincode::config::standard()).expect("a ticket has no unencodable field");
    *blake3::keyed_hash(&key.0, &bytes).as_bytes()
}
