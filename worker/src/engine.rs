//! What runs models: containers (`docker.rs`) or child processes (`process.rs`), behind one trait.
//!
//! Owns starting a runner, noticing its end, ending it. Never: what is said to it (`oip.rs`), when it is started (`pool.rs`).
//!
//! ```text
//!   Engine::start --> Runner { folder with runner.sock, exit }     dropping the Runner ends and removes what runs
//! ```

mod docker;
mod exit;
mod gpu_memory;
mod process;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use proto_msgs::{AttemptId, EngineKind, ErrorCode, Failure, ModelFormat};
use tokio::sync::{mpsc, oneshot, watch};

use crate::blobs::Pin;

pub(crate) use docker::{Docker, DockerSettings};
pub(crate) use exit::{Cause, Exit, code_named};
pub(crate) use process::{Process, find_runner};

/// Name of the socket in a runner's folder.
pub(crate) const SOCKET_NAME: &str = "runner.sock";

/// What one runner is to be.
#[derive(Clone, Debug)]
pub(crate) struct RunnerSpec {
    /// The model. Pinned as long as the runner lives.
    pub(crate) model: Pin,
    /// How it is written.
    pub(crate) format: ModelFormat,
    /// Threads of the runtime.
    pub(crate) threads: u32,
    /// Thousandths of a core that it may use, head-room included.
    pub(crate) cpu_millis: u32,
    /// Memory that it may use.
    pub(crate) memory_bytes: u64,
    /// What it computes on.
    pub(crate) device: Device,
    /// Memory of the GPU that it may use; 0: nobody said.
    pub(crate) gpu_memory_bytes: u64,
    /// Whom it was started for; runners are used again for other attempts.
    pub(crate) first_attempt: AttemptId,
}

/// What a runner computes on, and which GPUs it sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Device {
    /// The processor; no GPU is seen.
    Cpu,
    /// This GPU, as the driver counts.
    Gpu(u16),
    /// Whichever the runtime takes.
    AnyGpu,
}

/// Something that runs models.
pub(crate) trait Engine: Send + Sync {
    /// For the registration.
    fn kind(&self) -> EngineKind;

    /// Starts a runner whose socket will appear in `folder`. Does not wait for the model to be loaded.
    fn start(&self, spec: RunnerSpec, folder: Arc<SocketFolder>) -> BoxFuture<'_, Result<Runner, Failure>>;
}

/// A runner that lives, or has ended by itself. Ended and cleaned up when dropped.
#[derive(Debug)]
pub(crate) struct Runner {
    folder: Arc<SocketFolder>,
    exit: watch::Receiver<Option<Exit>>,
    /// Whether a model is being loaded or run, so that memory is worth watching.
    busy: watch::Sender<bool>,
    /// Dropping it tells the keeper to end the runner.
    _keep: oneshot::Sender<()>,
}

/// The other side of a [`Runner`]: what its keeper holds.
pub(crate) struct Keeper {
    /// Kept until the runner's end: its socket lies in it.
    pub(crate) folder: Arc<SocketFolder>,
    /// Says how it ended.
    pub(crate) exit: watch::Sender<Option<Exit>>,
    /// Whether it is loading or running.
    pub(crate) busy: watch::Receiver<bool>,
    /// Resolves when the runner is wanted no more.
    pub(crate) unwanted: oneshot::Receiver<()>,
}

impl Runner {
    /// Both sides of a runner.
    pub(crate) fn new(folder: Arc<SocketFolder>) -> (Self, Keeper) {
        let (exit_tx, exit) = watch::channel(None);
        let (busy, busy_rx) = watch::channel(true);
        let (keep, unwanted) = oneshot::channel();
        let keeper = Keeper { folder: folder.clone(), exit: exit_tx, busy: busy_rx, unwanted };
        (Self { folder, exit, busy, _keep: keep }, keeper)
    }

    /// Where its socket is.
    pub(crate) fn folder(&self) -> &SocketFolder {
        &self.folder
    }

    /// Whether it is loading or running just now.
    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.send_replace(busy);
    }

    /// Shows its end, also after this value is gone.
    pub(crate) fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.clone()
    }

    /// Waits for its end, however it comes.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        ended.unwrap_or_else(|| Exit::without_word(Cause::Stopped))
    }

    /// It has ended already.
    pub(crate) fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }
}

/// A folder for one runner's socket, deleted when dropped.
#[derive(Debug)]
pub(crate) struct SocketFolder {
    path: PathBuf,
    /// Closed once all runners have ended and are cleaned up.
    _alive: mpsc::Sender<()>,
}

impl SocketFolder {
    /// Makes a folder in `runners`, which only the worker's user can enter; so this one may be open to the runner's user.
    pub(crate) fn create(runners: &Path, number: u64, alive: mpsc::Sender<()>) -> Result<Self, Failure> {
        let path = runners.join(number.to_string());
        let made = fs::create_dir(&path).and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o777)));
        match made {
            Ok(()) => Ok(Self { path, _alive: alive }),
            Err(error) => {
                Err(Failure::new(ErrorCode::DiskFull, format!("the worker cannot make {}: {error}", path.display())))
            }
        }
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
