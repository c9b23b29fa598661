//! Short stories about the scheduler. Owns what is expected of it; `mesh` owns how it is asked.

mod beside;
mod bounds;
mod claims;
mod deadlines;
mod fair;
mod faults;
mod finish;
mod gpus;
mod lives;
mod mesh;
mod outgrown;
mod promises;
mod savings;
mod share;
mod trials;
mod twins;
mod unforeseeable;
mod waiting;
mod weights;
mod why;

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{
    AttemptReport, AttemptState, Digest, ErrorCode, LabelRule, Lane, ModelCost, Packing, Question, Submit, TaskId,
};

use super::{Config, Event, Policy, Tenant};
use mesh::{MODEL, Mesh, client, cost, task, worker};

fn mesh() -> Mesh {
    Mesh::new(Config::default())
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn two_equal_clients_get_equal_parts_though_one_came_first_with_everything() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit_all(0..100, 1, |_| {});
    mesh.submit_all(100..150, 2, |_| {});
    let order = mesh.drain(1000 * MS);
    // Both clients wait until the second one has had its fifty tasks.
    let both = &order[1..100];
    let second = both.iter().filter(|id| mesh.specs[*id].spec.client == client(2)).count() as f64;
    let first = both.len() as f64 - second;
    let jain = (first + second).powi(2) / (2.0 * (first * first + second * second));
    assert!(jain >= 0.99, "{first} against {second}: {jain}");
}

#[test]
fn shares_hold_even_if_the_first_came_before_anybody_knew_what_a_task_costs() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit_all(0..100, 1, |_| {});
    mesh.beat(0, |heartbeat| (heartbeat.held, heartbeat.costs) = (vec![MODEL], vec![cost(1_000_000)]));
    mesh.submit_all(100..140, 2, |_| {});
    let order = mesh.drain(1000 * MS);
    let second = order[..80].iter().filter(|id| mesh.specs[*id].spec.client == client(2)).count();
    assert!((36..=40).contains(&second), "{second} of the first 80");
}

#[test]
fn a_tenant_with_a_double_share_gets_twice_as_much_while_both_wait() {
    let double = Tenant { share_milli: 2000, ..Tenant::default() };
    let mut mesh = Mesh::new(Config { tenants: BTreeMap::from([(client(2), double)]), ..Config::default() });
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit_all(0..100, 1, |_| {});
    mesh.submit_all(100..160, 2, |_| {});
    let order = mesh.drain(1000 * MS);
    let second = order[1..91].iter().filter(|id| mesh.specs[*id].spec.client == client(2)).count();
    assert!((57..=60).contains(&second), "{second} of 90");
}

#[test]
fn a_flood_of_the_highest_priority_delays_the_lowest_but_does_not_starve_it() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 1_000_000);
    let vip = |submit: &mut Submit| submit.spec.priority = 100;
    for number in 0..5 {
        mesh.submit(number, number, vip);
    }
    mesh.submit(1000, 999, |submit| submit.spec.priority = 0);
    let mut waited_s = 0;
    // For each task that ends, a new client brings one with a higher rank than the old task.
    while !mesh.grants.iter().any(|grant| grant.id.task == task(1000)) {
        let grant = mesh.grants[waited_s].clone();
        mesh.wait(1000 * MS);
        mesh.close(grant.id);
        waited_s += 1;
        let fresh = 4 + waited_s as u32;
        mesh.submit(fresh, fresh, vip);
        assert!(waited_s <= 110, "it starves");
    }
    assert!(waited_s >= 90, "{waited_s} s for a hundred points of priority");
}

#[test]
fn among_equals_the_first_to_come_goes_first_and_little_data_before_much() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit(0, 9, |_| {});
    mesh.submit(1, 1, |submit| submit.spec.input_bytes = 4 << 30);
    for number in 2..6 {
        mesh.submit(number, number, |_| {});
    }
    let order = mesh.drain(1000 * MS);
    assert_eq!(order, [0, 2, 3, 4, 5, 1].map(task));
}

#[test]
fn a_priority_above_the_tenants_cap_counts_as_the_cap() {
    let tenant_default = Tenant { priority_max: 60, ..Tenant::default() };
    let mut mesh = Mesh::new(Config { tenant_default, ..Config::default() });
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit(0, 1, |_| {});
    mesh.submit(1, 1, |submit| submit.spec.priority = 60);
    mesh.submit(2, 2, |submit| submit.spec.priority = 100);
    assert_eq!(mesh.why(2, 2).task.priority, 60);
    assert_eq!(mesh.drain(1000 * MS), [0, 1, 2].map(task));
}

#[test]
fn a_large_job_goes_to_the_batch_lane_and_leaves_realtime_slots_alone() {
    let mut mesh = mesh();
    mesh.register(0, [1, 1], |_| {});
    let large = |submit: &mut Submit| submit.spec.job_items = 65;
    assert!(mesh.submit(0, 1, large).is_some());
    assert!(mesh.submit(1, 1, large).is_none());
    assert!(mesh.submit(2, 2, |submit| submit.spec.job_items = 64).is_some());
    assert!(mesh.submit(3, 2, |_| {}).is_none());
    assert_eq!(mesh.broker.gauges().lane_queued, [1, 1]);
    // The batch slot goes back to its own lane, though realtime waits.
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.grants[2].id.task, task(1));
}

#[test]
fn where_both_lanes_share_one_slot_realtime_goes_first_and_batch_gets_a_tenth() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit_all(0..10, 1, |submit| submit.spec.lane = Some(Lane::Batch));
    mesh.submit_all(10..60, 2, |_| {});
    let order = mesh.drain(MS);
    let batch_among = |order: &[TaskId]| order.iter().filter(|id| **id < task(10)).count();
    assert_eq!(batch_among(&order[1..11]), 1);
    assert_eq!(batch_among(&order[1..51]), 5);
}

#[test]
fn the_worker_that_will_be_done_first_is_chosen_not_the_idlest() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 2], 100_000);
    mesh.measured(1, [0, 2], 1_000_000);
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(0)));
    let why = mesh.why(1, 1);
    let decision = why.decision.expect("it was placed");
    assert_eq!((decision.chosen, decision.policy.as_str()), (Some(worker(0)), "predicted"));
    assert_eq!(decision.candidates.len(), 2);
    assert_eq!(decision.candidates[0].prediction.run_us, 100_000);
    assert_eq!((why.predicted_ms, why.took_ms), (Some(100), None));
    mesh.wait(200 * MS);
    mesh.close(mesh.grants[1].id);
    assert_eq!(mesh.why(1, 1).took_ms, Some(200));
    assert_eq!(mesh.broker.gauges().prediction_error_permille, Some(500));
}

#[test]
fn a_task_waits_for_a_fast_worker_rather_than_begin_at_a_slow_one() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.measured(1, [0, 1], 60_000_000);
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |_| {}), None, "held back from the slow one");
    let reason = mesh.queued[&task(1)].reason.clone();
    assert!(reason.ends_with(" is busy, and still better for it than the workers with room"), "{reason}");
    mesh.beat(1, |_| {});
    assert_eq!(mesh.grants.len(), 1);
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.grants[1].worker, worker(0));
    // With a hundred seconds of work before the last task, the slow worker is done with it sooner.
    mesh.submit_all(2..102, 1, |_| {});
    assert!(mesh.grants.iter().any(|grant| grant.worker == worker(1)));
}

#[test]
fn each_policy_keeps_its_word() {
    let chosen = |policy: Policy| {
        let mut mesh = Mesh::new(Config { policy, ..Config::default() });
        (0..3).for_each(|number| mesh.measured(number, [0, 4], 10_000 * (number + 1)));
        mesh.wait(MS);
        mesh.beat(2, |_| {});
        (0..6).map(|number| mesh.submit(number, 1, |_| {}).expect("there is room")).collect::<Vec<_>>()
    };
    assert_eq!(chosen(Policy::Predicted)[..4], [worker(0); 4]);
    assert_eq!(chosen(Policy::LeastLoaded), [0, 1, 2, 0, 1, 2].map(worker));
    assert_eq!(chosen(Policy::RoundRobin), [0, 1, 2, 0, 1, 2].map(worker));
    assert_eq!(chosen(Policy::LatestHeartbeat)[..4], [worker(2); 4]);
    let random = chosen(Policy::Random);
    assert_eq!(random, chosen(Policy::Random));
    assert!(random.iter().any(|chosen| *chosen != random[0]), "{random:?}");
}

#[test]
fn a_deadline_that_cannot_be_met_is_refused_at_once_and_remembered() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    assert!(mesh.submit(0, 1, |submit| submit.spec.deadline_ms = Some(1)).is_some(), "nobody knows how long it takes");
    mesh.close(mesh.grants[0].id);
    mesh.beat(0, |heartbeat| (heartbeat.held, heartbeat.costs) = (vec![MODEL], vec![cost(2_000_000)]));
    assert!(mesh.submit(1, 1, |submit| submit.spec.deadline_ms = Some(2500)).is_some());
    mesh.submit(2, 1, |submit| submit.spec.deadline_ms = Some(2500));
    assert_eq!(mesh.code(2), Some(ErrorCode::DeadlineUnmeetable));
    let why = mesh.why(2, 1);
    assert!(why.summary.contains("4.000 s"), "{}", why.summary);
    assert!(!why.decision.expect("it was looked for a place").candidates.is_empty());
    assert_eq!(mesh.broker.counters().refused_deadline, 1);
}

#[test]
fn a_required_label_is_a_filter_and_a_preferred_one_decides_between_near_equals() {
    let rule = |value: &str, required| LabelRule { key: "room".to_owned(), value: value.to_owned(), required };
    let mut mesh = mesh();
    mesh.measured(0, [0, 4], 100_000);
    mesh.register(1, [0, 4], |register| register.labels = vec![("room".to_owned(), "attic".to_owned())]);
    mesh.beat(1, |heartbeat| (heartbeat.held, heartbeat.costs) = (vec![MODEL], vec![cost(104_000)]));
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |submit| submit.spec.labels = vec![rule("attic", true)]), Some(worker(1)));
    assert_eq!(mesh.submit(2, 1, |submit| submit.spec.labels = vec![rule("attic", false)]), Some(worker(1)));
    mesh.submit(3, 1, |submit| submit.spec.labels = vec![rule("cellar", true)]);
    assert_eq!(mesh.code(3), Some(ErrorCode::NoWorkerFits));
    assert!(mesh.why(3, 1).summary.contains("no label room=cellar"));
}

#[test]
fn a_worker_finds_its_task_however_many_that_are_not_for_it_wait_in_front() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| register.memory_bytes = 1 << 30);
    mesh.register(1, [0, 1], |_| {});
    mesh.submit_all(0..1, 1, |submit| submit.spec.demands.memory_bytes = 2 << 30);
    mesh.submit_all(1..2, 1, |_| {});
    mesh.submit_all(2..300, 1, |submit| submit.spec.demands.memory_bytes = 2 << 30);
    mesh.submit(300, 1, |_| {});
    assert_eq!(mesh.grants[1].worker, worker(0));
    mesh.close(mesh.grants[1].id);
    (0..10).for_each(|_| mesh.beat(0, |_| {}));
    assert_eq!(mesh.grants[2].id.task, task(300));
}

#[test]
fn a_full_lane_says_when_to_come_back_and_the_other_lane_is_open() {
    let mut mesh = Mesh::new(Config { queue_max: 10, ..Config::default() });
    mesh.measured(0, [1, 1], 60_000_000);
    let batch = |submit: &mut Submit| submit.spec.lane = Some(Lane::Batch);
    mesh.submit_all(0..12, 1, batch);
    assert_eq!(mesh.code(11), Some(ErrorCode::Busy));
    // Ten tasks of one minute each; the wait is a tenth of that.
    assert_eq!(mesh.ends[&task(11)].1, Some(60_000));
    assert!(mesh.submit(12, 1, |_| {}).is_some());
    assert_eq!(mesh.broker.counters().refused_busy, 1);
}

#[test]
fn short_tasks_are_sent_ahead_of_their_slot_and_those_with_demands_are_not() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 10_000);
    let placed = (0..20).filter(|number| mesh.submit(*number, 1, |_| {}).is_some()).count();
    assert_eq!(placed, 6, "fifty milliseconds of work in front of the last one");
    assert!(mesh.submit(20, 1, |submit| submit.spec.demands.cpu_millis = 100).is_none());
    let mut slow = self::mesh();
    slow.measured(0, [0, 1], 10_000_000);
    assert!(slow.submit(0, 1, |_| {}).is_some());
    assert!(slow.submit(1, 1, |_| {}).is_none());
}

/// Number of tasks of eight items that a worker gets whose best and next batch sizes are these.
fn placed_where_items_are_packed(best_batch: u16, next_batch: u16) -> usize {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 5_000);
    let curve = vec![(1, 5_000), (64, 20_000), (128, 25_000)];
    let packed = ModelCost { packing: Packing::On, best_batch, next_batch, curve, ..cost(0) };
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![packed]);
    (0..100).filter(|number| mesh.submit(*number, 1, |submit| submit.spec.items = 8).is_some()).count()
}

#[test]
fn where_items_are_packed_there_is_room_for_the_next_batches() {
    let placed = placed_where_items_are_packed(64, 64);
    assert!((16..=25).contains(&placed), "{placed} tasks of eight items where two batches of 64 may be");
}

#[test]
fn where_a_larger_batch_has_yet_to_be_tried_there_is_room_for_it_however_large() {
    let placed = placed_where_items_are_packed(64, 128);
    assert!((32..=41).contains(&placed), "{placed} tasks of eight items where four batches of 64 may be");
}

#[test]
fn what_a_task_takes_besides_its_run_is_learned_and_told() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 100);
    for number in 0..600 {
        mesh.submit(number, 1, |_| {});
        mesh.wait(MS * 2);
        mesh.close(mesh.grants[number as usize].id);
    }
    mesh.submit(600, 1, |_| {});
    let prediction = mesh.why(600, 1).decision.expect("it was placed").candidates[0].prediction;
    assert!((1800..=1900).contains(&prediction.handover_us), "{prediction:?}");
    assert_eq!(prediction.total_us(), prediction.handover_us + 100);
    let off = mesh.broker.gauges().prediction_error_permille.expect("there were some");
    assert!(off < 50, "{off} thousandths");
}

#[test]
fn a_task_that_the_store_could_not_take_may_come_again() {
    let mut mesh = mesh();
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    assert_eq!(mesh.code(0), None, "the store has it before it has a worker");
    mesh.handle(Event::StoreAway);
    mesh.submit(1, 1, |submit| submit.spec.detached = true);
    for number in [0, 1] {
        let again = mesh.ends[&task(number)].1;
        assert_eq!((mesh.code(number), again), (Some(ErrorCode::StoreAway), Some(1000)), "task {number}");
    }
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    assert_eq!(mesh.ends[&task(0)].1, Some(1000), "told again when it is asked again");
}

#[test]
fn models_are_told_a_page_at_a_time_in_order() {
    let mut mesh = mesh();
    for number in 0..7 {
        mesh.register(number, [0, 1], |_| {});
        let costs = (0..60).rev().map(|model| ModelCost { model: Digest::from_bytes([model; 32]), ..cost(1000) });
        let costs: Vec<ModelCost> = costs.collect();
        mesh.beat(number, |heartbeat| heartbeat.costs = costs);
    }
    let mut after = None;
    loop {
        let before = mesh.models.len();
        mesh.ask(1, Question::Models { after });
        if mesh.models.len() == before {
            break;
        }
        after = mesh.models.last().copied();
    }
    assert_eq!(mesh.models.len(), 7 * 60);
    assert!(mesh.models.is_sorted());
}

#[test]
fn a_heartbeat_that_names_what_is_at_work_keeps_its_place_until_it_is_over() {
    let mut mesh = mesh();
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |_| {});
    mesh.submit(1, 1, |_| {});
    let id = mesh.grants[0].id;
    let running = AttemptReport { id, state: AttemptState::Running };
    mesh.beat(0, |heartbeat| heartbeat.attempts = vec![running]);
    assert_eq!(mesh.grants.len(), 1);
    mesh.beat(0, |heartbeat| heartbeat.attempts.clear());
    assert_eq!(mesh.grants[1].id.task, task(1));
    mesh.submit(2, 1, |submit| submit.spec.lane = Some(Lane::Batch));
    assert_eq!(mesh.code(2), Some(ErrorCode::NoWorkerFits));
}
