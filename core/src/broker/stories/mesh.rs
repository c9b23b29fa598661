//! A broker with workers and clients that say what a test wants. Time passes only when the test says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub(super) use mesh_samples::{MODEL, client_id as client, task_id as task, worker_id as worker};
use mesh_samples::{client_peer, worker_peer};
use proto_msgs::{
    Answer, AnswerBody, Ask, AttemptId, BrokerToClient, BrokerToWorker, CancelTask, ClientToBroker, Close, Digest,
    Direction, Epoch, ErrorCode, Grant, Heartbeat, Leave, Locate, ModelCost, ModelFormat, Outcome, Packing, Question,
    Queued, Register, Standing, Submit, TaskId, TaskStanding, WhyView, WorkerId, WorkerToBroker,
};

use crate::{
    MonoTime,
    broker::{Action, Broker, Change, Config, Event, TaskRecord},
};

pub(super) const DONE: Outcome = Outcome::Done { run_us: 1, load_us: 0 };

pub(super) const DAY: Duration = Duration::from_secs(24 * 3600);

/// Cost of a model that takes this long for one item and is never packed.
pub(super) fn cost(run_us: u32) -> ModelCost {
    let (curve, dispatched) = (vec![(1, run_us)], [0; 4]);
    ModelCost { model: MODEL, packing: Packing::NoGain, best_batch: 1, next_batch: 1, curve, load_us: 0, dispatched }
}

/// A broker with its peers and its store; time passes only when a test says so.
pub(super) struct Mesh {
    pub(super) broker: Broker,
    pub(super) now: MonoTime,
    seqs: BTreeMap<u32, u64>,
    heartbeats: BTreeMap<u32, Heartbeat>,
    pub(super) specs: BTreeMap<TaskId, Submit>,
    pub(super) grants: Vec<Grant>,
    pub(super) ends: BTreeMap<TaskId, (Outcome, Option<u32>)>,
    /// The last word on each task that waits or has waited.
    pub(super) queued: BTreeMap<TaskId, Queued>,
    why: Option<WhyView>,
    tasks: Vec<TaskId>,
    /// The rows given to the store; `unstored` are those that it has not confirmed.
    pub(super) rows: BTreeMap<TaskId, TaskRecord>,
    unstored: BTreeSet<TaskId>,
    /// Attached tasks whose rows the store shows to people.
    pub(super) shown: BTreeSet<TaskId>,
    pub(super) models: Vec<(WorkerId, Digest)>,
    /// Lives of workers that were told that another process has their id.
    pub(super) overtaken: Vec<Epoch>,
    /// Attempts that workers were told to stop.
    pub(super) stopped: Vec<AttemptId>,
}

impl Mesh {
    /// A mesh in which no peer counts as silent, however much time passes.
    pub(super) fn new(config: Config) -> Self {
        Self::exactly(Config { client_silence: DAY, client_quiet: DAY, grant_wait: DAY, ..config })
    }

    pub(super) fn exactly(config: Config) -> Self {
        Self {
            broker: Broker::new(config),
            // The broker started long ago.
            now: MonoTime::from_micros(60_000_000),
            seqs: BTreeMap::new(),
            heartbeats: BTreeMap::new(),
            specs: BTreeMap::new(),
            grants: Vec::new(),
            ends: BTreeMap::new(),
            queued: BTreeMap::new(),
            why: None,
            tasks: Vec::new(),
            rows: BTreeMap::new(),
            unstored: BTreeSet::new(),
            shown: BTreeSet::new(),
            models: Vec::new(),
            overtaken: Vec::new(),
            stopped: Vec::new(),
        }
    }

    pub(super) fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(due) = self.broker.next_deadline().filter(|due| *due < until) {
            self.now = self.now.max(due);
            self.handle(Event::Deadline);
        }
        self.now = until;
        self.handle(Event::Deadline);
    }

    pub(super) fn handle(&mut self, event: Event) {
        for action in self.broker.handle(self.now, event) {
            match action {
                Action::TellClient { message: BrokerToClient::Grant(grant), .. } => self.grants.push(grant),
                Action::TellClient { message: BrokerToClient::Ended(ended), .. } => {
                    self.ends.insert(ended.task, (ended.outcome, ended.retry_after_ms));
                }
                Action::TellClient { message: BrokerToClient::Queued(queued), .. } => {
                    self.queued.insert(queued.task, queued);
                }
                Action::TellClient { message: BrokerToClient::Answer(Answer { body, .. }), .. } => match body {
                    AnswerBody::Why(why) => self.why = Some(why),
                    AnswerBody::Tasks(rows) => self.tasks = rows.iter().map(|row| row.task).collect(),
                    AnswerBody::Models(rows) => {
                        self.models.extend(rows.iter().map(|row| (row.worker, row.cost.model)));
                    }
                    _ => {}
                },
                Action::TellWorker { message: BrokerToWorker::Stop(id), .. } => self.stopped.push(id),
                Action::TellWorker { message: BrokerToWorker::HeartbeatAck(ack), .. } => self.stopped.extend(ack.stop),
                Action::TellWorker { message: BrokerToWorker::Overtaken(told), .. } => self.overtaken.push(told.epoch),
                Action::Save(Change::PutTask { record, durable: true }) => {
                    self.unstored.insert(record.spec.task);
                    self.rows.insert(record.spec.task, *record);
                }
                Action::Save(Change::PutTask { record, durable: false }) => {
                    self.shown.insert(record.spec.task);
                }
                Action::Save(Change::DropTask(task)) => {
                    self.shown.remove(&task);
                }
                _ => {}
            }
        }
    }

    /// The store confirms all rows that it was given.
    pub(super) fn store(&mut self) {
        while let Some(task) = self.unstored.pop_first() {
            self.handle(Event::Stored { task, footing: self.rows[&task].footing() });
        }
    }

    /// Registers a worker with these slots, four cores and no GPU; `change` sets the rest.
    pub(super) fn register(&mut self, number: u32, slots: [u16; 2], change: impl FnOnce(&mut Register)) {
        let mut register = Register {
            formats: vec![ModelFormat::TfLite],
            memory_bytes: 4 << 30,
            slots,
            heartbeat_ms: 1_000_000,
            ..mesh_samples::register(number)
        };
        change(&mut register);
        let message = WorkerToBroker::Register(register);
        self.handle(Event::WorkerSaid { peer: worker_peer(number), key: None, message });
        self.beat(number, |_| {});
    }

    /// Repeats a worker's last heartbeat with this change.
    pub(super) fn beat(&mut self, number: u32, change: impl FnOnce(&mut Heartbeat)) {
        let seq = self.seqs.entry(number).or_default();
        *seq += 1;
        let new = || mesh_samples::heartbeat(&mesh_samples::register(number), 0);
        let heartbeat = self.heartbeats.entry(number).or_insert_with(new);
        heartbeat.seq = *seq;
        change(heartbeat);
        let message = WorkerToBroker::Heartbeat(heartbeat.clone());
        self.handle(Event::WorkerSaid { peer: worker_peer(number), key: None, message });
    }

    /// A worker leaves.
    pub(super) fn leave(&mut self, number: u32) {
        let Register { worker, epoch, .. } = mesh_samples::register(number);
        let message = WorkerToBroker::Leave(Leave { worker, epoch });
        self.handle(Event::WorkerSaid { peer: worker_peer(number), key: None, message });
    }

    /// Registers a worker that has run the model and takes this long for one item.
    pub(super) fn measured(&mut self, number: u32, slots: [u16; 2], run_us: u32) {
        self.register(number, slots, |_| {});
        self.beat(number, |heartbeat| {
            (heartbeat.held, heartbeat.warm, heartbeat.costs) = (vec![MODEL], vec![MODEL], vec![cost(run_us)]);
        });
    }

    /// Submits a task; returns its worker if it was granted one at once.
    pub(super) fn submit(&mut self, number: u32, of: u32, change: impl FnOnce(&mut Submit)) -> Option<WorkerId> {
        let mut submit = mesh_samples::submit(number, of);
        change(&mut submit);
        let already = self.grants.len();
        self.specs.insert(submit.spec.task, submit.clone());
        let message = ClientToBroker::Submit(submit);
        self.handle(Event::ClientSaid { peer: client_peer(of), key: None, message });
        self.grants.get(already).map(|grant| grant.worker)
    }

    /// Submits tasks with these numbers.
    pub(super) fn submit_all(&mut self, numbers: std::ops::Range<u32>, of: u32, change: impl Fn(&mut Submit)) {
        for number in numbers {
            self.submit(number, of, &change);
        }
    }

    /// A client repeats its submit with this standing.
    pub(super) fn says(&mut self, id: TaskId, standing: Standing) {
        let submit = Submit { standing, ..self.specs[&id].clone() };
        self.handle(Event::ClientSaid { peer: client_peer(0), key: None, message: ClientToBroker::Submit(submit) });
    }

    /// A client says that the granted attempt was lost.
    pub(super) fn lost(&mut self, grant: &Grant, code: ErrorCode) {
        let Grant { id, worker, .. } = *grant;
        self.says(id.task, Standing::Lost { attempt: id.attempt, worker, outcome: Outcome::failed(code, "gone") });
    }

    pub(super) fn close(&mut self, id: AttemptId) {
        self.close_as(id, DONE);
    }

    pub(super) fn close_as(&mut self, id: AttemptId, outcome: Outcome) {
        let close = Close { task: id.task, client: self.specs[&id.task].spec.client, attempt: id.attempt, outcome };
        self.handle(Event::ClientSaid { peer: client_peer(0), key: None, message: ClientToBroker::Close(close) });
    }

    /// Whether the task has a worker.
    pub(super) fn is_at_work(&self, id: TaskId) -> bool {
        self.broker.tasks.get(id).is_some_and(|task| task.place().is_some())
    }

    /// Ends each granted task after this time until none waits. Returns the tasks in the order of their grants.
    pub(super) fn drain(&mut self, each: Duration) -> Vec<TaskId> {
        let mut done = 0;
        while let Some(grant) = self.grants.get(done).cloned() {
            done += 1;
            self.wait(each);
            self.close(grant.id);
        }
        assert_eq!(self.broker.gauges().queued, 0, "something was left behind");
        self.grants.iter().map(|grant| grant.id.task).collect()
    }

    pub(super) fn ask(&mut self, of: u32, question: Question) {
        let ask = Ask { request: 1, client: client(of), question };
        self.handle(Event::ClientSaid { peer: client_peer(of), key: None, message: ClientToBroker::Ask(ask) });
    }

    /// All tasks of a client, read page by page.
    pub(super) fn tasks(&mut self, of: u32) -> Vec<TaskId> {
        let mut all = Vec::new();
        loop {
            self.ask(of, Question::Tasks { before: all.last().copied() });
            match std::mem::take(&mut self.tasks) {
                page if page.is_empty() => return all,
                page => all.extend(page),
            }
        }
    }

    pub(super) fn why(&mut self, number: u32, of: u32) -> WhyView {
        self.asks_why(number, of).expect("there is such a task")
    }

    /// Asks why a task is in its state; `None` if the broker does not know the task.
    pub(super) fn asks_why(&mut self, number: u32, of: u32) -> Option<WhyView> {
        self.ask(of, Question::Why(task(number)));
        self.why.take()
    }

    /// Number of tasks before a waiting task of client `1`, as told by the broker.
    pub(super) fn tasks_before(&mut self, number: u32) -> Option<u32> {
        match self.why(number, 1).task.standing {
            TaskStanding::Queued { position, .. } => Some(position),
            _ => None,
        }
    }

    /// A client cancels a task from another process.
    pub(super) fn cancel(&mut self, number: u32, of: u32) {
        let message = ClientToBroker::Cancel(CancelTask { task: task(number), client: client(of) });
        self.handle(Event::ClientSaid { peer: client_peer(1000), key: None, message });
    }

    /// A client asks for the result of a detached task.
    pub(super) fn fetch(&mut self, number: u32, of: u32) {
        self.fetch_at(number, of, &[], None);
    }

    /// A client that can be dialled at these endpoints asks, after a direction has failed.
    pub(super) fn fetch_at(&mut self, number: u32, of: u32, endpoints: &[&str], unreachable: Option<Direction>) {
        let endpoints = endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect();
        let locate = Locate { task: task(number), client: client(of), key: None, endpoints, unreachable };
        self.handle(Event::ClientSaid { peer: client_peer(of), key: None, message: ClientToBroker::Locate(locate) });
    }

    pub(super) fn code(&self, number: u32) -> Option<ErrorCode> {
        match &self.ends.get(&task(number))?.0 {
            Outcome::Failed(failure) => Some(failure.code),
            _ => None,
        }
    }
}
