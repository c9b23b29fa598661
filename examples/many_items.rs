//! Many tasks of one model, several at a time: the model is hashed once and sent once to each worker, and one link to a
//! worker serves all of its tasks.
//!
//! ```text
//! cargo run -p mesh-sdk --example many_items -- model.tflite inputs/*.bin
//! ```
//!
//! `MESH_BROKER` names the broker; default: tcp://127.0.0.1:5555.

use std::{collections::BTreeMap, env, error::Error, process::ExitCode, time::Instant};

use mesh_sdk::{BROKER_DEFAULT, Input, Mesh, Model, Options, Task, new_job};
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let Some(model) = arguments.next() else {
        eprintln!("usage: many_items MODEL INPUT...");
        return Ok(ExitCode::from(2));
    };

    let broker = env::var("MESH_BROKER").unwrap_or_else(|_| BROKER_DEFAULT.to_owned());
    let mesh = Mesh::connect(Options::new(broker)).await?;
    let template = Task::new(Model::from_file(model).await?).job(new_job());
    // Twice the slots: while one half of the tasks runs, the inputs of the other half are sent.
    let at_once = 2 * mesh.cluster().await?.slots.max(1) as usize;

    let started = Instant::now();
    let mut running = JoinSet::new();
    let mut per_worker: BTreeMap<String, u32> = BTreeMap::new();
    let mut failed = 0;
    loop {
        while running.len() < at_once
            && let Some(path) = arguments.next()
        {
            let (mesh, task) = (mesh.clone(), template.clone().input(Input::file(&path)));
            running.spawn(async move {
                let result = match mesh.submit(task).await {
                    Ok(mut handle) => handle.wait().await.map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                (path, result)
            });
        }
        let Some(ended) = running.join_next().await else { break };
        match ended? {
            (_, Ok(result)) => {
                let worker = result.worker.map_or_else(String::new, |(_, name)| name);
                *per_worker.entry(worker).or_default() += 1;
            }
            (path, Err(error)) => {
                failed += 1;
                eprintln!("{path}: {error}");
            }
        }
    }

    for (worker, items) in &per_worker {
        println!("{worker}: {items} items");
    }
    println!("{failed} failed, {:?} in all", started.elapsed());
    mesh.close().await;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
