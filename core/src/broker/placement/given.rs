//! The books of trials: when a worker was last given a task of a model, and how many of a model's tasks were none.
//!
//! Owns these times and counts, and what they allow. Never looks at a worker or a task; that is `trials`.

use std::time::Duration;

use crate::MonoTime;

/// Time without a task of the model after which a worker's figures count as old.
const OLD_AFTER: Duration = Duration::from_secs(10);

/// The longest time between two trials of a worker.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// A model that was given a task not longer ago than this is in use.
const IN_USE_FOR: Duration = Duration::from_secs(60);

/// A trial takes at most this part (1/20) of the time since the last one.
const TIME_PART: u32 = 20;

/// At most one in this many of a model's tasks is a trial.
const TASKS_PART: u32 = 16;

/// When a worker was last given a task of a model.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Given {
    /// With any task.
    pub(super) at: MonoTime,
    /// With one that was no trial.
    by_merit: MonoTime,
}

impl Given {
    /// The worker is new, or new to the model: what it says is not old yet.
    pub(crate) fn new(now: MonoTime) -> Self {
        Self { at: now, by_merit: now }
    }

    pub(crate) fn note(&mut self, now: MonoTime, is_trial: bool) {
        self.at = now;
        if !is_trial {
            self.by_merit = now;
        }
    }

    pub(crate) fn is_in_use(&self, now: MonoTime) -> bool {
        now.since(self.at) < IN_USE_FOR
    }

    /// Whether a trial that takes this long is due.
    pub(super) fn is_due(&self, now: MonoTime, total_us: u64) -> bool {
        let left = self.at.since(self.by_merit) / 2;
        let costs = Duration::from_micros(total_us).saturating_mul(TIME_PART);
        now.since(self.at) >= left.clamp(OLD_AFTER, WAIT_MAX).max(costs)
    }
}

/// A model's share of trials.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    /// Tasks placed since the last trial.
    since: u32,
}

impl Share {
    pub(crate) fn note(&mut self, is_trial: bool) {
        self.since = if is_trial { 0 } else { self.since.saturating_add(1) };
    }

    pub(super) fn allows_one(self) -> bool {
        self.since >= TASKS_PART - 1
    }
}
