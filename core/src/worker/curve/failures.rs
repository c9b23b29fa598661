//! What packed batches that failed, or ran one by one, say of their size.
//!
//! Owns how far the size is limited by them. Never: which rows run again, and how.

use super::{Cost, Proof, SIZES, point::Point};

/// Packed batches between two failures from outside for which nothing is blamed. A size that fits hardly ever fails more
/// often.
const MISHAP_EVERY: u32 = 1000;

/// So many packed batches in a row run one by one before the model is probed again.
const APART_MAX: u32 = 8;

/// A failure from outside for which nothing was blamed.
#[derive(Debug)]
pub(super) struct Excused {
    /// The number of the last batch of the worker by then.
    made: u64,
    /// Packed batches of the model by then.
    packed_batches: u32,
}

impl Cost {
    /// A packed batch of `rows` failed: until the cause is known, the limit is half as many.
    pub(in crate::worker) fn doubted(&mut self, rows: u32) {
        self.doubted_max = Some(rows / 2);
    }

    /// The size of the failed batch was not to blame.
    pub(in crate::worker) fn cleared(&mut self) {
        self.doubted_max = None;
    }

    /// A batch of `rows` fails although each row runs alone: the limit is half as many from now on.
    pub(in crate::worker) fn too_large(&mut self, rows: u32) {
        self.doubted_max = None;
        self.limit_to(rows / 2);
    }

    /// A batch of `rows` failed for a reason outside of it, and each row runs alone. Its size is blamed only if that comes
    /// again soon: a kernel that is short of memory ends runners from outside, too. `at`: the batch's number; `made`: that
    /// of the last one. Those that ran at the same time failed for the same reason.
    pub(in crate::worker) fn mishap(&mut self, rows: u32, (at, made): (u64, u64)) {
        let is_excused = |excused: &Excused| {
            at <= excused.made || self.packed_batches.saturating_sub(excused.packed_batches) >= MISHAP_EVERY
        };
        if self.excused.as_ref().is_none_or(is_excused) {
            let made = self.excused.as_ref().filter(|excused| at <= excused.made).map_or(made, |excused| excused.made);
            self.excused = Some(Excused { made, packed_batches: self.packed_batches });
            self.cleared();
        } else {
            self.too_large(rows);
        }
    }

    /// All rows of a packed batch ran one by one, because nobody has seen what the model makes of several such rows. If
    /// that goes on, a probe is due.
    pub(in crate::worker) fn ran_apart(&mut self) {
        self.apart += 1;
        if self.apart >= APART_MAX && self.proof == Proof::Same {
            (self.apart, self.proof) = (0, Proof::Unknown);
            self.try_later();
        }
    }

    pub(super) fn limit_to(&mut self, rows: u32) {
        self.rows_max = self.rows_max.min(rows).max(1);
        for (point, size) in self.points.iter_mut().zip(SIZES) {
            if size > self.rows_max {
                *point = Point::default();
            }
        }
        if self.rows_max < 2 {
            self.proof = Proof::Unsupported;
        }
    }
}
