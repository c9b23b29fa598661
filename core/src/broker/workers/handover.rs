//! The time that tasks take at a worker besides their predicted parts: messages, connecting, taking the result.
//!
//! A part of it is the client's: its line may be slow, or its process busy. So clients are measured apart, and the
//! worker's own part is the least of those seen of late: a slow client does not make the worker look slow to others.
//!
//! Owns these means. Never predicts.

use std::time::Duration;

use proto_msgs::ClientId;

use crate::{Census, MonoTime};

/// Cap of one hand-over time, microseconds: more is no hand-over, but a fault.
const US_MAX: u64 = 200_000;

/// An outlier counts as no more than this, or twice the mean if that is more, microseconds.
const STEP_US: u64 = 4_000;

/// Time without a task after which a mean is old: a much shorter time replaces it at once.
const OLD_AFTER: Duration = Duration::from_secs(5);

/// A client that had no task at the worker for this long before the latest one says nothing of the present.
const GONE_AFTER: Duration = Duration::from_secs(60);

/// Limit of clients measured at a worker; the one without a task for longest goes first.
const CLIENTS_MAX: usize = 4;

/// A client's running mean.
#[derive(Clone, Copy, Debug)]
struct Mean {
    client: ClientId,
    us: u64,
    /// When a task last told it.
    at: MonoTime,
}

impl Mean {
    fn learn(&mut self, now: MonoTime, us: u64) {
        let is_old = now.since(self.at) >= OLD_AFTER;
        self.at = now;
        if is_old && us < self.us / 2 {
            self.us = us;
            return;
        }
        let us = us.min(self.us.saturating_mul(2).max(STEP_US)).min(US_MAX);
        self.us = (self.us * 7 + us) / 8;
    }
}

/// The hand-over times of one worker.
#[derive(Clone, Debug, Default)]
pub(crate) struct Handover {
    /// The latest client last.
    means: Vec<Mean>,
}

impl Handover {
    /// The worker's part, microseconds; 0 before the first task.
    pub(crate) fn us(&self) -> u64 {
        let Some(latest) = self.means.last() else { return 0 };
        let present = self.means.iter().filter(|mean| latest.at.since(mean.at) < GONE_AFTER);
        present.map(|mean| mean.us).min().unwrap_or(0)
    }

    /// The longest hand-over to any client of late, microseconds: of a client that is not known.
    pub(crate) fn longest_us(&self) -> u64 {
        self.means.iter().map(|mean| mean.us).max().unwrap_or(0)
    }

    /// Learns how much longer than its predicted parts a client's task took that found a free slot, microseconds.
    pub(super) fn learn(&mut self, now: MonoTime, client: ClientId, us: u64) {
        let known = self.means.iter().position(|mean| mean.client == client).map(|at| self.means.remove(at));
        let mut mean = known.unwrap_or_else(|| Mean { client, us: self.us(), at: now });
        mean.learn(now, us);
        if self.means.len() == CLIENTS_MAX {
            self.means.remove(0);
        }
        self.means.push(mean);
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { means } = self;
        census.lasting("clients measured at a worker", means.len(), CLIENTS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(tasks: &[(u8, u64)]) -> u64 {
        let (mut handover, mut now) = (Handover::default(), MonoTime::ZERO);
        for (client, us) in tasks.repeat(50) {
            now = now + Duration::from_millis(100);
            handover.learn(now, ClientId::from_bytes([client; 16]), us);
        }
        handover.us()
    }

    #[test]
    fn a_slow_client_does_not_make_its_worker_slow_for_others() {
        assert!((150_000..=200_000).contains(&after(&[(1, 180_000)])), "nobody else is known");
        assert!((2_500..=3_000).contains(&after(&[(1, 180_000), (2, 3_000)])));
        assert!((2_500..=3_000).contains(&after(&[(1, 180_000), (2, 3_000), (3, 90_000), (4, 90_000), (1, 180_000)])));
    }

    #[test]
    fn a_worker_that_is_slow_to_all_is_slow() {
        assert!(after(&[(1, 90_000), (2, 80_000), (3, 85_000)]) > 70_000);
    }

    #[test]
    fn a_client_that_has_gone_says_nothing_any_more() {
        let mut handover = Handover::default();
        let at = |second: u64| MonoTime::from_micros(second * 1_000_000);
        handover.learn(at(0), ClientId::from_bytes([1; 16]), 1_000);
        (1..120).for_each(|second| handover.learn(at(second), ClientId::from_bytes([2; 16]), 90_000));
        assert!(handover.us() > 80_000, "{}", handover.us());
    }
}
