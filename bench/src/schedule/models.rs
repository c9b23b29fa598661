//! Real models: one whose rows may be packed; one that takes any number of rows, but then returns other results; and one
//! that takes exactly one row. With the first one also bulk before realtime.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Error, Result};
use mesh_sdk::{DType, Mesh, Model};
use mesh_tests::cache;
use serde_json::{Value, json};

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling},
    figures::seconds,
    load::{Answered, Job, Rows, burst, closed_loop, items_in, span},
    mixed::{BULK_CLIENTS, ITEMS, mix},
};
use crate::report::{Report, Table, percentile_ms};

/// Number of different inputs; their answers are known from single runs.
const KINDS: u32 = 16;
const CLIENTS: usize = 8;

/// Items of each bulk client: enough that the bulk still runs when the clients in a hurry come.
const BULK_ITEMS: u32 = 2500;

/// Rounds of bursts on an idle mesh.
const IDLE_ROUNDS: usize = 3;

/// A model, its inputs, and whether it takes many rows at once.
struct Subject {
    file: &'static str,
    title: &'static str,
    dtype: DType,
    /// Shape of one item.
    shape: &'static [u64],
    item: fn(u32) -> Vec<u8>,
    takes_rows: bool,
}

const DENOISER: Subject = Subject {
    file: "nsnet2.onnx",
    title: "nsnet2.onnx (recurrent), any number of rows",
    dtype: DType::F32,
    shape: &[10, 161],
    item: spectrum,
    takes_rows: true,
};

const SUBJECTS: [Subject; 3] = [
    DENOISER,
    Subject {
        file: "magika.onnx",
        title: "magika.onnx, any number of rows",
        dtype: DType::I32,
        shape: &[2048],
        item: text,
        takes_rows: true,
    },
    Subject {
        file: "face_detection_short_range.tflite",
        title: "face_detection_short_range.tflite, exactly one",
        dtype: DType::F32,
        shape: &[128, 128, 3],
        item: picture,
        takes_rows: false,
    },
];

/// A tenth of a second of sound: 10 frames of 161 logarithms of power, as FP32 between -8 and 2.
fn spectrum(kind: u32) -> Vec<u8> {
    (0..10 * 161_u32).flat_map(|at| (((at * (kind + 7)) % 241) as f32 / 24.1 - 8.0).to_le_bytes()).collect()
}

/// An input of 2048 INT32 tokens.
fn text(kind: u32) -> Vec<u8> {
    (0..2048_u32).flat_map(|at| ((at * (kind + 3) + kind) % 256).to_le_bytes()).collect()
}

/// An input of 128 × 128 × 3 FP32 values between 0 and 1.
fn picture(kind: u32) -> Vec<u8> {
    (0..128 * 128 * 3_u32).flat_map(|at| (((at * (kind + 5)) % 251) as f32 / 251.0).to_le_bytes()).collect()
}

/// Whether the models are in the cache.
///
/// # Errors
/// Naming the first one that is not there, and the command that fetches it.
pub(super) fn are_fetched() -> Result<()> {
    for subject in SUBJECTS {
        cache::find(&format!("models/{}", subject.file)).map_err(Error::msg)?;
    }
    Ok(())
}

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let mut report = Report::new("schedule-models", "Real models on this machine's processor");
    report.table(in_loops(plan).await?);
    report.table(behind_bulk(plan).await?);
    report.note(
        "Closed loops: one worker with 1 realtime and 1 batch slot; jobs of 8 items, all different from their neighbours, \
         every answer compared with that of a single run. Off: a task is one run: of 8 rows where the model takes them, else \
         of one.",
    );
    report.note(format!(
        "Behind bulk: {BULK_CLIENTS} jobs of {} items and, 2 s later, clients with {ITEMS} items; 2 realtime and 2 batch slots. \
         `Bulk alone`: the same bulk with nobody else there.",
        plan.or(BULK_ITEMS, 16)
    ));
    report.note(
        "nsnet2.onnx takes noise out of speech: recurrent layers and dense ones, whose rows give in company what they give \
         alone. Those of magika.onnx do not (the probe says `differs`), and the last model takes one row only.",
    );
    report.note("What limits: the processor, which the models share with the mesh and its clients.");
    Ok(report)
}

async fn in_loops(plan: Plan<'_>) -> Result<Table> {
    let run_for = plan.or(Duration::from_secs(8), Duration::from_millis(300));
    let columns =
        &["model", "scheduling", "items each", "items/s", "to off", "p50 ms", "p99 ms", "packing", "best batch"];
    let mut table = Table::new("8 clients in closed loops", columns);
    for subject in SUBJECTS {
        let mut off = f64::NAN;
        for scheduling in [Scheduling::Off, Scheduling::On] {
            let field = Field::start(Layout { scheduling, workers: 1, slots: [1, 1], runner: Runner::Real })?;
            let clients = field.clients("client", CLIENTS).await?;
            let job = subject.job(&field, &clients[0]).await?;
            closed_loop(&clients, &job, run_for / 2).await?;
            let answers = closed_loop(&clients, &job, run_for).await?.answers;
            let rate = items_in(&answers) as f64 / run_for.as_secs_f64();
            if scheduling == Scheduling::Off {
                off = rate;
            }
            let mut took: Vec<Duration> = answers.iter().map(Answered::took).collect();
            let [packing, best_batch] = packing(&clients[0], &job.model).await?;
            table.row(vec![
                json!(subject.title),
                json!(scheduling.name()),
                json!(job.items),
                json!(rate.round()),
                json!(rate / off),
                json!(percentile_ms(&mut took, 0.5)),
                json!(percentile_ms(&mut took, 0.99)),
                packing,
                best_batch,
            ]);
        }
    }
    Ok(table)
}

const BEHIND_BULK: &[&str] = &[
    "model",
    "scheduling",
    "realtime clients",
    "p50 s",
    "p99 s",
    "max s",
    "p99 s on an idle mesh",
    "p99 to idle p99",
    "bulk alone s",
    "bulk done s",
    "packing",
    "best batch",
];

async fn behind_bulk(plan: Plan<'_>) -> Result<Table> {
    let mut table = Table::new("Bulk first, then realtime, of one real model", BEHIND_BULK);
    for scheduling in Scheduling::BOTH {
        let field = Field::start(Layout { scheduling, workers: 1, slots: [2, 2], runner: Runner::Real })?;
        let bulk_clients = field.clients("bulk", BULK_CLIENTS).await?;
        let small = DENOISER.job(&field, &bulk_clients[0]).await?;
        let bulk = Job { items: plan.or(BULK_ITEMS, 16), ..small.clone() };
        let learn_for = plan.or(Duration::from_secs(4), Duration::from_millis(200));
        closed_loop(&bulk_clients, &Job { items: 64, ..small.clone() }, learn_for).await?;
        let alone = span(&burst(&bulk_clients, &bulk).await?);
        for count in plan.or(&[8_usize, 24, 48][..], &[2]) {
            let clients = field.clients(&format!("hurried{count}-"), *count).await?;
            let mut idle = Vec::new();
            for _ in 0..plan.or(IDLE_ROUNDS, 1) {
                idle.extend(burst(&clients, &small).await?.iter().map(Answered::took));
            }
            let mut mixed = mix(&bulk_clients, &bulk, &clients, &small).await?;
            let (p99, idle_p99) = (percentile_ms(&mut mixed.realtime, 0.99), percentile_ms(&mut idle, 0.99));
            let [packing, best_batch] = packing(&clients[0], &bulk.model).await?;
            table.row(vec![
                json!(DENOISER.file),
                json!(scheduling.name()),
                json!(count),
                json!(percentile_ms(&mut mixed.realtime, 0.5) / 1000.0),
                json!(p99 / 1000.0),
                json!(percentile_ms(&mut mixed.realtime, 1.0) / 1000.0),
                json!(idle_p99 / 1000.0),
                json!(p99 / idle_p99),
                seconds(alone),
                seconds(mixed.bulk),
                packing,
                best_batch,
            ]);
        }
    }
    Ok(table)
}

/// The worker's verdict on packing this model, and its best batch; nulls if it has not reported them yet.
async fn packing(client: &Mesh, model: &Model) -> Result<[Value; 2]> {
    let costs = client.models().await?;
    let cost = costs.iter().find(|row| row.cost.model == model.reference().digest).map(|row| &row.cost);
    Ok([json!(cost.map(|cost| cost.packing.name())), json!(cost.map(|cost| cost.best_batch))])
}

impl Subject {
    /// A job of eight items with known answers.
    async fn job(&self, field: &Field, client: &Mesh) -> Result<Job> {
        let model = Model::from_file(cache::model(self.file)).await?;
        let inputs: Vec<Vec<u8>> = (0..KINDS).map(self.item).collect();
        let rows = |inputs: Vec<Vec<u8>>, outputs| {
            let (dtype, shape) = (self.dtype, self.shape);
            Rows::Given { dtype, shape, inputs: Arc::new(inputs), outputs: Arc::new(outputs) }
        };
        let mut outputs = Vec::new();
        for input in &inputs {
            let single = Job { rows: rows(vec![input.clone()], Vec::new()), ..Job::new(field, &model, 1) };
            outputs.push(single.outputs_of_one(client).await.context("a single run")?);
        }
        let job = Job { rows: rows(inputs, outputs), ..Job::new(field, &model, 8) };
        let alone = field.scheduling() == Scheduling::Off && !self.takes_rows;
        Ok(if alone { Job { split: 1, ..job } } else { job })
    }
}
