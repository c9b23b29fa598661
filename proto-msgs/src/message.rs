//! Every message, by direction. Numbers: 1–99 client to broker, 100–199 broker to client, 200–299 worker to broker,
//! 300–399 broker to worker, 400–499 client to worker, 500–599 worker to client. A number once used is never used for
//! another message; a released message is never changed.

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
    /// What a client tells the broker. All of it may be repeated without harm.
    ClientToBroker {
        /// The client's whole view of one task: sent to begin with, and again every few seconds while the task lives.
        1 Submit(Submit);
        /// The client has its answer, or wants none.
        2 Close(Close);
        /// A question that changes nothing.
        3 Ask(Ask);
        /// Stop a task that another process of the same client submitted.
        4 Cancel(CancelTask);
        /// Where is the result of a detached task?
        5 Locate(Locate);
    }
}

messages! {
    /// What the broker tells a client.
    BrokerToClient {
        /// A worker, and the ticket to it.
        100 Grant(Grant);
        /// No worker yet, and why.
        101 Queued(Queued);
        /// The broker's word on a task whose client holds an attempt: all well, or the worker has gone silent.
        102 Noted(Noted);
        /// The task has ended.
        103 Ended(Ended);
        /// Answer to an [`Ask`].
        104 Answer(Answer);
    }
}

messages! {
    /// What a worker tells the broker.
    WorkerToBroker {
        /// Who I am: sent at the start and whenever the broker says that it does not know me.
        200 Register(Register);
        /// How I am and everything I hold: sent every interval.
        201 Heartbeat(Heartbeat);
        /// I am leaving for good; do not wait for my next heartbeat.
        202 Leave(Leave);
    }
}

messages! {
    /// What the broker tells a worker.
    BrokerToWorker {
        /// Answer to a heartbeat.
        300 HeartbeatAck(HeartbeatAck);
        /// Dial this client: it cannot dial you.
        301 Introduce(Introduce);
        /// Stop this attempt now; the next [`HeartbeatAck`] says so again.
        302 Stop(AttemptId);
    }
}

messages! {
    /// What a client tells a worker, directly.
    ClientToWorker {
        /// Ticket and manifest; the data follows without waiting for an answer.
        400 Open(Open);
        /// A piece of the model or an input; the bytes are the frame's payload.
        401 Chunk(Chunk);
        /// This much of the result has arrived.
        402 Credit(Credit);
        /// The result has arrived whole: forget the attempt.
        403 Release(AttemptId);
        /// Stop and forget the attempt.
        404 Abort(AttemptId);
        /// Still here.
        405 Alive(AttemptId);
    }
}

messages! {
    /// What a worker tells a client, directly.
    WorkerToClient {
        /// The worker that was to dial has arrived; open now.
        500 DialIn(AttemptId);
        /// The ticket is good; these blobs are needed from these offsets on.
        501 Accept(Accept);
        /// This attempt will not run, or not go on.
        502 Refuse(Refuse);
        /// This much of a blob has arrived.
        503 Credit(Credit);
        /// Where the attempt stands; also the sign of life.
        504 Progress(Progress);
        /// The attempt's end. Chunks of the outputs follow.
        505 Result(RunResult);
        /// A piece of an output; the bytes are the frame's payload.
        506 Chunk(Chunk);
        /// The worker does not know this connection: open again, from where you were.
        507 Reopen(AttemptId);
    }
}

impl BrokerToClient {
    /// The task it is about; none for an answer.
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
    /// The attempt it is about.
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

/// What arrives at the broker, from either role.
#[derive(Clone, Debug, PartialEq)]
pub enum ToBroker {
    /// From a client.
    Client(ClientToBroker),
    /// From a worker.
    Worker(WorkerToBroker),
}

impl ToBroker {
    /// The message in these bytes.
    ///
    /// # Errors
    /// If they are no message that a client or a worker may send.
    pub fn from_frame(frame: &crate::Frame) -> Result<Self, crate::DecodeError> {
        match ClientToBroker::from_frame(frame) {
            Err(crate::DecodeError::UnknownKind(_)) => WorkerToBroker::from_frame(frame).map(Self::Worker),
            other => other.map(Self::Client),
        }
    }
}
