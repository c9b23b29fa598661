//! The places of a queue, and the exact number of places before each, at a cost that hardly grows with the queue.
//!
//! Owns the count. Never knows which tasks wait, or why in this order.

use std::cmp::Reverse;

use crate::Census;

/// Most places in one bucket: to shift them costs about as much as to sum up the buckets of a queue of 100,000.
const BUCKET_MAX: usize = 512;

/// Sort key in a lane's queue: the effective priority without the parts that grow with time, then the order of arrival.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Order {
    pub(super) points: Reverse<i64>,
    pub(super) arrival: u64,
}

impl Order {
    pub(super) const fn new(points: i64, arrival: u64) -> Self {
        Self { points: Reverse(points), arrival }
    }

    /// The place of the same task with so many points less.
    pub(super) fn minus(self, points: i64) -> Self {
        Self { points: Reverse(self.points.0.saturating_sub(points)), ..self }
    }
}

/// Places in order, cut into non-empty buckets.
#[derive(Debug, Default)]
pub(super) struct Line {
    buckets: Vec<Vec<Order>>,
}

impl Line {
    /// Index of the first bucket that does not end before the place.
    fn bucket_of(&self, place: Order) -> usize {
        self.buckets.partition_point(|bucket| bucket.last().is_some_and(|last| *last < place))
    }

    pub(super) fn insert(&mut self, place: Order) {
        let at = self.bucket_of(place).min(self.buckets.len().saturating_sub(1));
        let Some(bucket) = self.buckets.get_mut(at) else { return self.buckets.push(vec![place]) };
        if let Err(index) = bucket.binary_search(&place) {
            bucket.insert(index, place);
        }
        if bucket.len() > BUCKET_MAX {
            let rest = bucket.split_off(BUCKET_MAX / 2);
            self.buckets.insert(at + 1, rest);
        }
    }

    pub(super) fn remove(&mut self, place: Order) {
        let at = self.bucket_of(place);
        let Some(bucket) = self.buckets.get_mut(at) else { return };
        if let Ok(index) = bucket.binary_search(&place) {
            bucket.remove(index);
        }
        let (len, next_len) = (bucket.len(), self.buckets.get(at + 1).map_or(0, Vec::len));
        if len == 0 {
            self.buckets.remove(at);
        } else if next_len > 0 && len + next_len < BUCKET_MAX / 2 {
            let next = self.buckets.remove(at + 1);
            self.buckets[at].extend(next);
        }
    }

    /// Counts the places; `waiting` is the number of waiting tasks.
    pub(super) fn census(&self, waiting: usize, census: &mut Census<'_>) {
        let Self { buckets } = self;
        census.passing("places in line", buckets.iter().map(Vec::len).sum(), waiting);
        census.passing("buckets of a line", buckets.len(), waiting);
    }

    /// Number of places before this one, which need not be in the line.
    pub(super) fn before(&self, place: Order) -> usize {
        let at = self.bucket_of(place);
        let within = self.buckets.get(at).map_or(0, |bucket| bucket.partition_point(|other| *other < place));
        self.buckets[..at].iter().map(Vec::len).sum::<usize>() + within
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_place_knows_how_many_are_before_it_however_they_come_and_go() {
        let (mut line, mut all) = (Line::default(), BTreeSet::new());
        // Each number's place is spread out and unique.
        let place = |number: u64| Order { points: Reverse((number * 48_271 % 4001) as i64), arrival: number };
        let is_right = |line: &Line, all: &BTreeSet<Order>| {
            assert!(all.iter().enumerate().all(|(before, place)| line.before(*place) == before));
        };
        for number in 0..4000 {
            line.insert(place(number));
            all.insert(place(number));
        }
        line.insert(place(7)); // It is there already.
        is_right(&line, &all);
        for number in (0..4000).filter(|number| number % 8 > 0) {
            line.remove(place(number));
            all.remove(&place(number));
        }
        line.remove(place(1)); // It is gone already.
        is_right(&line, &all);
        assert!(line.buckets.len() <= 4, "{} buckets for 500", line.buckets.len());
        all.iter().for_each(|place| line.remove(*place));
        assert_eq!((line.before(place(0)), line.buckets.len()), (0, 0));
    }
}
