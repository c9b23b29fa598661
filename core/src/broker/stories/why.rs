//! Short stories of questions: what people are told of a task that waits, runs, has ended or was refused.

use proto_msgs::{
    ErrorCode, LabelRule, ModelCost, Outcome, Packing, RankView, Submit, TaskStanding, WhyView, WorkerId,
};

use super::{
    super::{Config, Event},
    MS, mesh,
    mesh::{MODEL, Mesh, cost, task, worker},
};

/// Two workers with the model: a fast one that packs it, and a slow one that may not pack it.
fn unlike_workers() -> Mesh {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 40_000);
    mesh.measured(1, [0, 1], 60_000);
    let curve = vec![(1, 40_000), (8, 80_000)];
    let packed = ModelCost { packing: Packing::On, best_batch: 8, curve, dispatched: [5, 0, 0, 2], ..cost(0) };
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![packed]);
    let differs = ModelCost { packing: Packing::Differs, ..cost(60_000) };
    mesh.beat(1, |heartbeat| heartbeat.costs = vec![differs]);
    mesh
}

#[test]
fn why_tells_whether_the_model_is_packed_at_each_worker_and_its_curve_where_the_task_went() {
    let mut mesh = unlike_workers();
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    let why = mesh.why(0, 1);
    let decision = why.decision.expect("it was placed");
    for candidates in [&decision.candidates, &why.candidates] {
        let told: Vec<_> = candidates.iter().map(|worker| (worker.worker, worker.packing, worker.best_batch)).collect();
        assert_eq!(told, [(worker(0), Packing::On, 8), (worker(1), Packing::Differs, 1)]);
    }
    let [model] = &why.models[..] else { panic!("one model at one worker: {:?}", why.models) };
    assert_eq!((model.worker, model.warm, model.cost.model), (worker(0), true, MODEL));
    assert_eq!((&model.cost.curve[..], model.cost.dispatched), (&[(1, 40_000), (8, 80_000)][..], [5, 0, 0, 2]));
}

#[test]
fn a_decision_for_a_worker_that_has_left_still_has_its_name() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| register.name = "pi-4".to_owned());
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    mesh.leave(0);
    let decision = mesh.why(0, 1).decision.expect("it was placed");
    assert_eq!(decision.candidates[0].name, "pi-4");
}

#[test]
fn why_shows_a_waiting_task_the_curve_of_the_worker_that_could_do_it_soonest() {
    let mut mesh = unlike_workers();
    mesh.submit_all(0..1000, 1, |submit| submit.spec.demands.cpu_millis = 1);
    let waiting = 999;
    let why = mesh.why(waiting, 1);
    assert!(why.decision.is_none() && why.task.worker.is_none(), "{why:?}");
    assert_eq!(why.models.iter().map(|model| model.worker).collect::<Vec<_>>(), [worker(0)]);
    // A worker that could never run the task says nothing.
    mesh.submit(2000, 1, |submit| submit.spec.demands.memory_bytes = 1 << 50);
    assert!(mesh.why(2000, 1).models.is_empty());
    // A worker that has not run the model says nothing.
    let mut fresh = self::mesh();
    fresh.register(0, [0, 1], |_| {});
    fresh.submit_all(0..2, 1, |submit| submit.spec.demands.cpu_millis = 1);
    fresh.wait(MS);
    assert!(fresh.why(1, 1).models.is_empty());
    assert_eq!(fresh.why(1, 1).candidates[0].packing, Packing::Unknown);
}

/// The present obstacles of each worker.
fn against(why: &WhyView) -> Vec<(WorkerId, Vec<&str>)> {
    why.candidates.iter().map(|row| (row.worker, row.against.iter().map(String::as_str).collect())).collect()
}

fn code(why: &WhyView) -> Option<ErrorCode> {
    match &why.task.standing {
        TaskStanding::Ended(Outcome::Failed(failure)) => Some(failure.code),
        _ => None,
    }
}

#[test]
fn why_names_the_filter_that_each_worker_failed_of_a_task_that_nobody_can_run() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| register.labels = vec![("room".to_owned(), "attic".to_owned())]);
    mesh.register(1, [0, 1], |register| register.memory_bytes = 1 << 30);
    mesh.submit(0, 1, |submit| {
        submit.spec.labels = vec![LabelRule { key: "room".to_owned(), value: "cellar".to_owned(), required: true }];
        submit.spec.demands.memory_bytes = 2 << 30;
    });
    let why = mesh.why(0, 1);
    assert_eq!(code(&why), Some(ErrorCode::NoWorkerFits));
    assert!(why.summary.starts_with("refused, NO_WORKER_FITS: none of 2 workers fits: "), "{}", why.summary);
    let no_label = "has no label room=cellar";
    let expected = [(worker(0), vec![no_label]), (worker(1), vec!["has 1024 MiB of memory", no_label])];
    assert_eq!(against(&why), expected);
}

#[test]
fn a_decision_tells_what_spoke_against_the_quicker_worker() {
    let mut mesh = mesh();
    (0..2).for_each(|number| mesh.measured(number, [0, 1], 40_000 + 1000 * number));
    let (key, value) = ("room".to_owned(), "attic".to_owned());
    mesh.register(1, [0, 1], |register| register.labels = vec![(key.clone(), value.clone())]);
    let prefers = |submit: &mut Submit| submit.spec.labels = vec![LabelRule { key, value, required: false }];
    assert_eq!(mesh.submit(0, 1, prefers), Some(worker(1)));
    let why = mesh.why(0, 1);
    let decision = why.decision.clone().expect("it was placed");
    let lacks = vec!["lacks the preferred label room=attic".to_owned()];
    let told: Vec<_> = decision.candidates.into_iter().map(|row| (row.worker, row.against)).collect();
    assert_eq!(told, [(worker(1), Vec::new()), (worker(0), lacks)]);
}

/// The text of the refusal of a task that asks for more cores than each of these workers has.
fn refused_by(cores: &[u32]) -> String {
    let mut mesh = mesh();
    for (number, cores) in (0..).zip(cores) {
        mesh.register(number, [0, 1], |register| {
            (register.name, register.cores) = (format!("w{number}"), *cores);
            // Each is a kind of its own.
            register.memory_bytes = u64::from(number + 1) << 30;
        });
    }
    mesh.submit(0, 1, |submit| submit.spec.demands.cpu_millis = 64_000);
    match &mesh.ends[&task(0)].0 {
        Outcome::Failed(failure) => failure.text.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_refusal_tells_each_reason_once_and_of_how_many_workers_it_is_true() {
    assert_eq!(refused_by(&[4]), "w0 has 4 cores");
    assert_eq!(refused_by(&[4, 8, 4, 4]), "none of 4 workers fits: w0 (and 2 more) has 4 cores; w1 has 8 cores");
    let text = refused_by(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1]);
    assert!(text.starts_with("none of 11 workers fits: w0 (and 1 more) has 1 cores; w1 has 2 cores; "), "{text}");
    assert!(text.ends_with("; w7 has 8 cores; 2 more for other reasons"), "{text}");
}

#[test]
fn why_tells_of_a_task_that_was_turned_away_until_it_comes_again_and_is_taken() {
    let mut mesh = Mesh::new(Config { queue_max: 1, ..Config::default() });
    mesh.measured(0, [0, 1], 60_000_000);
    mesh.submit_all(0..3, 1, |_| {});
    let why = mesh.why(2, 1);
    assert_eq!(code(&why), Some(ErrorCode::Busy));
    let expected = "refused, BUSY: as many tasks wait in the realtime lane as this broker takes; they need about 60 s: \
                    try again in 6 s";
    assert_eq!(why.summary, expected);
    assert_eq!(against(&why), [(worker(0), vec!["all 1 slots are in use"])]);

    // Only questions know of the refused task.
    assert!(!mesh.tasks(1).contains(&task(2)));
    mesh.close(mesh.grants[0].id);
    mesh.submit(2, 1, |_| {});
    assert_eq!(
        mesh.why(2, 1).task.standing,
        TaskStanding::Queued { position: 0, reason: "the one worker that fits has no room".to_owned() }
    );

    mesh.handle(Event::StoreAway);
    mesh.submit(3, 1, |submit| submit.spec.detached = true);
    assert_eq!(code(&mesh.why(3, 1)), Some(ErrorCode::Busy), "the queue is full as well");
    mesh.close(mesh.grants[1].id);
    mesh.submit(3, 1, |submit| submit.spec.detached = true);
    let why = mesh.why(3, 1);
    assert!(why.summary.starts_with("refused, STORE_AWAY: the store does not answer"), "{}", why.summary);

    // Once the accepted task is forgotten, the refusal before it does not come up again.
    mesh.close(mesh.grants[2].id);
    mesh.wait(2 * 3_600_000 * MS);
    assert!(mesh.asks_why(2, 1).is_none());
}

#[test]
fn a_flood_of_tasks_that_are_turned_away_is_remembered_only_in_part() {
    let mut mesh = Mesh::new(Config { queue_max: 0, ..Config::default() });
    mesh.submit_all(0..3000, 1, |_| {});
    mesh.submit_all(2999..6000, 1, |_| {});
    let remembered = |mesh: &mut Mesh, number| mesh.asks_why(number, 1).is_some();
    assert!(remembered(&mut mesh, 5999) && remembered(&mut mesh, 5000) && !remembered(&mut mesh, 4500));
}

#[test]
fn why_tells_what_a_task_waited_for_whose_deadline_passed_in_the_queue() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.submit(0, 1, |_| {});
    mesh.submit(1, 1, |submit| submit.spec.deadline_ms = Some(500));
    mesh.wait(600 * MS);
    mesh.close(mesh.grants[0].id);
    let why = mesh.why(1, 1);
    assert_eq!(code(&why), Some(ErrorCode::Expired));
    assert!(why.summary.starts_with("ended before it was placed, EXPIRED: "), "{}", why.summary);
    assert_eq!(why.history, ["in the queue when its deadline passed: the one worker that fits has no room"]);
    let decision = why.decision.as_ref().expect("as it was when the deadline passed");
    assert_eq!((decision.chosen, decision.candidates.len()), (None, 1));
    assert_eq!(decision.candidates[0].against, ["all 1 slots are in use"]);
    assert_eq!(against(&why), [(worker(0), vec![])], "by now there is room");
}

#[test]
fn why_shows_each_term_of_a_waiting_tasks_rank_with_its_sign() {
    let mut mesh = mesh();
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit(0, 9, |_| {});
    mesh.submit(1, 1, |submit| (submit.spec.priority, submit.spec.input_bytes) = (70, 3 << 20));
    mesh.submit(2, 1, |submit| (submit.spec.priority, submit.spec.input_bytes) = (0, 0));
    mesh.wait(5000 * MS);
    let rank = |mesh: &mut Mesh, number| mesh.why(number, 1).rank.expect("it waits");
    // One point for each step of priority, second of waiting and doubling of 1 + MiB; four for a second of share. The
    // second one waits for its client's first one, which does not count.
    let first = RankView { priority_milli: 70_000, waited_milli: 5_000, data_milli: -2_000, share_milli: 0 };
    assert_eq!(rank(&mut mesh, 1), first);
    let second = RankView { priority_milli: 0, waited_milli: 0, data_milli: 0, share_milli: -4_000 };
    assert_eq!(rank(&mut mesh, 2), second, "behind a second of its own client's work");
}
