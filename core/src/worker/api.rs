//! What happens to a worker and what it orders.

use std::time::Duration;

use proto_msgs::{
    AttemptId, BrokerToWorker, Digest, ErrorCode, Load, Manifest, Open, Outcome, Phase, PublicKey, Register, Ticket,
    WorkerToBroker, WorkerToClient,
};

use crate::Rules;

/// A direct connection as the shell numbers it. A number is not used twice.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LinkId(pub u64);

/// Something happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The process has started; `attempts` are the detached ones found in the state folder. Given once, first.
    Started { attempts: Vec<Restored> },
    /// The broker's message arrived.
    BrokerSaid(BrokerToWorker),
    /// A client opens an attempt on a link, proven to hold `key` if the mesh has keys.
    Opened { link: LinkId, key: Option<PublicKey>, open: Box<Open> },
    /// The client says that it is there (any message of the attempt counts), on this link.
    ClientAlive { id: AttemptId, link: LinkId },
    /// The client has the result.
    Released { id: AttemptId },
    /// The client wants no result.
    Aborted { id: AttemptId },
    /// Model and inputs are here and verified.
    Received { id: AttemptId },
    /// Model and inputs did not arrive.
    ReceiveFailed { id: AttemptId, code: ErrorCode, text: String },
    /// The run has come this far.
    Reached { id: AttemptId, phase: Phase },
    /// The run is over; outputs, if any, are in the shell's keeping.
    RunEnded { id: AttemptId, outcome: Outcome },
    /// The client of a dial order could not be reached.
    DialFailed { id: AttemptId, text: String },
    /// The machine was measured. Sent a little more often than heartbeats are.
    Sampled(Sample),
    /// Finish what runs, take nothing new, then exit.
    DrainAsked,
    /// The time that `next_deadline` named has come.
    Deadline,
}

/// A detached attempt found on disk after a restart.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored {
    /// What the client was allowed.
    pub ticket: Ticket,
    /// The outcome if it had ended; `None` if it must run (again).
    pub outcome: Option<Outcome>,
    /// Runs of it that were begun.
    pub runs_begun: u32,
}

/// A measurement.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// How busy the machine is.
    pub load: Load,
    /// Models in the blob store, most recently used first.
    pub held: Vec<Digest>,
    /// Models that are loaded.
    pub warm: Vec<Digest>,
    /// Speed of the direct link from real transfers; 0 if none was seen.
    pub link_bytes_per_s: u64,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send to the broker.
    TellBroker(WorkerToBroker),
    /// Send to a client.
    TellClient { link: LinkId, message: WorkerToClient },
    /// Take model and inputs in over this link, or go on doing so after the link broke. The shell answers the client with
    /// `Accept`, and this machine with `Received` or `ReceiveFailed`. Attempts opened before keep what has arrived.
    Receive { id: AttemptId, link: LinkId, manifest: Box<Manifest>, ticket: Box<Ticket>, resume: bool },
    /// Run it; ends in `RunEnded`, at the latest after `limit`. Of a detached attempt it is first noted on disk that a run
    /// was begun: should the run take the worker down with it, the next life must know.
    Run { id: AttemptId, limit: Duration },
    /// Stop the transfer or run of this attempt. No event follows for it.
    Kill { id: AttemptId },
    /// Send outcome and outputs over this link, again from the beginning if some were sent over an earlier one.
    SendResult { id: AttemptId, link: LinkId, outcome: Outcome, window_bytes: u32 },
    /// Keep the outcome and outputs of a detached attempt on disk.
    Keep { id: AttemptId, outcome: Outcome },
    /// Delete everything of this attempt.
    Free { id: AttemptId },
    /// Connect to a client's listener and say `DialIn`; ends in `Opened` or `DialFailed`.
    Dial { id: AttemptId, endpoints: Vec<String>, client_key: Option<PublicKey> },
    /// All is done: leave.
    Exit,
}

/// A worker's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// What it says of itself.
    pub register: Register,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Without a word from the broker for this long, registration is repeated with each heartbeat.
    pub broker_silence: Duration,
    /// A client that says nothing for this long has left its attached attempts.
    pub client_silence: Duration,
    /// Time between signs of life to clients.
    pub progress_every: Duration,
    /// A run may take this long where the task's deadline does not end it earlier.
    pub run_limit: Duration,
    /// Results of detached attempts are kept this long.
    pub result_kept: Duration,
    /// Running attempts get this long to finish when draining.
    pub drain_wait: Duration,
    /// Rules in force.
    pub rules: Rules,
}

impl Config {
    /// Settings with the usual times.
    pub fn new(register: Register) -> Self {
        let heartbeat = Duration::from_millis(u64::from(register.heartbeat_ms));
        Self {
            register,
            heartbeat,
            broker_silence: heartbeat * 3,
            // Clients speak every second: four may be lost.
            client_silence: Duration::from_secs(5),
            progress_every: Duration::from_secs(1),
            run_limit: Duration::from_secs(300),
            result_kept: Duration::from_secs(3600),
            drain_wait: Duration::from_secs(30),
            rules: Rules::default(),
        }
    }
}
