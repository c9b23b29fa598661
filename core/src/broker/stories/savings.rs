//! Short stories of a stream that misses an idle worker, and of the task that pays for the load there.

use proto_msgs::{Digest, Heartbeat, ModelCost, Slo, Submit, WorkerId};

use super::{
    MS, mesh,
    mesh::{MODEL, Mesh, cost, worker},
};

/// A busy worker with the model, which takes 400 ms, and an idle one that would have to load it for 1 s.
fn busy_and_idle() -> Mesh {
    let mut mesh = mesh();
    mesh.measured(0, [1, 0], 400_000);
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![ModelCost { load_us: 1_000_000, ..cost(400_000) }]);
    mesh.register(1, [1, 0], |_| {});
    mesh
}

/// Every 100 ms two tasks, of which the second one would wait for the first one. Returns the number of the first pair
/// whose second task goes to the idle worker.
fn first_pair_apart(mesh: &mut Mesh, pairs: std::ops::Range<u32>, change: impl Fn(&mut Submit)) -> Option<u32> {
    let other: Option<WorkerId> = Some(worker(1));
    pairs.into_iter().find(|pair| {
        assert_eq!(mesh.submit(2 * pair, 1, |_| {}), Some(worker(0)));
        let second = mesh.submit(2 * pair + 1, 1, &change);
        mesh.wait(100 * MS);
        let ids: Vec<_> = mesh.grants.iter().rev().take(2).map(|grant| grant.id).collect();
        ids.into_iter().for_each(|id| mesh.close(id));
        second == other
    })
}

#[test]
fn one_of_a_stream_pays_for_a_load_once_the_others_have_missed_as_much() {
    let mut mesh = busy_and_idle();
    assert_eq!(first_pair_apart(&mut mesh, 0..100, |_| {}), Some(10));
    assert_eq!(mesh.broker.counters().preloads, 1);
    let history = mesh.why(21, 1).history;
    assert!(history[0].contains("for those after it"), "{history:?}");
    // It is not loaded yet, and what comes meanwhile loads it nowhere.
    assert_eq!(first_pair_apart(&mut mesh, 100..200, |_| {}), None, "a tenth of the time");
    mesh.beat(1, |heartbeat| (heartbeat.held, heartbeat.warm) = (vec![MODEL], vec![MODEL]));
    assert_eq!(first_pair_apart(&mut mesh, 200..300, |_| {}), Some(200), "loaded, it has its part");
}

#[test]
fn no_task_pays_whose_deadline_or_promise_the_load_might_break() {
    let deadline = |submit: &mut Submit| submit.spec.deadline_ms = Some(2000);
    let promise = |submit: &mut Submit| {
        submit.spec.slo = Some(Slo { latency_ms: 2000, max_violation_permille: 100 });
    };
    let mut mesh = busy_and_idle();
    assert_eq!(first_pair_apart(&mut mesh, 0..50, deadline), None);
    assert_eq!(first_pair_apart(&mut mesh, 50..100, promise), None);
    assert_eq!(first_pair_apart(&mut mesh, 100..200, |_| {}), Some(100), "the first one with time pays for all");
}

#[test]
fn a_worker_whose_models_are_all_in_use_is_left_to_them() {
    let other = Digest::from_bytes([9; 32]);
    let mut mesh = busy_and_idle();
    let has_other = |heartbeat: &mut Heartbeat| (heartbeat.held, heartbeat.warm) = (vec![other], vec![other]);
    mesh.beat(1, has_other);
    assert_eq!(first_pair_apart(&mut mesh, 0..300, |_| {}), None);
    mesh.wait(60_000 * MS);
    mesh.beat(1, |_| {});
    assert_eq!(first_pair_apart(&mut mesh, 300..400, |_| {}), Some(310), "nobody has wanted them for a minute");
    let mut mesh = busy_and_idle();
    mesh.register(1, [1, 1], |_| {});
    mesh.beat(1, has_other);
    assert_eq!(first_pair_apart(&mut mesh, 0..100, |_| {}), Some(10), "a slot for each");
}

#[test]
fn a_task_that_others_do_not_delay_misses_nothing() {
    let mut mesh = busy_and_idle();
    for number in 0..1000 {
        assert_eq!(mesh.submit(number, 1, |_| {}), Some(worker(0)));
        mesh.wait(100 * MS);
        mesh.close(mesh.grants[number as usize].id);
    }
}
