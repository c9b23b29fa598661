//! Many users with few items each, all at the same moment, and nothing else: 4 realtime slots, no batch slots, one
//! device that runs one batch at a time.

use anyhow::Result;
use mesh_bench::device::Cost;
use serde_json::json;

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    load::{Answered, Job, burst, items_in, span, warm_up},
};
use crate::report::{Report, Table, percentile_ms};

const ITEMS: u32 = 8;

/// Name of a device, its cost, and the bursts for each number of clients.
fn devices(plan: Plan<'_>) -> [(&'static str, Cost, usize); 2] {
    [
        ("5 ms + 5 ms an item", Cost::new(5000, 5000), plan.or(3, 1)),
        ("5 ms + 0.2 ms an item", Cost::new(5000, 200), plan.or(20, 1)),
    ]
}

const COLUMNS: &[&str] = &[
    "device",
    "clients",
    "scheduling",
    "items/s",
    "ideal items/s",
    "of the ideal",
    "p50 ms",
    "p99 ms",
    "max ms",
    "ideal max ms",
    "rows a batch",
    "device busy %",
];

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let mut report = Report::new("schedule-realtime", "Realtime only: bursts of 8 items a client");
    let mut table = Table::new("All clients submit at the same moment", COLUMNS);
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: 1, slots: [4, 0], runner: Runner::Device(1) };
        let field = Field::start(layout)?;
        for (name, cost, rounds) in devices(plan) {
            let model = model_of(&cost).await?;
            // More than 64 items would be bulk, which has no slots here.
            for _ in 0..3 {
                warm_up(&field, &model, None, 64).await?;
            }
            for count in plan.or(&[16, 32, 64, 128][..], &[4]) {
                let clients = field.clients(&format!("{}-{count}-", cost.row_us), *count).await?;
                burst(&clients, &Job::new(&field, &model, ITEMS)).await?;
                let before = field.usage("0")?;
                let mut bursts = Vec::new();
                for _ in 0..rounds {
                    bursts.push(burst(&clients, &Job::new(&field, &model, ITEMS)).await?);
                }
                let used = field.usage("0")?.since(before);
                let mut took: Vec<_> = bursts.iter().flatten().map(Answered::took).collect();
                let seconds: f64 = bursts.iter().map(|answers| span(answers).as_secs_f64()).sum();
                let rate = bursts.iter().map(|answers| items_in(answers)).sum::<u64>() as f64 / seconds;
                let items = *count as u64 * u64::from(ITEMS);
                let (ideal, least) = (items as f64 / cost.all(items).as_secs_f64(), cost.all(items));
                table.row(vec![
                    json!(name),
                    json!(count),
                    json!(scheduling.name()),
                    json!(rate.round()),
                    json!(ideal.round()),
                    json!(rate / ideal),
                    json!(percentile_ms(&mut took, 0.5)),
                    json!(percentile_ms(&mut took, 0.99)),
                    json!(percentile_ms(&mut took, 1.0)),
                    json!(least.as_secs_f64() * 1000.0),
                    json!(used.rows_per_batch()),
                    json!(used.busy.as_secs_f64() / seconds * 100.0),
                ]);
                for client in clients {
                    client.close().await;
                }
            }
        }
    }
    report.table(table);
    notes(&mut report);
    Ok(report)
}

fn notes(report: &mut Report) {
    report.note("One worker, 4 realtime and no batch slots, one device, one batch at a time, at most 64 rows each.");
    report.note(
        "Ideal: the device is busy from the first moment to the last, in as few batches as can be. Off: one lane, FIFO, each \
         task of 8 rows a run of its own, four of them waiting at the device.",
    );
    report.note(
        "What limits: `device busy` short of 100 % is the time in which work was on its way to or from the device.",
    );
}
