//! The result of a bench: the JSON document, the rows of the CSV file, the picture. Owns their field names, which are a
//! promise. Never measures. The text for people is in `text`.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{
    measurement::{Measured, Settled, Window, WorkerWindow},
    plot::{self, Line, Picture},
    search::Search,
    shares::Moved,
    sweep::Load,
    tally::{DELAYED_AFTER_US, QUANTILES, Tally},
    verdict::{Promise, Verdict},
};
use crate::{
    exit::{self, Failed},
    stop::Stop,
};

/// One level and its result.
#[derive(Debug)]
pub(crate) struct Level {
    pub(crate) load: Load,
    pub(crate) measured: Measured,
    /// `None` without a promise.
    pub(crate) verdict: Option<Verdict>,
}

/// The report of a whole bench.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) promise: Option<Promise>,
    pub(crate) window_us: u64,
    pub(crate) outstanding_max: usize,
    pub(crate) levels: Vec<Level>,
    /// Number of levels not measured because an earlier one broke the promise.
    pub(crate) left_out: usize,
    /// The search, if there was one.
    pub(crate) search: Option<Search>,
    /// Names of the workers by number.
    pub(crate) workers: Vec<String>,
    /// The first failure of each code, in the order in which they came.
    pub(crate) failures: Vec<Failed>,
    pub(crate) stopped: Option<Stop>,
}

impl Level {
    pub(crate) fn tally(&self) -> &Tally {
        &self.measured.tally
    }

    /// The level's value on the load axis.
    fn load_value(&self) -> f64 {
        match self.load {
            Load::Closed { concurrency } => f64::from(concurrency),
            Load::Open { rate } => rate,
            Load::Replay => self.tally().requests_per_s().unwrap_or(0.0),
        }
    }
}

impl Settled {
    /// The name as people and scripts see it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Unstable => "unstable",
            Self::Replayed => "replayed",
            Self::Stopped => "stopped",
        }
    }
}

impl Report {
    pub(crate) fn worker(&self, index: u32) -> &str {
        self.workers.get(index as usize).map_or("?", String::as_str)
    }

    /// The exit code. Any figures are a success, but a promise that no level kept is not, nor a mesh that fell silent.
    pub(crate) fn exit(&self) -> u8 {
        let is_answered = self.levels.iter().any(|level| level.tally().done() > 0);
        let is_kept = self.levels.iter().any(|level| level.verdict == Some(Verdict::Held));
        match (self.stopped, self.failures.first()) {
            (Some(stop), _) => stop.failed().exit,
            (None, Some(first)) if !is_answered => first.exit,
            _ if self.levels.last().is_some_and(|level| level.measured.silent_since_ms().is_some()) => {
                exit::UNREACHABLE
            }
            _ if self.promise.is_some() && !is_kept => exit::EXPIRED,
            _ => exit::OK,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "model": self.model,
            "window_ms": self.window_us as f64 / 1e3,
            "latency_threshold_ms": self.promise.map(|promise| promise.latency_us as f64 / 1e3),
            "max_violation": self.promise.map(|promise| promise.violation_max),
            "max_outstanding": self.outstanding_max,
            "delayed_after_ms": DELAYED_AFTER_US as f64 / 1e3,
            "levels": self.levels.iter().map(|level| self.level_json(level)).collect::<Vec<_>>(),
            "levels_left_out": self.left_out,
            "highest_rate": self.search.as_ref().map(|search| json!({
                "held": search.found(),
                "broken": search.broken(),
            })),
            "failures": self.failures.iter().map(|failed| json!({ "code": failed.code, "text": failed.text })).collect::<Vec<_>>(),
            "stopped": self.stopped.map(|stop| stop.failed().text),
        })
    }

    fn level_json(&self, level: &Level) -> Value {
        let (tally, measured) = (level.tally(), &level.measured);
        let latency = QUANTILES.map(|(name, quantile)| (name, tally.latencies.quantile_ms(quantile)));
        let mut latency: serde_json::Map<String, Value> =
            latency.into_iter().map(|(name, ms)| (name.to_owned(), json!(ms))).collect();
        latency.insert("mean".to_owned(), json!(tally.latencies.mean_ms()));
        latency.insert("max".to_owned(), json!(tally.latencies.max_ms()));
        let (concurrency, rate) = match level.load {
            Load::Closed { concurrency } => (Some(concurrency), None),
            Load::Open { rate } => (None, Some(rate)),
            Load::Replay => (None, None),
        };
        let worker = |(worker, part): (&super::sample::WorkerNo, &super::tally::WorkerTally)| {
            json!({
                "name": self.worker(worker.0),
                "requests": part.latencies.count(),
                "p50_ms": part.latencies.quantile_ms(0.5),
                "p99_ms": part.latencies.quantile_ms(0.99),
                "violation": self.promise.and_then(|_| part.violation()),
            })
        };
        json!({
            "load": level.load.to_string(),
            "concurrency": concurrency,
            "rate": rate,
            "settled": measured.settled.name(),
            "verdict": level.verdict.map(Verdict::name),
            "measured_ms": tally.length_ms(),
            "requests": tally.done(),
            "items": tally.items(),
            "requests_per_s": tally.requests_per_s(),
            "items_per_s": tally.items_per_s(),
            "latency_ms": latency,
            "parts_ms": tally.parts_ms().map(|parts| parts.into_iter().map(|(name, ms)| (name.to_owned(), json!(ms))).collect::<serde_json::Map<_, _>>()),
            "violation": tally.violation(),
            "late": tally.late,
            "failed": tally.failed(),
            "errors": tally.errors,
            "not_sent": tally.not_sent(),
            "delayed": tally.delayed,
            "unanswered": tally.unanswered,
            "overdue": tally.overdue,
            "outlasting": tally.outlasting,
            "silent_since_ms": measured.silent_since_ms(),
            "clients": { "items": tally.client_items, "jain": tally.fairness(level.load) },
            "workers": tally.workers.iter().map(worker).collect::<Vec<_>>(),
            "skew": tally.skew(),
            "windows": measured.windows.iter().map(|window| self.window_json(window)).collect::<Vec<_>>(),
        })
    }

    fn window_json(&self, window: &Window) -> Value {
        let worker = |part: &WorkerWindow| {
            json!({
                "name": self.worker(part.worker.0),
                "requests": part.done,
                "p99_ms": part.p99_ms,
                "violation": part.violation,
            })
        };
        json!({
            "start_ms": window.start_ms,
            "length_ms": window.length_ms,
            "requests": window.done,
            "failed": window.failed,
            "requests_per_s": window.requests_per_s,
            "p50_ms": window.p50_ms,
            "p99_ms": window.p99_ms,
            "violation": window.violation,
            "workers": window.workers.iter().map(worker).collect::<Vec<_>>(),
            "moved": window.moved.as_ref().map(|moved| self.moved_json(moved)),
        })
    }

    fn moved_json(&self, moved: &Moved) -> Value {
        let side = |worker: u32, (before, now): (f64, f64)| json!({ "worker": self.worker(worker), "before": before, "now": now });
        json!({ "from": side(moved.from.0, moved.from_share), "to": side(moved.to.0, moved.to_share) })
    }

    /// The CSV file: a heading and a row per level. A missing figure is an empty field.
    pub(crate) fn to_csv(&self) -> String {
        let mut text =
            "load,concurrency,rate,settled,verdict,requests,items,requests_per_s,items_per_s,mean_ms,".to_owned();
        for (name, _) in QUANTILES {
            let _ = write!(text, "{name}_ms,");
        }
        text.push_str("max_ms,violation,late,failed,not_sent,delayed,unanswered,overdue,outlasting,jain,skew\n");
        let figure = |figure: Option<f64>| figure.map_or_else(String::new, |figure| format!("{figure:.6}"));
        for level in &self.levels {
            let tally = level.tally();
            let (concurrency, rate) = match level.load {
                Load::Closed { concurrency } => (concurrency.to_string(), String::new()),
                Load::Open { rate } => (String::new(), rate.to_string()),
                Load::Replay => Default::default(),
            };
            let latencies = [tally.latencies.mean_ms()]
                .into_iter()
                .chain(QUANTILES.map(|(_, quantile)| tally.latencies.quantile_ms(quantile)))
                .chain([tally.latencies.max_ms()]);
            let mut cells = vec![
                level.load.to_string(),
                concurrency,
                rate,
                level.measured.settled.name().to_owned(),
                level.verdict.map_or("", Verdict::name).to_owned(),
                tally.done().to_string(),
                tally.items().to_string(),
                figure(tally.requests_per_s()),
                figure(tally.items_per_s()),
            ];
            cells.extend(latencies.map(figure));
            cells.push(figure(tally.violation()));
            let open = [tally.unanswered, tally.overdue, tally.outlasting];
            let counts = [tally.late, tally.failed(), tally.not_sent(), tally.delayed].into_iter().chain(open);
            cells.extend(counts.map(|count| count.to_string()));
            cells.extend([figure(tally.fairness(level.load)), figure(tally.skew())]);
            text.push_str(&cells.join(","));
            text.push('\n');
        }
        text
    }

    /// The picture of latency over load.
    pub(crate) fn to_svg(&self) -> String {
        let mut levels: Vec<&Level> = self.levels.iter().collect();
        levels.sort_by(|a, b| a.load_value().total_cmp(&b.load_value()));
        let line = |(name, quantile): (&'static str, f64)| Line {
            name,
            points: levels
                .iter()
                .filter_map(|level| Some((level.load_value(), level.tally().latencies.quantile_ms(quantile)?)))
                .collect(),
        };
        let load = match self.levels.first().map(|level| level.load) {
            Some(Load::Closed { .. }) => "requests at a time",
            Some(Load::Replay) => "requests answered per second",
            _ => "requests per second",
        };
        plot::svg(&Picture {
            title: format!("{}: latency over load", self.model),
            load,
            lines: [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)].map(line).to_vec(),
            threshold_ms: self.promise.map(|promise| promise.latency_us as f64 / 1e3),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{
        super::{
            measurement::{Measurement, Rules, Until, Warmup},
            range::SearchRange,
            tally::tests::{answered, by_worker},
        },
        *,
    };

    pub(crate) fn promise() -> Option<Promise> {
        Some(Promise { latency_us: 50_000, violation_max: 0.05 })
    }

    pub(crate) fn rules() -> Rules {
        Rules {
            window_us: 1_000_000,
            warmup: Warmup::For(0),
            until: Until::Stable { windows_max: 3 },
            stability: 0.1,
            quantile: 0.95,
            promise: promise(),
            moved_min: 0.2,
            clients: 2,
        }
    }

    /// A level of three windows of a second, each with 60 answers of `latency_ms` from one worker and 40 from another.
    pub(crate) fn level(load: Load, latency_ms: u64, promise: Option<Promise>) -> Level {
        let mut measurement = Measurement::new(Rules { promise, ..rules() });
        for window in 1..=3 {
            (0..60).for_each(|_| measurement.add(&answered(0, latency_ms)));
            (0..40).for_each(|_| measurement.add(&by_worker(1, answered(0, latency_ms))));
            measurement.end_window(window * 1_000_000);
        }
        let measured = measurement.finish(3_000_000, false, &[]);
        let verdict = promise.map(|promise| promise.judge(measured.tally.violation()));
        Level { load, measured, verdict }
    }

    pub(crate) fn report(levels: Vec<Level>, promise: Option<Promise>) -> Report {
        Report {
            model: "m.onnx".into(),
            promise,
            window_us: 1_000_000,
            outstanding_max: 1024,
            levels,
            left_out: 0,
            search: None,
            workers: vec!["pi-3".into(), "pi-4".into()],
            failures: Vec::new(),
            stopped: None,
        }
    }

    #[test]
    fn the_document_and_the_table_of_files_agree() {
        let levels =
            vec![level(Load::Open { rate: 100.0 }, 10, promise()), level(Load::Open { rate: 200.0 }, 90, promise())];
        let report = report(levels, promise());
        let document = report.to_json();
        let csv = report.to_csv();
        let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let heading = lines.next().unwrap();
        for (index, row) in lines.enumerate() {
            assert_eq!(row.len(), heading.len());
            let cell = |name: &str| row[heading.iter().position(|heading| *heading == name).unwrap()];
            let level = &document["levels"][index];
            assert_eq!(cell("rate").parse::<f64>().ok(), level["rate"].as_f64());
            assert_eq!(cell("requests"), level["requests"].to_string());
            assert_eq!(cell("verdict"), level["verdict"].as_str().unwrap());
            let (p99, in_document) =
                (cell("p99_ms").parse::<f64>().unwrap(), level["latency_ms"]["p99"].as_f64().unwrap());
            assert!((p99 - in_document).abs() < 1e-6);
        }
        assert_eq!(document["levels"][1]["verdict"], "broken");
        assert_eq!(document["levels"][0]["skew"], 1.5);
        assert_eq!(document["levels"][0]["windows"].as_array().unwrap().len(), 3);
        assert!(report.to_svg().contains("m.onnx: latency over load"));
    }

    #[test]
    fn figures_are_a_success_and_a_broken_promise_is_not() {
        let held = || level(Load::Replay, 10, promise());
        let broken = || level(Load::Replay, 90, promise());
        assert_eq!(report(vec![held(), broken()], promise()).exit(), exit::OK);
        assert_eq!(report(vec![broken()], promise()).exit(), exit::EXPIRED);
        assert_eq!(report(vec![level(Load::Replay, 90, None)], None).exit(), exit::OK);
        assert_eq!(Report { stopped: Some(Stop::CtrlC), ..report(vec![held()], promise()) }.exit(), exit::INTERRUPTED);
        let failed = Failed::new(exit::NO_PLACE, "BUSY", "the queue is full");
        assert_eq!(Report { failures: vec![failed], ..report(Vec::new(), None) }.exit(), exit::NO_PLACE);
    }

    #[test]
    fn a_search_tells_what_held_and_what_did_not() {
        let mut search = Search::new(SearchRange { start: 10.0, bound: 100.0, resolution: 10.0 });
        search.judged(10.0, Verdict::Held);
        search.judged(20.0, Verdict::Broken);
        let report = Report { search: Some(search), ..report(Vec::new(), promise()) };
        assert_eq!(report.to_json()["highest_rate"], json!({ "held": 10.0, "broken": 20.0 }));
    }
}
