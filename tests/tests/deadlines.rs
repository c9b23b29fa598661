//! Deadlines and full queues: an impossible deadline is refused, a missed one ends the task, a full mesh names a wait.

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, wait_until};

const NO_PLACE: i32 = 5;
const EXPIRED: i32 = 7;

#[test]
fn a_deadline_that_cannot_be_met_is_refused_at_once_with_the_predicted_finish() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 4000);
    job.run(&mesh);
    // The broker learns the run's cost from a heartbeat.
    wait_until("the cost to be known", PATIENCE, || {
        mesh.ask(&["models"])["models"][0]["curve"].as_array().is_some_and(|curve| !curve.is_empty())
    });
    wait_until("the broker to have waited for workers", PATIENCE, || mesh.metric("uptime_seconds") > Some(5.0));
    let before = [(); 3].map(|()| job.start(&mesh, &[]));
    wait_until("two to wait", PATIENCE, || mesh.count_of("client", "queued") == 2);

    let answer = job.start(&mesh, &["--deadline", "5s"]).answer().failed_with(EXPIRED, "DEADLINE_UNMEETABLE");
    // Another code would mean that the deadline has passed: the two that wait take longer than that.
    assert!(answer.stdout.contains("predicted") || answer.stderr.contains("predicted"), "{}", answer.stderr);

    // A deadline that can be met is accepted.
    job.start(&mesh, &["--deadline", "120s"]).done(&job);
    drop(before);
}

#[test]
fn nothing_is_refused_by_guess() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    // This model has never run, so no prediction can refuse the deadline.
    Job::endless(&mesh).start(&mesh, &["--deadline", "1s"]).answer().failed_with(EXPIRED, "EXPIRED");
    mesh.wait_idle();
}

#[test]
fn a_deadline_that_passes_while_the_task_waits_ends_it() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let _running = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("it to run", PATIENCE, || mesh.count_of("client", "running") == 1);
    Job::small(&mesh).start(&mesh, &["--deadline", "1s"]).answer().failed_with(EXPIRED, "EXPIRED");
    assert_eq!(mesh.count_of("client", "running"), 1);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let mesh =
        Mesh::with(MeshOptions { broker_args: vec!["--queue-max".into(), "2".into()], ..MeshOptions::default() });
    let _worker = mesh.worker("w1");
    let running = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("it to run", PATIENCE, || mesh.count_of("client", "running") == 1);
    let job = Job::small(&mesh);
    let waiting = [job.start(&mesh, &[]), job.start(&mesh, &[])];
    wait_until("two to wait", PATIENCE, || mesh.metric("tasks_queued") == Some(2.0));

    let said = job.start(&mesh, &["--no-wait"]).answer().failed_with(NO_PLACE, "BUSY");
    assert!((said.stdout + &said.stderr).contains("try again in"));

    // A client without `--no-wait` waits and is accepted when there is room. Tasks accepted before are not lost.
    let mut patient = job.start(&mesh, &[]);
    patient.client.process().wait_for_line("that it waits", PATIENCE, |line| line.contains("try again").then_some(()));
    running.client.interrupt();
    for waiting in waiting {
        waiting.done(&job);
    }
    patient.done(&job);
}
