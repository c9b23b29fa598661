//! A draining worker finishes its tasks, takes no new ones, and says good-bye.

use mesh_tests::{Job, Mesh, PATIENCE, wait_until};
use nix::sys::signal::Signal;
use proto_msgs::Phase;

#[test]
fn sigterm_lets_the_run_finish_and_sends_new_work_elsewhere() {
    let mesh = Mesh::start();
    let (door, mut leaving) = mesh.worker_behind_proxy("leaving", &["--slots", "2"]);
    let job = Job::long(&mesh, 3000);
    let running = job.start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    leaving.drain();
    let _staying = mesh.worker("staying");
    let next = Job::small(&mesh);
    assert_eq!(next.run(&mesh).worker(), "staying");

    let done = running.done(&job);
    assert_eq!((done.worker(), done.attempts()), ("leaving", 1));
    assert_eq!(leaving.process().wait(PATIENCE).code(), Some(0));
    wait_until("the good-bye", PATIENCE, || mesh.metric("workers") == Some(1.0));
    assert_eq!(mesh.metric("workers_lost_total"), Some(0.0), "a good-bye is no loss");
}

#[test]
fn what_does_not_finish_in_time_goes_to_another_worker() {
    let mesh = Mesh::start();
    let (door, mut leaving) = mesh.worker_behind_proxy("leaving", &["--drain-wait", "1s"]);
    let job = Job::long(&mesh, 6000);
    let running = job.start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    let _staying = mesh.worker("staying");
    leaving.drain();

    assert_eq!(running.done(&job).worker(), "staying");
    assert_eq!(leaving.process().wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_detached_task_that_ends_in_a_drain_is_known_to_be_done() {
    let mesh = Mesh::start();
    let mut leaving = mesh.worker("leaving");
    let task = Job::long(&mesh, 2000).detach(&mesh);

    leaving.drain();

    assert_eq!(leaving.process().wait(PATIENCE).code(), Some(0));
    assert_eq!(mesh.ask(&["status", &task])["state"], "done");
}

#[test]
fn the_second_sigterm_ends_it_at_once() {
    let mesh = Mesh::start();
    let (door, mut leaving) = mesh.worker_behind_proxy("leaving", &[]);
    let mut running = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    leaving.drain();
    wait_until("that it leaves", PATIENCE, || leaving.process().has_said("ask again to leave at once"));
    leaving.drain();

    leaving.process().wait(std::time::Duration::from_secs(10));
    running.client.process().kill();
}

#[test]
fn broker_and_worker_end_clean_on_either_signal() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut mesh = Mesh::start();
        let mut worker = mesh.worker("w1");
        worker.process().signal(signal);
        assert_eq!(worker.process().wait(PATIENCE).code(), Some(0), "worker on {signal}");
        mesh.broker().signal(signal);
        assert_eq!(mesh.broker().wait(PATIENCE).code(), Some(0), "broker on {signal}");
    }
}
