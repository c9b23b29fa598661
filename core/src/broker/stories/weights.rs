//! Short stories of the weights: each of them decides which of two waiting tasks goes first. Owns what is expected of
//! them.

use proto_msgs::{Submit, TaskId};

use super::{
    super::{Config, config::Weights},
    MS,
    mesh::{Mesh, task},
};

/// A waiting task: its arrival in seconds, its client, and a change of its submit.
type Comer = (u64, u32, fn(&mut Submit));

/// Tasks, a set of weights, the order with the usual weights, and the order with these.
type Row<'a> = (&'a [Comer], Weights, &'a [u32], &'a [u32]);

/// The order in which the tasks go with these weights, once the only slot is free.
fn order(weights: Weights, comers: &[Comer]) -> Vec<TaskId> {
    let mut mesh = Mesh::new(Config { weights, ..Config::default() });
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit(0, 99, |_| {}).expect("the slot is free");
    for (number, (at_s, of, change)) in (1..).zip(comers) {
        let wait = (*at_s * 1000) as u32 * MS;
        mesh.wait(wait.saturating_sub(mesh.now.since(crate::MonoTime::from_micros(60_000_000))));
        mesh.submit(number, *of, change);
    }
    mesh.drain(1000 * MS).split_off(1)
}

/// The usual weights with one change.
fn with(change: impl FnOnce(&mut Weights)) -> Weights {
    let mut weights = Weights::default();
    change(&mut weights);
    weights
}

#[test]
fn each_weight_decides_which_of_two_terms_counts_more() {
    // Three more points for priority against five seconds of waiting.
    let more_important: [Comer; 2] = [(0, 1, |_| {}), (5, 2, |submit| submit.spec.priority = 53)];
    // Eight more points for priority against five seconds of waiting.
    let much_more_important: [Comer; 2] = [(0, 1, |_| {}), (5, 2, |submit| submit.spec.priority = 58)];
    // Twelve doublings of the inputs beyond 1 MiB against five seconds of waiting.
    let large: [Comer; 2] = [(0, 1, |submit| submit.spec.input_bytes = 4 << 30), (5, 2, |_| {})];
    // A second task whose client is one second of slot time ahead, against two points of priority.
    let ahead: [Comer; 3] = [(0, 1, |_| {}), (0, 1, |_| {}), (0, 2, |submit| submit.spec.priority = 48)];
    let rows: [Row<'_>; 5] = [
        (&more_important, with(|weights| weights.priority_milli = 2000), &[1, 2], &[2, 1]),
        (&much_more_important, with(|weights| weights.wait_milli = 2000), &[2, 1], &[1, 2]),
        (&large, with(|weights| weights.data_milli = 250), &[2, 1], &[1, 2]),
        (&ahead, with(|weights| weights.share_milli = 1000), &[1, 3, 2], &[1, 2, 3]),
        (&ahead, with(|weights| weights.priority_milli = 3000), &[1, 3, 2], &[1, 2, 3]),
    ];
    for (comers, weights, usual, weighed) in rows {
        let numbers = |numbers: &[u32]| numbers.iter().map(|number| task(*number)).collect::<Vec<_>>();
        assert_eq!(order(Weights::default(), comers), numbers(usual), "the usual weights, not {weights:?}");
        assert_eq!(order(weights, comers), numbers(weighed), "{weights:?}");
    }
}

#[test]
fn the_terms_of_a_waiting_task_are_told_with_their_signs() {
    let mut mesh = Mesh::new(Config::default());
    mesh.measured(0, [0, 1], 1_000_000);
    mesh.submit(0, 99, |_| {});
    mesh.submit(1, 1, |_| {});
    mesh.submit(2, 1, |submit| (submit.spec.priority, submit.spec.input_bytes) = (70, 3 << 20));
    mesh.wait(3000 * MS);
    let rank = mesh.why(2, 1).rank.expect("it waits");
    let terms = [rank.priority_milli, rank.waited_milli, rank.data_milli, rank.share_milli];
    assert_eq!(terms, [70_000, 0, -2000, -4000], "it waits behind its own client's task");
    let rank = mesh.why(1, 1).rank.expect("it waits");
    assert_eq!([rank.waited_milli, rank.share_milli], [3000, 0]);
}
