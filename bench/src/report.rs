//! The outcome of a bench: tables for people, the same figures as JSON for scripts, and each figure's aim beside it.
//!
//! Owns how figures are shown and summarised. Never: measuring.

use std::{fmt::Write as _, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::aims::{self, Judged};

/// The result of one command of the bench.
#[derive(Debug)]
pub(crate) struct Report {
    name: &'static str,
    title: &'static str,
    tables: Vec<Table>,
    notes: Vec<String>,
    /// What stood on the command line behind the name.
    arguments: String,
    /// Load of the machine when the bench began.
    load_before: String,
    /// Of the checkout when the bench began.
    commit: String,
}

/// Rows of figures under one heading.
#[derive(Debug)]
pub(crate) struct Table {
    title: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<Value>>,
}

impl Table {
    pub(crate) fn new(title: &'static str, columns: &'static [&'static str]) -> Self {
        Self { title, columns, rows: Vec::new() }
    }

    /// Adds a row: one value per column. It is printed at once, so that a long run shows its progress.
    pub(crate) fn row(&mut self, values: Vec<Value>) {
        assert_eq!(values.len(), self.columns.len(), "a value for each column of '{}'", self.title);
        eprintln!("  {}", values.iter().map(shown).collect::<Vec<_>>().join(" | "));
        self.rows.push(values);
    }

    /// Each row's figures that have an aim in this report.
    fn judged(&self, report: &str) -> Vec<Vec<Judged>> {
        self.rows.iter().map(|row| aims::judge(report, self.columns, row)).collect()
    }

    fn to_json(&self, report: &str) -> Value {
        let row = |(row, judged): (&Vec<Value>, Vec<Judged>)| -> Value {
            let cells = self.columns.iter().zip(row).map(|(column, value)| ((*column).to_owned(), value.clone()));
            let aims: Vec<Value> =
                judged.iter().map(|judged| json!({"aim": judged.aim.in_words().0, "met": judged.is_met})).collect();
            cells.chain((!aims.is_empty()).then(|| ("aims".to_owned(), json!(aims)))).collect()
        };
        json!({"title": self.title, "rows": self.rows.iter().zip(self.judged(report)).map(row).collect::<Vec<_>>()})
    }

    /// With a column for the aims where there are any.
    fn to_markdown(&self, report: &str) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let judged = self.judged(report);
        let has_aims = judged.iter().any(|judged| !judged.is_empty());
        let columns: Vec<String> =
            self.columns.iter().copied().chain(has_aims.then_some("aims")).map(str::to_owned).collect();
        let mut text = format!("\n{}\n\n", self.title);
        text += &line(columns.clone());
        text += &line(columns.iter().map(|_| "---".to_owned()).collect());
        for (row, judged) in self.rows.iter().zip(judged) {
            let aims = judged.iter().map(Judged::to_string).collect::<Vec<_>>().join("; ");
            text += &line(row.iter().map(shown).chain(has_aims.then_some(aims)).collect());
        }
        text
    }
}

impl Report {
    pub(crate) fn new(name: &'static str, title: &'static str) -> Self {
        let (load_before, commit) = (load_average(), commit());
        Self { name, title, tables: Vec::new(), notes: Vec::new(), arguments: String::new(), load_before, commit }
    }

    /// Notes with what arguments it was made: ` --items 100`.
    pub(crate) fn called_with(self, arguments: String) -> Self {
        Self { arguments, ..self }
    }

    pub(crate) fn table(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// Adds a sentence under the tables.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!("# {}\n", self.title);
        self.tables.iter().for_each(|table| text += &table.to_markdown(self.name));
        text.push('\n');
        for note in self.notes.iter().chain(&self.aims_in_words()) {
            let _ = writeln!(text, "- {note}");
        }
        let _ = writeln!(text, "- {}, {}; `{}`; at commit {}.", today(), self.machine(), self.command(), self.commit);
        text
    }

    /// How many figures met their aim, and what kept the others from it.
    ///
    /// # Panics
    /// If an aim names a column that this report does not have: the list has fallen behind.
    fn aims_in_words(&self) -> Vec<String> {
        for column in aims::columns_named(self.name) {
            let is_there = self.tables.iter().any(|table| table.columns.contains(&column));
            assert!(is_there, "no table of {} has the column '{column}' that an aim names", self.name);
        }
        let judged: Vec<Judged> = self.tables.iter().flat_map(|table| table.judged(self.name)).flatten().collect();
        if judged.is_empty() {
            return Vec::new();
        }
        let met = judged.iter().filter(|judged| judged.is_met == Some(true)).count();
        let all = judged.iter().filter(|judged| judged.is_met.is_some()).count();
        let mut lines = vec![format!("Aims: {met} of {all} met.")];
        for other in judged.iter().filter(|judged| judged.is_met != Some(true)) {
            let (aim, because) = other.aim.in_words();
            let line = match other.is_met {
                Some(_) => format!("Missed: {aim}, because {because}."),
                None => format!("Not judged: {aim}, because there is {}.", aims::NOTHING_KNOWN),
            };
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        lines
    }

    /// Writes `NAME.md` and `NAME.json` into `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let all = json!({
            "bench": self.name,
            "command": self.command(),
            "date": today(),
            "machine": self.machine(),
            "commit": self.commit,
            "notes": self.notes,
            "aims": self.aims_in_words(),
            "tables": self.tables.iter().map(|table| table.to_json(self.name)).collect::<Vec<_>>(),
        });
        for (ending, text) in [("json", format!("{all:#}\n")), ("md", self.to_markdown())] {
            let path = folder.join(format!("{}.{ending}", self.name));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// The command that makes this report: for `schedule-mixed-small`, `mesh-bench schedule mixed-small`.
    fn command(&self) -> String {
        format!("mesh-bench {}{}", self.name.replacen('-', " ", 1), self.arguments)
    }

    /// The machine in general words: what decides the figures, but nothing that identifies it.
    fn machine(&self) -> String {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        let (arch, before, after) = (std::env::consts::ARCH, &self.load_before, load_average());
        let gib = kib >> 20;
        format!("{cores} cores ({arch}), {gib} GiB of memory, load average {before} at the start, {after} at the end")
    }
}

/// A number with three significant digits; more only before the decimal point.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "–".to_owned(),
        Value::Number(number) => match number.as_f64() {
            Some(number) if number.fract() != 0.0 && number.abs() < 9.995 => format!("{number:.2}"),
            Some(number) if number.fract() != 0.0 && number.abs() < 99.95 => format!("{number:.1}"),
            Some(number) => format!("{number:.0}"),
            None => number.to_string(),
        },
        other => other.to_string(),
    }
}

fn today() -> String {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d"]).output();
    date.map_or_else(|_| "undated".to_owned(), |date| String::from_utf8_lossy(&date.stdout).trim().to_owned())
}

/// The checkout's commit, and whether more than results differs from it; "unknown" outside of one.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR")]).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let changes = git(&["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results"]);
    if changes.is_some_and(|changes| changes.is_empty()) { commit } else { format!("{commit} with changes") }
}

fn load_average() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split_whitespace().next().unwrap_or("?").to_owned()
}

/// The percentile of the durations at `share` (0 to 1), in milliseconds. Sorts them.
pub(crate) fn percentile_ms(durations: &mut [Duration], share: f64) -> f64 {
    durations.sort_unstable();
    let last = durations.len().saturating_sub(1);
    let at = ((last as f64) * share).round() as usize;
    durations.get(at).map_or(f64::NAN, |duration| duration.as_secs_f64() * 1000.0)
}

/// The median of several measurements.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_as_far_as_they_count() {
        let shown: Vec<String> =
            [json!(0.123), json!(12.34), json!(1234.5), json!(7), json!(null)].iter().map(shown).collect();
        assert_eq!(shown, ["0.12", "12.3", "1234", "7", "–"]);
    }

    #[test]
    fn aims_stand_beside_their_figures_and_what_is_missed_has_its_reason() {
        let mut report = Report::new("idle", "Idle");
        let mut table = Table::new("While nothing is asked", &["program", "RSS MiB", "% of a core"]);
        table.row(vec![json!("mesh-worker"), json!(9.5), json!(0.75)]);
        table.row(vec![json!("mesh-broker"), json!(30.0), json!(0.1)]);
        report.table(table);
        report.commit = "0123456789ab".to_owned();
        let text = report.to_markdown();
        assert!(text.contains("| program | RSS MiB | % of a core | aims |"), "{text}");
        let row = "| mesh-worker | 9.50 | 0.75 | RSS MiB ≤ 20: met; % of a core ≤ 0.5: missed (0.750) |";
        assert!(text.contains(row) && text.contains("| mesh-broker | 30 | 0.10 |  |"), "{text}");
        assert!(text.contains("- Aims: 1 of 2 met.\n- Missed: % of a core ≤ 0.5, because each heartbeat"), "{text}");
        assert!(text.ends_with("`mesh-bench idle`; at commit 0123456789ab.\n"), "{text}");
    }

    #[test]
    #[should_panic = "has the column 'RSS MiB' that an aim names"]
    fn an_aim_of_a_column_that_is_gone_is_a_bug() {
        let mut report = Report::new("idle", "Idle");
        report.table(Table::new("While nothing is asked", &["program", "% of a core"]));
        let _text = report.to_markdown();
    }

    #[test]
    fn percentiles_and_medians_are_values_that_occurred() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile_ms(&mut times, 0.99), 99.0);
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
    }
}
