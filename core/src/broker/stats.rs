//! Numbers for the metrics page. Owns their names; the parts of the machine count.

use proto_msgs::Lane;

use super::Broker;

/// Numbers for the metrics page. Counters only grow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Gauge: workers alive.
    pub workers: u32,
    /// Gauge: slots of workers alive.
    pub slots: u32,
    /// Gauge: slots in use or promised.
    pub slots_used: u32,
    /// Gauge: slots of each lane.
    pub lane_slots: [u32; 2],
    /// Gauge: tasks at work or promised in each lane.
    pub lane_placed: [u32; 2],
    /// Gauge: items that wait at workers for a slot, by lane.
    pub lane_waiting_items: [u64; 2],
    /// Gauge: tasks waiting.
    pub queued: u32,
    /// Gauge: tasks waiting in each lane.
    pub lane_queued: [u32; 2],
    /// Gauge: slot time that the tasks waiting in each lane are predicted to need, microseconds.
    pub lane_queued_us: [u64; 2],
    /// Gauge: workers that violate a service level at the moment, counted once for each stream of tasks.
    pub slo_violating: u32,
    /// Gauge: workers that are being tried again after a violation, counted once for each stream of tasks.
    pub slo_probing: u32,
    /// Gauge: median of |predicted − actual| / actual over the last predictions, thousandths.
    pub prediction_error_permille: Option<u32>,
    /// Gauge: tasks placed.
    pub placed: u32,
    /// Counter: first submits taken.
    pub submitted: u64,
    /// Counter: grants given.
    pub granted: u64,
    /// Counter: tasks ended with a result.
    pub done: u64,
    /// Counter: tasks ended without.
    pub failed: u64,
    /// Counter: tasks cancelled.
    pub cancelled: u64,
    /// Counter: submits refused.
    pub refused: u64,
    /// Counter: of those, because something was full.
    pub refused_busy: u64,
    /// Counter: of those, because no worker could ever run them.
    pub refused_unfit: u64,
    /// Counter: of those, because their deadline could not be met.
    pub refused_deadline: u64,
    /// Counter: of those, because the store was away.
    pub refused_store: u64,
    /// Counter: tasks given up because they took worker after worker down.
    pub poisonous: u64,
    /// Counter: predictions that were compared with what came.
    pub predictions: u64,
    /// Counter: tasks of streams that took longer than promised.
    pub slo_violations: u64,
    /// Counter: times a worker was left for violating a service level.
    pub slo_trips: u64,
    /// Counter: workers looked at in order to place tasks.
    pub candidates_looked: u64,
    /// Counter: waiting tasks looked at in order to fill workers.
    pub waiting_looked: u64,
    /// Counter: attempts lost and asked for again.
    pub retried: u64,
    /// Counter: heartbeats.
    pub heartbeats: u64,
    /// Counter: times this process stood still for longer than any timer is late.
    pub pauses: u64,
    /// Counter: workers that fell silent.
    pub workers_lost: u64,
    /// Counter: reports of attempts that are no longer the task's.
    pub fenced: u64,
    /// Counter: messages from the wrong key or on the wrong task.
    pub forbidden: u64,
}

impl Broker {
    /// Numbers for the metrics page, as they were when something last happened.
    pub fn stats(&self) -> Stats {
        let totals = self.workers.totals();
        let queued = self.queue.len() as u32;
        let (slo_violating, slo_probing) = self.slos.counts(self.last_handled);
        Stats {
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
            slo_violations: self.slos.violations,
            slo_trips: self.slos.trips,
            ..self.stats
        }
    }
}
