//! Clients, a worker's machine and its devices. Time is a number; a device takes `base + each · rows`.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use mesh_core::{
    MonoTime, Rules,
    worker::{
        Action, BatchId, BatchKind, BatchTimes, CHECKED_ROWS, Config, Equality, Event, LinkId, Part, SPOT_ROWS, SlotId,
        Worker,
    },
};
use proto_msgs::{
    Attempt, AttemptId, BrokerToWorker, ClientId, DType, Demands, Digest, Epoch, ErrorCode, Failure, Gpu, HeartbeatAck,
    InputDecl, Lane, Manifest, ModelFormat, ModelRef, Open, Outcome, Phase, Register, RunNote, Stage, TaskId, Ticket,
    TicketBody, TicketKey, WorkerId, WorkerToBroker, WorkerToClient,
};

use super::referee::Referee;
pub(crate) use super::task::{Machine, Micros, Model, Task};

const KEY: TicketKey = TicketKey([7; 32]);
const GIB: u64 = 1 << 30;
const WORKER: WorkerId = WorkerId::from_bytes([1; 16]);

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Happening {
    Submit(usize),
    Cancel(usize),
    BatchRuns(BatchId),
    /// All calls whose outputs are kept are over.
    BatchOver(BatchId),
    Compared(BatchId),
    Wake,
}

/// A running batch.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) parts: Vec<Part>,
    pub(crate) slot: SlotId,
    pub(crate) device: i16,
    pub(crate) kind: BatchKind,
    pub(crate) apart: bool,
    pub(crate) took: Micros,
    /// Of a probe whose rows are answered: the rows to compare, and whether that was stopped.
    pub(crate) compares: Option<(u32, bool)>,
}

impl Running {
    pub(crate) fn rows(&self) -> u32 {
        self.parts.iter().map(|part| part.rows.end - part.rows.start).sum()
    }
}

/// How a task ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) at: Micros,
    pub(crate) outcome: Outcome,
    /// The runs of its rows, and when the first of them began.
    pub(crate) runs: Vec<RunNote>,
    pub(crate) began: Option<Micros>,
}

/// The worker with its clients, models and devices.
pub(crate) struct World {
    pub(crate) now: Micros,
    machine: Worker,
    models: Vec<Model>,
    /// Models of the devices that differ from the others.
    pub(crate) elsewhere: BTreeMap<i16, Model>,
    /// Models for items of other lengths than usual.
    pub(crate) by_length: BTreeMap<u64, Model>,
    /// When each task was sent, and the task, by number.
    pub(crate) tasks: Vec<(Micros, Task)>,
    pub(crate) ends: BTreeMap<usize, End>,
    running: BTreeMap<BatchId, Running>,
    /// Whether each model has a device of its own, which takes one call at a time, whatever the slot; and until when
    /// each is busy.
    pub(crate) own_devices: bool,
    busy_until: BTreeMap<usize, Micros>,
    /// When the first row of each task began to run.
    began: BTreeMap<usize, Micros>,
    pub(crate) referee: Referee,
    happenings: BinaryHeap<Reverse<(Micros, u64, Happening)>>,
    count: u64,
    wake: Option<Micros>,
    /// In a closed loop: the time from an answer to the client's next task.
    pub(crate) returns_after: Option<Micros>,
    /// Lane, kind and rows of each batch, in the order in which they ended.
    pub(crate) batches: Vec<(Lane, BatchKind, u32)>,
    /// From when on spot checks find that rows depend on each other.
    pub(crate) mingles_from: Option<Micros>,
    /// Batches that failed because of their rows.
    pub(crate) failed: Vec<Running>,
    /// How often each task was refused.
    pub(crate) refusals: BTreeMap<usize, u32>,
    /// The device of each batch.
    pub(crate) devices: Vec<i16>,
}

impl World {
    pub(crate) fn new(machine: Machine, models: Vec<Model>) -> Self {
        Self::with_rules(machine, models, Rules::default())
    }

    pub(crate) fn with_rules(machine: Machine, models: Vec<Model>, rules: Rules) -> Self {
        let config = Config {
            rules,
            // The clients of this test never go away.
            client_silence: Duration::from_secs(100_000),
            ..Config::new(register(&machine))
        };
        let mut world = Self {
            now: 1_000_000,
            machine: Worker::new(config),
            models,
            tasks: Vec::new(),
            ends: BTreeMap::new(),
            running: BTreeMap::new(),
            own_devices: false,
            busy_until: BTreeMap::new(),
            began: BTreeMap::new(),
            referee: Referee::new(machine),
            happenings: BinaryHeap::new(),
            count: 0,
            wake: None,
            returns_after: None,
            elsewhere: BTreeMap::new(),
            by_length: BTreeMap::new(),
            failed: Vec::new(),
            refusals: BTreeMap::new(),
            devices: Vec::new(),
            mingles_from: None,
            batches: Vec::new(),
        };
        world.handle(Event::Started { attempts: Vec::new() });
        let ack = HeartbeatAck {
            worker: WORKER,
            epoch: Epoch(1),
            seq: 1,
            known: true,
            broker_unix_ms: world.now / 1000,
            forget: Vec::new(),
            stop: Vec::new(),
        };
        world.handle(Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)));
        world
    }

    fn at(&mut self, at: Micros, happening: Happening) {
        self.count += 1;
        self.happenings.push(Reverse((at, self.count, happening)));
    }

    /// Sends a task at this time.
    pub(crate) fn submit(&mut self, at: Micros, task: Task) -> usize {
        self.tasks.push((at, task));
        self.at(at, Happening::Submit(self.tasks.len() - 1));
        self.tasks.len() - 1
    }

    pub(crate) fn cancel(&mut self, at: Micros, task: usize) {
        self.at(at, Happening::Cancel(task));
    }

    /// Lets time pass until `end`, or until nothing is in progress.
    pub(crate) fn run_until(&mut self, end: Micros) {
        while let Some(Reverse((at, _, happening))) = self.happenings.peek().copied() {
            let is_over = self.ends.len() == self.tasks.len() && self.running.is_empty();
            if at > end || is_over && self.returns_after.is_none() {
                return;
            }
            self.happenings.pop();
            self.now = at;
            match happening {
                Happening::Submit(task) => self.open(task),
                Happening::Cancel(task) => {
                    if !self.ends.contains_key(&task) {
                        self.end(task, Outcome::Cancelled, Vec::new());
                        self.handle(Event::Aborted { id: self.id_of(task), link: LinkId(task as u64) });
                    }
                }
                Happening::BatchRuns(batch) if self.running.contains_key(&batch) => {
                    self.handle(Event::BatchReached { batch, phase: Phase::Running });
                }
                Happening::BatchRuns(_) => {}
                Happening::BatchOver(batch) => self.batch_over(batch),
                Happening::Compared(batch) => self.compared(batch),
                Happening::Wake => {
                    self.wake = None;
                    self.handle(Event::Deadline);
                }
            }
            self.referee.look(self.now, &self.running);
        }
    }

    fn open(&mut self, number: usize) {
        if self.ends.contains_key(&number) {
            return; // It was cancelled meanwhile.
        }
        let open = Box::new(self.opening(number, &self.tasks[number].1, &self.tasks[number].1));
        self.handle(Event::Opened { link: LinkId(number as u64), key: None, open });
    }

    /// Opens an attempt as its ticket says, and then with other work. Returns how the second opening was refused.
    pub(crate) fn opens_again_as(&mut self, ticket: &Task, other: &Task) -> Option<ErrorCode> {
        let number = self.tasks.len();
        let mut answers = Vec::new();
        for brought in [ticket, other] {
            let open = Box::new(self.opening(number, ticket, brought));
            let event = Event::Opened { link: LinkId(number as u64), key: None, open };
            answers = self.machine.handle(MonoTime::from_micros(self.now), event);
        }
        answers.into_iter().find_map(|answer| match answer {
            Action::TellClient { message: WorkerToClient::Refuse(refuse), .. } => Some(refuse.code),
            _ => None,
        })
    }

    /// The opening of an attempt with the ticket of one task and the manifest of another.
    fn opening(&self, number: usize, task: &Task, brought: &Task) -> Open {
        let id = self.id_of(number);
        let model = |number: &usize| ModelRef {
            digest: Digest::from_bytes([*number as u8 + 1; 32]),
            size_bytes: 1,
            format: ModelFormat::Onnx,
        };
        let body = TicketBody {
            task: id.task,
            attempt: id.attempt,
            worker: WORKER,
            client: ClientId::from_bytes([task.client; 16]),
            bytes_max: u64::MAX,
            priority: task.priority,
            lane: task.lane,
            items: task.items,
            demands: Demands { gpu_memory_bytes: task.gpu_gib * GIB, ..Demands::default() },
            gpu: task.gpu,
            deadline_unix_ms: task.deadline_us.map(|after| (self.now + after) / 1000),
            slo_ms: task.slo_ms,
            ..mesh_samples::ticket_body(0, 0, 0)
        };
        let input = InputDecl {
            name: None,
            dtype: Some(DType::F32),
            shape: Some(vec![u64::from(brought.items), brought.length]),
            digest: Digest::from_bytes([0; 32]),
            size_bytes: u64::from(brought.items) * brought.length * 4,
        };
        let stage = |number: &usize| Stage { name: format!("m{number}"), model: model(number) };
        let manifest = Manifest {
            model: model(&brought.way[0]),
            model_name: "m".to_owned(),
            then: brought.way[1..].iter().map(stage).collect(),
            items: brought.items,
            inputs: vec![input],
        };
        let ticket = Ticket::sign(body, &KEY);
        Open { ticket, manifest: Some(manifest), window_bytes: 1 << 20, resume: false, outputs_here: Vec::new() }
    }

    fn handle(&mut self, event: Event) {
        let actions = self.machine.handle(MonoTime::from_micros(self.now), event);
        for action in actions {
            self.act(action);
        }
        if let Some(deadline) = self.machine.next_deadline() {
            let at = deadline.as_micros();
            assert!(at > self.now, "it wants to be woken at once, after being woken");
            if self.wake.is_none_or(|wake| at < wake) {
                self.wake = Some(at);
                self.at(at, Happening::Wake);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Receive { id, .. } => {
                let task = self.tasks[number_of(id)].1.clone();
                self.referee.arrived(self.now, id, task);
                self.handle(Event::Received { id });
            }
            Action::RunBatch { batch, parts, slot, device, kind, apart, .. } => {
                self.begin(batch, Running { parts, slot, device, kind, apart, took: 0, compares: None });
            }
            Action::Compare { batch, rows, limit } => self.compare(batch, rows, limit),
            Action::StopComparing { batch } => self.stop_comparing(batch),
            Action::KillBatch { batch } => {
                let killed = self.running.remove(&batch).expect("only what runs is killed");
                self.referee.killed(&killed);
            }
            Action::SendResult { id, outcome, runs, .. } => {
                assert!(runs.len() <= 64);
                self.referee.answered(self.now, id, &outcome);
                self.end(number_of(id), outcome, runs);
                self.handle(Event::Released { id, link: LinkId(number_of(id) as u64) });
            }
            Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)) => self.referee.heartbeat(&heartbeat),
            Action::TellClient { message: WorkerToClient::Refuse(refuse), .. } => {
                assert_eq!(refuse.code, ErrorCode::Busy, "{refuse:?}");
                self.referee.turned_away(self.now, refuse.id);
                let task = number_of(refuse.id);
                *self.refusals.entry(task).or_default() += 1;
                // The broker offers it again after this pause.
                self.at(self.now + 1_000_000, Happening::Submit(task));
            }
            _ => {}
        }
    }

    fn end(&mut self, task: usize, outcome: Outcome, runs: Vec<RunNote>) {
        self.referee.ended(self.id_of(task));
        let (at, began) = (self.now, self.began.remove(&task));
        let before = self.ends.insert(task, End { at, outcome, runs, began });
        assert!(before.is_none(), "task {task} ended before: {before:?}");
        if let Some(wait) = self.returns_after {
            let next = self.tasks[task].1.clone();
            self.submit(self.now + wait, next);
        }
    }

    /// The task's present attempt.
    fn id_of(&self, task: usize) -> AttemptId {
        id_of(task, 1 + self.refusals.get(&task).copied().unwrap_or(0))
    }

    fn model_on(&self, device: i16, part: &Part) -> Model {
        let length = self.tasks[number_of(part.id)].1.length;
        let special = self.by_length.get(&length).or_else(|| self.elsewhere.get(&device));
        special.copied().unwrap_or(self.models[self.referee.model_of(part)])
    }

    /// What the shell says of a batch of this kind that begins now.
    fn equality(&self, kind: BatchKind, model: Model, rows: u32) -> Option<Equality> {
        match kind {
            BatchKind::Check => Some(model.compared(rows)),
            BatchKind::Spot if self.mingles_from.is_some_and(|from| self.now >= from) => Some(Equality::Differs),
            BatchKind::Spot => Some(model.compared(rows)),
            BatchKind::Whole | BatchKind::Packed | BatchKind::Probe => None,
        }
    }

    fn begin(&mut self, batch: BatchId, mut running: Running) {
        let kind = running.kind;
        let model = self.model_on(running.device, &running.parts[0]);
        let singles = model.batch_us(1) * u64::from(running.rows());
        let packed = model.batch_us(running.rows());
        let checks = |rows: u32| singles.min(model.batch_us(1) * u64::from(rows));
        let equal = self.equality(kind, model, running.rows());
        running.took = match kind {
            BatchKind::Whole => singles,
            BatchKind::Packed => packed,
            BatchKind::Check if kind.keeps_packed(equal) => packed + checks(CHECKED_ROWS),
            BatchKind::Check => packed + checks(CHECKED_ROWS) + singles,
            BatchKind::Spot if kind.keeps_packed(equal) => packed + checks(SPOT_ROWS),
            BatchKind::Spot => packed + checks(SPOT_ROWS) + singles,
            BatchKind::Probe => singles,
        };
        if self.own_devices {
            let busy_until = self.busy_until.entry(self.referee.model_of(&running.parts[0])).or_default();
            let waits = busy_until.saturating_sub(self.now);
            running.took += waits;
            *busy_until = self.now + running.took;
        }
        self.referee.begins(self.now, &running, &self.running, model);
        // Every model is loaded.
        self.at(self.now, Happening::BatchRuns(batch));
        self.at(self.now + running.took, Happening::BatchOver(batch));
        for part in &running.parts {
            self.began.entry(number_of(part.id)).or_insert(self.now);
        }
        self.running.insert(batch, running);
    }

    /// The packed call of a probe begins.
    fn compare(&mut self, batch: BatchId, rows: u32, limit: Duration) {
        let running = self.running.get_mut(&batch).expect("only what is answered is compared");
        assert!((2..=running.rows()).contains(&rows), "{rows} rows of {running:?}");
        if running.compares.is_some() {
            return; // An answer that was taken at once had it stopped.
        }
        running.compares = Some((rows, false));
        let running = running.clone();
        let packed = self.model_on(running.device, &running.parts[0]).batch_us(rows);
        let takes = packed.min(limit.as_micros() as u64);
        if self.own_devices {
            *self.busy_until.entry(self.referee.model_of(&running.parts[0])).or_default() = self.now + takes;
        }
        self.running.get_mut(&batch).expect("it was just there").took += takes;
        self.at(self.now + takes, Happening::Compared(batch));
    }

    /// No more calls after the one that runs, if there is one.
    fn stop_comparing(&mut self, batch: BatchId) {
        let running = self.running.get_mut(&batch).expect("only what is answered is compared");
        let began = running.compares;
        assert!(began.is_none_or(|(_, is_stopped)| !is_stopped), "{batch:?} is stopped twice");
        // The one call that has begun is made.
        running.compares = Some((began.map_or(0, |(rows, _)| rows), true));
        if began.is_none() {
            self.at(self.now, Happening::Compared(batch));
        }
    }

    fn compared(&mut self, batch: BatchId) {
        let Some(running) = self.running.remove(&batch) else { return };
        let model = self.model_on(running.device, &running.parts[0]);
        let (rows, _) = running.compares.expect("it was ordered");
        let equal = if rows == 0 { Equality::Unfinished } else { model.compared(rows) };
        let knows_time = rows > 0 && equal != Equality::Unsupported;
        let packed_us = knows_time.then_some(model.batch_us(rows));
        let ended = match model.dies_comparing {
            true => Err(Failure::new(ErrorCode::RunCrashed, "as the model does")),
            false => Ok(BatchTimes { packed_us, equal: Some(equal), ..BatchTimes::default() }),
        };
        self.note_end(&running);
        self.handle(Event::BatchEnded { batch, ended });
    }

    /// Writes down a batch that leaves its slot.
    fn note_end(&mut self, running: &Running) {
        self.devices.push(running.device);
        self.batches.push((self.referee.lane_of(&running.parts[0]), running.kind, running.rows()));
        self.referee.spent(self.now, running, &self.running);
    }

    /// The single runs of a probe went well: its rows are answered, and it stays in its slot.
    fn answer(&mut self, batch: BatchId, running: Running) {
        let single_us = self.model_on(running.device, &running.parts[0]).batch_us(1);
        let run_us = single_us * u64::from(running.rows());
        self.referee.over(self.now, &running, true);
        self.running.insert(batch, running);
        let times = BatchTimes { run_us, single_us: Some(single_us), ..BatchTimes::default() };
        self.handle(Event::BatchAnswered { batch, times });
    }

    fn batch_over(&mut self, batch: BatchId) {
        let Some(running) = self.running.remove(&batch) else { return };
        let rows = running.rows();
        let model = self.model_on(running.device, &running.parts[0]);
        let is_poisoned = |part: &Part| {
            let task = &self.tasks[number_of(part.id)].1;
            task.poison_at == Some(part.stage) && part.rows.end == task.items
        };
        let is_too_large = running.kind.is_packed() && rows > model.rows_max;
        let poison = running.parts.iter().find(|part| is_poisoned(part));
        let ended = if let Some(part) = poison {
            let code = self.tasks[number_of(part.id)].1.fails_with;
            self.referee.failed(self.now, &running, code);
            self.failed.push(running.clone());
            Err(Failure::new(code, "as the model does"))
        } else if is_too_large {
            Err(Failure::new(ErrorCode::RunFailed, "as the model does"))
        } else if running.kind == BatchKind::Probe {
            return self.answer(batch, running);
        } else {
            let equal = self.equality(running.kind, model, rows);
            let keeps_packed = running.kind.keeps_packed(equal);
            let run_us = if keeps_packed { model.batch_us(rows) } else { model.batch_us(1) * u64::from(rows) };
            Ok(BatchTimes { run_us, equal, ..BatchTimes::default() })
        };
        self.note_end(&running);
        self.referee.over(self.now, &running, ended.is_ok());
        self.handle(Event::BatchEnded { batch, ended });
    }
}

fn register(machine: &Machine) -> Register {
    let (slots, device_map) = (machine.slots, machine.device_map.clone());
    let gpu = |_| Gpu { name: "G".to_owned(), memory_bytes: 10 * GIB };
    let gpus = device_map.iter().filter(|device| **device >= 0).map(gpu).collect();
    let device_width = machine.device_width;
    Register { worker: WORKER, ticket_key: KEY, slots, device_map, device_width, gpus, ..mesh_samples::register(1) }
}

fn id_of(task: usize, attempt: u32) -> AttemptId {
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&(task as u64).to_be_bytes());
    AttemptId { task: TaskId::from_bytes(bytes), attempt: Attempt(attempt) }
}

pub(crate) fn number_of(id: AttemptId) -> usize {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&id.task.as_bytes()[8..]);
    u64::from_be_bytes(bytes) as usize
}
