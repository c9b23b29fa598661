//! When each of many things wants to be looked at.
//!
//! Owns one entry for each of them, however often that changes. Never the things themselves.

use std::collections::{BTreeMap, BTreeSet};

use crate::MonoTime;

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Due<Id> {
    order: BTreeSet<(MonoTime, Id)>,
    of: BTreeMap<Id, MonoTime>,
}

impl<Id: Copy + Ord> Due<Id> {
    pub(crate) const fn new() -> Self {
        Self { order: BTreeSet::new(), of: BTreeMap::new() }
    }

    /// It wants to be looked at by then. An earlier look stays: it costs little to find that nothing is due yet.
    pub(crate) fn by(&mut self, id: Id, at: MonoTime) {
        if self.of.get(&id).is_none_or(|planned| at < *planned) {
            self.remove(id);
            self.of.insert(id, at);
            self.order.insert((at, id));
        }
    }

    pub(crate) fn remove(&mut self, id: Id) {
        if let Some(at) = self.of.remove(&id) {
            self.order.remove(&(at, id));
        }
    }

    /// When the first of them wants to be looked at.
    pub(crate) fn first(&self) -> Option<MonoTime> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes one out that wants to be looked at by now.
    pub(crate) fn pop(&mut self, now: MonoTime) -> Option<Id> {
        let (_, id) = self.order.first().filter(|(at, _)| *at <= now)?;
        let id = *id;
        self.remove(id);
        Some(id)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_has_one_entry_and_the_earliest_stands() {
        let at = MonoTime::from_micros;
        let mut due = Due::new();
        for micros in [5, 9, 3, 7] {
            due.by('a', at(micros));
        }
        due.by('b', at(4));
        assert_eq!((due.len(), due.first()), (2, Some(at(3))));
        assert_eq!([due.pop(at(3)), due.pop(at(3)), due.pop(at(4))], [Some('a'), None, Some('b')]);
        due.by('a', at(9));
        due.remove('a');
        assert_eq!((due.len(), due.first(), due.of.len()), (0, None, 0));
    }
}
