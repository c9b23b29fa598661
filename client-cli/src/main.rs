//! `mesh-client`: submit tasks from the command line and see their results.
//!
//! Owns arguments, the forms of inputs and outputs, progress and exit codes. Never decides where a task runs or when to
//! try again: the SDK and the broker do. Results go to standard output, everything else to standard error.
//!
//! ```text
//!   args --> submit: items -> inputs (npy, json, image) -> mesh_sdk -> report (outputs, table) --> exit code
//!        '-> ask: workers, models, tasks, status, why, cancel -> views
//! ```

// `print!` and `eprint!` panic when their reader has left; `streams` does not.
#![warn(clippy::print_stderr, clippy::print_stdout)]

mod args;
mod ask;
mod bench;
mod completions;
mod connect;
mod exit;
mod flags;
mod image_input;
mod inputs;
mod items;
mod json_input;
mod names;
mod npy;
mod outputs;
mod progress;
mod report;
mod stages;
mod stop;
mod streams;
mod submit;
mod table;
mod task_name;
mod tensor;
mod units;
mod views;
mod watch;

use std::{io, process::ExitCode, time::Duration};

use tracing_subscriber::EnvFilter;

use crate::{
    args::{Arguments, Command, Global},
    ask::Patience,
    exit::Failed,
    report::{Job, Report},
    streams::{print, print_json, say, write},
    table::printable_lines,
};

/// Longest wait for threads at the end. Closed connections need half of it for their last messages; a thread that reads a
/// pipe may stay for ever.
const LEAVE_MAX: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = args::parse().unwrap_or_else(|error| refuse(&error));
    start_log(&arguments.global);
    mesh_transport::keep_freed_messages();
    if let Err(error) = mesh_transport::raise_open_files() {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(command(&arguments));
            runtime.shutdown_timeout(LEAVE_MAX);
            ended
        }
        Err(error) => Err(Failed::new(exit::INTERNAL, "INTERNAL", error)),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failed) => {
            complain(&arguments.global, &failed);
            ExitCode::from(failed.exit)
        }
    }
}

/// Ends the program: with help or the version as asked for, or because of wrong usage.
fn refuse(error: &clap::Error) -> ! {
    if error.use_stderr() && args::want_json() {
        let text = error.to_string();
        // What follows the first paragraph is the usage, for people.
        let what = text.split("\n\n").next().unwrap_or(&text).trim_start_matches("error: ");
        // Standard output may be closed; the exit code reports the error anyway.
        let _ = print_json(&Failed::new(exit::USAGE, "USAGE", what).document());
    }
    error.exit()
}

async fn command(arguments: &Arguments) -> Result<u8, Failed> {
    let global = &arguments.global;
    match &arguments.command {
        Command::Submit(flags) => {
            let mut job = submit::submit(global, flags).await?;
            if flags.json_lines {
                // Each item has already been printed; only the summary for people is left.
                if !global.quiet {
                    say(&job.summary_text());
                    say_if_cut(&job.reports);
                }
                return Ok(job.exit());
            }
            if flags.detach && !global.json {
                return show_accepted(global, &job);
            }
            show_job(global, &mut job, flags.output.output.is_some())
        }
        Command::Bench(flags) => bench::bench(global, flags).await,
        Command::Workers(flags) if flags.watch => watch::workers(global).await,
        Command::Workers(_) => ask::workers(global).await,
        Command::Models => ask::models(global).await,
        Command::Tasks(flags) => ask::tasks(global, flags).await,
        Command::Status(flags) => ask::status(global, flags).await,
        Command::Result(flags) => ask::fetch(global, flags, Patience::None).await,
        Command::Wait(flags) => ask::fetch(global, flags, Patience::UntilItEnds).await,
        Command::Cancel(flags) => ask::cancel(global, flags).await,
        Command::Why(flags) => ask::why(global, flags).await,
        Command::Inspect(flags) => ask::inspect(global, flags),
        Command::Keygen(flags) => ask::keygen(global, flags),
        Command::Completions(flags) => write(|out| out.write_all(&completions::script(flags.shell))).map(|_| exit::OK),
    }
}

/// Prints the job's result as text or as the JSON document.
fn show_job(global: &Global, job: &mut Job, is_saved: bool) -> Result<u8, Failed> {
    if global.json {
        write(|out| job.write_json(out).and_then(|()| out.write_all(b"\n")))?;
    } else {
        let text = if let [only] = &job.reports[..] { only.to_text() } else { job.to_text(global.columns()) };
        print(&text)?;
    }
    say(&job.failures_text());
    if global.json && !global.quiet {
        say_if_cut(&job.reports);
    }
    if job.reports.len() > 1 && !is_saved && !global.json && !global.quiet && job.exit() == exit::OK {
        say("mesh-client: outputs were not kept: use --output DIR or --json\n");
    }
    Ok(job.exit())
}

/// Says that the JSON lacks outputs, if it does.
fn say_if_cut(reports: &[Report]) {
    if reports.iter().any(Report::is_cut) {
        let most = outputs::DATA_ELEMENTS_MAX;
        say(&format!("mesh-client: outputs of more than {most} elements are not in the JSON: use --output DIR\n"));
    }
}

/// Prints the ids of a detached job's tasks for `$(…)`, and everything else on standard error.
fn show_accepted(global: &Global, job: &Job) -> Result<u8, Failed> {
    print(&job.ids_text())?;
    say(&job.failures_text());
    if job.reports.len() > 1 && !global.quiet {
        say(&format!("mesh-client: {}", job.count_text()));
    }
    Ok(job.exit())
}

/// Prints an error that occurred before there was anything to show.
fn complain(global: &Global, failed: &Failed) {
    if global.json {
        // Standard output may be closed; the exit code reports the error anyway.
        let _ = print_json(&failed.document());
    }
    say(&format!("mesh-client: {}\n", printable_lines(&failed.text)));
}

/// Starts the log at the level of `RUST_LOG`, else of `-v`.
fn start_log(global: &Global) {
    let level = match global.verbose {
        0 => "error",
        1 => "mesh_client=info,mesh_sdk=info,warn",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Reporting a log line that cannot be written would panic.
    log.log_internal_errors(false).init();
}
