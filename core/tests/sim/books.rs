//! The referee's books about the broker: what it has heard, and whether its messages follow from that.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::broker::{Change, Config, TaskRecord};
use proto_msgs::{
    AnswerBody, Attempt, AttemptId, AttemptState, BrokerToClient, ClientId, ClientToBroker, Demands, Digest, Ended,
    Epoch, ErrorCode, Grant, Heartbeat, Lane, Outcome, Purpose, Standing, Submit, TaskId, ToBroker, WorkerId,
    WorkerToBroker,
};

use super::{
    ears::Ears,
    mesh::{Micros, SECOND, micros, short, short_id},
    referee::{ACTIVE_MAX, Referee},
};

/// A heartbeat comes at least every two seconds, and a connection is remade within one.
const WORKERS_COME_BACK: Micros = 4 * SECOND;

/// Slots that the broker has promised at a worker, by the messages it sent and got.
#[derive(Debug)]
pub(super) struct Promises {
    epoch: Epoch,
    slots: [usize; 2],
    seq: u64,
    /// Models whose cost the worker has reported.
    measured: Vec<Digest>,
    /// When the attempt was promised, and whether a heartbeat has named it.
    attempts: BTreeMap<AttemptId, (Micros, bool)>,
}

impl Referee {
    // What the broker hears.

    /// Whether a client submits another client's task before the broker has heard of that task.
    pub(super) fn is_squatting(&self, user: ClientId, message: &ClientToBroker) -> bool {
        let ClientToBroker::Submit(submit) = message else { return false };
        self.task(submit.spec.task).owner != user && !self.heard_of.contains(&submit.spec.task)
    }

    pub(super) fn broker_started(&mut self, now: Micros, life: u32) {
        (self.broker_life, self.broker_since) = (life, now);
        self.promises.clear();
        self.granted.clear();
        self.held.clear();
        self.heard_of.clear();
        self.lost.clear();
        self.ears = Ears::default();
    }

    /// The broker hears a node, and this user if it is a client. What was promised to a silent client is void, even if it
    /// speaks again.
    pub(super) fn broker_hears(&mut self, now: Micros, by: Option<ClientId>, message: &ToBroker) {
        if let ToBroker::Client(ClientToBroker::Submit(submit)) = message {
            let id = submit.spec.task;
            if by != Some(self.task(id).owner) {
                return; // Whoever else names the task says nothing of its client.
            }
            if self.ears.is_quiet(now, id) {
                for promises in self.promises.values_mut() {
                    promises.attempts.retain(|promised, (_, named)| *named || promised.task != id);
                }
            }
        }
        self.ears.hear(now, message);
    }

    pub(super) fn broker_hears_client(&mut self, message: &ClientToBroker) {
        match message {
            ClientToBroker::Submit(submit) if submit.spec.client == self.task(submit.spec.task).owner => {
                self.heard_of.insert(submit.spec.task);
                self.stands(submit);
            }
            ClientToBroker::Close(close) => self.released(close.task),
            ClientToBroker::Cancel(cancel) => self.released(cancel.task),
            _ => {}
        }
    }

    fn stands(&mut self, submit: &Submit) {
        let lost = self.lost.get(&submit.spec.task).copied().unwrap_or_default();
        let granted = self.granted.get(&submit.spec.task).copied().unwrap_or_default();
        match &submit.standing {
            Standing::Asking => {}
            Standing::Holding { attempt, worker } if *attempt > lost && *attempt >= granted => {
                self.held.insert(submit.spec.task, (*attempt, *worker));
                for (_, promises) in self.promises.iter_mut().filter(|(id, _)| *id != worker) {
                    promises.attempts.retain(|id, _| id.task != submit.spec.task);
                }
            }
            Standing::Holding { .. } => {}
            Standing::Lost { attempt, .. } => {
                self.lost.insert(submit.spec.task, lost.max(*attempt));
                if self.held.get(&submit.spec.task).is_some_and(|(held, _)| held <= attempt) {
                    self.held.remove(&submit.spec.task);
                }
                self.released(submit.spec.task);
            }
        }
    }

    fn released(&mut self, task: TaskId) {
        for promises in self.promises.values_mut() {
            promises.attempts.retain(|id, _| id.task != task);
        }
    }

    pub(super) fn broker_hears_worker(&mut self, message: &WorkerToBroker) {
        match message {
            WorkerToBroker::Register(_) => {}
            WorkerToBroker::Heartbeat(heartbeat) => self.broker_hears_heartbeat(heartbeat),
            WorkerToBroker::Leave(_) => {}
        }
    }

    fn broker_hears_heartbeat(&mut self, heartbeat: &Heartbeat) {
        let Some(promises) = self.promises.get_mut(&heartbeat.worker) else { return };
        if promises.epoch != heartbeat.epoch || heartbeat.seq <= promises.seq {
            return;
        }
        promises.seq = heartbeat.seq;
        promises.measured = heartbeat.costs.iter().map(|cost| cost.model).collect();
        let is_active = |state: &AttemptState| !matches!(state, AttemptState::Finished(_));
        let active: BTreeSet<AttemptId> =
            heartbeat.attempts.iter().filter(|report| is_active(&report.state)).map(|report| report.id).collect();
        let finished =
            |id: &AttemptId| heartbeat.attempts.iter().any(|report| report.id == *id) && !active.contains(id);
        promises.attempts.retain(|id, (_, named)| !finished(id) && (!*named || active.contains(id)));
        for id in &active {
            promises.attempts.entry(*id).or_insert((0, true)).1 = true;
        }
        // An attempt that has turned up here is not awaited elsewhere, nor is an earlier one anywhere, even if this one
        // is over.
        let is_past = |id: &AttemptId| {
            let is_after = |here: AttemptId| here.task == id.task && here.attempt > id.attempt;
            active.contains(id) || heartbeat.attempts.iter().any(|report| is_after(report.id))
        };
        for promises in self.promises.values_mut() {
            promises.attempts.retain(|id, (_, named)| *named || !is_past(id));
        }
    }

    /// The broker stores a life of a worker, or drops the worker: promises to the earlier life are void.
    pub(super) fn broker_saves(&mut self, change: &Change) {
        match change {
            Change::PutWorker(record) => {
                let (id, epoch) = (record.register.worker, record.register.epoch);
                if self.promises.get(&id).is_none_or(|promises| promises.epoch != epoch) {
                    let slots = record.register.slots.map(usize::from);
                    let (measured, attempts) = (Vec::new(), BTreeMap::new());
                    self.promises.insert(id, Promises { epoch, slots, seq: 0, measured, attempts });
                }
            }
            Change::DropWorker(worker) => {
                self.promises.remove(worker);
            }
            Change::PutTask { .. } | Change::DropTask(_) => {}
        }
    }

    // What the broker says.

    pub(super) fn broker_tells_client(
        &mut self,
        now: Micros,
        user: ClientId,
        message: &BrokerToClient,
        stored: &BTreeMap<TaskId, TaskRecord>,
    ) {
        let (task, durable) = match message {
            BrokerToClient::Grant(grant) => (grant.id.task, false),
            BrokerToClient::Queued(queued) => (queued.task, queued.durable),
            BrokerToClient::Noted(noted) => (noted.id.task, noted.durable),
            BrokerToClient::Ended(ended) => (ended.task, false),
            BrokerToClient::Answer(answer) => match &answer.body {
                AnswerBody::Task(view) => (view.task, false),
                AnswerBody::Why(view) => (view.task.task, false),
                _ => return,
            },
        };
        let truth = self.task(task);
        let is_refusal = matches!(message, BrokerToClient::Ended(ended) if is_no_answer(&ended.outcome));
        if truth.owner != user && !is_refusal {
            let detail = format!("another client hears of {}: {message:?}", short(task));
            return self.fail("a result goes to its owner", detail);
        }
        let row = stored.get(&task);
        let is_cancel = matches!(message, BrokerToClient::Ended(ended) if ended.outcome == Outcome::Cancelled);
        if is_cancel && truth.job.detached && row.is_some_and(|row| row.ended.is_none()) {
            return self.fail("acknowledged is stored", format!("{} is cancelled, not in the store", short(task)));
        }
        let is_there = match message {
            BrokerToClient::Noted(noted) => {
                row.is_some_and(|row| row.ended.is_some() || row.attempt == noted.id.attempt && row.worker.is_some())
            }
            _ => row.is_some(),
        };
        if durable && truth.job.detached && !is_there {
            let footing = row.map(TaskRecord::footing);
            let detail = format!("{} is acknowledged with {message:?}, stored is {footing:?}", short(task));
            return self.fail("acknowledged is stored", detail);
        }
        if matches!(message, BrokerToClient::Grant(_) | BrokerToClient::Queued(_)) {
            self.taken.insert(task);
        }
        match message {
            BrokerToClient::Grant(grant) if grant.ticket.body.purpose == Purpose::Run => self.granted(now, grant),
            BrokerToClient::Ended(ended) => {
                if row.is_none_or(|row| row.ended.is_none()) {
                    self.refused(now, ended);
                }
                if is_refusal {
                    self.heard_of.remove(&task);
                }
                self.released(task);
            }
            _ => {}
        }
    }

    /// An accepted task is not refused before the workers had time to come back to a new broker.
    fn refused(&mut self, now: Micros, ended: &Ended) {
        let Outcome::Failed(failure) = &ended.outcome else { return };
        let is_verdict = matches!(failure.code, ErrorCode::NoWorkerFits | ErrorCode::DeadlineUnmeetable);
        if is_verdict && self.taken.contains(&ended.task) && now < self.broker_since + WORKERS_COME_BACK {
            self.fail("workers have time to come back", format!("{} is refused: {}", short(ended.task), failure.text));
        }
    }

    fn granted(&mut self, now: Micros, grant: &Grant) {
        let (id, worker, life) = (grant.id, grant.worker, self.broker_life);
        if self.ears.is_surely_quiet(now, id.task) {
            return self.fail("who is silent is granted nothing", format!("{} at {worker}", short_id(id)));
        }
        let old = self.placed.insert(id, (life, worker));
        // A restarted broker counts anew until it hears what its earlier lives placed.
        if let Some((_, other)) = old.filter(|(_, other)| life == 1 && *other != worker) {
            let detail = format!("{} was granted at {other}, now at {worker}", short_id(id));
            return self.fail("an attempt has one place", detail);
        }
        if old.is_none_or(|old| old.0 != life) {
            let is_other = |held: &&(Attempt, WorkerId)| **held != (id.attempt, worker);
            if let Some((held, at)) = self.held.get(&id.task).filter(is_other) {
                let detail = format!("{} is granted while the client holds attempt {held} at {at}", short_id(id));
                return self.fail("a client that holds an attempt is believed", detail);
            }
            self.task_mut(id.task).placements.push((id.attempt, worker));
            self.granted.insert(id.task, id.attempt);
            self.promised(now, grant);
        }
    }

    fn promised(&mut self, now: Micros, grant: &Grant) {
        let lane_of = |id: &AttemptId| self.task(id.task).job.lane_in_force();
        let Some(promises) = self.promises.get(&grant.worker) else {
            return self.fail("a grant names a known worker", format!("{} at {}", short_id(grant.id), grant.worker));
        };
        if promises.attempts.get(&grant.id).is_some_and(|(_, named)| *named) {
            return; // A heartbeat has named it: the grant repeats what is, and promises nothing more.
        }
        // A promise that no worker has taken up expires, and at once if its client falls silent.
        let lasts = micros(Config::default().grant_wait);
        let lives = |(id, (at, named)): &(&AttemptId, &(Micros, bool))| {
            *named || now < *at + lasts && !self.ears.is_quiet(now, id.task)
        };
        let others: Vec<AttemptId> =
            promises.attempts.iter().filter(lives).map(|(id, _)| *id).filter(|id| *id != grant.id).collect();
        let used = Lane::ALL.map(|lane| others.iter().filter(|id| lane_of(id) == lane).count());
        let (lane, job) = (lane_of(&grant.id), &self.task(grant.id.task).job);
        let has_slot = promises.has_slot(lane, used);
        let is_ahead = !has_slot && others.len() < ACTIVE_MAX && !job.detached && job.demands == Demands::default();
        let is_fine = has_slot || is_ahead && promises.measured.contains(&job.model_digest());
        if grant.ticket.body.lane != lane {
            let detail = format!("{} is for the {lane} lane, not {}", short_id(grant.id), grant.ticket.body.lane);
            return self.fail("a task stays in its lane", detail);
        }
        if !is_fine {
            let detail = format!(
                "{} gets {} in the {lane} lane of slots {:?}, where {others:?} are, costs known of {:?}",
                grant.worker_name,
                short_id(grant.id),
                promises.slots,
                promises.measured
            );
            return self.fail("slots are never over-granted", detail);
        }
        let Some(promises) = self.promises.get_mut(&grant.worker) else { return };
        promises.attempts.retain(|id, (at, named)| *named || now < *at + lasts || *id == grant.id);
        promises.attempts.insert(grant.id, (now, false));
    }
}

impl Promises {
    /// Whether a lane has a free slot while this many are used in each lane. Idle batch slots are lent to realtime.
    fn has_slot(&self, lane: Lane, [realtime, batch]: [usize; 2]) -> bool {
        let [own, lent] = self.slots;
        match lane {
            Lane::Realtime => realtime < own || realtime + batch < own + lent,
            Lane::Batch => batch + realtime.saturating_sub(own) < lent,
        }
    }
}

fn is_no_answer(outcome: &Outcome) -> bool {
    use ErrorCode::{BadRequest, Busy, Conflict, DeadlineUnmeetable, Forbidden, NoWorkerFits, NotFound, StoreAway};
    let is_refusal = |code| {
        matches!(
            code,
            BadRequest | Busy | Conflict | DeadlineUnmeetable | Forbidden | NoWorkerFits | NotFound | StoreAway
        )
    };
    matches!(outcome, Outcome::Failed(failure) if is_refusal(failure.code))
}
