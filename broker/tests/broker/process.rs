//! The programs under test as processes: started on free ports, killed by their handle when the test ends.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// Nothing here takes a tenth of it on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A running `mesh-broker`.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) endpoint: String,
    pub(crate) admin: String,
    process: Child,
    own: TempDir,
}

/// The broker's command line: free ports and a folder of its own unless `flags` say otherwise.
fn command(flags: &[&str], own: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-broker"));
    command.args(flags).stdout(Stdio::piped()).stderr(File::create(own.path().join("log")).unwrap());
    let state = own.path().join("state").display().to_string();
    for (flag, value) in [("--bind", "tcp://127.0.0.1:0"), ("--admin", "127.0.0.1:0"), ("--state-dir", &state)] {
        if !flags.contains(&flag) {
            command.args([flag, value]);
        }
    }
    command
}

impl Broker {
    /// Starts one and waits until it listens.
    pub(crate) fn start(flags: &[&str]) -> Self {
        let own = tempfile::tempdir().unwrap();
        let mut process = command(flags, &own).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut told = |before: &str| {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            let said = line.strip_prefix(before).map(str::to_owned);
            said.unwrap_or_else(|| panic!("'{line}' in place of '{before}': {}", log(&own)))
        };
        let (endpoint, admin) = (told("listening on "), told("admin on "));
        Self { endpoint, admin, process, own }
    }

    /// Its exit code and log, where it does not come up.
    pub(crate) fn fail(flags: &[&str]) -> (Option<i32>, String) {
        let own = tempfile::tempdir().unwrap();
        let code = command(flags, &own).stdout(Stdio::null()).status().unwrap().code();
        (code, log(&own))
    }

    /// What another command prints.
    pub(crate) fn run(arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_mesh-broker")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn log(&self) -> String {
        log(&self.own)
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// SIGTERM; its exit code.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        self.signal("TERM");
        wait_for("the broker ends", || self.process.try_wait().unwrap().is_some());
        self.process.wait().unwrap().code()
    }

    pub(crate) fn signal(&self, name: &str) {
        let told = Command::new("kill").args(["-s", name, &self.process.id().to_string()]).status().unwrap();
        assert!(told.success());
    }

    /// A page of the admin port, head and body.
    pub(crate) fn page(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin.trim_start_matches("http://")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page
    }
}

fn log(own: &TempDir) -> String {
    std::fs::read_to_string(own.path().join("log")).unwrap_or_default()
}

impl Drop for Broker {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of the broker at {}\n{}", self.endpoint, self.log());
        }
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A running `redis-server` with an append-only file.
#[derive(Debug)]
pub(crate) struct Redis {
    port: u16,
    folder: TempDir,
    process: Option<Child>,
}

/// `false`, loudly, where a person has said that there is no Redis; a failure where there is none and nobody said so.
pub(crate) fn redis_is_there() -> bool {
    if std::env::var_os("MESH_SKIP_REDIS").is_some_and(|value| value == "1") {
        eprintln!("skipped: MESH_SKIP_REDIS=1");
        return false;
    }
    let found = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status();
    assert!(found.is_ok(), "redis-server is not installed: apt-get install redis, or set MESH_SKIP_REDIS=1");
    true
}

impl Redis {
    pub(crate) fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut redis = Self { port, folder: tempfile::tempdir().unwrap(), process: None };
        redis.start_again();
        redis
    }

    /// On its old files.
    pub(crate) fn start_again(&mut self) {
        let (port, folder) = (self.port.to_string(), self.folder.path().display().to_string());
        let settings = ["--appendonly", "yes", "--save", "", "--bind", "127.0.0.1", "--loglevel", "warning"];
        let mut command = Command::new("redis-server");
        command.args(["--port", &port, "--dir", &folder]).args(settings).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn().unwrap());
        wait_for("redis-server takes connections", || self.cli(&["PING"]) == "PONG");
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The answer of `redis-cli` to these arguments.
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
