//! The run time of batches of about one size: a running mean that forgives an outlier and adopts a new speed.
//!
//! Owns how a measurement is taken in. Never decides what follows from it.

/// Runs of a size before it may be judged not to pay: the first ones prepare buffers and kernels.
pub(super) const JUDGED_AFTER: u32 = 3;

/// After this many surprises in a row the speed counts as new, not as an outlier.
const SURPRISES: u8 = 3;

/// A point of the curve, as running means.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Point {
    pub(super) rows_milli: u64,
    pub(super) us: u64,
    pub(super) count: u32,
    /// Latest runs in a row that took less than half or more than twice the expected time.
    surprises: u8,
}

impl Point {
    /// Takes in one run. The first runs give a minimum, since cold ones are slow. Then each run moves the mean by an
    /// eighth, where an outlier counts as at most twice, or at least half, the expected time. Several outliers in a row
    /// replace the mean. If `is_old`, the mean says little about the present: the run counts half, and a much shorter
    /// one replaces it at once, since no run is quicker than its machine.
    pub(super) fn learn(&mut self, rows: u32, us: u64, is_old: bool) {
        let rows_milli = u64::from(rows) * 1000;
        let expected_us = self.us.saturating_mul(rows_milli) / self.rows_milli.max(1);
        self.count = self.count.saturating_add(1);
        if self.count <= JUDGED_AFTER {
            if self.count == 1 || us < expected_us {
                (self.rows_milli, self.us) = (rows_milli, us);
            }
            return;
        }
        let expected = expected_us / 2..=expected_us.saturating_mul(2);
        self.surprises = if expected.contains(&us) { 0 } else { self.surprises + 1 };
        if self.surprises >= SURPRISES || (is_old && us < *expected.start()) {
            (self.rows_milli, self.us, self.surprises) = (rows_milli, us, 0);
            return;
        }
        let us = us.clamp(*expected.start(), *expected.end());
        let parts = if is_old { 2 } else { 8 };
        self.rows_milli = (self.rows_milli * (parts - 1) + rows_milli).div_ceil(parts);
        self.us = self.us.saturating_mul(parts - 1).saturating_add(us).div_ceil(parts);
    }

    /// The mean may be from worse times: of it and the next run, the lesser counts.
    pub(super) fn doubt(&mut self) {
        self.count = self.count.min(JUDGED_AFTER - 1);
    }

    pub(super) fn rows(&self) -> u32 {
        u32::try_from((self.rows_milli + 500) / 1000).unwrap_or(u32::MAX)
    }

    /// Nanoseconds per item.
    pub(super) fn item_ns(&self) -> u64 {
        self.us.saturating_mul(1_000_000) / self.rows_milli.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_outlier_changes_little_and_a_new_speed_is_learned() {
        let mut point = Point::default();
        (0..20).for_each(|_| point.learn(1, 1000, false));
        point.learn(1, 1_000_000, false);
        assert!(point.us <= 1125, "{}", point.us);
        (0..3).for_each(|_| point.learn(1, 4000, false));
        assert_eq!(point.us, 4000, "three times is no outlier");
    }

    #[test]
    fn an_old_mean_yields_at_once_to_a_much_shorter_run_and_half_to_any_other() {
        let after = |us: u64| {
            let mut point = Point::default();
            (0..20).for_each(|_| point.learn(1, 1000, false));
            point.learn(1, us, true);
            point.us
        };
        assert_eq!([100, 800, 1200, 9000].map(after), [100, 900, 1100, 1500]);
    }
}
