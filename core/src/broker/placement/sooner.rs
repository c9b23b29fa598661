//! Whether a task is better held back for a worker without room than sent to the best one with room.
//!
//! - A full worker is waited for if it would still finish the task clearly earlier, keeps a promise that the other one
//!   breaks, may keep the deadline, or gives a run more memory than the other one, where such runs ended for want of it.
//! - If nobody knows when the full worker has room, the task waits no longer than it would gain there: so it never takes
//!   more than twice as long as at the other one (as one rents skis before one buys them). It does not wait for less
//!   than a second.
//!
//! Owns this choice among the workers of one look. Never rates a worker.

use crate::MonoTime;

use crate::broker::{task::Task, workers::worker::Seat};

/// A task is held back only if it would end elsewhere within this part of the time, percent: idle machines cost more
/// than a small gain brings.
const SOONER_PERCENT: u64 = 90;

/// The least gain for which a task waits for a worker of which nobody knows when it has room, microseconds. Queues are
/// looked at again with heartbeats, which are about so far apart.
const UNFORESEEN_GAIN_US_MIN: u64 = 1_000_000;

/// A worker without room that fits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Full {
    pub(super) seat: Seat,
    pub(super) total_us: u64,
    pub(super) run_us: u64,
}

/// The best worker with room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) total_us: u64,
    /// The same without what is in doubt.
    pub(super) least_us: u64,
    pub(super) is_measured: bool,
    /// It has failed the task.
    pub(super) is_doubtful: bool,
    /// It breaks the task's promise.
    pub(super) is_shunned: bool,
    /// It gives a run less memory than others of the model needed.
    pub(super) is_small: bool,
}

/// The workers of a look that matter for the choice.
#[derive(Debug, Default)]
pub(super) struct Sooner {
    /// Of the full workers, the one that would end the task first.
    full: Option<Full>,
    /// The same of those of which nobody knows when they have room.
    unforeseen: Option<Full>,
    /// The shortest time at a worker with room, microseconds.
    roomy_us: Option<u64>,
}

impl Sooner {
    pub(super) fn add_full(&mut self, full: Full, is_foreseeable: bool) {
        let best = if is_foreseeable { &mut self.full } else { &mut self.unforeseen };
        if best.is_none_or(|best| full.total_us < best.total_us) {
            *best = Some(full);
        }
    }

    pub(super) fn add_roomy(&mut self, total_us: u64) {
        self.roomy_us = Some(self.roomy_us.map_or(total_us, |shortest| shortest.min(total_us)));
    }

    /// The full worker that would end the task first.
    pub(super) fn full(&self) -> Option<Seat> {
        self.full.map(|full| full.seat)
    }

    /// The worker for which the task is held back, if any. `before_us` is the work that goes before it at the full one.
    pub(super) fn held_back(&self, task: &Task, offer: Offer, before_us: u64, now: MonoTime) -> Option<Full> {
        let left_us = task.deadline.map_or(u64::MAX, |deadline| deadline.since_us(now));
        self.foreseen(task, offer, before_us, left_us).or_else(|| self.unforeseen(task, offer, left_us, now))
    }

    fn foreseen(&self, task: &Task, offer: Offer, before_us: u64, left_us: u64) -> Option<Full> {
        let full = self.full?;
        let us = full.total_us.saturating_add(before_us);
        let roomy_us = self.roomy_us.unwrap_or(u64::MAX).min(offer.total_us);
        let is_sooner = offer.is_measured && !offer.is_doubtful && us < roomy_us / 100 * SOONER_PERCENT;
        let promised_us = task.spec.slo.map_or(0, |slo| u64::from(slo.latency_ms) * 1000);
        let keeps_promise = offer.is_shunned && us <= promised_us;
        // A run in vain at the small worker would come first.
        let in_vain_us = offer.total_us.saturating_mul(2).saturating_add(full.run_us);
        let gives_more = offer.is_small && us <= in_vain_us.min(left_us);
        let is_chance = offer.is_measured && !offer.is_doubtful && is_only_chance(offer, full, left_us);
        (is_sooner || keeps_promise || gives_more || is_chance).then_some(full)
    }

    fn unforeseen(&self, task: &Task, offer: Offer, left_us: u64, now: MonoTime) -> Option<Full> {
        let full = self.unforeseen.filter(|_| offer.is_measured && !offer.is_doubtful)?;
        let gain_us = offer.total_us.saturating_sub(full.total_us);
        let waited_us = task.rank.map_or(0, |rank| now.since_us(rank.came));
        let is_worth_it = gain_us >= UNFORESEEN_GAIN_US_MIN && waited_us < gain_us;
        (is_worth_it || is_only_chance(offer, full, left_us)).then_some(full)
    }
}

/// Whether the task would miss its deadline at the worker with room at best, and perhaps not at the full one: the time
/// of what waits before it there is only a mean of the lane.
fn is_only_chance(offer: Offer, full: Full, left_us: u64) -> bool {
    offer.least_us > left_us && full.total_us <= left_us
}
