//! Waiting tasks find a worker: one of them among all workers when its client speaks, many of them at one worker when that
//! gets room.
//!
//! Owns whose turn it is. Never rates; that is `placement`.

use proto_msgs::{Digest, Lane, TaskId, WorkerId};

use super::{
    Broker, Config, Policy,
    obstacle::{self, Obstacle},
    placement::{self, LOOK_MAX, Scene, Verdict},
    predict,
    queue::{Order, Queue, QueueKey, Rank, Stretch},
    tasks::{State, Task},
    worker::{Claim, LENT_IN_A_ROW_MAX, Seat, Slots, Worker},
    workers::Workers,
};
use crate::MonoTime;

/// Waiting tasks of one lane that are tried when one worker gets room. Those in front may want more than it has.
const FILL_LOOK_MAX: usize = 64;

/// Of one look's waiting tasks, those that are compared with what other workers could do for them. Each costs a look at
/// several workers.
const COMPARED_MAX: usize = 8;

/// How far a look at waiting tasks came.
enum End {
    /// None waits behind.
    Last,
    /// The worker takes no more.
    Full(Option<Order>),
    /// As many as one look takes.
    There(Option<Order>),
}

/// What came of trying to give a waiting task to a worker.
enum Tried {
    /// It went there.
    Placed,
    /// It does not fit, or another worker is the better one.
    Passed,
    /// All it lacks is a free slot.
    NeedsSlot,
    /// All it lacks are cores or memory that were promised to others.
    NeedsPromised,
}

/// What one look at waiting tasks leaves to other workers.
#[derive(Debug, Default)]
struct Left {
    /// Work for those that will be done with it earlier than the one that is being filled, and how long it takes there.
    sooner: Vec<(Seat, u64)>,
    /// Models of which it has its share.
    shared: Vec<Digest>,
}

impl Left {
    /// Whether one more task may be compared with what other workers could do for it.
    fn has_looks(&self) -> bool {
        self.sooner.len() + self.shared.len() < COMPARED_MAX
    }

    /// What goes there before the next one, microseconds.
    fn before_us(&self, seat: Seat) -> u64 {
        let there = self.sooner.iter().filter(|(skipped, _)| *skipped == seat);
        there.map(|(_, run_us)| *run_us).fold(0, u64::saturating_add)
    }
}

impl Broker {
    /// Gives a worker's room to waiting tasks: its realtime slots to realtime tasks, its batch slots to batch tasks, and what
    /// batch slots are left to realtime tasks. Where the lanes share all slots, realtime goes first in nine of ten cases.
    pub(super) fn fill(&mut self, now: MonoTime, id: WorkerId) {
        if self.queue.len() == 0 {
            return;
        }
        let Some(worker) = self.workers.get(id).filter(|worker| worker.is_open()) else { return };
        let is_shared = worker.register.slots[Lane::Realtime.index()] == 0;
        if !is_shared {
            self.fill_lane(now, id, Lane::Realtime, Slots::Own);
        } else if worker.lent_in_a_row < LENT_IN_A_ROW_MAX {
            return self.fill_shared(now, id);
        }
        self.fill_lane(now, id, Lane::Batch, Slots::Usable);
        self.fill_lane(now, id, Lane::Realtime, Slots::Usable);
    }

    fn fill_shared(&mut self, now: MonoTime, id: WorkerId) {
        self.fill_lane(now, id, Lane::Realtime, Slots::Usable);
        self.fill_lane(now, id, Lane::Batch, Slots::Usable);
    }

    /// Tries the first waiting tasks of the lane, then as many further on: where those in front are not for this worker, each
    /// fill gets on where the last one ended, so that none of those behind is overlooked for ever.
    fn fill_lane(&mut self, now: MonoTime, id: WorkerId, lane: Lane, slots: Slots) {
        if !self.takes_any(id, lane, slots) {
            return;
        }
        self.workers.await_slot(id, lane, None);
        let mut left = Left::default();
        let end = match self.fill_from(now, id, lane, slots, None, &mut left) {
            End::Last => return self.workers.fill_on(id, lane, None),
            End::Full(_) => return,
            End::There(end) => end,
        };
        let on = self.workers.get(id).and_then(|worker| worker.fill_on[lane.index()]);
        let next = match self.fill_from(now, id, lane, slots, on.max(end), &mut left) {
            End::Last => None,
            End::Full(on) | End::There(on) => on,
        };
        self.workers.fill_on(id, lane, next);
    }

    fn takes_any(&self, id: WorkerId, lane: Lane, slots: Slots) -> bool {
        self.workers.get(id).is_some_and(|worker| predict::takes_any(worker, lane, slots))
    }

    /// Tries the tasks behind this place.
    fn fill_from(
        &mut self,
        now: MonoTime,
        id: WorkerId,
        lane: Lane,
        slots: Slots,
        mut after: Option<Order>,
        left: &mut Left,
    ) -> End {
        let Some(kind) = self.workers.get(id).map(|worker| worker.kind) else { return End::Last };
        let Stretch { tasks, last } = self.queue.stretch(lane, after, kind, FILL_LOOK_MAX / 2);
        for (order, task) in tasks {
            if !self.takes_any(id, lane, slots) {
                return End::Full(after);
            }
            self.counters.waiting_looked += 1;
            match self.try_here(now, task, id, slots, left) {
                Tried::NeedsSlot => {
                    self.workers.await_slot(id, lane, Some(order));
                    return End::Full(after); // The next fill finds it again.
                }
                Tried::NeedsPromised => self.claim(now, id, QueueKey { lane, order }, task),
                Tried::Placed | Tried::Passed => {}
            }
            after = Some(order);
        }
        last.map_or(End::Last, |last| End::There(Some(last)))
    }

    /// Of the tasks that lack what was promised to others, the first one claims what they give back.
    fn claim(&mut self, now: MonoTime, at: WorkerId, key: QueueKey, id: TaskId) {
        let Some(worker) = self.workers.get(at) else { return };
        let old = worker.claims[key.lane.index()];
        if old.is_some_and(|old| old.task != id && old.order < key.order) {
            return;
        }
        let Some(task) = self.tasks.get_mut(id) else { return };
        let elsewhere = task.claims_at.filter(|elsewhere| *elsewhere != at).and_then(|at| self.workers.get(at));
        if elsewhere.is_some_and(|worker| worker.keeps_for(id)) {
            return; // One is enough: else all that fit would stand still for it.
        }
        task.claims_at = Some(at);
        let since = old.filter(|old| old.task == id).map_or(now, |old| old.since);
        self.workers.claim(at, key.lane, Claim { task: id, order: key.order, since });
    }

    /// The task waits no longer, and nothing is kept for it.
    pub(super) fn leave_queue(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if let State::Queued(key) = task.state {
            self.queue.remove(key);
        }
        if let Some(at) = task.claims_at.take() {
            self.workers.unclaim(at, id);
        }
    }

    /// Gives a waiting task to the worker if it fits, has room, and nobody else is worth waiting for.
    fn try_here(&mut self, now: MonoTime, id: TaskId, here: WorkerId, slots: Slots, left: &mut Left) -> Tried {
        let (Some(task), Some(worker)) = (self.tasks.get(id), self.workers.get(here)) else { return Tried::Passed };
        let has_slot = predict::has_slot(task, worker, slots);
        let model = task.spec.model.digest;
        // What is not compared with others is not sent ahead either: it would be taken from them unseen.
        let compare = left.has_looks();
        let has_room = has_slot || compare && predict::has_room_ahead(task, worker);
        let has_its_share = !has_slot && left.shared.contains(&model);
        // Without a peer, from before a restart: room is kept for its client once that is heard.
        if task.peer.is_none() || has_its_share || !(has_room || compare && predict::needs_slot(task, worker)) {
            return Tried::Passed;
        }
        if let Some(obstacle) = obstacle::ever(task, worker).next() {
            // A way may be found yet: its client may come to listen somewhere.
            if let State::Queued(key) = task.state
                && obstacle != Obstacle::NoWay
            {
                self.queue.set_unfit(key, worker.kind);
            }
            return Tried::Passed;
        }
        if let Some(obstacle) = obstacle::for_now(task, worker, now).next() {
            return if obstacle.is_promise(worker) { Tried::NeedsPromised } else { Tried::Passed };
        }
        let survey = placement::survey_here(task, self.scene(now), worker, compare);
        let looked = survey.looked();
        if !has_slot && compare && survey.has_its_share(self.queue.cost_us(task.lane())) {
            left.shared.push(model);
            self.counters.candidates_looked += looked;
            return Tried::Passed;
        }
        let before_us = survey.sooner().map_or(0, |seat| left.before_us(seat));
        let verdict = survey.decide(before_us);
        self.counters.candidates_looked += looked;
        match verdict {
            Verdict::Place(_) if !has_room => return Tried::NeedsSlot,
            Verdict::Place(choice) => {
                self.grant(now, id, choice);
                return Tried::Placed;
            }
            Verdict::HeldBack { elsewhere, run_us } => left.sooner.push((elsewhere, run_us)),
            Verdict::Wait => {}
        }
        Tried::Passed
    }

    /// Finds room for a waiting task at any worker, and tells its client; false if there is none.
    pub(super) fn place(&mut self, now: MonoTime, id: TaskId) -> bool {
        let Some(task) = self.tasks.get(id) else { return true };
        let State::Queued(key) = task.state else { return true };
        if task.peer.is_none() {
            return false;
        }
        let survey = placement::survey_all(task, self.scene(now));
        let looked = survey.looked();
        let before_us = if survey.has_sooner() { self.queue.before_us(key) } else { 0 };
        let model = task.spec.model.digest;
        let unfit: Vec<u32> = survey.unfit_kinds().collect();
        let verdict = survey.decide(before_us);
        self.counters.candidates_looked += looked;
        self.workers.turn(model, LOOK_MAX);
        match verdict {
            Verdict::Place(choice) => {
                self.grant(now, id, choice);
                true
            }
            Verdict::Wait | Verdict::HeldBack { .. } => {
                unfit.into_iter().for_each(|kind| self.queue.set_unfit(key, kind));
                self.go_round();
                false
            }
        }
    }

    /// Who goes from one worker to the next begins behind those that the last look found full.
    fn go_round(&mut self) {
        if self.config.policy == Policy::RoundRobin {
            self.last_chosen = self.workers.after(self.last_chosen).nth(LOOK_MAX - 1).map(Worker::id);
        }
    }

    /// What decisions rest on.
    pub(super) fn scene(&self, now: MonoTime) -> Scene<'_> {
        let (policy, workers, slos) = (self.config.policy, &self.workers, &self.slos);
        Scene { now, policy, workers, slos, last_chosen: self.last_chosen }
    }

    /// A task begins to wait, or waits again where it was.
    pub(super) fn enqueue(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        let rank = match task.rank {
            Some(rank) => rank,
            None => rate(now, task, &mut self.queue, &self.workers, &self.config),
        };
        task.rank = Some(rank);
        task.state = State::Queued(self.queue.push(rank, id));
    }

    /// Once models are known to cost much more or less than was assumed, what waits is put in order again.
    pub(super) fn weigh_again(&mut self, now: MonoTime) {
        for id in self.queue.take_stale(now) {
            let Some(task) = self.tasks.get_mut(id) else { continue };
            let (Some(rank), State::Queued(_)) = (task.rank, &task.state) else { continue };
            let (item_us, tenant) = (item_us(task, &self.workers), self.config.tenant(task.spec.client));
            let rank = self.queue.weigh_again(rank, &task.spec, item_us, &self.config.weights_in_force(), tenant);
            (task.rank, task.state) = (Some(rank), State::Queued(rank.key));
        }
    }

    /// Rates a task that has just come.
    pub(super) fn rate(&mut self, now: MonoTime, task: &Task) -> Rank {
        rate(now, task, &mut self.queue, &self.workers, &self.config)
    }
}

fn rate(now: MonoTime, task: &Task, queue: &mut Queue, workers: &Workers, config: &Config) -> Rank {
    queue.rate(now, &task.spec, item_us(task, workers), &config.weights_in_force(), config.tenant(task.spec.client))
}

/// Slot time that one item of the task is expected to need, microseconds.
fn item_us(task: &Task, workers: &Workers) -> u64 {
    workers.fleet().item_us(predict::models(task).map(|(digest, _)| digest))
}
