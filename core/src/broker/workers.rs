//! The worker half of the Metric Table: the live workers, and the indexes that keep placement fast.
//!
//! Owns the rows and what is derived from all of them. Never decides who gets a task.

pub(crate) mod claim;
pub(crate) mod finishing;
pub(crate) mod fleet;
pub(crate) mod handover;
pub(crate) mod kind;
pub(crate) mod occupancy;
pub(crate) mod twins;
mod warmth;
pub(crate) mod worker;

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
};

use proto_msgs::{
    AttemptId, AttemptState, ClientId, Demands, Digest, Epoch, Heartbeat, Lane, PeerId, Register, TaskId, WorkerId,
};

use super::{
    placement::given::Share,
    queue::{Cursor, line::Order},
};
use crate::{Census, MonoTime, Rule, Rules};
use claim::Claim;
use fleet::Fleet;
use kind::Kind;
use occupancy::Held;
use worker::{Seat, Worker};

/// Worker kinds that one look for room visits. A fleet has a handful. If each worker is its own kind, the next look
/// begins behind this one.
pub(super) const KINDS_LOOK_MAX: usize = 64;

/// Workers of one kind.
#[derive(Debug, Default)]
struct Members {
    seats: BTreeSet<Seat>,
    /// For each lane, the slots that it can use, lent ones included.
    slots: [u32; 2],
    /// For each lane, the workers with a free slot, least busy first.
    room: [BTreeSet<(u16, Seat)>; 2],
}

/// Workers that have one model.
#[derive(Debug, Default)]
struct Holders {
    seats: BTreeSet<Seat>,
    /// Where the next look begins if there are more workers than one look visits.
    begin: Seat,
    share: Share,
}

impl Holders {
    fn in_turn(&self) -> impl Iterator<Item = &Seat> {
        self.seats.range(self.begin..).chain(self.seats.range(..self.begin))
    }
}

/// All live workers.
#[derive(Debug, Default)]
pub(super) struct Workers {
    rules: Rules,
    ids: BTreeMap<WorkerId, Seat>,
    seats: Vec<Option<Box<Worker>>>,
    /// Seats whose worker is gone.
    empty: Vec<Seat>,
    kinds: BTreeMap<Kind, u32>,
    members: BTreeMap<u32, Members>,
    kinds_made: u32,
    /// Where the next look at the kinds begins.
    begin_kind: u32,
    holders: BTreeMap<Digest, Holders>,
    fleet: Fleet,
    totals: Totals,
    /// Rows of this table walked so far. Counted here, so that no loop over workers goes unnoticed.
    walked: Cell<u64>,
}

impl Workers {
    pub(super) fn new(rules: Rules) -> Self {
        Self { rules, ..Self::default() }
    }

    pub(super) fn holds(&self, rule: Rule) -> bool {
        self.rules.holds(rule)
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.at(*self.ids.get(&id)?)
    }

    pub(super) fn at(&self, seat: Seat) -> Option<&Worker> {
        self.seats.get(seat as usize)?.as_deref()
    }

    fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        let seat = *self.ids.get(&id)?;
        self.seats.get_mut(seat as usize)?.as_deref_mut()
    }

    /// Whether this life of the worker is registered and alive.
    pub(super) fn has_life(&self, id: WorkerId, epoch: Epoch) -> bool {
        self.get(id).is_some_and(|worker| worker.register.epoch == epoch)
    }

    /// Number of rows of this table walked so far.
    pub(super) fn walked(&self) -> u64 {
        self.walked.get()
    }

    fn counted<'a, T: 'a>(&'a self, rows: impl Iterator<Item = T> + 'a) -> impl Iterator<Item = T> + 'a {
        rows.inspect(|_| self.walked.set(self.walked.get() + 1))
    }

    /// Workers in order of id, after the given one.
    pub(super) fn after(&self, id: Option<WorkerId>) -> impl Iterator<Item = &Worker> {
        use std::ops::Bound::{Excluded, Unbounded};
        let rows = self.ids.range((id.map_or(Unbounded, Excluded), Unbounded));
        self.counted(rows.filter_map(|(_, seat)| self.at(*seat)))
    }

    /// Sums over all workers.
    pub(super) fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Average costs of models over all workers.
    pub(super) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// One worker of each kind.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (u32, &Worker)> {
        let from_begin = self.members.range(self.begin_kind..).chain(self.members.range(..self.begin_kind));
        self.counted(from_begin.filter_map(|(kind, members)| Some((*kind, self.at(*members.seats.first()?)?))))
    }

    pub(super) fn kinds_len(&self) -> usize {
        self.members.len()
    }

    /// Number of workers of the kind.
    pub(super) fn kind_len(&self, kind: u32) -> usize {
        self.members.get(&kind).map_or(0, |members| members.seats.len())
    }

    /// Slots that a lane can use at workers of the kind, lent ones included.
    pub(super) fn kind_slots(&self, kind: u32, lane: Lane) -> u32 {
        self.members.get(&kind).map_or(0, |members| members.slots[lane.index()])
    }

    /// Workers of the kind with a free slot for the lane, least busy first.
    pub(super) fn with_room(&self, kind: u32, lane: Lane) -> impl Iterator<Item = &Worker> {
        let room = self.members.get(&kind).into_iter().flat_map(move |members| &members.room[lane.index()]);
        self.counted(room.filter_map(|(_, seat)| self.at(*seat)))
    }

    /// Workers that have the model, each once; the first one changes with each [`Self::turn`].
    pub(super) fn holders(&self, model: Digest) -> impl Iterator<Item = &Worker> {
        let in_turn = self.holders.get(&model).into_iter().flat_map(Holders::in_turn);
        self.counted(in_turn.filter_map(|seat| self.at(*seat)))
    }

    /// Number of workers that have the model.
    pub(super) fn holders_len(&self, model: Digest) -> usize {
        self.holders.get(&model).map_or(0, |holders| holders.seats.len())
    }

    /// The model's share of trials.
    pub(super) fn share(&self, model: Digest) -> Share {
        self.holders.get(&model).map_or_else(Share::default, |holders| holders.share)
    }

    /// Lets the next looks begin behind the workers that this one saw, if there are more than one look visits.
    pub(super) fn turn(&mut self, model: Digest, looked_max: usize) {
        if let Some(holders) = self.holders.get_mut(&model).filter(|holders| holders.seats.len() > looked_max) {
            let next = holders.in_turn().nth(looked_max).copied();
            holders.begin = next.unwrap_or(0);
        }
        if self.members.len() > KINDS_LOOK_MAX {
            let begin = self.begin_kind;
            let next = self.members.range(begin..).chain(self.members.range(..begin)).nth(KINDS_LOOK_MAX);
            self.begin_kind = next.map_or(0, |(kind, _)| *kind);
        }
    }

    /// Registers a worker. It keeps the attempts that it was granted in this life.
    pub(super) fn register(&mut self, now: MonoTime, peer: PeerId, register: Register) {
        let id = register.worker;
        let old = self.remove(id).filter(|old| old.register.epoch == register.epoch);
        let (heartbeat, occupancy, handover) =
            old.map_or_else(Default::default, |old| (old.heartbeat, old.occupancy, old.handover));
        let seat = self.empty.pop().unwrap_or_else(|| {
            self.seats.push(None);
            (self.seats.len() - 1) as Seat
        });
        let kind = Kind::of(&register);
        let kinds_made = &mut self.kinds_made;
        let number = *self.kinds.entry(kind).or_insert_with(|| {
            *kinds_made += 1;
            *kinds_made
        });
        let mut worker = Box::new(Worker::new(register, peer, now, seat, occupancy));
        (worker.kind, worker.rules, worker.handover) = (number, self.rules, handover);
        self.totals.add(&worker);
        self.ids.insert(id, seat);
        let members = self.members.entry(number).or_default();
        members.seats.insert(seat);
        Lane::ALL.into_iter().for_each(|lane| members.slots[lane.index()] += u32::from(worker.usable_slots(lane)));
        self.seats[seat as usize] = Some(worker);
        if let Some(heartbeat) = heartbeat {
            self.set_heartbeat(now, id, heartbeat);
        }
    }

    pub(super) fn remove(&mut self, id: WorkerId) -> Option<Box<Worker>> {
        let seat = self.ids.remove(&id)?;
        let worker = self.seats.get_mut(seat as usize)?.take()?;
        self.empty.push(seat);
        self.totals.remove(&worker);
        if let Some(members) = self.members.get_mut(&worker.kind) {
            members.seats.remove(&seat);
            for lane in Lane::ALL {
                members.slots[lane.index()] -= u32::from(worker.usable_slots(lane));
                members.room[lane.index()].remove(&(worker.busy_permille(), seat));
            }
            if members.seats.is_empty() {
                self.members.remove(&worker.kind);
                self.kinds.remove(&Kind::of(&worker.register));
            }
        }
        if let Some(heartbeat) = &worker.heartbeat {
            self.fleet.remove(heartbeat);
            forget_holder(&mut self.holders, &heartbeat.held, seat);
        }
        Some(worker)
    }

    /// Notes a sign of life: a heartbeat that is news.
    pub(super) fn seen(&mut self, id: WorkerId, now: MonoTime, peer: PeerId) {
        if let Some(worker) = self.get_mut(id) {
            worker.seen = now;
            worker.peer = peer;
        }
    }

    /// Books an attempt at a worker, or updates it when more is known.
    pub(super) fn occupy(&mut self, now: MonoTime, id: WorkerId, attempt: AttemptId, held: Held) {
        self.change(now, id, |worker| worker.occupancy.put(attempt, held));
    }

    /// Frees a granted place, unless a heartbeat has named the attempt: then heartbeats say when it is free.
    pub(super) fn release_unnamed(&mut self, now: MonoTime, id: WorkerId, attempt: AttemptId) {
        // Mostly it is gone already, and then there is nothing to count anew.
        if self.get(id).is_some_and(|worker| worker.occupancy.is_unnamed(attempt)) {
            self.release(now, id, attempt);
        }
    }

    /// Frees an attempt's place.
    pub(super) fn release(&mut self, now: MonoTime, id: WorkerId, attempt: AttemptId) {
        self.change(now, id, |worker| worker.occupancy.remove(attempt));
    }

    /// Counts one more shared slot that went to realtime while batch waited; if not `in_a_row`, the count begins anew.
    pub(super) fn lent(&mut self, id: WorkerId, in_a_row: bool) {
        if let Some(worker) = self.get_mut(id) {
            worker.lent_in_a_row = if in_a_row { worker.lent_in_a_row.saturating_add(1) } else { 0 };
        }
    }

    /// Notes that the worker is given a task that passes through these models, the first one first.
    pub(super) fn give(&mut self, now: MonoTime, id: WorkerId, models: impl Iterator<Item = Digest>, is_trial: bool) {
        for (stage, model) in models.enumerate() {
            if let Some(holders) = self.holders.get_mut(&model).filter(|_| stage == 0) {
                holders.share.note(is_trial);
            }
            if let Some(worker) = self.get_mut(id) {
                worker.give(now, model, is_trial);
            }
        }
    }

    /// Learns how much longer than its predicted parts a client's task took that found a free slot.
    pub(super) fn learn_handover(&mut self, now: MonoTime, id: WorkerId, client: ClientId, us: u64) {
        if let Some(worker) = self.get_mut(id) {
            worker.handover.learn(now, client, us);
        }
    }

    /// Notes that a task that passes through these models ended well at the worker, with these demands.
    pub(super) fn ran(&mut self, id: WorkerId, models: impl Iterator<Item = Digest>, demands: &Demands) {
        if let Some(worker) = self.get_mut(id) {
            models.for_each(|model| worker.ran(model, demands));
        }
    }

    /// Notes that the worker finishes a load for nobody, in a slot of the lane, by prediction until then.
    pub(super) fn finishes_load(&mut self, now: MonoTime, id: WorkerId, lane: Lane, until: MonoTime) {
        if let Some(worker) = self.get_mut(id) {
            worker.finishing.begins(now, lane, until);
        }
    }

    /// Sets where the next fill of a lane continues.
    pub(super) fn fill_on(&mut self, id: WorkerId, lane: Lane, on: Option<Cursor>) {
        if let Some(worker) = self.get_mut(id) {
            worker.fill_on[lane.index()] = on;
        }
    }

    /// Sets the task that waits for a slot of a lane.
    pub(super) fn await_slot(&mut self, id: WorkerId, lane: Lane, order: Option<Order>) {
        if let Some(worker) = self.get_mut(id) {
            worker.awaited[lane.index()] = order;
        }
    }

    /// Sets the task of a lane that cores and memory are kept for.
    pub(super) fn claim(&mut self, id: WorkerId, lane: Lane, claim: Claim) {
        if let Some(worker) = self.get_mut(id) {
            worker.claims[lane.index()] = Some(claim);
        }
    }

    /// Drops the claim of this task.
    pub(super) fn unclaim(&mut self, id: WorkerId, task: TaskId) {
        if let Some(worker) = self.get_mut(id) {
            worker.claims.iter_mut().for_each(|claim| *claim = claim.filter(|claim| claim.task != task));
        }
    }

    /// Takes in a heartbeat. Returns the attempts that earlier ones named and this one does not.
    pub(super) fn heartbeat(&mut self, now: MonoTime, id: WorkerId, heartbeat: Heartbeat) -> Vec<AttemptId> {
        let mut vanished = Vec::new();
        self.change(now, id, |worker| {
            let active = heartbeat.attempts.iter().filter(|report| !matches!(report.state, AttemptState::Finished(_)));
            vanished = worker.occupancy.named(active.map(|report| report.id), heartbeat.names_all);
            let running = heartbeat.attempts.iter().filter(|report| report.state == AttemptState::Running);
            worker.occupancy.begun(running.map(|report| report.id));
        });
        self.set_heartbeat(now, id, heartbeat);
        vanished
    }

    /// The newest heartbeat number from this life of the worker.
    pub(super) fn last_seq(&self, id: WorkerId, epoch: Epoch) -> Option<u64> {
        let worker = self.get(id).filter(|worker| worker.register.epoch == epoch)?;
        worker.heartbeat.as_ref().map(|heartbeat| heartbeat.seq)
    }

    fn set_heartbeat(&mut self, now: MonoTime, id: WorkerId, heartbeat: Heartbeat) {
        let Some(seat) = self.ids.get(&id).copied() else { return };
        let Some(worker) = self.seats.get(seat as usize).and_then(Option::as_deref) else { return };
        let old = worker.heartbeat.as_ref();
        if let Some(old) = old {
            self.fleet.remove(old);
        }
        self.fleet.add(&heartbeat);
        let old_held = old.map_or(&[][..], |old| &old.held);
        if old_held != heartbeat.held {
            forget_holder(&mut self.holders, old_held, seat);
            for digest in &heartbeat.held {
                self.holders.entry(*digest).or_default().seats.insert(seat);
            }
        }
        self.change(now, id, |worker| worker.set_heartbeat(now, heartbeat));
    }

    /// Counts the rows and what is derived from them. `tasks`: those that a worker may have been promised.
    pub(super) fn census(&self, workers_max: usize, tasks: usize, census: &mut Census<'_>) {
        let Self {
            rules: _,
            ids,
            seats,
            empty,
            kinds,
            members,
            kinds_made: _,
            begin_kind: _,
            holders,
            fleet,
            totals: _,
            walked: _,
        } = self;
        census.lasting("workers", ids.len(), workers_max);
        census.lasting("seats", seats.len(), workers_max);
        census.lasting("empty seats", empty.len(), seats.len() - ids.len());
        census.lasting("kinds of workers", kinds.len().max(members.len()), ids.len());
        let seated =
            |Members { seats, slots: _, room }: &Members| room.iter().map(BTreeSet::len).fold(seats.len(), usize::max);
        census.lasting("workers by kind", members.values().map(seated).sum(), ids.len());
        let (mut held, mut measured) = (0, 0);
        for worker in seats.iter().flatten() {
            held += worker.heartbeat.as_ref().map_or(0, |heartbeat| heartbeat.held.len());
            measured += worker.heartbeat.as_ref().map_or(0, |heartbeat| heartbeat.costs.len());
            worker.census(tasks, census);
        }
        let holding = |Holders { seats, begin: _, share: _ }: &Holders| seats.len();
        census.lasting("workers by model", holders.values().map(holding).sum(), held);
        fleet.census(measured, census);
        let unnamed = seats.iter().flatten().map(|worker| worker.occupancy.unnamed()).sum();
        census.passing("promised places", unnamed, tasks);
    }

    /// Changes a worker and keeps the indexes up to date.
    fn change(&mut self, now: MonoTime, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        let Some(seat) = self.ids.get(&id).copied() else { return };
        let Some(worker) = self.seats.get_mut(seat as usize).and_then(Option::as_deref_mut) else { return };
        let Some(members) = self.members.get_mut(&worker.kind) else { return };
        let room = |worker: &Worker| Lane::ALL.map(|lane| (worker.free(lane) > 0).then(|| worker.busy_permille()));
        self.totals.remove(worker);
        let before = room(worker);
        worker.occupancy.work_until(now, worker.counted_slots());
        change(worker);
        self.totals.add(worker);
        let after = room(worker);
        for lane in Lane::ALL.map(Lane::index) {
            if before[lane] != after[lane] {
                before[lane].map(|busy| members.room[lane].remove(&(busy, seat)));
                after[lane].map(|busy| members.room[lane].insert((busy, seat)));
            }
        }
    }
}

/// Sums over all workers.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// Slots of each lane.
    pub(super) slots: [u32; 2],
    /// Attempts running or granted in each lane: more than its slots if items are packed or sent ahead.
    pub(super) tasks: [u32; 2],
    /// Slots that these take.
    pub(super) used: u32,
    /// Items that wait at workers for a slot, by lane.
    pub(super) waiting_items: [u64; 2],
}

impl Totals {
    fn add(&mut self, worker: &Worker) {
        let tasks = worker.occupancy.tasks();
        self.used += slots_used(worker);
        for lane in Lane::ALL.map(Lane::index) {
            self.slots[lane] += u32::from(worker.register.slots[lane]);
            self.tasks[lane] += u32::from(tasks[lane]);
            self.waiting_items[lane] += waiting_items(worker, lane);
        }
    }

    fn remove(&mut self, worker: &Worker) {
        let tasks = worker.occupancy.tasks();
        self.used -= slots_used(worker);
        for lane in Lane::ALL.map(Lane::index) {
            self.slots[lane] -= u32::from(worker.register.slots[lane]);
            self.tasks[lane] -= u32::from(tasks[lane]);
            self.waiting_items[lane] -= waiting_items(worker, lane);
        }
    }

    /// Slots that a lane can use, lent ones included.
    pub(super) fn usable_slots(&self, lane: Lane) -> u32 {
        match lane {
            Lane::Realtime => self.slots[0] + self.slots[1],
            Lane::Batch => self.slots[1],
        }
    }
}

fn slots_used(worker: &Worker) -> u32 {
    let tasks = worker.occupancy.tasks().map(u32::from).iter().sum();
    u32::from(worker.slots()).min(tasks)
}

fn waiting_items(worker: &Worker, lane: usize) -> u64 {
    worker.heartbeat.as_ref().map_or(0, |heartbeat| u64::from(heartbeat.lanes[lane].waiting_items))
}

fn forget_holder(holders: &mut BTreeMap<Digest, Holders>, models: &[Digest], seat: Seat) {
    for digest in models {
        if let Some(found) = holders.get_mut(digest) {
            found.seats.remove(&seat);
            if found.seats.is_empty() {
                holders.remove(digest);
            }
        }
    }
}
