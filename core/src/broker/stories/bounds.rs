//! Short stories of what peers say too much of, or invent. Owns what the broker believes and keeps of it.

use proto_msgs::{AttemptReport, AttemptState};

use super::{
    super::Config,
    mesh::{Mesh, task},
};

#[test]
fn an_end_that_found_no_place_in_a_heartbeat_is_waited_for() {
    let mut mesh = Mesh::new(Config::default());
    mesh.register(0, [1, 0], |_| {});
    mesh.submit(0, 1, |submit| submit.detached = true);
    mesh.store();
    let running = AttemptReport { id: mesh.grants[0].id, state: AttemptState::Running, detached: true };
    mesh.beat(0, |heartbeat| heartbeat.attempts = vec![running]);
    mesh.beat(0, |heartbeat| (heartbeat.attempts, heartbeat.names_all) = (Vec::new(), false));
    assert!(mesh.is_at_work(task(0)));
    mesh.beat(0, |heartbeat| heartbeat.names_all = true);
    assert!(!mesh.is_at_work(task(0)), "nothing was left out");
}
