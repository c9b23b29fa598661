//! When figures are measured again that no batch measures any more: they may be from worse times, or from beside other
//! work.
//!
//! Owns the counts of batches until then. Never changes a figure.

/// Batches after which a model without gain is reviewed. The number doubles with each review, at most `REVIEWS_MAX`
/// times. A review costs one packed run.
pub(super) const GAIN_AFTER: u32 = 256;
const REVIEWS_MAX: u32 = 6;
/// Batches after which the review may come earlier, if a single item takes another time than at the verdict.
pub(super) const GAIN_NOT_BEFORE: u32 = 32;

/// Batches between two reviews of the sizes below the best.
const SMALL_AFTER: u32 = 256;

/// Batches after which the largest size, passed over for a smaller one, may run once more. The number doubles each time,
/// at most `REVIEWS_MAX` times. It is small, since one slow run of many can make that size look dearer than the others.
pub(super) const LARGEST_AFTER: u32 = 16;
/// Batches after which that ends if so many rows were never there.
pub(super) const LARGEST_FOR: u32 = 16;

/// The counts of one model.
#[derive(Debug, Default)]
pub(super) struct Reviews {
    /// For a model without gain: batches since that verdict, time of a single item then, and earlier such verdicts.
    gainless_batches: u32,
    gainless_us: u64,
    gainless_before: u32,
    /// Batches since the last review of the small sizes.
    batches: u32,
    /// Batches since the largest size was passed over or last tried, and how often in succession it was tried in vain.
    passed_batches: u32,
    tried_before: u32,
}

impl Reviews {
    /// Counts a batch of a model, whose single items now take this long. True if its verdict of no gain is due.
    pub(super) fn is_gain_due(&mut self, is_gainless: bool, single_us: u64) -> bool {
        self.gainless_batches = if is_gainless { self.gainless_batches + 1 } else { 0 };
        if self.gainless_batches <= 1 {
            self.gainless_us = single_us;
        }
        let then_us = self.gainless_us;
        let is_other = single_us > then_us.saturating_mul(2) || then_us > single_us.saturating_mul(2);
        let after = if is_other { GAIN_NOT_BEFORE } else { GAIN_AFTER << self.gainless_before };
        let is_due = self.gainless_batches >= after;
        if is_due {
            (self.gainless_batches, self.gainless_before) = (0, (self.gainless_before + 1).min(REVIEWS_MAX));
        }
        is_due
    }

    /// Counts a batch. True if the sizes below the best are due.
    pub(super) fn are_small_due(&mut self) -> bool {
        self.batches = (self.batches + 1) % SMALL_AFTER;
        self.batches == 0
    }

    /// Counts a batch of a model whose largest size is, or is not, passed over for a smaller one.
    pub(super) fn count_passed_over(&mut self, is_passed_over: bool) {
        if !is_passed_over {
            (self.passed_batches, self.tried_before) = (0, 0);
        } else if self.passed_batches >= self.largest_after() + LARGEST_FOR {
            self.largest_ran();
        } else {
            self.passed_batches += 1;
        }
    }

    /// Whether the largest size runs once more as soon as enough rows are there.
    pub(super) fn tries_largest(&self) -> bool {
        self.passed_batches >= self.largest_after()
    }

    /// The largest size ran, so that its figure is not old.
    pub(super) fn largest_ran(&mut self) {
        if self.tries_largest() {
            (self.passed_batches, self.tried_before) = (0, (self.tried_before + 1).min(REVIEWS_MAX));
        }
    }

    fn largest_after(&self) -> u32 {
        LARGEST_AFTER << self.tried_before
    }
}
