//! The broker's machine: who is alive, who has room, who runs what.

mod api;

use crate::MonoTime;

pub use api::{Action, Change, Config, Event, Stats, TaskRecord, WorkerRecord};

/// The broker.
#[derive(Debug)]
pub struct Broker {
    config: Config,
}

impl Broker {
    /// A broker that knows nobody yet.
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

    /// Numbers for the metrics page.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }
}
