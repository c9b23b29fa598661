//! How fast the broker decides: the same client, the same messages, the same heartbeating workers, in turns against the
//! broker and against an echo that decides nothing.

mod driver;
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

/// Submits on their way at the same time.
const WINDOWS: [usize; 3] = [1, 64, 256];

/// How long and how often.
#[derive(Clone, Copy)]
struct Plan {
    workers: &'static [usize],
    rounds: usize,
    run_for: Duration,
}

const FULL: Plan = Plan { workers: &[10, 1000, 10_000], rounds: 5, run_for: Duration::from_millis(1500) };
const QUICK: Plan = Plan { workers: &[10, 100], rounds: 1, run_for: Duration::from_millis(200) };

/// One window against one server.
#[derive(Clone, Copy)]
struct Figures {
    per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Processor time of the server for one cycle, heartbeats that came meanwhile included.
    server_us: f64,
}

/// One server with one fleet.
struct Round {
    /// In the order of [`WINDOWS`].
    windows: Vec<Figures>,
    /// Without `Close`, at the widest window; the broker has none.
    bare_per_s: Option<f64>,
    /// Share of one core that the heartbeats alone take, percent.
    heartbeats_percent: f64,
}

pub(crate) fn run(quick: bool) -> Result<Report> {
    let plan = if quick { QUICK } else { FULL };
    let mut report = Report::new("broker", "Grants: the broker against a bare ROUTER/DEALER echo");
    let mut speed = Table::new(
        "Cycles per second: Submit, Grant, Close, with so many submits under way",
        &["workers", "under way", "grants/s", "echo/s", "ratio", "bare echo/s", "ratio to bare", "limited by"],
    );
    let mut latency =
        Table::new("From Submit to Grant", &["workers", "under way", "p50 ms", "echo p50 ms", "p99 ms", "echo p99 ms"]);
    let mut cost = Table::new(
        "Processor time of the server",
        &["workers", "µs per grant", "echo µs per cycle", "heartbeats alone, % of a core", "echo %"],
    );
    for workers in plan.workers {
        let (mut grants, mut echoes) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            echoes.push(against_echo(*workers, plan)?);
            grants.push(against_broker(*workers, plan)?);
        }
        add_rows(&mut speed, &mut latency, &mut cost, *workers, &grants, &echoes);
    }
    report.table(speed);
    report.table(latency);
    report.table(cost);
    report.note(format!(
        "Medians of {} rounds in turns, {} ms per window, a new server for each round. Every worker is a TCP connection of its own \
         that beats once a second and reads its answers.",
        plan.rounds,
        plan.run_for.as_millis()
    ));
    report.note(
        "`echo` gets the same three messages of a cycle as the broker and answers with the same sizes: `ratio` is per grant and, both \
         sides having three messages, per message as well. `bare echo` leaves out the Close: one message each way.",
    );
    report.note(
        "Client, fleet and server share the machine's cores, each with an I/O thread of libzmq beside it, so cycles per second are \
         bounded by the processor time of all of them together; the last table shows the server's part alone.",
    );
    Ok(report)
}

fn add_rows(
    speed: &mut Table,
    latency: &mut Table,
    cost: &mut Table,
    workers: usize,
    grants: &[Round],
    echoes: &[Round],
) {
    let middle =
        |of: &[Round], at: usize, field: fn(&Figures) -> f64| median(of.iter().map(|round| field(&round.windows[at])));
    let bare = median(echoes.iter().filter_map(|round| round.bare_per_s));
    for (at, window) in WINDOWS.into_iter().enumerate() {
        let (granted, echoed) = (middle(grants, at, |f| f.per_s), middle(echoes, at, |f| f.per_s));
        let widest = at + 1 == WINDOWS.len();
        let limit =
            if window == 1 { "wake-ups: six threads hand over per cycle" } else { "processor time of both sides" };
        speed.row(vec![
            json!(workers),
            json!(window),
            json!(granted.round()),
            json!(echoed.round()),
            json!(granted / echoed),
            if widest { json!(bare.round()) } else { json!(null) },
            if widest { json!(granted / bare) } else { json!(null) },
            json!(limit),
        ]);
        latency.row(vec![
            json!(workers),
            json!(window),
            json!(middle(grants, at, |f| f.p50_ms)),
            json!(middle(echoes, at, |f| f.p50_ms)),
            json!(middle(grants, at, |f| f.p99_ms)),
            json!(middle(echoes, at, |f| f.p99_ms)),
        ]);
    }
    let last = WINDOWS.len() - 1;
    cost.row(vec![
        json!(workers),
        json!(middle(grants, last, |f| f.server_us)),
        json!(middle(echoes, last, |f| f.server_us)),
        json!(median(grants.iter().map(|round| round.heartbeats_percent))),
        json!(median(echoes.iter().map(|round| round.heartbeats_percent))),
    ]);
}

fn against_echo(workers: usize, plan: Plan) -> Result<Round> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("echo");
    let mut echo = Process::start("echo", command);
    let endpoint =
        echo.wait_for_line("its endpoint", PATIENCE, |line| Some(line.strip_prefix("listening on ")?.to_owned()));
    let _fleet = Fleet::start(&endpoint, workers, slots(workers), Pace::EverySecond)?;
    let mut round = measure(&endpoint, echo.pid(), plan)?;
    let mut driver = Driver::connect(&endpoint)?;
    round.bare_per_s = Some(driver.drive(Cycle::Bare, WINDOWS[WINDOWS.len() - 1], plan.run_for)?.per_s);
    Ok(round)
}

fn against_broker(workers: usize, plan: Plan) -> Result<Round> {
    let mut mesh = Mesh::start();
    let _fleet = Fleet::start(mesh.endpoint(), workers, slots(workers), Pace::EverySecond)?;
    wait_until("all workers to be known", PATIENCE, || mesh.metric("workers") == Some(workers as f64));
    // A worker has room once it has said how it is.
    wait_until("all workers to have beaten", PATIENCE, || mesh.metric("heartbeats_total") >= Some(workers as f64));
    let (endpoint, pid) = (mesh.endpoint().to_owned(), mesh.broker().pid());
    measure(&endpoint, pid, plan)
}

/// Enough that no submit of the widest window has to wait.
fn slots(workers: usize) -> u16 {
    (2 * WINDOWS[WINDOWS.len() - 1] / workers).max(2) as u16
}

fn measure(endpoint: &str, server: u32, plan: Plan) -> Result<Round> {
    let (before, span) = (cpu_time(server), plan.run_for);
    std::thread::sleep(span);
    let heartbeats_percent = (cpu_time(server) - before).as_secs_f64() / span.as_secs_f64() * 100.0;
    let mut driver = Driver::connect(endpoint)?;
    driver.drive(Cycle::Whole, WINDOWS[1], plan.run_for.div_f64(4.0))?;
    let mut windows = Vec::new();
    for window in WINDOWS {
        let before = cpu_time(server);
        let mut answered = driver.drive(Cycle::Whole, window, plan.run_for)?;
        let used = cpu_time(server) - before;
        windows.push(Figures {
            per_s: answered.per_s,
            p50_ms: percentile_ms(&mut answered.times, 0.5),
            p99_ms: percentile_ms(&mut answered.times, 0.99),
            server_us: used.as_secs_f64() * 1e6 / answered.times.len() as f64,
        });
    }
    Ok(Round { windows, bare_per_s: None, heartbeats_percent })
}

/// Load on a broker that runs already.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Load {
    /// Where it listens, `tcp://HOST:PORT`.
    endpoint: String,
    /// Heartbeating workers.
    #[arg(long, default_value_t = 1000)]
    workers: usize,
    /// Submits under way at the same time; 0: heartbeats only.
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// How long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// Loads a broker and says how many grants it gave a second.
pub(crate) fn load(load: &Load) -> Result<()> {
    let _fleet = Fleet::start(&load.endpoint, load.workers, slots(load.workers), Pace::EverySecond)?;
    let run_for = Duration::from_secs(load.seconds);
    // A worker has room once it has said how it is.
    std::thread::sleep(2 * fleet::HEARTBEAT);
    if load.window == 0 {
        std::thread::sleep(run_for);
        return Ok(());
    }
    let answered = Driver::connect(&load.endpoint)?.drive(Cycle::Whole, load.window, run_for)?;
    println!("{:.0} grants/s", answered.per_s);
    Ok(())
}
