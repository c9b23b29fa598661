//! Numbers for the metrics page. Owns their names; the parts of the machine count.

use proto_msgs::Lane;

use super::Broker;

/// How things stand.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Gauges {
    /// Workers alive.
    pub workers: u32,
    /// Slots of workers alive.
    pub slots: u32,
    /// Slots in use or promised.
    pub slots_used: u32,
    /// Slots of each lane.
    pub lane_slots: [u32; 2],
    /// Tasks at work or promised in each lane.
    pub lane_placed: [u32; 2],
    /// Items that wait at workers for a slot, by lane.
    pub lane_waiting_items: [u64; 2],
    /// Tasks waiting.
    pub queued: u32,
    /// Tasks waiting in each lane.
    pub lane_queued: [u32; 2],
    /// Slot time that the tasks waiting in each lane are predicted to need, microseconds.
    pub lane_queued_us: [u64; 2],
    /// Workers that violate a service level at the moment, counted once for each stream of tasks.
    pub slo_violating: u32,
    /// Workers that are being tried again after a violation, counted once for each stream of tasks.
    pub slo_probing: u32,
    /// Median of |predicted − actual| / actual over the last predictions, thousandths.
    pub prediction_error_permille: Option<u32>,
    /// Tasks placed.
    pub placed: u32,
}

/// What has happened so far. These numbers only grow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// First submits taken.
    pub submitted: u64,
    /// Grants given.
    pub granted: u64,
    /// Tasks ended with a result.
    pub done: u64,
    /// Tasks that were taken and ended without.
    pub failed: u64,
    /// Tasks cancelled.
    pub cancelled: u64,
    /// First submits refused because something was full.
    pub refused_busy: u64,
    /// First submits refused because no worker could ever run them.
    pub refused_unfit: u64,
    /// First submits refused because their deadline could not be met.
    pub refused_deadline: u64,
    /// First submits refused because the store was away.
    pub refused_store: u64,
    /// Tasks given up because they took worker after worker down.
    pub poisonous: u64,
    /// Predictions that were compared with what came.
    pub predictions: u64,
    /// Tasks of streams that took longer than promised.
    pub slo_violations: u64,
    /// Times a worker was left for violating a service level.
    pub slo_trips: u64,
    /// Workers looked at in order to place tasks.
    pub candidates_looked: u64,
    /// Waiting tasks looked at in order to fill workers.
    pub waiting_looked: u64,
    /// Rows of the tables of workers and of waiting tasks that were gone through, looked at or not.
    pub walked: u64,
    /// Attempts lost and asked for again.
    pub retried: u64,
    /// Heartbeats.
    pub heartbeats: u64,
    /// Times this process stood still for longer than any timer is late.
    pub pauses: u64,
    /// Registrations refused because as many workers are known as may be.
    pub workers_refused: u64,
    /// Workers that fell silent.
    pub workers_lost: u64,
    /// Reports of attempts that are no longer the task's.
    pub fenced: u64,
    /// Messages from the wrong key or on the wrong task.
    pub forbidden: u64,
}

impl Broker {
    /// How things stood when something last happened.
    pub fn gauges(&self) -> Gauges {
        let totals = self.workers.totals();
        let queued = self.queue.len() as u32;
        let (slo_violating, slo_probing) = self.slos.counts(self.last_handled);
        Gauges {
            workers: self.workers.len() as u32,
            slots: totals.slots.iter().sum(),
            slots_used: totals.tasks.iter().sum(),
            lane_slots: totals.slots,
            lane_placed: totals.tasks,
            lane_waiting_items: totals.waiting_items,
            queued,
            placed: (self.tasks.live() as u32).saturating_sub(queued),
            lane_queued: Lane::ALL.map(|lane| self.queue.lane_len(lane) as u32),
            lane_queued_us: Lane::ALL.map(|lane| self.queue.cost_us(lane)),
            slo_violating,
            slo_probing,
            prediction_error_permille: self.errors.median_permille(),
        }
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        Counters {
            slo_violations: self.slos.violations,
            slo_trips: self.slos.trips,
            walked: self.workers.walked() + self.queue.walked,
            ..self.counters
        }
    }
}
