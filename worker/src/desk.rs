//! The desk: carries out the machine's orders, and reports to it the clients' messages and the progress of the work.
//!
//! Owns the attempts' material: transfers, inputs, runs, outputs. Never decides, and never keeps the machine waiting,
//! because it runs on another thread. Slow work runs in tasks of the attempt, which report by [`Note`] and end with it.
//!
//! ```text
//!   clients --frames--> Desk --Event--> machine          machine --Action--> Desk --> transfers, pool, disk
//!                         ^----Note---- tasks
//! ```

mod attempt;
mod dials;
mod frames;
mod inputs;
mod links;
mod receive;

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use mesh_core::worker::{Action, BatchId, BatchKind, BatchTimes, Event, LinkId, Part};
use mesh_transport::{Door, Heard, Inbox, Limits, Outlet, Received, blob::Intake, dial_first};
use proto_msgs::{AttemptId, ClientId, ErrorCode, Failure, Frame, Outcome, Refuse, RunNote, RunResult, WorkerToClient};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, spawn_blocking},
    time::timeout,
};
use tracing::{debug, warn};

use self::{
    attempt::{Attempt, Stage},
    dials::{Call, Callee, Dials},
    links::Links,
};
use crate::{
    batch::{Batch, Comparing, material::Inputs, unfinished::Unfinished},
    data::{keep::Found, payload::Output},
    tools::Tools,
};

/// Notes queued for the desk. Each attempt has a few, and frames of dialled links pass through here.
const NOTES_MAX: usize = 256;

/// A client whose address the broker gave counts as unreachable after this time.
const DIAL_WAIT: Duration = Duration::from_secs(5);

/// Time for clients to take queued frames when the worker leaves.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Frames taken from the door in a row before other work has its turn.
const FRAMES_AT_ONCE: usize = 32;

/// Orders carried out in a row before other work has its turn. More than the events that one turn can cause: a flood of
/// frames must not fill the order queue with its answers.
const ORDERS_AT_ONCE: usize = 64;

/// A report from a task of the desk.
enum Note {
    /// There is room for the attempt's blobs, and the transfer can go on.
    Prepared { id: AttemptId, number: u64, intake: Intake },
    /// The attempt's inputs are complete, or will not come.
    Received { id: AttemptId, number: u64, inputs: Result<Inputs, Failure> },
    /// A batch has ended.
    BatchEnded { batch: BatchId, ended: Result<BatchTimes, Failure> },
    /// The dial of this number has ended.
    Dialled { dial: u64, dialled: Result<(Outlet, Inbox<Heard>), String> },
    /// A dialled link delivered a frame, or changed its state.
    Heard { link: LinkId, heard: Heard },
    /// A dialled link was closed.
    Closed { link: LinkId },
}

/// A running batch. Dropping it stops the batch and its runner.
struct Running {
    task: AbortHandle,
    only_loads: Arc<AtomicBool>,
    comparing: watch::Sender<Comparing>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The desk: state of all attempts, batches and links.
pub(crate) struct Desk {
    tools: Arc<Tools>,
    orders: mpsc::Receiver<Action>,
    inbox: Option<Inbox<Received>>,
    links: Links,
    dials: Dials,
    /// Comparisons that were cut short.
    unfinished: Arc<Unfinished>,
    attempts: HashMap<AttemptId, Attempt>,
    batches: HashMap<BatchId, Running>,
    early: frames::Early,
    notes: mpsc::Receiver<Note>,
    note: mpsc::Sender<Note>,
    /// Number of the newest attempt; tells an attempt from a later one with the same id.
    next_number: u64,
}

impl Desk {
    /// A desk that holds the detached attempts found on disk.
    pub(crate) fn new(
        tools: Arc<Tools>,
        orders: mpsc::Receiver<Action>,
        door: Option<(Door, Inbox<Received>)>,
        found: Vec<Found>,
    ) -> Self {
        let (door, inbox) = door.unzip();
        let (note, notes) = mpsc::channel(NOTES_MAX);
        let (links, dials, early) = (Links::new(door), Dials::default(), frames::Early::default());
        let (attempts, batches) = (HashMap::new(), HashMap::new());
        let mut desk = Self {
            tools,
            orders,
            inbox,
            links,
            dials,
            attempts,
            batches,
            early,
            notes,
            note,
            next_number: 0,
            unfinished: Arc::default(),
        };
        for found in found {
            let id = found.id;
            let attempt = Attempt::restored(desk.number(), found, &desk.tools);
            desk.attempts.insert(id, attempt);
        }
        desk
    }

    /// Works until the machine has ended.
    pub(crate) async fn work(mut self) {
        loop {
            for _ in 0..ORDERS_AT_ONCE {
                let Ok(order) = self.orders.try_recv() else { break };
                self.carry_out(order).await;
            }
            tokio::select! {
                order = self.orders.recv() => match order {
                    Some(order) => self.carry_out(order).await,
                    None => return self.leave().await,
                },
                Some(note) = self.notes.recv() => self.noted(note).await,
                received = next_frame(&mut self.inbox) => self.came_in(received).await,
            }
        }
    }

    /// Closes the links. Detached runs that end because the worker leaves do not count against their models.
    async fn leave(self) {
        let is_cut_short = |attempt: &&Attempt| attempt.is_detached() && attempt.is_under_way();
        for attempt in self.attempts.values().filter(is_cut_short) {
            if let Err(error) = self.tools.keep.give_up_run(attempt.order.id) {
                warn!(%error, "a run that is cut short cannot be noted");
            }
        }
        let _a_slow_client_loses_the_rest = timeout(CLOSE_WAIT, self.links.close()).await;
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    async fn tell_machine(&self, event: Event) {
        // Closed only when the worker is leaving.
        let _ = self.tools.machine.send(event).await;
    }

    fn tell_client(&self, link: LinkId, message: &WorkerToClient) {
        match message.to_frame() {
            Ok(frame) => self.links.send(link, frame),
            Err(error) => warn!(%error, message = message.name(), "a message cannot be encoded"),
        }
    }

    // Orders.

    async fn carry_out(&mut self, order: Action) {
        match order {
            Action::TellClient { link, message } => {
                if let WorkerToClient::Refuse(refuse) = &message {
                    self.early.forget(refuse.id, link);
                }
                self.tell_client(link, &message);
            }
            Action::Receive { id, link, manifest, ticket } => {
                self.receive(id, link, *manifest, *ticket).await;
            }
            Action::Relink { id, link } => {
                if let (Some(attempt), Some(outlet)) = (self.attempts.get_mut(&id), self.links.outlet(link).cloned()) {
                    attempt.relink(link, outlet);
                }
            }
            Action::RunBatch { batch, parts, slot, device, kind, apart, limit } => {
                debug!(batch = batch.0, slot = slot.0, device, ?kind, apart, parts = parts.len(), "batch");
                self.run_batch(batch, parts, (device, apart), kind, limit).await;
            }
            Action::KillBatch { batch } => drop(self.batches.remove(&batch)),
            Action::OnlyLoad { batch } => {
                if let Some(running) = self.batches.get(&batch) {
                    running.only_loads.store(true, Ordering::Relaxed);
                }
            }
            Action::Compare { batch, rows, limit } => self.order(batch, Comparing::Goes { rows, limit }),
            Action::StopComparing { batch } => self.order(batch, Comparing::Stops),
            Action::Kill { id } => {
                if let Some(attempt) = self.attempts.get_mut(&id) {
                    attempt.stop();
                }
            }
            Action::SendResult { id, link, outcome, runs, held_us, window_bytes } => {
                self.send_result(
                    link,
                    RunResult { id, outcome, outputs: Vec::new(), runs, held_us, goes_on: false },
                    window_bytes,
                );
            }
            Action::Silence { id } => {
                if let Some(attempt) = self.attempts.get_mut(&id) {
                    attempt.upload = None;
                }
            }
            Action::Keep { id, outcome, runs } => self.keep(id, outcome, runs),
            Action::Free { id } => self.free(id),
            Action::Dial { id, endpoints, client_key, is_held } => {
                self.dial(Call { attempt: id, is_held }, Callee { endpoints, key: client_key });
            }
            Action::TellBroker(_) | Action::SayOvertaken | Action::Exit => {} // The control loop's.
        }
    }

    async fn run_batch(
        &mut self,
        batch: BatchId,
        parts: Vec<Part>,
        (device, apart): (i16, bool),
        kind: BatchKind,
        limit: Duration,
    ) {
        let material = |part: Part| match &self.attempts.get(&part.id)?.stage {
            Stage::Here(material) => Some((part, material.clone())),
            _ => None,
        };
        let Some(parts) = parts.into_iter().map(material).collect() else {
            let failure = Failure::new(ErrorCode::WorkerLost, "the worker lost the attempt's inputs");
            return self.tell_machine(Event::BatchEnded { batch, ended: Err(failure) }).await;
        };
        let only_loads = Arc::new(AtomicBool::new(false));
        let (orders, comparing) = watch::channel(Comparing::default());
        let (unfinished, only_loads_too) = (self.unfinished.clone(), only_loads.clone());
        let order =
            Batch { batch, parts, device, kind, apart, limit, only_loads: only_loads_too, unfinished, comparing };
        let (tools, note) = (self.tools.clone(), self.note.clone());
        let task = async move {
            // A bug in one batch takes neither its slot nor the worker.
            let ended = AssertUnwindSafe(order.run(&tools)).catch_unwind().await;
            let bug =
                |_| Failure::new(ErrorCode::WorkerLost, "a bug of mesh-worker ended the batch: its log says where");
            let ended = ended.map_err(bug).flatten();
            let _ = note.send(Note::BatchEnded { batch, ended }).await;
        };
        let task = tokio::spawn(task).abort_handle();
        self.batches.insert(batch, Running { task, only_loads, comparing: orders });
    }

    /// Passes an order on to a probe whose rows are answered.
    fn order(&self, batch: BatchId, order: Comparing) {
        if let Some(running) = self.batches.get(&batch) {
            running.comparing.send_replace(order);
        }
    }

    fn send_result(&mut self, link: LinkId, mut result: RunResult, window_bytes: u32) {
        let Some(outlet) = self.links.outlet(link).cloned() else { return };
        let id = result.id;
        let (mut outputs, mut arrived, mut client) = (Vec::new(), Vec::new(), ClientId::from_bytes([0; 16]));
        if let Some(attempt) = self.attempts.get_mut(&id) {
            client = attempt.order.ticket.body.client;
            attempt.relink(link, outlet.clone());
            (result.outcome, outputs) = with_outputs(result.outcome, attempt);
            arrived = attempt.arrived_over(link);
        }
        result.outputs = outputs.iter().map(Output::declaration).collect();
        let digests = result.outputs.iter().map(|output| output.digest);
        result.goes_on = !arrived.is_empty() && digests.eq(arrived.iter().map(|part| part.digest));
        if !result.goes_on {
            arrived.clear();
        }
        let frame = WorkerToClient::Result(result).to_frame().map_err(|error| {
            Failure::new(ErrorCode::ResultTooLarge, format!("the result cannot be described: {error}"))
        });
        let tools = &self.tools;
        let sending =
            |frame| attempt::send_result((id, client), frame, (&outputs, &arrived), outlet, window_bytes, tools);
        match frame.and_then(sending) {
            Ok(upload) => {
                if let Some(attempt) = self.attempts.get_mut(&id) {
                    attempt.upload = upload;
                }
            }
            Err(Failure { code, text }) => {
                self.tell_client(link, &WorkerToClient::Refuse(Refuse { id, code, text }));
            }
        }
    }

    fn keep(&mut self, id: AttemptId, outcome: Outcome, runs: Vec<RunNote>) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        let was_done = matches!(outcome, Outcome::Done { .. });
        let (outcome, outputs) = with_outputs(outcome, attempt);
        let tools = self.tools.clone();
        let keeping = spawn_blocking(move || {
            let failure = match tools.keep.finish(id, outcome, &runs, &outputs) {
                Outcome::Failed(failure) if was_done => Some(failure),
                _ => None,
            };
            // Closed only when the worker is leaving.
            let _ = tools.machine.blocking_send(Event::Kept { id, failure });
        });
        attempt.keeping = Some(keeping);
    }

    fn free(&mut self, id: AttemptId) {
        self.links.forget_attempt(id);
        self.dials.forget_attempt(id);
        self.early.forget_attempt(id);
        let Some(mut attempt) = self.attempts.remove(&id) else { return };
        attempt.stop();
        if !attempt.is_detached() {
            return;
        }
        let tools = self.tools.clone();
        tokio::spawn(async move {
            // Not while the result is still being written.
            if let Some(keeping) = attempt.keeping.take() {
                let _ = keeping.await;
            }
            let _ = spawn_blocking(move || tools.keep.remove(id)).await;
        });
    }

    fn dial(&mut self, call: Call, callee: Callee) {
        if let Some(link) = self.links.dialled_to(&callee) {
            self.dials.forget_attempt(call.attempt);
            return self.arrived(link, call);
        }
        let (transport, note) = (self.tools.transport.clone(), self.note.clone());
        self.dials.want(call, callee, |dial, callee| {
            let Callee { endpoints, key } = callee.clone();
            let task = tokio::spawn(async move {
                let dialled = dial_first(&transport, &endpoints, key, Limits::DIRECT, DIAL_WAIT).await;
                let dialled = dialled.map(mesh_transport::Dialer::spawn).map_err(|error| error.to_string());
                let _ = note.send(Note::Dialled { dial, dialled }).await;
            });
            task.abort_handle()
        });
    }

    /// Announces the worker to the client, and again after each reconnect if the worker holds the attempt.
    fn arrived(&mut self, link: LinkId, Call { attempt, is_held }: Call) {
        if is_held {
            self.links.dialled_for(link, attempt);
        }
        self.tell_client(link, &WorkerToClient::DialIn(attempt));
    }

    // Notes.

    async fn noted(&mut self, note: Note) {
        match note {
            Note::Prepared { id, number, intake } => self.prepared(id, number, intake),
            Note::Received { id, number, inputs } => self.received(id, number, inputs).await,
            Note::BatchEnded { batch, ended } => {
                // Nobody waits for the end of a batch that was killed meanwhile.
                if self.batches.remove(&batch).is_some() {
                    self.tell_machine(Event::BatchEnded { batch, ended }).await;
                }
            }
            Note::Dialled { dial, dialled } => self.dialled(dial, dialled).await,
            Note::Heard { link, heard: Heard::Frame(frame) } => self.frame(link, frame).await,
            Note::Heard { link, heard: Heard::Connected } => {
                for id in self.links.set_lost(link, false) {
                    self.tell_client(link, &WorkerToClient::DialIn(id));
                }
            }
            // Its client goes on waiting for it, or not.
            Note::Heard { heard: Heard::Refused, .. } => {}
            Note::Heard { link, heard: Heard::Lost } => drop(self.links.set_lost(link, true)),
            Note::Closed { link } => self.links.remove(link),
        }
    }

    async fn dialled(&mut self, number: u64, dialled: Result<(Outlet, Inbox<Heard>), String>) {
        let Some(mut dial) = self.dials.ended(number) else { return };
        let calls = std::mem::take(&mut dial.calls);
        let (outlet, mut inbox) = match dialled {
            Ok(dialled) => dialled,
            Err(text) => {
                for call in calls {
                    self.tell_machine(Event::DialFailed { id: call.attempt, text: text.clone() }).await;
                }
                return;
            }
        };
        let (link, note) = (self.links.reserve(), self.note.clone());
        let reader = tokio::spawn(async move {
            while let Some(heard) = inbox.recv().await {
                if note.send(Note::Heard { link, heard }).await.is_err() {
                    return;
                }
            }
            let _ = note.send(Note::Closed { link }).await;
        });
        let attempts = &self.attempts;
        let used = || attempts.values().map(|attempt| attempt.link).collect();
        self.links.add_dialled(link, (outlet, reader.abort_handle()), std::mem::take(&mut dial.callee), used);
        for call in calls {
            debug!(task = %call.attempt.task, "client dialled");
            self.arrived(link, call);
        }
    }

    // The door.

    async fn came_in(&mut self, received: Received) {
        let mut next = Some(received);
        for _ in 0..FRAMES_AT_ONCE {
            let Some(received) = next else { return };
            self.frame_of_peer(received).await;
            next = self.inbox.as_mut().and_then(Inbox::try_recv);
        }
        if let Some(received) = next {
            self.frame_of_peer(received).await;
        }
    }

    async fn frame_of_peer(&mut self, Received { peer, key, frame }: Received) {
        let attempts = &self.attempts;
        let used = || attempts.values().map(|attempt| attempt.link).collect();
        if let Some(link) = self.links.of_peer(peer, key, used) {
            self.frame(link, frame).await;
        }
    }

    fn unsupported(&self, link: LinkId) {
        self.links.send(link, Frame::unsupported());
    }
}

/// The attempt's outcome and outputs. It fails if the rows cannot be joined.
fn with_outputs(outcome: Outcome, attempt: &Attempt) -> (Outcome, Vec<Output>) {
    match (outcome, attempt.result()) {
        (outcome @ Outcome::Done { .. }, Ok(outputs)) => (outcome, outputs.to_vec()),
        (Outcome::Done { .. }, Err(failure)) => (Outcome::Failed(failure.clone()), Vec::new()),
        (outcome, _) => (outcome, Vec::new()),
    }
}

async fn next_frame(inbox: &mut Option<Inbox<Received>>) -> Received {
    if let Some(open) = inbox {
        match open.recv().await {
            Some(received) => return received,
            None => *inbox = None,
        }
    }
    std::future::pending().await
}
