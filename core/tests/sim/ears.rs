//! When the broker heard each node, and when it stood still: no node may be given up for silence that the broker slept
//! through.

use std::{cmp::Ordering, collections::BTreeMap};

use mesh_core::broker::Config;
use proto_msgs::{
    BrokerToClient, ClientToBroker, Epoch, ErrorCode, Outcome, TaskId, ToBroker, WorkerId, WorkerToBroker,
};

use super::{
    mesh::{MS, Micros, micros, short},
    referee::Referee,
};

/// A broker that is at most this late was not stopped, and the time counts.
const LATE_MAX: Micros = 100 * MS;

/// What one life of the broker has heard.
#[derive(Debug, Default)]
pub(super) struct Ears {
    tasks: BTreeMap<TaskId, Micros>,
    /// The worker's life, the number of its last heartbeat, and when that was heard.
    workers: BTreeMap<WorkerId, (Epoch, u64, Micros)>,
    /// Pauses of the broker, in order.
    pauses: Vec<Pause>,
    /// When the broker was last called.
    called: Micros,
}

/// A time in which the broker stands still.
#[derive(Debug)]
struct Pause {
    /// The last call before it. The broker's clock goes on from there.
    called: Micros,
    /// When the broker first had something to do. Before that it does not notice the pause.
    due: Micros,
    end: Micros,
}

impl Pause {
    fn is_noticed(&self) -> bool {
        self.due + LATE_MAX <= self.end
    }

    fn within(&self, from: Micros, to: Micros) -> Micros {
        self.end.min(to).saturating_sub(self.due.max(from))
    }

    /// The most that the broker's clock leaves out of this time.
    fn left_out(&self, from: Micros, to: Micros) -> Micros {
        self.end.min(to).saturating_sub(self.called.max(from))
    }
}

impl Ears {
    /// The broker stands still from now on; its next deadline is `due`.
    pub(super) fn pauses(&mut self, now: Micros, due: Micros, end: Micros) {
        match self.pauses.last_mut() {
            Some(pause) if pause.end > now => pause.end = end,
            _ => self.pauses.push(Pause { called: self.called, due: due.max(now), end }),
        }
    }

    /// The broker is called.
    pub(super) fn called(&mut self, now: Micros) {
        self.called = now;
    }

    pub(super) fn hear(&mut self, now: Micros, message: &ToBroker) {
        match message {
            ToBroker::Client(ClientToBroker::Submit(submit)) => {
                self.tasks.insert(submit.spec.task, now);
            }
            ToBroker::Client(_) => {}
            ToBroker::Worker(message) => {
                // The broker waits for the life that it knows, and another life's heartbeat is no sign of that one. Nor is
                // a late heartbeat. A life that leaves is dropped at once, also if the next one was heard before it.
                match message {
                    WorkerToBroker::Register(register) => {
                        let last = self.workers.entry(register.worker).or_default();
                        match register.epoch.cmp(&last.0) {
                            Ordering::Greater => *last = (register.epoch, 0, now),
                            Ordering::Equal => last.2 = now,
                            Ordering::Less => {}
                        }
                    }
                    WorkerToBroker::Heartbeat(heartbeat) => {
                        let last = self.workers.entry(heartbeat.worker).or_default();
                        if heartbeat.epoch == last.0 && heartbeat.seq > last.1 {
                            *last = (heartbeat.epoch, heartbeat.seq, now);
                        }
                    }
                    WorkerToBroker::Leave(leave) => {
                        let last = self.workers.entry(leave.worker).or_default();
                        last.2 = if leave.epoch == last.0 { now } else { last.2 };
                    }
                }
            }
        }
    }

    /// Whether the client of a task has been silent for so long that the broker promises it nothing.
    pub(super) fn is_quiet(&self, now: Micros, task: TaskId) -> bool {
        self.tasks.get(&task).is_some_and(|heard| now >= heard + micros(Config::default().client_quiet))
    }

    /// Whether the broker should know that the client of a task is silent, even if it stood still meanwhile.
    pub(super) fn is_surely_quiet(&self, now: Micros, task: TaskId) -> bool {
        let patience = micros(Config::default().client_quiet) + LATE_MAX;
        let awake = |heard: Micros| {
            let left_out: Micros = self.noticed().map(|pause| pause.left_out(heard, now)).sum();
            (now - heard).saturating_sub(left_out)
        };
        self.tasks.get(&task).is_some_and(|heard| awake(*heard) >= patience)
    }

    fn noticed(&self) -> impl Iterator<Item = &Pause> {
        self.pauses.iter().filter(|pause| pause.is_noticed())
    }

    /// Whether the broker was awake for less than `patience` since `heard`, and stood still for the rest.
    fn slept_through(&self, heard: Micros, now: Micros, patience: Micros) -> bool {
        let stood: Micros = self.noticed().map(|pause| pause.within(heard, now)).sum();
        stood > 0 && now - heard - stood + LATE_MAX < patience
    }
}

impl Referee {
    /// Checks an end that the broker tells a client.
    pub(super) fn broker_ends(&mut self, now: Micros, message: &BrokerToClient) {
        let BrokerToClient::Ended(ended) = message else { return };
        let is_gone = matches!(&ended.outcome, Outcome::Failed(failure) if failure.code == ErrorCode::ClientGone);
        let Some(heard) = self.ears.tasks.get(&ended.task).copied().filter(|_| is_gone) else { return };
        let patience = micros(Config::default().client_silence);
        if !self.task(ended.task).job.detached && self.ears.slept_through(heard, now, patience) {
            let detail = format!(
                "the client of {} is given up, last heard at {heard}: {:?}",
                short(ended.task),
                self.ears.pauses
            );
            self.fail("what was slept through is no silence", detail);
        }
    }

    /// Checks that the broker may give this worker up.
    pub(super) fn broker_drops(&mut self, now: Micros, id: WorkerId, heartbeat: Micros) {
        let Some((_, _, heard)) = self.ears.workers.get(&id).copied() else { return };
        if self.ears.slept_through(heard, now, heartbeat * Micros::from(Config::default().liveness_beats)) {
            let detail = format!("{id} is given up, last heard at {heard}: {:?}", self.ears.pauses);
            self.fail("what was slept through is no silence", detail);
        }
    }
}
