//! One process under test: its output lines, its signals, its end.

use std::{
    fmt,
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// Lines of each process that are shown when its test fails.
const LINES_SHOWN: usize = 80;

/// The output that a process wrote to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<(Stream, String)>>,
    grew: Condvar,
}

impl Log {
    fn lines(&self) -> MutexGuard<'_, Vec<(Stream, String)>> {
        self.lines.lock()
    }

    fn follow(self: &Arc<Self>, stream: Stream, output: impl Read + Send + 'static) -> std::thread::JoinHandle<()> {
        let log = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                log.lines().push((stream, line));
                log.grew.notify_all();
            }
        })
    }
}

/// A running or ended process. Dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    log: Arc<Log>,
    followers: Vec<std::thread::JoinHandle<()>>,
    ended: Option<ExitStatus>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({} {})", self.name, self.child.id())
    }
}

impl Process {
    /// Starts `command` in its own process group and follows its outputs line by line.
    ///
    /// # Panics
    /// If it cannot be started; the message says how to build it.
    pub fn start(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        // SAFETY: prctl is async-signal-safe. It makes the kernel end the child with the test's thread, also if the
        // test is killed and no destructor runs.
        unsafe {
            command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into));
        }
        let program = command.get_program().to_owned();
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("cannot start {}: {error} (for a program of the mesh: cargo build --release)", program.display())
        });
        let log = Arc::new(Log::default());
        let followers = vec![
            log.follow(Stream::Out, child.stdout.take().expect("piped above")),
            log.follow(Stream::Err, child.stderr.take().expect("piped above")),
        ];
        Self { name: name.to_owned(), child, log, followers, ended: None }
    }

    /// The process id, also the id of its group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line on either output for which `find` returns a value.
    ///
    /// # Panics
    /// If there is none within `limit`, or the process ends first.
    pub fn wait_for_line<T>(&mut self, what: &str, limit: Duration, find: impl Fn(&str) -> Option<T>) -> T {
        let start = Instant::now();
        let mut looked_at = 0;
        loop {
            // Checked before the lines are read, so that the output of an ended process is then complete.
            let ended = self.try_wait();
            if ended.is_some() {
                self.followers.drain(..).for_each(|follower| follower.join().expect("following does not panic"));
            }
            let mut lines = self.log.lines();
            if let Some(found) = lines[looked_at..].iter().find_map(|(_, line)| find(line)) {
                return found;
            }
            looked_at = lines.len();
            let left = limit.saturating_sub(start.elapsed());
            assert!(ended.is_none(), "{} ended ({}) without {what}", self.name, ended.expect("just seen"));
            assert!(!left.is_zero(), "{} did not print {what} within {limit:?}", self.name);
            let _ = self.log.grew.wait_for(&mut lines, left.min(Duration::from_millis(100)));
        }
    }

    /// Everything written to one of the outputs so far.
    pub fn output(&self, stream: Stream) -> String {
        self.log.lines().iter().filter(|(from, _)| *from == stream).map(|(_, line)| format!("{line}\n")).collect()
    }

    /// Whether a line on either output contains `text` so far.
    pub fn has_said(&self, text: &str) -> bool {
        self.log.lines().iter().any(|(_, line)| line.contains(text))
    }

    /// Sends a signal to the process, not to its children. Does nothing if it has ended.
    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
        }
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.wait(super::PATIENCE);
    }

    /// Sends SIGSTOP: the process exists but stands still.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Sends SIGCONT, after [`Self::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Freezes it for this long. This is the fault itself, not a wait for anything.
    pub fn stand_still(&self, time: Duration) {
        self.freeze();
        std::thread::sleep(time);
        self.thaw();
    }

    /// The exit status if the process has ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("own child");
        }
        self.ended
    }

    /// Waits for the end and all output.
    ///
    /// # Panics
    /// If the process does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        let status = super::wait_for(&what, limit, || self.try_wait());
        self.followers.drain(..).for_each(|follower| follower.join().expect("following does not panic"));
        status
    }

    /// Resident memory in bytes; 0 if it has ended.
    pub fn resident_bytes(&self) -> u64 {
        status_field(self.pid(), "VmRSS:").unwrap_or(0) * 1024
    }

    /// Processor time used so far, user and system.
    pub fn cpu_time(&self) -> Duration {
        cpu_time(self.pid()).unwrap_or_default()
    }

    /// Ids of its children that still exist.
    pub fn children(&self) -> Vec<u32> {
        children_of(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.try_wait().is_none() {
            self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let lines = self.log.lines();
            let hidden = lines.len().saturating_sub(LINES_SHOWN);
            eprintln!("---- {} (process {}), {hidden} lines before these ----", self.name, self.child.id());
            lines[hidden..].iter().for_each(|(_, line)| eprintln!("  {line}"));
        }
    }
}

/// A built binary of the mesh: in `$MESH_BIN_DIR`, by default `target/release` of this checkout.
pub fn binary(name: &str) -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release");
    std::env::var_os("MESH_BIN_DIR").map_or_else(default, PathBuf::from).join(name)
}

/// Whether a process with this id exists and is not a zombie.
pub fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z')))
}

/// Ids of the children of a process.
pub fn children_of(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|children| children.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|child| child.parse().ok())
        .collect()
}

/// Processor time of a process, all its threads; `None` if it is gone.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Fields 14 and 15, in ticks of 10 ms. They are counted behind the name, which may contain blanks.
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 10))
}

/// Whether a thread of the process computes, or waits for a processor to go on, at this moment.
pub fn is_computing(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    stats.filter_map(|stat| stat.rsplit(')').next()?.split_whitespace().next().map(|state| state == "R")).any(|is| is)
}

/// A number of `/proc/PID/status`, as printed there (kB for memory).
pub fn status_field(pid: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok())
}
