//! Predicts a task's time at a worker from measured parts: queue, transfer, load, run.
//!
//! Owns the sums and whether a worker has room. Never chooses.

use proto_msgs::{
    Digest, Lane, ModelCost, Packing, Prediction,
    limits::{ACTIVE_ATTEMPTS_MAX, STAGES_AFTER_MAX},
};

use super::obstacle;
use crate::{
    MonoTime,
    broker::{
        task::Task,
        workers::{
            fleet::{self, Fleet},
            kind::Places,
            occupancy::Held,
            worker::{ModelHere, Slots, Worker},
        },
    },
};

/// Longest work at a worker, per slot, before a task that is sent ahead, microseconds. The next task arrives before the
/// running one ends, and a more urgent one does not come too late.
const AHEAD_US_MAX: u64 = 50_000;

/// Longest work per slot, microseconds, at which one more task per slot is sent although only the running ones are
/// there. Above it, a better place may come up, and the pause between two tasks weighs little.
const NEXT_US_MAX: u64 = 500_000;

/// Items beyond the slots that may be at a worker while nobody knows yet whether it can pack them: only items that wait
/// together are ever compared.
const COMPARED_AHEAD: u64 = 2;

/// Longest work per slot, microseconds, behind which an item waits for another one to be compared with: two runs of the
/// slowest models that are compared.
const COMPARED_BEHIND_US_MAX: u64 = 2 * NEXT_US_MAX;

/// Batches of the best size, per slot, that may be at a worker: one runs, one is being gathered.
const BATCHES_AHEAD_MAX: u64 = 2;

/// Batches, per slot, while the best size may still grow: the worker tries the double size only if it has that many
/// items.
const BATCHES_GROWING_MAX: u64 = 4;

/// Microseconds in a second.
const SECOND_US: u128 = 1_000_000;

/// Digest and size in bytes of each model that the task passes through.
pub(crate) fn models(task: &Task) -> impl Iterator<Item = (Digest, u64)> + Clone + '_ {
    let then = task.spec.then.iter().map(|stage| &stage.model);
    std::iter::once(&task.spec.model).chain(then).map(|model| (model.digest, model.size_bytes))
}

/// Assumptions for a worker without own measurements: the fleet's means, looked up once for all candidates.
#[derive(Debug)]
pub(super) struct Guess {
    /// Run and load time of each model, microseconds.
    models: [(u64, u64); 1 + STAGES_AFTER_MAX],
    link_bytes_per_s: u64,
    /// Transfer and runs at an average idle worker that has every model loaded, microseconds.
    pub(super) ready_us: u64,
}

impl Guess {
    pub(super) fn new(task: &Task, fleet: &Fleet) -> Self {
        let mut guess = [(0, 0); 1 + STAGES_AFTER_MAX];
        for ((digest, _), guess) in models(task).zip(&mut guess) {
            *guess = (fleet.run_us(digest, task.spec.items), fleet.load_us(digest));
        }
        let link_bytes_per_s = fleet.link_bytes_per_s();
        let runs_us = guess.iter().map(|(run_us, _)| *run_us).fold(0, u64::saturating_add);
        let ready_us = transfer_us(task.spec.input_bytes, link_bytes_per_s).saturating_add(runs_us);
        Self { models: guess, link_bytes_per_s, ready_us }
    }
}

fn transfer_us(bytes: u64, link_bytes_per_s: u64) -> u64 {
    let us = (u128::from(bytes) * SECOND_US).checked_div(u128::from(link_bytes_per_s)).unwrap_or(0);
    u64::try_from(us).unwrap_or(u64::MAX)
}

/// The predicted time of the task at the worker; `first` is its state of the first model. Unknown parts count as zero.
pub(super) fn predict(task: &Task, worker: &Worker, first: ModelHere<'_>, guess: &Guess, now: MonoTime) -> Prediction {
    let handover_us = worker.handover.us();
    let mut prediction = Prediction { handover_us, measured: true, ..Prediction::default() };
    let mut bytes = task.spec.input_bytes;
    let mut add = |here: ModelHere<'_>, size_bytes: u64, (mean_run_us, mean_load_us): (u64, u64)| {
        if !here.held {
            bytes = bytes.saturating_add(size_bytes);
        }
        if !here.is_warm_for(&task.spec.demands) {
            let measured = here.cost.map_or(0, |cost| u64::from(cost.load_us));
            prediction.load_us += if measured > 0 { measured } else { mean_load_us };
        }
        let measured = here.cost.map_or(0, |cost| cost.run_us(task.spec.items));
        let run_us = if measured > 0 { measured } else { mean_run_us };
        prediction.measured &= run_us > 0;
        prediction.run_us = prediction.run_us.saturating_add(run_us);
    };
    let [first_guess, then_guesses @ ..] = &guess.models;
    add(first, task.spec.model.size_bytes, *first_guess);
    for (stage, guess) in task.spec.then.iter().zip(then_guesses) {
        add(worker.model(stage.model.digest), stage.model.size_bytes, *guess);
    }
    prediction.transfer_us = transfer_us(bytes, link_bytes_per_s(worker, guess));
    prediction.queue_us = match worker.free_at_once(task.lane(), now) {
        0 => backlog_us(worker, task.lane(), now),
        _ => turn_us(worker, task.lane(), now),
    };
    prediction
}

/// Whether the worker has the task's models loaded.
pub(super) fn is_loaded(task: &Task, worker: &Worker) -> bool {
    models(task).all(|(digest, _)| worker.model(digest).is_warm_for(&task.spec.demands))
}

/// The part of the prediction that falls away once the task's models are there and loaded, microseconds.
pub(super) fn opening_us(task: &Task, worker: &Worker, prediction: &Prediction, guess: &Guess) -> u64 {
    let inputs_us = transfer_us(task.spec.input_bytes, link_bytes_per_s(worker, guess));
    prediction.load_us.saturating_add(prediction.transfer_us.saturating_sub(inputs_us))
}

fn link_bytes_per_s(worker: &Worker, guess: &Guess) -> u64 {
    let link = worker.heartbeat.as_ref().map_or(0, |heartbeat| heartbeat.link_bytes_per_s);
    if link > 0 { link } else { guess.link_bytes_per_s }
}

/// Time until everything in the lane has run, and what is loaded for nobody, microseconds. Unknown runs count as zero.
fn backlog_us(worker: &Worker, lane: Lane, now: MonoTime) -> u64 {
    let load_us = worker.finishing.left_us(now, lane, worker.register.slots);
    let remaining_us = worker.occupancy.remaining_us(lane, worker.counted_slots(), now);
    remaining_us.saturating_add(load_us) / u64::from(at_once(worker, lane))
}

/// Time until a GPU is free for a task that has a slot, microseconds: slots may share GPUs. Realtime waits for the
/// batches of the other lane that run, batch for all of the other lane's work.
fn turn_us(worker: &Worker, lane: Lane, now: MonoTime) -> u64 {
    if !must_take_turns(worker) {
        return 0;
    }
    let left_us = |lane| worker.occupancy.remaining_us(lane, worker.counted_slots(), now);
    match lane {
        Lane::Realtime => left_us(lane) / u64::from(worker.places.count) + bulk_turn_us(worker, now),
        Lane::Batch => left_us(lane).saturating_add(left_us(Lane::Realtime)) / u64::from(worker.places.count),
    }
}

/// Whether a task that has a slot may wait for a GPU all the same.
fn must_take_turns(worker: &Worker) -> bool {
    worker.places.are_gpus && worker.occupancy.len() as u64 >= u64::from(worker.places.count)
}

/// Longest time that a realtime task waits for running batches of the batch lane on GPUs, microseconds.
fn bulk_turn_us(worker: &Worker, now: MonoTime) -> u64 {
    let left_us = worker.occupancy.remaining_us(Lane::Batch, worker.counted_slots(), now);
    left_us.min(worker.occupancy.batch_us(Lane::Batch)) / u64::from(worker.places.count)
}

/// The part of a prediction's queue that may as well be nothing, microseconds: nobody knows when the running batches of
/// the batch lane began, or how far the worker cuts them for realtime rows in a hurry. A task may so be taken that waits
/// behind a long run which nothing can cut: a refusal must be sure.
pub(super) fn doubtful_queue_us(worker: &Worker, lane: Lane, now: MonoTime) -> u64 {
    let waits = lane == Lane::Realtime && must_take_turns(worker) && worker.free_at_once(lane, now) > 0;
    if waits { bulk_turn_us(worker, now) } else { 0 }
}

/// Batches of the lane that run side by side at the worker: slots may share GPUs.
pub(super) fn at_once(worker: &Worker, lane: Lane) -> u32 {
    match worker.places {
        Places { count, are_gpus: true } => u32::from(lane_slots(worker, lane)).min(count),
        _ => lane_slots(worker, lane).into(),
    }
}

/// Slots that the lane can count on at the worker.
pub(super) fn lane_slots(worker: &Worker, lane: Lane) -> u16 {
    worker.counted_slots()[lane.index()]
}

/// Whether the worker has room for the task: a free slot, or room to send it ahead.
pub(crate) fn has_room(task: &Task, worker: &Worker, now: MonoTime) -> bool {
    has_slot(task, worker, Slots::Usable) || has_room_ahead(task, worker, now)
}

/// Whether a slot is free for the task.
pub(crate) fn has_slot(task: &Task, worker: &Worker, slots: Slots) -> bool {
    worker.free_of(task.lane(), slots) > 0
}

/// Whether the worker may have room for some task of the lane. If not, no task needs to be looked at.
pub(crate) fn takes_any(worker: &Worker, lane: Lane, slots: Slots, now: MonoTime) -> bool {
    if worker.free_of(lane, slots) > 0 {
        return true;
    }
    let takes_ahead = worker.is_open() && worker.occupancy.len() < ACTIVE_ATTEMPTS_MAX;
    takes_ahead && (worker.may_pack || (worker.has_measured() && is_nearly_done(worker, lane, now)))
}

/// Whether nobody knows when a slot for the lane falls free at the worker: its attempts, or those of the other lane that
/// are in its slots, were never measured or should have ended long ago.
pub(super) fn is_unforeseeable(worker: &Worker, lane: Lane, now: MonoTime) -> bool {
    let (slots, [realtime, _]) = (worker.register.slots, worker.occupancy.tasks());
    let (other, shares) = match lane {
        Lane::Realtime => (Lane::Batch, slots[Lane::Realtime.index()] == 0),
        Lane::Batch => (Lane::Realtime, realtime > slots[Lane::Realtime.index()]),
    };
    let is_so = |lane: Lane| worker.occupancy.is_unforeseeable(lane, worker.counted_slots(), now);
    is_so(lane) || (shares && is_so(other))
}

/// Whether the lane's own attempts are stuck. Those of the other lane stop nobody: the worker lets realtime pass.
fn is_stuck(worker: &Worker, lane: Lane, now: MonoTime) -> bool {
    worker.occupancy.is_overdue(lane, worker.counted_slots(), now)
}

/// Whether the lane's work ends so soon that the next task should be on its way.
fn is_nearly_done(worker: &Worker, lane: Lane, now: MonoTime) -> bool {
    let slots = lane_slots(worker, lane);
    let backlog_us = worker.occupancy.backlog_us(lane).filter(|_| !is_stuck(worker, lane, now));
    backlog_us.is_some_and(|us| {
        let each_us = us / u64::from(slots);
        let is_next = worker.occupancy.tasks()[lane.index()] < slots.saturating_mul(2);
        each_us <= AHEAD_US_MAX || (is_next && each_us <= NEXT_US_MAX)
    })
}

/// Whether the task may be sent before a slot is free, to be there when one is.
pub(crate) fn has_room_ahead(task: &Task, worker: &Worker, now: MonoTime) -> bool {
    let lane = task.lane();
    if !obstacle::may_go_ahead(task) || !worker.is_open() || worker.occupancy.len() >= ACTIVE_ATTEMPTS_MAX {
        return false;
    }
    let is_behind = |order| task.rank.is_some_and(|rank| order < rank.order(now));
    if worker.awaited[lane.index()].is_some_and(is_behind) || worker.owes_slot(lane) {
        return false;
    }
    // Asked first: most full workers need no look at their models.
    let is_nearly_done = is_nearly_done(worker, lane, now);
    if !is_nearly_done && !worker.may_pack {
        return false;
    }
    let model = task.spec.model.digest;
    let Some(cost) = worker.model(model).cost.filter(|cost| cost.batch_us(1) > 0) else { return false };
    if cost.packing == Packing::On && !is_stuck(worker, lane, now) {
        let grows = cost.next_batch > cost.best_batch;
        let batches = if grows { BATCHES_GROWING_MAX } else { BATCHES_AHEAD_MAX } * u64::from(lane_slots(worker, lane));
        if worker.occupancy.items(model, lane) < batches * u64::from(cost.best_batch.max(1)) {
            return true;
        }
    }
    is_nearly_done || may_be_compared(task, worker, cost) && !is_stuck(worker, lane, now)
}

/// Whether the worker may have the task's only item so that two wait together and can be compared. Not if they run for
/// long, or wait for long behind others, or nobody knows how long.
fn may_be_compared(task: &Task, worker: &Worker, cost: &ModelCost) -> bool {
    let (model, lane) = (task.spec.model.digest, task.lane());
    let is_single = task.spec.items == 1 && task.spec.then.is_empty();
    let is_wanted = cost.may_be_packed() && cost.batch_us(1) <= NEXT_US_MAX;
    let items_max = u64::from(worker.usable_slots(lane)) + COMPARED_AHEAD;
    let behind_us_max = COMPARED_BEHIND_US_MAX * u64::from(lane_slots(worker, lane));
    is_single
        && is_wanted
        && worker.occupancy.backlog_us(lane).is_some_and(|us| us <= behind_us_max)
        && worker.occupancy.items(model, lane) < items_max
}

/// Whether the task gets room only once the worker has less to do. If its items are packed, the worker may always have
/// a number of them.
pub(crate) fn needs_slot(task: &Task, worker: &Worker) -> bool {
    let cost = worker.model(task.spec.model.digest).cost;
    !obstacle::may_go_ahead(task) || cost.is_none_or(|cost| cost.packing != Packing::On)
}

/// The resources that the task takes up at a worker.
pub(crate) fn held(task: &Task, worker: Option<&Worker>) -> Held {
    let (lane, demands, items) = (task.lane(), task.spec.demands, task.spec.items);
    let (slot_us, batch_us) = worker.and_then(|worker| slot_us(task, worker)).unzip();
    let batch_us = batch_us.unwrap_or(0);
    let wanted_bytes = demands.gpu_memory_bytes;
    let gpu = worker.filter(|_| wanted_bytes > 0).and_then(|worker| worker.roomiest_gpu(lane, wanted_bytes));
    let gpu = gpu.map(|(gpu, _)| gpu);
    Held { lane: Some(lane), demands, gpu, model: Some(task.spec.model.digest), items, slot_us, batch_us }
}

/// Slot time that the task needs at the worker, and that of its whole batch, both with loading; `None` if its runs were
/// never measured. If items are packed, the first is its share of full batches, otherwise its runs one after the other.
pub(super) fn slot_us(task: &Task, worker: &Worker) -> Option<(u64, u64)> {
    let (mut sum, mut batches) = (0_u64, 0_u64);
    for (digest, _) in models(task) {
        let here = worker.model(digest);
        let cost = here.cost?;
        let (run_us, batch_us) = match cost.packing {
            Packing::On => {
                let run_us = fleet::item_us(cost).saturating_mul(u64::from(task.spec.items));
                (run_us, run_us.max(cost.batch_us(u32::from(cost.best_batch))))
            }
            _ => (cost.run_us(task.spec.items), cost.run_us(task.spec.items)),
        };
        if run_us == 0 {
            return None;
        }
        let load_us = if here.is_warm_for(&task.spec.demands) { 0 } else { u64::from(cost.load_us) };
        sum = sum.saturating_add(run_us).saturating_add(load_us);
        batches = batches.saturating_add(batch_us).saturating_add(load_us);
    }
    Some((sum, batches))
}
