//! How fast the broker decides: the same client, messages and heartbeating workers, in turns against the broker and
//! against an echo that decides nothing.

pub(crate) mod driver;
pub(crate) mod echo;
pub(crate) mod fleet;

use std::{process::Command, time::Duration};

use anyhow::Result;
use mesh_tests::{Mesh, PATIENCE, Process, wait_until};
use serde_json::json;

use crate::{
    measure::cpu_time,
    report::{Report, Table, median, percentile_ms},
};
use driver::{Cycle, Driver};
use fleet::{Fleet, Pace};

/// Number of the client's connections, and of the submits under way over them.
#[derive(Clone, Copy)]
struct Shape {
    connections: usize,
    window: usize,
    limit: &'static str,
}

const fn shape(connections: usize, window: usize, limit: &'static str) -> Shape {
    Shape { connections, window, limit }
}

/// One submit at a time; one busy client; many clients with one submit each, as in a real mesh.
const SHAPES: [Shape; 5] = [
    shape(1, 1, "wake-ups: six hand-overs between four threads per cycle"),
    shape(1, 64, ONE_THREAD),
    shape(1, 256, ONE_THREAD),
    shape(64, 64, SYSTEM_CALLS),
    shape(256, 256, SYSTEM_CALLS),
];
const ONE_THREAD: &str = "the broker's one thread: decode, decide, encode; libzmq moves such messages in large batches";
const SYSTEM_CALLS: &str = "a system call per message and connection in the I/O threads, then the broker's one thread";
const WINDOW_MAX: usize = 256;

/// Length and number of the measurements.
#[derive(Clone, Copy)]
struct Plan {
    workers: &'static [usize],
    rounds: usize,
    run_for: Duration,
}

const FULL: Plan = Plan { workers: &[10, 1000, 10_000], rounds: 5, run_for: Duration::from_millis(1000) };
const QUICK: Plan = Plan { workers: &[10, 100], rounds: 1, run_for: Duration::from_millis(200) };

/// Figures of one shape against one server.
#[derive(Clone, Copy)]
struct Figures {
    per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Processor time of the server per cycle, including heartbeats in that time.
    server_us: f64,
    /// Cycles without `Close` per second; measured for the echo only.
    bare_per_s: f64,
}

/// Figures of one server with one fleet.
struct Round {
    /// Figures in the order of [`SHAPES`].
    shapes: Vec<Figures>,
    /// Share of one core for the heartbeats alone, percent.
    heartbeats_percent: f64,
}

/// Rounds in turns against both servers.
#[derive(Default)]
struct Rounds {
    broker: Vec<Round>,
    echo: Vec<Round>,
}

pub(crate) fn run(quick: bool) -> Result<Report> {
    let plan = if quick { QUICK } else { FULL };
    let mut report = Report::new("broker", "Grants: the broker against a bare ROUTER/DEALER echo");
    let mut speed = Table::new(
        "Cycles per second: Submit, Grant, Close",
        &[
            "workers",
            "connections",
            "under way",
            "grants/s",
            "echo/s",
            "ratio",
            "bare echo/s",
            "ratio to bare",
            "limited by",
        ],
    );
    let mut latency = Table::new(
        "From Submit to Grant, and the server's processor time for each",
        &["workers", "connections", "under way", "p50 ms", "echo p50", "p99 ms", "echo p99", "server µs", "echo µs"],
    );
    let mut beats = Table::new(
        "Heartbeats alone, once a second each",
        &["workers", "broker % of a core", "echo % of a core", "limited by"],
    );
    for workers in plan.workers {
        let mut rounds = Rounds::default();
        for _ in 0..plan.rounds {
            rounds.echo.push(against_echo(*workers, plan)?);
            rounds.broker.push(against_broker(*workers, plan)?);
        }
        rounds.add_rows(*workers, &mut speed, &mut latency);
        let percent = |of: &[Round]| json!(median(of.iter().map(|round| round.heartbeats_percent)));
        let limit = "a system call per heartbeat and one per answer";
        beats.row(vec![json!(workers), percent(&rounds.broker), percent(&rounds.echo), json!(limit)]);
    }
    report.table(speed);
    report.table(latency);
    report.table(beats);
    report.note(format!(
        "Medians of {} rounds in turns ({} ms each), a new server for each; ratios are medians, too, of each round's own. \
         Every worker is a TCP connection of its own that beats once a second and reads its answers.",
        plan.rounds,
        plan.run_for.as_millis()
    ));
    report.note(
        "`echo` gets the same three messages of a cycle as the broker and answers with the same sizes: `ratio` is per \
         grant and, both sides having three messages, per message as well. `bare echo` leaves out the Close: one \
         message each way.",
    );
    report.note(
        "Client, fleet and server share the machine's cores, each with an I/O thread of libzmq beside it. The client's \
         messages are encoded beforehand, so that nearly all that is compared is the server.",
    );
    Ok(report)
}

impl Rounds {
    fn add_rows(&self, workers: usize, speed: &mut Table, latency: &mut Table) {
        for (at, shape) in SHAPES.into_iter().enumerate() {
            let middle =
                |of: &[Round], field: fn(&Figures) -> f64| median(of.iter().map(|round| field(&round.shapes[at])));
            let both =
                |field: fn(&Figures) -> f64| [json!(middle(&self.broker, field)), json!(middle(&self.echo, field))];
            let shown = [json!(workers), json!(shape.connections), json!(shape.window)];
            let (granted, echoed) = (middle(&self.broker, |f| f.per_s), middle(&self.echo, |f| f.per_s));
            let bare = middle(&self.echo, |f| f.bare_per_s);
            let ratio = |of_echo: fn(&Figures) -> f64| {
                let rounds = self.broker.iter().zip(&self.echo);
                median(rounds.map(|(broker, echo)| broker.shapes[at].per_s / of_echo(&echo.shapes[at])))
            };
            let (to_echo, to_bare) = (ratio(|f| f.per_s), ratio(|f| f.bare_per_s));
            let rates = [granted.round(), echoed.round(), to_echo, bare.round(), to_bare];
            let rates = rates.map(|value| json!(value));
            speed.row([&shown[..], &rates[..], &[json!(shape.limit)]].concat());
            let figures = [both(|f| f.p50_ms), both(|f| f.p99_ms), both(|f| f.server_us)].concat();
            latency.row([&shown[..], &figures[..]].concat());
        }
    }
}

fn against_echo(workers: usize, plan: Plan) -> Result<Round> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("echo");
    let mut echo = Process::start("echo", command);
    let endpoint =
        echo.wait_for_line("its endpoint", PATIENCE, |line| Some(line.strip_prefix("listening on ")?.to_owned()));
    let _fleet = Fleet::start(&endpoint, workers, slots(workers), Pace::EverySecond)?;
    let mut round = measure(&endpoint, echo.pid(), plan)?;
    for (shape, figures) in SHAPES.into_iter().zip(&mut round.shapes) {
        let mut driver = Driver::connect(&endpoint, shape.connections)?;
        figures.bare_per_s = driver.drive(Cycle::Bare, shape.window, plan.run_for)?.per_s;
    }
    Ok(round)
}

fn against_broker(workers: usize, plan: Plan) -> Result<Round> {
    let mut mesh = Mesh::start();
    let _fleet = Fleet::start(mesh.endpoint(), workers, slots(workers), Pace::EverySecond)?;
    wait_until("all workers to be known", PATIENCE, || mesh.metric("workers") == Some(workers as f64));
    // A worker has room only after its first heartbeat.
    wait_until("all workers to have beaten", PATIENCE, || mesh.metric("heartbeats_total") >= Some(workers as f64));
    let (endpoint, pid) = (mesh.endpoint().to_owned(), mesh.broker().pid());
    measure(&endpoint, pid, plan)
}

/// Enough slots that no submit of the widest window must wait.
fn slots(workers: usize) -> u16 {
    (2 * WINDOW_MAX / workers).max(2) as u16
}

fn measure(endpoint: &str, server: u32, plan: Plan) -> Result<Round> {
    let (before, span) = (cpu_time(server), plan.run_for);
    std::thread::sleep(span);
    let heartbeats_percent = (cpu_time(server) - before).as_secs_f64() / span.as_secs_f64() * 100.0;
    let mut shapes = Vec::new();
    for shape in SHAPES {
        let mut driver = Driver::connect(endpoint, shape.connections)?;
        driver.drive(Cycle::Whole, shape.window, plan.run_for.div_f64(5.0))?;
        let before = cpu_time(server);
        let mut answered = driver.drive(Cycle::Whole, shape.window, plan.run_for)?;
        let used = cpu_time(server) - before;
        shapes.push(Figures {
            per_s: answered.per_s,
            p50_ms: percentile_ms(&mut answered.times, 0.5),
            p99_ms: percentile_ms(&mut answered.times, 0.99),
            server_us: used.as_secs_f64() * 1e6 / answered.times.len() as f64,
            bare_per_s: f64::NAN,
        });
    }
    Ok(Round { shapes, heartbeats_percent })
}

/// Load on a running broker.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Load {
    /// The broker's endpoint, `tcp://HOST:PORT`.
    endpoint: String,
    /// Heartbeating workers.
    #[arg(long, default_value_t = 1000)]
    workers: usize,
    /// Submits under way at the same time; 0: heartbeats only.
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Connections that carry the submits
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Length of the load, seconds
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// Loads a broker and prints its grants per second.
pub(crate) fn load(load: &Load) -> Result<()> {
    let _fleet = Fleet::start(&load.endpoint, load.workers, slots(load.workers), Pace::EverySecond)?;
    let run_for = Duration::from_secs(load.seconds);
    // A worker has room only after its first heartbeat.
    std::thread::sleep(2 * fleet::HEARTBEAT);
    if load.window == 0 {
        std::thread::sleep(run_for);
        return Ok(());
    }
    let answered = Driver::connect(&load.endpoint, load.connections)?.drive(Cycle::Whole, load.window, run_for)?;
    println!("{:.0} grants/s", answered.per_s);
    Ok(())
}
