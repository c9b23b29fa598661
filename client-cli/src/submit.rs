//! `submit`: turns items into tasks, several at a time. Owns the order of the steps, and that one bad item does not
//! stop the others. Never: the form of inputs or outputs.
//!
//! ```text
//!   files ► items ──(at most --split)──► load ► bunches of one shape ► follow: task ► reports, item by item
//! ```

mod bunch;
mod ends;
mod follow;
mod pace;

use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_models::Signature;
use mesh_sdk::{Input, Mesh, Model, Task, WorkerId, new_job};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};

use self::{
    bunch::{Bunch, Loaded, bunches},
    ends::Ends,
    follow::Reports,
    pace::Pace,
};
use crate::{
    args::{Global, Submit},
    connect::connect,
    exit::{self, Failed},
    inputs,
    items::{self, Item, ItemsError},
    outputs,
    progress::Progress,
    report::{Job, Kept, LINES_MAX, Report},
    stages,
    stop::{self, Stop, stop_signal, unless_stopped},
};

pub(crate) use self::follow::{Unfinished, until_end};

/// Reports that may wait for the collector.
const REPORTS_MAX: usize = 64;

/// Longest wait for the broker's word on workers that got nothing.
const WHY_WAIT: Duration = Duration::from_millis(500);

/// The data common to all items.
struct Shared {
    mesh: Mesh,
    signature: Option<Signature>,
    wishes: inputs::Wishes,
    template: Task,
    deadline: Option<Duration>,
    detach: bool,
    no_wait: bool,
    /// Whether each item is printed as soon as it has ended.
    json_lines: bool,
    /// Whether the outputs are shown to people at the end of the command.
    shows_outputs: bool,
    /// Whether all items are in one document, on standard output or in a file.
    wants_document: bool,
    /// Items that may share a task.
    split: usize,
    /// The folder for outputs, and whether each item has its own subfolder.
    output: Option<(PathBuf, bool)>,
    broker: String,
    progress: Mutex<Progress>,
    /// Permits to read files and decode pictures at the same time: one per core.
    loading: Semaphore,
    /// Input bytes of the largest task so far.
    largest_bytes: AtomicU64,
}

/// One item to submit.
struct Work {
    index: usize,
    item: Item,
    /// The item's inputs, if its files have already been read.
    inputs: Option<Vec<Input>>,
}

/// Runs the command. Returns the job to print.
pub(crate) async fn submit(global: &Global, flags: &Submit) -> Result<Job, Failed> {
    let started = Instant::now();
    check_output(flags)?;
    let signature = stages::read_signature(&flags.model)?;
    let stages = stages::read(&flags.then)?;
    stages::check(&flags.model, signature.as_ref(), &stages)?;
    let mut stop = stop_signal(global.timeout);
    let work = works(flags, signature.as_ref(), &mut stop).await?;
    let items = work.len();
    if let Some(folder) = &flags.output.output {
        let names = work.iter().map(|work| work.item.name.as_str()).filter(|_| items != 1);
        outputs::prepare(folder, names).map_err(|error| Failed::new(exit::USAGE, "OUTPUT", error))?;
    }
    let progress = Progress::new(items, global.quiet, global.json);
    let mesh = connect(global, Some(&flags.path), &progress, &mut stop).await.inspect_err(|_| progress.finish())?;
    let model = stages::load(&flags.model).await?;
    let job = new_job();
    let template = template(flags, model.clone(), items).job(job);
    let template = stages::add(template, stages).await?;
    let (split, pace) = pace(flags, &mesh, items, &mut stop).await;
    let shared = Arc::new(Shared {
        mesh,
        signature,
        wishes: flags.forms.wishes(),
        template,
        deadline: flags.deadline,
        detach: flags.detach,
        no_wait: flags.no_wait,
        json_lines: flags.json_lines,
        shows_outputs: shows_outputs(global, flags, items),
        wants_document: wants_document(global, flags),
        split,
        output: flags.output.output.clone().map(|folder| (folder, items != 1)),
        broker: global.broker.clone(),
        progress: Mutex::new(progress),
        loading: Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)),
        largest_bytes: AtomicU64::new(0),
    });
    let ended = run(&shared, work, pace, &stop).await;
    shared.progress().finish();
    let took = started.elapsed();
    let idle = match &ended {
        Ok((reports, _)) => idle_workers(&shared.mesh, reports).await,
        Err(_) => Vec::new(),
    };
    shared.mesh.clone().close().await;
    let (model_name, model) = (model.name().to_owned(), model.reference());
    let unwritten = |error| Failed::new(exit::INTERNAL, "OUTPUT", error);
    let (reports, kept) = ended.map_err(unwritten)?;
    let mut job = Job { job: Some(job), model_name, model, took, reports, idle, kept };
    if let Some((folder, _)) = &shared.output {
        job.save(folder).map_err(unwritten)?;
    }
    Ok(job)
}

/// Names of workers that fit the job's tasks now and did none of them. Empty if the broker does not say at once.
async fn idle_workers(mesh: &Mesh, reports: &[Report]) -> Vec<String> {
    let Some(task) = reports.iter().rev().find_map(|report| report.task).filter(|_| reports.len() > 1) else {
        return Vec::new();
    };
    let Ok(Ok(why)) = tokio::time::timeout(WHY_WAIT, mesh.why(task)).await else { return Vec::new() };
    let busy: BTreeSet<WorkerId> = reports.iter().filter_map(Report::worker_id).collect();
    let idle = why.candidates.into_iter().filter(|worker| worker.against.is_empty() && !busy.contains(&worker.worker));
    idle.map(|worker| worker.name).collect()
}

/// Refuses `--output` with `--detach`, which does not wait for outputs.
fn check_output(flags: &Submit) -> Result<(), Failed> {
    if flags.detach && flags.output.output.is_some() {
        let text = "--detach does not wait for outputs: leave --output away here, and take them with \
                    `mesh-client wait TASK --output DIR`";
        return Err(Failed::new(exit::USAGE, "USAGE", text));
    }
    Ok(())
}

/// Whether each item's outputs are shown to people at the end. If not, they need not be kept so long.
fn shows_outputs(global: &Global, flags: &Submit, items: usize) -> bool {
    !flags.json_lines && !global.json && items <= LINES_MAX
}

/// Whether all items are in one document at the end.
fn wants_document(global: &Global, flags: &Submit) -> bool {
    global.json && !flags.json_lines || flags.output.output.is_some()
}

/// The items named by the arguments. If there is only one, an error in it is reported before anything is sent.
async fn works(
    flags: &Submit,
    signature: Option<&Signature>,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<Vec<Work>, Failed> {
    let items = items::items(&flags.inputs, signature).map_err(|error| items_failed(&error))?;
    let one = |(index, item)| Work { index, item, inputs: None };
    let mut work: Vec<Work> = items.into_iter().enumerate().map(one).collect();
    if let [only] = &mut work[..] {
        let (item, signature, wishes) = (only.item.clone(), signature.cloned(), flags.forms.wishes());
        let loaded = stop::blocking(stop, move || inputs::load(&item, signature.as_ref(), &wishes)).await?;
        only.inputs = Some(loaded.map_err(input_failed)?);
    }
    Ok(work)
}

/// A task with the flags' settings, without inputs.
fn template(flags: &Submit, model: Model, items: usize) -> Task {
    let task = Task::new(model)
        .priority(flags.priority)
        .deadline(flags.deadline)
        .demands(flags.demands.demands())
        .detached(flags.detach)
        .lane(flags.lane)
        .job_items(u32::try_from(items).unwrap_or(u32::MAX));
    let task = flags.promise.slo().into_iter().fold(task, Task::slo);
    flags.labels.rules().into_iter().fold(task, Task::label)
}

fn items_failed(error: &ItemsError) -> Failed {
    let (exit, code) = match error {
        ItemsError::Mixed { .. }
        | ItemsError::Twice(_)
        | ItemsError::Pattern(..)
        | ItemsError::NamedMany { .. }
        | ItemsError::TooMany(_) => (exit::USAGE, "USAGE"),
        _ => (exit::BAD_INPUT, "BAD_INPUT"),
    };
    Failed::new(exit, code, error)
}

fn input_failed(error: inputs::InputError) -> Failed {
    Failed::new(exit::BAD_INPUT, "BAD_INPUT", error)
}

fn submit_failed(error: &mesh_sdk::SubmitError) -> Failed {
    Failed::new(exit::of_submit(error), "BAD_INPUT", error)
}

/// Returns how many items share a task, and how many tasks are under way.
async fn pace(flags: &Submit, mesh: &Mesh, items: usize, stop: &mut watch::Receiver<Option<Stop>>) -> (usize, Pace) {
    let slots = match items {
        1 => None,
        _ => unless_stopped(stop, mesh.cluster()).await.ok().and_then(Result::ok).map(|cluster| cluster.slots as usize),
    };
    let split = flags.items_per_task().unwrap_or_else(|| pace::split(items, slots));
    let pace = flags.parallel.map(|parallel| Pace::fixed(parallel.into()));
    (split, pace.unwrap_or_else(|| Pace::of_mesh(slots, split)))
}

/// Runs all items, several tasks at a time. Returns the reports in the order of the items.
async fn run(
    shared: &Arc<Shared>,
    work: Vec<Work>,
    pace: Pace,
    stop: &watch::Receiver<Option<Stop>>,
) -> io::Result<(Vec<Report>, Option<Kept>)> {
    let mut ends = Ends::new(shared, work.len());
    let names: Vec<String> = work.iter().map(|work| work.item.name.clone()).collect();
    let (sender, mut ended) = mpsc::channel(REPORTS_MAX);
    let (mut waiting, mut running) = (work.into_iter(), JoinSet::new());
    loop {
        while running.len() < pace.tasks(shared.largest_bytes.load(Ordering::Relaxed)) {
            let next: Vec<Work> = waiting.by_ref().take(shared.split).collect();
            if next.is_empty() {
                break;
            }
            running.spawn(some(shared.clone(), next, sender.clone(), stop.clone()));
        }
        tokio::select! {
            biased;
            Some(report) = ended.recv() => ends.take(report),
            done = running.join_next() => if done.is_none() { break },
        }
    }
    drop(sender);
    while let Some(report) = ended.recv().await {
        ends.take(report);
    }
    ends.all(names)
}

/// Loads a few items, bunches them and follows the bunches to their ends.
async fn some(shared: Arc<Shared>, work: Vec<Work>, reports: Reports, mut stop: watch::Receiver<Option<Stop>>) {
    let stopped = *stop.borrow();
    let mut failed: Vec<(usize, String, Failed)> = Vec::new();
    let mut loaded = Vec::new();
    match stopped {
        Some(stop) => failed.extend(work.into_iter().map(|work| (work.index, work.item.name, stop.failed()))),
        None => (loaded, failed) = load(&shared, work, &mut stop).await,
    }
    for (index, item, failure) in failed {
        // The collector outlives everything that reports to it.
        let _ = reports.send((index, Report { item, task: None, failed_at: None, end: Err(failure) })).await;
    }
    let mut running = JoinSet::new();
    for bunch in loaded {
        running.spawn(follow::bunch(shared.clone(), bunch, reports.clone(), stop.clone()));
    }
    while running.join_next().await.is_some() {}
}

/// Reads the items' files. Returns bunches of items that can share a task, and the items that cannot be read.
async fn load(
    shared: &Arc<Shared>,
    work: Vec<Work>,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> (Vec<Bunch>, Vec<(usize, String, Failed)>) {
    let names: Vec<(usize, String)> = work.iter().map(|work| (work.index, work.item.name.clone())).collect();
    let turn = unless_stopped(stop, shared.loading.acquire()).await;
    let reader = shared.clone();
    let loading = move || {
        let (mut loaded, mut failed) = (Vec::new(), Vec::new());
        for Work { index, item, inputs } in work {
            let inputs = inputs.map_or_else(|| inputs::load(&item, reader.signature.as_ref(), &reader.wishes), Ok);
            match inputs {
                Ok(inputs) => loaded.push(Loaded { index, name: item.name, inputs }),
                Err(error) => failed.push((index, item.name, input_failed(error))),
            }
        }
        let bunches = bunches(loaded);
        reader.largest_bytes.fetch_max(bunches.iter().map(Bunch::bytes).sum(), Ordering::Relaxed);
        (bunches, failed)
    };
    let loaded = match turn {
        Ok(_turn) => stop::blocking(stop, loading).await,
        Err(stop) => Err(stop.failed()),
    };
    loaded.unwrap_or_else(|failed| {
        let all = names.into_iter().map(|(index, name)| (index, name, failed.clone()));
        (Vec::new(), all.collect())
    })
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        // The display has no state that a panic could corrupt.
        self.progress.lock()
    }

    /// The folder for an item's outputs.
    fn folder(&self, item: &str) -> Option<PathBuf> {
        let (folder, is_own) = self.output.as_ref()?;
        Some(if *is_own { folder.join(item) } else { folder.clone() })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Command};

    #[test]
    fn outputs_are_kept_for_the_table_and_a_document_is_made_where_one_is_wanted() {
        let wants = |flags: &str, items| {
            let line = format!("mesh-client submit m.onnx x {flags}");
            let arguments = Arguments::try_parse_from(line.split_whitespace()).unwrap();
            let Command::Submit(submit) = &arguments.command else { panic!("a submit") };
            (shows_outputs(&arguments.global, submit, items), wants_document(&arguments.global, submit))
        };
        assert_eq!([wants("", LINES_MAX), wants("", LINES_MAX + 1)], [(true, false), (false, false)]);
        assert_eq!([wants("--json", 1), wants("--json-lines", 1)], [(false, true), (false, false)]);
        assert_eq!(wants("--json-lines -o out", LINES_MAX + 1), (false, true), "result.json has them");
    }

    #[test]
    fn who_does_not_wait_for_outputs_is_told_how_to_come_by_them() {
        let check = |flags: &str| {
            let line = format!("mesh-client submit m.onnx x {flags}");
            let Command::Submit(submit) = Arguments::try_parse_from(line.split_whitespace()).unwrap().command else {
                panic!("a submit")
            };
            check_output(&submit)
        };
        assert!(check("--detach").is_ok() && check("--output out").is_ok());
        let failed = check("--detach --output out").unwrap_err();
        assert!(failed.exit == exit::USAGE && failed.text.contains("wait TASK --output DIR"), "{failed:?}");
    }
}
