//! How far batches of the batch lane are cut, so that realtime rows do not wait too long behind one of them.
//!
//! ```text
//!   realtime rows      what they ask for                     a batch of the batch lane
//!   not lately         nothing                               as large as pays best
//!   lately             nothing                               the smallest whose cost per item is nearly the best
//!   lately or before   answers in 50 ms; a run takes 13 ms   as many rows as run in 29 ms, unless that is too dear
//! ```
//!
//! What would be late even without any wait is not asked for, nor what would nearly always be late all the same.
//!
//! Owns what realtime rows asked for. Never composes a batch: `dispatch` does.

use std::time::Duration;

use proto_msgs::{AttemptId, Lane, limits::STAGES_AFTER_MAX};

use super::{
    Worker,
    curve::Cost,
    dispatch::time_for,
    packer::{Queue, QueueId},
};
use crate::{Census, MonoTime};

/// Batches are cut for this long after realtime rows came or ended, or for the time of `BATCHES_NEAR` batches that are
/// not cut, if that is longer. Realtime rows after a longer pause wait for a whole batch.
const REALTIME_NEAR: Duration = Duration::from_secs(1);
const BATCHES_NEAR: u64 = 2;

/// Batches are cut for this long after rows with a service level or a deadline: a stream with fewer than 8 tasks a
/// minute is not judged.
const ASKED_NEAR: Duration = Duration::from_secs(10);

/// Rows are no reason for a cut if fewer than one in so many would be in time behind the shortest batch: the bulk would
/// pay for nothing.
const HOPE_PART: u64 = 4;

/// Limit of what is remembered. Beyond it, those that may wait the longest go: batches that are short enough for the
/// others mostly suit them, too.
const ASKED_MAX: usize = 32;

/// Times are remembered with so many bits after the first one, rounded down: those of one stream vary with the time that
/// its inputs took to come.
const TIME_BITS: u32 = 4;

/// The time within which realtime rows want to be answered.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Asked {
    within_us: u64,
    rows: u32,
    /// The queues of their stages.
    way: Vec<QueueId>,
}

/// What realtime rows asked for lately.
#[derive(Debug, Default)]
pub(super) struct Wishes(Vec<Wish>);

#[derive(Debug)]
struct Wish {
    asked: Asked,
    /// When it was last asked for, and how long the rows could wait then, microseconds.
    at: MonoTime,
    room_us: u64,
}

impl Wish {
    fn is_live(&self, now: MonoTime) -> bool {
        now < self.at + ASKED_NEAR
    }
}

/// Limits of a batch that is cut.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Cut {
    /// Realtime rows are near: smaller batches that cost hardly more are preferred.
    pub(super) is_near: bool,
    /// Time that the batch may take, microseconds, if so few rows are not too dear.
    pub(super) within_us: u64,
    /// Rows for this batch. If they are too few for a size that is to be tried, they are cut as well.
    pub(super) rows: u32,
}

impl Cut {
    pub(super) const NONE: Self = Self { is_near: false, within_us: u64::MAX, rows: u32::MAX };
}

impl Wishes {
    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self(wishes) = self;
        census.lasting("wishes of realtime rows", wishes.len(), ASKED_MAX);
        let stages = wishes.iter().map(|wish| wish.asked.way.len()).max().unwrap_or(0);
        census.lasting("stages of a wish", stages, 1 + STAGES_AFTER_MAX);
    }

    fn add(&mut self, new: Wish) {
        self.0.retain(|wish| wish.asked != new.asked && wish.is_live(new.at));
        self.0.push(new);
        if self.0.len() > ASKED_MAX {
            self.0.sort_by_key(|wish| wish.room_us);
            self.0.truncate(ASKED_MAX);
        }
    }
}

impl Worker {
    /// Remembers when the result of realtime rows that have just arrived is due.
    pub(super) fn ask(&mut self, now: MonoTime, id: AttemptId) {
        let Some(attempt) = self.attempts.get(id) else { return };
        let first = attempt.work.way.first().and_then(|queue| self.packer.get(*queue));
        if first.is_none_or(|queue| queue.kind.lane == Lane::Batch) {
            return;
        }
        let (rows, way) = (attempt.work.items, &attempt.work.way);
        let dues = [attempt.deadline, attempt.slo_until].into_iter().flatten();
        let asked = dues.map(|due| Asked { within_us: rounded(due.since_us(now)), rows, way: way.clone() });
        let wishes = asked.filter_map(|asked| {
            let room_us = self.slots.devices().filter_map(|device| self.room_us(&asked, device)).min()?;
            Some(Wish { asked, at: now, room_us })
        });
        let wishes: Vec<Wish> = wishes.collect();
        wishes.into_iter().for_each(|wish| self.wishes.add(wish));
    }

    /// How far a lane's batches are cut on this device at present, if there are so many rows for one. `cost`: that of
    /// their model.
    pub(super) fn cut_of(&self, now: MonoTime, (lane, device): (Lane, i16), cost: &Cost, rows: u32) -> Cut {
        if lane == Lane::Realtime {
            return Cut::NONE;
        }
        let is_near = self.packer.is_realtime_near(now, realtime_near(cost));
        let waits = self.slots.makes_realtime_wait(device);
        let wishes = self.wishes.0.iter().filter(|wish| waits && wish.is_live(now));
        let is_use = |room_us: &u64| room_us.saturating_mul(HOPE_PART) >= cost.shortest_us();
        let within_us = wishes.filter_map(|wish| self.room_us(&wish.asked, device)).filter(is_use).min();
        Cut { is_near, within_us: within_us.unwrap_or(u64::MAX), rows }
    }

    /// How long these rows may wait for the device with a quarter of their run to spare, microseconds; `None` if they do
    /// not run there, or would be late even if they did not wait.
    fn room_us(&self, asked: &Asked, device: i16) -> Option<u64> {
        // A queue that nobody has used for long is gone.
        let queues: Vec<&Queue> = asked.way.iter().map(|queue| self.packer.get(*queue)).collect::<Option<_>>()?;
        let costs = queues.iter().map(|queue| self.costs.get(&self.cost_key(queue, device)));
        let run_us = costs.map(|cost| cost.batch_us(asked.rows)).fold(0, u64::saturating_add);
        let room = Duration::from_micros(asked.within_us).checked_sub(time_for(run_us))?;
        let runs_here = queues.iter().all(|queue| self.may_run_on(queue, device));
        runs_here.then(|| u64::try_from(room.as_micros()).unwrap_or(u64::MAX))
    }
}

fn rounded(us: u64) -> u64 {
    let dropped = us.checked_ilog2().unwrap_or(0).saturating_sub(TIME_BITS);
    us >> dropped << dropped
}

/// How long after realtime rows the batch lane is cut. A row that waited for a long batch is back only after it.
fn realtime_near(cost: &Cost) -> Duration {
    REALTIME_NEAR.max(Duration::from_micros(cost.batch_us(cost.best()).saturating_mul(BATCHES_NEAR)))
}
