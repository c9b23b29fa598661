//! The broker's state machine: which workers live, which have free slots, and which attempts they run.
//!
//! Owns the Metric Table, the tasks and the queue. Never: payload, files, sockets, the store.
//!
//! A client owns its attached tasks. It repeats their standing in every message and the broker believes it, so the
//! broker may forget everything. A detached task has no such owner: it exists from the moment the store has it.

mod answers;
mod api;
mod census;
mod clients;
mod config;
mod fill;
mod grants;
mod heartbeats;
mod life;
mod outcomes;
mod outgrown;
mod placement;
mod preloads;
mod queue;
mod refusals;
mod slo;
mod stats;
#[cfg(test)]
mod stories;
mod task;
mod tasks;
mod workers;

use proto_msgs::{BrokerToClient, BrokerToWorker, PeerId, WorkerId};

pub use api::{Action, Change, Event, Footing, TaskRecord, WorkerRecord};
pub use config::{Config, Policy, Tenant, Weights};
pub use stats::{Counters, Gauges};

use crate::{Clock, MonoTime, due::Due};
use outcomes::Errors;
use outgrown::Outgrown;
use placement::savings::Savings;
use preloads::Preloads;
use queue::{Queue, pace::Pace};
use refusals::TurnedAway;
use slo::Slos;
use tasks::Tasks;
use workers::{Workers, twins::Twins};

/// The broker.
#[derive(Debug)]
pub struct Broker {
    config: Config,
    workers: Workers,
    /// When to check whether a worker is still alive.
    worker_looks: Due<WorkerId>,
    twins: Twins,
    tasks: Tasks,
    queue: Queue,
    /// How fast the waiting tasks of each lane go to workers.
    paces: [Pace; 2],
    slos: Slos,
    turned_away: TurnedAway,
    /// Errors of earlier predictions.
    errors: Errors,
    preloads: Preloads,
    savings: Savings,
    outgrown: Outgrown,
    /// The worker that was granted the last task.
    last_chosen: Option<WorkerId>,
    clock: Clock,
    /// Time of the last event, on the broker's own clock.
    last_handled: MonoTime,
    store_ok: bool,
    counters: Counters,
    actions: Vec<Action>,
}

impl Broker {
    /// A broker without workers and tasks.
    pub fn new(config: Config) -> Self {
        Self {
            workers: Workers::new(config.rules),
            worker_looks: Due::default(),
            twins: Twins::default(),
            tasks: Tasks::default(),
            queue: Queue::new(config.weights_in_force(), config.ages_in_turn()),
            paces: Default::default(),
            slos: Slos::new(config.rules),
            turned_away: TurnedAway::default(),
            clock: Clock::new(config.rules),
            config,
            preloads: Preloads::default(),
            savings: Savings::default(),
            outgrown: Outgrown::default(),
            errors: Errors::default(),
            last_chosen: None,
            last_handled: MonoTime::ZERO,
            store_ok: true,
            counters: Counters::default(),
            actions: Vec::new(),
        }
    }

    /// Handles one event and returns what the caller must do: the only way to change the broker.
    #[must_use]
    pub fn handle(&mut self, now: MonoTime, event: Event) -> Vec<Action> {
        let due = self.clock.is_late(now).then(|| self.next_deadline()).flatten();
        let (now, has_stood) = self.clock.turn(now, due);
        self.counters.pauses += u64::from(has_stood);
        self.last_handled = self.last_handled.max(now);
        self.weigh_again(now);
        match event {
            Event::ClientSaid { peer, key, message } => self.client_said(now, peer, key, message),
            Event::WorkerSaid { peer, key, message } => self.worker_said(now, peer, key, message),
            Event::Restored(records) => self.restored(now, records),
            Event::Stored { task, footing } => self.stored(now, task, footing),
            Event::StoreAway => self.store_away(now),
            Event::StoreBack => self.store_ok = true,
            Event::Deadline => {}
        }
        self.look_at_due(now);
        self.take_turns(now);
        std::mem::take(&mut self.actions)
    }

    /// When the caller must pass [`Event::Deadline`] if no other event comes first.
    pub fn next_deadline(&self) -> Option<MonoTime> {
        let worker = self.worker_looks.first();
        let task = self.tasks.first_due();
        let first = [worker, task, self.tasks.first_forgotten()].into_iter().flatten().min();
        first.map(|at| self.clock.outside(at))
    }

    fn unix_ms(&self, now: MonoTime) -> u64 {
        self.config.origin_unix_ms + self.clock.outside(now).as_millis()
    }

    fn tell_client(&mut self, peer: Option<PeerId>, message: BrokerToClient) {
        if let Some(peer) = peer {
            self.actions.push(Action::TellClient { peer, message });
        }
    }

    fn tell_worker(&mut self, id: WorkerId, message: BrokerToWorker) {
        if let Some(worker) = self.workers.get(id) {
            self.actions.push(Action::TellWorker { peer: worker.peer, message });
        }
    }

    // Time.

    fn look_at_due(&mut self, now: MonoTime) {
        while let Some(id) = self.worker_looks.pop(now) {
            self.look_at_worker(now, id);
        }
        while let Some(id) = self.tasks.pop_due(now) {
            self.look_at_task(now, id);
        }
        while let Some(task) = self.tasks.forget_one(now, &self.config) {
            if task.has_row() {
                self.actions.push(Action::Save(Change::DropTask(task.id())));
            }
        }
    }
}
