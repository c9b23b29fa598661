//! Messages to the driver, from the handles of tasks and from the async tasks of links and transfers. Owns the
//! messages. Never acts on one, so every module may depend on it and it depends on none of them.

use std::sync::Arc;

use mesh_transport::{
    DialError, Dialer, Heard,
    blob::{Arrival, UploadEnd},
};
use proto_msgs::{AnswerBody, AttemptId, Outcome, Question, TaskId, TaskSpec};
use tokio::sync::{mpsc, oneshot};

use crate::{News, TaskError, TaskResult, questions::Reply, task::Payload};

/// The number of a connection in this process; never reused.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct LinkId(pub(crate) u64);

/// A request of a [`Mesh`](crate::Mesh) or task handle.
#[derive(Debug)]
pub(crate) enum Command {
    Submit { spec: Box<TaskSpec>, payload: Arc<Payload>, watcher: Watcher },
    Fetch { task: TaskId, watcher: Watcher },
    Cancel { task: TaskId, reply: Option<Reply<Outcome>> },
    Ask { question: Question, reply: Reply<AnswerBody> },
    Close { reply: oneshot::Sender<()> },
}

/// The channels to the handle that waits for a task.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) news: mpsc::Sender<News>,
    pub(crate) done: oneshot::Sender<Result<TaskResult, TaskError>>,
}

/// A report of a link's or transfer's async task.
#[derive(Debug)]
pub(crate) enum Happened {
    Dialled { link: LinkId, result: Result<Dialer, DialError> },
    Heard { link: LinkId, heard: Heard },
    DialInLate { id: AttemptId, wait: u64 },
    UploadEnded { id: AttemptId, serial: u64, result: UploadEnd },
    Arrived { id: AttemptId, serial: u64, arrival: Arrival },
}
