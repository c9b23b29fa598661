//! Every message, by direction. Kind numbers: 1–99 client to broker, 100–199 broker to client, 200–299 worker to
//! broker, 300–399 broker to worker, 400–499 client to worker, 500–599 worker to client. A number is never reused for
//! another message. A released message is never changed.

use crate::{TaskId, codec::messages};

pub(crate) mod check;
mod client;
mod direct;
mod schedule;
mod views;
mod worker;

pub use client::*;
pub use direct::*;
pub use schedule::*;
pub use views::*;
pub use worker::*;

messages! {
    /// Messages from a client to the broker. Each may be repeated without harm.
    ClientToBroker {
        /// The client's whole view of one task: sent first, and again every few seconds while the task lives.
        1 Submit(Submit);
        /// The client has its result, or wants none.
        2 Close(Close);
        /// A question that changes nothing.
        3 Ask(Ask);
        /// Stop a task that another process of the same client submitted.
        4 Cancel(CancelTask);
        /// Ask for the place of a detached task's result.
        5 Locate(Locate);
    }
}

messages! {
    /// Messages from the broker to a client.
    BrokerToClient {
        /// A worker for the task, and the ticket to it.
        100 Grant(Grant);
        /// No worker yet, and the reason.
        101 Queued(Queued);
        /// The broker's view of an attempt that the client holds: all is well, or its worker has gone silent.
        102 Noted(Noted);
        /// The task has ended.
        103 Ended(Ended);
        /// Answer to an [`Ask`].
        104 Answer(Answer);
    }
}

messages! {
    /// Messages from a worker to the broker.
    WorkerToBroker {
        /// The worker's fixed facts: sent at the start, and whenever the broker says that it does not know the worker.
        200 Register(Register);
        /// The worker's load and everything it holds: sent every interval.
        201 Heartbeat(Heartbeat);
        /// The worker leaves for good: the broker need not wait for its next heartbeat.
        202 Leave(Leave);
    }
}

messages! {
    /// Messages from the broker to a worker.
    BrokerToWorker {
        /// Answer to a heartbeat.
        300 HeartbeatAck(HeartbeatAck);
        /// Dial this client, which cannot dial the worker.
        301 Introduce(Introduce);
        /// Stop this attempt now; the next [`HeartbeatAck`] repeats it.
        302 Stop(AttemptId);
        /// Leave: another process has registered as a later life of this worker, and both are alive.
        303 Overtaken(Overtaken);
    }
}

messages! {
    /// Messages from a client to a worker, on their direct link.
    ClientToWorker {
        /// Ticket and manifest; the data follows without waiting for an answer.
        400 Open(Open);
        /// A piece of the model or an input; the bytes are the frame's payload.
        401 Chunk(Chunk);
        /// How many bytes of an output have arrived.
        402 Credit(Credit);
        /// The result has arrived completely: forget the attempt.
        403 Release(AttemptId);
        /// Stop and forget the attempt.
        404 Abort(AttemptId);
        /// Sign of life of the client.
        405 Alive(AttemptId);
    }
}

messages! {
    /// Messages from a worker to a client, on their direct link.
    WorkerToClient {
        /// The worker has dialled the client; open the attempt now.
        500 DialIn(AttemptId);
        /// The ticket is valid. Names the blobs that are needed, and from which offsets.
        501 Accept(Accept);
        /// The attempt will not run, or will not go on.
        502 Refuse(Refuse);
        /// How many bytes of a blob have arrived.
        503 Credit(Credit);
        /// The attempt's phase; also the worker's sign of life.
        504 Progress(Progress);
        /// The end of the attempt. Chunks of the outputs follow.
        505 Result(RunResult);
        /// A piece of an output; the bytes are the frame's payload.
        506 Chunk(Chunk);
        /// The worker does not know this connection: open again and go on from the bytes that had arrived.
        507 Reopen(AttemptId);
    }
}

impl BrokerToClient {
    /// The task that the message is about; `None` for an answer.
    pub fn task(&self) -> Option<TaskId> {
        match self {
            Self::Grant(grant) => Some(grant.id.task),
            Self::Queued(queued) => Some(queued.task),
            Self::Noted(noted) => Some(noted.id.task),
            Self::Ended(ended) => Some(ended.task),
            Self::Answer(_) => None,
        }
    }
}

impl WorkerToClient {
    /// The attempt that the message is about.
    pub fn attempt(&self) -> AttemptId {
        match self {
            Self::DialIn(id) | Self::Reopen(id) => *id,
            Self::Accept(accept) => accept.id,
            Self::Refuse(refuse) => refuse.id,
            Self::Credit(credit) => credit.id,
            Self::Progress(progress) => progress.id,
            Self::Result(result) => result.id,
            Self::Chunk(chunk) => chunk.id,
        }
    }
}

/// A message to the broker, from a client or from a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ToBroker {
    /// From a client.
    Client(ClientToBroker),
    /// From a worker.
    Worker(WorkerToBroker),
}

impl ToBroker {
    /// Decodes one message.
    ///
    /// # Errors
    /// If the bytes are not a message that a client or a worker may send.
    pub fn from_frame(frame: &crate::Frame) -> Result<Self, crate::DecodeError> {
        match ClientToBroker::from_frame(frame) {
            Err(crate::DecodeError::UnknownKind(_)) => WorkerToBroker::from_frame(frame).map(Self::Worker),
            other => other.map(Self::Client),
        }
    }
}
