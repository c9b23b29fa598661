//! How long an idle device waits for clients that will be back soon.
//!
//! ```text
//!   a batch of 4 ends ─► 4 clients have their answers      3 are waiting
//!     │                                                      │
//!     └── they come back within a moment ────────────────────┴──► one batch of 7 instead of one of 3 and one of 4
//! ```
//!
//! Many rows need longer to come back than few: each of them costs somebody some time. Where all of them together need
//! longer than one common batch saves, the halves stay apart, and each comes back while the other runs.
//!
//! And after a pause, how long it waits with the first rows of a burst for the others, if the last bursts had some:
//!
//! ```text
//!   8 rows ─┬─ 8 ─ 8 ─ 8 ─ 8 ─ 8 ─ 8 ─ 8 ──► one batch of 64 instead of one of 8 and one of 56
//!           └── at most a part of what the batch saves
//! ```
//!
//! Owns the expected times, learned from how long earlier clients took to come back, whether or not they were waited
//! for. Never holds rows itself.

use std::time::Duration;

use crate::MonoTime;

/// Longest time that an item waits for company while a slot is free.
pub(super) const WAIT_MAX: Duration = Duration::from_millis(100);

/// Rows that are not back after this multiple of the usual time will not come soon.
const PATIENCE: u64 = 2;

/// This part (1/10) of the possible saving is always spent on waiting: usual times are not exact.
const GAIN_PART: u64 = 10;

/// This part (1/4) of what one full batch saves over two halves is spent on waiting for the rest of a burst: it is
/// spent in vain if the burst was over.
const BURST_PART: u64 = 4;

/// So many bursts in succession must have had company before one is waited for.
const BURSTS_SEEN: u32 = 2;

/// Return times are kept for batches of about 1, 2, 4, 8 … 1024 rows; larger ones count as such.
const SIZES: usize = 11;

/// Rows that came to an idle queue, and those that followed at once.
#[derive(Debug)]
struct Burst {
    began: MonoTime,
    has_company: bool,
}

/// The expectations of one queue.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// When the last batch ended, and its number of rows.
    ended: MonoTime,
    ended_rows: u32,
    /// Rows that came since the last batch ended.
    returned_rows: u32,
    /// Running means of the time until as many rows are back as left, by the size of the batch; `None` until seen.
    returns_us: [Option<u64>; SIZES],
    /// Until when to wait, and for how many rows.
    waits: Option<(MonoTime, u32)>,
    /// How long the rest of a burst is waited for, and how many rows fit into a batch: as of the last batch.
    burst_wait: Duration,
    limit: u32,
    /// The last burst, and how many before it, in succession, had company.
    burst: Option<Burst>,
    accompanied: u32,
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
        let saved_us = batch_us((limit / 2).max(1)).saturating_mul(2).saturating_sub(batch_us(limit));
        (self.burst_wait, self.limit) = (Duration::from_micros(saved_us / BURST_PART), limit);
        let (all, target) = (waiting.saturating_add(rows), waiting.saturating_add(rows).min(limit));
        if waiting >= target {
            return;
        }
        let batch_us = |rows| if rows == 0 { 0 } else { batch_us(rows) };
        let apart_us = batch_us(waiting.max(1)).saturating_add(batch_us(rows));
        let together_us = batch_us(target).saturating_add(batch_us(all - target));
        // The device may stand still for as long as one common batch saves.
        let gain_us = apart_us.saturating_sub(together_us);
        // Who usually stays away for longer than rows wait for company will not be back in time. Once all are one batch,
        // they come back together, and the device stands still for as long as that takes.
        let returns = |rows, most_us: u64| self.returns_us(rows).filter(|return_us| *return_us < most_us);
        let return_us = returns(rows, gain_us.min(WAIT_MAX.as_micros() as u64));
        if let Some(return_us) = return_us.filter(|_| returns(target, gain_us).is_some()) {
            let wait_us = (return_us * PATIENCE).max(gain_us / GAIN_PART).min(gain_us);
            self.waits = Some((now + Duration::from_micros(wait_us), target));
        }
    }

    /// Notes that rows have come, and whether nothing waited or ran before them.
    pub(super) fn arrived(&mut self, now: MonoTime, rows: u32, is_idle: bool) {
        let before = self.returned_rows;
        self.returned_rows = before.saturating_add(rows);
        if before < self.ended_rows && self.returned_rows >= self.ended_rows {
            self.took(now);
        }
        if is_idle {
            self.burst_begins(now);
        } else if let Some(burst) = &mut self.burst {
            // What comes at the very same moment, from the stage before this one, needs no waiting.
            burst.has_company |= burst.began < now && now < burst.began + self.burst_wait;
        }
    }

    fn burst_begins(&mut self, now: MonoTime) {
        let last = self.burst.replace(Burst { began: now, has_company: false });
        self.accompanied = match last {
            Some(Burst { has_company: true, .. }) => self.accompanied.saturating_add(1),
            _ => 0,
        };
        if self.accompanied >= BURSTS_SEEN && self.waits.is_none() {
            self.waits = Some((now + self.burst_wait, self.limit));
        }
    }

    /// Learns the time until as many rows were back as left, or until the next batch ended without them.
    fn took(&mut self, now: MonoTime) {
        let (took_us, size) = (now.since_us(self.ended), size(self.ended_rows));
        let mean = |usual_us: u64, took_us: u64| usual_us.midpoint(took_us);
        self.returns_us[size] = Some(self.returns_us[size].map_or(took_us, |usual_us| mean(usual_us, took_us)));
        // Half as many rows take half as long at least: a figure that is too low is not believed for ever either.
        if let Some(half_us) = size.checked_sub(1).and_then(|half| self.returns_us[half].as_mut()) {
            *half_us = (*half_us).max(mean(*half_us, took_us / 2));
        }
    }

    /// The time that a batch of so many rows takes to come back; `None` if nobody has seen one like it. Twice as many rows
    /// take twice as long at most: a figure that is too high is not believed for ever.
    fn returns_us(&self, rows: u32) -> Option<u64> {
        let at = |size: usize| self.returns_us[size];
        let (size, half) = (size(rows), size(rows).checked_sub(1));
        let by_half = half.and_then(at).map(|half_us| half_us.saturating_mul(2));
        [at(size), by_half].into_iter().flatten().min()
    }

    /// Until when to wait with `waiting` rows here; `None`: begin now.
    pub(super) fn until(&self, now: MonoTime, waiting: u32) -> Option<MonoTime> {
        self.waits.filter(|(until, target)| now < *until && waiting < *target).map(|(until, _)| until)
    }

    /// Whether the `waiting` rows, the oldest of which `arrived` then, or found a slot then, have waited for more in vain:
    /// the time for it is over, or their patience.
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

/// The place of a batch's size in the table of sizes: that of the nearest one.
fn size(rows: u32) -> usize {
    let nearest = rows.saturating_add(rows / 3).max(1).ilog2() as usize;
    nearest.min(SIZES - 1)
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
        linger.arrived(at(2000), 4, false);
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
        linger.arrived(at(5200), 4, false);
        linger.batch_ended(at(5800), 4, 4, 64, batch_us);
        assert_eq!(linger.until(at(5800), 4), None);
    }

    #[test]
    fn halves_that_would_be_slow_together_stay_apart_until_they_are_quick() {
        let mut linger = Linger::default();
        let mut ended_us = 0;
        // Each half is back after so long, while the other runs.
        let mut halves = |return_us| {
            linger.batch_ended(at(ended_us), 32, 32, 64, batch_us);
            let waits = linger.until(at(ended_us), 32).is_some();
            linger.begins();
            linger.arrived(at(ended_us + return_us), 32, false);
            ended_us += 11_400;
            waits
        };
        assert_eq!([4000; 4].map(&mut halves), [false; 4], "64 rows may need 8 ms, and one batch saves 5 ms");
        assert_eq!([2000; 4].map(&mut halves), [false, false, false, true], "as soon as the mean is below 2.5 ms");
    }

    #[test]
    fn who_was_slow_once_as_a_whole_batch_is_tried_again_when_its_halves_are_quick() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 64, 0, 64, batch_us);
        linger.arrived(at(9000), 64, false);
        for half in 1..4 {
            linger.batch_ended(at(half * 20_000), 32, 32, 64, batch_us);
            let waits = linger.until(at(half * 20_000), 32).is_some();
            assert_eq!(waits, half > 1, "half {half}");
            linger.begins();
            linger.arrived(at(half * 20_000 + 1500), 32, false);
        }
    }

    #[test]
    fn where_two_batches_are_needed_anyway_nobody_waits() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 64, 32, 64, batch_us);
        linger.arrived(at(1000), 64, false);
        linger.batch_ended(at(17_800), 64, 32, 64, batch_us);
        assert_eq!(linger.until(at(17_800), 32), None);
    }

    #[test]
    fn who_never_comes_back_is_not_waited_for_again() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 8, 0, 64, batch_us);
        linger.arrived(at(1000), 8, true);
        let mut waits = 0;
        for batch in 1..100 {
            let now = at(batch * 1_000_000);
            linger.batch_ended(now, 8, 0, 64, batch_us);
            waits += u32::from(linger.until(now, 1).is_some());
            linger.begins();
        }
        assert_eq!(waits, 1, "they came back once");
    }

    /// A batch of 64 takes 17.8 ms and two of 32 take 5 ms more: a burst is waited for 1.25 ms.
    fn burst(linger: &mut Linger, at_us: u64, next_us: Option<u64>) -> Option<MonoTime> {
        linger.arrived(at(at_us), 8, true);
        let until = linger.until(at(at_us), 8);
        linger.begins();
        if let Some(next_us) = next_us {
            linger.arrived(at(at_us + next_us), 56, false);
        }
        linger.batch_ended(at(at_us + 100_000), 64, 0, 64, batch_us);
        until
    }

    #[test]
    fn the_first_of_a_burst_wait_for_the_rest_once_two_bursts_had_one() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 8, 0, 64, batch_us);
        let begins: Vec<u64> = (1..5).map(|burst| burst * 10_000_000).collect();
        let waits: Vec<_> = begins.iter().map(|begin| burst(&mut linger, *begin, Some(1000))).collect();
        assert_eq!(waits, [None, None, Some(at(begins[2] + 1250)), Some(at(begins[3] + 1250))]);
    }

    #[test]
    fn rows_that_come_alone_or_too_late_or_all_at_one_moment_are_not_waited_for() {
        for next_us in [None, Some(1250), Some(0)] {
            let mut linger = Linger::default();
            linger.batch_ended(at(0), 8, 0, 64, batch_us);
            let mut waits = (1..9).map(|number| burst(&mut linger, number * 10_000_000, next_us));
            assert!(waits.all(|until| until.is_none()), "{next_us:?}");
        }
    }

    #[test]
    fn one_burst_without_company_ends_the_waiting() {
        let mut linger = Linger::default();
        linger.batch_ended(at(0), 8, 0, 64, batch_us);
        let company = [Some(1000), Some(1000), None, Some(1000), Some(1000), None];
        let waits = (1..).zip(company).map(|(number, next)| burst(&mut linger, number * 10_000_000, next).is_some());
        assert_eq!(waits.collect::<Vec<_>>(), [false, false, true, false, false, true]);
    }
}
