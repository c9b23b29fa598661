//! What became of the items of a submit: texts, tables and the JSON document. Owns its fields, which are a promise; never
//! waits for anything.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    time::Duration,
};

use mesh_sdk::{ErrorCode, JobId, ModelRef, TaskError, TaskId, TaskResult, Timings, WorkerId};
use serde_json::{Value, json};

use crate::{
    exit,
    outputs::{self, Summary},
    table::{printable, printable_lines, table},
    units,
};

/// Up to this many items get a line each on the terminal.
const LINES_MAX: usize = 40;

/// Failures beyond these are counted, not listed.
const FAILURES_LISTED_MAX: usize = 20;

/// One item's end.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) item: String,
    /// `None` if nothing was submitted.
    pub(crate) task: Option<TaskId>,
    pub(crate) end: Result<Done, Failed>,
}

/// It was done.
#[derive(Debug)]
pub(crate) struct Done {
    /// The worker has everything, the result is fetched later.
    pub(crate) is_detached: bool,
    pub(crate) worker: Option<(WorkerId, String)>,
    pub(crate) attempts: u32,
    pub(crate) timings: Timings,
    pub(crate) outputs: Vec<Summary>,
}

/// It was not.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) exit: u8,
    /// Code of the mesh, or a name of the same kind.
    pub(crate) code: &'static str,
    pub(crate) text: String,
}

impl Failed {
    pub(crate) fn new(exit: u8, code: &'static str, text: impl ToString) -> Self {
        Self { exit, code, text: text.to_string() }
    }

    pub(crate) fn of_task(error: &TaskError) -> Self {
        let code = match error {
            TaskError::Failed(failure) | TaskError::Busy { failure, .. } => failure.code.name(),
            TaskError::Cancelled => "CANCELLED",
            TaskError::Version(_) => ErrorCode::Forbidden.name(),
            TaskError::Closed => "CLOSED",
        };
        let text = match error {
            TaskError::Failed(failure) | TaskError::Busy { failure, .. } => failure.text.clone(),
            other => other.to_string(),
        };
        Self { exit: exit::of_task(error), code, text }
    }
}

impl Done {
    /// Sums the outputs up and writes them to `folder` if there is one.
    ///
    /// # Errors
    /// If an output cannot be read or written.
    pub(crate) fn new(result: TaskResult, is_detached: bool, folder: Option<&Path>) -> io::Result<Self> {
        let TaskResult { outputs, worker, attempts, timings, .. } = result;
        let mut summaries = outputs.iter().map(outputs::summarize).collect::<io::Result<Vec<Summary>>>()?;
        if let Some(folder) = folder.filter(|_| !is_detached) {
            outputs::save(folder, &outputs, &mut summaries)?;
        }
        Ok(Self { is_detached, worker, attempts: attempts.0, timings, outputs: summaries })
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

    fn worker(&self) -> Option<&str> {
        Some(self.end.as_ref().ok()?.worker.as_ref()?.1.as_str())
    }

    /// The item's part of the document; also its `result.json`.
    pub(crate) fn to_json(&self) -> Value {
        let done = self.end.as_ref().ok();
        let failed = self.end.as_ref().err();
        let ms = |time: Duration| time.as_micros() as f64 / 1e3;
        json!({
            "item": self.item,
            "task": self.task.map(|task| task.to_string()),
            "state": self.state(),
            "worker": done.and_then(|done| done.worker.as_ref()).map(|(id, name)| json!({ "id": id.to_string(), "name": name })),
            "attempts": done.map(|done| done.attempts),
            "timings": done.map(|Done { timings, .. }| json!({
                "total_ms": ms(timings.total),
                "queued_ms": ms(timings.queued),
                "sending_ms": ms(timings.sending),
                "loading_ms": ms(timings.loading),
                "running_ms": ms(timings.running),
            })),
            "sent_bytes": done.map(|done| done.timings.sent_bytes),
            "outputs": done.map_or_else(Vec::new, |done| done.outputs.iter().map(Summary::to_json).collect()),
            "error": failed.map(|failed| json!({ "code": failed.code, "text": failed.text, "exit": failed.exit })),
        })
    }

    /// `result.json` beside the outputs.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        write_document(folder, &self.to_json())
    }

    /// For a submit of one item.
    pub(crate) fn to_text(&self) -> String {
        let Ok(done) = &self.end else { return String::new() };
        let task = self.task.map(|task| task.to_string()).unwrap_or_default();
        if done.is_detached {
            return format!("{task}\n");
        }
        let Timings { total, queued, sending, loading, running, .. } = done.timings;
        let again = if done.attempts > 1 { format!(", attempt {}", done.attempts) } else { String::new() };
        let parts = [("queued", queued), ("sending", sending), ("loading", loading), ("running", running)];
        let parts = parts.iter().filter(|(_, time)| !time.is_zero());
        let parts: Vec<String> = parts.map(|(what, time)| format!("{what} {}", units::time(*time))).collect();
        let worker = printable(self.worker().unwrap_or("a worker"));
        let mut text = format!("done on {worker} in {} ({}){again}\n", units::time(total), parts.join(", "));
        done.outputs.iter().for_each(|output| text.push_str(&output.to_text()));
        text
    }
}

/// A submit as a whole.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) job: Option<JobId>,
    pub(crate) model_name: String,
    pub(crate) model: ModelRef,
    pub(crate) took: Duration,
    pub(crate) reports: Vec<Report>,
}

impl Job {
    /// 0, or the code of the first item that failed.
    pub(crate) fn exit(&self) -> u8 {
        self.reports.iter().find_map(|report| Some(report.end.as_ref().err()?.exit)).unwrap_or(exit::OK)
    }

    fn failures(&self) -> impl Iterator<Item = (&Report, &Failed)> {
        self.reports.iter().filter_map(|report| Some((report, report.end.as_ref().err()?)))
    }

    pub(crate) fn to_json(&self) -> Value {
        let failed = self.failures().count();
        json!({
            "job": self.job.map(|job| job.to_string()),
            "model": {
                "name": self.model_name,
                "digest": self.model.digest.to_string(),
                "size_bytes": self.model.size_bytes,
                "format": self.model.format.name(),
            },
            "items": self.reports.iter().map(Report::to_json).collect::<Vec<_>>(),
            "summary": {
                "items": self.reports.len(),
                "done": self.reports.len() - failed,
                "failed": failed,
                "total_ms": self.took.as_micros() as f64 / 1e3,
                "per_item_ms": self.took.as_micros() as f64 / 1e3 / self.reports.len().max(1) as f64,
            },
        })
    }

    /// For a submit of several items.
    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        if self.reports.len() <= LINES_MAX {
            let line = |report: &Report| {
                let done = report.end.as_ref().ok();
                let time = done.map_or_else(|| "-".to_owned(), |done| units::time(done.timings.total));
                let worker = report.worker().unwrap_or("-").to_owned();
                let said = match &report.end {
                    Ok(done) if done.is_detached => report.task.map(|task| task.to_string()).unwrap_or_default(),
                    Ok(done) => done.outputs.first().map(Summary::in_short).unwrap_or_default(),
                    Err(failed) => failed.code.to_owned(),
                };
                vec![report.item.clone(), report.state().to_owned(), worker, time, said]
            };
            let rows: Vec<Vec<String>> = self.reports.iter().map(line).collect();
            text.push_str(&table(&["ITEM", "STATE", "WORKER", "TIME", "FIRST OUTPUT"], &rows));
            text.push('\n');
        }
        text.push_str(&self.per_worker());
        let (items, took) = (self.reports.len(), units::time(self.took));
        let each = units::time(self.took / u32::try_from(items.max(1)).unwrap_or(u32::MAX));
        let failed = self.failures().count();
        text.push_str(&format!("\n{items} items in {took}, {each} per item, {failed} failed\n"));
        text
    }

    fn per_worker(&self) -> String {
        let mut workers: BTreeMap<&str, (u32, Duration)> = BTreeMap::new();
        for (report, done) in self.reports.iter().filter_map(|report| Some((report, report.end.as_ref().ok()?))) {
            let of = workers.entry(report.worker().unwrap_or("-")).or_default();
            of.0 += 1;
            of.1 += done.timings.running;
        }
        let row = |(worker, (items, running)): (&&str, &(u32, Duration))| {
            vec![(*worker).to_owned(), items.to_string(), units::time(*running / *items)]
        };
        table(&["WORKER", "ITEMS", "RUN EACH"], &workers.iter().map(row).collect::<Vec<_>>())
    }

    /// What went wrong, for standard error.
    pub(crate) fn failures_text(&self) -> String {
        let lines = self.failures().take(FAILURES_LISTED_MAX).map(|(report, failed)| {
            let what = if self.reports.len() == 1 { String::new() } else { format!("{}: ", report.item) };
            let task = report.task.map(|task| format!(" (task {task})")).unwrap_or_default();
            format!("mesh-client: {what}{}: {}{task}\n", failed.code, failed.text)
        });
        let mut text: String = lines.collect();
        let more = self.failures().count().saturating_sub(FAILURES_LISTED_MAX);
        if more > 0 {
            text.push_str(&format!("mesh-client: and {more} more\n"));
        }
        printable_lines(&text)
    }

    /// `result.json`: one for each item in its folder, and one for all.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        if let [only] = &self.reports[..] {
            return only.save(folder);
        }
        self.reports.iter().try_for_each(|report| report.save(&folder.join(&report.item)))?;
        write_document(folder, &self.to_json())
    }
}

fn write_document(folder: &Path, document: &Value) -> io::Result<()> {
    outputs::make_folder(folder)?;
    outputs::write_whole(&folder.join("result.json"), |out| {
        serde_json::to_writer_pretty(&mut *out, document)?;
        out.write_all(b"\n")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use mesh_sdk::{DType, Digest, ModelFormat};

    use super::*;

    fn done(item: &str, worker: &str, value: f64) -> Report {
        let output = Summary {
            name: "y".into(),
            dtype: DType::F32,
            shape: vec![1],
            size_bytes: 4,
            spread: Some((value, value, value)),
            not_finite: 0,
            top: Vec::new(),
            data: Some(vec![value.into()]),
            file: None,
        };
        let ms = Duration::from_millis;
        let timings =
            Timings { total: ms(34), queued: ms(1), sending: ms(3), loading: ms(20), running: ms(4), sent_bytes: 2052 };
        let worker = Some((WorkerId::from_bytes([1; 16]), worker.to_owned()));
        let end = Ok(Done { is_detached: false, worker, attempts: 1, timings, outputs: vec![output] });
        Report { item: item.into(), task: Some(TaskId::from_bytes([2; 16])), end }
    }

    fn failed(item: &str) -> Report {
        let end = Err(Failed::new(exit::BAD_INPUT, "MODEL_INPUT_MISMATCH", "x has 3 bytes"));
        Report { item: item.into(), task: None, end }
    }

    fn job(reports: Vec<Report>) -> Job {
        let model = ModelRef { digest: Digest::from_bytes([7; 32]), size_bytes: 2048, format: ModelFormat::Onnx };
        Job { job: None, model_name: "m.onnx".into(), model, took: Duration::from_millis(90), reports }
    }

    #[test]
    fn one_item_shows_where_its_time_went_and_its_outputs() {
        let expected = "\
done on pi-4 in 34 ms (queued 1.0 ms, sending 3.0 ms, loading 20 ms, running 4.0 ms)
y  FP32 [1]  0.5
";
        assert_eq!(done("a", "pi-4", 0.5).to_text(), expected);
    }

    #[test]
    fn several_items_are_counted_by_worker_and_the_bad_one_is_listed() {
        let job = job(vec![done("a", "pi-4", 0.5), failed("b"), done("c", "pi-5", 2.0)]);
        let expected = "\
ITEM   STATE    WORKER   TIME    FIRST OUTPUT
a      done     pi-4     34 ms   0.5
b      failed   -        -       MODEL_INPUT_MISMATCH
c      done     pi-5     34 ms   2

WORKER   ITEMS   RUN EACH
pi-4     1       4.0 ms
pi-5     1       4.0 ms

3 items in 90 ms, 30 ms per item, 1 failed
";
        assert_eq!(job.to_text(), expected);
        assert_eq!(job.failures_text(), "mesh-client: b: MODEL_INPUT_MISMATCH: x has 3 bytes\n");
        assert_eq!(job.exit(), exit::BAD_INPUT);
    }

    #[test]
    fn a_failure_cannot_command_the_terminal() {
        let end = Err(Failed::new(exit::RUN_FAILED, "RUN_FAILED", "bad\x1b[31m\nmore"));
        let text = job(vec![Report { item: "a".into(), task: None, end }]).failures_text();
        assert_eq!(text, "mesh-client: RUN_FAILED: bad\u{fffd}[31m\nmore\n");
        assert!(done("a", "ev\x1bil\n", 0.5).to_text().starts_with("done on ev\u{fffd}il\u{fffd} in "));
    }

    #[test]
    fn the_document_has_the_promised_fields() {
        let document = job(vec![done("a", "pi-4", 0.5), failed("b")]).to_json();
        let expected = json!({
            "item": "a",
            "task": "02020202-0202-0202-0202-020202020202",
            "state": "done",
            "worker": { "id": "01010101-0101-0101-0101-010101010101", "name": "pi-4" },
            "attempts": 1,
            "timings":
                { "total_ms": 34.0, "queued_ms": 1.0, "sending_ms": 3.0, "loading_ms": 20.0, "running_ms": 4.0 },
            "sent_bytes": 2052,
            "outputs": [{
                "name": "y", "dtype": "FP32", "shape": [1], "size_bytes": 4, "min": 0.5, "max": 0.5, "mean": 0.5,
                "not_finite": 0, "data": [0.5], "file": null,
            }],
            "error": null,
        });
        assert_eq!(document["items"][0], expected);
        let error = json!({ "code": "MODEL_INPUT_MISMATCH", "text": "x has 3 bytes", "exit": 3 });
        assert_eq!((&document["items"][1]["error"], &document["items"][1]["task"]), (&error, &Value::Null));
        let summary = json!({ "items": 2, "done": 1, "failed": 1, "total_ms": 90.0, "per_item_ms": 45.0 });
        assert_eq!(document["summary"], summary);
        assert_eq!(document["model"]["name"], "m.onnx");
    }

    #[test]
    fn each_item_has_its_folder_and_the_submit_its_document() {
        let dir = tempfile::tempdir().unwrap();
        job(vec![done("a", "pi-4", 0.5), failed("b")]).save(dir.path()).unwrap();
        let read = |path: &str| -> Value {
            serde_json::from_str(&fs::read_to_string(dir.path().join(path)).unwrap()).unwrap()
        };
        assert_eq!(read("a/result.json")["state"], "done");
        assert_eq!(read("b/result.json")["state"], "failed");
        assert_eq!(read("result.json")["summary"]["items"], 2);
        let alone = tempfile::tempdir().unwrap();
        job(vec![done("a", "pi-4", 0.5)]).save(alone.path()).unwrap();
        assert!(alone.path().join("result.json").exists() && !alone.path().join("a").exists());
    }
}
