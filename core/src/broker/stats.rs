//! Numbers for the metrics page. Owns their names; the parts of the machine count.

use proto_msgs::Lane;

use super::Broker;

/// The present state of the broker, in numbers.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Gauges {
    /// Live workers.
    pub workers: u32,
    /// Slots of live workers.
    pub slots: u32,
    /// Slots taken by running and granted tasks.
    pub slots_used: u32,
    /// Slots of each lane.
    pub lane_slots: [u32; 2],
    /// Tasks running or granted in each lane.
    pub lane_placed: [u32; 2],
    /// Items that wait for a slot at workers, by lane.
    pub lane_waiting_items: [u64; 2],
    /// Waiting tasks.
    pub queued: u32,
    /// Waiting tasks in each lane.
    pub lane_queued: [u32; 2],
    /// Slot time that the waiting tasks of each lane are predicted to need, microseconds.
    pub lane_queued_us: [u64; 2],
    /// Workers that violate a service level at present, counted once per stream of tasks.
    pub slo_violating: u32,
    /// Workers tried again after a violation, counted once per stream of tasks.
    pub slo_probing: u32,
    /// Median of |predicted − actual| / actual over the last predictions, thousandths.
    pub prediction_error_permille: Option<u32>,
    /// Unfinished tasks that wait in no lane.
    pub placed: u32,
}

/// Counts of events since the start. They only grow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// First submits accepted.
    pub submitted: u64,
    /// Tasks granted to a worker.
    pub granted: u64,
    /// Tasks ended with a result.
    pub done: u64,
    /// Accepted tasks that failed.
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
    /// Tasks given up because they took down one worker after another.
    pub poisonous: u64,
    /// Predictions compared with the actual time.
    pub predictions: u64,
    /// Tasks that missed their service level.
    pub slo_violations: u64,
    /// Times that a worker was avoided because it violated a service level.
    pub slo_trips: u64,
    /// Tasks given to a worker only to measure it again.
    pub trials: u64,
    /// Tasks sent to a worker only so that it loads their model: they come too late, or others gain by it.
    pub preloads: u64,
    /// Workers looked at to place tasks.
    pub candidates_looked: u64,
    /// Waiting tasks looked at to fill workers.
    pub waiting_looked: u64,
    /// Rows walked in the tables of workers and of waiting tasks, looked at or not.
    pub walked: u64,
    /// Attempts that clients reported lost.
    pub retried: u64,
    /// Heartbeats received.
    pub heartbeats: u64,
    /// Times that this process stood still for longer than a timer is ever late.
    pub pauses: u64,
    /// Registrations refused because the limit of workers is reached.
    pub workers_refused: u64,
    /// Workers that were lost because they fell silent.
    pub workers_lost: u64,
    /// Heartbeats of an earlier life, and reports of attempts that their task no longer wants.
    pub fenced: u64,
    /// Messages with the wrong key, or about another client's task.
    pub forbidden: u64,
}

impl Broker {
    /// The broker's state at the last event.
    pub fn gauges(&self) -> Gauges {
        let totals = self.workers.totals();
        let queued = self.queue.len() as u32;
        let (slo_violating, slo_probing) = self.slos.counts(self.last_handled);
        Gauges {
            workers: self.workers.len() as u32,
            slots: totals.slots.iter().sum(),
            slots_used: totals.used,
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

    /// The counts since the start.
    pub fn counters(&self) -> Counters {
        Counters {
            slo_violations: self.slos.violations,
            slo_trips: self.slos.trips,
            walked: self.workers.walked() + self.queue.walked,
            ..self.counters
        }
    }
}
