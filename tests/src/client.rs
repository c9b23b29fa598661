//! A run of `mesh-client`: in the background, and what came of it.

use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Process, process::Stream};

/// The longest a client may take in any test.
const CLIENT_LIMIT: std::time::Duration = std::time::Duration::from_secs(180);

/// What a client left behind.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code; 128 + N where signal N ended it.
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
    /// If it did not.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.failed_with(0, "")
    }

    /// This answer, if the client exited with `code` and one of its outputs contains `text`.
    ///
    /// # Panics
    /// If not.
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
    /// If it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.stdout))
    }
}

/// A client that runs.
#[derive(Debug)]
pub struct Submission {
    process: Process,
}

impl Submission {
    /// Starts it.
    pub fn start(command: Command) -> Self {
        Self { process: Process::start("mesh-client", command) }
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        self.process.signal(Signal::SIGINT);
    }

    /// Waits for its end.
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
