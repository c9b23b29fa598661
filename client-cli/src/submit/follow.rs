//! One task from its submission to its end, and the effect on its items. Owns the retries when the mesh is full, and
//! that one bad item does not fail the others of its task. Never: the order of tasks.
//!
//! ```text
//!   Bunch ► submit ──► done: each item its own outputs
//!              ▲ └───► the input or the run was bad, several items ► each item as a task of its own, once
//!              └ BUSY, after the time that the broker names
//! ```

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_sdk::{ErrorCode, News, SubmitError, TaskError, TaskHandle, TaskId, TaskResult, Update, WorkerId};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{Shared, bunch::Bunch, submit_failed};
use crate::{
    exit::{self, Failed},
    report::{Done, Report},
    stop::{Stop, stopped, unless_stopped},
};

/// Time that a cancelled task gets to report its end.
const CANCEL_WAIT: Duration = Duration::from_secs(3);

/// Shortest wait before a full mesh is tried again, whatever the broker predicts: it has other clients.
const BUSY_WAIT_MIN: Duration = Duration::from_millis(50);

/// Longest wait before a full mesh is tried again: there may be room sooner than predicted.
const BUSY_WAIT_MAX: Duration = Duration::from_secs(10);

/// Items of one failed task that are tried again at the same time.
const APART_AT_ONCE: usize = 8;

/// The channel for reports, with the items' indexes.
pub(super) type Reports = mpsc::Sender<(usize, Report)>;

/// Why a task has no result.
#[derive(Debug)]
pub(crate) enum Unfinished {
    /// The task was never sent.
    NotSent(SubmitError),
    /// The mesh reported an error.
    Task(TaskError),
    /// The user stopped waiting.
    Stopped(Stop),
}

impl Unfinished {
    pub(crate) fn failed(&self) -> Failed {
        match self {
            Self::NotSent(error) => submit_failed(error),
            Self::Task(error) => Failed::of_task(error),
            Self::Stopped(stop) => stop.failed(),
        }
    }

    /// Whether one of several items may be the cause and the others innocent.
    fn blames_an_item(&self) -> bool {
        let Self::Task(error) = self else { return false };
        matches!(
            error.code(),
            Some(
                ErrorCode::InputMismatch
                    | ErrorCode::RunFailed
                    | ErrorCode::RunCrashed
                    | ErrorCode::RunOutOfMemory
                    | ErrorCode::RunProtocol
                    | ErrorCode::RunTimeout
                    | ErrorCode::ResultTooLarge
                    | ErrorCode::Poisonous
            )
        )
    }

    /// Whether the cause endangers the tasks that run beside it.
    fn takes_workers_down(&self) -> bool {
        matches!(self, Self::Task(error) if error.code() == Some(ErrorCode::Poisonous))
    }
}

/// The end of one task.
struct Whole {
    /// `None` if it was never sent.
    task: Option<TaskId>,
    /// The worker that had it last.
    worker: Option<(WorkerId, String)>,
    end: Result<TaskResult, Unfinished>,
}

/// Follows the items to their ends.
pub(super) async fn bunch(shared: Arc<Shared>, bunch: Bunch, reports: Reports, stop: watch::Receiver<Option<Stop>>) {
    let began = Instant::now();
    let mut stopping = stop.clone();
    let whole = follow(&shared, &bunch, began, &mut stopping).await;
    let apart = match &whole.end {
        Err(unfinished) if bunch.count() > 1 && unfinished.blames_an_item() => bunch.apart().ok(),
        _ => None,
    };
    let at_once = if whole.end.as_ref().err().is_some_and(Unfinished::takes_workers_down) { 1 } else { APART_AT_ONCE };
    let Some(apart) = apart else { return report(&shared, &bunch, whole, &reports).await };
    tracing::info!(task = ?whole.task, items = bunch.count(), "one of the items failed the task: each is tried alone");
    let mut running = JoinSet::new();
    for single in apart {
        if running.len() >= at_once {
            running.join_next().await;
        }
        let (shared, reports, mut stop) = (shared.clone(), reports.clone(), stop.clone());
        running.spawn(async move {
            let whole = follow(&shared, &single, began, &mut stop).await;
            report(&shared, &single, whole, &reports).await;
        });
    }
    while running.join_next().await.is_some() {}
}

/// Submits one task, again as long as the mesh is full, and follows it to its end.
async fn follow(shared: &Shared, bunch: &Bunch, began: Instant, stop: &mut watch::Receiver<Option<Stop>>) -> Whole {
    let name = bunch.name();
    loop {
        let mut task = shared.template.clone().inputs(bunch.inputs.iter().cloned()).items(bunch.count());
        if let Some(deadline) = shared.deadline {
            task = task.deadline(Some(deadline.saturating_sub(began.elapsed())));
        }
        let mut handle = match shared.mesh.submit(task).await {
            Ok(handle) => handle,
            Err(error) => return Whole { task: None, worker: None, end: Err(Unfinished::NotSent(error)) },
        };
        let (task, mut worker) = (Some(handle.id()), None);
        let on_news = |news| {
            if let News::Placed { worker: id, worker_name, .. } = &news {
                worker = Some((*id, worker_name.clone()));
            }
            shared.progress().news(&name, news, &shared.broker);
        };
        let end = until_end(&mut handle, stop, on_news).await;
        let wait = match &end {
            Err(Unfinished::Task(TaskError::Busy { failure, retry_after })) if !shared.no_wait => {
                let wait = spread((*retry_after).clamp(BUSY_WAIT_MIN, BUSY_WAIT_MAX), handle.id());
                shared.progress().full(&failure.text, wait);
                wait
            }
            _ => return Whole { task, worker, end },
        };
        let left = shared.deadline.map(|deadline| deadline.saturating_sub(began.elapsed()));
        if left.is_some_and(|left| left <= wait) {
            return Whole { task, worker, end };
        }
        if let Err(stop) = unless_stopped(stop, tokio::time::sleep(wait)).await {
            return Whole { task, worker, end: Err(Unfinished::Stopped(stop)) };
        }
    }
}

/// Lengthens the wait by up to a half, so that clients turned away together do not return together. The amount comes
/// from the last bytes of the task id, which are random.
fn spread(wait: Duration, task: TaskId) -> Duration {
    let [.., high, low] = *task.as_bytes();
    wait + wait.mul_f64(f64::from(u16::from_be_bytes([high, low])) / f64::from(u16::MAX) / 2.0)
}

/// Follows a task to its end. On a stop signal cancels the task and gives it a moment to end.
pub(crate) async fn until_end(
    handle: &mut TaskHandle,
    stop: &mut watch::Receiver<Option<Stop>>,
    mut on_news: impl FnMut(News),
) -> Result<TaskResult, Unfinished> {
    let stop = loop {
        tokio::select! {
            update = handle.next() => match update {
                Update::News(news) => on_news(news),
                Update::End(end) => return end.map_err(Unfinished::Task),
            },
            stop = stopped(stop) => break stop,
        }
    };
    handle.cancel().await;
    match tokio::time::timeout(CANCEL_WAIT, handle.wait()).await {
        // The task ended before it could be cancelled.
        Ok(Ok(result)) => Ok(result),
        Ok(Err(TaskError::Failed(failure))) => Err(Unfinished::Task(TaskError::Failed(failure))),
        Ok(Err(_)) | Err(_) => Err(Unfinished::Stopped(stop)),
    }
}

/// Reports the task's end for each item. Outputs are summed up and written on a blocking thread.
async fn report(shared: &Shared, bunch: &Bunch, whole: Whole, reports: &Reports) {
    let Whole { task, worker, end } = whole;
    let ends: Vec<Result<Done, Failed>> = match end {
        Err(unfinished) => bunch.items.iter().map(|_| Err(unfinished.failed())).collect(),
        Ok(result) => {
            let folders: Vec<Option<PathBuf>> = bunch.items.iter().map(|(_, name)| shared.folder(name)).collect();
            let detach = shared.detach;
            let finishing = move || {
                let of_each = folders.iter().zip(0..).map(|(folder, place)| {
                    Done::new(&result, place, detach, folder.as_deref())
                        .map_err(|error| Failed::new(exit::INTERNAL, "OUTPUT", error))
                });
                of_each.collect()
            };
            let finished = tokio::task::spawn_blocking(finishing).await;
            finished.unwrap_or_else(|error| {
                let broken = |_| Err(Failed::new(exit::INTERNAL, "INTERNAL", &error));
                bunch.items.iter().map(broken).collect()
            })
        }
    };
    for ((index, name), end) in bunch.items.iter().zip(ends) {
        // The collector outlives everything that reports to it.
        let _ = reports.send((*index, Report { item: name.clone(), task, failed_at: worker.clone(), end })).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_turned_away_together_come_back_one_by_one_and_not_early() {
        let wait = Duration::from_secs(2);
        let of = |last: [u8; 2]| {
            let mut bytes = [7; 16];
            bytes[14..].copy_from_slice(&last);
            spread(wait, TaskId::from_bytes(bytes))
        };
        assert_eq!([of([0, 0]), of([255, 255])], [wait, wait * 3 / 2]);
        assert!(wait < of([0, 1]) && of([0, 1]) < of([1, 0]) && of([1, 0]) < wait * 3 / 2);
    }
}
