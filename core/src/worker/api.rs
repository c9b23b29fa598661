//! What happens to a worker and what it orders.

use std::{ops::Range, time::Duration};

use proto_msgs::{
    AttemptId, BrokerToWorker, Digest, ErrorCode, Failure, Load, Manifest, Open, Outcome, Phase, PublicKey, Register,
    RunNote, Ticket, WorkerToBroker, WorkerToClient,
};

use crate::Rules;

/// A direct connection as the shell numbers it. A number is not used twice.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LinkId(pub u64);

/// A batch: rows that run together. A number is not used twice in one life of a worker.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BatchId(pub u64);

/// One of a worker's slots: a batch runs in it. Realtime slots come first.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlotId(pub u16);

/// Rows of one attempt in a batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// Whose rows.
    pub id: AttemptId,
    /// Which model they go through: 0 the manifest's `model` with the inputs, `k` the model of `then[k − 1]` with the outputs of
    /// stage `k − 1`.
    pub stage: u8,
    /// Which items, half open: each is one complete set of inputs of the model.
    pub rows: Range<u32>,
}

/// How the rows of a batch are given to the model.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BatchKind {
    /// One part; its items run one after the other, each in a runner call of its own. The single item of a task is given as
    /// the client sent it.
    Whole,
    /// One runner call with the rows of all parts, one behind the other along the first dimension. Every output must have as
    /// many rows for each item (`outputs' rows ÷ items`, without rest); else the batch failed with `RUN_PROTOCOL`.
    Packed,
    /// Each item in a runner call of its own, whose outputs are kept, and then all of them in one packed call, whose outputs are
    /// only compared with those. What goes wrong in the packed call is told by [`BatchTimes::equal`]: the batch went well if
    /// the single runs did.
    Probe,
}

/// How long a batch took.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BatchTimes {
    /// Time in the model, microseconds: all runner calls whose outputs are kept.
    pub run_us: u64,
    /// Time to start the runner and load the model, microseconds; 0 if it was warm.
    pub load_us: u64,
    /// Of a probe: the single runs' mean, microseconds, without the first where there are more.
    pub single_us: Option<u64>,
    /// Of a probe: the packed call, microseconds; `None` if it failed.
    pub packed_us: Option<u64>,
    /// Of a probe: what the comparison gave.
    pub equal: Option<Equality>,
}

/// What many rows gave, compared with single runs of them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Equality {
    /// The same, within the tolerance for floats.
    Same,
    /// Other values, or another number of rows.
    Differs,
    /// The model or the runtime does not take many rows.
    Unsupported,
    /// It cannot be told: all rows were alike, or the packed call was cut short.
    Inconclusive,
}

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
    /// The batch has come this far: [`Phase::Running`] once the model is loaded.
    BatchReached { batch: BatchId, phase: Phase },
    /// The batch is over. If it went well, the shell keeps for every part that is still wanted the outputs of these rows of
    /// this stage; if not, it keeps nothing of it, and the same rows may come again in another batch.
    BatchEnded { batch: BatchId, ended: Result<BatchTimes, Failure> },
    /// What [`Action::Keep`] ordered is on the disk, or cannot be brought there.
    Kept { id: AttemptId },
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
    /// What it consists of.
    pub manifest: Box<Manifest>,
    /// The runs it took if it had ended, as given to [`Action::Keep`].
    pub runs: Vec<RunNote>,
    /// The outcome if it had ended; `None` if it must run (again).
    pub outcome: Option<Outcome>,
    /// Lives of the worker in which a batch with rows of it was begun.
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
    /// `Accept` (not where all of an attached attempt came with its opening), and this machine with `Received` or
    /// `ReceiveFailed`. Attempts opened before keep what has arrived.
    Receive { id: AttemptId, link: LinkId, manifest: Box<Manifest>, ticket: Box<Ticket> },
    /// Run these rows; ends in [`Event::BatchEnded`].
    ///
    /// Of a detached attempt it is first noted on disk that a run was begun, once in a life of the worker: should the run take
    /// the worker down with it, the next life must know.
    RunBatch {
        /// The batch; a number is not used twice in one life.
        batch: BatchId,
        /// What runs. The rows of one runner call are those of the parts, one part behind the other. All parts are of one
        /// model, one stage's place in the way to it, and equal demands; an attempt comes once in a batch. One part unless
        /// `kind` is `Packed` or `Probe`.
        parts: Vec<Part>,
        /// The slot it occupies, for people; `device` follows from it.
        slot: SlotId,
        /// What it computes on: −1 the CPU, else the GPU of that index.
        device: i16,
        /// How the rows are given to the model.
        kind: BatchKind,
        /// Each single runner call of the batch may take this long, loading the model included for the first; the shell ends
        /// the batch with `RUN_TIMEOUT` when one takes longer. Deadlines of tasks are the machine's: it says `KillBatch`.
        limit: Duration,
    },
    /// Stop this batch. No event follows for it, and its slot is used again at once.
    KillBatch { batch: BatchId },
    /// Stop the transfer of this attempt. No event follows for it. Batches with rows of it are killed by themselves if nobody
    /// else has rows in them; else they go on.
    Kill { id: AttemptId },
    /// Send outcome and outputs over this link, again from the beginning if some were sent over an earlier one. The outputs are
    /// those of the last stage, all rows in order, joined along the first dimension.
    ///
    /// `held_us`: from the arrival of model and inputs to the end, microseconds; 0 if unknown.
    SendResult { id: AttemptId, link: LinkId, outcome: Outcome, runs: Vec<RunNote>, held_us: u64, window_bytes: u32 },
    /// Nobody listens any more: stop sending this attempt's result. It is sent anew when its client comes back.
    Silence { id: AttemptId },
    /// Keep the outcome and outputs of a detached attempt on disk; ends in [`Event::Kept`].
    Keep { id: AttemptId, outcome: Outcome, runs: Vec<RunNote> },
    /// Delete everything of this attempt. A running batch may still hold rows of it: they are thrown away when it ends, and
    /// the rows of the others are kept as if nothing had happened.
    Free { id: AttemptId },
    /// Connect to a client's listener and say `DialIn`; ends in `Opened` or `DialFailed`. `is_held`: there is such an attempt, so
    /// the way is mended until it is freed; else the client only hears why there is none.
    Dial { id: AttemptId, endpoints: Vec<String>, client_key: Option<PublicKey>, is_held: bool },
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
    /// A runner call may take this long. A task's deadline ends its rows earlier.
    pub run_limit: Duration,
    /// Batches that run on one GPU at once. A CPU has no such limit but the slots.
    pub device_width: u16,
    /// Items in one packed batch; 1 switches packing off.
    pub rows_max: u16,
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
            device_width: 1,
            rows_max: 64,
            result_kept: Duration::from_secs(3600),
            drain_wait: Duration::from_secs(30),
            rules: Rules::default(),
        }
    }
}
