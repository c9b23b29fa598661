//! Short stories of cores and memory that a worker keeps for the first task that needs more than is left. Owns for whom,
//! and from whom.

use std::time::Duration;

use proto_msgs::{Lane, Submit};

use super::{
    super::Config,
    mesh::{Mesh, task},
};

/// A batch task with this priority that wants three of a worker's four cores.
fn wants_three_cores(priority: u8) -> impl Fn(&mut Submit) {
    move |submit| {
        submit.spec.lane = Some(Lane::Batch);
        (submit.spec.priority, submit.spec.demands.cpu_millis) = (priority, 3000);
    }
}

#[test]
fn nobody_waits_for_what_is_kept_for_himself() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [2, 4], |_| {});
    mesh.submit(0, 1, wants_three_cores(50));
    mesh.submit(1, 1, wants_three_cores(50));
    // More important, and its turn has not come: its client has another task before it.
    mesh.submit(2, 1, wants_three_cores(90));
    mesh.beat(0, |_| {});
    mesh.wait(Duration::from_secs(1));
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.grants.len(), 2, "three cores are free: {}", mesh.why(2, 1).summary);
    mesh.close(mesh.grants[1].id);
    assert_eq!(mesh.grants.len(), 3);
    assert!([1, 2].into_iter().all(|number| mesh.grants.iter().any(|grant| grant.id.task == task(number))));
}

#[test]
fn small_tasks_do_not_take_for_ever_what_a_large_one_waits_for() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [2, 4], |_| {});
    let small = |submit: &mut Submit| {
        submit.spec.lane = Some(Lane::Batch);
        submit.spec.demands.cpu_millis = 2000;
    };
    mesh.submit(0, 1, small);
    mesh.submit(1, 1, small);
    mesh.submit(2, 2, wants_three_cores(50));
    mesh.submit_all(3..6, 1, small);
    mesh.beat(0, |_| {});
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.grants.len(), 2, "two cores are kept");
    mesh.close(mesh.grants[1].id);
    assert_eq!(mesh.grants[2].id.task, task(2));
}
