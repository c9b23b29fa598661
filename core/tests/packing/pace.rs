//! How close the machine comes to the device's best possible speed.

use mesh_core::{
    Rules,
    worker::{BatchKind, Equality},
};
use proto_msgs::Lane;

use super::world::{Machine, Micros, Model, Task, World};

const MS: Micros = 1000;
const SECOND: Micros = 1_000_000;

/// Two slots per lane, on one device that takes one batch at a time.
fn one_device() -> Machine {
    Machine { slots: [2, 2], device_map: vec![0], device_width: 1 }
}

/// Throughput as a share of the ideal, for clients that send one item, wait for the answer and return after this time.
fn closed_loop(clients: u8, model: Model, returns_after: Micros) -> f64 {
    let mut world = World::new(one_device(), vec![model]);
    world.returns_after = Some(returns_after);
    let start = world.now;
    for client in 0..clients {
        world.submit(start + u64::from(client) * 37, Task::new(client, Lane::Realtime, 1));
    }
    world.run_until(start + 2 * SECOND);
    let before = world.ends.len();
    world.run_until(start + 7 * SECOND);
    let per_second = (world.ends.len() - before) as f64 / 5.0;
    let ideal = f64::from(clients) * SECOND as f64 / model.batch_us(u32::from(clients)) as f64;
    let share = per_second / ideal;
    println!("{clients} clients on 5 ms + 0.2 ms an item, back after {returns_after} µs: {share:.3} of the ideal");
    share
}

#[test]
fn a_closed_loop_gets_nine_tenths_of_the_device() {
    let model = Model::packs(5 * MS, MS / 5);
    for clients in [8, 64] {
        for returns_after in [0, 200, 500] {
            let share = closed_loop(clients, model, returns_after);
            assert!(share >= 0.9, "{share}");
        }
        // The device cannot be busy while all clients are on their way back.
        let share = closed_loop(clients, model, 1500);
        let batch_us = model.batch_us(u32::from(clients)) as f64;
        assert!(share >= 0.9 * batch_us / (batch_us + 1500.0), "{share}");
    }
}

#[test]
fn a_request_of_several_tasks_is_answered_as_a_whole() {
    // In turn, all eight would be answered after the second batch, and be back at the same time.
    let model = Model::packs(5 * MS, MS / 5);
    let mut world = World::new(one_device(), vec![model]);
    for round in 0..100 {
        let start = world.now + SECOND;
        world.submit(start, Task::new(200, Lane::Realtime, 64));
        for client in [0, 1, 2, 3, 4, 5, 6, 7].repeat(2) {
            world.submit(start + MS, Task::new(client, Lane::Realtime, 8));
        }
        world.run_until(start + SECOND);
        let first_batch = |task: &usize| world.ends[task].at == start + 2 * model.batch_us(64);
        let tasks = world.tasks.len() - 16..world.tasks.len();
        let clients: Vec<u8> = tasks.filter(first_batch).map(|task| world.tasks[task].1.client).collect();
        // Before that it learns the size, and compares.
        if round >= 50 && !clients.is_empty() {
            assert_eq!(clients, [0, 1, 2, 3].repeat(2), "round {round}");
            return;
        }
    }
    panic!("never a full batch");
}

#[test]
fn two_clients_before_one_slot_are_soon_packed() {
    // When the first client has its answer, only the other's item waits: without a short wait packing is never tried.
    let machine = Machine { slots: [0, 1], device_map: vec![-1], device_width: 1 };
    let mut world = World::new(machine, vec![Model::packs(5 * MS, MS / 5)]);
    world.returns_after = Some(1500);
    let start = world.now;
    for client in 0..2 {
        world.submit(start, Task::new(client, Lane::Realtime, 1));
    }
    world.run_until(start + 2 * SECOND);
    let packed = world.batches.iter().filter(|(_, kind, _)| *kind == BatchKind::Packed).count();
    assert!(packed * 10 >= world.batches.len() * 9, "{packed} of {}", world.batches.len());
}

/// Result of a mixed run: time until the bulk was done, seconds, and realtime response times, milliseconds.
struct Mixed {
    bulk_s: f64,
    ideal_bulk_s: f64,
    realtime_ms: Vec<f64>,
}

/// Four clients of the batch lane bring `bulk_items` items each; two seconds later each realtime client brings eight.
fn mixed(bulk_items: u32, realtime_clients: u8) -> Mixed {
    let model = Model::packs(5 * MS, 5 * MS);
    let mut world = World::new(one_device(), vec![model]);
    let start = world.now;
    let bulk: Vec<usize> =
        (0..4).map(|client| world.submit(start, Task::new(100 + client, Lane::Batch, bulk_items))).collect();
    let realtime_at = start + 2 * SECOND;
    let realtime: Vec<usize> = (0..realtime_clients)
        .map(|client| world.submit(realtime_at + u64::from(client) * 10, Task::new(client, Lane::Realtime, 8)))
        .collect();
    world.run_until(start + 100 * SECOND);
    let at = |task: &usize| world.ends[task].at;
    let mut realtime_ms: Vec<f64> = realtime.iter().map(|task| (at(task) - realtime_at) as f64 / 1000.0).collect();
    realtime_ms.sort_by(f64::total_cmp);
    let items = 4 * bulk_items + 8 * u32::from(realtime_clients);
    // The run time of the items; the fixed cost of a batch is not part of the ideal.
    let ideal_us = u64::from(items) * model.each_us;
    let bulk_us = bulk.iter().map(at).max().expect("there is bulk") - start;
    Mixed { bulk_s: bulk_us as f64 / 1e6, ideal_bulk_s: ideal_us as f64 / 1e6, realtime_ms }
}

#[test]
fn realtime_goes_first_and_the_bulk_loses_nothing() {
    // Triton with priorities needs 0.64, 1.22 and 1.71 s.
    for (clients, median_ms) in [(8, 640.0), (24, 1220.0), (48, 1710.0)] {
        let Mixed { bulk_s, ideal_bulk_s, realtime_ms } = mixed(1000, clients);
        let middle = realtime_ms[realtime_ms.len() / 2];
        let last = realtime_ms.last().expect("there are some");
        let ratio = bulk_s / ideal_bulk_s;
        println!("4 x 1000 and {clients} x 8: bulk {bulk_s:.2} s of {ideal_bulk_s:.2} ideal ({ratio:.3})");
        println!("    realtime median {middle:.0} ms, last {last:.0} ms");
        assert!(ratio <= 1.03, "{ratio}");
        assert!(middle <= median_ms, "{middle}");
        // Its own time on the device, one batch ahead of it, and the batch lane's tenth.
        let alone_ms = f64::from(clients) * 8.0 * 5.0 + 5.0 * (f64::from(clients) / 8.0).ceil();
        assert!(*last <= (alone_ms + 170.0) / 0.9 + 170.0, "{last}");
    }
}

#[test]
fn bulk_is_cut_for_a_realtime_client_that_is_back_soon_however_long_a_whole_batch_takes() {
    let model = Model::packs(20 * MS, 40 * MS);
    let mut world = World::new(Machine { slots: [0, 1], device_map: vec![-1], device_width: 1 }, vec![model]);
    let start = world.now;
    (0..10).for_each(|client| _ = world.submit(start, Task::new(100 + client, Lane::Batch, 1000)));
    let mut sends_at = start + 60 * SECOND;
    world.run_until(sends_at);
    assert_eq!(world.batches.last(), Some(&(Lane::Batch, BatchKind::Packed, 64)), "whole batches of 2.6 s");
    let mut waits = Vec::new();
    for pause in [150 * MS, 2 * SECOND].repeat(8) {
        let task = world.submit(sends_at, Task::new(1, Lane::Realtime, 1));
        let mut now = sends_at;
        while !world.ends.contains_key(&task) {
            now += 10 * MS;
            world.run_until(now);
        }
        let answered_at = world.ends[&task].at;
        waits.push((answered_at - sends_at) / MS);
        sends_at = answered_at + pause;
    }
    println!("a realtime row beside bulk of 20 ms + 40 ms a row: {waits:?} ms");
    assert!(waits[1..].iter().all(|wait| *wait <= 1300), "{waits:?}");
}

/// Seconds for 100 items, as tasks of this many, through two models of 20 ms per item, each on a device of its own.
/// Only stages that overlap keep both devices busy.
fn through_two_stages(batch_slots: u16, task_items: u32, rules: Rules) -> f64 {
    let model = Model { many: Equality::Unsupported, ..Model::packs(20 * MS, 0) };
    let machine = Machine { slots: [0, batch_slots], device_map: vec![-1], device_width: 1 };
    let mut world = World::with_rules(machine, vec![model, model], rules);
    world.own_devices = true;
    let start = world.now;
    let task = || Task { way: vec![0, 1], ..Task::new(1, Lane::Batch, task_items) };
    let tasks: Vec<usize> = (0..100 / task_items).map(|_| world.submit(start, task())).collect();
    world.run_until(start + 60 * SECOND);
    tasks.iter().map(|task| world.ends[task].at - start).max().expect("there are some") as f64 / 1e6
}

#[test]
fn two_stages_overlap() {
    for task_items in [1, 100] {
        let [one, two] = [1, 2].map(|slots| through_two_stages(slots, task_items, Rules::default()));
        println!("100 items through two stages of 20 ms: {one:.2} s in one slot, {two:.2} s in two");
        assert!(one / two >= 1.8, "{one} {two}");
    }
}

#[cfg(feature = "sabotage")]
#[test]
#[should_panic(expected = "is free")]
fn the_referee_notices_stages_in_turn() {
    through_two_stages(2, 1, Rules::without(mesh_core::Rule::StagesOverlap));
}

#[test]
fn two_equal_clients_get_equal_shares() {
    let model = Model::packs(5 * MS, 5 * MS);
    let mut world = World::new(one_device(), vec![model]);
    let start = world.now;
    let tasks: Vec<usize> = (0..2).map(|client| world.submit(start, Task::new(client, Lane::Batch, 1000))).collect();
    world.run_until(start + 100 * SECOND);
    let at: Vec<f64> = tasks.iter().map(|task| (world.ends[task].at - start) as f64).collect();
    println!("two clients with 1000 items each: {:.2} s and {:.2} s", at[0] / 1e6, at[1] / 1e6);
    assert!((at[0] / at[1] - 1.0).abs() < 0.03, "{at:?}");
}

#[test]
fn idle_processors_share_the_rows_of_one_task_those_that_are_lent_too() {
    let last_batches = |slots: [u16; 2], lane| {
        let model = Model::packs(5 * MS, MS / 5);
        let mut world = World::new(Machine { slots, device_map: vec![-1], device_width: 1 }, vec![model]);
        let start = world.now;
        for round in 0..20 {
            world.submit(start + round * SECOND, Task::new(1, lane, 128));
        }
        world.run_until(start + 30 * SECOND);
        world.batches.iter().rev().take(4).map(|(_, _, rows)| *rows).collect::<Vec<u32>>()
    };
    assert_eq!(last_batches([4, 0], Lane::Realtime), [32; 4]);
    assert_eq!(last_batches([1, 3], Lane::Realtime), [32; 4]);
    assert_eq!(last_batches([2, 2], Lane::Batch), [64; 4], "realtime slots are not lent");
}
