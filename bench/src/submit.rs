//! The overhead of the mesh for a tiny model: from `submit` to the verified answer, against the runtime called directly.
//! The runner asked directly stands between the two.

mod runtime;

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_sdk::{Input, Model, Options, Task};
use mesh_tests::{Mesh, PATIENCE, Process, Worker, docker, onnx, process::binary, wait_for};
use serde_json::json;
use tempfile::TempDir;

use crate::report::{Report, Table, median, percentile_ms};
use runtime::Runtime;

/// Answers of one way before the next way has its turn.
const TURN: usize = 20;

/// Number and length of the measurements.
#[derive(Clone, Copy)]
struct Plan {
    cold_runs: usize,
    turns: usize,
}

const FULL: Plan = Plan { cold_runs: 5, turns: 25 };
const QUICK: Plan = Plan { cold_runs: 1, turns: 1 };

/// One way to get an answer, and its times.
struct Way {
    name: &'static str,
    asked: Asked,
    cold_ms: Vec<f64>,
    warm: Vec<Duration>,
    /// The runner's part of a warm answer, as the worker measured it.
    running: Vec<Duration>,
    limit: &'static str,
}

enum Asked {
    Runtime(Runtime),
    Runner(Box<Runner>),
    Mesh(Box<InMesh>),
    /// The program, with the mesh of the SDK's way that has answered before.
    Program(Command),
}

pub(crate) fn run(quick: bool) -> Result<Report> {
    let plan = if quick { QUICK } else { FULL };
    let mut ways = vec![Way::runtime(plan)?, Way::runner(plan)?];
    let mesh = Way::mesh("mesh, child process", "process", plan)?;
    let program = Way::program(&mesh)?;
    ways.extend([mesh, program]);
    if docker::is_ready("bench submit") {
        ways.push(Way::mesh("mesh, container", "docker", plan)?);
    }
    for _ in 0..plan.turns {
        for way in &mut ways {
            way.take_turn()?;
        }
    }
    Ok(report(&mut ways, plan))
}

fn report(ways: &mut [Way], plan: Plan) -> Report {
    let mut report = Report::new("submit", "Submit to answer of a tiny model");
    let mut table = Table::new(
        "Times in ms",
        &["way", "cold", "warm p50", "warm p99", "p50 over direct", "of it in the runner, p50", "limited by"],
    );
    let base = percentile_ms(&mut ways[0].warm, 0.5);
    for way in ways {
        let p50 = percentile_ms(&mut way.warm, 0.5);
        let running = (!way.running.is_empty()).then(|| percentile_ms(&mut way.running, 0.5));
        let cold = (!way.cold_ms.is_empty()).then(|| median(way.cold_ms.iter().copied()));
        table.row(vec![
            json!(way.name),
            json!(cold),
            json!(p50),
            json!(percentile_ms(&mut way.warm, 0.99)),
            json!(p50 - base),
            json!(running),
            json!(way.limit),
        ]);
    }
    report.table(table);
    report.note(format!(
        "y = x + 1 in ONNX, 16 bytes of input. Cold: model not at the worker, runner not started, library not loaded; \
         median of {} fresh workers or processes. Warm: {} answers of each way, {TURN} at a time in turns, one after the other over \
         kept connections.",
        plan.cold_runs,
        plan.turns * TURN
    ));
    report.note(
        "The runtime: ONNX Runtime's own Python package, each run measured around its call with the input in memory; cold: \
         from before the library is loaded, in a process whose Python has started. The runner: HTTP with JSON over a kept \
         connection to its Unix socket, from this program; cold: with the start of its process. Through the mesh: the SDK in \
         this program, one broker, one worker, all on this machine. `mesh-client submit`: from the start of the program to \
         its end, with the files read and hashed and both connections made anew.",
    );
    report
}

/// Starts something this many times. Returns the last one and the milliseconds that each start took.
fn cold_starts<T>(runs: usize, start: impl Fn() -> Result<(T, f64)>) -> Result<(T, Vec<f64>)> {
    let (mut started, cold) = start()?;
    let mut cold_ms = vec![cold];
    for _ in 1..runs {
        // The earlier one ends only now, so that its end is not part of this time.
        let cold;
        (started, cold) = start()?;
        cold_ms.push(cold);
    }
    Ok((started, cold_ms))
}

impl Way {
    fn runtime(plan: Plan) -> Result<Self> {
        let (runtime, cold_ms) = cold_starts(plan.cold_runs, Runtime::start)?;
        Ok(Self {
            name: "the runtime called directly",
            asked: Asked::Runtime(runtime),
            cold_ms,
            warm: Vec::new(),
            running: Vec::new(),
            limit: "cold: loading ONNX Runtime's library; warm: the call from Python",
        })
    }

    fn runner(plan: Plan) -> Result<Self> {
        let (runner, cold_ms) = cold_starts(plan.cold_runs, Runner::start)?;
        Ok(Self {
            name: "the runner asked directly",
            asked: Asked::Runner(Box::new(runner)),
            cold_ms,
            warm: Vec::new(),
            running: Vec::new(),
            limit: "cold: loading ONNX Runtime's library; warm: two wake-ups and JSON",
        })
    }

    fn mesh(name: &'static str, engine: &'static str, plan: Plan) -> Result<Self> {
        let (mesh, cold_ms) = cold_starts(plan.cold_runs, || InMesh::start(engine))?;
        let limit = match engine {
            "docker" => "cold: the engine starts a container; warm: as with a child process",
            _ => {
                "cold: loading ONNX Runtime's library; warm: client, broker, client, worker, runner and back, each a wake-up"
            }
        };
        let asked = Asked::Mesh(Box::new(mesh));
        Ok(Self { name, asked, cold_ms, warm: Vec::new(), running: Vec::new(), limit })
    }

    /// The program against the mesh of this way.
    fn program(of: &Self) -> Result<Self> {
        let Asked::Mesh(mesh) = &of.asked else { bail!("the way has no mesh") };
        let [model, input] = ["add.onnx", "input.bin"].map(|file| mesh.mesh.folder().join(file));
        std::fs::write(&model, onnx::add_one())?;
        std::fs::write(&input, input_bytes())?;
        let mut command = Command::new(binary("mesh-client"));
        command.args(["--broker", mesh.mesh.endpoint(), "submit", "--json"]).arg(&model).arg(&input);
        command.env("HOME", mesh.mesh.folder());
        Ok(Self {
            name: "`mesh-client submit`, child process",
            asked: Asked::Program(command),
            cold_ms: Vec::new(),
            warm: Vec::new(),
            running: Vec::new(),
            limit: "the start of a program, two connections with their handshakes",
        })
    }

    fn take_turn(&mut self) -> Result<()> {
        let Self { asked, warm, running, .. } = self;
        match asked {
            Asked::Runtime(runtime) => warm.extend(runtime.infer(TURN)?),
            Asked::Runner(runner) => measure_turn(warm, || runner.infer())?,
            Asked::Mesh(mesh) => measure_turn(warm, || mesh.submit().map(|time| running.push(time)))?,
            Asked::Program(command) => measure_turn(warm, || {
                let output = command.output()?;
                ensure!(output.status.success(), "mesh-client: {}", String::from_utf8_lossy(&output.stderr));
                Ok(())
            })?,
        }
        Ok(())
    }
}

/// Gets one turn's answers and adds the time of each, as seen from here.
fn measure_turn(times: &mut Vec<Duration>, mut ask: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..TURN {
        let start = Instant::now();
        ask()?;
        times.push(start.elapsed());
    }
    Ok(())
}

/// A separate runner with a kept connection to it.
struct Runner {
    connection: BufReader<UnixStream>,
    _process: Process,
    _folder: TempDir,
}

impl Runner {
    /// Starts a runner. Returns it after its first answer, with the milliseconds from its start.
    fn start() -> Result<(Self, f64)> {
        let folder = tempfile::tempdir()?;
        let (model, socket) = (folder.path().join("add.onnx"), folder.path().join("runner.sock"));
        std::fs::write(&model, onnx::add_one())?;
        let start = Instant::now();
        let mut command = Command::new(binary("mesh-runner"));
        command.arg("serve").arg("--model").arg(&model).arg("--socket").arg(&socket).args(["--name", "model"]);
        let process = Process::start("mesh-runner", command);
        let connection = wait_for("the runner's socket", PATIENCE, || connect(&socket).ok());
        let mut runner = Self { connection, _process: process, _folder: folder };
        runner.infer()?;
        Ok((runner, start.elapsed().as_secs_f64() * 1000.0))
    }

    fn infer(&mut self) -> Result<()> {
        let body = r#"{"inputs":[{"name":"x","shape":[4],"datatype":"FP32","data":[1,2,3,4]}]}"#;
        let request = format!(
            "POST /v2/models/model/infer HTTP/1.1\r\nHost: runner\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.connection.get_mut().write_all(request.as_bytes())?;
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            let start = head.len();
            ensure!(self.connection.read_line(&mut head)? > 0, "the runner hung up");
            if let Some(value) = head[start..].to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut answer = vec![0; length];
        self.connection.read_exact(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        ensure!(head.starts_with("HTTP/1.1 200") && answer.contains("[2.0,3.0,4.0,5.0]"), "the runner said {answer}");
        Ok(())
    }
}

fn connect(socket: &Path) -> Result<BufReader<UnixStream>> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}

/// A broker, a worker and a client in this process.
struct InMesh {
    runtime: tokio::runtime::Runtime,
    client: mesh_sdk::Mesh,
    model: Model,
    _worker: Worker,
    mesh: Mesh,
}

/// The model's input: four FP32 numbers.
fn input_bytes() -> Vec<u8> {
    [1_f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl InMesh {
    /// Starts a mesh. Returns it after its first answer, with the milliseconds from the submit.
    fn start(engine: &str) -> Result<(Self, f64)> {
        let mesh = Mesh::start();
        let worker = mesh.worker_with("w1", &["--engine", engine]);
        let runtime = tokio::runtime::Runtime::new()?;
        let mut options = Options::new(mesh.endpoint());
        options.state_dir = mesh.folder().join("client");
        let (client, model) = runtime.block_on(async {
            let client = mesh_sdk::Mesh::connect(options).await?;
            anyhow::Ok((client, Model::from_bytes("add.onnx", onnx::add_one()).await?))
        })?;
        let mut started = Self { runtime, client, model, _worker: worker, mesh };
        let start = Instant::now();
        started.submit()?;
        Ok((started, start.elapsed().as_secs_f64() * 1000.0))
    }

    /// Gets one answer and returns the time in the runner.
    fn submit(&mut self) -> Result<Duration> {
        let task = Task::new(self.model.clone()).input(Input::raw(input_bytes()));
        let result = self.runtime.block_on(async { anyhow::Ok(self.client.submit(task).await?.wait().await?) })?;
        let output = result.outputs.first().context("one output")?.bytes()?;
        ensure!(output[..4] == 2_f32.to_le_bytes(), "1 + 1 is 2");
        Ok(result.timings.running)
    }
}
