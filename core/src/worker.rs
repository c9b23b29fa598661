//! The worker's machine: what it admits, runs, reports and forgets.

mod api;

use crate::MonoTime;

pub use api::{Action, Config, Event, LinkId, Restored, Sample};

/// A worker.
#[derive(Debug)]
pub struct Worker {
    config: Config,
}

impl Worker {
    /// A worker that has not said a word yet.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// The one door.
    #[must_use]
    pub fn handle(&mut self, _now: MonoTime, _event: Event) -> Vec<Action> {
        Vec::new()
    }

    /// When to come back with [`Event::Deadline`] if nothing else happens.
    pub fn next_deadline(&self) -> Option<MonoTime> {
        None
    }
}
