//! The client's machine: it owns its tasks, asks until it has a worker, and follows one attempt at a time.

mod api;

use crate::MonoTime;

pub use api::{Action, Config, End, Event, News, TaskSpec};

/// A client with any number of tasks.
#[derive(Debug)]
pub struct Client {
    config: Config,
}

impl Client {
    /// A client without tasks.
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
