//! Stories of bulk beside realtime rows that ask for an answer in time, by a service level or a deadline.

use mesh_core::worker::{BatchKind, Equality};
use proto_msgs::Lane;

use super::world::{Machine, Micros, Model, Task, World};

const MS: Micros = 1000;
const SECOND: Micros = 1_000_000;

/// 5 ms and 5 ms a row: 64 rows take 325 ms, 32 hardly more for each, 4 take 25 ms, and 2 half as much again for each.
const PACKED: Model = Model::packs(5 * MS, 5 * MS);

fn one_gpu() -> Machine {
    Machine { slots: [1, 1], device_map: vec![0], device_width: 1 }
}

/// An item that asks for an answer within this time.
fn within(ms: u32) -> Task {
    Task { slo_ms: Some(ms), ..Task::new(2, Lane::Realtime, 1) }
}

/// A world with bulk for a minute and, from the tenth to the twentieth second, two a second of each of these items.
fn beside_bulk(machine: Machine, model: Model, items: &[Task]) -> World {
    let mut world = World::new(machine, vec![model]);
    let begin = world.now + 10 * SECOND;
    let rows = u32::try_from(60 * SECOND / model.each_us).expect("a minute of rows");
    world.submit(world.now, Task::new(1, Lane::Batch, rows));
    for (number, item) in (0_u64..).zip(items) {
        (0..20).for_each(|round| _ = world.submit(begin + round * 487 * MS + number * 11 * MS, item.clone()));
    }
    world.run_until(begin + 2 * SECOND);
    world
}

/// The largest batch of the bulk in so many seconds from now.
fn largest_in(world: &mut World, seconds: u64) -> u32 {
    world.batches.clear();
    world.run_until(world.now + seconds * SECOND);
    let of_bulk = world.batches.iter().filter(|(lane, ..)| *lane == Lane::Batch).map(|(.., rows)| *rows);
    of_bulk.max().expect("there is bulk")
}

fn largest_beside(machine: Machine, items: &[Task]) -> u32 {
    largest_in(&mut beside_bulk(machine, PACKED, items), 6)
}

#[test]
fn bulk_is_cut_as_short_as_a_service_level_or_a_deadline_asks_but_not_too_dear() {
    // A run of 10 ms with a quarter to spare, and 5 ms for the result: 32.5 ms of 50 are left for a batch of the bulk.
    assert_eq!(largest_beside(one_gpu(), &[within(50)]), 4);
    let by_deadline = Task { deadline_us: Some(50 * MS), ..Task::new(2, Lane::Realtime, 1) };
    assert_eq!(largest_beside(one_gpu(), &[by_deadline]), 4);
    assert_eq!(largest_beside(one_gpu(), &[within(25)]), 2, "half as much again per row");
    assert_eq!(largest_beside(one_gpu(), &[within(2000)]), 32, "it has time");
}

#[test]
fn an_item_that_is_in_time_waits_for_one_cut_batch_at_most() {
    let mut world = beside_bulk(one_gpu(), PACKED, &[within(50)]);
    world.run_until(world.now + 6 * SECOND);
    let begun = world.ends.iter().filter_map(|(item, end)| Some(end.began? - world.tasks[*item].0));
    let waits: Vec<Micros> = begun.collect();
    // The first ones come before the worker knows.
    let late = waits.iter().filter(|waited| **waited > 25 * MS).count();
    assert!(waits.len() > 12 && late <= 1, "{late} of {waits:?} late");
}

#[test]
fn a_batch_whose_rows_also_run_by_themselves_to_be_checked_is_shorter() {
    let model = Model::packs(5 * MS, MS);
    let mut world = beside_bulk(one_gpu(), model, &[within(50)]);
    assert_eq!(largest_in(&mut world, 6), 24, "29 ms; 32 would take 37, of which 36.6 are left");
    let spots: Vec<u32> =
        world.batches.iter().filter(|batch| batch.1 == BatchKind::Spot).map(|batch| batch.2).collect();
    assert_eq!(spots, [16], "21 ms, and two rows of 6 ms");
}

#[test]
fn who_would_be_late_all_the_same_asks_for_nothing_and_hides_nobody() {
    assert_eq!([12, 17, 20].map(|ms| largest_beside(one_gpu(), &[within(ms)])), [32; 3], "late behind 15 ms, mostly");
    assert_eq!(largest_beside(one_gpu(), &[within(50), within(12)]), 4);
    let both = Task { deadline_us: Some(50 * MS), ..within(12) };
    assert_eq!(largest_beside(one_gpu(), &[both]), 4, "its deadline can be kept");
    let large = Task { items: 16, ..within(50) };
    assert_eq!(largest_beside(one_gpu(), &[within(50), large]), 4, "85 ms do not fit into 50");
    assert_eq!(largest_beside(one_gpu(), &[within(200), within(50), within(60)]), 4);
}

#[test]
fn bulk_runs_in_full_batches_again_some_seconds_after_the_last_item() {
    let mut world = beside_bulk(one_gpu(), PACKED, &[within(50)]);
    // The last item comes after 9 s, and 2 s have passed.
    assert_eq!(largest_in(&mut world, 7 + 9), 4);
    world.run_until(world.now + 3 * SECOND);
    assert_eq!(largest_in(&mut world, 5), 64);
}

#[test]
fn bulk_that_keeps_nobody_waiting_is_not_cut_for_promises() {
    let on = |device_map: &[i16]| Machine { device_map: device_map.to_vec(), ..one_gpu() };
    assert_eq!(largest_beside(on(&[-1]), &[within(50)]), 32, "cores of the processor");
    assert_eq!(largest_beside(on(&[0, 1]), &[within(50)]), 32, "a GPU for each lane");
    let wide = Machine { device_width: 2, ..one_gpu() };
    assert_eq!(largest_beside(wide, &[within(50)]), 32, "a GPU that takes two batches at once");
    let shared = Machine { slots: [0, 1], ..on(&[-1]) };
    assert_eq!(largest_beside(shared, &[within(50)]), 4, "the realtime lane has no slot of its own");
}

#[test]
fn rows_run_one_by_one_where_packing_saves_little_and_no_batch_is_short_enough() {
    // Two rows take 17 ms, which is not worth it, four 31 ms, which is. A row of a batch of 64 takes 7 ms.
    let little = Model::packs(3 * MS, 7 * MS);
    let mut world = beside_bulk(one_gpu(), little, &[within(40)]);
    assert_eq!(largest_in(&mut world, 6), 2);
    assert!(world.batches.iter().all(|(_, kind, _)| *kind == BatchKind::Whole), "22.5 ms are left");
}

#[test]
fn rows_that_are_never_packed_run_in_shorter_batches_too_but_not_in_ones_that_only_start() {
    let single = Model { many: Equality::Differs, ..Model::packs(0, MS) };
    let largest = |ms| largest_in(&mut beside_bulk(one_gpu(), single, &[within(ms)]), 6);
    assert_eq!(largest(1000), 20);
    // 1.25 ms for its own run, and 5 ms for the result.
    assert_eq!([largest(18), largest(8)], [11, 5]);
}
