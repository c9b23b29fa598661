//! The end of one item: its text, its table row and its part of the JSON document. Owns the field names, which are a
//! promise. Never waits. `job` has all items of a submit.

use std::{
    io::{self, Write},
    path::Path,
    time::Duration,
};

use mesh_sdk::{Lane, RunNote, TaskId, TaskResult, Timings, WorkerId};
use serde_json::{Value, json};

use crate::{
    exit::{self, Failed},
    names,
    outputs::{self, Summary},
    streams::print,
    table::printable,
    units,
};

mod job;
mod kept;

pub(crate) use self::{
    job::{Job, LINES_MAX},
    kept::Kept,
};

/// The end of one item.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) item: String,
    /// `None` if nothing was submitted.
    pub(crate) task: Option<TaskId>,
    /// The worker that had a failed item last, if one had it.
    pub(crate) failed_at: Option<(WorkerId, String)>,
    pub(crate) end: Result<Done, Failed>,
}

/// A completed item.
#[derive(Debug)]
pub(crate) struct Done {
    /// Whether the task is detached: the worker has everything, and the result is fetched later.
    pub(crate) is_detached: bool,
    pub(crate) worker: Option<(WorkerId, String)>,
    pub(crate) attempts: u32,
    /// Timings of the item's task.
    pub(crate) timings: Timings,
    pub(crate) lane: Option<Lane>,
    /// Number of items in the task, this one included.
    pub(crate) task_items: u32,
    /// The runs that contained the item, by stage; empty if the task was cut into too many to report.
    pub(crate) runs: Vec<RunNote>,
    pub(crate) outputs: Vec<Summary>,
    /// Whether some of the outputs are too large for the document.
    pub(crate) is_cut: bool,
}

impl Done {
    /// Summarises the outputs of one of the task's items, and writes them to `folder` if there is one.
    ///
    /// # Errors
    /// If an output cannot be read or written.
    pub(crate) fn new(result: &TaskResult, place: u32, is_detached: bool, folder: Option<&Path>) -> io::Result<Self> {
        let outputs = if is_detached { Vec::new() } else { result.outputs.item(place)? };
        let mut summaries = outputs
            .iter()
            .map(|output| outputs::summarize(output, folder.is_some()))
            .collect::<io::Result<Vec<Summary>>>()?;
        if let Some(folder) = folder.filter(|_| !is_detached) {
            outputs::save(folder, &outputs, &mut summaries)?;
        }
        let is_cut = summaries.iter().any(Summary::is_left_out);
        let task_items = result.outputs.items();
        let has_item = |run: &&RunNote| (run.rows.0..run.rows.1).contains(&place);
        let mut runs: Vec<RunNote> = result.runs.iter().filter(has_item).copied().collect();
        runs.sort_by_key(|run| run.stage);
        let (worker, attempts, lane) = (result.worker.clone(), result.attempts.0, result.lane);
        let timings = result.timings;
        Ok(Self { is_detached, worker, attempts, timings, lane, task_items, runs, outputs: summaries, is_cut })
    }

    /// The item's own share of the time in the models; the items in the same batch have the rest.
    pub(crate) fn running_alone(&self) -> Duration {
        if self.runs.is_empty() {
            return self.timings.running / self.task_items.max(1);
        }
        // Rows of a task that ran one by one are reported as runs of one row with the time of all of them.
        let sharing = |run: &RunNote| run.batch_rows.max(run.rows.1.saturating_sub(run.rows.0)).max(1);
        self.runs.iter().map(|run| Duration::from_micros(run.run_us.into()) / sharing(run)).sum()
    }

    /// For each stage the rows of its batch and why it was run then, such as `8 full`.
    fn batches(&self) -> String {
        let batches = self.runs.iter().map(|run| format!("{} {}", run.batch_rows, run.dispatch.name()));
        if self.runs.is_empty() { "-".to_owned() } else { batches.collect::<Vec<_>>().join(" > ") }
    }

    fn runs_json(&self) -> Value {
        let run = |run: &RunNote| {
            json!({
                "stage": run.stage,
                "batch_rows": run.batch_rows,
                "dispatch": run.dispatch.name(),
                "run_ms": f64::from(run.run_us) / 1e3,
            })
        };
        self.runs.iter().map(run).collect()
    }
}

impl Report {
    fn state(&self) -> &'static str {
        match &self.end {
            Ok(done) if done.is_detached => "accepted",
            Ok(_) => "done",
            Err(failed) if matches!(failed.exit, exit::CANCELLED | exit::INTERRUPTED | exit::TERMINATED) => "cancelled",
            Err(_) => "failed",
        }
    }

    /// The worker that did the item.
    pub(crate) fn worker_id(&self) -> Option<WorkerId> {
        Some(self.end.as_ref().ok()?.worker.as_ref()?.0)
    }

    /// The worker that did the item, or had it last.
    fn last_worker(&self) -> Option<&(WorkerId, String)> {
        self.end.as_ref().map_or(self.failed_at.as_ref(), |done| done.worker.as_ref())
    }

    fn worker(&self) -> Option<&str> {
        self.last_worker().map(|(_, name)| name.as_str())
    }

    /// The item's part of the document, also its `result.json`.
    pub(crate) fn to_json(&self) -> Value {
        let done = self.end.as_ref().ok();
        let failed = self.end.as_ref().err();
        let ms = |time: Duration| time.as_micros() as f64 / 1e3;
        // What takes no time has not taken place, or is not known here. A model is loaded for a run.
        let known = |time: Duration| (!time.is_zero()).then(|| ms(time));
        json!({
            "item": self.item,
            "task": self.task.map(|task| task.to_string()),
            "state": self.state(),
            "worker": self.last_worker().map(|(id, name)| json!({ "id": id.to_string(), "name": name })),
            "attempts": done.map(|done| done.attempts),
            "lane": done.and_then(|done| done.lane).map(Lane::name),
            "task_items": done.map(|done| done.task_items),
            "runs": done.map_or_else(|| json!([]), Done::runs_json),
            "timings": done.map(|Done { timings, .. }| json!({
                "total_ms": ms(timings.total),
                "queued_ms": known(timings.queued),
                "sending_ms": known(timings.sending),
                "loading_ms": known(timings.running).map(|_| ms(timings.loading)),
                "running_ms": known(timings.running),
            })),
            "sent_bytes": done.map(|done| done.timings.sent_bytes / u64::from(done.task_items.max(1))),
            "outputs": done.map_or_else(Vec::new, |done| done.outputs.iter().map(Summary::to_json).collect()),
            "error": failed.map(Failed::to_json),
        })
    }

    /// Prints the item's part of the document at once, on its own line.
    pub(crate) fn print_line(&self) {
        // Standard output may be closed; the end of the command reports that.
        let _ = print(&format!("{}\n", self.to_json()));
    }

    /// Whether outputs of the item are too large for the document.
    pub(crate) fn is_cut(&self) -> bool {
        self.end.as_ref().is_ok_and(|done| done.is_cut)
    }

    /// Sets the times of a task that was fetched: `took` from its submit to its end, and not those of the fetch.
    pub(crate) fn set_took(&mut self, took: Duration) {
        if let Ok(Done { timings, .. }) = &mut self.end {
            *timings = Timings { total: took, queued: Duration::ZERO, sending: Duration::ZERO, ..*timings };
        }
    }

    /// Frees the output summaries, which are not shown again.
    pub(crate) fn forget_outputs(&mut self) {
        if let Ok(done) = &mut self.end {
            done.outputs = Vec::new();
        }
    }

    /// Writes `result.json` beside the outputs.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        let outputs = self.end.iter().flat_map(|done| &done.outputs);
        let files: Vec<&str> = outputs.filter_map(|output| output.file.as_deref()).collect();
        write_document(folder, &files, |out| Ok(serde_json::to_writer_pretty(out, &self.to_json())?))
    }

    /// The item's row in the table of a submit of several items.
    fn line(&self) -> Vec<String> {
        let done = self.end.as_ref().ok();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let said = match &self.end {
            Ok(done) => done.outputs.first().map(Summary::in_short).unwrap_or_default(),
            Err(failed) => failed.code.to_owned(),
        };
        vec![
            self.item.clone(),
            self.state().to_owned(),
            self.worker().unwrap_or("-").to_owned(),
            or_dash(done.and_then(|done| done.lane).map(|lane| lane.to_string())),
            or_dash(done.map(Done::batches)),
            or_dash(done.map(|done| units::time(done.timings.total))),
            said,
            or_dash(self.task.map(|task| task.to_string())),
        ]
    }

    /// The text for a submit of one item.
    pub(crate) fn to_text(&self) -> String {
        let Ok(done) = &self.end else { return String::new() };
        let Timings { total, queued, sending, loading, running, .. } = done.timings;
        let again = if done.attempts > 1 { format!(", attempt {}", done.attempts) } else { String::new() };
        let parts = [("queued", queued), ("sending", sending), ("loading", loading), ("running", running)];
        let parts = parts.iter().filter(|(_, time)| !time.is_zero());
        let parts: Vec<String> = parts.map(|(what, time)| format!("{what} {}", units::time(*time))).collect();
        let worker = printable(self.worker().unwrap_or("a worker"));
        let is_packed = done.runs.iter().any(|run| run.batch_rows > 1);
        let packed = if is_packed { format!(", run in batches of {}", done.batches()) } else { String::new() };
        let mut text = format!("done on {worker} in {} ({}){again}{packed}\n", units::time(total), parts.join(", "));
        done.outputs.iter().for_each(|output| text.push_str(&output.to_text()));
        text
    }
}

/// Writes the `result.json` of a folder with these outputs, and removes an earlier one and its outputs.
fn write_document(
    folder: &Path,
    files: &[&str],
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    outputs::make_folder(folder)?;
    outputs::remove_earlier(folder, files)?;
    outputs::write_whole(&folder.join(names::DOCUMENT), |out| {
        write(&mut *out)?;
        out.write_all(b"\n")
    })
}

#[cfg(test)]
mod tests;
