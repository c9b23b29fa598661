//! Short stories of the last tasks of a queue: which workers get them, and when.

use proto_msgs::{ModelCost, Packing};

use super::{
    MS, mesh,
    mesh::{cost, worker},
};

/// Of 1600 tasks of eight items, the number at each worker when the last one gets its place. So many workers have the
/// model, each with four slots that share a GPU, where 64 items run in 17.8 ms.
fn at_work_with_the_last(workers: u32) -> Vec<usize> {
    const TASKS: u32 = 1600;
    let mut mesh = mesh();
    let curve = vec![(1, 5_200), (64, 17_800)];
    let packed = ModelCost { packing: Packing::On, best_batch: 64, next_batch: 64, curve, ..cost(0) };
    for number in 0..workers {
        mesh.measured(number, [4, 0], 5_000);
        mesh.register(number, [4, 0], |register| (register.device_map, register.device_width) = (vec![0], 1));
        mesh.beat(number, |heartbeat| heartbeat.costs = vec![packed.clone()]);
    }
    mesh.submit_all(0..TASKS, 1, |submit| submit.spec.items = 8);
    let mut done = 0;
    while mesh.grants.len() < TASKS as usize {
        mesh.wait(MS * 2);
        mesh.close(mesh.grants[done].id);
        done += 1;
    }
    assert!(done > 0, "not all had a place at once");
    let at_work = |number: u32| mesh.grants[done..].iter().filter(|grant| grant.worker == worker(number)).count();
    (0..workers).map(at_work).collect()
}

#[test]
fn the_only_worker_with_the_model_gets_the_last_tasks_as_soon_as_it_has_room() {
    let at_work = at_work_with_the_last(1);
    assert!(at_work[0] >= 64, "two full batches for each slot: {at_work:?}");
}

#[test]
fn the_last_tasks_go_to_workers_that_are_equally_busy_long_before_these_fall_idle() {
    for workers in [2, 3, 8] {
        let at_work = at_work_with_the_last(workers);
        assert!(at_work.iter().all(|at_work| (16..100).contains(at_work)), "{at_work:?}");
    }
}

#[test]
fn the_only_worker_with_the_model_gets_large_tasks_ahead_though_none_is_a_share_of_its_slots() {
    let mut mesh = mesh();
    let curve = vec![(1, 5_200), (64, 17_800)];
    mesh.measured(0, [4, 0], 5_000);
    mesh.beat(0, |heartbeat| {
        heartbeat.costs = vec![ModelCost { packing: Packing::On, best_batch: 64, next_batch: 64, curve, ..cost(0) }];
    });
    mesh.submit_all(0..16, 1, |submit| submit.spec.items = 64);
    assert_eq!(mesh.grants.len(), 12, "two full batches for each slot, and one more behind them");
}
