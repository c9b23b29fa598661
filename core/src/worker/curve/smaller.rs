//! Sizes below the best: for idle slots, and for rows of the other lane that should not wait long.
//!
//! Owns what smaller batches may cost. Never decides when they are wanted.

use super::{Cost, SIZES};
use crate::worker::{
    api::{CHECKED_ROWS, SPOT_ROWS},
    cut::Cut,
};

/// Cut batches have the smallest size whose cost per item is this near the best: the next realtime item waits for less.
const CUT_PERMILLE: u64 = 1020;

/// A size with at most this cost per item, relative to the best, still pays if there are more idle slots than full
/// batches, or if realtime rows ask for shorter ones.
const SPREAD_PERMILLE: u64 = 1500;

impl Cost {
    /// The size below which batches are wasteful.
    pub(super) fn floor(&self) -> u32 {
        self.smallest_within(self.best().max(2), SPREAD_PERMILLE).max(2)
    }

    /// The size of a batch that is cut: the largest that is short enough. If none is, or only such as are wasteful, the
    /// smallest that is not.
    pub(super) fn cut_size(&self, size: u32, cut: Cut) -> u32 {
        let size = if cut.is_near { self.smallest_within(self.best(), CUT_PERMILLE) } else { size };
        if self.checked_us(size) <= cut.within_us {
            return size;
        }
        let is_short = |rows: &u32| *rows < size && self.checked_us(*rows) <= cut.within_us;
        let is_fit = |rows: &u32| is_short(rows) && self.costs_within(*rows, self.best(), SPREAD_PERMILLE);
        SIZES.into_iter().rev().find(is_fit).unwrap_or(0).max(self.least_cut().min(size))
    }

    /// The smallest size to which batches are cut. Rows of a size that saves too little run one by one.
    fn least_cut(&self) -> u32 {
        if self.costs_within(1, self.best(), SPREAD_PERMILLE) { 2 } else { self.floor() }
    }

    /// Run time of the shortest cut batch, microseconds.
    pub(in crate::worker) fn shortest_us(&self) -> u64 {
        self.batch_us(if self.best() > 1 { self.least_cut() } else { 1 })
    }

    /// Run time of the next batch if it has so many rows, with those of them that also run by themselves.
    fn checked_us(&self, rows: u32) -> u64 {
        let checked_rows = if self.is_unproven(rows) { CHECKED_ROWS } else { SPOT_ROWS };
        let singles = if self.is_unproven(rows) || self.is_spot_due() { checked_rows.min(rows) } else { 0 };
        self.batch_us(rows).saturating_add(self.batch_us(1).saturating_mul(singles.into()))
    }

    /// The smallest size that pays and whose cost per item is within `permille` of that of `size`.
    fn smallest_within(&self, size: u32, permille: u64) -> u32 {
        let is_near = |rows: &u32| self.costs_within(*rows, size, permille) && self.is_worth_it(*rows);
        SIZES.into_iter().find(|rows| *rows < size && is_near(rows)).unwrap_or(size)
    }

    /// Whether an item of a batch of `rows` costs at most `permille` of one of a batch of `size`.
    fn costs_within(&self, rows: u32, size: u32, permille: u64) -> bool {
        let item_ns = |rows: u32| self.batch_us(rows).saturating_mul(1000) / u64::from(rows.max(1));
        item_ns(rows) <= item_ns(size).saturating_mul(permille) / 1000
    }
}
