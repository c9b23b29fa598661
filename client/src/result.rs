//! What a task returns: news on the way, and its result or error.

use std::time::Duration;

use proto_msgs::{Attempt, ErrorCode, Failure, Lane, Phase, RunNote, TaskId, WorkerId};

use crate::Outputs;

/// An event in the life of a task before its end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// The task has no worker yet.
    Queued {
        /// Number of tasks ahead in the queue; 0 for the next one.
        position: u32,
        /// What the task waits for.
        reason: String,
        /// Whether no worker of the mesh could ever run the task, so that it waits for another to join.
        no_worker_fits: bool,
        /// Predicted time until the placement; `None` if there is no prediction.
        starts_in: Option<Duration>,
    },
    /// The task was placed on a worker.
    Placed {
        /// The number of the attempt, from 1.
        attempt: Attempt,
        /// The worker.
        worker: WorkerId,
        /// The worker's display name.
        worker_name: String,
        /// Whether the worker already has the model, so that only inputs are sent.
        model_held: bool,
        /// The lane whose slot the task uses.
        lane: Lane,
        /// Predicted time until the end of the run; `None` if the model has never run.
        predicted: Option<Duration>,
    },
    /// Model and inputs are being sent. Reported at most every [`SENDING_EVERY`](crate::SENDING_EVERY).
    Sending {
        /// Bytes that the worker has acknowledged.
        sent_bytes: u64,
        /// Bytes to send in all.
        total_bytes: u64,
    },
    /// The worker has entered this phase.
    Phase(Phase),
    /// The attempt failed; the client asks for another worker.
    Retrying {
        /// The number of the failed attempt.
        attempt: Attempt,
        /// The worker's name.
        worker_name: String,
        /// Why the attempt failed.
        why: String,
    },
    /// The broker has not answered for a while. The task continues when it does.
    BrokerSilent {
        /// What the connection tells about the cause; `None` if it is broken.
        hint: Option<&'static str>,
    },
}

/// What a [`TaskHandle`](crate::TaskHandle) returns.
#[derive(Clone, Debug)]
pub enum Update {
    /// News of a task that continues.
    News(News),
    /// The end of the task.
    End(Result<TaskResult, TaskError>),
}

/// The result of a completed task.
#[derive(Clone, Debug)]
pub struct TaskResult {
    /// The task.
    pub task: TaskId,
    /// The outputs, in the model's order. Empty for a detached task: see [`Mesh::fetch`](crate::Mesh::fetch).
    pub outputs: Outputs,
    /// The runs that contained the task's items, in the order of their ends; only the first ones if there were many.
    pub runs: Vec<RunNote>,
    /// The lane of the run; `None` if the task ended without a worker.
    pub lane: Option<Lane>,
    /// The worker that ran the task, with its name.
    pub worker: Option<(WorkerId, String)>,
    /// The number of placements.
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
    /// Loading the model, as the worker measured it; zero if it was already loaded.
    pub loading: Duration,
    /// Running the model, as the worker measured it.
    pub running: Duration,
    /// Bytes of model and inputs sent in the last attempt, repeated ones included.
    pub sent_bytes: u64,
}

/// Why a task has no result.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TaskError {
    /// The task failed.
    #[error("{0}")]
    Failed(Failure),
    /// The mesh has no room for the task now. Submit it again after `retry_after`.
    #[error("{failure}")]
    Busy {
        /// The part of the mesh that is full.
        failure: Failure,
        /// The broker's prediction of how long it stays full.
        retry_after: Duration,
    },
    /// The task was cancelled.
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
    /// The error code, if the mesh gave one.
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
    /// The broker did not answer.
    #[error(
        "no answer from the broker at {broker} within {} s: {}",
        within.as_secs_f32(),
        hint.unwrap_or("check that it runs and is not overloaded")
    )]
    Silent {
        /// The broker's address.
        broker: String,
        /// How long the client waited.
        within: Duration,
        /// What the connection tells about the cause; `None` if it is broken.
        hint: Option<&'static str>,
    },
    /// The task does not exist, or belongs to another client.
    #[error("there is no task {0} of this client: `tasks` lists those that the broker remembers")]
    NotFound(TaskId),
    /// The broker refused.
    #[error("{0}")]
    Refused(Failure),
    /// The broker speaks another version of the protocol.
    #[error("{0}")]
    Version(String),
    /// The connection to the mesh was closed.
    #[error("the connection to the mesh was closed")]
    Closed,
}
