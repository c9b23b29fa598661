//! A schedule: when each of many things must be looked at.
//!
//! Owns one entry for each thing, however often its time changes. Never the things themselves.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Census, MonoTime};

/// One entry per thing, ordered by time.
#[derive(Debug)]
pub(crate) struct Due<Id> {
    order: BTreeSet<(MonoTime, Id)>,
    of: BTreeMap<Id, MonoTime>,
}

impl<Id> Default for Due<Id> {
    fn default() -> Self {
        Self { order: BTreeSet::new(), of: BTreeMap::new() }
    }
}

impl<Id: Copy + Ord> Due<Id> {
    /// Plans a look at this time or earlier. An earlier one stays: it costs little to find that nothing is due yet.
    pub(crate) fn by(&mut self, id: Id, at: MonoTime) {
        if self.of.get(&id).is_none_or(|planned| at < *planned) {
            self.set(id, at);
        }
    }

    /// Plans a look at this time and no earlier.
    pub(crate) fn set(&mut self, id: Id, at: MonoTime) {
        if let Some(before) = self.of.insert(id, at) {
            self.order.remove(&(before, id));
        }
        self.order.insert((at, id));
    }

    pub(crate) fn remove(&mut self, id: Id) {
        if let Some(at) = self.of.remove(&id) {
            self.order.remove(&(at, id));
        }
    }

    /// Time of the first look.
    pub(crate) fn first(&self) -> Option<MonoTime> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes out one thing that is due by now.
    pub(crate) fn pop(&mut self, now: MonoTime) -> Option<Id> {
        self.order.first().filter(|(at, _)| *at <= now)?;
        self.pop_first()
    }

    /// Takes out the first thing, whenever it is due.
    pub(crate) fn pop_first(&mut self) -> Option<Id> {
        let (_, id) = self.order.pop_first()?;
        self.of.remove(&id);
        Some(id)
    }

    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Counts the entries; `limit` is the number of things that there are.
    pub(crate) fn census(&self, name: &'static str, limit: usize, census: &mut Census<'_>) {
        let Self { order, of } = self;
        census.lasting(name, order.len().max(of.len()), limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_has_one_entry_and_the_earliest_stands() {
        let at = MonoTime::from_micros;
        let mut due = Due::default();
        for micros in [5, 9, 3, 7] {
            due.by('a', at(micros));
        }
        due.by('b', at(4));
        assert_eq!((due.len(), due.first()), (2, Some(at(3))));
        assert_eq!([due.pop(at(3)), due.pop(at(3)), due.pop(at(4))], [Some('a'), None, Some('b')]);
        due.by('a', at(9));
        due.set('a', at(11));
        assert_eq!(due.first(), Some(at(11)));
        due.remove('a');
        assert_eq!((due.len(), due.first(), due.of.len()), (0, None, 0));
    }
}
