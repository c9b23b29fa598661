//! Short stories of streams with a service level, and of workers that miss it.

use proto_msgs::{AttemptReport, AttemptState, Grant, Slo, Standing};

use super::{
    MS, mesh,
    mesh::{Mesh, worker},
};

#[test]
fn a_stream_leaves_a_worker_that_breaks_its_promise_and_comes_back_with_care() {
    let mut mesh = mesh();
    (0..2).for_each(|number| mesh.register(number, [0, 8], |_| {}));
    let promise = Slo { latency_ms: 50, max_violation_permille: 100 };
    let mut slow_ones = 0;
    let mut number = 0;
    let mut one = |mesh: &mut Mesh, slow: bool| {
        let at = mesh.submit(number, 1, |submit| submit.spec.slo = Some(promise)).expect("there is room");
        mesh.wait(if slow && at == worker(0) { 100 * MS } else { 10 * MS });
        mesh.close(mesh.grants[number as usize].id);
        number += 1;
        at
    };
    for _ in 0..200 {
        slow_ones += u32::from(one(&mut mesh, true) == worker(0));
    }
    assert!((8..=16).contains(&slow_ones), "{slow_ones} of 200 at the slow worker");
    assert!(mesh.broker.counters().slo_trips >= 1);
    let later = (0..3000).filter(|_| one(&mut mesh, false) == worker(0)).count();
    assert!(later > 1000, "{later} of 3000 after it is well again");
}

/// Gives twenty tasks a second to two workers for ten seconds. The second worker ends each in time. The first one
/// accepts all, names them in each heartbeat, and ends none. Returns the number of tasks that the first one got in each
/// second.
fn given_to_one_that_hangs() -> Vec<usize> {
    let promise = Slo { latency_ms: 200, max_violation_permille: 100 };
    let mut mesh = mesh();
    // The worker that hangs was much the better one before, so that it gets tasks although it is the busier one.
    mesh.measured(0, [0, 100], 50_000);
    mesh.measured(1, [0, 100], 100_000);
    let mut given = vec![0; 10];
    for number in 0..200 {
        let at = mesh.submit(number, 1, |submit| submit.spec.slo = Some(promise)).expect("there is room");
        given[number as usize / 20] += usize::from(at == worker(0));
        mesh.wait(50 * MS);
        let grant = mesh.grants.last().cloned().expect("the one of this task");
        if at == worker(1) {
            mesh.close(grant.id);
        }
        if number % 20 == 19 {
            let hangs: Vec<Grant> = mesh.grants.iter().filter(|grant| grant.worker == worker(0)).cloned().collect();
            let running = |grant: &Grant| AttemptReport { id: grant.id, state: AttemptState::Running };
            mesh.beat(0, |heartbeat| heartbeat.attempts = hangs.iter().map(running).collect());
        }
    }
    given
}

#[test]
fn a_worker_that_hangs_loses_a_stream_within_a_window_though_it_ends_nothing() {
    let given = given_to_one_that_hangs();
    let before: usize = given[..2].iter().sum();
    assert!((9..=24).contains(&before), "{given:?}");
    assert_eq!(given[2..6], [0; 4], "{given:?}");
    assert!(given[6..].iter().sum::<usize>() <= 4, "some are sent to try it again: {given:?}");
}

#[test]
fn a_promise_counts_as_broken_once_for_each_attempt_and_only_where_the_task_is_at_work() {
    let promise = Slo { latency_ms: 200, max_violation_permille: 1000 };
    let mut mesh = mesh();
    mesh.register(0, [0, 4], |_| {});
    let broken = |mesh: &Mesh| mesh.broker.counters().slo_violations;
    let begin = |mesh: &mut Mesh, number| {
        mesh.submit(number, 1, |submit| submit.spec.slo = Some(promise)).expect("there is room");
        mesh.grants.last().cloned().expect("it was placed")
    };
    let grant = begin(&mut mesh, 0);
    mesh.wait(150 * MS);
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    mesh.wait(50 * MS);
    assert_eq!(broken(&mesh), 0, "it may still come in time");
    mesh.wait(MS);
    assert_eq!(broken(&mesh), 1);
    mesh.wait(1000 * MS);
    mesh.close(grant.id);
    assert_eq!(broken(&mesh), 1, "its end says nothing new");

    // Neither client nor worker has named this attempt: it shows later which of them is to blame.
    let grant = begin(&mut mesh, 1);
    mesh.wait(1000 * MS);
    assert_eq!(broken(&mesh), 1);
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    mesh.wait(MS);
    assert_eq!(broken(&mesh), 2);
}

#[test]
fn nobody_waits_for_a_worker_that_is_only_tried_again() {
    let promise = Slo { latency_ms: 200, max_violation_permille: 100 };
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 10_000);
    mesh.measured(1, [0, 1], 60_000);
    let mut tried = Vec::new();
    for number in 0..10_000 {
        // What asks for cores is not sent ahead.
        let at = mesh.submit(number, 1, |submit| {
            submit.spec.slo = Some(promise);
            submit.spec.demands.cpu_millis = 1;
        });
        let grant = mesh.grants.last().expect("there was one").id;
        if at == Some(worker(1)) {
            mesh.close(grant);
        } else if mesh.broker.counters().slo_trips == 0 {
            mesh.wait(300 * MS);
            mesh.close(grant);
        } else {
            assert_eq!(at, Some(worker(0)), "the second worker has room, so nobody waits: {number}");
            tried.push((number, grant));
        }
        mesh.wait(5 * MS);
        // The first worker breaks its promise each time that it is tried.
        tried.iter().filter(|(at, _)| number == at + 60).for_each(|(_, late)| mesh.close(*late));
    }
    assert!(tried.len() > 2, "{tried:?}");
}
