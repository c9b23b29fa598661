//! The ends of all items of a submit: the table, each worker's share, the JSON document and the exit code. Owns the
//! field names, which are a promise. Never waits.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::Path,
    time::Duration,
};

use mesh_sdk::{JobId, ModelRef, TaskId};
use serde_json::{Value, json};

use super::{Kept, Report, write_document};
use crate::{
    exit::{self, Failed},
    table::{Columns, printable_lines, table, table_of},
    units,
};

/// Most items with their own row on the terminal.
pub(crate) const LINES_MAX: usize = 40;

/// Failures beyond these are counted, not listed.
const FAILURES_LISTED_MAX: usize = 20;

/// All items of one submit.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) job: Option<JobId>,
    pub(crate) model_name: String,
    pub(crate) model: ModelRef,
    pub(crate) took: Duration,
    pub(crate) reports: Vec<Report>,
    /// Names of workers without a share although the job's tasks fit there.
    pub(crate) idle: Vec<String>,
    /// The reports' parts of the document, if they were kept as the items ended.
    pub(crate) kept: Option<Kept>,
}

impl Job {
    /// 0, or the exit code of the first failed item.
    pub(crate) fn exit(&self) -> u8 {
        self.reports.iter().find_map(|report| Some(report.end.as_ref().err()?.exit)).unwrap_or(exit::OK)
    }

    fn failures(&self) -> impl Iterator<Item = (&Report, &Failed)> {
        self.reports.iter().filter_map(|report| Some((report, report.end.as_ref().err()?)))
    }

    /// Writes the document, one line per item, one item after the other: all at once may exceed the memory.
    ///
    /// # Errors
    /// If the kept parts cannot be read, or `out` cannot be written.
    pub(crate) fn write_json(&mut self, mut out: &mut dyn Write) -> io::Result<()> {
        let job = json!(self.job.map(|job| job.to_string()));
        let model = json!({
            "name": self.model_name,
            "digest": self.model.digest.to_string(),
            "size_bytes": self.model.size_bytes,
            "format": self.model.format.name(),
        });
        write!(out, "{{\n  \"job\": {job},\n  \"model\": {model},\n  \"items\": [")?;
        for (index, report) in self.reports.iter().enumerate() {
            out.write_all(if index == 0 { b"\n    " } else { b",\n    " })?;
            match &mut self.kept {
                Some(kept) if kept.has(index) => kept.write(index, &mut out)?,
                _ => write!(out, "{}", report.to_json())?,
            }
        }
        write!(out, "\n  ],\n  \"summary\": {}\n}}", self.summary_json())
    }

    fn summary_json(&self) -> Value {
        let failed = self.failures().count();
        let workers = self.workers();
        let ms = |time: Duration| time.as_micros() as f64 / 1e3;
        json!({
            "items": self.reports.len(),
            "tasks": self.tasks(),
            "done": self.reports.len() - failed,
            "failed": failed,
            "workers": workers.iter().map(|(name, share)| json!({
                "name": name,
                "items": share.items,
                "run_each_ms": share.run_each().map(ms),
            })).collect::<Vec<_>>(),
            "skew": skew(&workers),
            "total_ms": ms(self.took),
            "per_item_ms": ms(self.took) / self.reports.len().max(1) as f64,
        })
    }

    /// The text for a submit of several items.
    pub(crate) fn to_text(&self, columns: Columns) -> String {
        let mut text = String::new();
        if self.reports.len() <= LINES_MAX {
            let headings = ["ITEM", "STATE", "WORKER", "LANE", "BATCH", "TIME", "FIRST OUTPUT", "TASK"];
            let main = ["ITEM", "STATE", "WORKER", "TIME", "FIRST OUTPUT"];
            text.push_str(&table_of(
                columns,
                &main,
                &headings,
                &self.reports.iter().map(Report::line).collect::<Vec<_>>(),
            ));
            text.push('\n');
        }
        text.push_str(&self.summary_text());
        text
    }

    /// Each worker's share, and the total time.
    pub(crate) fn summary_text(&self) -> String {
        let workers = self.workers();
        let row = |(worker, share): (&&str, &Share)| {
            let each = share.run_each().map_or_else(|| "-".to_owned(), units::time);
            vec![(*worker).to_owned(), share.items.to_string(), each]
        };
        if workers.is_empty() {
            return self.count_text();
        }
        let mut text = table(&["WORKER", "ITEMS", "RUN EACH"], &workers.iter().map(row).collect::<Vec<_>>());
        let idle = workers.values().filter(|share| share.items == 0).count();
        if idle > 0 {
            text.push_str(&format!("skew: {idle} of {} workers got nothing\n", workers.len()));
        }
        if let Some(skew) = skew(&workers) {
            text.push_str(&format!("skew {skew:.2} (most items of a worker / fewest)\n"));
        }
        text.push_str(&format!("\n{}", self.count_text()));
        text
    }

    /// The ids of the accepted tasks, one a line.
    pub(crate) fn ids_text(&self) -> String {
        let accepted = self.reports.iter().filter(|report| report.end.is_ok()).filter_map(|report| report.task);
        let mut seen = BTreeSet::new();
        accepted.filter(|task| seen.insert(*task)).map(|task| format!("{task}\n")).collect()
    }

    /// The number of items and tasks, and the total time, in one line.
    pub(crate) fn count_text(&self) -> String {
        let (items, tasks, took) = (self.reports.len(), self.tasks(), units::time(self.took));
        let each = units::time(self.took / u32::try_from(items.max(1)).unwrap_or(u32::MAX));
        let failed = self.failures().count();
        let each = if failed < items { format!(" {each} per item,") } else { String::new() };
        format!("{items} items in {tasks} tasks in {took},{each} {failed} failed\n")
    }

    /// Number of tasks. The tasks of items that were tried again alone count; their failed shared task does not.
    fn tasks(&self) -> usize {
        self.reports.iter().filter_map(|report| report.task).collect::<BTreeSet<TaskId>>().len()
    }

    fn workers(&self) -> BTreeMap<&str, Share> {
        let mut workers: BTreeMap<&str, Share> = BTreeMap::new();
        for (report, done) in self.reports.iter().filter_map(|report| Some((report, report.end.as_ref().ok()?))) {
            let share = workers.entry(report.worker().unwrap_or("-")).or_default();
            share.items += 1;
            share.running += done.running_alone();
        }
        // With fewer tasks than workers, some must be idle.
        if workers.len() + self.idle.len() <= self.tasks() {
            for name in &self.idle {
                workers.entry(name).or_default();
            }
        }
        workers
    }

    /// The failures, for standard error.
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

    /// Writes `result.json` for all items if there are several; each item also has its own.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn save(&mut self, folder: &Path) -> io::Result<()> {
        if self.reports.len() == 1 {
            return Ok(());
        }
        write_document(folder, &[], |out| self.write_json(out))
    }
}

/// One worker's share of the work.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    items: u32,
    running: Duration,
}

impl Share {
    /// The mean time of a run; `None` if none of the items has run, such as those of detached tasks.
    fn run_each(&self) -> Option<Duration> {
        (!self.running.is_zero()).then(|| self.running / self.items.max(1))
    }
}

/// How unevenly the work was spread over several workers: 1 is even. `None` also if a worker got nothing.
fn skew(workers: &BTreeMap<&str, Share>) -> Option<f64> {
    let items = || workers.values().map(|share| share.items);
    let (most, fewest) = (items().max()?, items().min().filter(|fewest| *fewest > 0)?);
    (workers.len() > 1).then(|| f64::from(most) / f64::from(fewest))
}
