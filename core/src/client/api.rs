//! What happens to a client and what it orders.

use std::time::Duration;

use proto_msgs::{
    Attempt, AttemptId, BrokerToClient, ClientId, ClientToBroker, ClientToWorker, Demands, Direction, Grant, JobId,
    LabelRule, Lane, ModelRef, Outcome, Phase, PublicKey, RunResult, Slo, Stage, TaskId, WorkerId, WorkerToClient,
};

use crate::Rules;

/// What the user wants done.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskSpec {
    /// Made by the shell.
    pub task: TaskId,
    /// The `submit` it belongs to.
    pub job: JobId,
    /// What a person calls the model.
    pub model_name: String,
    /// The model.
    pub model: ModelRef,
    /// Models that it passes through after the first.
    pub then: Vec<Stage>,
    /// Bytes of all inputs.
    pub input_bytes: u64,
    /// Items in it.
    pub items: u32,
    /// Items of the whole `submit`.
    pub job_items: u32,
    /// The lane it wants; `None`: by the number of items.
    pub lane: Option<Lane>,
    /// What it was promised.
    pub slo: Option<Slo>,
    /// Wishes for labels.
    pub labels: Vec<LabelRule>,
    /// 0 to 100.
    pub priority: u8,
    /// The answer is worthless after this long.
    pub deadline: Option<Duration>,
    /// What the run may use.
    pub demands: Demands,
    /// Leave once the worker has everything.
    pub detached: bool,
    /// Only this direction.
    pub direction: Option<Direction>,
}

/// Something happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The user submits.
    Submit(Box<TaskSpec>),
    /// The user wants the result of a detached task.
    Fetch { task: TaskId },
    /// The user takes the task back.
    Cancel { task: TaskId },
    /// The broker's message arrived. (Answers to questions do not come here; they change nothing.)
    BrokerSaid(BrokerToClient),
    /// No advertised address of the attempt's worker could be reached, or it did not dial in.
    ConnectFailed { id: AttemptId, text: String },
    /// The connection that carried the attempt broke.
    LinkBroken { id: AttemptId },
    /// The worker's message arrived. (Chunks and credits do not come here.)
    WorkerSaid(WorkerToClient),
    /// The attempt's link brought a chunk or a credit: the worker lives.
    WorkerAlive { id: AttemptId },
    /// The worker has acknowledged every byte of model and inputs.
    Sent { id: AttemptId },
    /// The inputs cannot be sent: a file vanished or changed.
    SendFailed { id: AttemptId, outcome: Outcome },
    /// All outputs are here and verified.
    ResultVerified { id: AttemptId },
    /// Outputs arrived that are not what was announced, which another attempt may mend, or could not be kept here, which none
    /// will.
    ResultBroken { id: AttemptId, outcome: Outcome },
    /// The time that `next_deadline` named has come.
    Deadline,
}

impl Event {
    /// The task it is about.
    pub(super) fn task(&self) -> Option<TaskId> {
        match self {
            Self::Submit(spec) => Some(spec.task),
            Self::Fetch { task } | Self::Cancel { task } => Some(*task),
            Self::BrokerSaid(message) => message.task(),
            Self::WorkerSaid(message) => Some(message.attempt().task),
            Self::ConnectFailed { id, .. }
            | Self::LinkBroken { id }
            | Self::WorkerAlive { id }
            | Self::Sent { id }
            | Self::SendFailed { id, .. }
            | Self::ResultVerified { id }
            | Self::ResultBroken { id, .. } => Some(id.task),
            Self::Deadline => None,
        }
    }
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send to the broker.
    TellBroker(ClientToBroker),
    /// Send to the attempt's worker, if there is a link.
    TellWorker { id: AttemptId, message: ClientToWorker },
    /// Dial the worker, or wait for it to dial in; then send `Open` and, unless `resume`, the data right behind it. With
    /// `resume`, a new connection replaces the old one and data goes on where `Accept` says.
    Connect { grant: Box<Grant>, resume: bool },
    /// Take the outputs in; ends in `ResultVerified` or `ResultBroken`. Their chunks follow this message.
    TakeResult { result: Box<RunResult> },
    /// Drop the attempt's session; its connection may stay for other attempts.
    Disconnect { id: AttemptId },
    /// Tell the user.
    Report { task: TaskId, news: News },
    /// The task is over; nothing more will be said of it.
    End { task: TaskId, end: End },
}

/// What a user may want to see on the way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// Waiting for a worker.
    Queued { position: u32, reason: String, starts_in_ms: Option<u32> },
    /// A worker was found.
    Placed {
        attempt: Attempt,
        worker: WorkerId,
        worker_name: String,
        model_held: bool,
        lane: Lane,
        predicted_ms: Option<u32>,
    },
    /// The worker is doing this.
    Phase(Phase),
    /// The attempt came to nothing; another is asked for.
    Retrying { attempt: Attempt, worker_name: String, why: String },
    /// The broker has not answered for a while.
    BrokerSilent,
}

/// How a task ended for the user.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Result, failure or cancelled. For a detached submit `Done` with zero times means that the worker has everything.
    pub outcome: Outcome,
    /// The result that was verified; `None` unless done.
    pub result: Option<Box<RunResult>>,
    /// The worker of the last attempt.
    pub worker: Option<(WorkerId, String)>,
    /// The last attempt; 0 if there was none.
    pub attempt: Attempt,
    /// The lane of the last attempt; `None` if there was none.
    pub lane: Option<Lane>,
    /// The broker has no room now: submit it anew after this long.
    pub retry_after_ms: Option<u32>,
}

/// A client's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whose tasks.
    pub client: ClientId,
    /// Key of its connections; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Where it can be dialled; empty if nowhere.
    pub endpoints: Vec<String>,
    /// While a task waits or runs, the broker hears of it this often.
    pub repeat_every: Duration,
    /// The first repetitions come faster: a lost first message should not cost seconds.
    pub repeat_first: Duration,
    /// Signs of life to workers.
    pub alive_every: Duration,
    /// A worker that says nothing for this long has lost the link: connect again.
    pub worker_silence: Duration,
    /// Links are mended for this long before the attempt is given up.
    pub mend_for: Duration,
    /// A connection must come about in this time.
    pub connect_wait: Duration,
    /// The user hears of a silent broker after this long.
    pub broker_silence: Duration,
    /// Rules in force.
    pub rules: Rules,
}

impl Config {
    /// Settings with the usual times.
    pub fn new(client: ClientId) -> Self {
        Self {
            client,
            key: None,
            endpoints: Vec::new(),
            repeat_every: Duration::from_secs(2),
            repeat_first: Duration::from_millis(500),
            alive_every: Duration::from_secs(1),
            // Workers speak every second: two may be lost.
            worker_silence: Duration::from_secs(3),
            // A worker that reboots is a new worker; this only has to outlast a flapping link.
            mend_for: Duration::from_secs(6),
            connect_wait: Duration::from_secs(3),
            broker_silence: Duration::from_secs(5),
            rules: Rules::default(),
        }
    }
}
