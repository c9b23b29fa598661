//! Short stories of tasks that ask for no memory and need more than a worker gives such a task.

use proto_msgs::{Demands, ErrorCode, Outcome};

use super::{
    MODEL, MS, cost, mesh,
    mesh::{Mesh, task, worker},
};
use crate::MonoTime;

const GIB: u64 = 1 << 30;

/// Workers that give a run so much memory, and a task that asks for none.
fn workers_of(gib: &[u64]) -> Mesh {
    let mut mesh = mesh();
    for (number, gib) in (0..).zip(gib) {
        mesh.register(number, [0, 1], |register| register.run_memory_bytes = gib * GIB);
    }
    mesh.submit(0, 1, |_| {});
    mesh
}

impl Mesh {
    /// The run outgrew the worker of the last grant.
    fn outgrows(&mut self) {
        let grant = self.grants.last().expect("there was a grant").clone();
        self.lost(&grant, ErrorCode::WorkerOutgrown);
    }

    fn workers(&self) -> Vec<u32> {
        let number = |id| (0..9).find(|number| worker(*number) == id).expect("workers have numbers");
        self.grants.iter().map(|grant| number(grant.worker)).collect()
    }

    fn text(&self) -> String {
        match &self.ends[&task(0)].0 {
            Outcome::Failed(failure) => failure.text.clone(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_task_that_outgrows_a_worker_goes_to_one_that_gives_more() {
    let mut mesh = workers_of(&[1, 1, 2]);
    mesh.outgrows();
    assert_eq!((mesh.workers(), mesh.code(0)), (vec![0, 2], None), "not to one that gives the same");
}

#[test]
fn a_task_that_outgrows_all_workers_is_given_up_at_once_and_told_what_to_ask_for() {
    let mut mesh = workers_of(&[1, 1]);
    mesh.outgrows();
    assert_eq!((mesh.workers(), mesh.code(0)), (vec![0], Some(ErrorCode::RunOutOfMemory)));
    assert!(mesh.text().contains("--memory"), "{}", mesh.text());

    let mut mesh = workers_of(&[1, 2]);
    mesh.outgrows();
    mesh.outgrows();
    assert_eq!((mesh.workers(), mesh.code(0)), (vec![0, 1], Some(ErrorCode::RunOutOfMemory)));
}

#[test]
fn a_broker_that_has_just_started_waits_for_larger_workers_before_it_gives_the_task_up() {
    let young = || {
        let mut mesh = mesh();
        mesh.now = MonoTime::ZERO;
        mesh.register(0, [0, 1], |register| register.run_memory_bytes = GIB);
        mesh.submit(0, 1, |_| {});
        mesh.outgrows();
        assert_eq!(mesh.code(0), None);
        mesh
    };
    let mut alone = young();
    alone.wait(60_000 * MS);
    assert_eq!(alone.code(0), Some(ErrorCode::RunOutOfMemory));
    assert!(alone.text().contains("--memory"), "{}", alone.text());

    let mut joined = young();
    joined.register(1, [0, 1], |register| register.run_memory_bytes = 2 * GIB);
    assert_eq!(joined.workers(), [0, 1]);
}

#[test]
fn a_task_that_waits_for_a_larger_worker_is_not_given_to_a_small_one() {
    let mut mesh = workers_of(&[1, 4]);
    let other = mesh.submit(1, 1, |_| {});
    assert_eq!(other, Some(worker(1)));
    let grant = mesh.grants[0].clone();
    mesh.lost(&grant, ErrorCode::WorkerOutgrown);
    mesh.beat(0, |_| {});
    assert_eq!(mesh.grants.len(), 2, "the large one is busy");
    let against = mesh.why(0, 1).candidates[0].against.join(", ");
    assert!(against.contains("gives a run 1024 MiB"), "{against}");
    mesh.close(mesh.grants[1].id);
    mesh.beat(1, |_| {});
    assert_eq!(mesh.workers(), [0, 1, 1]);
}

#[test]
fn a_task_that_asks_for_memory_is_placed_by_what_it_asks() {
    let mut mesh = workers_of(&[1]);
    let demands = |gib| Demands { memory_bytes: gib * GIB, ..Demands::default() };
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.submit(1, 1, |submit| submit.spec.demands = demands(3)), Some(worker(0)), "more than is usual");
}

/// A small worker and a large one, where a task has outgrown the small one and was done at the large one.
fn learned() -> Mesh {
    let mut mesh = workers_of(&[1, 4]);
    mesh.outgrows();
    assert_eq!(mesh.workers(), [0, 1]);
    mesh.close(mesh.grants[1].id);
    mesh.beat(1, |heartbeat| (heartbeat.held, heartbeat.costs) = (vec![MODEL], vec![cost(600_000)]));
    mesh
}

#[test]
fn what_one_task_has_learned_at_a_small_worker_the_next_ones_need_not_learn_again() {
    let mut mesh = learned();
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(1)), "at once to the large one");
    mesh.submit(2, 1, |_| {});
    mesh.beat(0, |_| {});
    assert_eq!(mesh.workers(), [0, 1, 1], "the small one stays idle, the next task waits");
}

#[test]
fn a_small_worker_is_taken_if_there_is_no_larger_one() {
    let mut mesh = learned();
    mesh.leave(1);
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(0)), "inputs differ");
}
