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
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_sdk::{Mesh, Task, new_job};
use tokio::{sync::watch, task::JoinSet};

use self::{
    drive::{Drive, Seen},
    flags::{Bench, FileFlags, Plan},
    payload::Payloads,
    report::{Level, Report},
    sweep::Load,
};
use crate::{
    args::Global,
    connect::connect,
    exit::{self, Failed},
    inputs, items,
    progress::Progress,
    stages,
    stop::{self, Stop, stop_signal, unless_stopped},
    streams::{print, print_json, say},
};

/// Runs the command and prints its report. Returns the exit code.
pub(crate) async fn bench(global: &Global, flags: &Bench) -> Result<u8, Failed> {
    let mut plan = flags.plan()?;
    let mut stop = stop_signal(global.timeout);
    let (payloads, read) = read_inputs(flags, &mut stop).await?;
    let written: Vec<&Path> =
        [&flags.files.csv, &flags.files.plot].into_iter().flatten().map(PathBuf::as_path).collect();
    for file in &written {
        // An unwritable file is found before an hour of measuring, not after it.
        try_to_write(file).map_err(|error| output_failed(exit::USAGE, file, &error))?;
    }
    spare_what_is_read(&written, &read)?;
    // One line of progress for any number of requests.
    let progress = Progress::new(1, global.quiet, global.json);
    let begun = begin(global, flags, &mut plan, payloads, &progress, &mut stop).await;
    let drive = begun.inspect_err(|_| progress.finish())?;
    let report = sweep(&drive, flags, plan, &progress, &mut stop).await;
    progress.finish();
    let unwritten = write_files(&flags.files, &report);
    // The figures are of an hour's work: a full disk does not lose them.
    let printed = if global.json { print_json(&report.to_json()) } else { print(&report.to_text(global.columns())) };
    unwritten.iter().for_each(|failed| say(&format!("mesh-client: {}\n", failed.text)));
    // Last, since it takes its time if the broker is away: a stopped program may have to end before it is over.
    close(&drive.meshes).await;
    printed?;
    Ok(unwritten.iter().fold(report.exit(), |exit, failed| exit::first(exit, failed.exit)))
}

/// Closes all connections at once.
async fn close(meshes: &[Mesh]) {
    let closing: JoinSet<()> = meshes.iter().map(|mesh| mesh.clone().close()).collect();
    closing.join_all().await;
}

/// Writes the files that are wanted. Returns why some are missing.
fn write_files(files: &FileFlags, report: &Report) -> Vec<Failed> {
    let csv = files.csv.as_deref().map(|path| (path, report.to_csv()));
    let plot = files.plot.as_deref().map(|path| (path, report.to_svg()));
    let failed = [csv, plot].into_iter().flatten().filter_map(|(path, content)| {
        let error = replace(path, &content).err()?;
        Some(output_failed(exit::INTERNAL, path, &error))
    });
    failed.collect()
}

/// Writes the file. If the disk is full, the earlier content stays.
fn replace(path: &Path, content: &str) -> io::Result<()> {
    let Some(old) = fs::metadata(path).ok().filter(fs::Metadata::is_file) else {
        return fs::write(path, content); // Such as /dev/stdout.
    };
    let path = fs::canonicalize(path)?;
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let written = fs::write(&new, content).and_then(|()| fs::set_permissions(&new, old.permissions()));
    let replaced = written.and_then(|()| fs::rename(&new, &path));
    replaced.or_else(|error| {
        let _ = fs::remove_file(&new);
        // A file may be open to us in a folder that is not.
        if is_full(&error) { Err(error) } else { fs::write(&path, content) }
    })
}

/// Whether there was no room: a second try would only empty the file that is there.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Refuses files that the bench reads, however they are spelt: its results would take the place of a model or an input.
/// Also refuses one file for two results. Pipes and terminals may serve for both.
fn spare_what_is_read(written: &[&Path], read: &[PathBuf]) -> Result<(), Failed> {
    let real = |path: &Path| fs::canonicalize(path).ok().filter(|path| path.is_file());
    let mut taken: Vec<PathBuf> = read.iter().filter_map(|path| real(path)).collect();
    let read_files = taken.len();
    for file in written {
        let Some(path) = real(file) else { continue };
        if let Some(place) = taken.iter().position(|taken| *taken == path) {
            let what =
                if place < read_files { "is a model, an input or a schedule" } else { "is to hold other results, too" };
            return Err(Failed::new(exit::USAGE, "USAGE", format!("{} {what}: name another file", file.display())));
        }
        taken.push(path);
    }
    Ok(())
}

/// Checks that the file can be written. It keeps the content of an earlier bench until there is a new one.
fn try_to_write(path: &Path) -> io::Result<()> {
    File::options().append(true).create(true).open(path).map(|_| ())
}

fn output_failed(exit: u8, path: &Path, error: &io::Error) -> Failed {
    Failed::new(exit, "OUTPUT", format!("cannot write {}: {error}", path.display()))
}

/// The items of the requests, and all files that the bench reads. They are read before connecting, so that an error
/// costs no connection.
async fn read_inputs(
    flags: &Bench,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<(Payloads, Vec<PathBuf>), Failed> {
    let bad = |error: &dyn std::fmt::Display| Failed::new(exit::BAD_INPUT, "BAD_INPUT", error);
    let signature = stages::read_signature(&flags.model)?;
    let items = items::items(&flags.inputs, signature.as_ref()).map_err(|error| bad(&error))?;
    let models = flags.request.then.iter().map(|then| &then.path).chain([&flags.model]);
    let inputs = items.iter().flat_map(|item| &item.files).map(|(_, path)| path);
    let read = models.chain(inputs).chain(flags.schedule()).cloned().collect();
    let (wishes, model) = (flags.forms.wishes(), signature.clone());
    let load = move || items.iter().map(|item| inputs::load(item, model.as_ref(), &wishes)).collect::<Result<_, _>>();
    let payloads = Payloads::new(stop::blocking(stop, load).await?.map_err(|error| bad(&error))?);
    // Items that cannot be joined are reported here, apart from the mesh's errors.
    payloads.of(0, flags.request.items).map_err(|error| bad(&error))?;
    stages::check(&flags.model, signature.as_ref(), &stages::read(&flags.request.then)?)?;
    Ok((payloads, read))
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
        failures: notes.failures.clone(),
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
        assert!(try_to_write(&dir.path().join("nowhere/monday.csv")).is_err());
    }

    #[test]
    fn results_take_the_place_of_nothing_that_is_read_nor_of_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("more")).unwrap();
        ["times.txt", "a.csv", "b.csv"].iter().for_each(|name| fs::write(at(name), "").unwrap());
        let refused = |written: &[&str], read: &[&str]| {
            let written: Vec<PathBuf> = written.iter().map(|name| at(name)).collect();
            let written: Vec<&Path> = written.iter().map(PathBuf::as_path).collect();
            let read: Vec<PathBuf> = read.iter().map(|name| at(name)).collect();
            spare_what_is_read(&written, &read).err().map(|failed| failed.text).unwrap_or_default()
        };
        assert!(refused(&["more/../times.txt"], &["times.txt"]).contains("is a model, an input or a schedule: name"));
        assert!(refused(&["a.csv", "./more/../a.csv"], &[]).contains("is to hold other results, too: name"));
        assert_eq!(refused(&["a.csv", "b.csv"], &["times.txt", "gone.txt"]), "");
        assert_eq!(refused(&["/dev/null", "/dev/null"], &["/dev/null"]), "", "nothing is lost there");
    }

    #[test]
    fn a_full_disk_and_a_spent_quota_are_the_same_to_an_earlier_file() {
        use nix::errno::Errno;
        let is_full = |errno: Errno| is_full(&io::Error::from_raw_os_error(errno as i32));
        assert_eq!([Errno::ENOSPC, Errno::EDQUOT, Errno::EACCES].map(is_full), [true, true, false]);
    }
}
