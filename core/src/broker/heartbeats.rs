//! Handles the messages of workers: registrations, heartbeats, good-byes; and what follows from their silence.
//!
//! A heartbeat names all attempts that its worker holds. Compared with those that it should hold, it repairs whatever was
//! lost on the way.

use proto_msgs::{
    AttemptId, AttemptState, BrokerToWorker, Direction, Epoch, ErrorCode, Heartbeat, HeartbeatAck, Leave, Outcome,
    PeerId, PublicKey, Register, WorkerId, WorkerToBroker,
};

use super::{
    Broker,
    api::{Action, Change},
    outcomes,
    placement::predict,
    task::{Last, Place, State, Task},
    workers::worker::Worker,
};
use crate::{MonoTime, Rule};

impl Broker {
    pub(super) fn worker_said(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, message: WorkerToBroker) {
        match message {
            WorkerToBroker::Register(register) => self.registered(now, peer, key, register),
            WorkerToBroker::Heartbeat(heartbeat) => self.heartbeat(now, peer, key, heartbeat),
            WorkerToBroker::Leave(leave) => self.left(now, key, leave),
        }
    }

    /// Whether a message about the worker came over a connection with the key that the worker registered.
    fn is_workers_key(&self, id: WorkerId, key: Option<PublicKey>) -> bool {
        !self.config.encrypted || self.workers.get(id).is_none_or(|worker| worker.register.key == key)
    }

    fn registered(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, register: Register) {
        let (id, epoch) = (register.worker, register.epoch);
        let known = self.workers.get(id);
        let is_new = known.is_none();
        let forged = self.config.encrypted && (key.is_none() || register.key != key || !self.is_workers_key(id, key));
        if forged {
            self.counters.forbidden += 1;
            return;
        }
        match known.map(|worker| worker.register.epoch) {
            Some(newer) if newer > epoch => return self.earlier_life_said(now, peer, id, epoch),
            Some(older) if older < epoch => self.lose_worker(now, id),
            _ => {}
        }
        if is_new && self.workers.len() >= self.config.workers_max {
            self.counters.workers_refused += 1;
            return;
        }
        self.workers.register(now, peer, register);
        self.watch(id);
        self.save_worker(now, id);
    }

    fn heartbeat(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, heartbeat: Heartbeat) {
        let (id, epoch, seq) = (heartbeat.worker, heartbeat.epoch, heartbeat.seq);
        if !self.is_workers_key(id, key) {
            self.counters.forbidden += 1;
            return;
        }
        self.counters.heartbeats += 1;
        if self.workers.get(id).is_some_and(|worker| worker.register.epoch > epoch) {
            return self.earlier_life_said(now, peer, id, epoch);
        }
        let known = self.workers.has_life(id, epoch);
        let is_news = known && self.workers.last_seq(id, epoch).is_none_or(|last| seq > last);
        let (forget, stop) = if is_news {
            self.workers.seen(id, now, peer);
            self.news(now, id, heartbeat)
        } else {
            Default::default()
        };
        let broker_unix_ms = self.unix_ms(now);
        let ack = HeartbeatAck { worker: id, epoch, seq, known, broker_unix_ms, forget, stop };
        self.actions.push(Action::TellWorker { peer, message: BrokerToWorker::HeartbeatAck(ack) });
    }

    /// Compares the attempts in a heartbeat with those the worker should hold. Returns which to forget and which to
    /// stop.
    fn news(&mut self, now: MonoTime, id: WorkerId, heartbeat: Heartbeat) -> (Vec<AttemptId>, Vec<AttemptId>) {
        let (mut forget, mut stop) = (Vec::new(), Vec::new());
        let epoch = heartbeat.epoch;
        for report in &heartbeat.attempts {
            let wanted = self.is_wanted(id, report.id);
            match &report.state {
                AttemptState::Finished(outcome) => {
                    if wanted {
                        self.attempt_finished(now, id, epoch, report.id, outcome.clone());
                    } else if self.is_superseded(report.id) || self.has_failed(report.id) {
                        stop.push(report.id); // Nobody will fetch its result.
                    }
                    if self.workers.get(id).is_some_and(|worker| worker.has(report.id)) {
                        self.workers.release(now, id, report.id); // It takes no slot, whoever still wants its result.
                    }
                    if self.may_be_forgotten(report.id) {
                        forget.push(report.id);
                    }
                }
                _ if wanted => self.attempt_named(now, id, epoch, report.id),
                _ => {
                    self.counters.fenced += 1;
                    stop.push(report.id);
                }
            }
        }
        for vanished in self.workers.heartbeat(now, id, heartbeat) {
            self.attempt_vanished(now, id, vanished);
        }
        self.save_worker(now, id);
        self.fill(now, id);
        if !self.config.rules.holds(Rule::ForgetFinished) {
            forget.clear();
        }
        (forget, stop)
    }

    /// Whether an attempt that a worker reports should go on. An unknown task counts as wanted: it may be from before a
    /// restart of the broker, and the worker itself sees whether the client is still there. A task of this broker's
    /// life is wanted only where it was granted.
    fn is_wanted(&self, worker: WorkerId, id: AttemptId) -> bool {
        let Some(task) = self.tasks.get(id.task) else {
            return true;
        };
        if !task.track.is_from_before && !task.track.was_given_to(worker, id.attempt) {
            return false;
        }
        // Only a placement elsewhere counts, not a grant: the client has gone to this worker.
        let is_current = task.is_placed() && task.track.attempt == id.attempt;
        let elsewhere = is_current && task.place().is_some_and(|at| at.worker != worker);
        !task.is_ended() && !elsewhere && !task.track.is_past(id.attempt)
    }

    /// Whether the worker may stop reporting a finished attempt. The end of a detached task is safe only once it is
    /// stored: until then the worker repeats it, in case this broker dies.
    fn may_be_forgotten(&self, id: AttemptId) -> bool {
        !self.tasks.get(id.task).is_some_and(Task::awaits_store) || !self.config.rules.holds(Rule::StoreBeforeForget)
    }

    /// Whether the attempt's task is detached, has ended without a result, and the store knows that: its data only
    /// takes room at the worker.
    fn has_failed(&self, id: AttemptId) -> bool {
        let ended = self.tasks.get(id.task).filter(|task| task.spec.detached && !task.awaits_store());
        ended.and_then(Task::end).is_some_and(|end| !matches!(end.outcome, Outcome::Done { .. }))
    }

    /// Whether a later attempt of the task has replaced this one.
    fn is_superseded(&self, id: AttemptId) -> bool {
        self.tasks.get(id.task).is_some_and(|task| task.track.is_past(id.attempt))
    }

    /// A heartbeat names a wanted attempt: the task is placed at that worker, whatever the broker assumed before.
    fn attempt_named(&mut self, now: MonoTime, worker: WorkerId, epoch: Epoch, id: AttemptId) {
        let Some(task) = self.tasks.get_mut(id.task) else {
            return;
        };
        let at = Place { worker, epoch, direction: task.place().map_or(Direction::ClientDials, |at| at.direction) };
        task.track.away_since = None;
        // If the worker had missed the client, both have met since: it takes an attempt in anew once it has forgotten it.
        task.track.finished = None;
        if task.track.attempt == id.attempt && task.state == (State::Placed { at, unnamed_until: None }) {
            let is_unbooked = |known: &&Worker| !known.has(id) || known.occupancy.is_stranger(id);
            let known = self.workers.get(worker).filter(is_unbooked);
            if let Some(held) = known.map(|known| predict::held(task, Some(known))) {
                // From before the worker was lost, or this broker began; now it is known whose it is.
                self.workers.occupy(now, worker, id, held);
            }
            return;
        }
        self.turned_up(now, id, at, None);
        self.reschedule(id.task);
    }

    /// Places the task where its attempt has turned up, and frees its place in the queue or at another worker. If only
    /// the client names the attempt, it takes a slot only if this broker granted it or an earlier one may have: a
    /// client's word alone takes no slot.
    pub(super) fn turned_up(&mut self, now: MonoTime, id: AttemptId, at: Place, unnamed_until: Option<MonoTime>) {
        self.leave_queue(id.task);
        let Some(task) = self.tasks.get_mut(id.task) else { return };
        let promised = task.attempt_id();
        let (here, elsewhere) = match task.place() {
            Some(place) if place.worker == at.worker && promised == id => (true, None),
            place => (false, place),
        };
        if !here {
            task.promise.drop_watch(); // Not granted by this life of the broker.
        }
        let known = self.workers.get(at.worker);
        let name = known.map_or_else(String::new, |known| known.register.name.clone());
        task.track.last = Some(Last { worker: at.worker, epoch: at.epoch, name });
        (task.track.attempt, task.state) = (id.attempt, State::Placed { at, unnamed_until });
        let is_named = unnamed_until.is_none() || known.is_some_and(|known| known.has(id));
        let (held, detached) = (predict::held(task, known), task.spec.detached);
        if is_named || here || !self.is_settled(now) {
            self.workers.occupy(now, at.worker, id, held);
        }
        if detached {
            self.save_task(id.task);
        }
        if let Some(other) = elsewhere {
            self.workers.release_unnamed(now, other.worker, promised);
        }
        if let Some(other) = elsewhere.filter(|other| other.worker != at.worker) {
            self.fill(now, other.worker);
        }
    }

    /// A heartbeat reports that a wanted attempt has ended.
    fn attempt_finished(&mut self, now: MonoTime, worker: WorkerId, epoch: Epoch, id: AttemptId, outcome: Outcome) {
        let Some(task) = self.tasks.get(id.task) else { return };
        let is_elsewhere = task.place().is_some_and(|at| at.worker != worker);
        if is_elsewhere && !(task.spec.detached && matches!(outcome, Outcome::Done { .. })) {
            return; // From before a restart: its client has asked for another place since.
        }
        self.attempt_named(now, worker, epoch, id);
        self.workers.release(now, worker, id);
        let Some(task) = self.tasks.get_mut(id.task) else { return };
        let is_missed = matches!(&outcome, Outcome::Failed(failure) if failure.code == ErrorCode::ClientGone);
        if task.spec.detached && !is_missed {
            let outcome = outcomes::without_more_memory(outcome);
            task.track.finished = Some(outcome.clone());
            return self.end(now, id.task, outcome);
        }
        // Also if the worker missed its client: perhaps only their link broke, and the client will ask for another
        // place.
        task.track.finished = Some(outcome);
        self.reschedule(id.task);
    }

    /// A heartbeat no longer names an attempt that an earlier heartbeat named.
    fn attempt_vanished(&mut self, now: MonoTime, worker: WorkerId, id: AttemptId) {
        let Some(task) = self.tasks.get(id.task) else { return };
        let is_current = task.track.attempt == id.attempt && task.place().is_some_and(|at| at.worker == worker);
        if !is_current || task.track.finished.is_some() {
            return;
        }
        if task.spec.detached {
            self.end(
                now,
                id.task,
                Outcome::failed(ErrorCode::WorkerLost, "the worker no longer has the task: submit it again"),
            );
        } else {
            self.note(id.task);
        }
    }

    fn left(&mut self, now: MonoTime, key: Option<PublicKey>, leave: Leave) {
        let is_this_life = self.workers.get(leave.worker).is_some_and(|worker| worker.register.epoch == leave.epoch);
        if is_this_life && self.is_workers_key(leave.worker, key) {
            self.lose_worker(now, leave.worker);
        }
    }

    /// Removes a worker, or an earlier life of it. Its clients are told to look at their links; they decide what
    /// follows.
    fn lose_worker(&mut self, now: MonoTime, id: WorkerId) {
        let Some(worker) = self.workers.remove(id) else { return };
        self.worker_looks.remove(id);
        self.twins.forget(id);
        if self.config.rules.holds(Rule::ForgetLostWorkers) {
            self.slos.forget(id);
        }
        if self.config.shows_workers {
            self.actions.push(Action::Save(Change::DropWorker(id)));
        }
        for attempt in worker.occupancy.ids() {
            let Some(task) = self.tasks.get_mut(attempt.task) else {
                continue;
            };
            if task.track.attempt != attempt.attempt || task.place().is_none_or(|at| at.worker != id) {
                continue;
            }
            task.track.away_since = Some(now);
            if !task.spec.detached {
                self.note(attempt.task);
            }
        }
    }

    fn watch(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get(id) {
            self.worker_looks.by(id, worker.dead_at(self.config.liveness_beats));
        }
    }

    fn save_worker(&mut self, now: MonoTime, id: WorkerId) {
        if !self.config.shows_workers {
            return; // The row would be made with every heartbeat, for nobody.
        }
        let now_unix_ms = self.unix_ms(now);
        if let Some(worker) = self.workers.get(id) {
            let violation_permille = self.slos.violation_permille(now, id);
            let record = worker.record(now_unix_ms, self.config.liveness_beats, violation_permille);
            self.actions.push(Action::Save(Change::PutWorker(Box::new(record))));
        }
    }

    pub(super) fn look_at_worker(&mut self, now: MonoTime, id: WorkerId) {
        let Some(worker) = self.workers.get(id) else { return };
        let dead_at = worker.dead_at(self.config.liveness_beats);
        if dead_at > now {
            self.worker_looks.by(id, dead_at);
        } else if self.config.rules.holds(Rule::NoticeDeadWorkers) {
            self.counters.workers_lost += 1;
            self.lose_worker(now, id);
        }
    }
}
