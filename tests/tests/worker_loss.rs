//! A worker dies without notice, at every stage of a task. The task ends on another worker without anyone's help.

use mesh_tests::{Job, Mesh, PATIENCE, proxy::Side, wait_until};
use proto_msgs::Phase;

const CHUNK_OF_OUTPUT: u16 = 506;

#[test]
fn before_the_transfer() {
    let mesh = Mesh::start();
    let mut doomed = mesh.worker("doomed");
    doomed.process().freeze();
    let job = Job::small(&mesh);
    let started = job.start(&mesh, &[]);
    wait_until("the grant", PATIENCE, || mesh.metric("grants_total") == Some(1.0));

    doomed.kill();
    let _heir = mesh.worker("heir");

    let done = started.done(&job);
    assert_eq!(done.worker(), "heir");
    assert!(done.attempts() >= 2);
}

#[test]
fn during_the_transfer() {
    let mesh = Mesh::start();
    let (door, mut doomed) = mesh.worker_behind_proxy("doomed", &[]);
    door.throttle(Some(10 << 20));
    let job = Job::heavy(&mesh, 32, 11);
    let started = job.start(&mesh, &[]);
    wait_until("a part of the model to arrive", PATIENCE, || door.bytes_from(Side::Dialler) > 4 << 20);

    let _heir = mesh.worker("heir");
    doomed.kill();

    assert_eq!(started.done(&job).worker(), "heir");
}

#[test]
fn during_the_run() {
    let mesh = Mesh::start();
    let (door, mut doomed) = mesh.worker_behind_proxy("doomed", &[]);
    let job = Job::long(&mesh, 3000);
    let started = job.start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    let _heir = mesh.worker("heir");
    doomed.kill();

    assert_eq!(started.done(&job).worker(), "heir");
}

#[test]
fn while_the_result_comes_back() {
    let mesh = Mesh::start();
    let (door, mut doomed) = mesh.worker_behind_proxy("doomed", &[]);
    // Seconds lie between seeing a part of the result and its end.
    door.throttle_from(Side::Listener, 4 << 20);
    let job = Job::voluminous(&mesh, 24);
    let started = job.start(&mesh, &[]);
    wait_until("a part of the result", PATIENCE, || door.payload_bytes(CHUNK_OF_OUTPUT) > 2 << 20);

    // The rest takes longer than any start of a worker.
    door.throttle(Some(512 << 10));
    let _heir = mesh.worker("heir");
    doomed.kill();
    assert!(door.payload_bytes(CHUNK_OF_OUTPUT) < 24 << 20, "the result was on its way");

    assert_eq!(started.done(&job).worker(), "heir");
}

#[test]
fn between_two_tasks() {
    let mesh = Mesh::start();
    let mut doomed = mesh.worker("doomed");
    let job = Job::small(&mesh);
    assert_eq!(job.run(&mesh).worker(), "doomed");

    let _heir = mesh.worker("heir");
    doomed.kill();

    // The broker may not have missed a heartbeat yet, and only the dead worker holds the model.
    assert_eq!(job.run(&mesh).worker(), "heir");
}

#[test]
fn a_worker_that_hangs_is_as_good_as_dead() {
    let mesh = Mesh::start();
    let (door, mut doomed) = mesh.worker_behind_proxy("doomed", &[]);
    let job = Job::long(&mesh, 3000);
    let started = job.start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    let _heir = mesh.worker("heir");
    doomed.process().freeze();
    let done = started.done(&job);
    assert_eq!(done.worker(), "heir");

    // When the worker wakes up, its attempt is outdated: it stops the attempt, frees its slot, and takes new work.
    doomed.process().thaw();
    mesh.wait_idle();
    wait_until("two workers again", PATIENCE, || mesh.metric("workers") == Some(2.0));
    assert_eq!(mesh.metric("tasks_done_total"), Some(1.0));
}

#[test]
fn the_runner_s_processes_die_with_the_worker() {
    let mesh = Mesh::start();
    let mut worker = mesh.worker("w1");
    let started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("a runner", PATIENCE, || !worker.process().children().is_empty());
    let runners = worker.process().children();

    worker.kill();

    wait_until("the runners to end", PATIENCE, || !runners.iter().any(|pid| mesh_tests::process::is_running(*pid)));
    drop(started);
}

#[test]
fn what_was_half_written_is_cleaned_up_at_the_next_start() {
    let mesh = Mesh::start();
    let (door, mut worker) = mesh.worker_behind_proxy("w1", &[]);
    door.throttle(Some(10 << 20));
    let job = Job::heavy(&mesh, 32, 12);
    let mut started = job.start(&mesh, &[]);
    let stored_bytes = |worker: &mesh_tests::Worker| -> u64 {
        worker.files().iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum()
    };
    wait_until("a part of the model on disk", PATIENCE, || stored_bytes(&worker) > 4 << 20);

    started.client.process().kill();
    worker.kill();
    worker.restart();

    wait_until("the half to be gone", PATIENCE, || stored_bytes(&worker) < 1 << 20);
}
