//! A slowed worker: only its runners stand still for most of the time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::Worker;

/// How long its runners run and stand still in turn. This is the fault itself, not a wait.
const GOES: Duration = Duration::from_millis(10);
const STANDS_STILL: Duration = Duration::from_millis(290);

/// While this value lives, a worker's runners stand still for all but a thirtieth of the time.
#[derive(Debug)]
pub struct Slowed {
    worker: u32,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slowed {
    /// Slows the worker at once.
    pub fn begin(worker: &Worker) -> Self {
        let (worker, is_over) = (worker.pid(), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&is_over);
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                signal_runners(worker, Signal::SIGCONT);
                std::thread::sleep(GOES);
                signal_runners(worker, Signal::SIGSTOP);
                std::thread::sleep(STANDS_STILL);
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

fn signal_runners(worker: u32, signal: Signal) {
    for runner in super::process::children_of(worker) {
        let _ = kill(Pid::from_raw(runner as i32), signal); // It may have ended.
    }
}
