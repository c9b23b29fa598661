//! One live worker: its registration, its last heartbeat, and the attempts that occupy its slots.
//!
//! Owns the questions that placement asks of a single row. Never decides who gets a task.

use std::time::Duration;

use proto_msgs::{
    AttemptId, Demands, Digest, Heartbeat, Lane, ModelCost, Packing, PeerId, Promised, Register, TaskId, WorkerId,
    WorkerView,
    limits::{COSTS_MAX, GPUS_MAX, HELD_MAX},
};

use super::{
    claim::Claim,
    finishing::Finishing,
    handover::Handover,
    kind::{LaneGpu, Places, lane_gpus, largest_bytes},
    occupancy::{Occupancy, Reserved},
    warmth::Warmth,
};
use crate::{
    Census, MonoTime, Rule, Rules,
    broker::{
        api::WorkerRecord,
        placement::given::Given,
        queue::{Cursor, line::Order, rank::Rank},
    },
};

/// Added to the missed heartbeats before a worker counts as dead: a heartbeat's travel time and its sender's
/// scheduling.
const LIVENESS_GRACE: Duration = Duration::from_millis(250);

/// Batch slots that realtime may get in a row, at a worker without realtime slots, while batch tasks wait: nine of ten.
/// The batch lane keeps moving.
pub(crate) const LENT_IN_A_ROW_MAX: u8 = 9;

/// The slots that a task may take at a worker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Slots {
    /// The slots of the task's own lane.
    Own,
    /// Also the slots that the other lane lends.
    Usable,
}

/// A worker's index in the table. Cheaper to follow than its id.
pub(crate) type Seat = u32;

/// A worker's state of one model.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    held: bool,
    warm: bool,
    /// Index in the heartbeat's list of costs.
    cost: Option<u16>,
    given: Given,
    warmth: Warmth,
}

/// A model's state at one worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ModelHere<'a> {
    pub(crate) held: bool,
    pub(crate) warm: bool,
    pub(crate) cost: Option<&'a ModelCost>,
    /// When the worker was last given a task of the model.
    pub(crate) given: Given,
    warmth: Warmth,
}

impl ModelHere<'_> {
    /// Whether a runner with the model loaded may serve a task with these demands.
    pub(crate) fn is_warm_for(&self, demands: &Demands) -> bool {
        self.warm && self.warmth.suits(demands)
    }

    /// Whether items of the model are run together, and the best batch size.
    pub(crate) fn packing(&self) -> (Packing, u16) {
        self.cost.map_or((Packing::Unknown, 1), |cost| (cost.packing, cost.best_batch))
    }
}

/// A live worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) register: Register,
    pub(crate) peer: PeerId,
    pub(crate) heartbeat: Option<Heartbeat>,
    pub(crate) seen: MonoTime,
    pub(crate) seat: Seat,
    /// Number of tasks that its slots can run without taking turns.
    pub(crate) places: Places,
    /// Number of the worker's [`Kind`](super::kind::Kind).
    pub(crate) kind: u32,
    pub(crate) occupancy: Occupancy,
    /// Slots that went to realtime in a row while batch tasks waited.
    pub(crate) lent_in_a_row: u8,
    /// For each lane: the last waiting task that this worker was compared with; `None` after the queue's end.
    pub(crate) fill_on: [Option<Cursor>; 2],
    /// For each lane: the first waiting task that needs a free slot here. No task behind it is sent ahead, or it would
    /// never get one.
    pub(crate) awaited: [Option<Order>; 2],
    /// For each lane: the first waiting task that needs cores or memory that others have here. No task behind it gets
    /// any.
    pub(crate) claims: [Option<Claim>; 2],
    /// The load that the worker finishes for nobody.
    pub(crate) finishing: Finishing,
    /// The heartbeat's models in order of digest, for a binary search per candidate of each task.
    models: Vec<(Digest, Known)>,
    /// Whether items of some model are run together, or may be.
    pub(crate) may_pack: bool,
    /// As many models as it has slots are loaded, and all are in use: another load may push one of them out.
    pub(crate) is_crowded: bool,
    /// The GPUs that tasks of each lane may get.
    gpus: [Vec<LaneGpu>; 2],
    /// Time that a task takes here besides its predicted parts.
    pub(crate) handover: Handover,
    pub(crate) rules: Rules,
}

impl Worker {
    pub(super) fn new(register: Register, peer: PeerId, now: MonoTime, seat: Seat, occupancy: Occupancy) -> Self {
        Self {
            gpus: Lane::ALL.map(|lane| lane_gpus(&register, lane)),
            places: Places::of(&register),
            register,
            peer,
            heartbeat: None,
            seen: now,
            seat,
            kind: 0,
            occupancy,
            lent_in_a_row: 0,
            fill_on: [None; 2],
            awaited: [None; 2],
            claims: [None; 2],
            finishing: Finishing::default(),
            models: Vec::new(),
            may_pack: false,
            is_crowded: false,
            handover: Handover::default(),
            rules: Rules::default(),
        }
    }

    pub(crate) fn id(&self) -> WorkerId {
        self.register.worker
    }

    fn is_draining(&self) -> bool {
        self.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.draining)
    }

    /// Whether the worker may get tasks: it is not draining, and its first heartbeat has named the attempts it already
    /// has.
    pub(crate) fn is_open(&self) -> bool {
        self.heartbeat.as_ref().is_some_and(|heartbeat| !heartbeat.draining)
    }

    /// Number of slots of both lanes.
    pub(crate) fn slots(&self) -> u16 {
        self.register.slots.iter().fold(0, |sum: u16, slots| sum.saturating_add(*slots))
    }

    /// Slots that a lane can use, lent ones included.
    pub(crate) fn usable_slots(&self, lane: Lane) -> u16 {
        match lane {
            Lane::Realtime => self.slots(),
            Lane::Batch => self.register.slots[Lane::Batch.index()],
        }
    }

    /// Slots that each lane can count on: its own, or the shared ones if it has none.
    pub(crate) fn counted_slots(&self) -> [u16; 2] {
        Lane::ALL.map(|lane| {
            let own = self.register.slots[lane.index()];
            if own > 0 { own } else { self.usable_slots(lane).max(1) }
        })
    }

    /// Attempts per slot, thousandths; over 1000 if tasks are sent ahead, or after a restart of the broker.
    pub(crate) fn busy_permille(&self) -> u16 {
        let total = u32::from(self.slots()).max(1);
        u16::try_from(self.occupancy.len() as u32 * 1000 / total).unwrap_or(u16::MAX)
    }

    /// Whether the worker has the attempt, or was granted it.
    pub(crate) fn has(&self, id: AttemptId) -> bool {
        self.occupancy.has(id)
    }

    pub(crate) fn free(&self, lane: Lane) -> u16 {
        self.free_among(lane, self.register.slots)
    }

    /// Free slots without the one in which a load is finished.
    pub(crate) fn free_at_once(&self, lane: Lane, now: MonoTime) -> u16 {
        self.free_among(lane, self.finishing.leaves(now, self.register.slots))
    }

    fn free_among(&self, lane: Lane, slots: [u16; 2]) -> u16 {
        let lane = if self.rules.holds(Rule::LendOnlyToRealtime) { lane } else { Lane::Realtime };
        if self.is_open() { self.occupancy.free(lane, slots) } else { 0 }
    }

    /// Free slots for a task of the lane, among those that it may take.
    pub(crate) fn free_of(&self, lane: Lane, slots: Slots) -> u16 {
        match slots {
            Slots::Own => self.own_free(lane),
            Slots::Usable => self.free(lane),
        }
    }

    fn own_free(&self, lane: Lane) -> u16 {
        if !self.rules.holds(Rule::LendOnlyToRealtime) {
            return self.free(lane);
        }
        if self.is_open() { self.occupancy.own_free(lane, self.register.slots) } else { 0 }
    }

    /// Whether the other lane waits for a slot that tasks of this lane would take from it if they were sent ahead.
    /// Batch owns the slots of its lane; a shared slot belongs to the lane whose turn it is.
    pub(crate) fn owes_slot(&self, lane: Lane) -> bool {
        let is_shared = self.register.slots[Lane::Realtime.index()] == 0;
        let is_batch_turn = self.lent_in_a_row >= LENT_IN_A_ROW_MAX;
        match lane {
            Lane::Realtime => {
                let has_own = self.occupancy.tasks()[Lane::Batch.index()] < self.usable_slots(Lane::Batch);
                self.awaited[Lane::Batch.index()].is_some() && has_own && (!is_shared || is_batch_turn)
            }
            Lane::Batch => self.awaited[Lane::Realtime.index()].is_some() && is_shared && !is_batch_turn,
        }
    }

    /// Whether the worker keeps cores or memory for this task.
    pub(crate) fn keeps_for(&self, task: TaskId) -> bool {
        self.claims.iter().flatten().any(|claim| claim.task == task)
    }

    /// Whether the worker keeps cores and memory from this task, for another task's claim before it.
    pub(crate) fn keeps_from(&self, task: TaskId, rank: &Rank, now: MonoTime) -> bool {
        let is_before = |lane, claim: Claim| claim.task != task && claim.holds(now) && claim.is_before(lane, rank, now);
        Lane::ALL.into_iter().zip(self.claims).any(|(lane, claim)| claim.is_some_and(|claim| is_before(lane, claim)))
    }

    /// Whether the worker has run some model often enough to know its cost.
    pub(crate) fn has_measured(&self) -> bool {
        self.heartbeat.as_ref().is_some_and(|heartbeat| !heartbeat.costs.is_empty())
    }

    /// The worker's state of a model.
    pub(crate) fn model(&self, digest: Digest) -> ModelHere<'_> {
        let Ok(at) = self.models.binary_search_by(|(known, _)| known.cmp(&digest)) else {
            return ModelHere::default();
        };
        let Known { held, warm, cost, given, warmth } = self.models[at].1;
        let costs = self.heartbeat.as_ref().map_or(&[][..], |heartbeat| &heartbeat.costs);
        ModelHere { held, warm, cost: cost.and_then(|at| costs.get(usize::from(at))), given, warmth }
    }

    /// Notes that a task of the model ended well with these demands.
    pub(super) fn ran(&mut self, model: Digest, demands: &Demands) {
        if let Ok(at) = self.models.binary_search_by(|(known, _)| known.cmp(&model)) {
            self.models[at].1.warmth.ran(demands);
        }
    }

    /// Notes that the worker is given a task of the model.
    pub(super) fn give(&mut self, now: MonoTime, model: Digest, is_trial: bool) {
        if let Ok(at) = self.models.binary_search_by(|(known, _)| known.cmp(&model)) {
            self.models[at].1.given.note(now, is_trial);
        }
    }

    pub(crate) fn holds(&self, model: Digest) -> bool {
        self.model(model).held
    }

    /// The models that the worker reports, in order of digest, after the given one.
    pub(crate) fn models(&self, after: Option<Digest>) -> impl Iterator<Item = ModelHere<'_>> {
        let rows = self.models.iter().filter(move |(digest, _)| Some(*digest) > after);
        rows.map(|(digest, _)| self.model(*digest))
    }

    /// The GPU with the most memory that is neither promised nor used, and that memory in bytes. A GPU that the lane
    /// only borrows comes last, unless the others lack the wanted memory.
    pub(crate) fn roomiest_gpu(&self, lane: Lane, wanted_bytes: u64) -> Option<(u8, u64)> {
        let free = self.gpus[lane.index()].iter().map(|gpu| (gpu, self.gpu_free_bytes(gpu.index, gpu.bytes)));
        let best = free.max_by_key(|(gpu, free_bytes)| {
            let has_room = gpu.is_own && *free_bytes >= wanted_bytes;
            (has_room, gpu.bytes >= wanted_bytes, *free_bytes, std::cmp::Reverse(gpu.index))
        });
        best.map(|(gpu, free_bytes)| (gpu.index, free_bytes))
    }

    /// Memory of the GPU that a task would be promised, without what others were promised there, whoever uses it.
    pub(crate) fn unpromised_gpu_bytes(&self, lane: Lane, wanted_bytes: u64) -> u64 {
        let index = self.roomiest_gpu(lane, wanted_bytes).map(|(index, _)| index);
        let gpu = self.gpus[lane.index()].iter().find(|gpu| Some(gpu.index) == index);
        let unpromised =
            gpu.map(|gpu| u128::from(gpu.bytes).saturating_sub(self.occupancy.gpu_memory(gpu.index).all_bytes));
        unpromised.map_or(0, |bytes| u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    fn gpu_free_bytes(&self, index: u8, bytes: u64) -> u64 {
        let loads = self.heartbeat.as_ref().map_or(&[][..], |heartbeat| &heartbeat.load.gpus);
        let used_bytes = loads.get(usize::from(index)).map_or(0, |gpu| u128::from(gpu.memory_used_bytes));
        let promised = self.occupancy.gpu_memory(index);
        // Promised memory shows as used once its attempt runs, and a running attempt may grow to its promise.
        let gone_bytes = promised.all_bytes.max(used_bytes + promised.coming_bytes);
        u64::try_from(u128::from(bytes).saturating_sub(gone_bytes)).unwrap_or(u64::MAX)
    }

    /// Memory of the largest GPU that a task of the lane may get.
    pub(crate) fn gpu_memory_bytes(&self, lane: Lane) -> u64 {
        largest_bytes(&self.gpus[lane.index()])
    }

    /// Whether the model is loaded here and idle: it already has the memory that it needs.
    pub(crate) fn is_loaded_and_idle(&self, model: Digest) -> bool {
        self.model(model).warm && Lane::ALL.iter().all(|lane| self.occupancy.items(model, *lane) == 0)
    }

    /// When the worker counts as dead if it stays silent.
    pub(crate) fn dead_at(&self, beats: u32) -> MonoTime {
        self.seen + Duration::from_millis(u64::from(self.register.heartbeat_ms)) * beats + LIVENESS_GRACE
    }

    /// Stores a heartbeat. Its attempts are counted elsewhere.
    pub(super) fn set_heartbeat(&mut self, now: MonoTime, heartbeat: Heartbeat) {
        let old = self.heartbeat.as_ref();
        let same = old.is_some_and(|old| {
            let costs = || old.costs.iter().map(|cost| &cost.model).eq(heartbeat.costs.iter().map(|cost| &cost.model));
            old.held == heartbeat.held && old.warm == heartbeat.warm && costs()
        });
        if !same {
            let mut models = models_of(&heartbeat);
            for (digest, known) in &mut models {
                let before = self.models.binary_search_by(|(known, _)| known.cmp(digest));
                known.given = before.map_or_else(|_| Given::new(now), |at| self.models[at].1.given);
                // A runner that has ended is not used any more.
                known.warmth =
                    before.ok().filter(|_| known.warm).map_or_else(Warmth::default, |at| self.models[at].1.warmth);
            }
            self.models = models;
        }
        self.may_pack = heartbeat.costs.iter().any(|cost| cost.packing == Packing::On || cost.may_be_packed());
        self.finishing.told(&heartbeat.lanes);
        let warm = self.models.iter().filter(|(_, known)| known.warm);
        let in_use = warm.clone().filter(|(_, known)| known.given.is_in_use(now)).count();
        self.is_crowded = in_use >= usize::from(self.slots()) && in_use == warm.count();
        self.heartbeat = Some(heartbeat);
    }

    /// Counts what was made of the worker's messages, and what it was promised.
    pub(super) fn census(&self, tasks: usize, census: &mut Census<'_>) {
        let Self {
            register: _,
            peer: _,
            heartbeat: _,
            seen: _,
            seat: _,
            places: _,
            kind: _,
            occupancy,
            lent_in_a_row: _,
            fill_on: _,
            awaited: _,
            claims: _,
            finishing: _,
            models,
            may_pack: _,
            is_crowded: _,
            gpus,
            handover,
            rules: _,
        } = self;
        occupancy.census(tasks, census);
        handover.census(census);
        census.lasting("models of a worker", models.len(), 2 * HELD_MAX + COSTS_MAX);
        gpus.iter().for_each(|gpus| census.lasting("GPUs of a worker", gpus.len(), GPUS_MAX));
    }

    pub(crate) fn record(&self, now_unix_ms: u64, beats: u32, violation_permille: Option<u16>) -> WorkerRecord {
        WorkerRecord {
            register: self.register.clone(),
            heartbeat: self.heartbeat.clone(),
            tasks: self.occupancy.tasks(),
            gpu_memory_reserved_bytes: u64::try_from(self.occupancy.reserved().gpu_memory_bytes).unwrap_or(u64::MAX),
            violation_permille,
            seen_unix_ms: now_unix_ms,
            expires_after: self.dead_at(beats).since(self.seen),
        }
    }

    fn promised(&self) -> Promised {
        let bytes = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
        let Reserved { cpu_millis, memory_bytes, .. } = self.occupancy.reserved();
        let gpus = (0..).zip(&self.register.gpus);
        let gpu_memory_bytes = gpus.map(|(gpu, _)| bytes(self.occupancy.gpu_memory(gpu).all_bytes)).collect();
        Promised { cpu_millis, memory_bytes: bytes(memory_bytes), gpu_memory_bytes }
    }

    pub(crate) fn view(&self, now: MonoTime, violation_permille: Option<u16>) -> WorkerView {
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
            slots_used: self.occupancy.tasks(),
            device_map: register.device_map.clone(),
            lanes: heartbeat.map(|heartbeat| heartbeat.lanes).unwrap_or_default(),
            promised: self.promised(),
            violation_permille,
            draining: self.is_draining(),
            load: heartbeat.map(|heartbeat| heartbeat.load.clone()).unwrap_or_default(),
            held: heartbeat.map(|heartbeat| heartbeat.held.clone()).unwrap_or_default(),
            link_bytes_per_s: heartbeat.map_or(0, |heartbeat| heartbeat.link_bytes_per_s),
            broker_rtt_us: heartbeat.map_or(0, |heartbeat| heartbeat.broker_rtt_us),
            silent_ms: u64::try_from(now.since(self.seen).as_millis()).unwrap_or(u64::MAX),
        }
    }
}

fn models_of(heartbeat: &Heartbeat) -> Vec<(Digest, Known)> {
    let held = heartbeat.held.iter().map(|digest| (*digest, Known { held: true, ..Known::default() }));
    let warm = heartbeat.warm.iter().map(|digest| (*digest, Known { warm: true, ..Known::default() }));
    let cost =
        |(at, cost): (usize, &ModelCost)| (cost.model, Known { cost: u16::try_from(at).ok(), ..Known::default() });
    let mut models: Vec<(Digest, Known)> =
        held.chain(warm).chain(heartbeat.costs.iter().enumerate().map(cost)).collect();
    models.sort_by_key(|(digest, _)| *digest);
    models.dedup_by(|(digest, later), (kept, known)| {
        let is_same = digest == kept;
        if is_same {
            known.held |= later.held;
            known.warm |= later.warm;
            known.cost = known.cost.or(later.cost);
        }
        is_same
    });
    models
}
