//! PROGRAM: loads one model and serves it. Owns the runtimes (LiteRT, ONNX Runtime) and the Open Inference Protocol on
//! a Unix socket. Never: more than one model, a network, a decision about tasks. A worker starts one runner per model,
//! in a container or as a process with limits, so a model can harm only its own runner.
//!
//! ```text
//!   socket -> serve -> routes -> request ---job---> model thread -> engine -> LiteRT | ONNX Runtime
//!                             <- response <--------
//! ```

use std::io::{IsTerminal, Write};

use clap::{CommandFactory, Parser};
use proto_msgs::Failure;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};

mod cli;
mod conformance;
mod engine;
mod exit;
mod inspect;
mod libraries;
mod model_thread;
mod npy;
mod protobuf;
mod run;
mod runtimes;
mod serve;
mod tensor;

fn main() -> ! {
    // SAFETY: this is the process's only thread so far.
    unsafe { libraries::forbid_telemetry() };
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // For a line that cannot be written, the logger would otherwise panic.
        .log_internal_errors(false)
        .init();
    let done = match cli.command {
        Command::Serve(arguments) => serve::serve(arguments),
        Command::Inspect(arguments) => inspect::inspect(&arguments).map(|()| exit::SUCCESS),
        Command::Run(arguments) => run::run(&arguments).map(|()| exit::SUCCESS),
        Command::Runtimes(arguments) => Ok(runtimes::runtimes(&arguments)),
        Command::Conformance(arguments) => conformance::conformance(&arguments),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "mesh-runner", &mut std::io::stdout());
            Ok(exit::SUCCESS)
        }
    };
    let status = done.unwrap_or_else(|error| {
        eprintln!("mesh-runner: {error:#}");
        let failure = error.downcast_ref::<Failure>();
        failure.map_or(exit::FAILURE, |failure| exit::exit_status(failure.code))
    });
    end(status)
}

/// Ends the process at once. What the libraries ask to be done at an exit is not done: it frees what the system frees
/// anyway, may crash beside a run under way or in a wrong library, and then the status would blame the model.
fn end(status: u8) -> ! {
    // Fails only if the reader has gone.
    let _ = std::io::stdout().flush();
    // SAFETY: a system call with a number, which does not return.
    unsafe { libc::_exit(i32::from(status)) }
}
