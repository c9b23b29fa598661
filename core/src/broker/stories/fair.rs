//! Short stories of clients that always have tasks under way, one of them more than the other. Owns the parts that the
//! usual weights promise them.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{LabelRule, Submit};

use super::{
    super::{Config, config::Weights},
    MS,
    mesh::{Mesh, task},
};
use crate::MonoTime;

/// Each task holds the only slot for this time.
const RUN: Duration = Duration::from_millis(20);

/// Tasks that run after each client has come, before the next one comes.
const BEFORE_NEXT: u32 = 25;

/// Tasks that are counted once all clients have come.
const COUNTED: u32 = 400;

/// What a client gets: the number of its tasks that ended, and the longest time that one of them took.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    tasks: u32,
    longest: Duration,
}

/// Clients that submit their next task when one has ended.
struct Loops {
    mesh: Mesh,
    /// By number of the task: its client, and when it came.
    came: Vec<(u32, MonoTime)>,
    ended: usize,
}

impl Loops {
    fn submit(&mut self, of: u32) {
        let number = self.came.len() as u32;
        self.came.push((of, self.mesh.now));
        self.mesh.submit(number, of, |_| {});
    }

    /// Runs the task that was granted next; returns its client, which submits another one, and the time that it took.
    fn run_one(&mut self) -> (u32, Duration) {
        let id = self.mesh.grants[self.ended].id;
        self.ended += 1;
        self.mesh.wait(RUN);
        self.mesh.close(id);
        let number = (0..).zip(&self.came).find(|(number, _)| task(*number) == id.task);
        let (of, since) = *number.expect("it was submitted").1;
        let took = self.mesh.now.since(since);
        self.submit(of);
        (of, took)
    }
}

/// The parts of clients, in their order, each with so many tasks under way.
fn parts(weights: Weights, at_once: &[u32]) -> Vec<Part> {
    let mut mesh = Mesh::new(Config { weights, ..Config::default() });
    mesh.measured(0, [0, 1], RUN.as_micros() as u32);
    let mut loops = Loops { mesh, came: Vec::new(), ended: 0 };
    for (of, at_once) in (0..).zip(at_once) {
        (0..*at_once).for_each(|_| loops.submit(of));
        for _ in 0..BEFORE_NEXT {
            loops.run_one();
        }
    }
    let mut parts = BTreeMap::<u32, Part>::new();
    for _ in 0..COUNTED {
        let (of, took) = loops.run_one();
        let part = parts.entry(of).or_default();
        (part.tasks, part.longest) = (part.tasks + 1, part.longest.max(took));
    }
    (0..at_once.len() as u32).map(|of| parts.get(&of).copied().unwrap_or_default()).collect()
}

#[test]
fn who_floods_the_lane_gets_no_more_than_who_has_a_few_tasks_under_way() {
    for at_once in [[32, 4], [32, 8], [250, 4], [250, 30], [2000, 4], [4, 250]] {
        let parts = parts(Weights::default(), &at_once);
        let halves = COUNTED * 49 / 100..=COUNTED * 51 / 100;
        assert!(parts.iter().all(|part| halves.contains(&part.tasks)), "{at_once:?}: {parts:?}");
    }
}

#[test]
fn who_asks_for_one_thing_at_a_time_waits_for_what_is_at_the_worker() {
    let parts = parts(Weights::default(), &[250, 1]);
    // One task that runs, and two that were sent ahead of their slot.
    assert!(parts[1].longest <= 4 * RUN, "{parts:?}");
    assert!(parts[1].tasks >= COUNTED * 24 / 100, "{parts:?}");
}

#[test]
fn five_clients_get_a_fifth_each_however_much_each_has_under_way() {
    let parts = parts(Weights::default(), &[400, 100, 20, 5, 4]);
    let fifths = COUNTED * 18 / 100..=COUNTED * 22 / 100;
    assert!(parts.iter().all(|part| fifths.contains(&part.tasks)), "{parts:?}");
}

#[test]
fn one_task_that_no_worker_can_run_does_not_hold_its_client_s_others_up_for_ever() {
    let mut mesh = Mesh::new(Config::default());
    mesh.measured(0, [0, 1], 100_000);
    mesh.register(1, [0, 1], |register| register.labels = vec![("camera".into(), "left".into())]);
    let at_camera = |submit: &mut Submit| {
        let rule = LabelRule { key: "camera".to_owned(), value: "left".to_owned(), required: true };
        submit.spec.labels = vec![rule];
    };
    mesh.submit_all(900..902, 1, at_camera);
    mesh.leave(1);
    let before = mesh.grants.len();
    // Others come who never came before, always five at once: nobody's share grows.
    mesh.submit_all(1000..1005, 1000, |_| {});
    mesh.submit_all(0..5, 1, |_| {});
    for (ended, stranger) in (before..).zip(1005..3500) {
        mesh.wait(100 * MS);
        mesh.close(mesh.grants[ended].id);
        mesh.submit(stranger, stranger, |_| {});
    }
    let granted = (0..5).filter(|number| mesh.grants.iter().any(|grant| grant.id.task == task(*number))).count();
    assert!(granted >= 4, "{granted} of five in four minutes");
}

#[test]
fn without_shares_all_waiting_counts_and_the_flood_gets_what_it_asked_for() {
    let weights = Weights { share_milli: 0, ..Weights::default() };
    let parts = parts(weights, &[32, 4]);
    assert!(parts[0].tasks >= COUNTED * 85 / 100, "{parts:?}");
}

#[test]
fn a_flood_of_the_highest_priority_leaves_the_lowest_its_part_in_the_end() {
    let mut mesh = Mesh::new(Config::default());
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit_all(0..400, 1, |submit| submit.spec.priority = 100);
    mesh.submit_all(400..420, 2, |submit| submit.spec.priority = 0);
    let order = mesh.drain(1000 * MS);
    let of_lowest: Vec<usize> =
        (400..420).filter_map(|number| order.iter().position(|id| *id == task(number))).collect();
    // Twenty seconds of share are worth eighty points, twenty seconds of waiting the rest. From then on both take turns.
    assert!(of_lowest[0] <= 25 && of_lowest[19] <= 100, "{of_lowest:?}");
}
