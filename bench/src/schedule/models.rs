//! Real models: one that takes any number of rows at once, and one that takes exactly one.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use mesh_sdk::{Mesh, Model};
use mesh_tests::cache;
use serde_json::json;

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling},
    load::{Answered, Job, Rows, closed_loop, items_in},
};
use crate::report::{Report, Table, percentile_ms};

/// Inputs that differ, and whose answers are known from single runs.
const KINDS: u32 = 16;
const CLIENTS: usize = 8;

/// A model, what goes in, and whether it takes many rows at once.
struct Subject {
    file: &'static str,
    title: &'static str,
    item: fn(u32) -> Vec<u8>,
    takes_rows: bool,
}

const SUBJECTS: [Subject; 2] = [
    Subject { file: "magika.onnx", title: "magika.onnx, any number of rows", item: text, takes_rows: true },
    Subject {
        file: "face_detection_short_range.tflite",
        title: "face_detection_short_range.tflite, exactly one",
        item: picture,
        takes_rows: false,
    },
];

/// 2048 INT32 tokens.
fn text(kind: u32) -> Vec<u8> {
    (0..2048_u32).flat_map(|at| ((at * (kind + 3) + kind) % 256).to_le_bytes()).collect()
}

/// 128 × 128 × 3 FP32 between 0 and 1.
fn picture(kind: u32) -> Vec<u8> {
    (0..128 * 128 * 3_u32).flat_map(|at| (((at * (kind + 5)) % 251) as f32 / 251.0).to_le_bytes()).collect()
}

pub(super) async fn run(plan: Plan) -> Result<Report> {
    let run_for = plan.or(Duration::from_secs(8), Duration::from_millis(300));
    let mut report = Report::new("schedule-models", "Real models on this machine's processor");
    let columns =
        &["model", "scheduling", "items each", "items/s", "to off", "p50 ms", "p99 ms", "packing", "best batch"];
    let mut table = Table::new("8 clients in closed loops", columns);
    for subject in SUBJECTS {
        let mut off = f64::NAN;
        for scheduling in [Scheduling::Off, Scheduling::On] {
            let field = Field::start(Layout { scheduling, workers: 1, slots: [1, 1], runner: Runner::Real })?;
            let clients = field.clients("client", CLIENTS).await?;
            let model = Model::from_file(cache::model(subject.file)).await?;
            let job = subject.job(&field, &clients[0], &model).await?;
            closed_loop(&clients, &job, run_for / 2).await?;
            let answers = closed_loop(&clients, &job, run_for).await?.answers;
            let rate = items_in(&answers) as f64 / run_for.as_secs_f64();
            if scheduling == Scheduling::Off {
                off = rate;
            }
            let mut took: Vec<Duration> = answers.iter().map(Answered::took).collect();
            let costs = clients[0].models().await?;
            let cost = costs.iter().find(|row| row.cost.model == model.reference().digest).map(|row| &row.cost);
            table.row(vec![
                json!(subject.title),
                json!(scheduling.name()),
                json!(job.items),
                json!(rate.round()),
                json!(rate / off),
                json!(percentile_ms(&mut took, 0.5)),
                json!(percentile_ms(&mut took, 0.99)),
                json!(cost.map(|cost| cost.packing.name())),
                json!(cost.map(|cost| cost.best_batch)),
            ]);
        }
    }
    report.table(table);
    report.note(
        "One worker with 1 realtime and 1 batch slot; jobs of 8 items, all different from their neighbours, every answer \
         compared with that of a single run. Off: a task is one run: of 8 rows where the model takes them, else of one.",
    );
    report.note("What limits: the processor, which the models share with the mesh and its clients.");
    Ok(report)
}

impl Subject {
    /// Eight items, whose answers are known.
    async fn job(&self, field: &Field, client: &Mesh, model: &Model) -> Result<Job> {
        let inputs: Vec<Vec<u8>> = (0..KINDS).map(self.item).collect();
        let mut outputs = Vec::new();
        for input in &inputs {
            let rows = Rows::Given { inputs: Arc::new(vec![input.clone()]), outputs: Arc::default() };
            let single = Job { rows, ..Job::new(field, model, 1) };
            outputs.push(single.outputs_of_one(client).await.context("a single run")?);
        }
        let rows = Rows::Given { inputs: Arc::new(inputs), outputs: Arc::new(outputs) };
        let job = Job { rows, ..Job::new(field, model, 8) };
        let alone = field.scheduling() == Scheduling::Off && !self.takes_rows;
        Ok(if alone { Job { split: 1, ..job } } else { job })
    }
}
