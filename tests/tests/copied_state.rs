//! Two workers with copies of one state folder, as on a cloned card: one of them leaves, and says how to go on.

use std::fs;

use mesh_tests::{Job, Mesh, PATIENCE, Worker};

/// EX_CONFIG of sysexits.h.
const EXIT_CONFIG: i32 = 78;

/// A folder with a worker's identity, copied after this many starts of the worker.
fn copy_identity(mesh: &Mesh, of: &Worker, name: &str, starts: u32) {
    let copy = mesh.folder().join(name);
    fs::create_dir(&copy).expect("the folder is ours");
    fs::copy(of.state_dir().join("worker-id"), copy.join("worker-id")).expect("the worker has an id");
    fs::write(copy.join("epoch"), format!("{starts}\n")).expect("the folder is ours");
}

/// Waits until the worker has left, and checks that it said why and what to do.
fn leaves(mut worker: Worker) {
    assert_eq!(worker.process().wait(PATIENCE).code(), Some(EXIT_CONFIG));
    let what_to_do = format!("delete {}/worker-id", worker.state_dir().display());
    assert!(worker.process().has_said(&what_to_do), "it says what to do");
}

#[test]
fn a_newcomer_with_a_copy_leaves_and_works_once_it_has_an_id_of_its_own() {
    let mesh = Mesh::start();
    let first = mesh.worker("first");
    copy_identity(&mesh, &first, "clone", 0);

    leaves(mesh.unregistered_worker("clone", &[]));

    assert_eq!(Job::small(&mesh).run(&mesh).worker(), "first");
    fs::remove_file(mesh.folder().join("clone/worker-id")).unwrap();
    let clone = mesh.worker("clone");
    assert_ne!(clone.id(), first.id());
    assert_eq!(mesh.ask(&["workers"])["workers"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_copy_that_has_started_more_often_stays_and_the_other_leaves_when_its_run_has_ended() {
    let mesh = Mesh::start();
    let first = mesh.worker("first");
    let job = Job::long(&mesh, 2000);
    let running = job.start(&mesh, &[]);
    mesh_tests::wait_until("the task to be placed", PATIENCE, || mesh.metric("tasks_placed") == Some(1.0));
    copy_identity(&mesh, &first, "clone", 5);

    let _clone = mesh.worker("clone");

    assert_eq!((running.done(&job).attempts()), 1, "what runs goes on");
    leaves(first);
    assert_eq!(Job::small(&mesh).run(&mesh).worker(), "clone");
}

#[test]
fn a_restarted_worker_is_let_in_at_once() {
    let mesh = Mesh::start();
    let mut worker = mesh.worker("w1");
    for _ in 0..3 {
        worker.restart();
        assert_eq!(Job::small(&mesh).run(&mesh).worker(), "w1");
    }
    assert!(!worker.process().has_said("another process"));
}
