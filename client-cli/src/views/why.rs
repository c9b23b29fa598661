//! Why a task is where it is: the ratings of workers, the task's rank, the predicted and the actual time.

use std::time::Duration;

use mesh_sdk::{Candidate, DecisionView, Packing, Prediction, RankView, TaskStanding, WhyView, WorkerId};
use serde_json::{Value, json};

use super::{
    LOST, RESULT_LOST,
    models::{Names, models_text, rows_json, verdict},
    task_json, wishes_text,
};
use crate::{
    table::{Columns, printable, printable_lines, table_of},
    units,
};

/// The explanation as text. `now_unix_ms` is this machine's clock.
pub(crate) fn why_text(why: &WhyView, is_lost: bool, now_unix_ms: u64, columns: Columns) -> String {
    let mut text = format!("{}\n", printable_lines(&why.summary));
    match why.task.standing {
        TaskStanding::Ended(_) if is_lost => text.push_str(&format!("its result is {RESULT_LOST}\n")),
        _ if is_lost => text.push_str(&format!("{LOST}\n")),
        _ => {}
    }
    if let Some(line) = wishes_text(&why.task) {
        text.push_str(&format!("it asks for {line}\n"));
    }
    if let Some(line) = predicted(why) {
        text.push_str(&line);
    }
    if let Some(rank) = &why.rank {
        text.push_str(&rank_text(rank));
    }
    if !why.history.is_empty() {
        text.push_str("\nSo far:\n");
        why.history.iter().for_each(|line| text.push_str(&format!("  {}\n", printable(line))));
    }
    if let Some(decision) = &why.decision {
        let ago = units::time(Duration::from_millis(now_unix_ms.saturating_sub(decision.at_unix_ms)));
        text.push_str(&format!("\nWorkers as they were rated by '{}' {ago} ago:\n", printable(&decision.policy)));
        text.push_str(&rated(&decision.candidates, decision.chosen.as_ref(), columns));
    }
    if !why.candidates.is_empty() {
        text.push_str("\nWorkers now:\n");
        text.push_str(&rated(&why.candidates, None, columns));
    }
    if let Some(first) = why.models.first() {
        text.push_str(&format!("\nWhat it costs at {} now:\n", printable(&first.worker_name)));
        text.push_str(&models_text(&why.models, &names(why), columns));
    }
    text
}

/// The name of the task's first model; later stages' models come without one.
fn names(why: &WhyView) -> Names {
    Names::from([(why.task.model.digest, why.task.model_name.clone())])
}

/// The broker's prediction and the actual time.
fn predicted(why: &WhyView) -> Option<String> {
    let time = |ms: u32| units::time(Duration::from_millis(ms.into()));
    match (why.predicted_ms, why.took_ms) {
        (Some(predicted), Some(took)) => Some(format!("predicted {}, took {}\n", time(predicted), time(took))),
        (Some(predicted), None) => Some(format!("predicted {}\n", time(predicted))),
        (None, Some(took)) => Some(format!("took {}; nothing was known to predict it by\n", time(took))),
        (None, None) => None,
    }
}

/// The task's rank: the task with the larger sum goes first.
fn rank_text(rank: &RankView) -> String {
    let points = |milli: i64| milli as f64 / 1e3;
    let terms = [rank.priority_milli, rank.waited_milli, rank.data_milli, rank.share_milli];
    let total = terms.into_iter().fold(0, i64::saturating_add);
    format!(
        "its turn: {:.2} points = {:.2} priority {:+.2} waited {:+.2} data {:+.2} share\n",
        points(total),
        points(rank.priority_milli),
        points(rank.waited_milli),
        points(rank.data_milli),
        points(rank.share_milli)
    )
}

fn rated(candidates: &[Candidate], chosen: Option<&WorkerId>, columns: Columns) -> String {
    let best = candidates.iter().find(|worker| chosen == Some(&worker.worker));
    // Of two that are nearly equal, the emptier is chosen, even if its total is the larger one.
    let is_too_busy = |worker: &Candidate| {
        best.is_some_and(|best| {
            worker.busy_permille > best.busy_permille && worker.prediction.total_us() < best.prediction.total_us()
        })
    };
    let row = |worker: &Candidate| {
        let verdict = match worker.against.is_empty() {
            true if chosen == Some(&worker.worker) => "chosen".to_owned(),
            false if chosen == Some(&worker.worker) => format!("chosen, but {}", worker.against.join("; ")),
            true if is_too_busy(worker) => "fits, but is busier".to_owned(),
            true => "fits".to_owned(),
            false => worker.against.join("; "),
        };
        let Prediction { queue_us, transfer_us, load_us, run_us, handover_us, measured } = worker.prediction;
        let time = |us: u64| units::time(Duration::from_micros(us));
        let known = |us: u64| if measured { time(us) } else { "?".to_owned() };
        vec![
            worker.name.clone(),
            format!("{}%", (worker.busy_permille + 5) / 10),
            if worker.holds_model { "yes" } else { "no" }.to_owned(),
            packing(worker),
            time(queue_us),
            time(transfer_us),
            known(load_us),
            known(run_us),
            time(handover_us),
            known(worker.prediction.total_us()),
            verdict,
        ]
    };
    let headings =
        ["WORKER", "BUSY", "HAS MODEL", "PACKING", "QUEUE", "TRANSFER", "LOAD", "RUN", "REST", "TOTAL", "VERDICT"];
    let main = ["WORKER", "BUSY", "QUEUE", "TRANSFER", "LOAD", "RUN", "TOTAL", "VERDICT"];
    table_of(columns, &main, &headings, &candidates.iter().map(row).collect::<Vec<_>>())
}

/// The packing verdict, such as `on, best 8`.
fn packing(worker: &Candidate) -> String {
    match worker.packing {
        Packing::On => format!("{}, best {}", verdict(Packing::On), worker.best_batch),
        other => verdict(other).to_owned(),
    }
}

pub(crate) fn why_json(why: &WhyView, is_lost: bool) -> Value {
    json!({
        "task": task_json(&why.task, is_lost),
        "summary": why.summary,
        "history": why.history,
        "candidates": why.candidates.iter().map(candidate_json).collect::<Vec<_>>(),
        "decision": why.decision.as_ref().map(decision_json),
        "models": rows_json(&why.models, &names(why)),
        "rank": why.rank.map(|rank| json!({
            "priority_milli": rank.priority_milli,
            "waited_milli": rank.waited_milli,
            "data_milli": rank.data_milli,
            "share_milli": rank.share_milli,
        })),
        "predicted_ms": why.predicted_ms,
        "took_ms": why.took_ms,
    })
}

fn decision_json(decision: &DecisionView) -> Value {
    json!({
        "at_unix_ms": decision.at_unix_ms,
        "policy": decision.policy,
        "chosen": decision.chosen.map(|worker| worker.to_string()),
        "candidates": decision.candidates.iter().map(candidate_json).collect::<Vec<_>>(),
    })
}

fn candidate_json(worker: &Candidate) -> Value {
    let Prediction { queue_us, transfer_us, load_us, run_us, handover_us, measured } = worker.prediction;
    json!({
        "worker": { "id": worker.worker.to_string(), "name": worker.name },
        "against": worker.against,
        "holds_model": worker.holds_model,
        "packing": worker.packing.name(),
        "best_batch": worker.best_batch.max(1),
        "busy_permille": worker.busy_permille,
        "prediction": {
            "queue_us": queue_us,
            "transfer_us": transfer_us,
            "load_us": load_us,
            "run_us": run_us,
            "handover_us": handover_us,
            "total_us": worker.prediction.total_us(),
            "measured": measured,
        },
    })
}
