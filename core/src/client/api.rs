//! Events, actions and settings of the client's machine.

use std::time::Duration;

use proto_msgs::{
    Attempt, AttemptId, BrokerToClient, ClientId, ClientToBroker, ClientToWorker, Grant, Lane, Outcome, Phase,
    PublicKey, RunResult, TaskId, TaskSpec, WorkerId, WorkerToClient,
};

use crate::Rules;

/// An event for the client's machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The user submits a task.
    Submit(Box<TaskSpec>),
    /// The user wants the result of a detached task.
    Fetch { task: TaskId },
    /// The user cancels the task.
    Cancel { task: TaskId },
    /// A message of the broker arrived. (Answers to questions do not come here, since they change nothing.)
    BrokerSaid(BrokerToClient),
    /// No advertised address of the attempt's worker could be reached, or it did not dial in.
    ConnectFailed { id: AttemptId, text: String },
    /// The connection that carried the attempt broke.
    LinkBroken { id: AttemptId },
    /// A message of the worker arrived. (Chunks and credits do not come here.)
    WorkerSaid(WorkerToClient),
    /// The attempt's link brought a chunk or a credit: the worker lives.
    WorkerAlive { id: AttemptId },
    /// The worker has acknowledged every byte of model and inputs.
    Sent { id: AttemptId },
    /// The inputs cannot be sent, because a file vanished or changed.
    SendFailed { id: AttemptId, outcome: Outcome },
    /// All outputs have arrived and are verified.
    ResultVerified { id: AttemptId },
    /// The outputs differ from what was announced, which another attempt may cure; or they could not be kept here,
    /// which no attempt can cure.
    ResultBroken { id: AttemptId, outcome: Outcome },
    /// The time that `next_deadline` named has come.
    Deadline,
}

impl Event {
    /// The task that the event is about.
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

/// An order to the client's shell.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this message to the broker.
    TellBroker(ClientToBroker),
    /// Send this message to the attempt's worker, if there is a link.
    TellWorker { id: AttemptId, message: ClientToWorker },
    /// Dial the worker, or wait for it to dial in. Then send `Open` and, unless `resume`, the data right behind it.
    /// With `resume`, a new link replaces the old one, and data goes on where `Accept` says.
    Connect { grant: Box<Grant>, resume: bool },
    /// Receive the outputs, whose chunks follow. Ends in `ResultVerified` or `ResultBroken`.
    TakeResult { result: Box<RunResult> },
    /// Drop the attempt's session. Its link may stay for other attempts.
    Disconnect { id: AttemptId },
    /// Tell the user about the task's progress.
    Report { task: TaskId, news: News },
    /// The task is over. Nothing more will be reported about it.
    End { task: TaskId, end: End },
}

/// Progress of a task, for its user.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// The task waits for a worker.
    Queued { position: u32, reason: String, no_worker_fits: bool, starts_in_ms: Option<u32> },
    /// A worker was found.
    Placed {
        attempt: Attempt,
        worker: WorkerId,
        worker_name: String,
        model_held: bool,
        lane: Lane,
        predicted_ms: Option<u32>,
    },
    /// The worker is in this phase.
    Phase(Phase),
    /// The attempt failed, and the client asks for another.
    Retrying { attempt: Attempt, worker_name: String, why: String },
    /// The broker has not answered for a while.
    BrokerSilent,
}

/// How a task ended for the user.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Result, failure or cancelled. For a detached submit, `Done` with zero times means that the worker has
    /// everything.
    pub outcome: Outcome,
    /// The verified result; `None` unless done.
    pub result: Option<Box<RunResult>>,
    /// The worker of the last attempt.
    pub worker: Option<(WorkerId, String)>,
    /// The last attempt; 0 if there was none.
    pub attempt: Attempt,
    /// The lane of the last attempt; `None` if there was none.
    pub lane: Option<Lane>,
    /// The broker has no room now: submit the task anew after this time.
    pub retry_after_ms: Option<u32>,
}

/// Settings of the client's machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// The client's id.
    pub client: ClientId,
    /// Key of the client's connections; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// Where the client can be dialled; empty if it cannot.
    pub endpoints: Vec<String>,
    /// Interval of `Submit` while a task waits or runs.
    pub repeat_every: Duration,
    /// The first interval, which is shorter: a lost first message should not cost seconds.
    pub repeat_first: Duration,
    /// Interval of signs of life to workers.
    pub alive_every: Duration,
    /// After this silence of a worker the link counts as lost, and the client connects again.
    pub worker_silence: Duration,
    /// Time for reconnecting before the attempt is given up.
    pub mend_for: Duration,
    /// Longest time to connect.
    pub connect_wait: Duration,
    /// After this silence of the broker the user hears of it.
    pub broker_silence: Duration,
    /// The rules in force.
    pub rules: Rules,
}

impl Config {
    /// Settings with the default times.
    pub fn new(client: ClientId) -> Self {
        Self {
            client,
            key: None,
            endpoints: Vec::new(),
            repeat_every: Duration::from_secs(2),
            repeat_first: Duration::from_millis(500),
            alive_every: Duration::from_secs(1),
            // Workers send every second, so two messages may be lost.
            worker_silence: Duration::from_secs(3),
            // A worker that reboots has a new epoch, so this must only outlast a flapping link.
            mend_for: Duration::from_secs(6),
            connect_wait: Duration::from_secs(3),
            broker_silence: Duration::from_secs(5),
            rules: Rules::default(),
        }
    }
}
