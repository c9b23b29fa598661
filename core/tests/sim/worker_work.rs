//! Work of a worker's process that takes time: transfers, results, dialling. Runs are in `batches`.

use mesh_core::worker::{Event, LinkId};
use proto_msgs::{
    Accept, AttemptId, DType, ErrorCode, Manifest, Outcome, OutputDecl, RunNote, RunResult, Ticket, WorkerToClient,
    limits::WINDOW_BYTES,
};

use super::{
    batches::Rows,
    client_shell::client_at,
    job::Behaviour,
    mesh::{Happening, MS, Mesh, Micros, SECOND, Step, short_id},
    net::Cargo,
    story::tell,
    worker_shell::{Kept, Session, Stage},
};

/// Most bytes that come with the opening, so that the worker need not ask for them.
const LITTLE_BYTES: u64 = 64 << 10;

impl Mesh {
    // Transfers.

    pub(super) fn receive(&mut self, worker: usize, id: AttemptId, link: LinkId, manifest: Manifest, ticket: Ticket) {
        self.referee.received(worker, &self.workers[worker], id, &ticket);
        tell!(self, "W{worker} takes {} in over {link:?}", short_id(id));
        let shell = &mut self.workers[worker];
        let number = shell.links.get(&link).copied();
        let holds_model = shell.disk.models.contains(&manifest.model.digest);
        let inputs_bytes: u64 = manifest.inputs.iter().map(|input| input.size_bytes).sum();
        let session = shell.sessions.entry(id).or_insert_with(|| Session {
            needed_bytes: inputs_bytes + if holds_model { 0 } else { manifest.model.size_bytes },
            ticket,
            manifest,
            link: None,
            stage: Stage::Receiving,
            turn: 0,
            received_bytes: 0,
            rows: Rows::new(),
        });
        session.link = number;
        session.turn += 1;
        let needs = match session.needed_bytes - session.received_bytes {
            0 => Vec::new(),
            _ => vec![(1, session.received_bytes)],
        };
        let is_new = session.turn == 1;
        let is_heard_of_soon = is_new && !session.ticket.body.detached && session.needed_bytes <= LITTLE_BYTES;
        if !is_heard_of_soon {
            let accept = WorkerToClient::Accept(Accept { id, needs, window_bytes: WINDOW_BYTES });
            self.tell_client(worker, link, accept);
        }
        self.transfer_on(worker, id);
    }

    fn transfer_on(&mut self, worker: usize, id: AttemptId) {
        let life = self.workers[worker].life;
        let Some(session) = self.workers[worker].sessions.get(&id) else { return };
        let Some(link) = session.link else { return };
        let (left, speed, turn) = (session.needed_bytes - session.received_bytes, self.links[link].speed, session.turn);
        let wait = (left.saturating_mul(SECOND) / speed).clamp(MS, SECOND / 2);
        let bytes = (speed.saturating_mul(wait) / SECOND).min(left);
        self.after(wait, Happening::Session { worker, life, id, turn, step: Step::Transfer { bytes } });
    }

    /// Some bytes of model and inputs arrive, if link and client process still exist.
    fn bytes_arrive(&mut self, worker: usize, id: AttemptId, bytes: u64) {
        let shell = &mut self.workers[worker];
        let Some(session) = shell.sessions.get_mut(&id).filter(|session| session.stage == Stage::Receiving) else {
            return;
        };
        let Some(number) = session.link else { return };
        let link = &self.links[number];
        let (client, link_id) = (link.client, link.number);
        if !link.is_up || !self.clients[client].sends(id, number) {
            return;
        }
        if self.clients[client].pulse.frozen_until > self.now {
            return self.transfer_on(worker, id);
        }
        session.received_bytes = session.needed_bytes.min(session.received_bytes + bytes);
        let is_whole = session.received_bytes == session.needed_bytes;
        self.send_direct(number, false, Cargo::Credit(id));
        self.worker_handle(worker, Event::ClientAlive { id, link: link_id });
        if is_whole {
            self.all_arrived(worker, number, id);
        } else {
            self.transfer_on(worker, id);
        }
    }

    fn all_arrived(&mut self, worker: usize, number: usize, id: AttemptId) {
        let is_full = self.referee.job(id.task).behaviour == Behaviour::DiskFullFirst && id.attempt.0 == 1;
        let Some(session) = self.workers[worker].sessions.get_mut(&id) else { return };
        if is_full {
            session.stage = Stage::Over;
            let (code, text) = (ErrorCode::DiskFull, "no space left".to_owned());
            return self.worker_handle(worker, Event::ReceiveFailed { id, code, text });
        }
        session.stage = Stage::Here;
        let (ticket, manifest) = (session.ticket.clone(), session.manifest.clone());
        let disk = &mut self.workers[worker].disk;
        if !disk.models.contains(&manifest.model.digest) {
            disk.models.insert(0, manifest.model.digest);
        }
        if ticket.body.detached {
            let (runs, rows) = (Vec::new(), Rows::new());
            disk.detached.insert(id, Kept { ticket, manifest, outcome: None, runs, rows, runs_begun: 0, begun_in: 0 });
        }
        tell!(self, "W{worker} has all of {}", short_id(id));
        self.referee.is_ready(self.now, worker, id);
        self.send_direct(number, false, Cargo::AllAcknowledged(id));
        self.worker_handle(worker, Event::Received { id });
    }

    pub(super) fn session_step(&mut self, worker: usize, life: u32, id: AttemptId, turn: u32, step: Step) {
        let shell = &self.workers[worker];
        let is_current = shell.sessions.get(&id).is_some_and(|session| session.turn == turn);
        if shell.life != life || shell.machine.is_none() || !is_current {
            return;
        }
        match step {
            Step::Transfer { bytes } => self.bytes_arrive(worker, id, bytes),
            Step::Piece { left } => self.send_piece(worker, id, left),
        }
    }

    // Results.

    pub(super) fn send_result(
        &mut self,
        worker: usize,
        id: AttemptId,
        link: LinkId,
        outcome: Outcome,
        runs: Vec<RunNote>,
    ) {
        let output_us = self.referee.job(id.task).output;
        let shell = &mut self.workers[worker];
        let number = shell.links.get(&link).copied();
        let Some(session) = shell.sessions.get_mut(&id) else { return };
        session.link = number;
        session.turn += 1;
        session.stage = Stage::Over;
        let is_done = matches!(outcome, Outcome::Done { .. });
        let Some(digest) = session.output().filter(|_| is_done) else {
            if is_done {
                let detail = format!("W{worker} sends a result of {} with rows {:?}", short_id(id), session.rows);
                self.referee.fail("a result has all rows", detail);
            }
            let result = RunResult { id, outcome, outputs: Vec::new(), runs, held_us: 0, goes_on: false };
            return self.tell_client(worker, link, WorkerToClient::Result(result));
        };
        let output = OutputDecl { name: "out".to_owned(), dtype: DType::F32, shape: vec![8], digest, size_bytes: 32 };
        let outputs = vec![output];
        self.tell_client(
            worker,
            link,
            WorkerToClient::Result(RunResult { id, outcome, outputs, runs, held_us: 0, goes_on: false }),
        );
        self.send_piece_later(worker, id, output_us);
    }

    fn send_piece_later(&mut self, worker: usize, id: AttemptId, left: Micros) {
        let life = self.workers[worker].life;
        let Some(session) = self.workers[worker].sessions.get(&id) else { return };
        let (turn, wait) = (session.turn, left.min(SECOND / 2));
        self.after(wait, Happening::Session { worker, life, id, turn, step: Step::Piece { left: left - wait } });
    }

    fn send_piece(&mut self, worker: usize, id: AttemptId, left: Micros) {
        let Some(session) = self.workers[worker].sessions.get(&id) else { return };
        let (Some(number), content) = (session.link, session.output().filter(|_| left == 0)) else { return };
        self.send_direct(number, false, Cargo::Piece(id, content));
        if left > 0 {
            self.send_piece_later(worker, id, left);
        }
    }

    // Dialling.

    pub(super) fn dial_client(&mut self, worker: usize, id: AttemptId, endpoints: &[String]) {
        let client = endpoints.first().and_then(|endpoint| client_at(endpoint));
        tell!(self, "W{worker} dials for {}", short_id(id));
        let (life, wait) = (self.workers[worker].life, self.rng.among(MS..200 * MS));
        self.after(wait, Happening::WorkerDialled { worker, life, id, client });
    }

    pub(super) fn worker_dialled(&mut self, worker: usize, life: u32, id: AttemptId, client: Option<usize>) {
        if self.workers[worker].life != life || self.workers[worker].machine.is_none() {
            return;
        }
        let reached = client.filter(|client| self.clients[*client].can_be_dialled() && self.can_reach(worker, *client));
        let Some(client) = reached else {
            let text = "no route to the client".to_owned();
            return self.worker_handle(worker, Event::DialFailed { id, text });
        };
        let number = self.new_link(client, worker, false);
        self.send_direct(number, false, Cargo::ToClient(WorkerToClient::DialIn(id)));
    }
}
