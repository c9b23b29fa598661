//! Between worker and broker.

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

/// What does not change during one life of a worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Register {
    /// Stays across restarts.
    pub worker: WorkerId,
    /// Grows with each start.
    pub epoch: Epoch,
    /// What a person calls it.
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
    /// How it runs models.
    pub engine: EngineKind,
    /// What it can open.
    pub formats: Vec<ModelFormat>,
    /// Where clients can dial it, best first; empty if nowhere.
    pub endpoints: Vec<String>,
    /// Key of its door; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Signs the tickets of this life.
    pub ticket_key: TicketKey,
    /// Batches at the same time in each lane, in the order of [`Lane::ALL`](crate::Lane::ALL). Idle slots of the batch lane are lent to realtime.
    pub slots: [u16; 2],
    /// What slots compute on: slot `i`, realtime ones first, uses entry `i` modulo the length. −1 is the CPU, others are GPUs.
    pub device_map: Vec<i16>,
    /// For people and for placement.
    pub labels: Vec<(String, String)>,
    /// GPUs in it.
    pub gpus: Vec<Gpu>,
    /// Time between its heartbeats.
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
    /// Free in the blob store's file system.
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
    /// Memory in use.
    pub memory_used_bytes: u64,
    /// Use, thousandths.
    pub busy_permille: u16,
}

/// Where an attempt stands at its worker.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum AttemptState {
    /// The way is being made, or model and inputs are on it.
    Receiving,
    /// Everything is here; the run waits for a place or for its engine.
    Ready,
    /// The model runs.
    Running,
    /// It is over. Repeated until the broker says that it may be forgotten.
    Finished(Outcome),
}

/// One attempt in a heartbeat.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct AttemptReport {
    /// Which.
    pub id: AttemptId,
    /// Where it stands.
    pub state: AttemptState,
    /// It goes on without its client.
    pub detached: bool,
}

/// How a worker is, and its whole set of attempts.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Heartbeat {
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub epoch: Epoch,
    /// Grows by one with each heartbeat.
    pub seq: u64,
    /// No new attempts, please.
    pub draining: bool,
    /// It keeps as many results as it may: no more detached attempts, please.
    pub keeps_no_more: bool,
    /// How busy.
    pub load: Load,
    /// Everything it holds, finished and unacknowledged attempts included.
    pub attempts: Vec<AttemptReport>,
    /// Models in its blob store, most recently used first.
    pub held: Vec<Digest>,
    /// Models that are loaded right now.
    pub warm: Vec<Digest>,
    /// Speed of the direct link, from real transfers: bytes per second, 0 if none was seen.
    pub link_bytes_per_s: u64,
    /// How busy the lanes are, in the order of [`Lane::ALL`](crate::Lane::ALL).
    pub lanes: [LaneLoad; 2],
    /// What models cost here, most recently run first.
    pub costs: Vec<ModelCost>,
}

/// Good-bye.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Leave {
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub epoch: Epoch,
}

/// Answer to a heartbeat.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct HeartbeatAck {
    /// Whose heartbeat.
    pub worker: WorkerId,
    /// Of which life.
    pub epoch: Epoch,
    /// Which heartbeat.
    pub seq: u64,
    /// The broker knows this life of the worker; if not, register again.
    pub known: bool,
    /// The broker's wall clock, milliseconds since 1970: what ticket times are compared with.
    pub broker_unix_ms: u64,
    /// Finished attempts that need not be named again.
    pub forget: Vec<AttemptId>,
    /// Attempts that must not go on.
    pub stop: Vec<AttemptId>,
}

/// Dial a client that cannot dial you.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Introduce {
    /// What the client will present; the dialling worker checks it like any other.
    pub ticket: Ticket,
    /// Where the client listens, best first.
    pub endpoints: Vec<String>,
    /// Key of the client's listener; `None` in a mesh without keys.
    pub client_key: Option<PublicKey>,
}
