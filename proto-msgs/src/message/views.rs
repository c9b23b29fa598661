//! What the broker shows to people and scripts.

use bincode::{Decode, Encode};

use crate::{
    Arch, Attempt, Demands, Digest, EngineKind, Epoch, Gpu, JobId, LabelRule, Lane, LaneLoad, Load, ModelCost,
    ModelFormat, ModelRef, Outcome, Packing, Prediction, Slo, Stage, TaskId, WorkerId,
};

/// The state of the broker.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct ClusterView {
    /// Version of the program.
    pub version: String,
    /// Start of the broker, milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Kind of store: `redis` or `embedded`.
    pub store: String,
    /// Whether the store answers.
    pub store_ok: bool,
    /// Whether connections are encrypted.
    pub encrypted: bool,
    /// Workers alive.
    pub workers: u32,
    /// Error of the latest predictions: median of |predicted − actual| / actual, thousandths; `None` before the first
    /// one.
    pub prediction_error_permille: Option<u32>,
    /// Name of the placement policy.
    pub policy: String,
    /// Slots of all workers alive.
    pub slots: u32,
    /// Slots in use.
    pub slots_used: u32,
    /// Tasks waiting.
    pub queued: u32,
    /// Tasks placed.
    pub placed: u32,
}

/// What a worker's tasks were promised, as far as they asked for it.
#[derive(Clone, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct Promised {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// Main memory.
    pub memory_bytes: u64,
    /// Memory of each of the worker's GPUs.
    pub gpu_memory_bytes: Vec<u64>,
}

/// A worker as the broker sees it.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct WorkerView {
    /// Id of the worker.
    pub worker: WorkerId,
    /// Its current life.
    pub epoch: Epoch,
    /// The worker's name for people.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// Operating system.
    pub os: String,
    /// Architecture.
    pub arch: Arch,
    /// Cores that tasks may use.
    pub cores: u32,
    /// Main memory that tasks may use.
    pub memory_bytes: u64,
    /// How the worker runs models.
    pub engine: EngineKind,
    /// Model formats that it can open.
    pub formats: Vec<ModelFormat>,
    /// Where clients can dial it.
    pub endpoints: Vec<String>,
    /// Key and value of each label.
    pub labels: Vec<(String, String)>,
    /// The worker's GPUs.
    pub gpus: Vec<Gpu>,
    /// Number of slots in each lane, in the order of [`Lane::ALL`].
    pub slots: [u16; 2],
    /// Tasks running or promised in each lane; more than its slots if items are packed.
    pub slots_used: [u16; 2],
    /// The device of each slot, as in [`Register::device_map`](crate::Register::device_map).
    pub device_map: Vec<i16>,
    /// Load of each lane.
    pub lanes: [LaneLoad; 2],
    /// What is promised to its tasks.
    pub promised: Promised,
    /// Thousandths of its tasks that missed their service level in the last window; `None`: no verdict.
    pub violation_permille: Option<u16>,
    /// The worker takes no new attempts.
    pub draining: bool,
    /// Load of the machine.
    pub load: Load,
    /// Models in its blob store.
    pub held: Vec<Digest>,
    /// Speed of its direct link, bytes per second; 0 if unknown.
    pub link_bytes_per_s: u64,
    /// Time from its heartbeat to the broker's answer, microseconds, smoothed; 0 if unknown.
    pub broker_rtt_us: u32,
    /// Time since its last sign of life.
    pub silent_ms: u64,
}

/// The state of a task.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum TaskStanding {
    /// The task waits for a worker.
    Queued {
        /// Tasks before it in the queue.
        position: u32,
        /// What it waits for.
        reason: String,
    },
    /// A worker was granted to the client; neither has confirmed it yet.
    Granted,
    /// The client holds the attempt or the worker has named it.
    Placed,
    /// It is over.
    Ended(Outcome),
}

/// What a task asks of its worker and of the time. Empty if it takes any worker and any time.
#[derive(Clone, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct Wishes {
    /// What the run may use.
    pub demands: Demands,
    /// Required and preferred labels of workers.
    pub labels: Vec<LabelRule>,
    /// The service level of the task's stream.
    pub slo: Option<Slo>,
    /// Milliseconds from the submit after which the result is worthless.
    pub deadline_ms: Option<u64>,
}

/// A task as the broker sees it.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct TaskView {
    /// Id of the task.
    pub task: TaskId,
    /// The job that it belongs to.
    pub job: JobId,
    /// The model's name for people.
    pub model_name: String,
    /// The model.
    pub model: ModelRef,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Items in this task.
    pub items: u32,
    /// User priority, after the tenant's cap.
    pub priority: u8,
    /// The lane of the task.
    pub lane: Lane,
    /// Whether it goes on without its client.
    pub detached: bool,
    /// What it asks for.
    pub wishes: Wishes,
    /// Later stages.
    pub then: Vec<Stage>,
    /// The task's state.
    pub standing: TaskStanding,
    /// Number of placements so far.
    pub attempt: Attempt,
    /// Id and name of its worker, or of the last one.
    pub worker: Option<(WorkerId, String)>,
    /// Time of the submit, milliseconds since 1970.
    pub submitted_unix_ms: u64,
    /// Time of the end, milliseconds since 1970.
    pub ended_unix_ms: Option<u64>,
}

/// One worker in the explanation of a placement.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Candidate {
    /// Id of the worker.
    pub worker: WorkerId,
    /// The worker's name for people.
    pub name: String,
    /// Reasons why the task does not fit there, or why another worker is better; empty if there are none.
    pub against: Vec<String>,
    /// The worker has the model.
    pub holds_model: bool,
    /// Whether items of the task's first model run together there.
    pub packing: Packing,
    /// Items in a batch of the best size there; 1 unless they run together.
    pub best_batch: u16,
    /// Attempts for each slot, thousandths: more than 1000 if items are packed or sent ahead.
    pub busy_permille: u16,
    /// The predicted time of the task there.
    pub prediction: Prediction,
}

/// A placement decision as it was made.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct DecisionView {
    /// Time of the decision, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Name of the policy that decided.
    pub policy: String,
    /// The worker chosen; `None` if none was.
    pub chosen: Option<WorkerId>,
    /// Workers as they stood then, best first; at most
    /// [`DECISION_CANDIDATES_MAX`](crate::limits::DECISION_CANDIDATES_MAX).
    pub candidates: Vec<Candidate>,
}

/// The terms of a task's effective priority, thousandths of a point. The larger sum goes first.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct RankView {
    /// Term of the user's priority.
    pub priority_milli: i64,
    /// Term of the time it has waited since its turn came: no other task of its client waits, or the client is not ahead
    /// of the others.
    pub waited_milli: i64,
    /// Term of the amount of data; negative.
    pub data_milli: i64,
    /// Term of what its client has already been given; negative.
    pub share_milli: i64,
}

/// The cost of a model at a worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct ModelView {
    /// The worker.
    pub worker: WorkerId,
    /// The worker's name for people.
    pub worker_name: String,
    /// The model is loaded there.
    pub warm: bool,
    /// Costs as the worker measured them.
    pub cost: ModelCost,
}

/// The explanation of a placement.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct WhyView {
    /// The task.
    pub task: TaskView,
    /// The explanation in one sentence.
    pub summary: String,
    /// Where each attempt went and how it ended.
    pub history: Vec<String>,
    /// Workers as they stand now; at most one page.
    pub candidates: Vec<Candidate>,
    /// The last decision; `None` before the first.
    pub decision: Option<DecisionView>,
    /// What the task's models cost now at its last worker. Before its first placement: at the candidate that could do it
    /// soonest, as far as measured there.
    pub models: Vec<ModelView>,
    /// The task's effective priority now; `None` if it does not wait.
    pub rank: Option<RankView>,
    /// Predicted time from placement to the run's end, milliseconds; `None` while unknown.
    pub predicted_ms: Option<u32>,
    /// Actual time from placement to the run's end, milliseconds; `None` while unknown.
    pub took_ms: Option<u32>,
}
