//! Service levels: a worker that misses them for a stream of tasks is left for a while and tried again with care.
//!
//! A stream is what one client sends to one model under one promise. For each stream and worker there is a breaker:
//!
//! ```text
//!              rate > allowed, of at least 8 tasks in 5 s
//!      Ok ─────────────────────────────────────────────────► Violating
//!      ▲                                                     │      ▲
//!      │                                      cool-down over │      │ rate > allowed:
//!      │                                      (5 s to 60 s)  ▼      │ cool-down doubled
//!      └───────────────────────────────────────────────── Probing ──┘
//!              rate < allowed/2, of at least 8 tasks         1 in 16 of the stream's tasks goes there
//! ```
//!
//! An empty window is no verdict. Measured is the worker's part of a task's time: from the grant to the end.
//!
//! Owns the windows and the verdicts. Never places.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{ClientId, Digest, Slo, Submit, WorkerId};

use crate::{MonoTime, Rule, Rules};

/// Tasks without which a rate says nothing.
const SAMPLES_MIN: u32 = 8;

/// Parts of the window; the oldest is dropped as a whole.
const PARTS: usize = 5;

/// Length of one part, microseconds: the whole window is the 5 s that load tools use.
const PART_US: u64 = 1_000_000;

/// First and longest time that a violating worker is left alone.
const COOL_FIRST: Duration = Duration::from_secs(5);
const COOL_LAST: Duration = Duration::from_secs(60);

/// Of so many tasks of a stream one goes to a worker that is being tried again.
const PROBE_EVERY: u32 = 16;

/// Streams and breakers remembered at the same time; beyond, those longest unused are forgotten.
const STREAMS_MAX: usize = 1024;
const BREAKERS_MAX: usize = 16_384;

/// What has not been used this long may be forgotten: longer than any cool-down.
const UNUSED: Duration = Duration::from_secs(120);

/// Between two searches for what may be forgotten, when a table is full.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Number of a stream.
pub(super) type StreamId = u32;

/// What a stream holds against a worker.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Stance {
    /// It is this worker's turn to be tried.
    Probe,
    /// Nothing.
    #[default]
    Ok,
    /// It has missed the service level this often, thousandths.
    Shunned(u16),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Ok,
    Violating { until: MonoTime, cool: Duration },
    Probing { cool: Duration },
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    total: u32,
    missed: u32,
}

impl Count {
    fn add(&mut self, missed: bool) {
        self.total += 1;
        self.missed += u32::from(missed);
    }

    /// Thousandths that missed; `None` if there are too few to say.
    fn rate_permille(self) -> Option<u16> {
        let rate = u64::from(self.missed) * 1000 / u64::from(self.total.max(1));
        (self.total >= SAMPLES_MIN).then_some(rate as u16)
    }
}

/// The last five seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    parts: [Count; PARTS],
    /// Number of the newest part since the origin of time.
    newest: u64,
}

impl Window {
    fn forward(&mut self, now: MonoTime) {
        let part = now.as_micros() / PART_US;
        let gone = part.saturating_sub(self.newest).min(PARTS as u64);
        for passed in 1..=gone {
            self.parts[((self.newest + passed) % PARTS as u64) as usize] = Count::default();
        }
        self.newest = self.newest.max(part);
    }

    fn add(&mut self, now: MonoTime, missed: bool) {
        self.forward(now);
        self.parts[(self.newest % PARTS as u64) as usize].add(missed);
    }

    fn count(&self, now: MonoTime) -> Count {
        let mut current = *self;
        current.forward(now);
        let sum = |sum: Count, part: &Count| Count { total: sum.total + part.total, missed: sum.missed + part.missed };
        current.parts.iter().fold(Count::default(), sum)
    }
}

#[derive(Clone, Copy, Debug)]
struct Breaker {
    verdict: Verdict,
    window: Window,
    /// Since the verdict became what it is.
    probes: Count,
    /// The rate that led to the last violation.
    worst_permille: u16,
    used: MonoTime,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    id: StreamId,
    /// Tasks given away so far.
    tasks: u32,
    used: MonoTime,
}

/// All breakers.
#[derive(Debug, Default)]
pub(super) struct Slos {
    rules: Rules,
    streams: BTreeMap<(ClientId, Digest, Slo), Stream>,
    streams_made: StreamId,
    breakers: BTreeMap<(WorkerId, StreamId), Breaker>,
    next_sweep: MonoTime,
    pub(super) violations: u64,
    pub(super) trips: u64,
}

impl Slos {
    pub(super) fn new(rules: Rules) -> Self {
        Self { rules, ..Self::default() }
    }

    /// The stream that a task belongs to, if it was promised something.
    pub(super) fn stream(&mut self, now: MonoTime, task: &Submit) -> Option<StreamId> {
        let key = (task.client, task.model.digest, task.slo?);
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.used = now;
            return Some(stream.id);
        }
        if self.streams.len() >= STREAMS_MAX {
            let oldest = self.streams.iter().min_by_key(|(_, stream)| stream.used).map(|(key, _)| *key)?;
            self.streams.remove(&oldest);
        }
        self.streams_made = self.streams_made.wrapping_add(1);
        let id = self.streams_made;
        self.streams.insert(key, Stream { id, tasks: 0, used: now });
        Some(id)
    }

    /// A task of the stream goes to a worker.
    pub(super) fn granted(&mut self, task: &Submit) {
        let stream = task.slo.and_then(|slo| self.streams.get_mut(&(task.client, task.model.digest, slo)));
        if let Some(stream) = stream {
            stream.tasks = stream.tasks.wrapping_add(1);
        }
    }

    /// Whether the stream's next task is one for trying workers again.
    pub(super) fn is_probe_turn(&self, task: &Submit) -> bool {
        let stream = task.slo.and_then(|slo| self.streams.get(&(task.client, task.model.digest, slo)));
        stream.is_some_and(|stream| stream.tasks % PROBE_EVERY == PROBE_EVERY - 1)
    }

    /// What the stream holds against the worker.
    pub(super) fn stance(&self, now: MonoTime, stream: StreamId, worker: WorkerId, probe_turn: bool) -> Stance {
        let Some(breaker) = self.breakers.get(&(worker, stream)) else { return Stance::Ok };
        match breaker.verdict {
            Verdict::Ok => Stance::Ok,
            _ if !self.rules.holds(Rule::SloHysteresis) => match breaker.window.count(now).rate_permille() {
                Some(rate) if rate > 0 => Stance::Shunned(rate),
                _ => Stance::Ok,
            },
            Verdict::Violating { until, .. } if now < until => Stance::Shunned(breaker.worst_permille),
            Verdict::Violating { .. } | Verdict::Probing { .. } if probe_turn => Stance::Probe,
            Verdict::Violating { .. } | Verdict::Probing { .. } => Stance::Shunned(breaker.worst_permille),
        }
    }

    /// A task of the stream ended at the worker.
    pub(super) fn ended(&mut self, now: MonoTime, stream: StreamId, worker: WorkerId, slo: Slo, missed: bool) {
        self.violations += u64::from(missed);
        let key = (worker, stream);
        if !self.breakers.contains_key(&key) && !self.has_space(now) {
            return;
        }
        let new = || Breaker {
            verdict: Verdict::Ok,
            window: Window::default(),
            probes: Count::default(),
            worst_permille: 0,
            used: now,
        };
        let breaker = self.breakers.entry(key).or_insert_with(new);
        breaker.used = now;
        breaker.window.add(now, missed);
        self.trips += u64::from(breaker.judge(now, slo, missed));
    }

    /// Thousandths of the worker's tasks that missed their service level in the last window; `None`: too few to say.
    pub(super) fn violation_permille(&self, now: MonoTime, worker: WorkerId) -> Option<u16> {
        let of_worker = self.breakers.range((worker, 0)..=(worker, StreamId::MAX));
        let mut sum = Count::default();
        for (_, breaker) in of_worker {
            let count = breaker.window.count(now);
            sum.total = sum.total.saturating_add(count.total);
            sum.missed = sum.missed.saturating_add(count.missed);
        }
        sum.rate_permille()
    }

    /// The worker is gone, and what was held against that life of it.
    pub(super) fn forget(&mut self, worker: WorkerId) {
        let keys = self.breakers.range((worker, 0)..=(worker, StreamId::MAX)).map(|(key, _)| *key);
        for key in keys.collect::<Vec<_>>() {
            self.breakers.remove(&key);
        }
    }

    /// Breakers that are violating, and that are being tried again.
    pub(super) fn counts(&self, now: MonoTime) -> (u32, u32) {
        let is_cooling =
            |breaker: &&Breaker| matches!(breaker.verdict, Verdict::Violating { until, .. } if now < until);
        let is_probing = |breaker: &&Breaker| !is_cooling(breaker) && breaker.verdict != Verdict::Ok;
        // One that nobody asks any more is only not swept yet.
        let used = || self.breakers.values().filter(|breaker| now.since(breaker.used) < UNUSED);
        let count = |of: &dyn Fn(&&Breaker) -> bool| used().filter(of).count() as u32;
        (count(&is_cooling), count(&is_probing))
    }

    fn has_space(&mut self, now: MonoTime) -> bool {
        if self.breakers.len() >= BREAKERS_MAX && now >= self.next_sweep {
            self.next_sweep = now + SWEEP_EVERY;
            self.breakers.retain(|_, breaker| now.since(breaker.used) < UNUSED);
        }
        self.breakers.len() < BREAKERS_MAX
    }
}

impl Breaker {
    /// Draws the conclusion from one more task. True if the worker is left because of it.
    fn judge(&mut self, now: MonoTime, slo: Slo, missed: bool) -> bool {
        let allowed = slo.max_violation_permille;
        let (rate, cool) = match self.verdict {
            Verdict::Ok => (self.window.count(now).rate_permille(), None),
            // A task that had been given away before.
            Verdict::Violating { until, .. } if now < until => return false,
            Verdict::Violating { cool, .. } => {
                self.verdict = Verdict::Probing { cool };
                self.probes = Count::default();
                self.probes.add(missed);
                return false;
            }
            Verdict::Probing { cool } => {
                self.probes.add(missed);
                (self.probes.rate_permille(), Some(cool))
            }
        };
        let Some(rate) = rate else { return false };
        if rate > allowed {
            let cool = cool.map_or(COOL_FIRST, |cool| (cool * 2).min(COOL_LAST));
            self.verdict = Verdict::Violating { until: now + cool, cool };
            self.worst_permille = rate;
            return true;
        }
        if cool.is_some() {
            // Between the two bounds neither is proven: the trial begins anew.
            self.probes = Count::default();
            if u32::from(rate) * 2 < u32::from(allowed) || rate == 0 {
                self.verdict = Verdict::Ok;
                self.window = Window::default();
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: WorkerId = WorkerId::from_bytes([1; 16]);
    const PROMISE: Slo = Slo { latency_ms: 50, max_violation_permille: 100 };
    const S: StreamId = 1;

    fn at(ms: u64) -> MonoTime {
        MonoTime::from_micros(ms * 1000)
    }

    fn many(slos: &mut Slos, from_ms: u64, count: u64, missed: bool) {
        (0..count).for_each(|number| slos.ended(at(from_ms + number), S, W, PROMISE, missed));
    }

    #[test]
    fn few_misses_and_empty_windows_are_no_verdict() {
        let mut slos = Slos::default();
        assert_eq!(slos.violation_permille(at(0), W), None);
        many(&mut slos, 0, u64::from(SAMPLES_MIN) - 1, true);
        assert_eq!(slos.stance(at(10), S, W, false), Stance::Ok);
        // Seven more, but long after: the first ones no longer count.
        many(&mut slos, 10_000, u64::from(SAMPLES_MIN) - 1, true);
        assert_eq!(slos.stance(at(10_010), S, W, false), Stance::Ok);
    }

    #[test]
    fn a_worker_is_left_tried_again_and_taken_back_when_it_is_well_below_the_bound() {
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        assert_eq!((slos.stance(at(20), S, W, true), slos.trips), (Stance::Shunned(1000), 1));
        assert_eq!(slos.violation_permille(at(20), W), Some(1000));
        // The cool-down is over: it is tried in its turn only.
        assert_eq!(slos.stance(at(6_000), S, W, false), Stance::Shunned(1000));
        assert_eq!(slos.stance(at(6_000), S, W, true), Stance::Probe);
        many(&mut slos, 6_000, 7, false);
        assert_eq!(slos.stance(at(6_100), S, W, false), Stance::Shunned(1000));
        many(&mut slos, 6_200, 1, false);
        assert_eq!(slos.stance(at(6_300), S, W, false), Stance::Ok);
    }

    #[test]
    fn a_worker_that_fails_its_trial_is_left_for_twice_as_long_up_to_a_minute() {
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        let (mut now_ms, mut cool_ms) = (7, 5_000);
        for _ in 0..6 {
            assert_eq!(slos.stance(at(now_ms + cool_ms - 1), S, W, true), Stance::Shunned(1000), "{cool_ms}");
            assert_eq!(slos.stance(at(now_ms + cool_ms), S, W, true), Stance::Probe, "{cool_ms}");
            many(&mut slos, now_ms + cool_ms, 8, true);
            (now_ms, cool_ms) = (now_ms + cool_ms + 7, (cool_ms * 2).min(60_000));
        }
    }

    #[test]
    fn a_trial_that_proves_neither_begins_anew() {
        let promise = Slo { max_violation_permille: 500, ..PROMISE };
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        // Three of eight: fewer than half, more than a quarter.
        (0..8).for_each(|number| slos.ended(at(6_000 + number), S, W, promise, number < 3));
        assert_eq!((slos.stance(at(6_100), S, W, false), slos.trips), (Stance::Shunned(1000), 1));
        (0..8).for_each(|number| slos.ended(at(6_200 + number), S, W, promise, number < 1));
        assert_eq!(slos.stance(at(6_300), S, W, false), Stance::Ok);
    }

    #[test]
    fn floods_of_streams_and_workers_leave_bounded_tables() {
        let mut slos = Slos::default();
        for number in 0..2 * BREAKERS_MAX as u32 {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            slos.ended(at(u64::from(number)), number, WorkerId::from_bytes(bytes), PROMISE, true);
        }
        assert!(slos.breakers.len() <= BREAKERS_MAX);
        slos.forget(WorkerId::from_bytes([0; 16]));
    }
}
