//! What a worker's registration says of all its life: which tasks it can ever run, the GPUs of each lane, and what its
//! slots have to share.
//!
//! Owns these readings of a registration. Never looks at a heartbeat or a task.

use std::{collections::BTreeSet, ops::Range};

use proto_msgs::{Arch, Gpu, Lane, ModelFormat, Register, limits::SLOTS_MAX};

/// The unchanging properties of a worker that decide which tasks it can ever run. Workers of one kind are alike in
/// these.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Kind {
    formats: Vec<ModelFormat>,
    arch: Arch,
    cores: u32,
    /// The machine's, and that of a run whose task asks for none.
    memory_bytes: [u64; 2],
    /// By lane, as [`lane_gpus`] says.
    gpu_memory_bytes: [u64; 2],
    has_door: bool,
    has_slots: [bool; 2],
    labels: Vec<(String, String)>,
}

impl Kind {
    pub(super) fn of(register: &Register) -> Self {
        let (mut formats, mut labels) = (register.formats.clone(), register.labels.clone());
        formats.sort_unstable();
        formats.dedup();
        labels.sort_unstable();
        Self {
            formats,
            arch: register.arch,
            cores: register.cores,
            memory_bytes: [register.memory_bytes, register.run_memory_bytes],
            gpu_memory_bytes: Lane::ALL.map(|lane| largest_bytes(&lane_gpus(register, lane))),
            has_door: !register.endpoints.is_empty(),
            has_slots: register.slots.map(|slots| slots > 0),
            labels,
        }
    }
}

/// A GPU of a worker, as tasks of one lane may get it.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneGpu {
    pub(super) index: u8,
    pub(super) bytes: u64,
    /// Whether a slot of the lane itself sits on it, or none of its slots sits on a GPU.
    pub(super) is_own: bool,
}

/// The GPUs that tasks of the lane may get: those on which slots open to it sit; if none does, those of the whole device
/// map; if it names none, all.
pub(super) fn lane_gpus(register: &Register, lane: Lane) -> Vec<LaneGpu> {
    let [realtime, batch] = register.slots.map(usize::from);
    let map = &register.device_map;
    let of = |slots: Range<usize>| -> Vec<i16> {
        slots.filter_map(|slot| map.get(slot.checked_rem(map.len())?).copied()).collect()
    };
    let (own, open) = match lane {
        Lane::Realtime => (of(0..realtime), of(0..realtime + batch)),
        Lane::Batch => (of(realtime..realtime + batch), of(realtime..realtime + batch)),
    };
    // Of these lists, the first that names a GPU decides.
    let is_in = |lists: &[&[i16]], gpu: i16| {
        let named = lists.iter().find(|devices| devices.iter().any(|device| *device >= 0));
        named.is_none_or(|devices| devices.contains(&gpu))
    };
    let gpus = (0_u8..).zip(&register.gpus).filter(|(index, _)| is_in(&[&open, map], i16::from(*index)));
    let lane_gpu =
        |(index, gpu): (u8, &Gpu)| LaneGpu { index, bytes: gpu.memory_bytes, is_own: is_in(&[&own], i16::from(index)) };
    gpus.map(lane_gpu).collect()
}

pub(super) fn largest_bytes(gpus: &[LaneGpu]) -> u64 {
    gpus.iter().map(|gpu| gpu.bytes).max().unwrap_or(0)
}

/// What a worker's slots have to share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    /// The number of tasks that the slots can run without taking turns.
    pub(crate) count: u32,
    /// All slots sit on GPUs: a task that finds no place waits for one. On a processor it would run beside the others.
    pub(crate) are_gpus: bool,
}

impl Places {
    pub(super) fn of(register: &Register) -> Self {
        let slots = register.slots.iter().map(|slots| usize::from(*slots)).sum::<usize>().min(SLOTS_MAX);
        let devices: BTreeSet<i16> = register.device_map.iter().cycle().take(slots).copied().collect();
        let gpus = devices.iter().filter(|device| **device >= 0).count() as u32;
        let are_gpus = gpus > 0 && devices.len() as u32 == gpus;
        let cores = if are_gpus { 0 } else { register.cores };
        let count = (gpus * u32::from(register.device_width.max(1))).saturating_add(cores).max(1);
        Self { count, are_gpus }
    }
}
