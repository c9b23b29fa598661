//! Refuses tasks: because something is full, because no worker can ever run them, because they would come too late.
//!
//! Owns when and in which words. A permanent refusal is remembered like any other end, so that `why` can tell.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use proto_msgs::{BrokerToClient, Ended, ErrorCode, Failure, Lane, Outcome, PeerId, Standing, TaskId, TaskSpec};

use super::{
    Broker, outcomes,
    placement::{self, decision::Decision, earliest::IfLoaded, predict, reasons},
    stats::Counters,
    task::{End, State, Task},
    workers::Workers,
};
use crate::{Census, MonoTime, Rule};

/// Wait before a retry when something is full or away: long enough to matter, short enough not to annoy.
const RETRY_AFTER_MS: u32 = 1000;

/// Longest wait before a retry when a lane is full, however long the lane is.
const RETRY_AFTER_MS_MAX: u64 = 60_000;

/// A client retries when one of this many parts of the lane has drained: there is room, and the lane is not empty yet.
const DRAINED_PART: u64 = 10;

/// Age of a broker at which its workers have found it: a new connection, a heartbeat, and room for one to be lost.
/// Before that, nobody can say what no worker could do, or when: a task waits and is judged then.
const SETTLED_AFTER: MonoTime = MonoTime::from_micros(5_000_000);

/// Microseconds in a millisecond.
const MS_US: u64 = 1000;

/// Limit of remembered refusals: the latest ones, for clients that ask at once. Refusals come in floods.
const TURNED_AWAY_MAX: usize = 1024;

/// Tasks that were turned away, only to be shown: nothing else knows of them.
#[derive(Debug, Default)]
pub(super) struct TurnedAway {
    tasks: BTreeMap<TaskId, Task>,
    /// Oldest first. A task that was turned away several times is listed as often, and goes with its first entry.
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

    /// Drops the record of a task that came again and was accepted.
    pub(super) fn forget(&mut self, id: TaskId) {
        self.tasks.remove(&id);
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { tasks, order } = self;
        census.lasting("tasks turned away", order.len(), TURNED_AWAY_MAX);
        census.lasting("records of tasks turned away", tasks.len(), order.len());
    }
}

/// The message about a task's end. The task may come again if only the store was to blame.
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

    /// The reason why there is no place for a new task, if so, and the wait before a retry in milliseconds.
    pub(super) fn no_place_for(
        &mut self,
        now: MonoTime,
        spec: &TaskSpec,
        standing: &Standing,
        lane: Lane,
    ) -> Option<(Failure, u32)> {
        let is_waiting = !matches!(standing, Standing::Holding { .. });
        // A task that is already at work, as after a restart, is not turned away because of waiting tasks.
        let tasks_max = if is_waiting { self.config.tasks_max } else { self.config.tasks_max.saturating_mul(2) };
        if self.tasks.live() >= tasks_max {
            self.counters.refused_busy += 1;
            let text = "this broker has as many unfinished tasks as it takes";
            return Some((Failure::new(ErrorCode::Busy, text), RETRY_AFTER_MS));
        }
        if is_waiting && self.queue.lane_len(lane) >= self.config.queue_max {
            self.counters.refused_busy += 1;
            return Some(self.full(now, lane));
        }
        if spec.detached && !self.store_ok {
            self.counters.refused_store += 1;
            let text = "the store does not answer or cannot be written (the broker's log says why), so a detached task \
                        could be lost: try again, or submit without --detach";
            return Some((Failure::new(ErrorCode::StoreAway, text), RETRY_AFTER_MS));
        }
        None
    }

    /// Tells a client that there is no place for its new task. The task is not accepted and may come again.
    pub(super) fn turn_away(&mut self, now: MonoTime, peer: PeerId, spec: TaskSpec, failure: Failure, retry_ms: u32) {
        let outcome = Outcome::Failed(failure);
        let ended = Ended { task: spec.task, outcome: outcome.clone(), retry_after_ms: Some(retry_ms) };
        let ended_unix_ms = self.unix_ms(now);
        let mut task = Task::new(spec, now, ended_unix_ms);
        task.state = State::Ended(End::new(outcome, ended_unix_ms));
        self.turned_away.put(task);
        self.tell_client(Some(peer), BrokerToClient::Ended(ended));
    }

    /// What is told of a full lane, and the wait before a retry in milliseconds.
    fn full(&self, now: MonoTime, lane: Lane) -> (Failure, u32) {
        let (they_need, retry_ms) = match self.drain_us(now, lane) {
            Some(drain_us) => {
                let drain_ms = drain_us / MS_US;
                let retry = (drain_ms / DRAINED_PART).clamp(u64::from(RETRY_AFTER_MS), RETRY_AFTER_MS_MAX) as u32;
                (format!("they need about {} s", drain_ms.div_ceil(1000)), retry)
            }
            None => ("nobody has measured yet how long they need".to_owned(), RETRY_AFTER_MS),
        };
        let text = format!(
            "as many tasks wait in the {lane} lane as this broker takes; {they_need}: try again in {} s",
            retry_ms.div_ceil(1000)
        );
        (Failure::new(ErrorCode::Busy, text), retry_ms)
    }

    /// Predicted time until all tasks that now wait in the lane have gone to a worker, microseconds: by what they cost
    /// if that was measured, else by the lane's pace. `None` if neither is known.
    fn drain_us(&self, now: MonoTime, lane: Lane) -> Option<u64> {
        let pace = &self.paces[lane.index()];
        if pace.is_assumed {
            return pace.time_for_us(now, self.queue.lane_len(lane) as u64);
        }
        Some(self.queue.cost_us(lane) / u64::from(self.workers.totals().usable_slots(lane).max(1)))
    }

    /// The reason to refuse a task for good, if any. A task that its client holds at a worker, as after a restart, is
    /// accepted. A lost task is not new: whether it comes too late is its client's affair.
    pub(super) fn hopeless(&mut self, now: MonoTime, task: &mut Task, standing: &Standing) -> Option<Failure> {
        match standing {
            Standing::Holding { .. } if self.config.rules.holds(Rule::BelieveHoldingClients) => None,
            _ if !self.is_settled(now) => None,
            Standing::Lost { .. } => unfit(task, &self.workers, &mut self.counters),
            _ => unfit(task, &self.workers, &mut self.counters).or_else(|| self.too_late(now, task)),
        }
    }

    /// Whether workers had time to register since this start of the broker.
    pub(super) fn is_settled(&self, now: MonoTime) -> bool {
        now >= SETTLED_AFTER || !self.config.rules.holds(Rule::SettleFirst)
    }

    /// When a task that came before the workers is judged; `None` once it was.
    pub(super) fn judged_at(&self, task: &Task) -> Option<MonoTime> {
        (!task.is_judged).then_some(SETTLED_AFTER)
    }

    /// The reason to refuse a task that came before the workers, if any. A deadline that is too near by now will simply
    /// pass.
    pub(super) fn judge(&mut self, now: MonoTime, id: TaskId) -> Option<Failure> {
        let is_settled = self.is_settled(now);
        let task = self.tasks.get_mut(id).filter(|task| is_settled && !task.is_judged)?;
        task.is_judged = true;
        let is_at_worker = task.place().is_some();
        if is_at_worker { None } else { unfit(task, &self.workers, &mut self.counters) }
    }

    fn too_late(&mut self, now: MonoTime, task: &mut Task) -> Option<Failure> {
        let deadline_us = task.spec.deadline_ms?.saturating_mul(MS_US);
        let until = now + Duration::from_micros(deadline_us);
        let items_before = task.rank.map_or(0, |rank| self.queue.alike_before(now, until, &rank, task.spec.client));
        let mut survey = placement::survey_all(task, self.scene(now));
        if survey.earliest_us(items_before).is_some_and(|earliest_us| earliest_us > deadline_us) {
            survey.widen();
        }
        let (looked, earliest_us) = (survey.looked(), survey.earliest_us(items_before));
        let at_once_us = survey.earliest_us(0);
        let if_loaded = survey.earliest().if_loaded().filter(|if_loaded| if_loaded.us <= deadline_us);
        let (old, untried) = (survey.earliest().old(), survey.earliest().untried());
        let rated = survey.into_rated();
        self.counters.candidates_looked += looked;
        let earliest_us = earliest_us.filter(|earliest_us| *earliest_us > deadline_us)?;
        let preload = if_loaded.and_then(|IfLoaded { load_us, at, .. }| Some((at?, load_us)));
        let is_told = |at| {
            let worker = self.workers.get(at);
            worker.is_some_and(|worker| predict::models(task).any(|(digest, _)| !worker.model(digest).warm))
        };
        if let Some((at, load_us)) = preload
            && self.preloads.begin(now, task.spec.model.digest, load_us, is_told(at))
        {
            self.counters.preloads += 1;
            task.serves = Some(at);
            return None;
        }
        let may_try = |(at, load_us)| self.preloads.begin(now, task.spec.model.digest, load_us, true).then_some(at);
        if let Some(at) = old.or_else(|| untried.and_then(may_try)) {
            // It is a trial from now on: the next task is refused even if this one waits for the store.
            self.workers.give(now, at, predict::models(task).map(|(digest, _)| digest), true);
            self.counters.trials += 1;
            task.serves = Some(at);
            return None;
        }
        let at_unix_ms = self.unix_ms(now);
        task.decision = Some(Box::new(Decision { at_unix_ms, chosen: None, rated }));
        let text = unmeetable(earliest_us, at_once_us.unwrap_or(earliest_us), deadline_us, if_loaded);
        Some(Failure::new(ErrorCode::DeadlineUnmeetable, text))
    }

    /// Remembers, for people who ask why, what a task waited for when its deadline passed.
    pub(super) fn waited_in_vain(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get(id) else { return };
        let line = format!("in the queue when its deadline passed: {}", self.waits_for(now, task).reason);
        let survey = placement::survey_some(task, self.scene(now));
        let (looked, rated) = (survey.looked(), survey.into_rated());
        let decision = Decision { at_unix_ms: self.unix_ms(now), chosen: None, rated };
        self.counters.candidates_looked += looked;
        if let Some(task) = self.tasks.get_mut(id) {
            task.decision = Some(Box::new(decision));
            task.track.remember(line);
        }
    }

    /// Tells the client that its new task is refused for good, and remembers the task.
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
        task.state = State::Ended(End::new(outcome, self.unix_ms(now)));
        self.tasks.insert(task, now + self.config.ended_kept);
        self.tell_client(Some(peer), BrokerToClient::Ended(ended));
    }
}

/// What a client is told whose deadline is before the predicted finish; without the tasks before it that would be
/// `at_once_us`, perhaps at another worker.
fn unmeetable(earliest_us: u64, at_once_us: u64, deadline_us: u64, if_loaded: Option<IfLoaded>) -> String {
    let seconds = |us: u64| format!("{:.3} s", Duration::from_micros(us).as_secs_f64());
    let mut text = format!("the predicted finish is in {} at best", seconds(earliest_us));
    let behind_us = earliest_us.saturating_sub(at_once_us);
    if behind_us >= MS_US {
        text += &format!(" ({} sooner without the tasks before it)", seconds(behind_us));
    }
    text += &format!(", and the deadline is in {}", seconds(deadline_us));
    if let Some(IfLoaded { us, .. }) = if_loaded {
        let us = seconds(us);
        text += &format!(" (in {us} once the model is loaded: submit it once without a deadline, or try again)");
    }
    text
}

/// The reason why no worker could ever run the task, if so.
fn unfit(task: &Task, workers: &Workers, counters: &mut Counters) -> Option<Failure> {
    let (failure, looked) = reasons::never_fits(task, workers);
    counters.candidates_looked += looked;
    match task.doubts.outgrown.clone().map(outcomes::without_more_memory) {
        Some(Outcome::Failed(outgrown)) => failure.map(|_| outgrown),
        _ => failure,
    }
}
