//! Short stories of failed attempts and of who is to blame. Owns what is expected of the broker there.

use std::time::Duration;

use proto_msgs::{AttemptReport, AttemptState, Epoch, ErrorCode, Grant, Outcome, Slo, Standing};

use super::{
    super::Config,
    MS, mesh,
    mesh::{DONE, Mesh, task, worker},
};

/// Five workers with a heartbeat per second, and a task that may be lost often.
fn five_workers() -> Mesh {
    let mut mesh = Mesh::new(Config { attempts_max: 10, ..Config::default() });
    (0..5).for_each(|number| mesh.register(number, [0, 1], |register| register.heartbeat_ms = 1000));
    mesh.submit(0, 1, |_| {});
    mesh
}

impl Mesh {
    /// Lets these seconds pass with heartbeats of these workers.
    fn beats(&mut self, seconds: u32, workers: std::ops::Range<u32>) {
        for _ in 0..seconds {
            self.wait(1000 * MS);
            workers.clone().for_each(|number| self.beat(number, |_| {}));
        }
    }

    /// Number of the worker that got the last grant.
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
    mesh.beats(2, 3..5);
    assert!(mesh.shown.contains(&task(0)), "it is under way");
    mesh.beats(2, 3..5);
    assert_eq!(mesh.code(0), Some(ErrorCode::Poisonous));
    assert_eq!(mesh.grants.len(), 3);
    // The task ended during a look at it: nothing brings its row back.
    mesh.beats(10, 3..5);
    assert!(mesh.shown.is_empty(), "{:?}", mesh.shown);
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
fn a_worker_that_was_cut_off_is_asked_again_once_it_is_heard() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [0, 1], |register| register.heartbeat_ms = 5000);
    mesh.submit(0, 1, |_| {});
    let grant = mesh.grants[0].clone();
    mesh.lost(&grant, ErrorCode::Unreachable);
    mesh.wait(4000 * MS);
    assert_eq!((mesh.grants.len(), mesh.code(0)), (1, None), "it may be dead: the task keeps its attempts");
    let against = mesh.why(0, 1).candidates.remove(0).against;
    assert_eq!(against, ["was cut off from the task or failed it, and has not been heard since"]);
    mesh.says(task(0), Standing::Asking);
    assert!(mesh.queued[&task(0)].reason.ends_with("have not been heard since"), "{:?}", mesh.queued[&task(0)]);
    mesh.beat(0, |_| {});
    assert_eq!(mesh.grants.len(), 2);
}

/// A detached task whose worker missed its client.
fn missed() -> Mesh {
    let mut mesh = Mesh::exactly(Config::default());
    (0..2).for_each(|number| mesh.register(number, [0, 1], |_| {}));
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    let state = AttemptState::Finished(Outcome::failed(ErrorCode::ClientGone, "its client went away"));
    let report = AttemptReport { id: mesh.grants[0].id, state };
    mesh.beat(mesh.last_worker(), |heartbeat| heartbeat.attempts = vec![report]);
    mesh
}

#[test]
fn a_detached_task_whose_client_was_missed_by_its_worker_only_goes_to_another() {
    let mut mesh = missed();
    assert_eq!((mesh.code(0), mesh.grants.len()), (None, 1), "its client will say");
    let grant = mesh.grants[0].clone();
    mesh.lost(&grant, ErrorCode::WorkerLost);
    assert_eq!(mesh.grants.len(), 2);
    assert_ne!(mesh.grants[1].worker, grant.worker);

    let mut mesh = missed();
    mesh.wait(Config::default().client_silence);
    assert_eq!(mesh.code(0), Some(ErrorCode::ClientGone), "gone for good");

    let mut mesh = missed();
    let report = AttemptReport { id: mesh.grants[0].id, state: AttemptState::Running };
    mesh.beat(mesh.last_worker(), |heartbeat| heartbeat.attempts = vec![report]);
    mesh.wait(Config::default().client_silence);
    assert_eq!(mesh.code(0), None, "they have met since, and its client may have gone for good reason");
}

#[test]
fn a_worker_keeps_the_failure_of_a_detached_task_until_it_is_stored() {
    let mut mesh = Mesh::exactly(Config::default());
    mesh.register(0, [0, 1], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    let failure = Outcome::failed(ErrorCode::RunFailed, "the model divides by zero");
    let report = AttemptReport { id: mesh.grants[0].id, state: AttemptState::Finished(failure) };
    mesh.beat(0, |heartbeat| heartbeat.attempts = vec![report]);
    assert!(mesh.rows[&task(0)].ended.is_some());
    assert_eq!(mesh.stopped, [], "if this broker died now, the next one would hear of no failure");
    mesh.beat(0, |_| {});
    assert_eq!(mesh.stopped, [], "the store has not confirmed it");
    mesh.store();
    mesh.beat(0, |_| {});
    assert_eq!(mesh.stopped, [mesh.grants[0].id], "its inputs take room at the worker for nobody");
}

/// Runs tasks with a service level at one worker; `ends` ends each. Returns how often the worker was found too slow.
fn trips(ends: impl Fn(&mut Mesh, &Grant)) -> u64 {
    let mut mesh = Mesh::exactly(Config::default());
    mesh.register(0, [0, 128], |_| {});
    for number in 0..100 {
        let promise = Slo { latency_ms: 50, max_violation_permille: 100 };
        mesh.submit(number, 1, |submit| submit.spec.slo = Some(promise)).expect("there is room");
        let grant = mesh.grants[number as usize].clone();
        ends(&mut mesh, &grant);
    }
    mesh.wait(Config::default().client_silence);
    mesh.broker.counters().slo_trips
}

#[test]
fn a_worker_is_not_slow_because_its_clients_cannot_reach_it_or_go_away() {
    let cancel = |mesh: &mut Mesh, id| mesh.close_as(id, Outcome::Cancelled);
    assert_eq!(
        trips(|mesh, grant| {
            mesh.lost(grant, ErrorCode::Unreachable);
            cancel(mesh, grant.id);
        }),
        0
    );
    let is_over = |mesh: &mut Mesh, grant: &Grant| {
        let report = AttemptReport { id: grant.id, state: AttemptState::Finished(DONE) };
        mesh.beat(0, |heartbeat| heartbeat.attempts = vec![report]);
    };
    assert_eq!(trips(is_over), 0, "they are given up all at once, long after they were done");
    assert!(trips(|mesh, grant| (mesh.wait(100 * MS), mesh.close(grant.id)).1) > 0, "else it is");
}

#[test]
fn a_worker_that_registers_again_and_again_is_looked_at_no_more_often() {
    let mut mesh = mesh();
    for epoch in 1..100 {
        mesh.wait(MS);
        mesh.register(0, [0, 1], |register| register.epoch = Epoch(epoch / 2));
    }
    assert_eq!(mesh.broker.worker_looks.len(), 1);
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
fn a_task_that_never_fits_a_quota_goes_elsewhere_at_once_and_never_back() {
    let mut mesh = mesh();
    (0..2).for_each(|number| mesh.register(number, [0, 1], |_| {}));
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(1)));
    let refused = mesh.grants[0].clone();
    mesh.lost(&refused, ErrorCode::QuotaExceeded);
    mesh.beats(5, 0..2);
    assert_eq!((mesh.grants.len(), mesh.code(0)), (2, None), "it waits for the other");
    assert!(mesh.why(0, 1).candidates[0].against[0].contains("quota"));
    assert!(mesh.why(0, 1).summary.contains("the one worker that fits has no room"), "{}", mesh.why(0, 1).summary);
    mesh.close(mesh.grants[1].id);
    mesh.beat(1, |_| {});
    assert_eq!(mesh.grants[2].worker, worker(1));
    let refused = mesh.grants[2].clone();
    mesh.lost(&refused, ErrorCode::QuotaExceeded);
    assert_eq!(mesh.code(0), Some(ErrorCode::QuotaExceeded), "nobody is left");
}

#[test]
fn who_waits_is_told_when_the_last_worker_with_a_large_enough_quota_has_left() {
    let mut mesh = mesh();
    (0..2).for_each(|number| mesh.register(number, [0, 1], |_| {}));
    mesh.submit_all(0..2, 1, |_| {});
    let refused = mesh.grants[0].clone();
    mesh.lost(&refused, ErrorCode::QuotaExceeded);
    mesh.leave(1);
    mesh.wait(2000 * MS);
    let why = mesh.why(0, 1).summary;
    assert!(why.contains("too large for the quotas of the workers that fit"), "{why}");
    mesh.leave(0);
    mesh.register(2, [0, 1], |_| {});
    assert_eq!(mesh.grants.last().map(|grant| (grant.id.task, grant.worker)), Some((task(0), worker(2))));
}

#[test]
fn a_worker_that_keeps_no_more_results_gets_attached_tasks_only() {
    let mut mesh = mesh();
    mesh.register(0, [0, 2], |_| {});
    mesh.beat(0, |heartbeat| heartbeat.keeps_no_more = true);
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    assert!(mesh.grants.is_empty());
    assert!(mesh.why(0, 1).candidates[0].against[0].contains("as many results"));
    assert!(mesh.submit(1, 1, |_| {}).is_some());
    mesh.beat(0, |heartbeat| heartbeat.keeps_no_more = false);
    assert_eq!(mesh.grants[1].id.task, task(0));
}
