//! `submit`: items become tasks, some of them at a time. Owns the order of things and that one bad item does not stop the
//! others; never the form of inputs or outputs.

use std::{
    collections::VecDeque,
    fs::File,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use mesh_models::{Signature, SignatureError};
use mesh_sdk::{Input, Mesh, Model, Task, TaskError, TaskHandle, Update, new_job};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    args::{Global, Submit},
    connect::{Stop, connect, stop_signal, stopped},
    exit, inputs,
    items::{self, Item, ItemsError},
    outputs,
    progress::Progress,
    report::{Done, Failed, Job, Report},
};

/// Tasks under way at the same time, unless `--parallel` says otherwise: more would only wait at the broker.
const PARALLEL_MAX: usize = 64;

/// Where the mesh's size is not known.
const PARALLEL_DEFAULT: usize = 8;

/// A cancelled task has this long to say that it is over.
const CANCEL_WAIT: Duration = Duration::from_secs(3);

/// What all items have in common.
struct Shared {
    mesh: Mesh,
    model: Model,
    signature: Option<Signature>,
    wishes: inputs::Wishes,
    template: Task,
    detach: bool,
    /// Where outputs go, and whether each item has a folder of its own there.
    output: Option<(PathBuf, bool)>,
    broker: String,
    progress: Mutex<Progress>,
}

/// One item on its way.
struct Work {
    item: Item,
    /// If its files have been read already.
    inputs: Option<Vec<Input>>,
}

/// Runs the command; gives what is to be printed.
pub(crate) async fn submit(global: &Global, flags: &Submit) -> Result<Job, Failed> {
    let started = Instant::now();
    let signature = read_signature(flags)?;
    let items = items::items(&flags.inputs, signature.as_ref()).map_err(|error| items_failed(&error))?;
    let wishes = flags.forms.wishes();
    let is_one = items.len() == 1;
    let mut items: Vec<Work> = items.into_iter().map(|item| Work { item, inputs: None }).collect();
    if let [only] = &mut items[..] {
        // A mistake in the only item is told before anybody is asked.
        only.inputs = Some(inputs::load(&only.item, signature.as_ref(), &wishes).map_err(input_failed)?);
    }
    if let Some(folder) = flags.output.output.as_ref().filter(|_| !flags.detach) {
        outputs::prepare(folder).map_err(|error| Failed::new(exit::USAGE, "OUTPUT", error))?;
    }
    let progress = Progress::new(items.len(), global.quiet, global.json);
    let mut stop = stop_signal(global.timeout);
    let mesh = connect(global, Some(&flags.path), &progress, &mut stop).await.inspect_err(|_| progress.finish())?;
    let model = Model::from_file(&flags.model).await.map_err(|error| submit_failed(&error))?;
    let job = new_job();
    let template = Task::new(model.clone())
        .priority(flags.priority)
        .deadline(flags.deadline)
        .demands(flags.demands.demands())
        .detached(flags.detach)
        .job(job);
    let parallel = parallel(flags, &mesh, items.len()).await;
    let shared = Arc::new(Shared {
        mesh,
        model,
        signature,
        wishes,
        template,
        detach: flags.detach,
        output: flags.output.output.clone().map(|folder| (folder, !is_one)),
        broker: global.broker.clone(),
        progress: Mutex::new(progress),
    });
    let reports = run(&shared, items, parallel, &stop).await;
    shared.progress().finish();
    shared.mesh.clone().close().await;
    let job = Job {
        job: Some(job),
        model_name: shared.model.name().to_owned(),
        model: shared.model.reference(),
        took: started.elapsed(),
        reports,
    };
    if let Some(folder) = flags.output.output.as_ref().filter(|_| !flags.detach) {
        job.save(folder).map_err(|error| Failed::new(exit::INTERNAL, "OUTPUT", error))?;
    }
    Ok(job)
}

/// What the model takes; `None` if only its runtime can say.
fn read_signature(flags: &Submit) -> Result<Option<Signature>, Failed> {
    let path = flags.model.display();
    let bad = |error: &dyn std::fmt::Display| Failed::new(exit::BAD_INPUT, "MODEL_INVALID", format!("{path}: {error}"));
    let file = File::open(&flags.model).map_err(|error| bad(&error))?;
    match mesh_models::read_signature(file) {
        Ok(signature) => Ok(Some(signature)),
        Err(error @ (SignatureError::UnknownFormat | SignatureError::Read(_))) => Err(bad(&error)),
        Err(error) => {
            tracing::info!(%error, "inputs are sent as they are; the worker will say what it thinks of them");
            Ok(None)
        }
    }
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

async fn parallel(flags: &Submit, mesh: &Mesh, items: usize) -> usize {
    if let Some(parallel) = flags.parallel {
        return usize::from(parallel);
    }
    if items == 1 {
        return 1;
    }
    match mesh.cluster().await {
        Ok(cluster) if cluster.slots > 0 => (2 * cluster.slots as usize).min(PARALLEL_MAX),
        _ => PARALLEL_DEFAULT,
    }
}

/// All items, `parallel` at a time, in the order in which they were given.
async fn run(
    shared: &Arc<Shared>,
    items: Vec<Work>,
    parallel: usize,
    stop: &watch::Receiver<Option<Stop>>,
) -> Vec<Report> {
    let mut waiting: VecDeque<(usize, Work)> = items.into_iter().enumerate().collect();
    let mut reports: Vec<(usize, Report)> = Vec::with_capacity(waiting.len());
    let mut running = JoinSet::new();
    let mut failed = 0;
    loop {
        while running.len() < parallel
            && let Some((index, work)) = waiting.pop_front()
        {
            let (shared, stop) = (shared.clone(), stop.clone());
            running.spawn(async move { (index, one(&shared, work, stop).await) });
        }
        let Some(ended) = running.join_next().await else { break };
        // A panic in an item is a bug, and has been printed; the others go on.
        let Ok((index, report)) = ended else { continue };
        failed += usize::from(report.end.is_err());
        shared.progress().item_done(failed);
        reports.push((index, report));
    }
    reports.sort_by_key(|(index, _)| *index);
    reports.into_iter().map(|(_, report)| report).collect()
}

async fn one(shared: &Arc<Shared>, work: Work, mut stop: watch::Receiver<Option<Stop>>) -> Report {
    let name = work.item.name.clone();
    let stopped = *stop.borrow();
    if let Some(stop) = stopped {
        return Report { item: name, task: None, end: Err(stop.failed()) };
    }
    let inputs = match load(shared, work).await {
        Ok(inputs) => inputs,
        Err(failed) => return Report { item: name, task: None, end: Err(failed) },
    };
    match begin(shared, inputs).await {
        Ok(mut handle) => {
            let task = Some(handle.id());
            let end = follow(shared, &name, &mut handle, &mut stop).await;
            Report { item: name, task, end }
        }
        Err(failed) => Report { item: name, task: None, end: Err(failed) },
    }
}

async fn load(shared: &Arc<Shared>, work: Work) -> Result<Vec<Input>, Failed> {
    let Work { item, inputs } = work;
    if let Some(inputs) = inputs {
        return Ok(inputs);
    }
    let shared = shared.clone();
    let loading = move || inputs::load(&item, shared.signature.as_ref(), &shared.wishes).map_err(input_failed);
    let loaded = tokio::task::spawn_blocking(loading).await;
    loaded.unwrap_or_else(|error| Err(Failed::new(exit::INTERNAL, "INTERNAL", error)))
}

async fn begin(shared: &Shared, inputs: Vec<Input>) -> Result<TaskHandle, Failed> {
    let task = shared.template.clone().inputs(inputs);
    shared.mesh.submit(task).await.map_err(|error| submit_failed(&error))
}

async fn follow(
    shared: &Arc<Shared>,
    name: &str,
    handle: &mut TaskHandle,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> Result<Done, Failed> {
    let folder =
        shared.output.as_ref().map(|(folder, is_own)| if *is_own { folder.join(name) } else { folder.clone() });
    let end = until_end(handle, stop, |news| shared.progress().news(name, news, &shared.broker)).await?;
    let detach = shared.detach;
    let finished = tokio::task::spawn_blocking(move || Done::new(end, detach, folder.as_deref()));
    match finished.await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(Failed::new(exit::INTERNAL, "OUTPUT", error)),
        Err(error) => Err(Failed::new(exit::INTERNAL, "INTERNAL", error)),
    }
}

/// Follows a task to its end. When it is time to stop the task is cancelled, and given a moment to be so.
pub(crate) async fn until_end(
    handle: &mut TaskHandle,
    stop: &mut watch::Receiver<Option<Stop>>,
    mut on_news: impl FnMut(mesh_sdk::News),
) -> Result<mesh_sdk::TaskResult, Failed> {
    let stop = loop {
        tokio::select! {
            update = handle.next() => match update {
                Update::News(news) => on_news(news),
                Update::End(end) => return end.map_err(|error| Failed::of_task(&error)),
            },
            stop = stopped(stop) => break stop,
        }
    };
    handle.cancel().await;
    match tokio::time::timeout(CANCEL_WAIT, handle.wait()).await {
        // It was faster than the cancellation.
        Ok(Ok(result)) => Ok(result),
        Ok(Err(TaskError::Failed(failure))) => Err(Failed::of_task(&TaskError::Failed(failure))),
        Ok(Err(_)) | Err(_) => Err(stop.failed()),
    }
}

impl Shared {
    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        // A display has no state that a panic could spoil.
        self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
