//! The client's machine: it owns its tasks, asks the broker until a task has a worker, and follows one attempt per
//! task.
//!
//! Owns the user's tasks until their end. Never: sockets, files, terminals.
//!
//! The client judges its attempts itself, since only the client sees the direct link. The broker only tells it when to
//! look.

mod api;
mod census;
mod tasks;

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{
    AttemptId, BrokerToClient, ClientToBroker, ClientToWorker, Close, Ended, ErrorCode, Grant, Locate, Noted, Outcome,
    Purpose, Queued, Refuse, RunResult, TaskId, WorkerToClient,
};

pub use api::{Action, Config, End, Event, News};

use crate::{Clock, DEADLINE_PASSED, MonoTime, Rule, due::Due};
use tasks::{At, Lost, State, Task, Way, Wish};

/// Interval of tries to mend a link: short enough to win back a flapping link, long enough not to storm a dead one.
const MEND_RETRY: Duration = Duration::from_millis(500);

/// When the broker misses a worker that has been silent to the client this long, the client checks the link.
const DOUBT_AFTER: Duration = Duration::from_millis(1100);

/// Failed attempts to fetch a detached result after which the user is told.
const FETCHES_MAX: u32 = 3;

/// The state machine of a client with any number of tasks.
#[derive(Debug)]
pub struct Client {
    config: Config,
    clock: Clock,
    tasks: BTreeMap<TaskId, Task>,
    /// When to look at each task.
    due: Due<TaskId>,
    next_alive: MonoTime,
    /// When the broker last spoke, or else when it was first asked.
    broker_heard: Option<MonoTime>,
    /// Whether the user was told that the broker is silent.
    broker_missed: bool,
    actions: Vec<Action>,
}

impl Client {
    /// A client without tasks.
    pub fn new(config: Config) -> Self {
        Self {
            clock: Clock::new(config.rules),
            config,
            tasks: BTreeMap::new(),
            due: Due::default(),
            next_alive: MonoTime::ZERO,
            broker_heard: None,
            broker_missed: false,
            actions: Vec::new(),
        }
    }

    /// Handles one event and returns the actions that the shell must carry out.
    #[must_use]
    pub fn handle(&mut self, now: MonoTime, event: Event) -> Vec<Action> {
        let due = self.clock.is_late(now).then(|| self.next_deadline()).flatten();
        let (now, has_stood) = self.clock.turn(now, due);
        if has_stood {
            self.next_alive = now; // Workers may be about to give us up.
        }
        let touched = event.task();
        match event {
            Event::Submit(spec) => self.begin(now, spec.task, Wish::Run(spec)),
            Event::Fetch { task } => self.begin(now, task, Wish::Fetch),
            Event::Cancel { task } => self.finish(task, Outcome::Cancelled),
            Event::BrokerSaid(message) => self.broker_said(now, message),
            Event::ConnectFailed { id, text } => self.connect_failed(now, id, text),
            Event::LinkBroken { id } => self.mend(now, id),
            Event::WorkerSaid(message) => self.worker_said(now, message),
            Event::WorkerAlive { id } => self.worker_alive(now, id),
            Event::Sent { id } => self.sent(now, id),
            Event::SendFailed { id, outcome } | Event::ResultBroken { id, outcome } => {
                self.attempt_failed(now, id, outcome);
            }
            Event::ResultVerified { id } => self.result_verified(id),
            Event::Deadline => {}
        }
        touched.into_iter().for_each(|id| self.plan(id));
        self.look_at_clock(now);
        std::mem::take(&mut self.actions)
    }

    /// When the shell must send [`Event::Deadline`] if no other event comes first.
    pub fn next_deadline(&self) -> Option<MonoTime> {
        let due = self.due.first()?.min(self.next_alive);
        Some(self.clock.outside(due))
    }

    fn begin(&mut self, now: MonoTime, id: TaskId, wish: Wish) {
        if self.tasks.is_empty() {
            // The broker was not asked anything, so its silence does not count.
            (self.broker_heard, self.broker_missed) = (None, false);
        }
        self.tasks.insert(id, Task::new(id, wish, now));
        self.say_standing(now, id);
    }

    // To the broker.

    /// Sends the broker the full state of one task, and plans the next repeat.
    fn say_standing(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let first = self.config.repeat_first * 2_u32.saturating_pow(task.repeats.min(8));
        task.repeats += 1;
        let wait = if task.at().is_some() { self.config.repeat_every } else { first.min(self.config.repeat_every) };
        task.repeat_at = if self.config.rules.holds(Rule::ClientRepeats) { now + wait } else { now + wait * 1_000_000 };
        self.broker_heard.get_or_insert(now);
        let message = match &task.wish {
            Wish::Run(spec) => ClientToBroker::Submit(tasks::submit(now, &self.config, spec, task)),
            Wish::Fetch => {
                let (client, key, endpoints) = (self.config.client, self.config.key, self.config.endpoints.clone());
                let unreachable = task.unreachable;
                ClientToBroker::Locate(Locate { task: id, client, key, endpoints, unreachable })
            }
        };
        self.actions.push(Action::TellBroker(message));
    }

    fn broker_said(&mut self, now: MonoTime, message: BrokerToClient) {
        self.broker_heard = Some(now);
        self.broker_missed = false;
        match message {
            BrokerToClient::Grant(grant) => self.granted(now, grant),
            BrokerToClient::Queued(queued) => self.queued(queued),
            BrokerToClient::Noted(noted) => self.noted(now, noted),
            BrokerToClient::Ended(ended) => self.ended(ended),
            BrokerToClient::Answer(_) => {}
        }
    }

    fn granted(&mut self, now: MonoTime, grant: Grant) {
        let id = grant.id.task;
        let Some(task) = self.tasks.get_mut(&id) else {
            return self.decline(&grant);
        };
        if task.is_past(&grant) {
            return;
        }
        let (old, is_fetch) = (task.at().map(At::id), task.wish == Wish::Fetch);
        task.fetches_from(grant.ticket.body.epoch);
        let until = now + self.config.connect_wait;
        let at = At { grant, way: Way::Connecting { until }, heard: now, phase: None, all_sent: false, result: None };
        let grant = Box::new(at.grant.clone());
        task.last = Some((grant.worker, grant.worker_name.clone()));
        task.repeats = 0;
        task.repeat_at = now + self.config.repeat_every;
        let news = News::Placed {
            attempt: grant.id.attempt,
            worker: grant.worker,
            worker_name: grant.worker_name.clone(),
            model_held: grant.model_held,
            lane: grant.ticket.body.lane,
            predicted_ms: grant.predicted_ms,
        };
        task.lane = Some(grant.ticket.body.lane);
        task.state = State::At(Box::new(at));
        if let Some(id) = old {
            if !is_fetch {
                self.actions.push(Action::TellWorker { id, message: ClientToWorker::Abort(id) });
            }
            self.actions.push(Action::Disconnect { id });
        }
        self.actions.push(Action::Connect { grant, resume: false });
        self.actions.push(Action::Report { task: id, news });
    }

    /// Answers a grant for a task that has ended here: the broker missed its end. A detached task goes on without this
    /// client.
    fn decline(&mut self, grant: &Grant) {
        if grant.ticket.body.purpose == Purpose::Run && !grant.ticket.body.detached {
            self.close(grant.id, Outcome::Cancelled);
        }
    }

    fn queued(&mut self, queued: Queued) {
        let Queued { task, position, reason, no_worker_fits, starts_in_ms, .. } = queued;
        if self.tasks.get(&task).is_some_and(|task| task.at().is_none()) {
            let news = News::Queued { position, reason, no_worker_fits, starts_in_ms };
            self.actions.push(Action::Report { task, news });
        }
    }

    /// The broker knows the task. If it misses the worker and the client does too, the client checks the link.
    fn noted(&mut self, now: MonoTime, noted: Noted) {
        let Some(task) = self.tasks.get(&noted.id.task) else { return };
        match task.at().filter(|at| at.id() == noted.id) {
            Some(at) if at.all_sent && noted.durable => {
                self.end_here(noted.id.task, Outcome::Done { run_us: 0, load_us: 0 }, None);
            }
            Some(at) if !noted.worker_alive => match at.way {
                Way::Mending { .. } => {
                    let text = "the worker died or cannot be reached any more";
                    self.lose(now, noted.id.task, Outcome::failed(ErrorCode::WorkerLost, text));
                }
                Way::Up if now.since(at.heard) >= DOUBT_AFTER => self.mend(now, noted.id),
                Way::Up | Way::Connecting { .. } => {}
            },
            Some(_) => {}
            None if task.wish == Wish::Fetch => {
                let reason = if noted.worker_alive { "the task has not ended" } else { "its worker is away" };
                let (reason, no_worker_fits) = (reason.to_owned(), false);
                let news = News::Queued { position: 0, reason, no_worker_fits, starts_in_ms: None };
                self.actions.push(Action::Report { task: noted.id.task, news });
            }
            None => {}
        }
    }

    fn ended(&mut self, ended: Ended) {
        let Some(task) = self.tasks.get_mut(&ended.task) else { return };
        // A result that this client takes is not over before it is here. The worker will say what became of it.
        let is_ours = matches!(ended.outcome, Outcome::Done { .. }) && !task.leaves_result();
        if !is_ours {
            task.retry_after_ms = ended.retry_after_ms;
            self.end_here(ended.task, ended.outcome, None);
        }
    }

    fn close(&mut self, id: AttemptId, outcome: Outcome) {
        let close = Close { task: id.task, client: self.config.client, attempt: id.attempt, outcome };
        self.actions.push(Action::TellBroker(ClientToBroker::Close(close)));
    }

    // To and from workers.

    /// The attempt with this id, if the client follows it; earlier attempts are fenced off.
    fn following(&mut self, id: AttemptId) -> Option<&mut At> {
        let fenced = self.config.rules.holds(Rule::FenceOldAttempts);
        let at = self.tasks.get_mut(&id.task)?.at_mut()?;
        (at.id() == id || !fenced).then_some(at)
    }

    fn worker_said(&mut self, now: MonoTime, message: WorkerToClient) {
        match message {
            WorkerToClient::Accept(accept) => {
                self.worker_alive(now, accept.id);
                if let Some(at) = self.following(accept.id) {
                    at.way = Way::Up;
                }
            }
            WorkerToClient::Progress(progress) => {
                self.worker_alive(now, progress.id);
                self.progress(progress.id, progress.phase);
            }
            WorkerToClient::Refuse(Refuse { id, code, text }) => {
                let was_in = self.following(id).is_some_and(|at| !matches!(at.way, Way::Connecting { .. }));
                let outcome = match code {
                    // The ticket was good before, so the life of the worker that knew it has ended.
                    ErrorCode::BadTicket if was_in => {
                        Outcome::failed(ErrorCode::WorkerLost, "the worker was restarted")
                    }
                    _ => Outcome::failed(code, text),
                };
                self.attempt_failed(now, id, outcome);
            }
            WorkerToClient::Result(result) => {
                self.worker_alive(now, result.id);
                self.result(now, result);
            }
            WorkerToClient::Reopen(id) => {
                // The worker speaks over the new connection and has dropped what came over it; `Accept` alone would not
                // say so.
                self.worker_alive(now, id);
                self.mend(now, id);
            }
            WorkerToClient::DialIn(_) | WorkerToClient::Credit(_) | WorkerToClient::Chunk(_) => {}
        }
    }

    fn worker_alive(&mut self, now: MonoTime, id: AttemptId) {
        if let Some(at) = self.following(id) {
            at.heard = now;
            // This does not end mending: only `Accept` or the result shows that the worker knows the new connection.
            if let Way::Connecting { .. } = at.way {
                at.way = Way::Up;
            }
        }
    }

    fn progress(&mut self, id: AttemptId, phase: proto_msgs::Phase) {
        let Some(at) = self.following(id) else { return };
        if at.phase.replace(phase) != Some(phase) {
            self.actions.push(Action::Report { task: id.task, news: News::Phase(phase) });
        }
    }

    fn result(&mut self, now: MonoTime, result: RunResult) {
        let id = result.id;
        self.sent(now, id);
        let leaves_it = self.tasks.get(&id.task).is_some_and(Task::leaves_result);
        let Some(at) = self.following(id) else { return };
        at.way = Way::Up;
        match &result.outcome {
            Outcome::Done { .. } if leaves_it => {}
            Outcome::Done { .. } => {
                let result = Box::new(result);
                at.result = Some(result.clone());
                self.actions.push(Action::TakeResult { result });
            }
            Outcome::Cancelled => {
                self.attempt_failed(now, id, Outcome::failed(ErrorCode::WorkerLost, "the worker dropped the task"));
            }
            Outcome::Failed(_) => self.attempt_failed(now, id, result.outcome),
        }
    }

    fn result_verified(&mut self, id: AttemptId) {
        let Some(result) = self.following(id).and_then(|at| at.result.take()) else { return };
        let (task, outcome) = (id.task, result.outcome.clone());
        if matches!(self.tasks.get(&task).map(|task| &task.wish), Some(Wish::Run(_))) {
            self.actions.push(Action::TellWorker { id, message: ClientToWorker::Release(id) });
            self.close(id, outcome.clone());
        }
        self.end_here(task, outcome, Some(result));
    }

    /// A detached task is safe once its worker has everything and the broker knows that.
    fn sent(&mut self, now: MonoTime, id: AttemptId) {
        self.worker_alive(now, id);
        let is_detached = self.tasks.get(&id.task).is_some_and(Task::leaves_result);
        let Some(at) = self.following(id).filter(|at| is_detached && !at.all_sent) else { return };
        at.all_sent = true;
        if let Some(task) = self.tasks.get_mut(&id.task) {
            // From now on worker and broker watch the deadline.
            task.deadline = None;
        }
        self.say_standing(now, id.task);
    }

    /// Ends a failed attempt: the task ends too, or is tried elsewhere if the outcome is retryable.
    fn attempt_failed(&mut self, now: MonoTime, id: AttemptId, outcome: Outcome) {
        if self.following(id).is_none() {
            return;
        }
        if outcome.is_retryable() {
            self.lose(now, id.task, outcome);
        } else {
            self.finish(id.task, outcome);
        }
    }

    fn connect_failed(&mut self, now: MonoTime, id: AttemptId, text: String) {
        let Some(at) = self.following(id) else { return };
        match &mut at.way {
            Way::Connecting { .. } => self.lose(now, id.task, Outcome::failed(ErrorCode::Unreachable, text)),
            Way::Mending { retry, .. } => *retry = now + MEND_RETRY,
            // The old connection failed while it was being replaced; the new one works.
            Way::Up => {}
        }
    }

    /// Connects again after the link broke or the worker fell silent, and resumes the transfer.
    fn mend(&mut self, now: MonoTime, id: AttemptId) {
        let (give_up, retry) = (now + self.config.mend_for, now + self.config.connect_wait);
        // A link that is being made has its own time limit.
        let Some(at) = self.following(id).filter(|at| at.way == Way::Up) else { return };
        at.way = Way::Mending { give_up, retry };
        let grant = Box::new(at.grant.clone());
        self.actions.push(Action::Connect { grant, resume: true });
    }

    /// Gives the attempt up and asks the broker for another.
    fn lose(&mut self, now: MonoTime, id: TaskId, outcome: Outcome) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let State::At(at) = std::mem::replace(&mut task.state, State::Asking) else { return };
        let (attempt, worker) = (at.id(), at.grant.worker);
        let why = match &outcome {
            Outcome::Failed(failure) => failure.text.clone(),
            Outcome::Done { .. } | Outcome::Cancelled => String::new(),
        };
        let news = News::Retrying { attempt: attempt.attempt, worker_name: at.grant.worker_name.clone(), why };
        task.lost = Some(Lost { attempt: attempt.attempt, worker, outcome: outcome.clone() });
        task.repeats = 0;
        let leaves_result = task.leaves_result();
        if task.wish == Wish::Fetch {
            task.fetches_failed += 1;
            task.unreachable = Some(at.grant.direction);
            task.repeat_at = now + self.config.repeat_every;
            self.actions.push(Action::Disconnect { id: attempt });
            if task.fetches_failed >= FETCHES_MAX {
                self.end_here(id, outcome, None);
            }
            return;
        }
        // A detached attempt may be complete without the client knowing it: the broker decides whether it goes on.
        if !leaves_result {
            let message = ClientToWorker::Abort(attempt);
            self.actions.push(Action::TellWorker { id: attempt, message });
        }
        self.actions.push(Action::Disconnect { id: attempt });
        self.actions.push(Action::Report { task: id, news });
        self.say_standing(now, id);
    }

    // Ends.

    /// Ends the task on the client's side: worker and broker are told.
    fn finish(&mut self, id: TaskId, outcome: Outcome) {
        let Some(task) = self.tasks.get(&id) else { return };
        let attempt = AttemptId { task: id, attempt: task.attempt() };
        if task.wish != Wish::Fetch {
            if task.at().is_some() {
                let message = ClientToWorker::Abort(attempt);
                self.actions.push(Action::TellWorker { id: attempt, message });
            }
            self.close(attempt, outcome.clone());
        }
        self.end_here(id, outcome, None);
    }

    fn end_here(&mut self, id: TaskId, outcome: Outcome, result: Option<Box<RunResult>>) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if self.config.rules.holds(Rule::ForgetLooks) {
            self.due.remove(id);
        }
        if let Some(at) = task.at() {
            self.actions.push(Action::Disconnect { id: at.id() });
        }
        let attempt = task.attempt();
        let Task { last: worker, lane, retry_after_ms, .. } = task;
        let end = End { outcome, result, worker, attempt, lane, retry_after_ms };
        self.actions.push(Action::End { task: id, end });
    }

    // Time.

    /// Plans when to look at the task next.
    fn plan(&mut self, id: TaskId) {
        let due = self.tasks.get(&id).map(|task| task.due(self.config.worker_silence));
        due.into_iter().for_each(|at| self.due.by(id, at));
    }

    fn look_at_clock(&mut self, now: MonoTime) {
        let due: Vec<TaskId> = std::iter::from_fn(|| self.due.pop(now)).collect();
        for id in due {
            self.look_at_task(now, id);
            self.plan(id);
        }
        if now >= self.next_alive {
            self.next_alive = now + self.config.alive_every;
            let ids = self.tasks.values().filter_map(|task| task.at().filter(|at| at.way == Way::Up).map(At::id));
            self.actions.extend(ids.map(|id| Action::TellWorker { id, message: ClientToWorker::Alive(id) }));
        }
        let missed = self.broker_heard.is_some_and(|heard| now.since(heard) >= self.config.broker_silence);
        if missed && !self.broker_missed && !self.tasks.is_empty() {
            self.broker_missed = true;
            let news = |task: &Task| Action::Report { task: task.id, news: News::BrokerSilent };
            self.actions.extend(self.tasks.values().map(news));
        }
    }

    fn look_at_task(&mut self, now: MonoTime, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if task.deadline.is_some_and(|deadline| now >= deadline) {
            return self.finish(id, Outcome::failed(ErrorCode::Expired, DEADLINE_PASSED));
        }
        let connect_wait = self.config.connect_wait;
        let repeat = now >= task.repeat_at;
        if let Some(at) = task.at_mut() {
            let attempt = at.id();
            match &mut at.way {
                Way::Connecting { until } if now >= *until => {
                    let text = "the worker did not answer: is its advertised address right and open?";
                    return self.lose(now, id, Outcome::failed(ErrorCode::Unreachable, text));
                }
                Way::Mending { give_up, .. } if now >= *give_up => {
                    let text = "the link to the worker broke and did not come back";
                    return self.lose(now, id, Outcome::failed(ErrorCode::WorkerLost, text));
                }
                Way::Mending { retry, .. } if now >= *retry => {
                    *retry = now + connect_wait;
                    let grant = Box::new(at.grant.clone());
                    self.actions.push(Action::Connect { grant, resume: true });
                }
                Way::Up if now >= at.heard + self.config.worker_silence => self.mend(now, attempt),
                Way::Connecting { .. } | Way::Mending { .. } | Way::Up => {}
            }
        }
        if repeat {
            self.say_standing(now, id);
        }
    }
}
