//! The thread that owns the model. Owns that runs come one after the other and never block the socket, that the queue
//! has a limit, and that one sequence of requests never sees another's state.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_models::Signature;
use proto_msgs::{ErrorCode, Failure};
use tokio::sync::{oneshot, watch};

use crate::{
    engine::{LoadOptions, Model},
    tensor::Tensor,
};

/// Runs that may wait. A worker sends one after the other; more are a mistake and would only hold memory.
const WAITING_MAX: usize = 64;

/// The handle through which runs are ordered.
#[derive(Clone, Debug)]
pub(crate) struct ModelThread {
    jobs: SyncSender<Job>,
    loading: watch::Receiver<Loading>,
}

/// `None` while the model is being loaded, then the result.
type Loading = Option<Result<Arc<Loaded>, Failure>>;

/// Facts about a loaded model.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Inputs and outputs of the model.
    pub(crate) signature: Signature,
    /// Name of the runtime.
    pub(crate) runtime: String,
    /// Time that loading took.
    pub(crate) load_time: Duration,
}

/// One run.
#[derive(Debug)]
struct Job {
    inputs: Vec<Tensor>,
    sequence: Sequence,
    reply: oneshot::Sender<Result<Ran, Failure>>,
}

/// Outputs in the order of the signature.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) outputs: Vec<Tensor>,
    /// Time in the model.
    pub(crate) run_time: Duration,
}

/// The sequence of a request. Requests of one sequence share the state that some models keep between runs.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Sequence {
    /// Id of the sequence. `None` for a single request: it sees fresh state and leaves none.
    pub(crate) id: Option<String>,
    /// Whether the sequence starts anew.
    pub(crate) start: bool,
}

impl ModelThread {
    /// Starts the thread, which first loads the model.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub(crate) fn start(file: PathBuf, options: LoadOptions) -> std::io::Result<Self> {
        let (jobs, waiting) = sync_channel(WAITING_MAX);
        let (loaded, loading) = watch::channel(None);
        thread::Builder::new().name("model".to_owned()).spawn(move || {
            // A panic in a runtime is as fatal as a crash: nobody may wait for a dead thread.
            let _abort = AbortOnPanic;
            match Model::load(&file, options) {
                Ok(model) => {
                    loaded.send_replace(Some(Ok(Arc::new(Loaded {
                        signature: model.signature().clone(),
                        runtime: model.runtime().to_owned(),
                        load_time: model.load_time(),
                    }))));
                    work(model, &waiting);
                }
                Err(failure) => {
                    loaded.send_replace(Some(Err(failure)));
                }
            }
        })?;
        Ok(Self { jobs, loading })
    }

    /// The result of loading; `None` while the model is being loaded.
    pub(crate) fn state(&self) -> Loading {
        self.loading.borrow().clone()
    }

    /// Waits until the model is loaded.
    ///
    /// # Errors
    /// The reason why it could not be loaded.
    pub(crate) async fn loaded(&self) -> Result<Arc<Loaded>, Failure> {
        let mut loading = self.loading.clone();
        let state = loading.wait_for(Option::is_some).await;
        let gone = || Failure::new(ErrorCode::ModelRejected, "the thread that loads the model is gone");
        state.map_err(|_| gone())?.clone().unwrap_or_else(|| Err(gone()))
    }

    /// Runs the model.
    ///
    /// # Errors
    /// `BUSY` if the queue is full, else the run's failure.
    pub(crate) async fn run(&self, inputs: Vec<Tensor>, sequence: Sequence) -> Result<Ran, Failure> {
        let (reply, done) = oneshot::channel();
        let job = Job { inputs, sequence, reply };
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => Failure::new(ErrorCode::Busy, format!("{WAITING_MAX} runs are waiting already")),
            TrySendError::Disconnected(_) => Failure::new(ErrorCode::RunCrashed, "the model's thread is gone"),
        })?;
        let gone = |_| Failure::new(ErrorCode::RunCrashed, "the model's thread is gone");
        done.await.map_err(gone)?
    }
}

fn work(mut model: Model, waiting: &Receiver<Job>) {
    let mut fresh = true;
    let mut current = None;
    while let Ok(job) = waiting.recv() {
        if job.reply.is_closed() {
            // The requester has gone.
            continue;
        }
        let goes_on = job.sequence.id.is_some() && job.sequence.id == current && !job.sequence.start;
        let reset = if goes_on || fresh { Ok(()) } else { model.reset() };
        let started = Instant::now();
        let outputs = reset.and_then(|()| model.run(&job.inputs));
        let run_time = started.elapsed();
        // Fails only if the requester has gone in the meantime.
        let _ = job.reply.send(outputs.map(|outputs| Ran { outputs, run_time }));
        current = job.sequence.id;
        // Reset after the answer, so that the next single request need not wait for it.
        fresh = current.is_none() && model.reset().is_ok();
    }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}
