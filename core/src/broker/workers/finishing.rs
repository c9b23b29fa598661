//! The load that a worker finishes for nobody: its task's deadline passed meanwhile, and the model is loaded for the tasks
//! to come. No heartbeat names an attempt for it, and all the same it takes a slot.
//!
//! Owns which slot, and for how long by prediction. Never decides that a load is finished: the worker does.

use proto_msgs::{Lane, LaneLoad};

use crate::MonoTime;

/// The load that one worker finishes. It finishes one at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Finishing(Option<Load>);

#[derive(Clone, Copy, Debug)]
struct Load {
    lane: Lane,
    until: MonoTime,
}

impl Finishing {
    /// A task of the lane has left while its model was being loaded, by prediction until then.
    pub(super) fn begins(&mut self, now: MonoTime, lane: Lane, until: MonoTime) {
        if self.at(now).is_none() {
            self.0 = Some(Load { lane, until });
        }
    }

    /// A heartbeat tells how many slots are in use. If none is, the load is over, or there was none.
    pub(super) fn told(&mut self, lanes: &[LaneLoad; 2]) {
        if lanes.iter().all(|lane| lane.slots_used == 0) {
            self.0 = None;
        }
    }

    /// The slots without the one that the load takes.
    pub(super) fn leaves(&self, now: MonoTime, mut slots: [u16; 2]) -> [u16; 2] {
        if let Some(load) = self.at(now) {
            let of = &mut slots[load.slots_of(slots).index()];
            *of = of.saturating_sub(1);
        }
        slots
    }

    /// Time that the load still takes from these slots of the lane, microseconds.
    pub(crate) fn left_us(&self, now: MonoTime, lane: Lane, slots: [u16; 2]) -> u64 {
        let lane = Load { lane, until: now }.slots_of(slots);
        let load = self.at(now).filter(|load| load.slots_of(slots) == lane);
        load.map_or(0, |load| load.until.since_us(now))
    }

    fn at(&self, now: MonoTime) -> Option<Load> {
        self.0.filter(|load| now < load.until)
    }
}

impl Load {
    /// The lane whose slots it takes: where realtime has none of its own, both lanes share those of the batch lane.
    fn slots_of(self, slots: [u16; 2]) -> Lane {
        if slots[Lane::Realtime.index()] == 0 { Lane::Batch } else { self.lane }
    }
}
