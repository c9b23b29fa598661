//! Whether equals are treated alike: two clients at one device, one job over four workers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_bench::device::Cost;
use mesh_sdk::{Mesh, Model};
use serde_json::json;

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    figures::{cut, jain, least_skew, seconds, skew},
    load::{Answered, Job, SPLIT, closed_loop, items_in, span, warm_up},
};
use crate::report::{Report, Table, median, percentile_ms};

/// Items of two clients, and how the second one differs from the first.
#[derive(Clone, Copy)]
struct Pair {
    name: &'static str,
    items: [u32; 2],
    split: [u32; 2],
    /// The second client starts this much later than the first.
    later_ms: u64,
}

const PAIRS: [Pair; 4] = [
    Pair { name: "equal", items: [2000, 2000], split: [8, 8], later_ms: 0 },
    Pair { name: "equal, in tasks of 128", items: [2000, 2000], split: [128, 128], later_ms: 0 },
    Pair { name: "second comes 1 s later", items: [2000, 1000], split: [8, 8], later_ms: 1000 },
    Pair { name: "first in tasks of 64", items: [2000, 2000], split: [64, 8], later_ms: 0 },
];

/// The usual pairs, or equal ones of the sizes that were asked for.
fn pairs(plan: Plan<'_>) -> Vec<Pair> {
    if plan.sizes.items.is_empty() && plan.sizes.split.is_none() {
        return PAIRS.map(|pair| Pair { items: pair.items.map(|items| plan.or(items, 100)), ..pair }).to_vec();
    }
    let of = |(items, split)| Pair { name: "equal", items: [items; 2], split: [split; 2], later_ms: 0 };
    plan.jobs(&[(2000, SPLIT)], (100, SPLIT)).into_iter().map(of).collect()
}

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let cost = Cost::new(5000, 1000);
    let mut report = Report::new("schedule-fair", "Two clients at one device");
    let columns = &["clients", "scheduling", "items each", "Jain", "first done s", "second done s", "ideal s for both"];
    let mut table = Table::new("Bulk of two clients", columns);
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: 1, slots: [2, 2], runner: Runner::Device(1) };
        let field = Field::start(layout)?;
        let model = model_of(&cost).await?;
        warm_up(&field, &model, None, 256).await?;
        let clients = field.clients("equal", 2).await?;
        for pair in pairs(plan).into_iter().filter(|pair| Job::fits(scheduling, pair.split[0])) {
            let items = pair.items;
            let [first, second] = both(&field, &model, &clients, &pair).await?;
            // Only the time in which both clients wanted something counts.
            let until = last(&first).min(last(&second));
            let from = second.first().map_or(until, |answer| answer.began);
            let in_time = |answers: &[Answered]| {
                answers.iter().filter(|a| a.ended > from && a.ended <= until).map(|a| f64::from(a.items)).sum::<f64>()
            };
            let all = cost.all(items.iter().copied().map(u64::from).sum());
            table.row(vec![
                json!(pair.name),
                json!(scheduling.name()),
                json!(format!("{} and {}", items[0], items[1])),
                json!((jain(&[in_time(&first), in_time(&second)]) * 10_000.0).round() / 10_000.0),
                seconds(span(&first)),
                seconds(span(&second)),
                seconds(all),
            ]);
        }
    }
    report.table(table);
    report.table(loops(plan).await?);
    report.note(
        "Second table: requests of one item on a device of 20 ms an item that gains nothing from batches; each client sends \
         its next request when one of those under way is answered.",
    );
    report.note(
        "One worker, 2 realtime and 2 batch slots, one device of 5 ms a batch and 1 ms an item. Jain's index over the items \
         answered while both clients wanted something: 1 is equal, 0.5 is all for one.",
    );
    report.note("Split in tasks of 8 items unless said otherwise; off, tasks of 64 rows are one run each, and those of 128 do not fit \
         the device.");
    Ok(report)
}

fn last(answers: &[Answered]) -> Instant {
    answers.iter().map(|answer| answer.ended).max().unwrap_or_else(Instant::now)
}

async fn both(field: &Field, model: &Model, clients: &[Mesh], pair: &Pair) -> Result<[Vec<Answered>; 2]> {
    let job = |which: usize| Job { split: pair.split[which], ..Job::new(field, model, pair.items[which]) };
    let (one, other) = (job(0), job(1));
    let second = async {
        tokio::time::sleep(Duration::from_millis(pair.later_ms)).await;
        other.run(&clients[1], Instant::now()).await
    };
    let (first, second) = tokio::try_join!(one.run(&clients[0], Instant::now()), second)?;
    Ok([first, second])
}

/// Requests under way of the first client and of the second.
const UNDER_WAY: [(usize, usize); 3] = [(64, 8), (250, 8), (250, 1)];

/// Two clients in closed loops, one with many more requests under way than the other.
async fn loops(plan: Plan<'_>) -> Result<Table> {
    let columns = &["under way", "scheduling", "answers of each", "Jain", "p50 ms of the second"];
    let mut table = Table::new("Two clients, one with many requests under way", columns);
    let run_for = plan.or(Duration::from_secs(10), Duration::from_millis(500));
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: 1, slots: [2, 2], runner: Runner::Device(1) };
        let field = Field::start(layout)?;
        let model = model_of(&Cost::new(0, 20_000)).await?;
        warm_up(&field, &model, None, 16).await?;
        let clients = field.clients("loop", 2).await?;
        let job = Job { split: 1, ..Job::new(&field, &model, 1) };
        for (many, few) in UNDER_WAY {
            let [first, second] = [(0, plan.or(many, 8)), (1, few)].map(|(of, count)| vec![clients[of].clone(); count]);
            let (first, second) =
                tokio::try_join!(closed_loop(&first, &job, run_for), closed_loop(&second, &job, run_for))?;
            let answers = [first.answers.len(), second.answers.len()];
            let mut took: Vec<Duration> = second.answers.iter().map(Answered::took).collect();
            table.row(vec![
                json!(format!("{many} and {few}")),
                json!(scheduling.name()),
                json!(format!("{} and {}", answers[0], answers[1])),
                json!((jain(&answers.map(|answers| answers as f64)) * 10_000.0).round() / 10_000.0),
                json!(percentile_ms(&mut took, 0.5).round()),
            ]);
        }
    }
    Ok(table)
}

const WORKERS: usize = 4;

/// Items of the job and of each of its tasks.
const SKEWED: [(u32, u32); 9] =
    [(100, 8), (100, 5), (500, 8), (1000, 8), (2000, 8), (2000, 64), (4000, 64), (2000, 128), (4000, 128)];

pub(super) async fn skewed(plan: Plan<'_>) -> Result<Report> {
    let cost = Cost::new(5000, 1000);
    let mut report = Report::new("schedule-skew", "One job over four workers");
    let columns = &[
        "items",
        "split",
        "scheduling",
        "items at each worker, worst round",
        "median max/min",
        "worst max/min",
        "least possible",
        "done s",
    ];
    let mut table = Table::new("Four workers, each with a device of its own", columns);
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: WORKERS, slots: [1, 1], runner: Runner::Device(1) };
        let field = Field::start(layout)?;
        let model = model_of(&cost).await?;
        for _ in 0..2 {
            warm_up(&field, &model, None, 1024).await?;
        }
        let clients = field.clients("one", 1).await?;
        let jobs = plan.jobs(&SKEWED, (100, 5));
        for (items, split) in jobs.into_iter().filter(|(_, split)| Job::fits(scheduling, *split)) {
            let (mut rounds, mut done) = (Vec::new(), Vec::new());
            for _ in 0..plan.or(3, 1) {
                let before = field.rows_by_worker()?;
                let job = Job { split, ..Job::new(&field, &model, items) };
                let answers = job.run(&clients[0], Instant::now()).await?;
                anyhow::ensure!(items_in(&answers) == u64::from(items), "an answer for each item");
                let counts: Vec<u64> =
                    field.rows_by_worker()?.iter().zip(before).map(|(now, before)| now - before).collect();
                rounds.push((skew(&counts), counts));
                done.push(span(&answers).as_secs_f64());
            }
            rounds.sort_by(|one, other| one.0.total_cmp(&other.0));
            let (worst, counts) = rounds.last().cloned().context("there was a round")?;
            let sizes = cut(items, split).into_iter().map(u64::from).collect();
            table.row(vec![
                json!(items),
                json!(split),
                json!(scheduling.name()),
                json!(counts.iter().map(u64::to_string).collect::<Vec<_>>().join(" / ")),
                json!(median(rounds.into_iter().map(|(skew, _)| skew))),
                json!(worst),
                json!(least_skew(sizes, WORKERS)),
                json!((median(done) * 1000.0).round() / 1000.0),
            ]);
        }
    }
    report.table(table);
    report.note(
        "Each worker has 1 realtime and 1 batch slot and a device of 5 ms a batch and 1 ms an item. Three rounds; the \
         aim is judged by the worst of them, whose counts stand there as the devices counted them. `Least possible`: tasks of that size dealt out evenly. Off, tasks of \
         128 rows do not fit the device.",
    );
    Ok(report)
}
