//! The worker's process: its machine, its disk and its door. `worker_work` has what takes time.

use std::{collections::BTreeMap, time::Duration};

use mesh_core::worker::{Action, BatchId, Config, Event, LinkId, Restored, Sample, Worker};
use proto_msgs::{
    AttemptId, BrokerToWorker, ClientToWorker, Digest, Epoch, ErrorCode, Failure, Gpu, Load, Manifest, Outcome,
    PublicKey, Register, RunNote, TaskId, Ticket, TicketKey, ToBroker, WorkerId, WorkerToClient,
};

use super::{
    batches::{Batch, Rows},
    job::Behaviour,
    mesh::{Happening, Mesh, Micros, Node, Pulse, SECOND, micros, short_id},
    models::output_of,
    net::Cargo,
    story::{brief_from_door, brief_to_door, tell},
};

/// Interval of measurements: a little shorter than that of heartbeats.
fn sample_every(place: &Place) -> Micros {
    micros(place.heartbeat) * 9 / 10
}

/// A worker's equipment and its place in the network.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Slots of the realtime and the batch lane.
    pub(crate) slots: [u16; 2],
    pub(crate) device_map: Vec<i16>,
    /// Batches at once on one GPU.
    pub(crate) device_width: u16,
    pub(crate) labels: Vec<(String, String)>,
    /// The worker listens for clients and advertises where.
    pub(crate) advertises: bool,
    /// The worker's endpoint can be reached.
    pub(crate) reachable: bool,
    pub(crate) heartbeat: Duration,
    /// Models that its memory holds at a time.
    pub(crate) warm_max: usize,
}

impl Place {
    /// A worker whose slots are shared out as `--slots` does.
    pub(crate) fn slots(slots: u16) -> Self {
        Self::lanes(slots / 2, slots - slots / 2)
    }

    pub(crate) fn lanes(realtime: u16, batch: u16) -> Self {
        Self {
            slots: [realtime, batch],
            device_map: vec![-1],
            device_width: 1,
            labels: Vec::new(),
            advertises: true,
            reachable: true,
            heartbeat: Duration::from_secs(1),
            warm_max: usize::MAX,
        }
    }

    /// Puts the slots on these devices in turn.
    pub(crate) fn devices(self, device_map: &[i16]) -> Self {
        Self { device_map: device_map.to_vec(), ..self }
    }
}

/// A worker: its process, and what survives the process.
#[derive(Debug)]
pub(super) struct WorkerShell {
    pub(super) machine: Option<Worker>,
    pub(super) id: WorkerId,
    pub(super) place: Place,
    pub(super) key: Option<PublicKey>,
    pub(super) life: u32,
    pub(super) pulse: Pulse,
    /// The number of its connection to the broker.
    pub(super) conn: u8,
    pub(super) sessions: BTreeMap<AttemptId, Session>,
    pub(super) batches: BTreeMap<BatchId, Batch>,
    /// Models that were loaded in this life and still are, the latest first.
    pub(super) warm: Vec<Digest>,
    /// Number of loads in all lives.
    pub(super) loads: u32,
    /// Duration of everything at this worker, in thousandths of the normal time.
    pub(super) slowness_permille: u64,
    pub(super) links: BTreeMap<LinkId, usize>,
    pub(super) links_made: u64,
    pub(super) disk: Disk,
    /// The worker will not be started again.
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
    pub(super) rows: Rows,
    pub(super) runs_begun: u32,
    /// The life in which `runs_begun` was last counted.
    pub(super) begun_in: u32,
}

/// An attempt that the shell works on.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) ticket: Ticket,
    pub(super) manifest: Manifest,
    pub(super) link: Option<usize>,
    pub(super) stage: Stage,
    /// Number of the current order. Steps of an earlier order have no effect.
    pub(super) turn: u32,
    pub(super) needed_bytes: u64,
    pub(super) received_bytes: u64,
    pub(super) rows: Rows,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stage {
    Receiving,
    Here,
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
            warm: Vec::new(),
            loads: 0,
            slowness_permille: 1000,
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

    pub(super) fn is_receiving(&self, task: TaskId) -> bool {
        self.sessions.iter().any(|(id, session)| id.task == task && session.stage == Stage::Receiving)
    }

    pub(super) fn is_running(&self, task: TaskId) -> bool {
        let runs = self.batches.values().filter(|batch| !batch.is_answered);
        runs.flat_map(|batch| &batch.parts).any(|part| part.id.task == task)
    }

    /// Attempts with any data left on the disk.
    pub(super) fn files(&self) -> Vec<AttemptId> {
        self.sessions.keys().chain(self.disk.detached.keys()).copied().collect()
    }

    pub(super) fn forget_models(&mut self) {
        self.disk.models.clear();
    }

    fn register(&self, number: usize) -> Register {
        let gpu = Gpu { name: "simulated".to_owned(), memory_bytes: 8 << 30 };
        let gpus = self.place.device_map.iter().max().map_or(0, |last| usize::try_from(last + 1).unwrap_or(0));
        Register {
            worker: self.id,
            epoch: Epoch(u64::from(self.life)),
            memory_bytes: 4 << 30,
            endpoints: self.place.advertises.then(|| format!("tcp://w{number}:7000")).into_iter().collect(),
            key: self.key,
            // Each life has the same key: a ticket of an earlier life must be refused for its epoch, too.
            ticket_key: TicketKey([number as u8; 32]),
            slots: self.place.slots,
            device_map: self.place.device_map.clone(),
            device_width: self.place.device_width,
            labels: self.place.labels.clone(),
            gpus: vec![gpu; gpus],
            heartbeat_ms: self.place.heartbeat.as_millis() as u32,
            ..mesh_samples::register(number as u32)
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
        self.referee.worker_started(self.now, worker, life);
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
            shell.warm.clear();
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
        let (held, warm) = (shell.disk.models.clone(), shell.warm.clone());
        let sample = Sample { load: Load::default(), held, warm, link_bytes_per_s: 0 };
        self.worker_handle(worker, Event::Sampled(sample));
        self.after(sample_every(&self.workers[worker].place), Happening::Sample { worker, life });
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
                    ClientToWorker::Release(id) => Event::Released { id, link },
                    ClientToWorker::Abort(id) => Event::Aborted { id, link },
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
        self.referee.worker_acted(self.now, worker, &self.workers[worker]);
        self.count_tables(Node::Worker(worker));
        self.set_wake(Node::Worker(worker));
    }

    fn worker_acts(&mut self, worker: usize, action: Action) {
        match action {
            Action::TellBroker(message) => {
                self.referee.worker_says(worker, &message, &self.workers[worker].disk);
                self.send_to_broker(Node::Worker(worker), ToBroker::Worker(message));
            }
            Action::TellClient { link, message } => self.tell_client(worker, link, message),
            Action::Receive { id, link, manifest, ticket } => self.receive(worker, id, link, *manifest, *ticket),
            Action::RunBatch { batch, parts, slot, device, kind, limit, .. } => {
                self.run_batch(worker, batch, Batch::new(parts, slot, device, kind), micros(limit));
            }
            Action::KillBatch { batch } => self.kill_batch(worker, batch),
            Action::OnlyLoad { batch } => self.only_load(worker, batch),
            Action::Compare { batch, rows, limit } => self.compare(worker, batch, rows, micros(limit)),
            Action::StopComparing { batch } => self.stop_comparing(worker, batch),
            Action::Kill { id } => {
                tell!(self, "W{worker} kills {}", short_id(id));
                if let Some(session) = self.workers[worker].sessions.get_mut(&id) {
                    session.turn += 1;
                    session.stage = Stage::Over;
                }
            }
            Action::SendResult { id, link, outcome, runs, .. } => self.send_result(worker, id, link, outcome, runs),
            // Messages sent before are still in the network.
            Action::Silence { .. } | Action::Relink { .. } => {}
            Action::Keep { id, outcome, runs } => {
                let Some(session) = self.workers[worker].sessions.get_mut(&id) else { return };
                session.stage = Stage::Over;
                let (shortest, longest) = self.setup.disk_wait;
                let (wait, life) = (self.rng.among(shortest..longest), self.workers[worker].life);
                self.after(wait, Happening::Kept { worker, life, id, outcome, runs });
            }
            Action::Free { id } => {
                tell!(self, "W{worker} frees {}", short_id(id));
                self.workers[worker].sessions.remove(&id);
                self.workers[worker].disk.detached.remove(&id);
            }
            Action::Dial { id, endpoints, .. } => self.dial_client(worker, id, &endpoints),
            // No two processes have one worker's id here.
            Action::SayOvertaken => {}
            Action::Exit => {
                tell!(self, "W{worker} leaves");
                self.crash_worker(worker);
                // The machine's supervisor starts the worker again.
                self.after(3 * SECOND, Happening::Start(Node::Worker(worker)));
            }
        }
    }

    /// A result arrives on the disk, or the note that it cannot be kept, unless the worker died meanwhile.
    pub(super) fn kept(&mut self, worker: usize, life: u32, id: AttemptId, outcome: Outcome, runs: Vec<RunNote>) {
        let shell = &mut self.workers[worker];
        if shell.life != life || shell.machine.is_none() {
            return;
        }
        let is_lost = matches!(outcome, Outcome::Done { .. })
            && self.referee.job(id.task).behaviour == Behaviour::ResultUnwritten;
        let failure = is_lost.then(|| Failure::new(ErrorCode::DiskFull, "no space left for the result"));
        let outcome = failure.clone().map_or(outcome, Outcome::Failed);
        if let (Some(session), Some(kept)) = (shell.sessions.get(&id), shell.disk.detached.get_mut(&id)) {
            (kept.outcome, kept.runs, kept.rows) = (Some(outcome), runs, session.rows.clone());
        }
        self.worker_handle(worker, Event::Kept { id, failure });
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
    /// Attempts found on the disk at a start: detached ones with complete inputs or results.
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
                rows: kept.rows.clone(),
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
    /// The outputs of all rows; `None` if any row has not passed all stages.
    pub(super) fn output(&self) -> Option<Digest> {
        let rows = self.rows.last()?.iter().copied().collect::<Option<Vec<u64>>>()?;
        Some(output_of(self.ticket.body.task, self.ticket.body.client, rows.into_iter()))
    }
}
