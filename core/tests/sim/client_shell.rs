//! A client process: its machine, its connections, and the files that it sends and receives.

use std::collections::BTreeMap;

use mesh_core::client::{Action, Client, Config, Event};
use proto_msgs::{
    AttemptId, BrokerToClient, ClientToBroker, ClientToWorker, Digest, Direction, ErrorCode, Grant, Open, Outcome,
    Purpose, TaskId, ToBroker, WorkerToClient, limits::WINDOW_BYTES,
};

use super::{
    job::Behaviour,
    mesh::{Happening, MS, Mesh, Node, Pulse, SECOND, short, short_id},
    net::Cargo,
    story::tell,
};

/// A client process.
#[derive(Debug)]
pub(super) struct ClientShell {
    pub(super) machine: Option<Client>,
    pub(super) user: usize,
    pub(super) pulse: Pulse,
    /// The number of its connection to the broker.
    pub(super) conn: u8,
    /// Whether the client listens for workers that dial, and can be reached.
    listens: bool,
    sessions: BTreeMap<AttemptId, Session>,
    /// Connections that the client dialled, by worker. They are reused.
    dialled: BTreeMap<usize, usize>,
    /// Workers that dialled in for an attempt before the client asked for it.
    dialled_in: BTreeMap<AttemptId, usize>,
}

/// An attempt that the shell works on.
#[derive(Debug)]
struct Session {
    grant: Grant,
    link: Option<usize>,
    /// `Some(resume)` while a worker is to dial in.
    awaits_dial_in: Option<bool>,
    /// Number of the last attempt to connect; results of earlier ones are ignored.
    try_no: u32,
    taking: Option<Digest>,
}

impl ClientShell {
    /// Whether the client has this attempt on this link, and so keeps sending.
    pub(super) fn sends(&self, id: AttemptId, link: usize) -> bool {
        self.machine.is_some() && self.sessions.get(&id).is_some_and(|session| session.link == Some(link))
    }

    pub(super) fn can_be_dialled(&self) -> bool {
        self.machine.is_some() && self.listens
    }

    /// Number of attempts that it still keeps data for.
    pub(super) fn session_count(&self) -> usize {
        self.sessions.len()
    }
}

impl Mesh {
    /// Starts a new process of a user.
    pub(crate) fn add_client(&mut self, user: usize, listens: bool) -> Node {
        let number = self.clients.len();
        let mut config = Config::new(self.users[user].id);
        config.key = self.users[user].key;
        config.rules = self.setup.rules;
        if listens {
            config.endpoints = vec![endpoint_of(number)];
        }
        self.clients.push(ClientShell {
            machine: Some(Client::new(config)),
            user,
            pulse: Pulse { started: self.now, ..Pulse::default() },
            conn: 0,
            listens,
            sessions: BTreeMap::new(),
            dialled: BTreeMap::new(),
            dialled_in: BTreeMap::new(),
        });
        Node::Client(number)
    }

    pub(crate) fn listens(&self, client: Node) -> bool {
        matches!(client, Node::Client(client) if self.clients[client].listens)
    }

    pub(super) fn crash_client(&mut self, client: usize) {
        if self.clients[client].machine.take().is_some() {
            tell!(self, "C{client} dies");
            let shell = &mut self.clients[client];
            shell.sessions.clear();
            shell.dialled.clear();
            shell.dialled_in.clear();
            shell.pulse = Pulse::default();
            self.referee.client_died(client);
            self.break_links_of(Node::Client(client));
        }
    }

    /// The user cancels the task in the process that submitted it.
    pub(crate) fn cancel(&mut self, task: TaskId) {
        let client = self.referee.task(task).process;
        if self.clients[client].machine.is_some() {
            tell!(self, "C{client} cancels {}", short(task));
            self.referee.cancelled(task);
            self.client_handle(client, Event::Cancel { task });
        }
    }

    /// Another process of the same user asks for the result of a detached task.
    pub(crate) fn fetch(&mut self, client: Node, task: TaskId) {
        let Node::Client(client) = client else { panic!("only clients fetch") };
        tell!(self, "C{client} fetches {}", short(task));
        self.referee.fetched(task, client);
        self.client_handle(client, Event::Fetch { task });
    }

    /// Sends a message that no real machine would send.
    pub(crate) fn say(&mut self, client: usize, message: ClientToBroker) {
        self.send_to_broker(Node::Client(client), ToBroker::Client(message));
    }

    pub(super) fn at_client(&mut self, client: usize, conn: u8, message: BrokerToClient) {
        if self.clients[client].conn == conn && !matches!(message, BrokerToClient::Answer(_)) {
            self.referee.client_hears(&message);
            self.client_handle(client, Event::BrokerSaid(message));
        }
    }

    pub(super) fn client_handle(&mut self, client: usize, event: Event) {
        let shell = &mut self.clients[client];
        let now = shell.pulse.clock(self.now);
        let Some(machine) = &mut shell.machine else { return };
        for action in machine.handle(now, event) {
            self.client_acts(client, action);
        }
        self.count_tables(Node::Client(client));
        self.set_wake(Node::Client(client));
    }

    fn client_acts(&mut self, client: usize, action: Action) {
        match action {
            Action::TellBroker(message) => self.send_to_broker(Node::Client(client), ToBroker::Client(message)),
            Action::TellWorker { id, message } => {
                if let Some(link) = self.clients[client].sessions.get(&id).and_then(|session| session.link) {
                    self.send_direct(link, true, Cargo::ToWorker(message));
                }
            }
            Action::Connect { grant, resume } => self.connect(client, *grant, resume),
            Action::TakeResult { result } => {
                tell!(self, "C{client} takes the result of {}", short_id(result.id));
                self.referee.takes_result(client, result.id);
                if let Some(session) = self.clients[client].sessions.get_mut(&result.id) {
                    session.taking = result.outputs.first().map(|output| output.digest);
                }
            }
            Action::Disconnect { id } => {
                let shell = &mut self.clients[client];
                let link = shell.sessions.remove(&id).and_then(|session| session.link);
                shell.dialled_in.remove(&id);
                // A connection that brought nothing is not reused.
                if let Some(dead) = link.filter(|link| !self.links[*link].is_up) {
                    shell.dialled.retain(|_, dialled| *dialled != dead);
                }
            }
            Action::Report { task, news } => {
                tell!(self, "C{client} reports {}: {news:?}", short(task));
                self.referee.reported(client, task, &news);
            }
            Action::End { task, end } => {
                tell!(self, "C{client} ends {}: {:?}", short(task), end.outcome);
                let wants_it = self.clients[client].user;
                let is_refused = matches!(&end.outcome, Outcome::Failed(failure)
                    if failure.code == ErrorCode::DeadlineUnmeetable);
                if is_refused && self.would_surely_meet(task) {
                    let detail = format!("{} at C{client}: {end:?}", short(task));
                    self.referee.fail("a deadline that would be met is not refused", detail);
                }
                self.referee.ended(self.now, self.users[wants_it].id, client, task, &end);
                self.stream_goes_on(task);
            }
        }
    }

    // Connections.

    fn connect(&mut self, client: usize, grant: Grant, resume: bool) {
        let id = grant.id;
        tell!(self, "C{client} connects for {}, {:?}, resume {resume}", short_id(id), grant.direction);
        self.referee.follows(client, id);
        let worker = self.worker_number(&grant);
        let direction = grant.direction;
        let reused = self.clients[client].dialled.get(&worker).copied();
        let dialled_in = self.clients[client].dialled_in.remove(&id);
        let old_try = self.clients[client].sessions.get(&id).map_or(0, |session| session.try_no);
        let try_no = old_try + 1;
        let session = Session { grant, link: None, awaits_dial_in: None, try_no, taking: None };
        self.clients[client].sessions.insert(id, session);
        match (direction, reused, dialled_in) {
            (Direction::ClientDials, Some(link), _) if !resume => self.open(client, id, link, resume),
            (Direction::ClientDials, ..) => {
                let wait = self.rng.among(MS..150 * MS);
                self.after(wait, Happening::Dialled { client, id, try_no, resume });
            }
            (Direction::WorkerDials, _, Some(link)) => self.open(client, id, link, resume),
            (Direction::WorkerDials, ..) => {
                if let Some(session) = self.clients[client].sessions.get_mut(&id) {
                    session.awaits_dial_in = Some(resume);
                }
                self.after(3 * SECOND, Happening::DialFailed { client, id, try_no });
            }
        }
        if self.referee.job(id.task).behaviour == Behaviour::FileVanishes {
            self.after(50 * MS, Happening::FileVanished { client, id });
        }
    }

    pub(super) fn dialled(&mut self, client: usize, id: AttemptId, try_no: u32, resume: bool) {
        let Some(session) = self.clients[client].sessions.get(&id).filter(|session| session.try_no == try_no) else {
            return;
        };
        let worker = self.worker_number(&session.grant);
        let shell = &self.workers[worker];
        let is_open = shell.machine.is_some() && shell.place.reachable && self.can_reach(worker, client);
        if is_open {
            let link = self.new_link(client, worker, true);
            self.clients[client].dialled.insert(worker, link);
            return self.open(client, id, link, resume);
        }
        // The dial is refused at once, or nothing answers.
        let wait = if self.rng.permille(500) { MS } else { 3 * SECOND };
        self.after(wait, Happening::DialFailed { client, id, try_no });
    }

    pub(super) fn dial_failed(&mut self, client: usize, id: AttemptId, try_no: u32) {
        let session = self.clients[client].sessions.get(&id);
        if session.is_some_and(|session| session.try_no == try_no && session.link.is_none()) {
            self.client_handle(client, Event::ConnectFailed { id, text: "tried its address".to_owned() });
        }
    }

    fn open(&mut self, client: usize, id: AttemptId, link: usize, resume: bool) {
        let job = self.referee.job(id.task).clone();
        let Some(session) = self.clients[client].sessions.get_mut(&id) else { return };
        session.link = Some(link);
        session.awaits_dial_in = None;
        let is_run = session.grant.ticket.body.purpose == Purpose::Run;
        let open = Open {
            ticket: session.grant.ticket.clone(),
            manifest: is_run.then(|| job.manifest(id.task)),
            window_bytes: WINDOW_BYTES,
            resume,
            outputs_here: Vec::new(),
        };
        self.send_direct(link, true, Cargo::ToWorker(ClientToWorker::Open(open)));
    }

    pub(super) fn worker_said(&mut self, client: usize, link: usize, message: WorkerToClient) {
        if let WorkerToClient::DialIn(id) = message {
            let session = self.clients[client].sessions.get(&id);
            match session.and_then(|session| session.awaits_dial_in) {
                Some(resume) => self.open(client, id, link, resume),
                None if session.is_none() => {
                    self.clients[client].dialled_in.insert(id, link);
                }
                None => {}
            }
        }
        self.client_handle(client, Event::WorkerSaid(message));
    }

    pub(super) fn piece_arrives(&mut self, client: usize, link: usize, id: AttemptId, content: Option<Digest>) {
        self.client_handle(client, Event::WorkerAlive { id });
        let Some(session) = self.clients[client].sessions.get(&id) else { return };
        let (taking, is_last) = (session.taking, content.is_some());
        self.send_direct(link, true, Cargo::PieceAcknowledged(id));
        match taking {
            Some(_) if self.referee.job(id.task).behaviour == Behaviour::FillsDisk => {
                let outcome = Outcome::failed(ErrorCode::ResultNotKept, "no space left for the output");
                self.client_handle(client, Event::ResultBroken { id, outcome });
            }
            Some(announced) if is_last && content == Some(announced) => {
                self.referee.verified(client, id, announced);
                self.client_handle(client, Event::ResultVerified { id });
            }
            Some(_) if is_last => {
                let outcome = Outcome::failed(ErrorCode::BadChunk, "not what was announced");
                self.client_handle(client, Event::ResultBroken { id, outcome });
            }
            _ => {}
        }
    }

    pub(super) fn file_vanished(&mut self, client: usize, id: AttemptId) {
        if self.clients[client].sessions.contains_key(&id) {
            let outcome = Outcome::failed(ErrorCode::DigestMismatch, "input.bin changed while it was sent");
            self.client_handle(client, Event::SendFailed { id, outcome });
        }
    }

    /// Whether this process still uses the link.
    pub(super) fn client_uses(&self, client: usize, link: usize) -> bool {
        let shell = &self.clients[client];
        shell.dialled.values().any(|dialled| *dialled == link)
            || shell.sessions.values().any(|session| session.link == Some(link))
    }

    fn worker_number(&self, grant: &Grant) -> usize {
        self.workers.iter().position(|worker| worker.id == grant.worker).expect("grants name workers of the mesh")
    }
}

fn endpoint_of(client: usize) -> String {
    format!("tcp://client-{client}")
}

/// The process that listens at this endpoint.
pub(super) fn client_at(endpoint: &str) -> Option<usize> {
    endpoint.strip_prefix("tcp://client-")?.parse().ok()
}
