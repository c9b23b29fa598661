//! The broker dies without notice. Running tasks continue, new ones wait, acknowledged ones are still known later.

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, Redis, process::Stream, proxy::Side, wait_until};

#[test]
fn transfer_and_run_go_on_without_it() {
    let mut mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    door.throttle(Some(16 << 20));
    let job = Job::heavy(&mesh, 32, 21);
    let started = job.start(&mesh, &[]);
    wait_until("a part of the model to arrive", PATIENCE, || door.bytes_from(Side::Dialler) > 4 << 20);

    mesh.kill_broker();

    started.done(&job);
    assert!(mesh.broker().try_wait().is_some(), "the broker is still dead");
}

#[test]
fn new_submits_wait_until_it_is_back() {
    let mut mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    job.run(&mesh);
    mesh.kill_broker();

    let mut started = job.start(&mesh, &[]);
    // The client says that it waits, and does wait.
    started.client.process().wait_for_line("that the broker is awaited", PATIENCE, |line| {
        line.to_lowercase().contains("broker").then_some(())
    });
    assert!(started.client.process().try_wait().is_none());
    mesh.restart_broker();

    started.done(&job);
}

#[test]
fn a_task_that_ran_meanwhile_is_known_again_after_the_restart() {
    let mut mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::long(&mesh, 4000);
    let started = job.start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(proto_msgs::Phase::Running));

    mesh.kill_broker();
    mesh.restart_broker();
    wait_until("the worker to be back", PATIENCE, || mesh.metric("workers") == Some(1.0));

    // The task holds the only slot: the restarted broker must not assign it a second time.
    let other = Job::small(&mesh);
    let queued = other.start(&mesh, &[]);
    assert_eq!(started.done(&job).attempts(), 1);
    queued.done(&other);
    mesh.wait_idle();
}

#[test]
fn a_worker_with_rare_heartbeats_keeps_its_connection() {
    let mesh = Mesh::start();
    // Longer than a broker that does not answer is waited for.
    let mut worker = mesh.worker_with("w1", &["--heartbeat", "5500ms"]);
    let heartbeats = || mesh.metric("heartbeats_total");
    wait_until("the third heartbeat", PATIENCE, || heartbeats() >= Some(3.0));
    let log = worker.process().output(Stream::Err);
    assert_eq!(log.matches("connected").count(), 1, "{log}");
}

fn kill_minus_nine_loses_no_detached_task(options: MeshOptions) {
    let mut mesh = Mesh::with(options);
    let _worker = mesh.worker_with("w1", &["--slots", "3"]);
    let job = Job::long(&mesh, 2000);
    let tasks: Vec<String> = (0..3).map(|_| job.detach(&mesh)).collect();

    mesh.kill_broker();
    mesh.restart_broker();

    for task in tasks {
        let output = mesh.folder().join(&task);
        mesh.client(&["wait", &task, "--output", output.to_str().expect("UTF-8")]).succeeded();
        let answer = mesh_tests::npy::Array::read(&output.join("y.npy"));
        assert_eq!(answer.numbers(), job.expected);
    }
}

#[test]
fn detached_tasks_survive_with_the_embedded_store() {
    kill_minus_nine_loses_no_detached_task(MeshOptions::default());
}

#[test]
fn detached_tasks_survive_with_redis() {
    let redis = Redis::start();
    kill_minus_nine_loses_no_detached_task(MeshOptions { redis_url: Some(redis.url()), ..MeshOptions::default() });
}

#[test]
fn detached_tasks_survive_a_kill_of_broker_and_worker() {
    let mut mesh = Mesh::start();
    let mut worker = mesh.worker("w1");
    let job = Job::long(&mesh, 2000);
    let task = job.detach(&mesh);

    mesh.kill_broker();
    worker.kill();
    mesh.restart_broker();
    worker.restart();

    mesh.client(&["wait", &task]).succeeded();
}
