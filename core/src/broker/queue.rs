//! Tasks that wait for room: by priority, then in order of arrival.

use std::{cmp::Reverse, collections::BTreeMap};

use proto_msgs::TaskId;

/// Place in the queue: higher priority first, then first come.
pub(super) type QueueKey = (Reverse<u8>, u64);

/// A position beyond this is not counted out: nobody reads the difference, and counting costs time.
const POSITION_MAX: usize = 1000;

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<QueueKey, TaskId>,
    arrivals: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn push(&mut self, priority: u8, task: TaskId) -> QueueKey {
        self.arrivals += 1;
        let key = (Reverse(priority), self.arrivals);
        self.waiting.insert(key, task);
        key
    }

    /// Puts a task back where it was.
    pub(super) fn put_back(&mut self, key: QueueKey, task: TaskId) {
        self.waiting.insert(key, task);
    }

    pub(super) fn remove(&mut self, key: QueueKey) {
        self.waiting.remove(&key);
    }

    /// In the order in which they shall run.
    pub(super) fn iter(&self) -> impl Iterator<Item = (QueueKey, TaskId)> {
        self.waiting.iter().map(|(key, task)| (*key, *task))
    }

    /// Tasks before this one, counted up to a thousand.
    pub(super) fn position(&self, key: QueueKey) -> u32 {
        self.waiting.range(..key).take(POSITION_MAX).count() as u32
    }
}
