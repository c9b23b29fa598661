//! The waiting tasks: one queue per lane.
//!
//! Over time, the effective priority of all due tasks grows equally, by the wait weight and by the lane's virtual time,
//! and that of all tasks ahead of their turn by the virtual time alone. So the order within both parts stays: a lane is
//! two ordered maps that are read as one. Tasks are rated again only if a model proves to cost much more or less than
//! was assumed. Equal tasks go in order of arrival.
//!
//! Owns the order of waiting tasks. Never places.

pub(crate) mod line;
pub(crate) mod pace;
pub(crate) mod rank;
mod shares;
mod turns;

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{ClientId, Digest, Lane, RankView, TaskId, TaskSpec};

use super::config::{Tenant, Weights};
use crate::{Census, MonoTime};
use line::{Line, Order};
use rank::{QueueKey, Rank, Sort, Spot, waited};
use shares::Shares;
use turns::{Turn, Turns};

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

/// Tasks whose turn comes in one go: a leap of the virtual time must not hold up the broker. The others are next.
const TURNS_AT_ONCE_MAX: usize = 64;

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
    sort: Option<Sort>,
    items: u32,
    /// Worker kinds that the task does not suit, the last found first, 0 for none: they need not look at it again.
    unfit: [u32; UNFIT_KINDS_MAX],
}

/// The last task walked of each part of a lane; `None`: none yet. Between two walks the parts shift against each other.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Cursor {
    due: Option<Order>,
    ahead: Option<Order>,
}

impl Cursor {
    /// The later place of both, part by part.
    pub(super) fn max(self, other: Self) -> Self {
        Self { due: self.due.max(other.due), ahead: self.ahead.max(other.ahead) }
    }
}

/// A walk through a stretch of a lane's queue, in order. A task is looked up when it is its turn: mostly the first one
/// takes all the room.
#[derive(Debug)]
pub(super) struct Walk {
    /// What was walked.
    pub(super) at: Cursor,
    tasks_left: usize,
    rows_left: usize,
}

impl Walk {
    /// A walk behind `after` to `tasks_max` tasks, passing at most eight times as many.
    pub(super) fn new(after: Cursor, tasks_max: usize) -> Self {
        Self { at: after, tasks_left: tasks_max, rows_left: tasks_max * UNFIT_PASSED_MAX }
    }
}

/// Waiting tasks in order.
#[derive(Debug, Default)]
struct Part {
    tasks: BTreeMap<Order, Waiting>,
    /// The orders of `tasks`, to count positions.
    line: Line,
}

impl Part {
    fn insert(&mut self, order: Order, waiting: Waiting) -> bool {
        self.line.insert(order);
        self.tasks.insert(order, waiting).is_none()
    }

    fn remove(&mut self, order: Order) -> Option<Waiting> {
        self.line.remove(order);
        self.tasks.remove(&order)
    }

    /// The tasks behind this place (`None`: all), in order.
    fn behind(&self, at: Option<Order>) -> impl Iterator<Item = (&Order, &Waiting)> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.tasks.range((at.map_or(Unbounded, Excluded), Unbounded))
    }
}

#[derive(Debug, Default)]
struct LaneQueue {
    due: Part,
    /// Tasks whose turn has not come, ordered as if it was time zero.
    ahead: Part,
    turns: Turns,
    /// Of each sort, how much waits.
    sorts: BTreeMap<Option<Sort>, Alike>,
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
    /// Slot time that the task is assumed to need. `item_us` is the current estimate for an item of it.
    fn cost_of(&mut self, task: &TaskSpec, item_us: u64) -> u64 {
        self.item_us(task.model.digest, item_us).saturating_mul(u64::from(task.items))
    }

    /// Slot time assumed per item of the model. `today_us` is the current estimate.
    fn item_us(&mut self, model: Digest, today_us: u64) -> u64 {
        if !self.items_us.contains_key(&model) && self.items_us.len() >= MODELS_MAX {
            return today_us;
        }
        let taken_us = *self.items_us.entry(model).or_insert(today_us);
        self.is_stale |= taken_us > today_us.saturating_mul(2) || today_us > taken_us.saturating_mul(2);
        taken_us
    }

    fn len(&self) -> usize {
        self.due.tasks.len() + self.ahead.tasks.len()
    }

    fn part(&mut self, spot: Spot) -> (&mut Part, Order) {
        match spot {
            Spot::Due(order, _) => (&mut self.due, order),
            Spot::Ahead(order) => (&mut self.ahead, order),
        }
    }

    /// All tasks behind this place, in order, with the place of each. `waited`: what those ahead are behind their order by
    /// now.
    fn behind(&self, mut at: Cursor, waited: i64) -> impl Iterator<Item = (Cursor, Order, &Waiting)> {
        let mut due = self.due.behind(at.due).map(|(order, waiting)| (*order, waiting)).peekable();
        let ahead = self.ahead.behind(at.ahead);
        let mut ahead = ahead.map(move |(order, waiting)| (order.minus(waited), waiting)).peekable();
        std::iter::from_fn(move || {
            let is_due = due.peek().is_some_and(|(due, _)| ahead.peek().is_none_or(|(ahead, _)| due < ahead));
            let (order, waiting) = if is_due { due.next() } else { ahead.next() }?;
            match is_due {
                true => at.due = Some(order),
                false => at.ahead = Some(order.minus(-waited)),
            }
            Some((at, order, waiting))
        })
    }

    fn census(&self, tasks: usize, census: &mut Census<'_>) {
        let Self { due, ahead, turns, sorts, cost_us: _, shares, items_us, is_stale: _, weigh_at: _ } = self;
        census.passing("waiting tasks of a lane", self.len(), tasks);
        due.line.census(due.tasks.len(), census);
        ahead.line.census(ahead.tasks.len(), census);
        turns.census(self.len(), census);
        census.passing("sorts of waiting tasks", sorts.len(), self.len());
        shares.census(census);
        census.lasting("models weighed", items_us.len(), MODELS_MAX);
    }
}

/// The waiting tasks of both lanes.
#[derive(Debug)]
pub(super) struct Queue {
    weights: Weights,
    ages_in_turn: bool,
    lanes: [LaneQueue; 2],
    arrivals: u64,
    /// Waiting tasks walked so far: tried, passed over, or weighed again.
    pub(super) walked: u64,
}

impl Queue {
    /// `ages_in_turn`: whether a task's waiting counts only from its turn on.
    pub(super) fn new(weights: Weights, ages_in_turn: bool) -> Self {
        Self { weights, ages_in_turn, lanes: Default::default(), arrivals: 0, walked: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.iter().map(LaneQueue::len).sum()
    }

    /// Counts what waits; `tasks` is the number of unfinished tasks.
    pub(super) fn census(&self, tasks: usize, census: &mut Census<'_>) {
        let Self { weights: _, ages_in_turn: _, lanes, arrivals: _, walked: _ } = self;
        lanes.iter().for_each(|lane| lane.census(tasks, census));
    }

    /// Number of tasks that wait in a lane.
    pub(super) fn lane_len(&self, lane: Lane) -> usize {
        self.lanes[lane.index()].len()
    }

    /// Slot time that the lane's waiting tasks are expected to need, microseconds.
    pub(super) fn cost_us(&self, lane: Lane) -> u64 {
        self.lanes[lane.index()].cost_us
    }

    /// Rates a task on its arrival. `item_us` is the slot time that an item of it is expected to need.
    pub(super) fn rate(&mut self, now: MonoTime, task: &TaskSpec, item_us: u64, tenant: Tenant) -> Rank {
        self.arrivals += 1;
        let lane = &mut self.lanes[task.lane.unwrap_or_default().index()];
        let cost_us = lane.cost_of(task, item_us);
        let start_tag_us = lane.shares.begin(task.client, cost_us, tenant.share_milli);
        Rank::new((now, self.arrivals), task, (start_tag_us, cost_us), &self.weights)
    }

    /// Adds a task to its lane, for the first time or again; the rank then tells its place.
    pub(super) fn push(&mut self, now: MonoTime, rank: &mut Rank, task: &TaskSpec) {
        let lane = &mut self.lanes[rank.key.lane.index()];
        let turn = rank.turn(task.client);
        let is_due = |turn: &Turn| !self.ages_in_turn || lane.turns.is_due(turn, lane.shares.virtual_us());
        if turn.as_ref().is_none_or(is_due) {
            rank.come_due(now);
        }
        match rank.turn(task.client) {
            Some(turn) => lane.turns.wait(turn),
            None => lane.turns.enter(now, task.client),
        }
        let Rank { cost_us, sort, items, .. } = *rank;
        let waiting = Waiting { task: task.task, cost_us, sort, items, unfit: [0; UNFIT_KINDS_MAX] };
        let (part, order) = lane.part(rank.key.spot);
        if part.insert(order, waiting) {
            lane.cost_us = lane.cost_us.saturating_add(rank.cost_us);
            let alike = lane.sorts.entry(sort).or_default();
            (alike.tasks, alike.items) = (alike.tasks + 1, alike.items + u64::from(items));
        }
    }

    /// Takes a task out of its lane.
    pub(super) fn remove(&mut self, rank: &Rank, client: ClientId) {
        let lane = &mut self.lanes[rank.key.lane.index()];
        let (part, order) = lane.part(rank.key.spot);
        let Some(waiting) = part.remove(order) else { return };
        match rank.turn(client) {
            Some(turn) => lane.turns.give_up(turn),
            None => lane.turns.leave(client),
        }
        lane.cost_us = lane.cost_us.saturating_sub(waiting.cost_us);
        if let Some(alike) = lane.sorts.get_mut(&waiting.sort) {
            (alike.tasks, alike.items) = (alike.tasks - 1, alike.items - u64::from(waiting.items));
            if alike.tasks == 0 {
                lane.sorts.remove(&waiting.sort);
            }
        }
    }

    /// Tasks whose turn has come: their ranks must [come due](Rank::come_due) now.
    pub(super) fn take_turns(&mut self, now: MonoTime) -> Vec<TaskId> {
        let waited = waited(self.weights.wait_milli, now);
        let mut come = Vec::new();
        for lane in &mut self.lanes {
            while let Some(turn) = lane.turns.next(now, lane.shares.virtual_us()) {
                lane.turns.enter(now, turn.client);
                let Some(waiting) = lane.ahead.remove(turn.order) else { continue };
                lane.due.insert(turn.order.minus(waited), waiting);
                come.push(waiting.task);
                if come.len() >= TURNS_AT_ONCE_MAX {
                    return come;
                }
            }
        }
        come
    }

    /// A task goes to a worker: charges its client's share.
    pub(super) fn dispatched(&mut self, rank: &Rank, client: ClientId, tenant: Tenant) {
        let lane = &mut self.lanes[rank.key.lane.index()];
        lane.shares.dispatched(rank.start_tag_us, client, rank.cost_us, tenant.share_milli);
        if lane.len() == 0 {
            lane.shares.idle();
            lane.items_us.clear();
            lane.is_stale = false;
        }
    }

    /// Empties a lane whose tasks should be weighed again; returns them in order of arrival.
    pub(super) fn take_stale(&mut self, now: MonoTime) -> Vec<TaskId> {
        let is_due = |lane: &&mut LaneQueue| lane.is_stale && now >= lane.weigh_at && lane.len() <= WEIGHED_AGAIN_MAX;
        let Some(lane) = self.lanes.iter_mut().find(is_due) else { return Vec::new() };
        let taken = [&mut lane.due, &mut lane.ahead].map(std::mem::take);
        let tasks = taken.into_iter().flat_map(|part| part.tasks);
        let mut waiting: Vec<(u64, TaskId)> = tasks.map(|(order, waiting)| (order.arrival, waiting.task)).collect();
        waiting.sort_unstable_by_key(|(arrival, _)| *arrival);
        self.walked += waiting.len() as u64;
        (lane.is_stale, lane.weigh_at, lane.cost_us) = (false, now + WEIGH_EVERY, 0);
        lane.turns = Turns::default();
        lane.sorts.clear();
        lane.items_us.clear();
        lane.shares.restart();
        waiting.into_iter().map(|(_, task)| task).collect()
    }

    /// Rates a task again and puts it at its new place. A task that was due remains so.
    pub(super) fn weigh_again(
        &mut self,
        now: MonoTime,
        rank: &mut Rank,
        task: &TaskSpec,
        item_us: u64,
        tenant: Tenant,
    ) {
        let lane = &mut self.lanes[rank.key.lane.index()];
        let cost_us = lane.cost_of(task, item_us);
        let start_tag_us = lane.shares.begin_again(rank.start_tag_us, task.client, cost_us, tenant.share_milli);
        let since = rank.since();
        *rank = Rank::new((rank.came, rank.arrival()), task, (start_tag_us, cost_us), &self.weights);
        if let Some(since) = since {
            rank.come_due(since);
        }
        self.push(now, rank, task);
    }

    /// A task has ended that never went to a worker: its client's share gets the cost back.
    pub(super) fn withdraw(&mut self, rank: &Rank, client: ClientId, tenant: Tenant) {
        self.lanes[rank.key.lane.index()].shares.withdraw(client, rank.cost_us, tenant.share_milli);
    }

    /// The next task of the walk that may suit workers of this kind, and its order by now.
    pub(super) fn next(&mut self, now: MonoTime, lane: Lane, kind: u32, walk: &mut Walk) -> Option<(Order, TaskId)> {
        walk.tasks_left = walk.tasks_left.checked_sub(1)?;
        let waited = waited(self.weights.wait_milli, now);
        for (at, order, waiting) in self.lanes[lane.index()].behind(walk.at, waited).take(walk.rows_left) {
            walk.at = at;
            walk.rows_left -= 1;
            self.walked += 1;
            if !waiting.unfit.contains(&kind) {
                return Some((order, waiting.task));
            }
        }
        None
    }

    /// Whether a task of the lane waits behind this place.
    pub(super) fn goes_on(&self, lane: Lane, at: Cursor) -> bool {
        self.lanes[lane.index()].behind(at, 0).next().is_some()
    }

    /// Remembers that a waiting task does not suit workers of this kind.
    pub(super) fn set_unfit(&mut self, key: QueueKey, kind: u32) {
        let (part, order) = self.lanes[key.lane.index()].part(key.spot);
        let waiting = part.tasks.get_mut(&order);
        if let Some(waiting) = waiting.filter(|waiting| !waiting.unfit.contains(&kind)) {
            waiting.unfit.rotate_right(1);
            waiting.unfit[0] = kind;
        }
    }

    /// Number of tasks before this one in its lane.
    pub(super) fn position(&self, now: MonoTime, rank: &Rank) -> u32 {
        self.before(rank.key.lane, rank.order(now), now)
    }

    /// Number of tasks before one of this order at that time, if none comes or goes.
    fn before(&self, lane: Lane, order: Order, at: MonoTime) -> u32 {
        let (lane, waited) = (&self.lanes[lane.index()], waited(self.weights.wait_milli, at));
        (lane.due.line.before(order) + lane.ahead.line.before(order.minus(-waited))) as u32
    }

    /// Slot time that `tasks` tasks of a lane are expected to need, microseconds, by the lane's mean.
    pub(super) fn several_us(&self, lane: Lane, tasks: u32) -> u64 {
        let lane = &self.lanes[lane.index()];
        let mean_us = lane.cost_us / (lane.len() as u64).max(1);
        mean_us.saturating_mul(u64::from(tasks))
    }

    /// Slot time that the tasks before this one are expected to need, microseconds, by the lane's mean.
    pub(super) fn before_us(&self, now: MonoTime, rank: &Rank) -> u64 {
        self.several_us(rank.key.lane, self.position(now, rank))
    }

    /// Items of tasks of the same sort that surely wait before this new one of the client until that time: those that
    /// remain if all others are before it, too. What else waits may run at other workers, or be quick.
    pub(super) fn alike_before(&self, now: MonoTime, until: MonoTime, rank: &Rank, client: ClientId) -> u64 {
        let lane = &self.lanes[rank.key.lane.index()];
        // Its waiting counts, that of those ahead does not.
        let gains = rank.turn(client).is_none_or(|turn| lane.turns.is_due(&turn, lane.shares.virtual_us()));
        let position = self.before(rank.key.lane, rank.order(now), if gains { until } else { now });
        let Some(alike) = lane.sorts.get(&rank.sort).filter(|_| rank.sort.is_some()) else { return 0 };
        let others = lane.len() as u64 - alike.tasks;
        let before = u64::from(position).saturating_sub(others).min(alike.tasks);
        before * alike.items / alike.tasks.max(1)
    }

    /// The current terms of a task's effective priority.
    pub(super) fn view(&self, rank: &Rank, task: &TaskSpec, weights: &Weights, now: MonoTime) -> RankView {
        let lead_us = self.lanes[rank.key.lane.index()].shares.lead_us(rank.start_tag_us);
        rank.view(task, weights, lead_us, now)
    }
}
