//! The broker's views for people and scripts: the cluster and tasks here, workers, models and explanations in their own
//! files. Owns the tables and the JSON fields, which are a promise. Never asks.

mod models;
mod why;
mod workers;

use std::{collections::BTreeSet, time::Duration};

use mesh_models::{Signature, TensorSpec};
use mesh_sdk::{ClusterView, Outcome, Slo, TaskId, TaskStanding, TaskView, Wishes};
use serde_json::{Value, json};

use crate::{
    table::{Columns, printable, printable_lines, table, table_of},
    units,
};

pub(crate) use self::{
    models::{Names, models_json, models_text},
    why::{why_json, why_text},
    workers::{workers_json, workers_text},
};

/// One line per task. The tasks of `lost` wait for a worker that is not connected. `now_unix_ms` is this machine's clock.
pub(crate) fn tasks_text(tasks: &[TaskView], lost: &BTreeSet<TaskId>, now_unix_ms: u64, columns: Columns) -> String {
    if tasks.is_empty() {
        return "the broker remembers no task of this client\n".to_owned();
    }
    let headings = ["TASK", "STATE", "MODEL", "ITEMS", "LANE", "WORKER", "ATTEMPT", "AGE", "TOOK"];
    let row = |task: &TaskView| {
        let age = Duration::from_millis(now_unix_ms.saturating_sub(task.submitted_unix_ms));
        let took = task.ended_unix_ms.map(|ended| Duration::from_millis(ended.saturating_sub(task.submitted_unix_ms)));
        vec![
            task.task.to_string(),
            shown_state(task, lost.contains(&task.task)).to_owned()
                + if task.detached && columns == Columns::All { " (detached)" } else { "" },
            task.model_name.clone(),
            task.items.to_string(),
            task.lane.to_string(),
            task.worker.as_ref().map_or_else(|| "-".to_owned(), |(_, name)| name.clone()),
            task.attempt.to_string(),
            units::time(age),
            took.map_or_else(|| "-".to_owned(), units::time),
        ]
    };
    let main = ["TASK", "STATE", "MODEL", "WORKER", "AGE", "TOOK"];
    table_of(columns, &main, &headings, &tasks.iter().map(row).collect::<Vec<_>>())
}

/// The state of a task in one word.
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

/// The state for people.
fn shown_state(task: &TaskView, is_lost: bool) -> &'static str {
    if is_lost && !matches!(task.standing, TaskStanding::Ended(_)) { "worker lost" } else { state(task) }
}

/// What becomes of a task whose worker is not connected.
const LOST: &str = "its worker has its inputs and is not connected: it goes on there when that is back, and ends as \
                    WORKER_LOST if that stays away for the broker's --detached-patience";

/// The same for one that is done.
const RESULT_LOST: &str = "at its worker, which is not connected: it can be fetched once that is back";

pub(crate) fn task_text(task: &TaskView, is_lost: bool) -> String {
    let mut text = format!(
        "task      {}\nstate     {}\nmodel     {} ({}, {}, {})\ninputs    {}{}\nlane      {}\npriority  {}{}\n",
        task.task,
        shown_state(task, is_lost),
        printable(&task.model_name),
        task.model.format,
        units::show_bytes(task.model.size_bytes),
        task.model.digest.short(),
        units::show_bytes(task.input_bytes),
        if task.items > 1 { format!(" of {} items", task.items) } else { String::new() },
        task.lane,
        task.priority,
        if task.detached { "\ndetached  yes" } else { "" },
    );
    if let Some(line) = wishes_text(task) {
        text.push_str(&format!("asks for  {line}\n"));
    }
    if let Some((id, name)) = &task.worker {
        text.push_str(&format!("worker    {} ({id}), attempt {}\n", printable(name), task.attempt));
    }
    match task.standing {
        TaskStanding::Ended(_) if is_lost => text.push_str(&format!("result    {RESULT_LOST}\n")),
        _ if is_lost => text.push_str(&format!("waits     {LOST}\n")),
        _ => {}
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

/// What a task asks for, as its flags; `None` if it takes any worker and any time.
pub(crate) fn wishes_text(task: &TaskView) -> Option<String> {
    let Wishes { demands, labels, slo, deadline_ms } = &task.wishes;
    let bytes =
        |flag: &str, bytes: u64| (bytes > 0).then(|| format!("{flag} {}", units::show_bytes(bytes).replace(' ', "")));
    let mut flags = vec![
        (demands.cpu_millis > 0).then(|| format!("--cpu {}", f64::from(demands.cpu_millis) / 1000.0)),
        bytes("--memory", demands.memory_bytes),
        bytes("--gpu-memory", demands.gpu_memory_bytes),
        demands.arch.map(|arch| format!("--arch {arch}")),
        deadline_ms.map(|ms| format!("--deadline {ms}ms")),
        slo.map(|Slo { latency_ms, max_violation_permille }| {
            format!("--slo {latency_ms}ms --max-violation {}", units::percent(max_violation_permille.into()))
        }),
    ];
    flags.extend(labels.iter().map(|rule| {
        let flag = if rule.required { "--require" } else { "--prefer" };
        Some(format!("{flag} {}={}", printable(&rule.key), printable(&rule.value)))
    }));
    flags.extend(task.then.iter().map(|stage| Some(format!("--then {}", printable(&stage.name)))));
    let flags: Vec<String> = flags.into_iter().flatten().collect();
    (!flags.is_empty()).then(|| flags.join(" "))
}

fn wishes_json(Wishes { demands, labels, slo, deadline_ms }: &Wishes) -> Value {
    json!({
        "cpu_millis": demands.cpu_millis,
        "memory_bytes": demands.memory_bytes,
        "gpu_memory_bytes": demands.gpu_memory_bytes,
        "arch": demands.arch.map(|arch| arch.name()),
        "labels": labels
            .iter()
            .map(|rule| json!({ "key": rule.key, "value": rule.value, "required": rule.required }))
            .collect::<Vec<_>>(),
        "slo": slo.map(|slo| {
            json!({ "latency_ms": slo.latency_ms, "max_violation_permille": slo.max_violation_permille })
        }),
        "deadline_ms": deadline_ms,
    })
}

pub(crate) fn task_json(task: &TaskView, is_lost: bool) -> Value {
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
        "items": task.items,
        "lane": task.lane.name(),
        "priority": task.priority,
        "detached": task.detached,
        "wishes": wishes_json(&task.wishes),
        "then": task
            .then
            .iter()
            .map(|stage| json!({ "name": stage.name, "digest": stage.model.digest.to_string() }))
            .collect::<Vec<_>>(),
        "position": position,
        "reason": reason,
        "worker": task.worker.as_ref().map(|(id, name)| json!({ "id": id.to_string(), "name": name })),
        "worker_lost": is_lost,
        "attempts": task.attempt.0,
        "submitted_unix_ms": task.submitted_unix_ms,
        "ended_unix_ms": task.ended_unix_ms,
        "error": error,
    })
}

pub(crate) fn cluster_text(cluster: &ClusterView, broker: &str, now_unix_ms: u64) -> String {
    let up = Duration::from_millis(now_unix_ms.saturating_sub(cluster.started_unix_ms));
    let error = cluster
        .prediction_error_permille
        .map(|permille| format!(", median error of its predictions {}", units::percent(permille)));
    format!(
        "broker    {broker} (version {}, up {})\nstore     {}{}\nkeys      {}\npolicy    {}{}\nworkers   {}\nslots     {} of {} in use\ntasks     {} placed, {} waiting\n",
        printable(&cluster.version),
        units::time(up),
        printable(&cluster.store),
        if cluster.store_ok {
            ""
        } else {
            " (away: detached tasks are refused; the broker's log and /healthz say why)"
        },
        if cluster.encrypted { "encrypted" } else { "none: connections are neither encrypted nor authenticated" },
        printable(&cluster.policy),
        error.unwrap_or_default(),
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
        "policy": cluster.policy,
        "prediction_error_permille": cluster.prediction_error_permille,
        "workers": cluster.workers,
        "slots": cluster.slots,
        "slots_used": cluster.slots_used,
        "queued": cluster.queued,
        "placed": cluster.placed,
    })
}

pub(crate) fn signature_text(signature: &Signature, size_bytes: u64) -> String {
    let mut text = format!("{} model, {}\n\n", signature.format, units::show_bytes(size_bytes));
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
