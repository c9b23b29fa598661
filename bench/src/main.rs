//! Figures of the mesh as ratios against the bare thing, measured in turns in one run on one machine.
//!
//! Owns the load, the baselines and the report. Never: thresholds that make a build fail, since machines differ and
//! people read the figures.

mod aims;
mod broker;
mod idle;
mod measure;
mod redis;
mod report;
mod schedule;
mod submit;
mod transfer;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use report::Report;

/// Side-by-side figures: the mesh against the bare thing, in one run.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  mesh-bench all\n  mesh-bench broker\n  mesh-bench all --quick\n\n\
    Takes the programs in target/release (or $MESH_BIN_DIR); needs what ./test fetches. Let the machine be idle."
)]
struct Args {
    /// Use tiny sizes and short runs and write nothing: shows that everything works, but nothing about speed
    #[arg(long, global = true)]
    quick: bool,
    /// Folder for the tables and their JSON; default: bench/results (nothing is written if the sizes are not the usual
    /// ones)
    #[arg(long, global = true, value_name = "DIR")]
    results: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Clone, Debug, Subcommand)]
enum Bench {
    /// Run all of the following, one after the other
    All,
    /// Grants per second and their latency, with 10, 1,000 and 10,000 workers.
    Broker,
    /// 1 MiB, 100 MiB and 1 GiB from client to worker.
    Transfer,
    /// Time from submit to answer of a tiny model: cold, warm, in a container, and without the mesh.
    Submit,
    /// Memory and processor use of an idle worker.
    Idle,
    /// Heartbeats per second into Redis.
    Redis,
    /// The value of scheduling, on devices of stated cost: every experiment, or those named.
    Schedule(schedule::Schedule),
    /// Keep a running broker busy, for a profiler.
    Load(broker::Load),
    /// The echo server that `broker` compares with and starts.
    #[command(hide = true)]
    Echo,
    /// A server of the baseline that `schedule gpu` compares with and starts.
    #[command(hide = true)]
    Bare { role: schedule::bare::Role },
}

fn main() -> Result<()> {
    let args = Args::parse();
    raise_file_limit()?;
    let benches: &[Bench] = match &args.bench {
        Bench::Echo => return broker::echo::serve(),
        Bench::Bare { role } => return schedule::bare::serve(*role),
        Bench::Load(load) => return broker::load(load),
        Bench::All => &[Bench::Broker, Bench::Transfer, Bench::Submit, Bench::Idle, Bench::Redis],
        one => std::slice::from_ref(one),
    };
    let folder = match (args.results, args.quick) {
        (Some(folder), _) => Some(folder),
        (None, true) => None,
        (None, false) if matches!(&args.bench, Bench::Schedule(schedule) if !schedule.is_usual()) => None,
        (None, false) => Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("results")),
    };
    let show = |report: &Report| {
        println!("{}", report.to_markdown());
        folder.as_ref().map_or(Ok(()), |folder| report.write(folder))
    };
    if let Bench::Schedule(schedule) = &args.bench {
        return schedule.run(args.quick, show);
    }
    benches.iter().try_for_each(|bench| show(&run(bench, args.quick)?))
}

fn run(bench: &Bench, quick: bool) -> Result<Report> {
    match bench {
        Bench::Broker => broker::run(quick),
        Bench::Transfer => transfer::run(quick),
        Bench::Submit => submit::run(quick),
        Bench::Idle => idle::run(quick),
        Bench::Redis => redis::run(quick),
        Bench::All | Bench::Schedule(_) | Bench::Load(_) | Bench::Echo | Bench::Bare { .. } => {
            unreachable!("no single benches")
        }
    }
}

/// Raises the limit of open files: ten thousand workers are as many connections, here and in the servers that inherit
/// it.
fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}
