//! The broker's input (events) and output (actions).

use std::time::Duration;

use proto_msgs::{
    Attempt, BrokerToClient, BrokerToWorker, ClientId, ClientToBroker, Demands, Direction, Epoch, Heartbeat, JobId,
    LabelRule, Lane, ModelRef, Outcome, PeerId, PublicKey, Register, Slo, Stage, TaskId, WorkerId, WorkerToBroker,
};

/// An input of the broker.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client's message arrived on connection `peer`. In a mesh with keys, the peer has proven that it holds `key`.
    ClientSaid { peer: PeerId, key: Option<PublicKey>, message: ClientToBroker },
    /// A worker's message arrived on connection `peer`. In a mesh with keys, the peer has proven that it holds `key`.
    WorkerSaid { peer: PeerId, key: Option<PublicKey>, message: WorkerToBroker },
    /// The tasks that the store has from before a restart. Comes once, as the first event, and only if there are any.
    Restored(Vec<TaskRecord>),
    /// The store has a record of `task` on disk; `footing` is what that record says.
    Stored { task: TaskId, footing: Footing },
    /// The store does not answer.
    StoreAway,
    /// The store answers again.
    StoreBack,
    /// The time that `next_deadline` returned has come.
    Deadline,
}

/// An order of the broker to its caller.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send a message to a client; drop it if it cannot be sent.
    TellClient { peer: PeerId, message: BrokerToClient },
    /// Send a message to a worker; drop it if it cannot be sent.
    TellWorker { peer: PeerId, message: BrokerToWorker },
    /// Pass a change to the store.
    Save(Change),
}

/// A change for the store. Changes with the same key may be merged; the last one wins.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Write the worker's row in the Metric Table.
    PutWorker(Box<WorkerRecord>),
    /// Remove the worker's row: the worker has left or died.
    DropWorker(WorkerId),
    /// Write a task. If `durable`, the broker waits for [`Event::Stored`]; otherwise it is a copy for people to read.
    PutTask { record: Box<TaskRecord>, durable: bool },
    /// Remove the task's record.
    DropTask(TaskId),
}

/// A worker's row in the Metric Table.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerRecord {
    /// The worker's registration.
    pub register: Register,
    /// The worker's last heartbeat; `None` before the first one.
    pub heartbeat: Option<Heartbeat>,
    /// Slots taken in each lane, by running and by granted tasks.
    pub slots_used: [u16; 2],
    /// Thousandths of the worker's tasks that missed their service level in the last window; `None`: no verdict.
    pub violation_permille: Option<u16>,
    /// When the worker was last heard, milliseconds since 1970.
    pub seen_unix_ms: u64,
    /// Time without news after which the row is worthless.
    pub expires_after: Duration,
}

/// The facts that the promise "this detached task is safe" rests on. It holds while the stored record has exactly
/// these.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Footing {
    /// Placements so far.
    pub attempt: Attempt,
    /// The worker of the last placement, on whose disk the attempt is.
    pub worker: Option<WorkerId>,
    /// The task has ended.
    pub is_over: bool,
}

/// A task as the store keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskRecord {
    /// The task's id.
    pub task: TaskId,
    /// The client that submitted the task.
    pub client: ClientId,
    /// The key that the task's owner must hold; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// The `submit` that the task belongs to.
    pub job: JobId,
    /// The model's name for people.
    pub model_name: String,
    /// The first model of the task.
    pub model: ModelRef,
    /// The models that follow the first one.
    pub then: Vec<Stage>,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Number of items.
    pub items: u32,
    /// The task's lane.
    pub lane: Lane,
    /// The service level promised to the task.
    pub slo: Option<Slo>,
    /// Labels that the task requires or prefers.
    pub labels: Vec<LabelRule>,
    /// The user's priority.
    pub priority: u8,
    /// Resources that the run may use.
    pub demands: Demands,
    /// The side that must open the direct connection; `None` if either may.
    pub direction: Option<Direction>,
    /// The task goes on without its client.
    pub detached: bool,
    /// Placements so far.
    pub attempt: Attempt,
    /// The worker of the last attempt, and its epoch at that placement.
    pub worker: Option<(WorkerId, Epoch)>,
    /// When the task was submitted, milliseconds since 1970.
    pub submitted_unix_ms: u64,
    /// When the task's answer becomes worthless, milliseconds since 1970.
    pub deadline_unix_ms: Option<u64>,
    /// How and when (milliseconds since 1970) the task ended; `None` while it is unfinished.
    pub ended: Option<(Outcome, u64)>,
}

impl TaskRecord {
    /// The footing of the task's promise once the store has this record.
    pub fn footing(&self) -> Footing {
        Footing { attempt: self.attempt, worker: self.worker.map(|(worker, _)| worker), is_over: self.ended.is_some() }
    }
}
