//! The run times of one model's batches, and the verdict whether its items may be packed.
//!
//! ```text
//!              Same                            the largest size measured pays and is the best: twice it may be tried
//!   Unknown ─────────► packed ── size 8 ──► 16 ──► 32 ──► 64      else the best size stays, or the last one that was
//!      │  ▲                                                           found right: each larger size is compared first
//!      │  └── inconclusive, or the probe failed: again later, after twice as many batches
//!      └────► Differs, Unsupported: one by one for ever
//! ```
//!
//! A model that passed is not trusted for ever: now and then a packed batch is compared with single runs of some rows
//! before its outputs count. A difference ends packing for good.
//!
//! Figures that no batch measures any more may be from worse times: a verdict of no gain, dear small sizes, and a largest
//! size that pays, but less than another, are reviewed now and then.
//!
//! Owns the measured t(N), the verdict and the resulting sizes. Never starts anything.

mod failures;
mod point;
mod reviews;
mod smaller;

use std::time::Duration;

use proto_msgs::{ModelCost, Packing, curve_us, limits::CURVE_POINTS_MAX};

use super::{
    api::{BatchKind, BatchTimes, Equality},
    cut::Cut,
};
use crate::MonoTime;
use failures::Excused;
use point::{JUDGED_AFTER, Point};
use reviews::Reviews;

/// Sizes at which a curve has a point. A batch counts for the largest size that is not above its own.
const SIZES: [u32; CURVE_POINTS_MAX] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024];

/// Most items in a probe batch: enough to tell rows apart, few enough to run one by one.
pub(super) const PROBE_ROWS_MAX: u32 = 8;

/// Most items in a probe if an item takes long, or its time is unknown: others wait meanwhile.
const PROBE_ROWS_SLOW: u32 = 4;

/// Items in a probe if an item takes very long: its first rows are answered only with the last.
const PROBE_ROWS_LONG: u32 = 2;

/// Longest time of an item that counts as quick, and longest that does not count as very long, microseconds.
const PROBE_QUICK_US: u64 = 10_000;
const PROBE_SLOW_US: u64 = 500_000;

/// Longest single run of a model that is compared at all: no row waits ten seconds for what is nobody's.
pub(super) const COMPARE_SINGLE_US: u64 = 3_300_000;

/// A batch must take less than this share of its items' single runs: a smaller gain is not worth the risk.
const PAYS_PERCENT: u64 = 80;

/// Sizes with a cost per item up to this, relative to the least, differ only by noise: the smallest of them is the
/// best.
const BEST_PERMILLE: u64 = 1005;

/// Pause between two runs after which the figures are old: the machine may have other work by now, or less.
const OLD_AFTER: Duration = Duration::from_secs(5);

/// Batches until a probe that was cut short is gone on with: others had to wait for it.
const GO_ON_AFTER: u32 = 1;

/// After a probe without answer, the wait for the next one doubles, up to 2^`PATIENCE_MAX` batches.
const PATIENCE_MAX: u32 = 10;

/// Packed batches between two that are compared with single runs of some rows. Before so many have run, the 8th, 16th,
/// 32nd … is: the first ones of each size were compared anyway.
const SPOT_EVERY: u32 = 1000;
const SPOT_FIRST: u32 = 8;

/// The verdict on packing a model's rows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Proof {
    Unknown,
    Same,
    Differs,
    Unsupported,
}

/// How items are run now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Plan {
    /// Run items one after the other.
    Single,
    /// Run `size` items one after the other, then together, and compare the outputs.
    Probe { size: u32 },
    /// Run up to `size` items together, if so many are worth it. `floor`: smaller batches are wasteful even if slots
    /// are idle.
    Pack { size: u32, floor: u32 },
}

/// The costs of one model with given limits on one device.
#[derive(Debug)]
pub(super) struct Cost {
    points: [Point; CURVE_POINTS_MAX],
    proof: Proof,
    is_probing: bool,
    /// Probes without answer, and batches until the next probe.
    fruitless: u32,
    wait_batches: u32,
    reviews: Reviews,
    /// Most items in a batch.
    rows_max: u32,
    /// Most items of a packed call that gave the same as single runs.
    proven_rows: u32,
    /// Packed batches since the verdict that they may be, without those of a new size.
    packed_batches: u32,
    /// Size limit after a larger batch failed, while it is unknown whether the size was to blame.
    doubted_max: Option<u32>,
    excused: Option<Excused>,
    /// Packed batches in a row whose rows ran one by one all the same.
    apart: u32,
    load_us: u64,
    /// When the last run ended, and whether the figures were old when the present one began.
    ran_until: Option<MonoTime>,
    is_old: bool,
    pub(super) dispatched: [u32; 4],
    /// The number of the last batch of this model.
    pub(super) touched: u64,
    /// Its share of the model's latest batches, in no unit.
    pub(super) recent: u32,
}

impl Cost {
    pub(super) fn new(rows_max: u16) -> Self {
        Self {
            points: [Point::default(); CURVE_POINTS_MAX],
            proof: Proof::Unknown,
            is_probing: false,
            fruitless: 0,
            wait_batches: 0,
            reviews: Reviews::default(),
            rows_max: u32::from(rows_max.max(1)),
            proven_rows: 0,
            packed_batches: 0,
            doubted_max: None,
            excused: None,
            apart: 0,
            load_us: 0,
            ran_until: None,
            is_old: false,
            dispatched: [0; 4],
            touched: 0,
            recent: 0,
        }
    }

    // What is learned.

    /// A run took this span: what is learned next is from it.
    pub(super) fn ran(&mut self, from: MonoTime, until: MonoTime) {
        self.is_old = self.ran_until.is_some_and(|last| from.since(last) >= OLD_AFTER);
        self.ran_until = Some(until);
    }

    pub(super) fn learn(&mut self, rows: u32, us: u64) {
        self.apart = if rows > 1 { 0 } else { self.apart };
        let Some(place) = SIZES.iter().rposition(|size| *size <= rows) else { return };
        let expected_us = self.batch_us(rows);
        let is_largest = self.points[place + 1..].iter().all(|larger| larger.count == 0);
        if is_largest && self.reviews.tries_largest() {
            self.points[place].doubt();
            self.reviews.largest_ran();
        }
        self.points[place].learn(rows, us, self.is_old);
        if self.is_old && us < expected_us / 2 {
            self.recover(place, us, expected_us);
        }
    }

    /// An old figure was much too high, so the others of that time are, too. A smaller batch takes no longer than this
    /// one. A larger one gains as much, unless its figure is from better times already.
    fn recover(&mut self, place: usize, us: u64, expected_us: u64) {
        for (other, point) in self.points.iter_mut().enumerate().filter(|(other, _)| *other != place) {
            if other < place {
                point.us = point.us.min(us);
            } else if point.us >= expected_us {
                let gained_us = u128::from(point.us) * u128::from(us) / u128::from(expected_us.max(1));
                point.us = u64::try_from(gained_us).unwrap_or(u64::MAX).max(us);
            }
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

    /// Counts a batch, and reviews the figures that are due.
    fn review(&mut self) {
        let is_gainless = self.proof == Proof::Same && self.size() == 1;
        if self.reviews.is_gain_due(is_gainless, self.batch_us(1)) {
            self.proof = Proof::Unknown;
            self.points[1..].fill(Point::default());
        }
        let best = self.best();
        if self.reviews.are_small_due() && best > 1 {
            self.forget_dear_below(best);
        }
        let is_passed_over =
            |largest: &Point| largest.count >= JUDGED_AFTER && largest.rows() > best && self.pays(largest);
        let is_passed_over = best > 1 && self.largest().is_some_and(is_passed_over);
        self.reviews.count_passed_over(is_passed_over);
    }

    /// Forgets the figures of sizes below the best that do not pay.
    fn forget_dear_below(&mut self, best: u32) {
        let is_dear = self.points.map(|point| point.rows_milli > 1000 && point.rows() < best && !self.pays(&point));
        for (point, _) in self.points.iter_mut().zip(is_dear).filter(|(_, is_dear)| *is_dear) {
            *point = Point::default();
        }
    }

    pub(super) fn probe_begins(&mut self) {
        self.is_probing = true;
    }

    /// Takes in the single runs of a probe.
    pub(super) fn probe_answered(&mut self, times: &BatchTimes) {
        if let Some(single_us) = times.single_us {
            self.learn(1, single_us);
        }
    }

    /// Takes in what the comparison of such a batch tells of `rows` rows in one call; `None` if it failed. The time until
    /// now was no pause of the machine.
    pub(super) fn compared(&mut self, now: MonoTime, (kind, rows): (BatchKind, u32), times: Option<&BatchTimes>) {
        self.ran_until = Some(now);
        match kind {
            BatchKind::Check => self.checked(rows, &times.copied().unwrap_or_default()),
            _ => self.probe_ended(times.and_then(|times| times.packed_rows).unwrap_or(rows), times),
        }
    }

    /// Takes in the result of a probe; `None` if the probe failed.
    pub(super) fn probe_ended(&mut self, rows: u32, times: Option<&BatchTimes>) {
        self.is_probing = false;
        // Another batch has shown it meanwhile.
        if self.proof == Proof::Differs {
            return;
        }
        self.proof = match times.and_then(|times| times.equal) {
            Some(Equality::Same) => Proof::Same,
            Some(Equality::Differs) => Proof::Differs,
            Some(Equality::Unsupported) => Proof::Unsupported,
            Some(Equality::Unfinished) => {
                self.wait_batches = GO_ON_AFTER;
                Proof::Unknown
            }
            Some(Equality::Inconclusive) | None => {
                self.try_later();
                Proof::Unknown
            }
        };
        if self.proof == Proof::Same {
            (self.proven_rows, self.packed_batches, self.fruitless) = (rows, 0, 0);
        }
        if let (Proof::Same, Some(packed_us)) = (self.proof, times.and_then(|times| times.packed_us)) {
            self.learn(rows, packed_us);
        }
    }

    fn try_later(&mut self) {
        self.fruitless = (self.fruitless + 1).min(PATIENCE_MAX);
        self.wait_batches = 1 << self.fruitless;
    }

    /// Whether a packed call of so many rows has never been compared with single runs.
    pub(super) fn is_unproven(&self, rows: u32) -> bool {
        rows > self.proven_rows
    }

    /// Takes in the result of a packed batch that was compared with single runs.
    pub(super) fn checked(&mut self, rows: u32, times: &BatchTimes) {
        match times.equal {
            Some(Equality::Same) => {
                (self.proven_rows, self.fruitless) = (self.proven_rows.max(rows), 0);
                self.learn(rows, times.run_us);
            }
            // Another batch of this size, in another slot at the same time, was right: the rows depend on each other at
            // times.
            Some(Equality::Differs) if rows <= self.proven_rows => self.proof = Proof::Differs,
            Some(Equality::Differs | Equality::Unsupported) => self.limit_to(self.proven_rows),
            Some(Equality::Unfinished) => self.wait_batches = GO_ON_AFTER,
            Some(Equality::Inconclusive) | None => self.try_later(),
        }
    }

    pub(super) fn packed_begins(&mut self) {
        self.packed_batches = self.packed_batches.saturating_add(1);
    }

    /// Whether some rows of the next packed batch run by themselves, too.
    pub(super) fn is_spot_due(&self) -> bool {
        let number = self.packed_batches.saturating_add(1);
        number.is_multiple_of(SPOT_EVERY) || (SPOT_FIRST..SPOT_EVERY).contains(&number) && number.is_power_of_two()
    }

    /// Takes in the result of a packed batch of a known size of which some rows ran by themselves, too.
    pub(super) fn spotted(&mut self, rows: u32, times: &BatchTimes) {
        match times.equal {
            Some(Equality::Differs) => self.proof = Proof::Differs,
            _ => self.learn(rows, times.run_us),
        }
    }

    // What follows.

    fn measured(&self) -> impl DoubleEndedIterator<Item = &Point> + Clone {
        self.points.iter().filter(|point| point.count > 0)
    }

    /// Run time of a batch of `rows`, microseconds; 0 if unknown.
    pub(super) fn batch_us(&self, rows: u32) -> u64 {
        curve_us(self.measured().map(|point| (point.rows_milli, point.us)), u64::from(rows) * 1000)
    }

    /// The largest size measured above one item.
    fn largest(&self) -> Option<&Point> {
        self.measured().next_back().filter(|largest| largest.rows_milli > 1000)
    }

    fn pays(&self, point: &Point) -> bool {
        self.saves(point.rows_milli, point.us)
    }

    /// Whether so many rows are worth a batch that takes this long.
    fn saves(&self, rows_milli: u64, us: u64) -> bool {
        let alone_us = self.batch_us(1).saturating_mul(rows_milli) / 1000;
        us.saturating_mul(100) < alone_us.saturating_mul(PAYS_PERCENT)
    }

    /// Whether a batch of exactly so many rows pays. Between two measured sizes it counts as taking as long as the
    /// larger one: some devices compute in steps. A size of the curve itself is tried if the others promise it, and the
    /// largest size tried so far is run until it can be judged.
    fn is_worth_it(&self, rows: u32) -> bool {
        let Some(place) = SIZES.iter().rposition(|size| *size <= rows).filter(|place| *place > 0) else { return false };
        let (point, larger, rows_milli) = (&self.points[place], &self.points[place + 1..], u64::from(rows) * 1000);
        // No batch takes longer than a larger one: if it seems so, this figure is from worse times.
        let is_present = larger.iter().all(|larger| larger.count == 0 || larger.us >= point.us);
        let is_known = point.count >= JUDGED_AFTER && is_present;
        let us = if !is_known && SIZES[place] == rows {
            let others = self.points.iter().enumerate().filter(|(at, other)| *at != place && other.count > 0);
            curve_us(others.map(|(_, other)| (other.rows_milli, other.us)), rows_milli)
        } else {
            let next = self.measured().find(|point| point.rows_milli >= rows_milli);
            next.map_or_else(|| self.batch_us(rows), |next| next.us)
        };
        let promises = self.saves(rows_milli, us);
        if is_known {
            return promises && self.pays(point);
        }
        promises || larger.iter().all(|larger| larger.count == 0)
    }

    /// How many of the `rows` rows that could run together do so: all, or as many as a smaller size that pays. 1: none.
    pub(super) fn together(&self, rows: u32) -> u32 {
        let is_largest = self.largest().is_none_or(|largest| rows >= largest.rows());
        // The largest size is tried once more: only that one, no size between it and the best.
        let rows = if self.reviews.tries_largest() && !is_largest { rows.min(self.best()) } else { rows };
        if self.is_worth_it(rows) {
            return rows;
        }
        SIZES.into_iter().rev().find(|size| *size < rows && self.is_worth_it(*size)).unwrap_or(1)
    }

    /// The best measured size; 1 if none pays.
    pub(super) fn best(&self) -> u32 {
        if self.proof != Proof::Same {
            return 1;
        }
        let paying = || self.measured().filter(|point| point.rows_milli > 1000 && self.pays(point));
        let Some(least_ns) = paying().map(Point::item_ns).min() else { return 1 };
        let near = |point: &&Point| point.item_ns().saturating_mul(1000) <= least_ns.saturating_mul(BEST_PERMILLE);
        paying().find(near).map_or(1, |point| point.rows().min(self.rows_max))
    }

    /// Most items to pack now: the best size, or a larger one that has not been judged yet.
    pub(super) fn size(&self) -> u32 {
        // After a comparison that told nothing, larger sizes wait for their next one.
        let proven_max = if self.wait_batches > 0 { self.proven_rows } else { u32::MAX };
        self.open_size().min(self.doubted_max.unwrap_or(u32::MAX)).min(proven_max).max(1)
    }

    fn open_size(&self) -> u32 {
        let best = self.best();
        let Some(largest) = self.largest() else { return best };
        let is_open = largest.count < JUDGED_AFTER;
        match self.pays(largest) {
            true if is_open || largest.rows() <= best => largest.rows().saturating_mul(2).min(self.rows_max),
            true if self.reviews.tries_largest() => largest.rows().min(self.rows_max),
            false if is_open => largest.rows().min(self.rows_max),
            _ => best,
        }
    }

    /// Whether the next batch is a probe. Models with very long runs are never compared.
    fn may_probe(&self) -> bool {
        let is_open = self.rows_max > 1 && !self.is_probing && self.wait_batches == 0;
        is_open && self.batch_us(1) <= COMPARE_SINGLE_US
    }

    /// How items are run now. `cut`: the batch lane takes smaller batches, to keep realtime rows from waiting.
    pub(super) fn plan(&self, cut: Cut) -> Plan {
        match self.proof {
            Proof::Unknown if self.may_probe() => {
                let size = match self.batch_us(1) {
                    1..=PROBE_QUICK_US => PROBE_ROWS_MAX,
                    0..=PROBE_SLOW_US => PROBE_ROWS_SLOW,
                    _ => PROBE_ROWS_LONG,
                };
                let short = cut.within_us.checked_div(self.batch_us(1)).unwrap_or(u64::MAX).max(2);
                Plan::Probe { size: size.min(self.rows_max).min(u32::try_from(short).unwrap_or(u32::MAX)) }
            }
            Proof::Same if self.size() > 1 => {
                let (size, best) = (self.size(), self.best());
                let is_too_few = cut.rows < size && self.batch_us(cut.rows) > cut.within_us;
                let is_tried = size <= best || self.reviews.tries_largest() || is_too_few;
                let floor = self.floor();
                let size = if is_tried { self.cut_size(size, cut) } else { size };
                Plan::Pack { size: size.clamp(2, self.size()), floor: floor.min(self.size()) }
            }
            _ => Plan::Single,
        }
    }

    /// The costs as a message for the broker.
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
            Proof::Unknown if self.rows_max == 1 => Packing::Off,
            Proof::Unknown if self.batch_us(1) > COMPARE_SINGLE_US => Packing::TooSlow,
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
mod tests;
