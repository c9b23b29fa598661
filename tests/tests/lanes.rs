//! Two lanes: realtime tasks get their answers however much batch work was there before.

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, jobs::Started, npy::Array, onnx, wait_until};

/// Starts `count` endless runs and waits until the broker knows all of them.
fn endless(mesh: &Mesh, count: usize, more: &[&str]) -> Vec<Started> {
    let (job, before) = (Job::endless(mesh), mesh.tasks_of("client").len());
    let started = (0..count).map(|_| job.start(mesh, more)).collect();
    wait_until("the broker to know them", PATIENCE, || mesh.tasks_of("client").len() == before + count);
    started
}

fn running(mesh: &Mesh) -> usize {
    mesh.count_of("client", "running")
}

#[test]
fn who_waits_for_an_answer_gets_it_while_batches_run() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--slots", "2"]);
    let _flood = endless(&mesh, 3, &["--lane", "batch"]);
    wait_until("a batch to run", PATIENCE, || running(&mesh) == 1);

    for _ in 0..3 {
        Job::small(&mesh).run(&mesh);
    }

    wait_until("all three to be closed", PATIENCE, || mesh.count_of("client", "done") == 3);
    let states = (running(&mesh), mesh.count_of("client", "queued"));
    assert_eq!(states, (1, 2), "the batch that was there first still runs");
}

#[test]
fn the_batch_lane_takes_no_realtime_slot_however_idle() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--realtime-slots", "2", "--batch-slots", "1"]);
    let _flood = endless(&mesh, 3, &["--lane", "batch"]);
    wait_until("a batch to run", PATIENCE, || running(&mesh) == 1);
    // Each of these tasks made the broker check whether anything fits the worker.
    for _ in 0..3 {
        Job::small(&mesh).run(&mesh);
    }
    assert_eq!(running(&mesh), 1);
    let lanes = &mesh.ask(&["workers"])["workers"][0]["lanes"];
    assert_eq!((&lanes["realtime"]["tasks"], &lanes["batch"]["tasks"]), (&0.into(), &1.into()));
}

#[test]
fn idle_batch_slots_are_lent_to_realtime() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--realtime-slots", "1", "--batch-slots", "2"]);
    let _asked = endless(&mesh, 3, &["--lane", "realtime"]);
    wait_until("all three to run", PATIENCE, || running(&mesh) == 3);
    // No slot is left for the batch task, which waits until one is free.
    let batch = Job::small(&mesh).start(&mesh, &["--lane", "batch"]);
    wait_until("the batch to wait", PATIENCE, || mesh.count_of("client", "queued") == 1);
    drop(batch);
}

#[test]
fn a_worker_without_batch_slots_is_no_place_for_batches() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--realtime-slots", "1", "--batch-slots", "0"]);
    Job::small(&mesh).start(&mesh, &["--lane", "batch"]).answer().failed_with(5, "NO_WORKER_FITS");
    Job::small(&mesh).run(&mesh);
}

#[test]
fn a_job_of_many_items_goes_to_the_batch_lane_by_itself() {
    let mesh = Mesh::with(MeshOptions {
        broker_args: vec!["--realtime-items-max".into(), "4".into()],
        ..MeshOptions::default()
    });
    let _worker = mesh.worker_with("w1", &["--slots", "2"]);
    let model = mesh.file("sociable1.onnx", &onnx::sociable(1000));
    for (count, lane) in [(4_u16, "realtime"), (5, "batch")] {
        let folder = mesh.folder().join(format!("items{count}"));
        std::fs::create_dir(&folder).expect("the folder is ours");
        for item in 0..count {
            Array::of_f32(&[1, 2], &[f32::from(item), 0.0]).write(&folder.join(format!("{item}.npy")));
        }
        mesh.client(&["submit", &model, folder.to_str().unwrap()]).succeeded();
        assert_eq!(mesh.tasks_of("client")[0]["lane"], lane, "{count} items");
    }
}
