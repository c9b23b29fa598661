//! Flags that several commands share, in groups as the help shows them. Owns their combined meaning. Never: a command.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Args, ValueEnum,
    builder::{PathBufValueParser, PossibleValue, PossibleValuesParser, TypedValueParser},
};
use mesh_sdk::{Arch, Demands, Direction, LabelRule, Lane, Slo};
use proto_msgs::limits::DEADLINE_MS_MAX;

use crate::{
    image_input::{Colors, Layout, Normalize, Resize, Wishes as ImageWishes},
    inputs::Wishes,
    units,
};

/// The names of lanes, which shells complete.
pub(crate) fn lane_parser() -> impl TypedValueParser<Value = Lane> {
    PossibleValuesParser::new(Lane::ALL.map(Lane::name)).try_map(|name| name.parse::<Lane>())
}

/// The names of architectures, also as `uname -m` prints them.
fn arch_parser() -> impl TypedValueParser<Value = Arch> {
    let [amd64, arm64] = [Arch::Amd64, Arch::Arm64].map(|arch| PossibleValue::new(arch.name()));
    let names = PossibleValuesParser::new([amd64.alias("x86_64"), arm64.alias("aarch64")]);
    names.map(|name| if matches!(name.as_str(), "amd64" | "x86_64") { Arch::Amd64 } else { Arch::Arm64 })
}

/// What the stream of tasks is promised.
#[derive(Args, Debug)]
#[command(next_help_heading = "Service level")]
pub(crate) struct PromiseFlags {
    /// A task that takes longer than this (50ms, 2s) from the grant to its result violates the service level; workers
    /// where this happens too often are passed over. Waiting at the broker is no worker's fault and does not count. At
    /// the worker, batches of bulk on the same GPU are kept shorter for realtime tasks with a service level
    #[arg(long, value_name = "TIME", value_parser = parse_slo_ms)]
    slo: Option<u32>,
    /// The part of a worker's tasks that may violate --slo before it is passed over, in steps of 0.1%
    #[arg(long, value_name = "PERCENT", requires = "slo", default_value = "5%", value_parser = units::parse_permille)]
    max_violation: u16,
}

impl PromiseFlags {
    pub(crate) fn slo(&self) -> Option<Slo> {
        self.slo.map(|latency_ms| Slo { latency_ms, max_violation_permille: self.max_violation })
    }
}

fn parse_slo_ms(text: &str) -> Result<u32, String> {
    let ms = units::duration(text)?.as_millis();
    u32::try_from(ms).ok().filter(|ms| *ms > 0).ok_or_else(|| format!("'{text}' is out of range: use 1ms to 49d"))
}

/// Reads a deadline, which the broker takes in whole milliseconds, a day of them at most.
pub(crate) fn parse_deadline(text: &str) -> Result<Duration, String> {
    let deadline = units::duration(text)?;
    match u64::try_from(deadline.as_millis()) {
        Ok(0) => Err(format!("'{text}' leaves no time for an answer: use at least 1ms")),
        Ok(1..=DEADLINE_MS_MAX) => Ok(deadline),
        _ => Err(format!("'{text}' is too far away: use at most {}h", DEADLINE_MS_MAX / 3_600_000)),
    }
}

/// Which workers are wanted.
#[derive(Args, Debug)]
#[command(next_help_heading = "Labels")]
pub(crate) struct LabelFlags {
    /// Only workers with this label (may be repeated)
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
    require: Vec<(String, String)>,
    /// Prefer workers with this label (may be repeated)
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
    prefer: Vec<(String, String)>,
}

impl LabelFlags {
    pub(crate) fn rules(&self) -> Vec<LabelRule> {
        let rule = |required: bool| {
            move |(key, value): &(String, String)| LabelRule { key: key.clone(), value: value.clone(), required }
        };
        self.require.iter().map(rule(true)).chain(self.prefer.iter().map(rule(false))).collect()
    }
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is not a label: write KEY=VALUE, as `mesh-client workers` shows them")),
    }
}

/// Where results go.
#[derive(Args, Debug)]
pub(crate) struct OutputFlags {
    /// Write each output to DIR/NAME.npy (several items: DIR/ITEM/NAME.npy) and result.json beside them
    #[arg(short, long, value_name = "DIR", value_parser = folder_parser())]
    pub(crate) output: Option<PathBuf>,
}

/// A folder. `-` is standard output elsewhere, which takes no files.
fn folder_parser() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path == Path::new("-") {
        true => Err("outputs are files: name a folder (./- for one of that name), or take --json on standard output"),
        false => Ok(path),
    })
}

/// What a worker must have.
#[derive(Args, Debug)]
#[command(next_help_heading = "Demands")]
pub(crate) struct DemandFlags {
    /// Cores the run may use (2, 0.5, 500m)
    #[arg(long, value_name = "CORES", value_parser = units::parse_cpu)]
    cpu: Option<u32>,
    /// Memory the run may use (1GiB)
    #[arg(long, value_name = "SIZE", value_parser = units::size_bytes)]
    memory: Option<u64>,
    /// GPU memory the run needs (4GiB)
    #[arg(long, value_name = "SIZE", value_parser = units::size_bytes)]
    gpu_memory: Option<u64>,
    /// Only workers of this architecture
    #[arg(long, value_parser = arch_parser())]
    arch: Option<Arch>,
}

impl DemandFlags {
    pub(crate) fn demands(&self) -> Demands {
        Demands {
            cpu_millis: self.cpu.unwrap_or(0),
            memory_bytes: self.memory.unwrap_or(0),
            gpu_memory_bytes: self.gpu_memory.unwrap_or(0),
            arch: self.arch,
        }
    }
}

/// How inputs become what the model takes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Inputs")]
pub(crate) struct FormFlags {
    /// Pictures: order of the dimensions
    #[arg(long, value_enum, default_value_t)]
    layout: Layout,
    /// Pictures: order of the colours
    #[arg(long, value_enum, default_value_t)]
    colors: Colors,
    /// Pictures: what to do if the proportions differ from the model's
    #[arg(long, value_enum, default_value_t)]
    resize: Resize,
    /// Pictures: what 0 to 255 becomes: a range (-1..1), raw, or auto (0..1 for models of real numbers, the type's whole range for integers)
    #[arg(long, value_name = "RANGE", default_value = "auto", allow_hyphen_values = true)]
    normalize: Normalize,
    /// Pictures: subtracted after --normalize, one number or one for each channel (0.485,0.456,0.406)
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS", allow_hyphen_values = true, value_parser = parse_number)]
    mean: Vec<f64>,
    /// Pictures: divided by after --mean
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS", value_parser = parse_divisor)]
    std: Vec<f64>,
    /// Convert arrays of another type to the model's, rounded and cut to its range
    #[arg(long)]
    cast: bool,
}

impl FormFlags {
    pub(crate) fn wishes(&self) -> Wishes {
        let image = ImageWishes {
            layout: self.layout,
            colors: self.colors,
            resize: self.resize,
            normalize: self.normalize,
            mean: self.mean.clone(),
            std: self.std.clone(),
        };
        Wishes { image, cast: self.cast }
    }
}

fn parse_number(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "not a number".to_owned())
}

fn parse_divisor(text: &str) -> Result<f64, String> {
    parse_number(text).ok().filter(|number| *number > 0.0).ok_or_else(|| "use numbers above 0".to_owned())
}

/// How client and worker come together.
#[derive(Args, Debug)]
#[command(next_help_heading = "Connections")]
pub(crate) struct PathFlags {
    /// Who opens the connection (default: the client, except for workers that cannot be dialled)
    #[arg(long, value_enum)]
    direction: Option<DirectionFlag>,
    /// Where workers may dial this client (tcp://0.0.0.0:7000); default: any free port towards the broker
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,
    /// What workers are told in place of that address (HOST or HOST:PORT)
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) advertise: Vec<String>,
}

impl PathFlags {
    pub(crate) fn direction(&self) -> Option<Direction> {
        self.direction.map(|direction| match direction {
            DirectionFlag::ClientDials => Direction::ClientDials,
            DirectionFlag::WorkerDials => Direction::WorkerDials,
        })
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DirectionFlag {
    /// The client connects to the worker
    ClientDials,
    /// The worker connects to the client
    WorkerDials,
}
