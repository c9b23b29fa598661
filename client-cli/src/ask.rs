//! All commands except `submit` and `bench`: most ask the broker one question, or fetch or stop one task.

use std::{
    collections::BTreeSet,
    fs::File,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_sdk::{AskError, Mesh, Outcome, TaskError, TaskId, TaskResult, TaskStanding, TaskView, WorkerId};
use mesh_transport::{KeyPair, keys};
use serde_json::json;
use tokio::sync::watch::Receiver;

use crate::{
    args::{Cancel, Fetch, Global, Inspect, Keygen, OneTask, Status, Tasks},
    complain,
    connect::connect,
    exit::{self, Failed},
    outputs,
    progress::Progress,
    report::{Done, Job, Report},
    say_if_cut, show_job,
    stop::{Stop, stop_signal, unless_stopped},
    streams::{print, print_json, say},
    submit::{Unfinished, until_end},
    table::printable_lines,
    task_name::{self, TaskName},
    views,
};

pub(crate) fn ask_failed(error: &AskError) -> Failed {
    let code = match exit::of_ask(error) {
        exit::UNREACHABLE => "UNREACHABLE",
        exit::NOT_FOUND => "NOT_FOUND",
        exit::REFUSED => "FORBIDDEN",
        _ => "INTERNAL",
    };
    Failed::new(exit::of_ask(error), code, error)
}

impl From<AskError> for Failed {
    fn from(error: AskError) -> Self {
        ask_failed(&error)
    }
}

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Connects, asks one question and closes.
async fn asking<T>(global: &Global, question: impl AsyncFnOnce(&Mesh) -> Result<T, Failed>) -> Result<T, Failed> {
    let progress = Progress::new(1, global.quiet, global.json);
    let mut stop = stop_signal(None);
    let mesh = connect(global, None, &progress, &mut stop).await.inspect_err(|_| progress.finish())?;
    // Here these limit the question, since there is nothing else to wait for. A broker that starts may be reached, and
    // not answer before it has read its store.
    let within = [global.timeout, global.broker_wait].into_iter().flatten().min();
    let mesh = within.into_iter().fold(mesh, Mesh::asking_within);
    let answer = unless_stopped(&mut stop, question(&mesh)).await;
    progress.finish();
    mesh.close().await;
    answer.map_err(Stop::failed)?
}

pub(crate) async fn workers(global: &Global) -> Result<u8, Failed> {
    let workers = asking(global, async |mesh| Ok(mesh.workers().await?)).await?;
    if global.json {
        print_json(&views::workers_json(&workers))
    } else {
        print(&views::workers_text(&workers, global.columns()))
    }
}

/// Tasks that are searched for the names of models.
const NAMES_LOOK_MAX: usize = 2_000;

pub(crate) async fn models(global: &Global) -> Result<u8, Failed> {
    let (models, tasks) =
        asking(global, async |mesh| Ok((mesh.models().await?, mesh.tasks(NAMES_LOOK_MAX).await?))).await?;
    let names: views::Names = tasks.into_iter().rev().map(|task| (task.model.digest, task.model_name)).collect();
    if global.json {
        return print_json(&views::models_json(&models, &names));
    }
    print(&views::models_text(&models, &names, global.columns()))
}

pub(crate) async fn tasks(global: &Global, flags: &Tasks) -> Result<u8, Failed> {
    let limit = flags.limit as usize;
    let (tasks, lost) = asking(global, async |mesh| {
        let tasks = mesh.tasks(limit).await?;
        let lost = without_worker(mesh, &tasks).await?;
        Ok((tasks, lost))
    })
    .await?;
    if global.json {
        let all: Vec<_> = tasks.iter().map(|task| views::task_json(task, lost.contains(&task.task))).collect();
        return print_json(&json!({ "tasks": all }));
    }
    print(&views::tasks_text(&tasks, &lost, now_unix_ms(), global.columns()))
}

/// The tasks at a worker that is not connected. A detached task waits for it, since it has the task's inputs, or its
/// results; others move to another worker at once.
async fn without_worker(mesh: &Mesh, tasks: &[TaskView]) -> Result<BTreeSet<TaskId>, AskError> {
    let is_placed = |task: &&TaskView| {
        task.detached && matches!(task.standing, TaskStanding::Placed | TaskStanding::Ended(Outcome::Done { .. }))
    };
    let placed: Vec<&TaskView> = tasks.iter().filter(is_placed).collect();
    if placed.is_empty() {
        return Ok(BTreeSet::new());
    }
    let live: BTreeSet<WorkerId> = mesh.workers().await?.iter().map(|worker| worker.worker).collect();
    let is_lost = |task: &&TaskView| task.worker.as_ref().is_some_and(|(worker, _)| !live.contains(worker));
    Ok(placed.into_iter().filter(is_lost).map(|task| task.task).collect())
}

/// The tasks of these names. Asks for the list of tasks only if a part of an id is among them.
async fn named(mesh: &Mesh, names: &[TaskName]) -> Result<Vec<TaskId>, Failed> {
    let tasks = match names.iter().any(|name| matches!(name, TaskName::Part(_))) {
        true => mesh.tasks(task_name::LOOK_MAX).await?,
        false => Vec::new(),
    };
    let ids: Vec<TaskId> = tasks.iter().map(|task| task.task).collect();
    names.iter().map(|name| name.among(&ids)).collect()
}

/// Asks about several tasks and shows each answer. One that fails does not stop the others.
async fn each<T>(
    global: &Global,
    names: &[TaskName],
    question: impl AsyncFn(&Mesh, TaskId) -> Result<T, AskError>,
    mut show: impl FnMut(TaskId, T) -> Result<u8, Failed>,
) -> Result<u8, Failed> {
    let asked = asking(global, async |mesh| {
        let tasks = named(mesh, names).await?;
        let mut answers = Vec::with_capacity(tasks.len());
        for task in tasks {
            answers.push((task, question(mesh, task).await));
        }
        Ok(answers)
    });
    let mut exit = exit::OK;
    for (task, answer) in asked.await? {
        let shown = answer.map_err(Failed::from).and_then(|answer| show(task, answer));
        exit = exit::first(exit, ended(global, shown));
    }
    Ok(exit)
}

/// The exit code of one of several tasks, after its error is printed.
fn ended(global: &Global, shown: Result<u8, Failed>) -> u8 {
    shown.unwrap_or_else(|failed| {
        complain(global, &failed);
        failed.exit
    })
}

pub(crate) async fn status(global: &Global, flags: &Status) -> Result<u8, Failed> {
    if flags.tasks.is_empty() {
        let cluster = asking(global, async |mesh| Ok(mesh.cluster().await?)).await?;
        return if global.json {
            print_json(&views::cluster_json(&cluster, &global.broker))
        } else {
            print(&views::cluster_text(&cluster, &global.broker, now_unix_ms()))
        };
    }
    let mut between = "";
    let show = |_, (view, is_lost): (TaskView, bool)| {
        if global.json {
            return print_json(&views::task_json(&view, is_lost));
        }
        print(&format!("{}{}", std::mem::replace(&mut between, "\n"), views::task_text(&view, is_lost)))
    };
    let question = async |mesh: &Mesh, task| {
        let view = mesh.status(task).await?;
        let is_lost = !without_worker(mesh, std::slice::from_ref(&view)).await?.is_empty();
        Ok((view, is_lost))
    };
    each(global, &flags.tasks, question, show).await
}

pub(crate) async fn why(global: &Global, flags: &OneTask) -> Result<u8, Failed> {
    let names = std::slice::from_ref(&flags.task);
    let (view, is_lost) = asking(global, async |mesh| {
        let mut view = None;
        for task in named(mesh, names).await? {
            view = Some(mesh.why(task).await?);
        }
        let view = view.ok_or(AskError::Closed)?;
        let is_lost = !without_worker(mesh, std::slice::from_ref(&view.task)).await?.is_empty();
        Ok((view, is_lost))
    })
    .await?;
    if global.json {
        print_json(&views::why_json(&view, is_lost))
    } else {
        print(&views::why_text(&view, is_lost, now_unix_ms(), global.columns()))
    }
}

pub(crate) async fn cancel(global: &Global, flags: &Cancel) -> Result<u8, Failed> {
    let show = |task, outcome: Outcome| {
        let state = match &outcome {
            Outcome::Cancelled => "cancelled",
            Outcome::Done { .. } => "done",
            Outcome::Failed(_) => "failed",
        };
        match outcome {
            _ if global.json => print_json(&json!({ "task": TaskId::to_string(&task), "state": state })),
            Outcome::Cancelled => print(&format!("{task} cancelled\n")),
            Outcome::Done { .. } | Outcome::Failed(_) => print(&format!("{task} had already ended: {state}\n")),
        }
    };
    each(global, &flags.tasks, async |mesh, task| mesh.cancel(task).await, show).await
}

/// Whether to wait for a task that still runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Patience {
    None,
    UntilItEnds,
}

/// Returns an error if the task has not ended, or its result is out of reach for now.
async fn check_ended(mesh: &Mesh, task: TaskId) -> Result<(), Failed> {
    let view = mesh.status(task).await.map_err(|error| ask_failed(&error))?;
    let lost = without_worker(mesh, std::slice::from_ref(&view)).await.map_err(|error| ask_failed(&error))?;
    let away = view.worker.as_ref().map(|(_, name)| name).filter(|_| !lost.is_empty());
    let stands = match (&view.standing, away) {
        (TaskStanding::Ended(_), None) => return Ok(()),
        (TaskStanding::Ended(_), Some(name)) => {
            format!("is done, but its result is at worker {name}, which is not connected")
        }
        (_, Some(name)) => format!("has not ended: its inputs are at worker {name}, which is not connected"),
        (_, None) => format!("has not ended, it is {}", views::state(&view)),
    };
    let text = format!("task {task} {stands}: `mesh-client wait` waits for it");
    Err(Failed::new(exit::NOT_READY, "NOT_READY", text))
}

pub(crate) async fn fetch(global: &Global, flags: &Fetch, patience: Patience) -> Result<u8, Failed> {
    if let Some(folder) = &flags.output.output {
        outputs::prepare(folder, []).map_err(|error| Failed::new(exit::USAGE, "OUTPUT", error))?;
    }
    let progress = Progress::new(1, global.quiet, global.json);
    let mut stop = stop_signal(global.timeout);
    let connected = connect(global, Some(&flags.path), &progress, &mut stop).await;
    progress.finish();
    let mesh = connected?;
    let tasks = unless_stopped(&mut stop, named(&mesh, &flags.tasks)).await.map_err(Stop::failed).flatten();
    let mut exit = exit::OK;
    for task in tasks.as_ref().map_or(&[][..], Vec::as_slice) {
        let folder = match (&flags.output.output, &flags.tasks[..]) {
            (Some(folder), [_]) => Some(folder.clone()),
            (folder, _) => folder.as_ref().map(|folder| folder.join(task.to_string())),
        };
        let shown = fetch_one(global, &mesh, *task, folder.as_deref(), patience, &mut stop).await;
        exit = exit::first(exit, ended(global, shown));
        if stop.borrow().is_some() {
            break;
        }
    }
    mesh.close().await;
    tasks.map(|_| exit)
}

async fn fetch_one(
    global: &Global,
    mesh: &Mesh,
    task: TaskId,
    folder: Option<&Path>,
    patience: Patience,
    stop: &mut Receiver<Option<Stop>>,
) -> Result<u8, Failed> {
    if patience == Patience::None {
        unless_stopped(stop, check_ended(mesh, task)).await.map_err(Stop::failed).flatten()?;
    }
    let mut progress = Progress::new(1, global.quiet, global.json).that_only_waits();
    let mut handle = mesh.fetch(task).await;
    let item = task.to_string();
    let followed = until_end(&mut handle, stop, |news| progress.news(&item, news, &global.broker)).await;
    progress.finish();
    let is_done = followed.is_ok();
    let is_over = is_done || matches!(followed, Err(Unfinished::Task(TaskError::Failed(_))));
    let mut reports = fetched(task, folder, followed);
    // The task's own times, and its worker. They are rarely missing: if the broker has forgotten the task, or is gone.
    let view = match is_over {
        true => unless_stopped(stop, mesh.status(task)).await.ok().and_then(Result::ok),
        false => None,
    };
    let worker = view.as_ref().and_then(|view| view.worker.clone());
    reports.iter_mut().for_each(|report| report.failed_at.clone_from(&worker));
    let took = view.as_ref().and_then(|view| Some(view.ended_unix_ms?.saturating_sub(view.submitted_unix_ms)));
    let took = took.map(Duration::from_millis);
    took.into_iter().for_each(|took| reports.iter_mut().for_each(|report| report.set_took(took)));
    let is_one = reports.len() == 1;
    let failed = |error| Failed::new(exit::INTERNAL, "OUTPUT", error);
    if let Some(folder) = folder {
        let save = |report: &Report| report.save(&if is_one { folder.to_owned() } else { folder.join(&report.item) });
        reports.iter().try_for_each(save).map_err(failed)?;
    }
    let Some(view) = view.filter(|_| !is_one) else {
        return reports.iter().try_fold(exit::OK, |code, report| Ok(exit::first(code, show_one(global, report)?)));
    };
    let (job, model_name, model) = (Some(view.job), view.model_name, view.model);
    let mut job = Job { job, model_name, model, took: took.unwrap_or_default(), reports, idle: Vec::new(), kept: None };
    if let Some(folder) = folder {
        job.save(folder).map_err(failed)?;
    }
    show_job(global, &mut job, folder.is_some())
}

/// One report per item of the task. Items are numbered, since their names are known only to the submitting process.
fn fetched(id: TaskId, folder: Option<&Path>, followed: Result<TaskResult, Unfinished>) -> Vec<Report> {
    let task = Some(id);
    let done = |result: &TaskResult, place, folder: Option<&Path>| {
        Done::new(result, place, false, folder).map_err(|error| Failed::new(exit::INTERNAL, "OUTPUT", error))
    };
    match followed {
        Err(unfinished) => {
            let mut failed = unfinished.failed();
            if matches!(unfinished, Unfinished::Stopped(_)) {
                failed.text = "stopped waiting; the task itself goes on".to_owned();
            }
            vec![Report { item: id.to_string(), task, failed_at: None, end: Err(failed) }]
        }
        Ok(result) if result.outputs.items() <= 1 => {
            vec![Report { item: id.to_string(), task, failed_at: None, end: done(&result, 0, folder) }]
        }
        Ok(result) => {
            let report = |place: u32| {
                let item = format!("item-{}", place + 1);
                let folder = folder.map(|folder| folder.join(&item));
                Report { end: done(&result, place, folder.as_deref()), item, task, failed_at: None }
            };
            (0..result.outputs.items()).map(report).collect()
        }
    }
}

fn show_one(global: &Global, report: &Report) -> Result<u8, Failed> {
    if global.json {
        print_json(&report.to_json())?;
        if !global.quiet {
            say_if_cut(std::slice::from_ref(report));
        }
    } else {
        print(&report.to_text())?;
    }
    match &report.end {
        Ok(_) => Ok(exit::OK),
        Err(failed) => {
            say(&format!("mesh-client: {}: {}\n", failed.code, printable_lines(&failed.text)));
            Ok(failed.exit)
        }
    }
}

pub(crate) fn inspect(global: &Global, flags: &Inspect) -> Result<u8, Failed> {
    let bad = |error: &dyn std::fmt::Display| {
        Failed::new(exit::BAD_INPUT, "MODEL_INVALID", format!("{}: {error}", flags.model.display()))
    };
    let file = File::open(&flags.model).map_err(|error| bad(&error))?;
    let size_bytes = file.metadata().map_err(|error| bad(&error))?.len();
    let signature = mesh_models::read_signature(file).map_err(|error| bad(&error))?;
    if global.json {
        print_json(&views::signature_json(&signature, size_bytes))
    } else {
        print(&views::signature_text(&signature, size_bytes))
    }
}

/// Makes a key pair and prints the public key, for the broker's list of authorized keys.
pub(crate) fn keygen(global: &Global, flags: &Keygen) -> Result<u8, Failed> {
    let made = KeyPair::generate().and_then(|pair| pair.save(&flags.file).map(|()| pair));
    let pair = made.map_err(|error| Failed::new(exit::USAGE, "BAD_CONFIGURATION", error))?;
    let public = keys::to_text(&pair.public());
    if global.json {
        let files = (flags.file.display().to_string(), format!("{}.pub", flags.file.display()));
        return print_json(&json!({ "public_key": public, "secret_file": files.0, "public_file": files.1 }));
    }
    print(&format!("{public}\n"))
}
