//! The broker's tests with real neighbours: the built program, real Redis servers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod broker;
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

/// Nothing here takes a tenth of it on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks at a condition that can only be looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until it is so.
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        thread::park_timeout(LOOK_EVERY);
    }
}
