//! The command line: flags, their help, their defaults. Owns names that scripts rely on; never does anything.

use std::{
    env,
    io::{self, IsTerminal},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{
    Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand,
    error::{ContextKind, ContextValue},
};
use mesh_sdk::{Lane, default_state_dir};
use mesh_transport::address;
use proto_msgs::limits;

use crate::{
    exit,
    flags::{DemandFlags, FormFlags, LabelFlags, OutputFlags, PathFlags, PromiseFlags, lane_parser, parse_deadline},
    outputs,
    stages::{self, Then},
    table::Columns,
    task_name::TaskName,
    units,
};

const EXAMPLES: &str = "\
Examples:
  mesh-client submit model.tflite input.bin
  mesh-client submit --output results detector.onnx photos/
  mesh-client submit --detach model.onnx x=x.npy y=y.npy
  mesh-client workers

`mesh-client help COMMAND` says more about each; --help lists the exit codes.";

/// Submit tasks to the mesh and see what became of them.
#[derive(Debug, Parser)]
#[command(
    name = "mesh-client",
    version,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = top_help(),
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Commands that ask nobody: flags about the broker, the identity and tables mean nothing to them.
const LOCAL: [&str; 3] = ["inspect", "keygen", "completions"];

/// The global flags that mean something to every command.
const EVERYWHERE: [&str; 3] = ["json", "quiet", "verbose"];

/// The command line. The help of a command shows only flags that mean something to it; scripts may give all of them.
pub(crate) fn command() -> clap::Command {
    let whole = Arguments::command();
    let is_elsewhere = |flag: &&Arg| flag.is_global_set() && !EVERYWHERE.contains(&flag.get_id().as_str());
    let elsewhere: Vec<Arg> = whole.get_arguments().filter(is_elsewhere).map(|flag| flag.clone().hide(true)).collect();
    LOCAL.iter().fold(whole, |whole, name| whole.mut_subcommand(name, |command| command.args(elsewhere.clone())))
}

/// The arguments of this program.
pub(crate) fn parse() -> Result<Arguments, clap::Error> {
    let parsed = command().try_get_matches().and_then(|matches| Arguments::from_arg_matches(&matches));
    parsed.map_err(|error| with_usage(error, words()))
}

/// Whether `--json` was asked for by a command line that could not be read.
pub(crate) fn want_json() -> bool {
    words().any(|word| word == "--json")
}

fn words() -> impl Iterator<Item = String> {
    env::args_os().map(|word| word.to_string_lossy().into_owned())
}

/// The error with its command's usage as the help shows it. clap's own names all flags that have a value, also from the
/// environment, as if they were required.
fn with_usage(mut error: clap::Error, mut words: impl Iterator<Item = String>) -> clap::Error {
    let mut whole = command();
    whole.build();
    let name = words.find(|word| whole.find_subcommand(word).is_some());
    let named = name.and_then(|name| whole.find_subcommand_mut(name));
    if let (Some(command), Some(_)) = (named, error.get(ContextKind::Usage)) {
        error.insert(ContextKind::Usage, ContextValue::StyledStr(command.render_usage()));
    }
    error
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Address of the broker
    #[arg(long, global = true, value_name = "ADDRESS", env = "MESH_BROKER", default_value = mesh_sdk::BROKER_DEFAULT, value_parser = parse_broker)]
    pub(crate) broker: String,
    /// The broker's public key, or the file that holds it (with --key-file)
    #[arg(long, global = true, value_name = "KEY-OR-FILE", env = "MESH_BROKER_KEY")]
    pub(crate) broker_key: Option<String>,
    /// This client's secret key; made by `keygen`
    #[arg(long, global = true, value_name = "FILE", env = "MESH_KEY_FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Folder of this client's identity
    #[arg(long, global = true, value_name = "DIR", env = "MESH_CLIENT_STATE_DIR", default_value_os_t = default_state_dir().unwrap_or_default())]
    pub(crate) state_dir: PathBuf,
    /// Wait so long for a broker that does not answer, such as one that is being restarted [default: 10s, or --timeout]
    #[arg(long, global = true, value_name = "TIME", env = "MESH_BROKER_WAIT", value_parser = units::duration)]
    pub(crate) broker_wait: Option<Duration>,
    /// Give up after this long; without it, a running task is waited for however long it takes
    #[arg(long, global = true, value_name = "TIME", env = "MESH_TIMEOUT", value_parser = units::duration)]
    pub(crate) timeout: Option<Duration>,
    /// One JSON document on standard output instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// All columns of tables on a terminal, too; a pipe or file always gets them
    #[arg(long, global = true)]
    pub(crate) wide: bool,
    /// No progress and no advice, only results, errors, and that no connected worker can ever run a task
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Log what happens (-vv: messages as well)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

impl Global {
    /// The columns of tables on standard output.
    pub(crate) fn columns(&self) -> Columns {
        if self.wide || !io::stdout().is_terminal() { Columns::All } else { Columns::Main }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a model on inputs and print what comes out
    ///
    /// An INPUT is a file: raw little-endian bytes of the model's input, .npy, .npz, .json, or a picture (.png, .jpg) for models
    /// that take one. For a model of one input each file is an item; folders and patterns ('photos/*.jpg') mean their files. For a model of several inputs name each (name=path), give them in the model's order,
    /// or give one .npz or .json file that holds all. Raw files of any size are read while they are sent; the others are read whole, into memory.
    ///
    /// An INPUT that begins with the name of an input of the model and `=` is always name=path, with the longest such
    /// name; write ./a=b.png for a file of such a name. Any other that is an existing file is that file.
    Submit(Box<Submit>),
    /// Put a load on the mesh and measure throughput and latency
    ///
    /// Measures one level of load after the other: a number of requests at a time, a number per second, the
    /// times in a file, or a search for the highest rate that keeps to a latency.
    Bench(Box<crate::bench::flags::Bench>),
    /// List the workers
    Workers(Workers),
    /// Show what each model costs at each worker, and whether items are run together
    ///
    /// PACKING is the result of a trial with several items in one run: on (same results as alone, in less time), or why
    /// not. CURVE lists measured batches as ROWS:TIME. A model has the name that this client's tasks gave it, else its digest.
    Models,
    /// List this client's tasks
    Tasks(Tasks),
    /// Show the state of tasks; without TASK, the state of the mesh
    Status(Status),
    /// Take the results of detached tasks that are done
    Result(Fetch),
    /// Wait for detached tasks and take their results
    Wait(Fetch),
    /// Stop tasks
    Cancel(Cancel),
    /// Explain why a task runs where it does, or why it does not run
    Why(OneTask),
    /// Show format, inputs and outputs of a model file
    Inspect(Inspect),
    /// Make a key pair: FILE (secret) and FILE.pub
    Keygen(Keygen),
    /// Print a completion script for a shell
    Completions(Completions),
}

/// Run a model on inputs.
#[derive(Args, Debug)]
#[command(after_help = submit_help())]
pub(crate) struct Submit {
    /// The model: a .tflite or .onnx file
    pub(crate) model: PathBuf,
    /// Input files, folders, patterns, name=path, or - for standard input (.npy, .npz and JSON are recognised)
    #[arg(value_name = "INPUT")]
    pub(crate) inputs: Vec<String>,
    /// 0 (whenever there is room) to 100 (first of all)
    #[arg(long, default_value_t = limits::PRIORITY_DEFAULT, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) priority: u8,
    /// Fail if there is no answer within this time (500ms, 2m)
    #[arg(long, value_name = "TIME", value_parser = parse_deadline)]
    pub(crate) deadline: Option<Duration>,
    /// Do not wait: print the task's id once the worker has everything; `wait` and `result` take the outputs
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Give what comes out to this model next, and so on (may be repeated; NAME is for people). Models run side by side
    /// at workers with two slots for the lane; in the batch lane these are --batch-slots, by default half of the cores
    #[arg(long, value_name = "[NAME=]MODEL", value_parser = stages::parse)]
    pub(crate) then: Vec<Then>,
    /// The lane (default: by the number of items)
    #[arg(long, value_parser = lane_parser())]
    pub(crate) lane: Option<Lane>,
    /// The most items (of equal types and shapes) that share a task (default: 8, fewer if slots would stay idle; with
    /// --detach 1)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    split: Option<u16>,
    /// Tasks under way at the same time (default: enough for two full batches in each slot, at most 256)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) parallel: Option<u16>,
    /// Fail at once when the mesh is full, instead of trying again when it says so
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Print each item as one line of JSON as soon as it has ended
    #[arg(long, conflicts_with = "json")]
    pub(crate) json_lines: bool,
    #[command(flatten)]
    pub(crate) output: OutputFlags,
    #[command(flatten)]
    pub(crate) promise: PromiseFlags,
    #[command(flatten)]
    pub(crate) labels: LabelFlags,
    #[command(flatten)]
    pub(crate) demands: DemandFlags,
    #[command(flatten)]
    pub(crate) forms: FormFlags,
    #[command(flatten)]
    pub(crate) path: PathFlags,
}

impl Submit {
    /// Items that may share a task; `None` if the mesh decides. Each item of a detached submit has its own task, since
    /// a task is fetched as a whole.
    pub(crate) fn items_per_task(&self) -> Option<usize> {
        self.split.or(self.detach.then_some(1)).map(usize::from)
    }
}

#[derive(Args, Debug)]
pub(crate) struct Workers {
    /// Show them again every two seconds until Ctrl-C
    #[arg(short, long)]
    pub(crate) watch: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Tasks {
    /// At most this many, newest first
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: u32,
}

#[derive(Args, Debug)]
pub(crate) struct Status {
    /// The tasks' ids, or parts of them
    #[arg(value_name = "TASK", value_parser = TaskName::from_str)]
    pub(crate) tasks: Vec<TaskName>,
}

#[derive(Args, Debug)]
#[command(after_help = exit::HELP)]
pub(crate) struct Fetch {
    /// The tasks' ids, or parts of them; with --json one document after the other, with --output each in DIR/TASK
    #[arg(value_name = "TASK", required = true, value_parser = TaskName::from_str)]
    pub(crate) tasks: Vec<TaskName>,
    #[command(flatten)]
    pub(crate) output: OutputFlags,
    #[command(flatten)]
    pub(crate) path: PathFlags,
}

#[derive(Args, Debug)]
pub(crate) struct OneTask {
    /// The task's id, or a part of it
    #[arg(value_parser = TaskName::from_str)]
    pub(crate) task: TaskName,
}

#[derive(Args, Debug)]
pub(crate) struct Cancel {
    /// The tasks' ids, or parts of them
    #[arg(value_name = "TASK", required = true, value_parser = TaskName::from_str)]
    pub(crate) tasks: Vec<TaskName>,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// The model: a .tflite or .onnx file
    pub(crate) model: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Keygen {
    /// Where the secret key goes
    pub(crate) file: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// Which shell
    pub(crate) shell: clap_complete::Shell,
}

fn parse_broker(text: &str) -> Result<String, String> {
    let endpoint = address::completed(text);
    if !endpoint.starts_with("tcp://") {
        return Err("only tcp:// addresses are understood".to_owned());
    }
    if address::can_be_dialled(&endpoint) { Ok(endpoint) } else { Err("write it as tcp://HOST:PORT".to_owned()) }
}

fn top_help() -> String {
    format!("{EXAMPLES}\n\n{}", exit::HELP)
}

fn submit_help() -> String {
    format!(
        "Examples:\n  \
        mesh-client submit model.tflite input.bin\n  \
        mesh-client submit --normalize=-1..1 --output out face_detection.tflite photos/*.jpg\n  \
        mesh-client submit --priority 90 --deadline 500ms model.onnx x.npy\n  \
        mesh-client submit --cpu 2 --memory 1GiB --arch arm64 model.onnx inputs.npz\n  \
        mesh-client submit --then decode=decoder.onnx encoder.onnx frames/\n  \
        mesh-client submit --lane batch --split 64 --prefer room=attic model.onnx inputs/\n  \
        mesh-client submit --slo 50ms --max-violation 5% model.onnx x.npy\n  \
        mesh-client submit --json-lines model.onnx inputs/ | jq -c '[.item, .worker.name]'\n  \
        mesh-client submit --json model.tflite input.bin | jq '.items[0].outputs[0].data'\n\n\
        JSON lists outputs of up to {} elements; --output DIR writes all of them to files. JSON has no NaN and no \
        infinity: such elements are null, `not_finite` counts them, and `min`, `max` and `mean` leave them out; the \
        files have them.\n\n{}",
        outputs::DATA_ELEMENTS_MAX,
        exit::HELP
    )
}

#[cfg(test)]
mod tests {
    use mesh_sdk::{Arch, Demands, Direction, Slo};

    use super::*;
    use crate::image_input::Normalize;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn an_error_shows_the_usage_as_the_help_does() {
        let words = || ["mesh-client", "--broker", "tcp://cloud:5555", "wait"].map(str::to_owned).into_iter();
        let error = with_usage(command().try_get_matches_from(words()).unwrap_err(), words()).to_string();
        assert!(error.contains("Usage: mesh-client wait [OPTIONS] <TASK>...\n"), "{error}");
    }

    #[test]
    fn commands_that_ask_nobody_show_no_flags_for_it() {
        let help = |name: &str| command().find_subcommand_mut(name).unwrap().render_long_help().to_string();
        command().build();
        for name in LOCAL {
            assert!(!help(name).contains("--broker") && !help(name).contains("--timeout"), "{}", help(name));
        }
        let line = ["mesh-client", "keygen", "--broker", "tcp://cloud:5555", "k", "--json"];
        let arguments = Arguments::from_arg_matches(&command().try_get_matches_from(line).unwrap()).unwrap();
        assert!(arguments.global.json && arguments.global.broker == "tcp://cloud:5555", "scripts may give them");
    }

    #[test]
    fn the_flags_that_scripts_rely_on() {
        let line = "mesh-client --broker tcp://cloud:5555 submit m.tflite a.bin b.bin --priority 90 --deadline 500ms --cpu 2 \
            --memory 1GiB --gpu-memory 4GiB --arch arm64 --detach --json --direction worker-dials --parallel 4 \
            --normalize -1..1 --mean 0.5,-0.5,0 --then decode=d.onnx --lane batch --split 64 --slo 50ms --max-violation 2.5% \
            --require gpu=h100 --prefer room=attic --no-wait";
        let arguments = Arguments::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Submit(submit) = arguments.command else { panic!("a submit") };
        let demands =
            Demands { cpu_millis: 2000, memory_bytes: 1 << 30, gpu_memory_bytes: 4 << 30, arch: Some(Arch::Arm64) };
        assert_eq!(submit.demands.demands(), demands);
        assert_eq!((submit.priority, submit.deadline), (90, Some(Duration::from_millis(500))));
        assert_eq!(submit.path.direction(), Some(Direction::WorkerDials));
        assert_eq!(submit.forms.wishes().image.normalize, Normalize::To(-1.0, 1.0));
        assert_eq!(submit.forms.wishes().image.mean, [0.5, -0.5, 0.0]);
        assert!(submit.detach && arguments.global.json && submit.inputs.len() == 2);
        assert_eq!(
            (submit.then[0].name.as_str(), submit.lane, submit.items_per_task()),
            ("decode", Some(Lane::Batch), Some(64))
        );
        assert_eq!(submit.promise.slo(), Some(Slo { latency_ms: 50, max_violation_permille: 25 }));
        let rules: Vec<(String, bool)> =
            submit.labels.rules().into_iter().map(|rule| (rule.key, rule.required)).collect();
        assert_eq!(rules, [("gpu".to_owned(), true), ("room".to_owned(), false)]);
        assert!(submit.no_wait);
    }

    #[test]
    fn items_share_tasks_unless_they_are_fetched_later() {
        let items_per_task = |line: &str| match Arguments::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Submit(submit) => submit.items_per_task(),
            _ => panic!("a submit"),
        };
        assert_eq!(items_per_task("mesh-client submit m.onnx a b"), None);
        assert_eq!(items_per_task("mesh-client submit m.onnx a b --detach"), Some(1));
        assert_eq!(items_per_task("mesh-client submit m.onnx a b --detach --split 4"), Some(4));
    }

    #[test]
    fn wrong_usage_names_what_was_wrong() {
        for (line, named) in [
            ("submit", "<MODEL>"),
            ("submit m.onnx x --priority 101", "101 is not in 0..=100"),
            ("submit m.onnx x --deadline 5", "'5' is not a time"),
            ("submit m.onnx x --deadline 0s", "'0s' leaves no time for an answer: use at least 1ms"),
            ("submit m.onnx x --deadline 100h", "'100h' is too far away: use at most 24h"),
            ("bench m.onnx x --deadline 500us", "'500us' leaves no time"),
            ("submit m.onnx x --memory much", "'much' is not a size"),
            ("submit m.onnx x --lane fast", "[possible values: realtime, batch]"),
            ("submit m.onnx x --slo 1us", "'1us' is out of range"),
            ("submit m.onnx x --max-violation 5%", "--slo <TIME>"),
            ("submit m.onnx x --slo 1s --max-violation 200%", "'200%' is not a part"),
            ("submit m.onnx x --slo 1s --max-violation 0.01%", "'0.01%' is too fine: the smallest step is 0.1%"),
            ("submit m.onnx x --output -", "outputs are files: name a folder"),
            ("submit m.onnx x --split 0", "0 is not in 1..=1024"),
            ("submit m.onnx x --require attic", "'attic' is not a label"),
            ("submit m.onnx x --json --json-lines", "cannot be used with"),
            ("submit m.onnx x --arch sparc", "[possible values: amd64, arm64]"),
            ("submit m.onnx x --normalize 0-1", "use auto, raw, or a range"),
            ("submit m.onnx x --normalize=5..1", "use auto, raw, or a range"),
            ("submit m.onnx x --std 0.5,0", "use numbers above 0"),
            ("submit m.onnx x --mean nan", "not a number"),
            ("status nonsense", "'nonsense'"),
            ("result 123", "a task's id looks like 0198d3a1-"),
            ("wait", "<TASK>"),
            ("--broker cloud workers", "write it as tcp://HOST:PORT"),
            ("--broker udp://cloud:1 workers", "only tcp:// addresses"),
            ("frobnicate", "frobnicate"),
        ] {
            let words = ["mesh-client"].into_iter().chain(line.split_whitespace());
            let error = Arguments::try_parse_from(words).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(exit::USAGE), "{line}");
            assert!(error.to_string().contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn architectures_have_the_names_that_uname_gives_them() {
        for (name, arch) in [("x86_64", Arch::Amd64), ("aarch64", Arch::Arm64), ("arm64", Arch::Arm64)] {
            let arguments = Arguments::parse_from(["mesh-client", "submit", "m.onnx", "x", "--arch", name]);
            let Command::Submit(submit) = arguments.command else { panic!("a submit") };
            assert_eq!(submit.demands.demands().arch, Some(arch), "{name}");
        }
    }

    #[test]
    fn an_address_without_its_scheme_is_understood() {
        assert_eq!(parse_broker("cloud:5555").unwrap(), "tcp://cloud:5555");
    }
}
