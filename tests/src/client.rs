//! A run of `mesh-client` in the background, and its result.

use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Process, process::Stream};

/// Longest run of a client in any test.
const CLIENT_LIMIT: std::time::Duration = std::time::Duration::from_secs(180);

/// The result of a finished client.
#[derive(Debug)]
pub struct Answer {
    /// Exit code; 128 + N if signal N ended the client.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Answer {
    /// This answer, if the client succeeded.
    ///
    /// # Panics
    /// If it failed.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.failed_with(0, "")
    }

    /// This answer, if the client exited with `code` and one of its outputs contains `text`.
    ///
    /// # Panics
    /// If the code differs or the text is missing.
    #[track_caller]
    pub fn failed_with(self, code: i32, text: &str) -> Self {
        assert_eq!(self.code, code, "exit code of mesh-client, which said:\n{}\n{}", self.stdout, self.stderr);
        let said = self.stdout.contains(text) || self.stderr.contains(text);
        assert!(said, "'{text}' is missing in what mesh-client said:\n{}\n{}", self.stdout, self.stderr);
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// If it is not JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.stdout))
    }
}

/// A running client.
#[derive(Debug)]
pub struct Submission {
    process: Process,
}

impl Submission {
    /// Starts a client.
    pub fn start(command: Command) -> Self {
        Self { process: Process::start("mesh-client", command) }
    }

    /// The client's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.process.signal(Signal::SIGINT);
    }

    /// Waits for the client's end.
    pub fn wait(mut self) -> Answer {
        use std::os::unix::process::ExitStatusExt;
        let status = self.process.wait(CLIENT_LIMIT);
        Answer {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: self.process.output(Stream::Out),
            stderr: self.process.output(Stream::Err),
        }
    }
}
