//! One message of every kind, with a value in every field. The numbers cover each width of the variable-length
//! encoding: below 251, 16, 32 and 64 bits.

mod views;

use proto_msgs::*;
use views::{cluster_view, model_view, task_view, why_view, worker_view};

/// A message of any direction.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Any {
    ClientToBroker(ClientToBroker),
    BrokerToClient(BrokerToClient),
    WorkerToBroker(WorkerToBroker),
    BrokerToWorker(BrokerToWorker),
    ClientToWorker(ClientToWorker),
    WorkerToClient(WorkerToClient),
}

/// Calls the same method of the message, whichever direction it has.
macro_rules! each {
    ($any:expr, $message:ident => $body:expr) => {
        match $any {
            Any::ClientToBroker($message) => $body,
            Any::BrokerToClient($message) => $body,
            Any::WorkerToBroker($message) => $body,
            Any::BrokerToWorker($message) => $body,
            Any::ClientToWorker($message) => $body,
            Any::WorkerToClient($message) => $body,
        }
    };
}

impl Any {
    pub(crate) fn kind(&self) -> u16 {
        each!(self, message => message.kind())
    }

    pub(crate) fn name(&self) -> &'static str {
        each!(self, message => message.name())
    }

    pub(crate) fn to_frame(&self) -> Frame {
        each!(self, message => message.to_frame()).expect("samples are short")
    }

    /// Reads `frame` as a message of the direction that `kind` belongs to.
    pub(crate) fn from_frame(kind: u16, frame: &Frame) -> Result<Self, DecodeError> {
        match kind / 100 {
            0 => ClientToBroker::from_frame(frame).map(Self::ClientToBroker),
            1 => BrokerToClient::from_frame(frame).map(Self::BrokerToClient),
            2 => WorkerToBroker::from_frame(frame).map(Self::WorkerToBroker),
            3 => BrokerToWorker::from_frame(frame).map(Self::BrokerToWorker),
            4 => ClientToWorker::from_frame(frame).map(Self::ClientToWorker),
            _ => WorkerToClient::from_frame(frame).map(Self::WorkerToClient),
        }
    }
}

/// Numbers and names of all six directions.
pub(crate) fn all_kinds() -> Vec<(u16, &'static str)> {
    [
        ClientToBroker::KINDS,
        BrokerToClient::KINDS,
        WorkerToBroker::KINDS,
        BrokerToWorker::KINDS,
        ClientToWorker::KINDS,
        WorkerToClient::KINDS,
    ]
    .concat()
}

/// At least one message of every kind.
pub(crate) fn samples() -> Vec<Any> {
    let mut all = client_and_broker();
    all.extend(worker_and_broker());
    all.extend(client_and_worker());
    all
}

fn task() -> TaskId {
    TaskId::from_bytes(*b"task............")
}

fn client() -> ClientId {
    ClientId::from_bytes(*b"client..........")
}

fn worker() -> WorkerId {
    WorkerId::from_bytes(*b"worker..........")
}

fn id() -> AttemptId {
    AttemptId { task: task(), attempt: Attempt(2) }
}

fn model() -> ModelRef {
    ModelRef { digest: Digest::from_bytes([0xD1; 32]), size_bytes: 229_032, format: ModelFormat::Onnx }
}

fn stage() -> Stage {
    Stage { name: "decode".into(), model: model() }
}

fn lanes() -> [LaneLoad; 2] {
    [LaneLoad { slots_used: 1, waiting_items: 251 }, LaneLoad { slots_used: 2, waiting_items: 70_000 }]
}

fn cost() -> ModelCost {
    ModelCost {
        model: model().digest,
        packing: Packing::On,
        best_batch: 64,
        next_batch: 300,
        curve: vec![(1, 5_200), (64, 70_000)],
        load_us: 40_000,
        dispatched: [1, 250, 251, 65_536],
    }
}

fn demands() -> Demands {
    Demands { cpu_millis: 2000, memory_bytes: 1 << 30, gpu_memory_bytes: 4 << 30, arch: Some(Arch::Arm64) }
}

fn key(byte: u8) -> Option<PublicKey> {
    Some(PublicKey([byte; 32]))
}

fn failed() -> Outcome {
    Outcome::failed(ErrorCode::RunTimeout, "no end after 300 s")
}

pub(crate) fn ticket() -> Ticket {
    let body = TicketBody {
        purpose: Purpose::Run,
        task: task(),
        attempt: Attempt(2),
        worker: worker(),
        epoch: Epoch(3),
        client: client(),
        client_key: key(0xC1),
        bytes_max: 300_000,
        priority: 50,
        lane: Lane::Batch,
        items: 8,
        detached: true,
        demands: demands(),
        gpu: Some(1),
        deadline_unix_ms: Some(1_795_000_000_500),
        slo_ms: Some(50),
        expires_unix_ms: 1_795_000_010_000,
    };
    Ticket::sign(body, &TicketKey([0x5E; 32]))
}

fn submit() -> Submit {
    let spec = TaskSpec {
        task: task(),
        client: client(),
        job: JobId::from_bytes(*b"job............."),
        model_name: "face.tflite".into(),
        model: model(),
        then: vec![stage()],
        input_bytes: 196_608,
        items: 8,
        job_items: 1000,
        priority: 50,
        lane: Some(Lane::Batch),
        slo: Some(Slo { latency_ms: 50, max_violation_permille: 50 }),
        labels: vec![LabelRule { key: "site".into(), value: "roof".into(), required: true }],
        deadline_ms: Some(500),
        demands: demands(),
        detached: false,
        key: key(0xC1),
        direction: Some(Direction::WorkerDials),
    };
    let standing = Standing::Lost { attempt: Attempt(1), worker: worker(), outcome: failed() };
    Submit { spec, endpoints: vec!["tcp://10.0.0.2:4000".into()], standing }
}

fn grant() -> Grant {
    Grant {
        id: id(),
        worker: worker(),
        worker_name: "pi".into(),
        worker_key: key(0x30),
        endpoints: vec!["tcp://10.0.0.3:4001".into(), "tcp://[fd00::3]:4001".into()],
        direction: Direction::ClientDials,
        window_bytes: 16 << 20,
        model_held: true,
        predicted_ms: Some(251),
        ticket: ticket(),
    }
}

fn client_and_broker() -> Vec<Any> {
    let outcome = Outcome::failed(ErrorCode::Busy, "100000 tasks wait: try again later");
    let ended = Ended { task: task(), outcome, retry_after_ms: Some(1000) };
    let queued = Queued {
        task: task(),
        position: 251,
        reason: "all slots are in use".into(),
        no_worker_fits: true,
        starts_in_ms: Some(70_000),
        durable: true,
    };
    let ask = |question| Ask { request: 70_000, client: client(), question };
    let answer = |body| Any::BrokerToClient(BrokerToClient::Answer(Answer { request: 70_000, body }));
    let mut all: Vec<Any> = [
        ClientToBroker::Submit(submit()),
        ClientToBroker::Close(Close {
            task: task(),
            client: client(),
            attempt: Attempt(2),
            outcome: Outcome::Cancelled,
        }),
        ClientToBroker::Ask(ask(Question::Cluster)),
        ClientToBroker::Ask(ask(Question::Workers { after: Some(worker()) })),
        ClientToBroker::Ask(ask(Question::Tasks { before: None })),
        ClientToBroker::Ask(ask(Question::Task(task()))),
        ClientToBroker::Ask(ask(Question::Why(task()))),
        ClientToBroker::Ask(ask(Question::Models { after: Some((worker(), model().digest)) })),
        ClientToBroker::Cancel(CancelTask { task: task(), client: client() }),
        ClientToBroker::Locate(Locate {
            task: task(),
            client: client(),
            key: None,
            endpoints: Vec::new(),
            unreachable: Some(Direction::ClientDials),
        }),
    ]
    .map(Any::ClientToBroker)
    .into();
    all.extend(
        [
            BrokerToClient::Grant(grant()),
            BrokerToClient::Queued(queued),
            BrokerToClient::Noted(Noted { id: id(), worker_alive: true, durable: false }),
            BrokerToClient::Ended(ended),
        ]
        .map(Any::BrokerToClient),
    );
    all.extend([
        answer(AnswerBody::Cluster(cluster_view())),
        answer(AnswerBody::Workers(vec![worker_view()])),
        answer(AnswerBody::Tasks(vec![task_view()])),
        answer(AnswerBody::Task(task_view())),
        answer(AnswerBody::Why(why_view())),
        answer(AnswerBody::Models(vec![model_view()])),
        answer(AnswerBody::NotFound),
    ]);
    all
}

/// The message with the most kinds of field: text, lists, options, nested enums.
pub(crate) fn register() -> Register {
    Register {
        worker: worker(),
        epoch: Epoch(3),
        name: "pi".into(),
        version: "0.1.0".into(),
        os: "Debian 12".into(),
        arch: Arch::Arm64,
        cores: 4,
        memory_bytes: 8 << 30,
        run_memory_bytes: 2 << 30,
        engine: EngineKind::Process,
        formats: vec![ModelFormat::TfLite, ModelFormat::Onnx],
        endpoints: vec!["tcp://10.0.0.3:4001".into()],
        key: key(0x30),
        ticket_key: TicketKey([0x5E; 32]),
        slots: [2, 3],
        device_map: vec![-1, 0],
        device_width: 3,
        labels: vec![("site".into(), "roof".into())],
        gpus: vec![Gpu { name: "none such".into(), memory_bytes: 4 << 30 }],
        heartbeat_ms: 1000,
    }
}

fn load() -> Load {
    Load {
        cpu_permille: 250,
        load1_milli: 1250,
        memory_available_bytes: 3 << 30,
        disk_free_bytes: 20 << 30,
        net_rx_bytes_per_s: 250,
        net_tx_bytes_per_s: 251,
        temperature_milli_c: Some(-61_250),
        throttled_bits: Some(0x5_0005),
        gpus: vec![GpuLoad { memory_used_bytes: 1 << 30, busy_permille: 999 }],
    }
}

fn worker_and_broker() -> Vec<Any> {
    let report = |state| AttemptReport { id: id(), state };
    let heartbeat = Heartbeat {
        worker: worker(),
        epoch: Epoch(3),
        seq: 65_536,
        draining: true,
        keeps_no_more: true,
        load: load(),
        attempts: vec![
            report(AttemptState::Receiving),
            report(AttemptState::Ready),
            report(AttemptState::Running),
            report(AttemptState::Finished(Outcome::Done { run_us: 1500, load_us: 0 })),
            report(AttemptState::Finished(Outcome::Cancelled)),
        ],
        names_all: false,
        held: vec![model().digest, Digest::from_bytes([0xD2; 32])],
        warm: vec![model().digest],
        link_bytes_per_s: 125_000_000,
        broker_rtt_us: 850,
        lanes: lanes(),
        costs: vec![cost()],
    };
    let ack = HeartbeatAck {
        worker: worker(),
        epoch: Epoch(3),
        seq: 65_536,
        known: true,
        broker_unix_ms: 1_795_000_000_000,
        forget: vec![id()],
        stop: vec![AttemptId { task: task(), attempt: Attempt(1) }],
    };
    let introduce =
        Introduce { ticket: ticket(), endpoints: vec!["tcp://10.0.0.2:4000".into()], client_key: key(0xC1) };
    vec![
        Any::WorkerToBroker(WorkerToBroker::Register(register())),
        Any::WorkerToBroker(WorkerToBroker::Heartbeat(heartbeat)),
        Any::WorkerToBroker(WorkerToBroker::Leave(Leave { worker: worker(), epoch: Epoch(3) })),
        Any::BrokerToWorker(BrokerToWorker::HeartbeatAck(ack)),
        Any::BrokerToWorker(BrokerToWorker::Introduce(introduce)),
        Any::BrokerToWorker(BrokerToWorker::Stop(id())),
        Any::BrokerToWorker(BrokerToWorker::Overtaken(Overtaken { worker: worker(), epoch: Epoch(3) })),
    ]
}

fn client_and_worker() -> Vec<Any> {
    let input = InputDecl {
        name: Some("image".into()),
        dtype: Some(DType::F32),
        shape: Some(vec![1, 128, 128, 3]),
        digest: Digest::from_bytes([0x1A; 32]),
        size_bytes: 196_608,
    };
    let (model_name, then, inputs) = ("face.tflite".into(), vec![stage()], vec![input]);
    let manifest = Some(Manifest { model: model(), model_name, then, items: 8, inputs });
    let outputs_here = vec![OutputPart { digest: Digest::from_bytes([5; 32]), received_bytes: 7 << 20 }];
    let open = Open { ticket: ticket(), manifest, window_bytes: 16 << 20, resume: false, outputs_here };
    let output = OutputDecl {
        name: "scores".into(),
        dtype: DType::F32,
        shape: vec![1, 896, 1],
        digest: Digest::from_bytes([0x07; 32]),
        size_bytes: 3584,
    };
    let run = RunNote { stage: 1, rows: (0, 8), batch_rows: 64, dispatch: Dispatch::Waited, run_us: 17_800 };
    let outcome = Outcome::Done { run_us: 1500, load_us: 40_000 };
    let result =
        RunResult { id: id(), outcome, outputs: vec![output], runs: vec![run], held_us: 43_000, goes_on: true };
    let chunk = Chunk { id: id(), blob: MODEL_BLOB, offset: 5 << 30, inflated_bytes: Some(1 << 20) };
    let credit = Credit { id: id(), blob: 1, received_bytes: 65_535 };
    let accept = Accept { id: id(), needs: vec![(MODEL_BLOB, 0), (1, 65_535)], window_bytes: 16 << 20 };
    let refuse = Refuse { id: id(), code: ErrorCode::BadTicket, text: "the ticket expired 3 ms ago".into() };
    let mut all: Vec<Any> = [
        ClientToWorker::Open(open),
        ClientToWorker::Chunk(chunk),
        ClientToWorker::Credit(credit),
        ClientToWorker::Release(id()),
        ClientToWorker::Abort(id()),
        ClientToWorker::Alive(id()),
    ]
    .map(Any::ClientToWorker)
    .into();
    all.extend(
        [
            WorkerToClient::DialIn(id()),
            WorkerToClient::Accept(accept),
            WorkerToClient::Refuse(refuse),
            WorkerToClient::Credit(credit),
            WorkerToClient::Progress(Progress { id: id(), phase: Phase::Loading }),
            WorkerToClient::Result(result),
            WorkerToClient::Chunk(Chunk { inflated_bytes: None, ..chunk }),
            WorkerToClient::Reopen(id()),
        ]
        .map(Any::WorkerToClient),
    );
    all
}
