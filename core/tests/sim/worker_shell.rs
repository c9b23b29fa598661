//! The worker's process: its machine, its disk and its door. What takes time is in `worker_work`.

use std::{collections::BTreeMap, time::Duration};

use mesh_core::worker::{Action, BatchId, Config, Event, LinkId, Part, Restored, Sample, SlotId, Worker};
use proto_msgs::{
    Arch, AttemptId, BrokerToWorker, ClientToWorker, Digest, EngineKind, Epoch, Load, Manifest, ModelFormat, Outcome,
    PublicKey, Register, RunNote, TaskId, Ticket, TicketKey, ToBroker, WorkerId, WorkerToClient,
};

use super::{
    job::output_of,
    mesh::{Happening, MS, Mesh, Micros, Node, Pulse, SECOND, micros, short_id},
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
    pub(super) batches: BTreeMap<BatchId, (SlotId, Vec<Part>)>,
    pub(super) links: BTreeMap<LinkId, usize>,
    pub(super) links_made: u64,
    pub(super) disk: Disk,
    /// It will not be started again.
    pub(super) is_gone: bool,
}

#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) models: Vec<Digest>,
    pub(super) detached: BTreeMap<AttemptId, Kept>,
}

#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) ticket: Ticket,
    pub(super) manifest: Manifest,
    pub(super) outcome: Option<Outcome>,
    pub(super) runs: Vec<RunNote>,
    pub(super) runs_begun: u32,
    /// The life of the worker in which a run was begun last.
    pub(super) begun_in: u32,
}

/// An attempt in the shell's hands.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) ticket: Ticket,
    pub(super) manifest: Manifest,
    pub(super) link: Option<usize>,
    pub(super) stage: Stage,
    /// Orders that are under way and meant for an earlier turn come to nothing.
    pub(super) turn: u32,
    pub(super) needed_bytes: u64,
    pub(super) received_bytes: u64,
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
            batches: BTreeMap::new(),
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

    /// Slots in which more than one batch runs.
    pub(super) fn overused(&self) -> Option<SlotId> {
        let used = |slot| self.batches.values().filter(|(in_slot, _)| *in_slot == slot).count();
        self.batches.values().map(|(slot, _)| *slot).find(|slot| used(*slot) > 1 || slot.0 >= self.place.slots)
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
            slots: [0, self.place.slots],
            device_map: vec![-1],
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
            shell.batches.clear();
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
            Action::RunBatch { batch, parts, slot, limit, .. } => {
                self.run_batch(worker, batch, slot, parts, micros(limit));
            }
            Action::KillBatch { batch } => {
                tell!(self, "W{worker} kills {batch:?}");
                self.workers[worker].batches.remove(&batch);
            }
            Action::Kill { id } => {
                tell!(self, "W{worker} kills {}", short_id(id));
                if let Some(session) = self.workers[worker].sessions.get_mut(&id) {
                    session.turn += 1;
                    session.stage = Stage::Over;
                }
            }
            Action::SendResult { id, link, outcome, runs, .. } => self.send_result(worker, id, link, outcome, runs),
            Action::Keep { id, outcome, runs } => {
                if let Some(kept) = self.workers[worker].disk.detached.get_mut(&id) {
                    (kept.outcome, kept.runs) = (Some(outcome), runs);
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

    pub(super) fn tell_client(&mut self, worker: usize, link: LinkId, message: WorkerToClient) {
        if let Some(number) = self.workers[worker].links.get(&link).copied()
            && self.links[number].number == link
        {
            tell!(self, "W{worker} > C{} {}", self.links[number].client, brief_from_door(&message));
            self.send_direct(number, false, Cargo::ToClient(message));
        }
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
            manifest: Box::new(kept.manifest.clone()),
            runs: kept.runs.clone(),
            outcome: kept.outcome.clone(),
            runs_begun: kept.runs_begun,
        };
        self.disk.detached.values().map(restored).collect()
    }
}

impl Session {
    pub(super) fn output(&self) -> Digest {
        output_of(self.ticket.body.task, self.ticket.body.client, self.manifest.inputs[0].digest)
    }
}
