//! One task: sends a model and its inputs to the worker that the broker chooses, and prints the outputs.
//!
//! ```text
//! cargo run -p mesh-sdk --example hello_mesh -- model.tflite input.bin
//! ```
//!
//! An input is a file of raw little-endian elements of the model's type. `MESH_BROKER` names the broker; default:
//! tcp://127.0.0.1:5555.

use std::{env, error::Error, process::ExitCode};

use mesh_sdk::{BROKER_DEFAULT, DType, Input, Mesh, Model, Options, Task, Update};

/// Number of values printed per output.
const SHOWN: usize = 8;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let Some(model) = arguments.next() else {
        eprintln!("usage: hello_mesh MODEL INPUT...");
        return Ok(ExitCode::from(2));
    };

    let broker = env::var("MESH_BROKER").unwrap_or_else(|_| BROKER_DEFAULT.to_owned());
    let mesh = Mesh::connect(Options::new(broker)).await?;
    let task = Task::new(Model::from_file(model).await?).inputs(arguments.map(Input::file));

    let mut handle = mesh.submit(task).await?;
    let result = loop {
        match handle.next().await {
            Update::News(news) => eprintln!("{news:?}"),
            Update::End(end) => break end?,
        }
    };

    let worker = result.worker.map_or_else(String::new, |(_, name)| name);
    println!("done on {worker} in {:?}, {:?} of it in the model", result.timings.total, result.timings.running);
    for output in &result.outputs {
        println!("{} {} {:?}", output.name, output.dtype, output.shape);
        if output.dtype == DType::F32 {
            let bytes = output.bytes()?;
            let values = bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
            println!("  {:?}", values.take(SHOWN).collect::<Vec<_>>());
        }
    }
    // Closes the links at once. Without it, the peers notice the end a little later.
    mesh.close().await;
    Ok(ExitCode::SUCCESS)
}
