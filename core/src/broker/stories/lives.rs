//! Short stories of how tasks live and end, and of what time does to them. Owns what is expected of the broker there.

use proto_msgs::{AttemptReport, AttemptState, Purpose};

use super::{
    super::Config,
    mesh::{DONE, Mesh, task},
};

impl Mesh {
    /// A detached task is submitted to the only worker, and is done.
    fn has_done(&mut self, number: u32) {
        self.submit(number, 1, |submit| submit.detached = true);
        self.store();
        let id = self.grants.last().expect("there is room").id;
        assert_eq!(id.task, task(number));
        let over = AttemptReport { id, state: AttemptState::Finished(DONE), detached: true };
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
