//! Between client and broker.

use bincode::{Decode, Encode};

use crate::{
    Arch, Attempt, ClientId, Digest, JobId, ModelRef, Outcome, PublicKey, TaskId, Ticket, WorkerId,
    message::{ClusterView, LabelRule, Lane, ModelView, Slo, Stage, TaskView, WhyView, WorkerView},
};

/// Attempt number of a task: the pair by which worker and client speak of one run.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AttemptId {
    /// The task.
    pub task: TaskId,
    /// Which placement of it.
    pub attempt: Attempt,
}

/// What a run may use; also what a worker must have.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct Demands {
    /// Thousandths of a core; 0 means no wish.
    pub cpu_millis: u32,
    /// Main memory; 0 means no wish.
    pub memory_bytes: u64,
    /// GPU memory; 0 means no GPU.
    pub gpu_memory_bytes: u64,
    /// Only this architecture.
    pub arch: Option<Arch>,
}

/// Who opens the direct connection.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Direction {
    /// The client connects to the worker's door: the usual case.
    ClientDials,
    /// The worker connects to the client: for workers behind NAT.
    WorkerDials,
}

/// What the client knows of its own task: the broker believes it, so that a restarted broker need remember nothing.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Standing {
    /// No worker yet.
    Asking,
    /// At work with this worker; no other is wanted.
    Holding {
        /// The attempt the client follows.
        attempt: Attempt,
        /// At this worker.
        worker: WorkerId,
    },
    /// That attempt came to nothing; another worker is wanted.
    Lost {
        /// The attempt that failed; the next one has a higher number.
        attempt: Attempt,
        /// At this worker.
        worker: WorkerId,
        /// How it failed, as the client saw it.
        outcome: Outcome,
    },
}

/// A task and how it stands, seen by its client.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Submit {
    /// Made by the client; the same in every repetition.
    pub task: TaskId,
    /// Whose task.
    pub client: ClientId,
    /// Which `submit` command this task belongs to.
    pub job: JobId,
    /// What a person calls the model.
    pub model_name: String,
    /// The model.
    pub model: ModelRef,
    /// Models that it passes through after the first.
    pub then: Vec<Stage>,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Items in this task, at least 1.
    pub items: u32,
    /// Items of the whole `submit`, this task's included.
    pub job_items: u32,
    /// 0 to 100.
    pub priority: u8,
    /// The lane it wants; `None`: by the number of items.
    pub lane: Option<Lane>,
    /// What it was promised, if it belongs to a stream with a promise.
    pub slo: Option<Slo>,
    /// Wishes for labels.
    pub labels: Vec<LabelRule>,
    /// The answer is worthless after this many milliseconds from now; of repetitions the broker heeds the first it hears.
    pub deadline_ms: Option<u64>,
    /// What the run may use.
    pub demands: Demands,
    /// Go on when the client leaves, and keep the result.
    pub detached: bool,
    /// The key of the client's connections; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Where the client can be dialled; empty if nowhere.
    pub endpoints: Vec<String>,
    /// Only this direction.
    pub direction: Option<Direction>,
    /// The client's view.
    pub standing: Standing,
}

/// The end of a task, said by its client.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Close {
    /// The task.
    pub task: TaskId,
    /// Whose task.
    pub client: ClientId,
    /// The attempt that ended so; 0 if there was none.
    pub attempt: Attempt,
    /// How it ended for the client.
    pub outcome: Outcome,
}

/// Stop a task, asked by the same user from another process. Answered with [`Ended`] or an error.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct CancelTask {
    /// The task.
    pub task: TaskId,
    /// Whose task.
    pub client: ClientId,
}

/// Ask for the way to a detached task's result. Answered with a [`Grant`] for
/// [`Purpose::Fetch`](crate::Purpose::Fetch), [`Noted`] while there is none yet, or [`Ended`].
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Locate {
    /// The task.
    pub task: TaskId,
    /// Whose task.
    pub client: ClientId,
    /// The key of the client's connections; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Where the client can be dialled; empty if nowhere.
    pub endpoints: Vec<String>,
    /// The way that was named last and led nowhere: the other one, if there is one.
    pub unreachable: Option<Direction>,
}

/// A place for one attempt.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Grant {
    /// The attempt.
    pub id: AttemptId,
    /// The worker.
    pub worker: WorkerId,
    /// What a person calls the worker.
    pub worker_name: String,
    /// The worker's key; `None` in a mesh without keys.
    pub worker_key: Option<PublicKey>,
    /// Where the worker can be dialled, best first; empty if nowhere.
    pub endpoints: Vec<String>,
    /// Who dials.
    pub direction: Direction,
    /// Bytes that may be under way unacknowledged.
    pub window_bytes: u32,
    /// The worker has the model already.
    pub model_held: bool,
    /// Until the run's end, as predicted; `None` if nobody has run the model yet.
    pub predicted_ms: Option<u32>,
    /// Lets the client in.
    pub ticket: Ticket,
}

/// A task that waits.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Queued {
    /// The task.
    pub task: TaskId,
    /// Tasks before it, 0 if it is the next.
    pub position: u32,
    /// What it waits for.
    pub reason: String,
    /// Until it is placed, as predicted; `None` if there is nothing to go by.
    pub starts_in_ms: Option<u32>,
    /// For a detached task: the store has it.
    pub durable: bool,
}

/// How the broker sees an attempt that the client holds.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Noted {
    /// The attempt.
    pub id: AttemptId,
    /// Heartbeats come from the attempt's worker and name it.
    pub worker_alive: bool,
    /// For a detached task: the store has that this attempt is there. Once the worker has everything, its client may leave.
    pub durable: bool,
}

/// A task is over.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Ended {
    /// The task.
    pub task: TaskId,
    /// How it ended.
    pub outcome: Outcome,
    /// For [`ErrorCode::Busy`](crate::ErrorCode::Busy) and its like: when to try again.
    pub retry_after_ms: Option<u32>,
}

/// A question.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Ask {
    /// Chosen by the asker, repeated in the answer.
    pub request: u64,
    /// Who asks: tasks of others are not shown.
    pub client: ClientId,
    /// What is asked.
    pub question: Question,
}

/// What can be asked.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Question {
    /// The broker itself.
    Cluster,
    /// Workers, a page at a time, in order of id.
    Workers {
        /// After this one.
        after: Option<WorkerId>,
    },
    /// The asker's tasks, newest first, a page at a time.
    Tasks {
        /// Before this one.
        before: Option<TaskId>,
    },
    /// One task.
    Task(TaskId),
    /// Why a task is where it is.
    Why(TaskId),
    /// What models cost at which workers, a page at a time, in order of worker and model.
    Models {
        /// After this row.
        after: Option<(WorkerId, Digest)>,
    },
}

/// The answer to a question.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Answer {
    /// The asker's number.
    pub request: u64,
    /// What is known.
    pub body: AnswerBody,
}

/// What is answered.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub enum AnswerBody {
    /// The broker itself.
    Cluster(ClusterView),
    /// A page; empty behind the end.
    Workers(Vec<WorkerView>),
    /// A page; empty behind the end.
    Tasks(Vec<TaskView>),
    /// One task.
    Task(TaskView),
    /// The placement of a task explained.
    Why(WhyView),
    /// A page; empty behind the end.
    Models(Vec<ModelView>),
    /// There is no such task, or it is somebody else's.
    NotFound,
}
