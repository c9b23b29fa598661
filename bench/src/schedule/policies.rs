//! Each placement policy in one run, on three workers: the second takes twice as long as the first, the third four times
//! as long. A stream of small tasks comes first, then one bulk job. And some policies where slots share a device.

use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_bench::device::Cost;
use mesh_core::broker::Policy;
use serde_json::json;

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    figures::{evenly, poisson, seconds},
    load::{Answered, Job, span, stream, warm_up},
};
use crate::report::{Report, Table, percentile_ms};

/// Run time of each worker, in thousandths of the stated cost.
const PERMILLE: [u64; 3] = [1000, 2000, 4000];

/// Tasks per second, of [`ITEMS`] items each. If each worker ran a third of them one by one, the slowest would be busy
/// for 72 % of the time.
const RATE: u32 = 60;
const ITEMS: u32 = 4;

const COLUMNS: &[&str] = &[
    "policy",
    "stream p50 ms",
    "p99 ms",
    "max ms",
    "shares of the stream %",
    "bulk done s",
    "ideal s",
    "to the ideal",
    "bulk items at each worker",
];

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let cost = Cost::new(5000, 1000);
    let (run_for, bulk_items) = plan.or((Duration::from_secs(5), 3000), (Duration::from_millis(300), 60));
    let mut report = Report::new("schedule-policies", "Placement policies on workers that are not equally fast");
    let mut table = Table::new("The second worker takes twice, the third four times as long as the first", COLUMNS);
    for policy in Policy::ALL {
        let layout =
            Layout { scheduling: Scheduling::On, workers: PERMILLE.len(), slots: [1, 1], runner: Runner::Device(1) };
        let field = Field::with_policy(layout, policy)?;
        for (worker, permille) in PERMILLE.into_iter().enumerate() {
            field.slow_down(worker, permille)?;
        }
        let model = model_of(&cost).await?;
        for _ in 0..2 {
            warm_up(&field, &model, None, 512).await?;
        }
        let clients = field.clients("one", 1).await?;
        let job = Job::new(&field, &model, ITEMS);
        let answers = stream(&clients[0], &job, Instant::now(), evenly(RATE, run_for)).await?;
        let mut took: Vec<Duration> = answers.iter().map(Answered::took).collect();
        let before = field.rows_by_worker()?;
        let bulk = Job::new(&field, &model, bulk_items).run(&clients[0], Instant::now()).await?;
        let counts = field.rows_by_worker()?.into_iter().zip(before).map(|(now, before)| (now - before).to_string());
        let ideal = ideal(&cost, bulk_items);
        table.row(vec![
            json!(policy.name()),
            json!(percentile_ms(&mut took, 0.5)),
            json!(percentile_ms(&mut took, 0.99)),
            json!(percentile_ms(&mut took, 1.0)),
            json!(shares(&field, &answers)),
            seconds(span(&bulk)),
            seconds(ideal),
            json!(span(&bulk).as_secs_f64() / ideal.as_secs_f64()),
            json!(counts.collect::<Vec<_>>().join(" / ")),
        ]);
    }
    report.table(table);
    report.table(shared_device(plan).await?);
    report.note(format!(
        "First table: three workers, 1 realtime and 1 batch slot each, a device each of 5 ms a batch and 1 ms an item, times 1, 2 and 4. \
         {RATE} tasks a second of {ITEMS} items for {} s, then one job of {bulk_items} items in tasks of 8. Lanes, fair \
         shares and packing are the same for all policies: only where a task goes differs.",
        run_for.as_secs_f64()
    ));
    report.note("Ideal: all three devices busy with full batches from the first moment to the last.");
    report.note(format!(
        "Second table: two equal workers, 2 realtime and 2 batch slots each, one device each of 20 ms a batch and 2 ms an item \
         with one batch at a time: a free slot is not a free device. {SHARED_RATE} tasks a second of {ITEMS} items on average \
         for {} s, at the same random times (Poisson) for all policies. A task alone takes {} ms.",
        shared_for(plan).as_secs_f64(),
        SHARED_COST_US.0 / 1000 + SHARED_COST_US.1 * u64::from(ITEMS) / 1000,
    ));
    Ok(report)
}

/// Tasks per second where slots share a device, and its cost: of each batch and of each item, microseconds. Run one by
/// one, they keep both devices busy for 42 % of the time.
const SHARED_RATE: u32 = 30;
const SHARED_COST_US: (u64, u64) = (20_000, 2000);

const SHARED_COLUMNS: &[&str] =
    &["policy", "stream p50 ms", "p90 ms", "p99 ms", "max ms", "shares of the stream %", "rows a batch"];

fn shared_for(plan: Plan<'_>) -> Duration {
    plan.or(Duration::from_secs(20), Duration::from_secs(1))
}

/// Two equal workers with more slots than their devices run at a time.
async fn shared_device(plan: Plan<'_>) -> Result<Table> {
    let mut table = Table::new("Two equal workers with 2 + 2 slots on one device each", SHARED_COLUMNS);
    for policy in [Policy::Predicted, Policy::LeastLoaded, Policy::RoundRobin] {
        let layout = Layout { scheduling: Scheduling::On, workers: 2, slots: [2, 2], runner: Runner::Device(1) };
        let field = Field::with_policy(layout, policy)?;
        let model = model_of(&Cost::new(SHARED_COST_US.0, SHARED_COST_US.1)).await?;
        for _ in 0..2 {
            warm_up(&field, &model, None, 256).await?;
        }
        let clients = field.clients("one", 1).await?;
        let job = Job::new(&field, &model, ITEMS);
        let before = field.usage("0")?;
        let answers = stream(&clients[0], &job, Instant::now(), poisson(SHARED_RATE, shared_for(plan))).await?;
        let used = field.usage("0")?.since(before);
        let mut took: Vec<Duration> = answers.iter().map(Answered::took).collect();
        table.row(vec![
            json!(policy.name()),
            json!(percentile_ms(&mut took, 0.5)),
            json!(percentile_ms(&mut took, 0.9)),
            json!(percentile_ms(&mut took, 0.99)),
            json!(percentile_ms(&mut took, 1.0)),
            json!(shares(&field, &answers)),
            json!(used.rows_per_batch()),
        ]);
    }
    Ok(table)
}

/// Ideal time of this many items: no device ever waits.
fn ideal(cost: &Cost, items: u32) -> Duration {
    let rate: f64 = PERMILLE.iter().map(|permille| cost.rows_per_s(64) * 1000.0 / *permille as f64).sum();
    Duration::from_secs_f64(f64::from(items) / rate)
}

/// The share of each worker in the answers, in whole percent.
fn shares(field: &Field, answers: &[Answered]) -> String {
    let share = |name: &str| {
        let count = answers.iter().filter(|answer| answer.worker == name).count();
        format!("{:.0}", count as f64 * 100.0 / answers.len().max(1) as f64)
    };
    field.worker_names().into_iter().map(share).collect::<Vec<_>>().join(" / ")
}
