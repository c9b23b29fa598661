//! What attempts take up at one worker: slots of lanes, cores, memory, items of models.
//!
//! Owns the sums, which are kept up with each change so that a look at a worker costs nothing. Never decides who comes.

use std::collections::BTreeMap;

use proto_msgs::{AttemptId, Demands, Digest, Lane, limits::ATTEMPTS_MAX};

use crate::MonoTime;

/// No estimate of one attempt counts for more: sums of them stay far from an overflow.
const ESTIMATE_US_MAX: u64 = 24 * 3_600 * 1_000_000;

/// Attempts of one worker beyond which no stranger is booked: what it was sent and as many as a heartbeat names are far fewer.
/// More are invented, or were left over while heartbeats could not name all.
const ENTRIES_MAX: usize = 4 * ATTEMPTS_MAX;

/// What one attempt takes up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Held {
    /// `None` for an attempt of which only a heartbeat has told, as after a restart: until its client tells more, it may be in
    /// the way of either lane.
    pub(super) lane: Option<Lane>,
    pub(super) demands: Demands,
    /// The GPU whose memory it was promised.
    pub(super) gpu: Option<u8>,
    /// `None` for an attempt of which only a heartbeat has told.
    pub(super) model: Option<Digest>,
    pub(super) items: u32,
    /// Slot time that it was predicted to need, microseconds; `None` if nobody knows.
    pub(super) slot_us: Option<u64>,
    /// The same of all that may run with it, itself included: where items are packed, a batch of the best size.
    pub(super) batch_us: u64,
}

impl Held {
    /// An attempt that a heartbeat names and of which nothing is known.
    pub(super) const UNKNOWN: Self = Self {
        lane: None,
        demands: Demands { cpu_millis: 0, memory_bytes: 0, gpu_memory_bytes: 0, arch: None },
        gpu: None,
        model: None,
        items: 1,
        slot_us: None,
        batch_us: 0,
    };
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// A heartbeat has named the attempt. From then on heartbeats alone say when it is gone.
    named: bool,
    /// A heartbeat has said that it runs: what it takes of its GPU's memory shows there.
    begun: bool,
    held: Held,
}

/// Memory of one GPU that was promised.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Promised {
    pub(super) all_bytes: u128,
    /// Of it, to those that do not run yet.
    pub(super) coming_bytes: u128,
}

/// One lane's part.
#[derive(Clone, Copy, Debug, Default)]
struct LaneUse {
    tasks: u32,
    /// Of them, those of which nobody knows how long they take.
    unmeasured: u32,
    /// Slot time that the others were predicted to need.
    backlog_us: u64,
    /// The same of the batches that each of them may be part of.
    batches_us: u64,
    /// Slot time that they have had already.
    served_us: u64,
}

impl LaneUse {
    /// Slot time that they have had some time later.
    fn served_us(&self, slots: u16, later_us: u64) -> u64 {
        let running = u64::from(self.tasks.min(u32::from(slots)));
        // Nobody has had more than it needs, and those that wait nothing.
        let most_us = (self.batches_us / u64::from(self.tasks.max(1))).saturating_mul(running).min(self.backlog_us);
        later_us.saturating_mul(running).saturating_add(self.served_us).min(most_us)
    }
}

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Occupancy {
    entries: BTreeMap<AttemptId, Entry>,
    lanes: [LaneUse; 2],
    /// Up to when what the lanes have had is counted.
    served_until: MonoTime,
    /// Attempts of which nobody knows the lane.
    strangers: u32,
    cpu_millis: u64,
    // Wider than the demands, which the network chooses: no sum of them can overflow.
    memory_bytes: u128,
    gpu_memory_bytes: u128,
    /// Items at work or waiting, by model and lane. A worker is at few models at a time.
    items: Vec<((Digest, Lane), u64)>,
}

impl Occupancy {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn has(&self, id: AttemptId) -> bool {
        self.entries.contains_key(&id)
    }

    /// Whether of this attempt only heartbeats have told.
    pub(super) fn is_stranger(&self, id: AttemptId) -> bool {
        self.strangers > 0 && self.entries.get(&id).is_some_and(|entry| entry.held.lane.is_none())
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = AttemptId> {
        self.entries.keys().copied()
    }

    /// Attempts in each lane; those of which nobody knows count with the lane that has no hurry.
    pub(super) fn tasks(&self) -> [u16; 2] {
        [self.lanes[0].tasks, self.lanes[1].tasks + self.strangers].map(slots_of)
    }

    /// Slots that a task of this lane could have at once. Idle slots of the batch lane serve realtime, never the other way.
    pub(super) fn free(&self, lane: Lane, slots: [u16; 2]) -> u16 {
        let [realtime, batch] = self.lanes.map(|lane| slots_of(lane.tasks));
        let free = match lane {
            Lane::Realtime => {
                let idle = slots[1].saturating_sub(batch);
                slots[0].saturating_add(idle).saturating_sub(realtime)
            }
            Lane::Batch => {
                let lent = realtime.saturating_sub(slots[0]);
                slots[1].saturating_sub(lent).saturating_sub(batch)
            }
        };
        free.saturating_sub(slots_of(self.strangers))
    }

    /// Slots of the lane's own that are free.
    pub(super) fn own_free(&self, lane: Lane, slots: [u16; 2]) -> u16 {
        match lane {
            Lane::Realtime => slots[0].saturating_sub(slots_of(self.lanes[0].tasks)).min(self.free(lane, slots)),
            Lane::Batch => self.free(lane, slots),
        }
    }

    /// Slot time that the lane's attempts need, microseconds; `None` if for one of them nobody knows.
    pub(super) fn backlog_us(&self, lane: Lane) -> Option<u64> {
        let lane = self.lanes[lane.index()];
        (lane.unmeasured == 0 && self.strangers == 0).then_some(lane.backlog_us)
    }

    /// The same, with nothing for those that nobody knows, less what those that run have had of it.
    pub(super) fn remaining_us(&self, lane: Lane, slots: [u16; 2], now: MonoTime) -> u64 {
        let used = &self.lanes[lane.index()];
        let later_us = now.as_micros().saturating_sub(self.served_until.as_micros());
        used.backlog_us - used.served_us(slots[lane.index()], later_us)
    }

    /// The lanes have worked until now, with so many slots.
    pub(super) fn work_until(&mut self, now: MonoTime, slots: [u16; 2]) {
        let later_us = now.as_micros().saturating_sub(self.served_until.as_micros());
        for (used, slots) in self.lanes.iter_mut().zip(slots) {
            used.served_us = used.served_us(slots, later_us);
        }
        self.served_until = now;
    }

    /// Items of the model in the lane.
    pub(super) fn items(&self, model: Digest, lane: Lane) -> u64 {
        self.items.iter().find(|(key, _)| *key == (model, lane)).map_or(0, |(_, items)| *items)
    }

    /// Promised: thousandths of a core, bytes of memory, bytes of GPU memory.
    pub(super) fn reserved(&self) -> (u64, u128, u128) {
        (self.cpu_millis, self.memory_bytes, self.gpu_memory_bytes)
    }

    /// What was promised of a GPU's memory. Few tasks ask for any, so it is summed up when one does.
    pub(super) fn gpu_memory(&self, gpu: u8) -> Promised {
        let mut promised = Promised::default();
        if self.gpu_memory_bytes > 0 {
            for entry in self.entries.values().filter(|entry| entry.held.gpu == Some(gpu)) {
                let bytes = u128::from(entry.held.demands.gpu_memory_bytes);
                promised.all_bytes += bytes;
                promised.coming_bytes += if entry.begun { 0 } else { bytes };
            }
        }
        promised
    }

    /// An attempt is promised, or more is known of it.
    pub(super) fn put(&mut self, id: AttemptId, held: Held) {
        let slot_us = held.slot_us.map(|us| us.min(ESTIMATE_US_MAX));
        let batch_us = held.batch_us.clamp(slot_us.unwrap_or(0), ESTIMATE_US_MAX);
        let served_us = self.lanes.map(|used| used.served_us);
        let before = self.take(id);
        let (named, begun) = before.map_or((false, false), |entry| (entry.named, entry.begun));
        let gpu = before.and_then(|entry| entry.held.gpu).or(held.gpu);
        self.insert(id, Entry { named, begun, held: Held { gpu, slot_us, batch_us, ..held } });
        // That more is known of one of them takes nothing from what they have had.
        for (used, served_us) in self.lanes.iter_mut().zip(served_us) {
            used.served_us = served_us.min(used.backlog_us);
        }
    }

    /// A heartbeat names these and, if it names all, no others. Gives those that earlier ones named and this one does not.
    pub(super) fn named(&mut self, active: impl Iterator<Item = AttemptId> + Clone, are_all: bool) -> Vec<AttemptId> {
        let known = self.entries.iter().filter(|(_, entry)| entry.named).map(|(id, _)| *id);
        let before: Vec<AttemptId> = known.collect();
        for id in active.clone() {
            let is_full = self.entries.len() >= ENTRIES_MAX;
            match self.entries.get_mut(&id) {
                Some(entry) => entry.named = true,
                None if is_full => {}
                None => self.insert(id, Entry { named: true, begun: false, held: Held::UNKNOWN }),
            }
        }
        if before.is_empty() || !are_all {
            return Vec::new();
        }
        let active: std::collections::BTreeSet<AttemptId> = active.collect();
        let vanished: Vec<AttemptId> = before.into_iter().filter(|id| !active.contains(id)).collect();
        for id in &vanished {
            self.take(*id);
        }
        vanished
    }

    /// A heartbeat says that these run.
    pub(super) fn begun(&mut self, running: impl Iterator<Item = AttemptId>) {
        for id in running {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.begun = true;
            }
        }
    }

    pub(super) fn remove(&mut self, id: AttemptId) {
        self.take(id);
    }

    /// Removes a promise that no heartbeat has taken up.
    pub(super) fn remove_unnamed(&mut self, id: AttemptId) {
        if self.entries.get(&id).is_some_and(|entry| !entry.named) {
            self.take(id);
        }
    }

    fn insert(&mut self, id: AttemptId, entry: Entry) {
        let Held { lane, demands, model, items, slot_us, batch_us, .. } = entry.held;
        match lane.map(|lane| &mut self.lanes[lane.index()]) {
            Some(used) => {
                used.tasks += 1;
                used.backlog_us += slot_us.unwrap_or(0);
                used.batches_us += batch_us;
                used.unmeasured += u32::from(slot_us.is_none());
            }
            None => self.strangers += 1,
        }
        self.cpu_millis += u64::from(demands.cpu_millis);
        self.memory_bytes += u128::from(demands.memory_bytes);
        self.gpu_memory_bytes += u128::from(demands.gpu_memory_bytes);
        if let Some((model, lane)) = model.zip(lane) {
            match self.items.iter_mut().find(|(key, _)| *key == (model, lane)) {
                Some((_, sum)) => *sum += u64::from(items),
                None => self.items.push(((model, lane), u64::from(items))),
            }
        }
        self.entries.insert(id, entry);
    }

    fn take(&mut self, id: AttemptId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        let Held { lane, demands, model, items, slot_us, batch_us, .. } = entry.held;
        match lane.map(|lane| &mut self.lanes[lane.index()]) {
            Some(used) => {
                used.tasks -= 1;
                used.backlog_us -= slot_us.unwrap_or(0);
                used.batches_us -= batch_us;
                used.served_us = used.served_us.saturating_sub(slot_us.unwrap_or(0)).min(used.backlog_us);
                used.unmeasured -= u32::from(slot_us.is_none());
            }
            None => self.strangers -= 1,
        }
        self.cpu_millis -= u64::from(demands.cpu_millis);
        self.memory_bytes -= u128::from(demands.memory_bytes);
        self.gpu_memory_bytes -= u128::from(demands.gpu_memory_bytes);
        if let Some(at) = self.items.iter().position(|(key, _)| Some(*key) == model.zip(lane)) {
            self.items[at].1 -= u64::from(items);
            if self.items[at].1 == 0 {
                self.items.swap_remove(at);
            }
        }
        Some(entry)
    }
}

/// Attempts as slots are counted.
fn slots_of(attempts: u32) -> u16 {
    u16::try_from(attempts).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use proto_msgs::{Attempt, TaskId};

    use super::*;

    fn id(number: u8) -> AttemptId {
        AttemptId { task: TaskId::from_bytes([number; 16]), attempt: Attempt(1) }
    }

    fn held(lane: Lane) -> Held {
        Held { lane: Some(lane), slot_us: Some(10_000), ..Held::UNKNOWN }
    }

    #[test]
    fn idle_batch_slots_are_lent_to_realtime_and_never_the_other_way() {
        let slots = [1, 2];
        let mut occupancy = Occupancy::default();
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (3, 2));
        occupancy.put(id(1), held(Lane::Realtime));
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (2, 2));
        occupancy.put(id(2), held(Lane::Realtime));
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (1, 1));
        occupancy.put(id(3), held(Lane::Batch));
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (0, 0));
        occupancy.remove(id(1));
        occupancy.remove(id(2));
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (2, 1));
    }

    #[test]
    fn one_slot_serves_both_lanes() {
        let slots = [0, 1];
        let mut occupancy = Occupancy::default();
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (1, 1));
        occupancy.put(id(1), held(Lane::Batch));
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (0, 0));
    }

    #[test]
    fn an_attempt_of_which_only_a_heartbeat_tells_is_in_the_way_of_both_lanes() {
        let slots = [1, 1];
        let mut occupancy = Occupancy::default();
        assert_eq!(occupancy.named([id(1), id(2)].into_iter(), true), []);
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.own_free(Lane::Realtime, slots)), (0, 0));
        occupancy.put(id(1), held(Lane::Batch));
        occupancy.put(id(2), held(Lane::Batch));
        assert_eq!((occupancy.free(Lane::Realtime, slots), occupancy.free(Lane::Batch, slots)), (1, 0));
    }

    #[test]
    fn what_a_full_list_does_not_name_is_not_gone() {
        let mut occupancy = Occupancy::default();
        assert_eq!(occupancy.named([id(1), id(2)].into_iter(), true), []);
        assert_eq!(occupancy.named([id(2)].into_iter(), false), []);
        assert_eq!(occupancy.named([id(2)].into_iter(), true), [id(1)]);
    }

    #[test]
    fn a_batch_is_served_as_a_whole_and_what_runs_alone_one_by_one() {
        let at = |ms: u64| MonoTime::from_micros(ms * 1000);
        let left_ms = |batch_us: u64, later_ms: u64| {
            let mut occupancy = Occupancy::default();
            occupancy.work_until(at(0), [0, 1]);
            let put_all = |occupancy: &mut Occupancy| {
                (0..6).for_each(|number| occupancy.put(id(number), Held { batch_us, ..held(Lane::Batch) }));
            };
            put_all(&mut occupancy);
            occupancy.work_until(at(later_ms), [0, 1]);
            put_all(&mut occupancy); // Heartbeats say the same again.
            occupancy.remaining_us(Lane::Batch, [0, 1], at(later_ms)) / 1000
        };
        assert_eq!([0, 5, 30, 90].map(|later_ms| left_ms(0, later_ms)), [60, 55, 50, 50]);
        assert_eq!([0, 5, 30, 90].map(|later_ms| left_ms(40_000, later_ms)), [60, 55, 30, 20]);
    }

    #[test]
    fn what_comes_and_goes_leaves_nothing_however_large_it_claims_to_be() {
        let mut occupancy = Occupancy::default();
        let demands = Demands { cpu_millis: u32::MAX, memory_bytes: u64::MAX, gpu_memory_bytes: u64::MAX, arch: None };
        let model = Some(Digest::from_bytes([1; 32]));
        for number in 0..4 {
            let lane = Some(Lane::ALL[usize::from(number % 2)]);
            occupancy.put(
                id(number),
                Held { lane, demands, gpu: Some(0), model, items: u32::MAX, slot_us: Some(u64::MAX), batch_us: 0 },
            );
            occupancy.put(
                id(number),
                Held {
                    lane: Some(Lane::Realtime),
                    demands,
                    gpu: None,
                    model,
                    items: 3,
                    slot_us: None,
                    batch_us: u64::MAX,
                },
            );
        }
        assert_eq!(occupancy.backlog_us(Lane::Realtime), None);
        assert_eq!(occupancy.named([id(0), id(9)].into_iter(), true), []);
        assert_eq!(occupancy.named([id(9)].into_iter(), true), [id(0)]);
        (0..10).for_each(|number| occupancy.remove(id(number)));
        assert_eq!((occupancy.reserved(), occupancy.gpu_memory(0)), ((0, 0, 0), Promised::default()));
        assert_eq!((occupancy.tasks(), occupancy.len(), occupancy.items.len()), ([0, 0], 0, 0));
        assert_eq!(occupancy.backlog_us(Lane::Batch), Some(0));
    }
}
