//! Effects of time and of the store on tasks: storing, waiting too long, ending, coming back after a restart.

use std::time::Duration;

use proto_msgs::{Direction, ErrorCode, Outcome, TaskId};

use super::{
    Action, Broker, Change, Footing, TaskRecord,
    task::{End, Last, Place, Row, State, Task},
};
use crate::{DEADLINE_PASSED, MonoTime, Rule};

/// Age at which a task is shown in the store. To show shorter ones costs more than it helps: nobody could look in time.
const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// Shortest pause after a look at a task that found nothing to change, whatever is overdue.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Broker {
    /// The store has a record of a task. That decides what clients of detached tasks may hear; waiting ones hear it at
    /// once.
    pub(super) fn stored(&mut self, now: MonoTime, id: TaskId, footing: Footing) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        if task.has_row() {
            task.row = Row::Confirmed(footing);
        }
        let (is_in_store, peer) = (task.is_in_store(), task.owner.peer);
        match &mut task.state {
            State::Storing => {
                self.enqueue(now, id);
                self.asking(now, id);
            }
            State::Placed { .. } if is_in_store => self.note(id),
            State::Ended(End { outcome: Outcome::Done { .. } | Outcome::Cancelled, cancelled_by, .. })
                if is_in_store =>
            {
                let cancelled_by = cancelled_by.take().filter(|by| Some(*by) != peer);
                self.say_ended(id, peer);
                self.say_ended(id, cancelled_by);
                self.answer_waiting(now, id);
            }
            State::Queued { .. } | State::Granted { .. } | State::Placed { .. } | State::Ended(_) => {}
        }
    }

    /// Whether the client of a detached task may leave: the store knows the task's place, or its end.
    pub(super) fn is_durable(&self, task: &Task) -> bool {
        let has_place = task.is_in_store() || !self.config.rules.holds(Rule::PlaceBeforeDurable);
        task.spec.detached && task.track.last.is_some() && has_place
    }

    /// The store does not answer: fails the tasks that wait for it, so that their clients can try again.
    pub(super) fn store_away(&mut self, now: MonoTime) {
        self.store_ok = false;
        for id in self.tasks.storing() {
            self.end_and_tell(now, id, Outcome::failed(ErrorCode::StoreAway, "the store stopped answering: try again"));
        }
    }

    /// Takes over the store's detached tasks. One with a worker has time to be named by it. One without waits for its
    /// client, or for a worker that an earlier broker gave it to. Ended ones can still be asked for.
    pub(super) fn restored(&mut self, now: MonoTime, records: Vec<TaskRecord>) {
        let now_unix_ms = self.unix_ms(now);
        let (kept, shown): (Vec<TaskRecord>, Vec<TaskRecord>) =
            records.into_iter().partition(|record| record.spec.detached);
        // Rows of attached tasks were for people to read; those that still live will be shown again.
        self.actions.extend(shown.into_iter().map(|record| Action::Save(Change::DropTask(record.spec.task))));
        // All of them: each was within the limits when it came, and nobody else would ever end it.
        for record in kept {
            let (attempt, worker, ended) = (record.attempt, record.worker, record.ended.clone());
            let (submitted_unix_ms, deadline_unix_ms) = (record.submitted_unix_ms, record.deadline_unix_ms());
            let footing = record.footing();
            let mut task = Task::new(record.spec, now, submitted_unix_ms);
            let id = task.id();
            (task.row, task.track.is_from_before) = (Row::Confirmed(footing), true);
            task.track.attempt = attempt;
            task.deadline = deadline_unix_ms.map(|at| now + Duration::from_millis(at.saturating_sub(now_unix_ms)));
            task.track.last = worker.map(|(worker, epoch)| Last { worker, epoch, name: String::new() });
            task.state = match (ended, worker) {
                (Some((outcome, ended_unix_ms)), _) => State::Ended(End::new(outcome, ended_unix_ms)),
                (None, Some((worker, epoch))) => {
                    let at = Place { worker, epoch, direction: Direction::ClientDials };
                    State::Placed { at, unnamed_until: None }
                }
                (None, None) => State::Storing,
            };
            task.track.away_since = Some(now);
            if !task.is_ended() {
                task.promise.stream = self.slos.stream(now, &task.spec);
            }
            let due = if task.is_ended() { now + self.config.ended_kept } else { self.due_of(&task) };
            let waits = task.state == State::Storing;
            self.tasks.insert(task, due);
            if waits {
                self.enqueue(now, id);
            }
        }
    }

    /// After an event: looks at the task earlier if it is due earlier now. Never later: a look that comes too early
    /// finds out when the next one is due.
    pub(super) fn reschedule(&mut self, id: TaskId) {
        if let Some(task) = self.tasks.get(id) {
            let due = self.due_of(task);
            self.tasks.due_by(id, due);
        }
    }

    /// When a task must be looked at next if no event comes.
    pub(super) fn due_of(&self, task: &Task) -> MonoTime {
        let mut due = self.patience_end(task);
        if task.owner.peer.is_some() && task.place().is_none() {
            due = due.min(task.owner.heard + self.config.client_silence);
        }
        if let Some(expires_at) = task.expires_at() {
            due = due.min(expires_at);
        }
        if let Some(lapses_at) = self.lapses_at(task) {
            due = due.min(lapses_at);
        }
        if let Some(judged_at) = self.judged_at(task) {
            due = due.min(judged_at);
        }
        if !task.has_row() {
            due = due.min(task.owner.heard + SHOWN_AFTER);
        }
        if let Some(late_at) = task.breaks_promise_at() {
            due = due.min(late_at);
        }
        if let Some(verdict_by) = task.doubts.verdict_by() {
            due = due.min(verdict_by);
        }
        if let Some(pause_until) = task.doubts.pause_until.filter(|_| task.is_queued()) {
            due = due.min(pause_until);
        }
        due
    }

    pub(super) fn look_at_task(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        if task.expires_at().is_some_and(|at| now >= at) {
            return self.end_and_tell(now, id, Outcome::failed(ErrorCode::Expired, DEADLINE_PASSED));
        }
        if let Some(outcome) = self.abandoned(now, task) {
            if let Some(task) = self.tasks.get_mut(id) {
                task.promise.drop_watch(); // How long was waited says nothing of its worker.
            }
            self.end_and_tell(now, id, outcome);
            let attached = self.tasks.get_mut(id).filter(|task| !task.spec.detached);
            if let Some(end) = attached.and_then(Task::end_mut) {
                end.is_abandoned = true;
            }
            return;
        }
        if let Some(failure) = self.judge(now, id) {
            return self.end_and_tell(now, id, Outcome::Failed(failure));
        }
        self.count_if_late(now, id);
        self.take_back(now, id);
        self.after_suspicion(now, id);
        self.after_pause(now, id);
        let Some(task) = self.tasks.get_mut(id).filter(|task| !task.is_ended()) else { return };
        if now >= task.owner.heard + self.config.client_silence && task.place().is_none() {
            task.owner.peer = None; // Room is kept for it once its client is heard again.
        }
        if !task.has_row() {
            task.row = Row::Told;
            self.save_task(id);
        }
        let Some(task) = self.tasks.get(id) else { return };
        let due = self.due_of(task);
        self.tasks.set_due(id, if due > now { due } else { now + LOOK_AGAIN });
    }

    /// When the broker gives up a task if no peer names it.
    fn patience_end(&self, task: &Task) -> MonoTime {
        if task.is_in_good_hands() {
            task.track.away_since.unwrap_or(task.owner.heard) + self.config.detached_patience
        } else if task.may_be_at_worker() {
            task.owner.heard + self.config.detached_patience
        } else {
            task.owner.heard + self.config.client_silence
        }
    }

    /// The outcome of a task whose patience has ended; `None` if somebody still cares for it.
    fn abandoned(&self, now: MonoTime, task: &Task) -> Option<Outcome> {
        let is_over = now >= self.patience_end(task);
        if let Some(at) = task.place().filter(|_| task.is_in_good_hands()) {
            let named = self.workers.get(at.worker).is_some_and(|worker| worker.has(task.attempt_id()));
            let text = "its worker has been away too long, and with it the inputs: submit it again";
            return (is_over && !named).then(|| Outcome::failed(ErrorCode::WorkerLost, text));
        }
        let silent = is_over && self.config.rules.holds(Rule::CloseAbandoned);
        silent.then(|| {
            let gone = || Outcome::failed(ErrorCode::ClientGone, "its client went away");
            task.track.finished.clone().unwrap_or_else(gone)
        })
    }

    /// Continues a task that was held back, now that its suspects have died or live.
    fn after_suspicion(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        task.doubts.convict(now, &self.workers);
        if let (Some(outcome), true) = (task.doubts.held_back.take(), task.is_queued()) {
            self.after_loss(now, id, outcome);
        }
    }

    /// Tries a task again whose pause, which lets the workers that failed it recover, is over.
    fn after_pause(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(id).filter(|task| task.is_queued()) else { return };
        if task.doubts.pause_until.take_if(|until| now >= *until).is_some() {
            self.place(now, id);
        }
    }

    /// When others get what is kept for a task if neither its client nor its worker speaks up before. A living client
    /// speaks of a grant in time, though it may be long until the worker hears of it.
    fn lapses_at(&self, task: &Task) -> Option<MonoTime> {
        let quiet_at = task.owner.heard + self.config.quiet_in_force();
        match task.state {
            State::Granted { until, .. } => Some(until.min(quiet_at)),
            State::Placed { unnamed_until, .. } => unnamed_until,
            State::Queued { claims_at: Some(_), .. } => Some(quiet_at),
            State::Queued { claims_at: None, .. } | State::Storing | State::Ended(_) => None,
        }
    }

    /// Frees a granted slot that neither client nor worker has taken up in time, and drops the claim of a silent client.
    fn take_back(&mut self, now: MonoTime, id: TaskId) {
        let lapses_at = self.tasks.get(id).and_then(|task| self.lapses_at(task));
        if lapses_at.is_none_or(|at| now < at) || !self.config.rules.holds(Rule::ExpireGrants) {
            return;
        }
        let Some(task) = self.tasks.get_mut(id) else { return };
        let attempt_id = task.attempt_id();
        match &mut task.state {
            State::Granted { at, .. } => {
                let worker = at.worker;
                task.promise.drop_watch();
                self.workers.release_unnamed(now, worker, attempt_id);
                self.enqueue(now, id);
                self.fill(now, worker);
            }
            State::Placed { at, unnamed_until } => {
                let worker = at.worker;
                *unnamed_until = None;
                self.workers.release_unnamed(now, worker, attempt_id);
                self.note(id);
                self.fill(now, worker);
            }
            State::Queued { claims_at, .. } => {
                if let Some(worker) = claims_at.take() {
                    self.workers.unclaim(worker, id);
                    self.fill(now, worker);
                }
            }
            State::Storing | State::Ended(_) => {}
        }
    }

    pub(super) fn save_task(&mut self, id: TaskId) {
        if let Some(task) = self.tasks.get(id).filter(|task| task.has_row()) {
            let record = Box::new(task.record());
            self.actions.push(Action::Save(Change::PutTask { record, durable: task.spec.detached }));
        }
    }

    /// Ends a task: frees its place, drops its row, and keeps it only for those who ask.
    pub(super) fn end(&mut self, now: MonoTime, id: TaskId, outcome: Outcome) {
        let ended_unix_ms = self.unix_ms(now);
        let Some(task) = self.tasks.get(id).filter(|task| !task.is_ended()) else {
            return;
        };
        let is_in_vain = matches!(&outcome, Outcome::Failed(failure) if failure.code == ErrorCode::Expired);
        if is_in_vain && task.is_queued() {
            self.waited_in_vain(now, id);
        }
        let Some(task) = self.tasks.get(id) else { return };
        let (place, attempt_id, has_row, detached) =
            (task.place(), task.attempt_id(), task.has_row(), task.spec.detached);
        let is_kept =
            matches!(outcome, Outcome::Done { .. }) || detached && task.track.finished.as_ref() == Some(&outcome);
        if let Some(rank) = task.rank.filter(|_| !task.is_dispatched) {
            self.queue.withdraw(&rank, task.spec.client, self.config.tenant(task.spec.client));
        }
        self.leave_queue(id);
        self.learn(now, id, &outcome);
        match &outcome {
            Outcome::Done { .. } => self.counters.done += 1,
            Outcome::Failed(_) => self.counters.failed += 1,
            Outcome::Cancelled => self.counters.cancelled += 1,
        }
        match place {
            // The worker keeps the result for the client, or the failure until it is in the store.
            Some(at) if is_kept => self.workers.release_unnamed(now, at.worker, attempt_id),
            Some(at) => self.free_place(now, at.worker, attempt_id),
            None => {}
        }
        self.tasks.end(id, outcome, ended_unix_ms, now + self.config.ended_kept);
        if detached {
            self.save_task(id);
        } else if has_row {
            self.actions.push(Action::Save(Change::DropTask(id)));
            if let Some(task) = self.tasks.get_mut(id) {
                task.row = Row::Absent;
            }
        }
        self.answer_waiting(now, id);
    }

    /// Answers a client that waits for the end of a task in the background.
    fn answer_waiting(&mut self, now: MonoTime, id: TaskId) {
        if let Some(waits) = self.tasks.get_mut(id).and_then(|task| task.owner.awaited_by.take()) {
            self.locate(now, waits.peer, waits.key, waits.locate);
        }
    }

    pub(super) fn end_and_tell(&mut self, now: MonoTime, id: TaskId, outcome: Outcome) {
        let peer = self.tasks.get(id).and_then(|task| task.owner.peer);
        let place = self.tasks.get(id).and_then(Task::place);
        self.end(now, id, outcome);
        self.say_ended(id, peer);
        if let Some(at) = place {
            self.fill(now, at.worker);
        }
    }
}
