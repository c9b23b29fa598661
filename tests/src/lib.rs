//! The harness of the end-to-end tests: a mesh of real processes on this machine, and the means to break it.
//!
//! Owns starting, freezing, killing and cleaning up brokers, workers, clients and Redis servers; a TCP proxy that cuts
//! and counts; models made to order. Never: any part of the mesh itself. The programs under test are the built
//! binaries, and tests assert only what a user, a container engine or the wire between two of them can see.
//!
//! Every wait is for a condition and has a limit; nothing sleeps for a fixed time. Every process has its own process
//! group, dies with the test's thread, and is killed by its id only. The last lines of each process are printed if its
//! test fails.
//!
//! Where to begin: [`Mesh`], then any file of `tests/`.

pub mod cache;
pub mod client;
pub mod docker;
pub mod gpus;
pub mod jobs;
pub mod mesh;
pub mod npy;
pub mod onnx;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod slowed;
pub mod zmtp;

use std::{
    io::Write,
    time::{Duration, Instant},
};

pub use client::{Answer, Submission};
pub use gpus::Gpus;
pub use jobs::Job;
pub use mesh::{Mesh, MeshOptions, Worker};
pub use process::Process;
pub use proxy::Proxy;
pub use redis::Redis;
pub use slowed::Slowed;

/// Limit for anything that takes a second on an idle machine. CI runs on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Pause between two looks at a condition that cannot be awaited otherwise.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` returns a value.
///
/// # Panics
/// If it returns none within `limit`; the message names `what`.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not hold within `limit`; the message names `what`.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}

/// Notes that `test` cannot run here, in the file `$MESH_SKIPPED` that `./test` counts.
///
/// # Panics
/// If `MESH_REQUIRE_ALL` is set, as it is in CI: skipping is for users' machines.
pub fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("MESH_REQUIRE_ALL").is_none(), "{test} must run here, but {why}");
    eprintln!("SKIPPED {test}: {why}");
    if let Some(list) = std::env::var_os("MESH_SKIPPED") {
        let list = std::fs::OpenOptions::new().append(true).create(true).open(list);
        list.and_then(|mut list| writeln!(list, "SKIPPED {test}: {why}")).expect("./test made the file");
    }
}
