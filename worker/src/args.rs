//! The command line: names and meanings only. `config.rs` checks the values.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_core::worker::headroom::Headroom;

use proto_msgs::units;

const EXAMPLES: &str = "\
Examples:
  mesh-worker                                        a worker for the broker on this machine
  mesh-worker --broker tcp://cloud:5555 --slots 2    … for a broker elsewhere
  mesh-worker --realtime-slots 4 --batch-slots 0     no bulk work here
  mesh-worker --slots 4 --device-map=-1,0            half of the slots on the processor, half on the first GPU
  mesh-worker --broker tcp://cloud:5555 --advertise edge7.example.org:7000 --data-bind tcp://0.0.0.0:7000
  mesh-worker --broker tcp://cloud:5555 --no-listen  behind NAT: the worker dials its clients
  mesh-worker keygen worker.key                      make keys; give worker.key.pub to the broker

Exit codes: 0 clean, 1 error, 2 usage, 78 bad configuration.";

/// Runs models for the mesh on this machine.
#[derive(Debug, Parser)]
#[command(name = "mesh-worker", version, after_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true, args_override_self = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a key pair: FILE with the secret key and FILE.pub with the public one.
    Keygen {
        /// Where to; never over a file that exists.
        file: PathBuf,
    },
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// How models are run.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// Containers if an engine answers and has the image, else child processes.
    Auto,
    /// Containers.
    Docker,
    /// Child processes.
    Process,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The broker's address.
    #[arg(long, env = "MESH_BROKER", default_value = "tcp://127.0.0.1:5555", value_name = "ENDPOINT")]
    pub(crate) broker: String,
    /// The broker's public key, or a file with it: connections are encrypted, --key-file is needed, too.
    #[arg(long, env = "MESH_BROKER_KEY", value_name = "KEY|FILE")]
    pub(crate) broker_key: Option<String>,
    /// This worker's secret key (see keygen).
    #[arg(long, env = "MESH_KEY_FILE", value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Where models, results and the worker's identity are kept [default: ~/.local/state/mesh/worker].
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Name for people [default: the host's].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// For people, and for tasks that require or prefer it; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
    /// Time between heartbeats. With more than two seconds, tasks that no other worker can run may be refused for so
    /// long after a restart of the broker.
    #[arg(long, default_value = "1s", value_parser = units::duration, value_name = "TIME")]
    pub(crate) heartbeat: Duration,
    /// Batches at the same time, half of them in each lane, an odd one in the batch lane [default: the number of cores].
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u16>,
    /// Slots of the realtime lane, which also borrows idle ones of the batch lane [default: half of --slots].
    #[arg(long, value_name = "N", conflicts_with = "slots")]
    pub(crate) realtime_slots: Option<u16>,
    /// Slots of the batch lane [default: the other half].
    #[arg(long, value_name = "N", conflicts_with = "slots")]
    pub(crate) batch_slots: Option<u16>,
    /// What slots compute on, in turn, realtime ones first: -1 the processor, 0 and up a GPU.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', allow_hyphen_values = true, default_value = "-1")]
    pub(crate) device_map: Vec<i16>,
    /// Batches at the same time on one GPU.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) device_width: u16,

    /// Items of one model that may run in one call, where that was found to give the same and to pay; 1: never.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) pack_max: u16,

    /// How models are run.
    #[arg(long, value_enum, default_value = "auto", help_heading = "Engine")]
    pub(crate) engine: EngineChoice,
    /// The engine's socket [default: $CONTAINER_HOST, then where Docker and Podman listen; the first that answers].
    #[arg(long, env = "DOCKER_HOST", value_name = "unix:///…", help_heading = "Engine")]
    pub(crate) docker_host: Option<String>,
    /// Image with the runner (see docker/build-image).
    #[arg(long, default_value = "mesh-runner:latest", help_heading = "Engine")]
    pub(crate) image: String,
    /// The runner for --engine process [default: mesh-runner beside this program, or in PATH].
    #[arg(long, env = "MESH_RUNNER", value_name = "PATH", help_heading = "Engine")]
    pub(crate) runner: Option<PathBuf>,
    /// Loaded models kept when idle [default: as many as slots, at least 2].
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub(crate) warm: Option<usize>,

    /// Space for models and large inputs and outputs [default: 10GiB, or half of what is free].
    #[arg(long, value_parser = units::size_bytes, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) quota: Option<u64>,
    /// Memory of a run that asks for none [default: the machine's, divided by slots].
    #[arg(long, value_parser = units::size_bytes, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) memory_limit: Option<u64>,
    /// Cores that a task gets for the cores it asks: a line through these points.
    #[arg(long, default_value = "2:2.2,5:5.3", value_name = "ASKED:GOT,…", help_heading = "Limits")]
    pub(crate) cpu_headroom: Headroom,
    /// Longest call of a model, loading included.
    #[arg(long, default_value = "5m", value_parser = units::duration, value_name = "TIME", help_heading = "Limits")]
    pub(crate) run_limit: Duration,
    /// Time that running tasks get when the worker is told to stop.
    #[arg(long, default_value = "30s", value_parser = units::duration, value_name = "TIME", help_heading = "Limits")]
    pub(crate) drain_wait: Duration,
    /// Results of detached tasks can be fetched for so long, and their inputs stay beside them; see also mesh-broker
    /// --keep-ended.
    #[arg(long, default_value = "1h", value_parser = units::duration, value_name = "TIME", help_heading = "Limits")]
    pub(crate) keep_results: Duration,

    /// Where clients connect [default: any port; on loopback if the broker is there, else on all addresses].
    #[arg(long, value_name = "ENDPOINT", help_heading = "Network")]
    pub(crate) data_bind: Option<String>,
    /// Address that clients are told; may be repeated, best first [default: the one that leads to the broker].
    #[arg(long, value_name = "HOST[:PORT]", help_heading = "Network")]
    pub(crate) advertise: Vec<String>,
    /// No clients can connect here: the worker dials them.
    #[arg(long, conflicts_with_all = ["data_bind", "advertise"], help_heading = "Network")]
    pub(crate) no_listen: bool,

    /// What is logged: error, warn, info, debug, or a filter of tracing.
    #[arg(long, env = "RUST_LOG", default_value = "info", value_name = "FILTER")]
    pub(crate) log: String,
    /// How logs are written.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_worker_needs_no_arguments() {
        let cli = Cli::try_parse_from(["mesh-worker"]).expect("defaults");
        assert_eq!(cli.run.heartbeat, Duration::from_secs(1));
        assert!(cli.command.is_none());
    }

    #[test]
    fn the_last_of_several_settings_counts_but_lists_grow() {
        let args = ["mesh-worker", "--slots", "1", "--slots", "2", "--label", "a=1", "--label", "b=2"];
        let run = Cli::try_parse_from(args).expect("repeated").run;
        assert_eq!((run.slots, run.labels.len()), (Some(2), 2));
    }

    #[test]
    fn addresses_and_no_listen_exclude_each_other() {
        assert!(Cli::try_parse_from(["mesh-worker", "--no-listen", "--advertise", "here"]).is_err());
        assert!(Cli::try_parse_from(["mesh-worker", "--label", "rack"]).is_err());
    }
}
