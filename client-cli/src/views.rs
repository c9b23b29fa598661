//! What the broker knows, for people and for scripts: workers, tasks, the cluster, explanations. Owns the tables and the JSON
//! fields, which are a promise; never asks for anything.

use std::time::Duration;

use mesh_models::{Signature, TensorSpec};
use mesh_sdk::{ClusterView, Lane, Outcome, TaskStanding, TaskView, WhyView, WorkerView};
use proto_msgs::EngineKind;
use serde_json::{Value, json};

use crate::{
    table::{printable, printable_lines, table},
    units,
};

/// One line per worker.
pub(crate) fn workers_text(workers: &[WorkerView]) -> String {
    if workers.is_empty() {
        return "no worker is connected\n".to_owned();
    }
    let headings =
        ["NAME", "STATUS", "ARCH", "ENGINE", "SLOTS", "CPU", "MEMORY FREE", "GPU", "MODELS", "TEMP", "SEEN", "ID"];
    let row = |worker: &WorkerView| {
        let load = &worker.load;
        let degrees = load.temperature_milli_c.map(|milli| format!("{} °C", (milli + 500).div_euclid(1000)));
        vec![
            worker.name.clone(),
            status(worker).to_owned(),
            worker.arch.to_string(),
            engine(worker.engine).to_owned(),
            slots(worker),
            format!("{}% of {}", (load.cpu_permille + 5) / 10, worker.cores),
            memory_free(worker),
            gpus(worker),
            worker.held.len().to_string(),
            degrees.unwrap_or_else(|| "-".to_owned()),
            format!("{} ago", units::time(Duration::from_millis(worker.silent_ms))),
            worker.worker.to_string(),
        ]
    };
    table(&headings, &workers.iter().map(row).collect::<Vec<_>>())
}

fn status(worker: &WorkerView) -> &'static str {
    // Bits 0 to 3 are what is so now, the higher ones what once was.
    let is_throttled = worker.load.throttled_bits.is_some_and(|bits| bits & 0xf != 0);
    let is_busy = worker.slots.iter().zip(&worker.slots_used).all(|(slots, used)| used >= slots);
    match (worker.draining, is_busy) {
        (true, _) => "draining",
        (false, _) if is_throttled => "throttled",
        (false, true) => "busy",
        (false, false) => "ready",
    }
}

/// In use of all, realtime and batch.
fn slots(worker: &WorkerView) -> String {
    let lanes = Lane::ALL.map(|lane| (worker.slots_used[lane.index()], worker.slots[lane.index()]));
    lanes.map(|(used, all)| format!("{used}/{all}")).join(" + ")
}

/// A worker that runs has some memory left: 0 says that it has not measured yet.
fn memory_free(worker: &WorkerView) -> String {
    match worker.load.memory_available_bytes {
        0 => "-".to_owned(),
        free => format!("{} of {}", units::size(free), units::size(worker.memory_bytes)),
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
        format!("{} {}/{}", gpu.name, units::size(used), units::size(gpu.memory_bytes))
    });
    let all: Vec<String> = of_each.collect();
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
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
            "slots": worker.slots,
            "slots_used": worker.slots_used,
            "draining": worker.draining,
            "held_models": worker.held.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "link_bytes_per_s": worker.link_bytes_per_s,
            "silent_ms": worker.silent_ms,
        })
    };
    json!({ "workers": workers.iter().map(one).collect::<Vec<_>>() })
}

/// One line per task. `now_unix_ms` is this machine's clock.
pub(crate) fn tasks_text(tasks: &[TaskView], now_unix_ms: u64) -> String {
    if tasks.is_empty() {
        return "the broker remembers no task of this client\n".to_owned();
    }
    let headings = ["TASK", "STATE", "MODEL", "WORKER", "ATTEMPT", "AGE", "TOOK"];
    let row = |task: &TaskView| {
        let age = Duration::from_millis(now_unix_ms.saturating_sub(task.submitted_unix_ms));
        let took = task.ended_unix_ms.map(|ended| Duration::from_millis(ended.saturating_sub(task.submitted_unix_ms)));
        vec![
            task.task.to_string(),
            state(task).to_owned() + if task.detached { " (detached)" } else { "" },
            task.model_name.clone(),
            task.worker.as_ref().map_or_else(|| "-".to_owned(), |(_, name)| name.clone()),
            task.attempt.to_string(),
            units::time(age),
            took.map_or_else(|| "-".to_owned(), units::time),
        ]
    };
    table(&headings, &tasks.iter().map(row).collect::<Vec<_>>())
}

/// One word for where a task stands.
pub(crate) fn state(task: &TaskView) -> &'static str {
    match &task.standing {
        TaskStanding::Queued { .. } => "queued",
        TaskStanding::Granted => "granted",
        TaskStanding::Placed => "running",
        TaskStanding::Ended(Outcome::Done { .. }) => "done",
        TaskStanding::Ended(Outcome::Failed(_)) => "failed",
        TaskStanding::Ended(Outcome::Cancelled) => "cancelled",
    }
}

pub(crate) fn task_text(task: &TaskView) -> String {
    let mut text = format!(
        "task      {}\nstate     {}\nmodel     {} ({}, {}, {})\ninputs    {}\npriority  {}{}\n",
        task.task,
        state(task),
        printable(&task.model_name),
        task.model.format,
        units::size(task.model.size_bytes),
        task.model.digest.short(),
        units::size(task.input_bytes),
        task.priority,
        if task.detached { "\ndetached  yes" } else { "" },
    );
    if let Some((id, name)) = &task.worker {
        text.push_str(&format!("worker    {} ({id}), attempt {}\n", printable(name), task.attempt));
    }
    match &task.standing {
        TaskStanding::Queued { position, reason } => {
            text.push_str(&format!("waits     {position} tasks before it: {}\n", printable(reason)));
        }
        TaskStanding::Ended(Outcome::Done { run_us, load_us }) => {
            let (run, load) = (Duration::from_micros(*run_us), Duration::from_micros(*load_us));
            text.push_str(&format!("took      {} running, {} loading\n", units::time(run), units::time(load)));
        }
        TaskStanding::Ended(Outcome::Failed(failure)) => {
            text.push_str(&format!("error     {}\n", printable_lines(&failure.to_string())));
        }
        TaskStanding::Granted | TaskStanding::Placed | TaskStanding::Ended(Outcome::Cancelled) => {}
    }
    text
}

pub(crate) fn task_json(task: &TaskView) -> Value {
    let (position, reason) = match &task.standing {
        TaskStanding::Queued { position, reason } => (Some(*position), Some(reason.as_str())),
        _ => (None, None),
    };
    let error = match &task.standing {
        TaskStanding::Ended(Outcome::Failed(failure)) => {
            json!({ "code": failure.code.name(), "text": failure.text })
        }
        _ => Value::Null,
    };
    json!({
        "task": task.task.to_string(),
        "job": task.job.to_string(),
        "state": state(task),
        "model": {
            "name": task.model_name,
            "digest": task.model.digest.to_string(),
            "size_bytes": task.model.size_bytes,
            "format": task.model.format.name(),
        },
        "input_bytes": task.input_bytes,
        "priority": task.priority,
        "detached": task.detached,
        "position": position,
        "reason": reason,
        "worker": task.worker.as_ref().map(|(id, name)| json!({ "id": id.to_string(), "name": name })),
        "attempts": task.attempt.0,
        "submitted_unix_ms": task.submitted_unix_ms,
        "ended_unix_ms": task.ended_unix_ms,
        "error": error,
    })
}

pub(crate) fn cluster_text(cluster: &ClusterView, broker: &str, now_unix_ms: u64) -> String {
    let up = Duration::from_millis(now_unix_ms.saturating_sub(cluster.started_unix_ms));
    format!(
        "broker    {broker} (version {}, up {})\nstore     {}{}\nkeys      {}\nworkers   {}\nslots     {} of {} in use\ntasks     {} placed, {} waiting\n",
        printable(&cluster.version),
        units::time(up),
        printable(&cluster.store),
        if cluster.store_ok { "" } else { " (away: detached tasks are refused)" },
        if cluster.encrypted { "encrypted" } else { "none: connections are neither encrypted nor authenticated" },
        cluster.workers,
        cluster.slots_used,
        cluster.slots,
        cluster.placed,
        cluster.queued,
    )
}

pub(crate) fn cluster_json(cluster: &ClusterView, broker: &str) -> Value {
    json!({
        "broker": broker,
        "version": cluster.version,
        "started_unix_ms": cluster.started_unix_ms,
        "store": cluster.store,
        "store_ok": cluster.store_ok,
        "encrypted": cluster.encrypted,
        "workers": cluster.workers,
        "slots": cluster.slots,
        "slots_used": cluster.slots_used,
        "queued": cluster.queued,
        "placed": cluster.placed,
    })
}

pub(crate) fn why_text(why: &WhyView) -> String {
    let mut text = format!("{}\n", printable_lines(&why.summary));
    if !why.history.is_empty() {
        text.push_str("\nSo far:\n");
        why.history.iter().for_each(|line| text.push_str(&format!("  {}\n", printable(line))));
    }
    if !why.candidates.is_empty() {
        text.push_str("\nWorkers now:\n");
        let rows: Vec<Vec<String>> = why
            .candidates
            .iter()
            .map(|worker| {
                let against = if worker.against.is_empty() { "fits".to_owned() } else { worker.against.join("; ") };
                let busy = format!("{}%", (worker.busy_permille + 5) / 10);
                vec![worker.name.clone(), busy, if worker.holds_model { "yes" } else { "no" }.to_owned(), against]
            })
            .collect();
        text.push_str(&table(&["WORKER", "BUSY", "HAS MODEL", "VERDICT"], &rows));
    }
    text
}

pub(crate) fn why_json(why: &WhyView) -> Value {
    let candidates = why.candidates.iter().map(|worker| {
        json!({
            "worker": { "id": worker.worker.to_string(), "name": worker.name },
            "against": worker.against,
            "holds_model": worker.holds_model,
            "busy_permille": worker.busy_permille,
        })
    });
    json!({
        "task": task_json(&why.task),
        "summary": why.summary,
        "history": why.history,
        "candidates": candidates.collect::<Vec<_>>(),
    })
}

pub(crate) fn signature_text(signature: &Signature, size_bytes: u64) -> String {
    let mut text = format!("{} model, {}\n\n", signature.format, units::size(size_bytes));
    let row = |kind: &str, spec: &TensorSpec| {
        let steps = spec.quantization.map(|steps| format!("{} * (x - {})", steps.scale, steps.zero_point));
        vec![kind.to_owned(), spec.name.clone(), spec.to_string(), steps.unwrap_or_default()]
    };
    let inputs = signature.inputs.iter().map(|spec| row("input", spec));
    let rows: Vec<Vec<String>> = inputs.chain(signature.outputs.iter().map(|spec| row("output", spec))).collect();
    text.push_str(&table(&["", "NAME", "TYPE", "QUANTIZED"], &rows));
    text
}

pub(crate) fn signature_json(signature: &Signature, size_bytes: u64) -> Value {
    let spec = |spec: &TensorSpec| {
        json!({
            "name": spec.name,
            "dtype": spec.dtype.map(|dtype| dtype.name()),
            "shape": spec.shape,
            "scale": spec.quantization.map(|steps| steps.scale),
            "zero_point": spec.quantization.map(|steps| steps.zero_point),
        })
    };
    json!({
        "format": signature.format.name(),
        "size_bytes": size_bytes,
        "inputs": signature.inputs.iter().map(spec).collect::<Vec<_>>(),
        "outputs": signature.outputs.iter().map(spec).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests;
