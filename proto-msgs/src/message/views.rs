//! What the broker shows to people and scripts.

use bincode::{Decode, Encode};

use crate::{
    Arch, Attempt, Digest, EngineKind, Epoch, Gpu, JobId, Load, ModelFormat, ModelRef, Outcome, TaskId, WorkerId,
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
    /// Attempts at the same time.
    pub slots: u16,
    /// Slots in use or promised.
    pub slots_used: u16,
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
    /// User priority.
    pub priority: u8,
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
}
