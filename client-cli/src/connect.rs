//! From the flags to a connection. Owns the wait for a broker that does not answer yet. Never: what is asked of it.

use std::time::{Duration, Instant};

use mesh_sdk::{ConnectError, Listen, Mesh, Options};
use mesh_transport::address;
use tokio::sync::watch;

use crate::{
    args::Global,
    exit::{self, Failed},
    flags::PathFlags,
    progress::Progress,
    stop::{Stop, stopped},
};

/// Time without the broker's answer before the user is told.
const PATIENCE: Duration = Duration::from_secs(3);

/// Time limit for the broker's connection, unless `--broker-wait` or `--timeout` sets another.
const WAIT_DEFAULT: Duration = Duration::from_secs(10);

/// Longest wait for an answer: a task or a watch may have an hour, a question beside it may not.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);

/// Time by which the connection's own limit may end after `--timeout`.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Joins the mesh. Tells the user if that takes long.
pub(crate) async fn connect(
    global: &Global,
    path: Option<&PathFlags>,
    progress: &Progress,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<Mesh, Failed> {
    let longest = global.timeout.unwrap_or(Duration::MAX);
    let within = global.broker_wait.or(global.timeout).unwrap_or(WAIT_DEFAULT).min(longest);
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
        options.listen = path.listen.clone().map_or(Listen::Auto, |at| Listen::At(address::completed(&at)));
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
                // The connection's own time limit ends about now, too, and its error names the address.
                Stop::Timeout => match tokio::time::timeout(AT_ONCE, &mut connecting).await {
                    Ok(result) => break result,
                    // It began later, because inputs had to be read.
                    Err(_) => return Err(stop.failed()),
                },
            },
            () = tokio::time::sleep(left), if !left.is_zero() => {
                let more = within.saturating_sub(PATIENCE).as_secs();
                progress.say(&format!("the broker at {} does not answer; trying for {more} s more", global.broker));
            }
        }
    };
    match result {
        Ok(mesh) => {
            Ok(mesh.asking_within(longest.min(ANSWER_WAIT_MAX.min(global.broker_wait.unwrap_or(Duration::MAX)))))
        }
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
