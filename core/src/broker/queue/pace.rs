//! Watches how fast the waiting tasks of a lane go to workers. Owns when that may be told as a time. Never: what a task
//! costs.

use std::collections::VecDeque;

use crate::{Census, MonoTime};

/// Starts that are remembered: a busy lane's last second or so, and a slow lane's last minutes.
const STARTS_KEPT: usize = 256;

/// Fewer starts than these say nothing about the next ones: workers' slots free themselves several at a time.
const STARTS_MIN: usize = 4;

/// Nor do starts that were watched for less time than this: a new worker takes many at once.
const WATCHED_US_MIN: u64 = 1_000_000;

/// The pace of one lane since tasks wait in it.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// The last starts, oldest first.
    starts: VecDeque<MonoTime>,
    /// A task came whose models nobody had measured: what the waiting tasks cost is in part assumed.
    pub(crate) is_assumed: bool,
}

impl Pace {
    /// A task comes to the lane, in which so many wait. `is_measured`: what its models cost is known.
    pub(crate) fn joined(&mut self, waiting: usize, is_measured: bool) {
        if waiting == 0 {
            *self = Self::default();
        }
        self.is_assumed |= !is_measured;
    }

    /// A task went to a worker while others waited.
    pub(crate) fn started(&mut self, now: MonoTime) {
        if self.starts.len() == STARTS_KEPT {
            self.starts.pop_front();
        }
        self.starts.push_back(now);
    }

    /// Time in which this many tasks start if they go on as lately, microseconds; `None` if too few have started. It
    /// grows while nothing starts.
    pub(crate) fn time_for_us(&self, now: MonoTime, tasks: u64) -> Option<u64> {
        let oldest = self.starts.front().filter(|_| self.starts.len() >= STARTS_MIN)?;
        let (watched_us, starts) = (now.since_us(*oldest), self.starts.len() as u64);
        let time_us = u128::from(watched_us) * u128::from(tasks) / u128::from(starts);
        (watched_us >= WATCHED_US_MIN).then(|| time_us.try_into().unwrap_or(u64::MAX))
    }

    pub(crate) fn census(&self, census: &mut Census<'_>) {
        let Self { starts, is_assumed: _ } = self;
        census.lasting("starts remembered", starts.len(), STARTS_KEPT);
    }
}
