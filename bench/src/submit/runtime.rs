//! ONNX Runtime without runner and mesh: its own Python package, called in a process of its own (`runtime.py`).
//!
//! Owns that process. The times are measured inside of it.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{cache, onnx};
use tempfile::NamedTempFile;

const SCRIPT: &str = include_str!("runtime.py");

/// A Python process that has loaded the model. Dropping it ends it.
pub(super) struct Runtime {
    process: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    _model: NamedTempFile,
}

impl Runtime {
    /// Starts a process. Returns it after its first answer, with the milliseconds from before the library was loaded.
    pub(super) fn start() -> Result<(Self, f64)> {
        let python = cache::reference_python().context(
            "the reference environment, in which ONNX Runtime is a Python package, is missing or old: \
             run ./test, or runner/reference/check",
        )?;
        let mut model = NamedTempFile::new()?;
        model.write_all(&onnx::add_one())?;
        let mut command = Command::new(python);
        command.args(["-I", "-c", SCRIPT]).arg(model.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("cannot start the reference environment's Python")?;
        let (asks, answers) = (process.stdin.take().context("piped")?, process.stdout.take().context("piped")?);
        let mut runtime = Self { process, asks, answers: BufReader::new(answers), _model: model };
        let first = runtime.times()?;
        let cold = first.first().context("the time of the first answer")?.as_secs_f64() * 1000.0;
        Ok((runtime, cold))
    }

    /// Runs the model this many times. Returns the time of each run.
    pub(super) fn infer(&mut self, runs: usize) -> Result<Vec<Duration>> {
        writeln!(self.asks, "{runs}")?;
        let times = self.times()?;
        ensure!(times.len() == runs, "asked for {runs} runs, ONNX Runtime's process told of {}", times.len());
        Ok(times)
    }

    fn times(&mut self) -> Result<Vec<Duration>> {
        let mut line = String::new();
        ensure!(self.answers.read_line(&mut line)? > 0, "ONNX Runtime's process ended: its log says why");
        line.split_whitespace().map(|ns| Ok(Duration::from_nanos(ns.parse()?))).collect()
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // One that has ended already needs no killing.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
