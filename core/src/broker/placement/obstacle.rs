//! The filters: which reasons speak against a worker for a task; and the drawbacks of those that pass.
//!
//! Owns them. Never rates what passes them.

use proto_msgs::{Demands, LabelRule, Lane};

use super::decision::Obstacle;
use crate::{
    MonoTime,
    broker::{slo::Stance, task::Task, workers::worker::Worker},
};

type Ever = fn(&Task, &Worker) -> Option<Obstacle>;
type Now = fn(&Task, &Worker, MonoTime) -> Option<Obstacle>;

/// The permanent filters: workers of one [`Kind`](crate::broker::workers::kind::Kind) are alike to them.
const EVER: &[Ever] = &[format, arch, cores, memory, run_memory, gpu_memory, way, lane_slots, label];

/// The temporary filters.
const NOW: &[Now] = &[open, keeps_no_more, suspicion, pausing, quota];

/// Those that concern only tasks with demands of their own.
const NOW_WITH_DEMANDS: &[Now] = &[cores_promised, memory_promised, gpu_memory_taken, claimed];

/// The permanent obstacles of a worker.
pub(crate) fn ever<'a>(task: &'a Task, worker: &'a Worker) -> impl Iterator<Item = Obstacle> + 'a {
    EVER.iter().filter_map(move |filter| filter(task, worker))
}

/// The temporary obstacles of a worker, without a lack of room.
pub(crate) fn for_now<'a>(task: &'a Task, worker: &'a Worker, at: MonoTime) -> impl Iterator<Item = Obstacle> + 'a {
    let with_demands = if has_demands(task) { NOW_WITH_DEMANDS } else { &[] };
    NOW.iter().chain(with_demands).filter_map(move |filter| filter(task, worker, at))
}

/// All obstacles of a worker at present, without a lack of room.
pub(super) fn now<'a>(task: &'a Task, worker: &'a Worker, at: MonoTime) -> impl Iterator<Item = Obstacle> + 'a {
    ever(task, worker).chain(for_now(task, worker, at))
}

/// Why another worker may be better for the task, though it fits here.
pub(super) fn drawback(task: &Task, worker: &Worker, stance: Stance) -> Option<Obstacle> {
    if let Stance::Shunned(permille) = stance {
        return Some(Obstacle::Late(permille));
    }
    let lacks = |rule: &LabelRule| !rule.required && !has_label(worker, &rule.key, &rule.value);
    let at = task.spec.labels.iter().position(lacks)?;
    Some(Obstacle::Unliked(u8::try_from(at).unwrap_or(u8::MAX)))
}

fn format(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let mut models = std::iter::once(&task.spec.model).chain(task.spec.then.iter().map(|stage| &stage.model));
    let unknown = models.find(|model| !worker.register.formats.contains(&model.format))?;
    Some(Obstacle::Format(unknown.format))
}

fn arch(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let is_other = task.spec.demands.arch.is_some_and(|arch| arch != worker.register.arch);
    is_other.then_some(Obstacle::Arch(worker.register.arch))
}

fn cores(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let cores = worker.register.cores;
    (u64::from(task.spec.demands.cpu_millis) > u64::from(cores) * 1000).then_some(Obstacle::Cores(cores))
}

fn memory(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let bytes = worker.register.memory_bytes;
    (task.spec.demands.memory_bytes > bytes).then_some(Obstacle::Memory { bytes })
}

/// A task that asks for no memory has outgrown what such a task gets here.
fn run_memory(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let (bytes, outgrown_bytes) = (worker.register.run_memory_bytes, task.doubts.outgrown_bytes);
    let is_too_small = outgrown_bytes > 0 && task.spec.demands.memory_bytes == 0 && bytes <= outgrown_bytes;
    is_too_small.then_some(Obstacle::RunMemory { bytes })
}

fn gpu_memory(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let (wanted_bytes, bytes) = (task.spec.demands.gpu_memory_bytes, worker.gpu_memory_bytes(task.lane()));
    let has_enough = |lane: &Lane| worker.gpu_memory_bytes(*lane) >= wanted_bytes;
    (wanted_bytes > bytes).then(|| Obstacle::GpuMemory { bytes, other: Lane::ALL.into_iter().find(has_enough) })
}

fn way(task: &Task, worker: &Worker) -> Option<Obstacle> {
    task.way_to(worker).is_none().then_some(Obstacle::NoWay)
}

fn lane_slots(task: &Task, worker: &Worker) -> Option<Obstacle> {
    (worker.usable_slots(task.lane()) == 0).then_some(Obstacle::NoSlots(task.lane()))
}

fn label(task: &Task, worker: &Worker) -> Option<Obstacle> {
    let mut required = task.spec.labels.iter().enumerate().filter(|(_, rule)| rule.required);
    let (broken, _) = required.find(|(_, rule)| !has_label(worker, &rule.key, &rule.value))?;
    Some(Obstacle::Label(u8::try_from(broken).unwrap_or(u8::MAX)))
}

pub(super) fn has_label(worker: &Worker, key: &str, value: &str) -> bool {
    worker.register.labels.iter().any(|(has, is)| has == key && is == value)
}

fn open(_: &Task, worker: &Worker, _: MonoTime) -> Option<Obstacle> {
    match &worker.heartbeat {
        None => Some(Obstacle::Unheard),
        Some(heartbeat) => heartbeat.draining.then_some(Obstacle::Draining),
    }
}

fn keeps_no_more(task: &Task, worker: &Worker, _: MonoTime) -> Option<Obstacle> {
    let is_full = worker.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.keeps_no_more);
    (task.spec.detached && is_full).then_some(Obstacle::KeepsNoMore)
}

fn suspicion(task: &Task, _: &Worker, _: MonoTime) -> Option<Obstacle> {
    task.doubts.held_back.is_some().then_some(Obstacle::Suspicion)
}

fn pausing(task: &Task, worker: &Worker, at: MonoTime) -> Option<Obstacle> {
    let is_silent = task.doubts.is_silent(worker.id(), worker.seen);
    let obstacle = if is_silent { Obstacle::Silent } else { Obstacle::Pausing };
    task.doubts.is_left_alone(worker.id(), worker.seen, at).then_some(obstacle)
}

/// Not a permanent filter: what one worker has said of its quota does not speak for its kind.
fn quota(task: &Task, worker: &Worker, _: MonoTime) -> Option<Obstacle> {
    task.doubts.too_small.contains(&worker.id()).then_some(Obstacle::Quota)
}

fn cores_promised(task: &Task, worker: &Worker, _: MonoTime) -> Option<Obstacle> {
    let wanted = u64::from(task.spec.demands.cpu_millis);
    let promised = worker.occupancy.reserved().cpu_millis;
    let is_over = wanted > 0 && promised > 0 && promised + wanted > u64::from(worker.register.cores) * 1000;
    is_over.then_some(Obstacle::CoresPromised)
}

fn memory_promised(task: &Task, worker: &Worker, _: MonoTime) -> Option<Obstacle> {
    let wanted = u128::from(task.spec.demands.memory_bytes);
    let promised = worker.occupancy.reserved().memory_bytes;
    let is_over = wanted > 0 && promised > 0 && promised + wanted > u128::from(worker.register.memory_bytes);
    is_over.then_some(Obstacle::MemoryPromised)
}

fn gpu_memory_taken(task: &Task, worker: &Worker, _: MonoTime) -> Option<Obstacle> {
    let wanted = task.spec.demands.gpu_memory_bytes;
    let too_large = wanted > worker.gpu_memory_bytes(task.lane());
    if wanted == 0 || too_large {
        return None;
    }
    // A model that is loaded and idle already has its memory, unless that was promised to others meanwhile.
    let has_room = match worker.is_loaded_and_idle(task.spec.model.digest) {
        true => worker.unpromised_gpu_bytes(task.lane(), wanted) >= wanted,
        false => worker.roomiest_gpu(task.lane(), wanted).is_some_and(|(_, free_bytes)| free_bytes >= wanted),
    };
    (!has_room).then_some(Obstacle::GpuMemoryTaken)
}

fn claimed(task: &Task, worker: &Worker, at: MonoTime) -> Option<Obstacle> {
    task.rank.is_some_and(|rank| worker.keeps_from(task.id(), &rank, at)).then_some(Obstacle::Claimed)
}

/// Whether the task is promised cores or memory of its own.
fn has_demands(task: &Task) -> bool {
    let Demands { cpu_millis, memory_bytes, gpu_memory_bytes, .. } = task.spec.demands;
    cpu_millis > 0 || memory_bytes > 0 || gpu_memory_bytes > 0
}

/// Whether a task may be sent before a slot is free: not if it was promised cores or memory of its own, or lives on at
/// the worker without its client.
pub(super) fn may_go_ahead(task: &Task) -> bool {
    !task.spec.detached && !has_demands(task)
}

impl Obstacle {
    /// Whether the obstacle goes away once other tasks free what they were promised.
    pub(crate) fn is_promise(self, worker: &Worker) -> bool {
        match self {
            Self::CoresPromised | Self::MemoryPromised => true,
            Self::GpuMemoryTaken => worker.occupancy.reserved().gpu_memory_bytes > 0,
            _ => false,
        }
    }
}
