//! Decides which rows run next, and where.
//!
//! ```text
//!   for each slot that is open, realtime slots first:
//!     realtime slot   the realtime lane, unless it is the batch lane's turn on this device
//!     batch slot      the batch lane, else the realtime lane: an idle slot is lent
//!                     (what has no realtime slots, or none on its GPU, goes first, unless it is the batch lane's turn)
//!   of the lane:      the queue of the most important item; among stages the one with the fewest running batches
//!   of the queue:     as many rows as the model's plan says, or one task's rows by themselves
//!   culprits' rows:   by themselves, one batch of a model at a time, and not at once after a crash
//! ```
//!
//! Changes nothing itself: `batches` carries the decision out.

use std::{cmp::Reverse, time::Duration};

use proto_msgs::{Dispatch, Lane};

use super::{
    Worker,
    api::{BatchKind, CHECKED_ROWS, SPOT_ROWS, SlotId},
    company,
    costs::CostKey,
    curve::{Cost, Plan},
    linger::WAIT_MAX,
    packer::{Company, Piece, Queue, QueueId, Rank},
};
use crate::{MonoTime, Rule};

/// Rows that run one by one are cut into batches of about this length, microseconds: long enough that starting them
/// costs nothing, short enough for the rows that wait behind.
const SINGLES_US: u64 = 20_000;

/// No shorter, even if realtime rows ask for it: the batch lane would lose more to the starts than they gain.
const SINGLES_CUT_US: u64 = 5_000;

/// Every Nth batch of a lane begins with its oldest item, so that no priority starves another.
const OLDEST_EVERY: u64 = 8;

/// Time from the end of a run until the client has the result.
const RESULT_MARGIN: Duration = Duration::from_millis(5);

/// A decision to run rows.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) queue: QueueId,
    pub(super) cost: CostKey,
    pub(super) lane: Lane,
    pub(super) slot: SlotId,
    pub(super) kind: BatchKind,
    pub(super) apart: bool,
    pub(super) dispatch: Dispatch,
    /// The pieces, and the number of rows of each.
    pub(super) taken: Vec<(Rank, u32)>,
    pub(super) run_us: u64,
}

impl Worker {
    /// The next batch; `None` if no slot is open, no row waits, or lingering pays.
    pub(super) fn next_order(&self, now: MonoTime) -> Option<Order> {
        let open = self.slots.open();
        open.iter().find_map(|slot| self.order_for(now, *slot, &open))
    }

    fn order_for(&self, now: MonoTime, slot: SlotId, open: &[SlotId]) -> Option<Order> {
        let device = self.slots.device(slot);
        let realtime = |hurry| self.order_of(now, Lane::Realtime, slot, hurry, |_| true);
        let batch = || self.order_of(now, Lane::Batch, slot, false, |_| true);
        if self.slots.lane(slot) == Lane::Realtime {
            let rival = open.iter().find(|other| {
                let is_rival = self.slots.lane(**other) == Lane::Batch && self.slots.device(**other) == device;
                is_rival && self.slots.is_contended(device)
            });
            let rival = rival.and_then(|other| self.order_of(now, Lane::Batch, *other, false, |_| true));
            let is_due = rival.as_ref().is_some_and(|order| self.slots.owes(device, order.run_us));
            let order = if is_due { None } else { realtime(rival.is_some()) };
            return if self.config.rules.holds(Rule::LaneSlots) { order } else { order.or_else(batch) };
        }
        let Some(batch) = batch() else { return realtime(false) };
        if self.slots.owes(device, batch.run_us) {
            return Some(batch);
        }
        let goes_first = |queue: &Queue| self.slots.are_shared() || self.has_no_other_slot(queue, device);
        self.order_of(now, Lane::Realtime, slot, true, goes_first).or(Some(batch))
    }

    /// Whether realtime rows were promised a GPU on which no slot of their lane sits. They run there in lent slots, and
    /// do not wait until one is idle.
    fn has_no_other_slot(&self, queue: &Queue, device: i16) -> bool {
        queue.kind.limits.gpu.is_some_and(|gpu| i16::from(gpu) == device) && !self.slots.has_own(Lane::Realtime, device)
    }

    /// The batch that a lane would run in this slot, of those queues. With `hurry` the lane does not linger: the other lane
    /// would take the device.
    fn order_of(
        &self,
        now: MonoTime,
        lane: Lane,
        slot: SlotId,
        hurry: bool,
        of: impl Fn(&Queue) -> bool,
    ) -> Option<Order> {
        let oldest = self.turns[lane.index()] % OLDEST_EVERY == OLDEST_EVERY - 1;
        let device = self.slots.device(slot);
        let fits = |queue: &Queue| {
            let has_memory = self.slots.has_memory(device, queue.kind.limits.gpu_memory_bytes);
            queue.kind.lane == lane && of(queue) && has_memory && self.may_run_on(queue, device)
        };
        let lingers = |queue: &Queue| !hurry && self.lingers_until(now, queue, device).is_some();
        let waits = |queue: &Queue| lingers(queue) || self.only_loads(queue, device);
        let may_go = |queue: &Queue| self.overlap_stages() || !self.packer.has_earlier_stage(queue);
        let waiting = self.packer.waiting().filter(|(_, queue)| fits(queue) && may_go(queue));
        let candidates = waiting.filter_map(|(id, queue)| {
            let (rank, piece) =
                queue.in_order(oldest).find(|(_, piece)| !self.is_blocked(now, queue, piece, device))?;
            let importance = if oldest { Reverse(0) } else { Reverse(piece.priority) };
            let order = (importance, if oldest { 0 } else { queue.running }, Reverse(queue.stage()), rank.arrival);
            (!waits(queue)).then_some((order, id, queue))
        });
        let (_, id, queue) = candidates.min_by_key(|(order, ..)| *order)?;
        self.compose(now, slot, id, queue, oldest)
    }

    /// Whether the queue's rows may run on this device. Where no slot of the lane sits on the GPU that they were
    /// promised, the runner sees it all the same.
    pub(super) fn may_run_on(&self, queue: &Queue, device: i16) -> bool {
        let has = |gpu: u8| self.slots.has_device(queue.kind.lane, gpu.into());
        queue.kind.limits.gpu.is_none_or(|gpu| device == i16::from(gpu) || !has(gpu))
    }

    /// Whether rows of a lane wait that may run on this device.
    pub(super) fn waits_for_device(&self, lane: Lane, device: i16) -> bool {
        self.packer.waiting().any(|(_, queue)| queue.kind.lane == lane && self.may_run_on(queue, device))
    }

    pub(super) fn cost_key(&self, queue: &Queue, device: i16) -> CostKey {
        CostKey { model: queue.model(), device, limits: queue.kind.limits, forms: queue.kind.forms.clone() }
    }

    /// Whether stages run side by side. A test that breaks the rule gets one stage after the other.
    fn overlap_stages(&self) -> bool {
        self.config.rules.holds(Rule::StagesOverlap)
    }

    /// Whether rows of the piece's client have ended a runner of the model, so that its rows run apart.
    fn is_apart(&self, now: MonoTime, queue: &Queue, piece: &Piece) -> bool {
        self.culprits.has(now, queue.model(), piece.client)
    }

    /// Whether the piece must wait although there is a slot: behind other culprits' rows, or because enough rows wait at
    /// the next stage: two of the larger batches of both stages. Of smaller ones the next stage would run out before more
    /// come.
    fn is_blocked(&self, now: MonoTime, queue: &Queue, piece: &Piece, device: i16) -> bool {
        let model = queue.model();
        if self.is_apart(now, queue, piece) && (self.runs_apart(model) || self.culprits.rest(now, model)) {
            return true;
        }
        let batch_rows = |queue: &Queue| {
            let cost = self.costs.get(&self.cost_key(queue, device));
            cost.best().max(singles_within(SINGLES_US, cost))
        };
        let next = piece.next.and_then(|next| self.packer.get(next)).filter(|_| self.overlap_stages());
        next.is_some_and(|next| next.rows >= batch_rows(next).max(batch_rows(queue)).saturating_mul(2))
    }

    fn compose(&self, now: MonoTime, slot: SlotId, id: QueueId, queue: &Queue, oldest: bool) -> Option<Order> {
        let device = self.slots.device(slot);
        let (key, lane) = (self.cost_key(queue, device), queue.kind.lane);
        let cost = self.costs.get(&key);
        let is_lent = self.packer.waiting().all(|(_, queue)| queue.kind.lane == Lane::Realtime);
        let spare = self.slots.spare(lane, is_lent, |device| self.may_run_on(queue, device));
        let share = queue.rows.div_ceil(spare.max(1));
        let cut = self.cut_of(now, (lane, device), cost, share);
        let mut plan = cost.plan(cut);
        let mut pieces =
            queue.in_order(oldest).filter(|(_, piece)| !self.is_blocked(now, queue, piece, device)).peekable();
        let (rank, first) = pieces.peek().map(|(rank, first)| (*rank, *first))?;
        let apart = self.is_apart(now, queue, first);
        if apart || first.company != Company::Any {
            plan = Plan::Single;
        }
        let pieces = pieces.filter(|(_, piece)| !self.is_apart(now, queue, piece));
        let alone = vec![(rank, first.len().min(share).min(singles_within(cut.within_us, cost)).max(1))];
        let (kind, taken, full) = match plan {
            Plan::Single => (BatchKind::Whole, alone, 1),
            Plan::Probe { size } => (BatchKind::Probe, company::in_turn(pieces, size), size),
            Plan::Pack { size, floor } => {
                let pieces: Vec<(Rank, &Piece)> = pieces.collect();
                let there = count(&company::in_turn(pieces.iter().copied(), share.max(floor).min(size)));
                match cost.together(there) {
                    1 => (BatchKind::Whole, alone, size),
                    rows if queue.is_calm() => (BatchKind::Packed, company::whole(pieces.into_iter(), rows), size),
                    rows => (BatchKind::Packed, company::in_turn(pieces.into_iter(), rows), size),
                }
            }
        };
        let rows = count(&taken);
        let kind = match kind {
            _ if rows == 1 => BatchKind::Whole,
            BatchKind::Packed if cost.is_unproven(rows) => BatchKind::Check,
            BatchKind::Packed if cost.is_spot_due() => BatchKind::Spot,
            kind => kind,
        };
        let singles_us = |rows: u32| cost.batch_us(1).saturating_mul(rows.into());
        let packed_and = |singles: u32| cost.batch_us(rows).saturating_add(singles_us(singles.min(rows)));
        let run_us = match kind {
            BatchKind::Packed => packed_and(0),
            BatchKind::Check => packed_and(CHECKED_ROWS),
            BatchKind::Spot => packed_and(SPOT_ROWS),
            BatchKind::Whole | BatchKind::Probe => singles_us(rows),
        };
        let dispatch = match queue.oldest() {
            _ if rows >= full => Dispatch::Full,
            Some(oldest)
                if queue.linger.has_waited(now, queue.rows, self.waits_since(queue, oldest, device), WAIT_MAX) =>
            {
                Dispatch::Waited
            }
            _ if presses_at(now, queue, run_us).is_some_and(|at| now >= at) => Dispatch::Deadline,
            _ => Dispatch::Idle,
        };
        Some(Order { queue: id, cost: key, lane, slot, kind, apart, dispatch, taken, run_us })
    }

    /// Since when a piece may have waited for company: before that it waited for a slot. What an earlier stage made waits
    /// for no client.
    fn waits_since(&self, queue: &Queue, piece: &Piece, device: i16) -> MonoTime {
        if queue.stage() > 0 { piece.arrived } else { piece.arrived.max(self.slots.opened(device)) }
    }

    /// Until when a queue lingers for clients that will be back soon; `None` if it does not.
    fn lingers_until(&self, now: MonoTime, queue: &Queue, device: i16) -> Option<MonoTime> {
        let until = queue.linger.until(now, queue.rows)?;
        let cost = self.costs.get(&self.cost_key(queue, device));
        if self.is_cut_full(now, queue, device, cost) {
            return None;
        }
        let patience = queue.oldest().map(|oldest| self.waits_since(queue, oldest, device) + WAIT_MAX);
        let until =
            [patience, presses_at(now, queue, cost.batch_us(queue.rows))].into_iter().flatten().fold(until, Ord::min);
        (now < until).then_some(until)
    }

    /// Whether rows of the batch lane fill a batch that is cut: they wait for no more.
    fn is_cut_full(&self, now: MonoTime, queue: &Queue, device: i16, cost: &Cost) -> bool {
        let (lane, rows) = (queue.kind.lane, queue.rows);
        let plan = || cost.plan(self.cut_of(now, (lane, device), cost, rows));
        lane == Lane::Batch && matches!(plan(), Plan::Pack { size, .. } if rows >= size)
    }

    /// When the first lingering queue stops waiting for more rows.
    pub(super) fn next_wake(&self, now: MonoTime) -> Option<MonoTime> {
        let open = self.slots.open();
        let devices: Vec<i16> = open.iter().map(|slot| self.slots.device(*slot)).collect();
        let until = |queue| devices.iter().filter_map(move |device| self.lingers_until(now, queue, *device)).min();
        let lingering = self.packer.waiting().filter_map(|(_, queue)| until(queue));
        lingering.chain(self.culprits.next_rested(now)).chain(self.next_cut(now)).min()
    }
}

/// Rows that run one by one in a batch that may take this long, microseconds.
fn singles_within(within_us: u64, cost: &Cost) -> u32 {
    let batch_us = within_us.clamp(SINGLES_CUT_US, SINGLES_US);
    u32::try_from(batch_us.checked_div(cost.batch_us(1)).unwrap_or(1)).unwrap_or(u32::MAX)
}

/// Time before a result is due at which a batch must begin, with a quarter of its run time to spare.
pub(super) fn time_for(run_us: u64) -> Duration {
    Duration::from_micros(run_us.saturating_add(run_us / 4)) + RESULT_MARGIN
}

/// When a batch must begin so that the queue's first due result is in time.
pub(super) fn presses_at(now: MonoTime, queue: &Queue, run_us: u64) -> Option<MonoTime> {
    queue.first_due(now, Duration::from_micros(run_us)).map(|due| due - time_for(run_us))
}

/// The number of rows taken.
fn count(taken: &[(Rank, u32)]) -> u32 {
    taken.iter().map(|(_, rows)| rows).sum()
}
