//! Grants: promises room, signs a ticket, and tells both sides how to connect.
//!
//! Owns the content of a grant and when it is repeated. Never chooses the worker; that is `placement`.

use std::time::Duration;

use proto_msgs::{
    BrokerToClient, BrokerToWorker, Direction, Grant, Introduce, Lane, PeerId, PublicKey, Purpose, TaskId, TaskSpec,
    Ticket, TicketBody, WorkerId,
    limits::{INPUT_BYTES_MAX, MODEL_BYTES_MAX, WINDOW_BYTES},
};

use super::{
    Broker,
    placement::{Choice, decision::Decision, predict, trials},
    task::{Last, Place, State, Task},
};
use crate::{MonoTime, Rule};

/// How long a ticket is valid: on a slow line, its opening may wait behind another attempt's data. The granted room is
/// taken back much sooner if nobody claims it; a client that comes too late for it is stopped by the next heartbeat.
const TICKET_LASTS: Duration = Duration::from_secs(60);

/// How client and worker connect.
pub(super) struct Way {
    pub(super) worker: WorkerId,
    pub(super) direction: Direction,
    /// Addresses where the client listens.
    pub(super) endpoints: Vec<String>,
    pub(super) client_key: Option<PublicKey>,
}

impl Broker {
    /// Grants the chosen place to a waiting task and tells its client.
    pub(super) fn grant(&mut self, now: MonoTime, id: TaskId, choice: Choice) {
        let Choice { worker, direction, prediction, rated, trial_after } = choice;
        let Some(chosen) = self.workers.get(worker) else { return };
        let (epoch, name) = (chosen.register.epoch, chosen.register.name.clone());
        let is_shared = chosen.register.slots[Lane::Realtime.index()] == 0;
        let (until, at_unix_ms) = (now + self.config.grant_wait, self.unix_ms(now));
        let Some(task) = self.tasks.get(id) else { return };
        let held = predict::held(task, Some(chosen));
        self.leave_queue(id);
        let Some(task) = self.tasks.get_mut(id) else { return };
        if let Some(rank) = task.rank.filter(|_| !std::mem::replace(&mut task.is_dispatched, true)) {
            self.queue.dispatched(&rank, task.spec.client, self.config.tenant(task.spec.client));
            if self.queue.lane_len(rank.key.lane) > 0 {
                self.paces[rank.key.lane.index()].started(now);
            }
        }
        task.track.begin(Last { worker, epoch, name });
        task.state = State::Granted { at: Place { worker, epoch, direction }, until };
        task.promise.begin(now, prediction, task.spec.slo.map(|slo| slo.latency_ms));
        let serves = task.serves.take() == Some(worker);
        if serves {
            // It was known to be late, and sent all the same.
            task.promise.counts_no_more();
        }
        task.decision = Some(Box::new(Decision { at_unix_ms, chosen: Some(worker), rated }));
        if let Some(after) = trial_after {
            task.track.remember_trial(after);
            self.counters.trials += 1;
        }
        self.slos.granted(&task.spec, trial_after.is_some() && trials::is_risk(task, &prediction));
        self.workers.give(
            now,
            worker,
            predict::models(task).map(|(digest, _)| digest),
            trial_after.is_some() || serves,
        );
        let attempt_id = task.attempt_id();
        self.last_chosen = Some(worker);
        if self.config.rules.holds(Rule::ReserveWithGrant) {
            self.workers.occupy(now, worker, attempt_id, held);
        }
        if is_shared {
            self.workers.lent(worker, held.lane == Some(Lane::Realtime) && self.queue.lane_len(Lane::Batch) > 0);
        }
        self.reschedule(id);
        self.counters.granted += 1;
        self.save_task(id);
        self.say_granted(now, id);
    }

    /// Repeats a grant that the client did not hear, or not in time. After a restart the slot has to be found again.
    pub(super) fn grant_again(&mut self, now: MonoTime, id: TaskId) {
        let Some(place) = self.tasks.get(id).and_then(Task::place) else { return };
        let (until, named_by) = (now + self.config.grant_wait, self.named_by(now, place.worker));
        let Some(task) = self.tasks.get_mut(id) else { return };
        let attempt_id = task.attempt_id();
        let known = task.place().and_then(|at| self.workers.get(at.worker));
        let held = predict::held(task, known);
        let has_room = known.is_some_and(|worker| predict::has_room(task, worker, now));
        match &mut task.state {
            State::Granted { until: old, .. } => *old = until,
            State::Placed { at, unnamed_until } => {
                if !known.is_some_and(|worker| worker.has(attempt_id)) {
                    if !has_room {
                        return self.say_queued(now, id);
                    }
                    *unnamed_until = Some(named_by);
                    let worker = at.worker;
                    self.workers.occupy(now, worker, attempt_id, held);
                }
            }
            State::Storing | State::Queued { .. } | State::Ended(_) => return,
        }
        self.say_granted(now, id);
    }

    /// When the worker should have named an attempt that its client has taken there: a heartbeat may be lost.
    pub(super) fn named_by(&self, now: MonoTime, worker: WorkerId) -> MonoTime {
        let beat_ms = self.workers.get(worker).map_or(0, |worker| worker.register.heartbeat_ms);
        now + self.config.grant_wait.max(Duration::from_millis(beat_ms.into()) * 2)
    }

    pub(super) fn say_granted(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        let Some(Place { worker, direction, .. }) = task.place() else {
            return;
        };
        let (endpoints, client_key, peer) = (task.owner.endpoints.clone(), task.spec.key, task.owner.peer);
        self.introduce(now, id, Purpose::Run, peer, Way { worker, direction, endpoints, client_key });
    }

    /// Signs a ticket and hands it out: the client always gets it, the worker if it has to dial.
    pub(super) fn introduce(&mut self, now: MonoTime, id: TaskId, purpose: Purpose, peer: Option<PeerId>, way: Way) {
        let (Some(task), Some(worker)) = (self.tasks.get(id), self.workers.get(way.worker)) else {
            return;
        };
        let body = TicketBody {
            purpose,
            task: id,
            attempt: task.track.attempt,
            worker: worker.id(),
            epoch: worker.register.epoch,
            client: task.spec.client,
            client_key: way.client_key,
            bytes_max: bytes_max(&task.spec),
            priority: task.spec.priority,
            lane: task.lane(),
            items: task.spec.items,
            detached: task.spec.detached,
            demands: task.spec.demands,
            gpu: worker.occupancy.gpu(task.attempt_id()),
            deadline_unix_ms: task.deadline_unix_ms(),
            slo_ms: task.spec.slo.map(|slo| slo.latency_ms),
            expires_unix_ms: self.unix_ms(now + TICKET_LASTS.max(self.config.grant_wait)),
        };
        let ticket = Ticket::sign(body, &worker.register.ticket_key);
        let grant = Grant {
            id: task.attempt_id(),
            worker: worker.id(),
            worker_name: worker.register.name.clone(),
            worker_key: worker.register.key,
            endpoints: worker.register.endpoints.clone(),
            direction: way.direction,
            window_bytes: WINDOW_BYTES,
            model_held: worker.holds(task.spec.model.digest),
            predicted_ms: task.promise.predicted_ms().filter(|_| purpose == Purpose::Run),
            ticket,
        };
        if way.direction == Direction::WorkerDials {
            let ticket = grant.ticket.clone();
            let introduce = Introduce { ticket, endpoints: way.endpoints, client_key: way.client_key };
            self.tell_worker(way.worker, BrokerToWorker::Introduce(introduce));
        }
        self.tell_client(peer, BrokerToClient::Grant(grant));
    }
}

/// Most bytes that a task may send: its models and its inputs.
fn bytes_max(task: &TaskSpec) -> u64 {
    let models = task.then.iter().map(|stage| stage.model.size_bytes).chain([task.model.size_bytes]);
    let models = models.fold(0, |sum: u64, bytes| sum.saturating_add(bytes.min(MODEL_BYTES_MAX)));
    models.saturating_add(task.input_bytes.min(INPUT_BYTES_MAX))
}
