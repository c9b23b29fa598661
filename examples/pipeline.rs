//! Many items through two models, one after the other: items share tasks, the second model takes the outputs of the
//! first, and both run at the same time on different items.
//!
//! ```text
//! cargo run -p mesh-sdk --example pipeline -- encoder.onnx decoder.onnx 1,128 inputs/*.bin
//! ```
//!
//! `1,128` is the shape of the FP32 numbers in each input file: only items with a declared shape can share a task.
//! `MESH_BROKER` names the broker; default: tcp://127.0.0.1:5555.

use std::{env, error::Error, process::ExitCode};

use mesh_sdk::{BROKER_DEFAULT, DType, Input, Mesh, Model, Options, Task, TaskHandle, new_job};

/// Items per task.
const SPLIT: usize = 8;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [encoder, decoder, shape, paths @ ..] = &arguments[..] else {
        eprintln!("usage: pipeline ENCODER DECODER SHAPE INPUT...");
        return Ok(ExitCode::from(2));
    };
    let shape: Vec<u64> = shape.split(',').map(str::parse).collect::<Result<_, _>>()?;

    let mesh =
        Mesh::connect(Options::new(env::var("MESH_BROKER").unwrap_or_else(|_| BROKER_DEFAULT.to_owned()))).await?;
    let template = Task::new(Model::from_file(encoder).await?)
        .then("decode", Model::from_file(decoder).await?)
        .job(new_job())
        .job_items(u32::try_from(paths.len())?);

    // All at once: tasks without a place wait at the broker, in the lane that the number of items decides.
    let mut running: Vec<(&[String], TaskHandle)> = Vec::new();
    for part in paths.chunks(SPLIT) {
        let items = part.iter().map(|path| vec![Input::file(path).shaped(DType::F32, shape.clone())]).collect();
        running.push((part, mesh.submit(template.clone().stack(items)?).await?));
    }

    for (part, mut handle) in running {
        let result = handle.wait().await?;
        for (place, path) in (0..).zip(part) {
            for output in result.outputs.item(place)? {
                println!("{path}: {} {} {:?}", output.name, output.dtype, output.shape);
            }
        }
        let batches = result.runs.iter().map(|run| format!("{} rows of stage {}", run.batch_rows, run.stage));
        let worker = result.worker.map_or_else(String::new, |(_, name)| name);
        eprintln!("{} items on {worker}, in batches of {}", part.len(), batches.collect::<Vec<_>>().join(", "));
    }
    mesh.close().await;
    Ok(ExitCode::SUCCESS)
}
