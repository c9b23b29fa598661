//! Engines, which run models: containers (`docker.rs`) or child processes (`process.rs`), behind one trait.
//!
//! Owns starting a runner, noticing its end, ending it. Never: requests to it (`oip.rs`), when it starts (`pool.rs`).
//!
//! ```text
//!   Engine::start --> Runner { folder with runner.sock, exit }     dropping the Runner ends and removes what runs
//! ```

mod docker;
mod exit;
mod formats;
pub(crate) mod gpu_memory;
mod process;
mod sockets;

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use futures_util::future::BoxFuture;
use proto_msgs::{AttemptId, EngineKind, ErrorCode, Failure, ModelFormat};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};
use tracing::warn;

use crate::{clear::clear, data::blobs::Pin};

pub(crate) use docker::{Docker, DockerSettings};
pub(crate) use exit::{Cause, Exit, LimitOf, code_of_runner};
pub(crate) use process::{Process, find_runner};

/// Name of the socket in a runner's folder.
pub(crate) const SOCKET_NAME: &str = "runner.sock";

/// Environment of every runner, whatever its version: its log, which ends up in error texts, has no colours, and ONNX
/// Runtime calls nobody.
const RUNNER_ENVIRONMENT: [(&str, &str); 2] = [("NO_COLOR", "1"), ("ORT_DISABLE_TELEMETRY", "1")];

/// Settings of one runner.
#[derive(Clone, Debug)]
pub(crate) struct RunnerSpec {
    /// The model, pinned as long as the runner lives.
    pub(crate) model: Pin,
    /// File format of the model.
    pub(crate) format: ModelFormat,
    /// Number of the runtime's threads.
    pub(crate) threads: u32,
    /// Thousandths of a core that the runner may use, head-room included.
    pub(crate) cpu_millis: u32,
    /// Bytes of memory that the runner may use.
    pub(crate) memory_bytes: u64,
    /// Who set that limit.
    pub(crate) memory_of: LimitOf,
    /// The device that the runner computes on.
    pub(crate) device: Device,
    /// Bytes of GPU memory that the runner may use; 0 if the task sets no limit.
    pub(crate) gpu_memory_bytes: u64,
    /// The attempt for which the runner was started. Later attempts use it, too.
    pub(crate) first_attempt: AttemptId,
}

impl RunnerSpec {
    /// The runner's argument for its device. A model whose task asks for GPU memory must not compute on the processor.
    fn device_argument(&self) -> Option<&'static str> {
        match self.device {
            Device::Cpu => None,
            _ if self.gpu_memory_bytes > 0 => Some("--gpu-required"),
            _ => Some("--gpu"),
        }
    }
}

/// The device that a runner computes on, and the GPUs that it sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Device {
    /// The processor; the runner sees no GPU.
    Cpu,
    /// The GPU with this index of the driver.
    Gpu(u16),
    /// Any GPU that the runtime chooses.
    AnyGpu,
}

/// An engine that runs models.
pub(crate) trait Engine: Send + Sync {
    /// The kind of the engine, for the registration.
    fn kind(&self) -> EngineKind;

    /// The model formats that it can run, as far as it knows.
    fn formats(&self) -> &[ModelFormat] {
        ModelFormat::ALL
    }

    /// Starts a runner whose socket will appear in `folder`. Does not wait until the model is loaded.
    fn start(&self, spec: RunnerSpec, folder: Arc<SocketFolder>) -> BoxFuture<'_, Result<Runner, Failure>>;
}

/// A runner that lives, or has ended by itself. Dropping it ends and removes the runner.
#[derive(Debug)]
pub(crate) struct Runner {
    folder: Arc<SocketFolder>,
    exit: watch::Receiver<Option<Exit>>,
    /// Whether the runner loads or runs a model, so that its memory must be watched.
    busy: watch::Sender<bool>,
    pid: Arc<OnceLock<u32>>,
    /// Dropping it tells the keeper to end the runner.
    _keep: oneshot::Sender<()>,
}

/// The keeper's side of a [`Runner`].
pub(crate) struct Keeper {
    /// The folder of the runner's socket, kept until the runner's end.
    pub(crate) folder: Arc<SocketFolder>,
    /// Receives the runner's end.
    pub(crate) exit: watch::Sender<Option<Exit>>,
    /// Whether the runner loads or runs a model.
    pub(crate) busy: watch::Receiver<bool>,
    /// Receives the process id, once it is known.
    pub(crate) pid: Arc<OnceLock<u32>>,
    /// Resolves when nobody needs the runner any more.
    pub(crate) unwanted: oneshot::Receiver<()>,
}

impl Runner {
    /// Both sides of a runner.
    pub(crate) fn new(folder: Arc<SocketFolder>) -> (Self, Keeper) {
        let (exit_tx, exit) = watch::channel(None);
        let (busy, busy_rx) = watch::channel(true);
        let (keep, unwanted) = oneshot::channel();
        let pid: Arc<OnceLock<u32>> = Arc::default();
        let keeper = Keeper { folder: folder.clone(), exit: exit_tx, busy: busy_rx, pid: pid.clone(), unwanted };
        (Self { folder, exit, busy, pid, _keep: keep }, keeper)
    }

    /// The folder of the runner's socket.
    pub(crate) fn folder(&self) -> &SocketFolder {
        &self.folder
    }

    /// The process id; `None` until the engine tells it.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.pid.get().copied()
    }

    /// Sets whether the runner loads or runs a model.
    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.send_replace(busy);
    }

    /// A channel that shows the runner's end, also after this value is dropped.
    pub(crate) fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.clone()
    }

    /// Waits for the runner's end, of whatever cause.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        ended.unwrap_or_else(|| Exit::without_word(Cause::Stopped))
    }

    /// Whether the runner has ended.
    pub(crate) fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }
}

/// A folder for one runner's socket, deleted when dropped.
#[derive(Debug)]
pub(crate) struct SocketFolder {
    path: PathBuf,
    /// Closes its channel once all runners have ended and are cleaned up.
    alive: mpsc::Sender<()>,
    runtime: Option<Handle>,
}

impl SocketFolder {
    /// Makes a folder in `runners`. Only the worker's user can enter `runners`, so the folder itself is open to all
    /// users.
    pub(crate) fn create(runners: &Path, number: u64, alive: mpsc::Sender<()>) -> Result<Self, Failure> {
        let path = runners.join(number.to_string());
        // Somebody may have removed it while the worker runs.
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(runners);
        let made = made
            .and_then(|()| fs::create_dir(&path))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o777)));
        match made {
            Ok(()) => Ok(Self { path, alive, runtime: Handle::try_current().ok() }),
            Err(error) => {
                Err(Failure::new(ErrorCode::DiskFull, format!("the worker cannot make {}: {error}", path.display())))
            }
        }
    }

    /// Path of the folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        let (path, alive) = (std::mem::take(&mut self.path), self.alive.clone());
        let remove = move || {
            if let Err(error) = clear(&path) {
                let text = "the files of a runner cannot be removed, and take memory: another user may";
                warn!(path = %path.display(), %error, "{text}");
            }
            drop(alive);
        };
        // A model may have left any number of files, and transfers shall not wait for that.
        match &self.runtime {
            Some(runtime) => drop(runtime.spawn_blocking(remove)),
            None => remove(),
        }
    }
}
