//! A bench's outcome: a table for people, the same figures as JSON for scripts, and a word on what limits them.

use std::{fmt::Write as _, fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// One table.
#[derive(Debug)]
pub(crate) struct Section {
    name: &'static str,
    title: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<Value>>,
    notes: Vec<String>,
}

impl Section {
    pub(crate) fn new(name: &'static str, title: &'static str, columns: &'static [&'static str]) -> Self {
        Self { name, title, columns, rows: Vec::new(), notes: Vec::new() }
    }

    /// A row: one value per column; numbers are shown with at most two decimals.
    pub(crate) fn row(&mut self, values: Vec<Value>) {
        assert_eq!(values.len(), self.columns.len(), "a value for each column");
        eprintln!("{}: {}", self.name, values.iter().map(shown).collect::<Vec<_>>().join(" | "));
        self.rows.push(values);
    }

    /// A sentence under the table.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!("## {}\n\n", self.title);
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        text += &line(self.columns.iter().map(|column| (*column).to_owned()).collect());
        text += &line(self.columns.iter().map(|_| "---".to_owned()).collect());
        self.rows.iter().for_each(|row| text += &line(row.iter().map(shown).collect()));
        self.notes.iter().for_each(|note| {
            let _ = write!(text, "\n- {note}");
        });
        let _ = write!(text, "\n- Machine: {}.\n", machine());
        text
    }

    /// Writes `NAME.md` and `NAME.json` into `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let row = |row: &Vec<Value>| -> Value {
            self.columns.iter().zip(row).map(|(column, value)| ((*column).to_owned(), value.clone())).collect()
        };
        let rows: Vec<Value> = self.rows.iter().map(row).collect();
        let all = json!({"bench": self.name, "machine": machine(), "rows": rows, "notes": self.notes});
        let path = folder.join(format!("{}.json", self.name));
        fs::write(&path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
        let path = folder.join(format!("{}.md", self.name));
        fs::write(&path, self.to_markdown()).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "–".to_owned(),
        Value::Number(number) => match number.as_f64() {
            Some(number) if number.fract() != 0.0 && number.abs() < 1000.0 => format!("{number:.2}"),
            Some(number) => format!("{number:.0}"),
            None => number.to_string(),
        },
        other => other.to_string(),
    }
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("?");
    format!("{cores} cores, {}, load average {load} when written", model.unwrap_or("unknown processor"))
}

/// The value at this share (0 to 1) of the sorted durations, in milliseconds.
pub(crate) fn percentile_ms(durations: &mut [Duration], share: f64) -> f64 {
    durations.sort_unstable();
    let last = durations.len().saturating_sub(1);
    let at = ((last as f64) * share).round() as usize;
    durations.get(at).map_or(f64::NAN, |duration| duration.as_secs_f64() * 1000.0)
}

/// The middle of several measurements.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
