//! A slowed worker: only its runners stand still, for most of the time or all of it.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    LOOK_EVERY, Worker,
    process::{children_of, is_computing},
};

/// How long its runners stand still in turn. This is the fault itself, not a wait. What is there when they begin to do so
/// takes longer than that, on any machine; a worker that is only busy needs far less for a short run.
const STANDS_STILL: Duration = Duration::from_secs(5);

/// The runners may go on for this long, and again for as long, until they have done what was there.
const GOES: Duration = Duration::from_millis(100);

/// While this value lives, a worker's runners stand still.
#[derive(Debug)]
pub struct Slowed {
    worker: u32,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slowed {
    /// From now on the runners stand still most of the time.
    pub fn begin(worker: &Worker) -> Self {
        Self::for_turns_of(worker, Some(STANDS_STILL))
    }

    /// From now on the runners stand still: what they run does not end, and what comes later is gathered.
    pub fn to_a_halt(worker: &Worker) -> Self {
        Self::for_turns_of(worker, None)
    }

    fn for_turns_of(worker: &Worker, stands_still: Option<Duration>) -> Self {
        let (worker, is_over) = (worker.pid(), Arc::new(AtomicBool::new(false)));
        signal_runners(worker, Signal::SIGSTOP);
        let over = Arc::clone(&is_over);
        let thread = std::thread::spawn(move || {
            let mut turn_began = Instant::now();
            while !over.load(Ordering::Relaxed) {
                // Runners that were started meanwhile stand still, too.
                signal_runners(worker, Signal::SIGSTOP);
                std::thread::sleep(LOOK_EVERY);
                if stands_still.is_some_and(|time| turn_began.elapsed() >= time) {
                    go(worker);
                    turn_began = Instant::now();
                }
            }
        });
        Self { worker, is_over, thread: Some(thread) }
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
        signal_runners(self.worker, Signal::SIGCONT);
    }
}

/// Lets the runners go on until none of them computes, for no longer than they stood still.
fn go(worker: u32) {
    let began = Instant::now();
    signal_runners(worker, Signal::SIGCONT);
    loop {
        std::thread::sleep(GOES);
        if began.elapsed() >= STANDS_STILL || !runners(worker).into_iter().any(is_computing) {
            return;
        }
    }
}

/// The worker's children that run another program. One that does not yet is being started: the worker waits for it, and
/// would stand still with it.
fn runners(worker: u32) -> Vec<u32> {
    let program = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = program(worker);
    let mut children = children_of(worker);
    children.retain(|pid| program(*pid).is_some_and(|its| Some(its) != own));
    children
}

fn signal_runners(worker: u32, signal: Signal) {
    for runner in runners(worker) {
        let _ = kill(Pid::from_raw(runner as i32), signal); // It may have ended.
    }
}
