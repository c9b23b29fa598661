//! Lessons from an attempt's end: prediction error, service level kept or not, workers to avoid, workers that died of a
//! task.
//!
//! Owns those lessons. Never ends a task.

use std::{collections::VecDeque, time::Duration};

use proto_msgs::{Direction, ErrorCode, Failure, Outcome, TaskId, WorkerId};

use super::{
    Broker, obstacle,
    tasks::{Place, Suspect, Task},
    worker::Worker,
    workers::Workers,
};
use crate::{MonoTime, Rule};

/// Number of latest comparisons in the median, so that it follows when machines change.
const ERRORS_MAX: usize = 512;

/// Workers that a task may take down before it is given up.
const LOST_WITH_MAX: usize = 3;

/// Longest time until it is known whether a worker died of a task: usual heartbeats are missed by then.
const SUSPECT_MAX: Duration = Duration::from_secs(10);

/// Errors of the latest predictions.
#[derive(Debug, Default)]
pub(super) struct Errors {
    /// |predicted − actual| / actual in thousandths, oldest first.
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

    /// Median error in thousandths; `None` before the first comparison.
    pub(super) fn median_permille(&self) -> Option<u32> {
        let mut sorted: Vec<u32> = self.last_permille.iter().copied().collect();
        let middle = sorted.len() / 2;
        (!sorted.is_empty()).then(|| *sorted.select_nth_unstable(middle).1)
    }
}

impl Broker {
    /// Learns from the end of a task's current attempt, whether or not the task ends with it.
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
        // A broken service level was counted when it broke.
        let Some(late_at) = task.late_at.take() else { return };
        let Some((stream, slo)) = task.stream.zip(task.spec.slo) else { return };
        let is_late = now >= late_at;
        // An attempt taken back early says nothing; a failed one did not keep its service level.
        let is_failure = matches!(outcome, Outcome::Failed(failure) if failure.code.is_retryable());
        // The worker had no room, is about to leave, or was never reached: it is not slow.
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

    /// Counts a service level that breaks while the task is at work. A hanging worker would never end the task.
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
    /// The client lost its worker: the broker learns whether the worker died only from time or its next life.
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
    /// Records the suspects that have died with an attempt of the task, and clears those that live.
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

    /// Whether the task took too many workers down.
    pub(super) fn is_poisonous(&self) -> bool {
        self.lost_with.len() >= LOST_WITH_MAX
    }

    /// Whether the task is poisonous if all its suspects died: it goes to no other worker before that is known.
    pub(super) fn may_be_poisonous(&self) -> bool {
        !self.suspects.is_empty() && self.lost_with.len() + self.suspects.len() >= LOST_WITH_MAX
    }

    /// When the next suspect's fate is known.
    pub(super) fn verdict_by(&self) -> Option<MonoTime> {
        self.suspects.iter().map(|suspect| suspect.until).min()
    }

    /// The outcome of a task that took worker after worker down.
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
        let name = self.last.as_ref().map_or_else(|| worker.to_string(), |(_, _, name)| name.clone());
        self.remember(format!("attempt {} at {name}: {code}: {text}", self.attempt));
        if *code == ErrorCode::Unreachable {
            let direction = place.map_or(Direction::ClientDials, |at| at.direction);
            remember(&mut self.unreachable, (worker, direction));
        }
        let counts = match code {
            // Not the task's fault and soon over: the worker had no place, or the ticket was too old.
            ErrorCode::Busy | ErrorCode::Draining | ErrorCode::BadTicket => false,
            // The worker may still be reached in the other direction.
            ErrorCode::Unreachable => !known.is_some_and(|worker| {
                let next = obstacle::direction(self, worker);
                next.is_some_and(|next| !self.unreachable.contains(&(worker.id(), next)))
            }),
            _ => true,
        };
        // A worker that only needs the other direction is tried at once.
        if counts || *code != ErrorCode::Unreachable {
            self.pause_until = now + PAUSE_FIRST * 2_u32.saturating_pow(self.failures.min(PAUSE_DOUBLINGS_MAX));
            self.failures += u32::from(counts);
            remember(&mut self.avoid, worker);
        }
    }

    /// Adds a line to the task's history.
    pub(super) fn remember(&mut self, mut line: String) {
        line.truncate(line.floor_char_boundary(HISTORY_LINE_BYTES_MAX));
        self.history.push(line);
        if self.history.len() > HISTORY_MAX {
            self.history.remove(0);
        }
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

/// Workers that a task remembers because they failed or refused it, or were out of reach. Each worker rated for the
/// task is compared with them, and one look does not rate many more.
const BLAMED_MAX: usize = 64;

/// Pause before a worker that failed or refused the task is asked again if there is no other; doubled after each
/// further failure. The cause is rarely gone sooner.
const PAUSE_FIRST: Duration = Duration::from_secs(1);

/// Doublings up to the longest pause, about half a minute.
const PAUSE_DOUBLINGS_MAX: u32 = 5;

/// Longest line of a task's history, bytes.
const HISTORY_LINE_BYTES_MAX: usize = 512;

/// Most lines of a task's history.
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
