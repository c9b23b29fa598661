//! What happens to the broker and what it orders.

use std::time::Duration;

use proto_msgs::{
    Attempt, BrokerToClient, BrokerToWorker, ClientId, ClientToBroker, Demands, Epoch, Heartbeat, JobId, LabelRule,
    Lane, ModelRef, Outcome, PeerId, PublicKey, Register, Slo, Stage, TaskId, WorkerId, WorkerToBroker,
};

use crate::Rules;

/// Something happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client's message arrived on connection `peer`, proven to hold `key` if the mesh has keys.
    ClientSaid { peer: PeerId, key: Option<PublicKey>, message: ClientToBroker },
    /// A worker's message arrived on connection `peer`, proven to hold `key` if the mesh has keys.
    WorkerSaid { peer: PeerId, key: Option<PublicKey>, message: WorkerToBroker },
    /// What the store remembers from before the restart. Given once, first, and only if there is something.
    Restored(Vec<TaskRecord>),
    /// The store has this task's record on disk.
    Stored { task: TaskId },
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
    /// When it was last heard, milliseconds since 1970.
    pub seen_unix_ms: u64,
    /// The row is worthless after this long without news.
    pub expires_after: Duration,
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

/// The broker's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// This start of the broker.
    pub epoch: Epoch,
    /// Wall clock at [`MonoTime::ZERO`](crate::MonoTime::ZERO), milliseconds since 1970.
    pub origin_unix_ms: u64,
    /// Version of the program, for people.
    pub version: String,
    /// `redis` or `embedded`, for people.
    pub store_name: String,
    /// Connections are encrypted: a message counts only with the key it was registered with.
    pub encrypted: bool,
    /// Heartbeats a worker may miss. Three: one may be lost, one late.
    pub liveness_beats: u32,
    /// A grant that neither client nor worker has taken up in this time is taken back.
    pub grant_wait: Duration,
    /// A client that has been silent this long has left its attached tasks.
    pub client_silence: Duration,
    /// A detached task whose worker has been away this long has failed.
    pub detached_patience: Duration,
    /// Ended tasks are shown this long; results of detached tasks can be fetched this long.
    pub ended_kept: Duration,
    /// Workers may fail a task this often.
    pub attempts_max: u32,
    /// Tasks waiting at the same time, over all clients.
    pub queue_max: usize,
    /// Unfinished tasks at the same time, over all clients.
    pub tasks_max: usize,
    /// Ended tasks remembered at the same time; the oldest go first.
    pub ended_max: usize,
    /// Workers known at the same time.
    pub workers_max: usize,
    /// Rules in force.
    pub rules: Rules,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            epoch: Epoch(1),
            origin_unix_ms: 0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_name: "embedded".to_owned(),
            encrypted: false,
            liveness_beats: 3,
            // Longer than a connection takes on a bad link, shorter than anybody's patience with a lost slot.
            grant_wait: Duration::from_secs(6),
            // Clients repeat themselves every two seconds: seven may be lost.
            client_silence: Duration::from_secs(15),
            detached_patience: Duration::from_secs(600),
            ended_kept: Duration::from_secs(3600),
            attempts_max: 3,
            queue_max: 100_000,
            tasks_max: 200_000,
            ended_max: 20_000,
            workers_max: 100_000,
            rules: Rules::default(),
        }
    }
}

/// Numbers for the metrics page. Counters only grow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Gauge: workers alive.
    pub workers: u32,
    /// Gauge: slots of workers alive.
    pub slots: u32,
    /// Gauge: slots in use or promised.
    pub slots_used: u32,
    /// Gauge: tasks waiting.
    pub queued: u32,
    /// Gauge: tasks placed.
    pub placed: u32,
    /// Counter: first submits taken.
    pub submitted: u64,
    /// Counter: grants given.
    pub granted: u64,
    /// Counter: tasks ended with a result.
    pub done: u64,
    /// Counter: tasks ended without.
    pub failed: u64,
    /// Counter: tasks cancelled.
    pub cancelled: u64,
    /// Counter: submits refused.
    pub refused: u64,
    /// Counter: attempts lost and asked for again.
    pub retried: u64,
    /// Counter: heartbeats.
    pub heartbeats: u64,
    /// Counter: workers that fell silent.
    pub workers_lost: u64,
    /// Counter: reports of attempts that are no longer the task's.
    pub fenced: u64,
    /// Counter: messages from the wrong key or on the wrong task.
    pub forbidden: u64,
}
