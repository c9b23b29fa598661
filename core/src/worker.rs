//! The worker's machine: what it admits, runs, reports and forgets.
//!
//! Owns its attempts and its slots. Never: sockets, files, engines; those are the shell's, which reports how they fare.
//!
//! The worker trusts tickets, not the broker's presence. While the broker is away, the worker goes on with the attempts
//! it holds and admits clients that hold a ticket.

mod api;
mod attempts;
mod batches;
mod broker_clock;
mod census;
mod clients;
mod company;
mod comparing;
mod costs;
mod culprits;
mod curve;
mod cut;
mod dispatch;
pub mod headroom;
mod linger;
mod packer;
mod probes;
mod slots;

use std::time::Duration;

use proto_msgs::{
    AttemptId, BrokerToWorker, ErrorCode, Failure, Heartbeat, HeartbeatAck, Introduce, Leave, Outcome, Overtaken,
    Phase, Progress, Purpose, WorkerToBroker, WorkerToClient,
};

pub use api::{
    Action, BatchId, BatchKind, BatchTimes, CHECKED_ROWS, Config, Equality, Event, LinkId, Part, Restored, SPOT_ROWS,
    Sample, SlotId,
};

use crate::{Clock, GRANT_WAIT, MonoTime, Rule};
use attempts::{Attempt, Attempts, State, Work};
use batches::Batches;
use broker_clock::BrokerClock;
use costs::Costs;
use culprits::Culprits;
use cut::Wishes;
use packer::Packer;
use slots::Slots;

/// Clients hear of a phase only after it has lasted this long. Nobody misses a shorter phase, and each message wakes
/// four threads.
const NEWS_AFTER: Duration = Duration::from_millis(50);

/// The end of a detached attempt is reported at once, but within this part (1/32) of the heartbeat interval only once,
/// with all that have ended meanwhile: a heartbeat names every attempt.
const ENDS_APART: u32 = 32;

/// A detached attempt is to blame if the worker died during its runs this many times.
const DEADLY_RUNS_MAX: u32 = 3;

/// The state machine of a worker.
#[derive(Debug)]
pub struct Worker {
    config: Config,
    clock: Clock,
    attempts: Attempts,
    sample: Sample,
    /// Whether the machine was measured at least once.
    sampled: bool,
    seq: u64,
    next_heartbeat: MonoTime,
    /// When the last heartbeat was sent.
    last_heartbeat: MonoTime,
    /// Earliest time of the next `Register` to a broker that does not know this worker.
    next_register: MonoTime,
    next_progress: MonoTime,
    /// `None` until the broker has told it.
    broker_clock: Option<BrokerClock>,
    /// When the broker last acknowledged a heartbeat.
    broker_heard: MonoTime,
    /// Time from a heartbeat to its answer, smoothed as in RFC 6298, and the number of the heartbeat that was answered
    /// last: a doubled answer says nothing new. `None` before the first answer.
    broker_rtt: Option<(Duration, u64)>,
    /// When clients are told of new phases.
    next_news: Option<MonoTime>,
    /// Set while draining: when the remaining attempts are stopped.
    drain_until: Option<MonoTime>,
    exited: bool,
    slots: Slots,
    packer: Packer,
    costs: Costs,
    batches: Batches,
    culprits: Culprits,
    wishes: Wishes,
    /// Batches begun in each lane.
    turns: [u64; 2],
    /// When the first lingering queue stops waiting for more rows.
    wake: Option<MonoTime>,
    actions: Vec<Action>,
}

impl Worker {
    /// A worker before its first event.
    pub fn new(config: Config) -> Self {
        let counts = config.rules.holds(Rule::WorkerCountsSlots);
        Self {
            slots: Slots::new(&config.register, counts),
            costs: Costs::new(config.rows_max),
            clock: Clock::new(config.rules),
            config,
            attempts: Attempts::default(),
            sample: Sample::default(),
            sampled: false,
            seq: 0,
            next_heartbeat: MonoTime::ZERO,
            last_heartbeat: MonoTime::ZERO,
            next_register: MonoTime::ZERO,
            next_progress: MonoTime::ZERO,
            next_news: None,
            broker_clock: None,
            broker_heard: MonoTime::ZERO,
            broker_rtt: None,
            drain_until: None,
            exited: false,
            batches: Batches::default(),
            culprits: Culprits::default(),
            wishes: Wishes::default(),
            packer: Packer::default(),
            turns: [0; 2],
            wake: None,
            actions: Vec::new(),
        }
    }

    /// Handles one event and returns the actions that the shell must carry out.
    #[must_use]
    pub fn handle(&mut self, now: MonoTime, event: Event) -> Vec<Action> {
        let due = self.clock.is_late(now).then(|| self.next_deadline()).flatten();
        let (now, has_stood) = self.clock.turn(now, due);
        if has_stood {
            self.next_heartbeat = now; // The broker may be about to count us as dead.
        }
        match event {
            Event::Started { attempts } => self.started(now, attempts),
            Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)) => self.acknowledged(now, ack),
            Event::BrokerSaid(BrokerToWorker::Introduce(introduce)) => self.introduced(now, introduce),
            Event::BrokerSaid(BrokerToWorker::Stop(id)) => self.stop(now, id),
            Event::BrokerSaid(BrokerToWorker::Overtaken(told)) => self.overtaken(now, told),
            Event::Opened { link, key, open } => self.opened(now, link, key, *open),
            Event::ClientAlive { id, link } => self.client_alive(now, id, link),
            Event::Released { id, link } => self.let_go(now, id, link),
            Event::Aborted { id, link } => self.let_go(now, id, link),
            Event::Received { id } => self.received(now, id),
            Event::ReceiveFailed { id, code, text } => self.receive_failed(now, id, code, text),
            Event::BatchReached { batch, phase } => self.reached(now, batch, phase),
            Event::BatchAnswered { batch, times } => self.answered(now, batch, &times),
            Event::BatchEnded { batch, ended } => self.batch_ended(now, batch, ended),
            Event::Kept { id, failure } => self.kept(now, id, failure),
            Event::DialFailed { id, text } => self.dial_failed(now, id, text),
            Event::Sampled(sample) => self.sampled(now, sample),
            Event::DrainAsked => self.drain(now),
            Event::Deadline => {}
        }
        self.look_at_clock(now);
        if !self.exited {
            self.pump(now);
        }
        self.attempts.tidy();
        self.leave_if_drained(now);
        std::mem::take(&mut self.actions)
    }

    /// When the shell must send [`Event::Deadline`] if no other event comes first.
    pub fn next_deadline(&self) -> Option<MonoTime> {
        if self.exited {
            return None;
        }
        let given_up = self.attempts.iter().filter_map(|attempt| attempt.given_up_at(&self.config));
        let expiries = self.attempts.iter().filter_map(Attempt::expires_at);
        let rested = self.attempts.first_rest().map(|since| since + self.config.result_kept);
        let speaks = self.attempts.iter().any(|attempt| attempt.link.is_some());
        let progress = speaks.then_some(self.next_progress);
        let others = [Some(self.next_heartbeat), self.drain_until, self.wake, self.next_news, progress, rested];
        let first = given_up.chain(expiries).chain(others.into_iter().flatten()).min();
        first.map(|at| self.clock.outside(at))
    }

    /// The number of attempts held, finished ones included.
    pub fn attempts_held(&self) -> usize {
        self.attempts.len()
    }

    // The broker.

    fn started(&mut self, now: MonoTime, restored: Vec<Restored>) {
        for Restored { ticket, manifest, runs, outcome, runs_begun } in restored {
            let id = ticket.body.attempt_id();
            let is_deadly = outcome.is_none() && runs_begun >= DEADLY_RUNS_MAX;
            let state = match outcome {
                Some(outcome) => State::Finished { outcome, ended: now, taken: false, reported: false },
                None => State::Ready,
            };
            let work = Work { runs, is_suspect: runs_begun > 0, ..Work::of(&manifest) };
            self.admit(Attempt { work, ..Attempt::new(ticket.body, state, now) });
            if is_deadly {
                let text = format!("the worker died in each of {runs_begun} runs");
                self.finish(now, id, Outcome::failed(ErrorCode::Poisonous, text));
            } else if self.attempts.get(id).is_some_and(Attempt::is_here) {
                self.enqueue(now, id);
            }
        }
        self.register();
        self.say_heartbeat(now);
    }

    /// Stores a measurement. The first one and a new model are reported at once: the next task should not send that
    /// model again.
    fn sampled(&mut self, now: MonoTime, sample: Sample) {
        let is_new = |model| !self.sample.held.contains(model);
        let is_first = !std::mem::replace(&mut self.sampled, true);
        let has_news = self.seq > 0 && !self.exited && (is_first || sample.held.iter().any(is_new));
        self.sample = sample;
        if has_news {
            self.say_heartbeat(now);
        }
    }

    fn register(&mut self) {
        self.actions.push(Action::TellBroker(WorkerToBroker::Register(self.config.register.clone())));
    }

    fn say_heartbeat(&mut self, now: MonoTime) {
        self.seq += 1;
        (self.last_heartbeat, self.next_heartbeat) = (now, now + self.config.heartbeat);
        let (attempts, names_all) = self.attempts.reports();
        let heartbeat = Heartbeat {
            worker: self.config.register.worker,
            epoch: self.config.register.epoch,
            seq: self.seq,
            draining: self.drain_until.is_some(),
            keeps_no_more: self.is_full(true),
            load: self.sample.load.clone(),
            attempts,
            names_all,
            held: self.sample.held.clone(),
            warm: self.sample.warm.clone(),
            link_bytes_per_s: self.sample.link_bytes_per_s,
            broker_rtt_us: u32::try_from(self.broker_rtt.map_or(0, |(rtt, _)| rtt.as_micros())).unwrap_or(u32::MAX),
            lanes: self.lane_loads(),
            costs: self.costs.said(),
        };
        self.actions.push(Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)));
        if !self.config.rules.holds(Rule::RepeatFinished) {
            self.mark_reported(|_| true);
        }
    }

    fn acknowledged(&mut self, now: MonoTime, ack: HeartbeatAck) {
        if (ack.worker, ack.epoch) != (self.config.register.worker, self.config.register.epoch) {
            return;
        }
        self.broker_heard = now;
        if ack.seq == self.seq && self.broker_rtt.is_none_or(|(_, answered)| answered < ack.seq) {
            let rtt = now.since(self.last_heartbeat);
            self.broker_rtt = Some((self.broker_rtt.map_or(rtt, |(known, _)| (known * 7 + rtt) / 8), ack.seq));
        }
        self.clock_told(ack.broker_unix_ms, now);
        // Once per heartbeat interval: a broker that keeps refusing is not asked as fast as it can answer.
        if !ack.known && now >= self.next_register {
            self.next_register = now + self.config.heartbeat;
            self.register();
            self.say_heartbeat(now);
        }
        self.mark_reported(|id| ack.forget.contains(&id));
        for id in ack.stop {
            self.stop(now, id);
        }
    }

    /// Another process is this worker by now: it takes all new tasks. What runs here may end.
    fn overtaken(&mut self, now: MonoTime, told: Overtaken) {
        let is_me = (told.worker, told.epoch) == (self.config.register.worker, self.config.register.epoch);
        if is_me && self.drain_until.is_none() {
            self.actions.push(Action::SayOvertaken);
            self.drain(now);
        }
    }

    fn mark_reported(&mut self, is_acknowledged: impl Fn(AttemptId) -> bool) {
        for attempt in self.attempts.iter_mut() {
            let id = attempt.id();
            if let State::Finished { reported, .. } = &mut attempt.state {
                *reported |= is_acknowledged(id);
            }
        }
    }

    /// The broker's wall clock now; `None` if the broker never told it.
    fn broker_unix_ms(&self, now: MonoTime) -> Option<u64> {
        Some(self.broker_clock?.unix_ms(now))
    }

    fn introduced(&mut self, now: MonoTime, introduce: Introduce) {
        let Introduce { ticket, endpoints, client_key } = introduce;
        let id = ticket.body.attempt_id();
        let is_run = ticket.body.purpose == Purpose::Run;
        if self.check(now, &ticket, ticket.body.client_key, false).is_err() {
            return; // Not from this life's broker: it will ask again.
        }
        let known = self.attempts.get(id);
        let is_dialling = known.is_some_and(|attempt| matches!(attempt.state, State::Dialling { .. }));
        if is_run && known.is_some() && !is_dialling {
            return; // The client has come.
        }
        // Without room, or without a result, the client is dialled too: it opens, and hears so at once.
        if is_run && !is_dialling && self.refusal(&ticket.body, now).is_none() {
            self.admit(Attempt::new(ticket.body, State::Dialling { until: now + GRANT_WAIT }, now));
        }
        let is_held = self.attempts.get(id).is_some();
        self.actions.push(Action::Dial { id, endpoints, client_key, is_held });
    }

    fn dial_failed(&mut self, now: MonoTime, id: AttemptId, text: String) {
        if self.attempts.get(id).is_some_and(|attempt| matches!(attempt.state, State::Dialling { .. })) {
            self.give_up(now, id, Outcome::failed(ErrorCode::Unreachable, text));
        }
    }

    // Runs.

    fn received(&mut self, now: MonoTime, id: AttemptId) {
        let Some(attempt) = self.attempts.get_mut(id).filter(|attempt| attempt.state == State::Receiving) else {
            return;
        };
        (attempt.state, attempt.work.here_since) = (State::Ready, Some(now));
        self.enqueue(now, id);
    }

    fn receive_failed(&mut self, now: MonoTime, id: AttemptId, code: ErrorCode, text: String) {
        let Some(attempt) = self.attempts.get(id).filter(|attempt| attempt.state == State::Receiving) else { return };
        if let Some(link) = attempt.link {
            self.refuse(link, id, code, text.clone());
        }
        self.give_up(now, id, Outcome::failed(code, text));
    }

    /// Ends the attempt and sends the outcome to its client.
    fn finish(&mut self, now: MonoTime, id: AttemptId, outcome: Outcome) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        attempt.state = State::Finished { outcome: outcome.clone(), ended: now, taken: false, reported: false };
        let (runs, link, window_bytes) = (attempt.work.runs.clone(), attempt.link, attempt.window_bytes);
        let held_us = attempt.held_us();
        let is_detached = attempt.ticket.detached;
        attempt.is_kept = !is_detached || !self.config.rules.holds(Rule::KeepBeforeReport);
        self.withdraw(now, id);
        if is_detached {
            self.actions.push(Action::Keep { id, outcome: outcome.clone(), runs: runs.clone() });
        }
        if let Some(link) = link {
            self.actions.push(Action::SendResult { id, link, outcome, runs, held_us, window_bytes });
        }
    }

    /// The end of a detached attempt is on disk: the broker is told soon, because somebody may wait.
    fn kept(&mut self, now: MonoTime, id: AttemptId, failure: Option<Failure>) {
        if let Some(attempt) = self.attempts.get_mut(id) {
            attempt.is_kept = true;
            if let (State::Finished { outcome, .. }, Some(failure)) = (&mut attempt.state, failure) {
                *outcome = Outcome::Failed(failure);
            }
            let soon = self.last_heartbeat + self.config.heartbeat / ENDS_APART;
            self.next_heartbeat = self.next_heartbeat.min(soon.max(now));
        }
    }

    /// Sends progress to clients: only for attempts with news, or for all, so that clients know that the worker lives.
    fn say_progress(&mut self, only_news: bool) {
        let due = self.attempts.iter_mut().filter(|attempt| !only_news || attempt.has_news && attempt.is_here());
        for attempt in due {
            attempt.has_news = false;
            let Some(link) = attempt.link else { continue };
            let phase = match attempt.state {
                State::Dialling { .. } | State::Receiving => Phase::Receiving,
                State::Ready => Phase::Waiting,
                State::Running(phase) => phase,
                // The result is on its way. This message only shows that the worker lives.
                State::Finished { .. } => Phase::Running,
            };
            let message = WorkerToClient::Progress(Progress { id: attempt.id(), phase });
            self.actions.push(Action::TellClient { link, message });
        }
    }

    // Time.

    fn look_at_clock(&mut self, now: MonoTime) {
        if self.exited {
            return;
        }
        if now >= self.next_heartbeat {
            if now.since(self.broker_heard) >= self.config.broker_silence {
                self.register();
            }
            self.say_heartbeat(now);
        }
        self.look_at_attempts(now);
        self.expire(now);
        if self.drain_until.is_some_and(|until| now >= until) {
            return self.stop_all(now);
        }
        let is_time_for_all = now >= self.next_progress;
        if is_time_for_all {
            self.next_progress = now + self.config.progress_every;
        }
        if self.next_news.take_if(|at| now >= *at).is_some() || is_time_for_all {
            self.say_progress(!is_time_for_all);
        }
    }

    fn look_at_attempts(&mut self, now: MonoTime) {
        let due = |attempt: &&Attempt| attempt.given_up_at(&self.config).is_some_and(|at| now >= at);
        let mut due: Vec<AttemptId> = self.attempts.iter().filter(due).map(Attempt::id).collect();
        due.extend(self.attempts.rested(now, self.config.result_kept));
        for id in due {
            match self.attempts.get(id) {
                Some(attempt) if attempt.is_active() => {
                    self.give_up(now, id, Outcome::failed(ErrorCode::ClientGone, "its client went away"));
                }
                _ => self.taken(id),
            }
        }
        for attempt in self.attempts.iter_mut() {
            // The client is silent: a detached attempt goes on without a link.
            if now >= attempt.heard + self.config.client_silence && attempt.link.take().is_some() {
                self.actions.push(Action::Silence { id: attempt.id() });
            }
        }
    }

    fn drain(&mut self, now: MonoTime) {
        // A second request to drain stops the worker at once.
        let wait = if self.drain_until.is_none() { self.config.drain_wait } else { Duration::ZERO };
        self.drain_until = Some(now + wait);
        self.say_heartbeat(now);
    }

    fn stop_all(&mut self, now: MonoTime) {
        let attached = |attempt: &&Attempt| attempt.is_active() && !attempt.ticket.detached;
        let ids: Vec<AttemptId> = self.attempts.iter().filter(attached).map(Attempt::id).collect();
        for id in ids {
            if let Some(link) = self.attempts.get(id).and_then(|attempt| attempt.link) {
                self.refuse(link, id, ErrorCode::Draining, "the worker is shutting down");
            }
            self.give_up(now, id, Outcome::failed(ErrorCode::Draining, "the worker shut down"));
        }
        self.exit();
    }

    /// Leaves once nobody needs this life of the worker: nothing runs, clients have their results, and the broker knows
    /// of the ends whose results stay on disk. A silent broker hears of them in the next life.
    fn leave_if_drained(&mut self, now: MonoTime) {
        let is_silent = now.since(self.broker_heard) >= self.config.broker_silence;
        let is_told = |attempt: &Attempt| is_silent || !attempt.ticket.detached || attempt.is_reported();
        let idle =
            |attempt: &Attempt| !attempt.is_active() && attempt.is_kept && !attempt.needs_client() && is_told(attempt);
        if self.drain_until.is_some() && !self.exited && self.attempts.iter().all(idle) {
            self.exit();
        }
    }

    fn exit(&mut self) {
        self.exited = true;
        let leave = Leave { worker: self.config.register.worker, epoch: self.config.register.epoch };
        self.actions.push(Action::TellBroker(WorkerToBroker::Leave(leave)));
        self.actions.push(Action::Exit);
    }
}
