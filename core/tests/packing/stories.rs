//! Single cases, each told as a story.

use mesh_core::worker::{BatchKind, Equality};
use proto_msgs::{Dispatch, ErrorCode, Lane, Outcome};

use super::world::{Machine, Micros, Model, Task, World};

const MS: Micros = 1000;
const SECOND: Micros = 1_000_000;

fn one_gpu() -> Machine {
    Machine { slots: [1, 1], device_map: vec![0], device_width: 1 }
}

/// A world in which the model is known to pack up to 64 rows.
fn practised(machine: Machine, model: Model) -> World {
    let mut world = World::new(machine, vec![model]);
    let start = world.now;
    for round in 0..40 {
        world.submit(start + round * SECOND, Task::new(200, Lane::Realtime, 64));
    }
    world.run_until(start + 60 * SECOND);
    let (_, kind, rows) = world.batches.last().expect("many ran");
    assert!(kind.is_packed() && *rows == 64, "{kind:?} of {rows} rows");
    world.batches.clear();
    world
}

fn is_done(world: &World, task: usize) -> bool {
    matches!(world.ends[&task].outcome, Outcome::Done { .. })
}

#[test]
fn a_cancelled_task_leaves_its_batch_to_the_others() {
    let mut world = practised(one_gpu(), Model::packs(50 * MS, MS));
    let now = world.now;
    let first = world.submit(now, Task::new(1, Lane::Realtime, 4));
    let others: Vec<usize> =
        (2..6).map(|client| world.submit(now + MS, Task::new(client, Lane::Realtime, 4))).collect();
    // The second batch, of four tasks, runs from 54 to 120 ms.
    world.cancel(now + 80 * MS, others[0]);
    world.run_until(now + SECOND);
    assert!(is_done(&world, first));
    for other in &others[1..] {
        assert!(is_done(&world, *other));
        assert_eq!(world.ends[other].at, now + 54 * MS + 66 * MS, "the batch went on");
    }
}

#[test]
fn a_batch_that_nobody_wants_makes_room_at_once() {
    let mut world = practised(one_gpu(), Model::packs(50 * MS, MS));
    let now = world.now;
    let first = world.submit(now, Task::new(1, Lane::Realtime, 64));
    let second = world.submit(now + MS, Task::new(2, Lane::Realtime, 1));
    world.cancel(now + 10 * MS, first);
    world.run_until(now + SECOND);
    assert_eq!(world.ends[&second].at, now + 10 * MS + 51 * MS);
}

#[test]
fn a_deadline_ends_its_task_and_not_its_neighbours() {
    let mut world = practised(one_gpu(), Model::packs(50 * MS, MS));
    let now = world.now;
    world.submit(now, Task::new(1, Lane::Realtime, 64));
    let late = Task { deadline_us: Some(150 * MS), ..Task::new(2, Lane::Realtime, 8) };
    let late = world.submit(now + MS, late);
    let patient = world.submit(now + MS, Task::new(3, Lane::Realtime, 32));
    world.run_until(now + SECOND);
    let end = &world.ends[&late];
    assert!(matches!(&end.outcome, Outcome::Failed(failure) if failure.code == ErrorCode::Expired), "{end:?}");
    assert!(end.at <= now + 152 * MS, "at its deadline, not at the batch's end");
    assert!(is_done(&world, patient));
}

#[test]
fn the_batch_lane_keeps_its_tenth_however_much_realtime_there_is() {
    let mut world = practised(one_gpu(), Model::packs(5 * MS, 5 * MS));
    let now = world.now;
    let bulk = world.submit(now, Task::new(1, Lane::Batch, 1000));
    // More realtime work than the device can do in 20 s.
    for client in 2..100 {
        world.submit(now + MS, Task::new(client, Lane::Realtime, 64));
    }
    world.run_until(now + 20 * SECOND);
    let items = |lane| world.batches.iter().filter(|batch| batch.0 == lane).map(|batch| batch.2).sum::<u32>();
    let share = f64::from(items(Lane::Batch)) / f64::from(items(Lane::Batch) + items(Lane::Realtime));
    println!("the batch lane has {share:.3} of the device while realtime could take all of it");
    assert!((0.08..0.13).contains(&share), "{share}");
    assert!(!world.ends.contains_key(&bulk));
    // One batch at a time: no realtime task waits for two batches of the batch lane.
    let lanes: Vec<Lane> = world.batches.iter().map(|(lane, ..)| *lane).collect();
    assert!(lanes[1..].windows(2).all(|two| two != [Lane::Batch; 2]), "{lanes:?}");
}

#[test]
fn the_batch_lane_gets_the_slot_that_falls_free_while_its_own_are_lent() {
    let machine = Machine { slots: [1, 2], device_map: vec![-1], device_width: 1 };
    let mut world = World::new(machine, vec![Model::packs(200 * MS, 0), Model::packs(20 * SECOND, 0)]);
    let now = world.now;
    let [short, long, _] = [0, 1, 1].map(|model| {
        let task = Task { way: vec![model], ..Task::new(1, Lane::Realtime, 1) };
        world.submit(now, task)
    });
    let batch = world.submit(now + 10 * MS, Task::new(2, Lane::Batch, 1));
    world.run_until(now + SECOND);
    assert!(is_done(&world, short) && !world.ends.contains_key(&long));
    assert!(is_done(&world, batch));
}

#[test]
fn the_batch_lane_takes_smaller_batches_while_realtime_items_come() {
    let mut world = practised(one_gpu(), Model::packs(5 * MS, 5 * MS));
    // Long after the last realtime item.
    let now = world.now + 2 * SECOND;
    world.submit(now, Task::new(1, Lane::Batch, 1000));
    for round in 1..20 {
        world.submit(now + round * 137 * MS, Task::new(2, Lane::Realtime, 1));
    }
    world.run_until(now + 2 * SECOND);
    let of_batch_lane = world.batches.iter().filter(|(lane, ..)| *lane == Lane::Batch);
    let sizes: Vec<u32> = of_batch_lane.map(|(.., rows)| *rows).collect();
    assert_eq!(sizes[0], 64);
    assert!(sizes.len() > 4 && sizes[1..].iter().all(|rows| *rows == 32), "{sizes:?}");
}

#[test]
fn a_realtime_item_waits_for_the_batch_that_runs_and_for_no_other() {
    for slots in [[1, 1], [2, 2], [0, 2]] {
        let machine = Machine { slots, ..one_gpu() };
        let mut world = practised(machine, Model::packs(5 * MS, 5 * MS));
        let now = world.now;
        world.submit(now, Task::new(1, Lane::Batch, 2000));
        let one_by_one = (1..40).map(|round| now + round * 137 * MS);
        let items: Vec<usize> = one_by_one.map(|at| world.submit(at, Task::new(2, Lane::Realtime, 1))).collect();
        world.run_until(now + 8 * SECOND);
        let largest = world.batches.iter().filter(|(lane, ..)| *lane == Lane::Batch).map(|(.., rows)| *rows).max();
        let one_batch = 5 * MS + 5 * MS * u64::from(largest.expect("there is bulk"));
        for item in items {
            let waited = world.ends[&item].began.expect("it has run") - world.tasks[item].0;
            assert!(waited <= one_batch, "{slots:?}: {waited} µs behind batches of {one_batch}");
        }
    }
}

#[test]
fn a_low_priority_is_late_and_not_forgotten() {
    let mut world = practised(one_gpu(), Model::packs(5 * MS, 5 * MS));
    let now = world.now;
    world.submit(now, Task::new(250, Lane::Realtime, 64));
    let humble = world.submit(now + MS, Task { priority: 1, ..Task::new(200, Lane::Realtime, 1) });
    for client in 0..150 {
        world.submit(now + MS, Task { priority: 90, ..Task::new(client, Lane::Realtime, 32) });
    }
    world.run_until(now + 100 * SECOND);
    let waited = world.ends[&humble].at - now;
    // 150 × 32 items take 24 s. Every eighth batch is for the oldest item, whoever owns it.
    assert!((650 * MS..3 * SECOND).contains(&waited), "{waited}");
}

#[test]
fn stages_wait_for_each_other() {
    // The second model is ten times as slow: the first must not run far ahead.
    let fast = Model { many: Equality::Unsupported, ..Model::packs(10 * MS, 0) };
    let slow = Model { base_us: 100 * MS, ..fast };
    let machine = Machine { slots: [0, 2], device_map: vec![-1], device_width: 1 };
    let mut world = World::new(machine, vec![fast, slow]);
    let now = world.now;
    let task = |client| Task { way: vec![0, 1], ..Task::new(client, Lane::Batch, 1) };
    let tasks: Vec<usize> = (0..20).map(|client| world.submit(now, task(client))).collect();
    world.run_until(now + 60 * SECOND);
    // Two waiting rows, and those that the first batch brings: the eight items of a probe, which go on before its slot
    // is free.
    assert!(world.referee.most_between_stages <= 10, "{}", world.referee.most_between_stages);
    let last = tasks.iter().map(|task| world.ends[task].at - now).max().expect("there are some");
    // Both slots share 20 × 110 ms.
    assert!(last <= 1300 * MS, "{last}");
}

#[test]
fn a_stage_does_not_run_far_ahead_inside_one_task_either() {
    let fast = Model { many: Equality::Unsupported, ..Model::packs(10 * MS, 0) };
    let slow = Model { base_us: 100 * MS, ..fast };
    let machine = Machine { slots: [0, 2], device_map: vec![-1], device_width: 1 };
    let mut world = World::new(machine, vec![fast, slow]);
    let now = world.now;
    let task = world.submit(now, Task { way: vec![0, 1], ..Task::new(1, Lane::Batch, 200) });
    world.run_until(now + 60 * SECOND);
    assert!(world.referee.most_between_stages <= 8, "{}", world.referee.most_between_stages);
    let took = world.ends[&task].at - now;
    // Both slots share 200 × 110 ms.
    assert!(took <= 11_500 * MS, "{took}");
}

#[test]
fn a_size_that_fails_is_not_tried_for_ever_whoever_shares_the_batch() {
    for members in [1, 2, 4] {
        let model = Model { rows_max: 16, ..Model::packs(10 * MS, MS / 10) };
        let mut world = World::new(one_gpu(), vec![model]);
        let start = world.now;
        for round in 0..60 {
            for client in 0..members {
                world.submit(start + round * SECOND, Task::new(client, Lane::Realtime, 64 / u32::from(members)));
            }
        }
        world.run_until(start + 200 * SECOND);
        let packed = || world.batches.iter().filter(|(_, kind, _)| kind.is_packed());
        let failed = packed().filter(|(_, _, rows)| *rows > 16).count();
        assert!(failed <= 8, "{members} clients: {failed} of {} batches were too large", packed().count());
    }
}

#[test]
fn a_model_that_is_right_for_few_rows_only_is_never_trusted_with_more() {
    for right_to in [8, 20] {
        let model = Model { right_to, ..Model::packs(10 * MS, MS / 10) };
        let mut world = World::new(one_gpu(), vec![model]);
        let start = world.now;
        for round in 0..60 {
            world.submit(start + round * SECOND, Task::new(1, Lane::Realtime, 64));
        }
        world.run_until(start + 200 * SECOND);
        let of = |wanted: BatchKind| world.batches.iter().filter(move |(_, kind, _)| *kind == wanted);
        let wrong = of(BatchKind::Check).filter(|(_, _, rows)| *rows > right_to).count();
        assert_eq!(wrong, 1, "{:?}", world.batches);
        let packed: u32 = of(BatchKind::Packed).map(|(_, _, rows)| rows).sum();
        assert!(packed > 50 * 64, "{packed} rows of {} are packed in sizes that are right", 60 * 64);
    }
}

#[test]
fn a_model_that_passed_is_looked_at_now_and_then_and_never_packed_again_once_its_rows_mingle() {
    let mut world = World::new(one_gpu(), vec![Model::packs(10 * MS, MS / 10)]);
    let start = world.now;
    let mingles_from = start + 2050 * SECOND;
    world.mingles_from = Some(mingles_from);
    let tasks: Vec<usize> =
        (0..3500).map(|round| world.submit(start + round * SECOND, Task::new(1, Lane::Realtime, 64))).collect();
    world.run_until(mingles_from);
    let of = |world: &World, wanted: BatchKind| world.batches.iter().filter(|(_, kind, _)| *kind == wanted).count();
    assert_eq!(of(&world, BatchKind::Spot), 7 + 2, "the 8th, 16th, 32nd … 512th, then every 1000th");
    world.run_until(start + 5000 * SECOND);
    assert_eq!(of(&world, BatchKind::Spot), 7 + 3);
    let found = world.batches.iter().rposition(|(_, kind, _)| *kind == BatchKind::Spot).expect("it was found out");
    assert!(world.batches[found + 1..].iter().all(|(_, kind, _)| *kind == BatchKind::Whole), "no row in company");
    // The batch that showed it ran again one by one: its client has the answers of single runs.
    let is_single = |task: &&usize| world.ends[*task].runs.iter().all(|run| run.batch_rows == 1);
    let rows: u32 = world.batches[found..].iter().map(|(_, _, rows)| rows).sum();
    assert_eq!(tasks.iter().skip(100).filter(is_single).count(), rows as usize / 64);
}

#[test]
fn items_of_another_length_have_a_verdict_and_a_curve_of_their_own() {
    let mut world = practised(one_gpu(), Model::packs(5 * MS, MS / 10));
    // Fifty frames in an item instead of four numbers: together they are wrong, and one takes 100 ms.
    world.by_length.insert(50, Model { many: Equality::Differs, ..Model::packs(100 * MS, 0) });
    let now = world.now;
    let long = Task { length: 50, ..Task::new(2, Lane::Realtime, 16) };
    let tasks = [world.submit(now, long), world.submit(now + 10 * SECOND, Task::new(1, Lane::Realtime, 64))];
    world.run_until(now + 20 * SECOND);
    assert!(tasks.iter().all(|task| is_done(&world, *task)));
    // The usual items still go all at once, in the time that they always took.
    assert_eq!(world.ends[&tasks[1]].at, now + 10 * SECOND + 5 * MS + 64 * MS / 10);
}

#[test]
fn an_attempt_that_is_open_cannot_become_another_one() {
    let model = Model::packs(10 * MS, MS / 10);
    let ticket = Task::new(1, Lane::Realtime, 4);
    let mut world = World::new(one_gpu(), vec![model, model]);
    assert_eq!(world.opens_again_as(&ticket, &ticket), None, "it may come back");
    let others_model = Task { way: vec![1], ..ticket.clone() };
    assert_eq!(world.opens_again_as(&ticket, &others_model), Some(ErrorCode::BadRequest));
    let more_items = Task { items: 1000, ..ticket.clone() };
    assert_eq!(world.opens_again_as(&ticket, &more_items), Some(ErrorCode::BadRequest));
}

/// A model with batches so long that waiting for more rows always pays.
const SLOW: Model = Model::packs(500 * MS, MS);

/// A world in which a client with one item comes back 60 ms after each answer, and the end of its last batch.
fn with_one_that_comes_back() -> (World, Micros) {
    let mut world = practised(one_gpu(), SLOW);
    for _ in 0..16 {
        let back = world.now + 60 * MS;
        world.submit(back, Task::new(1, Lane::Realtime, 1));
        world.run_until(back + SLOW.batch_us(1));
    }
    let back = world.now + 60 * MS;
    world.submit(back, Task::new(1, Lane::Realtime, 1));
    (world, back + SLOW.batch_us(1))
}

/// When a task began to run, with how many rows, and why at that time.
fn dispatched(world: &World, task: usize) -> (Micros, u32, Dispatch) {
    let end = &world.ends[&task];
    let note = end.runs.first().unwrap_or_else(|| panic!("{end:?}"));
    (end.began.expect("it has run"), note.batch_rows, note.dispatch)
}

#[test]
fn an_item_waits_for_company_at_most_a_hundred_milliseconds() {
    let (mut world, over) = with_one_that_comes_back();
    let came = over - 30 * MS;
    let other = world.submit(came, Task::new(2, Lane::Realtime, 1));
    let back = world.submit(over + 200 * MS, Task::new(1, Lane::Realtime, 1));
    world.run_until(over + 10 * SECOND);
    assert_eq!(dispatched(&world, other), (over + 100 * MS, 1, Dispatch::Waited), "before, it waits for the device");
    // The client that comes back late waits for the device, and no longer for the other one.
    let (began, rows, why) = dispatched(&world, back);
    assert_eq!((began, rows, why), (over + 100 * MS + SLOW.batch_us(1), 1, Dispatch::Idle));
}

#[test]
fn an_item_goes_as_soon_as_the_company_that_it_waited_for_is_there() {
    let (mut world, over) = with_one_that_comes_back();
    let other = world.submit(over - 30 * MS, Task::new(2, Lane::Realtime, 1));
    let back = world.submit(over + 50 * MS, Task::new(1, Lane::Realtime, 1));
    world.run_until(over + 10 * SECOND);
    assert_eq!(dispatched(&world, other), (over + 50 * MS, 2, Dispatch::Idle));
    assert_eq!(dispatched(&world, back), (over + 50 * MS, 2, Dispatch::Idle));
}

#[test]
fn a_deadline_cuts_the_wait_for_company_short() {
    let (mut world, over) = with_one_that_comes_back();
    let came = over - 30 * MS;
    // The wait is what remains after the run with a quarter and 5 ms to spare.
    let needs = SLOW.batch_us(1) * 5 / 4 + 5 * MS;
    let hurried = Task { deadline_us: Some(60 * MS + needs), ..Task::new(2, Lane::Realtime, 1) };
    let hurried = world.submit(came, hurried);
    world.run_until(over + 10 * SECOND);
    let (began, rows, why) = dispatched(&world, hurried);
    // Deadlines are rounded to milliseconds.
    assert!((came + 59 * MS..=came + 60 * MS).contains(&began), "{} µs after it came", began - came);
    assert_eq!((rows, why), (1, Dispatch::Deadline));
    assert!(is_done(&world, hurried));
}

#[test]
fn a_service_level_cuts_the_wait_for_company_short_while_it_can_be_met() {
    let needs = SLOW.batch_us(1) * 5 / 4 + 5 * MS;
    let dispatch_of = |slo_us: Micros| {
        let (mut world, over) = with_one_that_comes_back();
        let slo_ms = Some(u32::try_from(slo_us / MS).expect("a short time"));
        let item = world.submit(over - 30 * MS, Task { slo_ms, ..Task::new(2, Lane::Realtime, 1) });
        world.run_until(over + 10 * SECOND);
        let (began, _, why) = dispatched(&world, item);
        (began - (over - 30 * MS), why)
    };
    let (waited, why) = dispatch_of(needs + 60 * MS);
    assert!((59 * MS..=60 * MS).contains(&waited) && why == Dispatch::Deadline, "{waited} µs, {why:?}");
    let (waited, why) = dispatch_of(SLOW.batch_us(1));
    assert_eq!((waited, why), (130 * MS, Dispatch::Waited), "it is missed either way, and two rows cost less together");
}

#[test]
fn an_idle_device_takes_what_is_there_and_a_full_batch_at_once() {
    let mut world = practised(one_gpu(), SLOW);
    let now = world.now + 10 * SECOND;
    let alone = world.submit(now, Task::new(1, Lane::Realtime, 1));
    let full = world.submit(now + 10 * SECOND, Task::new(1, Lane::Realtime, 64));
    world.run_until(now + 20 * SECOND);
    assert_eq!(dispatched(&world, alone), (now, 1, Dispatch::Idle));
    assert_eq!(dispatched(&world, full), (now + 10 * SECOND, 64, Dispatch::Full));
}

#[test]
fn rows_run_together_only_in_numbers_that_save_a_fifth_whatever_the_curve() {
    let in_steps = |rows: u32| if rows == 1 { 1 } else { rows.div_ceil(4) * 3 };
    let curves: [(&str, Model, bool); 7] = [
        ("a line", Model::packs(0, 5 * MS), false),
        ("nearly a line", Model::packs(MS, 5 * MS), false),
        ("a dear start", Model::packs(5 * MS, 5 * MS), true),
        ("a very dear start", Model::packs(20 * MS, MS / 10), true),
        ("steps of four rows", Model { charged: in_steps, ..Model::packs(0, 5 * MS) }, true),
        (
            "a gain from eight rows on",
            Model { charged: |rows| if rows < 8 { rows } else { 5 + rows / 8 }, ..Model::packs(0, 5 * MS) },
            true,
        ),
        (
            "no gain beyond eight rows",
            Model { charged: |rows| rows.max(2) - rows.min(8) / 2, ..Model::packs(0, 5 * MS) },
            true,
        ),
    ];
    for (name, model, gains) in curves {
        let mut world = World::new(one_gpu(), vec![model]);
        let start = world.now;
        for round in 0..1000 {
            // All sizes up to 24, in a mixed order.
            world.submit(start + round * SECOND / 2, Task::new(1, Lane::Realtime, (round * 7 % 24) as u32 + 1));
        }
        world.run_until(start + 1000 * SECOND);
        let late = &world.batches[world.batches.len() / 2..];
        let packed: Vec<u32> = late.iter().filter(|(_, kind, _)| kind.is_packed()).map(|(.., rows)| *rows).collect();
        let is_dear = |rows: &&u32| model.batch_us(**rows) * 100 >= model.batch_us(1) * u64::from(**rows) * 80;
        let dear: Vec<u32> = packed.iter().filter(is_dear).copied().collect();
        println!("{name}: {} batches, {} packed, {} of them dear", late.len(), packed.len(), dear.len());
        // A few are tried again and again: times change.
        assert!(dear.len() * 50 < late.len(), "{name}: {} of {}: {dear:?}", dear.len(), late.len());
        let rows: u32 = packed.iter().sum();
        assert!(!gains || rows > 500 * 24 / 4, "{name}: {rows} rows ran together");
    }
}
