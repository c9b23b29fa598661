//! Sums over requests: latencies, throughput, errors, shares of workers and clients. Owns every reported figure, and
//! that none of them divides by zero. Never decides when a window ends.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use super::{
    sample::{End, NOT_SENT, Parts, Sample, WorkerNo},
    sweep::Load,
    verdict::{Promise, share},
};

/// A request sent later than this after its due time counts as delayed: the tool was late, not the mesh. Timers and
/// scheduler of a quiet system stay well below.
pub(crate) const DELAYED_AFTER_US: u64 = 5_000;

/// Largest latency counted: an hour. Longer ones count as this.
const LATENCY_US_MAX: u64 = 3_600_000_000;

/// Precision of the latencies of all requests: one in a thousand is finer than the difference of any two runs.
const DIGITS: u8 = 3;

/// Precision of each worker's latencies; a window may have hundreds of workers.
const WORKER_DIGITS: u8 = 2;

/// The quantiles that are reported, with their names.
pub(crate) const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999)];

/// A distribution of latencies. An empty one has no figures.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    histogram: Histogram<u64>,
    sum_us: u128,
}

impl Latencies {
    fn new(digits: u8) -> Self {
        let histogram = Histogram::new_with_max(LATENCY_US_MAX, digits);
        Self { histogram: histogram.expect("invariant: digits and bound are constants that fit"), sum_us: 0 }
    }

    fn add(&mut self, us: u64) {
        let us = us.min(LATENCY_US_MAX);
        self.histogram.saturating_record(us);
        self.sum_us += u128::from(us);
    }

    fn merge(&mut self, other: &Self) {
        self.histogram += &other.histogram;
        self.sum_us += other.sum_us;
    }

    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The latency in ms that this part of the requests did not exceed.
    pub(crate) fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        (self.count() > 0).then(|| self.histogram.value_at_quantile(quantile) as f64 / 1e3)
    }

    pub(crate) fn mean_ms(&self) -> Option<f64> {
        (self.count() > 0).then(|| self.sum_us as f64 / self.count() as f64 / 1e3)
    }

    pub(crate) fn max_ms(&self) -> Option<f64> {
        (self.count() > 0).then(|| self.histogram.max() as f64 / 1e3)
    }
}

/// The sums of one worker.
#[derive(Clone, Debug)]
pub(crate) struct WorkerTally {
    pub(crate) latencies: Latencies,
    late: u64,
}

impl WorkerTally {
    fn new() -> Self {
        Self { latencies: Latencies::new(WORKER_DIGITS), late: 0 }
    }

    /// The part of the worker's answers that came too late.
    pub(crate) fn violation(&self) -> Option<f64> {
        share(self.late, self.latencies.count())
    }
}

/// The sums over the requests that ended in a span of time.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    promise: Option<Promise>,
    length_us: u64,
    pub(crate) latencies: Latencies,
    /// Items of answered requests, by client.
    pub(crate) client_items: Vec<u64>,
    /// Failed requests by code.
    pub(crate) errors: BTreeMap<&'static str, u64>,
    /// Requests answered later than promised.
    pub(crate) late: u64,
    /// Requests never answered, and older than promised when the level ended.
    pub(crate) overdue: u64,
    /// Requests not answered when the level ended.
    pub(crate) unanswered: u64,
    /// Those of them that were older than the slowest answer: no latency tells of them.
    pub(crate) outlasting: u64,
    /// Requests sent later than [`DELAYED_AFTER_US`] after their due time.
    pub(crate) delayed: u64,
    parts: Parts,
    pub(crate) workers: BTreeMap<WorkerNo, WorkerTally>,
}

impl Tally {
    pub(crate) fn new(clients: u16, promise: Option<Promise>) -> Self {
        Self {
            promise,
            length_us: 0,
            latencies: Latencies::new(DIGITS),
            client_items: vec![0; usize::from(clients)],
            errors: BTreeMap::new(),
            late: 0,
            overdue: 0,
            unanswered: 0,
            outlasting: 0,
            delayed: 0,
            parts: Parts::default(),
            workers: BTreeMap::new(),
        }
    }

    fn is_late(&self, us: u64) -> bool {
        self.promise.is_some_and(|promise| us > promise.latency_us)
    }

    pub(crate) fn add(&mut self, sample: &Sample) {
        self.delayed += u64::from(sample.delay_us() > DELAYED_AFTER_US);
        match sample.end {
            End::Done { worker, parts } => self.add_done(sample, worker, parts),
            End::Failed(code) => *self.errors.entry(code).or_default() += 1,
            End::Unanswered => self.add_unanswered(sample, sample.ended_us),
        }
    }

    fn add_done(&mut self, sample: &Sample, worker: Option<WorkerNo>, parts: Parts) {
        let latency_us = sample.latency_us();
        let is_late = self.is_late(latency_us);
        self.latencies.add(latency_us);
        self.late += u64::from(is_late);
        if let Some(items) = self.client_items.get_mut(usize::from(sample.client.0)) {
            *items += u64::from(sample.items);
        }
        self.parts.queued_us += parts.queued_us;
        self.parts.sending_us += parts.sending_us;
        self.parts.loading_us += parts.loading_us;
        self.parts.running_us += parts.running_us;
        if let Some(worker) = worker {
            let of = self.workers.entry(worker).or_insert_with(WorkerTally::new);
            of.latencies.add(latency_us);
            of.late += u64::from(is_late);
        }
    }

    /// Adds a request that was under way when its level ended: it took longer than its age.
    pub(crate) fn add_unanswered(&mut self, sample: &Sample, level_ended_us: u64) {
        let age_us = level_ended_us.saturating_sub(sample.intended_us);
        self.unanswered += 1;
        self.overdue += u64::from(self.is_late(age_us));
        self.outlasting += u64::from(self.latencies.max_ms().is_none_or(|max_ms| age_us as f64 / 1e3 > max_ms));
    }

    /// Sets the length of the time span.
    pub(crate) fn lasted(&mut self, length_us: u64) {
        self.length_us = length_us;
    }

    /// Adds another tally's requests and time.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.length_us += other.length_us;
        self.latencies.merge(&other.latencies);
        for (items, more) in self.client_items.iter_mut().zip(&other.client_items) {
            *items += more;
        }
        for (code, count) in &other.errors {
            *self.errors.entry(code).or_default() += count;
        }
        self.late += other.late;
        self.overdue += other.overdue;
        self.unanswered += other.unanswered;
        self.outlasting += other.outlasting;
        self.delayed += other.delayed;
        self.parts.queued_us += other.parts.queued_us;
        self.parts.sending_us += other.parts.sending_us;
        self.parts.loading_us += other.parts.loading_us;
        self.parts.running_us += other.parts.running_us;
        for (worker, part) in &other.workers {
            let of = self.workers.entry(*worker).or_insert_with(WorkerTally::new);
            of.latencies.merge(&part.latencies);
            of.late += part.late;
        }
    }

    pub(crate) fn length_ms(&self) -> f64 {
        self.length_us as f64 / 1e3
    }

    /// Number of answered requests.
    pub(crate) fn done(&self) -> u64 {
        self.latencies.count()
    }

    pub(crate) fn items(&self) -> u64 {
        self.client_items.iter().sum()
    }

    /// Number of requests that ended without an answer, unsent ones included.
    pub(crate) fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    pub(crate) fn not_sent(&self) -> u64 {
        self.errors.get(NOT_SENT).copied().unwrap_or(0)
    }

    pub(crate) fn requests_per_s(&self) -> Option<f64> {
        (self.length_us > 0).then(|| self.done() as f64 * 1e6 / self.length_us as f64)
    }

    pub(crate) fn items_per_s(&self) -> Option<f64> {
        (self.length_us > 0).then(|| self.items() as f64 * 1e6 / self.length_us as f64)
    }

    /// The part of all requests that were late, failed, or overdue. `None` without a promise or without requests.
    pub(crate) fn violation(&self) -> Option<f64> {
        self.promise?;
        share(self.late + self.failed() + self.overdue, self.done() + self.failed() + self.overdue)
    }

    /// Average time of an answered request by step, in ms: queued at the broker, sending, loading, running (a packed
    /// item's share of its batch), and the rest: waiting for others' rows at the worker, and for messages.
    pub(crate) fn parts_ms(&self) -> Option<[(&'static str, f64); 5]> {
        let Parts { queued_us, sending_us, loading_us, running_us } = self.parts;
        let all_us = self.latencies.mean_ms()? * 1e3 * self.done() as f64;
        let rest_us = (all_us - [queued_us, sending_us, loading_us, running_us].iter().sum::<u64>() as f64).max(0.0);
        let [queued, sending, loading, running] = [queued_us, sending_us, loading_us, running_us].map(|us| us as f64);
        let parts = [
            ("queued", queued),
            ("sending", sending),
            ("loading", loading),
            ("running", running),
            ("waiting", rest_us),
        ];
        Some(parts.map(|(name, us)| (name, us / self.done() as f64 / 1e3)))
    }

    /// Jain's index of the clients' items per request that they may have under way: 1 if all had as many, 1/N if one
    /// had all. `None` for one client or no items.
    pub(crate) fn fairness(&self, load: Load) -> Option<f64> {
        let clients = self.client_items.len();
        let shares =
            || self.client_items.iter().enumerate().map(|(client, items)| *items as f64 / load.slots(client, clients));
        let (sum, squares) = (shares().sum::<f64>(), shares().map(|share| share * share).sum::<f64>());
        (clients > 1 && squares > 0.0).then(|| sum * sum / (clients as f64 * squares))
    }

    /// Answers of the busiest worker by those of the idlest that answered. `None` for fewer than two workers.
    pub(crate) fn skew(&self) -> Option<f64> {
        let counts = || self.workers.values().map(|worker| worker.latencies.count());
        let (most, least) = (counts().max()?, counts().min()?);
        (self.workers.len() > 1 && least > 0).then(|| most as f64 / least as f64)
    }

    /// Number of answers by worker.
    pub(crate) fn answers(&self) -> BTreeMap<WorkerNo, u64> {
        self.workers.iter().map(|(worker, part)| (*worker, part.latencies.count())).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{super::sample::ClientNo, *};

    /// An answer of worker 0 to client 0 with this latency, intended and sent at this time.
    pub(crate) fn answered(at_ms: u64, latency_ms: u64) -> Sample {
        let (intended_us, ended_us) = (at_ms * 1000, (at_ms + latency_ms) * 1000);
        let end = End::Done { worker: Some(WorkerNo(0)), parts: Parts::default() };
        Sample { intended_us, sent_us: Some(intended_us), ended_us, items: 1, client: ClientNo(0), end }
    }

    pub(crate) fn by_worker(worker: u32, sample: Sample) -> Sample {
        Sample { end: End::Done { worker: Some(WorkerNo(worker)), parts: Parts::default() }, ..sample }
    }

    fn promise() -> Option<Promise> {
        Some(Promise { latency_us: 50_000, violation_max: 0.05 })
    }

    #[test]
    fn figures_of_a_hundred_requests() {
        let mut tally = Tally::new(1, promise());
        (1..=100).for_each(|ms| tally.add(&answered(0, ms)));
        tally.lasted(2_000_000);

        let near = |got: Option<f64>, wanted: f64| assert!((got.unwrap() / wanted - 1.0).abs() < 0.002, "{got:?}");
        near(tally.latencies.quantile_ms(0.5), 50.0);
        near(tally.latencies.quantile_ms(0.99), 99.0);
        near(tally.latencies.max_ms(), 100.0);
        near(tally.latencies.mean_ms(), 50.5);
        assert_eq!((tally.requests_per_s(), tally.items_per_s()), (Some(50.0), Some(50.0)));
        assert_eq!(tally.violation(), Some(0.5), "51 to 100 ms are above 50 ms");
    }

    #[test]
    fn a_quantile_is_what_its_name_says() {
        let mut tally = Tally::new(1, None);
        (1..=1000).for_each(|ms| tally.add(&answered(0, ms)));
        let told = QUANTILES.map(|(name, quantile)| (name, tally.latencies.quantile_ms(quantile).unwrap().round()));
        assert_eq!(told, [("p50", 500.0), ("p90", 900.0), ("p95", 950.0), ("p99", 990.0), ("p99.9", 999.0)]);
    }

    #[test]
    fn nothing_has_no_figures() {
        let tally = Tally::new(2, promise());
        assert_eq!(
            (tally.latencies.quantile_ms(0.5), tally.latencies.mean_ms(), tally.latencies.max_ms()),
            (None, None, None)
        );
        assert_eq!((tally.requests_per_s(), tally.violation(), tally.fairness(Load::Replay)), (None, None, None));
        assert_eq!((tally.skew(), tally.parts_ms()), (None, None));
    }

    #[test]
    fn latency_counts_from_the_time_the_schedule_meant() {
        let mut tally = Tally::new(1, None);
        // Due at 0, sent at 90 ms because the tool was busy, answered 10 ms later.
        tally.add(&Sample { sent_us: Some(90_000), ..answered(0, 100) });
        assert!(tally.latencies.max_ms().unwrap() >= 99.9, "100 ms, not 10");
        assert_eq!(tally.delayed, 1);
        assert_eq!(tally.violation(), None, "nothing was promised");
    }

    #[test]
    fn a_failed_request_breaks_the_promise_too() {
        let mut tally = Tally::new(1, promise());
        (0..8).for_each(|_| tally.add(&answered(0, 10)));
        tally.add(&Sample { end: End::Failed("BUSY"), ..answered(0, 1) });
        tally.add(&Sample { end: End::Failed(NOT_SENT), sent_us: None, ..answered(0, 0) });
        assert_eq!(tally.violation(), Some(0.2));
        assert_eq!((tally.done(), tally.failed(), tally.not_sent()), (8, 2, 1));
    }

    #[test]
    fn what_is_never_answered_is_late_once_it_is_old_enough() {
        let mut tally = Tally::new(1, promise());
        let unanswered = |at_ms| Sample { end: End::Unanswered, ..answered(at_ms, 0) };
        tally.add_unanswered(&unanswered(0), 1_000_000);
        tally.add_unanswered(&unanswered(990), 1_000_000);
        assert_eq!((tally.unanswered, tally.overdue, tally.violation()), (2, 1, Some(1.0)));
    }

    #[test]
    fn what_waited_longer_than_any_answer_took_is_told_without_a_promise_too() {
        let mut tally = Tally::new(1, None);
        tally.add(&answered(0, 20));
        for at_ms in [0, 990] {
            tally.add_unanswered(&Sample { end: End::Unanswered, ..answered(at_ms, 0) }, 1_000_000);
        }
        assert_eq!((tally.unanswered, tally.outlasting), (2, 1));
    }

    #[test]
    fn shares_of_clients_and_workers() {
        let mut tally = Tally::new(2, None);
        for client in [0, 0, 0, 1] {
            tally.add(&by_worker(u32::from(client), Sample { client: ClientNo(client), items: 8, ..answered(0, 5) }));
        }
        assert_eq!(tally.client_items, [24, 8]);
        assert_eq!(tally.fairness(Load::Replay), Some(0.8), "32² / (2 · (24² + 8²))");
        assert_eq!(tally.skew(), Some(3.0));
    }

    #[test]
    fn a_client_with_more_requests_under_way_is_due_more_items() {
        let mut tally = Tally::new(2, None);
        for client in [0, 1, 0] {
            tally.add(&Sample { client: ClientNo(client), ..answered(0, 5) });
        }
        let index = [2, 3, 4].map(|concurrency| tally.fairness(Load::Closed { concurrency }).unwrap());
        assert_eq!(index, [0.9, 1.0, 0.9], "of three at a time the first client has two");
    }

    #[test]
    fn windows_add_up_to_their_level() {
        let (mut one, mut other) = (Tally::new(1, promise()), Tally::new(1, promise()));
        one.add(&answered(0, 10));
        one.lasted(1_000_000);
        other.add(&by_worker(1, answered(0, 90)));
        other.add(&Sample { end: End::Failed("BUSY"), ..answered(0, 1) });
        other.lasted(1_000_000);
        one.merge(&other);
        assert_eq!((one.done(), one.failed(), one.late, one.workers.len()), (2, 1, 1, 2));
        assert_eq!((one.requests_per_s(), one.violation()), (Some(1.0), Some(2.0 / 3.0)));
    }
}
