//! What comes of a task: news on the way, the result, or why there is none.

use std::time::Duration;

use proto_msgs::{Attempt, ErrorCode, Failure, Lane, Phase, RunNote, TaskId, WorkerId};

use crate::Outputs;

/// What happens to a task before it ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// No worker yet.
    Queued {
        /// Tasks before it; 0 if it is the next.
        position: u32,
        /// What it waits for.
        reason: String,
        /// Until it is placed, as predicted; `None` if the mesh has nothing to go by.
        starts_in: Option<Duration>,
    },
    /// A worker was found.
    Placed {
        /// The number of this placement, from 1.
        attempt: Attempt,
        /// The worker.
        worker: WorkerId,
        /// What a person calls it.
        worker_name: String,
        /// It has the model already: only inputs are sent.
        model_held: bool,
        /// The lane whose slots it uses.
        lane: Lane,
        /// Until the run's end, as predicted; `None` if nobody has run the model yet.
        predicted: Option<Duration>,
    },
    /// Model and inputs are on their way. Told at most every [`SENDING_EVERY`](crate::SENDING_EVERY).
    Sending {
        /// Bytes the worker has acknowledged.
        sent_bytes: u64,
        /// Bytes to be sent.
        total_bytes: u64,
    },
    /// The worker is doing this.
    Phase(Phase),
    /// This attempt came to nothing; another worker is asked for.
    Retrying {
        /// The number of the placement that failed.
        attempt: Attempt,
        /// The worker's name.
        worker_name: String,
        /// How it failed.
        why: String,
    },
    /// The broker has not answered for a while; the task goes on as soon as it does.
    BrokerSilent,
}

/// What a [`TaskHandle`](crate::TaskHandle) tells.
#[derive(Clone, Debug)]
pub enum Update {
    /// The task goes on.
    News(News),
    /// It is over.
    End(Result<TaskResult, TaskError>),
}

/// A task that was done.
#[derive(Clone, Debug)]
pub struct TaskResult {
    /// Which.
    pub task: TaskId,
    /// The outputs, in the model's order. Empty for a detached task: see [`Mesh::fetch`](crate::Mesh::fetch).
    pub outputs: Outputs,
    /// The runs that the task's items were part of, in the order in which they ended; the first ones if there were many.
    pub runs: Vec<RunNote>,
    /// The lane that it was run in; `None` if it ended without a worker.
    pub lane: Option<Lane>,
    /// The worker that did it.
    pub worker: Option<(WorkerId, String)>,
    /// How often the task was placed.
    pub attempts: Attempt,
    /// Where the time went.
    pub timings: Timings,
}

/// Where the time of a task went, as this program saw it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Timings {
    /// From submit to result.
    pub total: Duration,
    /// From submit to the last placement.
    pub queued: Duration,
    /// From the last placement until the worker had model and inputs.
    pub sending: Duration,
    /// Loading the model, as the worker measured it; zero if it was warm.
    pub loading: Duration,
    /// In the model, as the worker measured it.
    pub running: Duration,
    /// Bytes of model and inputs that were sent in the last attempt; repeated ones included.
    pub sent_bytes: u64,
}

/// Why a task has no result.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TaskError {
    /// It failed.
    #[error("{0}")]
    Failed(Failure),
    /// The mesh has no room for it now. Submit it anew after `retry_after`.
    #[error("{failure}")]
    Busy {
        /// What is full.
        failure: Failure,
        /// How long that will last, as the broker predicts.
        retry_after: Duration,
    },
    /// It was taken back.
    #[error("cancelled")]
    Cancelled,
    /// The broker speaks another version of the protocol.
    #[error("{0}")]
    Version(String),
    /// The connection to the mesh was closed before the task ended.
    #[error("the connection to the mesh was closed before the task ended")]
    Closed,
}

impl TaskError {
    /// The code if the mesh said why.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Failed(failure) | Self::Busy { failure, .. } => Some(failure.code),
            Self::Cancelled | Self::Version(_) | Self::Closed => None,
        }
    }
}

/// Why a question to the broker has no answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AskError {
    /// The broker said nothing.
    #[error(
        "no answer from the broker at {broker} within {} s: check that it runs and is not overloaded",
        within.as_secs_f32()
    )]
    Silent {
        /// Its address.
        broker: String,
        /// How long was waited.
        within: Duration,
    },
    /// There is no such task, or it is somebody else's.
    #[error("there is no task {0} of this client: `tasks` lists those that the broker remembers")]
    NotFound(TaskId),
    /// The broker refuses.
    #[error("{0}")]
    Refused(Failure),
    /// The broker speaks another version of the protocol.
    #[error("{0}")]
    Version(String),
    /// The connection to the mesh was closed.
    #[error("the connection to the mesh was closed")]
    Closed,
}
