//! Changes on their way to the store, merged by key: the last one wins, and a record that came and went in between is
//! never written.
//!
//! Owns what must be written next. Never: a store, a thread, a lock. Its size is bounded by the number of workers and
//! tasks that live or are in the store, however long the store is away.

use std::{
    collections::{HashMap, HashSet, hash_map},
    mem,
    sync::Arc,
    time::Instant,
};

use mesh_core::broker::{Change, TaskRecord, WorkerRecord};
use proto_msgs::{Epoch, TaskId, WorkerId};

/// One change to the store.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Write a worker's row; if `whole`, the store may lack the fields that do not change.
    PutWorker {
        /// The row.
        record: Arc<WorkerRecord>,
        /// Whether to write all fields.
        whole: bool,
    },
    /// Remove a worker's row.
    DropWorker(WorkerId),
    /// Write a task.
    PutTask {
        /// The task.
        record: Arc<TaskRecord>,
        /// Whether the task is remembered across restarts.
        durable: bool,
    },
    /// Remove a task.
    DropTask(TaskId),
}

/// The changes of one write.
pub type Batch = Vec<Write>;

/// The record that a change is about.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Key {
    Worker(WorkerId),
    Task(TaskId),
}

/// The value a key should have in the store.
#[derive(Clone, Debug)]
enum Value {
    Worker(Arc<WorkerRecord>),
    Task {
        record: Arc<TaskRecord>,
        durable: bool,
    },
    /// A worker's row that was written. It is not kept here, since the next heartbeat brings it again.
    WorkerWritten,
    /// The record is deleted.
    Gone,
}

#[derive(Debug)]
struct Entry {
    value: Value,
    /// The store has this key, or may have it since a write was tried.
    stored: bool,
    /// The life of the worker whose unchanging fields the store has.
    epoch: Option<Epoch>,
}

impl Entry {
    const fn new(value: Value, stored: bool) -> Self {
        Self { value, stored, epoch: None }
    }
}

/// Changes that are not in the store yet, merged by key.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    entries: HashMap<Key, Entry>,
    /// Keys to write with the next tick.
    dirty: HashSet<Key>,
    /// Keys to write at once; not in `dirty`.
    urgent: HashSet<Key>,
    /// Time of the oldest change that is not in the store.
    behind_since: Option<Instant>,
}

impl Pending {
    /// Adds one change.
    pub(crate) fn save(&mut self, change: Change, now: Instant) {
        match change {
            Change::PutWorker(record) => {
                let key = Key::Worker(record.register.worker);
                self.put(key, Value::Worker(record.into()), false);
            }
            Change::PutTask { record, durable } => {
                let key = Key::Task(record.spec.task);
                self.put(key, Value::Task { record: record.into(), durable }, durable);
            }
            Change::DropWorker(worker) => self.remove(Key::Worker(worker)),
            Change::DropTask(task) => self.remove(Key::Task(task)),
        }
        if self.is_settled() {
            self.behind_since = None;
        } else {
            self.behind_since.get_or_insert(now);
        }
    }

    fn put(&mut self, key: Key, value: Value, at_once: bool) {
        match self.entries.entry(key) {
            hash_map::Entry::Occupied(mut entry) => entry.get_mut().value = value,
            hash_map::Entry::Vacant(place) => drop(place.insert(Entry::new(value, false))),
        }
        if at_once {
            self.dirty.remove(&key);
            self.urgent.insert(key);
        } else if !self.urgent.contains(&key) {
            self.dirty.insert(key);
        }
    }

    fn remove(&mut self, key: Key) {
        self.urgent.remove(&key);
        match self.entries.get_mut(&key) {
            Some(entry) if entry.stored => {
                entry.value = Value::Gone;
                self.dirty.insert(key);
            }
            _ => {
                self.entries.remove(&key);
                self.dirty.remove(&key);
            }
        }
    }

    /// Adds tasks that the store had before this broker started. They are written again only if they change or the
    /// store loses them.
    pub(crate) fn restored(&mut self, records: &[TaskRecord]) {
        for record in records {
            let value = Value::Task { record: Arc::new(record.clone()), durable: true };
            self.entries.insert(Key::Task(record.spec.task), Entry::new(value, true));
        }
    }

    /// Takes at most `limit` changes: urgent ones first, the others only if `all`.
    pub(crate) fn take(&mut self, limit: usize, all: bool) -> Batch {
        let mut keys: Vec<Key> = self.urgent.iter().copied().take(limit).collect();
        if all {
            keys.extend(self.dirty.iter().copied().take(limit - keys.len()));
        }
        let mut batch = Batch::with_capacity(keys.len());
        for key in keys {
            self.urgent.remove(&key);
            self.dirty.remove(&key);
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            entry.stored = true;
            batch.push(match (&entry.value, key) {
                (Value::Worker(record), _) => {
                    let epoch = Some(record.register.epoch);
                    let whole = mem::replace(&mut entry.epoch, epoch) != epoch;
                    Write::PutWorker { record: Arc::clone(record), whole }
                }
                (Value::Task { record, durable }, _) => {
                    Write::PutTask { record: Arc::clone(record), durable: *durable }
                }
                (Value::Gone, Key::Worker(worker)) => Write::DropWorker(worker),
                (Value::Gone, Key::Task(task)) => Write::DropTask(task),
                (Value::WorkerWritten, _) => continue,
            });
            match entry.value {
                Value::Worker(_) => entry.value = Value::WorkerWritten,
                Value::Gone => drop(self.entries.remove(&key)),
                _ => {}
            }
        }
        batch
    }

    /// The batch from [`Self::take`] is in the store.
    pub(crate) fn written(&mut self, taken_at: Instant) {
        self.behind_since = (!self.is_settled()).then_some(taken_at);
    }

    /// The batch failed, or was written in part: every change in it that is still current must be written again.
    pub(crate) fn put_back(&mut self, batch: Batch) {
        for write in batch {
            match write {
                Write::PutWorker { record, .. } => {
                    let key = Key::Worker(record.register.worker);
                    let Some(entry) = self.entries.get_mut(&key) else { continue };
                    entry.epoch = None;
                    if matches!(entry.value, Value::WorkerWritten) {
                        entry.value = Value::Worker(record);
                        self.dirty.insert(key);
                    }
                }
                Write::PutTask { record, durable } => {
                    let key = Key::Task(record.spec.task);
                    match self.entries.get(&key).map(|entry| &entry.value) {
                        None | Some(Value::Gone) => {}
                        Some(_) if durable => drop(self.urgent.insert(key)),
                        Some(_) => drop(self.dirty.insert(key)),
                    }
                }
                Write::DropWorker(worker) => self.put_back_drop(Key::Worker(worker)),
                Write::DropTask(task) => self.put_back_drop(Key::Task(task)),
            }
        }
    }

    fn put_back_drop(&mut self, key: Key) {
        let entry = self.entries.entry(key).or_insert(Entry::new(Value::Gone, true));
        entry.stored = true;
        if matches!(entry.value, Value::Gone) {
            self.dirty.insert(key);
        }
    }

    /// The store may have lost everything: every known task must be written again, durable ones first. Rows of workers
    /// follow with their next heartbeats, whole.
    pub(crate) fn write_all_again(&mut self) {
        for (key, entry) in &mut self.entries {
            match entry.value {
                Value::Task { durable: true, .. } => {
                    self.dirty.remove(key);
                    self.urgent.insert(*key);
                }
                Value::Task { .. } => drop(self.dirty.insert(*key)),
                Value::Worker(_) | Value::WorkerWritten => entry.epoch = None,
                Value::Gone => {}
            }
        }
    }

    /// Whether nothing must be written.
    pub(crate) fn is_settled(&self) -> bool {
        self.dirty.is_empty() && self.urgent.is_empty()
    }

    /// Whether urgent changes wait.
    pub(crate) fn has_urgent(&self) -> bool {
        !self.urgent.is_empty()
    }

    /// Number of changes that are not in the store.
    pub(crate) fn len(&self) -> usize {
        self.dirty.len() + self.urgent.len()
    }

    /// Time of the oldest change that is not in the store.
    pub(crate) const fn behind_since(&self) -> Option<Instant> {
        self.behind_since
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::samples::{task, worker};

    const ALL: usize = usize::MAX;

    fn put_task(number: u8, durable: bool) -> Change {
        Change::PutTask { record: Box::new(task(number)), durable }
    }

    fn put_worker(number: u8, seen_unix_ms: u64) -> Change {
        Change::PutWorker(Box::new(WorkerRecord { seen_unix_ms, ..worker(number) }))
    }

    /// A `Pending` with all these changes.
    fn pending(changes: impl IntoIterator<Item = Change>) -> Pending {
        let mut pending = Pending::default();
        save(&mut pending, changes);
        pending
    }

    fn save(pending: &mut Pending, changes: impl IntoIterator<Item = Change>) {
        changes.into_iter().for_each(|change| pending.save(change, Instant::now()));
    }

    fn seen(batch: &Batch) -> Vec<(u64, bool)> {
        let rows = batch.iter().filter_map(|write| match write {
            Write::PutWorker { record, whole } => Some((record.seen_unix_ms, *whole)),
            _ => None,
        });
        rows.collect()
    }

    #[test]
    fn the_last_of_many_heartbeats_is_written_once() {
        let mut pending = pending((0..100).map(|ms| put_worker(1, ms)));
        assert_eq!(seen(&pending.take(ALL, true)), [(99, true)]);
        assert!(pending.is_settled());
    }

    #[test]
    fn what_came_and_went_between_two_writes_is_never_written() {
        let mut pending = pending([put_task(1, false), Change::DropTask(task(1).spec.task)]);
        assert!(pending.take(ALL, true).is_empty());
        assert_eq!(pending.behind_since(), None);
        assert_eq!(pending.entries.len(), 0);
    }

    #[test]
    fn what_was_written_is_dropped_in_the_store_too() {
        let mut pending = pending([put_task(1, false)]);
        pending.take(ALL, true);
        save(&mut pending, [Change::DropTask(task(1).spec.task)]);
        assert_eq!(pending.take(ALL, true), [Write::DropTask(task(1).spec.task)]);
        assert_eq!(pending.entries.len(), 0, "nothing is left of it");
    }

    #[test]
    fn a_durable_task_does_not_wait_for_the_tick_and_takes_nothing_with_it() {
        let mut pending = pending([put_worker(1, 1), put_task(1, true), put_task(2, false)]);
        let batch = pending.take(ALL, false);
        assert!(
            matches!(&batch[..], [Write::PutTask { record, durable: true }] if record.spec.task == task(1).spec.task)
        );
        assert_eq!(pending.len(), 2);
    }

    #[test]
    fn after_a_failed_write_everything_comes_again_but_what_is_newer_wins() {
        let mut pending = pending([put_worker(1, 1), put_worker(2, 1), put_task(1, true)]);
        let batch = pending.take(ALL, true);
        save(&mut pending, [put_worker(1, 2), Change::DropTask(task(1).spec.task)]);
        pending.put_back(batch);
        let batch = pending.take(ALL, true);
        let mut rows = seen(&batch);
        rows.sort_unstable();
        assert_eq!(rows, [(1, true), (2, true)], "rows are whole again, the newer heartbeat won");
        assert!(batch.contains(&Write::DropTask(task(1).spec.task)), "a part of the failed write may be in the store");
    }

    #[test]
    fn a_drop_that_failed_is_not_forgotten() {
        let mut pending = pending([put_task(1, false)]);
        pending.take(ALL, true);
        save(&mut pending, [Change::DropTask(task(1).spec.task)]);
        let batch = pending.take(ALL, true);
        pending.put_back(batch);
        assert_eq!(pending.take(ALL, true), [Write::DropTask(task(1).spec.task)]);
    }

    #[test]
    fn an_emptied_store_gets_every_task_again_and_whole_rows_with_the_next_heartbeats() {
        let mut pending = pending([put_task(1, true), put_task(2, false), put_worker(1, 1)]);
        pending.take(ALL, true);
        save(&mut pending, [put_worker(1, 2)]);
        assert_eq!(seen(&pending.take(ALL, true)), [(2, false)], "the store has the rest of the row");
        pending.write_all_again();
        assert_eq!(pending.take(ALL, true).len(), 2);
        save(&mut pending, [put_worker(1, 3)]);
        assert_eq!(seen(&pending.take(ALL, true)), [(3, true)]);
    }

    #[test]
    fn a_store_away_for_long_costs_no_more_than_what_lives() {
        let mut pending = pending([]);
        for _ in 0..1_000 {
            save(&mut pending, (0..10).flat_map(|number| [put_worker(number, 1), put_task(number, number % 2 == 0)]));
            let batch = pending.take(ALL, true);
            pending.put_back(batch);
            save(&mut pending, (0..5).map(|number| Change::DropTask(task(number).spec.task)));
        }
        assert_eq!(pending.entries.len(), 20);
        assert!(pending.len() <= 20);
    }

    #[test]
    fn lag_is_counted_from_the_oldest_change_that_is_not_written() {
        let start = Instant::now();
        let mut pending = Pending::default();
        pending.save(put_task(1, false), start);
        pending.save(put_task(2, false), start + Duration::from_secs(1));
        assert_eq!(pending.behind_since(), Some(start));
        pending.take(1, true);
        pending.written(start + Duration::from_secs(2));
        assert_eq!(pending.behind_since(), Some(start + Duration::from_secs(2)));
        pending.take(1, true);
        pending.written(start + Duration::from_secs(3));
        assert_eq!(pending.behind_since(), None);
    }
}
