//! Rows of many clients in one call of the runner: only if it is correct and faster, and each client gets its own rows.

use std::collections::HashSet;

use mesh_tests::{
    Job, Mesh, PATIENCE, Proxy, Slowed, cache,
    jobs::{Done, Started},
    npy::Array,
    onnx, wait_for, wait_until,
};
use proto_msgs::Phase;
use serde_json::Value;

/// The only worker's report on its models.
fn models(mesh: &Mesh) -> Vec<Value> {
    mesh.ask(&["models"])["models"].as_array().expect("a list of models").clone()
}

fn verdict(mesh: &Mesh) -> String {
    let models = models(mesh);
    assert!(models.len() <= 1, "{models:?}");
    // Nothing is known before the first heartbeat after the first run.
    models.first().map_or("unknown", |model| model["packing"].as_str().expect("a verdict")).to_owned()
}

/// A folder of items, each an array of one row.
fn folder(mesh: &Mesh, name: &str, rows: impl Iterator<Item = Array>) -> String {
    let folder = mesh.folder().join(name);
    std::fs::create_dir(&folder).expect("the folder is ours");
    for (item, row) in rows.enumerate() {
        row.write(&folder.join(format!("{item:03}.npy")));
    }
    folder.display().to_string()
}

fn rows_of_two(from: u16, count: u16) -> impl Iterator<Item = Array> {
    (from..from + count).map(|row| Array::of_f32(&[1, 2], &[f32::from(row), f32::from(row) * 2.0]))
}

/// Submits the items. Returns output `y` of each.
#[track_caller]
fn answers(mesh: &Mesh, model: &str, items: &str, more: &[&str]) -> Vec<Array> {
    let output = tempfile::tempdir_in(mesh.folder()).expect("the folder is ours").keep();
    mesh.client(&[&["submit", model, items, "--output", output.to_str().expect("a path of text")], more].concat())
        .succeeded();
    let mut names: Vec<_> =
        std::fs::read_dir(&output).expect("the results were written").flatten().map(|entry| entry.path()).collect();
    names.retain(|path| path.is_dir());
    names.sort();
    names.iter().map(|path| Array::read(&path.join("y.npy"))).collect()
}

/// Runs the model until the worker reports the wanted verdict.
fn warm_up(mesh: &Mesh, model: &str, verdict_wanted: &str) {
    let items = folder(mesh, &format!("warm-up-{verdict_wanted}"), rows_of_two(1000, 16));
    wait_until(&format!("the verdict {verdict_wanted}"), PATIENCE, || {
        answers(mesh, model, &items, &[]);
        verdict(mesh) == verdict_wanted
    });
}

/// Starts all jobs while the worker's runner stands still, each as another user, and waits until the rows of this many
/// are at the worker: some in the runner, the others behind it. However slowly clients start, these do not run alone.
fn gathered(mesh: &Mesh, door: &Proxy, _halted: &Slowed, jobs: &[Job], rows: usize) -> Vec<Started> {
    let known = |phase| door.attempts_in(phase);
    let before: HashSet<_> = known(Phase::Running).union(&known(Phase::Waiting)).copied().collect();
    let start = |(user, job): (usize, &Job)| job.start_as(mesh, &format!("user{user}"), &[]);
    let started = jobs.iter().enumerate().map(start).collect();
    wait_until("the rows to be gathered", PATIENCE, || {
        let (running, waiting) = (known(Phase::Running), known(Phase::Waiting));
        !running.is_subset(&before) && running.union(&waiting).filter(|id| !before.contains(id)).count() >= rows
    });
    started
}

/// Whether the task ran in company.
fn has_shared(item: &Value) -> bool {
    item["runs"][0]["batch_rows"].as_u64() > Some(1)
}

#[test]
fn rows_of_many_clients_run_together_and_each_gets_its_own() {
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &[]);
    let model = Job::sociable(&mesh, 100, [0.0, 0.0]).model;
    warm_up(&mesh, &model, "on");

    let jobs: Vec<Job> = (0..12_u8).map(|row| Job::sociable(&mesh, 100, [f32::from(row), 100.0])).collect();
    let halted = Slowed::to_a_halt(&worker);
    let started = gathered(&mesh, &door, &halted, &jobs, 3);
    drop(halted);
    let done: Vec<Value> = started.into_iter().zip(&jobs).map(|(started, job)| started.done(job).item).collect();

    assert!(done.iter().filter(|item| has_shared(item)).count() >= 2, "nobody ran in company: {done:?}");
    let reasons = ["full", "waited", "deadline", "idle"];
    let why = |item: &Value| reasons.iter().any(|reason| item["runs"][0]["dispatch"] == *reason);
    assert!(done.iter().all(why), "why each run began: {done:?}");
    let cost = &models(&mesh)[0];
    let begun: u64 = reasons.iter().filter_map(|reason| cost["dispatched"][reason].as_u64()).sum();
    assert!(begun > 2, "why batches began: {cost}");
    assert!(cost["best_batch"].as_u64() > Some(1), "{cost}");
    assert!(cost["curve"].as_array().is_some_and(|curve| curve.len() > 1), "{cost}");

    // `why` of a task shows the same.
    let task = mesh.tasks_of("client")[0]["task"].as_str().expect("an id").to_owned();
    let why = mesh.ask(&["why", &task]);
    assert_eq!(
        (&why["models"][0]["worker"]["name"], &why["models"][0]["packing"]),
        (&"w1".into(), &"on".into()),
        "{why}"
    );
    assert!(why["models"][0]["curve"].as_array().is_some_and(|curve| curve.len() > 1), "{why}");
    assert_eq!(why["candidates"][0]["packing"], "on", "{why}");
}

#[test]
fn items_of_one_submit_are_the_same_together_as_alone() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = Job::sociable(&mesh, 20, [0.0, 0.0]).model;
    warm_up(&mesh, &model, "on");
    let items = folder(&mesh, "items", rows_of_two(0, 50));

    let together = answers(&mesh, &model, &items, &["--split", "16"]);
    let alone = answers(&mesh, &model, &items, &["--split", "1", "--parallel", "1"]);

    assert_eq!(together.len(), 50);
    assert_eq!(together, alone);
    for (item, answer) in together.iter().enumerate() {
        let item = item as f64;
        assert_eq!((answer.numbers(), &answer.shape[..]), (vec![item + 20e3, 2.0 * item + 20e3], &[1, 2][..]));
    }
}

#[test]
fn a_model_whose_rows_mingle_is_found_out_and_run_row_by_row() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("mingling.onnx", &onnx::mingling());
    let items = folder(&mesh, "items", rows_of_two(0, 24));
    for _ in 0..2 {
        for (item, answer) in answers(&mesh, &model, &items, &[]).iter().enumerate() {
            let item = item as f64;
            assert_eq!(answer.numbers(), [item + 2.0 * item, 4.0 * item], "item {item}");
        }
    }
    wait_until("the verdict", PATIENCE, || verdict(&mesh) == "differs");
}

#[test]
fn equal_answers_of_different_rows_are_no_proof_that_rows_do_not_mingle() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("loudest.onnx", &onnx::loudest());
    let row = |value: u16| Array::of_f32(&[1, 2], &[f32::from(value), f32::from(value)]);
    let quiet = folder(&mesh, "quiet", (0..24).map(|item| row(item % 10)));
    for _ in 0..3 {
        assert!(answers(&mesh, &model, &quiet, &[]).iter().all(|answer| answer.numbers() == [0.0, 0.0]));
    }
    assert_ne!(verdict(&mesh), "on", "all answers were the same");
    let loud = folder(&mesh, "loud", (0..24_usize).map(|item| row([60, 400][item % 2])));
    for _ in 0..3 {
        let answers = answers(&mesh, &model, &loud, &[]);
        assert!(answers.iter().all(|answer| answer.numbers() == [1.0, 1.0]), "rows that mingled reached their client");
    }
    // `no-gain` if this machine runs rows of so small a model one by one as fast.
    assert_ne!(verdict(&mesh), "on");
}

/// Runs twelve items through a real model with a fixed batch of one, together and alone. Returns the verdict.
fn through_fixed_batch(model: &str) -> String {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = cache::model(model).display().to_string();
    let spec = mesh.ask(&["inspect", &model]);
    let input = &spec["inputs"][0];
    let shape: Vec<usize> =
        input["shape"].as_array().expect("a shape").iter().map(|dim| dim.as_u64().unwrap_or(1) as usize).collect();
    let count: usize = shape.iter().product();
    let row = |item: u16| {
        let values: Vec<f32> = (0..count).map(|index| ((index as f32) * 0.37 + f32::from(item)).sin()).collect();
        Array::of_f32(&shape, &values)
    };
    let items = folder(&mesh, "items", (0..12).map(row));
    let all = |more: &[&str]| {
        let output = tempfile::tempdir_in(mesh.folder()).expect("the folder is ours").keep();
        let line =
            [&["submit", &model, &items, "--output", output.to_str().expect("a path of text")][..], more].concat();
        mesh.client(&line).succeeded();
        let read = |item: usize| {
            let mut files: Vec<_> = std::fs::read_dir(output.join(format!("{item:03}")))
                .expect("the item has a folder")
                .flatten()
                .map(|e| e.path())
                .collect();
            files.sort();
            files.retain(|file| file.extension().is_some_and(|extension| extension == "npy"));
            files.iter().map(|file| std::fs::read(file).expect("it was just listed")).collect::<Vec<_>>()
        };
        (0..12).map(read).collect::<Vec<_>>()
    };

    let together = all(&[]);
    let alone = all(&["--split", "1", "--parallel", "1"]);

    assert!(together == alone, "an item in company differs from the same item alone");
    wait_for("the verdict", PATIENCE, || Some(verdict(&mesh)).filter(|verdict| verdict != "unknown"))
}

#[test]
fn models_of_a_fixed_batch_are_right_whether_or_not_they_can_be_stretched() {
    // With a larger batch this model mixes the rows of its items.
    let verdict = through_fixed_batch("face_detection_short_range.tflite");
    assert!(["unsupported", "differs"].contains(&verdict.as_str()), "{verdict}");
    // This one gives wrong numbers in the right shape.
    let verdict = through_fixed_batch("hand_recrop.tflite");
    assert!(["unsupported", "differs"].contains(&verdict.as_str()), "{verdict}");
    // This model does neither, and may run either way.
    through_fixed_batch("nmp.tflite");
}

#[test]
fn who_brings_a_bad_row_fails_alone() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("picky.onnx", &onnx::picky());
    let row = |index: i64| Array::of_i64(&[1, 1], &[index]);
    let good = folder(&mesh, "good", (0..16).map(row));
    wait_until("the verdict on", PATIENCE, || {
        answers(&mesh, &model, &good, &[]);
        verdict(&mesh) == "on"
    });

    // Many tasks at once, so that they share a run; one of them has an invalid input.
    for round in 0..5 {
        let bad = mesh.array("bad.npy", &row(99));
        let jobs: Vec<Job> = (0..10_i64)
            .map(|index| Job {
                model: model.clone(),
                input: mesh.array(&format!("row{index}.npy"), &row(index)),
                expected: vec![index as f64 + 0.5],
            })
            .collect();
        let spoiler = Job { model: model.clone(), input: bad, expected: Vec::new() };
        let bad = spoiler.start_as(&mesh, "spoiler", &[]);
        let started: Vec<Started> = jobs.iter().map(|job| job.start(&mesh, &[])).collect();
        bad.answer().failed_with(4, "RUN_FAILED");
        for (started, job) in started.into_iter().zip(&jobs) {
            assert_eq!(started.done(job).attempts(), 1, "round {round}");
        }
    }
}

#[test]
fn one_of_a_batch_is_cancelled_and_the_others_do_not_notice() {
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &[]);
    let model = Job::sociable(&mesh, 100, [0.0, 0.0]).model;
    warm_up(&mesh, &model, "on");
    let jobs: Vec<Job> = (0..6_u8).map(|row| Job::sociable(&mesh, 100, [f32::from(row), 7.0])).collect();
    let halted = Slowed::to_a_halt(&worker);
    let mut started = gathered(&mesh, &door, &halted, &jobs, jobs.len());

    let cancelled = started.pop().expect("six");
    cancelled.client.interrupt();
    cancelled.answer().failed_with(130, "");
    drop(halted);

    let others: Vec<Done> = started.into_iter().zip(&jobs).map(|(started, job)| started.done(job)).collect();
    assert!(others.iter().all(|done| done.attempts() == 1), "{others:?}");
    assert!(others.iter().any(|done| has_shared(&done.item)), "there was a batch: {others:?}");
    mesh.wait_idle();
}

#[test]
fn packing_can_be_switched_off() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--pack-max", "1"]);
    let model = Job::sociable(&mesh, 5, [0.0, 0.0]).model;
    let items = folder(&mesh, "items", rows_of_two(0, 24));
    assert_eq!(answers(&mesh, &model, &items, &[]).len(), 24);
    let cost = wait_for("the cost", PATIENCE, || models(&mesh).first().cloned());
    assert_eq!((&cost["packing"], &cost["best_batch"]), (&"off".into(), &1.into()), "{cost}");
}
