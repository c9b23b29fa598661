//! The table of the broker's tasks: which are unfinished, when each must be looked at, and when an ended one may be
//! forgotten.
//!
//! Owns the tasks and their ends. Never decides where a task goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Included},
    time::Duration,
};

use proto_msgs::{ClientId, Outcome, TaskId};

use super::{
    config::Config,
    task::{End, State, Task},
};
use crate::{Census, MonoTime, Rule, due::Due};

/// Ended tasks whose time is over within this time are forgotten together: one wake-up instead of hundreds.
const FORGOTTEN_TOGETHER: Duration = Duration::from_secs(1);

/// All tasks. The unfinished ones are ordered by their next look.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    // Boxed: a task has some hundred bytes, and the tree moves its entries. Unfinished tasks have their own map: they
    // are few, and nearly every look-up is for one of them.
    live: BTreeMap<TaskId, Box<Task>>,
    over: BTreeMap<TaskId, Box<Task>>,
    /// When each unfinished task must be looked at.
    due: Due<TaskId>,
    /// All tasks by owner: a client's question looks only at its own tasks.
    owners: BTreeSet<(ClientId, TaskId)>,
    /// When each ended task may be forgotten.
    ended: Due<TaskId>,
    /// When each ended task that a client may still come for may be forgotten. Other ends, however many, do not push it
    /// out.
    ended_for_later: Due<TaskId>,
}

impl Tasks {
    /// Number of unfinished tasks.
    pub(super) fn live(&self) -> usize {
        self.live.len()
    }

    /// Counts the tasks. At rest all are forgotten.
    pub(super) fn census(&self, config: &Config, census: &mut Census<'_>) {
        let Self { live, over, due, owners, ended, ended_for_later } = self;
        let ended_max = config.ended_max + config.ended_for_later_max;
        // As many new ones as old ones that their clients hold, and those that come back after a silence.
        census.passing("unfinished tasks", live.len(), 2 * config.tasks_max + ended_max);
        census.passing("ended tasks", over.len(), ended_max);
        census.passing("tasks by owner", owners.len(), live.len() + over.len());
        due.census("looks at tasks", live.len(), census);
        ended.census("ended tasks by time", config.ended_max.min(over.len()), census);
        ended_for_later.census("ended detached tasks by time", config.ended_for_later_max.min(over.len()), census);
        live.values().chain(over.values()).for_each(|task| task.census(census));
    }

    pub(super) fn get(&self, id: TaskId) -> Option<&Task> {
        self.live.get(&id).or_else(|| self.over.get(&id)).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: TaskId) -> Option<&mut Task> {
        self.live.get_mut(&id).or_else(|| self.over.get_mut(&id)).map(Box::as_mut)
    }

    /// The client's tasks before the given one, newest first.
    pub(super) fn before(&self, client: ClientId, id: Option<TaskId>) -> impl Iterator<Item = &Task> {
        const FIRST: TaskId = TaskId::from_bytes([0; 16]);
        const LAST: TaskId = TaskId::from_bytes([0xff; 16]);
        let end = id.map_or(Included((client, LAST)), |id| Excluded((client, id)));
        self.owners.range((Included((client, FIRST)), end)).rev().filter_map(|(_, id)| self.get(*id))
    }

    /// The tasks that wait for the store.
    pub(super) fn storing(&self) -> Vec<TaskId> {
        let storing = self.live.values().filter(|task| task.state == State::Storing);
        storing.map(|task| task.id()).collect()
    }

    /// Adds a task. `due` is its next look or, if it has ended, when it may be forgotten.
    pub(super) fn insert(&mut self, task: Task, due: MonoTime) {
        let (id, task) = (task.id(), Box::new(task));
        self.owners.insert((task.spec.client, id));
        if task.is_ended() {
            self.ends(&task).set(id, due);
            self.over.insert(id, task);
        } else {
            self.due.set(id, due);
            self.live.insert(id, task);
        }
    }

    /// The schedule that forgets this ended task.
    fn ends(&mut self, task: &Task) -> &mut Due<TaskId> {
        if task.outlives_client() { &mut self.ended_for_later } else { &mut self.ended }
    }

    /// Sets a task's next look.
    pub(super) fn set_due(&mut self, id: TaskId, due: MonoTime) {
        if self.live.contains_key(&id) {
            self.due.set(id, due);
        }
    }

    /// Sets a task's next look unless an earlier one is set.
    pub(super) fn due_by(&mut self, id: TaskId, due: MonoTime) {
        if self.live.contains_key(&id) {
            self.due.by(id, due);
        }
    }

    /// Time of the next look at any task.
    pub(super) fn first_due(&self) -> Option<MonoTime> {
        self.due.first()
    }

    /// Takes a task that is due; the caller sets its next look.
    pub(super) fn pop_due(&mut self, now: MonoTime) -> Option<TaskId> {
        self.due.pop(now)
    }

    /// Ends a task; it is remembered until `until`.
    pub(super) fn end(&mut self, id: TaskId, outcome: Outcome, ended_unix_ms: u64, until: MonoTime) {
        if let Some(mut task) = self.live.remove(&id) {
            self.due.remove(id);
            task.state = State::Ended(End::new(outcome, ended_unix_ms));
            self.ends(&task).set(id, until);
            self.over.insert(id, task);
        }
    }

    /// Makes an ended task unfinished again: it is about to wait.
    pub(super) fn revive(&mut self, now: MonoTime, id: TaskId) {
        if let Some(mut task) = self.over.remove(&id) {
            self.ends(&task).remove(id);
            (task.state, task.track.finished) = (State::Storing, None);
            // A task that never went to a worker has given its share back: it begins anew, behind its client's others.
            task.rank = task.rank.filter(|_| task.is_dispatched);
            self.due.set(id, now);
            self.live.insert(id, task);
        }
    }

    /// Removes one ended task whose time is over, or the oldest one of too many.
    pub(super) fn forget_one(&mut self, now: MonoTime, config: &Config) -> Option<Box<Task>> {
        let ends = [(&mut self.ended, config.ended_max), (&mut self.ended_for_later, config.ended_for_later_max)];
        let id =
            ends.into_iter().find_map(|(ends, max)| if ends.len() > max { ends.pop_first() } else { ends.pop(now) })?;
        let task = self.over.remove(&id)?;
        if config.rules.holds(Rule::ForgetEverywhere) {
            self.owners.remove(&(task.spec.client, id));
        }
        Some(task)
    }

    /// When to forget the next ended tasks: a little late, so that many go at once.
    pub(super) fn first_forgotten(&self) -> Option<MonoTime> {
        let firsts = [self.ended.first(), self.ended_for_later.first()];
        firsts.into_iter().flatten().min().map(|first| first + FORGOTTEN_TOGETHER)
    }
}
