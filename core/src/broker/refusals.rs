//! Tasks that are not taken: because something is full, because nobody can ever run them, because they would come too late.
//!
//! Owns when and in which words. A refusal for good is remembered like any other end, so that `why` can tell.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use proto_msgs::{BrokerToClient, Ended, ErrorCode, Failure, Lane, Outcome, PeerId, Standing, Submit, TaskId};

use super::{
    Broker,
    placement::{self, Decision},
    reasons,
    stats::Counters,
    tasks::{State, Task},
    workers::Workers,
};
use crate::{MonoTime, Rule};

/// What a client is told to wait when something is full or away: long enough to matter, short enough not to annoy.
const RETRY_AFTER_MS: u32 = 1000;

/// A full lane's refusal asks for no more patience than this, however long the lane is.
const RETRY_AFTER_MS_MAX: u64 = 60_000;

/// A client comes back when this part of the lane has drained: late enough for room, early enough not to find it empty.
const DRAINED_PART: u64 = 10;

/// Workers have found a broker that has just started by then: a new connection, a heartbeat, and room for one to be lost.
/// Before, nobody can say what no worker could do, or when: a task waits, and is judged then.
const SETTLED_AFTER: MonoTime = MonoTime::from_micros(5_000_000);

/// Microseconds in a millisecond.
const MS_US: u64 = 1000;

/// Tasks turned away that are remembered: the last ones, for who asks at once. Refusals come in floods.
const TURNED_AWAY_MAX: usize = 1024;

/// What was turned away, only to be shown: nothing else knows of these tasks.
#[derive(Debug, Default)]
pub(super) struct TurnedAway {
    tasks: BTreeMap<TaskId, Task>,
    /// Oldest first. A task that came again stands here several times, and goes with the first of them.
    order: VecDeque<TaskId>,
}

impl TurnedAway {
    fn put(&mut self, task: Task) {
        if self.order.len() == TURNED_AWAY_MAX {
            self.order.pop_front().map(|oldest| self.tasks.remove(&oldest));
        }
        self.order.push_back(task.id());
        self.tasks.insert(task.id(), task);
    }

    pub(super) fn get(&self, id: TaskId) -> Option<&Task> {
        self.tasks.get(&id)
    }

    /// It has come again and was taken.
    pub(super) fn forget(&mut self, id: TaskId) {
        self.tasks.remove(&id);
    }
}

/// What a client is told of an end. It may come again where nothing but the store was to blame.
pub(super) fn ended(task: TaskId, outcome: Outcome) -> Ended {
    let is_away = matches!(&outcome, Outcome::Failed(failure) if failure.code == ErrorCode::StoreAway);
    Ended { task, outcome, retry_after_ms: is_away.then_some(RETRY_AFTER_MS) }
}

impl Broker {
    pub(super) fn refuse(&mut self, peer: PeerId, task: TaskId, code: ErrorCode, text: &str) {
        let retry_after_ms = code.is_retryable().then_some(RETRY_AFTER_MS);
        let ended = Ended { task, outcome: Outcome::failed(code, text), retry_after_ms };
        self.tell_client(Some(peer), BrokerToClient::Ended(ended));
    }

    /// Why there is no place for a new task, if so, and when to come again.
    pub(super) fn no_place_for(&mut self, submit: &Submit, lane: Lane) -> Option<(Failure, u32)> {
        let is_waiting = !matches!(submit.standing, Standing::Holding { .. });
        // Who is at work already, as after a restart, is not turned away by those who wait.
        let tasks_max = if is_waiting { self.config.tasks_max } else { self.config.tasks_max.saturating_mul(2) };
        if self.tasks.live() >= tasks_max {
            self.counters.refused_busy += 1;
            let text = "this broker has as many unfinished tasks as it takes";
            return Some((Failure::new(ErrorCode::Busy, text), RETRY_AFTER_MS));
        }
        if is_waiting && self.queue.lane_len(lane) >= self.config.queue_max {
            self.counters.refused_busy += 1;
            let drain_ms = self.drain_us(lane) / MS_US;
            let retry = (drain_ms / DRAINED_PART).clamp(u64::from(RETRY_AFTER_MS), RETRY_AFTER_MS_MAX) as u32;
            let text = format!(
                "as many tasks wait in the {lane} lane as this broker takes; they need about {} s: try again in {} s",
                drain_ms.div_ceil(1000),
                retry.div_ceil(1000)
            );
            return Some((Failure::new(ErrorCode::Busy, text), retry));
        }
        if submit.detached && !self.store_ok {
            self.counters.refused_store += 1;
            let text =
                "the store does not answer, so a detached task could be lost: try again, or submit without --detach";
            return Some((Failure::new(ErrorCode::StoreAway, text), RETRY_AFTER_MS));
        }
        None
    }

    /// Tells the client that there is no place for its new task, which is not taken and may come again.
    pub(super) fn turn_away(&mut self, now: MonoTime, peer: PeerId, submit: Submit, failure: Failure, retry_ms: u32) {
        let outcome = Outcome::Failed(failure);
        let ended = Ended { task: submit.task, outcome: outcome.clone(), retry_after_ms: Some(retry_ms) };
        let ended_unix_ms = self.unix_ms(now);
        let mut task = Task::new(submit, now, ended_unix_ms);
        task.state = State::Ended { outcome, ended_unix_ms };
        self.turned_away.put(task);
        self.tell_client(Some(peer), BrokerToClient::Ended(ended));
    }

    /// Time until everything that waits in the lane now has gone to a worker, as predicted, microseconds.
    fn drain_us(&self, lane: Lane) -> u64 {
        self.queue.cost_us(lane) / u64::from(self.workers.totals().usable_slots(lane).max(1))
    }

    /// Why the task cannot be taken at all, if so. One whose client is at work with a worker, as after a restart, is taken; one
    /// that was at work is not new, and whether it comes too late is its client's affair.
    pub(super) fn hopeless(&mut self, now: MonoTime, task: &mut Task, standing: &Standing) -> Option<Failure> {
        match standing {
            Standing::Holding { .. } if self.config.rules.holds(Rule::BelieveHoldingClients) => None,
            _ if !self.is_settled(now) => None,
            Standing::Lost { .. } => unfit(task, &self.workers, &mut self.counters),
            _ => unfit(task, &self.workers, &mut self.counters).or_else(|| self.too_late(now, task)),
        }
    }

    /// Whether the workers had time to come since this start of the broker.
    pub(super) fn is_settled(&self, now: MonoTime) -> bool {
        now >= SETTLED_AFTER || !self.config.rules.holds(Rule::SettleFirst)
    }

    /// When a task is judged that came before the workers did; `None` once it was.
    pub(super) fn judged_at(&self, task: &Task) -> Option<MonoTime> {
        (!task.is_judged).then_some(SETTLED_AFTER)
    }

    /// Why a task that came before the workers did cannot be taken. A deadline that is too near by now will simply pass.
    pub(super) fn judge(&mut self, now: MonoTime, id: TaskId) -> Option<Failure> {
        let is_settled = self.is_settled(now);
        let task = self.tasks.get_mut(id).filter(|task| is_settled && !task.is_judged)?;
        task.is_judged = true;
        let is_at_worker = task.place().is_some();
        if is_at_worker { None } else { unfit(task, &self.workers, &mut self.counters) }
    }

    fn too_late(&mut self, now: MonoTime, task: &mut Task) -> Option<Failure> {
        let deadline_us = task.spec.deadline_ms?.saturating_mul(MS_US);
        let slots = u64::from(self.workers.totals().usable_slots(task.lane()).max(1));
        let before_us = task.rank.map_or(0, |rank| self.queue.before_us(rank.key)) / slots;
        let survey = placement::survey_all(task, self.scene(now));
        let (looked, earliest_us) = (survey.looked(), survey.earliest_us(before_us));
        let rated = survey.into_rated();
        self.counters.candidates_looked += looked;
        let earliest_us = earliest_us.filter(|earliest_us| *earliest_us > deadline_us)?;
        let at_unix_ms = self.unix_ms(now);
        task.decision = Some(Box::new(Decision { at_unix_ms, chosen: None, rated }));
        let finish = Duration::from_micros(earliest_us).as_secs_f64();
        let wanted = Duration::from_micros(deadline_us).as_secs_f64();
        let text = format!("the predicted finish is in {finish:.3} s at best, and the deadline is in {wanted:.3} s");
        Some(Failure::new(ErrorCode::DeadlineUnmeetable, text))
    }

    /// A deadline passed while its task waited: what for is remembered, for whoever asks why.
    pub(super) fn waited_in_vain(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        let line = format!("in the queue when its deadline passed: {}", self.waits_for(now, task));
        let survey = placement::survey_some(task, self.scene(now));
        let (looked, rated) = (survey.looked(), survey.into_rated());
        let decision = Decision { at_unix_ms: self.unix_ms(now), chosen: None, rated };
        self.counters.candidates_looked += looked;
        if let Some(task) = self.tasks.get_mut(id) {
            task.decision = Some(Box::new(decision));
            task.remember(line);
        }
    }

    /// Tells the client that its new task is over before it began, and remembers it.
    pub(super) fn refuse_for_good(&mut self, now: MonoTime, peer: PeerId, mut task: Task, failure: Failure) {
        match failure.code {
            ErrorCode::DeadlineUnmeetable => self.counters.refused_deadline += 1,
            _ => self.counters.refused_unfit += 1,
        }
        if let Some(rank) = task.rank.take() {
            self.queue.withdraw(&rank, task.spec.client, self.config.tenant(task.spec.client));
        }
        let outcome = Outcome::Failed(failure);
        let ended = ended(task.id(), outcome.clone());
        task.state = State::Ended { outcome, ended_unix_ms: self.unix_ms(now) };
        self.tasks.insert(task, now + self.config.ended_kept);
        self.tell_client(Some(peer), BrokerToClient::Ended(ended));
    }
}

/// Why no worker could ever run the task, if so.
fn unfit(task: &Task, workers: &Workers, counters: &mut Counters) -> Option<Failure> {
    let (failure, looked) = reasons::never_fits(task, workers);
    counters.candidates_looked += looked;
    failure
}
