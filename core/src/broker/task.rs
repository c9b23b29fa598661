//! A task as the broker knows it.
//!
//! ```text
//!   (new) ── Submit ──► Queued              if it is detached, Storing first, until the store has it
//!   Queued ── there is room ──► Granted
//!   Granted ── nobody takes it up ──► Queued
//!   Storing, Queued, Granted ── a heartbeat or its client names the attempt ──► Placed
//!   Granted, Placed ── its client says: lost, or asks and the worker is gone ──► Queued
//!   (restored from the store) ── with a worker ──► Placed, without one ──► Storing
//!   each of them ── result taken, failed for good, cancelled, expired, abandoned ──► Ended
//!   Ended ── it was abandoned, and its client speaks again ──► Queued
//! ```
//!
//! Owns one task: its state, and a room each for its client, its attempts, the faults in them, and what was promised.
//! Never decides where it goes.

mod doubts;
mod owner;
mod promise;
mod track;

use std::time::Duration;

use proto_msgs::{
    Attempt, AttemptId, ClientId, Direction, Epoch, ErrorCode, Failure, Lane, Outcome, PeerId, PublicKey, TaskId,
    TaskSpec, TaskStanding, TaskView, Wishes, WorkerId,
};

use super::{
    api::{Footing, TaskRecord},
    placement::decision::Decision,
    queue::rank::Rank,
    workers::worker::Worker,
};
use crate::{Census, MonoTime};
use doubts::Doubts;
use owner::Owner;
use promise::Promise;
use track::Track;

pub(super) use owner::Awaiting;
pub(super) use promise::Watch;
pub(super) use track::Last;

/// How long after the deadline the broker ends a task at a worker. The worker should have done so at the deadline.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// The state of a task.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// The task is detached and not in the store yet.
    Storing,
    /// The task waits for room. `claims_at`: the worker that was asked to keep cores and memory for it; it may have
    /// stopped since.
    Queued { claims_at: Option<WorkerId> },
    /// A slot is promised. The client has until `until` to take it up.
    Granted { at: Place, until: MonoTime },
    /// Client or worker has named the attempt. `unnamed_until`: only the client has; the worker should by then.
    Placed { at: Place, unnamed_until: Option<MonoTime> },
    /// The task is over.
    Ended(End),
}

/// A worker in one of its lives, and the side that dials.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    pub(super) worker: WorkerId,
    pub(super) epoch: Epoch,
    pub(super) direction: Direction,
}

/// The end of a task.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct End {
    pub(super) outcome: Outcome,
    pub(super) unix_ms: u64,
    /// The task ended because its client was silent. It goes on if the client speaks again.
    pub(super) is_abandoned: bool,
    /// The client connection that cancelled the task, to be told once the store has that.
    pub(super) cancelled_by: Option<PeerId>,
}

impl End {
    pub(super) fn new(outcome: Outcome, unix_ms: u64) -> Self {
        Self { outcome, unix_ms, is_abandoned: false, cancelled_by: None }
    }
}

/// What the store has of a task.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Row {
    /// Nothing.
    Absent,
    /// It was told of the task, and has confirmed nothing yet.
    Told,
    /// It has confirmed this state.
    Confirmed(Footing),
}

/// A task as the broker knows it.
#[derive(Debug)]
pub(crate) struct Task {
    /// What the first submit said, with its lane decided and its priority within the tenant's cap.
    pub(super) spec: TaskSpec,
    pub(super) submitted_unix_ms: u64,
    pub(super) deadline: Option<MonoTime>,
    pub(super) state: State,
    /// The task's rating in the queue; `None` if it never waited there.
    pub(super) rank: Option<Rank>,
    /// The task has gone to a worker once: its cost is charged to its client's share.
    pub(super) is_dispatched: bool,
    /// It was checked whether any worker could ever run the task.
    pub(super) is_judged: bool,
    /// The worker that the task is sent to although it would be late there: so that the models are loaded, or old figures
    /// measured anew.
    pub(super) serves: Option<WorkerId>,
    /// It was counted what the task misses at an idle worker.
    pub(super) is_counted: bool,
    /// The full worker for which the task was held back at the last look.
    pub(super) held_for: Option<WorkerId>,
    /// The last placement decision.
    pub(super) decision: Option<Box<Decision>>,
    pub(super) owner: Owner,
    pub(super) track: Track,
    pub(super) doubts: Doubts,
    pub(super) promise: Promise,
    pub(super) row: Row,
}

impl Task {
    pub(super) fn new(spec: TaskSpec, now: MonoTime, now_unix_ms: u64) -> Self {
        let deadline = spec.deadline_ms.map(|ms| now + Duration::from_millis(ms));
        Self {
            spec,
            submitted_unix_ms: now_unix_ms,
            deadline,
            state: State::Storing,
            rank: None,
            is_dispatched: false,
            is_judged: true,
            serves: None,
            is_counted: false,
            held_for: None,
            decision: None,
            owner: Owner::new(now),
            track: Track::default(),
            doubts: Doubts::default(),
            promise: Promise::default(),
            row: Row::Absent,
        }
    }

    pub(super) fn id(&self) -> TaskId {
        self.spec.task
    }

    pub(super) fn attempt_id(&self) -> AttemptId {
        AttemptId { task: self.spec.task, attempt: self.track.attempt }
    }

    pub(super) fn lane(&self) -> Lane {
        self.spec.lane.unwrap_or_default()
    }

    pub(super) fn is_queued(&self) -> bool {
        matches!(self.state, State::Queued { .. })
    }

    pub(super) fn is_placed(&self) -> bool {
        matches!(self.state, State::Placed { .. })
    }

    pub(super) fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }

    /// How the task ended; `None` before.
    pub(super) fn end(&self) -> Option<&End> {
        if let State::Ended(end) = &self.state { Some(end) } else { None }
    }

    pub(super) fn end_mut(&mut self) -> Option<&mut End> {
        if let State::Ended(end) = &mut self.state { Some(end) } else { None }
    }

    /// The worker that has the current attempt, or was granted it.
    pub(super) fn place(&self) -> Option<Place> {
        match self.state {
            State::Granted { at, .. } | State::Placed { at, .. } => Some(at),
            State::Storing | State::Queued { .. } | State::Ended(_) => None,
        }
    }

    /// The side that dials: as wished, otherwise the client if the worker has an endpoint that is not known to be
    /// unreachable.
    pub(super) fn way_to(&self, worker: &Worker) -> Option<Direction> {
        use Direction::{ClientDials, WorkerDials};
        let is_open = |direction: &Direction| match direction {
            ClientDials => !worker.register.endpoints.is_empty(),
            WorkerDials => !self.owner.endpoints.is_empty(),
        };
        let is_wanted = |direction: &Direction| self.spec.direction.is_none_or(|wish| wish == *direction);
        let is_shut = |direction: &Direction| self.doubts.is_shut(worker.id(), *direction);
        let mut ways = [ClientDials, WorkerDials].into_iter().filter(|way| is_open(way) && is_wanted(way));
        ways.clone().find(|way| !is_shut(way)).or_else(|| ways.next())
    }

    /// When the task breaks its service level at work. `None` before: nobody knows then whether the worker can be
    /// reached. `None` after the run: then only the client's fetch is missing.
    pub(super) fn breaks_promise_at(&self) -> Option<MonoTime> {
        let is_at_work = self.is_placed() && self.track.finished.is_none();
        self.promise.late_at().filter(|_| is_at_work)
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

    /// Whether the task's inputs may be at a worker that has not been heard: this broker or an earlier one may have
    /// granted the last attempt, and the client has not taken it back.
    pub(super) fn may_be_at_worker(&self) -> bool {
        let track = &self.track;
        let was_given_away = track.attempt > Attempt(0) || track.away_since.is_some();
        self.spec.detached && was_given_away && !track.is_taken_back() && track.finished.is_none()
    }

    /// Whether the task is at a worker that goes on with it, whatever its client does.
    pub(super) fn is_in_good_hands(&self) -> bool {
        self.is_placed() && self.spec.detached && self.track.finished.is_none()
    }
}

impl Task {
    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self {
            spec: _,
            submitted_unix_ms: _,
            deadline: _,
            state: _,
            rank: _,
            is_dispatched: _,
            is_judged: _,
            serves: _,
            is_counted: _,
            held_for: _,
            decision,
            owner,
            track,
            doubts,
            promise: _,
            row: _,
        } = self;
        if let Some(decision) = decision {
            decision.census(census);
        }
        owner.census(census);
        track.census(census);
        doubts.census(census);
    }
}

// A lost attempt.
impl Task {
    /// Records a lost attempt: the worker to avoid, the direction that failed, whether it counts, and a line for
    /// people.
    pub(super) fn blame(
        &mut self,
        now: MonoTime,
        known: Option<&Worker>,
        worker: WorkerId,
        place: Option<Place>,
        outcome: &Outcome,
    ) {
        let Outcome::Failed(Failure { code, text }) = outcome else { return };
        // A broker that has started anew knows it by its id only.
        let named = self.track.last.as_ref().filter(|last| last.worker == worker && !last.name.is_empty());
        let name = named.map_or_else(|| worker.to_string(), |last| last.name.clone());
        self.track.remember(format!("attempt {} at {name}: {code}: {text}", self.track.attempt));
        if *code == ErrorCode::Unreachable {
            let direction = place.map_or(Direction::ClientDials, |at| at.direction);
            self.doubts.shut(worker, direction);
        }
        if matches!(code, ErrorCode::Unreachable | ErrorCode::WorkerLost) {
            self.doubts.cut_off_at = Some(now);
        }
        if *code == ErrorCode::WorkerOutgrown {
            let given_bytes = known.map_or(0, |worker| worker.register.run_memory_bytes);
            self.doubts.outgrown_bytes = self.doubts.outgrown_bytes.max(given_bytes);
            self.doubts.outgrown = Some(outcome.clone());
        }
        if *code == ErrorCode::QuotaExceeded {
            self.doubts.outsize(worker);
        }
        let counts = match code {
            // Not the task's fault and soon over: the worker had no place, or the ticket was too old.
            ErrorCode::Busy | ErrorCode::Draining | ErrorCode::BadTicket => false,
            // The worker may still be reached in the other direction.
            ErrorCode::Unreachable => !known.is_some_and(|worker| {
                let next = self.way_to(worker);
                next.is_some_and(|next| !self.doubts.is_shut(worker.id(), next))
            }),
            _ => true,
        };
        // A worker that only needs the other direction is tried at once.
        if counts || *code != ErrorCode::Unreachable {
            self.doubts.avoid(now, worker, counts);
        }
    }
}

// The store.
impl Task {
    fn footing(&self) -> Footing {
        Footing { attempt: self.track.attempt, worker: self.track.last_worker(), is_over: self.is_ended() }
    }

    /// Whether the store was told of the task.
    pub(super) fn has_row(&self) -> bool {
        self.row != Row::Absent
    }

    /// Whether the store has confirmed what a restart must know: the task's place, or its end.
    pub(super) fn is_in_store(&self) -> bool {
        self.row == Row::Confirmed(self.footing())
    }

    /// Whether the task is over and a restart would not know of it yet.
    pub(super) fn awaits_store(&self) -> bool {
        self.outlives_client() && self.is_ended() && !self.is_in_store()
    }

    /// Whether the task's end is kept for later: the store knows the task, and a worker may keep its result.
    pub(super) fn outlives_client(&self) -> bool {
        self.spec.detached && self.has_row()
    }

    pub(super) fn record(&self) -> TaskRecord {
        TaskRecord {
            spec: self.spec.clone(),
            attempt: self.track.attempt,
            worker: self.track.last.as_ref().map(|last| (last.worker, last.epoch)),
            submitted_unix_ms: self.submitted_unix_ms,
            ended: self.end().map(|end| (end.outcome.clone(), end.unix_ms)),
        }
    }
}

// People.
impl Task {
    pub(super) fn view(&self, queued: impl FnOnce(&Rank) -> (u32, String)) -> TaskView {
        let standing = match &self.state {
            State::Storing => TaskStanding::Queued { position: 0, reason: "waiting for the store to have it".into() },
            State::Queued { .. } => {
                let (position, reason) = self.rank.as_ref().map(queued).unwrap_or_default();
                TaskStanding::Queued { position, reason }
            }
            State::Granted { .. } => TaskStanding::Granted,
            State::Placed { .. } => TaskStanding::Placed,
            State::Ended(end) => TaskStanding::Ended(end.outcome.clone()),
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
            wishes: Wishes {
                demands: self.spec.demands,
                labels: self.spec.labels.clone(),
                slo: self.spec.slo,
                deadline_ms: self.spec.deadline_ms,
            },
            then: self.spec.then.clone(),
            standing,
            attempt: self.track.attempt,
            worker: self.track.last.as_ref().map(|last| (last.worker, last.name.clone())),
            submitted_unix_ms: self.submitted_unix_ms,
            ended_unix_ms: self.end().map(|end| end.unix_ms),
        }
    }
}
