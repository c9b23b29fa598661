//! The laws that must always hold, checked at every event from outside the machines.
//!
//! Keeps its own books: who owns a task and what its result must be, what the broker was told and has promised, what
//! each client follows. Never asks a machine about itself, except for its counters once all is quiet.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::client::{End, News};
use proto_msgs::{
    Attempt, AttemptId, AttemptReport, AttemptState, BrokerToClient, ClientId, Digest, Epoch, ErrorCode, Lane, Outcome,
    Purpose, RunNote, TaskId, Ticket, WorkerId, WorkerToBroker, limits::RUN_NOTES_MAX,
};

use super::{
    books::Promises,
    ears::Ears,
    job::{Behaviour, Job},
    lanes::Rooms,
    mesh::{Micros, Node, SECOND, micros, short, short_id},
    worker_shell::{Disk, WorkerShell},
};

/// Most deadlines of one machine in a second. Twenty tasks with two looks each need far fewer.
const WAKES_PER_SECOND_MAX: u32 = 200;

/// More deadlines allowed for each task beyond those.
const WAKES_PER_TASK_MAX: usize = 20;

/// Most attempts in one heartbeat: active ones, and 64 unacknowledged ones.
const REPORTS_MAX: usize = ACTIVE_MAX + 64;

/// Most active attempts of one worker: the broker brings it no more ahead of time.
pub(super) const ACTIVE_MAX: usize = 192;

/// Workers that a task may take down before it is given up.
const KILLS_MAX: u32 = 3;

/// A law was broken.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Violation {
    /// The law in a few words, which name it everywhere.
    pub(crate) law: &'static str,
    pub(crate) detail: String,
}

/// Everything known of a task.
#[derive(Debug)]
pub(crate) struct Truth {
    pub(crate) owner: ClientId,
    /// The process that submitted it.
    pub(crate) process: usize,
    pub(crate) job: Job,
    pub(crate) submitted: Micros,
    /// When the first rows of the attempt that answered began to run.
    pub(crate) began: Option<Micros>,
    pub(crate) ended: Option<Micros>,
    /// The stream that the task is part of.
    pub(crate) stream: Option<usize>,
    /// Workers that died with this task.
    pub(crate) kills: u32,
    pub(crate) cancelled: bool,
    /// The task was submitted after all had healed: nothing may go wrong with it.
    pub(crate) in_calm: bool,
    /// The client heard that the store has the task.
    pub(crate) durable: bool,
    /// The client heard that the task is safe, and left: from then on only the mesh can lose it.
    pub(crate) left: bool,
    /// Processes that wait for the task's end.
    pub(super) open: BTreeMap<usize, Follow>,
    pub(crate) ends: Vec<(usize, End)>,
    pub(crate) placements: Vec<(Attempt, WorkerId)>,
    pub(crate) runs: Vec<(Attempt, usize)>,
}

/// What a process does about a task.
#[derive(Clone, Copy, Debug)]
pub(super) struct Follow {
    fetch: bool,
    attempt: Attempt,
    verified: Option<Digest>,
}

/// The referee of one run.
#[derive(Debug, Default)]
pub(crate) struct Referee {
    pub(crate) violation: Option<Violation>,
    pub(crate) tasks: Vec<Truth>,
    /// A fault happened that excuses retryable failures.
    pub(crate) is_harmed: bool,
    /// When the last fault struck.
    pub(super) struck: Option<Micros>,
    /// A worker was slow once: what it has learned may be of that time.
    pub(super) has_slowed: bool,
    /// A machine was lost for good, with the results that it kept.
    pub(crate) a_worker_is_gone: bool,
    /// Every worker that comes back is in time for its detached tasks.
    pub(crate) is_patient: bool,
    /// From now on no fault excuses a failure.
    pub(crate) is_calm: bool,
    pub(super) broker_life: u32,
    /// When the current life of the broker began.
    pub(super) broker_since: Micros,
    /// Tasks that any life of the broker accepted.
    pub(super) taken: BTreeSet<TaskId>,
    pub(super) promises: BTreeMap<WorkerId, Promises>,
    pub(super) placed: BTreeMap<AttemptId, (u32, WorkerId)>,
    /// In the broker's current life: the last attempt that was granted, held and lost by the client.
    pub(super) granted: BTreeMap<TaskId, Attempt>,
    pub(super) held: BTreeMap<TaskId, (Attempt, WorkerId)>,
    pub(super) heard_of: BTreeSet<TaskId>,
    pub(super) lost: BTreeMap<TaskId, Attempt>,
    received: BTreeMap<AttemptId, (usize, Epoch)>,
    pub(super) ran: BTreeSet<(AttemptId, usize, u32)>,
    lives: BTreeMap<usize, u32>,
    pub(super) rooms: Rooms,
    pub(super) ears: Ears,
    reported: BTreeMap<usize, usize>,
    wakes: BTreeMap<Node, (Micros, u32)>,
}

/// The number of a task in this run.
pub(super) fn number(task: TaskId) -> usize {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&task.as_bytes()[..8]);
    u64::from_be_bytes(bytes) as usize
}

/// The id of the task with this number.
pub(super) fn task_id(number: usize) -> TaskId {
    let mut bytes = [7; 16];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    TaskId::from_bytes(bytes)
}

impl Referee {
    pub(super) fn fail(&mut self, law: &'static str, detail: String) {
        self.violation.get_or_insert(Violation { law, detail });
    }

    pub(crate) fn task(&self, task: TaskId) -> &Truth {
        &self.tasks[number(task)]
    }

    pub(super) fn task_mut(&mut self, task: TaskId) -> &mut Truth {
        &mut self.tasks[number(task)]
    }

    pub(super) fn job(&self, task: TaskId) -> &Job {
        &self.task(task).job
    }

    // What users do.

    pub(super) fn new_task(&mut self, now: Micros, owner: ClientId, process: usize, job: Job) -> TaskId {
        let task = task_id(self.tasks.len());
        let follow = Follow { fetch: false, attempt: Attempt(0), verified: None };
        self.tasks.push(Truth {
            owner,
            process,
            job,
            submitted: now,
            began: None,
            ended: None,
            stream: None,
            kills: 0,
            cancelled: false,
            in_calm: self.is_calm && !self.tasks.iter().any(|truth| truth.job.behaviour == Behaviour::KillsWorker),
            durable: false,
            left: false,
            open: BTreeMap::from([(process, follow)]),
            ends: Vec::new(),
            placements: Vec::new(),
            runs: Vec::new(),
        });
        task
    }

    pub(super) fn cancelled(&mut self, task: TaskId) {
        self.task_mut(task).cancelled = true;
    }

    pub(super) fn fetched(&mut self, task: TaskId, process: usize) {
        let follow = Follow { fetch: true, attempt: Attempt(0), verified: None };
        self.task_mut(task).open.insert(process, follow);
    }

    pub(super) fn client_died(&mut self, process: usize) {
        for truth in &mut self.tasks {
            truth.open.remove(&process);
        }
    }

    // What clients do.

    pub(super) fn follows(&mut self, process: usize, id: AttemptId) {
        match self.task_mut(id.task).open.get_mut(&process) {
            Some(follow) if follow.attempt <= id.attempt => follow.attempt = id.attempt,
            other => {
                let detail = format!("C{process} connects for {}, {other:?}", short_id(id));
                self.fail("a client follows the newest attempt", detail);
            }
        }
    }

    pub(super) fn takes_result(&mut self, process: usize, id: AttemptId) {
        let follow = self.task(id.task).open.get(&process).copied();
        if follow.is_none_or(|follow| follow.attempt != id.attempt) {
            let detail = format!("C{process} takes {} while it follows {follow:?}", short_id(id));
            self.fail("an old attempt's result does not count", detail);
        }
    }

    pub(super) fn verified(&mut self, process: usize, id: AttemptId, content: Digest) {
        if let Some(follow) = self.task_mut(id.task).open.get_mut(&process) {
            follow.verified = Some(content);
        }
    }

    pub(super) fn reported(&mut self, process: usize, task: TaskId, news: &News) {
        if !self.task(task).open.contains_key(&process) {
            self.fail("a task ends once", format!("C{process} has news of {} after its end: {news:?}", short(task)));
        }
    }

    pub(super) fn client_hears(&mut self, message: &BrokerToClient) {
        match message {
            BrokerToClient::Queued(queued) if queued.durable => self.task_mut(queued.task).durable = true,
            BrokerToClient::Noted(noted) if noted.durable => self.task_mut(noted.id.task).durable = true,
            _ => {}
        }
    }

    pub(super) fn ended(&mut self, now: Micros, user: ClientId, process: usize, task: TaskId, end: &End) {
        let truth = self.task_mut(task);
        let Some(follow) = truth.open.remove(&process) else {
            return self.fail("a task ends once", format!("C{process} ends {} again: {end:?}", short(task)));
        };
        truth.ends.push((process, end.clone()));
        truth.ended = Some(now);
        if truth.owner != user {
            return self.fail("a result goes to its owner", format!("{} ended at C{process}", short(task)));
        }
        let truth = self.task(task);
        let complaint = match &end.outcome {
            Outcome::Done { .. } if truth.job.detached && !follow.fetch => None,
            Outcome::Done { .. } => wrong_result(task, truth, follow, end),
            Outcome::Cancelled => (!truth.cancelled && !truth.was_given_up()).then(|| "nobody cancelled it".to_owned()),
            Outcome::Failed(failure) => self.unjustified(now, truth, follow, failure.code),
        };
        if let Some(complaint) = complaint {
            self.fail("a task ends as it must", format!("{} at C{process}: {complaint}: {end:?}", short(task)));
        } else if matches!(end.outcome, Outcome::Done { .. }) && truth.job.detached {
            let truth = self.task_mut(task);
            (truth.durable, truth.left) = (true, true);
        }
    }

    /// Why this failure is not justified; `None` if it is.
    fn unjustified(&self, now: Micros, truth: &Truth, follow: Follow, code: ErrorCode) -> Option<String> {
        let is_late = truth.job.deadline.is_some_and(|deadline| now >= truth.submitted + micros(deadline));
        let behaviour = truth.job.behaviour;
        let excused = self.is_harmed && !truth.in_calm;
        let good = match code {
            ErrorCode::Expired => is_late,
            ErrorCode::DeadlineUnmeetable => truth.job.deadline.is_some(),
            ErrorCode::RunTimeout => behaviour == Behaviour::NeverEnds,
            ErrorCode::ResultNotKept => behaviour == Behaviour::FillsDisk,
            ErrorCode::DigestMismatch => behaviour == Behaviour::FileVanishes,
            ErrorCode::NoWorkerFits => {
                let is_choosy = truth.job.direction.is_some() || !truth.job.labels.is_empty();
                excused || is_choosy || truth.job.lane_in_force() == Lane::Batch
            }
            // The broker promises the unfetched result of an acknowledged task as long as its worker is there.
            ErrorCode::NotFound | ErrorCode::ResultGone if !self.a_worker_is_gone => {
                follow.fetch && (!truth.durable || truth.was_fetched() || truth.was_given_up())
            }
            ErrorCode::NotFound | ErrorCode::ResultGone => self.a_worker_is_gone,
            // A detached task is meant to outlive its client.
            ErrorCode::ClientGone => excused && !truth.left,
            // A worker has stopped what its user cancelled, though a broker that died since could not store that.
            ErrorCode::WorkerLost if truth.left && self.is_patient => self.a_worker_is_gone || truth.cancelled,
            ErrorCode::RunCrashed | ErrorCode::Poisonous if behaviour == Behaviour::KillsWorker => true,
            // Three workers died while they ran it.
            ErrorCode::Poisonous => excused,
            code if behaviour == Behaviour::Fails(code) => true,
            code if code.is_retryable() || code == ErrorCode::AttemptsExhausted => {
                // A detached task is not retried: the inputs left with its client.
                let tried_again = behaviour == Behaviour::FailsFirst(1) && !truth.job.detached;
                let works = matches!(behaviour, Behaviour::Works | Behaviour::LosesRow);
                excused || !works && !tried_again
            }
            _ => false,
        };
        (!good).then(|| format!("no reason for {code}"))
    }

    // What workers do.

    pub(super) fn worker_started(&mut self, now: Micros, worker: usize, life: u32) {
        self.stands_still(worker, now);
        self.lives.insert(worker, life);
        self.reported.insert(worker, 0);
    }

    pub(super) fn worker_says(&mut self, worker: usize, message: &WorkerToBroker, disk: &Disk) {
        if let WorkerToBroker::Heartbeat(heartbeat) = message {
            let is_over = |report: &&AttemptReport| matches!(report.state, AttemptState::Finished(_));
            let is_only_said = |id| disk.detached.get(&id).is_some_and(|kept| kept.outcome.is_none());
            let mut over = heartbeat.attempts.iter().filter(is_over).map(|report| report.id);
            if let Some(id) = over.find(|id| is_only_said(*id)) {
                self.fail("told is kept", format!("W{worker} says that {} is over, its disk does not", short_id(id)));
            }
            let count = heartbeat.attempts.len();
            self.reported.insert(worker, count);
            self.rooms.told(worker, &heartbeat.costs);
            if count > REPORTS_MAX {
                self.fail("nothing grows without bound", format!("W{worker} reports {count} attempts"));
            }
        }
    }

    /// Attempts in the worker's last heartbeat.
    pub(super) fn last_reported(&self, worker: usize) -> usize {
        self.reported.get(&worker).copied().unwrap_or(0)
    }

    pub(super) fn received(&mut self, worker: usize, shell: &WorkerShell, id: AttemptId, ticket: &Ticket) {
        let here = (worker, Epoch(u64::from(shell.life)));
        if ticket.body.worker != shell.id || ticket.body.epoch != here.1 {
            let detail = format!("W{worker} in {:?} takes {} for {:?}", here.1, short_id(id), ticket.body.epoch);
            return self.fail("a ticket is for one life of one worker", detail);
        }
        if ticket.body.purpose != Purpose::Run || ticket.body.client != self.task(id.task).owner {
            return self.fail("a ticket says what may be done", format!("W{worker} takes {}", short_id(id)));
        }
        let place = *self.received.entry(id).or_insert(here);
        if place != here {
            let detail = format!("{} was taken in at {place:?}, now at {here:?}", short_id(id));
            self.fail("an attempt has one place", detail);
        }
    }

    pub(super) fn life_of(&self, worker: usize) -> u32 {
        self.lives.get(&worker).copied().unwrap_or(0)
    }

    /// Counts a worker that died while it ran this task.
    pub(super) fn killed(&mut self, worker: usize, task: TaskId) {
        let (life, workers) = (self.broker_life, self.lives.len());
        let truth = self.task_mut(task);
        truth.kills += 1;
        // A restarted broker counts anew, and a detached task comes back with its worker. A worker that dies before its
        // client heard of it counts as unreachable, and is tried in the other direction, too.
        if truth.kills > KILLS_MAX + workers as u32 && life == 1 && !truth.job.detached {
            let detail = format!("{} takes W{worker} down, the {}. time", short(task), self.task(task).kills);
            self.fail("poison stops", detail);
        }
    }

    // Machines' deadlines.

    pub(super) fn woken(&mut self, node: Node, now: Micros) {
        let (second, count) = self.wakes.entry(node).or_default();
        if *second != now / SECOND {
            (*second, *count) = (now / SECOND, 0);
        }
        *count += 1;
        let count = *count;
        if count > WAKES_PER_SECOND_MAX {
            let open = self.tasks.iter().filter(|truth| !truth.open.is_empty()).count();
            if count as usize > WAKES_PER_SECOND_MAX as usize + open * WAKES_PER_TASK_MAX {
                self.fail("no busy loop", format!("{node} was woken {count} times in a second with {open} tasks"));
            }
        }
    }
}

impl Truth {
    /// Whether its client ended the task without a result, so that its worker may have been stopped.
    fn was_given_up(&self) -> bool {
        self.ends.iter().any(|(_, end)| !matches!(end.outcome, Outcome::Done { .. }))
    }

    fn was_fetched(&self) -> bool {
        let fetched = |(_, end): &(usize, End)| end.result.is_some();
        self.ends.iter().any(fetched) || self.cancelled
    }
}

fn wrong_result(task: TaskId, truth: &Truth, follow: Follow, end: &End) -> Option<String> {
    let right = truth.job.right_output(task, truth.owner);
    let Some(result) = &end.result else { return Some("done without a result".to_owned()) };
    let announced = result.outputs.first().map(|output| output.digest);
    if follow.verified != Some(right) || announced != Some(right) {
        return Some(format!("the result is wrong: verified {:?}", follow.verified));
    }
    if result.id.attempt != follow.attempt {
        return Some(format!("the result is of attempt {}", result.id.attempt));
    }
    wrong_notes(&truth.job, &result.runs)
}

/// What is wrong with the notes about the runs; they must cover each stage's rows once.
fn wrong_notes(job: &Job, runs: &[RunNote]) -> Option<String> {
    if runs.len() >= RUN_NOTES_MAX {
        return None; // Cut off.
    }
    for stage in 0..=job.then.len() {
        let notes = runs.iter().filter(|note| usize::from(note.stage) == stage);
        let mut rows: Vec<(u32, u32)> = notes.map(|note| note.rows).collect();
        rows.sort_unstable();
        let end = rows.iter().try_fold(0, |end, (from, to)| (*from == end && to > from).then_some(*to));
        if end != Some(job.items) {
            return Some(format!("the runs of stage {stage} do not cover {} items once: {runs:?}", job.items));
        }
    }
    None
}
