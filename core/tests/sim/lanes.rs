//! The referee's books about workers' slots: which batch may run where, and which items wait while there is room.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mesh_core::worker::{BatchId, BatchKind};
use proto_msgs::{AttemptId, ClientId, Lane, ModelCost};

use super::{
    batches::{Batch, brief, has, model_of},
    job::Job,
    mesh::{Micros, micros, short_id},
    referee::{Referee, number},
    worker_shell::WorkerShell,
};

/// Most rows of one runner call.
const ROWS_MAX: u32 = 64;

/// Longest wait of an item that there is room for: for company, plus a moment of the machine's own time.
const WAIT_MAX: Duration = Duration::from_millis(105);

/// What the referee knows of a worker's slots.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    /// Attempts whose rows have all arrived but none has run, and when they arrived.
    ready: BTreeMap<(usize, AttemptId), Micros>,
    /// When a lane of a worker last had no room, or until when the worker stands still.
    full: BTreeMap<(usize, Lane), Micros>,
    /// Costs of models, as each worker last reported them.
    costs: BTreeMap<usize, Vec<ModelCost>>,
    of_many: usize,
    /// Batches of a later stage that began while rows of their lane waited for a first one.
    overlaps: usize,
    /// Workers at which a client's rows of a model ended a runner: there they wait for their turn, room or not.
    crashes: BTreeSet<(usize, ClientId, u8)>,
}

impl Rooms {
    pub(super) fn costs_of(&self, worker: usize) -> &[ModelCost] {
        self.costs.get(&worker).map_or(&[], Vec::as_slice)
    }

    pub(super) fn told(&mut self, worker: usize, costs: &[ModelCost]) {
        self.costs.insert(worker, costs.to_vec());
    }

    /// Number of batches so far with rows of several tasks.
    pub(super) fn batches_of_many(&self) -> usize {
        self.of_many
    }

    /// Number of batches so far that show stages side by side.
    pub(super) fn overlaps(&self) -> usize {
        self.overlaps
    }
}

impl Referee {
    /// Rows failed by themselves, and their runner may have ended.
    pub(super) fn crashed(&mut self, worker: usize, batch: &Batch) {
        for part in &batch.parts {
            let key = (worker, self.task(part.id.task).owner, model_of(self.job(part.id.task), part.stage));
            self.rooms.crashes.insert(key);
        }
    }

    /// Notes that model and inputs of an attempt have arrived.
    pub(super) fn is_ready(&mut self, now: Micros, worker: usize, id: AttemptId) {
        self.rooms.ready.insert((worker, id), now);
    }

    pub(super) fn batch_begins(&mut self, now: Micros, worker: usize, shell: &WorkerShell, id: BatchId, batch: &Batch) {
        if let Some((law, detail)) = self.misplaced(shell, batch) {
            let parts = brief(&batch.parts);
            return self.fail(law, format!("W{worker} {id:?} {:?} of {parts}: {detail}", batch.kind));
        }
        self.rooms.of_many += usize::from(batch.parts.len() > 1);
        self.rooms.overlaps += usize::from(self.is_ahead_of_first_stages(worker, batch));
        for part in &batch.parts {
            if let Some(detail) = self.waited_in_vain(now, worker, part.id) {
                self.fail("what waits goes when there is room", detail);
            }
            let life = self.life_of(worker);
            let is_first = self.ran.insert((part.id, worker, life));
            let truth = self.task_mut(part.id.task);
            if is_first {
                truth.runs.push((part.id.attempt, worker));
                truth.began = Some(now);
            }
        }
    }

    /// Whether a batch of a later stage begins although rows of its lane wait for a first stage.
    fn is_ahead_of_first_stages(&self, worker: usize, batch: &Batch) -> bool {
        let Some(part) = batch.parts.first().filter(|part| part.stage > 0) else { return false };
        let lane = |id: AttemptId| self.job(id.task).lane_in_force();
        self.rooms.ready.keys().any(|(at, id)| *at == worker && lane(*id) == lane(part.id))
    }

    /// The law that this batch breaks in this slot now; `None` if it breaks none.
    fn misplaced(&self, shell: &WorkerShell, batch: &Batch) -> Option<(&'static str, String)> {
        let job = |index: usize| batch.parts.get(index).map(|part| (self.job(part.id.task), part));
        let (first, first_part) = job(0)?;
        let [realtime, lent] = shell.place.slots;
        let slot = batch.slot.0;
        if slot >= realtime + lent || shell.batches.values().any(|other| other.slot.0 == slot) {
            return Some((
                "a worker stays within its slots",
                format!("{:?} is taken: {:?}", batch.slot, shell.batches),
            ));
        }
        if first.lane_in_force() == Lane::Batch && self.free_slots(shell, Lane::Batch, batch.device) == 0 {
            return Some(("the batch lane stays in its slots", format!("in slot {slot} with {realtime} for realtime")));
        }
        let map = &shell.place.device_map;
        if batch.device != map[usize::from(slot) % map.len()] {
            return Some(("a slot sits on its device", format!("slot {slot} on {} with {map:?}", batch.device)));
        }
        let beside = shell.batches.values().filter(|other| other.device == batch.device).count();
        if batch.device >= 0 && beside >= usize::from(shell.place.device_width) {
            return Some(("a device takes what it is wide", format!("{beside} batches run on {}", batch.device)));
        }
        let is_like = |(job, part): &(&Job, &mesh_core::worker::Part)| {
            part.stage == first_part.stage
                && model_of(job, part.stage) == model_of(first, first_part.stage)
                && job.demands == first.demands
                && job.lane_in_force() == first.lane_in_force()
        };
        let parts: Vec<_> = (0..batch.parts.len()).filter_map(job).collect();
        if !parts.iter().all(is_like) {
            return Some(("only like runs with like", String::new()));
        }
        let packs = batch.kind != BatchKind::Whole;
        if (parts.len() > 1 && !packs) || (packs && batch.rows() > ROWS_MAX) {
            return Some(("a call has its limits", format!("{} rows", batch.rows())));
        }
        let good = |(job, part): &(&Job, &mesh_core::worker::Part)| {
            let twice = parts.iter().filter(|(_, other)| other.id == part.id).count() > 1;
            let rows = &part.rows;
            let beside = shell.batches.values().flat_map(|batch| &batch.parts).any(|other| {
                (other.id, other.stage) == (part.id, part.stage)
                    && other.rows.start < rows.end
                    && rows.start < other.rows.end
            });
            rows.start < rows.end && rows.end <= job.items && !twice && !beside
        };
        let bad = parts.iter().find(|part| !good(part))?;
        Some(("every row runs once", format!("{} {:?}", short_id(bad.1.id), bad.1.rows)))
    }

    /// Notes that the worker's process was down, or is frozen, until this time.
    pub(super) fn stands_still(&mut self, worker: usize, until: Micros) {
        for lane in Lane::ALL {
            self.rooms.full.insert((worker, lane), until);
        }
    }

    /// Updates which lanes have room, after any change that may matter.
    pub(super) fn worker_acted(&mut self, now: Micros, worker: usize, shell: &WorkerShell) {
        for lane in Lane::ALL {
            if !self.has_room(shell, lane) {
                self.rooms.full.insert((worker, lane), now);
            }
        }
        let loads = shell.batches.values().filter(|batch| batch.only_loads).filter_map(|batch| batch.parts.first());
        let loads: Vec<u8> = loads.map(|part| model_of(self.job(part.id.task), part.stage)).collect();
        let (rooms, tasks) = (&mut self.rooms, &self.tasks);
        // Rows whose model is being loaded for nobody wait for that runner.
        let waits = |id: &AttemptId| loads.contains(&tasks[number(id.task)].job.model);
        let its = rooms.ready.iter_mut().filter(|((at, id), _)| *at == worker && waits(id));
        its.for_each(|(_, since)| *since = now);
        self.rooms.ready.retain(|(at, id), _| {
            *at != worker || shell.sessions.contains_key(id) && !shell.batches.values().any(|batch| has(batch, *id))
        });
    }

    fn waited_in_vain(&mut self, now: Micros, worker: usize, id: AttemptId) -> Option<String> {
        let ready = self.rooms.ready.remove(&(worker, id))?;
        let lane = self.job(id.task).lane_in_force();
        let since = self.rooms.full.get(&(worker, lane)).map_or(ready, |full| ready.max(*full));
        // A first stage also waits for the stages behind it.
        let has_stages = !self.job(id.task).then.is_empty();
        let has_crashed = self.rooms.crashes.contains(&(worker, self.task(id.task).owner, self.job(id.task).model));
        let excused = has_stages || has_crashed || now <= since + micros(WAIT_MAX);
        (!excused).then(|| format!("{} had room at W{worker} for {} ms", short_id(id), (now - since) / 1000))
    }

    /// Whether one more batch of the lane could run at once.
    fn has_room(&self, shell: &WorkerShell, lane: Lane) -> bool {
        shell.place.device_map.iter().any(|device| {
            let beside = shell.batches.values().filter(|batch| batch.device == *device).count();
            let has_place = *device < 0 || beside < usize::from(shell.place.device_width);
            let is_lent = lane == Lane::Realtime && self.free_slots(shell, Lane::Batch, *device) > 0;
            has_place && (is_lent || self.free_slots(shell, lane, *device) > 0)
        })
    }

    /// The lane's slots on this device in which nothing runs. What realtime rows have been lent are batch slots.
    fn free_slots(&self, shell: &WorkerShell, lane: Lane, device: i16) -> usize {
        let (slots, map) = (shell.place.slots, &shell.place.device_map);
        let of_lane = |number: &u16| if *number < slots[0] { Lane::Realtime } else { Lane::Batch };
        let sits_here = |number: &u16| map[usize::from(*number) % map.len()] == device;
        let own = |lane| (0..slots[0] + slots[1]).filter(sits_here).filter(|number| of_lane(number) == lane).count();
        let here = || shell.batches.values().filter(|batch| batch.device == device);
        let lane_of = |batch: &Batch| batch.parts.first().map(|part| self.job(part.id.task).lane_in_force());
        let runs = |lane| here().filter(|batch| lane_of(batch) == Some(lane)).count();
        let free = own(lane).saturating_sub(runs(lane));
        match lane {
            Lane::Realtime => free,
            Lane::Batch => free.saturating_sub(runs(Lane::Realtime).saturating_sub(own(Lane::Realtime))),
        }
    }
}
