//! Stories about detached tasks: what a client was told before it left stays true, whichever node dies.

use proto_msgs::{ErrorCode, TaskId};

use super::{
    job::{Behaviour, Job},
    mesh::{MS, Mesh, SECOND},
    stories::{B, C0, W0, mesh, ms, s},
    worker_shell::Place,
};

impl Mesh {
    /// A new process of the user fetches the result.
    #[track_caller]
    fn is_fetched(&mut self, task: TaskId) {
        let later = self.add_client(0, false);
        self.fetch(later, task);
        self.until_over(task);
        self.expect(task).done().ran_at(W0);
    }
}

#[test]
fn a_client_stays_until_the_store_has_where_its_task_is() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(20)).detached());
    mesh.until("the store has it", s(2), |mesh| mesh.broker.store.tasks.contains_key(&task));
    mesh.setup.store_wait = (3 * SECOND, 3 * SECOND + MS);
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.crash(B);
    mesh.run_for(s(1));
    mesh.expect(task).not_ended();
    mesh.restart(B);
    mesh.until_over(task);
    mesh.expect(task).done();
    mesh.crash(C0);
    mesh.crash(B);
    mesh.restart(B);
    mesh.is_fetched(task);
    mesh.end_well();
}

#[test]
fn an_end_that_the_store_does_not_have_is_told_again_to_the_next_broker() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(2)).detached());
    mesh.until_over(task);
    mesh.crash(C0);
    mesh.setup.store_wait = (20 * SECOND, 20 * SECOND + MS);
    mesh.until("it has run", s(5), |mesh| !mesh.is_running(task));
    // The worker has reported the end twice, and the broker knows it.
    mesh.run_for(s(3));
    mesh.crash(B);
    mesh.restart(B);
    mesh.is_fetched(task);
    mesh.expect(task).ran_times(1);
    mesh.end_well();
}

#[test]
fn a_worker_that_dies_before_its_result_is_on_the_disk_runs_it_again() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(2)).detached());
    mesh.until_over(task);
    mesh.setup.disk_wait = (3 * SECOND, 3 * SECOND + MS);
    mesh.until("it has run", s(5), |mesh| !mesh.is_running(task));
    // Heartbeats have been sent since.
    mesh.run_for(s(2));
    mesh.crash(W0);
    mesh.restart(W0);
    mesh.is_fetched(task);
    mesh.expect(task).ran_times(2);
    mesh.end_well();
}

#[test]
fn a_result_that_its_worker_cannot_write_ends_its_task_and_does_not_come_back_as_another_end() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(2)).behaves(Behaviour::ResultUnwritten).detached());
    mesh.until_over(task);
    mesh.until("it has run", s(5), |mesh| !mesh.is_running(task));
    mesh.run_for(s(1));
    for node in [W0, B] {
        mesh.crash(node);
        mesh.restart(node);
        mesh.run_for(s(5));
    }
    let later = mesh.add_client(0, false);
    mesh.fetch(later, task);
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::DiskFull).ran_times(1);
    mesh.end_well();
}

#[test]
fn after_a_restart_a_worker_may_bring_a_task_that_the_store_knows_without_a_place() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(2)).detached());
    mesh.until("the store has it", s(2), |mesh| mesh.broker.store.tasks.contains_key(&task));
    mesh.setup.store_wait = (20 * SECOND, 20 * SECOND + MS);
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.crash(B);
    mesh.crash(C0);
    mesh.crash(W0);
    mesh.restart(B);
    // Longer than a client may be silent.
    mesh.run_for(s(18));
    mesh.restart(W0);
    mesh.is_fetched(task);
    mesh.end_well();
}

#[test]
fn what_was_cancelled_does_not_come_back_with_the_broker() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let task = mesh.submit(C0, Job::runs(s(20)).detached());
    mesh.until_over(task);
    mesh.setup.store_wait = (3 * SECOND, 3 * SECOND + MS);
    mesh.cancel_elsewhere(task);
    mesh.run_for(s(1));
    mesh.crash(B);
    mesh.restart(B);
    mesh.end_well();
}

#[test]
fn a_result_is_fetched_the_way_that_its_task_came() {
    // The client's endpoint cannot be reached, and the client does not know it.
    let mut mesh = mesh(&[Place { reachable: false, ..Place::slots(1) }]);
    mesh.referee.is_harmed = true;
    let task = mesh.submit(C0, Job::runs(s(1)).detached());
    mesh.until_over(task);
    mesh.run_for(s(3));
    let later = mesh.add_client(0, true);
    mesh.fetch(later, task);
    mesh.until("the result is there", s(2), |mesh| mesh.expect(task).is_over());
    mesh.expect(task).done();
    // A restarted broker must be told.
    mesh.crash(B);
    mesh.restart(B);
    mesh.run_for(s(3));
    let last = mesh.add_client(0, true);
    mesh.fetch(last, task);
    mesh.until_over(task);
    mesh.expect(task).done();
    mesh.end_well();
}

#[test]
fn a_task_that_is_at_no_worker_ends_once_its_client_was_silent_for_long() {
    let mut mesh = mesh(&[Place::slots(1)]);
    let busy = mesh.submit(C0, Job::runs(s(11)));
    mesh.until("the slot is taken", s(3), |mesh| mesh.is_running(busy));
    let other = mesh.add_client(0, true);
    let task = mesh.submit(other, Job::runs(s(2)).detached());
    mesh.run_for(ms(500));
    mesh.crash(other);
    mesh.run_for(s(17));
    let later = mesh.add_client(0, false);
    mesh.fetch(later, task);
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::ClientGone).ran_times(0);
    mesh.end_well();
}
