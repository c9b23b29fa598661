//! What a task loses at a worker where others run beside it: a free slot is not a free core.
//!
//! Tasks that outnumber the cores take turns; those that outnumber the GPUs wait, and `predict` says how long. Below
//! that, the loss is small or none, but nothing speaks for the busier of two workers that are nearly equal either. The
//! figures of a busy worker already contain some of this loss, and nobody knows how long the others will be there. So it
//! only weighs between workers: no prediction contains it, and no refusal comes from it.
//!
//! Owns this sum. Never chooses.

use proto_msgs::Prediction;

use crate::{
    MonoTime,
    broker::{
        task::Task,
        workers::{kind::Places, worker::Worker},
    },
};

/// A task that has a GPU or core for itself counts as losing this part (1/4) of what it would lose on a shared one.
const APART_PART: u64 = 4;

/// Time that the task is expected to lose at the worker to those beside it, microseconds: less than it runs. So a
/// worker that takes twice as long is not better for being idle. No worker that would be late is better than one in
/// time.
pub(super) fn loss_us(task: &Task, worker: &Worker, prediction: &Prediction, now: MonoTime) -> u64 {
    // Those in front of it in the queue, or for a GPU, are not beside it.
    let others = (worker.occupancy.len() as u64).min(u64::from(worker.slots()).saturating_sub(1));
    let Places { count, are_gpus } = worker.places;
    let sharing = if are_gpus { 0 } else { others / u64::from(count) };
    // One other takes half of the run time again, each further one half of the rest.
    let run_us = prediction.run_us;
    let part_us = |others: u64| run_us - run_us.checked_shr(others as u32).unwrap_or(0);
    let loss_us = part_us(sharing).max(part_us(others) / APART_PART);
    let left_us = task.deadline.map_or(u64::MAX, |deadline| deadline.since_us(now));
    left_us.saturating_sub(prediction.total_us()).min(loss_us)
}
