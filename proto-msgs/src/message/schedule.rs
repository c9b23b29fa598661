//! The types of scheduling: lanes, service levels, stages, costs of runs. Messages of several directions use them.

use std::{fmt, str::FromStr};

use bincode::{Decode, Encode};

use crate::{Digest, ModelRef};

/// Decides which of a worker's slots a task may use.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Lane {
    /// Someone waits for the result: realtime slots, and idle batch slots in addition.
    #[default]
    Realtime,
    /// Much data, no hurry: batch slots only.
    Batch,
}

impl Lane {
    /// Both lanes, in the order of tables with one row per lane.
    pub const ALL: [Self; 2] = [Self::Realtime, Self::Batch];

    /// The name as people and scripts see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Realtime => "realtime",
            Self::Batch => "batch",
        }
    }

    /// The lane's row in tables with one row per lane.
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Lane {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|lane| lane.name() == text)
            .ok_or_else(|| format!("'{text}' is not a lane: realtime or batch"))
    }
}

/// The service level of a stream of tasks.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Slo {
    /// A task that takes longer than this from the grant to its result violates the service level.
    pub latency_ms: u32,
    /// Thousandths of a worker's tasks that may violate it before other workers are preferred.
    pub max_violation_permille: u16,
}

/// A wish for workers with a label.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct LabelRule {
    /// The label's name.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Whether other workers are excluded; if false, matching workers are only preferred.
    pub required: bool,
}

/// A later stage: a model that takes the outputs of the one before it.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Stage {
    /// The stage's name for people.
    pub name: String,
    /// The model.
    pub model: ModelRef,
}

/// Why a batch started with the rows it had.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Dispatch {
    /// The batch had the best size.
    Full,
    /// Its items had waited for company, while a slot was free, for as long as that pays or is allowed.
    Waited,
    /// An item's deadline would have passed, or its service level would have been missed.
    Deadline,
    /// A slot came free, or was free.
    Idle,
}

impl Dispatch {
    /// All reasons, in the order of tables with one row per reason.
    pub const ALL: [Self; 4] = [Self::Full, Self::Waited, Self::Deadline, Self::Idle];

    /// The name as people and scripts see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Waited => "waited",
            Self::Deadline => "deadline",
            Self::Idle => "idle",
        }
    }
}

/// Whether a worker packs a model's items into batches, and if not, why.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, Hash, PartialEq)]
pub enum Packing {
    /// No probe has run yet.
    #[default]
    Unknown,
    /// A batch gives the same rows as single runs, and sooner.
    On,
    /// The model takes one item at a time.
    Unsupported,
    /// A batch gave other rows than single runs.
    Differs,
    /// A batch takes as long as single runs.
    NoGain,
    /// A single run takes so long that no row is made to wait for a comparison.
    TooSlow,
    /// The worker's operator wants none.
    Off,
}

impl Packing {
    /// The name as people and scripts see it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::On => "on",
            Self::Unsupported => "unsupported",
            Self::Differs => "differs",
            Self::NoGain => "no-gain",
            Self::TooSlow => "too-slow",
            Self::Off => "off",
        }
    }
}

/// What a model costs at a worker, as measured there.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct ModelCost {
    /// The model.
    pub model: Digest,
    /// Whether its items are packed.
    pub packing: Packing,
    /// Rows of a batch of the best size; 1 unless packing is on.
    pub best_batch: u16,
    /// Items in the next batch at most: the best size, or more where a larger one has yet to be tried.
    pub next_batch: u16,
    /// Points of (rows, microseconds per batch of these rows), fewest rows first; the first point is a single item's.
    /// At most [`CURVE_POINTS_MAX`](crate::limits::CURVE_POINTS_MAX).
    pub curve: Vec<(u16, u32)>,
    /// Microseconds to load it; 0 if not measured.
    pub load_us: u32,
    /// Number of batches so far by reason, in the order of [`Dispatch::ALL`].
    pub dispatched: [u32; 4],
}

impl ModelCost {
    /// Whether a measured model's items may turn out to be packed once some of them are compared.
    pub fn may_be_packed(&self) -> bool {
        self.packing == Packing::Unknown && !self.curve.is_empty()
    }

    /// Microseconds of `items` in one slot, one batch after the other: batches of the best size, then one of the rest.
    pub fn run_us(&self, items: u32) -> u64 {
        let best = u32::from(self.best_batch.max(1));
        let (full, rest) = (u64::from(items / best), items % best);
        full.saturating_mul(self.batch_us(best)).saturating_add(if rest == 0 { 0 } else { self.batch_us(rest) })
    }

    /// Microseconds of one batch of `rows`; 0 if nothing was measured.
    pub fn batch_us(&self, rows: u32) -> u64 {
        curve_us(self.curve.iter().map(|(rows, us)| (u64::from(*rows), u64::from(*us))), u64::from(rows))
    }
}

/// Microseconds of a batch of `rows`, read from a curve of (rows, microseconds), fewest rows first. Between two points:
/// a straight line. Below the first point: the first point's time. Beyond the last: the line of the last two, or in
/// proportion to the only one. Without points: 0.
pub fn curve_us(points: impl DoubleEndedIterator<Item = (u64, u64)> + Clone, rows: u64) -> u64 {
    let on_line = |(from, from_us): (u64, u64), (to, to_us): (u64, u64)| {
        // A falling curve is noise: the line is level instead.
        let rise = u128::from(to_us.saturating_sub(from_us)) * u128::from(rows.saturating_sub(from));
        let rise = rise.checked_div(u128::from(to.saturating_sub(from))).unwrap_or(0);
        from_us.saturating_add(u64::try_from(rise).unwrap_or(u64::MAX))
    };
    let below = points.clone().rfind(|(at, _)| *at <= rows);
    let above = points.clone().find(|(at, _)| *at >= rows);
    match (below, above) {
        (Some(low), Some(high)) => on_line(low, high),
        (Some(last), None) => match points.clone().rfind(|(at, _)| *at < last.0) {
            Some((at, us)) => last.1.max(on_line((at, us), last)),
            None => last.1.saturating_mul(rows) / last.0.max(1),
        },
        (None, Some((_, us))) => us,
        (None, None) => 0,
    }
}

/// How busy one lane of a worker is.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct LaneLoad {
    /// Slots that run the lane's batches; a lent slot counts with the lane that uses it.
    pub slots_used: u16,
    /// Items that have arrived and wait for a slot.
    pub waiting_items: u32,
}

/// One run that included items of a task.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct RunNote {
    /// The stage, 0 for the first model.
    pub stage: u8,
    /// The task's rows in this run, half open.
    pub rows: (u32, u32),
    /// Rows of all tasks in this run.
    pub batch_rows: u32,
    /// Why the batch started then.
    pub dispatch: Dispatch,
    /// Duration of the run, microseconds.
    pub run_us: u32,
}

/// The predicted time of a task at a worker, by its parts.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, PartialEq)]
pub struct Prediction {
    /// Time until a slot is free, microseconds.
    pub queue_us: u64,
    /// Transfer of model (0 if held) and inputs, microseconds.
    pub transfer_us: u64,
    /// Loading the model (0 if warm), microseconds.
    pub load_us: u64,
    /// The runs themselves, microseconds.
    pub run_us: u64,
    /// The fixed cost of every task there, however short its run: opening, handing over, sending the result;
    /// microseconds.
    pub handover_us: u64,
    /// Every model of the task has a measured run, at this or another worker; if false, at least one has never run.
    pub measured: bool,
}

impl Prediction {
    /// The sum of all parts, microseconds.
    pub fn total_us(&self) -> u64 {
        let parts = [self.queue_us, self.transfer_us, self.load_us, self.run_us, self.handover_us];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(best_batch: u16, curve: &[(u16, u32)]) -> ModelCost {
        let (curve, dispatched) = (curve.to_vec(), [0; 4]);
        ModelCost {
            model: Digest::from_bytes([0; 32]),
            packing: Packing::On,
            best_batch,
            next_batch: best_batch,
            curve,
            load_us: 0,
            dispatched,
        }
    }

    #[test]
    fn a_curve_is_read_between_and_beyond_its_points() {
        let read = |curve: &[(u16, u32)], rows| cost(8, curve).batch_us(rows);
        let two = [(1, 10_000), (8, 45_000)];
        assert_eq!([1, 4, 8, 16].map(|rows| read(&two, rows)), [10_000, 25_000, 45_000, 85_000]);
        assert_eq!(read(&[(2, 10_000)], 1), 10_000);
        assert_eq!(read(&[(2, 10_000)], 4), 20_000);
        assert_eq!(read(&[(1, 10_000), (4, 8_000)], 8), 10_000, "no batch takes less than a smaller one");
    }

    #[test]
    fn items_run_in_batches_of_the_best_size_and_a_rest() {
        let cost = cost(8, &[(1, 10_000), (8, 45_000)]);
        assert_eq!(cost.run_us(17), 2 * 45_000 + 10_000);
        assert_eq!(cost.run_us(0), 0);
    }

    #[test]
    fn what_was_never_measured_costs_nothing_and_is_no_fault() {
        assert_eq!(cost(0, &[]).run_us(u32::MAX), 0);
        assert_eq!(cost(0, &[(0, u32::MAX)]).run_us(u32::MAX), u64::from(u32::MAX) * u64::from(u32::MAX));
    }
}
