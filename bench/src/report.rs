//! A bench's outcome: tables for people, the same figures as JSON for scripts, and what limits each row.
//!
//! Owns how figures are shown and summed up. Never: measuring.

use std::{fmt::Write as _, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// What one command of the bench found.
#[derive(Debug)]
pub(crate) struct Report {
    name: &'static str,
    title: &'static str,
    tables: Vec<Table>,
    notes: Vec<String>,
    /// Of the machine when the bench began.
    load_before: String,
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

    /// A row: one value per column. Also said at once, so that a long run shows where it is.
    pub(crate) fn row(&mut self, values: Vec<Value>) {
        assert_eq!(values.len(), self.columns.len(), "a value for each column of '{}'", self.title);
        eprintln!("  {}", values.iter().map(shown).collect::<Vec<_>>().join(" | "));
        self.rows.push(values);
    }

    fn to_json(&self) -> Value {
        let row = |row: &Vec<Value>| -> Value {
            self.columns.iter().zip(row).map(|(column, value)| ((*column).to_owned(), value.clone())).collect()
        };
        json!({"title": self.title, "rows": self.rows.iter().map(row).collect::<Vec<_>>()})
    }
}

impl Report {
    pub(crate) fn new(name: &'static str, title: &'static str) -> Self {
        Self { name, title, tables: Vec::new(), notes: Vec::new(), load_before: load_average() }
    }

    pub(crate) fn table(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// A sentence under the tables.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!("# {}\n", self.title);
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        for table in &self.tables {
            let _ = write!(text, "\n{}\n\n", table.title);
            text += &line(table.columns.iter().map(|column| (*column).to_owned()).collect());
            text += &line(table.columns.iter().map(|_| "---".to_owned()).collect());
            table.rows.iter().for_each(|row| text += &line(row.iter().map(shown).collect()));
        }
        text.push('\n');
        self.notes.iter().for_each(|note| {
            let _ = writeln!(text, "- {note}");
        });
        let _ = writeln!(text, "- {}, {}; `{}`.", today(), self.machine(), self.command());
        text
    }

    /// Writes `NAME.md` and `NAME.json` into `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let all = json!({
            "bench": self.name,
            "command": self.command(),
            "date": today(),
            "machine": self.machine(),
            "notes": self.notes,
            "tables": self.tables.iter().map(Table::to_json).collect::<Vec<_>>(),
        });
        for (ending, text) in [("json", format!("{all:#}\n")), ("md", self.to_markdown())] {
            let path = folder.join(format!("{}.{ending}", self.name));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// `schedule-mixed-small` is made by `mesh-bench schedule mixed-small`.
    fn command(&self) -> String {
        format!("mesh-bench {}", self.name.replacen('-', " ", 1))
    }

    /// The machine in general words: what decides the figures, nothing that names it.
    fn machine(&self) -> String {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        let (arch, before, after) = (std::env::consts::ARCH, &self.load_before, load_average());
        let gib = kib >> 20;
        format!("{cores} cores ({arch}), {gib} GiB of memory, load average {before} at the start, {after} at the end")
    }
}

/// Three digits that count, more only before the point.
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

fn load_average() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split_whitespace().next().unwrap_or("?").to_owned()
}

/// The value at this share (0 to 1) of the durations, in milliseconds. Sorts them.
pub(crate) fn percentile_ms(durations: &mut [Duration], share: f64) -> f64 {
    durations.sort_unstable();
    let last = durations.len().saturating_sub(1);
    let at = ((last as f64) * share).round() as usize;
    durations.get(at).map_or(f64::NAN, |duration| duration.as_secs_f64() * 1000.0)
}

/// The middle of several measurements.
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
    fn percentiles_and_medians_are_values_that_occurred() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile_ms(&mut times, 0.99), 99.0);
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
    }
}
