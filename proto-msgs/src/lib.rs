//! WIRE: the messages between the nodes of the mesh, and their bytes.
//!
//! Owns ids, messages, the fixed header, the ticket, the codec, every limit on what a peer may send, and the units in
//! which people write times and sizes. Never: sockets, clocks, async, files.
//!
//! ```text
//!            control (ROUTER at the broker)                 direct (ROUTER at whichever side listens)
//!   client  -- ClientToBroker -->  broker            client  -- ClientToWorker -->  worker
//!   client  <- BrokerToClient --   broker            client  <- WorkerToClient --   worker
//!   worker  -- WorkerToBroker -->  broker
//!   worker  <- BrokerToWorker --   broker
//! ```
//!
//! Every message may be lost, doubled or late. Two messages keep the mesh right in spite of that, because both are
//! repeated: a worker's [`Heartbeat`] carries its whole set of attempts, and a client's [`Submit`] carries its whole
//! view of the task.
//!
//! Where to begin: [`message`].

pub mod codec;
pub mod header;
pub mod ids;
pub mod limits;
pub mod message;
pub mod model;
pub mod outcome;
pub mod ticket;
pub mod units;

pub use codec::{DecodeError, EncodeError, Frame};
pub use header::{Header, VERSION, VERSION_MIN};
pub use ids::{Attempt, ClientId, Digest, Epoch, JobId, PeerId, PublicKey, TaskId, WorkerId};
pub use message::*;
pub use model::{Arch, DType, Direction, ModelFormat, ModelRef};
pub use outcome::{ErrorCode, Failure, Outcome};
pub use ticket::{Purpose, Ticket, TicketBody, TicketError, TicketKey};
