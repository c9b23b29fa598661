//! What comes of a task: news on the way, the result, or why there is none.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh_transport::blob::Content;
use proto_msgs::{Attempt, DType, ErrorCode, Failure, OutputDecl, Phase, TaskId, WorkerId};

/// What happens to a task before it ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// No worker yet.
    Queued {
        /// Tasks before it; 0 if it is the next.
        position: u32,
        /// What it waits for.
        reason: String,
    },
    /// A worker was found.
    Placed {
        /// The number of this placement, from 1.
        attempt: Attempt,
        /// The worker.
        worker: WorkerId,
        /// What a person calls it.
        worker_name: String,
        /// It has the model already: only inputs are sent.
        model_held: bool,
    },
    /// Model and inputs are on their way. Told at most every [`SENDING_EVERY`](crate::SENDING_EVERY).
    Sending {
        /// Bytes the worker has acknowledged.
        sent_bytes: u64,
        /// Bytes to be sent.
        total_bytes: u64,
    },
    /// The worker is doing this.
    Phase(Phase),
    /// This attempt came to nothing; another worker is asked for.
    Retrying {
        /// The number of the placement that failed.
        attempt: Attempt,
        /// The worker's name.
        worker_name: String,
        /// How it failed.
        why: String,
    },
    /// The broker has not answered for a while; the task goes on as soon as it does.
    BrokerSilent,
}

/// What a [`TaskHandle`](crate::TaskHandle) tells.
#[derive(Clone, Debug)]
pub enum Update {
    /// The task goes on.
    News(News),
    /// It is over.
    End(Result<TaskResult, TaskError>),
}

/// A task that was done.
#[derive(Clone, Debug)]
pub struct TaskResult {
    /// Which.
    pub task: TaskId,
    /// The outputs, in the model's order. Empty for a detached task: see [`Mesh::fetch`](crate::Mesh::fetch).
    pub outputs: Vec<Output>,
    /// The worker that did it.
    pub worker: Option<(WorkerId, String)>,
    /// How often the task was placed.
    pub attempts: Attempt,
    /// Where the time went.
    pub timings: Timings,
}

/// Where the time of a task went, as this program saw it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Timings {
    /// From submit to result.
    pub total: Duration,
    /// From submit to the last placement.
    pub queued: Duration,
    /// From the last placement until the worker had model and inputs.
    pub sending: Duration,
    /// Loading the model, as the worker measured it; zero if it was warm.
    pub loading: Duration,
    /// In the model, as the worker measured it.
    pub running: Duration,
    /// Bytes of model and inputs that were sent in the last attempt; repeated ones included.
    pub sent_bytes: u64,
}

/// One output, verified against the worker's digest.
#[derive(Clone, Debug)]
pub struct Output {
    /// Name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<u64>,
    data: OutputData,
}

#[derive(Clone, Debug)]
enum OutputData {
    Memory(Bytes),
    File(Arc<Spooled>),
}

/// A file that lives as long as the result it belongs to.
#[derive(Debug)]
struct Spooled {
    path: PathBuf,
    size_bytes: u64,
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // What cannot be removed now is removed when the folder is used again a day later.
        let _ = fs::remove_file(&self.path);
    }
}

impl Output {
    pub(crate) fn new(decl: OutputDecl, content: Content) -> Self {
        let data = match content {
            Content::Memory(bytes) => OutputData::Memory(bytes),
            Content::File(path) => OutputData::File(Arc::new(Spooled { path, size_bytes: decl.size_bytes })),
        };
        Self { name: decl.name, dtype: decl.dtype, shape: decl.shape, data }
    }

    /// Length of the data.
    pub fn size_bytes(&self) -> u64 {
        match &self.data {
            OutputData::Memory(bytes) => bytes.len() as u64,
            OutputData::File(file) => file.size_bytes,
        }
    }

    /// The elements, little-endian and in row-major order. Reads the file if the output is large.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn bytes(&self) -> io::Result<Bytes> {
        match &self.data {
            OutputData::Memory(bytes) => Ok(bytes.clone()),
            OutputData::File(file) => fs::read(&file.path).map(Bytes::from),
        }
    }

    /// The elements as a stream, for outputs too large for memory.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn reader(&self) -> io::Result<Box<dyn io::Read + Send>> {
        match &self.data {
            OutputData::Memory(bytes) => Ok(Box::new(io::Cursor::new(bytes.clone()))),
            OutputData::File(file) => Ok(Box::new(fs::File::open(&file.path)?)),
        }
    }

    /// The file that a large output is in. It is removed with the last clone of this output.
    pub fn path(&self) -> Option<&Path> {
        match &self.data {
            OutputData::Memory(_) => None,
            OutputData::File(file) => Some(&file.path),
        }
    }
}

/// Why a task has no result.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TaskError {
    /// It failed.
    #[error("{0}")]
    Failed(Failure),
    /// It was taken back.
    #[error("cancelled")]
    Cancelled,
    /// The broker speaks another version of the protocol.
    #[error("{0}")]
    Version(String),
    /// The connection to the mesh was closed before the task ended.
    #[error("the connection to the mesh was closed before the task ended")]
    Closed,
}

impl TaskError {
    /// The code if the mesh said why.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Failed(failure) => Some(failure.code),
            Self::Cancelled | Self::Version(_) | Self::Closed => None,
        }
    }
}

/// Why a question to the broker has no answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AskError {
    /// The broker said nothing.
    #[error(
        "no answer from the broker at {broker} within {} s: check that it runs and is not overloaded",
        within.as_secs_f32()
    )]
    Silent {
        /// Its address.
        broker: String,
        /// How long was waited.
        within: Duration,
    },
    /// There is no such task, or it is somebody else's.
    #[error("there is no task {0} of this client: `tasks` lists those that the broker remembers")]
    NotFound(TaskId),
    /// The broker refuses.
    #[error("{0}")]
    Refused(Failure),
    /// The broker speaks another version of the protocol.
    #[error("{0}")]
    Version(String),
    /// The connection to the mesh was closed.
    #[error("the connection to the mesh was closed")]
    Closed,
}
