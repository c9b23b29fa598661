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

    pub(super) fn add(&mut self, key: Key, rated: Rated) {
        if self.rated.len() < DECISION_CANDIDATES_MAX {
            self.rated.push((key, rated));
        } else if key < self.rated[self.worst].0 {
            self.rated[self.worst] = (key, rated);
        } else {
            return;
        }
        let worst = (0..self.rated.len()).max_by_key(|at| self.rated[*at].0);
        self.worst = worst.unwrap_or(0);
    }

    pub(super) fn into_best_first(mut self) -> Vec<Rated> {
        self.rated.sort_unstable_by_key(|(key, _)| *key);
        self.rated.into_iter().map(|(_, rated)| rated).collect()
    }
}
