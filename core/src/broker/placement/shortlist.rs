//! The best few rated workers of a look, for people who ask why.
//!
//! Owns how many. Never compares workers itself: their keys do.

use proto_msgs::limits::DECISION_CANDIDATES_MAX;

use super::decision::Rated;

/// The workers with the smallest keys.
#[derive(Debug)]
pub(super) struct Shortlist<Key> {
    rated: Vec<(Key, Rated)>,
    /// Index of the worst of them.
    worst: usize,
}

impl<Key: Copy + Ord> Shortlist<Key> {
    pub(super) fn new() -> Self {
        Self { rated: Vec::with_capacity(DECISION_CANDIDATES_MAX), worst: 0 }
    }

    /// Adds a worker if it is among the best; most are not, and nothing is written down for them.
    pub(super) fn add(&mut self, key: Key, rated: impl FnOnce() -> Rated) {
        if self.rated.len() < DECISION_CANDIDATES_MAX {
            self.rated.push((key, rated()));
        } else if key < self.rated[self.worst].0 {
            self.rated[self.worst] = (key, rated());
        } else {
            return;
        }
        // Nobody has to give way before the list is full.
        if self.rated.len() == DECISION_CANDIDATES_MAX {
            let worst = (0..self.rated.len()).max_by_key(|at| self.rated[*at].0);
            self.worst = worst.unwrap_or(0);
        }
    }

    pub(super) fn into_best_first(mut self) -> Vec<Rated> {
        self.rated.sort_unstable_by_key(|(key, _)| *key);
        self.rated.into_iter().map(|(_, rated)| rated).collect()
    }
}
