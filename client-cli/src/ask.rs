//! All commands except `submit` and `bench`: most ask the broker one question, or fetch or stop one task.

use std::{
    fs::File,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_sdk::{AskError, Mesh, Outcome, TaskId, TaskResult, TaskStanding};
use mesh_transport::{KeyPair, keys};
use serde_json::json;

use crate::{
    args::{Fetch, Global, Inspect, Keygen, OneTask, Status, Tasks},
    connect::{Stop, connect, stop_signal, unless_stopped},
    exit, outputs,
    progress::Progress,
    report::{Done, Failed, Job, Report},
    show_job,
    streams::{print, print_json, say},
    submit::{Unfinished, until_end},
    table::printable_lines,
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

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Connects, asks one question and closes.
async fn asking<T>(global: &Global, question: impl AsyncFnOnce(&Mesh) -> Result<T, AskError>) -> Result<T, Failed> {
    let progress = Progress::new(1, global.quiet, global.json);
    let mut stop = stop_signal(None);
    let mesh = connect(global, None, &progress, &mut stop).await.inspect_err(|_| progress.finish())?;
    // Here `--timeout` limits the question, since there is nothing else to wait for.
    let mesh = global.timeout.into_iter().fold(mesh, Mesh::asking_within);
    let answer = unless_stopped(&mut stop, question(&mesh)).await;
    progress.finish();
    mesh.close().await;
    answer.map_err(Stop::failed)?.map_err(|error| ask_failed(&error))
}

pub(crate) async fn workers(global: &Global) -> Result<u8, Failed> {
    let workers = asking(global, async |mesh| mesh.workers().await).await?;
    if global.json { print_json(&views::workers_json(&workers)) } else { print(&views::workers_text(&workers)) }
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
    print(&views::models_text(&models, &names))
}

pub(crate) async fn tasks(global: &Global, flags: &Tasks) -> Result<u8, Failed> {
    let limit = flags.limit;
    let tasks = asking(global, async |mesh| mesh.tasks(limit).await).await?;
    if global.json {
        return print_json(&json!({ "tasks": tasks.iter().map(views::task_json).collect::<Vec<_>>() }));
    }
    print(&views::tasks_text(&tasks, now_unix_ms()))
}

pub(crate) async fn status(global: &Global, flags: &Status) -> Result<u8, Failed> {
    let Some(task) = flags.task else {
        let cluster = asking(global, async |mesh| mesh.cluster().await).await?;
        return if global.json {
            print_json(&views::cluster_json(&cluster, &global.broker))
        } else {
            print(&views::cluster_text(&cluster, &global.broker, now_unix_ms()))
        };
    };
    let view = asking(global, async |mesh| mesh.status(task).await).await?;
    if global.json { print_json(&views::task_json(&view)) } else { print(&views::task_text(&view)) }
}

pub(crate) async fn why(global: &Global, flags: &OneTask) -> Result<u8, Failed> {
    let task = flags.task;
    let view = asking(global, async |mesh| mesh.why(task).await).await?;
    if global.json { print_json(&views::why_json(&view)) } else { print(&views::why_text(&view, now_unix_ms())) }
}

pub(crate) async fn cancel(global: &Global, flags: &OneTask) -> Result<u8, Failed> {
    let task = flags.task;
    let outcome = asking(global, async |mesh| mesh.cancel(task).await).await?;
    let state = match &outcome {
        Outcome::Cancelled => "cancelled",
        Outcome::Done { .. } => "done",
        Outcome::Failed(_) => "failed",
    };
    if global.json {
        return print_json(&json!({ "task": task.to_string(), "state": state }));
    }
    match outcome {
        Outcome::Cancelled => print(&format!("{task} cancelled\n")),
        Outcome::Done { .. } | Outcome::Failed(_) => print(&format!("{task} had already ended: {state}\n")),
    }
}

/// Whether to wait for a task that still runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Patience {
    None,
    UntilItEnds,
}

/// Returns an error if the task has not ended.
async fn check_ended(mesh: &Mesh, task: TaskId) -> Result<(), Failed> {
    let view = mesh.status(task).await.map_err(|error| ask_failed(&error))?;
    if matches!(view.standing, TaskStanding::Ended(_)) {
        return Ok(());
    }
    let text = format!("task {task} has not ended, it is {}: `mesh-client wait` waits for it", views::state(&view));
    Err(Failed::new(exit::NOT_FOUND, "NOT_READY", text))
}

pub(crate) async fn fetch(global: &Global, flags: &Fetch, patience: Patience) -> Result<u8, Failed> {
    if let Some(folder) = &flags.output.output {
        outputs::prepare(folder).map_err(|error| Failed::new(exit::USAGE, "OUTPUT", error))?;
    }
    let mut progress = Progress::new(1, global.quiet, global.json);
    let mut stop = stop_signal(global.timeout);
    let mesh = connect(global, Some(&flags.path), &progress, &mut stop).await.inspect_err(|_| progress.finish())?;
    if patience == Patience::None {
        let checked = unless_stopped(&mut stop, check_ended(&mesh, flags.task)).await.map_err(Stop::failed);
        checked.flatten().inspect_err(|_| progress.finish())?;
    }
    let mut handle = mesh.fetch(flags.task).await;
    let item = flags.task.to_string();
    let followed = until_end(&mut handle, &mut stop, |news| progress.news(&item, news, &global.broker)).await;
    progress.finish();
    let reports = fetched(flags, followed);
    let is_one = reports.len() == 1;
    // Data of the whole job for the document. It is rarely missing: if the broker has forgotten the task, or is gone.
    let view = match is_one {
        true => None,
        false => unless_stopped(&mut stop, mesh.status(flags.task)).await.ok().and_then(Result::ok),
    };
    mesh.close().await;
    let failed = |error| Failed::new(exit::INTERNAL, "OUTPUT", error);
    if let Some(folder) = &flags.output.output {
        let save = |report: &Report| report.save(&if is_one { folder.clone() } else { folder.join(&report.item) });
        reports.iter().try_for_each(save).map_err(failed)?;
    }
    let Some(view) = view else {
        return reports.iter().try_fold(exit::OK, |code, report| Ok(code.max(show_one(global, report)?)));
    };
    let took = view.ended_unix_ms.map_or(0, |ended| ended.saturating_sub(view.submitted_unix_ms));
    let (job, model_name, model) = (Some(view.job), view.model_name, view.model);
    let mut job =
        Job { job, model_name, model, took: Duration::from_millis(took), reports, idle: Vec::new(), kept: None };
    if let Some(folder) = &flags.output.output {
        job.save(folder).map_err(failed)?;
    }
    show_job(global, &mut job, flags.output.output.is_some())
}

/// One report per item of the task. Items are numbered, since their names are known only to the submitting process.
fn fetched(flags: &Fetch, followed: Result<TaskResult, Unfinished>) -> Vec<Report> {
    let task = Some(flags.task);
    let folder = flags.output.output.as_deref();
    let done = |result: &TaskResult, place, folder: Option<&Path>| {
        Done::new(result, place, false, folder).map_err(|error| Failed::new(exit::INTERNAL, "OUTPUT", error))
    };
    match followed {
        Err(unfinished) => vec![Report { item: flags.task.to_string(), task, end: Err(unfinished.failed()) }],
        Ok(result) if result.outputs.items() <= 1 => {
            vec![Report { item: flags.task.to_string(), task, end: done(&result, 0, folder) }]
        }
        Ok(result) => {
            let report = |place: u32| {
                let item = format!("item-{}", place + 1);
                let folder = folder.map(|folder| folder.join(&item));
                Report { end: done(&result, place, folder.as_deref()), item, task }
            };
            (0..result.outputs.items()).map(report).collect()
        }
    }
}

fn show_one(global: &Global, report: &Report) -> Result<u8, Failed> {
    if global.json {
        print_json(&report.to_json())?;
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
