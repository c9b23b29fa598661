//! The broker's tasks and their states.
//!
//! ```text
//!   (new) ── Submit ──► Queued              if it is detached, Storing first, until the store has it
//!   Queued ── there is room ──► Granted
//!   Granted ── nobody takes it up ──► Queued
//!   Storing, Queued, Granted ── a heartbeat or its client names the attempt ──► Placed
//!   Granted, Placed ── its client says: lost ──► Queued
//!   each of them ── result taken, failed for good, cancelled, expired, abandoned ──► Ended
//!   Ended ── it was abandoned, and its client speaks again ──► Queued
//! ```
//!
//! Owns the tasks and their ends. Never decides where a task goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Included},
    time::Duration,
};

use proto_msgs::{
    Attempt, AttemptId, ClientId, Direction, Epoch, Lane, Locate, Outcome, PeerId, Prediction, PublicKey, TaskId,
    TaskSpec, TaskStanding, TaskView, WorkerId,
};

use super::{
    api::{Footing, TaskRecord},
    config::Config,
    decision::Decision,
    queue::{QueueKey, Rank},
    slo::StreamId,
};
use crate::{MonoTime, due::Due};

/// The state of a task.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// The task is detached and not in the store yet.
    Storing,
    /// The task waits for room.
    Queued(QueueKey),
    /// A slot is promised. The client has until `until` to take it up.
    Granted { at: Place, until: MonoTime },
    /// Client or worker has named the attempt. `unnamed_until`: only the client has; the worker should by then.
    Placed { at: Place, unnamed_until: Option<MonoTime> },
    /// The task is over.
    Ended { outcome: Outcome, ended_unix_ms: u64 },
}

/// How long after the deadline the broker ends a task at a worker. The worker should have done so at the deadline.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// A worker in one of its lives, and the side that dials.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    pub(super) worker: WorkerId,
    pub(super) epoch: Epoch,
    pub(super) direction: Direction,
}

/// A life of a worker at which an attempt was lost. A client cannot tell a dead worker from a broken link. The broker
/// can, but only once heartbeats are missed or the next life has registered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspect {
    pub(super) worker: WorkerId,
    pub(super) epoch: Epoch,
    /// Time by which it is known whether the worker died.
    pub(super) until: MonoTime,
}

/// A task as the broker knows it.
#[derive(Debug)]
pub(super) struct Task {
    /// What the first submit said, with its lane decided and its priority within the tenant's cap.
    pub(super) spec: TaskSpec,
    /// Where the client can be dialled; empty if it cannot.
    pub(super) endpoints: Vec<String>,
    /// The connection on which the client last spoke; `None` after a restart.
    pub(super) peer: Option<PeerId>,
    /// When the client last spoke.
    pub(super) heard: MonoTime,
    pub(super) submitted_unix_ms: u64,
    pub(super) deadline: Option<MonoTime>,
    pub(super) state: State,
    /// Placements so far.
    pub(super) attempt: Attempt,
    /// The first attempt that may count: earlier ones are dead, whatever a worker says.
    pub(super) fence: Attempt,
    /// An earlier broker may have placed the task: reports of attempts from workers and client may be news.
    pub(super) is_from_before: bool,
    /// The last placement: worker, epoch, and the worker's name.
    pub(super) last: Option<(WorkerId, Epoch, String)>,
    /// Failed attempts that count against the task.
    pub(super) failures: u32,
    /// Workers that failed the task; others are tried first.
    pub(super) avoid: Vec<WorkerId>,
    /// Workers that could not be reached, with the direction that was tried.
    pub(super) unreachable: Vec<(WorkerId, Direction)>,
    /// Workers that died while they had the task.
    pub(super) lost_with: Vec<WorkerId>,
    /// Workers that may have died while they had the task.
    pub(super) suspects: Vec<Suspect>,
    /// Outcome of the last attempt, while the task must wait until it is known whether its suspects died.
    pub(super) held_back: Option<Outcome>,
    /// Time before which the workers that failed the task are not asked again.
    pub(super) pause_until: MonoTime,
    /// The task's rating in the queue; `None` if it never waited there.
    pub(super) rank: Option<Rank>,
    /// It was checked whether any worker could ever run the task.
    pub(super) is_judged: bool,
    /// The worker that was asked to keep cores and memory for the task; it may have stopped since.
    pub(super) claims_at: Option<WorkerId>,
    /// The task has gone to a worker once: its cost is charged to its client's share.
    pub(super) is_dispatched: bool,
    /// The task's stream; `None` if it has no service level.
    pub(super) stream: Option<StreamId>,
    /// When the current attempt was granted; `None` if an earlier broker did that.
    pub(super) granted_at: Option<MonoTime>,
    /// When the current attempt breaks its service level; `None` once it has, or without one.
    pub(super) late_at: Option<MonoTime>,
    /// Predicted time of the current attempt.
    pub(super) predicted: Option<Prediction>,
    /// Actual time of the attempt that ended with a result.
    pub(super) took: Option<Duration>,
    /// The last placement decision.
    pub(super) decision: Option<Box<Decision>>,
    /// What happened to the attempts, as lines for people.
    pub(super) history: Vec<String>,
    /// The current attempt's outcome as reported by its worker, where the client has the last word: for an attached
    /// task, and for a detached one whose client the worker missed.
    pub(super) finished: Option<Outcome>,
    /// Since when the attempt's worker is absent: since its loss, or since the broker's restart.
    pub(super) away_since: Option<MonoTime>,
    /// The newest attempt that the client has named. A message that names an earlier one is late.
    pub(super) named_by_client: Attempt,
    /// The client connection that cancelled the task, to be told once the store has that.
    pub(super) cancelled_by: Option<PeerId>,
    /// The last client that asked for a detached task's result before there was one. It is told the way when there is
    /// one.
    pub(super) awaited_by: Option<Box<Awaiting>>,
    /// The task ended because its client was silent.
    pub(super) abandoned: bool,
    /// The store was told of the task.
    pub(super) stored: bool,
    /// The state that the store has confirmed; `None` before the first confirmation.
    pub(super) in_store: Option<Footing>,
}

/// A client that waits for a result.
#[derive(Debug)]
pub(super) struct Awaiting {
    pub(super) peer: PeerId,
    pub(super) key: Option<PublicKey>,
    pub(super) locate: Locate,
}

impl Task {
    pub(super) fn new(spec: TaskSpec, now: MonoTime, now_unix_ms: u64) -> Self {
        let deadline = spec.deadline_ms.map(|ms| now + Duration::from_millis(ms));
        Self {
            spec,
            endpoints: Vec::new(),
            peer: None,
            heard: now,
            submitted_unix_ms: now_unix_ms,
            deadline,
            state: State::Storing,
            attempt: Attempt(0),
            fence: Attempt(0),
            is_from_before: false,
            last: None,
            failures: 0,
            avoid: Vec::new(),
            unreachable: Vec::new(),
            lost_with: Vec::new(),
            suspects: Vec::new(),
            held_back: None,
            pause_until: MonoTime::ZERO,
            rank: None,
            is_judged: true,
            claims_at: None,
            is_dispatched: false,
            stream: None,
            granted_at: None,
            late_at: None,
            predicted: None,
            took: None,
            decision: None,
            history: Vec::new(),
            finished: None,
            away_since: None,
            named_by_client: Attempt(0),
            cancelled_by: None,
            awaited_by: None,
            abandoned: false,
            stored: false,
            in_store: None,
        }
    }

    pub(super) fn id(&self) -> TaskId {
        self.spec.task
    }

    pub(super) fn attempt_id(&self) -> AttemptId {
        AttemptId { task: self.spec.task, attempt: self.attempt }
    }

    pub(super) fn lane(&self) -> Lane {
        self.spec.lane.unwrap_or_default()
    }

    pub(super) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }

    /// Whether this worker was the last to get the task, with this attempt, be it by this broker or an earlier one.
    pub(super) fn was_given_to(&self, worker: WorkerId, attempt: Attempt) -> bool {
        attempt == self.attempt && self.last.as_ref().is_some_and(|(last, ..)| *last == worker)
    }

    /// The worker that has the current attempt, or was granted it.
    pub(super) fn place(&self) -> Option<Place> {
        match self.state {
            State::Granted { at, .. } | State::Placed { at, .. } => Some(at),
            State::Storing | State::Queued(_) | State::Ended { .. } => None,
        }
    }

    /// When the task breaks its service level at work. `None` before: nobody knows then whether the worker can be
    /// reached. `None` after the run: then only the client's fetch is missing.
    pub(super) fn breaks_promise_at(&self) -> Option<MonoTime> {
        let is_at_work = matches!(self.state, State::Placed { .. }) && self.finished.is_none();
        self.late_at.filter(|_| is_at_work && self.granted_at.is_some())
    }

    /// Predicted time from placement to end; `None` if nobody has run the model before.
    pub(super) fn predicted_ms(&self) -> Option<u32> {
        let predicted = self.predicted.filter(|predicted| predicted.measured)?;
        Some(u32::try_from(predicted.total_us().div_ceil(1000)).unwrap_or(u32::MAX))
    }

    pub(super) fn belongs_to(&self, client: ClientId, key: Option<PublicKey>) -> bool {
        self.spec.client == client && self.spec.key == key
    }

    /// When the broker ends the task for its deadline. A worker ends its attempt itself, and the client sees that at
    /// once.
    pub(super) fn expires_at(&self) -> Option<MonoTime> {
        let grace = if self.place().is_some() { DEADLINE_GRACE } else { Duration::ZERO };
        self.deadline.map(|deadline| deadline + grace)
    }

    pub(super) fn deadline_unix_ms(&self) -> Option<u64> {
        self.spec.deadline_ms.map(|ms| self.submitted_unix_ms.saturating_add(ms))
    }

    fn footing(&self) -> Footing {
        let worker = self.last.as_ref().map(|(worker, ..)| *worker);
        Footing { attempt: self.attempt, worker, is_over: self.is_ended() }
    }

    /// Whether the store has confirmed what a restart must know: the task's place, or its end.
    pub(super) fn is_in_store(&self) -> bool {
        self.in_store == Some(self.footing())
    }

    /// Whether the task is over and a restart would not know of it yet.
    pub(super) fn awaits_store(&self) -> bool {
        self.outlives_client() && self.is_ended() && !self.is_in_store()
    }

    /// Whether the task's end is kept for later: the store knows the task, and a worker may keep its result.
    fn outlives_client(&self) -> bool {
        self.spec.detached && self.stored
    }

    /// Whether the task's inputs may be at a worker that has not been heard: this broker or an earlier one may have
    /// granted the last attempt, and the client has not taken it back.
    pub(super) fn may_be_at_worker(&self) -> bool {
        let was_given_away = self.attempt > Attempt(0) || self.away_since.is_some();
        self.spec.detached && was_given_away && self.fence <= self.attempt && self.finished.is_none()
    }

    /// Whether the task is at a worker that goes on with it, whatever its client does.
    pub(super) fn is_in_good_hands(&self) -> bool {
        matches!(self.state, State::Placed { .. }) && self.spec.detached && self.finished.is_none()
    }

    pub(super) fn record(&self) -> TaskRecord {
        TaskRecord {
            spec: self.spec.clone(),
            attempt: self.attempt,
            worker: self.last.as_ref().map(|(worker, epoch, _)| (*worker, *epoch)),
            submitted_unix_ms: self.submitted_unix_ms,
            ended: match &self.state {
                State::Ended { outcome, ended_unix_ms } => Some((outcome.clone(), *ended_unix_ms)),
                _ => None,
            },
        }
    }

    pub(super) fn view(&self, queued: impl FnOnce(QueueKey) -> (u32, String)) -> TaskView {
        let (standing, ended_unix_ms) = match &self.state {
            State::Storing => {
                (TaskStanding::Queued { position: 0, reason: "waiting for the store to have it".into() }, None)
            }
            State::Queued(key) => {
                let (position, reason) = queued(*key);
                (TaskStanding::Queued { position, reason }, None)
            }
            State::Granted { .. } => (TaskStanding::Granted, None),
            State::Placed { .. } => (TaskStanding::Placed, None),
            State::Ended { outcome, ended_unix_ms } => (TaskStanding::Ended(outcome.clone()), Some(*ended_unix_ms)),
        };
        TaskView {
            task: self.spec.task,
            job: self.spec.job,
            model_name: self.spec.model_name.clone(),
            model: self.spec.model,
            input_bytes: self.spec.input_bytes,
            items: self.spec.items,
            priority: self.spec.priority,
            lane: self.lane(),
            detached: self.spec.detached,
            standing,
            attempt: self.attempt,
            worker: self.last.as_ref().map(|(worker, _, name)| (*worker, name.clone())),
            submitted_unix_ms: self.submitted_unix_ms,
            ended_unix_ms,
        }
    }
}

/// All tasks. The unfinished ones are ordered by their next look.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    // Boxed: a task has some hundred bytes, and the tree moves its entries. Unfinished tasks have their own map: they
    // are few, and nearly every look-up is for one of them.
    live: BTreeMap<TaskId, Box<Task>>,
    over: BTreeMap<TaskId, Box<Task>>,
    /// When each unfinished task must be looked at.
    due: Due<TaskId>,
    /// All tasks by owner: a client's question looks only at its own tasks.
    owners: BTreeSet<(ClientId, TaskId)>,
    /// When each ended task may be forgotten.
    ended: Due<TaskId>,
    /// When each ended task that a client may still come for may be forgotten. Other ends, however many, do not push it
    /// out.
    ended_for_later: Due<TaskId>,
}

impl Tasks {
    /// Number of unfinished tasks.
    pub(super) fn live(&self) -> usize {
        self.live.len()
    }

    /// Entries of all tables together: none when every task is forgotten.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        let looks = self.due.len() + self.ended.len() + self.ended_for_later.len();
        self.live.len() + self.over.len() + self.owners.len() + looks
    }

    pub(super) fn get(&self, id: TaskId) -> Option<&Task> {
        self.live.get(&id).or_else(|| self.over.get(&id)).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: TaskId) -> Option<&mut Task> {
        self.live.get_mut(&id).or_else(|| self.over.get_mut(&id)).map(Box::as_mut)
    }

    /// The client's tasks before the given one, newest first.
    pub(super) fn before(&self, client: ClientId, id: Option<TaskId>) -> impl Iterator<Item = &Task> {
        const FIRST: TaskId = TaskId::from_bytes([0; 16]);
        const LAST: TaskId = TaskId::from_bytes([0xff; 16]);
        let end = id.map_or(Included((client, LAST)), |id| Excluded((client, id)));
        self.owners.range((Included((client, FIRST)), end)).rev().filter_map(|(_, id)| self.get(*id))
    }

    /// The tasks that wait for the store.
    pub(super) fn storing(&self) -> Vec<TaskId> {
        let storing = self.live.values().filter(|task| task.state == State::Storing);
        storing.map(|task| task.id()).collect()
    }

    /// Adds a task. `due` is its next look or, if it has ended, when it may be forgotten.
    pub(super) fn insert(&mut self, task: Task, due: MonoTime) {
        let (id, task) = (task.id(), Box::new(task));
        self.owners.insert((task.spec.client, id));
        if task.is_ended() {
            self.ends(&task).set(id, due);
            self.over.insert(id, task);
        } else {
            self.due.set(id, due);
            self.live.insert(id, task);
        }
    }

    /// The schedule that forgets this ended task.
    fn ends(&mut self, task: &Task) -> &mut Due<TaskId> {
        if task.outlives_client() { &mut self.ended_for_later } else { &mut self.ended }
    }

    /// Sets a task's next look.
    pub(super) fn set_due(&mut self, id: TaskId, due: MonoTime) {
        if self.live.contains_key(&id) {
            self.due.set(id, due);
        }
    }

    /// Sets a task's next look unless an earlier one is set.
    pub(super) fn due_by(&mut self, id: TaskId, due: MonoTime) {
        if self.live.contains_key(&id) {
            self.due.by(id, due);
        }
    }

    /// Time of the next look at any task.
    pub(super) fn first_due(&self) -> Option<MonoTime> {
        self.due.first()
    }

    /// Takes a task that is due; the caller sets its next look.
    pub(super) fn pop_due(&mut self, now: MonoTime) -> Option<TaskId> {
        self.due.pop(now)
    }

    /// Ends a task; it is remembered until `until`.
    pub(super) fn end(&mut self, id: TaskId, outcome: Outcome, ended_unix_ms: u64, until: MonoTime) {
        if let Some(mut task) = self.live.remove(&id) {
            self.due.remove(id);
            task.state = State::Ended { outcome, ended_unix_ms };
            self.ends(&task).set(id, until);
            self.over.insert(id, task);
        }
    }

    /// Makes an ended task unfinished again: it is about to wait.
    pub(super) fn revive(&mut self, now: MonoTime, id: TaskId) {
        if let Some(mut task) = self.over.remove(&id) {
            self.ends(&task).remove(id);
            (task.state, task.abandoned, task.finished) = (State::Storing, false, None);
            self.due.set(id, now);
            self.live.insert(id, task);
        }
    }

    /// Removes one ended task whose time is over, or the oldest one of too many.
    pub(super) fn forget_one(&mut self, now: MonoTime, config: &Config) -> Option<Box<Task>> {
        let ends = [(&mut self.ended, config.ended_max), (&mut self.ended_for_later, config.ended_for_later_max)];
        let id =
            ends.into_iter().find_map(|(ends, max)| if ends.len() > max { ends.pop_first() } else { ends.pop(now) })?;
        let task = self.over.remove(&id)?;
        self.owners.remove(&(task.spec.client, id));
        Some(task)
    }

    /// When the next ended task may be forgotten.
    pub(super) fn first_forgotten(&self) -> Option<MonoTime> {
        let firsts = [self.ended.first(), self.ended_for_later.first()];
        firsts.into_iter().flatten().min()
    }
}
