//! Clients whose rows crash the model, and their neighbours.

use mesh_core::worker::BatchKind;
use proto_msgs::{ErrorCode, Lane, Outcome};

use super::world::{Machine, Micros, Model, Task, World};

const MS: Micros = 1000;
const SECOND: Micros = 1_000_000;

const CULPRIT: u8 = 99;

/// A world with processors of this many slots, in which the model is known to pack and eight neighbours come back 2 ms
/// after each answer.
fn with_neighbours(slots: [u16; 2]) -> World {
    let machine = Machine { slots, device_map: vec![-1], device_width: 1 };
    let mut world = World::new(machine, vec![Model::packs(5 * MS, MS / 5)]);
    world.returns_after = Some(2 * MS);
    for client in 0..8 {
        world.submit(world.now, Task::new(client, Lane::Realtime, 1));
    }
    world.run_until(world.now + 2 * SECOND);
    assert!(world.batches.iter().any(|(_, kind, rows)| *kind == BatchKind::Packed && *rows > 2), "it packs");
    world
}

fn crashing() -> Task {
    let (poison_at, fails_with) = (Some(0), ErrorCode::RunCrashed);
    Task { poison_at, fails_with, ..Task::new(CULPRIT, Lane::Realtime, 1) }
}

fn of_neighbours(world: &World) -> usize {
    world.ends.keys().filter(|number| world.tasks[**number].1.client != CULPRIT).count()
}

#[test]
fn who_crashes_the_model_again_and_again_takes_its_neighbours_with_it_once() {
    for slots in [[0, 1], [1, 1], [2, 2]] {
        for tasks_at_once in [1, 4, 100] {
            let mut world = with_neighbours(slots);
            let (before, start) = (of_neighbours(&world), world.now);
            world.run_until(start + 5 * SECOND);
            let without = of_neighbours(&world) - before;

            let (before, start) = (of_neighbours(&world), world.now);
            for _ in 0..tasks_at_once {
                world.submit(start, crashing());
            }
            world.run_until(start + 5 * SECOND);

            let beside = of_neighbours(&world) - before;
            let of_all = world.failed.iter().filter(|failed| !failed.apart).count();
            let crashes = world.failed.len();
            println!("{slots:?}, {tasks_at_once}: {without} answers, beside {crashes} crashes {beside}");
            assert!(crashes > 50, "it has its turns: {crashes}");
            // In each slot batches of several that had begun with such rows, and then the first row that ran alone.
            let most = 3 + 3 * usize::from(slots[0] + slots[1]);
            assert!(of_all <= most, "{of_all} of {crashes} runners that crashed were everybody's");
            assert!(beside * 10 >= without * 6, "{slots:?}: {beside} answers beside crashes, {without} without");
            let failed = |(number, end): (&usize, &super::world::End)| {
                world.tasks[*number].1.client != CULPRIT && !matches!(end.outcome, Outcome::Done { .. })
            };
            assert!(!world.ends.iter().any(failed), "a neighbour failed");
        }
    }
}

#[test]
fn a_culprit_whose_rows_are_good_again_has_its_turns_and_after_a_while_its_company() {
    let mut world = with_neighbours([1, 1]);
    let start = world.now;
    world.returns_after = None;
    world.submit(start, crashing());
    world.run_until(start + SECOND);
    let good: Vec<usize> = (0..12).map(|_| world.submit(world.now, Task::new(CULPRIT, Lane::Realtime, 1))).collect();
    for (client, round) in (0..8).flat_map(|client| (0..400).map(move |round| (client, round))) {
        world.submit(world.now + round * 20 * MS, Task::new(client, Lane::Realtime, 1));
    }
    world.run_until(start + 9 * SECOND);
    for task in good {
        let end = &world.ends[&task];
        assert!(matches!(end.outcome, Outcome::Done { .. }), "{end:?}");
        assert!(end.runs.iter().all(|run| run.batch_rows == 1), "its rows ran alone: {end:?}");
    }

    let later = start + 12 * SECOND;
    let all: Vec<usize> =
        (0..8).chain([CULPRIT]).map(|client| world.submit(later, Task::new(client, Lane::Realtime, 1))).collect();
    let last = *all.last().expect("nine");
    world.run_until(later + SECOND);
    assert!(world.ends[&last].runs.iter().any(|run| run.batch_rows > 1), "{:?}", world.ends[&last]);
}

#[test]
fn a_culprit_with_many_tasks_has_few_of_them_here_and_the_others_come_again() {
    let mut world = with_neighbours([1, 1]);
    let start = world.now;
    world.returns_after = None;
    let crashing = [(); 2].map(|()| world.submit(start, crashing()));
    let good: Vec<usize> = (0..60).map(|_| world.submit(start, Task::new(CULPRIT, Lane::Realtime, 1))).collect();
    world.run_until(start + 200 * SECOND);
    let code = |task: &usize| match &world.ends[task].outcome {
        Outcome::Failed(failure) => Some(failure.code),
        _ => None,
    };
    assert_eq!(crashing.each_ref().map(code), [Some(ErrorCode::RunCrashed); 2]);
    assert!(good.iter().all(|task| code(task).is_none()), "{:?}", world.ends);
    assert!(world.refusals.keys().any(|task| good.contains(task)), "no task was one too many");
}
