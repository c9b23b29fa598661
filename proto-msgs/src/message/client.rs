//! Messages between client and broker, and their parts.

use bincode::{Decode, Encode};

use crate::{
    Arch, Attempt, ClientId, Digest, Direction, JobId, ModelRef, Outcome, PublicKey, TaskId, Ticket, WorkerId,
    message::{ClusterView, LabelRule, Lane, ModelView, Slo, Stage, TaskView, WhyView, WorkerView},
};

/// A task and its attempt number: the pair by which worker and client name one run.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AttemptId {
    /// The task.
    pub task: TaskId,
    /// The placement of the task.
    pub attempt: Attempt,
}

/// The resources that a run may use, and that its worker must therefore have.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct Demands {
    /// Thousandths of a core; 0 means no wish.
    pub cpu_millis: u32,
    /// Main memory; 0 means no wish.
    pub memory_bytes: u64,
    /// GPU memory; 0 means no GPU.
    pub gpu_memory_bytes: u64,
    /// The required architecture; `None` means any.
    pub arch: Option<Arch>,
}

/// The client's view of its own task. The broker believes it, so a restarted broker need not remember attached tasks.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Standing {
    /// The task has no worker yet.
    Asking,
    /// The task is with this worker; the client wants no other.
    Holding {
        /// The attempt that the client follows.
        attempt: Attempt,
        /// The worker of that attempt.
        worker: WorkerId,
    },
    /// The attempt failed; the client wants another worker.
    Lost {
        /// The attempt that failed; the next one has a higher number.
        attempt: Attempt,
        /// The worker of that attempt.
        worker: WorkerId,
        /// How the attempt failed, as the client saw it.
        outcome: Outcome,
    },
}

/// What a task wants, as its client describes it.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct TaskSpec {
    /// Made by the client, equal in every repetition.
    pub task: TaskId,
    /// The client that owns the task.
    pub client: ClientId,
    /// The `submit` command that this task belongs to.
    pub job: JobId,
    /// The model's name for people.
    pub model_name: String,
    /// The model.
    pub model: ModelRef,
    /// Later stages: models that the outputs pass through after the first one.
    pub then: Vec<Stage>,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Items in this task, at least 1.
    pub items: u32,
    /// Items of the whole job, this task's included.
    pub job_items: u32,
    /// User priority, 0 to 100.
    pub priority: u8,
    /// The lane that the client asks for; `None`: by the number of items.
    pub lane: Option<Lane>,
    /// The service level of the task's stream, if it has one.
    pub slo: Option<Slo>,
    /// Required and preferred labels of workers.
    pub labels: Vec<LabelRule>,
    /// The result is worthless after this many milliseconds from now. Of repetitions the broker takes the first one it
    /// hears.
    pub deadline_ms: Option<u64>,
    /// What the run may use.
    pub demands: Demands,
    /// The task goes on when the client leaves, and the worker keeps the result.
    pub detached: bool,
    /// The key of the client's connections; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// The only direction allowed; `None`: either.
    pub direction: Option<Direction>,
}

/// A task and its standing, as its client sees them.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Submit {
    /// What the task wants.
    pub spec: TaskSpec,
    /// Where the client can be dialled; empty if it cannot.
    pub endpoints: Vec<String>,
    /// The client's view of the task.
    pub standing: Standing,
}

/// The end of a task, reported by its client.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Close {
    /// The task.
    pub task: TaskId,
    /// The client that owns the task.
    pub client: ClientId,
    /// The attempt that ended; 0 if there was none.
    pub attempt: Attempt,
    /// How the task ended for the client.
    pub outcome: Outcome,
}

/// Stops a task, on request of another process of the same user. Answered with [`Ended`] or an error.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct CancelTask {
    /// The task.
    pub task: TaskId,
    /// The client that owns the task.
    pub client: ClientId,
}

/// Asks for the way to a detached task's result. Answered with a [`Grant`] for
/// [`Purpose::Fetch`](crate::Purpose::Fetch), with [`Queued`] while it has no worker, with [`Noted`] while there is no
/// result yet, or with [`Ended`].
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Locate {
    /// The task.
    pub task: TaskId,
    /// The client that owns the task.
    pub client: ClientId,
    /// The key of the client's connections; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Where the client can be dialled; empty if it cannot.
    pub endpoints: Vec<String>,
    /// The direction that was granted last and failed. The broker then grants the other one, if there is one.
    pub unreachable: Option<Direction>,
}

/// A place at a worker for one attempt.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Grant {
    /// The attempt.
    pub id: AttemptId,
    /// The worker.
    pub worker: WorkerId,
    /// The worker's name for people.
    pub worker_name: String,
    /// The worker's key; `None` in a mesh without keys.
    pub worker_key: Option<PublicKey>,
    /// Where the worker can be dialled, best first; empty if it cannot.
    pub endpoints: Vec<String>,
    /// Which side dials.
    pub direction: Direction,
    /// Bytes that may be under way unacknowledged.
    pub window_bytes: u32,
    /// The worker already has the model.
    pub model_held: bool,
    /// Predicted time until the run's end; `None` if the model has never run.
    pub predicted_ms: Option<u32>,
    /// The ticket that lets the client in.
    pub ticket: Ticket,
}

/// The broker's word on a waiting task.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Queued {
    /// The task.
    pub task: TaskId,
    /// Tasks before it in the queue; 0 if it is the next.
    pub position: u32,
    /// What the task waits for.
    pub reason: String,
    /// There are workers, and none of them could ever run the task: it waits for another.
    pub no_worker_fits: bool,
    /// Predicted time until it is placed; `None` without any measurement.
    pub starts_in_ms: Option<u32>,
    /// For a detached task: the store has the task.
    pub durable: bool,
}

/// The broker's view of an attempt that the client holds.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Noted {
    /// The attempt.
    pub id: AttemptId,
    /// The attempt's worker sends heartbeats, and they name the attempt.
    pub worker_alive: bool,
    /// For a detached task: the store knows that this attempt is at its worker. The client may leave once the worker
    /// has everything.
    pub durable: bool,
}

/// The broker's word on a task that is over.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Ended {
    /// The task.
    pub task: TaskId,
    /// How the task ended.
    pub outcome: Outcome,
    /// For [`ErrorCode::Busy`](crate::ErrorCode::Busy) and similar codes: the time after which to try again.
    pub retry_after_ms: Option<u32>,
}

/// A question.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Ask {
    /// Number chosen by the asker and repeated in the answer.
    pub request: u64,
    /// The asking client. Tasks of other clients are not shown.
    pub client: ClientId,
    /// The question itself.
    pub question: Question,
}

/// A question that the broker can answer.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Question {
    /// The state of the broker itself.
    Cluster,
    /// Workers in order of id, a page at a time.
    Workers {
        /// The page begins after this worker.
        after: Option<WorkerId>,
    },
    /// The asker's tasks, newest first, a page at a time.
    Tasks {
        /// The page begins with tasks older than this one.
        before: Option<TaskId>,
    },
    /// One task.
    Task(TaskId),
    /// Why a task is at its worker, or waits.
    Why(TaskId),
    /// The cost of each model at each worker, in order of worker and model, a page at a time.
    Models {
        /// The page begins after this row.
        after: Option<(WorkerId, Digest)>,
    },
}

/// The answer to a question.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Answer {
    /// The asker's number of the question.
    pub request: u64,
    /// The answer itself.
    pub body: AnswerBody,
}

/// The content of an answer.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub enum AnswerBody {
    /// The state of the broker itself.
    Cluster(ClusterView),
    /// A page of workers; empty after the last one.
    Workers(Vec<WorkerView>),
    /// A page of tasks; empty after the last one.
    Tasks(Vec<TaskView>),
    /// One task.
    Task(TaskView),
    /// The placement of a task, explained.
    Why(WhyView),
    /// A page of model costs; empty after the last one.
    Models(Vec<ModelView>),
    /// There is no such task, or it belongs to another client.
    NotFound,
}
