//! What the mesh adds to the run of a tiny model: from `submit` to the verified answer, against the runner asked directly.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_sdk::{Input, Model, Options, Task};
use mesh_tests::{Mesh, PATIENCE, Process, docker, onnx, process::binary, wait_for};
use serde_json::json;

use crate::report::{Section, percentile_ms};

pub(crate) fn run(smoke: bool) -> Result<Section> {
    let warm_runs = if smoke { 5 } else { 300 };
    let columns = &["way", "cold ms", "warm p50 ms", "warm p99 ms", "p50 over direct ms", "run in the model p50 ms"];
    let mut section = Section::new("answer", "Answer: submit to answer of a tiny model", columns);

    let (cold, mut direct) = direct(warm_runs)?;
    let base = percentile_ms(&mut direct, 0.5);
    section.row(vec![
        json!("the runner asked directly"),
        json!(cold.as_secs_f64() * 1000.0),
        json!(base),
        json!(percentile_ms(&mut direct, 0.99)),
        json!(0.0),
        json!(null),
    ]);
    let mut engines = vec![("mesh, child process", "process")];
    if docker::is_ready("bench answer") {
        engines.push(("mesh, container", "docker"));
    }
    for (name, engine) in engines {
        let (cold, mut warm, mut running) = through_mesh(engine, warm_runs)?;
        let p50 = percentile_ms(&mut warm, 0.5);
        section.row(vec![
            json!(name),
            json!(cold.as_secs_f64() * 1000.0),
            json!(p50),
            json!(percentile_ms(&mut warm, 0.99)),
            json!(p50 - base),
            json!(percentile_ms(&mut running, 0.5)),
        ]);
    }
    section.note(format!(
        "y = x + 1 in ONNX, 16 bytes of input. Cold: model not at the worker, runner not started, library not loaded. Warm: \
         {warm_runs} submits one after the other over kept connections; the model is held and loaded."
    ));
    section.note(
        "Asked directly: HTTP with JSON on the runner's Unix socket, a connection each, from the same program. What limits a warm \
         answer is the number of hops: client, broker, client, worker, runner, and back.",
    );
    Ok(section)
}

/// First answer after the start of the runner, and warm ones.
fn direct(runs: usize) -> Result<(Duration, Vec<Duration>)> {
    let folder = tempfile::tempdir()?;
    let (model, socket) = (folder.path().join("add.onnx"), folder.path().join("runner.sock"));
    std::fs::write(&model, onnx::add_one())?;
    let start = Instant::now();
    let mut command = Command::new(binary("mesh-runner"));
    command.arg("serve").arg("--model").arg(&model).arg("--socket").arg(&socket).args(["--name", "model"]);
    let _runner = Process::start("mesh-runner", command);
    wait_for("the runner's first answer", PATIENCE, || infer(&socket).ok());
    let cold = start.elapsed();
    let mut warm = Vec::with_capacity(runs);
    for _ in 0..runs {
        let start = Instant::now();
        infer(&socket)?;
        warm.push(start.elapsed());
    }
    Ok((cold, warm))
}

fn infer(socket: &Path) -> Result<()> {
    let body = r#"{"inputs":[{"name":"x","shape":[4],"datatype":"FP32","data":[1,2,3,4]}]}"#;
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "POST /v2/models/model/infer HTTP/1.1\r\nHost: runner\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("[2.0,3.0,4.0,5.0]"), "the runner said {answer}");
    Ok(())
}

/// First answer of a fresh worker, warm ones, and the time in the model of each warm one.
fn through_mesh(engine: &str, runs: usize) -> Result<(Duration, Vec<Duration>, Vec<Duration>)> {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--engine", engine]);
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let mut options = Options::new(mesh.endpoint());
        options.state_dir = mesh.folder().join("client");
        let client = mesh_sdk::Mesh::connect(options).await?;
        let model = Model::from_bytes("add.onnx", onnx::add_one()).await?;
        let input: Vec<u8> = [1_f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        let (mut cold, mut warm, mut running) = (Duration::ZERO, Vec::new(), Vec::new());
        for run in 0..=runs {
            let start = Instant::now();
            let mut task = client.submit(Task::new(model.clone()).input(Input::raw(input.clone()))).await?;
            let result = task.wait().await?;
            let took = start.elapsed();
            let output = result.outputs.first().context("one output")?.bytes()?;
            ensure!(output[..4] == 2_f32.to_le_bytes(), "1 + 1 is 2");
            if run == 0 {
                cold = took;
            } else {
                warm.push(took);
                running.push(result.timings.running);
            }
        }
        client.close().await;
        Ok((cold, warm, running))
    })
}
