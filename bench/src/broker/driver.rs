//! The client that drives broker and echo alike, as cheap as possible, since its cost is part of both figures. Its
//! messages are encoded once and only the task's id is rewritten; of an answer it reads only kind number and task.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::PATIENCE;
use proto_msgs::{
    Attempt, AttemptId, BrokerToClient, ClientId, ClientToBroker, Close, Digest, Direction, Frame, Grant, Header,
    ModelFormat, ModelRef, Outcome, Submit, TaskId, Ticket, TicketBody, header::HEADER_BYTES, limits::WINDOW_BYTES,
};

/// `Submit`, `Grant` and `Close` begin with the task's id.
const TASK_BYTES: usize = 16;

/// The messages of one cycle.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cycle {
    /// Grant, then the `Close` that frees the slot: three messages.
    Whole,
    /// Grant alone: two messages. Only an echo can go on for long without `Close`.
    Bare,
}

/// The result of one measurement.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answered {
    pub(crate) per_s: f64,
    /// Time from each submit to its grant.
    pub(crate) times: Vec<Duration>,
}

/// One DEALER with any number of connections, and its message templates.
pub(crate) struct Driver {
    socket: zmq::Socket,
    submit: Vec<u8>,
    close: Vec<u8>,
    grant_kind: u16,
    count: u64,
    under_way: HashMap<u64, Instant>,
}

impl Driver {
    /// A client with this many connections; each submit takes the next one.
    pub(crate) fn connect(endpoint: &str, connections: usize) -> Result<Self> {
        let socket = zmq::Context::new().socket(zmq::DEALER)?;
        socket.set_linger(0)?;
        socket.set_rcvtimeo(PATIENCE.as_millis() as i32)?;
        let (_, port) = endpoint.rsplit_once(':').context("an endpoint has a port")?;
        for number in 0..connections {
            // A DEALER connects to one address only once, but a different source address makes a new connection. All of
            // 127/8 is local.
            let (high, low) = (number / 250, number % 250 + 1);
            socket.connect(&format!("tcp://127.0.{high}.{low}:0;127.0.0.1:{port}"))?;
        }
        let client = ClientId::from_bytes(*uuid::Uuid::now_v7().as_bytes());
        let (submit, close) = (example_submit(client), example_close(client));
        let driver = Self {
            socket,
            submit: ClientToBroker::Submit(submit).to_frame()?.head.to_vec(),
            close: ClientToBroker::Close(close).to_frame()?.head.to_vec(),
            grant_kind: kind_of(BrokerToClient::KINDS, "Grant"),
            count: u64::from_be_bytes(*uuid::Uuid::new_v4().as_bytes().first_chunk().expect("16 bytes")) >> 1,
            under_way: HashMap::new(),
        };
        driver.check_templates()?;
        Ok(driver)
    }

    /// Keeps `window` submits under way for this long.
    pub(crate) fn drive(&mut self, cycle: Cycle, window: usize, run_for: Duration) -> Result<Answered> {
        let start = Instant::now();
        let mut times = Vec::with_capacity(1 << 16);
        for _ in 0..window {
            self.submit()?;
        }
        let mut answer = zmq::Message::new();
        while !self.under_way.is_empty() {
            self.socket.recv(&mut answer, 0).context("no answer to a submit")?;
            let task = self.granted(&answer)?;
            let began = self.under_way.remove(&task).context("a grant that was not asked for, or a second one")?;
            times.push(began.elapsed());
            if cycle == Cycle::Whole {
                set_task(&mut self.close, task_bytes(task));
                self.socket.send(&self.close[..], 0)?;
            }
            if start.elapsed() < run_for {
                self.submit()?;
            }
        }
        ensure!(!times.is_empty(), "nothing was granted");
        Ok(Answered { per_s: times.len() as f64 / start.elapsed().as_secs_f64(), times })
    }

    fn submit(&mut self) -> Result<()> {
        self.count += 1;
        set_task(&mut self.submit, task_bytes(self.count));
        self.under_way.insert(self.count, Instant::now());
        self.socket.send(&self.submit[..], 0).context("cannot send a submit")
    }

    /// The number of the task that was granted.
    fn granted(&self, answer: &[u8]) -> Result<u64> {
        if Header::split(answer).is_some_and(|(header, _)| header.kind == self.grant_kind)
            && let Some(task) = task_of(answer)
        {
            return Ok(u64::from_be_bytes(*task.last_chunk().expect("invariant: 16 bytes have 8")));
        }
        bail!("wanted a grant, got {:?}", BrokerToClient::from_frame(&Frame::new(answer.to_vec())));
    }

    /// Checks that writing ids into encoded messages gives the same bytes as encoding.
    fn check_templates(&self) -> Result<()> {
        for template in [&self.submit, &self.close] {
            let mut bytes = template.clone();
            set_task(&mut bytes, task_bytes(7));
            let task = match ClientToBroker::from_frame(&Frame::new(bytes))? {
                ClientToBroker::Submit(submit) => submit.spec.task,
                ClientToBroker::Close(close) => close.task,
                other => bail!("no template has {}", other.name()),
            };
            ensure!(task.as_bytes() == &task_bytes(7), "submit and close begin with the task's id");
        }
        Ok(())
    }
}

fn task_bytes(count: u64) -> [u8; TASK_BYTES] {
    let mut bytes = *b"bench\0\x70\0\x80\0\0\0\0\0\0\0";
    bytes[8..].copy_from_slice(&count.to_be_bytes());
    bytes
}

/// The task's id in an encoded `Submit`, `Grant` or `Close`.
pub(crate) fn task_of(message: &[u8]) -> Option<[u8; TASK_BYTES]> {
    message.get(HEADER_BYTES..)?.first_chunk().copied()
}

/// Writes another task's id into an encoded `Submit`, `Grant` or `Close`.
pub(crate) fn set_task(message: &mut [u8], task: [u8; TASK_BYTES]) {
    message[HEADER_BYTES..HEADER_BYTES + TASK_BYTES].copy_from_slice(&task);
}

/// The kind number of the message with this name.
pub(crate) fn kind_of(kinds: &[(u16, &str)], name: &str) -> u16 {
    kinds.iter().find(|(_, known)| *known == name).expect("invariant: named as in proto-msgs").0
}

fn example_submit(client: ClientId) -> Submit {
    let mut submit = mesh_samples::submit(0, 0);
    (submit.spec.task, submit.spec.client) = (TaskId::from_bytes([0; TASK_BYTES]), client);
    submit.spec.model = ModelRef { digest: Digest::of(b"bench"), size_bytes: 1 << 20, format: ModelFormat::Onnx };
    submit.spec.input_bytes = 4096;
    submit
}

fn example_close(client: ClientId) -> Close {
    let outcome = Outcome::Done { run_us: 100, load_us: 0 };
    Close { task: TaskId::from_bytes([0; TASK_BYTES]), client, attempt: Attempt(1), outcome }
}

/// A grant as the broker gives it to this driver.
pub(crate) fn example_grant() -> Grant {
    let id = AttemptId { task: TaskId::from_bytes([0; TASK_BYTES]), attempt: Attempt(1) };
    let body = TicketBody { task: id.task, ..mesh_samples::ticket_body(0, 3, 2) };
    Grant {
        id,
        worker: body.worker,
        worker_name: "bench-1000".into(),
        worker_key: None,
        endpoints: vec!["tcp://127.0.0.1:9".into()],
        direction: Direction::ClientDials,
        window_bytes: WINDOW_BYTES,
        model_held: false,
        predicted_ms: None,
        ticket: Ticket::sign(body, &mesh_samples::TICKET_KEY),
    }
}
