//! Faults of the mesh: the verbs of stories and seeds, and the meaning of "all is well again".

use std::time::Duration;

use mesh_core::worker::Event as WorkerEvent;
use proto_msgs::{
    Ask, CancelTask, ClientToBroker, Close, Locate, Outcome, Question, Standing, Submit, TaskId, TaskSpec,
};

use super::{
    job::Job,
    mesh::{Mesh, Micros, Node, SECOND, User, micros, short, short_id},
    net::Net,
    story::tell,
};

/// A planned step of a seed.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    Crash(Node),
    Restart(Node),
    /// The machine is lost for good with all its data.
    Lose(usize),
    Freeze(Node, Micros),
    CutOff(Node),
    Rejoin(Node),
    /// Worker and client can no longer reach each other.
    Part(usize, usize),
    /// A direct link breaks, chosen by this number.
    BreakLink(u64),
    /// The connection to the broker is remade, and the broker knows it by a new name.
    Reconnect(Node),
    StoreAway(bool),
    Drain(usize),
    ForgetModels(usize),
    /// Everything that a worker does takes this many thousandths of its normal time.
    Slow(usize, u64),
    /// A process submits a task.
    Submit(Node, Box<Job>),
    /// The process that submitted the task cancels it; the number chooses the task.
    Cancel(u64),
    /// Another process of the same user cancels the task.
    CancelElsewhere(u64),
    /// A client asks for another client's tasks.
    Pry {
        client: usize,
        which: u64,
        how: u64,
    },
}

impl Mesh {
    // The verbs of stories.

    pub(crate) fn crash(&mut self, node: Node) {
        self.referee.is_harmed = true;
        match node {
            Node::Broker => self.crash_broker(),
            Node::Worker(worker) => self.crash_worker(worker),
            Node::Client(client) => self.crash_client(client),
        }
    }

    pub(crate) fn restart(&mut self, node: Node) {
        match node {
            Node::Broker => self.start_broker(),
            Node::Worker(worker) => self.start_worker(worker),
            Node::Client(_) => {}
        }
    }

    /// Freezes a process: nothing reaches it, and it does not notice.
    pub(crate) fn freeze(&mut self, node: Node, duration: Duration) {
        self.referee.is_harmed = true;
        tell!(self, "{node} freezes for {duration:?}");
        // If a longer pause began before, waiting messages come at its end.
        let until = self.pulse(node).frozen_until.max(self.now + micros(duration));
        self.pulse_mut(node).frozen_until = until;
        if let Node::Worker(worker) = node {
            self.referee.stands_still(worker, until);
        }
        if let (Node::Broker, Some(due)) = (node, self.deadline(node)) {
            self.referee.ears.pauses(self.now, due, until);
        }
    }

    /// Cuts a node off: the broker cannot hear or reach it.
    pub(crate) fn cut_off(&mut self, node: Node) {
        self.referee.is_harmed = true;
        tell!(self, "{node} is cut off from B");
        self.net.cut_off.push(node);
    }

    pub(crate) fn rejoin(&mut self, node: Node) {
        tell!(self, "{node} rejoins B");
        self.net.cut_off.retain(|cut_off| *cut_off != node);
    }

    /// Parts a worker and a client: they cannot reach each other.
    pub(crate) fn part(&mut self, worker: Node, client: Node) {
        let (Node::Worker(worker), Node::Client(client)) = (worker, client) else { panic!("a worker and a client") };
        self.referee.is_harmed = true;
        tell!(self, "W{worker} and C{client} are parted");
        self.net.apart.push((worker, client));
        self.break_links_between(worker, client);
    }

    pub(crate) fn drain(&mut self, worker: Node) {
        let Node::Worker(worker) = worker else { panic!("workers drain") };
        self.referee.is_harmed = true;
        tell!(self, "W{worker} is asked to drain");
        self.worker_handle(worker, WorkerEvent::DrainAsked);
    }

    /// Slows a worker: everything that it runs from now on takes this many thousandths of its normal time.
    pub(crate) fn slow_down(&mut self, worker: Node, permille: u64) {
        let Node::Worker(worker) = worker else { panic!("workers are slow") };
        tell!(self, "W{worker} takes {permille} thousandths of the time");
        self.workers[worker].slowness_permille = permille;
        self.referee.has_slowed = true;
    }

    /// The worker's idle runners have ended: every model must be loaded again.
    pub(crate) fn cool(&mut self, worker: Node) {
        let Node::Worker(worker) = worker else { panic!("workers have runners") };
        tell!(self, "W{worker} is cold");
        self.workers[worker].warm.clear();
    }

    /// Heals all faults. A frozen process goes on by itself and finds what it missed.
    pub(crate) fn heal(&mut self) {
        tell!(self, "all heals");
        self.referee.struck = Some(self.now);
        self.net = Net::calm();
        if self.broker.store.is_away {
            self.store_away(false);
        }
        self.start_broker();
        for worker in 0..self.workers.len() {
            self.workers[worker].slowness_permille = 1000;
            self.start_worker(worker);
        }
    }

    // The plan of a seed.

    pub(super) fn strike(&mut self, fault: Fault) {
        let is_alive = |mesh: &Self, node: Node| match node {
            Node::Client(client) => mesh.clients[client].machine.is_some(),
            _ => true,
        };
        let is_of_users = matches!(fault, Fault::Submit(..) | Fault::Cancel(_) | Fault::CancelElsewhere(_));
        if !is_of_users {
            self.referee.struck = Some(self.now);
        }
        match fault {
            Fault::Crash(node) => self.crash(node),
            Fault::Restart(node) => self.restart(node),
            Fault::Lose(worker) => {
                self.crash(Node::Worker(worker));
                self.workers[worker].is_gone = true;
                self.referee.a_worker_is_gone = true;
            }
            Fault::Freeze(node, duration) => self.freeze(node, Duration::from_micros(duration)),
            Fault::CutOff(node) => self.cut_off(node),
            Fault::Rejoin(node) => self.rejoin(node),
            Fault::Part(worker, client) => self.part(Node::Worker(worker), Node::Client(client)),
            Fault::BreakLink(which) => {
                self.referee.is_harmed = true;
                let up: Vec<usize> = (0..self.links.len()).filter(|link| self.links[*link].is_up).collect();
                if !up.is_empty() {
                    self.break_link(up[which as usize % up.len()]);
                }
            }
            Fault::Reconnect(node) => self.reconnect(node),
            Fault::StoreAway(away) => {
                self.referee.is_harmed = true;
                self.store_away(away);
            }
            Fault::Drain(worker) => self.drain(Node::Worker(worker)),
            Fault::ForgetModels(worker) => self.workers[worker].forget_models(),
            Fault::Slow(worker, permille) => self.slow_down(Node::Worker(worker), permille),
            Fault::Submit(client, job) if is_alive(self, client) => {
                self.submit(client, *job);
            }
            Fault::Submit(..) => {}
            Fault::Cancel(which) => {
                if let Some(task) = self.some_task(which) {
                    self.cancel(task);
                }
            }
            Fault::CancelElsewhere(which) => {
                if let Some(task) = self.some_task(which) {
                    self.cancel_elsewhere(task);
                }
            }
            Fault::Pry { client, which, how } => {
                if let Some(task) = self.some_task(which).filter(|_| is_alive(self, Node::Client(client))) {
                    self.pry(client, task, how);
                }
            }
        }
    }

    fn some_task(&self, which: u64) -> Option<TaskId> {
        let tasks = self.referee.tasks.len();
        (tasks > 0).then(|| super::referee::task_id(which as usize % tasks))
    }

    /// Remakes the connection to the broker. Messages on the old connection are lost.
    pub(crate) fn reconnect(&mut self, node: Node) {
        tell!(self, "{node} connects to B anew");
        match node {
            Node::Broker => {}
            Node::Worker(worker) => self.workers[worker].conn = self.workers[worker].conn.wrapping_add(1),
            Node::Client(client) => self.clients[client].conn = self.clients[client].conn.wrapping_add(1),
        }
    }

    /// Another process of the owner cancels the task.
    pub(crate) fn cancel_elsewhere(&mut self, task: TaskId) {
        let owner = self.referee.task(task).owner;
        let user = self.users.iter().position(|user| user.id == owner).expect("tasks belong to users");
        let process = self.add_client(user, false);
        let Node::Client(process) = process else { return };
        tell!(self, "C{process} cancels {} of its user", short(task));
        self.referee.cancelled(task);
        self.say(process, ClientToBroker::Cancel(CancelTask { task, client: owner }));
    }

    /// A client asks for, fetches or stops a task of another client.
    fn pry(&mut self, client: usize, task: TaskId, how: u64) {
        let user = self.users[self.clients[client].user];
        let truth = self.referee.task(task);
        if truth.owner == user.id {
            return;
        }
        tell!(self, "C{client} pries at {}", short(task));
        // In a mesh with keys the client may even claim to be the owner.
        let claimed = if self.setup.encrypted && how.is_multiple_of(2) { truth.owner } else { user.id };
        let message = match how / 2 % 5 {
            0 => {
                let (endpoints, unreachable) = (Vec::new(), None);
                ClientToBroker::Locate(Locate { task, client: claimed, key: user.key, endpoints, unreachable })
            }
            1 => ClientToBroker::Cancel(CancelTask { task, client: claimed }),
            2 => ClientToBroker::Ask(Ask { request: 1, client: claimed, question: Question::Task(task) }),
            3 => {
                let attempt = proto_msgs::Attempt(1);
                ClientToBroker::Close(Close { task, client: claimed, attempt, outcome: Outcome::Cancelled })
            }
            _ => {
                let spec = truth.job.spec(task, &User { id: claimed, key: user.key });
                let spec = TaskSpec { deadline_ms: None, direction: None, ..spec };
                ClientToBroker::Submit(Submit { spec, endpoints: Vec::new(), standing: Standing::Asking })
            }
        };
        self.say(client, message);
    }

    // Questions.

    /// Whether any worker runs the task.
    pub(crate) fn is_running(&self, task: TaskId) -> bool {
        self.workers.iter().any(|worker| worker.is_running(task))
    }

    /// Whether any worker is receiving model and inputs of the task.
    pub(crate) fn is_receiving(&self, task: TaskId) -> bool {
        self.workers.iter().any(|worker| worker.is_receiving(task))
    }

    /// What is left to do before all is quiet; `None` if nothing is.
    pub(crate) fn unsettled(&self) -> Option<String> {
        for (number, truth) in self.referee.tasks.iter().enumerate() {
            if let Some((process, _)) = truth.open.first_key_value() {
                return Some(format!("C{process} waits for T{number} {:?}", truth.job));
            }
        }
        for (number, worker) in self.workers.iter().enumerate().filter(|(_, worker)| !worker.is_gone) {
            if let Some(id) = worker.files().first() {
                return Some(format!("W{number} keeps {}", short_id(*id)));
            }
            if worker.machine.is_some() && self.referee.last_reported(number) > 0 {
                return Some(format!("W{number} still reports attempts"));
            }
        }
        for (number, client) in self.clients.iter().enumerate() {
            let machine = client.machine.as_ref();
            if client.session_count() > 0 || machine.is_some_and(|machine| machine.next_deadline().is_some()) {
                return Some(format!("C{number} still has something to do"));
            }
        }
        let Some(broker) = &self.broker.machine else { return Some("no broker".to_owned()) };
        let (gauges, alive) = (broker.gauges(), self.workers.iter().filter(|worker| worker.machine.is_some()).count());
        if gauges.queued + gauges.placed + gauges.slots_used > 0 || gauges.workers as usize != alive {
            return Some(format!("B still has {gauges:?} with {alive} workers alive"));
        }
        let rows = self.broker.store.tasks.len();
        if rows > 0 {
            return Some(format!("the store still has {rows} tasks"));
        }
        self.left_in_tables()
    }

    /// Plays on until all is quiet. If that takes longer than `limit`, it is a violation.
    pub(crate) fn settle(&mut self, limit: Duration) {
        let end = self.now + micros(limit);
        while self.violation().is_none() {
            match self.unsettled() {
                None => return,
                Some(what) if self.now >= end => {
                    return self.referee.fail("all comes to an end", format!("{}: {what}", self.now / SECOND));
                }
                Some(_) => self.run_for(Duration::from_secs(1)),
            }
        }
    }
}
