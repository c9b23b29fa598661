//! `bench`: puts a load on the mesh and measures the result. Owns the order of the steps: connect, one request per
//! client, level after level, report. Never decides where a request runs or what a figure means.
//!
//! ```text
//!   flags -> Plan -> Sweep --load--> drive (SDK) --samples--> Measurement -> windows, stability
//!                      ^                                           |
//!                      '------------- verdict (Promise) <----------'--> Report -> text, JSON, CSV, SVG
//! ```
//!
//! Except for `drive` and this file, the modules are told the time and do no I/O. Begin with `measurement`.

mod drive;
pub(crate) mod flags;
mod measurement;
mod payload;
mod plot;
mod range;
mod report;
mod sample;
mod schedule;
mod search;
mod shares;
mod sweep;
mod tally;
mod text;
mod verdict;

use std::{
    fs::{self, File},
    path::Path,
    sync::Arc,
};

use mesh_sdk::{Mesh, Task, new_job};
use tokio::sync::watch;

use self::{
    drive::{Drive, Seen},
    flags::{Bench, Plan},
    payload::Payloads,
    report::{Level, Report},
    sweep::Load,
};
use crate::{
    args::Global,
    connect::{Stop, connect, stop_signal, unless_stopped},
    exit, inputs, items,
    progress::Progress,
    report::Failed,
    stages,
};

/// Runs the command. Returns the report to print.
pub(crate) async fn bench(global: &Global, flags: &Bench) -> Result<Report, Failed> {
    let mut plan = flags.plan()?;
    let payloads = read_inputs(flags)?;
    for file in [&flags.files.csv, &flags.files.plot].into_iter().flatten() {
        // An unwritable file is found before an hour of measuring, not after it.
        try_to_write(file)?;
    }
    // One line of progress for any number of requests.
    let progress = Progress::new(1, global.quiet, global.json);
    let mut stop = stop_signal(global.timeout);
    let begun = begin(global, flags, &mut plan, payloads, &progress, &mut stop).await;
    let drive = begun.inspect_err(|_| progress.finish())?;
    let report = sweep(&drive, flags, plan, &progress, &mut stop).await;
    progress.finish();
    if let Some(path) = &flags.files.csv {
        fs::write(path, report.to_csv()).map_err(|error| output_failed(path, &error))?;
    }
    if let Some(path) = &flags.files.plot {
        fs::write(path, report.to_svg()).map_err(|error| output_failed(path, &error))?;
    }
    for mesh in &drive.meshes {
        mesh.clone().close().await;
    }
    Ok(report)
}

/// Checks that the file can be written. It keeps the content of an earlier bench until there is a new one.
fn try_to_write(path: &Path) -> Result<(), Failed> {
    let opened = File::options().append(true).create(true).open(path);
    opened.map(|_| ()).map_err(|error| output_failed(path, &error))
}

fn output_failed(path: &Path, error: &std::io::Error) -> Failed {
    Failed::new(exit::USAGE, "OUTPUT", format!("cannot write {}: {error}", path.display()))
}

/// The items of the requests. All files are read before connecting, so that an error costs no connection.
fn read_inputs(flags: &Bench) -> Result<Payloads, Failed> {
    let bad = |error: &dyn std::fmt::Display| Failed::new(exit::BAD_INPUT, "BAD_INPUT", error);
    let signature = stages::read_signature(&flags.model)?;
    let items = items::items(&flags.inputs, signature.as_ref()).map_err(|error| bad(&error))?;
    let wishes = flags.forms.wishes();
    let load = |item: &items::Item| inputs::load(item, signature.as_ref(), &wishes).map_err(|error| bad(&error));
    let payloads = Payloads::new(items.iter().map(load).collect::<Result<_, Failed>>()?);
    // Items that cannot be joined are reported here, apart from the mesh's errors.
    payloads.of(0, flags.request.items).map_err(|error| bad(&error))?;
    stages::check(&flags.model, signature.as_ref(), &stages::read(&flags.request.then)?)?;
    Ok(payloads)
}

/// Connects all clients, and lets each send one request.
async fn begin(
    global: &Global,
    flags: &Bench,
    plan: &mut Plan,
    payloads: Payloads,
    progress: &Progress,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<Arc<Drive>, Failed> {
    let template = template(flags, plan).await?;
    let mut meshes = Vec::new();
    for client in 0..plan.rules.clients {
        meshes.push(client_of(global, flags, client, progress, stop).await?);
    }
    let drive = Arc::new(Drive {
        meshes,
        template,
        payloads,
        items: flags.request.items,
        distribution: plan.distribution,
        seed: plan.seed,
        outstanding_max: plan.outstanding_max,
        replay: std::mem::take(&mut plan.replay),
        notes: Default::default(),
    });
    progress.phase("first requests: sending model and inputs");
    unless_stopped(stop, drive.prime()).await.map_err(Stop::failed)??;
    Ok(drive)
}

/// Connects one client. The first has the user's own identity, each other one its own, which stays from run to run.
async fn client_of(
    global: &Global,
    flags: &Bench,
    client: u16,
    progress: &Progress,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<Mesh, Failed> {
    if client == 0 {
        return connect(global, Some(&flags.path), progress, stop).await;
    }
    let state_dir = global.state_dir.join("bench").join(client.to_string());
    connect(&Global { state_dir, ..global.clone() }, Some(&flags.path), progress, stop).await
}

/// The settings common to all requests.
async fn template(flags: &Bench, plan: &Plan) -> Result<Task, Failed> {
    let request = &flags.request;
    let task = Task::new(stages::load(&flags.model).await?)
        .job(new_job())
        .priority(request.priority)
        .deadline(request.deadline)
        .lane(request.lane)
        .demands(flags.demands.demands());
    let task = plan.slo.into_iter().fold(task, Task::slo);
    let task = flags.labels.rules().into_iter().fold(task, Task::label);
    stages::add(task, stages::read(&request.then)?).await
}

/// Measures level after level, until none is left or it is time to stop.
async fn sweep(
    drive: &Arc<Drive>,
    flags: &Bench,
    plan: Plan,
    progress: &Progress,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Report {
    let Plan { mut sweep, rules, outstanding_max, .. } = plan;
    let (mut levels, mut left_out, mut stopped) = (Vec::new(), 0, None);
    while let Some(load) = sweep.next().filter(|_| stopped.is_none()) {
        let see = |seen: Seen<'_>| show(progress, drive, load, seen);
        let (measured, stopped_by) = drive::measure(drive, load, rules, stop, see).await;
        stopped = stopped_by;
        let verdict = rules.promise.map(|promise| promise.judge(measured.tally.violation()));
        levels.push(Level { load, measured, verdict });
        if stopped.is_none() {
            left_out += sweep.judged(load, verdict);
        }
    }
    let notes = drive.notes();
    Report {
        model: flags.model.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        promise: rules.promise,
        window_us: rules.window_us,
        outstanding_max,
        levels,
        left_out,
        search: sweep.found().cloned(),
        workers: notes.workers.clone(),
        failures: notes.failures.values().cloned().collect(),
        stopped,
    }
}

/// Shows the progress line and events.
fn show(progress: &Progress, drive: &Drive, load: Load, seen: Seen<'_>) {
    match seen {
        Seen::Window(window) => {
            if let Some(line) = text::moved_line(window, &drive.notes().workers) {
                progress.say(&format!("{load}: {line}"));
            }
        }
        Seen::Progress { measurement, outstanding, part } => {
            progress.phase(&format!("{load}: {}", text::progress_line(measurement, outstanding, part)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bench_that_comes_to_nothing_leaves_earlier_results_alone() {
        let dir = tempfile::tempdir().unwrap();
        let csv = dir.path().join("monday.csv");
        fs::write(&csv, "an hour's work").unwrap();
        try_to_write(&csv).unwrap();
        assert_eq!(fs::read_to_string(&csv).unwrap(), "an hour's work");
        try_to_write(&dir.path().join("tuesday.csv")).unwrap();
        assert_eq!(try_to_write(&dir.path().join("nowhere/monday.csv")).unwrap_err().exit, exit::USAGE);
    }
}
