//! Owns reading a process's figures from `/proc`. Never: how they are shown.

use std::{fs, time::Duration};

/// Processor time of all current threads of a process, to the nanosecond (`/proc/PID/stat` counts ticks of 10 ms).
pub(crate) fn cpu_time(pid: u32) -> Duration {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Duration::ZERO };
    let on_cpu_ns = |thread: fs::DirEntry| -> Option<u64> {
        fs::read_to_string(thread.path().join("schedstat")).ok()?.split_whitespace().next()?.parse().ok()
    };
    Duration::from_nanos(threads.flatten().filter_map(on_cpu_ns).sum())
}

/// A field of `/proc/PID/status` in bytes (`VmRSS`, `VmHWM`, `RssFile`); 0 if it is missing.
pub(crate) fn memory_bytes(pid: u32, field: &str) -> u64 {
    mesh_tests::process::status_field(pid, &format!("{field}:")).unwrap_or(0) * 1024
}
