//! The broker's input (events) and output (actions).

use std::time::Duration;

use proto_msgs::{
    Attempt, BrokerToClient, BrokerToWorker, ClientToBroker, Epoch, Heartbeat, Outcome, PeerId, PublicKey, Register,
    TaskId, TaskSpec, WorkerId, WorkerToBroker,
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
    /// Tasks running or granted in each lane: more than its slots if items are packed or sent ahead.
    pub tasks: [u16; 2],
    /// GPU memory promised to these tasks.
    pub gpu_memory_reserved_bytes: u64,
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
    /// What the task wants, its lane decided. The deadline counts from `submitted_unix_ms`.
    pub spec: TaskSpec,
    /// Placements so far.
    pub attempt: Attempt,
    /// The worker of the last attempt, and its epoch at that placement.
    pub worker: Option<(WorkerId, Epoch)>,
    /// When the task was submitted, milliseconds since 1970.
    pub submitted_unix_ms: u64,
    /// How and when (milliseconds since 1970) the task ended; `None` while it is unfinished.
    pub ended: Option<(Outcome, u64)>,
}

impl TaskRecord {
    /// The footing of the task's promise once the store has this record.
    pub fn footing(&self) -> Footing {
        Footing { attempt: self.attempt, worker: self.worker.map(|(worker, _)| worker), is_over: self.ended.is_some() }
    }

    /// When the task's answer becomes worthless, milliseconds since 1970.
    pub fn deadline_unix_ms(&self) -> Option<u64> {
        self.spec.deadline_ms.map(|ms| self.submitted_unix_ms.saturating_add(ms))
    }
}
