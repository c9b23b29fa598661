//! What speaks against a task and against the workers that had it: failures, broken ways, and deaths.
//!
//! Owns these lessons. Never ends a task.

use std::time::Duration;

use proto_msgs::{Direction, Epoch, ErrorCode, Outcome, WorkerId};

use crate::{Census, MonoTime, broker::workers::Workers};

/// Workers that a task may take down before it is given up.
const LOST_WITH_MAX: usize = 3;

/// Workers that a task remembers because they failed or refused it, or were out of reach. Each worker rated for the
/// task is compared with them, and one look does not rate many more.
const BLAMED_MAX: usize = 64;

/// Pause before a worker that failed or refused the task is asked again if there is no other; doubled after each
/// further failure. The cause is rarely gone sooner.
const PAUSE_FIRST: Duration = Duration::from_secs(1);

/// Doublings up to the longest pause, about half a minute.
const PAUSE_DOUBLINGS_MAX: u32 = 5;

/// A life of a worker at which an attempt was lost. A client cannot tell a dead worker from a broken link. The broker
/// can, but only once heartbeats are missed or the next life has registered.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    worker: WorkerId,
    epoch: Epoch,
    /// Time by which it is known whether the worker died.
    until: MonoTime,
}

/// Doubts about a task and its workers.
#[derive(Debug, Default)]
pub(crate) struct Doubts {
    /// Failed attempts that count against the task.
    pub(crate) failures: u32,
    /// Workers that failed the task; others are tried first.
    pub(crate) avoid: Vec<WorkerId>,
    /// Workers whose quota is too small for what the task brings: they are not asked again.
    pub(crate) too_small: Vec<WorkerId>,
    /// Time before which the workers that failed the task are not asked again; `None` after the look that it brings.
    pub(crate) pause_until: Option<MonoTime>,
    /// Time of the last attempt that was lost with its worker's connection; workers that failed the task are asked again
    /// once they were heard after it. A dead one would use up all attempts before its death is certain.
    pub(crate) cut_off_at: Option<MonoTime>,
    /// Workers that could not be reached, with the direction that was tried.
    unreachable: Vec<(WorkerId, Direction)>,
    /// Workers that died while they had the task.
    lost_with: Vec<WorkerId>,
    /// Workers that may have died while they had the task.
    suspects: Vec<Suspect>,
    /// Memory that was not enough for a run: workers that give no more are not asked. 0 if none is known.
    pub(crate) outgrown_bytes: u64,
    /// The last failure for want of that memory.
    pub(crate) outgrown: Option<Outcome>,
    /// Outcome of the last attempt, while the task must wait until it is known whether its suspects died.
    pub(crate) held_back: Option<Outcome>,
}

impl Doubts {
    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self {
            failures: _,
            avoid,
            too_small,
            pause_until: _,
            cut_off_at: _,
            unreachable,
            lost_with,
            suspects,
            outgrown_bytes: _,
            outgrown: _,
            held_back: _,
        } = self;
        census.passing("workers that a task avoids", avoid.len(), BLAMED_MAX);
        census.passing("workers too small for a task", too_small.len(), BLAMED_MAX);
        census.passing("workers out of a task's reach", unreachable.len(), BLAMED_MAX);
        census.passing("suspects of a task", suspects.len(), LOST_WITH_MAX);
        census.passing("workers lost with a task", lost_with.len(), 2 * LOST_WITH_MAX);
    }

    /// Whether the worker has failed the task, or could not be reached for it in one direction.
    pub(crate) fn doubt(&self, worker: WorkerId) -> bool {
        self.avoid.contains(&worker) || self.unreachable.iter().any(|(unreachable, _)| *unreachable == worker)
    }

    /// Whether the workers that failed the task get a while to recover.
    pub(crate) fn is_pausing(&self, now: MonoTime) -> bool {
        self.pause_until.is_some_and(|until| now < until)
    }

    /// Whether the worker failed the task and shall not be asked again yet: it gets a while to recover, or nothing was
    /// heard of it since. `heard`: its last sign of life.
    pub(crate) fn is_left_alone(&self, worker: WorkerId, heard: MonoTime, now: MonoTime) -> bool {
        self.is_silent(worker, heard) || self.is_pausing(now) && self.avoid.contains(&worker)
    }

    /// Whether the worker failed the task and has not been heard since an attempt was lost with its connection.
    pub(crate) fn is_silent(&self, worker: WorkerId, heard: MonoTime) -> bool {
        self.cut_off_at.is_some_and(|at| heard <= at) && self.avoid.contains(&worker)
    }

    /// Whether the worker could not be reached in this direction.
    pub(super) fn is_shut(&self, worker: WorkerId, direction: Direction) -> bool {
        self.unreachable.contains(&(worker, direction))
    }

    /// The worker could not be reached in this direction.
    pub(super) fn shut(&mut self, worker: WorkerId, direction: Direction) {
        remember(&mut self.unreachable, (worker, direction));
    }

    /// The client could not reach the worker in this direction. One that failed before may work by now.
    pub(crate) fn shut_only(&mut self, worker: WorkerId, direction: Direction) {
        self.unreachable.retain(|(at, _)| *at != worker);
        remember(&mut self.unreachable, (worker, direction));
    }

    /// Suspects that the worker died of the task. `until`: when that is known. With so many suspects the task is held
    /// back, so only a client that lies brings more.
    pub(crate) fn suspect(&mut self, worker: WorkerId, epoch: Epoch, until: MonoTime) {
        let is_full = self.suspects.len() >= LOST_WITH_MAX;
        if !is_full && !self.suspects.iter().any(|suspect| (suspect.worker, suspect.epoch) == (worker, epoch)) {
            self.suspects.push(Suspect { worker, epoch, until });
        }
    }

    /// Records the suspects that have died with an attempt of the task, and clears those that live.
    pub(crate) fn convict(&mut self, now: MonoTime, workers: &Workers) {
        let lost_with = &mut self.lost_with;
        self.suspects.retain(|suspect| {
            let is_dead = !workers.has_life(suspect.worker, suspect.epoch);
            if is_dead && !lost_with.contains(&suspect.worker) {
                lost_with.push(suspect.worker);
            }
            !is_dead && now < suspect.until
        });
    }

    /// Whether the task took too many workers down.
    pub(crate) fn is_poisonous(&self) -> bool {
        self.lost_with.len() >= LOST_WITH_MAX
    }

    /// Whether the task is poisonous if all its suspects died: it goes to no other worker before that is known.
    pub(crate) fn may_be_poisonous(&self) -> bool {
        !self.suspects.is_empty() && self.lost_with.len() + self.suspects.len() >= LOST_WITH_MAX
    }

    /// When the next suspect's fate is known.
    pub(crate) fn verdict_by(&self) -> Option<MonoTime> {
        self.suspects.iter().map(|suspect| suspect.until).min()
    }

    /// The outcome of a task that took worker after worker down.
    pub(crate) fn poisonous(&self) -> Outcome {
        let text = format!(
            "{} workers died while they had this task: it is given up before it takes another; \
             run it on one machine of your own with more memory, and see what the model does",
            self.lost_with.len()
        );
        Outcome::failed(ErrorCode::Poisonous, text)
    }

    /// What the task brings never fits the worker's quota.
    pub(super) fn outsize(&mut self, worker: WorkerId) {
        remember(&mut self.too_small, worker);
    }

    /// The worker failed or refused the task. `counts`: that counts against the task.
    pub(super) fn avoid(&mut self, now: MonoTime, worker: WorkerId, counts: bool) {
        let pause = PAUSE_FIRST * 2_u32.saturating_pow(self.failures.min(PAUSE_DOUBLINGS_MAX));
        self.pause_until = Some(now + pause);
        self.failures += u32::from(counts);
        remember(&mut self.avoid, worker);
    }
}

/// Adds a blamed worker; if the list is full, the oldest entry gets another chance.
fn remember<T: PartialEq>(list: &mut Vec<T>, blamed: T) {
    if list.contains(&blamed) {
        return;
    }
    if list.len() == BLAMED_MAX {
        list.remove(0);
    }
    list.push(blamed);
}
