//! What the broker shows to people and scripts.

use bincode::{Decode, Encode};

use crate::{
    Arch, Attempt, Digest, EngineKind, Epoch, Gpu, JobId, Lane, LaneLoad, Load, ModelCost, ModelFormat, ModelRef,
    Outcome, Prediction, TaskId, WorkerId,
};

/// The broker.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct ClusterView {
    /// Version of the program.
    pub version: String,
    /// When it started, milliseconds since 1970.
    pub started_unix_ms: u64,
    /// `redis` or `embedded`.
    pub store: String,
    /// The store answers.
    pub store_ok: bool,
    /// Connections are encrypted.
    pub encrypted: bool,
    /// Workers alive.
    pub workers: u32,
    /// Prediction against reality since the start: median of |predicted − actual| / actual, thousandths; `None` before the first.
    pub prediction_error_permille: Option<u32>,
    /// How places are chosen.
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

/// A worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct WorkerView {
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub epoch: Epoch,
    /// What a person calls it.
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
    /// How it runs models.
    pub engine: EngineKind,
    /// What it can open.
    pub formats: Vec<ModelFormat>,
    /// Where clients can dial it.
    pub endpoints: Vec<String>,
    /// For people.
    pub labels: Vec<(String, String)>,
    /// GPUs in it.
    pub gpus: Vec<Gpu>,
    /// Batches at the same time in each lane.
    pub slots: [u16; 2],
    /// Tasks at work or promised in each lane; more than slots where items are packed.
    pub slots_used: [u16; 2],
    /// What slots compute on.
    pub device_map: Vec<i16>,
    /// How busy its lanes are.
    pub lanes: [LaneLoad; 2],
    /// Thousandths of its tasks that missed their service level in the last window; `None`: no verdict.
    pub violation_permille: Option<u16>,
    /// Takes no new attempts.
    pub draining: bool,
    /// How busy.
    pub load: Load,
    /// Models it has.
    pub held: Vec<Digest>,
    /// Speed of its direct link, bytes per second; 0 if unknown.
    pub link_bytes_per_s: u64,
    /// Since its last sign of life.
    pub silent_ms: u64,
}

/// Where a task stands.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum TaskStanding {
    /// Waiting for a worker.
    Queued {
        /// Tasks before it.
        position: u32,
        /// What it waits for.
        reason: String,
    },
    /// A worker was named to the client; nothing heard from there yet.
    Granted,
    /// The client holds the attempt or the worker has named it.
    Placed,
    /// It is over.
    Ended(Outcome),
}

/// A task.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct TaskView {
    /// Which.
    pub task: TaskId,
    /// Of which `submit`.
    pub job: JobId,
    /// What a person calls the model.
    pub model_name: String,
    /// The model.
    pub model: ModelRef,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Items in it.
    pub items: u32,
    /// User priority, after the tenant's cap.
    pub priority: u8,
    /// Its lane.
    pub lane: Lane,
    /// Goes on without its client.
    pub detached: bool,
    /// Where it stands.
    pub standing: TaskStanding,
    /// Placements so far.
    pub attempt: Attempt,
    /// Where it is, or was last.
    pub worker: Option<(WorkerId, String)>,
    /// When it was submitted, milliseconds since 1970.
    pub submitted_unix_ms: u64,
    /// When it ended, milliseconds since 1970.
    pub ended_unix_ms: Option<u64>,
}

/// One worker in the explanation of a placement.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Candidate {
    /// Who.
    pub worker: WorkerId,
    /// What a person calls it.
    pub name: String,
    /// What spoke against it; empty if it fitted.
    pub against: Vec<String>,
    /// It has the model.
    pub holds_model: bool,
    /// Slots in use of all slots, thousandths.
    pub busy_permille: u16,
    /// The time the task would take there.
    pub prediction: Prediction,
}

/// A placement as it was decided.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct DecisionView {
    /// When, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// By which policy.
    pub policy: String,
    /// The worker chosen; `None` if none was.
    pub chosen: Option<WorkerId>,
    /// Workers as they stood then, best first; at most
    /// [`DECISION_CANDIDATES_MAX`](crate::limits::DECISION_CANDIDATES_MAX).
    pub candidates: Vec<Candidate>,
}

/// The terms of a task's effective priority, thousandths of a point. Larger goes first.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct RankView {
    /// From the user's priority.
    pub priority_milli: i64,
    /// From the time it has waited.
    pub waited_milli: i64,
    /// From the amount of data; negative.
    pub data_milli: i64,
    /// From what its client has had already; negative.
    pub share_milli: i64,
}

/// What a model costs at a worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct ModelView {
    /// The worker.
    pub worker: WorkerId,
    /// What a person calls it.
    pub worker_name: String,
    /// It is loaded there.
    pub warm: bool,
    /// The costs.
    pub cost: ModelCost,
}

/// The explanation of a placement.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct WhyView {
    /// The task.
    pub task: TaskView,
    /// In one sentence.
    pub summary: String,
    /// Where it went at each attempt and how that ended.
    pub history: Vec<String>,
    /// Workers as they stand now; at most a page.
    pub candidates: Vec<Candidate>,
    /// The last placement as it was decided; `None` before the first.
    pub decision: Option<DecisionView>,
    /// Its effective priority now; `None` if it does not wait.
    pub rank: Option<RankView>,
    /// From its placement to the run's end, as predicted and as it was, milliseconds; `None` while unknown.
    pub predicted_ms: Option<u32>,
    /// See `predicted_ms`.
    pub took_ms: Option<u32>,
}
