//! The waiting tasks: one queue per lane.
//!
//! Effective priority, in points, larger first:
//!
//! ```text
//!   + priority weight · priority            0 to 100, after the tenant's cap
//!   + wait weight     · seconds waited      so that nothing waits for ever
//!   − data weight     · log2(1 + MiB)       little data first
//!   − share weight    · seconds of slot time that the client is ahead of the others
//! ```
//!
//! Over time, the priority of all waiting tasks grows equally: by the wait weight, and by the lane's virtual time. So
//! their order stays and the queue is an ordered map. Tasks are rated again only if a model proves to cost much more or
//! less than was assumed. Equal tasks go in order of arrival.
//!
//! Owns the order of waiting tasks. Never places.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use proto_msgs::{ClientId, Demands, Digest, Lane, RankView, TaskId, TaskSpec};

use super::{
    config::{Tenant, Weights},
    line::{Line, Order},
    shares::Shares,
};
use crate::{Census, MonoTime};

/// Unfit worker kinds remembered per waiting task. A fleet has a handful of kinds.
const UNFIT_KINDS_MAX: usize = 4;

/// Models whose assumed cost a lane remembers.
const MODELS_MAX: usize = 1024;

/// Longest queue that is weighed again when costs prove different: some milliseconds of work.
const WEIGHED_AGAIN_MAX: usize = 10_000;

/// Waiting tasks walked per task that a worker tries. The others are known to be unfit; to pass one costs next to
/// nothing.
const UNFIT_PASSED_MAX: usize = 8;

/// Shortest time between two times that a lane is weighed again.
const WEIGH_EVERY: Duration = Duration::from_secs(5);

/// Millionths per thousandth: points are compared in millionths.
const MICRO_PER_MILLI: i64 = 1000;

/// A task's place in the queues: its lane, and its order there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct QueueKey {
    pub(super) lane: Lane,
    pub(super) order: Order,
}

/// A task's rating on arrival. The task keeps it: if it waits again, it is back in its old place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Rank {
    pub(super) key: QueueKey,
    /// Start tag of the task, see [`Shares`].
    start_tag_us: u64,
    /// Slot time that the task is expected to need, microseconds.
    pub(super) cost_us: u64,
    pub(super) came: MonoTime,
    sort: Sort,
    items: u32,
}

/// Tasks of one sort can run at the same workers, and each of their items takes as long. `None`: a task that is like no
/// other, because it names labels, stages or the side that dials, or is detached: after a restart it may wait for a
/// client that has left.
type Sort = Option<(Digest, u32, u64, u64, Option<u16>)>;

fn sort_of(task: &TaskSpec) -> Sort {
    let Demands { cpu_millis, memory_bytes, gpu_memory_bytes, arch } = task.demands;
    let is_plain = task.then.is_empty() && task.labels.is_empty() && task.direction.is_none() && !task.detached;
    is_plain.then_some((task.model.digest, cpu_millis, memory_bytes, gpu_memory_bytes, arch.map(|arch| arch as u16)))
}

/// Waiting tasks of one sort.
#[derive(Clone, Copy, Debug, Default)]
struct Alike {
    tasks: u64,
    items: u64,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    task: TaskId,
    cost_us: u64,
    sort: Sort,
    items: u32,
    /// Worker kinds that the task does not suit, the last found first, 0 for none: they need not look at it again.
    unfit: [u32; UNFIT_KINDS_MAX],
}

/// A walk through a stretch of a lane's queue, in order. A task is looked up when it is its turn: mostly the first one
/// takes all the room.
#[derive(Debug)]
pub(super) struct Walk {
    /// The last task walked.
    pub(super) at: Option<Order>,
    tasks_left: usize,
    rows_left: usize,
}

impl Walk {
    /// A walk behind `after` (`None`: from the front) to `tasks_max` tasks, passing at most eight times as many.
    pub(super) fn new(after: Option<Order>, tasks_max: usize) -> Self {
        Self { at: after, tasks_left: tasks_max, rows_left: tasks_max * UNFIT_PASSED_MAX }
    }
}

#[derive(Debug, Default)]
struct LaneQueue {
    waiting: BTreeMap<Order, Waiting>,
    /// The orders of `waiting`, to count positions.
    line: Line,
    /// Of each sort, how much waits.
    sorts: BTreeMap<Sort, Alike>,
    cost_us: u64,
    shares: Shares,
    /// Slot time assumed per item of a model, microseconds. It stays while tasks wait, even if a better value is known:
    /// two clients' tasks of one model must weigh the same.
    items_us: BTreeMap<Digest, u64>,
    /// An assumed cost is off by more than a factor of two: all tasks should be weighed again.
    is_stale: bool,
    /// Earliest time at which they are weighed again.
    weigh_at: MonoTime,
}

impl LaneQueue {
    /// Slot time assumed per item of the model. `today_us` is the current estimate.
    fn item_us(&mut self, model: Digest, today_us: u64) -> u64 {
        if !self.items_us.contains_key(&model) && self.items_us.len() >= MODELS_MAX {
            return today_us;
        }
        let taken_us = *self.items_us.entry(model).or_insert(today_us);
        self.is_stale |= taken_us > today_us.saturating_mul(2) || today_us > taken_us.saturating_mul(2);
        taken_us
    }

    /// The tasks behind this place (`None`: all), in order.
    fn behind(&self, at: Option<Order>) -> impl Iterator<Item = (&Order, &Waiting)> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.waiting.range((at.map_or(Unbounded, Excluded), Unbounded))
    }

    fn census(&self, tasks: usize, census: &mut Census<'_>) {
        let Self { waiting, line, sorts, cost_us: _, shares, items_us, is_stale: _, weigh_at: _ } = self;
        census.passing("waiting tasks of a lane", waiting.len(), tasks);
        line.census(waiting.len(), census);
        census.passing("sorts of waiting tasks", sorts.len(), waiting.len());
        shares.census(census);
        census.lasting("models weighed", items_us.len(), MODELS_MAX);
    }
}

/// The waiting tasks of both lanes.
#[derive(Debug, Default)]
pub(super) struct Queue {
    lanes: [LaneQueue; 2],
    arrivals: u64,
    /// Waiting tasks walked so far: tried, passed over, or weighed again.
    pub(super) walked: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.lanes.iter().map(|lane| lane.waiting.len()).sum()
    }

    /// Counts what waits; `tasks` is the number of unfinished tasks.
    pub(super) fn census(&self, tasks: usize, census: &mut Census<'_>) {
        let Self { lanes, arrivals: _, walked: _ } = self;
        lanes.iter().for_each(|lane| lane.census(tasks, census));
    }

    /// Number of tasks that wait in a lane.
    pub(super) fn lane_len(&self, lane: Lane) -> usize {
        self.lanes[lane.index()].waiting.len()
    }

    /// Slot time that the lane's waiting tasks are expected to need, microseconds.
    pub(super) fn cost_us(&self, lane: Lane) -> u64 {
        self.lanes[lane.index()].cost_us
    }

    /// Rates a task on its arrival. `item_us` is the slot time that an item of it is expected to need.
    pub(super) fn rate(
        &mut self,
        now: MonoTime,
        task: &TaskSpec,
        item_us: u64,
        weights: &Weights,
        tenant: Tenant,
    ) -> Rank {
        self.arrivals += 1;
        self.rate_as((now, self.arrivals), task, item_us, weights, tenant)
    }

    /// Rates a task with this time and number of arrival.
    fn rate_as(
        &mut self,
        (came, arrival): (MonoTime, u64),
        task: &TaskSpec,
        item_us: u64,
        weights: &Weights,
        tenant: Tenant,
    ) -> Rank {
        let lane = task.lane.unwrap_or_default();
        let item_us = self.lanes[lane.index()].item_us(task.model.digest, item_us);
        let cost_us = item_us.saturating_mul(u64::from(task.items));
        let start_tag_us = self.lanes[lane.index()].shares.begin(task.client, cost_us, tenant.share_milli);
        let points = i64::from(weights.priority_milli) * i64::from(task.priority) * MICRO_PER_MILLI
            - over_time(weights.wait_milli, came.as_micros())
            - i64::from(weights.data_milli) * doublings_milli(task.input_bytes)
            - over_time(weights.share_milli, start_tag_us);
        Rank {
            key: QueueKey { lane, order: Order { points: Reverse(points), arrival } },
            start_tag_us,
            cost_us,
            came,
            sort: sort_of(task),
            items: task.items,
        }
    }

    /// Adds a task to its lane, for the first time or again.
    pub(super) fn push(&mut self, rank: Rank, task: TaskId) -> QueueKey {
        let lane = &mut self.lanes[rank.key.lane.index()];
        let Rank { cost_us, sort, items, .. } = rank;
        let waiting = Waiting { task, cost_us, sort, items, unfit: [0; UNFIT_KINDS_MAX] };
        lane.line.insert(rank.key.order);
        if lane.waiting.insert(rank.key.order, waiting).is_none() {
            lane.cost_us = lane.cost_us.saturating_add(rank.cost_us);
            let alike = lane.sorts.entry(sort).or_default();
            (alike.tasks, alike.items) = (alike.tasks + 1, alike.items + u64::from(items));
        }
        rank.key
    }

    /// Takes a task out of its lane.
    pub(super) fn remove(&mut self, key: QueueKey) {
        let lane = &mut self.lanes[key.lane.index()];
        lane.line.remove(key.order);
        if let Some(waiting) = lane.waiting.remove(&key.order) {
            lane.cost_us = lane.cost_us.saturating_sub(waiting.cost_us);
            if let Some(alike) = lane.sorts.get_mut(&waiting.sort) {
                (alike.tasks, alike.items) = (alike.tasks - 1, alike.items - u64::from(waiting.items));
                if alike.tasks == 0 {
                    lane.sorts.remove(&waiting.sort);
                }
            }
        }
    }

    /// A task goes to a worker: charges its client's share.
    pub(super) fn dispatched(&mut self, rank: &Rank, client: ClientId, tenant: Tenant) {
        let lane = &mut self.lanes[rank.key.lane.index()];
        lane.shares.dispatched(rank.start_tag_us, client, rank.cost_us, tenant.share_milli);
        if lane.waiting.is_empty() {
            lane.shares.idle();
            lane.items_us.clear();
            lane.is_stale = false;
        }
    }

    /// Empties a lane whose tasks should be weighed again; returns them in order of arrival.
    pub(super) fn take_stale(&mut self, now: MonoTime) -> Vec<TaskId> {
        let is_due =
            |lane: &&mut LaneQueue| lane.is_stale && now >= lane.weigh_at && lane.waiting.len() <= WEIGHED_AGAIN_MAX;
        let Some(lane) = self.lanes.iter_mut().find(is_due) else { return Vec::new() };
        let mut waiting: Vec<(u64, TaskId)> = std::mem::take(&mut lane.waiting)
            .into_iter()
            .map(|(order, waiting)| (order.arrival, waiting.task))
            .collect();
        waiting.sort_unstable_by_key(|(arrival, _)| *arrival);
        self.walked += waiting.len() as u64;
        (lane.is_stale, lane.weigh_at, lane.cost_us) = (false, now + WEIGH_EVERY, 0);
        lane.line = Line::default();
        lane.sorts.clear();
        lane.items_us.clear();
        lane.shares.restart();
        waiting.into_iter().map(|(_, task)| task).collect()
    }

    /// Rates a task again and puts it at its new place.
    pub(super) fn weigh_again(
        &mut self,
        rank: Rank,
        task: &TaskSpec,
        item_us: u64,
        weights: &Weights,
        tenant: Tenant,
    ) -> Rank {
        let rank = self.rate_as((rank.came, rank.key.order.arrival), task, item_us, weights, tenant);
        self.push(rank, task.task);
        rank
    }

    /// A task has ended that never went to a worker: its client's share gets the cost back.
    pub(super) fn withdraw(&mut self, rank: &Rank, client: ClientId, tenant: Tenant) {
        self.lanes[rank.key.lane.index()].shares.withdraw(client, rank.cost_us, tenant.share_milli);
    }

    /// The next task of the walk that may suit workers of this kind.
    pub(super) fn next(&mut self, lane: Lane, kind: u32, walk: &mut Walk) -> Option<(Order, TaskId)> {
        walk.tasks_left = walk.tasks_left.checked_sub(1)?;
        for (order, waiting) in self.lanes[lane.index()].behind(walk.at).take(walk.rows_left) {
            walk.at = Some(*order);
            walk.rows_left -= 1;
            self.walked += 1;
            if !waiting.unfit.contains(&kind) {
                return Some((*order, waiting.task));
            }
        }
        None
    }

    /// Whether a task of the lane waits behind this place.
    pub(super) fn goes_on(&self, lane: Lane, at: Option<Order>) -> bool {
        self.lanes[lane.index()].behind(at).next().is_some()
    }

    /// Remembers that a waiting task does not suit workers of this kind.
    pub(super) fn set_unfit(&mut self, key: QueueKey, kind: u32) {
        let waiting = self.lanes[key.lane.index()].waiting.get_mut(&key.order);
        if let Some(waiting) = waiting.filter(|waiting| !waiting.unfit.contains(&kind)) {
            waiting.unfit.rotate_right(1);
            waiting.unfit[0] = kind;
        }
    }

    /// Number of tasks before this one in its lane.
    pub(super) fn position(&self, key: QueueKey) -> u32 {
        self.lanes[key.lane.index()].line.before(key.order) as u32
    }

    /// Slot time that `tasks` tasks of a lane are expected to need, microseconds, by the lane's mean.
    pub(super) fn several_us(&self, lane: Lane, tasks: u32) -> u64 {
        let lane = &self.lanes[lane.index()];
        let mean_us = lane.cost_us / (lane.waiting.len() as u64).max(1);
        mean_us.saturating_mul(u64::from(tasks))
    }

    /// Slot time that the tasks before this one are expected to need, microseconds, by the lane's mean.
    pub(super) fn before_us(&self, key: QueueKey) -> u64 {
        self.several_us(key.lane, self.position(key))
    }

    /// Items of tasks of the same sort that surely wait before this one: those that remain if all others are before it,
    /// too. What else waits may run at other workers, or be quick.
    pub(super) fn alike_before(&self, rank: &Rank) -> u64 {
        let lane = &self.lanes[rank.key.lane.index()];
        let Some(alike) = lane.sorts.get(&rank.sort).filter(|_| rank.sort.is_some()) else { return 0 };
        let others = lane.waiting.len() as u64 - alike.tasks;
        let before = u64::from(self.position(rank.key)).saturating_sub(others).min(alike.tasks);
        before * alike.items / alike.tasks.max(1)
    }

    /// The current terms of a task's effective priority.
    pub(super) fn view(&self, rank: &Rank, task: &TaskSpec, weights: &Weights, now: MonoTime) -> RankView {
        let waited_us = now.as_micros().saturating_sub(rank.came.as_micros());
        let lead_us = self.lanes[rank.key.lane.index()].shares.lead_us(rank.start_tag_us);
        RankView {
            priority_milli: i64::from(weights.priority_milli) * i64::from(task.priority),
            waited_milli: over_time(weights.wait_milli, waited_us) / MICRO_PER_MILLI,
            data_milli: -(i64::from(weights.data_milli) * doublings_milli(task.input_bytes) / MICRO_PER_MILLI),
            share_milli: -over_time(weights.share_milli, lead_us) / MICRO_PER_MILLI,
        }
    }
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
