//! The resources that attempts take up at one worker: slots of lanes, cores, memory, items of models.
//!
//! Owns the sums; each change updates them, so that a look at a worker costs nothing. Never decides which task comes.

use std::collections::BTreeMap;

use proto_msgs::{AttemptId, Demands, Digest, Lane, limits::ATTEMPTS_MAX};

use crate::{Census, MonoTime};

/// Cap of one attempt's estimate: sums stay far from an overflow.
const ESTIMATE_US_MAX: u64 = 24 * 3_600 * 1_000_000;

/// Attempts are overdue only this long after they should have ended, microseconds: times vary.
const OVERDUE_US_MIN: u64 = 500_000;

/// Attempts of one worker beyond which no stranger is added. The attempts that it was sent and that one heartbeat names
/// are far fewer: more are invented, or left over from heartbeats that could not name all.
const ENTRIES_MAX: usize = 4 * ATTEMPTS_MAX;

/// The resources that one attempt takes up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Held {
    /// The attempt's lane; `None` if only a heartbeat has named it, as after a restart. Until its client tells more, it
    /// may block either lane.
    pub(crate) lane: Option<Lane>,
    pub(crate) demands: Demands,
    /// The GPU whose memory the attempt was promised.
    pub(crate) gpu: Option<u8>,
    /// The attempt's model; `None` if only a heartbeat has named it.
    pub(crate) model: Option<Digest>,
    pub(crate) items: u32,
    /// Slot time that the attempt was predicted to need, microseconds; `None` if unknown.
    pub(crate) slot_us: Option<u64>,
    /// Predicted slot time of all that may run together with the attempt, itself included, microseconds: if items are
    /// packed, a batch of the best size.
    pub(crate) batch_us: u64,
}

impl Held {
    /// An attempt that a heartbeat names and of which nothing else is known.
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
    /// A heartbeat has named the attempt. From then on only heartbeats say when it is gone.
    named: bool,
    /// A heartbeat has said that the attempt runs: the GPU's measured use now includes its memory.
    begun: bool,
    held: Held,
}

/// Promised memory of one GPU.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct GpuPromised {
    pub(super) all_bytes: u128,
    /// The part promised to attempts that do not run yet.
    pub(super) coming_bytes: u128,
}

/// Sums over the attempts of one lane.
#[derive(Clone, Copy, Debug, Default)]
struct LaneUse {
    tasks: u32,
    /// Attempts without an estimate.
    unmeasured: u32,
    /// Predicted slot time of the other attempts, microseconds.
    backlog_us: u64,
    /// Predicted slot time of the batches that they may be part of, microseconds.
    batches_us: u64,
    /// Slot time that the attempts have already had, microseconds.
    served_us: u64,
    /// Attempts of which a heartbeat has said that they run.
    begun: u32,
    /// Slot time that these have had beyond what they should need, since one of them last ended, microseconds. It counts
    /// only while they fill the slots: else what is there may wait for its inputs, and the next task may run before it.
    over_us: u64,
}

impl LaneUse {
    /// The attempts that have a slot.
    fn running(&self, slots: u16) -> u64 {
        u64::from(self.tasks.min(u32::from(slots)))
    }

    /// Slot time that the running attempts should need. A waiting one gets nothing.
    fn most_us(&self, slots: u16) -> u64 {
        (self.batches_us / u64::from(self.tasks.max(1))).saturating_mul(self.running(slots)).min(self.backlog_us)
    }

    /// Slot time that the attempts will have had `later_us` after the last count, and what goes beyond their needs.
    fn served_us(&self, slots: u16, later_us: u64) -> (u64, u64) {
        let most_us = self.most_us(slots);
        let had_us = later_us.saturating_mul(self.running(slots)).saturating_add(self.served_us);
        let is_full = u64::from(self.begun) >= self.running(slots);
        let over_us = if is_full { had_us.saturating_sub(most_us) } else { 0 };
        (had_us.min(most_us), self.over_us.saturating_add(over_us))
    }

    /// Whether nothing has ended for twice the time in which something should have.
    fn is_overdue(&self, slots: u16, later_us: u64) -> bool {
        let (_, over_us) = self.served_us(slots, later_us);
        over_us > self.most_us(slots).max(self.running(slots).saturating_mul(OVERDUE_US_MIN))
    }
}

/// What the attempts at a worker were promised, in sum. Wider than the demands, which come from the network: no sum of
/// them can overflow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Reserved {
    /// Thousandths of a core.
    pub(crate) cpu_millis: u64,
    pub(crate) memory_bytes: u128,
    pub(crate) gpu_memory_bytes: u128,
}

/// The attempts at one worker and the sums of their resources.
#[derive(Debug, Default)]
pub(crate) struct Occupancy {
    entries: BTreeMap<AttemptId, Entry>,
    lanes: [LaneUse; 2],
    /// Time up to which `served_us` of the lanes is counted.
    served_until: MonoTime,
    /// Attempts of unknown lane.
    strangers: u32,
    reserved: Reserved,
    /// Items running or waiting, by model and lane. A worker has few models at a time.
    items: Vec<((Digest, Lane), u64)>,
}

impl Occupancy {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn has(&self, id: AttemptId) -> bool {
        self.entries.contains_key(&id)
    }

    /// Whether only heartbeats have named this attempt.
    pub(crate) fn is_stranger(&self, id: AttemptId) -> bool {
        self.strangers > 0 && self.entries.get(&id).is_some_and(|entry| entry.held.lane.is_none())
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = AttemptId> {
        self.entries.keys().copied()
    }

    /// Attempts in each lane. Attempts of unknown lane count in the batch lane, which has no hurry.
    pub(crate) fn tasks(&self) -> [u16; 2] {
        [self.lanes[0].tasks, self.lanes[1].tasks + self.strangers].map(slots_of)
    }

    /// Free slots for tasks of this lane. Idle batch slots serve realtime, never the other way round.
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

    /// Free slots among the lane's own.
    pub(super) fn own_free(&self, lane: Lane, slots: [u16; 2]) -> u16 {
        match lane {
            Lane::Realtime => slots[0].saturating_sub(slots_of(self.lanes[0].tasks)).min(self.free(lane, slots)),
            Lane::Batch => self.free(lane, slots),
        }
    }

    /// Slot time that the lane's attempts need, microseconds; `None` if that of one attempt is unknown.
    pub(crate) fn backlog_us(&self, lane: Lane) -> Option<u64> {
        let lane = self.lanes[lane.index()];
        (lane.unmeasured == 0 && self.strangers == 0).then_some(lane.backlog_us)
    }

    /// Slot time that the lane's attempts still need, microseconds. Unknown attempts count as zero; time already had is
    /// off.
    pub(crate) fn remaining_us(&self, lane: Lane, slots: [u16; 2], now: MonoTime) -> u64 {
        let used = &self.lanes[lane.index()];
        let later_us = now.since_us(self.served_until);
        used.backlog_us - used.served_us(slots[lane.index()], later_us).0
    }

    /// Mean time of the batches of the lane's attempts, microseconds; unknown ones count as zero.
    pub(crate) fn batch_us(&self, lane: Lane) -> u64 {
        let used = &self.lanes[lane.index()];
        used.batches_us / u64::from(used.tasks.max(1))
    }

    /// Whether nobody knows when the lane's attempts end: the time of one was never measured, or is long over.
    pub(crate) fn is_unforeseeable(&self, lane: Lane, slots: [u16; 2], now: MonoTime) -> bool {
        self.is_overdue(lane, slots, now) || self.backlog_us(lane).is_none()
    }

    /// Whether the lane is stuck: attempts that should long have ended run in all its slots.
    pub(crate) fn is_overdue(&self, lane: Lane, slots: [u16; 2], now: MonoTime) -> bool {
        let later_us = now.since_us(self.served_until);
        self.lanes[lane.index()].is_overdue(slots[lane.index()], later_us)
    }

    /// Counts the work of the lanes up to now, with these slots.
    pub(super) fn work_until(&mut self, now: MonoTime, slots: [u16; 2]) {
        let later_us = now.since_us(self.served_until);
        for (used, slots) in self.lanes.iter_mut().zip(slots) {
            (used.served_us, used.over_us) = used.served_us(slots, later_us);
        }
        self.served_until = now;
    }

    /// Items of the model in the lane.
    pub(crate) fn items(&self, model: Digest, lane: Lane) -> u64 {
        self.items.iter().find(|(key, _)| *key == (model, lane)).map_or(0, |(_, items)| *items)
    }

    pub(crate) fn reserved(&self) -> Reserved {
        self.reserved
    }

    /// The GPU whose memory this attempt was promised.
    pub(crate) fn gpu(&self, id: AttemptId) -> Option<u8> {
        self.entries.get(&id)?.held.gpu
    }

    /// Promised memory of one GPU. Few tasks ask for any, so it is summed up on demand.
    pub(super) fn gpu_memory(&self, gpu: u8) -> GpuPromised {
        let mut promised = GpuPromised::default();
        if self.reserved.gpu_memory_bytes > 0 {
            for entry in self.entries.values().filter(|entry| entry.held.gpu == Some(gpu)) {
                let bytes = u128::from(entry.held.demands.gpu_memory_bytes);
                promised.all_bytes += bytes;
                promised.coming_bytes += if entry.begun { 0 } else { bytes };
            }
        }
        promised
    }

    /// Adds a granted attempt, or updates it when more is known.
    pub(super) fn put(&mut self, id: AttemptId, held: Held) {
        let slot_us = held.slot_us.map(|us| us.min(ESTIMATE_US_MAX));
        let batch_us = held.batch_us.clamp(slot_us.unwrap_or(0), ESTIMATE_US_MAX);
        let times_us = self.lanes.map(|used| (used.served_us, used.over_us));
        let before = self.take(id);
        let (named, begun) = before.map_or((false, false), |entry| (entry.named, entry.begun));
        let gpu = before.and_then(|entry| entry.held.gpu).or(held.gpu);
        self.insert(id, Entry { named, begun, held: Held { gpu, slot_us, batch_us, ..held } });
        // More knowledge about one attempt takes nothing from the time that the lane has had.
        for (used, (served_us, over_us)) in self.lanes.iter_mut().zip(times_us) {
            (used.served_us, used.over_us) = (served_us.min(used.backlog_us), if used.tasks > 0 { over_us } else { 0 });
        }
    }

    /// Takes in the attempts that a heartbeat names, all there are if `are_all`. Returns those that have vanished.
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

    /// A heartbeat says that these attempts run.
    pub(super) fn begun(&mut self, running: impl Iterator<Item = AttemptId>) {
        for id in running {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let is_new = !std::mem::replace(&mut entry.begun, true);
            if let Some(lane) = entry.held.lane {
                self.lanes[lane.index()].begun += u32::from(is_new);
            }
        }
    }

    pub(super) fn remove(&mut self, id: AttemptId) {
        self.take(id);
    }

    /// Whether the attempt is booked and no heartbeat has named it.
    pub(super) fn is_unnamed(&self, id: AttemptId) -> bool {
        self.entries.get(&id).is_some_and(|entry| !entry.named)
    }

    /// The number of attempts that no heartbeat has named.
    pub(super) fn unnamed(&self) -> usize {
        self.entries.values().filter(|entry| !entry.named).count()
    }

    /// Counts the attempts. `tasks`: those that may have been promised a place here.
    pub(super) fn census(&self, tasks: usize, census: &mut Census<'_>) {
        let Self { entries, lanes: _, served_until: _, strangers: _, reserved: _, items } = self;
        census.passing("attempts booked at a worker", entries.len(), ENTRIES_MAX + tasks);
        census.passing("models booked at a worker", items.len(), entries.len());
    }

    fn insert(&mut self, id: AttemptId, entry: Entry) {
        let Held { lane, demands, model, items, slot_us, batch_us, .. } = entry.held;
        match lane.map(|lane| &mut self.lanes[lane.index()]) {
            Some(used) => {
                used.tasks += 1;
                used.begun += u32::from(entry.begun);
                used.backlog_us += slot_us.unwrap_or(0);
                used.batches_us += batch_us;
                used.unmeasured += u32::from(slot_us.is_none());
            }
            None => self.strangers += 1,
        }
        self.reserved.cpu_millis += u64::from(demands.cpu_millis);
        self.reserved.memory_bytes += u128::from(demands.memory_bytes);
        self.reserved.gpu_memory_bytes += u128::from(demands.gpu_memory_bytes);
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
                if entry.begun {
                    // One that only waited behind a stuck one proves nothing.
                    (used.begun, used.over_us) = (used.begun - 1, 0);
                }
                used.unmeasured -= u32::from(slot_us.is_none());
            }
            None => self.strangers -= 1,
        }
        self.reserved.cpu_millis -= u64::from(demands.cpu_millis);
        self.reserved.memory_bytes -= u128::from(demands.memory_bytes);
        self.reserved.gpu_memory_bytes -= u128::from(demands.gpu_memory_bytes);
        if let Some(at) = self.items.iter().position(|(key, _)| Some(*key) == model.zip(lane)) {
            self.items[at].1 -= u64::from(items);
            if self.items[at].1 == 0 {
                self.items.swap_remove(at);
            }
        }
        Some(entry)
    }
}

/// A number of attempts as a number of slots.
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
        assert_eq!((occupancy.reserved(), occupancy.gpu_memory(0)), (Reserved::default(), GpuPromised::default()));
        assert_eq!((occupancy.tasks(), occupancy.len(), occupancy.items.len()), ([0, 0], 0, 0));
        assert_eq!(occupancy.backlog_us(Lane::Batch), Some(0));
    }
}
