//! A Redis server for one test.

use std::{net::TcpListener, process::Command, time::Duration};

use tempfile::TempDir;

use super::{PATIENCE, Process};

/// A redis-server process with its own empty folder.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    folder: TempDir,
    port: u16,
}

impl Redis {
    /// Starts a server on a free port of the loopback.
    ///
    /// # Panics
    /// If redis-server is not installed (Debian: `apt-get install redis-server`).
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        Self { process: serve(port, &folder), folder, port }
    }

    /// `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Kills the server with SIGKILL. Its files stay.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the server again on the same port and folder.
    pub fn start_again(&mut self) {
        self.process = serve(self.port, &self.folder);
    }

    /// The output of `redis-cli` for these arguments.
    pub fn cli(&self, arguments: &[&str]) -> String {
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(arguments).output();
        let output = output.expect("redis-cli comes with redis-server");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn serve(port: u16, folder: &TempDir) -> Process {
    let mut command = Command::new("redis-server");
    // Every write is on disk before it is answered: what the broker has acknowledged must survive a kill of both.
    command.args([
        "--port",
        &port.to_string(),
        "--bind",
        "127.0.0.1",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
    ]);
    command.args(["--save", "", "--dir"]).arg(folder.path());
    let mut process = Process::start("redis-server", command);
    process.wait_for_line("that it accepts connections", PATIENCE, |line| {
        line.to_lowercase().contains("ready to accept connections").then_some(())
    });
    process
}

/// A port on which nothing listens right now.
pub fn free_port() -> u16 {
    // Redis does not accept port 0. Another process might take the port before Redis binds it, but the kernel hands
    // ports out in turn, so that is unlikely.
    let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback has a free port");
    listener.local_addr().expect("just bound").port()
}

/// Longest time until a broker notices that its store is away or back.
pub const NOTICE_LIMIT: Duration = Duration::from_secs(20);
