//! What an attempt's end teaches: how good the prediction was, whether a service level was kept, whom to avoid, whom a task
//! took down.
//!
//! Owns those lessons. Never ends a task.

use std::{collections::VecDeque, time::Duration};

use proto_msgs::{Direction, Epoch, ErrorCode, Failure, Outcome, TaskId, WorkerId};

use super::{
    Broker, obstacle,
    tasks::{Place, Task},
    worker::Worker,
    workers::Workers,
};
use crate::{MonoTime, Rule};

/// Comparisons that the median is taken of: the last ones, so that it follows when machines change.
const ERRORS_MAX: usize = 512;

/// Workers that a task may take down before it is given up.
const LOST_WITH_MAX: usize = 3;

/// Whether a worker died of a task is known after this long at the latest: usual heartbeats are missed by then.
const SUSPECT_MAX: Duration = Duration::from_secs(10);

/// A life of a worker at which an attempt came to nothing. Clients cannot tell a dead worker from a broken link; the broker
/// can, but only once heartbeats are missed or the next life has registered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspect {
    worker: WorkerId,
    epoch: Epoch,
    /// By then it is known.
    until: MonoTime,
}

/// How far predictions were off.
#[derive(Debug, Default)]
pub(super) struct Errors {
    /// |predicted − actual| / actual, thousandths, oldest first.
    last_permille: VecDeque<u32>,
}

impl Errors {
    fn add(&mut self, predicted_us: u64, actual_us: u64) {
        let off = u128::from(predicted_us.abs_diff(actual_us)) * 1000 / u128::from(actual_us.max(1));
        if self.last_permille.len() == ERRORS_MAX {
            self.last_permille.pop_front();
        }
        self.last_permille.push_back(u32::try_from(off).unwrap_or(u32::MAX));
    }

    /// `None` before the first comparison.
    pub(super) fn median_permille(&self) -> Option<u32> {
        let mut sorted: Vec<u32> = self.last_permille.iter().copied().collect();
        let middle = sorted.len() / 2;
        (!sorted.is_empty()).then(|| *sorted.select_nth_unstable(middle).1)
    }
}

impl Broker {
    /// The current attempt is over, and with it the task or not.
    pub(super) fn learn(&mut self, now: MonoTime, task: TaskId, outcome: &Outcome) {
        let Some(task) = self.tasks.get_mut(task) else { return };
        let Some((granted_at, place)) = task.granted_at.take().zip(task.place()) else { return };
        let took = now.since(granted_at);
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let is_done = matches!(outcome, Outcome::Done { .. });
        if is_done {
            task.took = Some(took);
            if let Some(predicted) = task.predicted.filter(|predicted| predicted.measured) {
                self.errors.add(predicted.total_us(), took_us);
                self.counters.predictions += 1;
                if predicted.queue_us == 0 {
                    let parts_us = predicted.total_us() - predicted.handover_us;
                    self.workers.learn_handover(place.worker, took_us.saturating_sub(parts_us));
                }
            }
        }
        // What broke its promise was counted when it did.
        let Some(late_at) = task.late_at.take() else { return };
        let Some((stream, slo)) = task.stream.zip(task.spec.slo) else { return };
        let is_late = now >= late_at;
        // One that was taken back early says nothing; one that failed did not keep its promise.
        let is_failure = matches!(outcome, Outcome::Failed(failure) if failure.code.is_retryable());
        // It had no room, is about to leave, or was never reached: the worker is not slow.
        let says_nothing = matches!(outcome, Outcome::Failed(Failure { code, .. }) if matches!(
            code,
            ErrorCode::Busy
                | ErrorCode::Draining
                | ErrorCode::BadTicket
                | ErrorCode::ClientGone
                | ErrorCode::Unreachable
                | ErrorCode::ResultNotKept
        ));
        if !says_nothing && (is_done || is_late || is_failure) {
            self.slos.ended(now, stream, place.worker, slo, is_late || is_failure);
        }
    }

    /// The promise passes while the task is at work: that counts now. A worker that hangs ends nothing.
    pub(super) fn is_late(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if task.breaks_promise_at().is_none_or(|late_at| now < late_at) {
            return;
        }
        task.late_at = None;
        if let Some(((stream, slo), place)) = task.stream.zip(task.spec.slo).zip(task.place()) {
            self.slos.ended(now, stream, place.worker, slo, true);
        }
    }
}

impl Broker {
    /// The client lost its worker: whether that died, only time or its next life will tell.
    pub(super) fn suspect(&mut self, now: MonoTime, id: TaskId, at: Place, outcome: &Outcome) {
        let is_sign = matches!(outcome, Outcome::Failed(Failure { code, .. })
            if matches!(code, ErrorCode::WorkerLost | ErrorCode::Unreachable));
        if !is_sign || !self.config.rules.holds(Rule::PoisonStops) {
            return;
        }
        let Place { worker, epoch, .. } = at;
        let known = self.workers.get(worker).filter(|known| known.register.epoch == epoch);
        let until = known.map_or(now, |known| known.dead_at(self.config.liveness_beats).min(now + SUSPECT_MAX));
        let Some(task) = self.tasks.get_mut(id) else { return };
        if !task.suspects.iter().any(|suspect| (suspect.worker, suspect.epoch) == (worker, epoch)) {
            task.suspects.push(Suspect { worker, epoch, until });
        }
    }
}

impl Task {
    /// Books the workers that are known to have died with an attempt of it, and clears those that live.
    pub(super) fn convict(&mut self, now: MonoTime, workers: &Workers) {
        let lost_with = &mut self.lost_with;
        self.suspects.retain(|suspect| {
            let is_dead = !workers.has_life(suspect.worker, suspect.epoch);
            if is_dead && !lost_with.contains(&suspect.worker) {
                lost_with.push(suspect.worker);
            }
            !is_dead && now < suspect.until
        });
    }

    /// It took too many workers down.
    pub(super) fn is_poisonous(&self) -> bool {
        self.lost_with.len() >= LOST_WITH_MAX
    }

    /// So it would be if all died that may have: it goes to no other before that is known.
    pub(super) fn may_be_poisonous(&self) -> bool {
        !self.suspects.is_empty() && self.lost_with.len() + self.suspects.len() >= LOST_WITH_MAX
    }

    /// When it is known of the next worker whether it died.
    pub(super) fn verdict_by(&self) -> Option<MonoTime> {
        self.suspects.iter().map(|suspect| suspect.until).min()
    }

    /// The end of a task that took worker after worker down with it.
    pub(super) fn poisonous(&self) -> Outcome {
        let text = format!(
            "{} workers died while they had this task: it is given up before it takes another; \
             run it on one machine of your own with more memory, and see what the model does",
            self.lost_with.len()
        );
        Outcome::failed(ErrorCode::Poisonous, text)
    }
}

impl Task {
    /// Books a lost attempt: whom to avoid, which way is shut, whether it counts against the task, what to tell a person.
    pub(super) fn blame(
        &mut self,
        now: MonoTime,
        known: Option<&Worker>,
        worker: WorkerId,
        place: Option<Place>,
        outcome: &Outcome,
    ) {
        let Outcome::Failed(Failure { code, text }) = outcome else { return };
        let name = self.last.as_ref().map_or_else(|| worker.to_string(), |(_, _, name)| name.clone());
        self.remember(format!("attempt {} at {name}: {code}: {text}", self.attempt));
        if *code == ErrorCode::Unreachable {
            let direction = place.map_or(Direction::ClientDials, |at| at.direction);
            remember(&mut self.unreachable, (worker, direction));
        }
        let counts = match code {
            // Not the task's fault and soon over: the place was taken, or the ticket had grown old.
            ErrorCode::Busy | ErrorCode::Draining | ErrorCode::BadTicket => false,
            // It may still be reached the other way round.
            ErrorCode::Unreachable => !known.is_some_and(|worker| {
                let next = obstacle::direction(self, worker);
                next.is_some_and(|next| !self.unreachable.contains(&(worker.id(), next)))
            }),
            _ => true,
        };
        // One that is only tried the other way round is tried at once.
        if counts || *code != ErrorCode::Unreachable {
            self.pause_until = now + PAUSE_FIRST * 2_u32.saturating_pow(self.failures.min(PAUSE_DOUBLINGS_MAX));
            self.failures += u32::from(counts);
            remember(&mut self.avoid, worker);
        }
    }

    /// One more line of what it went through.
    pub(super) fn remember(&mut self, mut line: String) {
        line.truncate(line.floor_char_boundary(HISTORY_LINE_BYTES_MAX));
        self.history.push(line);
        if self.history.len() > HISTORY_MAX {
            self.history.remove(0);
        }
    }
}

/// Notes one that went wrong; of too many the oldest is given another chance.
fn remember<T: PartialEq>(list: &mut Vec<T>, blamed: T) {
    if list.contains(&blamed) {
        return;
    }
    if list.len() == BLAMED_MAX {
        list.remove(0);
    }
    list.push(blamed);
}

/// Workers that a task remembers for having failed or refused it, or for being out of its reach. Each worker that is rated
/// for the task is compared with them; it is not rated for many more in one look.
const BLAMED_MAX: usize = 64;

/// A worker that failed a task, or refused it, is not asked again for this long if there is no other; twice as long after each
/// further failure. What made it do so is rarely over in less.
const PAUSE_FIRST: Duration = Duration::from_secs(1);

/// Longest pause: about half a minute.
const PAUSE_DOUBLINGS_MAX: u32 = 5;

/// Bytes kept of what went wrong in one attempt.
const HISTORY_LINE_BYTES_MAX: usize = 512;

/// Lines kept of a task's attempts.
const HISTORY_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_predictions_is_the_median_of_the_last_ones() {
        let mut errors = Errors::default();
        assert_eq!(errors.median_permille(), None);
        errors.add(50, 100);
        assert_eq!(errors.median_permille(), Some(500));
        for _ in 0..ERRORS_MAX {
            errors.add(110, 100);
        }
        assert_eq!(errors.median_permille(), Some(100));
        assert_eq!(errors.last_permille.len(), ERRORS_MAX);
        errors.add(u64::MAX, 0);
    }
}
