//! Short stories of peers that claim too much, or invent things. Owns what the broker believes and keeps of it.

use proto_msgs::{
    Attempt, AttemptId, AttemptReport, AttemptState, Digest, ErrorCode, ModelCost, Outcome, Slo, Standing, WorkerId,
};

use super::{
    super::{Config, Event},
    mesh::{DAY, DONE, Mesh, cost, task, worker},
};
use crate::{Census, Table};

/// A worker of a new kind comes with a model of its own, a client brings tasks of every sort, and both leave.
fn come_and_go(mesh: &mut Mesh, round: u32) {
    let (first, model) = (round * 10, Digest::from_bytes([round as u8 + 1; 32]));
    mesh.register(round, [1, 1], |register| register.memory_bytes = u64::from(round + 1) << 30);
    let costs = vec![ModelCost { model, ..cost(1_000_000) }];
    mesh.beat(round, |heartbeat| (heartbeat.held, heartbeat.costs) = (vec![model], costs));
    mesh.submit_all(first..first + 4, round, |submit| {
        submit.spec.model.digest = model;
        submit.spec.slo = Some(Slo { latency_ms: 500, max_violation_permille: 50 });
    });
    mesh.submit_all(first + 4..first + 8, round, |submit| submit.spec.detached = true);
    mesh.submit(first + 8, round, |submit| submit.spec.demands.memory_bytes = 1 << 50);
    mesh.submit(first + 9, round, |submit| submit.spec.deadline_ms = Some(60_000));
    mesh.store();
    mesh.cancel(first + 1, round);
    mesh.cancel(first + 5, round);
    while let Some(grant) = mesh.grants.pop() {
        if !mesh.specs[&grant.id.task].spec.detached {
            mesh.close(grant.id);
        }
    }
    mesh.leave(round);
}

#[test]
fn busy_days_leave_nothing_behind() {
    let mut mesh = Mesh::new(Config::default());
    (0..100).for_each(|round| come_and_go(&mut mesh, round));
    assert!(mesh.broker.tasks.live() > 200, "detached tasks wait for their workers");
    for _ in 0..3 {
        mesh.store();
        mesh.wait(DAY);
    }
    assert_eq!(tables(&mesh, |table| table.entries > table.at_rest), []);
    let of = |name| tables(&mesh, |table| table.name == name)[0].entries;
    assert_eq!([of("workers"), of("seats")], [0, 1], "there was one worker at a time");
}

/// The broker's tables of which this is true.
fn tables(mesh: &Mesh, is_it: impl Fn(&Table) -> bool) -> Vec<Table> {
    let mut tables = Vec::new();
    mesh.broker.census(&mut Census::new(&mut |table| tables.extend(is_it(&table).then_some(table))));
    tables
}

fn beyond_limits(mesh: &Mesh) -> Vec<Table> {
    tables(mesh, |table| table.entries > table.limit)
}

#[test]
fn an_end_that_found_no_place_in_a_heartbeat_is_waited_for() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    let running = AttemptReport { id: mesh.grants[0].id, state: AttemptState::Running };
    mesh.beat(0, |heartbeat| heartbeat.attempts = vec![running]);
    mesh.beat(0, |heartbeat| (heartbeat.attempts, heartbeat.names_all) = (Vec::new(), false));
    assert!(mesh.is_at_work(task(0)));
    mesh.beat(0, |heartbeat| heartbeat.names_all = true);
    assert!(!mesh.is_at_work(task(0)), "nothing was left out");
}

/// Grants the first of two workers a task; `says` is what its client says next.
fn at_work(says: impl Fn(&mut Mesh)) -> Mesh {
    let mut mesh = Mesh::new(Config::default());
    (0..2).for_each(|number| mesh.register(number, [1, 0], |_| {}));
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
    says(&mut mesh);
    mesh
}

fn blamed(mesh: &Mesh) -> Vec<WorkerId> {
    mesh.broker.tasks.get(task(0)).expect("it is known").doubts.avoid.clone()
}

#[test]
fn a_client_cannot_blame_a_worker_that_never_had_its_task() {
    let busy = |number| {
        let outcome = Outcome::failed(ErrorCode::Busy, "no room");
        Standing::Lost { attempt: Attempt(1), worker: worker(number), outcome }
    };
    assert_eq!(blamed(&at_work(|mesh| mesh.says(task(0), busy(0)))), [worker(0)]);
    assert_eq!(blamed(&at_work(|mesh| mesh.says(task(0), busy(1)))), []);
}

#[test]
fn a_task_remembers_only_so_many_workers_that_failed_it() {
    let mesh = at_work(|mesh| {
        for number in 2..200 {
            let attempt = Attempt(number);
            mesh.says(task(0), Standing::Holding { attempt, worker: worker(number) });
            let outcome = Outcome::failed(ErrorCode::Busy, "no room");
            mesh.says(task(0), Standing::Lost { attempt, worker: worker(number), outcome });
        }
    });
    let blamed = blamed(&mesh);
    assert!(blamed.len() <= 100 && blamed.contains(&worker(199)), "{blamed:?}");
}

#[test]
fn a_client_that_suspects_one_live_worker_after_the_other_fills_no_memory() {
    let mesh = at_work(|mesh| {
        for number in 2..50 {
            mesh.register(number, [1, 0], |_| {});
            let (attempt, worker) = (Attempt(number), worker(number));
            mesh.says(task(0), Standing::Holding { attempt, worker });
            let outcome = Outcome::failed(ErrorCode::WorkerLost, "it fell silent ".repeat(200));
            mesh.says(task(0), Standing::Lost { attempt, worker, outcome });
        }
    });
    assert_eq!(beyond_limits(&mesh), []);
}

#[test]
fn ever_new_clients_with_ever_new_models_and_promises_fill_no_memory() {
    let mut mesh = Mesh::new(Config::default());
    for number in 0..1100_u32 {
        let mut model = [0; 32];
        model[..4].copy_from_slice(&number.to_be_bytes());
        mesh.submit(number, number, |submit| {
            submit.spec.model.digest = Digest::from_bytes(model);
            submit.spec.slo = Some(Slo { latency_ms: 500, max_violation_permille: 50 });
        });
    }
    assert_eq!(beyond_limits(&mesh), []);
}

#[test]
fn of_many_ended_tasks_only_the_latest_are_remembered() {
    let mut mesh = Mesh::new(Config { ended_max: 10, ended_for_later_max: 20, ..Config::default() });
    for number in 0..100 {
        mesh.submit(number, 1, |submit| submit.spec.detached = number % 2 == 0);
        mesh.store();
        mesh.cancel(number, 1);
    }
    assert_eq!(beyond_limits(&mesh), []);
    assert_eq!(tables(&mesh, |table| table.name == "ended tasks")[0].entries, 30);
}

#[test]
fn of_many_workers_only_the_best_are_named_in_a_decision() {
    let mut mesh = Mesh::new(Config::default());
    (0..30).for_each(|number| mesh.register(number, [1, 1], |_| {}));
    assert!(mesh.submit(0, 1, |_| {}).is_some());
    assert_eq!(beyond_limits(&mesh), []);
    assert_eq!(tables(&mesh, |table| table.name == "workers rated for a task")[0].entries, 8);
}

#[test]
fn a_task_that_dies_with_its_worker_leaves_no_verdict_on_the_next_life_of_it() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.slo = Some(Slo { latency_ms: 500, max_violation_permille: 50 }));
    let grant = mesh.grants[0].clone();
    mesh.leave(0);
    mesh.lost(&grant, ErrorCode::WorkerLost);
    assert_eq!(beyond_limits(&mesh), []);
    assert_eq!(mesh.broker.counters().slo_violations, 1, "the promise was broken all the same");
}

#[test]
fn a_worker_that_invents_attempts_fills_no_memory() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    for beat in 0..100 {
        let invented = (beat * 256..).map(|number| AttemptId { task: task(number), attempt: Attempt(1) });
        let report = |id| AttemptReport { id, state: AttemptState::Running };
        let attempts = invented.take(256).map(report).collect();
        mesh.beat(0, |heartbeat| (heartbeat.attempts, heartbeat.names_all) = (attempts, false));
    }
    let booked = tables(&mesh, |table| table.name == "attempts booked at a worker")[0].entries;
    assert!((256..=1024).contains(&booked), "{booked}");
    assert_eq!(beyond_limits(&mesh), []);
    mesh.beat(0, |heartbeat| (heartbeat.attempts, heartbeat.names_all) = (Vec::new(), true));
    assert_eq!(mesh.submit(1_000_000, 1, |_| {}), Some(worker(0)), "it holds none of them");
}

/// A worker's report of one attempt.
fn report(number: u32, attempt: u32, state: AttemptState) -> Vec<AttemptReport> {
    let id = AttemptId { task: task(number), attempt: Attempt(attempt) };
    vec![AttemptReport { id, state }]
}

#[test]
fn a_worker_that_lost_a_task_cannot_end_it_with_an_attempt_that_it_was_never_given() {
    let mut mesh = Mesh::new(Config::default());
    (0..2).for_each(|number| mesh.register(number, [1, 0], |_| {}));
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    let first = mesh.grants[0].clone();
    assert_eq!(first.worker, worker(0));
    mesh.lost(&first, ErrorCode::WorkerLost);
    assert_eq!(mesh.grants[1].worker, worker(1));
    for attempt in [1, 2, 3, 99] {
        for state in [AttemptState::Running, AttemptState::Finished(DONE)] {
            mesh.beat(0, |heartbeat| heartbeat.attempts = report(0, attempt, state));
            let place = mesh.broker.tasks.get(task(0)).and_then(|task| task.place());
            assert_eq!(place.map(|at| at.worker), Some(worker(1)), "attempt {attempt}");
        }
    }
    mesh.beat(1, |heartbeat| heartbeat.attempts = report(0, 2, AttemptState::Finished(DONE)));
    assert!(!mesh.is_at_work(task(0)), "its own worker ends it");
}

#[test]
fn a_new_broker_believes_a_worker_that_has_a_later_attempt_than_the_store() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    let mut next = Mesh::new(Config::default());
    next.handle(Event::Restored(mesh.rows.into_values().collect()));
    next.register(1, [1, 0], |_| {});
    next.beat(1, |heartbeat| heartbeat.attempts = report(0, 2, AttemptState::Running));
    let place = next.broker.tasks.get(task(0)).and_then(|task| task.place());
    assert_eq!(place.map(|at| at.worker), Some(worker(1)));
}
