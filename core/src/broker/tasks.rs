//! The task half of the broker's memory.
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
    Attempt, AttemptId, ClientId, Direction, Epoch, Lane, Locate, Outcome, PeerId, Prediction, PublicKey, Submit,
    TaskId, TaskStanding, TaskView, WorkerId,
};

use super::{
    api::{Footing, TaskRecord},
    config::Config,
    outcomes::Suspect,
    placement::Decision,
    queue::{QueueKey, Rank},
    slo::StreamId,
};
use crate::{MonoTime, due::Due};

/// Where a task stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// Detached, and the store does not have it yet.
    Storing,
    /// Waiting for room.
    Queued(QueueKey),
    /// A slot is promised; the client has until `until` to take it up.
    Granted { at: Place, until: MonoTime },
    /// Client or worker has named the attempt. `unnamed_until`: only the client has, and the worker should by then.
    Placed { at: Place, unnamed_until: Option<MonoTime> },
    /// Over.
    Ended { outcome: Outcome, ended_unix_ms: u64 },
}

/// The broker clears up this much later what its worker should have ended at the deadline.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// A worker in one of its lives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    pub(super) worker: WorkerId,
    pub(super) epoch: Epoch,
    pub(super) direction: Direction,
}

/// A task.
#[derive(Debug)]
pub(super) struct Task {
    /// As first submitted, with its lane decided and its priority within the tenant's cap; its `standing` is not looked at.
    pub(super) spec: Submit,
    /// The connection the client last spoke on; `None` after a restart.
    pub(super) peer: Option<PeerId>,
    /// When the client last spoke.
    pub(super) heard: MonoTime,
    pub(super) submitted_unix_ms: u64,
    pub(super) deadline: Option<MonoTime>,
    pub(super) state: State,
    /// Placements so far.
    pub(super) attempt: Attempt,
    /// Earlier attempts than this one are dead, whatever a worker says.
    pub(super) fence: Attempt,
    /// A broker before this one may have placed it: what workers and its client say of attempts may be news.
    pub(super) is_from_before: bool,
    /// Where it was placed last.
    pub(super) last: Option<(WorkerId, Epoch, String)>,
    /// Attempts that count against the task.
    pub(super) failures: u32,
    /// Workers that failed it; others are tried first.
    pub(super) avoid: Vec<WorkerId>,
    /// Directions in which a worker could not be reached.
    pub(super) unreachable: Vec<(WorkerId, Direction)>,
    /// Workers that died with it.
    pub(super) lost_with: Vec<WorkerId>,
    /// Workers that may have.
    pub(super) suspects: Vec<Suspect>,
    /// How its last attempt came to nothing, while another one has to wait until that is known.
    pub(super) held_back: Option<Outcome>,
    /// Workers that failed it are not asked again before.
    pub(super) pause_until: MonoTime,
    /// How it was rated in the queue; `None` if it never waited there.
    pub(super) rank: Option<Rank>,
    /// It has been asked whether any worker could ever run it.
    pub(super) is_judged: bool,
    /// The worker that keeps cores and memory for it, if that still does.
    pub(super) claims_at: Option<WorkerId>,
    /// It has gone to a worker once: what it costs its client's share is spent.
    pub(super) is_dispatched: bool,
    /// The stream with a promise that it belongs to.
    pub(super) stream: Option<StreamId>,
    /// When its current attempt was given away, by this life of the broker.
    pub(super) granted_at: Option<MonoTime>,
    /// When that attempt will have broken the promise of its stream; `None` once it has, or if there is none.
    pub(super) late_at: Option<MonoTime>,
    /// How long that attempt was predicted to take.
    pub(super) predicted: Option<Prediction>,
    /// How long it took.
    pub(super) took: Option<Duration>,
    /// The last decision where it goes.
    pub(super) decision: Option<Box<Decision>>,
    /// How its attempts went, for people.
    pub(super) history: Vec<String>,
    /// How the worker says that the current attempt ended, where the client has the last word: of an attached task, and of a
    /// detached one whose client the worker missed.
    pub(super) finished: Option<Outcome>,
    /// Since when the worker of an attempt has not been there to name it: since its loss, or since the broker's restart.
    pub(super) away_since: Option<MonoTime>,
    /// The newest attempt that its client has named. A message that knows less is a late one.
    pub(super) named_by_client: Attempt,
    /// Who took it back and is told so once the store has it.
    pub(super) cancelled_by: Option<PeerId>,
    /// Who asked last for the result of a detached task that had none yet, and is shown the way when there is one.
    pub(super) awaited_by: Option<Box<Awaiting>>,
    /// It ended because its client was silent.
    pub(super) abandoned: bool,
    /// The store has been told of it.
    pub(super) stored: bool,
    /// What the store has of it, as far as it has said.
    pub(super) in_store: Option<Footing>,
}

/// A client that asked for a result.
#[derive(Debug)]
pub(super) struct Awaiting {
    pub(super) peer: PeerId,
    pub(super) key: Option<PublicKey>,
    pub(super) locate: Locate,
}

impl Task {
    pub(super) fn new(spec: Submit, now: MonoTime, now_unix_ms: u64) -> Self {
        let deadline = spec.deadline_ms.map(|ms| now + Duration::from_millis(ms));
        Self {
            spec,
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

    /// Whether the worker was given this attempt, the last one that was given to any, or took it with it from before.
    pub(super) fn was_given_to(&self, worker: WorkerId, attempt: Attempt) -> bool {
        attempt == self.attempt && self.last.as_ref().is_some_and(|(last, ..)| *last == worker)
    }

    /// The worker that has, or was promised to, the current attempt.
    pub(super) fn place(&self) -> Option<Place> {
        match self.state {
            State::Granted { at, .. } | State::Placed { at, .. } => Some(at),
            State::Storing | State::Queued(_) | State::Ended { .. } => None,
        }
    }

    /// When it will have broken its promise where it is at work. Before that nobody knows whether its worker could be reached,
    /// and once its run is over, only whether its client comes for the result.
    pub(super) fn breaks_promise_at(&self) -> Option<MonoTime> {
        let is_at_work = matches!(self.state, State::Placed { .. }) && self.finished.is_none();
        self.late_at.filter(|_| is_at_work && self.granted_at.is_some())
    }

    /// From its placement to its end, as predicted; `None` if nobody has run the model before.
    pub(super) fn predicted_ms(&self) -> Option<u32> {
        let predicted = self.predicted.filter(|predicted| predicted.measured)?;
        Some(u32::try_from(predicted.total_us().div_ceil(1000)).unwrap_or(u32::MAX))
    }

    pub(super) fn belongs_to(&self, client: ClientId, key: Option<PublicKey>) -> bool {
        self.spec.client == client && self.spec.key == key
    }

    /// When the broker ends it for its deadline. The worker ends an attempt itself, and its client sees that at once.
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

    /// Whether the store has said that it has what a restart must know: where the task is, or that it is over.
    pub(super) fn is_in_store(&self) -> bool {
        self.in_store == Some(self.footing())
    }

    /// Whether it is over and a restart would not know of it yet.
    pub(super) fn awaits_store(&self) -> bool {
        self.outlives_client() && self.is_ended() && !self.is_in_store()
    }

    /// Whether its end is for whoever comes for it later: the store has been told of it, and a worker may keep its result.
    fn outlives_client(&self) -> bool {
        self.spec.detached && self.stored
    }

    /// Whether its inputs may be at a worker that has not been heard: its last attempt was given away, or a broker before this
    /// one may have done so, and its client has not taken that back.
    pub(super) fn may_be_at_worker(&self) -> bool {
        let was_given_away = self.attempt > Attempt(0) || self.away_since.is_some();
        self.spec.detached && was_given_away && self.fence <= self.attempt && self.finished.is_none()
    }

    /// Whether it is at a worker that goes on with it, whatever its client does.
    pub(super) fn is_in_good_hands(&self) -> bool {
        matches!(self.state, State::Placed { .. }) && self.spec.detached && self.finished.is_none()
    }

    pub(super) fn record(&self) -> TaskRecord {
        TaskRecord {
            task: self.spec.task,
            client: self.spec.client,
            key: self.spec.key,
            job: self.spec.job,
            model_name: self.spec.model_name.clone(),
            model: self.spec.model,
            then: self.spec.then.clone(),
            input_bytes: self.spec.input_bytes,
            items: self.spec.items,
            lane: self.lane(),
            slo: self.spec.slo,
            labels: self.spec.labels.clone(),
            priority: self.spec.priority,
            demands: self.spec.demands,
            direction: self.spec.direction,
            detached: self.spec.detached,
            attempt: self.attempt,
            worker: self.last.as_ref().map(|(worker, epoch, _)| (*worker, *epoch)),
            submitted_unix_ms: self.submitted_unix_ms,
            deadline_unix_ms: self.deadline_unix_ms(),
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

/// All tasks, the unfinished ones in order of when they want to be looked at.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    // Boxed: a task is some hundred bytes, and the tree moves its entries about. The unfinished ones are apart: there are few
    // of them, and nearly every look is for one of them.
    live: BTreeMap<TaskId, Box<Task>>,
    over: BTreeMap<TaskId, Box<Task>>,
    /// When the unfinished ones want to be looked at.
    due: Due<TaskId>,
    /// All tasks by whose they are: a question for a client's own looks at no others.
    owners: BTreeSet<(ClientId, TaskId)>,
    /// When ended tasks may be forgotten.
    ended: Due<TaskId>,
    /// When those may be that somebody may still come for. However many others end, these stay.
    ended_for_later: Due<TaskId>,
}

impl Tasks {
    /// Unfinished tasks.
    pub(super) fn live(&self) -> usize {
        self.live.len()
    }

    pub(super) fn get(&self, id: TaskId) -> Option<&Task> {
        self.live.get(&id).or_else(|| self.over.get(&id)).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: TaskId) -> Option<&mut Task> {
        self.live.get_mut(&id).or_else(|| self.over.get_mut(&id)).map(Box::as_mut)
    }

    /// Those of the client, newest first, before the given one.
    pub(super) fn before(&self, client: ClientId, id: Option<TaskId>) -> impl Iterator<Item = &Task> {
        const FIRST: TaskId = TaskId::from_bytes([0; 16]);
        const LAST: TaskId = TaskId::from_bytes([0xff; 16]);
        let end = id.map_or(Included((client, LAST)), |id| Excluded((client, id)));
        self.owners.range((Included((client, FIRST)), end)).rev().filter_map(|(_, id)| self.get(*id))
    }

    /// Those that wait for the store to have them.
    pub(super) fn storing(&self) -> Vec<TaskId> {
        let storing = self.live.values().filter(|task| task.state == State::Storing);
        storing.map(|task| task.id()).collect()
    }

    /// A new task, and when it wants to be looked at or, if it has ended, may be forgotten.
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

    /// Where it stands when an ended task may be forgotten.
    fn ends(&mut self, task: &Task) -> &mut Due<TaskId> {
        if task.outlives_client() { &mut self.ended_for_later } else { &mut self.ended }
    }

    /// The task wants to be looked at then.
    pub(super) fn set_due(&mut self, id: TaskId, due: MonoTime) {
        if self.live.contains_key(&id) {
            self.due.set(id, due);
        }
    }

    /// The task wants to be looked at then, if not earlier.
    pub(super) fn due_by(&mut self, id: TaskId, due: MonoTime) {
        if self.live.contains_key(&id) {
            self.due.by(id, due);
        }
    }

    /// When the next task wants to be looked at.
    pub(super) fn first_due(&self) -> Option<MonoTime> {
        self.due.first()
    }

    /// A task that wants to be looked at by now; it says when it does again.
    pub(super) fn pop_due(&mut self, now: MonoTime) -> Option<TaskId> {
        self.due.pop(now)
    }

    /// The task is over: it is only remembered from now on, until then.
    pub(super) fn end(&mut self, id: TaskId, outcome: Outcome, ended_unix_ms: u64, until: MonoTime) {
        if let Some(mut task) = self.live.remove(&id) {
            self.due.remove(id);
            task.state = State::Ended { outcome, ended_unix_ms };
            self.ends(&task).set(id, until);
            self.over.insert(id, task);
        }
    }

    /// The task is not over after all: it is about to wait again.
    pub(super) fn revive(&mut self, now: MonoTime, id: TaskId) {
        if let Some(mut task) = self.over.remove(&id) {
            self.ends(&task).remove(id);
            (task.state, task.abandoned, task.finished) = (State::Storing, false, None);
            self.due.set(id, now);
            self.live.insert(id, task);
        }
    }

    /// Takes one ended task away whose time is over, or that is the oldest of too many.
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
