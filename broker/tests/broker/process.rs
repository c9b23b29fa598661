//! The program under test as a process: started on free ports, killed through its handle when the test ends.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
};

use tempfile::TempDir;

use crate::{PATIENCE, wait_for};

/// A running `mesh-broker`.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) endpoint: String,
    pub(crate) admin: String,
    process: Child,
    own: TempDir,
}

/// The broker's command line: free ports and its own folder unless `flags` say otherwise.
fn command(flags: &[&str], own: &TempDir) -> Command {
    complete(Command::new(env!("CARGO_BIN_EXE_mesh-broker")), flags, own)
}

fn complete(mut command: Command, flags: &[&str], own: &TempDir) -> Command {
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
    /// Starts a broker and waits until it listens.
    pub(crate) fn start(flags: &[&str]) -> Self {
        let own = tempfile::tempdir().unwrap();
        Self::listening(command(flags, &own), own)
    }

    /// Starts a broker from a shell that has run this line before.
    pub(crate) fn start_after(line: &str) -> Self {
        let own = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{line} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_mesh-broker")]);
        Self::listening(complete(shell, &[], &own), own)
    }

    fn listening(mut command: Command, own: TempDir) -> Self {
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut told = |before: &str| {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            let said = line.strip_prefix(before).map(str::to_owned);
            said.unwrap_or_else(|| panic!("'{line}' in place of '{before}': {}", log(&own)))
        };
        let (endpoint, admin) = (told("listening on "), told("admin on "));
        Self { endpoint, admin, process, own }
    }

    /// Exit code and log of a broker that does not start.
    pub(crate) fn fail(flags: &[&str]) -> (Option<i32>, String) {
        let own = tempfile::tempdir().unwrap();
        let code = command(flags, &own).stdout(Stdio::null()).status().unwrap().code();
        (code, log(&own))
    }

    /// Standard output of another command of the program.
    pub(crate) fn run(arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_mesh-broker")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn log(&self) -> String {
        log(&self.own)
    }

    /// Kills the broker with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Stops the broker with SIGTERM and returns its exit code.
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
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page
    }

    /// A number of the metrics page that has no labels, by its name without `mesh_broker_`.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (page, line) = (self.page("/metrics"), format!("mesh_broker_{name} "));
        let value = page.lines().find_map(|found| found.strip_prefix(&line)?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {page}"))
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
