//! Sizes below the best: for idle slots, and for rows of the other lane that should not wait long.
//!
//! Owns what smaller batches may cost. Never decides when they are wanted.

use super::{Cost, SIZES};
use crate::worker::cut::Cut;

/// Cut batches have the smallest size whose cost per item is this near the best: the next realtime item waits for less.
const CUT_PERMILLE: u64 = 1020;

/// A size with at most this cost per item, relative to the best, still pays if there are more idle slots than full
/// batches, or if realtime rows ask for shorter ones.
const SPREAD_PERMILLE: u64 = 1500;

impl Cost {
    /// The size below which batches are wasteful, compared with those of size `best`.
    pub(super) fn floor(&self, best: u32) -> u32 {
        self.smallest_within(best.max(2), SPREAD_PERMILLE).max(2)
    }

    /// The size of a batch that is cut: the largest that is short enough, but none that is wasteful.
    pub(super) fn cut_size(&self, size: u32, cut: Cut) -> u32 {
        let best = self.foreseen_best();
        let size = if cut.is_near { self.smallest_within(best, CUT_PERMILLE).min(size) } else { size };
        if self.batch_us(size) <= cut.within_us {
            return size;
        }
        let is_short = |rows: &u32| *rows < size && self.batch_us(*rows) <= cut.within_us;
        let is_fit = |rows: &u32| is_short(rows) && self.costs_within(*rows, best, SPREAD_PERMILLE);
        SIZES.into_iter().rev().find(is_fit).unwrap_or(0).max(self.floor(best).min(size))
    }

    /// The best size, as far as the curve foretells those that are still to be tried: who cuts batches keeps them from
    /// being tried.
    fn foreseen_best(&self) -> u32 {
        let (best, size_max) = (self.best(), self.size_max());
        if self.size() <= best {
            return best;
        }
        let larger = SIZES.into_iter().filter(|rows| (best..=size_max).contains(rows));
        larger.min_by_key(|rows| self.item_ns(*rows)).unwrap_or(best)
    }

    /// The smallest size that pays and whose cost per item is within `permille` of that of `size`.
    fn smallest_within(&self, size: u32, permille: u64) -> u32 {
        let is_near = |rows: &u32| self.costs_within(*rows, size, permille) && self.is_worth_it(*rows);
        SIZES.into_iter().find(|rows| *rows < size && is_near(rows)).unwrap_or(size)
    }

    /// Whether an item of a batch of `rows` costs at most `permille` of one of a batch of `size`.
    fn costs_within(&self, rows: u32, size: u32, permille: u64) -> bool {
        self.item_ns(rows) <= self.item_ns(size).saturating_mul(permille) / 1000
    }

    fn item_ns(&self, rows: u32) -> u64 {
        self.batch_us(rows).saturating_mul(1000) / u64::from(rows.max(1))
    }
}
