//! The earliest end of a task that any worker promises, for the verdict on its deadline.
//!
//! A refusal must be sure, so what is in doubt counts for the task: one whose cores are promised at present, waiting tasks
//! of another sort, the batch of the other lane that runs, and what may be the client's: the hand-over, and the line on
//! which its inputs come. A worker that has not measured the task's models counts with the fleet's means, and is tried
//! now and then: nothing else would show that it is faster.
//!
//! Owns the sums. Never refuses.

use proto_msgs::{Prediction, WorkerId};

use super::{
    predict::{doubtful_queue_us, models},
    trials,
};
use crate::{
    MonoTime,
    broker::{
        task::Task,
        workers::{fleet, worker::Worker},
    },
};

/// Speed of a fast line, bytes per microsecond (10 Gbit/s). The line that a worker has measured may be that of other
/// clients, and nobody knows this client's.
const FAST_BYTES_PER_US: u64 = 1250;

/// A worker that would be in time if it had loaded the task's models.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IfLoaded {
    /// Predicted time without the load, microseconds.
    pub(crate) us: u64,
    pub(crate) load_us: u64,
    /// The worker, if it has room and the models on its disk: a task would make it load them.
    pub(crate) at: Option<WorkerId>,
}

/// A worker at which the task would be too late by figures that are old.
#[derive(Clone, Copy, Debug)]
struct Old {
    us: u64,
    at: WorkerId,
}

/// Sums over the workers that could run the task.
#[derive(Debug, Default)]
pub(crate) struct Earliest {
    /// Shortest predicted time of those at which it could begin now, and of the others, microseconds.
    begins_us: Option<u64>,
    waits_us: Option<u64>,
    /// An idle worker that has not measured the task, and the time to load its models there, microseconds.
    untried: Option<(WorkerId, u64)>,
    if_loaded: Option<IfLoaded>,
    /// The best of the idle workers whose figures are old.
    old: Option<Old>,
    /// Shortest slot time that one of them needs for an item, microseconds.
    item_us: Option<u64>,
}

impl Earliest {
    /// Adds a worker's prediction, if the task has a deadline. If the task cannot begin there now, those of its sort
    /// that wait in front go first.
    pub(super) fn add(&mut self, task: &Task, worker: &Worker, prediction: &Prediction, begins: bool, now: MonoTime) {
        if task.spec.deadline_ms.is_none() {
            return;
        }
        let item_us = item_us(task, worker);
        let (us, transfer_us) = (least_us(task, worker, prediction, now), least_transfer_us(task, prediction));
        let shortest = if begins { &mut self.begins_us } else { &mut self.waits_us };
        *shortest = Some(shortest.map_or(us, |shortest| shortest.min(us)));
        if let Some(item_us) = item_us {
            self.item_us = Some(self.item_us.map_or(item_us, |shortest| shortest.min(item_us)));
        }
        let is_idle = begins && worker.occupancy.len() == 0;
        // No measurement would make the line faster.
        let is_near = task.spec.deadline_ms.is_some_and(|ms| transfer_us / 1000 < ms);
        if is_idle && is_near && trials::is_due(task, worker, us, now) && self.old.is_none_or(|old| us < old.us) {
            self.old = Some(Old { us, at: worker.id() });
        }
        if is_idle && is_near && item_us.is_none() && trials::is_untried(task, worker, us, now) {
            self.untried = self.untried.or(Some((worker.id(), prediction.load_us)));
        }
        if prediction.load_us > 0 && begins {
            let has_models = models(task).all(|(digest, _)| worker.holds(digest));
            let us = us - prediction.load_us;
            let this = IfLoaded { us, load_us: prediction.load_us, at: has_models.then(|| worker.id()) };
            let key = |this: &IfLoaded| (this.at.is_none(), this.us);
            self.if_loaded =
                Some(self.if_loaded.map_or(this, |best| if key(&this) < key(&best) { this } else { best }));
        }
    }

    /// The earliest end, microseconds from now; `None` without a worker. `items_before`: those of tasks of this sort that
    /// wait in front, for `slots` slots at most.
    pub(super) fn us(&self, items_before: u64, slots: u32) -> Option<u64> {
        let before_us = items_before.saturating_mul(self.item_us.unwrap_or(0)) / u64::from(slots.max(1));
        let waits_us = self.waits_us.map(|us| us.saturating_add(before_us));
        self.begins_us.into_iter().chain(waits_us).min()
    }

    /// An idle worker that has not measured the task and may be faster than all that have, and the time to load the
    /// task's models there, microseconds.
    pub(crate) fn untried(&self) -> Option<(WorkerId, u64)> {
        self.untried
    }

    /// The worker at which the task would end first of those that may well be faster by now, if there is one.
    pub(crate) fn old(&self) -> Option<WorkerId> {
        self.old.map(|old| old.at)
    }

    /// The worker at which the task would end first if its models were loaded, if one of them is not.
    pub(crate) fn if_loaded(&self) -> Option<IfLoaded> {
        self.if_loaded
    }
}

/// The predicted time without what is in doubt at this worker, microseconds.
pub(super) fn least_us(task: &Task, worker: &Worker, prediction: &Prediction, now: MonoTime) -> u64 {
    let transfer_us = least_transfer_us(task, prediction);
    let queue_us = prediction.queue_us.saturating_sub(doubtful_queue_us(worker, task.lane(), now));
    Prediction { queue_us, transfer_us, handover_us: 0, ..*prediction }.total_us()
}

fn least_transfer_us(task: &Task, prediction: &Prediction) -> u64 {
    prediction.transfer_us.min(task.spec.input_bytes / FAST_BYTES_PER_US)
}

/// Slot time that the worker needs for an item of the task, microseconds; `None` if it has not measured that.
fn item_us(task: &Task, worker: &Worker) -> Option<u64> {
    let each = models(task).map(|(digest, _)| worker.model(digest).cost.map(fleet::item_us).filter(|us| *us > 0));
    each.sum()
}
