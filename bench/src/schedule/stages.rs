//! Two models in a row, each on its own device: overlapping, and one at a time.

use std::time::Instant;

use anyhow::Result;
use mesh_bench::device::Cost;
use mesh_sdk::{Mesh, Model};
use serde_json::json;

use super::{
    Plan,
    field::{Field, Layout, Runner, Scheduling, model_of},
    figures::seconds,
    load::{Job, burst, span, warm_up},
};
use crate::report::{Report, Table, median};

/// How a job passes through the two models.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// One job with two stages, and a slot for each.
    Pipelined,
    /// The same job with one slot: one stage at a time.
    OneSlot,
    /// A job for the first model and, when all its answers have come, one for the second.
    TwoJobs,
}

impl Way {
    const ALL: [Self; 3] = [Self::Pipelined, Self::OneSlot, Self::TwoJobs];

    fn name(self) -> &'static str {
        match self {
            Self::Pipelined => "pipelined",
            Self::OneSlot => "one slot: one stage at a time",
            Self::TwoJobs => "scheduling off: two jobs, one after the other",
        }
    }

    fn layout(self) -> Layout {
        let (scheduling, slots) = match self {
            Self::Pipelined => (Scheduling::On, [0, 2]),
            Self::OneSlot => (Scheduling::On, [0, 1]),
            Self::TwoJobs => (Scheduling::Off, [0, 2]),
        };
        Layout { scheduling, workers: 1, slots, runner: Runner::Device(2) }
    }
}

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let costs = [Cost::new(5000, 1000).on("encode"), Cost::new(5000, 1000).on("decode")];
    let mut report = Report::new("schedule-stages", "Two balanced stages: encode, decode");
    let columns = &[
        "way",
        "items",
        "split",
        "done s",
        "items/s",
        "to one slot",
        "rows a batch encode",
        "decode",
        "ideal pipelined s",
    ];
    let mut table = Table::new("One client, one job", columns);
    let sizes = plan.jobs(&[(100, 8), (512, 8), (2048, 8), (2000, 64), (2000, 128)], (32, 8));
    let mut one_slot = vec![f64::NAN; sizes.len()];
    let mut rows = Vec::new();
    for way in [Way::OneSlot, Way::Pipelined, Way::TwoJobs] {
        let field = Field::start(way.layout())?;
        let [encode, decode] = [model_of(&costs[0]).await?, model_of(&costs[1]).await?];
        warm(&field, way, &encode, &decode).await?;
        let clients = field.clients("one", 1).await?;
        for (at, (items, split)) in sizes.iter().copied().enumerate() {
            if !Job::fits(field.scheduling(), split) {
                continue;
            }
            let (mut times, before) = (Vec::new(), [field.usage("encode")?, field.usage("decode")?]);
            for _ in 0..plan.or(3, 1) {
                times.push(pass(&field, way, &clients, [&encode, &decode], (items, split)).await?);
            }
            let time = median(times);
            if way == Way::OneSlot {
                one_slot[at] = time;
            }
            let used = [field.usage("encode")?.since(before[0]), field.usage("decode")?.since(before[1])];
            let ideal = costs[0].all(items.into()) + costs[1].batch(64.min(items).into());
            let row = vec![
                json!(way.name()),
                json!(items),
                json!(split),
                json!((time * 1000.0).round() / 1000.0),
                json!((f64::from(items) / time).round()),
                json!(one_slot[at] / time),
                json!(used[0].rows_per_batch()),
                json!(used[1].rows_per_batch()),
                seconds(ideal),
            ];
            rows.push((way, row));
        }
    }
    for way in Way::ALL {
        rows.iter().filter(|(of, _)| *of == way).for_each(|(_, row)| table.row(row.clone()));
    }
    report.table(table);
    notes(&mut report);
    Ok(report)
}

fn notes(report: &mut Report) {
    report.note(
        "One worker, two devices of 5 ms a batch and 1 ms an item, one model on each; medians of three rounds. Ideal: the \
         first device always busy with batches of 64, the second with its last batch behind it.",
    );
    report.note(
        "What limits: the batches of the first stage that must be done before the second can begin, and the last ones.",
    );
}

async fn warm(field: &Field, way: Way, encode: &Model, decode: &Model) -> Result<()> {
    match way {
        Way::Pipelined | Way::OneSlot => warm_up(field, encode, Some(decode), 512).await,
        Way::TwoJobs => {
            warm_up(field, encode, None, 128).await?;
            warm_up(field, decode, None, 128).await
        }
    }
}

/// Duration of the job.
async fn pass(
    field: &Field,
    way: Way,
    clients: &[Mesh],
    [encode, decode]: [&Model; 2],
    (items, split): (u32, u32),
) -> Result<f64> {
    let began = Instant::now();
    match way {
        Way::Pipelined | Way::OneSlot => {
            let job = Job { then: Some(decode.clone()), split, ..Job::new(field, encode, items) };
            Ok(span(&burst(clients, &job).await?).as_secs_f64())
        }
        Way::TwoJobs => {
            for model in [encode, decode] {
                burst(clients, &Job { split, ..Job::new(field, model, items) }).await?;
            }
            Ok(began.elapsed().as_secs_f64())
        }
    }
}
