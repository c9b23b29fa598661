//! Handles the messages of clients and answers them.

use proto_msgs::{
    Attempt, AttemptId, BrokerToClient, BrokerToWorker, CancelTask, ClientId, ClientToBroker, Close, Direction,
    ErrorCode, Failure, Locate, Noted, Outcome, PeerId, PublicKey, Purpose, Queued, Standing, Submit, TaskId, WorkerId,
};

use super::{
    Action, Broker, Change,
    grants::Way,
    outcomes,
    placement::{
        obstacle,
        reasons::{self, Waits},
    },
    refusals,
    task::{Awaiting, End, Place, Row, State, Task},
    workers::worker::Worker,
};
use crate::{MonoTime, Rule};

impl Broker {
    pub(super) fn client_said(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, message: ClientToBroker) {
        match message {
            ClientToBroker::Submit(submit) if self.config.encrypted && submit.spec.key != key => {
                self.counters.forbidden += 1;
                self.refuse(peer, submit.spec.task, ErrorCode::Forbidden, "the key named is not the connection's key");
            }
            ClientToBroker::Submit(submit) => {
                let id = submit.spec.task;
                self.submit(now, peer, submit);
                self.reschedule(id);
            }
            ClientToBroker::Close(close) => self.close(now, key, close),
            ClientToBroker::Cancel(cancel) => self.cancel(now, peer, key, cancel),
            ClientToBroker::Locate(locate) => self.locate(now, peer, key, locate),
            ClientToBroker::Ask(ask) => self.ask(now, peer, key, ask),
        }
    }

    /// The task if it is this client's.
    pub(super) fn owned(&self, id: TaskId, client: ClientId, key: Option<PublicKey>) -> Option<&Task> {
        self.tasks.get(id).filter(|task| self.is_owner(task, client, key))
    }

    /// The task, or the remembered record of a task that was turned away, if it is this client's.
    pub(super) fn shown(&self, id: TaskId, client: ClientId, key: Option<PublicKey>) -> Option<&Task> {
        let task = self.tasks.get(id).or_else(|| self.turned_away.get(id));
        task.filter(|task| self.is_owner(task, client, key))
    }

    fn is_owner(&self, task: &Task, client: ClientId, key: Option<PublicKey>) -> bool {
        let key = if self.config.encrypted { key } else { task.spec.key };
        !self.config.rules.holds(Rule::AnswerOwnerOnly) || task.belongs_to(client, key)
    }

    fn submit(&mut self, now: MonoTime, peer: PeerId, submit: Submit) {
        let id = submit.spec.task;
        if self.tasks.get(id).is_none() {
            return self.first_submit(now, peer, submit);
        }
        if self.owned(id, submit.spec.client, submit.spec.key).is_none() {
            self.counters.forbidden += 1;
            return self.refuse(peer, id, ErrorCode::Conflict, "this task id is in use by another client");
        }
        let Some(task) = self.tasks.get_mut(id) else { return };
        task.owner.speaks(now, peer);
        if task.end().is_some_and(|end| end.is_abandoned) {
            // The client was only silent for long, and still wants its result.
            self.tasks.revive(now, id);
            self.enqueue(now, id);
        }
        let Some(task) = self.tasks.get_mut(id) else { return };
        // A client's addresses may change while it waits.
        task.owner.endpoints.clone_from(&submit.endpoints);
        if let Some(End { outcome, .. }) = task.end() {
            // A client leaves when it hears that its detached task is done or cancelled, so that must be stored first.
            let waits = task.awaits_store() && !matches!(outcome, Outcome::Failed(_));
            return if waits { self.note(id) } else { self.say_ended(id, Some(peer)) };
        }
        let named = named_in(&submit.standing);
        if named < task.owner.named {
            return self.answer_again(now, id);
        }
        task.owner.named = named;
        match submit.standing {
            Standing::Asking => self.asking(now, id),
            Standing::Holding { attempt, worker } => self.holding(now, id, attempt, worker),
            Standing::Lost { attempt, worker, outcome } => self.lost(now, id, attempt, worker, outcome),
        }
    }

    /// Handles the submit of an unknown task: it is new, or from before a restart.
    fn first_submit(&mut self, now: MonoTime, peer: PeerId, submit: Submit) {
        let Submit { mut spec, endpoints, standing } = submit;
        let id = spec.task;
        let (lane, tenant) = (self.config.lane(&spec), self.config.tenant(spec.client));
        (spec.lane, spec.priority) = (Some(lane), spec.priority.min(tenant.priority_max));
        if let Some((failure, retry_after_ms)) = self.no_place_for(now, &spec, &standing, lane) {
            return self.turn_away(now, peer, spec, failure, retry_after_ms);
        }
        self.turned_away.forget(id);
        let detached = spec.detached;
        let mut task = Task::new(spec, now, self.unix_ms(now));
        (task.owner.peer, task.owner.endpoints) = (Some(peer), endpoints);
        task.owner.named = named_in(&standing);
        task.track.is_from_before = !self.is_settled(now) || standing != Standing::Asking;
        task.rank = Some(self.rate(now, &task));
        if let Some(failure) = self.hopeless(now, &mut task, &standing) {
            return self.refuse_for_good(now, peer, task, failure);
        }
        task.is_judged = self.is_settled(now);
        self.counters.submitted += 1;
        task.promise.stream = self.slos.stream(now, &task.spec);
        task.row = if detached { Row::Told } else { Row::Absent };
        let must_store = detached && self.config.rules.holds(Rule::AcknowledgeAfterStore);
        let due = self.due_of(&task);
        if detached {
            self.actions.push(Action::Save(Change::PutTask { record: Box::new(task.record()), durable: true }));
        }
        self.tasks.insert(task, due);
        if !must_store {
            self.enqueue(now, id);
        }
        match standing {
            Standing::Holding { attempt, worker } if self.config.rules.holds(Rule::BelieveHoldingClients) => {
                self.holding(now, id, attempt, worker);
            }
            Standing::Lost { attempt, worker, outcome } => self.lost(now, id, attempt, worker, outcome),
            _ if must_store => {}
            _ => self.asking(now, id),
        }
    }

    /// Repeats the current answer. A late message changes nothing, but the answer may be news to the client.
    fn answer_again(&mut self, now: MonoTime, id: TaskId) {
        match self.tasks.get(id).map(|task| &task.state) {
            Some(State::Granted { .. }) => self.say_granted(now, id),
            Some(State::Placed { .. }) => self.note(id),
            Some(State::Storing | State::Queued { .. }) => self.say_queued(now, id),
            Some(State::Ended(_)) | None => {}
        }
    }

    /// The client has no worker: grants it one, or tells it what the task waits for.
    pub(super) fn asking(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        match task.state {
            State::Queued { .. } => {
                if !self.place(now, id) {
                    self.say_queued(now, id);
                }
            }
            State::Storing => self.say_queued(now, id),
            State::Granted { .. } | State::Placed { .. } if self.is_void(task) => {
                self.enqueue(now, id);
                self.asking(now, id);
            }
            State::Granted { .. } | State::Placed { .. } => self.grant_again(now, id),
            State::Ended(_) => {}
        }
    }

    /// Whether the worker of a grant or placement is gone, so that the task must wait again. Its client is still
    /// asking.
    fn is_void(&self, task: &Task) -> bool {
        match task.state {
            State::Granted { at, .. } => {
                let promised = self.workers.get(at.worker).is_some_and(|worker| worker.has(task.attempt_id()));
                !promised || !self.workers.has_life(at.worker, at.epoch)
            }
            // A detached task may be fine and this message late: its worker comes back with it, or patience ends.
            State::Placed { at, .. } => {
                let is_over = task.track.finished.is_some() || !self.workers.has_life(at.worker, at.epoch);
                is_over && !task.spec.detached
            }
            State::Storing | State::Queued { .. } | State::Ended(_) => false,
        }
    }

    /// The client holds an attempt at a worker: the task is placed there, whatever the broker assumed before.
    fn holding(&mut self, now: MonoTime, id: TaskId, attempt: Attempt, worker: WorkerId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if task.track.is_past(attempt) {
            // A late message, or a client that missed the current attempt's grant.
            if matches!(task.state, State::Granted { .. }) {
                self.say_granted(now, id);
            }
            return;
        }
        let here = task.place().filter(|at| at.worker == worker && task.track.attempt == attempt);
        if !task.is_placed() || here.is_none() {
            let epoch = self.workers.get(worker).map(|known| known.register.epoch).unwrap_or_default();
            let at = here.unwrap_or(Place { worker, epoch, direction: Direction::ClientDials });
            self.turned_up(now, AttemptId { task: id, attempt }, at, Some(self.named_by(now, worker)));
        } else if self.awaits_dial(id) {
            // The order to dial may have got lost.
            self.say_granted(now, id);
        }
        self.note(id);
    }

    /// Whether the worker was told to dial the client and has not named the attempt yet.
    fn awaits_dial(&self, id: TaskId) -> bool {
        matches!(self.tasks.get(id).map(|task| &task.state), Some(State::Placed { at, unnamed_until: Some(_) })
            if at.direction == Direction::WorkerDials)
    }

    /// The client reports that its attempt was lost.
    fn lost(&mut self, now: MonoTime, id: TaskId, attempt: Attempt, worker: WorkerId, outcome: Outcome) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if task.track.is_past(attempt) {
            return self.asking(now, id); // Said before, and answered.
        }
        let (place, current) = (task.place(), task.attempt_id());
        let lost = AttemptId { task: id, attempt };
        let is_current = attempt == task.track.attempt && place.is_some_and(|at| at.worker == worker);
        // If this broker has not placed the task, an earlier one may have: only the client knows where.
        let is_to_blame = task.track.was_given_to(worker, attempt) || task.track.attempt == Attempt(0);
        if is_current {
            self.learn(now, id, &outcome);
        }
        let Some(task) = self.tasks.get_mut(id) else { return };
        task.track.lose(attempt);
        if is_to_blame {
            task.blame(now, self.workers.get(worker), worker, place, &outcome);
        }
        if !self.config.rules.holds(Rule::PoisonStops) {
            task.doubts.failures = 0;
        }
        if let Some(at) = place.filter(|_| is_current) {
            self.suspect(now, id, at, &outcome);
        }
        self.counters.retried += 1;
        self.free_place(now, worker, lost);
        if let Some(at) = place {
            // After a restart, the task may have been granted another place meanwhile.
            self.workers.release_unnamed(now, at.worker, current);
        }
        // What is not in the store yet waits for that first.
        if self.tasks.get(id).is_some_and(|task| !task.is_queued() && task.state != State::Storing) {
            self.enqueue(now, id);
        }
        self.after_loss(now, id, outcome);
        self.fill(now, worker);
    }

    /// Continues a task after a lost attempt: it waits again, is given up, or is held back until either is clear.
    pub(super) fn after_loss(&mut self, now: MonoTime, id: TaskId, outcome: Outcome) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        task.doubts.convict(now, &self.workers);
        if task.doubts.is_poisonous() {
            let outcome = task.doubts.poisonous();
            self.counters.poisonous += 1;
            return self.end_and_tell(now, id, outcome);
        }
        task.doubts.held_back = task.doubts.may_be_poisonous().then(|| outcome.clone());
        let is_last = task.doubts.failures >= self.config.attempts_max || !outcome.is_retryable();
        let (is_free, failures) = (task.doubts.held_back.is_none(), task.doubts.failures);
        if is_free && (is_last || outcomes::is_outgrown(&outcome) && self.fits_nowhere(now, id)) {
            return self.end_and_tell(now, id, exhausted(failures, outcome));
        }
        if is_free && outcomes::is_too_large(&outcome) && self.is_too_large_everywhere(now, id) {
            return self.end_and_tell(now, id, outcome);
        }
        self.asking(now, id);
    }

    /// Whether there are workers, and none could ever run the task.
    fn fits_nowhere(&mut self, now: MonoTime, id: TaskId) -> bool {
        let Some(task) = self.tasks.get(id).filter(|_| self.is_settled(now)) else { return false };
        let (failure, looked) = reasons::never_fits(task, &self.workers);
        self.counters.candidates_looked += looked;
        failure.is_some()
    }

    /// Whether every worker that could run the task has said that it can never hold what the task brings. A broker that
    /// has just started does not know all workers: it lets the task try again. So does one with very many.
    fn is_too_large_everywhere(&mut self, now: MonoTime, id: TaskId) -> bool {
        let is_settled = self.is_settled(now);
        let Some(task) = self.tasks.get_mut(id) else { return false };
        if !is_settled || self.workers.len() > reasons::NEVER_LOOK_MAX {
            task.doubts.too_small.clear();
            return false;
        }
        let too_small = |worker: &Worker| task.doubts.too_small.contains(&worker.id());
        let may_hold = |worker: &Worker| !too_small(worker) && obstacle::ever(task, worker).next().is_none();
        !self.workers.after(None).any(may_hold)
    }

    /// Stops an attempt and frees its slot. If a heartbeat has named the attempt, heartbeats say when the slot is free.
    pub(super) fn free_place(&mut self, now: MonoTime, worker: WorkerId, id: AttemptId) {
        self.workers.release_unnamed(now, worker, id);
        self.tell_worker(worker, BrokerToWorker::Stop(id));
    }

    fn close(&mut self, now: MonoTime, key: Option<PublicKey>, close: Close) {
        let Some(task) = self.owned(close.task, close.client, key).filter(|task| !task.is_ended()) else {
            return;
        };
        let (id, place) = (task.attempt_id(), task.place());
        let is_over = !matches!(close.outcome, Outcome::Cancelled);
        if let Some(at) = place.filter(|_| is_over && close.attempt == id.attempt) {
            // The run ended at the worker before the client had the result, so the slot is free.
            self.workers.release(now, at.worker, id);
        }
        self.end(now, close.task, close.outcome);
        if let Some(at) = place {
            self.fill(now, at.worker);
        }
    }

    fn cancel(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, cancel: CancelTask) {
        let Some(task) = self.owned(cancel.task, cancel.client, key) else {
            return self.refuse(peer, cancel.task, ErrorCode::NotFound, "no such task, or it is somebody else's");
        };
        let (submitter, place) = (task.owner.peer, task.place());
        if !task.is_ended() {
            self.end(now, cancel.task, Outcome::Cancelled);
        }
        let Some(task) = self.tasks.get_mut(cancel.task) else { return };
        if let Some(end) = task.end_mut().filter(|end| end.is_abandoned) {
            // Its client, silent until now, shall not bring it back.
            (end.outcome, end.is_abandoned) = (Outcome::Cancelled, false);
        }
        if !task.awaits_store() || !self.config.rules.holds(Rule::StoreBeforeCancelled) {
            self.say_ended(cancel.task, submitter);
            self.say_ended(cancel.task, Some(peer).filter(|_| submitter != Some(peer)));
        } else if self.store_ok {
            if let Some(end) = task.end_mut() {
                end.cancelled_by = Some(peer);
            }
        } else {
            let text = "the task is stopped, but the store does not answer: a restart of the broker would bring it back; \
                        cancel it again later";
            self.refuse(peer, cancel.task, ErrorCode::StoreAway, text);
        }
        if let Some(at) = place {
            self.fill(now, at.worker);
        }
    }

    pub(super) fn locate(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, locate: Locate) {
        let Some(task) = self.owned(locate.task, locate.client, key) else {
            return self.refuse(peer, locate.task, ErrorCode::NotFound, "no such task, or it is somebody else's");
        };
        let is_done = task.end().is_some_and(|end| matches!(end.outcome, Outcome::Done { .. }));
        // Nobody hears of a cancel before the store does: a restart would bring the task back.
        let is_being_cancelled = self.config.rules.holds(Rule::StoreBeforeCancelled)
            && task.awaits_store()
            && task.end().is_some_and(|end| end.outcome == Outcome::Cancelled);
        if !is_done && task.is_ended() && !is_being_cancelled {
            return self.say_ended(locate.task, Some(peer));
        }
        if !task.spec.detached {
            return self.refuse(
                peer,
                locate.task,
                ErrorCode::ResultGone,
                "its result went to the client that submitted it",
            );
        }
        let keeper = task.track.last_worker().and_then(|worker| self.workers.get(worker));
        let (Some(worker), true) = (keeper, is_done) else {
            let (id, worker_alive) = (task.attempt_id(), keeper.is_some());
            let noted = Noted { id, worker_alive, durable: self.is_durable(task) };
            let is_queued = task.is_queued();
            if let Some(task) = self.tasks.get_mut(locate.task) {
                task.owner.awaited_by = Some(Box::new(Awaiting { peer, key, locate }));
            }
            if is_queued {
                return self.say_queued_to(now, id.task, Some(peer));
            }
            return self.tell_client(Some(peer), BrokerToClient::Noted(noted));
        };
        let worker = worker.id();
        let direction = self.way_to_result(&locate, worker);
        let way = Way { worker, direction, endpoints: locate.endpoints, client_key: locate.key };
        self.introduce(now, locate.task, Purpose::Fetch, Some(peer), way);
    }

    /// The direction of the connection that fetches a result: the task's own, or the other one if that failed.
    fn way_to_result(&mut self, locate: &Locate, worker: WorkerId) -> Direction {
        let (Some(task), Some(worker)) = (self.tasks.get_mut(locate.task), self.workers.get(worker)) else {
            return Direction::ClientDials;
        };
        task.owner.endpoints.clone_from(&locate.endpoints);
        if let Some(direction) = locate.unreachable {
            task.doubts.shut_only(worker.id(), direction);
        }
        task.way_to(worker).unwrap_or(Direction::ClientDials)
    }

    // Answers.

    pub(super) fn say_queued(&mut self, now: MonoTime, id: TaskId) {
        let submitter = self.tasks.get(id).and_then(|task| task.owner.peer);
        self.say_queued_to(now, id, submitter);
    }

    /// Tells a client what a task waits for: its submitter, or one that waits for its result.
    fn say_queued_to(&mut self, now: MonoTime, id: TaskId, peer: Option<PeerId>) {
        let Some(task) = self.tasks.get(id) else { return };
        let (position, waits) = match task.state {
            State::Queued { .. } => {
                let position = task.rank.map_or(0, |rank| self.queue.position(now, &rank));
                (position, self.waits_for(now, task))
            }
            State::Storing => (0, Waits::for_now("waiting for the store to have it")),
            _ => (0, Waits::for_now("waiting for room at its worker")),
        };
        let Waits { reason, no_worker_fits } = waits;
        let is_in_store =
            matches!(task.row, Row::Confirmed(_)) || !self.config.rules.holds(Rule::AcknowledgeAfterStore);
        let durable = task.has_row() && task.state != State::Storing && is_in_store;
        let starts_in_ms = self.starts_in_ms(now, task, position);
        let queued = Queued { task: id, position, reason, no_worker_fits, starts_in_ms, durable };
        self.tell_client(peer, BrokerToClient::Queued(queued));
    }

    /// The reason why a task still waits.
    pub(super) fn waits_for(&self, now: MonoTime, task: &Task) -> Waits {
        if !task.owner.hears(now, self.config.quiet_in_force()) {
            return Waits::for_now(
                "nothing has been heard lately of its client, nor of a worker that may have its inputs",
            );
        }
        if task.doubts.held_back.is_some() {
            return Waits::for_now(
                "workers were lost while they had it, and it is not known yet whether it was the cause",
            );
        }
        let are_all = |is: &dyn Fn(&Worker) -> bool| self.workers.len() > 0 && self.workers.after(None).all(is);
        if are_all(&|worker| task.doubts.is_silent(worker.id(), worker.seen)) {
            return Waits::for_now(
                "the workers that fit were cut off from it or failed it, and have not been heard since",
            );
        }
        if task.doubts.is_pausing(now) && are_all(&|worker| task.doubts.avoid.contains(&worker.id())) {
            return Waits::for_now("the workers that fit failed it a moment ago and get a while to recover");
        }
        reasons::waits_for(task, &self.workers, self.is_settled(now))
    }

    /// Predicted time until a waiting task is placed: by what the tasks before it cost if that was measured, else by the
    /// lane's pace. `None` if neither is known.
    fn starts_in_ms(&self, now: MonoTime, task: &Task, position: u32) -> Option<u32> {
        let lane = task.is_queued().then(|| task.lane())?;
        let pace = &self.paces[lane.index()];
        let slots = u64::from(self.workers.totals().usable_slots(lane));
        let before_us = if pace.is_assumed {
            pace.time_for_us(now, u64::from(position) + 1)
        } else {
            self.queue.several_us(lane, position).checked_div(slots)
        };
        Some(u32::try_from(before_us? / 1000).unwrap_or(u32::MAX))
    }

    /// Tells a client that holds an attempt whether the attempt's worker is heard.
    pub(super) fn note(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        let attempt_id = task.attempt_id();
        let is_over = task.track.finished.is_some() || task.is_ended();
        let worker = task.track.last_worker().and_then(|worker| self.workers.get(worker));
        let worker_alive = worker.is_some_and(|worker| worker.has(attempt_id) || is_over);
        let noted = Noted { id: attempt_id, worker_alive, durable: self.is_durable(task) };
        let peer = task.owner.peer;
        self.tell_client(peer, BrokerToClient::Noted(noted));
    }

    pub(super) fn say_ended(&mut self, id: TaskId, peer: Option<PeerId>) {
        if let Some(end) = self.tasks.get(id).and_then(Task::end) {
            let ended = refusals::ended(id, end.outcome.clone());
            self.tell_client(peer, BrokerToClient::Ended(ended));
        }
    }
}

/// The newest attempt that this message's sender knows of.
fn named_in(standing: &Standing) -> Attempt {
    match standing {
        Standing::Asking => Attempt(0),
        Standing::Holding { attempt, .. } | Standing::Lost { attempt, .. } => *attempt,
    }
}

/// The outcome of a task that no worker could finish: the last failure, and the number of attempts.
fn exhausted(failures: u32, last: Outcome) -> Outcome {
    match last {
        outgrown if outcomes::is_outgrown(&outgrown) => outcomes::without_more_memory(outgrown),
        Outcome::Failed(Failure { code, text }) if code.is_retryable() => {
            let code = if code == ErrorCode::Unreachable { code } else { ErrorCode::AttemptsExhausted };
            Outcome::failed(code, format!("{failures} attempts failed, the last one: {text}"))
        }
        other => other,
    }
}
