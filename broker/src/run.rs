//! Owns the broker's life: read the store, listen, run the loop, stop.
//!
//! Owns the one loop around the machine: socket, store, questions, deadline -> [`Event`] -> `handle` -> actions.
//! Nothing awaits between `handle` and the last action, so the machine's view never differs from what was sent.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use mesh_core::{
    MonoTime,
    broker::{Action, Broker, Event},
};
use mesh_transport::{Admit, Admitted, Context, ContextError, Limits, ListenError, Listener, Received};
use proto_msgs::{DecodeError, Frame, PeerId, PublicKey, ToBroker};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{sleep_until, timeout},
};
use tracing::{debug, error, info, warn};

use crate::{
    admin::{self, Pages, Phase, PhaseTeller, Question},
    authorized,
    config::{Config, unix_ms},
    metrics::{self, LoopMetrics, Snapshot},
    store::{self, Opened, StoreError},
};

/// Messages taken from the socket before other sources have their turn. Enough to make a wake-up cheap, few enough that
/// deadlines and the store's events wait for less than a millisecond.
const DRAIN_MAX: usize = 64;

/// Messages that are handled before the answers to them are sent together: libzmq's thread is woken once for all of
/// them, and the first one waits for some tens of microseconds.
const TOGETHER_MAX: usize = 8;

/// Questions from the admin port that may wait.
const QUESTIONS_MAX: usize = 16;

/// Time for queued messages to leave at the end.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// Why the broker did not start, or stopped early.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The address cannot be listened on.
    #[error("--bind: {0}")]
    Listen(#[from] ListenError),
    /// There can be no sockets.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The admin port cannot be opened.
    #[error("--admin {address}: {source}; stop the program that listens there, choose another port, or write none")]
    Admin {
        /// The address.
        address: std::net::SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store's thread has ended.
    #[error("the store's thread has ended: this is a bug, the log says more")]
    StoreGone,
    /// Signals cannot be awaited, or standard output is closed.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

impl RunError {
    /// Whether the settings are wrong, and not the circumstances.
    pub const fn is_configuration(&self) -> bool {
        match self {
            Self::Listen(_) | Self::Admin { .. } => true,
            Self::Context(error) => matches!(error, ContextError::Keys(_)),
            Self::Store(error) => error.is_configuration(),
            Self::StoreGone | Self::System(_) => false,
        }
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// If a needed resource is not available, or a thread died.
pub async fn run(config: Config) -> Result<(), RunError> {
    let mut stop = Stop::new()?;
    let mut registry = metrics::registry();
    let metrics = LoopMetrics::new(&mut registry);
    let (ask, questions) = mpsc::channel(QUESTIONS_MAX);
    let phase = PhaseTeller::new();
    let pages = Pages { registry, phase: phase.clone(), ask };
    let admin = match config.admin {
        Some(address) => Some(admin::serve(address, pages).map_err(|source| RunError::Admin { address, source })?),
        None => None,
    };
    if config.is_open_to_the_network() {
        warn!(
            "{} WITHOUT KEYS: everybody who reaches this port can run models and read results; \
             make keys with `mesh-broker keygen FILE` and start with --key-file and --authorized-keys",
            config.bind
        );
    }
    // The port is bound first: a wrong address is reported at once, and early peers only wait.
    let context = Context::new(config.security)?;
    let admitted = config.authorized.map(authorized::follow);
    let admit = admitted.clone().map_or(Admit::Anyone, Admit::Listed);
    let listener = context.listen(&config.bind, admit, Limits::CONTROL)?;
    let opened = tokio::select! {
        opened = store::open(config.store, config.store_wait) => opened?,
        () = stop.asked() => return Ok(()),
    };
    announce(listener.endpoint(), admin)?;
    phase.set(Phase::Serving);
    let start = Instant::now();
    let machine = mesh_core::broker::Config { origin_unix_ms: unix_ms(), ..config.machine };
    let Opened { handle, restored, events } = opened;
    let shell = Shell {
        broker: Broker::new(machine),
        listener,
        store: handle,
        admitted,
        metrics,
        start,
        questions,
        outgoing: Vec::new(),
    };
    let ended = shell.turn(restored, events, &mut stop, &phase).await;
    info!("stopped");
    ended
}

/// Tells scripts where to connect. Everything else goes to standard error.
fn announce(endpoint: &str, admin: Option<std::net::SocketAddr>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "listening on {endpoint}")?;
    if let Some(address) = admin {
        writeln!(out, "admin on http://{address}")?;
    }
    out.flush()
}

/// The machine and the resources that its actions touch.
struct Shell {
    broker: Broker,
    listener: Listener,
    store: store::Handle,
    /// Keys that may send messages; `None` in a mesh without keys.
    admitted: Option<Admitted>,
    metrics: LoopMetrics,
    start: Instant,
    questions: mpsc::Receiver<Question>,
    /// Messages to be sent before the loop waits again.
    outgoing: Vec<(PeerId, Frame)>,
}

/// The reason why the loop woke.
enum Wake {
    Stop,
    Heard(Received),
    Store(Option<Event>),
    Asked(Question),
    Deadline,
}

impl Shell {
    async fn turn(
        mut self,
        restored: Vec<mesh_core::broker::TaskRecord>,
        mut events: mpsc::Receiver<Event>,
        stop: &mut Stop,
        phase: &PhaseTeller,
    ) -> Result<(), RunError> {
        if !restored.is_empty() {
            self.handle(Event::Restored(restored));
        }
        let ended = loop {
            self.send_all();
            let deadline = self.broker.next_deadline();
            // The socket is last: if peers flood it, the other sources still have their turn.
            let wake = tokio::select! {
                biased;
                () = stop.asked() => Wake::Stop,
                event = events.recv() => Wake::Store(event),
                Some(question) = self.questions.recv() => Wake::Asked(question),
                () = at(self.start, deadline) => Wake::Deadline,
                received = self.listener.recv() => Wake::Heard(received),
            };
            match wake {
                Wake::Stop => break Ok(()),
                Wake::Store(None) => break Err(RunError::StoreGone),
                Wake::Store(Some(event)) => {
                    self.metrics.store_events.inc();
                    self.handle(event);
                }
                Wake::Asked(question) => drop(question.send(self.snapshot())),
                Wake::Deadline => {
                    self.metrics.deadlines.inc();
                    self.handle(Event::Deadline);
                }
                Wake::Heard(received) => self.drain(received),
            }
        };
        info!("stopping");
        drop(events);
        phase.set(Phase::Stopping);
        if timeout(CLOSE_MAX, self.listener.close()).await.is_err() {
            debug!("the socket did not close in time");
        }
        self.store.close().await;
        ended
    }

    /// Handles this message and those that have already arrived.
    fn drain(&mut self, first: Received) {
        self.heard(first);
        for handled in 1..DRAIN_MAX {
            if handled.is_multiple_of(TOGETHER_MAX) {
                self.send_all();
            }
            let Some(next) = self.listener.try_recv() else { return };
            self.heard(next);
        }
    }

    fn heard(&mut self, Received { peer, key, frame }: Received) {
        if !self.may_speak(key) {
            self.metrics.revoked.inc();
            return;
        }
        match ToBroker::from_frame(&frame) {
            Ok(ToBroker::Client(message)) => {
                self.metrics.message(message.kind());
                self.handle(Event::ClientSaid { peer, key, message });
            }
            Ok(ToBroker::Worker(message)) => {
                self.metrics.message(message.kind());
                self.handle(Event::WorkerSaid { peer, key, message });
            }
            Err(error) => self.undecodable(peer, &error),
        }
    }

    /// Whether the sender may still send. Keys are admitted when a connection is made, so a key that left the list
    /// since then is refused here.
    fn may_speak(&self, key: Option<PublicKey>) -> bool {
        match (&self.admitted, key) {
            (None, _) => true,
            (Some(admitted), Some(key)) => admitted.contains(&key),
            (Some(_), None) => false,
        }
    }

    fn undecodable(&mut self, peer: PeerId, error: &DecodeError) {
        debug!("{peer:?}: {error}");
        self.metrics.undecodable(error);
        if let DecodeError::Version { .. } = error {
            self.outgoing.push((peer, Frame::unsupported()));
        }
    }

    fn handle(&mut self, event: Event) {
        let began = Instant::now();
        let now = MonoTime::from_micros(began.duration_since(self.start).as_micros() as u64);
        for action in self.broker.handle(now, event) {
            match action {
                Action::TellClient { peer, message } => self.encoded(peer, message.name(), message.to_frame()),
                Action::TellWorker { peer, message } => self.encoded(peer, message.name(), message.to_frame()),
                Action::Save(change) => self.store.save(change),
            }
        }
        self.metrics.handle_seconds.observe(began.elapsed().as_secs_f64());
    }

    fn encoded(&mut self, peer: PeerId, name: &str, frame: Result<Frame, proto_msgs::EncodeError>) {
        match frame {
            Ok(frame) => self.outgoing.push((peer, frame)),
            Err(error) => {
                self.metrics.unsendable.inc();
                error!("{name} was not sent: {error}");
            }
        }
    }

    fn send_all(&mut self) {
        for (peer, frame) in self.outgoing.drain(..) {
            // Lost messages are repeated by the peer that misses an answer. The socket counts them.
            if let Err(error) = self.listener.send(peer, frame) {
                debug!("{peer:?}: {error}");
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            gauges: self.broker.gauges(),
            counters: self.broker.counters(),
            traffic: self.listener.traffic(),
            store: self.store.health(),
            uptime: self.start.elapsed(),
        }
    }
}

/// Sleeps until the machine's deadline, or for ever.
async fn at(start: Instant, deadline: Option<MonoTime>) {
    match deadline {
        Some(deadline) => sleep_until((start + deadline.since(MonoTime::ZERO)).into()).await,
        None => std::future::pending().await,
    }
}

/// The stop signals from a person or a supervisor.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
