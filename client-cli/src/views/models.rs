//! The cost of models per worker: whether their items are run together, how long batches take, why batches were run.

use std::{collections::BTreeMap, time::Duration};

use mesh_sdk::{Digest, Dispatch, ModelView, Packing};
use serde_json::{Value, json};

use crate::{
    table::{Columns, table_of},
    units,
};

/// This client's names of models: workers know models only by digest.
pub(crate) type Names = BTreeMap<Digest, String>;

/// One line per model and worker.
pub(crate) fn models_text(models: &[ModelView], names: &Names, columns: Columns) -> String {
    if models.is_empty() {
        return "no worker has run a model yet\n".to_owned();
    }
    let headings =
        ["MODEL", "WORKER", "WARM", "PACKING", "BEST BATCH", "1 ITEM", "BATCH", "PER ITEM", "LOAD", "BATCHES", "CURVE"];
    let row = |view: &ModelView| {
        let cost = &view.cost;
        let time = |us: u64| if us == 0 { "-".to_owned() } else { units::time(Duration::from_micros(us)) };
        let best = u32::from(cost.best_batch.max(1));
        let curve = cost.curve.iter().map(|(rows, us)| format!("{rows}:{}", time((*us).into()).replace(' ', "")));
        vec![
            name(view, names),
            view.worker_name.clone(),
            if view.warm { "yes" } else { "no" }.to_owned(),
            verdict(cost.packing).to_owned(),
            best.to_string(),
            time(cost.batch_us(1)),
            time(cost.batch_us(best)),
            time(cost.batch_us(best) / u64::from(best)),
            time(cost.load_us.into()),
            batches(&cost.dispatched),
            curve.collect::<Vec<_>>().join(" "),
        ]
    };
    let main = ["MODEL", "WORKER", "PACKING", "BEST BATCH", "1 ITEM", "PER ITEM", "LOAD"];
    table_of(columns, &main, &headings, &models.iter().map(row).collect::<Vec<_>>())
}

fn name(view: &ModelView, names: &Names) -> String {
    let digest = view.cost.model;
    names.get(&digest).cloned().unwrap_or_else(|| digest.short())
}

/// The verdict for people, with the reason if it is no.
pub(super) fn verdict(packing: Packing) -> &'static str {
    match packing {
        Packing::Unknown => "not tried",
        Packing::On => "on",
        Packing::Unsupported => "off: one at a time",
        Packing::Differs => "off: results differ",
        Packing::NoGain => "off: no gain",
        Packing::TooSlow => "off: runs are too long",
        Packing::Off => "off: --pack-max 1",
    }
}

/// Number of batches by reason, such as `12 full, 3 idle`.
fn batches(dispatched: &[u32; 4]) -> String {
    let of_reason = Dispatch::ALL.iter().zip(dispatched).filter(|(_, count)| **count > 0);
    let all: Vec<String> = of_reason.map(|(reason, count)| format!("{count} {}", reason.name())).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
}

pub(crate) fn models_json(models: &[ModelView], names: &Names) -> Value {
    json!({ "models": rows_json(models, names) })
}

/// The rows without the document around them.
pub(super) fn rows_json(models: &[ModelView], names: &Names) -> Vec<Value> {
    let one = |view: &ModelView| {
        let cost = &view.cost;
        let best = u32::from(cost.best_batch.max(1));
        let reasons = Dispatch::ALL.iter().zip(cost.dispatched);
        json!({
            "model": { "name": names.get(&cost.model), "digest": cost.model.to_string() },
            "worker": { "id": view.worker.to_string(), "name": view.worker_name },
            "warm": view.warm,
            "packing": cost.packing.name(),
            "best_batch": best,
            "one_us": cost.batch_us(1),
            "best_us": cost.batch_us(best),
            "per_item_us": cost.batch_us(best) / u64::from(best),
            "load_us": cost.load_us,
            "curve": cost.curve.iter().map(|(rows, us)| json!({ "rows": rows, "run_us": us })).collect::<Vec<_>>(),
            "dispatched": reasons.map(|(reason, count)| (reason.name().to_owned(), count.into())).collect::<serde_json::Map<_, _>>(),
        })
    };
    models.iter().map(one).collect()
}
