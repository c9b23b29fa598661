//! Figures of the mesh as ratios against the bare thing, measured in turns in one run on one machine.
//!
//! Owns the load, the baselines and the report. Never: thresholds that make a build fail; machines differ, people read.
//!
//! | command    | the mesh                                     | the bare thing                                  |
//! |------------|----------------------------------------------|-------------------------------------------------|
//! | `grants`   | a broker with heartbeating workers           | a libzmq ROUTER that echoes the same sizes      |
//! | `transfer` | client to worker, RAM disk to RAM disk       | curl to nginx, socat, rsync to its daemon       |
//! | `answer`   | `submit` to answer, cold, warm, in a container | the runtime in the runner, without the mesh   |
//! | `idle`     | a worker with nothing to do                  | nothing                                         |
//! | `table`    | the Metric Table in Redis                    | the same rows, pipelined into Redis by hand     |

mod answer;
mod echo;
mod fleet;
mod grants;
mod idle;
mod report;
mod table;
mod transfer;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

use report::Section;

/// Side-by-side figures: the mesh against the bare thing, in one run.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  mesh-bench all --results bench/results\n  mesh-bench grants\n  mesh-bench all --smoke\n\n\
    Takes the programs in target/release (or $MESH_BIN_DIR); needs what ./test fetches. Let the machine be idle."
)]
struct Args {
    /// Tiny sizes and short runs: shows that everything works, says nothing about speed.
    #[arg(long, global = true)]
    smoke: bool,
    /// Writes one .md and one .json file per bench into this folder.
    #[arg(long, global = true, value_name = "DIR")]
    results: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Bench {
    /// Everything below, one after the other.
    All,
    /// Grants per second and their latency, with 10, 1,000 and 10,000 workers.
    Grants,
    /// 1 MiB, 100 MiB and 1 GiB from client to worker.
    Transfer,
    /// Time from submit to answer of a tiny model.
    Answer,
    /// Memory and processor use of an idle worker.
    Idle,
    /// Heartbeats per second into Redis.
    Table,
    /// The echo server that `grants` compares with; started by it.
    #[command(hide = true)]
    Echo,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let benches: &[Bench] = match args.bench {
        Bench::Echo => return echo::serve(),
        Bench::All => &[Bench::Grants, Bench::Transfer, Bench::Answer, Bench::Idle, Bench::Table],
        ref one => std::slice::from_ref(one),
    };
    for bench in benches {
        let section = run(*bench, args.smoke)?;
        println!("{}", section.to_markdown());
        if let Some(folder) = &args.results {
            section.write(folder)?;
        }
    }
    Ok(())
}

fn run(bench: Bench, smoke: bool) -> Result<Section> {
    match bench {
        Bench::Grants => grants::run(smoke),
        Bench::Transfer => transfer::run(smoke),
        Bench::Answer => answer::run(smoke),
        Bench::Idle => idle::run(smoke),
        Bench::Table => table::run(smoke),
        Bench::All | Bench::Echo => unreachable!("no single benches"),
    }
}
