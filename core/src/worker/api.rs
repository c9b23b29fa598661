//! Events, actions and settings of the worker's machine.

use std::{ops::Range, time::Duration};

use proto_msgs::{
    AttemptId, BrokerToWorker, Digest, ErrorCode, Failure, Load, Manifest, Open, Outcome, Phase, PublicKey, Register,
    RunNote, Ticket, WorkerToBroker, WorkerToClient,
};

use crate::Rules;

/// A direct connection, numbered by the shell. Numbers are never reused.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LinkId(pub u64);

/// A batch: rows that run together. Numbers are never reused in one life of a worker.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BatchId(pub u64);

/// A slot of the worker, in which one batch runs at a time. At first, realtime slots have the lowest numbers.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlotId(pub u16);

/// Consecutive rows of one attempt in a batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// The attempt that owns the rows.
    pub id: AttemptId,
    /// The model that the rows go through: 0 is the manifest's `model` with the inputs, `k` the model of `then[k − 1]`
    /// with the outputs of stage `k − 1`.
    pub stage: u8,
    /// The items, half open. Each item is one complete set of inputs of the model.
    pub rows: Range<u32>,
}

/// How the shell passes the rows of a batch to the model.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BatchKind {
    /// One part. Its items run one after the other, each in its own runner call. The single item of a task is passed as
    /// the client sent it.
    Whole,
    /// One runner call with the rows of all parts, concatenated along the first dimension. Every output must have
    /// equally many rows per item (`outputs' rows ÷ items`, without rest); otherwise the batch fails with
    /// `RUN_PROTOCOL`.
    Packed,
    /// Like `Packed`, for a size whose results have not been seen yet: up to [`CHECKED_ROWS`] of its rows also run by
    /// themselves, and [`BatchTimes::equal`] tells how they compare. Unless they are the same, the outputs kept are
    /// those of single runs of all rows.
    Check,
    /// Like `Packed`, now and then, for a size whose results were right before: up to [`SPOT_ROWS`] of its rows also run
    /// by themselves. If [`BatchTimes::equal`] is `Differs`, the outputs kept are those of single runs of all rows.
    Spot,
    /// Each item in its own runner call, whose outputs are kept: [`Event::BatchAnswered`]. Then, if the machine orders
    /// [`Action::Compare`], some of the items in one packed call, or in one more with made-up items, whose outputs are
    /// only compared with them. [`BatchTimes::equal`] reports a failure of the packed call.
    Probe,
}

/// Rows of a [`BatchKind::Check`] that run by themselves: the first, the middle and the last.
pub const CHECKED_ROWS: u32 = 3;

/// Rows of a [`BatchKind::Spot`] that run by themselves: two neighbours with different outputs, if there are any.
pub const SPOT_ROWS: u32 = 2;

impl BatchKind {
    /// Whether the rows run in one call whose outputs are meant to be kept.
    pub fn is_packed(self) -> bool {
        matches!(self, Self::Packed | Self::Check | Self::Spot)
    }

    /// Whether the outputs kept are those of the common call, given how they compare with single runs.
    pub fn keeps_packed(self, equal: Option<Equality>) -> bool {
        match self {
            Self::Packed => true,
            Self::Check => equal == Some(Equality::Same),
            Self::Spot => equal != Some(Equality::Differs),
            Self::Whole | Self::Probe => false,
        }
    }
}

/// Times measured during one batch.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BatchTimes {
    /// Time in the model, microseconds: the sum of all runner calls whose outputs are kept.
    pub run_us: u64,
    /// Time to start the runner and load the model, microseconds; 0 if it was warm.
    pub load_us: u64,
    /// Rows that should have been packed and ran one by one, as nobody has seen what their stage makes of such shapes.
    pub apart_rows: u32,
    /// Probe: the mean of the single runs, microseconds, without the first run if there are more. Check that was answered
    /// early: its single run.
    pub single_us: Option<u64>,
    /// Probe only: time of the packed call, microseconds; `None` if it failed.
    pub packed_us: Option<u64>,
    /// Rows of that call, if they are not those that the machine ordered.
    pub packed_rows: Option<u32>,
    /// Probe, check and spot only: result of the comparison.
    pub equal: Option<Equality>,
}

/// How the outputs of a packed call compare with those of single runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Equality {
    /// The outputs are the same, within the tolerance for floats.
    Same,
    /// The outputs have other values, or another number of rows.
    Differs,
    /// The model or the runtime does not accept several rows.
    Unsupported,
    /// The probe cannot tell: the outputs of all rows were alike, their files have gone, or the time was over.
    Inconclusive,
    /// The probe was cut short, and the next one goes on from there.
    Unfinished,
}

/// An event for the worker's machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The process has started. `attempts` are the detached attempts found in the state folder. This event comes once,
    /// first.
    Started { attempts: Vec<Restored> },
    /// A message of the broker arrived.
    BrokerSaid(BrokerToWorker),
    /// A client opens an attempt over a link. If the mesh has keys, the link's peer has proven that it holds `key`.
    Opened { link: LinkId, key: Option<PublicKey>, open: Box<Open> },
    /// A client shows over this link that it is alive; any message about the attempt counts.
    ClientAlive { id: AttemptId, link: LinkId },
    /// The client says over this link that it has the result.
    Released { id: AttemptId, link: LinkId },
    /// The client says over this link that it wants no result.
    Aborted { id: AttemptId, link: LinkId },
    /// Model and inputs have arrived and are verified.
    Received { id: AttemptId },
    /// Model and inputs did not arrive.
    ReceiveFailed { id: AttemptId, code: ErrorCode, text: String },
    /// The batch has reached this phase: [`Phase::Running`] once the model is loaded.
    BatchReached { batch: BatchId, phase: Phase },
    /// The rows are answered, and the shell keeps their outputs: the single runs of a probe went well, and there is
    /// something to compare; or the packed call of a check with equal rows gave the same as one single run. What packed
    /// calls tell of the model follows in `BatchEnded`, whatever becomes of the rows.
    BatchAnswered { batch: BatchId, times: BatchTimes },
    /// The batch is over. If it ended well, the shell keeps the outputs of its rows at this stage, for every part that
    /// is still wanted. If it failed, the shell keeps nothing of it, and the same rows may come again in another batch.
    BatchEnded { batch: BatchId, ended: Result<BatchTimes, Failure> },
    /// The end of an [`Action::Keep`] is on disk. With a failure, the rows could not be joined or the result could not be
    /// written: that is the outcome, on the disk too, and not the one that was to be kept.
    Kept { id: AttemptId, failure: Option<Failure> },
    /// The client named by an [`Action::Dial`] could not be reached.
    DialFailed { id: AttemptId, text: String },
    /// The machine was measured. Sent a little more often than heartbeats.
    Sampled(Sample),
    /// The worker must drain: finish what runs, admit nothing new, then exit.
    DrainAsked,
    /// The time that `next_deadline` named has come.
    Deadline,
}

/// A detached attempt found on disk after a restart.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored {
    /// The ticket of the attempt.
    pub ticket: Ticket,
    /// Models, items and inputs of the attempt.
    pub manifest: Box<Manifest>,
    /// If the attempt had ended: its runs, as given to [`Action::Keep`].
    pub runs: Vec<RunNote>,
    /// If the attempt had ended: its outcome. `None`: it must run (again).
    pub outcome: Option<Outcome>,
    /// In how many lives of the worker a batch with rows of this attempt was begun.
    pub runs_begun: u32,
}

/// One measurement of the machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// How busy the machine is.
    pub load: Load,
    /// Models in the blob store, most recently used first.
    pub held: Vec<Digest>,
    /// Models that are loaded now.
    pub warm: Vec<Digest>,
    /// Speed of the direct link, from real transfers; 0 if there was none yet.
    pub link_bytes_per_s: u64,
}

/// An order to the worker's shell.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this message to the broker.
    TellBroker(WorkerToBroker),
    /// Send this message to a client.
    TellClient { link: LinkId, message: WorkerToClient },
    /// Receive model and inputs over this link, or go on receiving after the old link broke. The shell answers the
    /// client with `Accept` (unless the opening brought all of an attached attempt), and this machine with `Received`
    /// or `ReceiveFailed`. A reopened attempt keeps the data that has arrived.
    Receive { id: AttemptId, link: LinkId, manifest: Box<Manifest>, ticket: Box<Ticket> },
    /// The client has come back over this link while the attempt waits or runs: nothing is to be received.
    Relink { id: AttemptId, link: LinkId },
    /// Run these rows. Ends in [`Event::BatchEnded`], perhaps after [`Event::BatchAnswered`].
    ///
    /// For a detached attempt the shell first notes on disk that a run was begun, once per life of the worker: if the
    /// run kills the worker, the next life must know it.
    RunBatch {
        /// The batch. Numbers are never reused in one life.
        batch: BatchId,
        /// The rows to run; a runner call gets them part after part. All parts have the same models up to this stage
        /// and equal demands. An attempt has at most one part. There is one part if `kind` is `Whole`.
        parts: Vec<Part>,
        /// The slot that the batch occupies, for people; `device` follows from it.
        slot: SlotId,
        /// The device: −1 for the CPU, otherwise the index of the GPU.
        device: i16,
        /// How the rows are passed to the model.
        kind: BatchKind,
        /// Rows of their client have ended a runner of this model: these run in one that serves only such rows, if the
        /// machine has the memory for one more.
        apart: bool,
        /// Longest time of each runner call; the first includes loading the model. If a call takes longer, the shell
        /// ends the batch with `RUN_TIMEOUT`. Task deadlines are the machine's: it orders `KillBatch`.
        limit: Duration,
    },
    /// Stop this batch. No event follows for it, and its slot is reused at once.
    KillBatch { batch: BatchId },
    /// Nobody wants the rows of this batch any more, but its model is being loaded: finish that, run no row, and keep
    /// the runner warm. Ends in [`Event::BatchEnded`] with the time to load, or in `BatchReached` if rows run already.
    OnlyLoad { batch: BatchId },
    /// A batch's rows are answered: compare packed calls of `rows` rows with single runs. What is not done within `limit` is
    /// [`Equality::Inconclusive`]. Ends in [`Event::BatchEnded`].
    Compare { batch: BatchId, rows: u32, limit: Duration },
    /// Others need the slot of a batch whose rows are answered: make no call after the one that is under way, and keep
    /// the runner warm. Ends in [`Event::BatchEnded`].
    StopComparing { batch: BatchId },
    /// Stop the transfer of this attempt. No event follows for it. Batches are handled apart: one without rows of
    /// other attempts gets its own `KillBatch`, the others go on.
    Kill { id: AttemptId },
    /// Send outcome and outputs over this link, from the beginning even if an earlier link carried some of them. The
    /// outputs are those of the last stage: all rows in order, joined along the first dimension.
    ///
    /// `held_us`: time from the arrival of model and inputs to the end, microseconds; 0 if unknown.
    SendResult { id: AttemptId, link: LinkId, outcome: Outcome, runs: Vec<RunNote>, held_us: u64, window_bytes: u32 },
    /// Stop sending this attempt's result: its client is silent. The result is sent anew when the client comes back.
    Silence { id: AttemptId },
    /// Keep outcome and outputs of a detached attempt on disk. Ends in [`Event::Kept`].
    Keep { id: AttemptId, outcome: Outcome, runs: Vec<RunNote> },
    /// Delete all data of this attempt. A running batch may still hold its rows: they are discarded when the batch
    /// ends, and the rows of other attempts are kept as usual.
    Free { id: AttemptId },
    /// Connect to a client's listener and send `DialIn`. Ends in `Opened` or `DialFailed`. `is_held`: the worker holds
    /// this attempt, so the shell mends the link until the attempt is freed; otherwise the client only hears why there
    /// is none. The newest order counts for an attempt. A shell that dials many already may drop the order: it comes
    /// again with the client's next request.
    Dial { id: AttemptId, endpoints: Vec<String>, client_key: Option<PublicKey>, is_held: bool },
    /// Say that another process has this worker's id: the worker takes nothing new and exits once what runs has ended.
    SayOvertaken,
    /// Everything is done: exit.
    Exit,
}

/// Settings of the worker's machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// The worker's description of itself, as sent to the broker.
    pub register: Register,
    /// Interval of heartbeats.
    pub heartbeat: Duration,
    /// After this silence of the broker the worker registers anew with each heartbeat.
    pub broker_silence: Duration,
    /// A client that is silent this long has abandoned its attached attempts.
    pub client_silence: Duration,
    /// Interval of signs of life to clients.
    pub progress_every: Duration,
    /// Longest time of one runner call. A task's deadline may end its rows earlier.
    pub run_limit: Duration,
    /// Most items in one packed batch; 1 switches packing off.
    pub rows_max: u16,
    /// How long results of detached attempts are kept.
    pub result_kept: Duration,
    /// How long running attempts may take to finish while draining.
    pub drain_wait: Duration,
    /// The rules in force.
    pub rules: Rules,
}

impl Config {
    /// Settings with the default times.
    pub fn new(register: Register) -> Self {
        let heartbeat = Duration::from_millis(u64::from(register.heartbeat_ms));
        Self {
            register,
            heartbeat,
            broker_silence: heartbeat * 3,
            // Clients send every second, so four messages may be lost.
            client_silence: Duration::from_secs(5),
            progress_every: Duration::from_secs(1),
            run_limit: Duration::from_secs(300),
            rows_max: 64,
            result_kept: Duration::from_secs(3600),
            drain_wait: Duration::from_secs(30),
            rules: Rules::default(),
        }
    }
}
