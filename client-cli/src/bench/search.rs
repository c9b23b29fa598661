//! Chooses the next rate in the search for the highest one that holds. Owns the search. Never measures.

use super::{range::SearchRange, verdict::Verdict};

/// Tries of a rate without any answer before the search gives up: such a try says nothing about rates.
const EMPTY_TRIES_MAX: u32 = 2;

/// Doubles the rate until one does not hold (or halves it until one does), then halves the gap between the two.
///
/// ```text
///            holds: double          does not hold
///   start ---------------> rising ----------------> between ---- gap <= resolution ----> ended
///     '--- does not hold: halve --> falling --holds--^  | ^
///                                                       '-' middle
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Search {
    range: SearchRange,
    /// The highest rate that holds.
    held: Option<f64>,
    /// The lowest rate that does not.
    broken: Option<f64>,
    empty_tries: u32,
}

impl Search {
    pub(crate) fn new(range: SearchRange) -> Self {
        Self { range, held: None, broken: None, empty_tries: 0 }
    }

    /// The rate to measure next; `None` once the search is over.
    pub(crate) fn next(&self) -> Option<f64> {
        let SearchRange { start, bound, resolution } = self.range;
        if self.empty_tries >= EMPTY_TRIES_MAX {
            return None;
        }
        match (self.held, self.broken) {
            (None, None) => Some(start),
            (Some(held), None) => (held < bound).then(|| (held * 2.0).min(bound)),
            (None, Some(broken)) => (broken > resolution).then(|| (broken / 2.0).max(resolution)),
            // A tiny excess is a rounding error: halving has reached the resolution.
            (Some(held), Some(broken)) => (broken - held > resolution * 1.000_001).then(|| f64::midpoint(held, broken)),
        }
    }

    /// Takes the verdict on the rate that [`Self::next`] returned.
    pub(crate) fn judged(&mut self, rate: f64, verdict: Verdict) {
        match verdict {
            Verdict::Held => self.held = Some(rate),
            Verdict::Broken => self.broken = Some(rate),
            Verdict::Empty => {
                self.empty_tries += 1;
                return;
            }
        }
        self.empty_tries = 0;
    }

    /// The highest rate that held.
    pub(crate) fn found(&self) -> Option<f64> {
        self.held
    }

    /// The lowest rate that did not hold; `None` if all rates up to the bound held.
    pub(crate) fn broken(&self) -> Option<f64> {
        self.broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches in a mesh that holds up to `capacity`. Returns the tried rates and the answer.
    fn search(start: f64, bound: f64, resolution: f64, capacity: f64) -> (Vec<f64>, Option<f64>) {
        let mut search = Search::new(SearchRange { start, bound, resolution });
        let mut tried = Vec::new();
        while let Some(rate) = search.next() {
            tried.push(rate);
            assert!(tried.len() < 100, "the search does not end: {tried:?}");
            search.judged(rate, if rate <= capacity { Verdict::Held } else { Verdict::Broken });
        }
        (tried, search.found())
    }

    #[test]
    fn the_highest_rate_is_found_within_the_resolution() {
        let (tried, found) = search(10.0, 1000.0, 5.0, 137.0);
        assert_eq!(tried[..5], [10.0, 20.0, 40.0, 80.0, 160.0]);
        let found = found.unwrap();
        assert!(found <= 137.0 && found > 137.0 - 5.0, "{found}");
        assert!(tried.len() <= 10, "{tried:?}");
    }

    #[test]
    fn a_start_that_is_too_high_is_no_end() {
        let (tried, found) = search(100.0, 1000.0, 5.0, 30.0);
        assert_eq!(tried[..3], [100.0, 50.0, 25.0]);
        assert!(found.is_some_and(|found| found <= 30.0 && found > 25.0 - 1e-9));
    }

    #[test]
    fn a_bound_that_holds_is_the_answer() {
        assert_eq!(search(10.0, 50.0, 1.0, 1e9), (vec![10.0, 20.0, 40.0, 50.0], Some(50.0)));
        assert_eq!(search(50.0, 50.0, 1.0, 1e9), (vec![50.0], Some(50.0)));
    }

    #[test]
    fn where_nothing_holds_nothing_is_found() {
        let (tried, found) = search(8.0, 100.0, 2.0, 0.0);
        assert_eq!((tried, found), (vec![8.0, 4.0, 2.0], None));
    }

    #[test]
    fn silence_is_no_verdict() {
        let mut search = Search::new(SearchRange { start: 10.0, bound: 100.0, resolution: 1.0 });
        search.judged(10.0, Verdict::Empty);
        assert_eq!(search.next(), Some(10.0), "the same rate once more");
        search.judged(10.0, Verdict::Held);
        search.judged(20.0, Verdict::Empty);
        search.judged(20.0, Verdict::Empty);
        assert_eq!((search.next(), search.found()), (None, Some(10.0)), "given up, not called broken");
        assert_eq!(search.broken(), None);
    }
}
