//! A waiting task's rating.
//!
//! Effective priority, in points, larger first:
//!
//! ```text
//!   + priority weight · priority            0 to 100, after the tenant's cap
//!   + wait weight     · seconds waited      since the task's turn, so that nothing waits for ever
//!   − data weight     · log2(1 + MiB)       little data first
//!   − share weight    · seconds of slot time that the client is ahead of the others
//! ```
//!
//! Owns the formula. Never knows which tasks wait, or whose turn it is.

use proto_msgs::{ClientId, Demands, Digest, Lane, RankView, TaskSpec};

use super::{line::Order, turns::Turn};
use crate::{MonoTime, broker::config::Weights};

/// Millionths per thousandth: points are compared in millionths.
const MICRO_PER_MILLI: i64 = 1000;

/// A task's place in the queues.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct QueueKey {
    pub(crate) lane: Lane,
    pub(super) spot: Spot,
}

/// A task's order in one of the two parts of its lane.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Spot {
    /// Its turn has not come, and its waiting does not count. The order is as if it was time zero.
    Ahead(Order),
    /// Its waiting counts since this time.
    Due(Order, MonoTime),
}

/// A task's rating on arrival. The task keeps it: if it waits again, it is back in its old place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Rank {
    pub(crate) key: QueueKey,
    /// Start tag of the task, see [`Shares`](super::shares::Shares).
    pub(super) start_tag_us: u64,
    /// Slot time that the task is expected to need, microseconds.
    pub(super) cost_us: u64,
    pub(crate) came: MonoTime,
    pub(super) sort: Option<Sort>,
    pub(super) items: u32,
    wait_milli: u32,
}

/// Tasks of one sort can run at the same workers, and each of their items takes as long.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Sort {
    model: Digest,
    cpu_millis: u32,
    memory_bytes: u64,
    gpu_memory_bytes: u64,
    arch: Option<u16>,
}

/// `None`: the task is like no other, because it names labels, stages or the side that dials, or is detached: after a
/// restart it may wait for a client that has left.
fn sort_of(task: &TaskSpec) -> Option<Sort> {
    let Demands { cpu_millis, memory_bytes, gpu_memory_bytes, arch } = task.demands;
    let is_plain = task.then.is_empty() && task.labels.is_empty() && task.direction.is_none() && !task.detached;
    let (model, arch) = (task.model.digest, arch.map(|arch| arch as u16));
    is_plain.then_some(Sort { model, cpu_millis, memory_bytes, gpu_memory_bytes, arch })
}

impl Rank {
    /// Rates a task that is not due yet; `arrival` is its number.
    pub(super) fn new(
        (came, arrival): (MonoTime, u64),
        task: &TaskSpec,
        (start_tag_us, cost_us): (u64, u64),
        weights: &Weights,
    ) -> Self {
        let points = i64::from(weights.priority_milli) * i64::from(task.priority) * MICRO_PER_MILLI
            - i64::from(weights.data_milli) * doublings_milli(task.input_bytes)
            - over_time(weights.share_milli, start_tag_us);
        let key = QueueKey { lane: task.lane.unwrap_or_default(), spot: Spot::Ahead(Order::new(points, arrival)) };
        let wait_milli = weights.wait_milli;
        Self { key, start_tag_us, cost_us, came, sort: sort_of(task), items: task.items, wait_milli }
    }

    /// The task's order among all of its lane at this time.
    pub(crate) fn order(&self, now: MonoTime) -> Order {
        match self.key.spot {
            Spot::Ahead(order) => order.minus(waited(self.wait_milli, now)),
            Spot::Due(order, _) => order,
        }
    }

    /// The task's turn has come: from now on its waiting counts.
    pub(crate) fn come_due(&mut self, now: MonoTime) {
        self.key.spot = Spot::Due(self.order(now), self.since().unwrap_or(now));
    }

    /// Whose turn has to come, unless it has.
    pub(super) fn turn(&self, client: ClientId) -> Option<Turn> {
        match self.key.spot {
            Spot::Ahead(order) => Some(Turn { client, start_tag_us: self.start_tag_us, order }),
            Spot::Due(..) => None,
        }
    }

    /// The number of its arrival: equal tasks go in this order.
    pub(super) fn arrival(&self) -> u64 {
        match self.key.spot {
            Spot::Ahead(order) | Spot::Due(order, _) => order.arrival,
        }
    }

    /// When its waiting began to count, if it does.
    pub(super) fn since(&self) -> Option<MonoTime> {
        match self.key.spot {
            Spot::Ahead(_) => None,
            Spot::Due(_, since) => Some(since),
        }
    }

    /// The current terms of the task's effective priority. Its client is `lead_us` of slot time ahead.
    pub(super) fn view(&self, task: &TaskSpec, weights: &Weights, lead_us: u64, now: MonoTime) -> RankView {
        let waited_us = self.since().map_or(0, |since| now.since_us(since));
        RankView {
            priority_milli: i64::from(weights.priority_milli) * i64::from(task.priority),
            waited_milli: over_time(weights.wait_milli, waited_us) / MICRO_PER_MILLI,
            data_milli: -(i64::from(weights.data_milli) * doublings_milli(task.input_bytes) / MICRO_PER_MILLI),
            share_milli: -over_time(weights.share_milli, lead_us) / MICRO_PER_MILLI,
        }
    }
}

/// What tasks that come at this time are behind those of time zero, millionths of a point.
pub(super) fn waited(wait_milli: u32, now: MonoTime) -> i64 {
    over_time(wait_milli, now.as_micros())
}

/// Millionths of a point for this time.
fn over_time(weight_milli: u32, time_us: u64) -> i64 {
    let points = u128::from(weight_milli) * u128::from(time_us) / 1000;
    i64::try_from(points).unwrap_or(i64::MAX / 8).min(i64::MAX / 8)
}

/// log2(1 + MiB) in thousandths, linear between powers of two.
fn doublings_milli(bytes: u64) -> i64 {
    const MIB_LOG2: u32 = 20;
    let bytes = u128::from(bytes) + (1 << MIB_LOG2);
    let whole = bytes.ilog2();
    let rest = ((bytes - (1 << whole)) * 1000) >> whole;
    i64::from(whole - MIB_LOG2) * 1000 + rest as i64
}
