//! Short stories of workers of which nobody knows when they will be free: no task waits for them while another is idle.

use proto_msgs::{AttemptReport, AttemptState, Digest, ErrorCode, Submit};

use super::{
    MS, mesh,
    mesh::{Mesh, cost, task, worker},
};

/// A quick worker and a slow one, with one slot each.
fn quick_and_slow(slow_us: u32) -> Mesh {
    let mut mesh = mesh();
    mesh.measured(0, [1, 0], 10_000);
    mesh.measured(1, [1, 0], slow_us);
    mesh
}

/// A model that no worker has run.
fn never_measured(submit: &mut Submit) {
    submit.spec.model.digest = Digest::from_bytes([9; 32]);
}

impl Mesh {
    /// The first worker says that the first task runs there.
    fn the_first_runs(&mut self) {
        let running = AttemptReport { id: self.grants[0].id, state: AttemptState::Running };
        self.beat(0, |heartbeat| heartbeat.attempts = vec![running]);
    }
}

#[test]
fn nobody_waits_for_a_run_that_was_never_measured() {
    let mut mesh = quick_and_slow(100_000);
    assert_eq!(mesh.submit(0, 1, never_measured), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(1)), "the quick one would be free nobody knows when");
}

#[test]
fn who_would_gain_much_waits_as_long_as_the_gain() {
    let mut mesh = quick_and_slow(20_000_000);
    assert_eq!(mesh.submit(0, 1, never_measured), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |_| {}), None, "the slow one takes 20 s");
    mesh.wait(19_000 * MS);
    mesh.beat(1, |_| {});
    assert_eq!(mesh.grants.len(), 1);
    mesh.wait(1_000 * MS);
    mesh.beat(1, |_| {});
    assert_eq!(mesh.grants.last().map(|grant| (grant.id.task, grant.worker)), Some((task(1), worker(1))));
}

#[test]
fn a_task_that_would_be_late_at_the_idle_worker_waits_for_its_only_chance() {
    let mut mesh = quick_and_slow(900_000);
    assert_eq!(mesh.submit(0, 1, never_measured), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |submit| submit.spec.deadline_ms = Some(500)), None);
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.grants.last().map(|grant| (grant.id.task, grant.worker)), Some((task(1), worker(0))));
}

#[test]
fn a_short_run_is_waited_for_until_it_takes_much_longer_than_it_should() {
    let mut mesh = quick_and_slow(100_000);
    let asks = |submit: &mut Submit| submit.spec.demands.cpu_millis = 1; // None of these is sent ahead.
    assert_eq!([0, 1].map(|number| mesh.submit(number, 1, asks)), [Some(worker(0)), None]);
    mesh.the_first_runs();
    mesh.wait(400 * MS);
    mesh.beat(1, |_| {});
    assert_eq!(mesh.grants.len(), 1, "runs vary");
    mesh.wait(200 * MS);
    mesh.beat(1, |_| {});
    assert_eq!(mesh.grants.last().map(|grant| (grant.id.task, grant.worker)), Some((task(1), worker(1))));
}

#[test]
fn nothing_is_sent_ahead_to_a_worker_that_is_stuck() {
    let mut mesh = quick_and_slow(100_000);
    assert_eq!([0, 1].map(|number| mesh.submit(number, 1, |_| {})), [Some(worker(0)); 2], "the second one is ahead");
    mesh.the_first_runs();
    mesh.wait(1_000 * MS);
    mesh.cancel(1, 1);
    assert_eq!(mesh.submit(2, 1, |_| {}), Some(worker(1)), "that one has gone proves nothing");
    let first = mesh.grants[0].id;
    mesh.close(first);
    mesh.beat(0, |heartbeat| heartbeat.attempts = Vec::new());
    assert_eq!(mesh.submit(4, 1, |_| {}), Some(worker(0)), "it goes on");
}

#[test]
fn a_task_whose_inputs_come_slowly_keeps_no_other_from_the_slot() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 0], 10_000);
    mesh.submit(0, 1, |submit| submit.spec.input_bytes = 1 << 30);
    mesh.wait(60_000 * MS);
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(0)), "it runs while the other one's inputs come");
}

#[test]
fn a_first_run_in_the_batch_lane_shuts_realtime_out_of_no_worker() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 10_000);
    assert_eq!(mesh.submit(0, 1, |submit| (never_measured(submit), submit.spec.job_items = 1000).0), Some(worker(0)));
    mesh.the_first_runs();
    mesh.wait(60_000 * MS);
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(0)), "the worker lets it pass");
}

#[test]
fn one_slow_run_does_not_refuse_deadlines_for_ever() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 0], 1_000_000);
    let within = |number: u32, mesh: &mut Mesh| {
        mesh.wait(1_000 * MS);
        mesh.submit(number, 1, |submit| submit.spec.deadline_ms = Some(500))
    };
    let first = (0..60).find(|number| within(*number, &mut mesh).is_some()).expect("one is to find out");
    assert!((15..25).contains(&first), "twenty times the run later: {first}");
    assert_eq!(mesh.broker.counters().trials, 1);
    assert_eq!(within(100, &mut mesh), None, "one is enough");
    assert_eq!(mesh.code(100), Some(ErrorCode::DeadlineUnmeetable));
    mesh.close(mesh.grants[0].id);
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![cost(10_000)]);
    assert_eq!(within(101, &mut mesh), Some(worker(0)), "it is well again");
}

#[test]
fn a_deadline_that_stays_out_of_reach_is_tried_ever_less() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 0], 1_000_000);
    let one = |number: &u32| {
        mesh.wait(1_000 * MS);
        mesh.submit(*number, 1, |submit| submit.spec.deadline_ms = Some(500)).is_some()
    };
    let tried_s: Vec<u32> = (0..1_500).filter(one).collect();
    let apart_s: Vec<u32> = tried_s.windows(2).map(|two| two[1] - two[0]).collect();
    assert!(apart_s.is_sorted() && apart_s.last() >= Some(&290), "{apart_s:?}");
}
