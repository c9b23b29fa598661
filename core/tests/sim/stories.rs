//! Short stories, each about one fault. The referee watches these, too.

use std::time::Duration;

use proto_msgs::{Direction, ErrorCode, TaskId};

use super::{
    job::{Behaviour, Job},
    mesh::{Mesh, Node, Setup},
    story::Story,
    worker_shell::Place,
};

pub(super) const B: Node = Node::Broker;
pub(super) const W0: Node = Node::Worker(0);
pub(super) const W1: Node = Node::Worker(1);
pub(super) const C0: Node = Node::Client(0);

pub(super) const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(super) const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A calm mesh with these workers and one client `C0`, after all have registered.
pub(super) fn mesh(workers: &[Place]) -> Mesh {
    let mut mesh = Mesh::new(Setup::new(1), Story::told());
    for place in workers {
        mesh.add_worker(place.clone());
    }
    let user = mesh.add_user();
    mesh.add_client(user, true);
    mesh.run_for(s(1));
    mesh
}

impl Mesh {
    /// Plays on until the task has ended for every process that waits for it.
    #[track_caller]
    pub(super) fn until_over(&mut self, task: TaskId) {
        self.until("the task ends", s(120), |mesh| mesh.expect(task).is_over());
    }

    #[track_caller]
    pub(super) fn until(&mut self, what: &str, limit: Duration, done: impl FnMut(&Self) -> bool) {
        let came = self.run_until(limit, done);
        assert!(self.violation().is_none(), "{:?}\n{}", self.violation(), self.story.last_lines());
        assert!(came, "waited in vain until {what}\n{}", self.story.last_lines());
    }

    /// Ends the story: nothing may be left anywhere.
    #[track_caller]
    pub(super) fn end_well(mut self) {
        self.heal();
        self.settle(s(300));
        assert!(self.violation().is_none(), "{:?}\n{}", self.violation(), self.story.last_lines());
    }
}

fn two_workers() -> Mesh {
    mesh(&[Place::slots(1), Place::slots(1)])
}

/// A model whose transfer takes more than a second on each simulated link.
fn large() -> Job {
    Job::runs(s(1)).model(9, 800 << 20)
}

#[test]
fn a_task_runs_once_and_leaves_nothing_behind() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(2)));
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn the_worker_dies_before_the_client_has_reached_it() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(1)));
    mesh.until("the task is placed", s(2), |mesh| mesh.expect(task).placements() == 1);
    let chosen = mesh.expect(task).placed_at();
    mesh.crash(chosen);
    mesh.until_over(task);
    mesh.expect(task).done().ran_times(1);
    assert_ne!(mesh.expect(task).placed_at(), chosen);
    mesh.end_well();
}

#[test]
fn the_worker_dies_during_the_transfer() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, large());
    mesh.until("bytes are on their way", s(2), |mesh| mesh.is_receiving(task));
    mesh.crash(mesh.expect(task).placed_at());
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(2).ran_times(1);
    mesh.end_well();
}

#[test]
fn the_worker_dies_during_the_run() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(5)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.crash(mesh.expect(task).placed_at());
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(2).ran_times(2);
    mesh.end_well();
}

#[test]
fn the_worker_dies_while_its_result_is_on_the_way() {
    let mut mesh = two_workers();
    let mut job = Job::runs(s(1));
    job.output = 2_000_000;
    let task = mesh.submit(C0, job);
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.until("it has run", s(3), |mesh| !mesh.is_running(task));
    mesh.run_for(ms(700));
    mesh.crash(mesh.expect(task).placed_at());
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(2).ran_times(2);
    mesh.end_well();
}

#[test]
fn the_broker_dies_during_the_transfer_and_nobody_minds() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, large());
    mesh.until("bytes are on their way", s(2), |mesh| mesh.is_receiving(task));
    mesh.crash(B);
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    let late = mesh.submit(C0, Job::runs(ms(100)));
    mesh.run_for(s(5));
    mesh.expect(late).not_ended();
    mesh.restart(B);
    mesh.until_over(late);
    mesh.expect(late).done();
    mesh.end_well();
}

#[test]
fn a_restarted_broker_believes_the_client_that_holds_an_attempt() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(10)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.crash(B);
    mesh.run_for(ms(300));
    mesh.restart(B);
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_lost_grant_is_said_again() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(ms(100)));
    mesh.until("the task is placed", s(2), |mesh| mesh.expect(task).placements() == 1);
    // The answer is on its way, but its connection no longer exists.
    mesh.reconnect(C0);
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_worker_that_the_broker_cannot_hear_goes_on() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(8)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    let chosen = mesh.expect(task).placed_at();
    mesh.cut_off(chosen);
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.rejoin(chosen);
    mesh.end_well();
}

#[test]
fn a_zombie_wakes_up_and_its_result_does_not_count() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(4)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    let zombie = mesh.expect(task).placed_at();
    mesh.freeze(zombie, s(16));
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(2).ran_times(2);
    assert_ne!(mesh.expect(task).placed_at(), zombie);
    mesh.run_for(s(20));
    mesh.end_well();
}

#[test]
fn a_broker_that_stands_still_takes_nobody_for_silent() {
    for pause in [4, 20] {
        let mut mesh = two_workers();
        let runs = mesh.submit(C0, Job::runs(s(30)));
        mesh.until("it runs", s(3), |mesh| mesh.is_running(runs));
        let placed = mesh.submit(C0, Job::runs(s(30)));
        mesh.until("the task is placed", s(2), |mesh| mesh.expect(placed).placements() == 1);
        mesh.freeze(B, s(pause));
        for task in [runs, placed] {
            mesh.until_over(task);
            mesh.expect(task).done().placed_times(1).ran_times(1);
        }
        mesh.end_well();
    }
}

#[test]
fn a_host_that_is_moved_with_broker_and_worker_on_it_loses_nothing() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(12)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.freeze(B, s(7));
    mesh.freeze(W0, s(7));
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_client_that_stands_still_blames_no_worker_for_it() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(1)));
    mesh.until("the task is placed", s(2), |mesh| mesh.expect(task).placements() == 1);
    mesh.run_for(ms(3));
    mesh.freeze(C0, s(4));
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_broken_link_is_mended_and_the_transfer_goes_on() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, large());
    mesh.until("bytes are on their way", s(2), |mesh| mesh.is_receiving(task));
    mesh.run_for(s(1));
    mesh.break_links_of(C0);
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_worker_behind_nat_dials_the_client() {
    let mut mesh = mesh(&[Place { advertises: false, reachable: false, ..Place::slots(1) }]);
    let task = mesh.submit(C0, Job::runs(s(1)));
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_worker_that_does_not_know_of_its_nat_dials_in_the_end() {
    let mut mesh = mesh(&[Place { reachable: false, ..Place::slots(1) }]);
    mesh.referee.is_harmed = true;
    let task = mesh.submit(C0, Job::runs(s(1)));
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(2).ran_times(1);
    mesh.end_well();
}

#[test]
fn with_both_unreachable_the_user_is_told() {
    let mut mesh = mesh(&[Place { reachable: false, ..Place::slots(1) }]);
    mesh.referee.is_harmed = true;
    let user = mesh.add_user();
    let mute = mesh.add_client(user, false);
    let task = mesh.submit(mute, Job::runs(s(1)));
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::Unreachable).ran_times(0);
    let impossible = mesh.submit(mute, Job::runs(s(1)).direction(Direction::WorkerDials));
    mesh.until_over(impossible);
    mesh.expect(impossible).failed(ErrorCode::NoWorkerFits);
    mesh.end_well();
}

#[test]
fn a_killed_client_frees_its_slot() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let user = mesh.add_user();
    let other = mesh.add_client(user, true);
    let abandoned = mesh.submit(C0, Job::runs(s(11)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(abandoned));
    let waiting = mesh.submit(other, Job::runs(s(1)));
    mesh.run_for(s(1));
    mesh.crash(C0);
    // Five seconds of silence, and a heartbeat that reports it.
    mesh.until("the other one runs", s(8), |mesh| mesh.is_running(waiting));
    mesh.until_over(waiting);
    mesh.expect(waiting).done();
    mesh.end_well();
}

#[test]
fn a_client_with_many_tasks_that_dies_or_stands_still_lets_others_pass_within_seconds() {
    for dies in [true, false] {
        let mut mesh = mesh(&[Place::slots(1)]);
        let user = mesh.add_user();
        let other = mesh.add_client(user, true);
        let first = mesh.submit(C0, Job::runs(ms(20)));
        mesh.until_over(first);
        let many: Vec<TaskId> = (0..100).map(|_| mesh.submit(C0, Job::runs(ms(20)))).collect();
        mesh.run_for(ms(500));
        if dies {
            mesh.crash(C0);
        } else {
            mesh.freeze(C0, s(10));
        }
        let waiting = mesh.submit(other, Job::runs(ms(20)));
        mesh.until("the other one is done", s(6), |mesh| mesh.expect(waiting).is_over());
        mesh.expect(waiting).done();
        if !dies {
            many.iter().for_each(|task| mesh.until_over(*task));
            many.iter().for_each(|task| _ = mesh.expect(*task).done());
        }
        mesh.end_well();
    }
}

#[test]
fn a_cancelled_task_stops_at_its_worker() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(10)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.cancel(task);
    mesh.expect(task).cancelled();
    mesh.until("the worker has stopped it", ms(200), |mesh| !mesh.is_running(task));
    let elsewhere = mesh.submit(C0, Job::runs(s(10)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(elsewhere));
    mesh.cancel_elsewhere(elsewhere);
    mesh.until("the worker has stopped it", ms(200), |mesh| !mesh.is_running(elsewhere));
    mesh.until_over(elsewhere);
    mesh.expect(elsewhere).cancelled();
    mesh.end_well();
}

#[test]
fn a_detached_task_survives_broker_worker_and_client() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(6)).detached());
    mesh.until_over(task);
    mesh.expect(task).done();
    mesh.crash(C0);
    mesh.crash(B);
    mesh.crash(W0);
    mesh.run_for(s(1));
    mesh.restart(B);
    mesh.restart(W0);
    let later = mesh.add_client(0, false);
    mesh.fetch(later, task);
    mesh.until_over(task);
    mesh.expect(task).done().placed_times(1).ran_at(W0);
    mesh.end_well();
}

#[test]
fn a_detached_task_is_refused_while_the_store_is_away() {
    let mut mesh = two_workers();
    mesh.store_away(true);
    mesh.referee.is_harmed = true;
    mesh.run_for(s(1));
    let (detached, attached) = (mesh.submit(C0, Job::runs(s(1)).detached()), mesh.submit(C0, Job::runs(s(1))));
    mesh.until_over(detached);
    mesh.expect(detached).failed(ErrorCode::StoreAway);
    mesh.until_over(attached);
    mesh.expect(attached).done();
    mesh.end_well();
}

#[test]
fn of_those_that_wait_the_important_one_goes_first() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let first = mesh.submit(C0, Job::runs(s(2)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(first));
    let jobs = [(20, "low"), (80, "high"), (50, "middle"), (80, "high, later")];
    let tasks = jobs.map(|(priority, _)| {
        mesh.run_for(ms(10));
        mesh.submit(C0, Job::runs(s(1)).priority(priority))
    });
    let [low, high, middle, high_later] = tasks;
    let mut order = Vec::new();
    for _ in 0..4 {
        let began = |mesh: &Mesh, order: &[TaskId]| {
            tasks.into_iter().find(|task| !order.contains(task) && mesh.expect(*task).runs() == 1)
        };
        mesh.until("the next one runs", s(10), |mesh| began(mesh, &order).is_some());
        order.extend(began(&mesh, &order));
    }
    assert_eq!(order, [high, high_later, middle, low]);
    mesh.end_well();
}

#[test]
fn a_poisonous_task_stops_after_three_workers() {
    let mut mesh = mesh(&[Place::slots(1), Place::slots(1), Place::slots(1), Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(ms(500)).behaves(Behaviour::KillsWorker));
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::Poisonous).ran_times(3);
    mesh.end_well();
}

#[test]
fn a_poisonous_detached_task_does_not_kill_its_worker_for_ever() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(ms(500)).detached().behaves(Behaviour::KillsWorker));
    mesh.run_for(s(30));
    let later = mesh.add_client(0, false);
    mesh.fetch(later, task);
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::Poisonous).ran_times(3);
    mesh.end_well();
}

#[test]
fn a_model_that_fails_for_good_is_not_tried_elsewhere() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(ms(500)).behaves(Behaviour::Fails(ErrorCode::ModelRejected)));
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::ModelRejected).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_client_without_room_for_the_result_is_told_so_and_no_other_worker_runs_it() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(ms(500)).behaves(Behaviour::FillsDisk));
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::ResultNotKept).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_deadline_ends_a_task_that_waits_and_one_that_runs() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let runs = mesh.submit(C0, Job::runs(s(9)).deadline(s(3)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(runs));
    let waits = mesh.submit(C0, Job::runs(s(1)).deadline(s(1)));
    mesh.run_for(s(4));
    mesh.expect(waits).failed(ErrorCode::Expired).ran_times(0);
    mesh.expect(runs).failed(ErrorCode::Expired);
    mesh.end_well();
}

#[test]
fn a_draining_worker_finishes_and_takes_nothing_new() {
    let mut mesh = two_workers();
    let task = mesh.submit(C0, Job::runs(s(4)));
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    let draining = mesh.expect(task).placed_at();
    mesh.drain(draining);
    mesh.run_for(ms(100));
    let (next, last) = (mesh.submit(C0, Job::runs(ms(500))), mesh.submit(C0, Job::runs(ms(500))));
    let other = if draining == W0 { W1 } else { W0 };
    mesh.until_over(next);
    mesh.until_over(last);
    mesh.expect(next).done().ran_at(other);
    mesh.expect(last).done().ran_at(other);
    mesh.until_over(task);
    mesh.expect(task).done().ran_times(1);
    mesh.end_well();
}
