//! Owns the command line of `mesh-runner`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use proto_msgs::{ModelFormat, limits};

use crate::engine::LoadOptions;

/// Loads one model and serves it.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(Serve),
    Inspect(Inspect),
    Run(Run),
    Runtimes(Runtimes),
    #[command(hide = true)]
    Conformance(Conformance),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        shell: clap_complete::Shell,
    },
}

/// Serve a model on a Unix socket with the Open Inference Protocol v2, until SIGTERM
#[derive(Args, Debug)]
#[command(after_help = SERVE_HELP)]
pub(crate) struct Serve {
    /// The model
    #[arg(long, value_name = "FILE")]
    pub(crate) model: PathBuf,
    /// The socket to listen on; the rights of its folder decide who may connect
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// The model's name in paths
    #[arg(long, value_name = "NAME", default_value = "model")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) options: ModelOptions,
    /// Longest request in bytes
    #[arg(long, value_name = "BYTES", default_value_t = BODY_BYTES_MAX)]
    pub(crate) body_limit: u64,
    /// End when nobody is connected: 60 s after the start, 5 s after the last connection ended
    #[arg(long)]
    pub(crate) while_connected: bool,
}

/// All inputs of a task in one request, and the JSON before them. The runner's memory limit bounds what it can really
/// hold.
const BODY_BYTES_MAX: u64 = limits::INPUT_BYTES_MAX + (16 << 20);

const SERVE_HELP: &str = "\
The socket exists at once; requests wait until the model is loaded. If it cannot be
loaded, one line of JSON with `code` and `text` goes to stderr and the exit status is
10 (MODEL_INVALID), 11 (MODEL_UNSUPPORTED), 12 (MODEL_REJECTED),
13 (ENGINE_UNAVAILABLE) or 14 (RUN_OOM).

Example:
  mesh-runner serve --model face.tflite --socket /tmp/face.sock &
  curl --unix-socket /tmp/face.sock http://runner/v2/models/model";

/// Load a model and print its inputs and outputs
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// Print JSON: the model metadata of the Open Inference Protocol
    #[arg(long)]
    pub(crate) json: bool,
}

/// Run a model once on files and write its outputs as .npy
#[derive(Args, Debug)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// One file for each input, NAME=FILE or in the model's order: .npy, else the raw little-endian bytes of the input
    #[arg(value_name = "INPUT")]
    pub(crate) inputs: Vec<String>,
    /// Folder for OUTPUT_NAME.npy
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) output: PathBuf,
    /// Run N times and print the shortest time
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) repeat: u32,
}

/// Open the runtime library of each model format and print where it is, or what is wrong; exit status 13 if one cannot
/// be used
#[derive(Args, Debug)]
pub(crate) struct Runtimes {
    /// Print JSON: for each format its `library`, or the `failure`
    #[arg(long)]
    pub(crate) json: bool,
}

/// Run the node tests of the ONNX project and count what passes
#[derive(Args, Debug)]
pub(crate) struct Conformance {
    /// Folder with one folder for each test: model.onnx, test_data_set_N/input_I.pb, output_I.pb
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// Fail if fewer than N tests pass
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) floor: usize,
    /// Run the tests whose names come on stdin, in this process; used by the children of this command
    #[arg(long)]
    pub(crate) names_on_stdin: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ModelArguments {
    /// The model
    #[arg(value_name = "MODEL")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) options: ModelOptions,
}

#[derive(Args, Debug)]
pub(crate) struct ModelOptions {
    /// Required format of the file; default: decided by its content
    #[arg(long, value_name = "tflite|onnx")]
    pub(crate) format: Option<ModelFormat>,
    /// Threads that one run may use
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) threads: u16,
    /// Use the GPU if the runtime library supports it
    #[arg(long)]
    pub(crate) gpu: bool,
    /// Refuse the model with ENGINE_UNAVAILABLE if the runtime library cannot use the GPU
    #[arg(long)]
    pub(crate) gpu_required: bool,
}

impl ModelOptions {
    pub(crate) fn options(&self) -> LoadOptions {
        let Self { format, threads, gpu, gpu_required } = *self;
        LoadOptions { format, threads, gpu: gpu || gpu_required, gpu_required }
    }
}
