//! A stream of tasks with a service level, and a worker that becomes slow in the middle of it.

use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_bench::device::Cost;
use mesh_sdk::Slo;
use serde_json::json;

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    figures::evenly,
    load::{Answered, Job, Promise, stream, warm_up},
};
use crate::report::{Report, Table, percentile_ms};

const SLO: Slo = Slo { latency_ms: 60, max_violation_permille: 50 };
const ITEMS: u32 = 4;
/// Tasks per second: nearly half of what the two workers can do without packing, nearly all of what one can.
const RATE: u32 = 100;
/// Slowness of the slow worker, thousandths of its usual time: 90 ms per task, more than the service level allows.
const SLOW_PERMILLE: u64 = 10_000;

/// Seconds at which the first worker becomes slow, at which it recovers, and at which the stream ends.
const FULL: [u64; 3] = [6, 18, 36];
const QUICK: [u64; 3] = [1, 2, 3];

const COLUMNS: &[&str] = &[
    "scheduling",
    "seconds",
    "first worker is",
    "tasks",
    "share of the first worker %",
    "violations %",
    "p50 ms",
    "p99 ms",
];

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let (phases, rate) = (plan.or(FULL, QUICK), plan.sizes.rate.unwrap_or(RATE));
    let mut report = Report::new("schedule-switch", "A worker becomes slow under a stream with a promise");
    let mut table = Table::new("Share of the slow worker and violations over time", COLUMNS);
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: 2, slots: [2, 2], runner: Runner::Device(1) };
        let field = Field::start(layout)?;
        let model = model_of(&Cost::new(5000, 1000)).await?;
        for _ in 0..2 {
            warm_up(&field, &model, None, 256).await?;
        }
        let clients = field.clients("stream", 1).await?;
        let job = Job { promise: Some(Promise::Slo(SLO)), ..Job::new(&field, &model, ITEMS) };
        let began = Instant::now();
        let disturb = async {
            for (at, permille) in [(phases[0], SLOW_PERMILLE), (phases[1], 1000)] {
                tokio::time::sleep_until((began + Duration::from_secs(at)).into()).await;
                field.slow_down(0, permille)?;
            }
            anyhow::Ok(())
        };
        let (answers, ()) =
            tokio::try_join!(stream(&clients[0], &job, began, evenly(rate, Duration::from_secs(phases[2]))), disturb)?;
        let slow_name = field.worker_names().first().copied().unwrap_or_default();
        let step = plan.or(2, 1);
        for from in (0..phases[2]).step_by(step as usize) {
            let within = |answer: &&Answered| (answer.began - began).as_secs() / step == from / step;
            let state = if (phases[0]..phases[1]).contains(&from) { "slow" } else { "well" };
            let answers: Vec<&Answered> = answers.iter().filter(within).collect();
            let percent = |counted: usize| json!(counted as f64 / answers.len().max(1) as f64 * 100.0);
            let limit = Duration::from_millis(SLO.latency_ms.into());
            let mut took: Vec<Duration> = answers.iter().map(|answer| answer.took()).collect();
            table.row(vec![
                json!(scheduling.name()),
                json!(format!("{from}–{}", from + step)),
                json!(state),
                json!(answers.len()),
                percent(answers.iter().filter(|answer| answer.worker == slow_name).count()),
                percent(took.iter().filter(|took| **took > limit).count()),
                json!(percentile_ms(&mut took, 0.5)),
                json!(percentile_ms(&mut took, 0.99)),
            ]);
        }
    }
    report.table(table);
    notes(&mut report, phases, rate);
    Ok(report)
}

fn notes(report: &mut Report, phases: [u64; 3], rate: u32) {
    report.note(format!(
        "Two workers with a device each (5 ms a batch, 1 ms an item); {rate} tasks a second of {ITEMS} items, 60 ms promised, \
         5 % may take longer. The first worker's device takes {} times as long from second {} to {}. Times count from the \
         moment a task was meant to be sent.",
        SLOW_PERMILLE / 1000,
        phases[0],
        phases[1]
    ));
}
