//! The mesh in one thread: virtual time, one heap of future happenings, and the real machines of all three roles.
//!
//! Owns time and order. The shells of the nodes are in `broker_shell`, `worker_shell` and `client_shell`, the network
//! between them is in `net`, and the laws that must always hold are in `referee`.

use std::{cmp::Ordering, collections::BinaryHeap, fmt, time::Duration};

use mesh_core::{
    MonoTime, Rules,
    broker::{Footing, Policy},
    worker::BatchId,
};
use proto_msgs::{AttemptId, BrokerToClient, BrokerToWorker, ClientId, Outcome, PublicKey, RunNote, TaskId, ToBroker};

use super::{
    batches::BatchStep,
    broker_shell::BrokerShell,
    client_shell::ClientShell,
    expect::Expect,
    faults::Fault,
    job::Job,
    net::{Cargo, Link, Net},
    referee::{Referee, Violation},
    rng::Rng,
    story::{Story, tell},
    streams::Stream,
    worker_shell::WorkerShell,
};

/// Microseconds since the simulation began.
pub(crate) type Micros = u64;

pub(crate) const SECOND: Micros = 1_000_000;
pub(crate) const MS: Micros = 1_000;

/// The wall clock when a simulation begins, milliseconds since 1970.
pub(super) const BEGIN_UNIX_MS: u64 = 1_700_000_000_000;

pub(crate) const fn micros(duration: Duration) -> Micros {
    duration.as_micros() as Micros
}

/// A process. A worker is a machine with many lives; a client is one process and dies once.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Node {
    Broker,
    Worker(usize),
    Client(usize),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broker => f.write_str("B"),
            Self::Worker(worker) => write!(f, "W{worker}"),
            Self::Client(client) => write!(f, "C{client}"),
        }
    }
}

/// A future happening. If it belongs to one life of a process, it names that life and has no effect in the next one.
#[derive(Debug)]
pub(super) enum Happening {
    /// A machine's own deadline.
    Wake { node: Node, life: u32 },
    /// A control message arrives at the broker, over this connection of its sender.
    AtBroker { from: Node, conn: u8, broker_life: u32, message: ToBroker },
    /// A control message arrives at a worker.
    AtWorker { worker: usize, conn: u8, message: BrokerToWorker },
    /// A control message arrives at a client.
    AtClient { client: usize, conn: u8, message: BrokerToClient },
    /// Cargo arrives on a direct link, unless the link was cut meanwhile.
    Direct { link: usize, cuts: u32, to_worker: bool, cargo: Cargo },
    /// A silently broken link comes back.
    Relink { link: usize },
    /// A client's attempt to connect ends.
    Dialled { client: usize, id: AttemptId, try_no: u32, resume: bool },
    /// A client's attempt to connect is given up.
    DialFailed { client: usize, id: AttemptId, try_no: u32 },
    /// A worker's attempt to reach a client ends.
    WorkerDialled { worker: usize, life: u32, id: AttemptId, client: Option<usize> },
    /// Bytes arrive, or a piece of a result goes out. `turn` names the order that it belongs to.
    Session { worker: usize, life: u32, id: AttemptId, turn: u32, step: Step },
    /// A batch comes further.
    Batch { worker: usize, life: u32, batch: BatchId, step: BatchStep },
    /// The end of a detached attempt is on its worker's disk.
    Kept { worker: usize, life: u32, id: AttemptId, outcome: Outcome, runs: Vec<RunNote> },
    /// A user of a stream has the next task.
    Arrive { stream: usize },
    /// A worker is measured.
    Sample { worker: usize, life: u32 },
    /// The store takes its next order.
    Flush { life: u32 },
    /// The store reports that it has the task.
    Stored { life: u32, task: TaskId, footing: Footing },
    /// The broker hears whether the store is reachable.
    StoreNews { life: u32, away: bool },
    /// A file vanishes while a client uses it.
    FileVanished { client: usize, id: AttemptId },
    /// A process starts.
    Start(Node),
    /// The seed's plan acts.
    Fault(Fault),
}

/// A step of an attempt at its worker.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Transfer { bytes: u64 },
    Piece { left: Micros },
}

struct Entry {
    at: Micros,
    order: u64,
    happening: Happening,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

/// A user, who may have several client processes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User {
    pub(crate) id: ClientId,
    pub(crate) key: Option<PublicKey>,
}

/// When a process is woken by its own machine, and until when it is frozen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pulse {
    pub(super) wake_at: Option<Micros>,
    pub(super) frozen_until: Micros,
    pub(super) started: Micros,
}

impl Pulse {
    /// The time by the process's own clock.
    pub(super) fn clock(&self, now: Micros) -> MonoTime {
        MonoTime::from_micros(now - self.started)
    }
}

/// Settings of a run that no verb changes.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) rules: Rules,
    pub(crate) encrypted: bool,
    /// Every message is encoded and decoded on its way.
    pub(crate) through_bytes: bool,
    pub(crate) store_wait: (Micros, Micros),
    /// How long a result takes to its worker's disk: a small one, and a large one while the disk is busy.
    pub(crate) disk_wait: (Micros, Micros),
    pub(crate) policy: Policy,
    /// Time to load a model that is not warm.
    pub(crate) load: Micros,
    /// How long the broker waits for a worker that was given a detached task.
    pub(crate) patience: Duration,
    /// How long ended tasks are shown and detached results kept.
    pub(crate) kept: Duration,
    /// One in so many comparisons takes its runner with it.
    pub(crate) deadly_comparisons: Option<u64>,
}

impl Setup {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            rules: Rules::default(),
            encrypted: false,
            through_bytes: true,
            store_wait: (2 * MS, 30 * MS),
            disk_wait: (MS, SECOND / 2),
            policy: Policy::default(),
            load: 20 * MS,
            patience: Duration::from_secs(20),
            kept: Duration::from_secs(120),
            deadly_comparisons: None,
        }
    }
}

/// The simulated mesh.
pub(crate) struct Mesh {
    pub(crate) now: Micros,
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) net: Net,
    pub(super) broker: BrokerShell,
    pub(super) workers: Vec<WorkerShell>,
    pub(super) clients: Vec<ClientShell>,
    pub(super) users: Vec<User>,
    pub(super) links: Vec<Link>,
    pub(crate) referee: Referee,
    pub(crate) story: Story,
    pub(crate) streams: Vec<Stream>,
    queue: BinaryHeap<Entry>,
    pushed: u64,
    /// Events handled.
    pub(crate) steps: u64,
}

impl Mesh {
    pub(crate) fn new(setup: Setup, story: Story) -> Self {
        let mut mesh = Self {
            now: 0,
            rng: Rng::new(setup.seed),
            net: Net::calm(),
            broker: BrokerShell::default(),
            workers: Vec::new(),
            clients: Vec::new(),
            users: Vec::new(),
            links: Vec::new(),
            referee: Referee::default(),
            story,
            streams: Vec::new(),
            queue: BinaryHeap::new(),
            pushed: 0,
            steps: 0,
            setup,
        };
        mesh.start_broker();
        mesh
    }

    // Time.

    pub(super) fn at(&mut self, at: Micros, happening: Happening) {
        self.pushed += 1;
        self.queue.push(Entry { at: at.max(self.now), order: self.pushed, happening });
    }

    pub(super) fn after(&mut self, wait: Micros, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    /// Plays on for this long, or until something is wrong.
    pub(crate) fn run_for(&mut self, duration: Duration) {
        let end = self.now + micros(duration);
        while self.step(end) {}
        if self.violation().is_none() {
            self.now = end;
        }
    }

    /// Plays on until `done`, at most this long. Returns whether `done` came true.
    pub(crate) fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now + micros(limit);
        while !done(self) {
            if !self.step(end) {
                return false;
            }
        }
        true
    }

    pub(crate) fn violation(&self) -> Option<&Violation> {
        self.referee.violation.as_ref()
    }

    /// Lets one thing happen, if it comes before `end` and there is no violation.
    fn step(&mut self, end: Micros) -> bool {
        if self.referee.violation.is_some() || self.queue.peek().is_none_or(|entry| entry.at > end) {
            return false;
        }
        let Some(entry) = self.queue.pop() else { return false };
        self.now = entry.at;
        self.steps += 1;
        self.happen(entry.happening);
        true
    }

    fn happen(&mut self, happening: Happening) {
        if let Some(node) = addressee(&happening)
            && let Some(until) = self.frozen_until(node)
        {
            return self.at(until, happening);
        }
        match happening {
            Happening::Wake { node, life } => self.wake(node, life),
            Happening::AtBroker { from, conn, broker_life, message } => {
                self.at_broker(from, conn, broker_life, message);
            }
            Happening::AtWorker { worker, conn, message } => self.at_worker(worker, conn, message),
            Happening::AtClient { client, conn, message } => self.at_client(client, conn, message),
            Happening::Direct { link, cuts, to_worker, cargo } => self.at_direct(link, cuts, to_worker, cargo),
            Happening::Relink { link } => self.relink(link),
            Happening::Dialled { client, id, try_no, resume } => self.dialled(client, id, try_no, resume),
            Happening::DialFailed { client, id, try_no } => self.dial_failed(client, id, try_no),
            Happening::WorkerDialled { worker, life, id, client } => self.worker_dialled(worker, life, id, client),
            Happening::Session { worker, life, id, turn, step } => self.session_step(worker, life, id, turn, step),
            Happening::Batch { worker, life, batch, step } => self.batch_step(worker, life, batch, step),
            Happening::Kept { worker, life, id, outcome, runs } => self.kept(worker, life, id, outcome, runs),
            Happening::Arrive { stream } => self.arrive(stream),
            Happening::Sample { worker, life } => self.sample(worker, life),
            Happening::Flush { life } => self.flush(life),
            Happening::Stored { life, task, footing } => self.stored(life, task, footing),
            Happening::StoreNews { life, away } => self.store_news(life, away),
            Happening::FileVanished { client, id } => self.file_vanished(client, id),
            Happening::Start(node) => self.restart(node),
            Happening::Fault(fault) => self.strike(fault),
        }
    }

    fn frozen_until(&self, node: Node) -> Option<Micros> {
        let until = self.pulse(node).frozen_until;
        (until > self.now).then_some(until)
    }

    // Machines' own deadlines.

    pub(super) fn pulse(&self, node: Node) -> &Pulse {
        match node {
            Node::Broker => &self.broker.pulse,
            Node::Worker(worker) => &self.workers[worker].pulse,
            Node::Client(client) => &self.clients[client].pulse,
        }
    }

    pub(super) fn pulse_mut(&mut self, node: Node) -> &mut Pulse {
        match node {
            Node::Broker => &mut self.broker.pulse,
            Node::Worker(worker) => &mut self.workers[worker].pulse,
            Node::Client(client) => &mut self.clients[client].pulse,
        }
    }

    fn life(&self, node: Node) -> Option<u32> {
        match node {
            Node::Broker => self.broker.machine.is_some().then_some(self.broker.life),
            Node::Worker(worker) => self.workers[worker].machine.is_some().then_some(self.workers[worker].life),
            Node::Client(client) => self.clients[client].machine.is_some().then_some(0),
        }
    }

    pub(super) fn deadline(&self, node: Node) -> Option<Micros> {
        let deadline = match node {
            Node::Broker => self.broker.machine.as_ref()?.next_deadline()?,
            Node::Worker(worker) => self.workers[worker].machine.as_ref()?.next_deadline()?,
            Node::Client(client) => self.clients[client].machine.as_ref()?.next_deadline()?,
        };
        Some(self.pulse(node).started.saturating_add(deadline.as_micros()))
    }

    /// Plans the wake-up that the machine asks for.
    pub(super) fn set_wake(&mut self, node: Node) {
        let (Some(life), Some(deadline)) = (self.life(node), self.deadline(node)) else { return };
        let at = deadline.max(self.now);
        if self.pulse(node).wake_at.is_none_or(|planned| planned > at) {
            self.pulse_mut(node).wake_at = Some(at);
            self.at(at, Happening::Wake { node, life });
        }
    }

    fn wake(&mut self, node: Node, life: u32) {
        if self.life(node) != Some(life) {
            return;
        }
        if self.pulse(node).wake_at.is_some_and(|planned| planned > self.now) {
            return; // An earlier plan that was overtaken.
        }
        self.pulse_mut(node).wake_at = None;
        if self.deadline(node).is_some_and(|deadline| deadline <= self.now) {
            self.referee.woken(node, self.now);
            match node {
                Node::Broker => self.broker_handle(mesh_core::broker::Event::Deadline),
                Node::Worker(worker) => self.worker_handle(worker, mesh_core::worker::Event::Deadline),
                Node::Client(client) => self.client_handle(client, mesh_core::client::Event::Deadline),
            }
            if self.deadline(node).is_some_and(|deadline| deadline <= self.now) {
                self.referee.fail("no busy loop", format!("{node} wants to be woken at once, after being woken"));
            }
        }
        self.set_wake(node);
    }

    // The stage.

    /// Adds a user. All processes of a user share the identity.
    pub(crate) fn add_user(&mut self) -> usize {
        let user = self.users.len();
        let byte = user as u8 + 1;
        let key = self.setup.encrypted.then_some(PublicKey([byte; 32]));
        self.users.push(User { id: ClientId::from_bytes([byte; 16]), key });
        user
    }

    /// Submits a task from this process.
    pub(crate) fn submit(&mut self, client: Node, job: Job) -> TaskId {
        self.submit_in(client, job, None)
    }

    /// Submits a task that is part of a stream.
    pub(super) fn submit_in(&mut self, client: Node, job: Job, stream: Option<usize>) -> TaskId {
        let Node::Client(client) = client else { panic!("only clients submit") };
        let user = self.clients[client].user;
        let task = self.referee.new_task(self.now, self.users[user].id, client, job.clone());
        self.referee.task_mut(task).stream = stream;
        tell!(self, "C{client} submits {} {job:?}", short(task));
        let spec = Box::new(job.spec(task, &self.users[user]));
        self.client_handle(client, mesh_core::client::Event::Submit(spec));
        task
    }

    /// A view of a task for questions about it.
    pub(crate) fn expect(&self, task: TaskId) -> Expect<'_> {
        Expect { mesh: self, task }
    }
}

/// The process whose time a happening takes: while it is frozen, the happening waits.
fn addressee(happening: &Happening) -> Option<Node> {
    Some(match happening {
        Happening::Wake { node, .. } => *node,
        Happening::AtBroker { .. } | Happening::Stored { .. } | Happening::StoreNews { .. } => Node::Broker,
        Happening::AtWorker { worker, .. }
        | Happening::Session { worker, .. }
        | Happening::Batch { worker, .. }
        | Happening::Kept { worker, .. }
        | Happening::Sample { worker, .. }
        | Happening::WorkerDialled { worker, .. } => Node::Worker(*worker),
        Happening::AtClient { client, .. }
        | Happening::Dialled { client, .. }
        | Happening::DialFailed { client, .. }
        | Happening::FileVanished { client, .. } => Node::Client(*client),
        // A link knows its two ends by itself.
        Happening::Direct { .. } | Happening::Relink { .. } => return None,
        Happening::Flush { .. } | Happening::Start(_) | Happening::Fault(_) | Happening::Arrive { .. } => return None,
    })
}

/// A task's name in the story.
pub(super) fn short(task: TaskId) -> String {
    format!("T{}", super::referee::number(task))
}

/// An attempt's name in the story.
pub(super) fn short_id(id: AttemptId) -> String {
    format!("T{}.{}", super::referee::number(id.task), id.attempt)
}
