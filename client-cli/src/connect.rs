//! From the flags to a connection. Owns the wait for a broker that does not answer yet, Ctrl-C and `--timeout`.

use std::{
    process,
    time::{Duration, Instant},
};

use mesh_sdk::{ConnectError, Listen, Mesh, Options};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{args::Global, exit, flags::PathFlags, progress::Progress, report::Failed};

/// Time without the broker's answer before the user is told.
const PATIENCE: Duration = Duration::from_secs(3);

/// Time limit for the broker's connection, unless `--timeout` sets another.
const WAIT_DEFAULT: Duration = Duration::from_secs(10);

/// Longest wait for an answer: a task or a watch may have an hour, a question beside it may not.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);

/// Why the program has to stop.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stop {
    CtrlC,
    /// The system asks the program to end.
    Terminate,
    Timeout,
}

impl Stop {
    /// The failure of a task that was stopped.
    pub(crate) fn failed(self) -> Failed {
        match self {
            Self::CtrlC => Failed::new(exit::INTERRUPTED, "INTERRUPTED", "cancelled by Ctrl-C"),
            Self::Terminate => Failed::new(exit::TERMINATED, "INTERRUPTED", "cancelled by SIGTERM"),
            Self::Timeout => Failed::new(exit::EXPIRED, "TIMEOUT", "not done within --timeout"),
        }
    }
}

/// A receiver that learns when to stop. A second Ctrl-C ends the program at once.
pub(crate) fn stop_signal(timeout: Option<Duration>) -> watch::Receiver<Option<Stop>> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let late = async {
            match timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        // If no handler can be installed, the signal itself ends the program.
        let terminated = async {
            match signal(SignalKind::terminate()) {
                Ok(mut signals) => signals.recv().await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            Ok(()) = tokio::signal::ctrl_c() => drop(sender.send(Some(Stop::CtrlC))),
            Some(()) = terminated => drop(sender.send(Some(Stop::Terminate))),
            () = late => drop(sender.send(Some(Stop::Timeout))),
        }
        if tokio::signal::ctrl_c().await.is_ok() {
            process::exit(i32::from(exit::INTERRUPTED));
        }
    });
    receiver
}

/// Waits for the stop signal; for ever if there is none.
pub(crate) async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    match stop.wait_for(Option::is_some).await.map(|stop| *stop) {
        Ok(Some(stop)) => stop,
        _ => std::future::pending().await,
    }
}

/// The result of the future, or the stop signal if that comes first.
pub(crate) async fn unless_stopped<T>(
    stop: &mut watch::Receiver<Option<Stop>>,
    work: impl Future<Output = T>,
) -> Result<T, Stop> {
    tokio::select! {
        done = work => Ok(done),
        stop = stopped(stop) => Err(stop),
    }
}

/// Joins the mesh. Tells the user if that takes long.
pub(crate) async fn connect(
    global: &Global,
    path: Option<&PathFlags>,
    progress: &Progress,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<Mesh, Failed> {
    let within = global.timeout.unwrap_or(WAIT_DEFAULT);
    let mut options = Options::new(&global.broker);
    options.broker_key.clone_from(&global.broker_key);
    options.key_file.clone_from(&global.key_file);
    options.state_dir.clone_from(&global.state_dir);
    options.connect_within = within;
    // Only commands that submit or fetch tasks need to be dialled.
    options.listen = Listen::Never;
    if let Some(path) = path {
        options.direction = path.direction();
        options.advertise.clone_from(&path.advertise);
        options.listen = path.listen.clone().map_or(Listen::Auto, Listen::At);
    }
    let started = Instant::now();
    let mut connecting = std::pin::pin!(Mesh::connect(options));
    progress.phase(&format!("connecting to the broker at {}", global.broker));
    let result = loop {
        let left = PATIENCE.saturating_sub(started.elapsed());
        tokio::select! {
            result = &mut connecting => break result,
            stop = stopped(stop) => match stop {
                Stop::CtrlC | Stop::Terminate => return Err(stop.failed()),
                // The connection's own time limit ends now, too, and its error names the address.
                Stop::Timeout => break connecting.await,
            },
            () = tokio::time::sleep(left), if !left.is_zero() => {
                let more = within.saturating_sub(PATIENCE).as_secs();
                progress.say(&format!("the broker at {} does not answer; trying for {more} s more", global.broker));
            }
        }
    };
    match result {
        Ok(mesh) => Ok(mesh.asking_within(within.min(ANSWER_WAIT_MAX))),
        Err(error) => Err(Failed::new(exit::of_connect(&error), code_of(&error), error)),
    }
}

fn code_of(error: &ConnectError) -> &'static str {
    match exit::of_connect(error) {
        exit::UNREACHABLE => "UNREACHABLE",
        exit::REFUSED => "FORBIDDEN",
        exit::USAGE => "BAD_CONFIGURATION",
        _ => "INTERNAL",
    }
}
