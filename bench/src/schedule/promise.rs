//! A stream of single items beside bulk on one device: as it is, and with a service level or deadlines that a full batch
//! of the bulk would break.

use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_bench::device::Cost;
use mesh_sdk::Slo;
use serde_json::{Value, json};

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    figures::{evenly, poisson, seconds},
    load::{Answered, Job, Promise, burst, span, stream, warm_up},
    mixed::BULK_CLIENTS,
};
use crate::report::{Report, Table, percentile_ms};

/// Tasks a second of the stream.
const RATE: u32 = 4;
/// What each device takes for an item (ms), the items of each bulk job, about 18 seconds of work together, and the time
/// that the stream asks for (ms): less than a batch of 64 takes.
const DEVICES: [(u64, u32, u32); 2] = [(5, 900, 50), (1, 4500, 40)];
/// More than 64: fewer would be no bulk.
const BULK_ITEMS_QUICK: u32 = 80;
/// How long the stream is measured on an idle mesh, and beside the bulk. It begins as the bulk runs.
const IDLE_FOR: Duration = Duration::from_secs(5);
const BESIDE_FOR: Duration = Duration::from_secs(16);
const LATER: Duration = Duration::from_secs(1);

const COLUMNS: &[&str] = &[
    "device",
    "scheduling",
    "asks for",
    "within ms",
    "p50 ms",
    "p99 ms",
    "max ms",
    "p99 ms on an idle mesh",
    "late %",
    "refused or expired %",
    "bulk done s",
    "ideal s",
    "of the ideal",
    "rows a batch",
];

/// What the stream asks for.
#[derive(Clone, Copy)]
enum Asks {
    Nothing,
    Slo,
    Deadline,
}

impl Asks {
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Slo => Some("service level"),
            Self::Deadline => Some("deadline"),
        }
    }

    fn promise(self, latency_ms: u32) -> Option<Promise> {
        match self {
            Self::Nothing => None,
            Self::Slo => Some(Promise::Slo(Slo { latency_ms, max_violation_permille: 50 })),
            Self::Deadline => Some(Promise::Deadline(Duration::from_millis(latency_ms.into()))),
        }
    }
}

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let mut report = Report::new("schedule-promise", "A promise to a stream beside bulk on the same device");
    let mut table = Table::new("Single items beside four bulk jobs", COLUMNS);
    for device in plan.or(&DEVICES[..], &DEVICES[..1]) {
        for (scheduling, asks) in [
            (Scheduling::On, Asks::Slo),
            (Scheduling::On, Asks::Deadline),
            (Scheduling::On, Asks::Nothing),
            (Scheduling::Off, Asks::Nothing),
        ] {
            table.row(beside_bulk(plan, *device, scheduling, asks).await?);
        }
    }
    report.table(table);
    report.note(format!(
        "One worker, 2 realtime and 2 batch slots, one device, one batch of at most 64 at a time. The stream: {RATE} tasks of \
         one item a second, at random moments (Poisson); times count from the moment at which each was meant to be sent. Late: \
         not answered within the time of its row, whether it was asked for or not. Times: of those that were answered. Ideal: \
         all items of the run, without the 5 ms of each batch."
    ));
    Ok(report)
}

/// Runs bulk and stream once, and tells how late the stream was.
async fn beside_bulk(
    plan: Plan<'_>,
    (row_ms, items, latency_ms): (u64, u32, u32),
    scheduling: Scheduling,
    asks: Asks,
) -> Result<Vec<Value>> {
    let cost = Cost::new(5000, row_ms * 1000);
    let field = Field::start(Layout { scheduling, workers: 1, slots: [2, 2], runner: Runner::Device(1) })?;
    let model = model_of(&cost).await?;
    warm_up(&field, &model, None, 256).await?;
    let (bulk_clients, clients) = (field.clients("bulk", BULK_CLIENTS).await?, field.clients("stream", 1).await?);
    let (bulk, one) = (Job::new(&field, &model, plan.or(items, BULK_ITEMS_QUICK)), Job::new(&field, &model, 1));
    let one = Job { promise: asks.promise(latency_ms), ..one };

    let alone = evenly(RATE, plan.or(IDLE_FOR, LATER));
    let mut idle = took(&stream(&clients[0], &one, Instant::now(), alone).await?);
    let (before, began) = (field.usage("0")?, Instant::now());
    let beside: Vec<Duration> = poisson(RATE, plan.or(BESIDE_FOR, LATER)).collect();
    let sent = beside.len();
    let beside = stream(&clients[0], &one, began + LATER, beside.into_iter());
    let (bulk_answers, answers) = tokio::try_join!(burst(&bulk_clients, &bulk), beside)?;
    let used = field.usage("0")?.since(before);

    let mut took = took(&answers);
    let in_time = took.iter().filter(|took| **took <= Duration::from_millis(latency_ms.into())).count();
    let percent = |count: usize| json!(count as f64 / sent.max(1) as f64 * 100.0);
    let rows = bulk.items as usize * BULK_CLIENTS + answers.len();
    let (lasted, ideal) = (span(&bulk_answers), Duration::from_micros(rows as u64 * cost.row_us));
    Ok(vec![
        json!(format!("5 ms + {row_ms} ms an item")),
        json!(scheduling.name()),
        json!(asks.name()),
        json!(latency_ms),
        json!(percentile_ms(&mut took, 0.5)),
        json!(percentile_ms(&mut took, 0.99)),
        json!(percentile_ms(&mut took, 1.0)),
        json!(percentile_ms(&mut idle, 0.99)),
        percent(sent - in_time),
        percent(sent - answers.len()),
        seconds(lasted),
        seconds(ideal),
        json!(lasted.as_secs_f64() / ideal.as_secs_f64()),
        json!(used.rows_per_batch()),
    ])
}

fn took(answers: &[Answered]) -> Vec<Duration> {
    answers.iter().map(Answered::took).collect()
}
