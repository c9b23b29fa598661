//! Lessons from an attempt's end: prediction error, service level kept or not, workers that may have died of a task.
//!
//! Owns those lessons. Never ends a task.

use std::{collections::VecDeque, time::Duration};

use proto_msgs::{ClientId, ErrorCode, Failure, Outcome, Slo, TaskId};

use super::{
    Broker,
    placement::predict::models,
    slo::StreamId,
    task::{Place, Watch},
};
use crate::{Census, MonoTime, Rule};

/// Number of latest comparisons in the median, so that it follows when machines change.
const ERRORS_MAX: usize = 512;

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

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { last_permille } = self;
        census.lasting("errors of predictions", last_permille.len(), ERRORS_MAX);
    }
}

impl Broker {
    /// Learns from the end of a task's current attempt, whether or not the task ends with it.
    pub(super) fn learn(&mut self, now: MonoTime, task: TaskId, outcome: &Outcome) {
        let Some(task) = self.tasks.get_mut(task) else { return };
        let Watch::Runs { since, late_at } = task.promise.watch else { return };
        let loads_until = task.promise.loads_until(now).filter(|_| is_expired(outcome) && task.spec.then.is_empty());
        task.promise.watch = Watch::Off;
        let Some(place) = task.place() else { return };
        if let Some(until) = loads_until {
            self.workers.finishes_load(now, place.worker, task.lane(), until);
        }
        let took = now.since(since);
        let took_us = now.since_us(since);
        let is_done = matches!(outcome, Outcome::Done { .. });
        if is_done {
            task.promise.watch = Watch::Stopped(took);
            let (client, model) = (task.spec.client, task.spec.model.digest);
            if task.spec.demands.memory_bytes == 0 {
                let given_bytes = self.workers.get(place.worker).map(|worker| worker.register.run_memory_bytes);
                self.outgrown.correct(client, model, given_bytes.unwrap_or(u64::MAX));
            }
            if task.doubts.outgrown_bytes > 0 {
                self.outgrown.learn(now, client, model, task.doubts.outgrown_bytes);
            }
            self.workers.ran(place.worker, models(task).map(|(digest, _)| digest), &task.spec.demands);
            if let Some(predicted) = task.promise.predicted.filter(|predicted| predicted.measured) {
                self.errors.add(predicted.total_us(), took_us);
                self.counters.predictions += 1;
                if predicted.queue_us == 0 {
                    let parts_us = predicted.total_us() - predicted.handover_us;
                    let handover_us = took_us.saturating_sub(parts_us);
                    self.workers.learn_handover(now, place.worker, task.spec.client, handover_us);
                }
            }
        }
        // A broken service level was counted when it broke.
        let Some(late_at) = late_at else { return };
        let Some((stream, slo)) = task.promise.stream.zip(task.spec.slo) else { return };
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
                | ErrorCode::WorkerOutgrown
        ));
        if !says_nothing && (is_done || is_late || is_failure) {
            let client = task.spec.client;
            self.count_promise(now, (client, stream, slo), place, is_late || is_failure);
        }
    }

    /// Counts a service level that breaks while the task is at work. A hanging worker would never end the task.
    pub(super) fn count_if_late(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if task.breaks_promise_at().is_none_or(|late_at| now < late_at) {
            return;
        }
        task.promise.counts_no_more();
        if let Some(((stream, slo), place)) = task.promise.stream.zip(task.spec.slo).zip(task.place()) {
            let client = task.spec.client;
            self.count_promise(now, (client, stream, slo), place, true);
        }
    }

    /// Counts a service level kept or missed. It does not speak against a later life of the worker.
    fn count_promise(
        &mut self,
        now: MonoTime,
        (client, stream, slo): (ClientId, StreamId, Slo),
        at: Place,
        missed: bool,
    ) {
        if self.workers.has_life(at.worker, at.epoch) {
            self.slos.ended(now, (client, stream), at.worker, slo, missed);
        } else {
            self.slos.violations += u64::from(missed);
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
        task.doubts.suspect(worker, epoch, until);
    }
}

fn is_expired(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(failure) if failure.code == ErrorCode::Expired)
}

/// Whether a worker's memory was not enough for a task that asks for none.
pub(super) fn is_outgrown(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(failure) if failure.code == ErrorCode::WorkerOutgrown)
}

/// Whether a worker's quota is too small for what a task brings.
pub(super) fn is_too_large(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(failure) if failure.code == ErrorCode::QuotaExceeded)
}

/// The end of a task that no worker gives more memory.
pub(super) fn without_more_memory(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Failed(Failure { code: ErrorCode::WorkerOutgrown, text }) => {
            let advice = "ask for more with --memory, or give all runs more with mesh-worker --memory-limit";
            Outcome::failed(ErrorCode::RunOutOfMemory, format!("{}; {advice}", text.trim_end()))
        }
        other => other,
    }
}

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
