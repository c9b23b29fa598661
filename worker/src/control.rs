//! The control loop: the machine, the connection to the broker, the clock. It has its own thread, so heartbeats leave
//! in time whatever transfers and models do.
//!
//! Nothing is awaited between `handle` and the last action. An order goes to the desk without waiting for the desk.

use std::{
    io::{self, Write},
    thread,
    time::{Duration, Instant},
};

use mesh_core::{
    MonoTime,
    worker::{Action, Event, Worker},
};
use mesh_transport::{DialError, Dialer, Heard, Limits};
use proto_msgs::{BrokerToWorker, DecodeError, Frame, PublicKey, WorkerToBroker};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::{debug, error, info, warn};

/// Events queued for the machine, which takes microseconds for each.
pub(crate) const EVENTS_MAX: usize = 1024;

/// Orders queued for the desk. After a long stop, all kept results may expire in one step, and each is an order. A desk
/// that is further behind hangs.
pub(crate) const ORDERS_MAX: usize = 16_384;

/// A live broker answers within this time; otherwise the worker logs a warning.
const CONNECT_WAIT: Duration = Duration::from_secs(3);

/// Time for the last message (Leave) to leave.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Events handled in a row before other work has its turn.
const EVENTS_AT_ONCE: usize = 64;

/// A broker that is silent this long is dialled again: a connection that was refused once, because the key was not yet
/// authorized, is not retried by itself.
const REDIAL_AFTER: Duration = Duration::from_secs(5);

/// The broker's address and key, and the transport that dials it.
pub(crate) struct BrokerAddress {
    pub(crate) transport: mesh_transport::Context,
    pub(crate) endpoint: String,
    pub(crate) key: Option<PublicKey>,
}

impl BrokerAddress {
    fn dial(&self) -> Result<Dialer, DialError> {
        self.transport.dial(&self.endpoint, self.key, Limits::CONTROL)
    }
}

/// The control loop and everything it owns.
pub(crate) struct Control {
    machine: Worker,
    address: BrokerAddress,
    broker: Dialer,
    /// Since when the broker answers nothing, or was last dialled; `None` once it has answered.
    unanswered_since: Option<Instant>,
    events: mpsc::Receiver<Event>,
    desk: mpsc::Sender<Action>,
    origin: Instant,
    /// The ready line, printed once on standard output when the broker knows this worker.
    ready: Option<String>,
    is_over: bool,
    is_overtaken: bool,
    terminate: Signal,
    interrupt: Signal,
}

/// Why the loop ended before the worker was told to leave.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("signals cannot be listened to: {0}")]
    Signals(#[from] io::Error),
    #[error(transparent)]
    Address(#[from] DialError),
    #[error("another process has this worker's id")]
    Overtaken,
    #[error("orders are no longer carried out: the worker hangs, start it again")]
    DeskStuck,
}

impl Control {
    /// A control loop that has not run yet. `ready` is the ready line for scripts.
    pub(crate) fn new(
        machine: Worker,
        address: BrokerAddress,
        events: mpsc::Receiver<Event>,
        desk: mpsc::Sender<Action>,
        ready: String,
    ) -> Result<Self, ControlError> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let (broker, origin) = (address.dial()?, Instant::now());
        Ok(Self {
            machine,
            address,
            broker,
            unanswered_since: Some(origin),
            events,
            desk,
            origin,
            ready: Some(ready),
            is_over: false,
            is_overtaken: false,
            terminate,
            interrupt,
        })
    }

    /// Runs until the machine says that all is done. The event `first` comes before all others.
    pub(crate) async fn run(mut self, first: Event) -> Result<(), ControlError> {
        self.greet_broker().await;
        self.happened(first)?;
        while !self.is_over {
            let deadline = self.machine.next_deadline();
            let wait = deadline.map_or(Duration::MAX, |at| at.since(self.now()));
            tokio::select! {
                biased;
                () = sleep(wait), if deadline.is_some() => {
                    self.redial_silent_broker();
                    self.happened(Event::Deadline)?;
                }
                heard = self.broker.recv() => self.heard(heard)?,
                Some(event) = self.events.recv() => {
                    self.happened(event)?;
                    for _ in 0..EVENTS_AT_ONCE {
                        let Ok(event) = self.events.try_recv() else { break };
                        self.happened(event)?;
                    }
                }
                _ = self.terminate.recv() => self.asked_to_leave()?,
                _ = self.interrupt.recv() => self.asked_to_leave()?,
            }
        }
        let _ = timeout(CLOSE_WAIT, self.broker.close()).await;
        if self.is_overtaken { Err(ControlError::Overtaken) } else { Ok(()) }
    }

    /// Warns early if the broker cannot be reached. Goes on in any case, because the broker may come up.
    async fn greet_broker(&mut self) {
        tokio::select! {
            connected = self.broker.connected(CONNECT_WAIT) => if let Err(error) = connected {
                warn!("{error}; trying on");
            },
            _ = self.terminate.recv() => self.is_over = true,
            _ = self.interrupt.recv() => self.is_over = true,
        }
    }

    fn now(&self) -> MonoTime {
        MonoTime::from_micros(u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn asked_to_leave(&mut self) -> Result<(), ControlError> {
        info!("draining: finishing what runs, taking nothing new (ask again to leave at once)");
        self.happened(Event::DrainAsked)
    }

    /// Dials a broker again that has not answered for long. Checked with the heartbeats, which it answers.
    fn redial_silent_broker(&mut self) {
        if self.unanswered_since.is_none_or(|since| since.elapsed() < REDIAL_AFTER) {
            return;
        }
        self.unanswered_since = Some(Instant::now());
        match self.address.dial() {
            Ok(broker) => self.broker = broker,
            Err(error) => error!("{error}"),
        }
    }

    fn heard(&mut self, heard: Heard) -> Result<(), ControlError> {
        match heard {
            Heard::Frame(frame) => self.said(&frame),
            Heard::Connected => {
                info!(broker = self.broker.endpoint(), "connected");
                Ok(())
            }
            Heard::Lost => {
                warn!(broker = self.broker.endpoint(), "connection lost; going on with what there is");
                Ok(())
            }
            Heard::Refused => {
                let broker = self.broker.endpoint();
                error!(
                    broker,
                    "this worker's key is refused, or the broker has another key by now: see its --authorized-keys"
                );
                Ok(())
            }
        }
    }

    fn said(&mut self, frame: &Frame) -> Result<(), ControlError> {
        self.unanswered_since = None;
        match BrokerToWorker::from_frame(frame) {
            Ok(message) => {
                if let (BrokerToWorker::HeartbeatAck(ack), Some(_)) = (&message, &self.ready)
                    && ack.known
                    && let Some(line) = self.ready.take()
                {
                    say_on_stdout(line);
                }
                self.happened(Event::BrokerSaid(message))
            }
            Err(error @ (DecodeError::Version { .. } | DecodeError::Unsupported { .. })) => {
                error!("{error}");
                Ok(())
            }
            Err(error) => {
                debug!(%error, "the broker sent something that is not a message: dropped");
                Ok(())
            }
        }
    }

    fn happened(&mut self, event: Event) -> Result<(), ControlError> {
        let now = self.now();
        for action in self.machine.handle(now, event) {
            match action {
                Action::TellBroker(message) => self.tell_broker(&message),
                Action::Exit => self.is_over = true,
                Action::SayOvertaken => {
                    error!(
                        "another process is registered under this worker's id: leaving once what runs here has ended"
                    );
                    self.is_overtaken = true;
                }
                order => self.order(order)?,
            }
        }
        Ok(())
    }

    fn tell_broker(&mut self, message: &WorkerToBroker) {
        self.unanswered_since.get_or_insert_with(Instant::now);
        match message.to_frame() {
            // Queue full: the broker is away, and the next heartbeat repeats the content of this one.
            Ok(frame) => drop(self.broker.send(frame)),
            Err(error) => error!(%error, message = message.name(), "a message cannot be encoded"),
        }
    }

    fn order(&self, order: Action) -> Result<(), ControlError> {
        match self.desk.try_send(order) {
            // Messages to clients are repeated.
            Ok(()) | Err(mpsc::error::TrySendError::Full(Action::TellClient { .. })) => Ok(()),
            Err(_) => Err(ControlError::DeskStuck),
        }
    }
}

/// Prints a line on a thread of its own: an unread pipe would delay heartbeats. A closed pipe is ignored.
fn say_on_stdout(line: String) {
    let say = move || drop(writeln!(io::stdout(), "{line}"));
    if let Err(error) = thread::Builder::new().name("mesh-ready".to_owned()).spawn(say) {
        warn!(%error, "the ready line cannot be said");
    }
}
