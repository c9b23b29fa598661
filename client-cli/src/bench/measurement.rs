//! The measurement of one level: warm-up, windows, and its end. Owns the criterion of stability. Never reads a clock,
//! never sends.
//!
//! ```text
//!   warming --- its time is over, or stable ---> measuring --- three stable windows, or the most ---> over
//! ```

use std::collections::VecDeque;

use super::{
    sample::{Sample, WorkerNo},
    shares::{Moved, Shares},
    tally::Tally,
    verdict::Promise,
};

/// Number of windows that must agree. They make up a level's figures.
pub(crate) const WINDOWS_AGREEING: usize = 3;

/// Most windows kept per level: a day of five seconds each.
const WINDOWS_KEPT_MAX: usize = 20_000;

/// How a level is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) window_us: u64,
    pub(crate) warmup: Warmup,
    pub(crate) until: Until,
    /// Windows agree if the largest figure exceeds the smallest by at most this part of 1.
    pub(crate) stability: f64,
    /// The latency quantile that must agree.
    pub(crate) quantile: f64,
    pub(crate) promise: Option<Promise>,
    /// Smallest reported loss of a worker's share of the traffic, a part of 1.
    pub(crate) moved_min: f64,
    pub(crate) clients: u16,
}

/// The time before anything counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Warmup {
    /// A fixed time in microseconds.
    For(u64),
    /// Until windows agree, or the most windows that may be measured have passed.
    UntilStable,
}

/// The end of a level.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Until {
    /// When windows agree, or after this many.
    Stable {
        /// Most windows.
        windows_max: u32,
    },
    /// When every request of the schedule has been sent and answered. Every window counts.
    Replayed,
}

/// How reliable a level's figures are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Settled {
    /// The last windows agree.
    Stable,
    /// The windows never agreed.
    Unstable,
    /// A schedule was replayed to its end.
    Replayed,
    /// The level was stopped early.
    Stopped,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Warming { windows: u32 },
    Measuring,
    Over(Settled),
}

/// The figures of one window.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    /// Start, from the beginning of the level.
    pub(crate) start_ms: f64,
    pub(crate) length_ms: f64,
    pub(crate) done: u64,
    pub(crate) failed: u64,
    /// Those of them that never left: they are no sign of the mesh.
    not_sent: u64,
    pub(crate) requests_per_s: Option<f64>,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    /// The latency quantile that decides about stability.
    watched_ms: Option<f64>,
    pub(crate) violation: Option<f64>,
    pub(crate) workers: Vec<WorkerWindow>,
    pub(crate) moved: Option<Moved>,
}

/// The figures of one worker in one window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerWindow {
    pub(crate) worker: WorkerNo,
    pub(crate) done: u64,
    pub(crate) p99_ms: Option<f64>,
    /// The part of the worker's answers that came too late; `None` without a promise.
    pub(crate) violation: Option<f64>,
}

/// The result of a level.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) settled: Settled,
    /// The sum of the last windows if they agree, otherwise of all.
    pub(crate) tally: Tally,
    pub(crate) windows: Vec<Window>,
}

/// The state of a level's measurement.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    rules: Rules,
    phase: Phase,
    window_start_us: u64,
    tally: Tally,
    /// The complete tallies of the last windows.
    last: VecDeque<Tally>,
    /// The sum of all windows.
    all: Tally,
    windows: Vec<Window>,
    agreeing: VecDeque<Window>,
    shares: Shares,
}

impl Measurement {
    /// A measurement that starts at time 0.
    pub(crate) fn new(rules: Rules) -> Self {
        let empty = Tally::new(rules.clients, rules.promise);
        let phase = if rules.warmup == Warmup::For(0) { Phase::Measuring } else { Phase::Warming { windows: 0 } };
        Self {
            rules,
            phase,
            window_start_us: 0,
            tally: empty.clone(),
            last: VecDeque::new(),
            all: empty,
            windows: Vec::new(),
            agreeing: VecDeque::new(),
            shares: Shares::new(rules.moved_min),
        }
    }

    /// The time at which the window or the warm-up has to end.
    pub(crate) fn ends_us(&self) -> u64 {
        self.window_start_us.saturating_add(self.length_us())
    }

    /// The elapsed part of the window or the warm-up, from 0.
    pub(crate) fn part(&self, now_us: u64) -> f64 {
        now_us.saturating_sub(self.window_start_us) as f64 / self.length_us().max(1) as f64
    }

    fn length_us(&self) -> u64 {
        match (self.phase, self.rules.warmup) {
            (Phase::Warming { .. }, Warmup::For(us)) => us,
            _ => self.rules.window_us,
        }
    }

    pub(crate) fn is_warming(&self) -> bool {
        matches!(self.phase, Phase::Warming { .. })
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over(_))
    }

    /// Number of windows that count so far.
    pub(crate) fn windows_ended(&self) -> usize {
        self.windows.len()
    }

    /// Adds a request that ended in the current window.
    pub(crate) fn add(&mut self, sample: &Sample) {
        self.tally.add(sample);
    }

    /// The tally of the current window so far.
    pub(crate) fn current(&self) -> &Tally {
        &self.tally
    }

    /// Ends the window. Returns its figures if it counts.
    pub(crate) fn end_window(&mut self, now_us: u64) -> Option<&Window> {
        let mut tally = Tally::new(self.rules.clients, self.rules.promise);
        std::mem::swap(&mut tally, &mut self.tally);
        tally.lasted(now_us.saturating_sub(self.window_start_us));
        let start_us = std::mem::replace(&mut self.window_start_us, now_us);
        match self.phase {
            Phase::Over(_) => return None,
            Phase::Warming { windows } => {
                self.warmed(windows + 1, &tally, start_us);
                return None;
            }
            Phase::Measuring => {}
        }
        let mut window = self.figures(&tally, start_us);
        window.moved = self.shares.window(&tally.answers());
        self.all.merge(&tally);
        self.last.push_back(tally);
        if self.last.len() > WINDOWS_AGREEING {
            self.last.pop_front();
        }
        self.note_agreeing(window.clone());
        if self.windows.len() < WINDOWS_KEPT_MAX {
            self.windows.push(window);
        }
        if let Until::Stable { windows_max } = self.rules.until {
            if self.agree() {
                self.phase = Phase::Over(Settled::Stable);
            } else if self.windows.len() >= windows_max as usize {
                self.phase = Phase::Over(Settled::Unstable);
            }
        }
        self.windows.last()
    }

    /// Ends a window of the warm-up; `windows` is their number so far.
    fn warmed(&mut self, windows: u32, tally: &Tally, start_us: u64) {
        let is_warm = match (self.rules.warmup, self.rules.until) {
            (Warmup::For(_), _) | (Warmup::UntilStable, Until::Replayed) => true,
            (Warmup::UntilStable, Until::Stable { windows_max }) => {
                let window = self.figures(tally, start_us);
                self.note_agreeing(window);
                self.agree() || windows >= windows_max
            }
        };
        self.phase = if is_warm { Phase::Measuring } else { Phase::Warming { windows } };
        if is_warm {
            self.agreeing.clear();
        }
    }

    fn figures(&self, tally: &Tally, start_us: u64) -> Window {
        let of_worker = |(worker, part): (&WorkerNo, &super::tally::WorkerTally)| WorkerWindow {
            worker: *worker,
            done: part.latencies.count(),
            p99_ms: part.latencies.quantile_ms(0.99),
            violation: self.rules.promise.and_then(|_| part.violation()),
        };
        Window {
            start_ms: start_us as f64 / 1e3,
            length_ms: tally.length_ms(),
            done: tally.done(),
            failed: tally.failed(),
            not_sent: tally.not_sent(),
            requests_per_s: tally.requests_per_s(),
            p50_ms: tally.latencies.quantile_ms(0.5),
            p99_ms: tally.latencies.quantile_ms(0.99),
            watched_ms: tally.latencies.quantile_ms(self.rules.quantile),
            violation: tally.violation(),
            workers: tally.workers.iter().map(of_worker).collect(),
            moved: None,
        }
    }

    fn note_agreeing(&mut self, window: Window) {
        self.agreeing.push_back(window);
        if self.agreeing.len() > WINDOWS_AGREEING {
            self.agreeing.pop_front();
        }
    }

    /// Whether the last windows have the same throughput and latency within the tolerance. Empty windows never agree.
    fn agree(&self) -> bool {
        let near = |figure: fn(&Window) -> Option<f64>| {
            let figures: Option<Vec<f64>> = self.agreeing.iter().map(figure).collect();
            let Some(figures) = figures.filter(|figures| figures.len() == WINDOWS_AGREEING) else { return false };
            let (least, most) = figures.iter().fold((f64::MAX, 0.0_f64), |(l, m), f| (l.min(*f), m.max(*f)));
            least > 0.0 && most <= least * (1.0 + self.rules.stability)
        };
        near(|window| window.requests_per_s) && near(|window| window.watched_ms)
    }

    /// Ends the measurement. `unanswered` are the requests still under way at `now_us`.
    pub(crate) fn finish(mut self, now_us: u64, is_early: bool, unanswered: &[Sample]) -> Measured {
        let is_replay = self.rules.until == Until::Replayed;
        let settled = match self.phase {
            Phase::Over(settled) => settled,
            _ if is_replay && !is_early => Settled::Replayed,
            _ => Settled::Stopped,
        };
        // An incomplete window counts if it was the schedule's last, or if there is no other.
        if !self.is_over() && now_us > self.window_start_us && (is_replay || self.windows.is_empty()) {
            self.phase = Phase::Measuring;
            self.end_window(now_us);
        }
        let mut tally = self.all;
        if settled == Settled::Stable {
            tally = Tally::new(self.rules.clients, self.rules.promise);
            self.last.iter().for_each(|window| tally.merge(window));
        }
        unanswered.iter().for_each(|sample| tally.add_unanswered(sample, now_us));
        Measured { settled, tally, windows: self.windows }
    }
}

impl Measured {
    /// The time since which nothing was answered, in ms from the level's beginning, if requests were under way for more
    /// than twice as long as the slowest answer took.
    pub(crate) fn silent_since_ms(&self) -> Option<f64> {
        let silent = self.windows.iter().rev().take_while(|window| window.done + window.failed == window.not_sent);
        let (since_ms, silence_ms) = silent.fold((0.0, 0.0), |(_, sum_ms), w| (w.start_ms, sum_ms + w.length_ms));
        let slowest_ms = self.tally.latencies.max_ms().unwrap_or(0.0);
        (self.tally.outlasting > 0 && silence_ms > 2.0 * slowest_ms).then_some(since_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tally::tests::*, *};

    const SECOND_US: u64 = 1_000_000;

    fn rules() -> Rules {
        Rules {
            window_us: SECOND_US,
            warmup: Warmup::For(0),
            until: Until::Stable { windows_max: 10 },
            stability: 0.1,
            quantile: 0.95,
            promise: Some(Promise { latency_us: 50_000, violation_max: 0.05 }),
            moved_min: 0.2,
            clients: 1,
        }
    }

    /// Measures windows of 1 s, given as requests and latency in ms. Returns the result and the windows used.
    fn measure(rules: Rules, windows: &[(u64, u64)]) -> (Measured, usize) {
        let mut measurement = Measurement::new(rules);
        let mut taken = 0;
        for (count, latency_ms) in windows {
            let now_us = measurement.ends_us();
            (0..*count).for_each(|_| measurement.add(&answered(0, *latency_ms)));
            measurement.end_window(now_us);
            taken += 1;
            if measurement.is_over() {
                break;
            }
        }
        let now_us = measurement.window_start_us;
        (measurement.finish(now_us, false, &[]), taken)
    }

    #[test]
    fn three_windows_that_agree_are_enough() {
        let (measured, taken) = measure(rules(), &[(50, 90), (100, 20), (104, 21), (102, 20), (1, 1)]);
        assert_eq!((measured.settled, taken), (Settled::Stable, 4));
        assert_eq!(measured.tally.requests_per_s(), Some(102.0), "the first window is not in the figures");
        assert_eq!(measured.tally.violation(), Some(0.0));
        assert_eq!(measured.windows[0].violation, Some(1.0), "but it is told");
    }

    #[test]
    fn latency_must_agree_as_well_as_throughput() {
        let windows: Vec<(u64, u64)> = (1..=10).map(|window| (100, 10 * window)).collect();
        let (measured, taken) = measure(rules(), &windows);
        assert_eq!((measured.settled, taken), (Settled::Unstable, 10));
        assert_eq!(measured.tally.done(), 1000, "a slow window is not left out because it was not the last");
    }

    #[test]
    fn empty_windows_agree_on_nothing_and_are_no_verdict() {
        let rules = Rules { until: Until::Stable { windows_max: 4 }, ..rules() };
        let (measured, taken) = measure(rules, &[(0, 0); 8]);
        assert_eq!((measured.settled, taken), (Settled::Unstable, 4));
        assert_eq!((measured.tally.violation(), measured.windows[0].violation), (None, None));
        assert_eq!(measured.tally.requests_per_s(), Some(0.0));
    }

    #[test]
    fn a_mesh_that_falls_silent_is_told_from_one_that_has_nothing_to_do() {
        let rules = Rules { until: Until::Stable { windows_max: 4 }, ..rules() };
        let mut measurement = Measurement::new(rules);
        measurement.add(&answered(0, 10));
        (1..=4).for_each(|second| drop(measurement.end_window(second * SECOND_US).cloned()));
        assert_eq!(measurement.clone().finish(4 * SECOND_US, false, &[]).silent_since_ms(), None);
        let unanswered = Sample { end: super::super::sample::End::Unanswered, ..answered(1100, 0) };
        let measured = measurement.finish(4 * SECOND_US, false, &[unanswered]);
        assert_eq!((measured.silent_since_ms(), measured.tally.outlasting), (Some(1000.0), 1));
    }

    #[test]
    fn requests_that_never_left_are_no_sign_of_life() {
        use super::super::sample::{End, NOT_SENT};
        let rules = Rules { until: Until::Stable { windows_max: 4 }, ..rules() };
        let mut measurement = Measurement::new(rules);
        measurement.add(&answered(0, 10));
        for second in 1..=4 {
            let _ = measurement.end_window(second * SECOND_US);
            measurement.add(&Sample { end: End::Failed(NOT_SENT), sent_us: None, ..answered(second * 1000, 0) });
        }
        let unanswered = Sample { end: End::Unanswered, ..answered(1100, 0) };
        assert_eq!(measurement.finish(4 * SECOND_US, false, &[unanswered]).silent_since_ms(), Some(1000.0));
    }

    #[test]
    fn what_happens_during_the_warm_up_is_not_counted() {
        let rules = Rules { warmup: Warmup::For(3 * SECOND_US), ..rules() };
        let (measured, _) = measure(rules, &[(5, 900), (100, 20), (100, 20), (100, 20)]);
        assert_eq!((measured.settled, measured.tally.done()), (Settled::Stable, 300));
        assert_eq!(measured.windows[0].start_ms, 3000.0);
    }

    #[test]
    fn progress_is_a_part_of_the_warm_up_as_of_a_window() {
        let mut measurement = Measurement::new(Rules { warmup: Warmup::For(30 * SECOND_US), ..rules() });
        assert_eq!([0, 15, 30].map(|second| measurement.part(second * SECOND_US)), [0.0, 0.5, 1.0]);
        let _ = measurement.end_window(30 * SECOND_US);
        assert_eq!(measurement.part(30 * SECOND_US + SECOND_US / 4), 0.25);
    }

    #[test]
    fn a_warm_up_may_last_until_windows_agree() {
        let rules = Rules { warmup: Warmup::UntilStable, ..rules() };
        let warming = [(5, 900), (100, 20), (100, 20), (100, 20)];
        let (measured, taken) = measure(rules, &[&warming[..], &[(100, 30); 3]].concat());
        assert_eq!((taken, measured.windows.len(), measured.settled), (7, 3, Settled::Stable));
        assert!(measured.tally.latencies.quantile_ms(0.01).unwrap() >= 29.9);
    }

    #[test]
    fn a_replay_counts_everything_to_its_end() {
        let rules = Rules { until: Until::Replayed, ..rules() };
        let mut measurement = Measurement::new(rules);
        measurement.add(&answered(0, 10));
        measurement.end_window(SECOND_US);
        measurement.add(&answered(0, 10));
        let unanswered = Sample { end: super::super::sample::End::Unanswered, ..answered(0, 0) };
        let measured = measurement.finish(SECOND_US * 3 / 2, false, &[unanswered]);
        assert_eq!((measured.settled, measured.windows.len()), (Settled::Replayed, 2));
        assert_eq!((measured.tally.done(), measured.tally.unanswered, measured.tally.overdue), (2, 1, 1));
        assert_eq!(measured.tally.requests_per_s(), Some(2.0 / 1.5));
    }

    #[test]
    fn a_replay_that_is_stopped_does_not_pass_for_a_whole_one() {
        let mut measurement = Measurement::new(Rules { until: Until::Replayed, ..rules() });
        measurement.add(&answered(0, 10));
        let measured = measurement.finish(SECOND_US / 2, true, &[]);
        assert_eq!((measured.settled, measured.windows.len()), (Settled::Stopped, 1));
    }

    #[test]
    fn a_run_that_is_stopped_keeps_what_it_has() {
        let mut measurement = Measurement::new(rules());
        measurement.add(&answered(0, 10));
        let measured = measurement.finish(SECOND_US / 2, true, &[]);
        assert_eq!((measured.settled, measured.tally.done()), (Settled::Stopped, 1));
    }

    #[test]
    fn a_switch_away_from_a_slow_worker_is_seen() {
        let mut measurement = Measurement::new(Rules { stability: 0.0001, ..rules() });
        let window = |measurement: &mut Measurement, slow: u64, fast: u64| {
            (0..slow).for_each(|_| measurement.add(&by_worker(0, answered(0, 90))));
            (0..fast).for_each(|_| measurement.add(&by_worker(1, answered(0, 10))));
            let now_us = measurement.ends_us();
            measurement.end_window(now_us).unwrap().clone()
        };
        let before = window(&mut measurement, 50, 50);
        assert_eq!((before.workers[0].violation, before.workers[1].violation), (Some(1.0), Some(0.0)));
        assert_eq!(before.moved, None);
        let after = window(&mut measurement, 5, 95);
        let moved = after.moved.unwrap();
        assert_eq!((moved.from, moved.to), (WorkerNo(0), WorkerNo(1)));
        assert_eq!((after.workers[0].done, after.workers[1].done), (5, 95));
    }
}
