//! The async task that owns a client: turns every source into an event of the core's machine and carries out every
//! action. Owns the broker's connection, the links and the sessions. Never decides: between an event and the last of
//! its actions nothing is awaited.

mod direct;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    MonoTime,
    client::{Action, Client, Config, End, Event, News as CoreNews},
};
use mesh_transport::{Admitted, Context, Dialer, Heard, Inbox, Limits, Listener, Received};
use proto_msgs::{
    AttemptId, BrokerToClient, ClientId, ClientToBroker, DecodeError, ErrorCode, Failure, Frame, Outcome, PublicKey,
    TaskId,
};
use tokio::{
    sync::mpsc,
    task::yield_now,
    time::{MissedTickBehavior, sleep_until},
};

use crate::{
    News, Outputs, TaskError, TaskResult, Timings,
    happened::{Command, Happened, Watcher},
    links::Links,
    outputs::Output,
    questions::{Questions, Reply},
    session::{Resume, Session, Taken},
    silence::BrokerLink,
    spool::Spool,
    task::Payload,
};

/// Reports of links and transfers that may wait. Beyond, links are not read and transfers pause.
const HAPPENED_MAX: usize = 256;

/// How often questions are repeated, abandoned tasks noticed and idle links closed.
const TICK: Duration = Duration::from_secs(1);

/// Time after which a broker that refused this client's key is dialled again: longer than a connection takes.
const REDIAL_AFTER: Duration = Duration::from_secs(5);

/// Time that the last messages get to leave.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// The parts of a new driver.
pub(crate) struct Setup {
    pub(crate) client: ClientId,
    pub(crate) context: Context,
    pub(crate) broker: Dialer,
    pub(crate) broker_key: Option<PublicKey>,
    pub(crate) broker_link: BrokerLink,
    pub(crate) listener: Option<Listener>,
    pub(crate) admitted: Admitted,
    pub(crate) endpoints: Vec<String>,
    pub(crate) spool: Spool,
}

/// A task of this process.
#[derive(Debug)]
struct Live {
    watcher: Watcher,
    payload: Option<Arc<Payload>>,
    submitted: Instant,
    placed: Option<Instant>,
    sent: Option<Instant>,
    sent_bytes: u64,
    outputs: Vec<Output>,
    cancelled: Vec<Reply<Outcome>>,
    is_abandoned: bool,
}

pub(crate) struct Driver {
    origin: Instant,
    machine: Client,
    connect_wait: Duration,
    context: Context,
    broker: Dialer,
    broker_key: Option<PublicKey>,
    broker_link: BrokerLink,
    /// When the broker last refused this client's key, or was dialled again since.
    refused_at: Option<Instant>,
    commands: mpsc::Receiver<Command>,
    happened: mpsc::Sender<Happened>,
    happened_inbox: mpsc::Receiver<Happened>,
    listened: Option<Inbox<Received>>,
    links: Links,
    sessions: BTreeMap<AttemptId, Session>,
    live: BTreeMap<TaskId, Live>,
    questions: Questions,
    endpoints: Vec<String>,
    spool: Spool,
    /// `Close` messages not yet sent to the broker.
    closes: Vec<Frame>,
    /// Whether `closes` has waited for one turn of the loop, so that the tasks' callers know their ends.
    closes_have_waited: bool,
    /// Events raised while an action is carried out. They are handled after its sibling actions.
    raised: VecDeque<Event>,
    is_stepping: bool,
    waits: u64,
}

impl Driver {
    pub(crate) fn new(setup: Setup, commands: mpsc::Receiver<Command>) -> Self {
        let config =
            Config { key: setup.context.public_key(), endpoints: setup.endpoints.clone(), ..Config::new(setup.client) };
        let (happened, happened_inbox) = mpsc::channel(HAPPENED_MAX);
        let (door, listened) = setup.listener.map(Listener::spawn).unzip();
        Self {
            origin: Instant::now(),
            // A little shorter than the machine's own limit, so that the user learns which address was tried.
            connect_wait: config.connect_wait.mul_f32(0.9),
            machine: Client::new(config),
            context: setup.context.clone(),
            broker: setup.broker,
            broker_key: setup.broker_key,
            broker_link: setup.broker_link,
            refused_at: None,
            commands,
            links: Links::new(setup.context, happened.clone(), door, setup.admitted),
            happened,
            happened_inbox,
            listened,
            sessions: BTreeMap::new(),
            live: BTreeMap::new(),
            questions: Questions::new(setup.client),
            endpoints: setup.endpoints,
            spool: setup.spool,
            closes: Vec::new(),
            closes_have_waited: false,
            raised: VecDeque::new(),
            is_stepping: false,
            waits: 0,
        }
    }

    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let closed = loop {
            let deadline = self.machine.next_deadline();
            let at = self.origin + Duration::from_micros(deadline.map_or(0, MonoTime::as_micros));
            let later = self.links.later_due().unwrap_or(self.origin);
            // The task's caller gets a turn first: its next submission leaves together with the close.
            if self.closes_have_waited {
                self.say_closes();
            }
            self.closes_have_waited = !self.closes.is_empty();
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Close { reply }) => break Some(reply),
                    Some(command) => self.obey(command),
                    None => break None,
                },
                heard = self.broker.recv() => self.broker_said(heard),
                Some(happened) = self.happened_inbox.recv() => self.reported(happened),
                received = next_of(&mut self.listened) => self.dialler_said(received),
                () = sleep_until(at.into()), if deadline.is_some() => self.step(Event::Deadline),
                () = yield_now(), if self.closes_have_waited => {}
                () = sleep_until(later.into()), if self.links.later_due().is_some() => self.links.say_later(),
                _ = tick.tick() => self.tick(),
            }
        };
        self.close().await;
        if let Some(reply) = closed {
            // The caller may have left.
            let _ = reply.send(());
        }
    }

    /// Handles one event: carries out its actions, and handles the events that these raise at once.
    fn step(&mut self, event: Event) {
        self.raised.push_back(event);
        if std::mem::replace(&mut self.is_stepping, true) {
            return;
        }
        while let Some(event) = self.raised.pop_front() {
            let now = MonoTime::from_micros(self.origin.elapsed().as_micros() as u64);
            for action in self.machine.handle(now, event) {
                self.carry_out(action);
            }
        }
        self.is_stepping = false;
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::TellBroker(message) => self.tell_broker(&message),
            Action::TellWorker { id, message } => self.tell_worker(id, &message),
            Action::Connect { grant, resume } => {
                self.connect(grant, if resume { Resume::Yes } else { Resume::No });
            }
            Action::TakeResult { result } => {
                let Some(session) = self.sessions.get_mut(&result.id) else { return };
                let taken = session.take(&result, &self.spool, &self.happened);
                self.taken(result.id, taken.unwrap_or_else(|error| vec![Taken::Broken(error)]));
            }
            Action::Disconnect { id } => {
                self.sessions.remove(&id);
                self.open_patient();
            }
            Action::Report { task, news } => self.report(task, news),
            Action::End { task, end } => self.end(task, end),
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { spec, payload, watcher } => {
                self.live.insert(spec.task, Live::new(watcher, Some(payload)));
                self.step(Event::Submit(spec));
            }
            Command::Fetch { task, watcher } if self.live.contains_key(&task) => {
                let failure = Failure::new(ErrorCode::Conflict, "this program waits for the task already");
                // The caller may have left.
                let _ = watcher.done.send(Err(TaskError::Failed(failure)));
            }
            Command::Fetch { task, watcher } => {
                self.live.insert(task, Live::new(watcher, None));
                self.step(Event::Fetch { task });
            }
            Command::Cancel { task, reply } => match self.live.get_mut(&task) {
                Some(live) => {
                    live.cancelled.extend(reply);
                    self.step(Event::Cancel { task });
                }
                None => {
                    if let Some(reply) = reply {
                        let message = self.questions.cancel(task, reply);
                        self.tell_broker(&message);
                    }
                }
            },
            Command::Ask { question, reply } => {
                let message = self.questions.ask(question, reply);
                self.tell_broker(&message);
            }
            // Handled by `run`.
            Command::Close { .. } => {}
        }
    }

    /// Dials a broker that has refused this client's key: the key may be on its list again.
    fn redial_broker(&mut self) {
        self.refused_at = Some(Instant::now());
        let endpoint = self.broker.endpoint().to_owned();
        match self.context.dial(&endpoint, self.broker_key, Limits::CONTROL) {
            Ok(broker) => self.broker = broker,
            Err(error) => tracing::warn!(%error, "the broker cannot be dialled again"),
        }
    }

    fn tick(&mut self) {
        if self.refused_at.is_some_and(|at| at.elapsed() >= REDIAL_AFTER) {
            self.redial_broker();
        }
        for message in self.questions.repeat() {
            self.tell_broker(&message);
        }
        let left = self.live.iter_mut().filter(|(_, live)| live.watcher.done.is_closed() && !live.is_abandoned);
        let left: Vec<TaskId> = left
            .map(|(task, live)| {
                live.is_abandoned = true;
                *task
            })
            .collect();
        for task in left {
            self.step(Event::Cancel { task });
        }
        self.keep_patient_alive();
        let sessions = &self.sessions;
        self.links.retire_idle(|link| sessions.values().any(|session| session.link() == Some(link)));
    }

    fn tell_broker(&mut self, message: &ClientToBroker) {
        match message.to_frame() {
            Ok(frame) if matches!(message, ClientToBroker::Close(_)) => self.closes.push(frame),
            Ok(frame) => {
                self.say_closes();
                // A message that cannot be queued is sent again later: the machine and the questions repeat theirs.
                let _ = self.broker.send(frame);
            }
            Err(error) => tracing::warn!(%error, message = message.name(), "message not sent"),
        }
    }

    fn say_closes(&mut self) {
        for frame in self.closes.drain(..) {
            let _ = self.broker.send(frame);
        }
    }

    fn broker_said(&mut self, heard: Heard) {
        let Heard::Frame(frame) = heard else {
            tracing::debug!(?heard, "connection to the broker");
            self.refused_at = matches!(heard, Heard::Refused).then(Instant::now);
            if self.broker_link.note(&heard) {
                let waiting: Vec<TaskId> = self.live.keys().copied().collect();
                waiting.into_iter().for_each(|task| self.report(task, CoreNews::BrokerSilent));
            }
            return;
        };
        match BrokerToClient::from_frame(&frame) {
            Ok(BrokerToClient::Answer(answer)) => self.questions.answered(answer),
            Ok(message) => {
                if let BrokerToClient::Ended(ended) = &message {
                    self.questions.ended(ended);
                }
                self.step(Event::BrokerSaid(message));
            }
            Err(error @ (DecodeError::Version { .. } | DecodeError::Unsupported { .. })) => {
                if matches!(error, DecodeError::Version { .. }) {
                    // If the queue is full, the broker hears it another time.
                    let _ = self.broker.send(Frame::unsupported());
                }
                self.refused(&format!("the broker at {} cannot be used: {error}", self.broker.endpoint()));
            }
            Err(error) => tracing::debug!(%error, "message of the broker dropped"),
        }
    }

    /// Ends all questions and tasks: the broker will never answer.
    fn refused(&mut self, why: &str) {
        self.questions.fail(why);
        for (task, live) in std::mem::take(&mut self.live) {
            let _ = live.watcher.done.send(Err(TaskError::Version(why.to_owned())));
            self.step(Event::Cancel { task });
        }
    }

    fn report(&mut self, task: TaskId, news: CoreNews) {
        if let (CoreNews::Placed { .. }, Some(live)) = (&news, self.live.get_mut(&task)) {
            live.placed = Some(Instant::now());
            live.sent = None;
            live.sent_bytes = 0;
        }
        let news = match news {
            CoreNews::Queued { position, reason, no_worker_fits, starts_in_ms } => {
                News::Queued { position, reason, no_worker_fits, starts_in: starts_in_ms.map(millis) }
            }
            CoreNews::Placed { attempt, worker, worker_name, model_held, lane, predicted_ms } => {
                let predicted = predicted_ms.map(millis);
                News::Placed { attempt, worker, worker_name, model_held, lane, predicted }
            }
            CoreNews::Phase(phase) => News::Phase(phase),
            CoreNews::Retrying { attempt, worker_name, why } => News::Retrying { attempt, worker_name, why },
            CoreNews::BrokerSilent => News::BrokerSilent { hint: self.broker_link.hint() },
        };
        self.tell_user(task, news);
    }

    fn tell_user(&self, task: TaskId, news: News) {
        if let Some(live) = self.live.get(&task) {
            // News is only informative, so unread news may be lost.
            let _ = live.watcher.news.try_send(news);
        }
    }

    fn end(&mut self, task: TaskId, end: End) {
        self.sessions.retain(|id, _| id.task != task);
        let Some(live) = self.live.remove(&task) else { return };
        let timings = live.timings(&end.outcome);
        for reply in live.cancelled {
            let _ = reply.send(Ok(end.outcome.clone()));
        }
        let result = match end.outcome {
            Outcome::Done { .. } => {
                let of_outputs = live.outputs.first().map_or(1, Output::items);
                let items = live.payload.as_ref().map_or(of_outputs, |payload| payload.manifest.items);
                let outputs = Outputs::new(live.outputs, items);
                let runs = end.result.map(|result| result.runs).unwrap_or_default();
                let (worker, attempts, lane) = (end.worker, end.attempt, end.lane);
                Ok(TaskResult { task, outputs, runs, lane, worker, attempts, timings })
            }
            Outcome::Failed(failure) => Err(match end.retry_after_ms {
                Some(after) => TaskError::Busy { failure, retry_after: millis(after) },
                None => TaskError::Failed(failure),
            }),
            Outcome::Cancelled => Err(TaskError::Cancelled),
        };
        // The handle may be gone.
        let _ = live.watcher.done.send(result);
    }

    /// Cancels all attached tasks, then waits until queued messages have left.
    async fn close(mut self) {
        let tasks: Vec<TaskId> = self.live.keys().copied().collect();
        for task in tasks {
            self.step(Event::Cancel { task });
        }
        self.say_closes();
        self.links.close().await;
        let _ = tokio::time::timeout(CLOSE_WAIT, self.broker.close()).await;
    }
}

impl Live {
    fn new(watcher: Watcher, payload: Option<Arc<Payload>>) -> Self {
        Self {
            watcher,
            payload,
            submitted: Instant::now(),
            placed: None,
            sent: None,
            sent_bytes: 0,
            outputs: Vec::new(),
            cancelled: Vec::new(),
            is_abandoned: false,
        }
    }

    fn timings(&self, outcome: &Outcome) -> Timings {
        let (load_us, run_us) = match outcome {
            Outcome::Done { run_us, load_us } => (*load_us, *run_us),
            Outcome::Failed(_) | Outcome::Cancelled => (0, 0),
        };
        Timings {
            total: self.submitted.elapsed(),
            queued: self.placed.map_or_else(Duration::default, |placed| placed.duration_since(self.submitted)),
            sending: self
                .placed
                .zip(self.sent)
                .map_or_else(Duration::default, |(placed, sent)| sent.duration_since(placed)),
            loading: Duration::from_micros(load_us),
            running: Duration::from_micros(run_us),
            sent_bytes: self.sent_bytes,
        }
    }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

/// The listener's next message; pending for ever if there is no listener.
async fn next_of(listened: &mut Option<Inbox<Received>>) -> Received {
    if let Some(inbox) = listened
        && let Some(received) = inbox.recv().await
    {
        return received;
    }
    std::future::pending().await
}
