//! The flags of `bench` and their meaning together. Owns names, defaults and checks between flags. Never runs them.

mod unused;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use mesh_sdk::{Lane, Slo};
use proto_msgs::limits;

use super::{
    measurement::{Rules, Until, WINDOWS_AGREEING, Warmup},
    range::{self, CONCURRENCY_MAX, Levels, SearchRange},
    schedule::{self, Arrival, Distribution},
    sweep::{Load, Sweep},
    verdict::Promise,
};
use crate::{
    exit::{self, Failed},
    flags::{DemandFlags, FormFlags, LabelFlags, PathFlags, lane_parser, parse_deadline},
    stages::{self, Then},
    units,
};

/// Most connections of one bench: each has its own sockets and thread.
const CLIENTS_MAX: i64 = 256;

/// Shortest window: a shorter one holds a handful of requests at best.
const WINDOW_MIN: Duration = Duration::from_millis(50);

/// Most unanswered requests unless `--max-outstanding` says otherwise: far beyond what a mesh answers in time.
const OUTSTANDING_MAX_DEFAULT: u32 = 1024;

/// Seed unless `--seed` says otherwise: two benches of the same command send at the same times.
const SEED_DEFAULT: u64 = 1;

/// Warm-up unless `--warmup` says otherwise: a loaded model's first answers are over by then.
const WARMUP_DEFAULT: Warmup = Warmup::For(1_000_000);

/// Windows of a level unless `--windows-max` says otherwise: a minute of the usual ones.
const WINDOWS_MAX_DEFAULT: u32 = 10;

/// Difference between windows that agree unless `--stability` says otherwise, as other load tools have it.
const STABILITY_DEFAULT: f64 = 0.1;

/// Percentile of latency that must agree unless `--percentile` says otherwise: few requests per window decide about it.
const PERCENTILE_DEFAULT: f64 = 95.0;

/// Part of requests that may violate the threshold unless `--max-violation` says otherwise: as for `submit --slo`.
const MAX_VIOLATION_DEFAULT: f64 = 0.05;

/// Longest window: a longer one is a typing error.
const WINDOW_MAX: Duration = Duration::from_secs(3600);

const EXAMPLES: &str = "\
Examples:
  mesh-client bench model.onnx x.npy --concurrency 1:64:x2
  mesh-client bench model.onnx x.npy --rate 50:400:50 --distribution poisson --latency-threshold 50ms --plot latency.svg
  mesh-client bench model.onnx photos/ --find-max-rate 10:1000:5 --latency-threshold 100ms --max-violation 1%
  mesh-client bench model.onnx x.npy --rate 200 --slo 50ms --max-violation 5% --windows-max 60
  mesh-client bench model.onnx x.npy --concurrency 8 --clients 4 --items 8 --json | jq '.levels[0].clients.jain'
  mesh-client bench model.onnx x.npy --schedule monday.txt --csv monday.csv

What is measured:
The latency of a request counts from the time at which it should have been sent: a rate or a schedule never waits for \
earlier answers, and a request that was sent late does not look fast. At most --max-outstanding requests are under way; \
a request that is due beyond that is not sent, counts as failed (NOT_SENT) at its time, and is reported.
A level is warmed up, then measured in windows until the last three agree within --stability; its figures are those \
of the last three windows. With a schedule every window counts. A request violates --latency-threshold (or --slo) if it \
is answered later than that, fails, or is older than that when the level ends. A window or level in which no request \
ended has no verdict. A sweep stops after the first level with more violations than --max-violation.
Before anything is measured each client sends one request: a mistake in model or input shows at once.";

/// Put a load on the mesh and measure what comes of it.
#[derive(Args, Debug)]
#[command(after_help = help())]
pub(crate) struct Bench {
    /// The model: a .tflite or .onnx file
    pub(crate) model: PathBuf,
    /// Input files, folders, patterns or name=path, as for `submit`; several items are sent in turn
    #[arg(value_name = "INPUT")]
    pub(crate) inputs: Vec<String>,
    #[command(flatten)]
    load: LoadFlags,
    #[command(flatten)]
    pacing: PacingFlags,
    #[command(flatten)]
    pub(crate) request: RequestFlags,
    #[command(flatten)]
    measuring: MeasuringFlags,
    #[command(flatten)]
    pub(crate) files: FileFlags,
    #[command(flatten)]
    pub(crate) labels: LabelFlags,
    #[command(flatten)]
    pub(crate) demands: DemandFlags,
    #[command(flatten)]
    pub(crate) forms: FormFlags,
    #[command(flatten)]
    pub(crate) path: PathFlags,
}

/// What load: one of these.
#[derive(Args, Debug)]
#[command(next_help_heading = "Load (one of)")]
#[group(multiple = false)]
struct LoadFlags {
    /// Closed loop: this many requests under way (4, 1:16, 1:16:5, 1:64:x2) [default: one for each client]
    #[arg(long, value_name = "A[:B[:STEP]]", value_parser = range::parse_concurrency)]
    concurrency: Option<Levels<u32>>,
    /// Open loop: this many requests per second, whatever becomes of them (200, 100:500:50, 10:1000:x2)
    #[arg(long, value_name = "A[:B[:STEP]]", value_parser = range::parse_rates)]
    rate: Option<Levels<f64>>,
    /// Open loop: at the times in FILE; each line holds ms from the beginning and optionally a number of items
    #[arg(long, value_name = "FILE")]
    schedule: Option<PathBuf>,
    /// Search for the highest rate that keeps --latency-threshold (10:1000:5); the resolution is BOUND/50 if not said
    #[arg(long, value_name = "START:BOUND[:RESOLUTION]", value_parser = range::parse_search)]
    find_max_rate: Option<SearchRange>,
}

/// How it is put on the mesh.
#[derive(Args, Debug)]
#[command(next_help_heading = "Pacing")]
struct PacingFlags {
    /// Times between the requests of a rate [default: constant]
    #[arg(long, value_enum)]
    distribution: Option<Distribution>,
    /// The same seed gives the same poisson times again [default: 1]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The most unanswered requests of an open loop; further ones are counted but not sent [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_outstanding: Option<u32>,
    /// Connections, each a client of its own to the mesh; requests go over them in turn
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=CLIENTS_MAX))]
    clients: u16,
}

/// What each request is.
#[derive(Args, Debug)]
#[command(next_help_heading = "Requests")]
pub(crate) struct RequestFlags {
    /// Items in each request
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::ITEMS_MAX)))]
    pub(crate) items: u32,
    /// The lane (default: by the number of items)
    #[arg(long, value_parser = lane_parser())]
    pub(crate) lane: Option<Lane>,
    /// 0 (whenever there is room) to 100 (first of all)
    #[arg(long, default_value_t = limits::PRIORITY_DEFAULT, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) priority: u8,
    /// A request fails if there is no answer within this time (500ms, 2m)
    #[arg(long, value_name = "TIME", value_parser = parse_deadline)]
    pub(crate) deadline: Option<Duration>,
    /// The promised latency: the broker moves traffic away from workers that break it. Also sets --latency-threshold
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    slo: Option<Duration>,
    /// The part of requests that may violate --slo (in steps of 0.1%) or --latency-threshold [default: 5%]
    #[arg(long, value_name = "PERCENT", value_parser = range::parse_percent)]
    max_violation: Option<f64>,
    /// One more model, which takes what the one before it gave; may be repeated
    #[arg(long, value_name = "[NAME=]MODEL", value_parser = stages::parse)]
    pub(crate) then: Vec<Then>,
}

/// When it is enough.
#[derive(Args, Debug)]
#[command(next_help_heading = "Measuring")]
struct MeasuringFlags {
    /// Not counted at the beginning of each level: a time, or `stable` to wait until windows agree [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = parse_warmup)]
    warmup: Option<Warmup>,
    /// Length of a window
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = units::duration)]
    window: Duration,
    /// A level ends unstable after this many windows [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(WINDOWS_AGREEING as i64..=10_000))]
    windows_max: Option<u32>,
    /// Windows agree if throughput and latency differ by at most this [default: 10%]
    #[arg(long, value_name = "PERCENT", value_parser = range::parse_percent)]
    stability: Option<f64>,
    /// The percentile of latency that must agree [default: 95]
    #[arg(long, value_name = "P", value_parser = parse_percentile)]
    percentile: Option<f64>,
    /// A request that takes longer violates it (default: --slo)
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    latency_threshold: Option<Duration>,
    /// Report when a worker's share of the answers falls by this many points
    #[arg(long, value_name = "PERCENT", default_value = "20%", value_parser = range::parse_percent)]
    moved: f64,
}

/// Where figures go.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub(crate) struct FileFlags {
    /// A row for each level
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Latency over load as a picture
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

/// The combined meaning of the flags.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) sweep: Sweep,
    pub(crate) rules: Rules,
    pub(crate) slo: Option<Slo>,
    pub(crate) distribution: Distribution,
    pub(crate) seed: u64,
    pub(crate) outstanding_max: usize,
    /// The requests of `--schedule`.
    pub(crate) replay: Vec<Arrival>,
}

impl Bench {
    /// Checks the combination of flags.
    ///
    /// # Errors
    /// If flags contradict each other; the text names them and a way out.
    pub(crate) fn plan(&self) -> Result<Plan, Failed> {
        self.check()?;
        let Self { load, pacing, request, measuring, .. } = self;
        let replay = load.schedule.as_ref().map_or(Ok(Vec::new()), |path| read_schedule(path, request.items))?;
        let violation_max = request.violation_max();
        let latency = measuring.latency_threshold.or(request.slo);
        let promise = latency.map(|latency| Promise { latency_us: micros(latency), violation_max });
        let is_replay = load.schedule.is_some();
        let windows_max = measuring.windows_max.unwrap_or(WINDOWS_MAX_DEFAULT);
        let until = if is_replay { Until::Replayed } else { Until::Stable { windows_max } };
        let rules = Rules {
            window_us: micros(measuring.window),
            // A replay starts with its first line: the file itself contains the warm-up.
            warmup: if is_replay { Warmup::For(0) } else { measuring.warmup.unwrap_or(WARMUP_DEFAULT) },
            until,
            stability: measuring.stability.unwrap_or(STABILITY_DEFAULT),
            quantile: measuring.percentile.unwrap_or(PERCENTILE_DEFAULT) / 100.0,
            promise,
            moved_min: measuring.moved,
            clients: pacing.clients,
        };
        let slo = request.slo.map(|latency| Slo {
            latency_ms: latency.as_millis() as u32,
            max_violation_permille: units::whole_permille(violation_max).unwrap_or_default(),
        });
        let distribution = pacing.distribution.unwrap_or_default();
        let seed = pacing.seed.unwrap_or(SEED_DEFAULT);
        let outstanding_max = pacing.max_outstanding.unwrap_or(OUTSTANDING_MAX_DEFAULT) as usize;
        Ok(Plan { sweep: self.sweep(), rules, slo, distribution, seed, outstanding_max, replay })
    }

    /// The file of `--schedule`.
    pub(crate) fn schedule(&self) -> Option<&PathBuf> {
        self.load.schedule.as_ref()
    }

    fn sweep(&self) -> Sweep {
        let LoadFlags { concurrency, rate, schedule, find_max_rate } = &self.load;
        match (concurrency, rate, schedule, find_max_rate) {
            (_, Some(Levels(rates)), ..) => Sweep::over(rates.iter().map(|rate| Load::Open { rate: *rate })),
            (_, _, Some(_), _) => Sweep::over([Load::Replay]),
            (.., Some(range)) => Sweep::search(*range),
            (Some(Levels(levels)), ..) => {
                Sweep::over(levels.iter().map(|concurrency| Load::Closed { concurrency: *concurrency }))
            }
            (None, None, None, None) => Sweep::over([Load::Closed { concurrency: u32::from(self.pacing.clients) }]),
        }
    }

    fn check(&self) -> Result<(), Failed> {
        let wrong = |text: String| Err(Failed::new(exit::USAGE, "USAGE", text));
        let Self { load, pacing, request, measuring, files, .. } = self;
        for (flag, file) in [("--csv", &files.csv), ("--plot", &files.plot)] {
            if file.as_deref() == Some(Path::new("-")) {
                return wrong(format!(
                    "{flag} - is standard output, where the report goes: name a file (./- for one of that name)"
                ));
            }
        }
        if files.csv.is_some() && files.csv == files.plot {
            return wrong("--csv and --plot name the same file: one would overwrite the other".to_owned());
        }
        if let Some(unused) = unused::find(self) {
            return wrong(unused);
        }
        let clients = u32::from(pacing.clients);
        if let Some(fewest) = load.concurrency.as_ref().and_then(|levels| levels.0.iter().min())
            && *fewest < clients
        {
            return wrong(format!(
                "--concurrency {fewest} is less than one request for each of --clients {clients}: begin at {clients} or more"
            ));
        }
        if load.find_max_rate.is_some() && measuring.latency_threshold.is_none() && request.slo.is_none() {
            return wrong("--find-max-rate needs to know what must hold: add --latency-threshold 50ms".to_owned());
        }
        if !(WINDOW_MIN..=WINDOW_MAX).contains(&measuring.window) {
            let (least, most, got) = (units::time(WINDOW_MIN), units::time(WINDOW_MAX), units::time(measuring.window));
            return wrong(format!("--window {got} is out of range: use {least} to {most}"));
        }
        if measuring.stability == Some(0.0) || measuring.moved == 0.0 {
            return wrong("--stability and --moved must be above 0%: no two windows are the same".to_owned());
        }
        for (flag, time) in [("--slo", request.slo), ("--latency-threshold", measuring.latency_threshold)] {
            if time.is_some_and(|time| time.is_zero() || time > WINDOW_MAX) {
                return wrong(format!(
                    "{flag} is out of range: use more than 0 and at most {}",
                    units::time(WINDOW_MAX)
                ));
            }
        }
        if request.slo.is_some_and(|slo| slo.as_millis() == 0) {
            return wrong("--slo is told to the broker in whole milliseconds: use at least 1ms".to_owned());
        }
        if request.slo.is_some() && units::whole_permille(request.violation_max()).is_none() {
            let text = "--max-violation is told to the broker with --slo, in steps of 0.1%: write fewer digits, or use \
                        --latency-threshold in place of --slo";
            return wrong(text.to_owned());
        }
        debug_assert!(clients <= CONCURRENCY_MAX, "so that a concurrency that fits exists");
        Ok(())
    }
}

impl RequestFlags {
    fn violation_max(&self) -> f64 {
        self.max_violation.unwrap_or(MAX_VIOLATION_DEFAULT)
    }
}

fn read_schedule(path: &Path, items: u32) -> Result<Vec<Arrival>, Failed> {
    let failed = |why: &dyn std::fmt::Display| {
        Failed::new(exit::BAD_INPUT, "BAD_INPUT", format!("schedule {}: {why}", path.display()))
    };
    let text = fs::read_to_string(path).map_err(|error| failed(&error))?;
    schedule::parse(&text, items, limits::ITEMS_MAX).map_err(|error| failed(&error))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn parse_warmup(text: &str) -> Result<Warmup, String> {
    match text {
        "stable" => Ok(Warmup::UntilStable),
        text => units::duration(text).map(|time| Warmup::For(micros(time))).map_err(|why| format!("{why}, or stable")),
    }
}

fn parse_percentile(text: &str) -> Result<f64, String> {
    match text.trim_start_matches(['p', 'P']).parse::<f64>() {
        Ok(percentile) if percentile > 0.0 && percentile < 100.0 => Ok(percentile),
        _ => Err(format!("'{text}' is not a percentile: write 50, 95 or 99.9")),
    }
}

fn help() -> String {
    format!(
        "{EXAMPLES}\n\n{}\n\
        For bench: 0 if anything was measured (failed requests are part of the figures); 7 if there is a threshold and \
        no level kept it; if no request was answered, the code of the first failure.",
        exit::HELP
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        bench: Bench,
    }

    fn parse(line: &str) -> Result<Bench, clap::Error> {
        let words = ["bench", "m.onnx", "x.npy"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.bench)
    }

    pub(super) fn plan(line: &str) -> Result<Plan, String> {
        parse(line).unwrap().plan().map_err(|failed| failed.text)
    }

    #[test]
    fn without_flags_one_request_follows_the_other() {
        let plan = plan("").unwrap();
        assert_eq!(plan.sweep.next(), Some(Load::Closed { concurrency: 1 }));
        assert_eq!((plan.rules.window_us, plan.rules.warmup), (5_000_000, Warmup::For(1_000_000)));
        assert_eq!((plan.rules.promise, plan.slo), (None, None));
    }

    #[test]
    fn an_slo_is_told_to_the_broker_and_is_the_threshold() {
        let plan = plan("--rate 200 --slo 50ms --max-violation 2.5%").unwrap();
        assert_eq!(plan.slo, Some(Slo { latency_ms: 50, max_violation_permille: 25 }));
        assert_eq!(plan.rules.promise, Some(Promise { latency_us: 50_000, violation_max: 0.025 }));
    }

    #[test]
    fn a_threshold_alone_is_this_programs_business() {
        let fine = plan("--rate 10 --latency-threshold 1s --max-violation 0.01%").unwrap();
        assert_eq!(fine.rules.promise.unwrap().violation_max, 0.0001);
        let plan =
            plan("--find-max-rate 10:100 --latency-threshold 1.5ms --warmup stable --distribution poisson").unwrap();
        assert_eq!((plan.slo, plan.rules.promise.unwrap().latency_us), (None, 1_500));
        assert_eq!(plan.sweep.next(), Some(Load::Open { rate: 10.0 }));
        assert_eq!((plan.rules.warmup, plan.distribution), (Warmup::UntilStable, Distribution::Poisson));
    }

    #[test]
    fn a_schedule_is_replayed_from_its_first_line_to_its_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("times");
        fs::write(&path, "0\n5 3\n").unwrap();
        let plan = plan(&format!("--schedule {}", path.display())).unwrap();
        assert_eq!((plan.replay.len(), plan.replay[1].items), (2, 3));
        assert_eq!((plan.rules.until, plan.rules.warmup), (Until::Replayed, Warmup::For(0)));
    }

    #[test]
    fn flags_that_do_not_go_together_are_named() {
        for (line, named) in [
            ("--concurrency 2 --clients 4", "--concurrency 2 is less than one request for each of --clients 4"),
            ("--find-max-rate 1:10", "add --latency-threshold"),
            ("--window 1ms", "--window 1.0 ms is out of range: use 50 ms to 1h00m"),
            ("--stability 0%", "must be above 0%"),
            ("--latency-threshold 0ms", "--latency-threshold is out of range"),
            ("--slo 100us", "at least 1ms"),
            ("--slo 1s --max-violation 0.01%", "--max-violation is told to the broker with --slo, in steps of 0.1%"),
            ("--csv -", "--csv - is standard output"),
            ("--plot -", "--plot - is standard output"),
            ("--schedule /none", "schedule /none: No such file"),
        ] {
            let error = plan(line).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
        for (line, named) in [
            ("--rate 1 --concurrency 1", "cannot be used with"),
            ("--rate 0", "0 requests per second is not a rate"),
            ("--windows-max 2", "2 is not in 3..="),
            ("--items 0", "0 is not in 1..="),
            ("--lane slow", "[possible values: realtime, batch]"),
            ("--percentile 100", "'100' is not a percentile"),
            ("--warmup soon", "'soon' is not a time"),
            ("--max-violation 5", "write 5% or 0.1%"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
