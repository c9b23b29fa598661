//! Owns the summary figures of the experiments. Never: measuring.

use std::time::Duration;

/// Jain's index of fairness: 1 if all have the same, 1/n if one has everything.
pub(super) fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = (shares.iter().sum::<f64>(), shares.iter().map(|share| share * share).sum::<f64>());
    if squares == 0.0 { f64::NAN } else { sum * sum / (shares.len() as f64 * squares) }
}

/// The largest count divided by the smallest.
pub(super) fn skew(counts: &[u64]) -> f64 {
    let (most, least) = (counts.iter().max().copied().unwrap_or(0), counts.iter().min().copied().unwrap_or(0));
    most as f64 / least as f64
}

/// The least possible skew when tasks of these sizes go to this many workers: largest first, each to the least loaded.
pub(super) fn least_skew(mut sizes: Vec<u64>, workers: usize) -> f64 {
    sizes.sort_unstable();
    let mut laden = vec![0_u64; workers];
    for size in sizes.into_iter().rev() {
        if let Some(least) = laden.iter_mut().min() {
            *least += size;
        }
    }
    skew(&laden)
}

/// Sizes of the tasks that a job is cut into.
pub(super) fn cut(items: u32, split: u32) -> Vec<u32> {
    let full = (items / split) as usize;
    let rest = items % split;
    std::iter::repeat_n(split, full).chain((rest > 0).then_some(rest)).collect()
}

/// Seconds, as tables show them.
pub(super) fn seconds(duration: Duration) -> serde_json::Value {
    serde_json::json!((duration.as_secs_f64() * 1000.0).round() / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_shares_are_fair_and_one_share_is_not() {
        assert_eq!(jain(&[3.0, 3.0, 3.0]), 1.0);
        assert_eq!(jain(&[1.0, 0.0]), 0.5);
        assert!(jain(&[0.0, 0.0]).is_nan());
    }

    #[test]
    fn a_hundred_items_in_eights_cannot_be_even_but_in_fives_they_can() {
        let least = |split| least_skew(cut(100, split).into_iter().map(u64::from).collect(), 4);
        assert_eq!(cut(100, 8).len(), 13);
        assert!((least(8) - 28.0 / 24.0).abs() < 1e-9);
        assert_eq!(least(5), 1.0);
        assert_eq!(skew(&[10, 5]), 2.0);
    }
}
