//! Short stories of attempts that come to nothing, and of whose fault that was. Owns what is expected of the broker there.

use std::time::Duration;

use proto_msgs::{Epoch, ErrorCode};

use super::{
    super::Config,
    MS, mesh,
    mesh::{Mesh, task, worker},
};

/// Five workers that speak each second, and a task that may be lost often.
fn five_workers() -> Mesh {
    let mut mesh = Mesh::new(Config { attempts_max: 10, ..Config::default() });
    (0..5).for_each(|number| mesh.register(number, [0, 1], |register| register.heartbeat_ms = 1000));
    mesh.submit(0, 1, |_| {});
    mesh
}

impl Mesh {
    /// So long passes, in which these workers speak.
    fn beats(&mut self, seconds: u32, workers: std::ops::Range<u32>) {
        for _ in 0..seconds {
            self.wait(1000 * MS);
            workers.clone().for_each(|number| self.beat(number, |_| {}));
        }
    }

    /// The worker of the last grant, by its number.
    fn last_worker(&self) -> u32 {
        let last = self.grants.last().expect("there was a grant").worker;
        (0..5).find(|number| worker(*number) == last).expect("workers have numbers")
    }
}

#[test]
fn a_task_that_takes_three_workers_down_is_given_up() {
    let mut mesh = five_workers();
    for lost in 0..3 {
        assert_eq!(mesh.code(0), None);
        let (grant, number) = (mesh.grants[lost].clone(), mesh.last_worker());
        mesh.register(number, [0, 1], |register| register.epoch = Epoch(2));
        mesh.lost(&grant, ErrorCode::WorkerLost);
    }
    assert_eq!(mesh.grants.len(), 3);
    assert_eq!(mesh.code(0), Some(ErrorCode::Poisonous));
}

#[test]
fn a_task_that_kills_before_anybody_has_heard_of_it_goes_to_three_workers_and_no_further() {
    let mut mesh = five_workers();
    for lost in 0..3 {
        let grant = mesh.grants[lost].clone();
        mesh.lost(&grant, ErrorCode::Unreachable);
    }
    assert_eq!((mesh.grants.len(), mesh.code(0)), (3, None), "it is not known yet");
    assert_eq!(mesh.last_worker(), 2);
    mesh.beats(4, 3..5);
    assert_eq!(mesh.code(0), Some(ErrorCode::Poisonous));
    assert_eq!(mesh.grants.len(), 3);
}

#[test]
fn links_that_break_at_workers_that_live_do_not_make_a_task_poisonous() {
    let mut mesh = five_workers();
    for lost in 0..4 {
        let grant = mesh.grants[lost].clone();
        mesh.lost(&grant, ErrorCode::WorkerLost);
        mesh.beats(4, 0..5);
        assert_eq!((mesh.grants.len(), mesh.code(0)), (lost + 2, None));
    }
}

#[test]
fn the_only_worker_gets_a_while_before_it_is_asked_again() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit(0, 1, |_| {});
    for (failures, pause_ms) in [(1, 1000), (2, 2000)] {
        let grant = mesh.grants[failures - 1].clone();
        mesh.lost(&grant, ErrorCode::EngineUnavailable);
        mesh.beat(0, |_| {});
        assert_eq!(mesh.grants.len(), failures, "it is not asked again at once");
        mesh.wait(Duration::from_millis(pause_ms));
        assert_eq!(mesh.grants.len(), failures + 1);
    }
    // Another worker is asked at once.
    let grant = mesh.grants[2].clone();
    mesh.register(1, [0, 1], |_| {});
    mesh.submit(1, 1, |_| {});
    let other = mesh.grants[3].clone();
    assert_eq!((grant.worker, other.worker), (worker(0), worker(1)));
}

#[test]
fn a_worker_that_refuses_is_not_asked_again_at_once_and_refusals_are_no_failures() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit(0, 1, |_| {});
    for refusals in 1..10 {
        let grant = mesh.grants[refusals - 1].clone();
        mesh.lost(&grant, ErrorCode::Busy);
        mesh.beat(0, |_| {});
        assert_eq!(mesh.grants.len(), refusals, "it is not asked again at once");
        mesh.wait(1000 * MS);
        assert_eq!(mesh.grants.len(), refusals + 1);
    }
}

#[test]
fn a_worker_that_keeps_no_more_results_gets_attached_tasks_only() {
    let mut mesh = mesh();
    mesh.register(0, [0, 2], |_| {});
    mesh.beat(0, |heartbeat| heartbeat.keeps_no_more = true);
    mesh.submit(0, 1, |submit| submit.detached = true);
    mesh.store();
    assert!(mesh.grants.is_empty());
    assert!(mesh.why(0, 1).candidates[0].against[0].contains("as many results"));
    assert!(mesh.submit(1, 1, |_| {}).is_some());
    mesh.beat(0, |heartbeat| heartbeat.keeps_no_more = false);
    assert_eq!(mesh.grants[1].id.task, task(0));
}
