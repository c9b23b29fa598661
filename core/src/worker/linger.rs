//! How long an idle device waits for clients that will be back in a moment.
//!
//! ```text
//!   a batch of 4 ends ─► 4 clients have their answers      3 are waiting
//!     │                                                      │
//!     └── they come back within a moment ────────────────────┴──► one batch of 7 instead of one of 3 and one of 4
//! ```
//!
//! Owns the expectation, learned from how long earlier ones took to come back. Never holds anything itself.

use std::time::Duration;

use crate::MonoTime;

/// Waiting is free up to this share of the batch's time.
const FREE_PERCENT: u64 = 10;

/// Times in a row that nobody came back put waiting off for twice as many batches, up to 2 to the power of this.
const MISSES_MAX: u32 = 6;

/// One queue's expectations.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// When the last batch ended, and with how many rows.
    ended: MonoTime,
    ended_rows: u32,
    /// Rows that came since.
    returned_rows: u32,
    /// How long as many rows as left take to come back, a running mean; 0: not seen yet.
    return_us: u64,
    /// How long waiting for them would have been worth, at most.
    worth_us: u64,
    /// Until when to wait, and for how many.
    waits: Option<(MonoTime, u32)>,
    misses: u32,
    skips: u32,
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
        (self.ended, self.ended_rows, self.returned_rows, self.waits) = (now, rows, 0, None);
        let target = waiting.saturating_add(rows).min(limit);
        if waiting >= target {
            return;
        }
        let apart_us = batch_us(waiting.max(1)).saturating_add(batch_us(rows));
        let free_us = batch_us(target) * FREE_PERCENT / 100;
        self.worth_us = (apart_us.saturating_sub(batch_us(target)) / 2).max(free_us);
        if self.skips > 0 {
            self.skips -= 1;
            return;
        }
        let likely_us = self.likely_us();
        let wait_us = if likely_us <= self.worth_us { likely_us.max(free_us) } else { free_us };
        self.waits = Some((now + Duration::from_micros(wait_us), target));
    }

    fn likely_us(&self) -> u64 {
        self.return_us.saturating_add(self.return_us / 2)
    }

    /// Rows have come.
    pub(super) fn arrived(&mut self, now: MonoTime, rows: u32) {
        let before = self.returned_rows;
        self.returned_rows = before.saturating_add(rows);
        if before < self.ended_rows && self.returned_rows >= self.ended_rows {
            let took_us = u64::try_from(now.since(self.ended).as_micros()).unwrap_or(u64::MAX);
            self.return_us = if self.return_us == 0 { took_us } else { self.return_us.midpoint(took_us) };
            // Too short a wait was no proof that nobody comes.
            if self.likely_us() <= self.worth_us {
                (self.misses, self.skips) = (0, 0);
            }
        }
    }

    /// Until when to wait with so many rows here; `None`: go.
    pub(super) fn until(&self, now: MonoTime, waiting: u32) -> Option<MonoTime> {
        self.waits.filter(|(until, target)| now < *until && waiting < *target).map(|(until, _)| until)
    }

    /// Time has passed: whether the wait was worth it.
    pub(super) fn look(&mut self, now: MonoTime) {
        if self.waits.take_if(|(until, _)| now >= *until).is_some() && self.returned_rows < self.ended_rows.div_ceil(2)
        {
            self.misses = (self.misses + 1).min(MISSES_MAX);
            self.skips = (1 << self.misses) - 2;
        }
    }

    /// A batch begins, with so many rows here.
    pub(super) fn begins(&mut self, waiting: u32) {
        if self.waits.take().is_some_and(|(_, target)| waiting >= target) {
            self.misses = 0;
        }
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
    fn an_idle_device_waits_a_tenth_of_the_batch_for_those_who_just_left() {
        let mut linger = Linger::default();
        linger.batch_ended(at(10_000), 8, 0, 64, batch_us);
        assert_eq!(linger.until(at(10_000), 1), Some(at(10_660)));
        assert_eq!(linger.until(at(10_300), 8), None, "all are back");
        assert_eq!(linger.until(at(10_660), 1), None, "the time is over");
    }

    #[test]
    fn two_halves_of_a_closed_loop_become_one() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 4, 4, 64, batch_us);
        assert_eq!(linger.until(at(0), 4), Some(at(660)));
        // They need 1.5 ms, which is less than a second batch costs: next time that is waited for.
        linger.look(at(660));
        linger.begins(4);
        linger.arrived(at(1500), 4);
        linger.batch_ended(at(6460), 4, 4, 64, batch_us);
        assert_eq!(linger.until(at(6460), 4), Some(at(6460 + 2250)));
    }

    #[test]
    fn who_never_comes_back_is_waited_for_ever_more_rarely() {
        let mut linger = Linger::default();
        let mut waits = 0;
        for batch in 0..100 {
            let now = at(batch * 1_000_000);
            linger.batch_ended(now, 8, 0, 64, batch_us);
            waits += u32::from(linger.until(now, 1).is_some());
            linger.look(now + Duration::from_secs(1));
            linger.begins(1);
        }
        assert!(waits < 10, "{waits}");
    }
}
