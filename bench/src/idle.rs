//! The cost of an idle worker on a small machine, and of its broker.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::{Mesh, PATIENCE, wait_until};
use serde_json::json;

use crate::{
    measure::{cpu_time, memory_bytes},
    report::{Report, Table},
};

pub(crate) fn run(quick: bool) -> Result<Report> {
    let watch = Duration::from_secs(if quick { 2 } else { 30 });
    let mut report = Report::new("idle", "Idle: one worker at 1 s heartbeats, and its broker");
    let mut table = Table::new(
        "While nothing is asked",
        &["program", "RSS MiB", "of it in files MiB", "peak MiB", "% of a core", "heartbeats seen", "limited by"],
    );
    let mut mesh = Mesh::start();
    let mut worker = mesh.worker_with("idle", &["--heartbeat", "1s"]);
    let beats = |mesh: &Mesh| mesh.metric("heartbeats_total").unwrap_or(0.0);
    let first = beats(&mesh);
    wait_until("the first heartbeats", PATIENCE, || beats(&mesh) >= first + 2.0);

    let programs = [
        ("mesh-worker", worker.process().pid(), "the look at the machine before each heartbeat"),
        ("mesh-broker", mesh.broker().pid(), "one table page for this bench, wake-ups"),
    ];
    let (start, before, first) = (Instant::now(), programs.map(|(_, pid, _)| cpu_time(pid)), beats(&mesh));
    std::thread::sleep(watch);
    let seconds = start.elapsed().as_secs_f64();
    let after = programs.map(|(_, pid, _)| cpu_time(pid));
    let seen = beats(&mesh) - first;
    ensure!(seen > 0.0, "the worker went silent");
    for (at, (name, pid, limit)) in programs.into_iter().enumerate() {
        let mib = |field| memory_bytes(pid, field) as f64 / f64::from(1 << 20);
        let percent = (after[at] - before[at]).as_secs_f64() / seconds * 100.0;
        table.row(vec![
            json!(name),
            json!(mib("VmRSS")),
            json!(mib("RssFile")),
            json!(mib("VmHWM")),
            json!(percent),
            json!(seen),
            json!(limit),
        ]);
    }
    report.table(table);
    report.note(format!("Watched for {} s.", watch.as_secs()));
    report.note("Memory in files is the program itself: pages that other processes of it share, dropped first when memory is short.");
    Ok(report)
}
