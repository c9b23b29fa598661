//! When to stop: Ctrl-C, SIGTERM, `--timeout`. Owns that a command that talks to the mesh ends soon after a signal,
//! wherever it is stuck. Never decides what is cancelled: each command does.
//!
//! ```text
//!   signal or --timeout ──► Stop ──► the command cancels its tasks and ends
//!                             └ after a signal: another one, a stuck output, or GRACE ──► the program ends at once
//! ```

use std::{
    process, thread,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::spawn_blocking,
    time::sleep,
};

use crate::{
    exit::{self, Failed},
    streams,
};

/// Time from a signal to the program's end, more than a command needs to cancel its tasks and to say so.
const GRACE: Duration = Duration::from_secs(10);

/// Time without progress of a write after which nobody reads the output.
const UNREAD: Duration = Duration::from_secs(1);

/// Interval of looking for a stuck write.
const LOOK: Duration = Duration::from_millis(100);

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

/// A receiver that learns when to stop. A second signal ends the program at once.
pub(crate) fn stop_signal(timeout: Option<Duration>) -> watch::Receiver<Option<Stop>> {
    let (sender, receiver) = watch::channel(None);
    // Its own runtime: the other one's threads may be stuck in a write.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    // If no handler can be installed, the signal itself ends the program.
    let Ok(runtime) = runtime else { return receiver };
    let signals = {
        let _within = runtime.enter();
        [(SignalKind::interrupt(), Stop::CtrlC), (SignalKind::terminate(), Stop::Terminate)]
            .map(|(kind, stop)| (signal(kind).ok(), stop))
    };
    thread::spawn(move || runtime.block_on(listen(sender, signals, timeout)));
    receiver
}

/// Sends the first stop, and ends the program if that was not enough.
async fn listen(
    sender: watch::Sender<Option<Stop>>,
    mut signals: [(Option<Signal>, Stop); 2],
    timeout: Option<Duration>,
) {
    let late = async {
        match timeout {
            Some(timeout) => sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let first = tokio::select! {
        stop = next(&mut signals) => stop,
        () = late => Stop::Timeout,
    };
    // Without a receiver the command has ended, except for its output.
    let _ = sender.send(Some(first));
    let last = match first {
        Stop::Timeout => next(&mut signals).await,
        Stop::CtrlC | Stop::Terminate => tokio::select! {
            again = next(&mut signals) => again,
            () = stuck() => first,
        },
    };
    process::exit(i32::from(last.failed().exit));
}

/// The next signal.
async fn next([(interrupts, interrupt), (terminations, terminate)]: &mut [(Option<Signal>, Stop); 2]) -> Stop {
    async fn one(signals: &mut Option<Signal>) {
        match signals {
            Some(signals) => drop(signals.recv().await),
            None => std::future::pending().await,
        }
    }
    tokio::select! {
        () = one(interrupts) => *interrupt,
        () = one(terminations) => *terminate,
    }
}

/// Returns once an output is stuck or the time for an orderly end is over.
async fn stuck() {
    let until = Instant::now() + GRACE;
    while Instant::now() < until && !streams::is_unread_for(UNREAD) {
        sleep(LOOK).await;
    }
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

/// The result of work that blocks, or the stop signal if that comes first: to read a pipe may take for ever.
///
/// # Errors
/// If the stop signal came, or the work panicked.
pub(crate) async fn blocking<T: Send + 'static>(
    stop: &mut watch::Receiver<Option<Stop>>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failed> {
    let ended = unless_stopped(stop, spawn_blocking(work)).await.map_err(Stop::failed)?;
    ended.map_err(|error| Failed::new(exit::INTERNAL, "INTERNAL", error))
}
