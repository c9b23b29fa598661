//! Short stories of waiting tasks and those that must not overtake them. Owns what is expected of the scheduler there.

use proto_msgs::{
    Attempt, Digest, ErrorCode, LabelRule, Lane, ModelCost, Outcome, Packing, Queued, Slo, Standing, Submit,
};

use super::{
    super::{Config, Policy},
    MS, mesh,
    mesh::{MODEL, Mesh, client, cost, task, worker},
};
use crate::MonoTime;

/// Number of short tasks of a flood that go before one with a higher priority that may not be sent ahead.
fn gone_before(packs: bool, change: impl Fn(&mut Submit)) -> usize {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], 5_000);
    if packs {
        let curve = vec![(1, 5_000), (8, 6_000)];
        mesh.beat(0, |heartbeat| {
            heartbeat.costs =
                vec![ModelCost { packing: Packing::On, best_batch: 8, next_batch: 16, curve, ..cost(5_000) }];
        });
    }
    mesh.submit_all(0..300, 1, |submit| submit.spec.priority = 0);
    mesh.submit(100_000, 2, |submit| {
        submit.spec.priority = 100;
        change(submit);
    });
    let already = mesh.grants.len();
    for closed in 0..200 {
        mesh.wait(MS);
        mesh.close(mesh.grants[closed].id);
        mesh.submit(300 + closed as u32, 1, |submit| submit.spec.priority = 0);
        if let Some(at) = mesh.grants.iter().position(|grant| grant.id.task == task(100_000)) {
            return at - already;
        }
    }
    panic!("it starves");
}

#[test]
fn items_are_sent_ahead_until_their_worker_knows_whether_it_can_pack_them() {
    let granted = |packing, us| {
        let mut mesh = mesh();
        mesh.measured(0, [1, 1], us);
        mesh.beat(0, |heartbeat| heartbeat.costs = vec![ModelCost { packing, ..cost(us) }]);
        mesh.submit_all(0..20, 1, |_| {});
        mesh.grants.len()
    };
    assert_eq!(granted(Packing::Unknown, 300_000), 4, "two run, and two wait together");
    assert_eq!(granted(Packing::NoGain, 300_000), granted(Packing::Differs, 300_000));
    assert!(granted(Packing::NoGain, 300_000) < 4);
    assert_eq!(granted(Packing::Unknown, 3_000_000), 2, "too long a wait for what may come to nothing");

    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 300_000);
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![ModelCost { packing: Packing::Unknown, ..cost(300_000) }]);
    mesh.submit(100, 2, |submit| submit.spec.model.digest = Digest::from_bytes([9; 32]));
    mesh.submit_all(0..5, 1, |_| {});
    assert_eq!(mesh.grants.len(), 1, "nobody knows when the first one ends");
}

#[test]
fn a_time_is_told_only_if_the_waiting_tasks_were_measured_or_seen_to_start() {
    let mut mesh = Mesh::new(Config { queue_max: 40, ..Config::default() });
    mesh.register(0, [0, 1], |_| {});
    mesh.submit_all(0..42, 1, |submit| submit.spec.items = 64);
    let told = |mesh: &Mesh, number| match &mesh.ends[&task(number)] {
        (Outcome::Failed(failure), retry_ms) => (failure.text.clone(), *retry_ms),
        other => panic!("{other:?}"),
    };
    let (text, retry_ms) = told(&mesh, 41);
    assert!(text.ends_with("nobody has measured yet how long they need: try again in 1 s"), "{text}");
    assert_eq!((retry_ms, mesh.queued[&task(40)].starts_in_ms), (Some(1000), None));

    // One task starts every two seconds, so the forty need eighty seconds.
    for started in 0..10 {
        mesh.wait(2000 * MS);
        mesh.close(mesh.grants[started].id);
        mesh.submit(100 + started as u32, 1, |_| {});
    }
    mesh.wait(2000 * MS);
    mesh.submit(200, 1, |_| {});
    let (text, retry_ms) = told(&mesh, 200);
    assert!(text.ends_with("they need about 80 s: try again in 8 s"), "{text}");
    assert_eq!(retry_ms, Some(8000));
    mesh.says(task(30), Standing::Asking);
    let Queued { position, starts_in_ms, .. } = mesh.queued[&task(30)];
    assert_eq!((position, starts_in_ms), (19, Some(40_000)));

    // While nothing starts, the time grows.
    mesh.wait(60_000 * MS);
    mesh.submit(201, 1, |_| {});
    assert!(told(&mesh, 201).0.contains("they need about 320 s"), "{}", told(&mesh, 201).0);
}

#[test]
fn tasks_that_are_sent_ahead_do_not_keep_one_that_needs_a_free_slot_from_it() {
    let unmeasured = |submit: &mut Submit| submit.spec.model.digest = Digest::from_bytes([9; 32]);
    let batch = |submit: &mut Submit| submit.spec.lane = Some(Lane::Batch);
    for packs in [false, true] {
        assert!(gone_before(packs, unmeasured) <= 1);
        assert!(gone_before(packs, |submit| submit.spec.demands.cpu_millis = 1000) <= 1);
        let both = |submit: &mut Submit| (batch(submit), unmeasured(submit)).0;
        assert!(gone_before(packs, both) <= 1);
    }
}

/// Number of one-core tasks that a worker of four cores gets before a waiting task that needs all four.
fn gone_before_all_cores(of_newcomers: Lane) -> u32 {
    let mut mesh = mesh();
    mesh.register(0, [2, 4], |_| {});
    let one_core = |submit: &mut Submit| submit.spec.demands.cpu_millis = 1000;
    mesh.submit_all(0..3, 1, one_core);
    mesh.submit(100_000, 2, |submit| submit.spec.demands.cpu_millis = 4000);
    mesh.submit(100_001, 3, |_| {}).expect("one without demands goes on");
    for newcomer in 3..100 {
        mesh.wait(10_000 * MS);
        let first =
            mesh.grants.iter().map(|grant| grant.id).find(|id| id.task < task(100_000) && mesh.is_at_work(id.task));
        mesh.submit(newcomer, 1, |submit| (one_core(submit), submit.spec.lane = Some(of_newcomers)).1);
        mesh.close(first.expect("some are at work as long as the large one waits"));
        mesh.beat(0, |_| {});
        if mesh.is_at_work(task(100_000)) {
            return newcomer - 3;
        }
    }
    panic!("it starves");
}

#[test]
fn a_task_that_needs_all_cores_gets_them_though_tasks_of_one_core_keep_coming() {
    assert!(gone_before_all_cores(Lane::Realtime) <= 3);
    assert!(gone_before_all_cores(Lane::Batch) <= 3);
}

#[test]
fn nothing_is_kept_for_a_task_that_was_cancelled() {
    let mut mesh = mesh();
    mesh.register(0, [4, 4], |_| {});
    let one_core = |submit: &mut Submit| submit.spec.demands.cpu_millis = 1000;
    mesh.submit_all(0..2, 1, one_core);
    mesh.submit(100, 2, |submit| submit.spec.demands.cpu_millis = 4000);
    mesh.beat(0, |_| {});
    assert_eq!(mesh.submit(2, 1, one_core), None, "kept for the large one");
    mesh.cancel(100, 2);
    assert_eq!(mesh.submit(3, 1, one_core), Some(worker(0)));
}

#[test]
fn one_worker_is_kept_free_for_a_task_that_needs_all_its_cores_and_not_for_ever() {
    let mut mesh = mesh();
    let one_core = |submit: &mut Submit| submit.spec.demands.cpu_millis = 1000;
    (0..2).for_each(|number| mesh.register(number, [0, 4], |_| {}));
    mesh.submit_all(0..2, 1, one_core);
    mesh.submit(100, 2, |submit| submit.spec.demands.cpu_millis = 4000);
    (0..2).for_each(|number| mesh.beat(number, |_| {}));
    let other = mesh.submit(2, 1, one_core).expect("one of two workers goes on");
    assert_eq!(mesh.submit(3, 1, one_core), Some(other));
    assert_eq!(mesh.submit(4, 1, one_core), Some(other));
    assert_eq!(mesh.submit(5, 1, one_core), None);
    mesh.wait(300_000 * MS);
    (0..2).for_each(|number| mesh.beat(number, |_| {}));
    assert!(mesh.is_at_work(task(5)), "what the large one waits for takes too long");
}

#[test]
fn a_newcomer_keeps_its_share_though_a_late_task_of_another_client_went_early() {
    let rule = || vec![LabelRule { key: "room".to_owned(), value: "attic".to_owned(), required: true }];
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| register.labels = vec![("room".to_owned(), "attic".to_owned())]);
    mesh.beat(0, |heartbeat| (heartbeat.held, heartbeat.costs) = (vec![MODEL], vec![cost(1_000_000)]));
    mesh.register(1, [0, 1], |_| {});
    mesh.submit_all(0..100, 1, |submit| submit.spec.labels = rule());
    assert_eq!(mesh.submit(500, 1, |_| {}), Some(worker(1)), "behind a hundred, and nobody else's");
    mesh.submit_all(1000..1020, 2, |submit| submit.spec.labels = rule());
    let order = mesh.drain(1000 * MS);
    let newcomers = order[..50].iter().filter(|id| mesh.specs[*id].spec.client == client(2)).count();
    assert_eq!(newcomers, 20);
}

#[test]
fn a_new_task_is_placed_at_once_however_many_kinds_of_workers_there_are() {
    for kinds in [1, 32, 33, 64, 100] {
        let mut mesh = mesh();
        (0..kinds).for_each(|number| mesh.register(number, [1, 1], |register| register.cores += number));
        assert!(mesh.submit(0, 1, |_| {}).is_some(), "{kinds} kinds");
    }
}

#[test]
fn a_heartbeat_passes_over_thousands_of_tasks_that_are_not_for_its_worker() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| register.memory_bytes = 1 << 30);
    mesh.register(1, [0, 1], |_| {});
    let large = |submit: &mut Submit| submit.spec.demands.memory_bytes = 2 << 30;
    mesh.submit(0, 1, large);
    mesh.submit(1, 1, |_| {});
    mesh.submit_all(2..5000, 1, large);
    mesh.submit(5000, 1, |_| {});
    mesh.close(mesh.grants[1].id);
    let looked = mesh.broker.counters().waiting_looked;
    let beats = (0..100).take_while(|_| (mesh.beat(0, |_| {}), mesh.grants.len() < 3).1).count();
    assert_eq!(mesh.grants[2].id.task, task(5000));
    assert!(beats < 30, "{beats} heartbeats");
    let looked = mesh.broker.counters().waiting_looked - looked;
    assert!(looked < 10, "{looked} tasks were looked at");
}

#[test]
fn who_goes_round_gets_past_workers_that_are_full() {
    let mut mesh = Mesh::new(Config { policy: Policy::RoundRobin, ..Config::default() });
    (0..100).for_each(|number| mesh.register(number, [0, 1], |_| {}));
    mesh.submit_all(0..100, 1, |_| {});
    let there = mesh.grants.iter().find(|grant| grant.worker == worker(90)).expect("each has one").id;
    mesh.close(there);
    let found = (100..110).find_map(|number| mesh.submit(number, 1, |_| {}));
    assert_eq!(found, Some(worker(90)));
}

#[test]
fn who_goes_round_passes_nobody_with_room_however_busy() {
    let mut mesh = Mesh::new(Config { policy: Policy::RoundRobin, ..Config::default() });
    (0..2).for_each(|number| mesh.measured(number, [0, 4], 10_000));
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)), "and it does not end");
    for number in 1..4 {
        let next = worker(number % 2);
        assert_eq!(mesh.submit(number, 1, |_| {}), Some(next));
        if next == worker(1) {
            mesh.close(mesh.grants[number as usize].id);
        }
    }
}

#[test]
fn a_client_at_work_is_not_refused_by_a_broker_that_has_just_started() {
    let holding = || Standing::Holding { attempt: Attempt(1), worker: worker(0) };
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 60_000_000);
    mesh.submit(0, 1, |submit| (submit.spec.deadline_ms, submit.standing) = (Some(3000), holding()));
    mesh.submit(1, 1, |submit| (submit.spec.demands.gpu_memory_bytes, submit.standing) = (1, holding()));
    assert_eq!((mesh.code(0), mesh.code(1)), (None, None));
    mesh.submit(2, 1, |submit| submit.spec.deadline_ms = Some(3000));
    assert_eq!(mesh.code(2), Some(ErrorCode::DeadlineUnmeetable));
}

#[test]
fn clients_that_say_that_they_are_at_work_are_bounded_too() {
    let mut mesh = Mesh::new(Config { tasks_max: 10, ..Config::default() });
    mesh.register(0, [0, 1], |_| {});
    let holding = || Standing::Holding { attempt: Attempt(1), worker: worker(0) };
    mesh.submit_all(0..30, 1, |submit| submit.standing = holding());
    assert_eq!(mesh.ends.len(), 10);
    assert_eq!(mesh.code(29), Some(ErrorCode::Busy));
}

#[test]
fn a_deadline_is_held_against_what_is_left_of_the_work_in_front() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 60_000_000);
    let short = Digest::from_bytes([8; 32]);
    mesh.beat(0, |heartbeat| {
        heartbeat.costs.push(ModelCost { model: short, ..cost(1_000_000) });
        heartbeat.held.push(short);
    });
    mesh.submit(0, 1, |_| {});
    let hurried = |submit: &mut Submit| (submit.spec.model.digest, submit.spec.deadline_ms) = (short, Some(10_000));
    mesh.submit(1, 2, hurried);
    assert_eq!(mesh.code(1), Some(ErrorCode::DeadlineUnmeetable));
    mesh.wait(59_000 * MS);
    mesh.submit(2, 2, hurried);
    assert_eq!(mesh.code(2), None);
}

#[test]
fn a_worker_goes_on_where_it_was_though_it_was_full_in_between() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| register.memory_bytes = 1 << 30);
    mesh.register(1, [0, 1], |_| {});
    for number in 0..400 {
        mesh.submit(number, 100 + number, |submit| {
            (submit.spec.priority, submit.spec.demands.memory_bytes) = (100, 2 << 30);
        });
    }
    mesh.submit_all(1000..1010, 2, |_| {});
    let here = |mesh: &Mesh| mesh.grants.iter().filter(|grant| grant.worker == worker(0)).cloned().collect::<Vec<_>>();
    let mut events = 0;
    while here(&mesh).len() < 10 {
        match here(&mesh).last() {
            Some(grant) if mesh.broker.gauges().placed == 2 => mesh.close(grant.id),
            _ => mesh.beat(0, |_| {}),
        }
        events += 1;
        assert!(events < 100, "{} of ten", here(&mesh).len());
    }
    assert!(events <= 30, "{events}");
}

#[test]
fn a_worker_that_had_no_room_has_not_broken_its_promise_and_a_stream_that_is_over_is_not_on_trial() {
    let promise = Slo { latency_ms: 10, max_violation_permille: 10 };
    let violating = |code: ErrorCode| {
        let mut mesh = mesh();
        mesh.measured(0, [4, 4], 1000);
        for number in 0..10 {
            mesh.submit(number, 1, |submit| submit.spec.slo = Some(promise));
            let grant = mesh.grants[mesh.grants.len() - 1].clone();
            mesh.lost(&grant, code);
            mesh.close(grant.id);
        }
        let now = mesh.broker.gauges().slo_violating;
        mesh.wait(1_800_000 * MS);
        (now, mesh.broker.gauges().slo_probing)
    };
    assert_eq!(violating(ErrorCode::Busy), (0, 0));
    assert_eq!(violating(ErrorCode::EngineUnavailable), (1, 0));
}

#[test]
fn a_task_in_the_middle_of_a_long_queue_is_told_how_many_are_before_it() {
    let mut mesh = mesh();
    mesh.submit_all(0..1200, 1, |_| {});
    assert!([0, 300, 600, 900, 1199].into_iter().all(|number| mesh.tasks_before(number) == Some(number)));
    mesh.cancel(100, 1);
    assert_eq!(mesh.tasks_before(600), Some(599));
}

#[test]
fn a_deadline_is_held_against_all_that_is_before_the_task_in_a_long_queue() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 100_000);
    // Each task has a client of its own, so only priorities decide.
    for number in 0..600 {
        mesh.submit(number, 10_000 + number, |submit| submit.spec.priority = 100);
        mesh.submit(1000 + number, 20_000 + number, |submit| submit.spec.priority = 0);
    }
    let in_between = |deadline_ms| move |submit: &mut Submit| submit.spec.deadline_ms = Some(deadline_ms);
    mesh.submit(5000, 1, in_between(40_000));
    assert_eq!(mesh.code(5000), Some(ErrorCode::DeadlineUnmeetable), "those before it take a minute");
    let told = format!("{:?}", mesh.ends[&task(5000)]);
    assert!(told.contains("60.200 s at best (59.900 s sooner without the tasks before it)"), "{told}");
    mesh.submit(5001, 1, in_between(80_000));
    assert_eq!(mesh.code(5001), None);
}

#[test]
fn what_is_refused_is_counted_once_by_its_reason_and_what_was_taken_and_fails_is_no_refusal() {
    let gpu = |submit: &mut Submit| submit.spec.demands.gpu_memory_bytes = 1 << 30;
    let mut mesh = Mesh::new(Config { workers_max: 1, ..Config::default() });
    mesh.now = MonoTime::from_micros(1);
    (0..2).for_each(|number| mesh.register(number, [0, 1], |_| {}));
    mesh.submit(0, 1, gpu);
    mesh.wait(10_000 * MS);
    assert_eq!(mesh.code(0), Some(ErrorCode::NoWorkerFits));
    let counters = mesh.broker.counters();
    assert_eq!((counters.submitted, counters.failed, counters.refused_unfit), (1, 1, 0), "it was taken and waited");
    assert_eq!(counters.workers_refused, 1);

    mesh.submit(1, 1, gpu);
    let counters = mesh.broker.counters();
    assert_eq!((counters.submitted, counters.failed, counters.refused_unfit), (1, 1, 1));
}

#[test]
fn who_waits_is_told_when_no_worker_that_is_connected_could_ever_run_it_and_why() {
    let batch = |submit: &mut Submit| submit.spec.lane = Some(Lane::Batch);
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit_all(0..2, 1, batch);
    let waits = |mesh: &mut Mesh| {
        mesh.says(task(1), Standing::Asking);
        let queued = &mesh.queued[&task(1)];
        (queued.no_worker_fits, queued.reason.clone())
    };
    assert_eq!(waits(&mut mesh), (false, "the one worker that fits has no room".to_owned()));

    mesh.register(0, [1, 0], |register| register.name = "attic".to_owned());
    let reason = "no connected worker can ever run it, so it waits for another: attic has no slots for the batch lane";
    assert_eq!(waits(&mut mesh), (true, reason.to_owned()));
    assert!(mesh.why(1, 1).summary.contains(reason), "{}", mesh.why(1, 1).summary);
    assert_eq!(mesh.code(1), None, "the worker may come back as it was");
    mesh.submit(2, 1, batch);
    assert_eq!(mesh.code(2), Some(ErrorCode::NoWorkerFits), "who comes now is refused");

    mesh.leave(0);
    assert_eq!(waits(&mut mesh), (false, "no worker is registered".to_owned()));
    mesh.register(0, [0, 1], |_| {});
    assert!(mesh.is_at_work(task(1)));
}

#[test]
fn who_waits_for_a_detached_tasks_result_is_told_what_the_task_waits_for() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit_all(0..2, 1, |submit| (submit.spec.lane, submit.spec.detached) = (Some(Lane::Batch), true));
    mesh.store();
    let told = |mesh: &mut Mesh| {
        mesh.queued.clear();
        mesh.fetch(1, 1);
        let queued = &mesh.queued[&task(1)];
        (queued.no_worker_fits, queued.reason.clone())
    };
    assert_eq!(told(&mut mesh), (false, "the one worker that fits has no room".to_owned()));
    mesh.register(0, [1, 0], |_| {});
    let (no_worker_fits, reason) = told(&mut mesh);
    assert!(no_worker_fits && reason.starts_with("no connected worker can ever run it"), "{reason}");
    mesh.queued.clear();
    mesh.fetch(0, 1);
    assert!(mesh.queued.is_empty(), "it is at work");
}

#[test]
fn nobody_is_told_that_no_worker_fits_before_all_had_time_to_come_to_a_new_broker() {
    let mut mesh = mesh();
    mesh.now = MonoTime::from_micros(1);
    mesh.register(0, [0, 1], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.demands.gpu_memory_bytes = 1 << 30);
    let queued = &mesh.queued[&task(0)];
    assert_eq!((queued.no_worker_fits, &*queued.reason), (false, "no worker that fits is registered"));
}
