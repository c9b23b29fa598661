//! Whether a busy worker already has its share of what waits.
//!
//! ```text
//!   A  ■■■■■■■■■■        waiting: □ □ □ □ □      Spread evenly, all would be done at ┊. A is busy for longer, so it
//!   B  ■■■□□□□□┊                                 gets no more, although it has room: the rest is for B.
//! ```
//!
//! Owns the sums over the fitting workers. Never chooses.

use proto_msgs::Prediction;

use super::predict;
use crate::broker::{task::Task, workers::worker::Worker};

/// Sums over the fitting workers, with or without room.
#[derive(Debug, Default)]
pub(super) struct Fitting {
    workers: usize,
    /// Batches of the task's lane that run side by side.
    places: u64,
    /// Time until each of these places is free, summed up, microseconds.
    queues_us: u64,
    /// The shortest of these times, of workers that would take the task.
    shortest_us: Option<u64>,
}

impl Fitting {
    /// Counts a worker. `is_sound`: nothing speaks against it, and its figures are measured.
    pub(super) fn add(&mut self, task: &Task, worker: &Worker, prediction: &Prediction, is_sound: bool) {
        let (places, queue_us) = (u64::from(predict::at_once(worker, task.lane())), prediction.queue_us);
        if is_sound {
            self.shortest_us = Some(self.shortest_us.map_or(queue_us, |shortest_us| shortest_us.min(queue_us)));
        }
        self.workers += 1;
        self.places += places;
        self.queues_us = self.queues_us.saturating_add(queue_us.saturating_mul(places));
    }

    /// Whether the worker is busy beyond the time at which all would be done together. More work would only come from
    /// workers that fall idle before it. Half of the task may lie behind that time: rounded like this, no worker gets
    /// more than the others. A task of less than half a batch may always go to the least busy worker: by itself, once
    /// somebody is idle, it would take much longer. `waits_us` is the slot time of all waiting tasks; of the workers that
    /// have the model, this part was looked at.
    pub(super) fn has_its_share(
        &self,
        (task, worker, prediction): (&Task, &Worker, &Prediction),
        waits_us: u64,
        (looked, holders): (usize, usize),
    ) -> bool {
        let (own_us, batch_us) = predict::slot_us(task, worker).unwrap_or((prediction.run_us, prediction.run_us));
        let is_only = self.workers == 1 && holders <= looked;
        let is_least = self.shortest_us.is_none_or(|shortest_us| prediction.queue_us <= shortest_us);
        let may_join = own_us < batch_us / 2 && is_least;
        let holders = holders.max(1);
        let waits_us = waits_us.saturating_mul(looked.min(holders) as u64) / holders as u64;
        let together_us = self.queues_us.saturating_add(waits_us) / self.places.max(1);
        let is_busy = prediction.queue_us.saturating_add(own_us / 2) > together_us;
        prediction.measured && is_busy && !is_only && !may_join
    }
}
