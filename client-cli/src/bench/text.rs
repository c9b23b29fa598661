//! A bench's report as text: tables, and remarks. Owns the wording. Never: the figures.

use super::{
    measurement::{Measurement, Settled, WINDOWS_AGREEING, Window},
    report::{Level, Report},
    sample::WorkerNo,
    sweep::Load,
    tally::{DELAYED_AFTER_US, QUANTILES, Tally},
    verdict::Verdict,
};
use crate::{
    table::{Columns, printable, table, table_of},
    units,
};

/// Most windows listed in the table by worker; the document has all of them.
const WINDOWS_LISTED_MAX: usize = 60;

impl Report {
    /// All tables and remarks.
    pub(crate) fn to_text(&self, columns: Columns) -> String {
        let remarks = self.remarks().iter().map(|line| format!("{line}\n")).collect();
        let mut parts = vec![self.levels_table(columns), self.workers_table(), self.windows_table(), remarks];
        parts.retain(|part| !part.is_empty());
        parts.join("\n")
    }

    fn levels_table(&self, columns: Columns) -> String {
        if self.levels.is_empty() {
            return String::new();
        }
        let mut headings = vec!["LOAD", "DONE/S", "ITEMS/S", "MEAN"];
        let quantiles: Vec<String> = QUANTILES.iter().map(|(name, _)| name.to_uppercase()).collect();
        headings.extend(quantiles.iter().map(String::as_str));
        headings.extend(["MAX", "REQUESTS", "FAILED", "DELAYED"]);
        if self.promise.is_some() {
            headings.extend(["VIOLATION", "THRESHOLD"]);
        }
        headings.push("WINDOWS");
        let rows: Vec<Vec<String>> = self.levels.iter().map(|level| self.level_row(level)).collect();
        // With a promise, its verdict says whether the windows agree.
        let main: &[&str] = match self.promise {
            Some(_) => &["LOAD", "DONE/S", "P50", "P95", "P99", "P99.9", "FAILED", "VIOLATION", "THRESHOLD"],
            None => &["LOAD", "DONE/S", "P50", "P90", "P95", "P99", "P99.9", "FAILED", "WINDOWS"],
        };
        table_of(columns, main, &headings, &rows)
    }

    fn level_row(&self, level: &Level) -> Vec<String> {
        let tally = level.tally();
        let mut row = vec![level.load.to_string(), rate(tally.requests_per_s()), rate(tally.items_per_s())];
        row.push(ms(tally.latencies.mean_ms()));
        row.extend(QUANTILES.map(|(_, quantile)| ms(tally.latencies.quantile_ms(quantile))));
        row.push(ms(tally.latencies.max_ms()));
        row.extend([tally.done(), tally.failed(), tally.delayed].map(|count| count.to_string()));
        if self.promise.is_some() {
            row.push(percent(tally.violation()));
            row.push(verdict(level));
        }
        row.push(format!("{} {}", level.measured.windows.len(), level.measured.settled.name()));
        row
    }

    /// The table of each level's workers, if there are several.
    fn workers_table(&self) -> String {
        if self.workers.len() < 2 {
            return String::new();
        }
        let rows = self.levels.iter().flat_map(|level| {
            let all = level.tally().done();
            level.tally().workers.iter().map(move |(worker, part)| {
                let count = part.latencies.count();
                let share = (all > 0).then(|| count as f64 / all as f64);
                let violation = self.promise.and_then(|_| part.violation());
                vec![
                    level.load.to_string(),
                    self.worker(worker.0).to_owned(),
                    count.to_string(),
                    percent(share),
                    ms(part.latencies.quantile_ms(0.5)),
                    ms(part.latencies.quantile_ms(0.99)),
                    percent(violation),
                ]
            })
        });
        let rows: Vec<Vec<String>> = rows.collect();
        if rows.is_empty() {
            return String::new();
        }
        table(&["LOAD", "WORKER", "REQUESTS", "SHARE", "P50", "P99", "VIOLATION"], &rows)
    }

    /// The table of each worker in each window, if traffic moved.
    fn windows_table(&self) -> String {
        let moved = |level: &&Level| level.measured.windows.iter().any(|window| window.moved.is_some());
        let rows = self.levels.iter().filter(moved).flat_map(|level| {
            let windows = level.measured.windows.iter().take(WINDOWS_LISTED_MAX);
            windows.flat_map(|window| {
                window.workers.iter().map(|part| {
                    vec![
                        level.load.to_string(),
                        seconds(window.start_ms),
                        self.worker(part.worker.0).to_owned(),
                        part.done.to_string(),
                        ms(part.p99_ms),
                        percent(part.violation),
                    ]
                })
            })
        });
        let rows: Vec<Vec<String>> = rows.collect();
        if rows.is_empty() {
            return String::new();
        }
        table(&["LOAD", "FROM", "WORKER", "REQUESTS", "P99", "VIOLATION"], &rows)
    }

    fn remarks(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for level in &self.levels {
            let events = level.measured.windows.iter().filter_map(|window| moved_line(window, &self.workers));
            lines.extend(events.map(|line| format!("{}: {line}", level.load)));
            lines.extend(self.level_remarks(level).into_iter().map(|line| format!("{}: {line}", level.load)));
        }
        lines.extend(self.unstable_line());
        for failed in &self.failures {
            lines.push(printable(&format!("first {}: {}", failed.code, failed.text)));
        }
        if self.left_out > 0 {
            lines.push(format!("{} more levels were left out: the threshold was exceeded", self.left_out));
        }
        lines.extend(self.search_line());
        lines
    }

    fn level_remarks(&self, level: &Level) -> Vec<String> {
        let tally = level.tally();
        let mut about = Vec::new();
        if let Some(parts) = tally.parts_ms() {
            let parts = parts.iter().filter(|(_, part_ms)| *part_ms > 0.0);
            let of_all = |(name, part_ms): &(&str, f64)| format!("{name} {}", ms(Some(*part_ms)));
            about.push(format!("on average {}", parts.map(of_all).collect::<Vec<_>>().join(", ")));
        }
        let answered = tally.workers.len();
        about.extend(tally.skew().map(|skew| format!("busiest of {answered} workers over idlest {skew:.2}")));
        let clients = tally.client_items.len();
        about.extend(
            tally.fairness(level.load).map(|index| format!("fairness between {clients} clients (Jain) {index:.4}")),
        );
        let mut lines = Vec::new();
        if !about.is_empty() {
            lines.push(about.join("; "));
        }
        if tally.failed() > 0 {
            let errors: Vec<String> = tally.errors.iter().map(|(code, count)| format!("{count} {code}")).collect();
            lines.push(format!("failed: {}", errors.join(", ")));
        }
        lines.extend(self.warnings(level, tally));
        lines
    }

    /// Warnings that limit the meaning of the figures.
    fn warnings(&self, level: &Level, tally: &Tally) -> Vec<String> {
        let mut lines = Vec::new();
        if tally.not_sent() > 0 {
            let (count, most) = (tally.not_sent(), self.outstanding_max);
            lines.push(format!(
                "not sent at their time: {count}, because {most} were under way (--max-outstanding); counted as failed"
            ));
        }
        if tally.delayed > 0 {
            let after = units::time(std::time::Duration::from_micros(DELAYED_AFTER_US));
            let how = match level.load {
                // A request of a closed loop has no due time, only a time that it took to leave.
                Load::Closed { .. } => format!("took more than {after} to leave"),
                Load::Open { .. } | Load::Replay => format!("left more than {after} after their time"),
            };
            lines.push(format!("requests that {how}: {}; this machine was busy", tally.delayed));
        }
        if tally.overdue > 0 {
            let (unanswered, overdue) = (tally.unanswered, tally.overdue);
            lines.push(format!(
                "under way when it ended: {unanswered}, of which {overdue} beyond the threshold (counted as violations)"
            ));
        }
        if tally.outlasting > 0 {
            let (unanswered, outlasting) = (tally.unanswered, tally.outlasting);
            lines.push(format!(
                "unanswered at the end: {unanswered}, of which {outlasting} had waited longer than the slowest answer took: \
                 the latencies look better than they are"
            ));
        }
        if let Some(since_ms) = level.measured.silent_since_ms() {
            lines.push(format!("nothing was answered after {}: is the mesh still there?", seconds(since_ms)));
        }
        if level.measured.settled == Settled::Stopped {
            lines.push("cut short: the figures are of what was measured until then".to_owned());
        }
        lines
    }

    /// The remark on unstable levels: one line for all of them.
    fn unstable_line(&self) -> Option<String> {
        let is_unstable = |level: &Level| level.measured.settled == Settled::Unstable;
        self.levels.iter().any(is_unstable).then(|| {
            format!(
                "unstable: no {WINDOWS_AGREEING} windows agree within --stability, so the figures are of all; \
                 use a longer --window (some hundred requests), more --windows-max, or less load"
            )
        })
    }

    fn search_line(&self) -> Option<String> {
        let search = self.search.as_ref()?;
        let promise = self.promise?;
        let what = format!(
            "at most {} of requests above {}",
            percent(Some(promise.violation_max)),
            ms(Some(promise.latency_us as f64 / 1e3))
        );
        let open = |rate| Load::Open { rate };
        let is_of = |rate: f64| move |level: &&Level| level.load == Load::Open { rate };
        let found = search.found().and_then(|rate| self.levels.iter().rev().find(is_of(rate)));
        let is_unstable = found.is_some_and(|level| level.measured.settled == Settled::Unstable);
        let unsure = if is_unstable { " (its windows do not agree)" } else { "" };
        Some(match (search.found(), search.broken()) {
            (Some(held), Some(broken)) => {
                format!("highest rate with {what}: {}{unsure}; {} is too much", open(held), open(broken))
            }
            (Some(held), None) => {
                format!("highest rate tried, with {what}: {}{unsure}; no higher one broke it", open(held))
            }
            (None, Some(broken)) => {
                format!("no rate was found with {what}: {} is too much already", open(broken))
            }
            (None, None) => format!("nothing can be said of a rate with {what}: no request was answered"),
        })
    }
}

/// The verdict as text. A promise kept in windows that do not agree may be broken in the next ones.
fn verdict(level: &Level) -> String {
    match (level.verdict, level.measured.settled) {
        (None, _) => "-".to_owned(),
        (Some(Verdict::Held), Settled::Unstable) => "held, unstable".to_owned(),
        (Some(Verdict::Held), Settled::Stopped) => "held, cut short".to_owned(),
        (Some(verdict), _) => verdict.name().to_owned(),
    }
}

/// A line such as `at 15.0 s traffic moved from pi-3 (61% -> 2%) to pi-4 (39% -> 98%)`, if traffic moved.
pub(crate) fn moved_line(window: &Window, workers: &[String]) -> Option<String> {
    let moved = window.moved.as_ref()?;
    let side = |worker: WorkerNo, (before, now): (f64, f64)| {
        let name = workers.get(worker.0 as usize).map_or("?", String::as_str);
        format!("{} ({:.0}% -> {:.0}%)", printable(name), before * 100.0, now * 100.0)
    };
    let (from, to) = (side(moved.from, moved.from_share), side(moved.to, moved.to_share));
    Some(format!("at {} traffic moved from {from} to {to}", seconds(window.start_ms + window.length_ms)))
}

/// The current window so far: `window 3 40%: 120 answered, 8 under way, p99 12.3 ms, 2.5% too late`.
pub(crate) fn progress_line(measurement: &Measurement, outstanding: usize, part: f64) -> String {
    let tally = measurement.current();
    let window = measurement.windows_ended() + 1;
    let what = if measurement.is_warming() { "warm-up".to_owned() } else { format!("window {window}") };
    let late = tally.violation().map(|part| format!(", {} too late", percent(Some(part)))).unwrap_or_default();
    let failed = if tally.failed() > 0 { format!(", {} failed", tally.failed()) } else { String::new() };
    let (done, p99, part) = (tally.done(), ms(tally.latencies.quantile_ms(0.99)), (part * 100.0).min(100.0));
    format!("{what} {part:.0}%: {done} answered, {outstanding} under way, p99 {p99}{late}{failed}")
}

fn seconds(at_ms: f64) -> String {
    format!("{:.1} s", at_ms / 1e3)
}

/// A time such as `12.3 ms` or `850 µs`; `-` if there is none.
pub(crate) fn ms(ms: Option<f64>) -> String {
    match ms {
        Some(ms) => units::time(std::time::Duration::from_micros((ms * 1e3).round() as u64)),
        None => "-".to_owned(),
    }
}

pub(crate) fn percent(part: Option<f64>) -> String {
    match part {
        // Rounding must not turn something into nothing.
        Some(part) if part > 0.0 && part < 0.0005 => "<0.1%".to_owned(),
        Some(part) => format!("{:.1}%", part * 100.0),
        None => "-".to_owned(),
    }
}

/// A rate with one decimal, or with three digits that count if that is more: a slow model's is not nothing.
fn rate(rate: Option<f64>) -> String {
    match rate {
        Some(rate) if rate > 0.0 => format!("{rate:.*}", (2.0 - rate.log10().floor()).clamp(1.0, 9.0) as usize),
        Some(rate) => format!("{rate:.1}"),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            measurement::{Rules, Warmup},
            range::SearchRange,
            report::tests::*,
            sample::{End, Sample},
            search::Search,
            tally::tests::answered,
        },
        *,
    };

    #[test]
    fn the_live_line_tells_the_window_so_far() {
        let mut measurement = Measurement::new(Rules { warmup: Warmup::For(500_000), ..rules() });
        assert_eq!(progress_line(&measurement, 4, 0.25), "warm-up 25%: 0 answered, 4 under way, p99 -");
        measurement.end_window(500_000);
        [10, 20, 90].into_iter().for_each(|ms| measurement.add(&answered(0, ms)));
        let told = progress_line(&measurement, 2, 0.5);
        assert_eq!(told, "window 1 50%: 3 answered, 2 under way, p99 90 ms, 33.3% too late");
        measurement.end_window(1_500_000);
        measurement.add(&Sample { end: End::Failed("BUSY"), ..answered(0, 1) });
        let told = progress_line(&measurement, 0, 1.2);
        assert_eq!(told, "window 2 100%: 0 answered, 0 under way, p99 -, 100.0% too late, 1 failed");
    }

    #[test]
    fn a_level_is_a_row_and_what_needs_a_word_has_a_line() {
        let text = report(vec![level(Load::Open { rate: 100.0 }, 90, promise())], promise()).to_text(Columns::All);
        let row = text.lines().nth(1).unwrap();
        assert!(row.starts_with("100/s   100.0    100.0     90 ms"), "{text}");
        assert!(row.contains("100.0%      broken") && row.ends_with("3 stable"), "{text}");
        assert!(text.contains("pi-4     120        40.0%"), "{text}");
        assert!(
            text.contains("busiest of 2 workers over idlest 1.50; fairness between 2 clients (Jain) 0.5000"),
            "{text}"
        );
    }

    #[test]
    fn a_terminal_of_a_hundred_columns_is_enough() {
        let slow = |load| level(load, 123_456, promise());
        for promise in [promise(), None] {
            let levels = vec![slow(Load::Closed { concurrency: 1024 }), slow(Load::Open { rate: 12_345.678 })];
            let text = report(levels, promise).to_text(Columns::Main);
            let table: Vec<&str> = text.lines().take(3).collect();
            assert!(table.iter().all(|line| line.chars().count() <= 100), "{text}");
            assert!(["P50", "P99.9", "FAILED"].iter().all(|heading| table[0].contains(heading)), "{text}");
        }
    }

    #[test]
    fn what_held_while_it_was_unstable_is_not_told_as_certain() {
        let verdict_of = |settled| {
            let mut level = level(Load::Open { rate: 100.0 }, 10, promise());
            (level.measured.settled, level.verdict) = (settled, Some(Verdict::Held));
            verdict(&level)
        };
        let told = [Settled::Stable, Settled::Unstable, Settled::Stopped].map(verdict_of);
        assert_eq!(told, ["held", "held, unstable", "held, cut short"]);
    }

    #[test]
    fn a_closed_loop_has_no_time_to_be_late_for() {
        let line = |load| {
            let mut level = level(load, 10, promise());
            level.measured.tally.delayed = 2;
            report(vec![level], None).to_text(Columns::All)
        };
        let closed = line(Load::Closed { concurrency: 4 });
        assert!(closed.contains("requests that took more than 5.0 ms to leave: 2; this machine was busy"), "{closed}");
        assert!(line(Load::Replay).contains("requests that left more than 5.0 ms after their time: 2"));
    }

    #[test]
    fn nothing_measured_is_told_without_figures() {
        let mut nothing = level(Load::Closed { concurrency: 1 }, 1, promise());
        nothing.measured.tally = Tally::new(1, promise());
        nothing.verdict = Some(Verdict::Empty);
        let text = report(vec![nothing], promise()).to_text(Columns::All);
        let row = text.lines().nth(1).unwrap();
        assert!(row.starts_with("1 at a time   -        -         -") && row.contains("no verdict"), "{text}");
        assert_eq!(report(Vec::new(), None).to_text(Columns::All), "");
    }

    #[test]
    fn a_move_of_traffic_is_told_with_both_sides() {
        let mut level = level(Load::Open { rate: 100.0 }, 10, promise());
        let moved = super::super::shares::Moved {
            from: WorkerNo(0),
            from_share: (0.61, 0.02),
            to: WorkerNo(1),
            to_share: (0.39, 0.98),
        };
        level.measured.windows[1].moved = Some(moved);
        let text = report(vec![level], promise()).to_text(Columns::All);
        assert!(text.contains("100/s: at 2.0 s traffic moved from pi-3 (61% -> 2%) to pi-4 (39% -> 98%)"), "{text}");
        assert!(text.contains("LOAD    FROM    WORKER   REQUESTS   P99     VIOLATION"), "{text}");
    }

    #[test]
    fn a_slow_rate_is_not_nothing_either() {
        let told = [None, Some(0.0), Some(0.012_34), Some(0.5), Some(2.0 / 3.0), Some(9.25), Some(1234.56)].map(rate);
        assert_eq!(told, ["-", "0.0", "0.0123", "0.500", "0.667", "9.25", "1234.6"]);
    }

    #[test]
    fn a_found_rate_is_told_as_its_level_is() {
        let mut search = Search::new(SearchRange { start: 0.25, bound: 1.0, resolution: 0.125 });
        [(0.25, Verdict::Held), (0.375, Verdict::Broken)].into_iter().for_each(|(rate, is)| search.judged(rate, is));
        let level = level(Load::Open { rate: 0.25 }, 10, promise());
        let text = Report { search: Some(search), ..report(vec![level], promise()) }.to_text(Columns::All);
        assert!(text.contains("50 ms: 0.25/s; 0.375/s is too much") && text.contains("\n0.25/s "), "{text}");
    }

    #[test]
    fn small_parts_are_not_nothing() {
        assert_eq!([None, Some(0.0), Some(1e-5), Some(0.05)].map(percent), ["-", "0.0%", "<0.1%", "5.0%"]);
    }
}
