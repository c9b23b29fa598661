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

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{ClientId, Digest, Slo, TaskSpec, WorkerId};

use crate::{Census, MonoTime, Rule, Rules};

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

/// The part (1/10) of a stream's tasks that may miss its service level with which it may be put at risk on purpose.
const RISK_PART: u32 = 10;

/// Limit of streams; the one unused for longest goes first. Of too many breakers, only those unused for [`UNUSED`] go.
const STREAMS_MAX: usize = 1024;

/// Limit of streams per client, one for each model and service level. Beyond it, a client loses only its own.
const CLIENT_STREAMS_MAX: usize = 64;
const BREAKERS_MAX: usize = 16_384;

/// Limit of breakers per client, one for each of its streams at each worker: one client does not take all of them.
const CLIENT_BREAKERS_MAX: u32 = 2048;

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
    client: ClientId,
    verdict: Verdict,
    window: Window<PART_US>,
    long_window: Window<LONG_PART_US>,
    /// Tasks at the worker in the current step of a trial.
    probes: Count,
    /// When the worker was last taken back, and the length of the cool-down before.
    taken_back: Option<(MonoTime, Duration)>,
    /// The rate that led to the last violation, or the one since.
    missed_permille: u16,
    used: MonoTime,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    id: StreamId,
    /// Tasks granted so far.
    tasks: u32,
    /// Of these, the number of the last one that was put at risk on purpose.
    risked: u32,
    used: MonoTime,
}

/// All streams and breakers.
#[derive(Debug, Default)]
pub(super) struct Slos {
    rules: Rules,
    streams: BTreeMap<StreamKey, Stream>,
    streams_made: StreamId,
    breakers: BTreeMap<(WorkerId, StreamId), Breaker>,
    /// Number of breakers of each client.
    of_client: BTreeMap<ClientId, u32>,
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
        self.streams.insert(key, Stream { id, tasks: 0, risked: 0, used: now });
        id
    }

    fn streams_of(&self, client: ClientId) -> impl Iterator<Item = (&StreamKey, &Stream)> {
        let first = (client, Digest::from_bytes([0; 32]), Slo { latency_ms: 0, max_violation_permille: 0 });
        self.streams.range(first..).take_while(move |((of, ..), _)| *of == client)
    }

    /// Counts a task of a stream that goes to a worker. `is_risk`: it is expected to miss its service level.
    pub(super) fn granted(&mut self, task: &TaskSpec, is_risk: bool) {
        let stream = task.slo.and_then(|slo| self.streams.get_mut(&(task.client, task.model.digest, slo)));
        if let Some(stream) = stream {
            stream.tasks = stream.tasks.wrapping_add(1);
            stream.risked = if is_risk { stream.tasks } else { stream.risked };
        }
    }

    /// Whether a task may be put at risk of missing its service level, to see whether a worker is well again.
    pub(super) fn may_risk_one(&self, task: &TaskSpec) -> bool {
        let Some(slo) = task.slo.filter(|slo| slo.max_violation_permille > 0) else { return false };
        let stream = self.streams.get(&(task.client, task.model.digest, slo));
        let one_in = 1000 * RISK_PART / u32::from(slo.max_violation_permille);
        stream.is_some_and(|stream| stream.tasks.wrapping_sub(stream.risked) >= one_in)
    }

    /// Number of the stream's tasks granted so far, which is its turn. In some turns, workers are tried again.
    pub(super) fn turn(&self, task: &TaskSpec) -> u32 {
        let stream = task.slo.and_then(|slo| self.streams.get(&(task.client, task.model.digest, slo)));
        stream.map_or(0, |stream| stream.tasks)
    }

    /// The stream's verdict on the worker in this turn.
    pub(super) fn stance(&self, now: MonoTime, stream: StreamId, worker: WorkerId, turn: u32) -> Stance {
        let Some(breaker) = self.breakers.get(&(worker, stream)) else { return Stance::Ok };
        let shunned = Stance::Shunned(breaker.missed_permille);
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

    /// Counts a client's task of the stream that ended at the worker.
    pub(super) fn ended(
        &mut self,
        now: MonoTime,
        (client, stream): (ClientId, StreamId),
        worker: WorkerId,
        slo: Slo,
        missed: bool,
    ) {
        self.violations += u64::from(missed);
        let key = (worker, stream);
        if !self.breakers.contains_key(&key) {
            if !self.has_space(now, client) {
                return;
            }
            *self.of_client.entry(client).or_default() += 1;
        }
        let new = || Breaker {
            client,
            verdict: Verdict::Ok,
            window: Window::default(),
            long_window: Window::default(),
            probes: Count::default(),
            taken_back: None,
            missed_permille: 0,
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
            if let Some(breaker) = self.breakers.remove(&key) {
                uncount(&mut self.of_client, breaker.client);
            }
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

    /// Counts streams and breakers; `is_there` tells which workers are.
    pub(super) fn census(&self, is_there: impl Fn(WorkerId) -> bool, census: &mut Census<'_>) {
        let Self { rules: _, streams, streams_made: _, breakers, of_client, next_sweep: _, violations: _, trips: _ } =
            self;
        census.lasting("streams", streams.len(), STREAMS_MAX);
        census.lasting("breakers", breakers.len(), BREAKERS_MAX);
        census.lasting("clients with breakers", of_client.len(), breakers.len());
        let absent = breakers.keys().filter(|(worker, _)| !is_there(*worker)).count();
        census.passing("breakers of absent workers", absent, 0);
    }

    /// Whether the client may have one more breaker.
    fn has_space(&mut self, now: MonoTime, client: ClientId) -> bool {
        let has_space = |slos: &Self| {
            let of_client = slos.of_client.get(&client).copied().unwrap_or(0);
            slos.breakers.len() < BREAKERS_MAX && of_client < CLIENT_BREAKERS_MAX
        };
        if !has_space(self) && now >= self.next_sweep {
            self.next_sweep = now + SWEEP_EVERY;
            for (_, breaker) in self.breakers.extract_if(.., |_, breaker| now.since(breaker.used) >= UNUSED) {
                uncount(&mut self.of_client, breaker.client);
            }
        }
        has_space(self)
    }
}

/// Counts one breaker less of the client.
fn uncount(of_client: &mut BTreeMap<ClientId, u32>, client: ClientId) {
    if let Some(count) = of_client.get_mut(&client) {
        *count -= 1;
        if *count == 0 {
            of_client.remove(&client);
        }
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
            // A task that was granted earlier, or went here because all workers are avoided: then the one that misses
            // least at present is taken.
            Verdict::Violating { until, .. } if now < until => {
                self.missed_permille = self.window.count(now).rate_permille().unwrap_or(self.missed_permille);
                return false;
            }
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
            (self.verdict, self.missed_permille) = (Verdict::Violating { until: now + cool, cool }, rate);
        }
        is_bad
    }
}
