//! Models in stages: the second takes the outputs of the first, for one row or many, and both run at the same time.

use std::collections::BTreeSet;

use mesh_tests::{Job, Mesh, PATIENCE, Worker, npy::Array, onnx, process, wait_until};

/// Moments with both models at work that show stages side by side.
const MOMENTS: usize = 40;

/// Encoder and decoder, each of about `ms` milliseconds per call. Together they add `2 × ms × 1000`.
fn stages(mesh: &Mesh, ms: i64) -> [String; 2] {
    let job = Job::sociable(mesh, ms, [0.0, 0.0]);
    // The same model with another comment in its file, so that the worker has two models.
    let second = mesh.file("decoder.onnx", &[onnx::sociable(ms * 1000), b"\x32\x01x".to_vec()].concat());
    [job.model, second]
}

fn items(mesh: &Mesh, count: u16) -> String {
    let folder = mesh.folder().join("items");
    std::fs::create_dir(&folder).expect("the folder is ours");
    for item in 0..count {
        Array::of_f32(&[1, 2], &[f32::from(item), -f32::from(item)]).write(&folder.join(format!("{item:03}.npy")));
    }
    folder.display().to_string()
}

#[test]
fn every_row_goes_through_both_models_and_comes_back_in_its_place() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--slots", "2"]);
    let [encode, decode] = stages(&mesh, 3);
    let (items, output) = (items(&mesh, 30), mesh.folder().join("out"));
    let then = format!("decode={decode}");
    mesh.client(&["submit", &encode, &items, "--then", &then, "--output", output.to_str().unwrap()]).succeeded();
    for item in 0..30_u16 {
        let answer = Array::read(&output.join(format!("{item:03}/y.npy"))).numbers();
        assert_eq!(answer, [f64::from(item) + 6000.0, 6000.0 - f64::from(item)], "item {item}");
    }
}

#[test]
fn a_second_model_that_takes_something_else_is_refused_before_it_runs() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    // This model takes integers, and the one before it returns floats.
    let other = mesh.file("picky.onnx", &onnx::picky());
    let answer = mesh.client(&job.submit(&["--then", &other]));
    assert_eq!(answer.code, 3, "{}", answer.stderr);
    Job::small(&mesh).run(&mesh);
}

#[test]
fn a_missing_second_model_is_said_to_be_missing() {
    let mesh = Mesh::start();
    let job = Job::small(&mesh);
    mesh.client(&job.submit(&["--then", "/nowhere/decode.onnx"])).failed_with(3, "/nowhere/decode.onnx");
}

/// The models that a runner of this worker computes at this moment.
fn computing(worker: &Worker) -> BTreeSet<String> {
    let model_of = |runner: &u32| {
        let line = std::fs::read_to_string(format!("/proc/{runner}/cmdline")).ok()?;
        line.split('\0').skip_while(|word| *word != "--model").nth(1).map(str::to_owned)
    };
    process::children_of(worker.pid())
        .into_iter()
        .filter(|runner| process::is_computing(*runner))
        .filter_map(|runner| model_of(&runner))
        .collect()
}

#[test]
fn two_stages_work_at_the_same_moment() {
    let mesh = Mesh::start();
    // Without packing: otherwise each stage would run all items in one call.
    let worker = mesh.worker_with("w1", &["--slots", "4", "--pack-max", "1"]);
    let [encode, decode] = stages(&mesh, 600);
    let items = items(&mesh, 40);
    let line = ["submit", &encode, &items, "--then", &decode, "--split", "1", "--lane", "batch"];
    let _client = mesh.client_in_background(&line);
    // If the stages took turns, however often, there would be no such moment but a few at the end of calls.
    let mut moments = 0;
    wait_until("both models to compute at the same moment, again and again", PATIENCE, || {
        moments += usize::from(computing(&worker).len() == 2);
        moments == MOMENTS
    });
}
