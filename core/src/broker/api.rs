//! What happens to the broker and what it orders.

use std::time::Duration;

use proto_msgs::{
    Attempt, BrokerToClient, BrokerToWorker, ClientId, ClientToBroker, Demands, Direction, Epoch, Heartbeat, JobId,
    LabelRule, Lane, ModelRef, Outcome, PeerId, PublicKey, Register, Slo, Stage, TaskId, WorkerId, WorkerToBroker,
};

/// Something happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client's message arrived on connection `peer`, proven to hold `key` if the mesh has keys.
    ClientSaid { peer: PeerId, key: Option<PublicKey>, message: ClientToBroker },
    /// A worker's message arrived on connection `peer`, proven to hold `key` if the mesh has keys.
    WorkerSaid { peer: PeerId, key: Option<PublicKey>, message: WorkerToBroker },
    /// What the store remembers from before the restart. Given once, first, and only if there is something.
    Restored(Vec<TaskRecord>),
    /// The store has a record of this task on disk, and this stands in it.
    Stored { task: TaskId, footing: Footing },
    /// The store does not answer.
    StoreAway,
    /// The store answers again.
    StoreBack,
    /// The time that `next_deadline` named has come.
    Deadline,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send; a message that cannot be sent is dropped.
    TellClient { peer: PeerId, message: BrokerToClient },
    /// Send; a message that cannot be sent is dropped.
    TellWorker { peer: PeerId, message: BrokerToWorker },
    /// Tell the store.
    Save(Change),
}

/// A change that the store is told. Changes of the same key may be merged, the last one wins.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The worker's row in the Metric Table.
    PutWorker(Box<WorkerRecord>),
    /// The worker has left or died.
    DropWorker(WorkerId),
    /// A task. If `durable`, the broker waits for [`Event::Stored`]; if not, it is a copy for people to read.
    PutTask { record: Box<TaskRecord>, durable: bool },
    /// The task need not be remembered.
    DropTask(TaskId),
}

/// A worker as the Metric Table shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerRecord {
    /// What it said of itself.
    pub register: Register,
    /// What it last said of its state; `None` before the first heartbeat.
    pub heartbeat: Option<Heartbeat>,
    /// Tasks at work or promised in each lane.
    pub slots_used: [u16; 2],
    /// Thousandths of its tasks that missed their service level in the last window; `None`: no verdict.
    pub violation_permille: Option<u16>,
    /// When it was last heard, milliseconds since 1970.
    pub seen_unix_ms: u64,
    /// The row is worthless after this long without news.
    pub expires_after: Duration,
}

/// What the promise that a detached task is safe rests on: it holds while the store has just this.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Footing {
    /// Placements so far.
    pub attempt: Attempt,
    /// Whose disk the last of them is for.
    pub worker: Option<WorkerId>,
    /// The task is over.
    pub is_over: bool,
}

/// A task as the store keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskRecord {
    /// Which.
    pub task: TaskId,
    /// Whose.
    pub client: ClientId,
    /// The key its owner must hold; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Of which `submit`.
    pub job: JobId,
    /// What a person calls the model.
    pub model_name: String,
    /// The model.
    pub model: ModelRef,
    /// Models that it passes through after the first.
    pub then: Vec<Stage>,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Items in it.
    pub items: u32,
    /// Its lane.
    pub lane: Lane,
    /// What it was promised.
    pub slo: Option<Slo>,
    /// Wishes for labels.
    pub labels: Vec<LabelRule>,
    /// User priority.
    pub priority: u8,
    /// What the run may use.
    pub demands: Demands,
    /// Who must open the direct connection, if that matters.
    pub direction: Option<Direction>,
    /// Goes on without its client.
    pub detached: bool,
    /// Placements so far.
    pub attempt: Attempt,
    /// Where the attempt is, and in which life of that worker it was placed.
    pub worker: Option<(WorkerId, Epoch)>,
    /// When it was submitted, milliseconds since 1970.
    pub submitted_unix_ms: u64,
    /// When its answer becomes worthless, milliseconds since 1970.
    pub deadline_unix_ms: Option<u64>,
    /// How it ended, and when (milliseconds since 1970); `None` while it lives.
    pub ended: Option<(Outcome, u64)>,
}

impl TaskRecord {
    /// What promises rest on once the store has this record.
    pub fn footing(&self) -> Footing {
        Footing { attempt: self.attempt, worker: self.worker.map(|(worker, _)| worker), is_over: self.ended.is_some() }
    }
}
