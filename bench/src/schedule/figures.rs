//! Owns the numbers of the experiments: when tasks are due, and summary figures. Never: measuring.

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

/// Due times of so many tasks a second, at equal distances, as long as this.
pub(super) fn evenly(rate: u32, run_for: Duration) -> impl Iterator<Item = Duration> {
    (0..).map(move |number| Duration::from_secs(1) * number / rate).take_while(move |due| *due < run_for)
}

/// Due times of so many tasks a second on average, each independent of the others (a Poisson process), as long as this.
/// They are the same each time.
pub(super) fn poisson(rate: u32, run_for: Duration) -> impl Iterator<Item = Duration> {
    let mut state = 1_u64;
    let mut due_s = 0.0;
    let dues = std::iter::repeat_with(move || {
        // The generator of Knuth's MMIX; its high bits are random enough for a stream of tasks.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let chance = (state >> 11) as f64 / (1_u64 << 53) as f64;
        due_s -= (1.0 - chance).ln() / f64::from(rate);
        Duration::from_secs_f64(due_s)
    });
    dues.take_while(move |due| *due < run_for)
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
    fn a_stream_has_its_rate_and_a_poisson_process_its_bursts() {
        let minute = Duration::from_secs(60);
        assert_eq!(evenly(30, minute).count(), 1800);
        let dues: Vec<Duration> = poisson(30, minute).collect();
        assert!(dues.is_sorted() && (1650..1950).contains(&dues.len()), "{} tasks", dues.len());
        // The distances of a Poisson process are as large as their mean on average, and 14 % are more than twice that.
        let long = dues.windows(2).filter(|pair| pair[1] - pair[0] > minute / 900).count();
        assert!((200..300).contains(&long), "{long} long distances");
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
