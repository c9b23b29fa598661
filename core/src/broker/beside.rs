//! What a task loses at a worker where others run beside it: a free slot is not a free GPU or core.
//!
//! Tasks that outnumber the GPUs or cores take turns. Below that, the loss is small or none, but nothing speaks for the
//! busier of two workers that are nearly equal either. The figures of a busy worker already contain some of this loss,
//! and nobody knows how long the others will be there. So it only weighs between workers: no prediction contains it,
//! and no refusal comes from it.
//!
//! Owns this sum. Never chooses.

use std::collections::BTreeSet;

use proto_msgs::{Prediction, Register, limits::SLOTS_MAX};

use super::{task::Task, worker::Worker};
use crate::MonoTime;

/// A task that has a GPU or core for itself counts as losing this part (1/4) of what it would lose on a shared one.
const APART_PART: u64 = 4;

/// The number of tasks that the worker's slots can run without taking turns.
pub(super) fn places(register: &Register) -> u32 {
    let slots = register.slots.iter().map(|slots| usize::from(*slots)).sum::<usize>().min(SLOTS_MAX);
    let devices: BTreeSet<i16> = register.device_map.iter().cycle().take(slots).copied().collect();
    let gpus = devices.iter().filter(|device| **device >= 0).count() as u32;
    let uses_processor = gpus == 0 || devices.len() as u32 > gpus;
    let cores = if uses_processor { register.cores } else { 0 };
    gpus.saturating_add(cores).max(1)
}

/// Time that the task is expected to lose at the worker to those beside it, microseconds: less than it runs. So a
/// worker that takes twice as long is not better for being idle. No worker that would be late is better than one in
/// time.
pub(super) fn loss_us(task: &Task, worker: &Worker, prediction: &Prediction, now: MonoTime) -> u64 {
    // Those in front of it in the queue are not beside it.
    let others = (worker.occupancy.len() as u64).min(u64::from(worker.slots()).saturating_sub(1));
    let sharing = others / u64::from(worker.places);
    // One other takes half of the run time again, each further one half of the rest.
    let run_us = prediction.run_us;
    let part_us = |others: u64| run_us - run_us.checked_shr(others as u32).unwrap_or(0);
    let loss_us = part_us(sharing).max(part_us(others) / APART_PART);
    let left_us = task.deadline.map_or(u128::MAX, |deadline| deadline.since(now).as_micros());
    let spare_us = left_us.saturating_sub(prediction.total_us().into());
    u64::try_from(spare_us).map_or(loss_us, |spare_us| spare_us.min(loss_us))
}
