//! How long an idle device waits for clients that will be back soon.
//!
//! ```text
//!   a batch of 4 ends ─► 4 clients have their answers      3 are waiting
//!     │                                                      │
//!     └── they come back within a moment ────────────────────┴──► one batch of 7 instead of one of 3 and one of 4
//! ```
//!
//! Owns the expected time, learned from how long earlier clients took to come back, whether or not they were waited
//! for. Never holds rows itself.

use std::time::Duration;

use crate::MonoTime;

/// Rows that are not back after this multiple of the usual time will not come soon.
const PATIENCE: u64 = 2;

/// This part (1/10) of the possible saving is always spent on waiting: usual times are not exact.
const GAIN_PART: u64 = 10;

/// The expectations of one queue.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// When the last batch ended, and its number of rows.
    ended: MonoTime,
    ended_rows: u32,
    /// Rows that came since the last batch ended.
    returned_rows: u32,
    /// Running mean of the time until as many rows are back as left; `None` until seen.
    return_us: Option<u64>,
    /// Until when to wait, and for how many rows.
    waits: Option<(MonoTime, u32)>,
}

impl Linger {
    /// Notes the end of a batch of `rows`. `waiting` rows are here, `limit` fit into a batch, `batch_us(n)` is the time
    /// of n rows.
    pub(super) fn batch_ended(
        &mut self,
        now: MonoTime,
        rows: u32,
        waiting: u32,
        limit: u32,
        batch_us: impl Fn(u32) -> u64,
    ) {
        if self.returned_rows < self.ended_rows {
            // Perhaps these rows never come back; this is the least time they take.
            self.took(now);
        }
        (self.ended, self.ended_rows, self.returned_rows, self.waits) = (now, rows, 0, None);
        let (all, target) = (waiting.saturating_add(rows), waiting.saturating_add(rows).min(limit));
        if waiting >= target {
            return;
        }
        let batch_us = |rows| if rows == 0 { 0 } else { batch_us(rows) };
        let apart_us = batch_us(waiting.max(1)).saturating_add(batch_us(rows));
        let together_us = batch_us(target).saturating_add(batch_us(all - target));
        // The device may stand still for as long as one common batch saves.
        let gain_us = apart_us.saturating_sub(together_us);
        if let Some(return_us) = self.return_us.filter(|return_us| *return_us < gain_us) {
            let wait_us = (return_us * PATIENCE).max(gain_us / GAIN_PART).min(gain_us);
            self.waits = Some((now + Duration::from_micros(wait_us), target));
        }
    }

    /// Notes that rows have come.
    pub(super) fn arrived(&mut self, now: MonoTime, rows: u32) {
        let before = self.returned_rows;
        self.returned_rows = before.saturating_add(rows);
        if before < self.ended_rows && self.returned_rows >= self.ended_rows {
            self.took(now);
        }
    }

    /// Learns the time until as many rows were back as left, or until the next batch ended without them.
    fn took(&mut self, now: MonoTime) {
        let took_us = u64::try_from(now.since(self.ended).as_micros()).unwrap_or(u64::MAX);
        self.return_us = Some(self.return_us.map_or(took_us, |usual_us| usual_us.midpoint(took_us)));
    }

    /// Until when to wait with `waiting` rows here; `None`: begin now.
    pub(super) fn until(&self, now: MonoTime, waiting: u32) -> Option<MonoTime> {
        self.waits.filter(|(until, target)| now < *until && waiting < *target).map(|(until, _)| until)
    }

    /// Whether the `waiting` rows, the oldest of which `arrived` then, have waited for more in vain: the time for it is
    /// over, or their patience.
    pub(super) fn has_waited(&self, now: MonoTime, waiting: u32, arrived: MonoTime, patience: Duration) -> bool {
        let waited = |(until, target): (MonoTime, u32)| {
            waiting < target && arrived < until && now >= until.min(arrived + patience)
        };
        // Rows that ran out of patience while the device was busy did not wait for company.
        now > self.ended && self.waits.is_some_and(waited)
    }

    /// Notes that a batch begins.
    pub(super) fn begins(&mut self) {
        self.waits = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(us: u64) -> MonoTime {
        MonoTime::from_micros(us)
    }

    fn batch_us(rows: u32) -> u64 {
        5000 + 200 * u64::from(rows)
    }

    #[test]
    fn two_halves_of_a_closed_loop_become_one() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 4, 4, 64, batch_us);
        assert_eq!(linger.until(at(0), 4), None, "nobody knows whether they come back");
        linger.begins();
        linger.arrived(at(2000), 4);
        // A second batch costs 5 ms more, and the rows need 2 ms to come back.
        linger.batch_ended(at(5800), 4, 4, 64, batch_us);
        assert_eq!(linger.until(at(5800), 4), Some(at(5800 + 4000)));
        assert_eq!(linger.until(at(7000), 8), None, "all are back");
        assert_eq!(linger.until(at(9800), 7), None, "the time is over");
    }

    #[test]
    fn who_is_slower_than_a_batch_of_their_own_is_not_waited_for() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 4, 4, 64, batch_us);
        linger.arrived(at(5200), 4);
        linger.batch_ended(at(5800), 4, 4, 64, batch_us);
        assert_eq!(linger.until(at(5800), 4), None);
    }

    #[test]
    fn where_two_batches_are_needed_anyway_nobody_waits() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 64, 32, 64, batch_us);
        linger.arrived(at(1000), 64);
        linger.batch_ended(at(17_800), 64, 32, 64, batch_us);
        assert_eq!(linger.until(at(17_800), 32), None);
    }

    #[test]
    fn who_never_comes_back_is_not_waited_for_again() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 8, 0, 64, batch_us);
        linger.arrived(at(1000), 8);
        let mut waits = 0;
        for batch in 1..100 {
            let now = at(batch * 1_000_000);
            linger.batch_ended(now, 8, 0, 64, batch_us);
            waits += u32::from(linger.until(now, 1).is_some());
            linger.begins();
        }
        assert_eq!(waits, 1, "they came back once");
    }
}
