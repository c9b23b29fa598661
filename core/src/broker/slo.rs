//! Service levels: a worker that misses them for a stream of tasks is avoided for a while, then tried again with care.
//!
//! A stream is all tasks of one client for one model under one service level. Each stream has a breaker per worker:
//!
//! ```text
//!              rate > allowed, of at least 8 tasks in 5 s, or in 1 min
//!      Ok ─────────────────────────────────────────────────► Violating
//!      ▲                                                     │      ▲
//!      │                                      cool-down over │      │ so many misses that it is clear:
//!      │                                      (5 s to 20 s)  ▼      │ cool-down doubled
//!      └───────────────────────────────────────────────── Probing ──┘
//!              three times rate < allowed/2, of 8 tasks      1 in 16 of the stream's tasks goes there, then 1 in 8, 1 in 4
//! ```
//!
//! A trial ends with the first late task too many, so it costs little and can be repeated soon. A trial that goes well
//! sends more and more tasks there: the worker proves that it bears them, and its present cost is measured before it
//! competes with the others again.
//!
//! An empty window is no verdict. The long window is for slow streams: it counts only if the short one holds too few
//! tasks, and a worker with fewer than 8 tasks of a stream in a minute is not judged. The worker's part of a task's time
//! counts: from the grant to the end.
//!
//! Owns the windows and the verdicts. Never places.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{ClientId, Digest, Slo, TaskSpec, WorkerId};

use crate::{MonoTime, Rule, Rules};

/// Number of tasks below which a rate says nothing.
const SAMPLES_MIN: u32 = 8;

/// Parts of the window; the oldest is dropped as a whole.
const PARTS: usize = 5;

/// Length of one part of the short window, microseconds. The whole window is the 5 s that load tools use.
const PART_US: u64 = 1_000_000;

/// Length of one part of the long window, microseconds.
const LONG_PART_US: u64 = 12_000_000;

/// First and longest time that a violating worker is avoided. A worker that has recovered waits for at most the
/// longest; a trial in vain costs a task or two, one in some hundreds.
const COOL_FIRST: Duration = Duration::from_secs(5);
const COOL_LAST: Duration = Duration::from_secs(20);

/// A worker that violates again within this time after it was taken back is avoided twice as long as the last time.
const RELAPSE: Duration = Duration::from_secs(60);

/// One in this many of a stream's tasks goes to a worker that is tried again; one in half as many after each step.
const PROBE_EVERY: u32 = 16;
const PROBE_STEPS: u8 = 3;

/// Limit of streams; the one unused for longest goes first. Of too many breakers, only those unused for [`UNUSED`] go.
const STREAMS_MAX: usize = 1024;

/// Limit of streams per client, one for each model and service level. Beyond it, a client loses only its own.
const CLIENT_STREAMS_MAX: usize = 64;
const BREAKERS_MAX: usize = 16_384;

/// Time without use after which a breaker may be forgotten: longer than any cool-down.
const UNUSED: Duration = Duration::from_secs(120);

/// Shortest time between two searches for breakers to forget, while their table is full.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// The identity of a stream.
type StreamKey = (ClientId, Digest, Slo);

/// The number of a stream.
pub(super) type StreamId = u32;

/// A stream's verdict on a worker, as placement uses it.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Stance {
    /// The worker is to be tried in this turn.
    Probe,
    /// No objection.
    #[default]
    Ok,
    /// The worker is avoided; its rate of missed service levels, thousandths.
    Shunned(u16),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Ok,
    Violating { until: MonoTime, cool: Duration },
    Probing { cool: Duration, step: u8 },
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

    /// Thousandths of tasks that missed; `None` if there are too few tasks to say.
    fn rate_permille(self) -> Option<u16> {
        (self.total >= SAMPLES_MIN).then_some(self.least_permille())
    }

    /// The lowest possible rate once there are enough tasks, thousandths.
    fn least_permille(self) -> u16 {
        (u64::from(self.missed) * 1000 / u64::from(self.total.max(SAMPLES_MIN))) as u16
    }
}

/// Tasks and misses of the last parts of time.
#[derive(Clone, Copy, Debug, Default)]
struct Window<const PART_US: u64> {
    parts: [Count; PARTS],
    /// Number of the newest part, counted from the origin of time.
    newest: u64,
}

impl<const PART_US: u64> Window<PART_US> {
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
    window: Window<PART_US>,
    long_window: Window<LONG_PART_US>,
    /// Tasks at the worker in the current step of a trial.
    probes: Count,
    /// When the worker was last taken back, and the length of the cool-down before.
    taken_back: Option<(MonoTime, Duration)>,
    /// The rate that led to the last violation.
    worst_permille: u16,
    used: MonoTime,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    id: StreamId,
    /// Tasks granted so far.
    tasks: u32,
    used: MonoTime,
}

/// All streams and breakers.
#[derive(Debug, Default)]
pub(super) struct Slos {
    rules: Rules,
    streams: BTreeMap<StreamKey, Stream>,
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

    /// The stream of a task; `None` if the task has no service level.
    pub(super) fn stream(&mut self, now: MonoTime, task: &TaskSpec) -> Option<StreamId> {
        Some(self.open(now, (task.client, task.model.digest, task.slo?)))
    }

    fn open(&mut self, now: MonoTime, key: StreamKey) -> StreamId {
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.used = now;
            return stream.id;
        }
        let oldest = if self.streams_of(key.0).count() >= CLIENT_STREAMS_MAX {
            self.streams_of(key.0).min_by_key(|(_, stream)| stream.used).map(|(key, _)| *key)
        } else if self.streams.len() >= STREAMS_MAX {
            self.streams.iter().min_by_key(|(_, stream)| stream.used).map(|(key, _)| *key)
        } else {
            None
        };
        oldest.map(|oldest| self.streams.remove(&oldest));
        self.streams_made = self.streams_made.wrapping_add(1);
        let id = self.streams_made;
        self.streams.insert(key, Stream { id, tasks: 0, used: now });
        id
    }

    fn streams_of(&self, client: ClientId) -> impl Iterator<Item = (&StreamKey, &Stream)> {
        let first = (client, Digest::from_bytes([0; 32]), Slo { latency_ms: 0, max_violation_permille: 0 });
        self.streams.range(first..).take_while(move |((of, ..), _)| *of == client)
    }

    /// Counts a task of a stream that goes to a worker.
    pub(super) fn granted(&mut self, task: &TaskSpec) {
        let stream = task.slo.and_then(|slo| self.streams.get_mut(&(task.client, task.model.digest, slo)));
        if let Some(stream) = stream {
            stream.tasks = stream.tasks.wrapping_add(1);
        }
    }

    /// Number of the stream's tasks granted so far, which is its turn. In some turns, workers are tried again.
    pub(super) fn turn(&self, task: &TaskSpec) -> u32 {
        let stream = task.slo.and_then(|slo| self.streams.get(&(task.client, task.model.digest, slo)));
        stream.map_or(0, |stream| stream.tasks)
    }

    /// The stream's verdict on the worker in this turn.
    pub(super) fn stance(&self, now: MonoTime, stream: StreamId, worker: WorkerId, turn: u32) -> Stance {
        let Some(breaker) = self.breakers.get(&(worker, stream)) else { return Stance::Ok };
        let shunned = Stance::Shunned(breaker.worst_permille);
        let step = match breaker.verdict {
            Verdict::Ok => return Stance::Ok,
            _ if !self.rules.holds(Rule::SloHysteresis) => {
                return match breaker.window.count(now).rate_permille() {
                    Some(rate) if rate > 0 => Stance::Shunned(rate),
                    _ => Stance::Ok,
                };
            }
            Verdict::Violating { until, .. } if now < until => return shunned,
            Verdict::Violating { .. } => 0,
            Verdict::Probing { step, .. } => step,
        };
        let every = PROBE_EVERY >> step;
        if turn % every == every - 1 { Stance::Probe } else { shunned }
    }

    /// Counts a task of the stream that ended at the worker.
    pub(super) fn ended(&mut self, now: MonoTime, stream: StreamId, worker: WorkerId, slo: Slo, missed: bool) {
        self.violations += u64::from(missed);
        let key = (worker, stream);
        if !self.breakers.contains_key(&key) && !self.has_space(now) {
            return;
        }
        let new = || Breaker {
            verdict: Verdict::Ok,
            window: Window::default(),
            long_window: Window::default(),
            probes: Count::default(),
            taken_back: None,
            worst_permille: 0,
            used: now,
        };
        let breaker = self.breakers.entry(key).or_insert_with(new);
        breaker.used = now;
        breaker.window.add(now, missed);
        breaker.long_window.add(now, missed);
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

    /// Drops all breakers of a worker that is gone: they concern only that life of it.
    pub(super) fn forget(&mut self, worker: WorkerId) {
        let keys = self.breakers.range((worker, 0)..=(worker, StreamId::MAX)).map(|(key, _)| *key);
        for key in keys.collect::<Vec<_>>() {
            self.breakers.remove(&key);
        }
    }

    /// Number of breakers in cool-down, and of those being tried again.
    pub(super) fn counts(&self, now: MonoTime) -> (u32, u32) {
        let is_cooling =
            |breaker: &&Breaker| matches!(breaker.verdict, Verdict::Violating { until, .. } if now < until);
        let is_probing = |breaker: &&Breaker| !is_cooling(breaker) && breaker.verdict != Verdict::Ok;
        // A breaker that nobody uses any more is only not swept yet.
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
    /// Updates the verdict after one more task. True if the worker is avoided from now on.
    fn judge(&mut self, now: MonoTime, slo: Slo, missed: bool) -> bool {
        let (cool, step) = match self.verdict {
            Verdict::Ok => {
                let rate = self.window.count(now).rate_permille();
                let rate = rate.or_else(|| self.long_window.count(now).rate_permille());
                let last = self.taken_back.filter(|(at, _)| now < *at + RELAPSE).map(|(_, cool)| cool);
                return rate.is_some_and(|rate| self.leave_if(now, slo, rate, last));
            }
            // A task that was granted earlier.
            Verdict::Violating { until, .. } if now < until => return false,
            Verdict::Violating { cool, .. } => {
                (self.verdict, self.probes) = (Verdict::Probing { cool, step: 0 }, Count::default());
                (cool, 0)
            }
            Verdict::Probing { cool, step } => (cool, step),
        };
        self.probes.add(missed);
        // The rate over eight tasks if all that are still to come are in time.
        if self.leave_if(now, slo, self.probes.least_permille(), Some(cool)) {
            return true;
        }
        let Some(rate) = self.probes.rate_permille() else { return false };
        // A rate between the two bounds proves neither: the step begins anew.
        self.probes = Count::default();
        if u32::from(rate) * 2 < u32::from(slo.max_violation_permille) || rate == 0 {
            if step + 1 < PROBE_STEPS {
                self.verdict = Verdict::Probing { cool, step: step + 1 };
            } else {
                (self.verdict, self.taken_back) = (Verdict::Ok, Some((now, cool)));
                (self.window, self.long_window) = (Window::default(), Window::default());
            }
        }
        false
    }

    /// Avoids the worker if its rate is too high, twice as long as the last time.
    fn leave_if(&mut self, now: MonoTime, slo: Slo, rate: u16, last: Option<Duration>) -> bool {
        let is_bad = rate > slo.max_violation_permille;
        if is_bad {
            let cool = last.map_or(COOL_FIRST, |last| (last * 2).min(COOL_LAST));
            (self.verdict, self.worst_permille) = (Verdict::Violating { until: now + cool, cool }, rate);
        }
        is_bad
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

    /// A turn in which every worker on trial gets a task, and one in which none does.
    const TURN: u32 = PROBE_EVERY - 1;
    const OTHER: u32 = PROBE_EVERY;

    #[test]
    fn few_misses_and_empty_windows_are_no_verdict() {
        let mut slos = Slos::default();
        assert_eq!(slos.violation_permille(at(0), W), None);
        many(&mut slos, 0, u64::from(SAMPLES_MIN) - 1, true);
        assert_eq!(slos.stance(at(10), S, W, OTHER), Stance::Ok);
        // Seven more, but long after: the first ones no longer count.
        many(&mut slos, 70_000, u64::from(SAMPLES_MIN) - 1, true);
        assert_eq!(slos.stance(at(70_010), S, W, OTHER), Stance::Ok);
    }

    #[test]
    fn a_slow_stream_is_judged_by_its_last_minute() {
        for every_ms in [700, 1_000, 5_000] {
            let mut slos = Slos::default();
            let late = (0..100).find(|number| {
                slos.ended(at(number * every_ms), S, W, PROMISE, true);
                slos.stance(at(number * every_ms), S, W, OTHER) != Stance::Ok
            });
            assert_eq!(late, Some(u64::from(SAMPLES_MIN) - 1), "one task in {every_ms} ms");
        }
        let mut slos = Slos::default();
        (0..100).for_each(|number| slos.ended(at(number * 10_000), S, W, PROMISE, true));
        assert_eq!(slos.stance(at(990_000), S, W, OTHER), Stance::Ok, "six in a minute are no rate");
        // A worker that is well again is not judged by what was before.
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        (0..24).for_each(|number| slos.ended(at(6_000 + number), S, W, PROMISE, false));
        slos.ended(at(12_000), S, W, PROMISE, true);
        assert_eq!(slos.stance(at(12_000), S, W, OTHER), Stance::Ok);
    }

    #[test]
    fn a_worker_is_left_tried_again_with_more_and_more_and_taken_back() {
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        assert_eq!((slos.stance(at(20), S, W, TURN), slos.trips), (Stance::Shunned(1000), 1));
        assert_eq!(slos.violation_permille(at(20), W), Some(1000));
        // The cool-down is over: the worker is tried only in its turn, and that comes more and more often.
        for step in 0..3 {
            let now = 6_000 + step * 100;
            let turns = (0..16).filter(|turn| slos.stance(at(now), S, W, *turn) == Stance::Probe).count();
            assert_eq!(turns, [1, 2, 4][step as usize]);
            many(&mut slos, now, 7, false);
            assert_eq!(slos.stance(at(now + 50), S, W, OTHER), Stance::Shunned(1000));
            many(&mut slos, now + 50, 1, false);
        }
        assert_eq!(slos.stance(at(6_300), S, W, OTHER), Stance::Ok);
    }

    #[test]
    fn a_worker_that_fails_its_trial_is_left_for_twice_as_long_and_that_costs_one_task() {
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        let (mut now_ms, mut cool_ms) = (7, 5_000);
        for _ in 0..6 {
            assert_eq!(slos.stance(at(now_ms + cool_ms - 1), S, W, TURN), Stance::Shunned(1000), "{cool_ms}");
            assert_eq!(slos.stance(at(now_ms + cool_ms), S, W, TURN), Stance::Probe, "{cool_ms}");
            slos.ended(at(now_ms + cool_ms), S, W, PROMISE, true);
            slos.breakers.values_mut().for_each(|breaker| breaker.worst_permille = 1000);
            (now_ms, cool_ms) = (now_ms + cool_ms, (cool_ms * 2).min(20_000));
        }
    }

    #[test]
    fn a_worker_that_is_well_only_while_it_is_tried_is_left_for_longer_and_longer() {
        let mut slos = Slos::default();
        let (mut now_ms, mut left_ms) = (0, Vec::new());
        for _ in 0..4 {
            many(&mut slos, now_ms, 8, true);
            let back = (now_ms..).find(|ms| slos.stance(at(*ms), S, W, TURN) == Stance::Probe).expect("it is tried");
            left_ms.push((back - now_ms) / 1000);
            (0..24).for_each(|number| slos.ended(at(back + number), S, W, PROMISE, false));
            now_ms = back + 100;
            assert_eq!(slos.stance(at(now_ms), S, W, OTHER), Stance::Ok);
        }
        assert_eq!(left_ms, [5, 10, 20, 20]);
    }

    #[test]
    fn a_trial_that_proves_neither_begins_anew() {
        let promise = Slo { max_violation_permille: 500, ..PROMISE };
        let mut slos = Slos::default();
        many(&mut slos, 0, 8, true);
        let turns = |slos: &Slos| (0..16).filter(|turn| slos.stance(at(7_000), S, W, *turn) == Stance::Probe).count();
        // Three of eight: fewer than half, more than a quarter.
        (0..8).for_each(|number| slos.ended(at(6_000 + number), S, W, promise, number < 3));
        assert_eq!((turns(&slos), slos.trips), (1, 1));
        (0..8).for_each(|number| slos.ended(at(6_200 + number), S, W, promise, number < 1));
        assert_eq!(turns(&slos), 2);
    }

    #[test]
    fn a_client_with_ever_new_streams_loses_its_own() {
        let key = |client: u8, latency_ms: u32| {
            let slo = Slo { latency_ms, max_violation_permille: 10 };
            (ClientId::from_bytes([client; 16]), Digest::from_bytes([1; 32]), slo)
        };
        let mut slos = Slos::default();
        let mine = slos.open(at(0), key(1, 10));
        for number in 0..10 * STREAMS_MAX as u32 {
            slos.open(at(1 + u64::from(number)), key(2, number));
        }
        assert_eq!(slos.open(at(100_000), key(1, 10)), mine);
        assert_eq!(slos.streams.len(), 1 + CLIENT_STREAMS_MAX);
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
