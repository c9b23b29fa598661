//! Short stories of two processes with one worker's id, and of restarts, which look alike for a moment.

use proto_msgs::Epoch;

use super::{
    MS, mesh,
    mesh::{Mesh, worker},
};

impl Mesh {
    /// A process starts as this life of the first worker.
    fn starts(&mut self, life: u64) {
        self.beat(0, |heartbeat| heartbeat.epoch = Epoch(life));
        self.register(0, [0, 1], |register| register.epoch = Epoch(life));
    }

    /// The process with this life of the first worker sends a heartbeat.
    fn speaks(&mut self, life: u64) {
        self.wait(100 * MS);
        self.beat(0, |heartbeat| heartbeat.epoch = Epoch(life));
    }
}

#[test]
fn of_two_live_processes_with_one_id_the_earlier_life_is_told() {
    let mut mesh = mesh();
    mesh.starts(5);
    mesh.speaks(5);
    mesh.starts(6);
    for _ in 0..2 {
        mesh.speaks(5);
        mesh.speaks(6);
    }
    assert_eq!(mesh.overtaken, [Epoch(5)]);
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)), "the later life works");
    mesh.speaks(5);
    mesh.speaks(6);
    assert_eq!(mesh.overtaken, [Epoch(5); 2], "again, for a message may be lost");
}

#[test]
fn a_copy_with_fewer_lives_is_told_though_it_comes_later() {
    let mut mesh = mesh();
    mesh.starts(6);
    mesh.speaks(6);
    mesh.starts(5);
    mesh.speaks(6);
    mesh.speaks(5);
    assert_eq!(mesh.overtaken, [Epoch(5)]);
}

#[test]
fn a_restarted_worker_is_not_taken_for_two() {
    let mut mesh = mesh();
    for life in 1..5 {
        mesh.starts(life);
        mesh.speaks(life);
        assert_eq!(mesh.submit(life as u32, 1, |_| {}), Some(worker(0)), "at once");
        mesh.close(mesh.grants.last().expect("just granted").id);
    }
    // A heartbeat that was on its way when its process was killed.
    mesh.speaks(3);
    mesh.speaks(4);
    assert_eq!(mesh.overtaken, []);
}

#[test]
fn a_worker_restored_from_a_backup_waits_until_its_later_life_counts_as_dead() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |register| (register.epoch, register.heartbeat_ms) = (Epoch(9), 100));
    // The later life is dead: nothing but the restored one speaks.
    (0..4).for_each(|_| mesh.speaks(5));
    assert_eq!(mesh.overtaken, []);
    mesh.wait(2000 * MS);
    mesh.starts(5);
    assert_eq!(mesh.submit(0, 1, |_| {}), Some(worker(0)));
}
