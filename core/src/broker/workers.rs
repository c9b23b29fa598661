//! The worker half of the Metric Table: who is alive, what occupies their slots, who has which model.
//!
//! Owns slot accounting and the two indexes that keep placement fast. Never decides who gets a task.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proto_msgs::{AttemptId, AttemptState, Demands, Digest, Epoch, Heartbeat, PeerId, Register, WorkerId, WorkerView};

use super::api::WorkerRecord;
use crate::MonoTime;

/// Added to the missed heartbeats before a worker counts as dead: a heartbeat's own way and the sender's scheduling.
const LIVENESS_GRACE: Duration = Duration::from_millis(250);

/// One occupied slot.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// A heartbeat has named the attempt. From then on heartbeats alone say when the slot is free.
    named: bool,
    demands: Demands,
}

/// A live worker.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) register: Register,
    pub(super) peer: PeerId,
    pub(super) heartbeat: Option<Heartbeat>,
    pub(super) seen: MonoTime,
    slots: BTreeMap<AttemptId, Slot>,
    cpu_reserved_millis: u64,
    memory_reserved_bytes: u64,
}

impl Worker {
    pub(super) fn id(&self) -> WorkerId {
        self.register.worker
    }

    pub(super) fn is_draining(&self) -> bool {
        self.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.draining)
    }

    pub(super) fn slots_used(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    /// Slots of both lanes.
    pub(super) fn slots(&self) -> u16 {
        self.register.slots.iter().fold(0, |sum: u16, slots| sum.saturating_add(*slots))
    }

    /// Slots in use of all slots, thousandths; more than 1000 is possible after a broker's restart.
    pub(super) fn busy_permille(&self) -> u16 {
        let total = u32::from(self.slots()).max(1);
        u16::try_from(u32::from(self.slots_used()) * 1000 / total).unwrap_or(u16::MAX)
    }

    /// Whether an attempt occupies a slot here.
    pub(super) fn has(&self, id: AttemptId) -> bool {
        self.slots.contains_key(&id)
    }

    /// Attempts that occupy its slots.
    pub(super) fn attempts(&self) -> impl Iterator<Item = AttemptId> {
        self.slots.keys().copied()
    }

    pub(super) fn holds(&self, model: Digest) -> bool {
        self.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.held.contains(&model))
    }

    pub(super) fn has_free_slot(&self) -> bool {
        self.slots_used() < self.slots() && self.heartbeat.is_some() && !self.is_draining()
    }

    /// What of the demands is taken already: thousandths of a core, bytes.
    pub(super) fn reserved(&self) -> (u64, u64) {
        (self.cpu_reserved_millis, self.memory_reserved_bytes)
    }

    /// When silence becomes death.
    pub(super) fn dead_at(&self, beats: u32) -> MonoTime {
        self.seen + Duration::from_millis(u64::from(self.register.heartbeat_ms)) * beats + LIVENESS_GRACE
    }

    pub(super) fn record(&self, now_unix_ms: u64, beats: u32) -> WorkerRecord {
        WorkerRecord {
            register: self.register.clone(),
            heartbeat: self.heartbeat.clone(),
            slots_used: [self.slots_used(), 0],
            seen_unix_ms: now_unix_ms,
            expires_after: self.dead_at(beats).since(self.seen),
        }
    }

    pub(super) fn view(&self, now: MonoTime) -> WorkerView {
        let register = &self.register;
        let heartbeat = self.heartbeat.as_ref();
        WorkerView {
            worker: register.worker,
            epoch: register.epoch,
            name: register.name.clone(),
            version: register.version.clone(),
            os: register.os.clone(),
            arch: register.arch,
            cores: register.cores,
            memory_bytes: register.memory_bytes,
            engine: register.engine,
            formats: register.formats.clone(),
            endpoints: register.endpoints.clone(),
            labels: register.labels.clone(),
            gpus: register.gpus.clone(),
            slots: register.slots,
            slots_used: [self.slots_used(), 0],
            device_map: register.device_map.clone(),
            lanes: heartbeat.map(|heartbeat| heartbeat.lanes).unwrap_or_default(),
            violation_permille: None,
            draining: self.is_draining(),
            load: heartbeat.map(|heartbeat| heartbeat.load.clone()).unwrap_or_default(),
            held: heartbeat.map(|heartbeat| heartbeat.held.clone()).unwrap_or_default(),
            link_bytes_per_s: heartbeat.map_or(0, |heartbeat| heartbeat.link_bytes_per_s),
            silent_ms: u64::try_from(now.since(self.seen).as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// All live workers.
#[derive(Debug, Default)]
pub(super) struct Workers {
    table: BTreeMap<WorkerId, Worker>,
    /// Workers with a free slot, least busy first.
    free: BTreeSet<(u16, WorkerId)>,
    /// Who has a model.
    holders: BTreeMap<Digest, BTreeSet<WorkerId>>,
    totals: Totals,
}

impl Workers {
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.table.get(&id)
    }

    /// Whether this life of the worker is there.
    pub(super) fn has_life(&self, id: WorkerId, epoch: Epoch) -> bool {
        self.get(id).is_some_and(|worker| worker.register.epoch == epoch)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Worker> {
        self.table.values()
    }

    /// In order of id, those after the given one.
    pub(super) fn after(&self, id: Option<WorkerId>) -> impl Iterator<Item = &Worker> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.table.range((id.map_or(Unbounded, Excluded), Unbounded)).map(|(_, worker)| worker)
    }

    /// Slots of all workers, and how many are in use.
    pub(super) fn slot_totals(&self) -> (u32, u32) {
        (self.totals.slots, self.totals.used)
    }

    /// Workers with a free slot, least busy first.
    pub(super) fn free(&self) -> impl Iterator<Item = &Worker> + Clone {
        self.free.iter().filter_map(|(_, id)| self.table.get(id))
    }

    /// Workers that have the model, in order of id.
    pub(super) fn holders(&self, model: Digest) -> impl Iterator<Item = &Worker> {
        self.holders.get(&model).into_iter().flatten().filter_map(|id| self.table.get(id))
    }

    /// A worker introduces itself. It gets nothing to do before its first heartbeat has said what it has already.
    pub(super) fn register(&mut self, now: MonoTime, peer: PeerId, register: Register) {
        let id = register.worker;
        let old = self.remove(id).filter(|old| old.register.epoch == register.epoch);
        let (heartbeat, slots) = old.map_or_else(Default::default, |old| (old.heartbeat, old.slots));
        let mut worker = Worker {
            register,
            peer,
            heartbeat: None,
            seen: now,
            slots,
            cpu_reserved_millis: 0,
            memory_reserved_bytes: 0,
        };
        recount(&mut worker);
        self.totals.add(&worker);
        if worker.has_free_slot() {
            self.free.insert((worker.busy_permille(), id));
        }
        self.table.insert(id, worker);
        if let Some(heartbeat) = heartbeat {
            self.set_heartbeat(id, heartbeat);
        }
    }

    pub(super) fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        let worker = self.table.remove(&id)?;
        self.totals.remove(&worker);
        self.free.remove(&(worker.busy_permille(), id));
        for digest in worker.heartbeat.iter().flat_map(|heartbeat| &heartbeat.held) {
            forget_holder(&mut self.holders, *digest, id);
        }
        Some(worker)
    }

    /// Any message of a worker is a sign of life.
    pub(super) fn seen(&mut self, id: WorkerId, now: MonoTime, peer: PeerId) {
        if let Some(worker) = self.table.get_mut(&id) {
            worker.seen = now;
            worker.peer = peer;
        }
    }

    /// A slot is promised.
    pub(super) fn occupy(&mut self, id: WorkerId, attempt: AttemptId, demands: Demands) {
        self.change(id, |worker| {
            worker.slots.entry(attempt).or_insert(Slot { named: false, demands });
        });
    }

    /// A promised slot is free again, unless a heartbeat has named the attempt: then heartbeats say when it is.
    pub(super) fn release_unnamed(&mut self, id: WorkerId, attempt: AttemptId) {
        self.change(id, |worker| {
            if worker.slots.get(&attempt).is_some_and(|slot| !slot.named) {
                worker.slots.remove(&attempt);
            }
        });
    }

    /// A slot is free again.
    pub(super) fn release(&mut self, id: WorkerId, attempt: AttemptId) {
        self.change(id, |worker| {
            worker.slots.remove(&attempt);
        });
    }

    /// A heartbeat arrived. Gives the attempts that earlier ones named and this one does not.
    pub(super) fn heartbeat(&mut self, id: WorkerId, heartbeat: Heartbeat) -> Vec<AttemptId> {
        let mut vanished = Vec::new();
        self.change(id, |worker| {
            let active: BTreeSet<AttemptId> = heartbeat
                .attempts
                .iter()
                .filter(|report| !matches!(report.state, AttemptState::Finished(_)))
                .map(|report| report.id)
                .collect();
            worker.slots.retain(|attempt, slot| {
                let stays = !slot.named || active.contains(attempt);
                if !stays {
                    vanished.push(*attempt);
                }
                stays
            });
            for attempt in active {
                worker.slots.entry(attempt).or_insert(Slot { named: true, demands: Demands::default() }).named = true;
            }
        });
        self.set_heartbeat(id, heartbeat);
        vanished
    }

    /// Newest heartbeat number seen from this life of the worker.
    pub(super) fn last_seq(&self, id: WorkerId, epoch: Epoch) -> Option<u64> {
        let worker = self.table.get(&id).filter(|worker| worker.register.epoch == epoch)?;
        worker.heartbeat.as_ref().map(|heartbeat| heartbeat.seq)
    }

    fn set_heartbeat(&mut self, id: WorkerId, heartbeat: Heartbeat) {
        let Some(worker) = self.table.get_mut(&id) else { return };
        let old_held = worker.heartbeat.as_ref().map_or(&[][..], |old| &old.held);
        if old_held != heartbeat.held {
            for digest in old_held {
                forget_holder(&mut self.holders, *digest, id);
            }
            for digest in &heartbeat.held {
                self.holders.entry(*digest).or_default().insert(id);
            }
        }
        self.change(id, |worker| worker.heartbeat = Some(heartbeat));
    }

    /// Changes a worker and keeps the indexes true.
    fn change(&mut self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        let Some(worker) = self.table.get_mut(&id) else { return };
        self.totals.remove(worker);
        let was_free = worker.has_free_slot().then(|| worker.busy_permille());
        change(worker);
        recount(worker);
        self.totals.add(worker);
        let is_free = worker.has_free_slot().then(|| worker.busy_permille());
        if was_free != is_free {
            was_free.map(|busy| self.free.remove(&(busy, id)));
            is_free.map(|busy| self.free.insert((busy, id)));
        }
    }
}

/// Slots over all workers.
#[derive(Debug, Default)]
struct Totals {
    slots: u32,
    used: u32,
}

impl Totals {
    fn add(&mut self, worker: &Worker) {
        self.slots += u32::from(worker.slots());
        self.used += u32::from(worker.slots_used());
    }

    fn remove(&mut self, worker: &Worker) {
        self.slots -= u32::from(worker.slots());
        self.used -= u32::from(worker.slots_used());
    }
}

fn recount(worker: &mut Worker) {
    worker.cpu_reserved_millis = worker.slots.values().map(|slot| u64::from(slot.demands.cpu_millis)).sum();
    worker.memory_reserved_bytes =
        worker.slots.values().fold(0, |sum: u64, slot| sum.saturating_add(slot.demands.memory_bytes));
}

fn forget_holder(holders: &mut BTreeMap<Digest, BTreeSet<WorkerId>>, digest: Digest, id: WorkerId) {
    if let Some(ids) = holders.get_mut(&digest) {
        ids.remove(&id);
        if ids.is_empty() {
            holders.remove(&digest);
        }
    }
}
