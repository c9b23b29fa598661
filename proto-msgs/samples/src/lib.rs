//! Ordinary messages of a worker and a client, for tests and benches.
//!
//! A test writes down only what it is about and takes the rest from here, so a new field of a message is one line in
//! one place: `Register { slots: [2, 0], ..mesh_samples::register(1) }`. Never: a dependency of a program that ships.
//! The pinned bytes of `proto-msgs/tests/bytes` do not come from here, since there every field has a value.

use proto_msgs::{
    Arch, Attempt, ClientId, Demands, Digest, EngineKind, Epoch, Heartbeat, JobId, Lane, Load, Manifest, ModelFormat,
    ModelRef, Open, PeerId, Purpose, Register, Standing, Submit, TaskId, TaskSpec, Ticket, TicketBody, TicketKey,
    WorkerId,
};

/// The model that [`submit`] asks for.
pub const MODEL: Digest = Digest::from_bytes([7; 32]);

/// The key that signs the tickets of every worker of [`register`].
pub const TICKET_KEY: TicketKey = TicketKey([1; 32]);

/// An id of this kind; ids sort like their numbers.
fn id(kind: u8, number: u32) -> [u8; 16] {
    let mut bytes = [kind; 16];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// The worker with this number.
pub fn worker_id(number: u32) -> WorkerId {
    WorkerId::from_bytes(id(1, number))
}

/// The client with this number.
pub fn client_id(number: u32) -> ClientId {
    ClientId::from_bytes(id(2, number))
}

/// The task with this number.
pub fn task_id(number: u32) -> TaskId {
    TaskId::from_bytes(id(3, number))
}

/// The number in a task id made by [`task_id`].
pub fn task_number(task: TaskId) -> u32 {
    let [a, b, c, d, ..] = *task.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// The connection of the worker with this number.
pub fn worker_peer(number: u32) -> PeerId {
    peer(1, number)
}

/// The connection of the client with this number.
pub fn client_peer(number: u32) -> PeerId {
    peer(2, number)
}

fn peer(kind: u8, number: u32) -> PeerId {
    let [a, b, c, d] = number.to_be_bytes();
    PeerId::from_slice(&[kind, a, b, c, d]).expect("invariant: five bytes are a name")
}

/// The first `Register` of a worker with four cores, one slot in each lane, every format, no GPU and no keys.
pub fn register(number: u32) -> Register {
    Register {
        worker: worker_id(number),
        epoch: Epoch(1),
        name: format!("w{number}"),
        version: "0.1.0".to_owned(),
        os: "sample".to_owned(),
        arch: Arch::Amd64,
        cores: 4,
        memory_bytes: 8 << 30,
        run_memory_bytes: 1 << 30,
        engine: EngineKind::Process,
        formats: ModelFormat::ALL.to_vec(),
        endpoints: vec!["tcp://w:1".to_owned()],
        key: None,
        ticket_key: TICKET_KEY,
        slots: [1, 1],
        device_map: vec![-1],
        device_width: 1,
        labels: Vec::new(),
        gpus: Vec::new(),
        heartbeat_ms: 1000,
    }
}

/// A heartbeat of this life of a worker that is idle, holds no attempt and has measured nothing.
pub fn heartbeat(of: &Register, seq: u64) -> Heartbeat {
    Heartbeat {
        worker: of.worker,
        epoch: of.epoch,
        seq,
        draining: false,
        keeps_no_more: false,
        load: Load { memory_available_bytes: of.memory_bytes, ..Load::default() },
        attempts: Vec::new(),
        names_all: true,
        held: Vec::new(),
        warm: Vec::new(),
        link_bytes_per_s: 0,
        broker_rtt_us: 0,
        lanes: Default::default(),
        costs: Vec::new(),
    }
}

/// One attached item for [`MODEL`] without wishes, submitted for the first time.
pub fn submit(task: u32, client: u32) -> Submit {
    let spec = TaskSpec {
        task: task_id(task),
        client: client_id(client),
        job: JobId::from_bytes([0; 16]),
        model_name: "model".to_owned(),
        model: ModelRef { digest: MODEL, size_bytes: 1000, format: ModelFormat::TfLite },
        then: Vec::new(),
        input_bytes: 100,
        items: 1,
        job_items: 1,
        priority: 50,
        lane: None,
        slo: None,
        labels: Vec::new(),
        deadline_ms: None,
        demands: Demands::default(),
        detached: false,
        key: None,
        direction: None,
    };
    Submit { spec, endpoints: Vec::new(), standing: Standing::Asking }
}

/// The body of a ticket for the first attempt of one attached item at the first life of a worker; it never expires.
pub fn ticket_body(task: u32, client: u32, worker: u32) -> TicketBody {
    TicketBody {
        purpose: Purpose::Run,
        task: task_id(task),
        attempt: Attempt(1),
        worker: worker_id(worker),
        epoch: Epoch(1),
        client: client_id(client),
        client_key: None,
        bytes_max: 1 << 30,
        priority: 50,
        lane: Lane::Realtime,
        items: 1,
        detached: false,
        demands: Demands::default(),
        gpu: None,
        deadline_unix_ms: None,
        slo_ms: None,
        expires_unix_ms: u64::MAX,
    }
}

/// An opening with this ticket, for the first time, by a client that has nothing yet and a window of one byte.
pub fn opening(ticket: Ticket, manifest: Option<Manifest>) -> Open {
    Open { ticket, manifest, window_bytes: 1, resume: false, outputs_here: Vec::new() }
}
