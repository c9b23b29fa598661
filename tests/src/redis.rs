//! Redis servers for one test: single, as a node of a cluster, as a sentinel.

use std::{hash::BuildHasher, net::TcpListener, path::Path, process::Command, time::Duration};

use tempfile::TempDir;

use super::{PATIENCE, Process};

/// Longest time until a broker notices that its store is away or back.
pub const NOTICE_LIMIT: Duration = Duration::from_secs(20);

/// Where [`free_port`] looks: above what services use, below what Linux hands out by itself (32,768 and above), so that
/// a port stays free while its server is down.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// A redis-server process with its own empty folder. Killed when dropped.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    folder: TempDir,
    port: u16,
    settings: Vec<String>,
}

impl Redis {
    /// A server on a free port of the loopback. Every write is on disk before it is answered: what the broker has
    /// acknowledged must survive a kill of both.
    ///
    /// # Panics
    /// If redis-server is not installed (Debian: `apt-get install redis-server`).
    pub fn start() -> Self {
        Self::start_with(&["--appendonly", "yes", "--appendfsync", "always"])
    }

    /// A server with these settings (`--name`, `value`).
    pub fn start_with(settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        Self { process: serve(port, &settings, folder.path()), folder, port, settings }
    }

    /// A sentinel that watches only the master at this port, under this name.
    pub fn start_sentinel(name: &str, master_port: u16) -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a temporary folder"), free_port());
        let file = folder.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor {name} 127.0.0.1 {master_port} 1\n\
             sentinel down-after-milliseconds {name} 500\nsentinel failover-timeout {name} 2000\n",
            folder.path().display()
        );
        std::fs::write(&file, text).expect("the folder is ours");
        let mut command = Command::new("redis-server");
        command.arg(&file).arg("--sentinel");
        Self { process: started(command, "sentinel id is"), folder, port, settings: Vec::new() }
    }

    /// `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Kills the server with SIGKILL. Its files stay.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the server again on the same port and folder.
    pub fn start_again(&mut self) {
        self.process = serve(self.port, &self.settings, self.folder.path());
    }

    /// Kills the server and starts it again with more settings.
    pub fn restart_with(&mut self, settings: &[&str]) {
        self.kill();
        self.settings.extend(settings.iter().map(|setting| (*setting).to_owned()));
        self.start_again();
    }

    /// The output of `redis-cli` for these arguments, without its last line break. A cluster's redirections are followed.
    pub fn cli(&self, arguments: &[&str]) -> String {
        let output = Command::new("redis-cli").args(["-c", "-p", &self.port.to_string()]).args(arguments).output();
        let output = output.expect("redis-cli comes with redis-server");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

fn serve(port: u16, settings: &[String], folder: &Path) -> Process {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]).arg(folder);
    command.args(settings);
    started(command, "ready to accept connections")
}

fn started(command: Command, sign: &str) -> Process {
    let mut process = Process::start("redis-server", command);
    process.wait_for_line("that it has started", PATIENCE, |line| line.to_lowercase().contains(sign).then_some(()));
    process
}

/// A port on which nothing listens, and that stays so unless somebody asks for just this one.
///
/// # Panics
/// If all of a thousand ports are taken.
pub fn free_port() -> u16 {
    // Each new state has its own keys, which makes it a source of chance.
    let chance = |turn: u16| std::collections::hash_map::RandomState::new().hash_one(turn);
    let port = |turn| PORTS.start + u16::try_from(chance(turn) % PORTS.len() as u64).expect("within the range");
    let free = (0..1000).map(port).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    free.expect("the loopback has a free port")
}
