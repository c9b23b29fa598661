//! The worker's process: its machine, its disk, and the transfers and runs that take time.

use std::{collections::BTreeMap, time::Duration};

use mesh_core::worker::{Action, Config, Event, LinkId, Restored, Sample, Worker};
use proto_msgs::{
    Accept, Arch, AttemptId, BrokerToWorker, ClientToWorker, DType, Digest, EngineKind, Epoch, ErrorCode, Load,
    Manifest, ModelFormat, Outcome, OutputDecl, Phase, PublicKey, Register, RunResult, TaskId, Ticket, TicketKey,
    ToBroker, WorkerId, WorkerToClient, limits::WINDOW_BYTES,
};

use super::{
    client_shell::client_at,
    job::{Behaviour, output_of},
    mesh::{Happening, MS, Mesh, Micros, Node, Pulse, SECOND, Step, micros, short_id},
    net::Cargo,
    story::{brief_from_door, brief_to_door, tell},
};

/// Time between measurements: a little less than between heartbeats.
const SAMPLE_EVERY: Micros = 900 * MS;

/// How a worker stands in the network and what it has.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) slots: u16,
    /// It has a door and says where.
    pub(crate) advertises: bool,
    /// That door can be reached.
    pub(crate) reachable: bool,
    pub(crate) heartbeat: Duration,
}

impl Place {
    pub(crate) fn slots(slots: u16) -> Self {
        Self { slots, advertises: true, reachable: true, heartbeat: Duration::from_secs(1) }
    }
}

/// The worker's machine room: what survives the process, and the process.
#[derive(Debug)]
pub(super) struct WorkerShell {
    pub(super) machine: Option<Worker>,
    pub(super) id: WorkerId,
    pub(super) place: Place,
    pub(super) key: Option<PublicKey>,
    pub(super) life: u32,
    pub(super) pulse: Pulse,
    /// Which connection to the broker it is on.
    pub(super) conn: u8,
    pub(super) sessions: BTreeMap<AttemptId, Session>,
    links: BTreeMap<LinkId, usize>,
    links_made: u64,
    disk: Disk,
    /// It will not be started again.
    pub(super) is_gone: bool,
}

#[derive(Debug, Default)]
struct Disk {
    models: Vec<Digest>,
    detached: BTreeMap<AttemptId, Kept>,
}

#[derive(Clone, Debug)]
struct Kept {
    ticket: Ticket,
    manifest: Manifest,
    outcome: Option<Outcome>,
    runs_begun: u32,
}

/// An attempt in the shell's hands.
#[derive(Debug)]
pub(super) struct Session {
    ticket: Ticket,
    manifest: Manifest,
    link: Option<usize>,
    pub(super) stage: Stage,
    /// Orders that are under way and meant for an earlier turn come to nothing.
    turn: u32,
    needed_bytes: u64,
    received_bytes: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stage {
    Receiving,
    Here,
    Running,
    Over,
}

impl WorkerShell {
    /// A machine on which no worker has been started yet.
    pub(super) fn new(number: usize, place: Place, encrypted: bool) -> Self {
        let byte = 100 + number as u8;
        Self {
            machine: None,
            id: WorkerId::from_bytes([byte; 16]),
            place,
            key: encrypted.then_some(PublicKey([byte; 32])),
            life: 0,
            pulse: Pulse::default(),
            conn: 0,
            sessions: BTreeMap::new(),
            links: BTreeMap::new(),
            links_made: 0,
            disk: Disk::default(),
            is_gone: false,
        }
    }

    pub(super) fn new_link(&mut self, link: usize) -> LinkId {
        self.links_made += 1;
        let number = LinkId(self.links_made);
        self.links.insert(number, link);
        number
    }

    /// Attempts that occupy a slot as the shell sees it.
    pub(super) fn active(&self) -> usize {
        self.sessions.values().filter(|session| session.stage != Stage::Over).count()
    }

    pub(super) fn is_at(&self, task: TaskId, stage: Stage) -> bool {
        self.sessions.iter().any(|(id, session)| id.task == task && session.stage == stage)
    }

    /// Attempts of which anything is left on the disk.
    pub(super) fn files(&self) -> Vec<AttemptId> {
        self.sessions.keys().chain(self.disk.detached.keys()).copied().collect()
    }

    pub(super) fn forget_models(&mut self) {
        self.disk.models.clear();
    }

    fn register(&self, number: usize) -> Register {
        Register {
            worker: self.id,
            epoch: Epoch(u64::from(self.life)),
            name: format!("w{number}"),
            version: "0.1.0".to_owned(),
            os: "simulated".to_owned(),
            arch: Arch::Amd64,
            cores: 4,
            memory_bytes: 4 << 30,
            engine: EngineKind::Process,
            formats: vec![ModelFormat::TfLite, ModelFormat::Onnx],
            endpoints: self.place.advertises.then(|| format!("tcp://w{number}:7000")).into_iter().collect(),
            key: self.key,
            // The same key in each life: a ticket of an earlier life must be refused for what it says, too.
            ticket_key: TicketKey([number as u8; 32]),
            slots: self.place.slots,
            labels: Vec::new(),
            gpus: Vec::new(),
            heartbeat_ms: self.place.heartbeat.as_millis() as u32,
        }
    }
}

impl Mesh {
    /// A new worker, started.
    pub(crate) fn add_worker(&mut self, place: Place) -> Node {
        let number = self.workers.len();
        self.workers.push(WorkerShell::new(number, place, self.setup.encrypted));
        self.start_worker(number);
        Node::Worker(number)
    }

    pub(super) fn start_worker(&mut self, worker: usize) {
        let shell = &mut self.workers[worker];
        if shell.machine.is_some() || shell.is_gone {
            return;
        }
        shell.life += 1;
        shell.conn = shell.conn.wrapping_add(1);
        shell.pulse = Pulse { started: self.now, ..Pulse::default() };
        let config = Config {
            rules: self.setup.rules,
            result_kept: self.setup.kept,
            drain_wait: Duration::from_secs(8),
            run_limit: Duration::from_secs(12),
            ..Config::new(shell.register(worker))
        };
        shell.machine = Some(Worker::new(config));
        let attempts = shell.restore();
        let life = shell.life;
        self.referee.worker_started(worker, life);
        tell!(self, "W{worker} starts, life {life}, with {} attempts", attempts.len());
        self.worker_handle(worker, Event::Started { attempts });
        self.sample(worker, life);
    }

    pub(super) fn crash_worker(&mut self, worker: usize) {
        let shell = &mut self.workers[worker];
        if shell.machine.take().is_some() {
            tell!(self, "W{worker} dies");
            let shell = &mut self.workers[worker];
            shell.sessions.clear();
            shell.links.clear();
            shell.pulse = Pulse::default();
            self.break_links_of(Node::Worker(worker));
        }
    }

    pub(super) fn sample(&mut self, worker: usize, life: u32) {
        let shell = &self.workers[worker];
        if shell.life != life || shell.machine.is_none() {
            return;
        }
        let held = shell.disk.models.clone();
        let sample = Sample { load: Load::default(), held, warm: Vec::new(), link_bytes_per_s: 0 };
        self.worker_handle(worker, Event::Sampled(sample));
        self.after(SAMPLE_EVERY, Happening::Sample { worker, life });
    }

    pub(super) fn at_worker(&mut self, worker: usize, conn: u8, message: BrokerToWorker) {
        if self.workers[worker].conn == conn {
            self.worker_handle(worker, Event::BrokerSaid(message));
        }
    }

    pub(super) fn worker_receives(&mut self, worker: usize, number: usize, cargo: Cargo) {
        let link = self.links[number].number;
        let event = match cargo {
            Cargo::ToWorker(message) => {
                tell!(self, "C{} > W{worker} {}", self.links[number].client, brief_to_door(&message));
                match message {
                    ClientToWorker::Open(open) => {
                        let key = self.users[self.clients[self.links[number].client].user].key;
                        Event::Opened { link, key, open: Box::new(open) }
                    }
                    ClientToWorker::Alive(id) => Event::ClientAlive { id, link },
                    ClientToWorker::Release(id) => Event::Released { id },
                    ClientToWorker::Abort(id) => Event::Aborted { id },
                    ClientToWorker::Chunk(_) | ClientToWorker::Credit(_) => return,
                }
            }
            Cargo::PieceAcknowledged(id) => Event::ClientAlive { id, link },
            _ => unreachable!("workers do not receive these"),
        };
        self.worker_handle(worker, event);
    }

    pub(super) fn worker_handle(&mut self, worker: usize, event: Event) {
        let shell = &mut self.workers[worker];
        let now = shell.pulse.clock(self.now);
        let Some(machine) = &mut shell.machine else { return };
        for action in machine.handle(now, event) {
            self.worker_acts(worker, action);
        }
        self.referee.worker_acted(worker, &self.workers[worker]);
        self.set_wake(Node::Worker(worker));
    }

    fn worker_acts(&mut self, worker: usize, action: Action) {
        match action {
            Action::TellBroker(message) => {
                self.referee.worker_says(worker, &message);
                self.send_to_broker(Node::Worker(worker), ToBroker::Worker(message));
            }
            Action::TellClient { link, message } => self.tell_client(worker, link, message),
            Action::Receive { id, link, manifest, ticket, resume } => {
                self.receive(worker, id, link, *manifest, *ticket, resume);
            }
            Action::Run { id, limit } => self.run_model(worker, id, micros(limit)),
            Action::Kill { id } => {
                tell!(self, "W{worker} kills {}", short_id(id));
                if let Some(session) = self.workers[worker].sessions.get_mut(&id) {
                    session.turn += 1;
                    session.stage = Stage::Over;
                }
            }
            Action::SendResult { id, link, outcome, .. } => self.send_result(worker, id, link, outcome),
            Action::Keep { id, outcome } => {
                if let Some(kept) = self.workers[worker].disk.detached.get_mut(&id) {
                    kept.outcome = Some(outcome);
                }
                if let Some(session) = self.workers[worker].sessions.get_mut(&id) {
                    session.stage = Stage::Over;
                }
            }
            Action::Free { id } => {
                tell!(self, "W{worker} frees {}", short_id(id));
                self.workers[worker].sessions.remove(&id);
                self.workers[worker].disk.detached.remove(&id);
            }
            Action::Dial { id, endpoints, .. } => self.dial_client(worker, id, &endpoints),
            Action::Exit => {
                tell!(self, "W{worker} leaves");
                self.crash_worker(worker);
                // Whoever looks after the machine starts it again.
                self.after(3 * SECOND, Happening::Start(Node::Worker(worker)));
            }
        }
    }

    fn tell_client(&mut self, worker: usize, link: LinkId, message: WorkerToClient) {
        if let Some(number) = self.workers[worker].links.get(&link).copied()
            && self.links[number].number == link
        {
            tell!(self, "W{worker} > C{} {}", self.links[number].client, brief_from_door(&message));
            self.send_direct(number, false, Cargo::ToClient(message));
        }
    }

    // Transfers.

    fn receive(
        &mut self,
        worker: usize,
        id: AttemptId,
        link: LinkId,
        manifest: Manifest,
        ticket: Ticket,
        resume: bool,
    ) {
        self.referee.received(worker, &self.workers[worker], id, &ticket);
        tell!(self, "W{worker} takes {} in over {link:?}, resume {resume}", short_id(id));
        let shell = &mut self.workers[worker];
        let number = shell.links.get(&link).copied();
        let holds_model = shell.disk.models.contains(&manifest.model.digest);
        let inputs_bytes: u64 = manifest.inputs.iter().map(|input| input.size_bytes).sum();
        let session = shell.sessions.entry(id).or_insert_with(|| Session {
            needed_bytes: inputs_bytes + if holds_model { 0 } else { manifest.model.size_bytes },
            ticket,
            manifest,
            link: None,
            stage: Stage::Receiving,
            turn: 0,
            received_bytes: 0,
        });
        session.link = number;
        session.turn += 1;
        let needs = match session.needed_bytes - session.received_bytes {
            0 => Vec::new(),
            _ => vec![(1, session.received_bytes)],
        };
        let accept = WorkerToClient::Accept(Accept { id, needs, window_bytes: WINDOW_BYTES });
        self.tell_client(worker, link, accept);
        self.transfer_on(worker, id);
    }

    fn transfer_on(&mut self, worker: usize, id: AttemptId) {
        let life = self.workers[worker].life;
        let Some(session) = self.workers[worker].sessions.get(&id) else { return };
        let Some(link) = session.link else { return };
        let (left, speed, turn) = (session.needed_bytes - session.received_bytes, self.links[link].speed, session.turn);
        let wait = (left.saturating_mul(SECOND) / speed).clamp(MS, SECOND / 2);
        let bytes = (speed.saturating_mul(wait) / SECOND).min(left);
        self.after(wait, Happening::Session { worker, life, id, turn, step: Step::Transfer { bytes } });
    }

    /// Some bytes of model and inputs arrive, if the link and the client's process still are there to bring them.
    fn bytes_arrive(&mut self, worker: usize, id: AttemptId, bytes: u64) {
        let shell = &mut self.workers[worker];
        let Some(session) = shell.sessions.get_mut(&id).filter(|session| session.stage == Stage::Receiving) else {
            return;
        };
        let Some(number) = session.link else { return };
        let link = &self.links[number];
        let (client, link_id) = (link.client, link.number);
        if !link.is_up || !self.clients[client].sends(id, number) {
            return;
        }
        if self.clients[client].pulse.frozen_until > self.now {
            return self.transfer_on(worker, id);
        }
        session.received_bytes = session.needed_bytes.min(session.received_bytes + bytes);
        let is_whole = session.received_bytes == session.needed_bytes;
        self.send_direct(number, false, Cargo::Credit(id));
        self.worker_handle(worker, Event::ClientAlive { id, link: link_id });
        if is_whole {
            self.all_arrived(worker, number, id);
        } else {
            self.transfer_on(worker, id);
        }
    }

    fn all_arrived(&mut self, worker: usize, number: usize, id: AttemptId) {
        let is_full = self.referee.job(id.task).behaviour == Behaviour::DiskFullFirst && id.attempt.0 == 1;
        let Some(session) = self.workers[worker].sessions.get_mut(&id) else { return };
        if is_full {
            session.stage = Stage::Over;
            let (code, text) = (ErrorCode::DiskFull, "no space left".to_owned());
            return self.worker_handle(worker, Event::ReceiveFailed { id, code, text });
        }
        session.stage = Stage::Here;
        let (ticket, manifest) = (session.ticket.clone(), session.manifest.clone());
        let disk = &mut self.workers[worker].disk;
        if !disk.models.contains(&manifest.model.digest) {
            disk.models.insert(0, manifest.model.digest);
        }
        if ticket.body.detached {
            disk.detached.insert(id, Kept { ticket, manifest, outcome: None, runs_begun: 0 });
        }
        tell!(self, "W{worker} has all of {}", short_id(id));
        self.send_direct(number, false, Cargo::AllAcknowledged(id));
        self.worker_handle(worker, Event::Received { id });
    }

    // Runs.

    fn run_model(&mut self, worker: usize, id: AttemptId, limit: Micros) {
        tell!(self, "W{worker} runs {}", short_id(id));
        self.referee.ran(worker, id);
        let life = self.workers[worker].life;
        let job = self.referee.job(id.task).clone();
        if let Some(kept) = self.workers[worker].disk.detached.get_mut(&id) {
            kept.runs_begun += 1;
        }
        let Some(session) = self.workers[worker].sessions.get_mut(&id) else {
            return self.referee.fail("the worker runs what it has", format!("W{worker} was to run {}", short_id(id)));
        };
        session.stage = Stage::Running;
        session.turn += 1;
        let turn = session.turn;
        let run = if job.behaviour == Behaviour::NeverEnds { Micros::MAX } else { job.run };
        let over = Step::RunOver { at_limit: run > limit };
        self.after(MS.min(limit), Happening::Session { worker, life, id, turn, step: Step::Load });
        self.after(run.min(limit), Happening::Session { worker, life, id, turn, step: over });
    }

    fn run_over(&mut self, worker: usize, id: AttemptId, at_limit: bool) {
        let job = self.referee.job(id.task);
        let outcome = match job.behaviour {
            _ if at_limit => Outcome::failed(ErrorCode::RunTimeout, "stopped at its limit"),
            Behaviour::Fails(code) => Outcome::failed(code, "as the model does"),
            Behaviour::FailsFirst(attempts) if id.attempt.0 <= attempts => {
                Outcome::failed(ErrorCode::RunProtocol, "nonsense")
            }
            Behaviour::KillsWorker => {
                self.crash(Node::Worker(worker));
                return self.after(2 * SECOND, Happening::Start(Node::Worker(worker)));
            }
            _ => Outcome::Done { run_us: job.run, load_us: 0 },
        };
        let Some(session) = self.workers[worker].sessions.get_mut(&id) else { return };
        session.stage = Stage::Over;
        tell!(self, "W{worker} has run {}: {outcome:?}", short_id(id));
        self.worker_handle(worker, Event::RunEnded { id, outcome });
    }

    pub(super) fn session_step(&mut self, worker: usize, life: u32, id: AttemptId, turn: u32, step: Step) {
        let shell = &self.workers[worker];
        let is_current = shell.sessions.get(&id).is_some_and(|session| session.turn == turn);
        if shell.life != life || shell.machine.is_none() || !is_current {
            return;
        }
        match step {
            Step::Transfer { bytes } => self.bytes_arrive(worker, id, bytes),
            Step::Load => self.worker_handle(worker, Event::Reached { id, phase: Phase::Running }),
            Step::RunOver { at_limit } => self.run_over(worker, id, at_limit),
            Step::Piece { left } => self.send_piece(worker, id, left),
        }
    }

    // Results.

    fn send_result(&mut self, worker: usize, id: AttemptId, link: LinkId, outcome: Outcome) {
        let output_us = self.referee.job(id.task).output;
        let shell = &mut self.workers[worker];
        let number = shell.links.get(&link).copied();
        let Some(session) = shell.sessions.get_mut(&id) else { return };
        session.link = number;
        session.turn += 1;
        let is_done = matches!(outcome, Outcome::Done { .. });
        let digest = session.output();
        let output = OutputDecl { name: "out".to_owned(), dtype: DType::F32, shape: vec![8], digest, size_bytes: 32 };
        let outputs = if is_done { vec![output] } else { Vec::new() };
        self.tell_client(worker, link, WorkerToClient::Result(RunResult { id, outcome, outputs }));
        if is_done {
            self.send_piece_later(worker, id, output_us);
        }
    }

    fn send_piece_later(&mut self, worker: usize, id: AttemptId, left: Micros) {
        let life = self.workers[worker].life;
        let Some(session) = self.workers[worker].sessions.get(&id) else { return };
        let (turn, wait) = (session.turn, left.min(SECOND / 2));
        self.after(wait, Happening::Session { worker, life, id, turn, step: Step::Piece { left: left - wait } });
    }

    fn send_piece(&mut self, worker: usize, id: AttemptId, left: Micros) {
        let Some(session) = self.workers[worker].sessions.get(&id) else { return };
        let (Some(number), content) = (session.link, (left == 0).then(|| session.output())) else { return };
        self.send_direct(number, false, Cargo::Piece(id, content));
        if left > 0 {
            self.send_piece_later(worker, id, left);
        }
    }

    // Dialling.

    fn dial_client(&mut self, worker: usize, id: AttemptId, endpoints: &[String]) {
        let client = endpoints.first().and_then(|endpoint| client_at(endpoint));
        tell!(self, "W{worker} dials for {}", short_id(id));
        let (life, wait) = (self.workers[worker].life, self.rng.among(MS..200 * MS));
        self.after(wait, Happening::WorkerDialled { worker, life, id, client });
    }

    pub(super) fn worker_dialled(&mut self, worker: usize, life: u32, id: AttemptId, client: Option<usize>) {
        if self.workers[worker].life != life || self.workers[worker].machine.is_none() {
            return;
        }
        let reached = client.filter(|client| self.clients[*client].can_be_dialled() && self.can_reach(worker, *client));
        let Some(client) = reached else {
            let text = "no route to the client".to_owned();
            return self.worker_handle(worker, Event::DialFailed { id, text });
        };
        let number = self.new_link(client, worker, false);
        self.send_direct(number, false, Cargo::ToClient(WorkerToClient::DialIn(id)));
    }
}

impl WorkerShell {
    /// What is found on the disk at a start: detached attempts, whose inputs or results are there.
    fn restore(&mut self) -> Vec<Restored> {
        let sessions = self.disk.detached.iter().map(|(id, kept)| {
            let stage = if kept.outcome.is_some() { Stage::Over } else { Stage::Here };
            let session = Session {
                ticket: kept.ticket.clone(),
                manifest: kept.manifest.clone(),
                link: None,
                stage,
                turn: 0,
                needed_bytes: 0,
                received_bytes: 0,
            };
            (*id, session)
        });
        self.sessions = sessions.collect();
        let restored = |kept: &Kept| Restored {
            ticket: kept.ticket.clone(),
            outcome: kept.outcome.clone(),
            runs_begun: kept.runs_begun,
        };
        self.disk.detached.values().map(restored).collect()
    }
}

impl Session {
    fn output(&self) -> Digest {
        output_of(self.ticket.body.task, self.ticket.body.client, self.manifest.inputs[0].digest)
    }
}
