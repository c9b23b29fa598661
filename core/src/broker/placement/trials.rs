//! Trials: now and then a task goes to an idle worker that another one seems to beat, to measure it again.
//!
//! A worker that was slow loses its tasks, and with them the measurements that would show that it is well again. So a
//! worker without tasks of a model is tried with one of them:
//!
//! - not before ten seconds, half the time that it has been left, and twenty times what the task would take there: a
//!   worker that was slow for long is missed for half as long again at most, and one that stays slow is asked ever less;
//! - not if the task would wait for long, even at the old figures, nor if it might break its deadline;
//! - with one task in sixteen of the model at most. A promise is put at risk with a tenth of the tasks that may break
//!   it.
//!
//! Owns the bounds for one task; `given` counts what workers were given. Never rates; that is `placement`.

use proto_msgs::Prediction;

use super::{given::Given, predict::models};
use crate::{
    MonoTime, Rule,
    broker::{
        slo::Slos,
        task::Task,
        workers::{
            Workers,
            worker::{ModelHere, Worker},
        },
    },
};

/// The longest predicted time of a trial, by lane, microseconds. Someone waits for it, or a whole job does.
const LASTS_US_MAX: [u64; 2] = [1_000_000, 10_000_000];

/// A deadline or promise is safe if the task needs this part (1/2) of the time, at figures that are too high if
/// anything.
const SAFE_PART: u64 = 2;

/// The longest predicted time with which the task may be a trial now, microseconds; `None` if it may not be one.
pub(super) fn longest_us(task: &Task, now: MonoTime, workers: &Workers, slos: &Slos) -> Option<u64> {
    if !workers.holds(Rule::TrialsAreBounded) {
        return Some(u64::MAX);
    }
    // A task that has been through a failure is spared.
    let is_spared = task.track.attempt.0 > 0 || !workers.share(task.spec.model.digest).allows_one();
    if is_spared {
        return None;
    }
    let mut longest_us = LASTS_US_MAX[task.lane().index()].min(in_time_us(task, now));
    if let Some(safe_us) = safe_us(task).filter(|_| !slos.may_risk_one(&task.spec)) {
        longest_us = longest_us.min(safe_us);
    }
    Some(longest_us)
}

/// The longest predicted time that puts neither the task's deadline nor its promise at risk, microseconds.
pub(super) fn kept_us(task: &Task, now: MonoTime) -> u64 {
    in_time_us(task, now).min(safe_us(task).unwrap_or(u64::MAX))
}

/// The longest predicted time that puts the task's deadline at no risk, microseconds.
fn in_time_us(task: &Task, now: MonoTime) -> u64 {
    task.deadline.map_or(u64::MAX, |deadline| deadline.since_us(now) / SAFE_PART)
}

/// The longest predicted time that puts the task's promise at no risk, microseconds; `None` without a promise.
fn safe_us(task: &Task) -> Option<u64> {
    task.spec.slo.map(|slo| u64::from(slo.latency_ms) * 1000 / SAFE_PART)
}

/// Whether a trial with this prediction puts the task's promise at risk.
pub(crate) fn is_risk(task: &Task, prediction: &Prediction) -> bool {
    safe_us(task).is_some_and(|safe_us| prediction.total_us() > safe_us)
}

/// Since when the worker's figures for the task are old, if the task may be a trial of them. `here` is the worker's
/// state of the first model.
pub(super) fn old_since(
    task: &Task,
    worker: &Worker,
    here: ModelHere<'_>,
    prediction: &Prediction,
    longest_us: u64,
    now: MonoTime,
) -> Option<MonoTime> {
    let total_us = Prediction { handover_us: worker.handover.longest_us(), ..*prediction }.total_us();
    let is_idle = worker.occupancy.len() == 0 && worker.free(task.lane()) > 0;
    if !here.held || !is_idle || !prediction.measured || total_us > longest_us {
        return None;
    }
    let oldest = oldest(task, worker);
    let is_due = !worker.rules.holds(Rule::TrialsAreBounded) || oldest.is_due(now, total_us);
    is_due.then_some(oldest.at)
}

/// Whether the worker's figures for the task are so old that one task may find out whether they still hold, if it takes
/// this long.
pub(super) fn is_due(task: &Task, worker: &Worker, total_us: u64, now: MonoTime) -> bool {
    models(task).all(|(digest, _)| worker.holds(digest)) && oldest(task, worker).is_due(now, total_us)
}

/// Whether a worker without figures for the task was not given its models lately either. `total_us`: what the task
/// probably takes there.
pub(super) fn is_untried(task: &Task, worker: &Worker, total_us: u64, now: MonoTime) -> bool {
    models(task).any(|(digest, _)| !worker.holds(digest)) || oldest(task, worker).is_due(now, total_us)
}

/// When the worker was last given the task's models. A trial renews the figures of all: the oldest counts.
fn oldest(task: &Task, worker: &Worker) -> Given {
    let mut given = models(task).map(|(digest, _)| worker.model(digest).given);
    let first = given.next().unwrap_or_default();
    given.fold(first, |oldest, given| if given.at < oldest.at { given } else { oldest })
}
