//! The slots of a worker: each runs one batch at a time, on one device.
//!
//! ```text
//!   slots     realtime 0 · realtime 1 · batch 2 · batch 3       slot i sits on entry i of the device map
//!   devices        GPU 0       GPU 1       GPU 0     GPU 1       a GPU takes `width` batches at once, the CPU any number
//!   lanes     realtime ──► realtime slots, then idle batch slots
//!             batch ─────► batch slots
//! ```
//!
//! A lent slot changes places with the first slot of the realtime lane that falls free on its device: otherwise the batch
//! lane would wait for the whole lent run beside a free slot, and the broker, which counts, would not know why.
//!
//! Owns which slot is free on which device, and the device time owed to the batch lane. Never knows what runs.

use std::collections::BTreeMap;

use proto_msgs::{
    Lane, Register,
    limits::{GPUS_MAX, SLOTS_MAX},
};

use super::api::{BatchId, SlotId};
use crate::{Census, MonoTime};

/// While realtime work competes, the batch lane's share of a device is a tenth: it is owed one part for every nine of
/// the realtime lane.
const REALTIME_PARTS: i64 = 9;

/// Most device time owed, microseconds: after hours of realtime work the batch lane does not get minutes at once.
const OWED_US_MAX: i64 = 2_000_000;

#[derive(Debug)]
struct Slot {
    lane: Lane,
    device: i16,
    batch: Option<BatchId>,
    /// The lane of the running batch, or of the last one.
    runs: Lane,
    /// GPU memory promised to the running batch.
    gpu_memory_bytes: u64,
}

impl Slot {
    fn is_lent(&self) -> bool {
        self.batch.is_some() && (self.lane, self.runs) == (Lane::Batch, Lane::Realtime)
    }
}

/// The slots of a worker.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// Batches that may run on one GPU at once.
    width: usize,
    /// Cores of the processor; as good as endless if nobody knows.
    cores: usize,
    /// Memory of each GPU, in the driver's order.
    gpus_bytes: Vec<u64>,
    /// Device time that the batch lane is owed, microseconds; negative if it had too much while realtime work waited.
    owed_us: BTreeMap<i16, i64>,
    /// When a slot last fell free on a device on which none was.
    opened: BTreeMap<i16, MonoTime>,
    /// False only in a test: then every slot counts as free.
    counts: bool,
}

impl Slots {
    pub(super) fn new(register: &Register, counts: bool) -> Self {
        let [realtime, batch] = register.slots;
        // A worker without slots would admit tasks and never run them.
        let batch = if realtime == 0 { batch.max(1) } else { batch };
        let lanes = (0..realtime).map(|_| Lane::Realtime).chain((0..batch).map(|_| Lane::Batch));
        let map = if register.device_map.is_empty() { &[-1][..] } else { &register.device_map };
        let empty = |lane, device| Slot { lane, device, batch: None, runs: lane, gpu_memory_bytes: 0 };
        let slots = lanes.zip(map.iter().cycle()).map(|(lane, device)| empty(lane, *device)).collect();
        let gpus_bytes = register.gpus.iter().map(|gpu| gpu.memory_bytes).collect();
        let cores = if register.cores == 0 { usize::MAX } else { register.cores as usize };
        let width = usize::from(register.device_width.max(1));
        Self { slots, width, cores, gpus_bytes, owed_us: BTreeMap::new(), opened: BTreeMap::new(), counts }
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { slots, width: _, cores: _, gpus_bytes, owed_us, opened, counts: _ } = self;
        census.lasting("slots", slots.len(), SLOTS_MAX);
        census.lasting("GPUs", gpus_bytes.len(), GPUS_MAX);
        census.lasting("devices owed", owed_us.len(), slots.len());
        census.lasting("devices opened", opened.len(), slots.len());
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn of_lane(&self, lane: Lane) -> usize {
        self.slots.iter().filter(|slot| slot.lane == lane).count()
    }

    /// Whether a slot that is open to the lane sits on this device.
    pub(super) fn has_device(&self, lane: Lane, device: i16) -> bool {
        self.slots.iter().any(|slot| slot.device == device && (slot.lane == lane || lane == Lane::Realtime))
    }

    /// Whether a slot of the lane itself sits on this device.
    pub(super) fn has_own(&self, lane: Lane, device: i16) -> bool {
        self.slots.iter().any(|slot| (slot.device, slot.lane) == (device, lane))
    }

    /// Slots in which a batch can begin now: realtime slots first, and within a lane those on the least busy device.
    pub(super) fn open(&self) -> Vec<SlotId> {
        let is_open = |slot: &&(usize, &Slot)| !self.counts || slot.1.batch.is_none() && self.has_room(slot.1.device);
        let mut open: Vec<(usize, &Slot)> = self.slots.iter().enumerate().filter(|slot| is_open(&slot)).collect();
        open.sort_by_key(|(number, slot)| (slot.lane, self.running_on(slot.device), *number));
        open.into_iter().map(|(number, _)| SlotId(u16::try_from(number).unwrap_or(u16::MAX))).collect()
    }

    pub(super) fn lane(&self, slot: SlotId) -> Lane {
        self.slots[usize::from(slot.0)].lane
    }

    pub(super) fn device(&self, slot: SlotId) -> i16 {
        self.slots[usize::from(slot.0)].device
    }

    /// Whether both lanes share all slots: the realtime lane has none of its own.
    pub(super) fn are_shared(&self) -> bool {
        self.of_lane(Lane::Realtime) == 0
    }

    /// Whether a batch of one lane can make the other lane wait on this device.
    pub(super) fn is_contended(&self, device: i16) -> bool {
        device >= 0 || self.are_shared()
    }

    /// Whether realtime rows that have a slot may wait for a batch of the batch lane on this device.
    pub(super) fn makes_realtime_wait(&self, device: i16) -> bool {
        let here = self.slots.iter().filter(|slot| slot.device == device).count();
        self.are_shared() || device >= 0 && self.has_own(Lane::Realtime, device) && here > self.width
    }

    /// The device of each slot.
    pub(super) fn devices(&self) -> impl Iterator<Item = i16> {
        self.slots.iter().map(|slot| slot.device)
    }

    fn running_on(&self, device: i16) -> usize {
        self.slots.iter().filter(|slot| slot.device == device && slot.batch.is_some()).count()
    }

    fn has_room(&self, device: i16) -> bool {
        device < 0 || self.running_on(device) < self.width
    }

    /// Whether the device has this much memory left beside what its running batches were promised. A device without any
    /// promise is tried in any case.
    pub(super) fn has_memory(&self, device: i16, wanted_bytes: u64) -> bool {
        let running = self.slots.iter().filter(|slot| slot.device == device && slot.batch.is_some());
        let promised_bytes = running.fold(0_u64, |sum, slot| sum.saturating_add(slot.gpu_memory_bytes));
        let size_bytes = usize::try_from(device).ok().and_then(|index| self.gpus_bytes.get(index));
        wanted_bytes == 0
            || promised_bytes == 0
            || size_bytes.is_none_or(|size| promised_bytes.saturating_add(wanted_bytes) <= *size)
    }

    /// The number of batches of a lane that can begin now, side by side, within the width of each device that they `may`
    /// use. `is_lent`: the realtime lane has the batch slots, too; on the processor as far as it has cores, as more would
    /// only share them.
    pub(super) fn spare(&self, lane: Lane, is_lent: bool, may: impl Fn(i16) -> bool) -> u32 {
        let lane = if self.are_shared() { Lane::Batch } else { lane };
        let is_lent = is_lent && lane == Lane::Realtime;
        let mut room: BTreeMap<i16, [usize; 2]> = BTreeMap::new();
        let is_spare = |slot: &&Slot| slot.batch.is_none() && (slot.lane == lane || is_lent) && may(slot.device);
        for slot in self.slots.iter().filter(is_spare) {
            room.entry(slot.device).or_default()[usize::from(slot.lane != lane)] += 1;
        }
        let capped = |(device, [own, lent]): (i16, [usize; 2])| {
            let running = self.running_on(device);
            if device < 0 {
                own + lent.min(self.cores.saturating_sub(running + own))
            } else {
                (own + lent).min(self.width.saturating_sub(running))
            }
        };
        u32::try_from(room.into_iter().map(capped).sum::<usize>()).unwrap_or(u32::MAX)
    }

    pub(super) fn occupy(&mut self, slot: SlotId, batch: BatchId, runs: Lane, gpu_memory_bytes: u64) {
        let slot = &mut self.slots[usize::from(slot.0)];
        (slot.batch, slot.runs, slot.gpu_memory_bytes) = (Some(batch), runs, gpu_memory_bytes);
    }

    pub(super) fn release(&mut self, now: MonoTime, batch: BatchId) {
        let Some(freed) = self.slots.iter().position(|slot| slot.batch == Some(batch)) else { return };
        let (lane, device) = (self.slots[freed].lane, self.slots[freed].device);
        if self.open().iter().all(|slot| self.device(*slot) != device) {
            self.opened.insert(device, now);
        }
        self.slots[freed].batch = None;
        if lane == Lane::Realtime
            && let Some(lent) = self.slots.iter_mut().find(|slot| slot.device == device && slot.is_lent())
        {
            lent.lane = Lane::Realtime;
            self.slots[freed].lane = Lane::Batch;
        }
    }

    /// When a slot last fell free on a device on which none was.
    pub(super) fn opened(&self, device: i16) -> MonoTime {
        self.opened.get(&device).copied().unwrap_or(MonoTime::ZERO)
    }

    /// Books device time used by a lane; `waits` names the lanes that wait. The batch lane's claim grows only while it
    /// has work. What it had too much, because a batch took longer than expected, counts only if realtime work waited
    /// for it.
    pub(super) fn spent(&mut self, device: i16, lane: Lane, run_us: u64, waits: [bool; 2]) {
        let run_us = i64::try_from(run_us).unwrap_or(i64::MAX);
        let owed_us = self.owed_us.entry(device).or_default();
        let least_us = if waits[Lane::Realtime.index()] { -OWED_US_MAX } else { 0 };
        *owed_us = match lane {
            Lane::Realtime if waits[Lane::Batch.index()] => owed_us.saturating_add(run_us / REALTIME_PARTS),
            Lane::Realtime => 0,
            Lane::Batch => owed_us.saturating_sub(run_us).max(least_us),
        };
        *owed_us = (*owed_us).min(OWED_US_MAX);
    }

    /// Whether the batch lane is owed this device for a batch that takes `run_us`.
    pub(super) fn owes(&self, device: i16, run_us: u64) -> bool {
        let owed_us = self.owed_us.get(&device).copied().unwrap_or(0);
        owed_us >= i64::try_from(run_us).unwrap_or(i64::MAX).clamp(1, OWED_US_MAX)
    }
}

#[cfg(test)]
mod tests {
    use proto_msgs::Gpu;

    use super::*;

    fn slots(lanes: [u16; 2], device_map: &[i16], width: u16) -> Slots {
        let device_map = device_map.to_vec();
        let register = Register { slots: lanes, device_map, device_width: width, ..mesh_samples::register(1) };
        Slots::new(&register, true)
    }

    fn devices(slots: &Slots) -> Vec<i16> {
        slots.slots.iter().map(|slot| slot.device).collect()
    }

    #[test]
    fn devices_are_used_again_by_more_slots_and_the_first_ones_by_fewer() {
        assert_eq!(devices(&slots([2, 3], &[0, 1], 1)), [0, 1, 0, 1, 0]);
        assert_eq!(devices(&slots([0, 2], &[-1, 0, 1], 1)), [-1, 0]);
        assert_eq!(devices(&slots([1, 1], &[], 1)), [-1, -1]);
    }

    #[test]
    fn a_gpu_takes_as_many_batches_as_it_is_wide_and_a_cpu_as_many_as_there_are_slots() {
        let mut slots = slots([2, 2], &[0, -1], 1);
        assert_eq!(slots.open(), [SlotId(0), SlotId(1), SlotId(2), SlotId(3)]);
        assert_eq!([false, true].map(|is_lent| slots.spare(Lane::Realtime, is_lent, |_| true)), [2, 3]);
        assert_eq!(slots.spare(Lane::Realtime, true, |device| device == 0), 1, "what is pinned to a GPU has only that");
        slots.occupy(SlotId(0), BatchId(1), Lane::Batch, 0);
        assert_eq!(slots.open(), [SlotId(1), SlotId(3)], "slot 2 sits on the same GPU");
        assert_eq!(slots.spare(Lane::Batch, true, |_| true), 1);
        slots.occupy(SlotId(1), BatchId(2), Lane::Batch, 0);
        assert_eq!(slots.open(), [SlotId(3)]);
        slots.release(MonoTime::ZERO, BatchId(1));
        assert_eq!(slots.open(), [SlotId(0), SlotId(2), SlotId(3)]);
        assert_eq!(slots.slots.iter().filter(|slot| slot.batch.is_some()).count(), 1);
    }

    #[test]
    fn slots_are_lent_as_far_as_a_processor_has_cores() {
        let register = Register { slots: [2, 4], cores: 3, ..mesh_samples::register(1) };
        let mut slots = Slots::new(&register, true);
        let spare = |slots: &Slots| [false, true].map(|is_lent| slots.spare(Lane::Realtime, is_lent, |_| true));
        assert_eq!((spare(&slots), slots.spare(Lane::Batch, false, |_| true)), ([2, 3], 4));
        slots.occupy(SlotId(2), BatchId(1), Lane::Batch, 0);
        slots.occupy(SlotId(3), BatchId(2), Lane::Batch, 0);
        assert_eq!(spare(&slots), [2, 2]);
        assert_eq!(slots.open().len(), 4, "a slot that is open is used, if only by one batch more");
    }

    #[test]
    fn a_lent_slot_changes_places_with_one_of_its_device_that_falls_free() {
        let mut slots = slots([1, 2], &[-1, 0, -1], 1);
        (0..3).for_each(|slot| slots.occupy(SlotId(slot), BatchId(slot.into()), Lane::Realtime, 0));
        slots.release(MonoTime::ZERO, BatchId(0));
        assert_eq!(
            [SlotId(0), SlotId(1), SlotId(2)].map(|slot| slots.lane(slot)),
            [Lane::Batch, Lane::Batch, Lane::Realtime]
        );
        assert_eq!((slots.open(), slots.spare(Lane::Batch, false, |_| true)), (vec![SlotId(0)], 1));
        slots.release(MonoTime::ZERO, BatchId(2));
        assert_eq!((slots.open(), slots.of_lane(Lane::Realtime)), (vec![SlotId(2), SlotId(0)], 1));
    }

    #[test]
    fn the_least_busy_device_is_used_first() {
        let mut slots = slots([0, 4], &[0, 1], 2);
        slots.occupy(SlotId(0), BatchId(1), Lane::Batch, 0);
        assert_eq!(slots.open(), [SlotId(1), SlotId(3), SlotId(2)]);
    }

    #[test]
    fn a_gpu_begins_no_batch_for_which_its_memory_does_not_suffice_beside_those_that_run() {
        const GIB: u64 = 1 << 30;
        let gpus = [10 * GIB, 4 * GIB].map(|memory_bytes| Gpu { name: "G".to_owned(), memory_bytes }).to_vec();
        let device_map = vec![0, 1, -1];
        let register = Register { slots: [0, 5], device_map, device_width: 2, gpus, ..mesh_samples::register(1) };
        let mut slots = Slots::new(&register, true);
        slots.occupy(SlotId(0), BatchId(1), Lane::Batch, 6 * GIB);
        assert!(slots.has_memory(0, 4 * GIB) && !slots.has_memory(0, 4 * GIB + 1));
        assert!(slots.has_memory(0, 0), "who was promised none asks for none");
        assert!(slots.has_memory(1, 4 * GIB) && slots.has_memory(-1, 20 * GIB));
        assert!(slots.has_memory(1, 5 * GIB), "the engine says that it is too much, nobody waits for ever");
        slots.release(MonoTime::ZERO, BatchId(1));
        assert!(slots.has_memory(0, 10 * GIB));
    }

    #[test]
    fn a_device_owes_the_batch_lane_a_tenth_of_what_it_gives_the_other() {
        let mut slots = slots([1, 1], &[0], 1);
        slots.spent(0, Lane::Realtime, 900_000, [true, true]);
        assert!(slots.owes(0, 100_000) && !slots.owes(0, 100_001));
        slots.spent(0, Lane::Batch, 100_000, [true, true]);
        assert!(!slots.owes(0, 1));
        slots.spent(0, Lane::Realtime, 900_000, [true, true]);
        slots.spent(0, Lane::Realtime, 1, [true, false]);
        assert!(!slots.owes(0, 1), "nothing is owed to a lane that wants nothing");
        slots.spent(0, Lane::Realtime, 3_600_000_000, [true, true]);
        assert!(slots.owes(0, 60_000_000));
        slots.spent(0, Lane::Batch, 2_000_000, [true, true]);
        assert!(!slots.owes(0, 1), "after hours it gets two seconds, not minutes");
    }
}
