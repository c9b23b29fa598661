//! The workers: load of their lanes, equipment, and how often they were late.

use std::time::Duration;

use mesh_sdk::{Lane, WorkerView};
use proto_msgs::{EngineKind, Promised};
use serde_json::{Value, json};

use crate::{
    table::{Columns, table_of},
    units,
};

/// One line per worker.
pub(crate) fn workers_text(workers: &[WorkerView], columns: Columns) -> String {
    if workers.is_empty() {
        return "no worker is connected\n".to_owned();
    }
    let headings = [
        "NAME",
        "STATUS",
        "ARCH",
        "ENGINE",
        "REALTIME",
        "BATCH",
        "WAITING",
        "LATE",
        "CPU",
        "MEMORY FREE",
        "GPU",
        "PROMISED",
        "MODELS",
        "TEMP",
        "LABELS",
        "SEEN",
        "ID",
    ];
    let row = |worker: &WorkerView| {
        let load = &worker.load;
        let degrees = load.temperature_milli_c.map(|milli| format!("{} °C", (milli + 500).div_euclid(1000)));
        vec![
            worker.name.clone(),
            status(worker).to_owned(),
            worker.arch.to_string(),
            engine(worker.engine).to_owned(),
            slots(worker, Lane::Realtime),
            slots(worker, Lane::Batch),
            worker.lanes.iter().map(|lane| lane.waiting_items).fold(0, u32::saturating_add).to_string(),
            worker.violation_permille.map_or_else(|| "-".to_owned(), |permille| units::percent(permille.into())),
            format!("{}% of {}", (load.cpu_permille + 5) / 10, worker.cores),
            memory_free(worker),
            gpus(worker),
            promised(worker),
            worker.held.len().to_string(),
            degrees.unwrap_or_else(|| "-".to_owned()),
            labels(worker),
            format!("{} ago", units::time(Duration::from_millis(worker.silent_ms))),
            worker.worker.to_string(),
        ]
    };
    let main = ["NAME", "STATUS", "REALTIME", "BATCH", "WAITING", "CPU", "LABELS", "SEEN"];
    table_of(columns, &main, &headings, &workers.iter().map(row).collect::<Vec<_>>())
}

fn status(worker: &WorkerView) -> &'static str {
    // Bits 0 to 3 are the current state, the higher bits the past.
    let is_throttled = worker.load.throttled_bits.is_some_and(|bits| bits & 0xf != 0);
    // Realtime tasks also take idle batch slots.
    let ([realtime, batch], [realtime_used, batch_used]) = (worker.slots, worker.slots_used);
    let is_busy = realtime_used >= realtime.saturating_add(batch.saturating_sub(batch_used));
    match (worker.draining, is_busy) {
        (true, _) => "draining",
        (false, _) if is_throttled => "throttled",
        (false, true) => "busy",
        (false, false) => "ready",
    }
}

/// The lane's used and total slots. Slots borrowed by realtime count as used, so it may use more than it has.
fn slots(worker: &WorkerView, lane: Lane) -> String {
    format!("{}/{}", worker.lanes[lane.index()].slots_used, worker.slots[lane.index()])
}

fn labels(worker: &WorkerView) -> String {
    let all: Vec<String> = worker.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(",") }
}

/// Free memory. A running worker always has some left, so 0 means that it has not measured yet.
fn memory_free(worker: &WorkerView) -> String {
    match worker.load.memory_available_bytes {
        0 => "-".to_owned(),
        free => format!("{} of {}", units::show_bytes(free), units::show_bytes(worker.memory_bytes)),
    }
}

fn engine(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Docker => "docker",
        EngineKind::Process => "process",
    }
}

fn gpus(worker: &WorkerView) -> String {
    let of_each = worker.gpus.iter().enumerate().map(|(index, gpu)| {
        let used = worker.load.gpus.get(index).map_or(0, |load| load.memory_used_bytes);
        format!("{} {}/{}", gpu.name, units::show_bytes(used), units::show_bytes(gpu.memory_bytes))
    });
    let all: Vec<String> = of_each.collect();
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
}

/// What the worker's tasks were promised: cores, memory, memory of all GPUs.
fn promised(worker: &WorkerView) -> String {
    let Promised { cpu_millis, memory_bytes, gpu_memory_bytes } = &worker.promised;
    let gpu_bytes = gpu_memory_bytes.iter().copied().fold(0, u64::saturating_add);
    let parts = [
        (*cpu_millis > 0).then(|| format!("{} cores", *cpu_millis as f64 / 1000.0)),
        (*memory_bytes > 0).then(|| units::show_bytes(*memory_bytes)),
        (gpu_bytes > 0).then(|| format!("GPU {}", units::show_bytes(gpu_bytes))),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "-".to_owned() } else { parts.join(", ") }
}

/// The lane's load: `tasks` are the tasks given to it by the broker, `slots_busy` the running batches.
fn lane_json(worker: &WorkerView, lane: Lane) -> Value {
    let load = worker.lanes[lane.index()];
    json!({
        "slots_total": worker.slots[lane.index()],
        "slots_busy": load.slots_used,
        "tasks": worker.slots_used[lane.index()],
        "waiting_items": load.waiting_items,
    })
}

pub(crate) fn workers_json(workers: &[WorkerView]) -> Value {
    let one = |worker: &WorkerView| {
        let load = &worker.load;
        let gpus = worker.gpus.iter().enumerate().map(|(index, gpu)| {
            let now = load.gpus.get(index);
            json!({
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "memory_used_bytes": now.map(|now| now.memory_used_bytes),
                "memory_promised_bytes": worker.promised.gpu_memory_bytes.get(index),
                "busy_permille": now.map(|now| now.busy_permille),
            })
        });
        json!({
            "id": worker.worker.to_string(),
            "name": worker.name,
            "status": status(worker),
            "version": worker.version,
            "os": worker.os,
            "arch": worker.arch.name(),
            "engine": engine(worker.engine),
            "formats": worker.formats.iter().map(|format| format.name()).collect::<Vec<_>>(),
            "endpoints": worker.endpoints,
            "labels": worker.labels.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect::<serde_json::Map<_, _>>(),
            "cores": worker.cores,
            "memory_bytes": worker.memory_bytes,
            "memory_available_bytes": load.memory_available_bytes,
            "disk_free_bytes": load.disk_free_bytes,
            "cpu_permille": load.cpu_permille,
            "load1_milli": load.load1_milli,
            "net_rx_bytes_per_s": load.net_rx_bytes_per_s,
            "net_tx_bytes_per_s": load.net_tx_bytes_per_s,
            "temperature_milli_c": load.temperature_milli_c,
            "throttled_bits": load.throttled_bits,
            "gpus": gpus.collect::<Vec<_>>(),
            "device_map": worker.device_map,
            "lanes": Lane::ALL.map(|lane| (lane.name().to_owned(), lane_json(worker, lane))).into_iter().collect::<serde_json::Map<_, _>>(),
            "promised": {
                "cpu_millis": worker.promised.cpu_millis,
                "memory_bytes": worker.promised.memory_bytes,
            },
            "violation_permille": worker.violation_permille,
            "draining": worker.draining,
            "held_models": worker.held.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "link_bytes_per_s": worker.link_bytes_per_s,
            "broker_rtt_us": worker.broker_rtt_us,
            "silent_ms": worker.silent_ms,
        })
    };
    json!({ "workers": workers.iter().map(one).collect::<Vec<_>>() })
}
