//! Short stories of deadlines: which are refused at once, and that a refusal is sure. Owns what is expected of them.

use proto_msgs::{Demands, Digest, ErrorCode, Heartbeat, LabelRule, Lane, ModelCost, Outcome, Packing, Slo, Submit};

use super::{
    super::Event,
    MS, mesh,
    mesh::{MODEL, Mesh, cost, task, worker},
};

/// A change that sets a deadline.
fn within(ms: u64) -> impl Fn(&mut Submit) {
    move |submit| submit.spec.deadline_ms = Some(ms)
}

/// A worker that holds the model, takes this long to load it, and 10 ms to run it.
fn cold(mesh: &mut Mesh, number: u32, load_us: u32) {
    mesh.register(number, [1, 1], |_| {});
    mesh.beat(number, |heartbeat| {
        (heartbeat.held, heartbeat.costs) = (vec![MODEL], vec![ModelCost { load_us, ..cost(10_000) }]);
    });
}

fn ends(mesh: &mut Mesh, number: u32) {
    let grant = mesh.grants.iter().find(|grant| grant.id.task == task(number)).expect("it was placed");
    mesh.close(grant.id);
}

#[test]
fn a_model_that_must_be_loaded_is_loaded_for_tasks_that_cannot_wait_for_it() {
    let mut mesh = mesh();
    cold(&mut mesh, 0, 1_000_000);
    let loads = |number: u32, mesh: &mut Mesh| mesh.submit(number, 1, within(200)) == Some(worker(0));
    assert!(loads(0, &mut mesh), "the first one makes the worker load the model");
    ends(&mut mesh, 0);
    let placed = (1..100).filter(|number| (mesh.wait(100 * MS), loads(*number, &mut mesh)).1).count();
    assert_eq!(placed, 0, "for ten times the load the others are refused");
    assert_eq!(mesh.code(50), Some(ErrorCode::DeadlineUnmeetable));
    let why = mesh.why(50, 1).summary;
    assert!(why.contains("0.010 s once the model is loaded: submit it once without a deadline"), "{why}");
    mesh.wait(100 * MS);
    assert!(loads(100, &mut mesh), "one load may have failed");
    ends(&mut mesh, 100);
    mesh.beat(0, |heartbeat| heartbeat.warm = vec![MODEL]);
    for number in 101..200 {
        assert!(loads(number, &mut mesh), "loaded, it is in time");
        ends(&mut mesh, number);
    }
    assert_eq!(mesh.broker.counters().preloads, 2);
}

#[test]
fn a_model_is_loaded_where_its_tasks_will_be_in_time() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 500_000);
    cold(&mut mesh, 1, 2_000_000);
    assert_eq!(
        mesh.submit(0, 1, within(200)),
        Some(worker(1)),
        "the other one has it loaded, and is too slow for ever"
    );
}

#[test]
fn a_model_that_no_worker_has_is_not_loaded_ahead() {
    let mut mesh = mesh();
    cold(&mut mesh, 0, 1_000_000);
    mesh.beat(0, |heartbeat| heartbeat.held = Vec::new());
    assert_eq!(mesh.submit(0, 1, within(200)), None);
    assert_eq!(mesh.code(0), Some(ErrorCode::DeadlineUnmeetable));
    let why = mesh.why(0, 1).summary;
    assert!(why.contains("submit it once without a deadline"), "{why}");
    mesh.submit(1, 1, within(5));
    let why = mesh.why(1, 1).summary;
    assert!(!why.contains("without a deadline"), "no load is to blame: {why}");
}

/// A worker in the yard and one in the house, each with a task of 100 ms.
fn yard_and_house() -> Mesh {
    let mut mesh = mesh();
    for (number, place) in [(0, "yard"), (1, "house")] {
        mesh.register(number, [0, 1], |register| register.labels = vec![("at".to_owned(), place.to_owned())]);
        mesh.beat(number, |heartbeat| {
            (heartbeat.held, heartbeat.warm, heartbeat.costs) = (vec![MODEL], vec![MODEL], vec![cost(100_000)]);
        });
        assert!(mesh.submit(number, 9, |_| {}).is_some());
    }
    mesh
}

fn asks_for_cores(submit: &mut Submit) {
    submit.spec.demands.cpu_millis = 4000;
}

fn only_at(place: &str) -> impl Fn(&mut Submit) {
    move |submit| {
        submit.spec.labels = vec![LabelRule { key: "at".to_owned(), value: place.to_owned(), required: true }];
    }
}

#[test]
fn tasks_that_wait_for_another_worker_put_no_deadline_off() {
    let mut mesh = yard_and_house();
    mesh.submit_all(100..200, 1, only_at("house"));
    mesh.submit(300, 2, |submit| (only_at("yard")(submit), within(1000)(submit)).0);
    assert_eq!(mesh.code(300), None, "nobody waits for the yard");
}

#[test]
fn tasks_of_the_same_sort_in_front_do() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 100_000);
    mesh.submit_all(0..100, 1, asks_for_cores);
    mesh.submit(300, 1, |submit| (asks_for_cores(submit), within(5000)(submit)).0);
    assert_eq!(mesh.code(300), Some(ErrorCode::DeadlineUnmeetable));
    mesh.submit(301, 1, |submit| (asks_for_cores(submit), within(15_000)(submit)).0);
    assert_eq!(mesh.code(301), None);
}

#[test]
fn tasks_that_nobody_has_measured_put_no_deadline_off() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 100_000);
    mesh.submit_all(0..1, 1, |_| {});
    mesh.submit_all(1..100, 1, |submit| submit.spec.model.digest = Digest::from_bytes([9; 32]));
    mesh.submit(300, 1, within(2000));
    assert_eq!(mesh.code(300), None);
}

#[test]
fn a_busy_quick_worker_does_not_hide_an_idle_one_that_is_in_time() {
    let mut mesh = yard_and_house();
    // They wait for the quick worker in the yard.
    mesh.submit_all(100..200, 1, only_at("yard"));
    mesh.measured(2, [0, 1], 400_000);
    mesh.submit(300, 2, within(500));
    assert_eq!(mesh.code(300), None);
}

#[test]
fn a_worker_that_never_ran_the_model_may_be_in_time() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 10_000_000);
    mesh.submit(0, 2, within(5000));
    assert_eq!(mesh.code(0), Some(ErrorCode::DeadlineUnmeetable));
    mesh.register(1, [0, 1], |_| {});
    mesh.beat(1, |_| {});
    assert_eq!(mesh.submit(1, 2, within(5000)), Some(worker(1)), "the other one is too slow");
    mesh.submit(2, 2, within(5000));
    assert_eq!(mesh.code(2), Some(ErrorCode::DeadlineUnmeetable), "one task is enough to find out");
}

#[test]
fn a_worker_that_has_never_ended_the_model_in_time_is_asked_ever_less() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 10_000_000);
    mesh.register(1, [0, 1], |_| {});
    let mut tried = 0;
    for number in 0..600 {
        if mesh.submit(number, 2, within(400)).is_some() {
            let grant = mesh.grants.last().expect("it was placed").clone();
            mesh.beat(1, |heartbeat| heartbeat.held = vec![MODEL]);
            mesh.close_as(grant.id, Outcome::failed(ErrorCode::Expired, "its deadline passed"));
            tried += u32::from(grant.worker == worker(1));
        }
        mesh.wait(1000 * MS);
    }
    assert!((2..=15).contains(&tried), "{tried} times in ten minutes");
}

#[test]
fn a_worker_that_lacks_the_model_and_is_busy_for_a_moment_may_be_in_time() {
    let mut mesh = mesh();
    for (number, run_us) in [(0, 100_000_000), (1, 1_000_000)] {
        mesh.measured(number, [0, 1], run_us);
        assert!(mesh.submit(number, 1, |_| {}).is_some());
    }
    mesh.beat(1, |heartbeat| (heartbeat.held, heartbeat.warm) = (Vec::new(), Vec::new()));
    mesh.submit(2, 2, within(20_000));
    assert_eq!(mesh.code(2), None);
}

#[test]
fn the_slow_line_of_one_client_puts_nobody_elses_deadline_off() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 10_000);
    mesh.beat(0, |heartbeat| heartbeat.link_bytes_per_s = 1_000_000);
    let large = |submit: &mut Submit| submit.spec.input_bytes = 10_000_000;
    mesh.submit(0, 1, |submit| (large(submit), within(5000)(submit)).0);
    assert_eq!(mesh.code(0), None, "its line may be faster");
    mesh.submit(1, 1, |submit| (large(submit), within(15)(submit)).0);
    assert_eq!(mesh.code(1), Some(ErrorCode::DeadlineUnmeetable), "no line is so fast");
}

#[test]
fn tasks_that_wait_for_clients_that_have_left_put_no_deadline_off() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 100_000);
    mesh.submit_all(0..100, 1, |submit| (asks_for_cores(submit), submit.spec.detached = true).0);
    mesh.submit(300, 2, |submit| (asks_for_cores(submit), within(5000)(submit)).0);
    assert_eq!(mesh.code(300), None);
}

#[test]
fn a_task_that_makes_a_worker_load_its_model_breaks_no_promise_of_that_worker() {
    let mut mesh = mesh();
    cold(&mut mesh, 0, 1_000_000);
    let slo = Slo { latency_ms: 200, max_violation_permille: 50 };
    assert!(mesh.submit(0, 1, |submit| (within(300)(submit), submit.spec.slo = Some(slo)).0).is_some());
    mesh.wait(250 * MS);
    assert_eq!(mesh.broker.counters().slo_violations, 0);
}

#[test]
fn cores_that_others_were_promised_may_be_free_in_time() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 100_000);
    mesh.measured(1, [1, 1], 5_000_000);
    assert_eq!(mesh.submit(0, 1, asks_for_cores), Some(worker(0)));
    mesh.submit(1, 1, |submit| (asks_for_cores(submit), within(1000)(submit)).0);
    assert_eq!(mesh.code(1), None, "the quick one has a slot, and soon the cores");
}

#[test]
fn a_batch_of_the_bulk_that_runs_puts_no_deadline_off() {
    let mut mesh = mesh();
    let curve = vec![(1, 10_000), (64, 325_000)];
    mesh.measured(0, [2, 2], 10_000);
    mesh.register(0, [2, 2], |register| register.device_map = vec![0]);
    mesh.beat(0, |heartbeat| {
        heartbeat.costs = vec![ModelCost { packing: Packing::On, best_batch: 64, next_batch: 64, curve, ..cost(0) }];
    });
    mesh.submit_all(0..16, 1, |submit| (submit.spec.items, submit.spec.lane) = (8, Some(Lane::Batch)));
    mesh.wait(20 * MS);
    assert_eq!(mesh.submit(16, 2, within(50)), Some(worker(0)), "it may end at once, and the next one may be short");
    mesh.submit(17, 2, within(5));
    assert_eq!(mesh.code(17), Some(ErrorCode::DeadlineUnmeetable), "its own run takes longer");
}

#[test]
fn a_client_that_is_slow_to_take_results_puts_nobodys_deadline_off() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 10_000);
    for number in 0..50 {
        mesh.submit(number, 1, |_| {});
        mesh.wait(300 * MS);
        ends(&mut mesh, number);
    }
    assert_eq!(mesh.submit(100, 2, within(60)), Some(worker(0)));
}

#[test]
fn a_model_loaded_for_other_demands_must_be_loaded_again() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 10_000);
    mesh.beat(0, |heartbeat: &mut Heartbeat| heartbeat.costs[0].load_us = 1_000_000);
    let with =
        |cpu_millis| move |submit: &mut Submit| submit.spec.demands = Demands { cpu_millis, ..Demands::default() };
    let load_us = |mesh: &mut Mesh, number: u32, cpu_millis: u32| {
        assert!(mesh.submit(number, 1, with(cpu_millis)).is_some());
        ends(mesh, number);
        mesh.why(number, 1).decision.expect("it was placed").candidates[0].prediction.load_us
    };
    assert_eq!(load_us(&mut mesh, 0, 1000), 0, "nobody knows for what it was loaded");
    assert_eq!(load_us(&mut mesh, 1, 1000), 0);
    assert_eq!(load_us(&mut mesh, 2, 2000), 1_000_000);
    assert_eq!(load_us(&mut mesh, 3, 2000), 0);
    mesh.beat(0, |heartbeat| heartbeat.warm = Vec::new());
    assert_eq!(load_us(&mut mesh, 4, 2000), 1_000_000);
}

#[test]
fn what_was_loaded_for_other_demands_soon_serves_those_that_could_not_wait_for_it() {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 10_000);
    mesh.beat(0, |heartbeat| heartbeat.costs[0].load_us = 1_000_000);
    let with = |cpu_millis| move |submit: &mut Submit| submit.spec.demands.cpu_millis = cpu_millis;
    let hurried = |submit: &mut Submit| (with(2000)(submit), within(200)(submit)).0;
    assert!(mesh.submit(0, 1, with(1000)).is_some());
    ends(&mut mesh, 0);
    assert_eq!(mesh.submit(1, 1, hurried), Some(worker(0)), "it makes the worker load the model once more");
    mesh.wait(200 * MS);
    let id = mesh.grants[1].id;
    mesh.close_as(id, Outcome::failed(ErrorCode::Expired, "too late"));
    // The heartbeat says that the model is loaded, as before, and not for what.
    let refused = (2..100).take_while(|number| {
        mesh.beat(0, |_| {});
        mesh.wait(100 * MS);
        mesh.submit(*number, 1, hurried).is_none()
    });
    let refused = refused.count() as u32;
    assert!((8..50).contains(&refused), "{refused} were refused, and the load takes as long as ten of them");
    ends(&mut mesh, 2 + refused);
    for number in 200..300 {
        assert_eq!(mesh.submit(number, 1, hurried), Some(worker(0)), "loaded for it, it is in time");
        ends(&mut mesh, number);
    }
    assert_eq!(mesh.broker.counters().preloads, 2);
}

#[test]
fn a_promise_is_watched_after_a_restart_of_the_broker() {
    let mut mesh = mesh();
    let promised = |submit: &mut Submit| {
        submit.spec.detached = true;
        submit.spec.slo = Some(Slo { latency_ms: 50, max_violation_permille: 100 });
    };
    mesh.submit_all(0..1, 1, promised);
    mesh.store();
    let rows = mesh.rows.into_values().collect();
    let mut next = super::mesh();
    next.handle(Event::Restored(rows));
    next.measured(0, [1, 1], 10_000);
    next.specs = mesh.specs;
    next.says(task(0), proto_msgs::Standing::Asking);
    assert!(next.is_at_work(task(0)));
    next.beat(0, |heartbeat| {
        let id = proto_msgs::AttemptId { task: task(0), attempt: proto_msgs::Attempt(1) };
        let state = proto_msgs::AttemptState::Running;
        heartbeat.attempts = vec![proto_msgs::AttemptReport { id, state }];
    });
    next.wait(1000 * MS);
    assert_eq!(next.broker.counters().slo_violations, 1);
}

#[test]
fn a_deadline_is_not_held_against_a_flood_that_waiting_overtakes() {
    for (deadline_s, is_refused) in [(15, true), (26, false)] {
        let mut mesh = mesh();
        mesh.measured(0, [0, 1], 1_000_000);
        mesh.submit_all(0..400, 1, |submit| submit.spec.priority = 100);
        // Without a deadline it would end after 23 s.
        mesh.submit(400, 2, |submit| (submit.spec.priority, submit.spec.deadline_ms) = (0, Some(deadline_s * 1000)));
        assert_eq!(mesh.code(400).is_some(), is_refused, "{deadline_s} s");
    }
}
