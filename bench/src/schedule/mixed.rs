//! Bulk first, then clients in a hurry: four jobs of many items and, two seconds later, 8, 24 or 48 clients with 8
//! items each, on one device of 5 ms per batch and 5 ms per item.

use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_bench::device::Cost;
use mesh_sdk::Mesh;
use serde_json::{Value, json};

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    figures::seconds,
    load::{Answered, Job, burst, span, warm_up},
};
use crate::{
    aims::NOTHING_KNOWN,
    report::{Report, Table, percentile_ms},
};

pub(super) const BULK_CLIENTS: usize = 4;
pub(super) const ITEMS: u32 = 8;
/// Time between the bulk and the clients in a hurry.
const LATER: Duration = Duration::from_secs(2);
/// Rounds of bursts on an idle mesh.
const IDLE_ROUNDS: usize = 3;

/// Amount of bulk, and the figures reported for Triton with priorities: realtime p50 in seconds for each number of
/// clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    name: &'static str,
    title: &'static str,
    bulk_items: u32,
    triton_p50_s: Option<[f64; 3]>,
}

pub(super) const LARGE: Kind = Kind {
    name: "schedule-mixed",
    title: "Mixed: 4 bulk jobs of 1000 items, then realtime",
    bulk_items: 1000,
    triton_p50_s: Some([0.64, 1.22, 1.71]),
};
pub(super) const SMALL: Kind = Kind {
    name: "schedule-mixed-small",
    title: "Mixed, small: 4 bulk jobs of 128 items, then realtime",
    bulk_items: 128,
    triton_p50_s: None,
};

/// Figures of one run.
pub(super) struct Mixed {
    /// What each task of those in a hurry took.
    pub(super) realtime: Vec<Duration>,
    /// What all of the bulk took.
    pub(super) bulk: Duration,
}

const COLUMNS: &[&str] = &[
    "scheduling",
    "realtime clients",
    "p50 s",
    "Triton's p50 s",
    "p99 s",
    "max s",
    "Triton's max s",
    "p99 s on an idle mesh",
    "p99 to idle p99",
    "bulk done s",
    "ideal s",
    "of the ideal",
    "rows a batch",
    "device idle %",
];

pub(super) async fn run(plan: Plan<'_>, kind: Kind) -> Result<Report> {
    let cost = Cost::new(5000, 5000);
    let mut report = Report::new(kind.name, kind.title);
    let mut table = Table::new("Realtime behind bulk", COLUMNS);
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: 1, slots: [2, 2], runner: Runner::Device(1) };
        let field = Field::start(layout)?;
        let model = model_of(&cost).await?;
        warm_up(&field, &model, None, 256).await?;
        let bulk_clients = field.clients("bulk", BULK_CLIENTS).await?;
        let bulk = Job::new(&field, &model, plan.or(kind.bulk_items, 16));
        for (at, count) in plan.or(&[8_usize, 24, 48][..], &[2]).iter().enumerate() {
            let clients = field.clients(&format!("hurried{count}-"), *count).await?;
            let small = Job::new(&field, &model, ITEMS);
            let mut idle = Vec::new();
            for _ in 0..plan.or(IDLE_ROUNDS, 1) {
                idle.extend(burst(&clients, &small).await?.iter().map(Answered::took));
            }
            let (before, began) = (field.usage("0")?, Instant::now());
            let mut mixed = mix(&bulk_clients, &bulk, &clients, &small).await?;
            let (used, lasted) = (field.usage("0")?.since(before), began.elapsed());
            let all_items = bulk.items as usize * BULK_CLIENTS + count * ITEMS as usize;
            let ideal = Duration::from_micros(all_items as u64 * cost.row_us);
            let (p99, idle_p99) = (percentile_ms(&mut mixed.realtime, 0.99), percentile_ms(&mut idle, 0.99));
            let triton = kind.triton_p50_s.map_or(Value::Null, |p50| json!(p50[at]));
            table.row(vec![
                json!(scheduling.name()),
                json!(count),
                json!(percentile_ms(&mut mixed.realtime, 0.5) / 1000.0),
                triton,
                json!(p99 / 1000.0),
                json!(percentile_ms(&mut mixed.realtime, 1.0) / 1000.0),
                json!(NOTHING_KNOWN),
                json!(idle_p99 / 1000.0),
                json!(p99 / idle_p99),
                seconds(mixed.bulk),
                seconds(ideal),
                json!((mixed.bulk.as_secs_f64() / ideal.as_secs_f64() * 1000.0).round() / 1000.0),
                json!(used.rows_per_batch()),
                json!((1.0 - used.busy.as_secs_f64() / lasted.as_secs_f64()) * 100.0),
            ]);
            for client in clients {
                client.close().await;
            }
        }
    }
    report.table(table);
    notes(&mut report, kind);
    Ok(report)
}

fn notes(report: &mut Report, kind: Kind) {
    report.note(
        "One worker, 2 realtime and 2 batch slots, one device of 5 ms a batch and 5 ms an item, one batch of at most 64 at \
         a time. Lanes by the broker's threshold on the number of items. Ideal: all items of the run at 5 ms each, without \
         the 5 ms a batch: batches of 64 alone take 1.016 of it.",
    );
    if kind.triton_p50_s.is_some() {
        report.note(
            "Not measured here: Triton with priorities is said to reach these p50 at 8, 24 and 48 clients with the bulk done \
             after 29 to 31 s; Triton FIFO, MLServer, Ray Serve and LitServe 18 to 22 s at p50. No maximum of Triton is \
             known: the maxima here are compared with nothing.",
        );
    }
    report.note("Off: one FIFO lane, workers in turn, each task of 8 rows a run of its own (45 ms).");
}

/// Runs the bulk and then the clients in a hurry.
pub(super) async fn mix(bulk_clients: &[Mesh], bulk: &Job, clients: &[Mesh], small: &Job) -> Result<Mixed> {
    let began = Instant::now();
    let hurried = async {
        tokio::time::sleep_until((began + LATER).into()).await;
        burst(clients, small).await
    };
    let (bulk, hurried) = tokio::try_join!(burst(bulk_clients, bulk), hurried)?;
    Ok(Mixed { bulk: span(&bulk), realtime: hurried.iter().map(Answered::took).collect() })
}
