//! Short stories of how tasks live and end, and of the effects of time on them. Owns what is expected of the broker
//! there.

use std::time::Duration;

use proto_msgs::{
    Attempt, AttemptReport, AttemptState, Direction, ErrorCode, Gpu, Outcome, Purpose, Register, Standing, Submit,
};

use super::{
    super::{Config, Event},
    mesh::{DAY, DONE, Mesh, task, worker},
};
use crate::MonoTime;

impl Mesh {
    /// Submits a detached task to the only worker, which ends it with a result.
    fn has_done(&mut self, number: u32) {
        self.submit(number, 1, |submit| submit.spec.detached = true);
        self.store();
        let id = self.grants.last().expect("there is room").id;
        assert_eq!(id.task, task(number));
        let over = AttemptReport { id, state: AttemptState::Finished(DONE) };
        self.beat(0, |heartbeat| heartbeat.attempts = vec![over]);
        self.store();
        self.beat(0, |heartbeat| heartbeat.attempts.clear());
    }
}

#[test]
fn however_many_others_end_a_detached_result_is_found() {
    let mut mesh = Mesh::new(Config { ended_max: 10, ..Config::default() });
    mesh.register(0, [1, 0], |_| {});
    mesh.has_done(0);
    for number in 1..50 {
        mesh.submit(number, 2, |_| {});
        mesh.close(mesh.grants[number as usize].id);
    }
    mesh.fetch(0, 1);
    let way = mesh.grants.last().expect("it was asked for");
    assert_eq!((way.id.task, way.ticket.body.purpose), (task(0), Purpose::Fetch));
}

#[test]
fn whoever_fetches_a_result_is_shown_the_two_directions_in_turn() {
    use Direction::{ClientDials, WorkerDials};
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.has_done(0);
    let mut failed = None;
    for expected in [ClientDials, WorkerDials, ClientDials, WorkerDials] {
        mesh.fetch_at(0, 1, &["tcp://10.0.0.9:1"], failed);
        failed = mesh.grants.last().map(|grant| grant.direction);
        assert_eq!(failed, Some(expected), "one that failed may work by now");
    }
}

#[test]
fn whoever_waits_for_a_result_is_shown_the_way_when_there_is_one() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.detached = true);
    mesh.store();
    let id = mesh.grants[0].id;
    mesh.fetch(0, 1);
    assert_eq!(mesh.grants.len(), 1, "there is no result yet");
    mesh.beat(0, |heartbeat| {
        heartbeat.attempts = vec![AttemptReport { id, state: AttemptState::Finished(DONE) }];
    });
    let purposes: Vec<Purpose> = mesh.grants.iter().map(|grant| grant.ticket.body.purpose).collect();
    assert_eq!(purposes, [Purpose::Run, Purpose::Fetch], "nobody has asked again");
}

#[test]
fn a_worker_that_is_gone_puts_off_no_deadline() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| (submit.spec.detached, submit.spec.deadline_ms) = (true, Some(60_000)));
    mesh.store();
    let grant = mesh.grants[0].clone();
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    mesh.leave(0);
    mesh.wait(Duration::from_secs(63));
    assert_eq!(mesh.code(0), Some(ErrorCode::Expired));
}

#[test]
fn a_client_that_has_found_its_worker_is_reminded_of_its_deadline_all_the_same() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.deadline_ms = Some(1000));
    let grant = mesh.grants[0].clone();
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    mesh.wait(Duration::from_secs(4));
    assert_eq!(mesh.code(0), Some(ErrorCode::Expired), "not only when the grant would have been taken back");
}

#[test]
fn room_that_was_kept_for_nobody_is_given_away_at_once() {
    let mut mesh = Mesh::exactly(Config { client_silence: DAY, client_quiet: DAY, ..Config::default() });
    mesh.register(0, [1, 0], |register| register.heartbeat_ms = 3000);
    mesh.submit(0, 1, |_| {});
    let grant = mesh.grants[0].clone();
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    mesh.submit(1, 1, |_| {});
    assert_eq!(mesh.grants.len(), 1, "the room is taken");
    mesh.wait(Config::default().grant_wait);
    assert_eq!(mesh.grants[1].id.task, task(1), "its worker has never named it");
}

#[test]
fn a_worker_that_seldom_speaks_is_given_time_to_name_what_it_has() {
    let mut mesh = Mesh::exactly(Config { client_silence: DAY, client_quiet: DAY, ..Config::default() });
    mesh.register(0, [1, 0], |register| register.heartbeat_ms = 30_000);
    mesh.submit(0, 1, |_| {});
    let grant = mesh.grants[0].clone();
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    mesh.submit(1, 1, |_| {});
    mesh.wait(Duration::from_secs(59));
    assert_eq!(mesh.grants.len(), 1, "one heartbeat may be lost");
    mesh.wait(Duration::from_secs(1));
    assert_eq!(mesh.grants[1].id.task, task(1), "it would have named it by now");
}

#[test]
fn what_a_worker_still_runs_when_it_is_back_takes_the_memory_that_it_was_promised() {
    let mut mesh = Mesh::new(Config::default());
    let large = |submit: &mut Submit| submit.spec.demands.memory_bytes = 3 << 30;
    let short = |register: &mut Register| register.heartbeat_ms = 1000;
    mesh.register(0, [0, 8], short);
    mesh.submit(0, 1, large);
    let grant = mesh.grants[0].clone();
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    let runs = AttemptReport { id: grant.id, state: AttemptState::Running };
    mesh.beat(0, |heartbeat| heartbeat.attempts = vec![runs]);
    mesh.submit(1, 1, large);
    mesh.wait(Duration::from_secs(10));
    assert_eq!(mesh.broker.gauges().workers, 0, "it is missed");
    mesh.register(0, [0, 8], short);
    assert_eq!(mesh.grants.len(), 1, "four GiB are there, and three of them are taken");
    mesh.close(grant.id);
    assert_eq!(mesh.grants[1].id.task, task(1));
}

#[test]
fn what_has_ended_takes_no_slot_even_if_nobody_wants_it_and_not_all_is_named() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |_| {});
    let grant = mesh.grants[0].clone();
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    let named = |state| vec![AttemptReport { id: grant.id, state }];
    mesh.beat(0, |heartbeat| heartbeat.attempts = named(AttemptState::Running));
    mesh.cancel(0, 1);
    mesh.submit(1, 1, |_| {});
    assert_eq!(mesh.grants.len(), 1, "it is still being stopped");
    let over = AttemptState::Finished(Outcome::Cancelled);
    mesh.beat(0, |heartbeat| (heartbeat.names_all, heartbeat.attempts) = (false, named(over)));
    assert_eq!(mesh.grants.last().map(|grant| grant.id.task), Some(task(1)));
}

/// A worker full of grants to client 1, which has tasks waiting as well and falls silent. Client 2 speaks on.
fn silent_with_much() -> Mesh {
    let mut mesh = Mesh::exactly(Config::default());
    mesh.measured(0, [0, 1], 10_000);
    mesh.submit_all(0..50, 1, |_| {});
    assert!(mesh.submit(50, 2, |_| {}).is_none(), "there is no room");
    for _ in 0..4 {
        mesh.wait(Duration::from_secs(1));
        mesh.says(task(50), Standing::Asking);
    }
    mesh.wait(Duration::from_secs(1));
    mesh
}

#[test]
fn who_does_not_take_up_what_he_is_granted_gets_no_more_until_he_speaks() {
    let mut mesh = silent_with_much();
    let quiet = mesh.grants.len();
    assert_eq!(mesh.grants[quiet - 1].id.task, task(50), "the other one, within five seconds");
    mesh.beat(0, |_| {});
    assert_eq!(mesh.grants.len(), quiet, "though there is room");
    assert!(mesh.why(3, 1).summary.contains("nothing has been heard"), "{}", mesh.why(3, 1).summary);
    mesh.says(task(3), Standing::Asking);
    assert_eq!(mesh.grants.last().map(|grant| grant.id.task), Some(task(3)), "it waits no longer than it was silent");
}

#[test]
fn who_was_silent_and_took_it_up_all_the_same_keeps_it() {
    let mut mesh = silent_with_much();
    let grant = mesh.grants[0].clone();
    assert!(!mesh.is_at_work(grant.id.task));
    mesh.says(grant.id.task, Standing::Holding { attempt: grant.id.attempt, worker: grant.worker });
    assert!(mesh.is_at_work(grant.id.task));
}

#[test]
fn nothing_is_kept_for_a_task_whose_client_is_silent() {
    let mut mesh = Mesh::exactly(Config::default());
    mesh.register(0, [4, 4], |_| {});
    let one_core = |submit: &mut Submit| submit.spec.demands.cpu_millis = 1000;
    mesh.submit_all(0..2, 1, one_core);
    let held = mesh.grants.clone();
    mesh.submit(100, 2, |submit| submit.spec.demands.cpu_millis = 4000);
    mesh.beat(0, |_| {});
    assert_eq!(mesh.submit(2, 1, one_core), None, "kept for the large one");
    for _ in 0..5 {
        mesh.wait(Duration::from_secs(1));
        held.iter().for_each(|grant| mesh.says(grant.id.task, Standing::Asking));
        mesh.says(task(2), Standing::Asking);
    }
    assert!(mesh.is_at_work(task(2)));
}

#[test]
fn a_task_that_was_cancelled_after_its_client_fell_silent_stays_cancelled_when_the_client_wakes() {
    let mut mesh = Mesh::exactly(Config::default());
    mesh.submit_all(0..2, 1, |_| {});
    mesh.wait(Duration::from_secs(60));
    mesh.cancel(0, 1);
    mesh.register(0, [1, 1], |_| {});
    mesh.says(task(0), Standing::Asking);
    mesh.says(task(1), Standing::Asking);
    assert_eq!(mesh.grants.iter().map(|grant| grant.id.task).collect::<Vec<_>>(), [task(1)]);
}

#[test]
fn a_detached_task_is_not_granted_again_before_the_store_has_it() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 1], |_| {});
    let outcome = Outcome::failed(ErrorCode::WorkerLost, "it was restarted");
    mesh.submit(0, 1, |submit| {
        submit.spec.detached = true;
        submit.standing = Standing::Lost { attempt: Attempt(1), worker: worker(7), outcome };
    });
    assert_eq!(mesh.grants.len(), 0, "it is not stored");
    mesh.store();
    assert_eq!(mesh.grants.len(), 1);
}

#[test]
fn what_failed_at_a_worker_before_a_restart_of_the_broker_ends_nothing_that_goes_elsewhere_by_now() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(1, [0, 1], |_| {});
    let outcome = Outcome::failed(ErrorCode::WorkerLost, "it was restarted");
    mesh.submit(0, 1, |submit| {
        submit.spec.detached = true;
        submit.standing = Standing::Lost { attempt: Attempt(1), worker: worker(7), outcome };
    });
    mesh.store();
    let id = mesh.grants[0].id;
    // The earlier broker had given it to another worker with the same number.
    mesh.register(0, [0, 0], |_| {});
    let state = AttemptState::Finished(Outcome::failed(ErrorCode::Unreachable, "no route to the client"));
    mesh.beat(0, |heartbeat| heartbeat.attempts = vec![AttemptReport { id, state }]);
    assert_eq!((mesh.is_at_work(task(0)), mesh.ends.len()), (true, 0));
    assert_eq!(mesh.submit(1, 2, |_| {}), None, "the only slot is promised");
}

#[test]
fn who_waits_for_the_last_worker_to_come_back_to_a_new_broker_is_not_turned_away() {
    let mut mesh = Mesh::new(Config::default());
    mesh.now = MonoTime::from_micros(1);
    mesh.register(0, [0, 1], |_| {});
    let gpu =
        |submit: &mut Submit| (submit.spec.demands.gpu_memory_bytes, submit.spec.deadline_ms) = (1 << 30, Some(60_000));
    mesh.submit_all(0..2, 1, gpu);
    mesh.wait(Duration::from_secs(2));
    mesh.register(1, [0, 1], |register| register.gpus = vec![Gpu { name: "G".to_owned(), memory_bytes: 2 << 30 }]);
    assert_eq!(mesh.grants[0].worker, worker(1));
    mesh.wait(Duration::from_secs(10));
    assert_eq!((mesh.code(0), mesh.code(1)), (None, None), "the second one waits");
}

#[test]
fn what_no_worker_can_do_is_said_once_all_had_time_to_come() {
    let mut mesh = Mesh::new(Config::default());
    mesh.now = MonoTime::from_micros(1);
    mesh.register(0, [0, 1], |_| {});
    mesh.submit(0, 1, |submit| submit.spec.demands.gpu_memory_bytes = 1 << 30);
    mesh.wait(Duration::from_secs(4));
    assert_eq!(mesh.code(0), None);
    mesh.wait(Duration::from_secs(2));
    assert_eq!(mesh.code(0), Some(ErrorCode::NoWorkerFits));
    mesh.submit(1, 1, |submit| submit.spec.demands.gpu_memory_bytes = 1 << 30);
    assert_eq!(mesh.code(1), Some(ErrorCode::NoWorkerFits), "from then on at once");
}

#[test]
fn a_detached_task_is_cancelled_once_the_store_has_it() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    for number in 0..2 {
        mesh.submit(number, 1, |submit| submit.spec.detached = true);
        mesh.store();
    }
    mesh.cancel(0, 1);
    assert_eq!(mesh.ends.get(&task(0)), None, "a restart would bring it back");
    assert_eq!(mesh.grants[1].id.task, task(1), "its place is free all the same");
    mesh.store();
    assert_eq!(mesh.ends[&task(0)].0, Outcome::Cancelled);
    mesh.handle(Event::StoreAway);
    mesh.cancel(1, 1);
    assert_eq!(mesh.code(1), Some(ErrorCode::StoreAway));
    mesh.handle(Event::StoreBack);
    mesh.store();
    mesh.cancel(1, 1);
    assert_eq!(mesh.ends[&task(1)].0, Outcome::Cancelled);
}

#[test]
fn words_alone_buy_no_room() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    let holding = Standing::Holding { attempt: Attempt(1), worker: worker(0) };
    mesh.submit(0, 1, |submit| submit.standing = holding.clone());
    assert_eq!(mesh.submit(1, 2, |_| {}), Some(worker(0)), "nobody has given the first one a place");
    mesh.submit(2, 1, |_| {});
    mesh.says(task(2), holding);
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.submit(3, 2, |_| {}), Some(worker(0)), "one that waits gets no further by saying that it does not");
}

#[test]
fn a_new_broker_keeps_room_for_those_who_were_at_work_before() {
    let mut mesh = Mesh::new(Config::default());
    mesh.now = MonoTime::from_micros(1);
    mesh.register(0, [1, 0], |_| {});
    let holding = Standing::Holding { attempt: Attempt(1), worker: worker(0) };
    mesh.submit(0, 1, |submit| submit.standing = holding);
    assert_eq!(mesh.submit(1, 2, |_| {}), None);
}

#[test]
fn a_new_broker_knows_of_every_task_that_the_store_has() {
    let mut mesh = Mesh::new(Config::default());
    for number in 0..3 {
        mesh.submit(number, 1, |submit| submit.spec.detached = true);
    }
    let mut next = Mesh::new(Config { tasks_max: 2, ..Config::default() });
    next.handle(Event::Restored(mesh.rows.into_values().collect()));
    (0..3).for_each(|number| next.fetch(number, 1));
    assert!(next.ends.is_empty(), "{:?}", next.ends);
}

#[test]
fn a_client_is_told_of_all_its_tasks_newest_first_and_of_no_others() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit_all(0..100, 1, |_| {});
    mesh.submit_all(100..103, 2, |_| {});
    mesh.close(mesh.grants[0].id);
    for (of, own) in [(1, 0..100), (2, 100..103), (3, 0..0)] {
        let told = mesh.tasks(of);
        assert!(told.into_iter().eq(own.rev().map(task)), "client {of}");
    }
}

#[test]
fn whoever_wants_to_be_dialled_still_does_after_a_restart_of_the_broker() {
    let mut mesh = Mesh::new(Config::default());
    mesh.submit(0, 1, |submit| {
        let endpoints = vec!["tcp://10.0.0.9:1".to_owned()];
        (submit.spec.detached, submit.spec.direction, submit.endpoints) =
            (true, Some(Direction::WorkerDials), endpoints);
    });
    mesh.store();
    let mut next = Mesh::new(Config::default());
    next.register(0, [1, 0], |_| {});
    next.handle(Event::Restored(mesh.rows.into_values().collect()));
    next.specs = mesh.specs;
    next.says(task(0), Standing::Asking);
    assert_eq!(next.grants[0].direction, Direction::WorkerDials);
}
