//! Short stories of questions: what a person is told of a task that waits, runs, has ended or was not taken.

use proto_msgs::{ModelCost, Packing};

use super::{
    MS, mesh,
    mesh::{MODEL, Mesh, cost, worker},
};

/// Two workers with the model, a fast one that packs it and a slow one that found that it may not.
fn unlike_workers() -> Mesh {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 40_000);
    mesh.measured(1, [0, 1], 60_000);
    let curve = vec![(1, 40_000), (8, 80_000)];
    let packed = ModelCost { packing: Packing::On, best_batch: 8, curve, dispatched: [5, 0, 0, 2], ..cost(0) };
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![packed]);
    let differs = ModelCost { packing: Packing::Differs, ..cost(60_000) };
    mesh.beat(1, |heartbeat| heartbeat.costs = vec![differs]);
    mesh
}

#[test]
fn why_tells_whether_the_model_is_packed_at_each_worker_and_its_curve_where_the_task_went() {
    let mut mesh = unlike_workers();
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    let why = mesh.why(0, 1);
    let decision = why.decision.expect("it was placed");
    for candidates in [&decision.candidates, &why.candidates] {
        let told: Vec<_> = candidates.iter().map(|worker| (worker.worker, worker.packing, worker.best_batch)).collect();
        assert_eq!(told, [(worker(0), Packing::On, 8), (worker(1), Packing::Differs, 1)]);
    }
    let [model] = &why.models[..] else { panic!("one model at one worker: {:?}", why.models) };
    assert_eq!((model.worker, model.warm, model.cost.model), (worker(0), true, MODEL));
    assert_eq!((&model.cost.curve[..], model.cost.dispatched), (&[(1, 40_000), (8, 80_000)][..], [5, 0, 0, 2]));
}

#[test]
fn why_shows_a_waiting_task_the_curve_of_the_worker_that_could_do_it_soonest() {
    let mut mesh = unlike_workers();
    mesh.submit_all(0..1000, 1, |submit| submit.demands.cpu_millis = 1);
    let waiting = 999;
    let why = mesh.why(waiting, 1);
    assert!(why.decision.is_none() && why.task.worker.is_none(), "{why:?}");
    assert_eq!(why.models.iter().map(|model| model.worker).collect::<Vec<_>>(), [worker(0)]);
    // Where it could never run says nothing.
    mesh.submit(2000, 1, |submit| submit.demands.memory_bytes = 1 << 50);
    assert!(mesh.why(2000, 1).models.is_empty());
    // Nor does a worker that has not run it.
    let mut fresh = self::mesh();
    fresh.register(0, [0, 1], |_| {});
    fresh.submit_all(0..2, 1, |submit| submit.demands.cpu_millis = 1);
    fresh.wait(MS);
    assert!(fresh.why(1, 1).models.is_empty());
    assert_eq!(fresh.why(1, 1).candidates[0].packing, Packing::Unknown);
}
