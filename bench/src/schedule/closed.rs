//! Small requests without end, on a device whose time depends mostly on the number of batches: 5 ms per batch and 0.2
//! ms per item.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::{
    Plan,
    bare::{self, Bare},
    field::{Field, Layout, Runner, Scheduling, model_of},
    load::{Answered, Job, Looped, closed_loop, items_in, warm_up},
};
use crate::{
    measure::{cpu_time, memory_bytes},
    report::{Report, Table, percentile_ms},
};

/// Number of clients, and items per request. The first is bulk, to which small requests are compared. With 8 clients of 8
/// items all that is outstanding is one full batch; with 16 items the next batch waits while the answers go out.
const SHAPES: [(usize, u32); 7] = [(4, 512), (8, 1), (8, 8), (8, 16), (64, 1), (64, 8), (256, 1)];

const COLUMNS: &[&str] = &[
    "scheduling",
    "clients",
    "items each",
    "items/s",
    "ideal items/s",
    "of the ideal",
    "of bare libzmq",
    "to bulk",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "rows a batch",
    "device busy %",
    "mesh µs a task",
    "clients µs a task",
];

pub(super) async fn run(plan: Plan<'_>) -> Result<Report> {
    let cost = bare::cost();
    let run_for = plan.or(Duration::from_secs(6), Duration::from_millis(300));
    let mut report = Report::new("schedule-gpu", "Closed loops on a GPU-like device");
    let mut table = Table::new("Each client sends its next request when it has the answer to the last", COLUMNS);
    let mut memory_mib = 0;
    let bare = without_mesh(plan, run_for, &mut table)?;
    for scheduling in Scheduling::BOTH {
        let layout = Layout { scheduling, workers: 1, slots: [2, 2], runner: Runner::Device(1) };
        let mut field = Field::start(layout)?;
        let model = model_of(&cost).await?;
        warm_up(&field, &model, None, 512).await?;
        let mut bulk = None;
        for ((clients, items), bare) in SHAPES.into_iter().zip(&bare) {
            let clients = field.clients(&format!("{clients}x{items}-"), plan.or(clients, 2)).await?;
            let job = Job::new(&field, &model, items);
            closed_loop(&clients, &job, run_for / 4).await?;
            let (before, cpu, own) = (field.usage("0")?, field.mesh_cpu(), cpu_time(std::process::id()));
            let Looped { answers, later, all } = closed_loop(&clients, &job, run_for).await?;
            let (cpu, own) = (field.mesh_cpu().saturating_sub(cpu), cpu_time(std::process::id()).saturating_sub(own));
            let used = field.usage("0")?.since(before);
            let rate = items_in(&answers) as f64 / run_for.as_secs_f64();
            let ideal = cost.rows_per_s(clients.len() as u64 * u64::from(items));
            let mut took: Vec<Duration> = answers.iter().map(Answered::took).collect();
            let tasks = (answers.len() + later).max(1) as f64;
            let each = |cpu: Duration| json!((cpu.as_micros() as f64 / tasks).round());
            table.row(vec![
                json!(scheduling.name()),
                json!(clients.len()),
                json!(items),
                json!(rate.round()),
                json!(ideal.round()),
                json!(rate / ideal),
                json!(bare.map(|bare| rate / bare)),
                json!(rate / *bulk.get_or_insert(rate)),
                json!((rate / f64::from(items)).round()),
                json!(percentile_ms(&mut took, 0.5)),
                json!(percentile_ms(&mut took, 0.99)),
                json!(used.rows_per_batch()),
                json!(used.busy.as_secs_f64() / all.as_secs_f64() * 100.0),
                each(cpu),
                each(own),
            ]);
            for client in clients {
                client.close().await;
            }
        }
        memory_mib = memory_bytes(std::process::id(), "VmHWM") >> 20;
    }
    report.table(table);
    notes(&mut report, run_for, memory_mib);
    Ok(report)
}

/// Items per second of each shape over bare libzmq; `None` for bulk, whose clients have many tasks under way.
fn without_mesh(plan: Plan<'_>, run_for: Duration, table: &mut Table) -> Result<Vec<Option<f64>>> {
    let (bare, cost) = (Bare::start()?, bare::cost());
    let mut rates = vec![None];
    for (clients, items) in &SHAPES[1..] {
        let clients = plan.or(*clients, 2);
        bare.closed_loop(clients, *items, run_for / 4)?;
        let rate = bare.closed_loop(clients, *items, run_for)?;
        let ideal = cost.rows_per_s(clients as u64 * u64::from(*items));
        let mut row = vec![json!(null); COLUMNS.len()];
        let shown = [json!("no mesh: bare libzmq"), json!(clients), json!(items), json!(rate.round())];
        row[..4].clone_from_slice(&shown);
        row[4] = json!(ideal.round());
        row[5] = json!(rate / ideal);
        table.row(row);
        rates.push(Some(rate));
    }
    Ok(rates)
}

fn notes(report: &mut Report, run_for: Duration, memory_mib: u64) {
    report.note(format!(
        "One worker, 2 realtime and 2 batch slots, one device, one batch of at most 64 at a time; {} s each. Ideal: the \
         device always busy with batches of all that can be outstanding, 64 at most. Bulk: 4 clients with 512 items each, \
         sent in tasks of 8.",
        run_for.as_secs_f64()
    ));
    report.note(
        "Times of 512 items are those of their tasks, from the moment the whole job was begun. Triton's dynamic batcher is \
         said to reach 0.60 of the ideal at 64 clients (not measured here).",
    );
    report.note(
        "Bare libzmq: the messages of a task, of the same sizes, between one process for all clients, one that answers every \
         submit with a grant, and one that takes the time of a batch of all that ask. No scheduling, hashing or runner: \
         what a mesh over ZeroMQ can reach on this machine at most.",
    );
    report.note(format!(
        "What limits: processor time. `µs a task` is what broker and worker, and all clients together, use of two cores; \
         the clients are one process ({memory_mib} MiB) on the same machine."
    ));
}
