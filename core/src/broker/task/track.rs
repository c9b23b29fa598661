//! A task's attempts: which one counts, where it went, and what became of it.

use std::time::Duration;

use proto_msgs::{Attempt, Epoch, Outcome, WorkerId};

use crate::{Census, MonoTime};

/// Longest line of a task's history, bytes.
const HISTORY_LINE_BYTES_MAX: usize = 512;

/// Most lines of a task's history.
const HISTORY_MAX: usize = 16;

/// The attempts of a task.
#[derive(Debug, Default)]
pub(crate) struct Track {
    /// Placements so far.
    pub(crate) attempt: Attempt,
    /// The first attempt that may count: earlier ones are dead, whatever a worker says.
    fence: Attempt,
    /// An earlier broker may have placed the task: reports of attempts from workers and client may be news.
    pub(crate) is_from_before: bool,
    /// The last placement.
    pub(crate) last: Option<Last>,
    /// The current attempt's outcome as reported by its worker. The client of an attached task has the last word, and so
    /// has that of a detached one whom the worker missed.
    pub(crate) finished: Option<Outcome>,
    /// Since when the attempt's worker is absent: since its loss, or since the broker's restart.
    pub(crate) away_since: Option<MonoTime>,
    /// What happened to the attempts, as lines for people.
    pub(crate) history: Vec<String>,
}

/// The worker of a task's last placement.
#[derive(Debug)]
pub(crate) struct Last {
    pub(crate) worker: WorkerId,
    pub(crate) epoch: Epoch,
    pub(crate) name: String,
}

impl Track {
    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { attempt: _, fence: _, is_from_before: _, last: _, finished: _, away_since: _, history } = self;
        census.passing("lines of a task's history", history.len(), HISTORY_MAX);
        let longest = history.iter().map(String::len).max().unwrap_or(0);
        census.passing("bytes of a line of a task's history", longest, HISTORY_LINE_BYTES_MAX);
    }

    pub(crate) fn last_worker(&self) -> Option<WorkerId> {
        self.last.as_ref().map(|last| last.worker)
    }

    /// Whether this worker was the last to get the task, with this attempt, be it by this broker or an earlier one.
    pub(crate) fn was_given_to(&self, worker: WorkerId, attempt: Attempt) -> bool {
        attempt == self.attempt && self.last_worker() == Some(worker)
    }

    /// Whether a later attempt has replaced this one, or its loss is known.
    pub(crate) fn is_past(&self, attempt: Attempt) -> bool {
        attempt < self.attempt.max(self.fence)
    }

    /// Whether the client has said that the current attempt is lost.
    pub(super) fn is_taken_back(&self) -> bool {
        self.attempt < self.fence
    }

    /// The task is granted to a worker: a new attempt begins.
    pub(crate) fn begin(&mut self, last: Last) {
        self.attempt = self.attempt.next().max(self.fence);
        self.last = Some(last);
        (self.finished, self.away_since) = (None, None);
    }

    /// The client says that this attempt is lost.
    pub(crate) fn lose(&mut self, attempt: Attempt) {
        self.attempt = attempt;
        self.fence = attempt.next();
        self.finished = None;
    }

    /// The task went to its worker as a trial, after the worker was without such a task for this long.
    pub(crate) fn remember_trial(&mut self, after: Duration) {
        let name = self.last.as_ref().map_or("", |last| &last.name);
        let (attempt, after_s) = (self.attempt, after.as_secs());
        self.remember(format!(
            "attempt {attempt} at {name} is a trial: it had no such task for {after_s} s, and may be better by now than \
             it seems"
        ));
    }

    /// Adds a line to the history.
    pub(crate) fn remember(&mut self, mut line: String) {
        line.truncate(line.floor_char_boundary(HISTORY_LINE_BYTES_MAX));
        self.history.push(line);
        if self.history.len() > HISTORY_MAX {
            self.history.remove(0);
        }
    }
}
