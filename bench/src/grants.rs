//! How fast the broker decides: the same client, the same messages, the same heartbeating workers, once against the broker
//! and once against an echo that decides nothing.

use std::{
    collections::HashMap,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Mesh, PATIENCE, Process, wait_until};
use proto_msgs::{
    Attempt, BrokerToClient, ClientId, ClientToBroker, Close, Demands, Digest, Frame, Header, JobId, ModelFormat,
    ModelRef, Outcome, Standing, Submit, TaskId,
};
use serde_json::json;

use crate::{
    fleet::Fleet,
    report::{Section, median, percentile_ms},
};

/// Submits on their way at the same time when throughput is measured.
const WINDOW: usize = 64;

/// What one run gave.
#[derive(Clone, Copy, Debug)]
struct Figures {
    per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
}

pub(crate) fn run(smoke: bool) -> Result<Section> {
    let columns =
        &["workers", "grants/s", "echoes/s", "ratio", "grant p50 ms", "echo p50 ms", "grant p99 ms", "echo p99 ms"];
    let mut section = Section::new("grants", "Grants: the broker against a bare ROUTER/DEALER echo", columns);
    let (sizes, rounds, run_for): (&[usize], usize, _) =
        if smoke { (&[10], 1, Duration::from_millis(300)) } else { (&[10, 1000, 10_000], 3, Duration::from_secs(4)) };
    for workers in sizes {
        let (mut grants, mut echoes) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            echoes.push(against_echo(*workers, run_for)?);
            grants.push(against_broker(*workers, run_for)?);
        }
        let middle = |of: &[Figures], field: fn(&Figures) -> f64| median(&mut of.iter().map(field).collect::<Vec<_>>());
        let (granted, echoed) = (middle(&grants, |f| f.per_s), middle(&echoes, |f| f.per_s));
        section.row(vec![
            json!(workers),
            json!(granted.round()),
            json!(echoed.round()),
            json!(granted / echoed),
            json!(middle(&grants, |f| f.p50_ms)),
            json!(middle(&echoes, |f| f.p50_ms)),
            json!(middle(&grants, |f| f.p99_ms)),
            json!(middle(&echoes, |f| f.p99_ms)),
        ]);
    }
    section.note(format!(
        "Throughput with {WINDOW} submits under way; latency with one. Each grant is a Submit, a Grant and the Close that frees \
         its slot; the echo gets the same messages and answers with the same sizes. Median of {rounds} rounds in turns."
    ));
    section.note(
        "Client, workers and broker share the machine's cores: what limits is libzmq's work per message on both sides; the \
         decision itself (tables, ticket, store) is the difference of the two columns.",
    );
    Ok(section)
}

fn against_echo(workers: usize, run_for: Duration) -> Result<Figures> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("echo");
    let mut echo = Process::start("echo", command);
    let endpoint =
        echo.wait_for_line("its endpoint", PATIENCE, |line| Some(line.strip_prefix("listening on ")?.to_owned()));
    let _fleet = Fleet::start(&endpoint, workers, slots(workers), false)?;
    measure(&endpoint, run_for)
}

fn against_broker(workers: usize, run_for: Duration) -> Result<Figures> {
    let mesh = Mesh::start();
    let _fleet = Fleet::start(mesh.endpoint(), workers, slots(workers), false)?;
    wait_until("all workers to be known", PATIENCE, || mesh.metric("workers") == Some(workers as f64));
    measure(mesh.endpoint(), run_for)
}

/// Few workers have many slots, so that none is ever waited for.
fn slots(workers: usize) -> u16 {
    if workers < 100 { 64 } else { 2 }
}

fn measure(endpoint: &str, run_for: Duration) -> Result<Figures> {
    let mut client = Client::connect(endpoint)?;
    client.drive(WINDOW, run_for.div_f64(4.0))?;
    let start = Instant::now();
    let answered = client.drive(WINDOW, run_for)?.len();
    let per_s = answered as f64 / start.elapsed().as_secs_f64();
    let mut alone = client.drive(1, run_for.div_f64(2.0))?;
    Ok(Figures { per_s, p50_ms: percentile_ms(&mut alone, 0.5), p99_ms: percentile_ms(&mut alone, 0.99) })
}

/// One DEALER that submits, takes the grant and closes, over and over.
struct Client {
    socket: zmq::Socket,
    submit: Submit,
    count: u64,
}

impl Client {
    fn connect(endpoint: &str) -> Result<Self> {
        let socket = zmq::Context::new().socket(zmq::DEALER)?;
        socket.set_linger(0)?;
        socket.set_rcvtimeo(PATIENCE.as_millis() as i32)?;
        socket.connect(endpoint)?;
        let submit = Submit {
            task: TaskId::from_bytes([0; 16]),
            client: ClientId::from_bytes(*uuid::Uuid::now_v7().as_bytes()),
            job: JobId::from_bytes([1; 16]),
            model_name: "bench.onnx".into(),
            model: ModelRef { digest: Digest::of(b"bench"), size_bytes: 1 << 20, format: ModelFormat::Onnx },
            input_bytes: 4096,
            priority: 50,
            deadline_ms: None,
            demands: Demands::default(),
            detached: false,
            key: None,
            endpoints: Vec::new(),
            direction: None,
            standing: Standing::Asking,
        };
        Ok(Self { socket, submit, count: 0 })
    }

    /// Keeps `window` submits under way for this long; gives the time of each from submit to grant.
    fn drive(&mut self, window: usize, run_for: Duration) -> Result<Vec<Duration>> {
        let start = Instant::now();
        let mut under_way = HashMap::new();
        let mut order = std::collections::VecDeque::new();
        let mut times = Vec::new();
        for _ in 0..window {
            order.push_back(self.submit(&mut under_way)?);
        }
        while !under_way.is_empty() {
            let answer = Frame::new(self.socket.recv_bytes(0).context("no answer to a submit")?);
            let BrokerToClient::Grant(grant) = BrokerToClient::from_frame(&answer)? else { continue };
            // The echo answers in order and names no task.
            let oldest = order.pop_front().context("more answers than questions")?;
            let task = if under_way.contains_key(&grant.id.task) { grant.id.task } else { oldest };
            let began = under_way.remove(&task).context("each is answered once")?;
            times.push(began.elapsed());
            self.close(task, grant.id.attempt)?;
            if start.elapsed() < run_for {
                order.push_back(self.submit(&mut under_way)?);
            }
        }
        ensure!(!times.is_empty(), "nothing was granted");
        Ok(times)
    }

    fn submit(&mut self, under_way: &mut HashMap<TaskId, Instant>) -> Result<TaskId> {
        self.count += 1;
        self.submit.task = TaskId::from(uuid::Uuid::now_v7());
        under_way.insert(self.submit.task, Instant::now());
        self.send(&ClientToBroker::Submit(self.submit.clone()))?;
        Ok(self.submit.task)
    }

    fn close(&self, task: TaskId, attempt: Attempt) -> Result<()> {
        let outcome = Outcome::Done { run_us: 100, load_us: 0 };
        self.send(&ClientToBroker::Close(Close { task, client: self.submit.client, attempt, outcome }))
    }

    fn send(&self, message: &ClientToBroker) -> Result<()> {
        let frame = message.to_frame()?;
        debug_assert!(Header::split(&frame.head).is_some());
        self.socket.send(&frame.head[..], 0).context("cannot send")
    }
}
