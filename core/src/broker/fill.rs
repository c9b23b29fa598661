//! Matches waiting tasks with workers: one task with all workers when its client speaks, many tasks with one worker
//! when it gets room.
//!
//! Owns whose turn it is. Never rates; that is `placement`.

use proto_msgs::{Digest, Lane, TaskId, WorkerId};

use super::{
    Broker, Config, Policy,
    placement::{self, LOOK_MAX, Verdict, decision::Obstacle, obstacle, predict, scene::Scene},
    queue::{Cursor, Queue, Walk, rank::Rank},
    task::{State, Task},
    workers::{
        Workers,
        claim::Claim,
        worker::{LENT_IN_A_ROW_MAX, Seat, Slots, Worker},
    },
};
use crate::MonoTime;

/// Waiting tasks of one lane that one worker's fill tries. Those in front may need more than the worker has free.
const FILL_LOOK_MAX: usize = 64;

/// Waiting tasks of one fill that are compared with what other workers could do. Each comparison looks at several
/// workers.
const COMPARED_MAX: usize = 8;

/// Where a walk through waiting tasks ended.
enum End {
    /// At the end of the queue.
    Last,
    /// Behind this task: the worker takes no more.
    Full(Cursor),
    /// Behind this task: the limit of one walk is reached.
    There(Cursor),
}

/// The result of trying to give a waiting task to a worker.
enum Tried {
    /// The worker was granted the task.
    Placed,
    /// The task does not fit, or another worker is better for it.
    Passed,
    /// The task fits but for a free slot.
    NeedsSlot,
    /// The task fits but for cores or memory that were promised to other tasks.
    NeedsPromised,
}

/// Tasks that one fill leaves to other workers.
#[derive(Debug, Default)]
struct Left {
    /// Tasks that another worker will finish earlier: that worker, and the run time there in microseconds.
    sooner: Vec<(Seat, u64)>,
    /// Models of which the filled worker already has its share.
    shared: Vec<Digest>,
}

impl Left {
    /// Whether one more task may be compared with what other workers could do.
    fn has_looks(&self) -> bool {
        self.sooner.len() + self.shared.len() < COMPARED_MAX
    }

    /// Run time of the tasks that this fill has left to that worker, microseconds.
    fn before_us(&self, seat: Seat) -> u64 {
        let there = self.sooner.iter().filter(|(skipped, _)| *skipped == seat);
        there.map(|(_, run_us)| *run_us).fold(0, u64::saturating_add)
    }
}

impl Broker {
    /// Gives a worker's room to waiting tasks: realtime slots to realtime tasks, batch slots to batch tasks, and the
    /// batch slots that are left to realtime tasks. Where the lanes share all slots, realtime goes first in nine of ten
    /// cases.
    pub(super) fn fill(&mut self, now: MonoTime, id: WorkerId) {
        if self.queue.len() == 0 {
            return Lane::ALL.into_iter().for_each(|lane| self.workers.await_slot(id, lane, None));
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

    /// Tries the first waiting tasks of the lane, then as many further back. The second part begins where the last fill
    /// ended: no task is overlooked for ever because those in front do not suit this worker.
    fn fill_lane(&mut self, now: MonoTime, id: WorkerId, lane: Lane, slots: Slots) {
        if !self.takes_any(now, id, lane, slots) {
            return;
        }
        self.workers.await_slot(id, lane, None);
        let mut left = Left::default();
        let end = match self.fill_from(now, id, lane, slots, Cursor::default(), &mut left) {
            End::Last => return self.workers.fill_on(id, lane, None),
            End::Full(_) => return,
            End::There(end) => end,
        };
        let on = self.workers.get(id).and_then(|worker| worker.fill_on[lane.index()]);
        let next = match self.fill_from(now, id, lane, slots, on.map_or(end, |on| on.max(end)), &mut left) {
            End::Last => None,
            End::Full(on) | End::There(on) => Some(on),
        };
        self.workers.fill_on(id, lane, next);
    }

    fn takes_any(&self, now: MonoTime, id: WorkerId, lane: Lane, slots: Slots) -> bool {
        self.workers.get(id).is_some_and(|worker| predict::takes_any(worker, lane, slots, now))
    }

    /// Tries the waiting tasks behind this place.
    fn fill_from(
        &mut self,
        now: MonoTime,
        id: WorkerId,
        lane: Lane,
        slots: Slots,
        mut after: Cursor,
        left: &mut Left,
    ) -> End {
        let Some(kind) = self.workers.get(id).map(|worker| worker.kind) else { return End::Last };
        let mut walk = Walk::new(after, FILL_LOOK_MAX / 2);
        loop {
            if !self.takes_any(now, id, lane, slots) {
                return End::Full(after);
            }
            let Some((order, task)) = self.queue.next(now, lane, kind, &mut walk) else { break };
            self.counters.waiting_looked += 1;
            match self.try_here(now, task, id, slots, left) {
                Tried::NeedsSlot => {
                    self.workers.await_slot(id, lane, Some(order));
                    return End::Full(after); // The next fill finds it again.
                }
                Tried::NeedsPromised => self.claim(now, id, lane, task),
                Tried::Placed | Tried::Passed => {}
            }
            after = walk.at;
        }
        if self.queue.goes_on(lane, walk.at) { End::There(walk.at) } else { End::Last }
    }

    /// The first task that lacks only what was promised to other tasks claims what those free.
    fn claim(&mut self, now: MonoTime, at: WorkerId, lane: Lane, id: TaskId) {
        let (Some(worker), Some(task)) = (self.workers.get(at), self.tasks.get_mut(id)) else { return };
        let (old, Some(rank)) = (worker.claims[lane.index()], task.rank) else { return };
        if old.is_some_and(|old| old.task != id && old.rank.order(now) < rank.order(now)) {
            return;
        }
        let State::Queued { claims_at } = &mut task.state else { return };
        let elsewhere = claims_at.filter(|elsewhere| *elsewhere != at).and_then(|at| self.workers.get(at));
        if elsewhere.is_some_and(|worker| worker.keeps_for(id)) {
            return; // One is enough: else all that fit would stand still for it.
        }
        *claims_at = Some(at);
        let since = old.filter(|old| old.task == id).map_or(now, |old| old.since);
        self.workers.claim(at, lane, Claim { task: id, rank, since });
        self.reschedule(id); // Nothing is kept for a client that falls silent.
    }

    /// Takes a task out of the queue and drops its claim.
    pub(super) fn leave_queue(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if let State::Queued { claims_at } = &mut task.state {
            if let Some(rank) = &task.rank {
                self.queue.remove(rank, task.spec.client);
            }
            if let Some(at) = claims_at.take() {
                self.workers.unclaim(at, id);
            }
        }
    }

    /// Grants the worker a waiting task if the task fits, has room there, and no other worker is worth waiting for.
    fn try_here(&mut self, now: MonoTime, id: TaskId, here: WorkerId, slots: Slots, left: &mut Left) -> Tried {
        let (Some(task), Some(worker)) = (self.tasks.get(id), self.workers.get(here)) else { return Tried::Passed };
        let has_slot = predict::has_slot(task, worker, slots);
        let model = task.spec.model.digest;
        // A task that is not compared is not sent ahead either: that would take it unseen from a better worker.
        let compare = left.has_looks();
        let has_room = has_slot || compare && predict::has_room_ahead(task, worker, now);
        let has_its_share = !has_slot && left.shared.contains(&model);
        // A client that is gone, or has not spoken since a restart: its task gets room once it is heard.
        let hears = task.owner.hears(now, self.config.quiet_in_force());
        if !hears || has_its_share || !(has_room || compare && predict::needs_slot(task, worker)) {
            return Tried::Passed;
        }
        if let Some(obstacle) = obstacle::ever(task, worker).next() {
            // Not final: its client may become reachable.
            if let Some(rank) = task.rank.filter(|_| task.is_queued())
                && obstacle != Obstacle::NoWay
            {
                self.queue.set_unfit(rank.key, worker.kind);
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
            Verdict::HeldBack { elsewhere, run_us } => {
                left.sooner.push((elsewhere, run_us));
                self.note_wait(id, &verdict);
            }
            Verdict::Wait => {}
        }
        Tried::Passed
    }

    /// Notes what the task waits for, for those who ask.
    fn note_wait(&mut self, id: TaskId, verdict: &Verdict) {
        let held_for = match verdict {
            Verdict::HeldBack { elsewhere, .. } => self.workers.at(*elsewhere).map(Worker::id),
            Verdict::Place(_) | Verdict::Wait => None,
        };
        if let Some(task) = self.tasks.get_mut(id) {
            task.held_for = held_for;
        }
    }

    /// Grants a waiting task room at any worker and tells its client; false if no worker has room.
    pub(super) fn place(&mut self, now: MonoTime, id: TaskId) -> bool {
        let Some(task) = self.tasks.get(id) else { return true };
        let Some(rank) = task.rank.filter(|_| task.is_queued()) else { return true };
        if !task.owner.hears(now, self.config.quiet_in_force()) {
            return false;
        }
        let serves = task.serves.and_then(|at| self.workers.get(at));
        let serves = serves.filter(|at| predict::has_room(task, at, now));
        let survey = match serves {
            Some(here) => placement::survey_here(task, self.scene(now), here, false),
            None => placement::survey_room(task, self.scene(now)),
        };
        let looked = survey.looked();
        let before_us = if survey.has_sooner() { self.queue.before_us(now, &rank) } else { 0 };
        let model = task.spec.model.digest;
        let unfit: Vec<u32> = survey.unfit_kinds().collect();
        let missed = survey.missed(before_us);
        let verdict = survey.decide(before_us);
        self.counters.candidates_looked += looked;
        self.workers.turn(model, LOOK_MAX);
        if missed.is_some_and(|missed| self.pays_for_load(now, id, missed)) {
            return self.place(now, id);
        }
        match verdict {
            Verdict::Place(choice) => {
                self.grant(now, id, choice);
                true
            }
            Verdict::Wait | Verdict::HeldBack { .. } => {
                self.note_wait(id, &verdict);
                unfit.into_iter().for_each(|kind| self.queue.set_unfit(rank.key, kind));
                self.go_round();
                false
            }
        }
    }

    /// Under `round-robin`, the next look begins behind the workers that the last one found full.
    fn go_round(&mut self) {
        if self.config.policy == Policy::RoundRobin && self.workers.len() > LOOK_MAX {
            self.last_chosen = self.workers.after(self.last_chosen).nth(LOOK_MAX - 1).map(Worker::id);
        }
    }

    /// The input of a placement decision.
    pub(super) fn scene(&self, now: MonoTime) -> Scene<'_> {
        let (policy, workers, slos, outgrown) = (self.config.policy, &self.workers, &self.slos, &self.outgrown);
        Scene { now, policy, workers, slos, outgrown, last_chosen: self.last_chosen }
    }

    /// Puts a task into the queue. A task that was there before returns to its old place.
    pub(super) fn enqueue(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        let mut rank = match task.rank {
            Some(rank) => rank,
            None => rate(now, task, &mut self.queue, &self.workers, &self.config),
        };
        let is_measured = predict::models(task).all(|(digest, _)| self.workers.fleet().run_us(digest, 1) > 0);
        self.paces[rank.key.lane.index()].joined(self.queue.lane_len(rank.key.lane), is_measured);
        self.queue.push(now, &mut rank, &task.spec);
        (task.rank, task.state) = (Some(rank), State::Queued { claims_at: None });
    }

    /// Lets the waiting of tasks count whose turn has come.
    pub(super) fn take_turns(&mut self, now: MonoTime) {
        for id in self.queue.take_turns(now) {
            if let Some(rank) = self.tasks.get_mut(id).and_then(|task| task.rank.as_mut()) {
                rank.come_due(now);
            }
        }
    }

    /// Reorders a lane once its models prove to cost much more or less than was assumed.
    pub(super) fn weigh_again(&mut self, now: MonoTime) {
        for id in self.queue.take_stale(now) {
            let Some(task) = self.tasks.get_mut(id) else { continue };
            let Some(mut rank) = task.rank.filter(|_| task.is_queued()) else { continue };
            let (item_us, tenant) = (item_us(task, &self.workers), self.config.tenant(task.spec.client));
            self.queue.weigh_again(now, &mut rank, &task.spec, item_us, tenant);
            // Its cost is charged anew, also if it went to a worker before and came back.
            (task.rank, task.is_dispatched) = (Some(rank), false);
        }
    }

    /// Rates a task on its arrival.
    pub(super) fn rate(&mut self, now: MonoTime, task: &Task) -> Rank {
        rate(now, task, &mut self.queue, &self.workers, &self.config)
    }
}

fn rate(now: MonoTime, task: &Task, queue: &mut Queue, workers: &Workers, config: &Config) -> Rank {
    queue.rate(now, &task.spec, item_us(task, workers), config.tenant(task.spec.client))
}

/// Slot time that one item of the task is expected to need, microseconds.
fn item_us(task: &Task, workers: &Workers) -> u64 {
    workers.fleet().item_us(predict::models(task).map(|(digest, _)| digest))
}
