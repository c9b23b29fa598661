//! What a worker costs a small machine while it has nothing to do.

use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_tests::{Mesh, PATIENCE, process, wait_until};
use serde_json::json;

use crate::report::Section;

pub(crate) fn run(smoke: bool) -> Result<Section> {
    let watch = Duration::from_secs(if smoke { 2 } else { 60 });
    let columns = &["program", "RSS MiB", "of it in files MiB", "% of a core", "heartbeats seen"];
    let mut section = Section::new("idle", "Idle: one worker at 1 s heartbeats, and its broker", columns);
    let mut mesh = Mesh::start();
    let mut worker = mesh.worker_with("idle", &["--heartbeat", "1s"]);
    let beats = || mesh.metric("heartbeats_total").unwrap_or(0.0);
    let before = beats();
    wait_until("the first heartbeats", PATIENCE, || beats() >= before + 2.0);

    let first = beats();
    let programs = [("mesh-worker", worker.process().pid()), ("mesh-broker", mesh.broker().pid())];
    let start = Instant::now();
    let before = programs.map(|(_, pid)| process::cpu_time(pid).unwrap_or_default());
    std::thread::sleep(watch);
    let seconds = start.elapsed().as_secs_f64();
    let seen = mesh.metric("heartbeats_total").unwrap_or(0.0) - first;
    let cpu = |now: Duration, before: Duration| (now.saturating_sub(before)).as_secs_f64() / seconds * 100.0;
    for ((name, pid), before) in programs.into_iter().zip(before) {
        let mib = |field| process::status_field(pid, field).unwrap_or(0) as f64 / 1024.0;
        let used = cpu(process::cpu_time(pid).unwrap_or_default(), before);
        section.row(vec![json!(name), json!(mib("VmRSS:")), json!(mib("RssFile:")), json!(used), json!(seen)]);
    }
    section.note(format!("Watched for {} s. Processor time comes in steps of 10 ms.", watch.as_secs()));
    section.note(
        "Memory in files is the program itself: pages shared with other processes that run it, and dropped first.",
    );
    section.note("What limits: the sample of the machine before each heartbeat is nearly all of the processor time.");
    Ok(section)
}
