//! The network between the nodes: control messages that may be lost, duplicated and late, and direct links that keep
//! order until they break.

use mesh_core::{client::Event as ClientEvent, worker::LinkId};
use proto_msgs::{AttemptId, BrokerToClient, BrokerToWorker, ClientToWorker, Digest, PeerId, ToBroker, WorkerToClient};

use super::{
    mesh::{Happening, MS, Mesh, Micros, Node, SECOND},
    story::tell,
};

/// How the network treats control messages.
#[derive(Clone, Debug)]
pub(crate) struct Net {
    pub(crate) lost_permille: u64,
    pub(crate) doubled_permille: u64,
    /// Shortest and longest delay. A wide range reorders messages.
    pub(crate) delay: (Micros, Micros),
    /// Nodes that the broker can neither hear nor reach.
    pub(crate) cut_off: Vec<Node>,
    /// Pairs of worker and client that cannot reach each other.
    pub(crate) apart: Vec<(usize, usize)>,
}

impl Net {
    pub(crate) fn calm() -> Self {
        Self { lost_permille: 0, doubled_permille: 0, delay: (MS, 2 * MS), cut_off: Vec::new(), apart: Vec::new() }
    }
}

/// Cargo of a direct link.
#[derive(Clone, Debug)]
pub(super) enum Cargo {
    ToWorker(ClientToWorker),
    ToClient(WorkerToClient),
    /// Some bytes of model or inputs were acknowledged.
    Credit(AttemptId),
    /// All bytes of model and inputs were acknowledged.
    AllAcknowledged(AttemptId),
    /// A piece of the result. The last piece carries the whole content.
    Piece(AttemptId, Option<Digest>),
    /// A piece of the result was acknowledged.
    PieceAcknowledged(AttemptId),
}

/// A direct connection between a client's process and a worker.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) client: usize,
    pub(super) worker: usize,
    pub(super) client_dialled: bool,
    pub(super) is_up: bool,
    /// The worker's number for the link. It changes when the link comes back after a silent break.
    pub(super) number: LinkId,
    pub(super) worker_life: u32,
    /// Number of cuts so far: cargo sent before a cut never arrives after it.
    cuts: u32,
    last_arrival: [Micros; 2],
    latency: Micros,
    /// Speed for model and inputs, bytes per second.
    pub(super) speed: u64,
    /// Messages that the client's socket keeps until the link is back.
    kept: Vec<Cargo>,
}

/// Messages that a socket keeps for a peer that is away.
const KEPT_MAX: usize = 16;

impl Mesh {
    // Control links.

    fn control_ways(&mut self, from: Node, to: Node) -> Vec<Micros> {
        let away = |node: &Node| self.net.cut_off.contains(node);
        if away(&from) || away(&to) || self.rng.permille(self.net.lost_permille) {
            return Vec::new();
        }
        let (shortest, longest) = self.net.delay;
        let mut ways = vec![self.rng.among(shortest..longest + 1)];
        if self.rng.permille(self.net.doubled_permille) {
            ways.push(self.rng.among(shortest..longest * 3 + 1));
        }
        ways
    }

    fn conn(&self, node: Node) -> u8 {
        match node {
            Node::Broker => 0,
            Node::Worker(worker) => self.workers[worker].conn,
            Node::Client(client) => self.clients[client].conn,
        }
    }

    pub(super) fn send_to_broker(&mut self, from: Node, message: ToBroker) {
        let message = if self.setup.through_bytes { self.through_bytes_to_broker(message) } else { message };
        let (conn, broker_life) = (self.conn(from), self.broker.life);
        for way in self.control_ways(from, Node::Broker) {
            let message = message.clone();
            self.after(way, Happening::AtBroker { from, conn, broker_life, message });
        }
    }

    pub(super) fn send_to_worker(&mut self, peer: PeerId, message: BrokerToWorker) {
        let Some((Node::Worker(worker), conn)) = self.node_of(peer) else { return };
        let message = match self.setup.through_bytes {
            true => through_bytes(&message, BrokerToWorker::to_frame, BrokerToWorker::from_frame, &mut self.referee),
            false => message,
        };
        for way in self.control_ways(Node::Broker, Node::Worker(worker)) {
            self.after(way, Happening::AtWorker { worker, conn, message: message.clone() });
        }
    }

    pub(super) fn send_to_client(&mut self, peer: PeerId, message: BrokerToClient) {
        let Some((Node::Client(client), conn)) = self.node_of(peer) else { return };
        let message = match self.setup.through_bytes {
            true => through_bytes(&message, BrokerToClient::to_frame, BrokerToClient::from_frame, &mut self.referee),
            false => message,
        };
        for way in self.control_ways(Node::Broker, Node::Client(client)) {
            self.after(way, Happening::AtClient { client, conn, message: message.clone() });
        }
    }

    fn through_bytes_to_broker(&mut self, message: ToBroker) -> ToBroker {
        let frame = match &message {
            ToBroker::Client(message) => message.to_frame(),
            ToBroker::Worker(message) => message.to_frame(),
        };
        match frame.map(|frame| ToBroker::from_frame(&frame)) {
            Ok(Ok(same)) if same == message => same,
            other => {
                self.referee.fail("every message has its bytes", format!("{message:?} became {other:?}"));
                message
            }
        }
    }

    /// The name under which the broker's socket knows a connection.
    pub(super) fn peer_of(&self, node: Node, conn: u8) -> PeerId {
        let (kind, number) = match node {
            Node::Broker => (0, 0),
            Node::Worker(worker) => (1, worker),
            Node::Client(client) => (2, client),
        };
        let name = [kind, (number >> 8) as u8, number as u8, conn, self.broker.life as u8];
        PeerId::from_slice(&name).expect("five bytes are a name")
    }

    /// The node that a connection's name belongs to; `None` if the name is from an earlier life of the broker.
    pub(super) fn node_of(&self, peer: PeerId) -> Option<(Node, u8)> {
        let [kind, high, low, conn, life] = *<&[u8; 5]>::try_from(peer.as_slice()).ok()?;
        let number = usize::from(high) << 8 | usize::from(low);
        let node = if kind == 1 { Node::Worker(number) } else { Node::Client(number) };
        (life == self.broker.life as u8).then_some((node, conn))
    }

    /// A control message arrives at the broker's door. One for an earlier life of the broker was either lost with the
    /// connection or waited in its sender's socket.
    pub(super) fn at_broker(&mut self, from: Node, conn: u8, broker_life: u32, message: ToBroker) {
        let broker_is_up = self.broker.machine.is_some();
        if !broker_is_up || broker_life != self.broker.life {
            let sender_waits = self.conn(from) == conn && self.life_of(from);
            if !sender_waits || self.rng.permille(500) {
                return;
            }
            if !broker_is_up {
                return self.after(SECOND / 2, Happening::AtBroker { from, conn, broker_life, message });
            }
        }
        let peer = self.peer_of(from, conn);
        self.broker_hears(from, peer, message);
    }

    fn life_of(&self, node: Node) -> bool {
        match node {
            Node::Broker => self.broker.machine.is_some(),
            Node::Worker(worker) => self.workers[worker].machine.is_some(),
            Node::Client(client) => self.clients[client].machine.is_some(),
        }
    }

    // Direct links.

    pub(super) fn can_reach(&self, worker: usize, client: usize) -> bool {
        !self.net.apart.contains(&(worker, client))
    }

    pub(super) fn new_link(&mut self, client: usize, worker: usize, client_dialled: bool) -> usize {
        let link = self.links.len();
        let number = self.workers[worker].new_link(link);
        let (latency, speed) = (self.rng.among(200..40 * MS), self.rng.among(2 << 20..200 << 20));
        self.links.push(Link {
            client,
            worker,
            client_dialled,
            is_up: true,
            number,
            worker_life: self.workers[worker].life,
            cuts: 0,
            last_arrival: [self.now; 2],
            latency,
            speed,
            kept: Vec::new(),
        });
        link
    }

    /// Gives all links the same latency from now on.
    pub(crate) fn level_links(&mut self, latency: Micros) {
        self.links.iter_mut().for_each(|link| link.latency = latency);
    }

    pub(super) fn send_direct(&mut self, number: usize, to_worker: bool, cargo: Cargo) {
        let jitter = self.rng.among(0..5 * MS);
        let keeps = self.rng.permille(500);
        let link = &mut self.links[number];
        if !link.is_up {
            if to_worker && link.client_dialled && keeps && link.kept.len() < KEPT_MAX {
                link.kept.push(cargo);
            }
            return;
        }
        let last = &mut link.last_arrival[usize::from(to_worker)];
        let at = (*last).max(self.now + link.latency + jitter);
        *last = at;
        let cuts = link.cuts;
        self.at(at, Happening::Direct { link: number, cuts, to_worker, cargo });
    }

    pub(super) fn at_direct(&mut self, number: usize, cuts: u32, to_worker: bool, cargo: Cargo) {
        let link = &self.links[number];
        if link.cuts != cuts {
            return;
        }
        let (client, worker) = (link.client, link.worker);
        let (node, is_alive) = match to_worker {
            true => (Node::Worker(worker), self.workers[worker].life == link.worker_life),
            false => (Node::Client(client), true),
        };
        if !is_alive || !self.life_of(node) {
            return;
        }
        let frozen_until = self.pulse(node).frozen_until;
        if frozen_until > self.now {
            return self.at(frozen_until, Happening::Direct { link: number, cuts, to_worker, cargo });
        }
        match to_worker {
            true => self.worker_receives(worker, number, cargo),
            false => self.client_receives(client, number, cargo),
        }
    }

    /// Breaks the link: cargo on its way is lost. A link that the client dialled comes back silently by itself, if its
    /// other end can be reached; one that the worker dialled does not.
    pub(crate) fn break_link(&mut self, number: usize) {
        if !self.links[number].is_up {
            return;
        }
        let link = &mut self.links[number];
        link.is_up = false;
        link.cuts += 1;
        let (client, worker, comes_back) = (link.client, link.worker, link.client_dialled);
        tell!(self, "link {number} between C{client} and W{worker} breaks");
        if comes_back && self.rng.permille(700) {
            let wait = self.rng.among(100 * MS..2 * SECOND);
            self.after(wait, Happening::Relink { link: number });
        }
    }

    pub(crate) fn break_links_of(&mut self, node: Node) {
        for number in 0..self.links.len() {
            let link = &self.links[number];
            if Node::Worker(link.worker) == node || Node::Client(link.client) == node {
                self.break_link(number);
            }
        }
    }

    pub(super) fn break_links_between(&mut self, worker: usize, client: usize) {
        for number in 0..self.links.len() {
            if (self.links[number].worker, self.links[number].client) == (worker, client) {
                self.break_link(number);
            }
        }
    }

    pub(super) fn relink(&mut self, number: usize) {
        let (client, worker) = (self.links[number].client, self.links[number].worker);
        if self.links[number].is_up || !self.life_of(Node::Client(client)) || !self.client_uses(client, number) {
            return;
        }
        if !self.life_of(Node::Worker(worker)) || !self.can_reach(worker, client) {
            return self.after(SECOND, Happening::Relink { link: number });
        }
        let number_at_worker = self.workers[worker].new_link(number);
        let life = self.workers[worker].life;
        let link = &mut self.links[number];
        (link.is_up, link.number, link.worker_life) = (true, number_at_worker, life);
        link.last_arrival = [self.now; 2];
        let kept = std::mem::take(&mut link.kept);
        tell!(self, "link {number} between C{client} and W{worker} is back with {} messages", kept.len());
        for cargo in kept {
            self.send_direct(number, true, cargo);
        }
    }

    /// Handles cargo that arrives at a client's process.
    fn client_receives(&mut self, client: usize, link: usize, cargo: Cargo) {
        match cargo {
            Cargo::ToClient(message) => self.worker_said(client, link, message),
            Cargo::Credit(id) => self.client_handle(client, ClientEvent::WorkerAlive { id }),
            Cargo::AllAcknowledged(id) => {
                self.client_handle(client, ClientEvent::WorkerAlive { id });
                self.client_handle(client, ClientEvent::Sent { id });
            }
            Cargo::Piece(id, content) => self.piece_arrives(client, link, id, content),
            Cargo::ToWorker(_) | Cargo::PieceAcknowledged(_) => unreachable!("clients do not send these"),
        }
    }
}

/// The message after encoding and decoding, which must not change it.
pub(super) fn through_bytes<M: Clone + PartialEq + std::fmt::Debug>(
    message: &M,
    encode: impl Fn(&M) -> Result<proto_msgs::Frame, proto_msgs::EncodeError>,
    decode: impl Fn(&proto_msgs::Frame) -> Result<M, proto_msgs::DecodeError>,
    referee: &mut super::referee::Referee,
) -> M {
    match encode(message).map(|frame| decode(&frame)) {
        Ok(Ok(same)) if same == *message => same,
        other => {
            referee.fail("every message has its bytes", format!("{message:?} became {other:?}"));
            message.clone()
        }
    }
}
