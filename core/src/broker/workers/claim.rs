//! Cores and memory that a worker keeps for a waiting task.
//!
//! Owns for how long, and from whom. Never decides who claims.

use proto_msgs::{Lane, TaskId};

use crate::{MonoTime, broker::queue::rank::Rank};

/// Seconds for which freed resources are kept for a claim: as long as a runner's call may take. Then they are given
/// away for as long: nothing stands idle for ever for a task that does not get enough.
const CLAIM_LASTS_S: u64 = 300;

/// A waiting task that a worker keeps cores and memory for, because it needs more of them than others have left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) task: TaskId,
    /// Its rank when it last claimed.
    pub(crate) rank: Rank,
    pub(crate) since: MonoTime,
}

impl Claim {
    pub(super) fn holds(&self, now: MonoTime) -> bool {
        (now.since(self.since).as_secs() / CLAIM_LASTS_S).is_multiple_of(2)
    }

    /// Whether the claim comes before another task of this rank: within a lane by queue order as it is now, between lanes
    /// by time.
    pub(super) fn is_before(&self, lane: Lane, rank: &Rank, now: MonoTime) -> bool {
        if rank.key.lane == lane { self.rank.order(now) < rank.order(now) } else { self.since < rank.came }
    }
}
