//! Runners in containers, through the socket of a Docker or Podman engine. The only file that knows bollard.
//!
//! This file builds the request to the engine from fixed parts; only numbers in it come from a client. A container has
//! no network, no rights, a read-only root and sees two things of the host: the model, read-only, and the folder of its
//! socket. Containers carry the worker's id, so that its next life can find and remove those of a killed worker.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bollard::{
    API_DEFAULT_VERSION,
    errors::Error,
    models::{
        ContainerCreateBody, DeviceRequest, HostConfig, HostConfigLogConfig, Mount, MountType, ResourcesUlimits,
        SystemVersion,
    },
    query_parameters::{
        ListContainersOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder, WaitContainerOptions,
    },
};
use futures_util::{StreamExt, future::BoxFuture};
use nix::sys::resource::Resource;
use proto_msgs::{EngineKind, ErrorCode, Failure, WorkerId};
use tracing::{debug, info, warn};

use super::{
    Cause, Device, Engine, Exit, Keeper, RUNNER_ENVIRONMENT, Runner, RunnerSpec, SOCKET_NAME, SocketFolder,
    exit::LogTail, gpu_memory::outgrown, sockets,
};

/// An engine that does not answer a request within this time is broken.
const ENGINE_WAIT: Duration = Duration::from_secs(30);

/// Pause before an engine that did not remove a container is asked again.
const REMOVE_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// User and group `nobody`, which own nothing.
const USER: &str = "65534:65534";

/// Threads of a container beyond those granted to the runtime; too few for a fork bomb.
const PIDS_MAX: i64 = 64;

/// Period of the CPU quota: the kernel's default.
const CPU_PERIOD_US: i64 = 100_000;

/// Open files of a container: libraries, the model and sockets are some tens.
const OPEN_FILES_MAX: i64 = 256;

/// Processes of all containers of one Podman together: half of Podman's own limit on a host with usual limits.
const PROCESSES_MAX: i64 = 16_384;

/// Largest file that a container can write: the size of its `/tmp`.
const FILE_BYTES_MAX: i64 = 64 << 20;

/// Options of the container's `/tmp`. It can write only there and into its socket's folder, both of them memory that
/// counts as the container's.
const TMPFS: &str = "rw,noexec,nosuid,nodev,size=64m";

/// Options that close a folder in memory which the engine adds unasked.
const TMPFS_CLOSED: &str = "ro,noexec,nosuid,nodev,size=64k";

/// Score by which the kernel, short of memory, kills containers before the worker.
const OOM_SCORE_ADJ: i64 = 500;

/// Label: the worker that owns the container.
const LABEL_WORKER: &str = "mesh.worker";

/// Label: the attempt for which the container was started.
const LABEL_ATTEMPT: &str = "mesh.attempt";

/// Label: the model in the container.
const LABEL_MODEL: &str = "mesh.model";

/// First Podman that obeys CDI requests for GPUs; earlier ones silently start the container without GPUs.
const PODMAN_CDI_FROM: (u32, u32) = (5, 4);

/// First Podman that tells of an end by the memory limit. The monitor of earlier ones notes it in a file that they look
/// for in another folder, and the container's cgroup, which counts such ends, is removed with the container.
const PODMAN_TELLS_MEMORY_FROM: u32 = 5;

/// First runc without the container escapes of November 2025 (CVE-2025-31133, -52565, -52881). Distributions fix older
/// versions under the old number, so an older one only causes a warning.
const RUNC_FROM: [u32; 3] = [1, 2, 8];

/// Settings of the container engine.
#[derive(Clone, Debug)]
pub(crate) struct DockerSettings {
    /// `unix:///…` or a path; `None` for the usual sockets of engines.
    pub(crate) host: Option<String>,
    /// Name of the runner's image.
    pub(crate) image: String,
    /// The worker that owns the containers.
    pub(crate) worker: WorkerId,
}

/// The kind of engine that answers on the socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flavour {
    Docker,
    Podman { major: u32, minor: u32 },
}

/// Why containers cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerError {
    #[error("no container engine answers ({0}): start it, name its socket with --docker-host, or use --engine process")]
    NoEngine(String),
    #[error(
        "the engine has no image {image} ({error}): build it with docker/build-image, or name another with --image"
    )]
    NoImage { image: String, error: Error },
}

/// A connected container engine.
#[derive(Clone, Debug)]
pub(crate) struct Docker {
    client: bollard::Docker,
    flavour: Flavour,
    settings: DockerSettings,
    /// Id of the image by its content: the image found at the start is the one that runs.
    image_id: String,
}

impl Docker {
    /// Connects to the engine, reads its version and finds the image.
    pub(crate) async fn connect(settings: DockerSettings) -> Result<Self, DockerError> {
        let client = open(settings.host.as_deref()).await.map_err(DockerError::NoEngine)?;
        let no_engine = |error: Error| DockerError::NoEngine(error.to_string());
        let client = client.negotiate_version().await.map_err(no_engine)?;
        let version = client.version().await.map_err(no_engine)?;
        let flavour = Flavour::of(&version);
        let image = client.inspect_image(&settings.image).await;
        let image = image.map_err(|error| DockerError::NoImage { image: settings.image.clone(), error })?;
        let image_id = image.id.unwrap_or_else(|| settings.image.clone());
        info!(?flavour, version = version.version, image = settings.image, "container engine found");
        if let Some(runc) = old_runc(&version) {
            let [major, minor, patch] = RUNC_FROM;
            warn!(
                runc,
                "models could escape from containers of a runc older than {major}.{minor}.{patch}, unless the distribution has \
                 mended it: check for updates"
            );
        }
        Ok(Self { client, flavour, settings, image_id })
    }

    /// Ends once the engine has answered, or is known not to be there. Does not end while the engine hangs.
    pub(crate) async fn answers(host: Option<&str>) {
        if let Ok(client) = open(host).await {
            let _ = client.version().await;
        }
    }

    /// Removes the containers of earlier lives of this worker, if an engine answers. Needs no image.
    pub(crate) async fn remove_leftovers(host: Option<&str>, worker: WorkerId) {
        let Ok(client) = open(host).await else { return };
        let Ok(client) = client.negotiate_version().await else { return };
        let filter = HashMap::from([("label", vec![format!("{LABEL_WORKER}={worker}")])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filter).build();
        let left = client.list_containers(Some(options)).await.unwrap_or_else(|error| {
            warn!(%error, "cannot look for containers of an earlier life");
            Vec::new()
        });
        for id in left.into_iter().filter_map(|container| container.id) {
            info!(container = id, "removing a container of an earlier life");
            remove(&client, &id).await;
        }
    }

    async fn start_container(&self, spec: &RunnerSpec, folder: &SocketFolder) -> Result<String, Failure> {
        let body = ContainerCreateBody {
            image: Some(self.image_id.clone()),
            cmd: Some(self.command(spec)),
            user: Some(USER.to_owned()),
            network_disabled: Some(true),
            env: Some(RUNNER_ENVIRONMENT.map(|(name, value)| format!("{name}={value}")).to_vec()),
            labels: Some(HashMap::from([
                (LABEL_WORKER.to_owned(), self.settings.worker.to_string()),
                (LABEL_ATTEMPT.to_owned(), format!("{}-{}", spec.first_attempt.task, spec.first_attempt.attempt)),
                (
                    LABEL_MODEL.to_owned(),
                    spec.model.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
                ),
            ])),
            host_config: Some(self.host_config(spec, folder)?),
            ..ContainerCreateBody::default()
        };
        let unavailable = |error: Error| {
            let text =
                format!("container engine: {error}; look at `docker info` at this worker, and its --docker-host");
            warn!("a container cannot be started: {error}");
            Failure::new(ErrorCode::EngineUnavailable, text)
        };
        let id = self.client.create_container(None, body).await.map_err(unavailable)?.id;
        if let Err(error) = self.client.start_container(&id, None).await {
            remove(&self.client, &id).await;
            return Err(unavailable(error));
        }
        Ok(id)
    }

    /// Arguments of the image's entry point.
    fn command(&self, spec: &RunnerSpec) -> Vec<String> {
        let socket = format!("/mesh/{SOCKET_NAME}");
        let threads = spec.threads.to_string();
        let format = spec.format.name();
        [
            "serve",
            "--model",
            "/model",
            "--socket",
            &socket,
            "--name",
            "model",
            "--format",
            format,
            "--threads",
            &threads,
            // A container does not die with the worker by itself.
            "--while-connected",
        ]
        .into_iter()
        .chain(spec.device_argument())
        .map(str::to_owned)
        .collect()
    }

    fn host_config(&self, spec: &RunnerSpec, folder: &SocketFolder) -> Result<HostConfig, Failure> {
        let memory_bytes = i64::try_from(spec.memory_bytes).unwrap_or(i64::MAX);
        Ok(HostConfig {
            network_mode: Some("none".to_owned()),
            readonly_rootfs: Some(true),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            privileged: Some(false),
            pids_limit: Some(PIDS_MAX + i64::from(spec.threads)),
            memory: Some(memory_bytes),
            // The same as the memory limit: no swap.
            memory_swap: Some(memory_bytes),
            // Not as a number of processors: the engine refuses more than the machine has, which head-room may exceed.
            cpu_period: Some(CPU_PERIOD_US),
            cpu_quota: Some(i64::from(spec.cpu_millis) * CPU_PERIOD_US / 1000),
            ulimits: Some(self.flavour.ulimits()),
            tmpfs: Some(self.flavour.tmpfs()),
            ipc_mode: Some("none".to_owned()),
            log_config: Some(self.flavour.log_config()),
            oom_score_adj: Some(OOM_SCORE_ADJ),
            init: Some(false),
            mounts: Some(vec![bind(spec.model.path(), "/model", true), bind(folder.path(), "/mesh", false)]),
            device_requests: self.flavour.gpu_request(spec.device)?.map(|request| vec![request]),
            ..HostConfig::default()
        })
    }

    /// Waits for the container's end.
    async fn wait(&self, id: &str, memory_bytes: u64) -> Cause {
        let code = loop {
            let mut waiting = Box::pin(self.client.wait_container(id, None::<WaitContainerOptions>));
            match waiting.next().await {
                Some(Ok(ended)) => break ended.status_code,
                Some(Err(Error::DockerContainerWaitError { code, .. })) => break code,
                Some(Err(Error::RequestTimeoutError)) => {}
                // The engine restarted, or the container was removed.
                Some(Err(_)) | None => return Cause::Stopped,
            }
        };
        let state = self.client.inspect_container(id, None).await.ok().and_then(|container| container.state);
        self.flavour.cause_of(code, state.is_some_and(|state| state.oom_killed == Some(true)), memory_bytes)
    }

    /// Returns once the container uses more than its limit of GPU memory.
    async fn outgrown(&self, id: &str, keeper_pid: &OnceLock<u32>, spec: &RunnerSpec) {
        let state = match spec.device {
            Device::Cpu => None,
            _ => self.client.inspect_container(id, None).await.ok().and_then(|container| container.state),
        };
        let pid = state.and_then(|state| u32::try_from(state.pid?).ok()).filter(|pid| *pid > 0);
        if let Some(pid) = pid {
            let _ = keeper_pid.set(pid);
        }
        outgrown(pid, spec.gpu_memory_bytes).await;
    }

    async fn log_tail(&self, id: &str) -> LogTail {
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail("50").build();
        let mut tail = LogTail::default();
        let mut lines = Box::pin(self.client.logs(id, Some(options)));
        while let Some(Ok(line)) = lines.next().await {
            tail.push(&line.into_bytes());
        }
        tail
    }

    async fn keep(self, id: String, keeper: Keeper, spec: RunnerSpec) {
        let cause = tokio::select! {
            cause = self.wait(&id, spec.memory_bytes) => cause,
            () = self.outgrown(&id, &keeper.pid, &spec) => Cause::OutOfGpuMemory { limit_bytes: spec.gpu_memory_bytes },
            _ = keeper.unwanted => Cause::Stopped,
        };
        let log = if cause == Cause::Stopped { LogTail::default() } else { self.log_tail(&id).await };
        debug!(container = id, %cause, "runner ended");
        let end = Exit::new(cause, spec.memory_of, &log);
        // Dropped first: the model may be evicted once the end is known.
        drop(spec);
        // A container that may still run has the memory that somebody waits for.
        let may_run = matches!(cause, Cause::Stopped | Cause::OutOfGpuMemory { .. });
        if may_run {
            remove(&self.client, &id).await;
        }
        keeper.exit.send_replace(Some(end));
        if !may_run {
            remove(&self.client, &id).await;
        }
        drop(keeper.folder);
    }
}

impl Engine for Docker {
    fn kind(&self) -> EngineKind {
        EngineKind::Docker
    }

    fn start(&self, spec: RunnerSpec, folder: Arc<SocketFolder>) -> BoxFuture<'_, Result<Runner, Failure>> {
        Box::pin(async move {
            let (runner, keeper) = Runner::new(folder);
            let engine = self.clone();
            // In its own task: a start that is given up half-way must still remove its container.
            let started = tokio::spawn(async move {
                let id = engine.start_container(&spec, &keeper.folder).await?;
                tokio::spawn(engine.keep(id, keeper, spec));
                Ok(())
            });
            match started.await {
                Ok(started) => started.map(|()| runner),
                Err(error) => Err(Failure::new(ErrorCode::EngineUnavailable, error.to_string())),
            }
        })
    }
}

/// The version of the engine's runc if it is older than [`RUNC_FROM`].
fn old_runc(version: &SystemVersion) -> Option<&str> {
    let runc = version.components.iter().flatten().find(|component| component.name == "runc")?;
    (numbers(&runc.version) < RUNC_FROM).then_some(&runc.version)
}

/// Major, minor and patch of a version; 0 where there is no number. Suffixes (`5+ds1`, `0-rc.1`) are ignored.
fn numbers(version: &str) -> [u32; 3] {
    let digits = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>();
    let mut parts = version.split('.').map(|part| digits(part).parse().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

impl Flavour {
    fn of(version: &SystemVersion) -> Self {
        let components = version.components.iter().flatten();
        let podman = components.into_iter().find(|component| component.name.to_lowercase().contains("podman"));
        match podman {
            None => Self::Docker,
            Some(podman) => {
                let [major, minor, _] = numbers(&podman.version);
                Self::Podman { major, minor }
            }
        }
    }

    /// Why a container with this exit code ended.
    fn cause_of(self, code: i64, oom_killed: bool, memory_bytes: u64) -> Cause {
        let tells_memory = !matches!(self, Self::Podman { major, .. } if major < PODMAN_TELLS_MEMORY_FROM);
        // A shell's notation of a death by signal.
        let signal = i32::try_from(code.saturating_sub(128)).ok().filter(|signal| (1..=64).contains(signal));
        match signal {
            _ if oom_killed => Cause::OutOfMemory { limit_bytes: memory_bytes },
            // A person may have killed it, too.
            Some(libc::SIGKILL) if !tells_memory => Cause::Killed { limit_bytes: memory_bytes },
            Some(signal) => Cause::Signal(signal),
            None => Cause::Code(i32::try_from(code).unwrap_or(-1)),
        }
    }

    /// Limits of the container's processes, beside those of its cgroup.
    fn ulimits(self) -> Vec<ResourcesUlimits> {
        let limit =
            |name: &str, max| ResourcesUlimits { name: Some(name.to_owned()), soft: Some(max), hard: Some(max) };
        let mut limits = vec![limit("nofile", OPEN_FILES_MAX), limit("core", 0), limit("fsize", FILE_BYTES_MAX)];
        if let (Self::Podman { .. }, Ok((_, hard))) = (self, nix::sys::resource::getrlimit(Resource::RLIMIT_NPROC)) {
            // By default Podman asks for four million, which a host with user limits refuses, so the container does not
            // start. The cgroup counts one container's processes; this limit counts those of all containers.
            limits.push(limit("nproc", i64::try_from(hard).unwrap_or(PROCESSES_MAX).min(PROCESSES_MAX)));
        }
        limits
    }

    /// Folders in memory, with their mount options.
    fn tmpfs(self) -> HashMap<String, String> {
        let closed: &[&str] = match self {
            Self::Docker => &[],
            // By default Podman lets any user write there without limit, and run what was written.
            Self::Podman { .. } => &["/run", "/var/tmp"],
        };
        let closed = closed.iter().map(|folder| ((*folder).to_owned(), TMPFS_CLOSED.to_owned()));
        closed.chain([("/tmp".to_owned(), TMPFS.to_owned())]).collect()
    }

    /// Settings of a log of at most one megabyte that can be read back.
    fn log_config(self) -> HostConfigLogConfig {
        let (driver, size) = match self {
            Self::Docker => ("local", "1m"),
            Self::Podman { .. } => ("k8s-file", "1mb"),
        };
        let mut config = HashMap::from([("max-size".to_owned(), size.to_owned())]);
        if self == Self::Docker {
            config.insert("max-file".to_owned(), "1".to_owned());
            config.insert("compress".to_owned(), "false".to_owned());
        }
        HostConfigLogConfig { typ: Some(driver.to_owned()), config: Some(config) }
    }

    /// The request for GPUs, in the form that this engine obeys.
    fn gpu_request(self, device: Device) -> Result<Option<DeviceRequest>, Failure> {
        let index = match device {
            Device::Cpu => return Ok(None),
            Device::Gpu(index) => Some(index.to_string()),
            Device::AnyGpu => None,
        };
        match self {
            Self::Docker => Ok(Some(DeviceRequest {
                driver: Some("nvidia".to_owned()),
                // A count and ids exclude each other; −1 stands for all GPUs.
                count: index.is_none().then_some(-1),
                device_ids: index.map(|index| vec![index]),
                capabilities: Some(vec![vec!["gpu".to_owned()]]),
                ..DeviceRequest::default()
            })),
            Self::Podman { major, minor } if (major, minor) >= PODMAN_CDI_FROM => Ok(Some(DeviceRequest {
                driver: Some("cdi".to_owned()),
                device_ids: Some(vec![format!("nvidia.com/gpu={}", index.as_deref().unwrap_or("all"))]),
                ..DeviceRequest::default()
            })),
            Self::Podman { major, minor } => {
                let text =
                    format!("Podman {major}.{minor} ignores requests for GPUs: upgrade it to 5.4 at this worker");
                Err(Failure::new(ErrorCode::EngineUnavailable, text))
            }
        }
    }
}

/// Mounts a file or folder of the host. Not in the short form with colons, since a path may contain colons.
fn bind(source: &Path, target: &str, read_only: bool) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(source.display().to_string()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        ..Mount::default()
    }
}

/// Removes a container. Where the engine does not do so now, it is asked again and again, and nobody waits for that.
async fn remove(client: &bollard::Docker, id: &str) {
    let Err(error) = try_remove(client, id).await else { return };
    warn!(container = id, %error, "a container cannot be removed; this is tried again, at the latest at the next start");
    let (client, id) = (client.clone(), id.to_owned());
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(REMOVE_AGAIN_AFTER).await;
            if try_remove(&client, &id).await.is_ok() {
                return info!(container = id, "the container that could not be removed is gone");
            }
        }
    });
}

async fn try_remove(client: &bollard::Docker, id: &str) -> Result<(), Error> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    match client.remove_container(id, Some(options)).await {
        // It is gone, or about to go.
        Err(Error::DockerResponseServerError { status_code: 404 | 409, .. }) => Ok(()),
        other => other,
    }
}

async fn open(host: Option<&str>) -> Result<bollard::Docker, String> {
    let path = sockets::find(host).await?;
    let client = bollard::Docker::connect_with_unix(&path, ENGINE_WAIT.as_secs(), API_DEFAULT_VERSION);
    client.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
