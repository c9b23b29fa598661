//! Random clients, tasks, cancels, failures, models and machines: every row runs once, successfully, for its owner.

use mesh_core::worker::Equality;
use proptest::{collection::vec, option, prelude::*, test_runner::RngSeed};
use proto_msgs::{ErrorCode, Lane, Outcome};

use super::world::{Machine, Micros, Model, Task, World};

const SECOND: Micros = 1_000_000;

fn machine() -> impl Strategy<Value = Machine> {
    let slots = prop_oneof![Just([0, 1]), Just([1, 1]), Just([2, 2]), Just([0, 3]), Just([1, 3]), Just([3, 1])];
    let map = prop_oneof![Just(vec![-1]), Just(vec![0]), Just(vec![0, 1]), Just(vec![-1, 0]), Just(vec![1, -1, 0])];
    (slots, map, 1..3_u16).prop_map(|(slots, device_map, device_width)| Machine { slots, device_map, device_width })
}

fn model() -> impl Strategy<Value = Model> {
    let many = prop_oneof![
        4 => Just(Equality::Same),
        1 => Just(Equality::Differs),
        1 => Just(Equality::Unsupported),
        1 => Just(Equality::Inconclusive),
    ];
    let rows_max = prop_oneof![3 => Just(u32::MAX), 1 => 1..64_u32];
    let right_to = prop_oneof![3 => Just(u32::MAX), 1 => 1..64_u32];
    // Every fourth model is so slow that its comparisons have to be cut or kept small.
    let base_us = prop_oneof![3 => 100..20_000_u64, 1 => 100_000..900_000_u64];
    let parts = (base_us, 0..5_000_u64, many, rows_max, right_to, prop::bool::weighted(0.2));
    parts.prop_map(|(base_us, each_us, many, rows_max, right_to, dies_comparing)| Model {
        many,
        rows_max,
        right_to,
        dies_comparing,
        ..Model::packs(base_us, each_us)
    })
}

fn task() -> impl Strategy<Value = Task> {
    let items = prop_oneof![4 => Just(1), 4 => 2..9_u32, 1 => 9..200_u32];
    let way = prop_oneof![4 => vec(0..3_usize, 1), 2 => vec(0..3_usize, 2), 1 => vec(0..3_usize, 3)];
    let lane = prop_oneof![Just(Lane::Realtime), Just(Lane::Batch)];
    let poison = (option::weighted(0.1, 0..2_u8), prop_oneof![Just(ErrorCode::RunFailed), Just(ErrorCode::RunCrashed)]);
    let times = (option::weighted(0.1, 1_000..2_000_000_u64), option::weighted(0.2, 1..2000_u32));
    let length = prop_oneof![3 => Just(4_u64), 1 => 5..8_u64];
    let gpu = option::weighted(0.2, 0..2_u8);
    let parts = (0..6_u8, lane, 0..101_u8, items, length, way, poison, times, gpu);
    parts.prop_map(|(client, lane, priority, items, length, way, (poison_at, fails_with), times, gpu)| Task {
        client,
        lane,
        priority,
        items,
        length,
        way,
        poison_at,
        fails_with,
        gpu_gib: 0,
        gpu,
        deadline_us: times.0,
        slo_ms: times.1,
    })
}

/// Whether the task may have this outcome.
fn is_right(task: &Task, sent: Micros, at: Micros, outcome: &Outcome, is_cancelled: bool) -> bool {
    let is_poisoned = task.poison_at.is_some_and(|stage| usize::from(stage) < task.way.len());
    match outcome {
        Outcome::Done { .. } => !is_poisoned,
        Outcome::Cancelled => is_cancelled,
        Outcome::Failed(failure) if failure.code == ErrorCode::Expired => {
            // The broker's clock counts milliseconds.
            task.deadline_us.is_some_and(|deadline| at + 1000 >= sent + deadline)
        }
        Outcome::Failed(failure) => failure.code == task.fails_with && is_poisoned,
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        max_shrink_iters: 400,
        failure_persistence: None,
        // The same worlds in each run; another number gives others.
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_row_runs_once_for_its_owner(
        machine in machine(),
        models in vec(model(), 3),
        longer in model(),
        tasks in vec((0..3 * SECOND, task(), option::weighted(0.15, 0..SECOND)), 1..120),
    ) {
        let mut world = World::new(machine, models);
        world.by_length.insert(5, longer);
        let start = world.now;
        let mut cancelled = Vec::new();
        for (after, task, cancel) in tasks {
            let number = world.submit(start + after, task);
            cancelled.push(cancel.is_some());
            if let Some(cancel) = cancel {
                world.cancel(start + after + cancel, number);
            }
        }
        world.run_until(start + 10_000 * SECOND);
        prop_assert_eq!(world.referee.left(), Vec::<usize>::new());
        prop_assert_eq!(world.ends.len(), world.tasks.len());
        for (number, end) in &world.ends {
            let (sent, task) = &world.tasks[*number];
            let is_cancelled = cancelled[*number];
            prop_assert!(is_right(task, *sent, end.at, &end.outcome, is_cancelled), "{task:?} ended {end:?}");
        }
    }
}

#[test]
fn one_tasks_failure_is_nobody_elses() {
    let machine = Machine { slots: [0, 1], device_map: vec![-1], device_width: 1 };
    let mut world = World::new(machine, vec![Model::packs(5000, 200)]);
    let start = world.now;
    // The model is known to pack before the failing task comes.
    for client in 0..32 {
        world.submit(start, Task::new(client, Lane::Realtime, 4));
    }
    let later = start + SECOND;
    let good: Vec<usize> = (0..8).map(|client| world.submit(later, Task::new(client, Lane::Realtime, 2))).collect();
    let bad = world.submit(later, Task { poison_at: Some(0), ..Task::new(9, Lane::Realtime, 2) });
    world.run_until(start + 10 * SECOND);
    assert!(world.batches.iter().any(|(_, kind, _)| kind.is_packed()), "{:?}", world.batches);
    assert!(good.iter().all(|task| matches!(world.ends[task].outcome, Outcome::Done { .. })));
    assert!(matches!(&world.ends[&bad].outcome, Outcome::Failed(failure) if failure.code == ErrorCode::RunFailed));
}

#[test]
fn a_size_at_which_the_model_fails_is_found_and_avoided() {
    let model = Model { rows_max: 20, ..Model::packs(5000, 200) };
    let mut world = World::new(Machine { slots: [0, 1], device_map: vec![0], device_width: 1 }, vec![model]);
    let start = world.now;
    let task = world.submit(start, Task::new(1, Lane::Batch, 1000));
    world.run_until(start + 60 * SECOND);
    assert!(matches!(world.ends[&task].outcome, Outcome::Done { .. }), "{:?}", world.ends);
    let large = world.batches.iter().filter(|(_, kind, rows)| kind.is_packed() && *rows > 20).count();
    assert_eq!(large, 1);
}
