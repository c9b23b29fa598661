//! What the driver is told: by the handles of tasks, and by the tasks of links and transfers. Owns the messages; never acts on
//! one, so that everybody may know them and they know nobody.

use std::sync::Arc;

use mesh_core::client::TaskSpec;
use mesh_transport::{
    DialError, Dialer, Heard,
    blob::{Arrival, UploadEnd},
};
use proto_msgs::{AnswerBody, AttemptId, Outcome, Question, TaskId};
use tokio::sync::{mpsc, oneshot};

use crate::{News, TaskError, TaskResult, questions::Reply, task::Payload};

/// A connection as this process numbers it; never used twice.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct LinkId(pub(crate) u64);

/// What the handles want.
#[derive(Debug)]
pub(crate) enum Command {
    Submit { spec: Box<TaskSpec>, payload: Arc<Payload>, watcher: Watcher },
    Fetch { task: TaskId, watcher: Watcher },
    Cancel { task: TaskId, reply: Option<Reply<Outcome>> },
    Ask { question: Question, reply: Reply<AnswerBody> },
    Close { reply: oneshot::Sender<()> },
}

/// Who waits for a task.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) news: mpsc::Sender<News>,
    pub(crate) done: oneshot::Sender<Result<TaskResult, TaskError>>,
}

/// What the tasks of links and transfers report.
#[derive(Debug)]
pub(crate) enum Happened {
    Dialled { link: LinkId, result: Result<Dialer, DialError> },
    Heard { link: LinkId, heard: Heard },
    DialInLate { id: AttemptId, wait: u64 },
    UploadEnded { id: AttemptId, serial: u64, result: UploadEnd },
    Arrived { id: AttemptId, serial: u64, arrival: Arrival },
}
