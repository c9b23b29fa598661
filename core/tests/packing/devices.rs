//! Cases with several devices, and with memory promised of a GPU.

use mesh_core::worker::BatchKind;
use proto_msgs::Lane;

use super::world::{Machine, Micros, Model, Task, World};

const MS: Micros = 1000;
const SECOND: Micros = 1_000_000;

#[test]
fn what_is_learned_on_one_device_says_nothing_of_another() {
    let machine = Machine { slots: [0, 2], device_map: vec![0, 1], device_width: 1 };
    // On device 0 more rows in a batch cost nearly nothing; on device 1 each row costs as much as the first.
    let mut world = World::new(machine, vec![Model::packs(20 * MS, MS / 10)]);
    world.elsewhere.insert(1, Model::packs(0, 4 * MS));
    let start = world.now;
    for round in 0..400 {
        world.submit(start + round * SECOND / 10, Task::new(1, Lane::Realtime, 40));
    }
    world.run_until(start + 60 * SECOND);
    let late = world.batches.len() / 2;
    let on = |device: i16| {
        let batches = world.batches.iter().zip(&world.devices).skip(late);
        let here = batches.filter(move |(_, at)| **at == device).map(|((_, kind, rows), _)| (*kind, *rows));
        here.collect::<Vec<_>>()
    };
    let packed_rows = |device| {
        let packed = on(device).into_iter().filter(|(kind, _)| *kind == BatchKind::Packed);
        packed.map(|(_, rows)| rows).sum::<u32>()
    };
    let rows = |device| on(device).iter().map(|(_, rows)| rows).sum::<u32>();
    assert!(rows(0) > 1000 && rows(1) > 100, "both are used: {} and {}", rows(0), rows(1));
    assert!(packed_rows(0) * 10 > rows(0) * 9, "{} of {} packed where it pays", packed_rows(0), rows(0));
    // Now and then packing is tried again.
    assert!(packed_rows(1) * 20 < rows(1), "{} of {} packed where it does not", packed_rows(1), rows(1));
}

#[test]
fn who_was_promised_memory_of_a_gpu_runs_only_beside_those_that_leave_so_much() {
    let ends = |gpu_gib| {
        let machine = Machine { slots: [0, 4], device_map: vec![0], device_width: 4 };
        let mut world =
            World::new(machine, vec![Model { many: mesh_core::worker::Equality::Differs, ..Model::packs(60 * MS, 0) }]);
        let now = world.now;
        let tasks = [1, 2]
            .map(|client| world.submit(now, Task { gpu_gib, gpu: Some(0), ..Task::new(client, Lane::Realtime, 1) }));
        world.run_until(now + SECOND);
        tasks.map(|task| (world.ends[&task].at - now) / MS)
    };
    assert_eq!(ends(5), [60, 60]);
    assert_eq!(ends(6), [60, 120]);
    assert_eq!(ends(0), [60, 60]);
}

#[test]
fn who_was_promised_memory_of_a_gpu_runs_on_that_one() {
    let devices = |device_map: Vec<i16>, promised: [Option<u8>; 2]| {
        let machine = Machine { slots: [0, 2], device_map, device_width: 1 };
        let mut world = World::new(machine, vec![Model::packs(20 * MS, 0)]);
        let now = world.now;
        for gpu in promised {
            let gpu_gib = if gpu.is_some() { 4 } else { 0 };
            world.submit(now, Task { gpu_gib, gpu, ..Task::new(1, Lane::Batch, 1) });
        }
        world.run_until(now + SECOND);
        world.devices.clone()
    };
    assert_eq!(devices(vec![0, 1], [Some(1); 2]), [1, 1], "the other one is idle all the time");
    assert_eq!(devices(vec![0, 1], [None, Some(1)]), [0, 1]);
    // Its slots sit on the processor; the runner is shown the GPU.
    assert_eq!(devices(vec![-1], [Some(1); 2]), [-1, -1]);
}

/// The time from submit to end of a realtime task that was promised GPU 0, behind much bulk; milliseconds.
fn behind_bulk(slots: [u16; 2], device_map: &[i16], bulk_gpu: Option<u8>) -> Micros {
    let machine = Machine { slots, device_map: device_map.to_vec(), device_width: 1 };
    let single = Model { many: mesh_core::worker::Equality::Differs, ..Model::packs(0, 20 * MS) };
    let mut world = World::new(machine, vec![single]);
    let start = world.now;
    for client in 0..100 {
        world.submit(start, Task { gpu: bulk_gpu, ..Task::new(client, Lane::Batch, 1) });
    }
    // Once it is known that these rows cannot be packed.
    let at = start + 1005 * MS;
    let task = world.submit(at, Task { gpu_gib: 1, gpu: Some(0), ..Task::new(200, Lane::Realtime, 1) });
    world.run_until(start + 10 * SECOND);
    (world.ends[&task].at - at) / MS
}

#[test]
fn who_was_promised_a_gpu_with_batch_slots_only_waits_for_one_batch_of_bulk() {
    assert_eq!(behind_bulk([1, 1], &[0, 0], None), 35, "its lane has a slot there");
    assert_eq!(behind_bulk([1, 1], &[-1, 0], None), 35);
    assert_eq!(behind_bulk([1, 1], &[1, 0], Some(0)), 35);
    assert_eq!(behind_bulk([0, 1], &[0], None), 35);
}

#[test]
fn bulk_that_waits_for_one_gpu_is_owed_nothing_by_another() {
    let machine = Machine { slots: [2, 2], device_map: vec![0, 1], device_width: 1 };
    let single = Model { many: mesh_core::worker::Equality::Differs, ..Model::packs(0, 20 * MS) };
    let mut world = World::new(machine, vec![single]);
    let start = world.now;
    for task in 0..1000 {
        world.submit(start, Task { gpu: Some(1), ..Task::new(task as u8, Lane::Batch, 1) });
        world.submit(start + task * 40 * MS, Task { gpu: Some(0), ..Task::new(200, Lane::Realtime, 1) });
    }
    // Bulk comes to the GPU of the stream.
    let at = start + 15 * SECOND;
    for client in 0..100 {
        world.submit(at, Task { gpu: Some(0), ..Task::new(client, Lane::Batch, 1) });
    }
    world.run_until(start + 60 * SECOND);
    let waited = |(number, (sent, task)): (usize, &(Micros, Task))| {
        (task.lane == Lane::Realtime).then(|| world.ends[&number].at - sent)
    };
    let longest = world.tasks.iter().enumerate().filter_map(waited).max().unwrap_or(0);
    assert!(longest < SECOND / 5, "{} ms behind bulk that has just come", longest / MS);
}

#[test]
fn rows_for_one_gpu_are_not_divided_among_slots_of_other_devices() {
    let largest = |gpu| {
        let machine = Machine { slots: [0, 5], device_map: vec![0, -1, -1, -1, -1], device_width: 1 };
        let mut world = World::new(machine, vec![Model::packs(20 * MS, MS)]);
        let start = world.now;
        for round in 0..100 {
            world.submit(start + round * SECOND, Task { gpu, ..Task::new(1, Lane::Batch, 64) });
        }
        world.run_until(start + 200 * SECOND);
        world.batches.iter().skip(world.batches.len() / 2).map(|(_, _, rows)| *rows).max()
    };
    assert_eq!(largest(Some(0)), Some(64));
    assert!(largest(None) < Some(64), "five devices share them");
}
