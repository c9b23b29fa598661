//! How long an idle device waits for clients that will be back in a moment.
//!
//! ```text
//!   a batch of 4 ends ─► 4 clients have their answers      3 are waiting
//!     │                                                      │
//!     └── they come back within a moment ────────────────────┴──► one batch of 7 instead of one of 3 and one of 4
//! ```
//!
//! Owns the expectation, learned from how long earlier ones took to come back, which is seen whether they were waited for or
//! not. Never holds anything itself.

use std::time::Duration;

use crate::MonoTime;

/// Who has not come back after so many times the usual time will not come soon.
const PATIENCE: u64 = 2;

/// This part of what waiting may save is always spent on it: usual times are not exact.
const GAIN_PART: u64 = 10;

/// One queue's expectations.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// When the last batch ended, and with how many rows.
    ended: MonoTime,
    ended_rows: u32,
    /// Rows that came since.
    returned_rows: u32,
    /// How long as many rows as left take to come back, a running mean; nothing before it was seen.
    return_us: Option<u64>,
    /// Until when to wait, and for how many.
    waits: Option<(MonoTime, u32)>,
}

impl Linger {
    /// A batch has ended, `waiting` rows are here and `limit` fit in a batch. `batch_us(n)` is what n rows take.
    pub(super) fn batch_ended(
        &mut self,
        now: MonoTime,
        rows: u32,
        waiting: u32,
        limit: u32,
        batch_us: impl Fn(u32) -> u64,
    ) {
        if self.returned_rows < self.ended_rows {
            // Perhaps they never come; it was at least as long as this.
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
        // What the device saves when they go together is what it may stand still for.
        let gain_us = apart_us.saturating_sub(together_us);
        if let Some(return_us) = self.return_us.filter(|return_us| *return_us < gain_us) {
            let wait_us = (return_us * PATIENCE).max(gain_us / GAIN_PART).min(gain_us);
            self.waits = Some((now + Duration::from_micros(wait_us), target));
        }
    }

    /// Rows have come.
    pub(super) fn arrived(&mut self, now: MonoTime, rows: u32) {
        let before = self.returned_rows;
        self.returned_rows = before.saturating_add(rows);
        if before < self.ended_rows && self.returned_rows >= self.ended_rows {
            self.took(now);
        }
    }

    /// As many rows as left are back, or were waited for so long.
    fn took(&mut self, now: MonoTime) {
        let took_us = u64::try_from(now.since(self.ended).as_micros()).unwrap_or(u64::MAX);
        self.return_us = Some(self.return_us.map_or(took_us, |usual_us| usual_us.midpoint(took_us)));
    }

    /// Until when to wait with so many rows here; `None`: go.
    pub(super) fn until(&self, now: MonoTime, waiting: u32) -> Option<MonoTime> {
        self.waits.filter(|(until, target)| now < *until && waiting < *target).map(|(until, _)| until)
    }

    /// A batch begins.
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
        // A second batch costs 5 ms more, and they need 2.
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
