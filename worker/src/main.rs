//! SHELL: mesh-worker reports this machine's resources to the broker, keeps models and runs tasks.
//!
//! Owns the process: settings, threads, start and end. Never: decisions, which are `mesh_core::worker`'s.
//!
//! ```text
//!   main thread   control.rs   machine, broker's connection, clock: never held up
//!   probe thread  probe.rs     measures
//!   runtime       desk.rs      carries out
//!
//!   state <- data <- engine <- runners <- tools <- batch <- desk <- start     each room knows those to its left
//! ```
//!
//! Where to begin: `control.rs`, then `desk.rs`.

mod args;
mod batch;
mod clear;
mod config;
mod control;
mod data;
mod desk;
mod engine;
mod probe;
mod runners;
mod start;
mod state;
mod tools;

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser};
use tracing::{error, warn};
use tracing_subscriber::EnvFilter;

use crate::{
    args::{Cli, Command, LogFormat, RunArgs},
    config::Config,
    start::StartError,
};

/// EX_CONFIG of sysexits.h: something in the settings must be changed.
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Keygen { file }) => keygen(&file),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "mesh-worker", &mut io::stdout());
            ExitCode::SUCCESS
        }
        None => run(cli.run),
    }
}

fn run(args: RunArgs) -> ExitCode {
    if let Err(reason) = start_log(&args) {
        eprintln!("mesh-worker: --log '{}': {reason}; write warn, info or mesh_worker=debug", args.log);
        return ExitCode::from(EXIT_CONFIG);
    }
    let config = match Config::new(args) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("mesh-worker: {error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    mesh_transport::keep_freed_messages();
    if let Err(error) = mesh_transport::raise_open_files() {
        warn!("cannot raise the limit of open files, so few clients can connect at a time: {error}");
    }
    match start::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(StartError::Config(error)) => {
            eprintln!("mesh-worker: {error}");
            ExitCode::from(EXIT_CONFIG)
        }
        Err(StartError::Failed(error)) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn keygen(file: &std::path::Path) -> ExitCode {
    let made = mesh_transport::KeyPair::generate().and_then(|pair| pair.save(file).map(|()| pair.public()));
    match made {
        Ok(public) => {
            // The files exist. A reader who misses this line finds the key in the public file.
            let _ = writeln!(io::stdout(), "{}", mesh_transport::keys::to_text(&public));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mesh-worker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(args: &RunArgs) -> Result<(), String> {
    let filter = EnvFilter::try_new(&args.log).map_err(|error| error.to_string())?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // The logger would panic about a line that it cannot write (a log service that restarts).
    let log = log.with_ansi(io::stderr().is_terminal()).log_internal_errors(false);
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
