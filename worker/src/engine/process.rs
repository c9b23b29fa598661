//! Runners as child processes, for machines without a container engine. The limits stop accidents, not malice:
//! untrusted models belong into containers.
//!
//! A runner has its own process group and dies with the worker, even with a killed one.

use std::{
    fs, io,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use nix::{
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use proto_msgs::{EngineKind, ErrorCode, Failure, ModelFormat};
use tokio::{
    io::AsyncReadExt,
    process::{Child, ChildStderr, Command},
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{debug, warn};

use super::{
    Cause, Device, Engine, Exit, Keeper, RUNNER_ENVIRONMENT, Runner, RunnerSpec, SOCKET_NAME, SocketFolder,
    exit::LogTail, formats, gpu_memory::outgrown,
};

/// Interval of memory checks while a model loads or runs. A limit can be exceeded by what is touched within it.
const MEMORY_WATCH_EVERY: Duration = Duration::from_millis(50);

/// Largest file that a runner can write. Runners write none, but a runtime may cache something.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Open files of a runner: libraries, the model and sockets are some tens.
const OPEN_FILES_MAX: u64 = 256;

/// Writable address space beyond the memory limit, since runtimes reserve more than they touch. Stops memory that grows
/// faster than the checks see.
const DATA_HEADROOM_BYTES: u64 = 1 << 30;

/// Time to read the log of an ended runner to its end; a process left behind may keep the log open.
const LOG_END_WAIT: Duration = Duration::from_millis(200);

/// Score by which the kernel, short of memory, kills runners before the worker.
const OOM_SCORE_ADJ: &str = "500";

/// Environment variables that a runner gets from the worker's.
const ENVIRONMENT: [&str; 7] =
    ["PATH", "HOME", "XDG_DATA_HOME", "MESH_RUNTIME_DIR", "LD_LIBRARY_PATH", "RUST_LOG", "RUST_BACKTRACE"];

/// The engine that runs child processes.
#[derive(Debug)]
pub(crate) struct Process {
    runner: PathBuf,
    formats: Vec<ModelFormat>,
}

impl Process {
    /// An engine that starts this program as its runners, whatever the program can run.
    #[cfg(test)]
    pub(crate) fn new(runner: PathBuf) -> Self {
        Self { runner, formats: ModelFormat::ALL.to_vec() }
    }

    /// An engine that starts this program as its runners, for the formats that the program can run.
    ///
    /// # Errors
    /// What an operator must do if it can run none.
    pub(crate) async fn open(runner: PathBuf) -> Result<Self, String> {
        let formats::Answer { formats, failures, remarks } = formats::ask(program(&runner).into()).await;
        remarks.iter().for_each(|remark| warn!("{remark}"));
        if formats.is_empty() && !failures.is_empty() {
            let reasons: Vec<_> = failures.into_iter().map(|(_, reason)| reason).collect();
            return Err(format!("{} can run no model: {}", runner.display(), reasons.join("; ")));
        }
        for (format, reason) in failures {
            warn!(%format, "models of this format are not taken: {reason}; then start this worker again");
        }
        Ok(Self { runner, formats })
    }
}

/// The runner's program, with the environment that it gets from the worker's.
fn program(runner: &Path) -> std::process::Command {
    let mut program = std::process::Command::new(runner);
    program.env_clear().envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    // Runners start in other folders.
    let libraries = std::env::var_os("MESH_RUNTIME_DIR").filter(|folder| !folder.is_empty());
    program.envs(libraries.and_then(|folder| std::path::absolute(folder).ok()).map(|all| ("MESH_RUNTIME_DIR", all)));
    program.envs(RUNNER_ENVIRONMENT);
    program
}

/// Path of the runner's program: `told`, else the one beside this program, else the first in PATH.
pub(crate) fn find_runner(told: Option<&Path>) -> Option<PathBuf> {
    const NAME: &str = "mesh-runner";
    if let Some(path) = told {
        return path.canonicalize().ok().filter(|path| path.is_file());
    }
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(NAME)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside.into_iter().chain(std::env::split_paths(&path).map(|folder| folder.join(NAME))).find(|path| path.is_file())
}

impl Engine for Process {
    fn kind(&self) -> EngineKind {
        EngineKind::Process
    }

    fn formats(&self) -> &[ModelFormat] {
        &self.formats
    }

    fn start(&self, spec: RunnerSpec, folder: Arc<SocketFolder>) -> BoxFuture<'_, Result<Runner, Failure>> {
        Box::pin(async move {
            let (runner, keeper) = Runner::new(folder);
            let child = self.spawn(&spec, runner.folder()).map_err(|error| {
                let text = format!("{} does not start: {error}", self.runner.display());
                Failure::new(ErrorCode::EngineUnavailable, text)
            })?;
            if let Some(pid) = child.id() {
                let _ = keeper.pid.set(pid);
                // May be forbidden; then the kernel treats the runner like any other process.
                let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE_ADJ);
            }
            tokio::spawn(keep(child, keeper, spec));
            Ok(runner)
        })
    }
}

impl Process {
    fn spawn(&self, spec: &RunnerSpec, folder: &SocketFolder) -> io::Result<Child> {
        let mut command = Command::from(program(&self.runner));
        command
            .arg("serve")
            .arg("--model")
            .arg(spec.model.path())
            // Relative to the folder: a socket's path must be shorter than the path of a state folder may be.
            .args(["--socket", SOCKET_NAME, "--name", "model"])
            .args(["--format", spec.format.name()])
            .args(["--threads", &spec.threads.to_string()])
            .current_dir(folder.path())
            .args(spec.device_argument())
            .envs(visible_gpus(spec.device))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let worker = std::process::id();
        let data_bytes_max = spec.memory_bytes.saturating_add(DATA_HEADROOM_BYTES);
        // SAFETY: between fork and exec only async-signal-safe system calls are made and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                // Bound to the spawning thread: one of the runtime, which lives as long as the worker.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The worker may have died before the line above.
                if nix::unistd::getppid() != Pid::from_raw(worker as i32) {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
                setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES_MAX, OPEN_FILES_MAX)?;
                setrlimit(Resource::RLIMIT_FSIZE, FILE_BYTES_MAX, FILE_BYTES_MAX)?;
                setrlimit(Resource::RLIMIT_DATA, data_bytes_max, data_bytes_max)?;
                Ok(())
            });
        }
        command.spawn()
    }
}

/// Environment that selects the GPUs a runner sees. Indexes are those of the management library: the bus order.
fn visible_gpus(device: Device) -> Vec<(&'static str, String)> {
    const ORDER: (&str, &str) = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    let order = (ORDER.0, ORDER.1.to_owned());
    match device {
        Device::Cpu => vec![("CUDA_VISIBLE_DEVICES", String::new())],
        Device::Gpu(index) => vec![order, ("CUDA_VISIBLE_DEVICES", index.to_string())],
        Device::AnyGpu => vec![order],
    }
}

/// Watches one runner until its end. Ends it when nobody needs it any more.
async fn keep(mut child: Child, mut keeper: Keeper, spec: RunnerSpec) {
    let pid = child.id();
    let mut stderr = child.stderr.take();
    let mut log = LogTail::default();
    let mut piece = [0; 4096];
    let mut outgrown = Box::pin(outgrown(pid, spec.gpu_memory_bytes));
    // One for all turns: a runner that writes without a pause is measured, too.
    let mut measure = interval(MEMORY_WATCH_EVERY);
    measure.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let cause = loop {
        let watching = *keeper.busy.borrow_and_update();
        tokio::select! {
            status = child.wait() => break cause_of(status),
            _ = &mut keeper.unwanted => break Cause::Stopped,
            read = read_some(&mut stderr, &mut piece) => match read {
                0 => stderr = None,
                n => log.push(&piece[..n]),
            },
            () = &mut outgrown => break Cause::OutOfGpuMemory { limit_bytes: spec.gpu_memory_bytes },
            _ = keeper.busy.changed() => {}
            _ = measure.tick(), if watching => {
                if resident_bytes(pid) > spec.memory_bytes {
                    break Cause::OutOfMemory { limit_bytes: spec.memory_bytes };
                }
            }
        }
    };
    if let Some(pid) = pid {
        // The group lives as long as any child in it, and its number is not reused before.
        let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
    let _ = child.wait().await;
    let _ = timeout(LOG_END_WAIT, async {
        while stderr.is_some() {
            match read_some(&mut stderr, &mut piece).await {
                0 => break,
                n => log.push(&piece[..n]),
            }
        }
    })
    .await;
    debug!(pid, %cause, "runner ended");
    let end = Exit::new(cause, spec.memory_of, &log);
    // Dropped first: the model may be evicted once the end is known.
    drop(spec);
    keeper.exit.send_replace(Some(end));
    drop(keeper.folder);
}

/// Reads a piece of the log. Waits for ever after the log's end, as the loop above needs it.
async fn read_some(stderr: &mut Option<ChildStderr>, piece: &mut [u8]) -> usize {
    match stderr {
        Some(pipe) => pipe.read(piece).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

fn cause_of(status: io::Result<ExitStatus>) -> Cause {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Cause::Code(code),
            (None, Some(signal)) => Cause::Signal(signal),
            (None, None) => Cause::Stopped,
        },
        Err(_) => Cause::Stopped,
    }
}

/// Resident memory of the process; 0 if it is gone.
fn resident_bytes(pid: Option<u32>) -> u64 {
    let read = |pid| fs::read_to_string(format!("/proc/{pid}/statm")).ok();
    let pages = pid.and_then(read).and_then(|statm| statm.split(' ').nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    pages.saturating_mul(page_bytes())
}

fn page_bytes() -> u64 {
    // SAFETY: sysconf only reads a constant of the system.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
