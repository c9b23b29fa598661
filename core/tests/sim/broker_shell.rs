//! The broker's process and its store, as thin and forgetful as the real ones.

use std::collections::BTreeMap;

use mesh_core::broker::{Action, Broker, Change, Config, Event, Footing, Policy, TaskRecord};
use proto_msgs::{PeerId, TaskId, ToBroker, WorkerId};

use super::{
    mesh::{BEGIN_UNIX_MS, Happening, MS, Mesh, Node, Pulse, SECOND, micros},
    story::{brief_from_client, brief_from_worker, brief_to_client, brief_to_worker, tell},
};

/// The broker's process.
#[derive(Debug, Default)]
pub(super) struct BrokerShell {
    pub(super) machine: Option<Broker>,
    pub(super) life: u32,
    pub(super) pulse: Pulse,
    pub(super) store: Store,
}

/// What survives the broker, and orders on their way to the store, which do not.
#[derive(Debug, Default)]
pub(super) struct Store {
    pub(super) tasks: BTreeMap<TaskId, TaskRecord>,
    pub(super) workers: BTreeMap<WorkerId, u16>,
    pending: Vec<Change>,
    is_flushing: bool,
    pub(super) is_away: bool,
}

impl Mesh {
    pub(super) fn start_broker(&mut self) {
        if self.broker.machine.is_some() {
            return;
        }
        if self.broker.store.is_away {
            // A broker that cannot read its store must not start: it would have forgotten its promises.
            return self.after(SECOND, Happening::Start(Node::Broker));
        }
        self.broker.life += 1;
        self.broker.pulse = Pulse { started: self.now, ..Pulse::default() };
        let config = Config {
            origin_unix_ms: BEGIN_UNIX_MS + self.now / MS,
            encrypted: self.setup.encrypted,
            ended_kept: self.setup.kept,
            detached_patience: self.setup.patience,
            policy: self.setup.policy,
            rules: self.setup.rules,
            ..Config::default()
        };
        self.broker.machine = Some(Broker::new(config));
        self.referee.broker_started(self.now, self.broker.life);
        tell!(self, "B starts, life {}", self.broker.life);
        let records: Vec<TaskRecord> = self.broker.store.tasks.values().cloned().collect();
        if !records.is_empty() {
            self.broker_handle(Event::Restored(records));
        }
    }

    /// Restarts the broker before any node has come, with another way of choosing places.
    pub(crate) fn restart_with_policy(&mut self, policy: Policy) {
        self.setup.policy = policy;
        self.crash_broker();
        self.start_broker();
    }

    pub(super) fn crash_broker(&mut self) {
        if self.broker.machine.take().is_some() {
            tell!(self, "B dies");
            self.broker.store.pending.clear();
            self.broker.store.is_flushing = false;
            self.broker.pulse = Pulse::default();
        }
    }

    pub(super) fn broker_hears(&mut self, from: Node, peer: PeerId, message: ToBroker) {
        let by = if let Node::Client(client) = from { Some(self.users[self.clients[client].user].id) } else { None };
        self.referee.broker_hears(self.now, by, &message);
        let event = match message {
            ToBroker::Client(message) => {
                tell!(self, "{from} > B {}", brief_from_client(&message));
                let Node::Client(client) = from else { return };
                let user = self.users[self.clients[client].user];
                if self.referee.is_squatting(user.id, &message) {
                    return; // Ids are as good as secret until their owner has used them.
                }
                self.referee.broker_hears_client(&message);
                let key = user.key;
                Event::ClientSaid { peer, key, message }
            }
            ToBroker::Worker(message) => {
                tell!(self, "{from} > B {}", brief_from_worker(&message));
                self.referee.broker_hears_worker(&message);
                let Node::Worker(worker) = from else { return };
                let key = self.workers[worker].key;
                Event::WorkerSaid { peer, key, message }
            }
        };
        self.broker_handle(event);
    }

    pub(super) fn broker_handle(&mut self, event: Event) {
        let now = self.broker.pulse.clock(self.now);
        let Some(machine) = &mut self.broker.machine else { return };
        let actions = machine.handle(now, event);
        self.referee.ears.called(self.now);
        for action in actions {
            self.broker_acts(action);
        }
        self.count_tables(Node::Broker);
        self.set_wake(Node::Broker);
    }

    fn broker_acts(&mut self, action: Action) {
        match action {
            Action::TellClient { peer, message } => {
                if let Some((Node::Client(client), _)) = self.node_of(peer) {
                    tell!(self, "B > C{client} {}", brief_to_client(&message));
                    let user = self.users[self.clients[client].user].id;
                    self.referee.broker_tells_client(self.now, user, &message, &self.broker.store.tasks);
                    self.referee.broker_ends(self.now, &message);
                }
                self.send_to_client(peer, message);
            }
            Action::TellWorker { peer, message } => {
                if let Some((node, _)) = self.node_of(peer) {
                    tell!(self, "B > {node} {}", brief_to_worker(&message));
                }
                self.send_to_worker(peer, message);
            }
            Action::Save(change) => {
                self.referee.broker_saves(&change);
                self.broker_drops(&change);
                self.broker.store.pending.push(change);
                self.flush_soon();
            }
        }
    }

    fn broker_drops(&mut self, change: &Change) {
        let Change::DropWorker(id) = change else { return };
        if let Some(worker) = self.workers.iter().find(|worker| worker.id == *id) {
            self.referee.broker_drops(self.now, *id, micros(worker.place.heartbeat));
        }
    }

    // The store.

    fn flush_soon(&mut self) {
        let store = &mut self.broker.store;
        if store.is_flushing || store.is_away || store.pending.is_empty() {
            return;
        }
        store.is_flushing = true;
        let (shortest, longest) = self.setup.store_wait;
        let (wait, life) = (self.rng.among(shortest..longest), self.broker.life);
        self.after(wait, Happening::Flush { life });
    }

    pub(super) fn flush(&mut self, life: u32) {
        let store = &mut self.broker.store;
        if self.broker.life != life || self.broker.machine.is_none() || !store.is_flushing {
            return;
        }
        store.is_flushing = false;
        if store.is_away {
            return;
        }
        let mut durable_ones = Vec::new();
        for change in std::mem::take(&mut store.pending) {
            match change {
                Change::PutWorker(record) => {
                    store.workers.insert(record.register.worker, record.tasks.iter().sum());
                }
                Change::DropWorker(worker) => {
                    store.workers.remove(&worker);
                }
                Change::PutTask { record, durable } => {
                    durable_ones.extend(durable.then_some((record.spec.task, record.footing())));
                    store.tasks.insert(record.spec.task, *record);
                }
                Change::DropTask(task) => {
                    store.tasks.remove(&task);
                }
            }
        }
        for (task, footing) in durable_ones {
            // The broker may die after the store has the task and before it hears of it.
            self.after(MS, Happening::Stored { life, task, footing });
        }
    }

    pub(super) fn stored(&mut self, life: u32, task: TaskId, footing: Footing) {
        if self.broker.life == life && self.broker.machine.is_some() {
            self.broker_handle(Event::Stored { task, footing });
        }
    }

    /// Takes the store away; the broker notices a little later.
    pub(crate) fn store_away(&mut self, away: bool) {
        tell!(self, "the store is {}", if away { "away" } else { "back" });
        self.broker.store.is_away = away;
        let life = self.broker.life;
        self.after(300 * MS, Happening::StoreNews { life, away });
        self.flush_soon();
    }

    pub(super) fn store_news(&mut self, life: u32, away: bool) {
        if self.broker.life == life && self.broker.machine.is_some() {
            self.broker_handle(if away { Event::StoreAway } else { Event::StoreBack });
        }
    }
}
