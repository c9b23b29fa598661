//! The broker's tests with real neighbours: the built program and real Redis servers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod broker;
mod first_start;
mod full_disk;
mod mesh;
mod process;
mod redis_store;
#[path = "../../src/store/samples.rs"]
mod samples;
mod servers;

use std::{
    thread,
    time::{Duration, Instant},
};

/// Limit of every wait: nothing here takes a tenth of it on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two looks at a condition that cannot be awaited otherwise.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until the condition holds.
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        thread::park_timeout(LOOK_EVERY);
    }
}
