//! What batches of one model cost, and whether its items may be packed at all.
//!
//! ```text
//!              Same                            the largest size measured pays and is the best: twice it may be tried
//!   Unknown ─────────► packed ── size 8 ──► 16 ──► 32 ──► 64      else the best size stays
//!      │  ▲
//!      │  └── inconclusive, or the probe failed: again later, after twice as many batches
//!      └────► Differs, Unsupported: one by one for ever
//! ```
//!
//! That nothing is gained may be true only beside other work: it is asked again now and then, and ever more rarely.
//!
//! Owns t(N) as measured, the verdict and the sizes that follow. Never starts anything.

mod point;

use proto_msgs::{ModelCost, Packing, curve_us, limits::CURVE_POINTS_MAX};

use super::api::{BatchTimes, Equality};
use point::{JUDGED_AFTER, Point};

/// Sizes at which a curve keeps a point; a batch counts for the largest that is not above it.
const SIZES: [u32; CURVE_POINTS_MAX] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024];

/// Items in the batch that shows whether packing is right: enough to tell rows apart, few enough to run one by one.
pub(super) const PROBE_ROWS_MAX: u32 = 8;

/// The same where an item takes long or nobody knows how long: others wait meanwhile.
const PROBE_ROWS_SLOW: u32 = 4;

/// Up to here an item does not take long.
const PROBE_QUICK_US: u64 = 10_000;

/// A batch must take less than this share of what its items take alone: below it the gain is not worth the risk.
const PAYS_PERCENT: u64 = 80;

/// Batches of the batch lane have the smallest size this near to the best: the next realtime item waits for less.
const CUT_PERMILLE: u64 = 1020;

/// A size of which an item costs so much of the best is still good where more slots are idle than there are full batches.
const SPREAD_PERMILLE: u64 = 1500;

/// Of sizes at which an item costs no more than this part of the least, the smallest is as good: they differ by noise.
const BEST_PERMILLE: u64 = 1005;

/// Batches after which it is asked again whether a model gains by packing; twice as many after each time that it did not, up
/// to 2 to the power of the other. The question costs one packed run.
const REVIEW_AFTER: u32 = 256;
const REVIEWS_MAX: u32 = 6;
/// After so many, if a single item takes another time than it did then.
const REVIEW_NOT_BEFORE: u32 = 32;

/// Probes that told nothing put the next one off by twice as many batches, up to 2 to the power of this.
const PATIENCE_MAX: u32 = 10;

/// What was found about many rows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Proof {
    Unknown,
    Same,
    Differs,
    Unsupported,
}

/// How items are to be run now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Plan {
    /// One after the other.
    Single,
    /// So many one after the other, and then together to see whether that gives the same.
    Probe { size: u32 },
    /// Up to `size` together. `floor`: smaller batches than this are wasteful even if slots are idle.
    Pack { size: u32, floor: u32 },
}

/// The costs of one model with certain limits on one kind of device.
#[derive(Debug)]
pub(super) struct Cost {
    points: [Point; CURVE_POINTS_MAX],
    proof: Proof,
    is_probing: bool,
    /// Probes that told nothing, and batches until the next one.
    fruitless: u32,
    wait_batches: u32,
    /// Batches since it was found that nothing is gained, what a single item took then, and how often that was found before.
    gainless_batches: u32,
    gainless_us: u64,
    reviews: u32,
    /// Items in a batch at most.
    rows_max: u32,
    /// A larger batch failed, and whether its size was to blame is not known yet.
    doubted_max: Option<u32>,
    load_us: u64,
    dispatched: [u32; 4],
    /// Which batch of the worker was the last of this model.
    pub(super) touched: u64,
}

impl Cost {
    pub(super) fn new(rows_max: u16) -> Self {
        Self {
            points: [Point::default(); CURVE_POINTS_MAX],
            proof: Proof::Unknown,
            is_probing: false,
            fruitless: 0,
            wait_batches: 0,
            gainless_batches: 0,
            gainless_us: 0,
            reviews: 0,
            rows_max: u32::from(rows_max.max(1)),
            doubted_max: None,
            load_us: 0,
            dispatched: [0; 4],
            touched: 0,
        }
    }

    // What is learned.

    pub(super) fn learn(&mut self, rows: u32, us: u64) {
        let place = SIZES.iter().rposition(|size| *size <= rows);
        if let Some(place) = place {
            self.points[place].learn(rows, us);
        }
    }

    pub(super) fn loaded(&mut self, load_us: u64) {
        if load_us > 0 {
            self.load_us = if self.load_us == 0 { load_us } else { (self.load_us * 3 + load_us) / 4 };
        }
    }

    pub(super) fn dispatched(&mut self, reason: proto_msgs::Dispatch) {
        let count = &mut self.dispatched[reason as usize];
        *count = count.saturating_add(1);
        self.wait_batches = self.wait_batches.saturating_sub(1);
        self.review();
    }

    /// Asks again, now and then, whether a model gains by packing that did not.
    fn review(&mut self) {
        let is_gainless = self.proof == Proof::Same && self.size() == 1;
        self.gainless_batches = if is_gainless { self.gainless_batches + 1 } else { 0 };
        let (now_us, then_us) = (self.batch_us(1), &mut self.gainless_us);
        if self.gainless_batches <= 1 {
            *then_us = now_us;
        }
        let is_other = now_us > then_us.saturating_mul(2) || *then_us > now_us.saturating_mul(2);
        let after = if is_other { REVIEW_NOT_BEFORE } else { REVIEW_AFTER << self.reviews };
        if self.gainless_batches >= after {
            self.proof = Proof::Unknown;
            self.points[1..].fill(Point::default());
            (self.gainless_batches, self.reviews) = (0, (self.reviews + 1).min(REVIEWS_MAX));
        }
    }

    pub(super) fn probe_begins(&mut self) {
        self.is_probing = true;
    }

    /// The probe is over; `None` if it came to nothing.
    pub(super) fn probe_ended(&mut self, rows: u32, times: Option<&BatchTimes>) {
        self.is_probing = false;
        if let Some(single_us) = times.and_then(|times| times.single_us) {
            self.learn(1, single_us);
        }
        self.proof = match times.and_then(|times| times.equal) {
            Some(Equality::Same) => Proof::Same,
            Some(Equality::Differs) => Proof::Differs,
            Some(Equality::Unsupported) => Proof::Unsupported,
            Some(Equality::Inconclusive) | None => {
                self.fruitless = (self.fruitless + 1).min(PATIENCE_MAX);
                self.wait_batches = 1 << self.fruitless;
                Proof::Unknown
            }
        };
        if let (Proof::Same, Some(packed_us)) = (self.proof, times.and_then(|times| times.packed_us)) {
            self.learn(rows, packed_us);
        }
    }

    /// So many rows together failed: until it is known why, half as many at most.
    pub(super) fn doubted(&mut self, rows: u32) {
        self.doubted_max = Some(rows / 2);
    }

    /// It was not their number.
    pub(super) fn cleared(&mut self) {
        self.doubted_max = None;
    }

    /// So many rows together fail though each runs alone.
    pub(super) fn too_large(&mut self, rows: u32) {
        self.doubted_max = None;
        self.rows_max = self.rows_max.min(rows / 2).max(1);
        for (point, size) in self.points.iter_mut().zip(SIZES) {
            if size > self.rows_max {
                *point = Point::default();
            }
        }
        if self.rows_max < 2 {
            self.proof = Proof::Unsupported;
        }
    }

    // What follows.

    fn measured(&self) -> impl DoubleEndedIterator<Item = &Point> + Clone {
        self.points.iter().filter(|point| point.count > 0)
    }

    /// Microseconds of a batch of `rows`; 0 if nothing is known.
    pub(super) fn batch_us(&self, rows: u32) -> u64 {
        curve_us(self.measured().map(|point| (point.rows_milli, point.us)), u64::from(rows) * 1000)
    }

    fn pays(&self, point: &Point) -> bool {
        let alone_us = self.batch_us(1).saturating_mul(point.rows_milli) / 1000;
        point.us.saturating_mul(100) < alone_us.saturating_mul(PAYS_PERCENT)
    }

    /// The best size as measured; 1 if none pays.
    pub(super) fn best(&self) -> u32 {
        if self.proof != Proof::Same {
            return 1;
        }
        let paying = || self.measured().filter(|point| point.rows_milli > 1000 && self.pays(point));
        let Some(least_ns) = paying().map(Point::item_ns).min() else { return 1 };
        let near = |point: &&Point| point.item_ns().saturating_mul(1000) <= least_ns.saturating_mul(BEST_PERMILLE);
        paying().find(near).map_or(1, |point| point.rows().min(self.rows_max))
    }

    /// The most that may be packed: the best size, or more where nobody has tried.
    pub(super) fn size(&self) -> u32 {
        self.open_size().min(self.doubted_max.unwrap_or(u32::MAX)).max(1)
    }

    fn open_size(&self) -> u32 {
        let best = self.best();
        let Some(last) = self.measured().next_back().filter(|last| last.rows_milli > 1000) else { return best };
        let is_open = last.count < JUDGED_AFTER;
        match self.pays(last) {
            true if is_open || last.rows() <= best => last.rows().saturating_mul(2).min(self.rows_max),
            false if is_open => last.rows().min(self.rows_max),
            _ => best,
        }
    }

    /// The smallest size whose item costs at most so much of the best one's.
    fn smallest_within(&self, size: u32, permille: u64) -> u32 {
        let item_ns = |rows: u32| self.batch_us(rows).saturating_mul(1000) / u64::from(rows.max(1));
        let limit_ns = item_ns(size).saturating_mul(permille) / 1000;
        SIZES.into_iter().find(|rows| *rows < size && item_ns(*rows) <= limit_ns).unwrap_or(size)
    }

    /// How items are to be run now, by a batch lane that must not keep the other waiting or by one that need not care.
    pub(super) fn plan(&self, is_cut: bool) -> Plan {
        match self.proof {
            Proof::Unknown if self.rows_max > 1 && !self.is_probing && self.wait_batches == 0 => {
                let is_quick = (1..=PROBE_QUICK_US).contains(&self.batch_us(1));
                let size = if is_quick { PROBE_ROWS_MAX } else { PROBE_ROWS_SLOW };
                Plan::Probe { size: size.min(self.rows_max) }
            }
            Proof::Same if self.size() > 1 => {
                let (size, best) = (self.size(), self.best());
                let is_tried = size <= best;
                let floor = self.smallest_within(best.max(2), SPREAD_PERMILLE).max(2);
                let size = if is_cut && is_tried { self.smallest_within(best, CUT_PERMILLE) } else { size };
                Plan::Pack { size: size.clamp(2, self.size()), floor: floor.min(self.size()) }
            }
            _ => Plan::Single,
        }
    }

    /// As the wire says it.
    pub(super) fn said(&self, model: proto_msgs::Digest) -> ModelCost {
        let narrow = |us: u64| u32::try_from(us).unwrap_or(u32::MAX);
        let mut curve: Vec<(u16, u32)> = Vec::new();
        for point in self.measured() {
            let rows = u16::try_from(point.rows()).unwrap_or(u16::MAX);
            if curve.last().is_none_or(|(last, _)| *last < rows) {
                curve.push((rows, narrow(point.us)));
            }
        }
        let packing = match self.proof {
            Proof::Unknown => Packing::Unknown,
            Proof::Same if self.size() > 1 => Packing::On,
            Proof::Same => Packing::NoGain,
            Proof::Differs => Packing::Differs,
            Proof::Unsupported => Packing::Unsupported,
        };
        ModelCost {
            model,
            packing,
            best_batch: u16::try_from(self.best()).unwrap_or(u16::MAX),
            next_batch: u16::try_from(self.size()).unwrap_or(u16::MAX),
            curve,
            load_us: narrow(self.load_us),
            dispatched: self.dispatched,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A probe of so many rows shows that packing is right.
    fn probe(cost: &mut Cost, rows: u32, time: impl Fn(u32) -> u64) {
        assert!(matches!(cost.plan(false), Plan::Probe { .. }));
        cost.probe_begins();
        assert_eq!(cost.plan(false), Plan::Single, "one probe at a time");
        let (single_us, packed_us) = (Some(time(1)), Some(time(rows)));
        let times = BatchTimes { single_us, packed_us, equal: Some(Equality::Same), ..BatchTimes::default() };
        cost.probe_ended(rows, Some(&times));
    }

    /// A model that takes so long for so many rows, just probed.
    fn probed(rows: u32, time: impl Fn(u32) -> u64) -> Cost {
        let mut cost = Cost::new(64);
        probe(&mut cost, rows, time);
        cost
    }

    fn size(cost: &Cost) -> u32 {
        match cost.plan(false) {
            Plan::Pack { size, .. } => size,
            Plan::Single | Plan::Probe { .. } => 1,
        }
    }

    #[test]
    fn sizes_double_while_they_pay() {
        let time = |rows| 5000 + 200 * u64::from(rows);
        let mut cost = probed(8, time);
        for expected in [16, 32, 64, 64, 64] {
            assert_eq!(size(&cost), expected);
            assert_eq!(u32::from(cost.said(proto_msgs::Digest::from_bytes([0; 32])).next_batch), expected);
            cost.learn(expected, time(expected));
        }
        assert_eq!(cost.best(), 64);
        assert_eq!(cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, Packing::On);
    }

    #[test]
    fn sizes_stop_where_an_item_gets_no_cheaper() {
        // Beyond 16 the device needs a second pass.
        let time =
            |rows: u32| 5000 * u64::from(rows.div_ceil(16)) + 100 * u64::from(rows) + u64::from(rows > 16) * 3000;
        let mut cost = probed(8, time);
        for _ in 0..10 {
            let rows = size(&cost);
            cost.learn(rows, time(rows));
        }
        assert_eq!((cost.best(), size(&cost)), (16, 16));
    }

    #[test]
    fn a_batch_is_worth_it_only_where_it_saves_a_fifth() {
        let verdict = |permille: u64| {
            // Any number of rows takes this part of what they take one by one.
            let time = |rows: u32| 1000 * u64::from(rows) * if rows == 1 { 1000 } else { permille } / 1000;
            let mut cost = probed(4, time);
            (0..100).for_each(|_| cost.learn(size(&cost), time(size(&cost))));
            (cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, size(&cost) > 1)
        };
        assert_eq!(verdict(790), (Packing::On, true));
        assert_eq!(verdict(799), (Packing::On, true));
        assert_eq!(verdict(801), (Packing::NoGain, false));
        assert_eq!(verdict(810), (Packing::NoGain, false));
    }

    #[test]
    fn no_gain_is_believed_only_of_what_is_warm() {
        let time = |rows| 1000 * u64::from(rows);
        let mut cost = probed(4, time);
        for _ in 0..2 {
            assert_eq!(size(&cost), 4);
            cost.learn(4, time(4));
        }
        assert_eq!(cost.plan(false), Plan::Single);
        assert_eq!(cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, Packing::NoGain);
    }

    #[test]
    fn a_first_packed_run_that_compiles_does_not_spoil_the_verdict() {
        let time = |rows| 5000 + 200 * u64::from(rows);
        let mut cost = probed(8, |rows| if rows == 8 { 300_000 } else { time(rows) });
        assert_eq!(size(&cost), 8);
        cost.learn(8, time(8));
        assert_eq!(size(&cost), 16);
    }

    #[test]
    fn the_batch_lane_is_cut_where_it_costs_nothing() {
        let time = |rows| 5000 + 5000 * u64::from(rows);
        let mut cost = probed(8, time);
        for rows in [16, 32, 64] {
            (0..3).for_each(|_| cost.learn(rows, time(rows)));
        }
        assert_eq!(cost.plan(false), Plan::Pack { size: 64, floor: 2 });
        assert_eq!(cost.plan(true), Plan::Pack { size: 32, floor: 2 });
    }

    #[test]
    fn a_model_that_gained_nothing_beside_other_work_is_tried_again_and_ever_more_rarely() {
        let beside_others = |rows: u32| 5000 * u64::from(rows);
        let mut cost = Cost::new(64);
        let find_no_gain = |cost: &mut Cost| {
            probe(cost, 4, beside_others);
            (0..2).for_each(|_| cost.learn(4, beside_others(4)));
            assert_eq!(cost.plan(false), Plan::Single);
        };
        for review in 0..3 {
            find_no_gain(&mut cost);
            let run = || (cost.dispatched(proto_msgs::Dispatch::Idle), cost.plan(false)).1;
            let batches = std::iter::repeat_with(run).take_while(|plan| *plan == Plan::Single).count() + 1;
            assert_eq!(batches, (REVIEW_AFTER << review) as usize);
        }
        find_no_gain(&mut cost);
        // A single item takes less than half of what it did: the verdict is of another time.
        cost.dispatched(proto_msgs::Dispatch::Idle);
        (0..3).for_each(|_| cost.learn(1, 2000));
        (0..REVIEW_NOT_BEFORE).for_each(|_| cost.dispatched(proto_msgs::Dispatch::Idle));
        probe(&mut cost, 4, |rows| 5000 + 200 * u64::from(rows));
        assert_eq!(size(&cost), 8, "and now it gains");
    }

    #[test]
    fn a_probe_that_tells_nothing_is_repeated_later_and_ever_later() {
        let mut cost = Cost::new(64);
        for patience in [2, 4, 8] {
            cost.probe_begins();
            let times = BatchTimes { equal: Some(Equality::Inconclusive), ..BatchTimes::default() };
            cost.probe_ended(4, Some(&times));
            for _ in 0..patience {
                assert_eq!(cost.plan(false), Plan::Single);
                cost.dispatched(proto_msgs::Dispatch::Idle);
            }
            assert!(matches!(cost.plan(false), Plan::Probe { .. }));
        }
    }

    #[test]
    fn what_differs_is_never_packed() {
        let mut cost = Cost::new(64);
        cost.probe_begins();
        let times = BatchTimes { equal: Some(Equality::Differs), packed_us: Some(1), ..BatchTimes::default() };
        cost.probe_ended(4, Some(&times));
        (0..2000).for_each(|_| cost.dispatched(proto_msgs::Dispatch::Idle));
        assert_eq!(cost.plan(false), Plan::Single);
    }

    #[test]
    fn a_size_that_fails_is_not_tried_again() {
        let time = |rows| 5000 + 200 * u64::from(rows);
        let mut cost = probed(8, time);
        cost.learn(16, time(16));
        cost.too_large(32);
        cost.learn(16, time(16));
        assert_eq!(size(&cost), 16);
        cost.too_large(3);
        assert_eq!(cost.plan(false), Plan::Single);
    }
}
