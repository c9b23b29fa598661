//! The thread that owns the model. Owns that runs come one after the other and never hold up the socket, that a waiting
//! line has a limit, and that one sequence of requests never sees the state of another.

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

/// Runs that may wait. A worker sends one after the other; more are somebody's mistake and would only hold memory.
const WAITING_MAX: usize = 64;

/// Where runs are ordered.
#[derive(Clone, Debug)]
pub(crate) struct ModelThread {
    jobs: SyncSender<Job>,
    loading: watch::Receiver<Loading>,
}

/// Nothing while the model is being loaded, then how that went.
type Loading = Option<Result<Arc<Loaded>, Failure>>;

/// What is known of a model once it is loaded.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// What goes in and what comes out.
    pub(crate) signature: Signature,
    /// Name of the runtime.
    pub(crate) runtime: String,
    /// How long loading took.
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

/// Which requests share the state that some models keep between runs.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Sequence {
    /// `None` for a request that stands alone: it sees fresh state and leaves none.
    pub(crate) id: Option<String>,
    /// Begin anew.
    pub(crate) start: bool,
}

impl ModelThread {
    /// Starts the thread, which begins with loading.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub(crate) fn start(file: PathBuf, options: LoadOptions) -> std::io::Result<Self> {
        let (jobs, waiting) = sync_channel(WAITING_MAX);
        let (loaded, loading) = watch::channel(None);
        thread::Builder::new().name("model".to_owned()).spawn(move || {
            // A runtime that makes us panic is as lost as one that crashes: nobody may wait for it.
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

    /// Whether the model is loaded; `None` while it is being loaded.
    pub(crate) fn state(&self) -> Loading {
        self.loading.borrow().clone()
    }

    /// Waits until the model is loaded.
    ///
    /// # Errors
    /// Why it could not be loaded.
    pub(crate) async fn loaded(&self) -> Result<Arc<Loaded>, Failure> {
        let mut loading = self.loading.clone();
        let state = loading.wait_for(Option::is_some).await;
        let gone = || Failure::new(ErrorCode::ModelRejected, "the thread that loads the model is gone");
        state.map_err(|_| gone())?.clone().unwrap_or_else(|| Err(gone()))
    }

    /// Runs the model.
    ///
    /// # Errors
    /// `BUSY` when the line is full, else what the run failed with.
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
            // Whoever asked has gone.
            continue;
        }
        let goes_on = job.sequence.id.is_some() && job.sequence.id == current && !job.sequence.start;
        let reset = if goes_on || fresh { Ok(()) } else { model.reset() };
        let started = Instant::now();
        let outputs = reset.and_then(|()| model.run(&job.inputs));
        let run_time = started.elapsed();
        // An error means that whoever asked has gone in the meantime.
        let _ = job.reply.send(outputs.map(|outputs| Ran { outputs, run_time }));
        current = job.sequence.id;
        // After the answer, so that the next request that stands alone need not wait for it.
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
