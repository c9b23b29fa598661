//! Savings: what a model's tasks would have saved at an idle worker that had the model loaded.
//!
//! A task alone prefers the worker that has the model, unless it would wait there for longer than a load takes. So does
//! each one after it, and a stream would never reach an idle worker. So what they miss is added up. Once it exceeds the
//! load, one of them is sent there, pays for the load, and those after it are better off:
//!
//! - not before tasks have missed something for as long as the load takes: a short burst is over by then;
//! - not at a worker where as many models as it has slots are loaded and in use: the load might push one of them out, and
//!   then both streams would load for ever;
//! - if the model is gone from the worker that loaded it last, twice as much must have been missed, each time: models
//!   that take turns in too little memory push each other out ever less;
//! - no task pays whose deadline or promise the load might break, nor one that would take very long.
//!
//! Owns these sums and bounds; `preloads` bounds how often a model is loaded so. Never rates a worker.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{Digest, Prediction, TaskId, WorkerId};

use super::trials;
use crate::{
    Census, MonoTime, Rule,
    broker::{
        Broker,
        task::Task,
        workers::worker::{Seat, Worker},
    },
};

/// The longest predicted time of a task that pays for a load, by lane, microseconds. Someone waits for it, or a whole
/// job does.
const PAYS_US_MAX: [u64; 2] = [10_000_000, 60_000_000];

/// A task misses something only where it would end within this part of the time, percent: predictions are no better.
const MISSED_PERCENT: u64 = 90;

/// What was missed is forgotten if nothing is missed for so many times the load, or for `FORGET_AFTER` if that is longer.
const FORGET_LOADS: u64 = 10;

/// Bursts that are farther apart than this are no stream.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Time after which it is forgotten that a model was pushed out.
const PUSHED_OUT_FOR: Duration = Duration::from_secs(3_600);

/// Most doublings of what must be missed.
const DOUBLINGS_MAX: u32 = 16;

/// Limit of models whose sums are kept. Beyond it, others wait until one is forgotten.
const MODELS_MAX: usize = 256;

/// An idle worker that would have to load the task's models.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    pub(super) seat: Seat,
    /// Predicted time of the task with the load.
    pub(super) prediction: Prediction,
    /// The part of it that only the first task takes: sending and loading the models, microseconds.
    pub(super) load_us: u64,
}

impl Idle {
    /// Predicted time with the models loaded, without the hand-over, microseconds.
    fn ready_us(&self) -> u64 {
        let Prediction { handover_us, .. } = self.prediction;
        self.prediction.total_us().saturating_sub(handover_us).saturating_sub(self.load_us)
    }
}

/// What one task misses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Missed {
    /// The idle worker that lacks the loaded models.
    at: Seat,
    us: u64,
    load_us: u64,
    /// Whether this task may be the one that pays for the load.
    may_pay: bool,
}

impl Missed {
    /// What the task misses at one of these workers if it takes `instead_us` without the hand-over where it goes.
    pub(super) fn of(task: &Task, idle: &[Idle], instead_us: u64, now: MonoTime) -> Option<Self> {
        let better = idle.iter().filter(|idle| idle.ready_us() < instead_us / 100 * MISSED_PERCENT);
        let best = better.min_by_key(|idle| (idle.prediction.total_us(), idle.seat))?;
        let is_safe = best.prediction.total_us() <= PAYS_US_MAX[task.lane().index()].min(trials::kept_us(task, now));
        let may_pay = is_safe && task.track.attempt.0 == 0;
        Some(Self { at: best.seat, us: instead_us - best.ready_us(), load_us: best.load_us, may_pay })
    }
}

/// What the tasks of one model have missed.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    us: u64,
    /// Since when, and the last time.
    since: MonoTime,
    last: MonoTime,
    /// The worker that loaded the model last.
    loaded_at: Option<WorkerId>,
    /// Loads in a row that were followed by one although the model had been pushed out.
    pushed_out: u32,
}

/// What the tasks of each model have missed.
#[derive(Debug, Default)]
pub(crate) struct Savings {
    sums: BTreeMap<Digest, Sum>,
}

impl Savings {
    /// Adds what a task has missed. Returns whether that exceeds the load. `has`: whether a worker has the model loaded.
    fn add(&mut self, now: MonoTime, model: Digest, missed: &Missed, has: impl Fn(WorkerId) -> bool) -> bool {
        let is_over = |sum: &Sum, after: Duration| now.since(sum.last) >= after;
        if self.sums.len() >= MODELS_MAX && !self.sums.contains_key(&model) {
            self.sums.retain(|_, sum| !is_over(sum, FORGET_AFTER));
            if self.sums.len() >= MODELS_MAX {
                return false;
            }
        }
        let sum = self.sums.entry(model).or_default();
        let load = Duration::from_micros(missed.load_us);
        if is_over(sum, PUSHED_OUT_FOR) {
            *sum = Sum::default();
        }
        if sum.us == 0 || is_over(sum, FORGET_AFTER.max(load.saturating_mul(FORGET_LOADS as u32))) {
            (sum.us, sum.since) = (0, now);
        }
        (sum.us, sum.last) = (sum.us.saturating_add(missed.us), now);
        if sum.us < missed.load_us || now.since(sum.since) < load {
            return false;
        }
        sum.us >= missed.load_us.saturating_mul(1 << sum.doublings(has))
    }

    /// The model is loaded at the worker for what was missed.
    fn spend(&mut self, model: Digest, at: WorkerId, has: impl Fn(WorkerId) -> bool) {
        if let Some(sum) = self.sums.get_mut(&model) {
            (sum.us, sum.pushed_out, sum.loaded_at) = (0, sum.doublings(has), Some(at));
        }
    }

    pub(crate) fn census(&self, census: &mut Census<'_>) {
        let Self { sums } = self;
        census.lasting("models with something missed", sums.len(), MODELS_MAX);
    }
}

impl Sum {
    fn doublings(&self, has: impl Fn(WorkerId) -> bool) -> u32 {
        let is_gone = self.loaded_at.is_some_and(|at| !has(at));
        if is_gone { (self.pushed_out + 1).min(DOUBLINGS_MAX) } else { 0 }
    }
}

impl Broker {
    /// Counts what a task misses. Returns whether it is now to go to that worker and pay for the load.
    pub(crate) fn pays_for_load(&mut self, now: MonoTime, id: TaskId, missed: Missed) -> bool {
        let Some(task) = self.tasks.get_mut(id).filter(|task| !task.is_counted) else { return false };
        task.is_counted = true;
        let (model, workers) = (task.spec.model.digest, &self.workers);
        let has = |at| workers.get(at).is_some_and(|worker| worker.model(model).warm);
        let Some(worker) = workers.at(missed.at) else { return false };
        // What the last load saves is not known yet.
        if self.preloads.is_pausing(now, model) {
            return false;
        }
        let pays_off = self.savings.add(now, model, &missed, has) || !self.config.rules.holds(Rule::LoadsPayOff);
        if !pays_off || !missed.may_pay || !self.preloads.begin(now, model, missed.load_us, true) {
            return false;
        }
        self.savings.spend(model, worker.id(), has);
        self.counters.preloads += 1;
        task.track.remember(format!("loads its model at {} for those after it", worker.register.name));
        task.serves = Some(worker.id());
        true
    }
}

/// Whether the worker is idle, and what it loads pushes out nothing that is in use.
pub(super) fn may_load(task: &Task, worker: &Worker, now: MonoTime) -> bool {
    worker.occupancy.len() == 0 && !worker.is_crowded && worker.free_at_once(task.lane(), now) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Digest = Digest::from_bytes([1; 32]);
    const AT: WorkerId = WorkerId::from_bytes([1; 16]);

    fn at(ms: u64) -> MonoTime {
        MonoTime::from_micros(ms * 1000)
    }

    /// The first of tasks, one every 100 ms, that pays for a load of 2 s; each misses this much.
    fn first_that_pays(savings: &mut Savings, from_ms: u64, missed_ms: u64, has: bool) -> Option<u64> {
        let missed = Missed { at: 0, us: missed_ms * 1000, load_us: 2_000_000, may_pay: true };
        let first = (0..1000).find(|nth| savings.add(at(from_ms + nth * 100), MODEL, &missed, |_| has))?;
        savings.spend(MODEL, AT, |_| has);
        Some(first * 100)
    }

    #[test]
    fn a_load_is_due_once_as_much_was_missed_and_for_as_long() {
        let first = |missed_ms| first_that_pays(&mut Savings::default(), 0, missed_ms, true);
        assert_eq!([50, 100, 1000].map(first), [Some(3900), Some(2000), Some(2000)]);
    }

    #[test]
    fn each_load_that_did_not_last_makes_the_next_one_twice_as_dear() {
        let mut savings = Savings::default();
        let times = [0, 1, 2, 3].map(|nth| first_that_pays(&mut savings, nth * 50_000, 100, false));
        assert_eq!(
            times,
            [Some(1900), Some(3900), Some(7900), Some(15_900)].map(|ms: Option<u64>| ms.map(|ms| ms.max(2000)))
        );
        assert_eq!(first_that_pays(&mut savings, 200_000, 100, true), Some(2000), "this one lasts");
        assert_eq!(first_that_pays(&mut savings, 250_000, 100, false), Some(3900));
    }

    #[test]
    fn what_was_missed_long_ago_counts_no_more_and_many_models_fill_no_memory() {
        let mut savings = Savings::default();
        let missed = Missed { at: 0, us: 1_000_000, load_us: 2_000_000, may_pay: true };
        let mut add = |ms, model| savings.add(at(ms), Digest::from_bytes([model; 32]), &missed, |_| true);
        assert!((0..10).all(|nth| !add(nth * 60_000, 0)), "alone each time");
        assert!(add(9 * 60_000 + 59_000, 0));
        (0..=255).for_each(|model| _ = add(600_000, model));
        let mut other = [0; 32];
        other[1] = 1;
        assert!(!savings.add(at(600_000), Digest::from_bytes(other), &missed, |_| true));
        assert_eq!(savings.sums.len(), MODELS_MAX);
        assert!(!savings.add(at(700_000), Digest::from_bytes(other), &missed, |_| true));
        assert_eq!(savings.sums.len(), 1, "the others are forgotten");
    }
}
