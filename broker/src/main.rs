//! `mesh-broker`: reads the command line, starts the log, and turns the outcome into an exit code.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use clap::{CommandFactory, Parser};
use mesh_broker::{
    args::{Arguments, Command, LogFormat, Serve},
    config::Config,
    run,
};
use mesh_transport::keys::{self, KeyPair};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

/// The broker failed at run time.
const EXIT_FAILED: u8 = 1;

/// Settings or files are wrong, so a supervisor need not try again (`EX_CONFIG` of sysexits.h).
const EXIT_CONFIG: u8 = 78;

/// Fewer open files than this are worth a warning: every worker and client is one.
const OPEN_FILES_MIN: u64 = 4096;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Keygen { file }) => keygen(&file),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Arguments::command(), "mesh-broker", &mut io::stdout());
            ExitCode::SUCCESS
        }
        None => serve(&arguments.serve),
    }
}

fn keygen(file: &Path) -> ExitCode {
    let made = KeyPair::generate().and_then(|pair| pair.save(file).map(|()| pair));
    match made {
        Ok(pair) => {
            // The files exist; if the line cannot be printed, the key is in the public file.
            let _ = writeln!(io::stdout(), "{}", keys::to_text(&pair.public()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mesh-broker: {error}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn serve(flags: &Serve) -> ExitCode {
    if let Err(complaint) = start_log(flags) {
        eprintln!("mesh-broker: --log '{}': {complaint}; write warn, info or mesh_broker=debug", flags.log);
        return ExitCode::from(EXIT_CONFIG);
    }
    let config = match Config::new(flags) {
        Ok(config) => config,
        Err(complaint) => {
            error!("{complaint}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    info!("mesh-broker {} starts, tasks are kept by the {} store", config.machine.version, config.machine.store_name);
    match mesh_transport::raise_open_files() {
        Ok(files) if files < OPEN_FILES_MIN => {
            warn!(
                "room for fewer than {files} workers and clients: raise the limit of open files (`ulimit -Hn`, LimitNOFILE=)"
            );
        }
        Ok(_) => {}
        Err(error) => warn!("cannot raise the limit of open files: {error}"),
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(run::RunError::from).and_then(|runtime| runtime.block_on(run::run(config)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure}");
            ExitCode::from(if failure.is_configuration() { EXIT_CONFIG } else { EXIT_FAILED })
        }
    }
}

fn start_log(flags: &Serve) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::try_new(&flags.log)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // For a line that cannot be written (a restarting log service), the logger would otherwise panic.
    let log = log.with_ansi(io::stderr().is_terminal()).log_internal_errors(false);
    match flags.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
