//! Messages between worker and broker, and their parts.

use bincode::{Decode, Encode};

use crate::{
    Arch, Digest, Epoch, ModelFormat, Outcome, PublicKey, Ticket, TicketKey, WorkerId,
    message::{AttemptId, LaneLoad, ModelCost},
};

/// What runs models at a worker.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub enum EngineKind {
    /// Containers of a Docker or Podman engine.
    Docker,
    /// Child processes.
    Process,
}

/// The facts that do not change during one life of a worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Register {
    /// Id of the worker; stays across restarts.
    pub worker: WorkerId,
    /// The worker's life; grows with each start.
    pub epoch: Epoch,
    /// The worker's name for people.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// Operating system, for people.
    pub os: String,
    /// Architecture.
    pub arch: Arch,
    /// Cores that tasks may use.
    pub cores: u32,
    /// Main memory that tasks may use.
    pub memory_bytes: u64,
    /// Main memory that a run gets if its task asks for none.
    pub run_memory_bytes: u64,
    /// How the worker runs models.
    pub engine: EngineKind,
    /// Model formats that it can open.
    pub formats: Vec<ModelFormat>,
    /// Where clients can dial it, best first; empty if they cannot.
    pub endpoints: Vec<String>,
    /// Key of the worker's door; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Key that signs the tickets of this life.
    pub ticket_key: TicketKey,
    /// Number of slots in each lane, in the order of [`Lane::ALL`](crate::Lane::ALL). Idle slots of the batch lane are
    /// lent to realtime.
    pub slots: [u16; 2],
    /// The device of each slot: slot `i`, realtime ones first, uses entry `i` modulo the length. −1 is the CPU, others
    /// are GPUs.
    pub device_map: Vec<i16>,
    /// Batches that may run on one GPU at once. On the CPU only the slots limit them.
    pub device_width: u16,
    /// Key and value of each label, for people and for placement.
    pub labels: Vec<(String, String)>,
    /// The worker's GPUs.
    pub gpus: Vec<Gpu>,
    /// Interval of its heartbeats.
    pub heartbeat_ms: u32,
}

/// A GPU.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Gpu {
    /// Model name.
    pub name: String,
    /// Its memory.
    pub memory_bytes: u64,
}

/// How busy a machine is.
#[derive(Clone, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct Load {
    /// Processor use since the last heartbeat, thousandths of all cores.
    pub cpu_permille: u16,
    /// One-minute load average, thousandths.
    pub load1_milli: u32,
    /// Main memory free for new work.
    pub memory_available_bytes: u64,
    /// Free bytes in the blob store's file system.
    pub disk_free_bytes: u64,
    /// Received since the last heartbeat, bytes per second over all interfaces.
    pub net_rx_bytes_per_s: u64,
    /// Sent since the last heartbeat, bytes per second over all interfaces.
    pub net_tx_bytes_per_s: u64,
    /// Hottest sensor, thousandths of a degree Celsius.
    pub temperature_milli_c: Option<i32>,
    /// The firmware's throttle bits as a Raspberry Pi reports them: bit 0 under-voltage, 1 capped, 2 throttled, 3 hot.
    pub throttled_bits: Option<u32>,
    /// One per GPU in [`Register::gpus`].
    pub gpus: Vec<GpuLoad>,
}

/// How busy a GPU is.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct GpuLoad {
    /// Memory in use, without that of the worker's idle runners, which end for a task that needs it.
    pub memory_used_bytes: u64,
    /// Use, thousandths.
    pub busy_permille: u16,
}

/// Where an attempt stands at its worker.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum AttemptState {
    /// Model and inputs are arriving, or the link is being made.
    Receiving,
    /// Model and inputs are here; the run waits for a slot or for its engine.
    Ready,
    /// The model runs.
    Running,
    /// The attempt is over. Repeated until the broker says that it may be forgotten.
    Finished(Outcome),
}

/// One attempt in a heartbeat.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct AttemptReport {
    /// The attempt.
    pub id: AttemptId,
    /// State of the attempt.
    pub state: AttemptState,
}

/// A worker's load and its whole set of attempts.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Heartbeat {
    /// Id of the worker.
    pub worker: WorkerId,
    /// The worker's current life.
    pub epoch: Epoch,
    /// Number of the heartbeat; grows by one each time.
    pub seq: u64,
    /// The worker takes no new attempts.
    pub draining: bool,
    /// The worker keeps as many results as it may: it takes no more detached attempts.
    pub keeps_no_more: bool,
    /// Load of the machine.
    pub load: Load,
    /// Attempts under way, then ends that the broker has not acknowledged, as far as they fit: see `names_all`.
    pub attempts: Vec<AttemptReport>,
    /// `attempts` are all. If not, some of the finished ones found no place in it: they come with the next.
    pub names_all: bool,
    /// Models in its blob store, most recently used first.
    pub held: Vec<Digest>,
    /// Models that are loaded right now.
    pub warm: Vec<Digest>,
    /// Speed of the direct link in real transfers: bytes per second, 0 if none was seen.
    pub link_bytes_per_s: u64,
    /// Time from a heartbeat to the broker's answer, microseconds, smoothed; 0 before the first answer.
    pub broker_rtt_us: u32,
    /// Load of each lane, in the order of [`Lane::ALL`](crate::Lane::ALL).
    pub lanes: [LaneLoad; 2],
    /// Cost of models at this worker, most recently run first.
    pub costs: Vec<ModelCost>,
}

/// The worker leaves for good.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Leave {
    /// Id of the worker.
    pub worker: WorkerId,
    /// The life that ends.
    pub epoch: Epoch,
}

/// Answer to a heartbeat.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct HeartbeatAck {
    /// Id of the worker.
    pub worker: WorkerId,
    /// The life that sent the heartbeat.
    pub epoch: Epoch,
    /// Number of the heartbeat that is answered.
    pub seq: u64,
    /// The broker knows this life of the worker; if false, the worker registers again.
    pub known: bool,
    /// The broker's wall clock, milliseconds since 1970: ticket times are compared with it.
    pub broker_unix_ms: u64,
    /// Finished attempts that need not be reported again.
    pub forget: Vec<AttemptId>,
    /// Attempts that must stop.
    pub stop: Vec<AttemptId>,
}

/// Tells a worker that another process has its id: a later life has registered, and both are alive. Two workers with
/// copies of one state folder do that.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Overtaken {
    /// Id of the worker.
    pub worker: WorkerId,
    /// The life that is told.
    pub epoch: Epoch,
}

/// Asks a worker to dial a client that cannot dial the worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Introduce {
    /// The ticket that the client will present. The worker checks it like any other.
    pub ticket: Ticket,
    /// Where the client listens, best first.
    pub endpoints: Vec<String>,
    /// Key of the client's listener; `None` in a mesh without keys.
    pub client_key: Option<PublicKey>,
}
