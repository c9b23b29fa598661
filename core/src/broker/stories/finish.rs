//! Short stories of the predicted finish: each of its parts is measured, and each can decide. Owns what is expected of
//! the prediction, and of the choice between two workers that differ in one part.

use proto_msgs::{Digest, ErrorCode, Heartbeat, ModelCost, ModelFormat, ModelRef, Outcome, Prediction, Stage, Submit};

use super::{
    MS, mesh,
    mesh::{DONE, MODEL, Mesh, cost, task, worker},
};

/// The model of the second stage.
const SECOND: Digest = Digest::from_bytes([9; 32]);

/// Bytes of each model: one second on the usual link.
const MODEL_BYTES: u64 = 1_000_000;

/// Prediction for the usual worker: inputs of 100 kB on a link of 1 MB/s, two models to load, two to run.
const USUAL: Prediction = Prediction {
    queue_us: 0,
    transfer_us: 100_000,
    load_us: 500_000 + 300_000,
    run_us: 100_000 + 50_000,
    handover_us: 0,
    measured: true,
};

/// Heartbeat of the usual worker: it holds both models, has loaded neither, and has measured everything.
fn usual(heartbeat: &mut Heartbeat) {
    heartbeat.link_bytes_per_s = 1_000_000;
    heartbeat.held = vec![MODEL, SECOND];
    heartbeat.costs = vec![
        ModelCost { load_us: 500_000, ..cost(100_000) },
        ModelCost { model: SECOND, load_us: 300_000, ..cost(50_000) },
    ];
}

/// A task of two stages with 100 kB of input.
fn two_stages(submit: &mut Submit) {
    submit.spec.model.size_bytes = MODEL_BYTES;
    submit.spec.input_bytes = 100_000;
    let model = ModelRef { digest: SECOND, size_bytes: MODEL_BYTES, format: ModelFormat::TfLite };
    submit.spec.then = vec![Stage { name: "second".to_owned(), model }];
}

fn join(mesh: &mut Mesh, number: u32, change: impl Fn(&mut Heartbeat)) {
    mesh.register(number, [0, 1], |_| {});
    mesh.beat(number, |heartbeat| (usual(heartbeat), change(heartbeat)).0);
}

/// The prediction for each worker that was rated for a placed task.
fn predictions<const N: usize>(mesh: &mut Mesh, number: u32) -> [Prediction; N] {
    let mut candidates = mesh.why(number, 1).decision.expect("it was placed").candidates;
    candidates.sort_by_key(|candidate| candidate.worker);
    let all: Vec<Prediction> = candidates.iter().map(|candidate| candidate.prediction).collect();
    all.try_into().expect("each worker was rated")
}

/// One property in which a worker differs from the usual one, and the prediction that follows.
type Difference = (&'static str, fn(&mut Heartbeat), Prediction);

/// Checks that the better one of the usual and a different worker is taken. Its id is higher: nothing else speaks for
/// it.
fn is_decided_by((what, change, expected): Difference) {
    let is_better = expected.total_us() < USUAL.total_us();
    let mut mesh = mesh();
    for number in 0..2 {
        let is_other = (number == 1) == is_better;
        join(&mut mesh, number, |heartbeat| {
            if is_other {
                change(heartbeat);
            }
        });
    }
    assert_eq!(mesh.submit(0, 1, two_stages), Some(worker(1)), "{what}");
    let [first, second] = predictions(&mut mesh, 0);
    let both = if is_better { [USUAL, expected] } else { [expected, USUAL] };
    assert_eq!([first, second], both, "{what}");
}

#[test]
fn each_part_of_the_predicted_finish_is_measured_and_decides_between_equals() {
    let more_transfer = |more_us| Prediction { transfer_us: USUAL.transfer_us + more_us, ..USUAL };
    let load = |load_us| Prediction { load_us, ..USUAL };
    let run = |run_us| Prediction { run_us, ..USUAL };
    let differences: [Difference; 10] = [
        ("lacks the model", |heartbeat| heartbeat.held = vec![SECOND], more_transfer(1_000_000)),
        ("lacks the later model", |heartbeat| heartbeat.held = vec![MODEL], more_transfer(1_000_000)),
        ("lacks both", |heartbeat| heartbeat.held = Vec::new(), more_transfer(2_000_000)),
        ("has a slower link", |heartbeat| heartbeat.link_bytes_per_s = 500_000, more_transfer(100_000)),
        ("has loaded the model", |heartbeat| heartbeat.warm = vec![MODEL], load(300_000)),
        ("has loaded the later model", |heartbeat| heartbeat.warm = vec![SECOND], load(500_000)),
        ("loads it longer", |heartbeat| heartbeat.costs[0].load_us += 1000, load(USUAL.load_us + 1000)),
        ("loads the later one longer", |heartbeat| heartbeat.costs[1].load_us += 1000, load(USUAL.load_us + 1000)),
        ("runs it longer", |heartbeat| heartbeat.costs[0].curve = vec![(1, 101_000)], run(151_000)),
        ("runs the later one longer", |heartbeat| heartbeat.costs[1].curve = vec![(1, 51_000)], run(151_000)),
    ];
    differences.into_iter().for_each(is_decided_by);
}

#[test]
fn the_work_in_front_is_part_of_the_predicted_finish_less_what_has_run_of_it() {
    let mut mesh = mesh();
    join(&mut mesh, 0, |_| {});
    assert_eq!(mesh.submit(0, 1, two_stages), Some(worker(0)));
    join(&mut mesh, 1, |_| {});
    mesh.wait(150 * MS);
    assert_eq!(mesh.submit(1, 1, two_stages), Some(worker(1)));
    // The slot is busy with loading and running its task.
    let taken_us = USUAL.load_us + USUAL.run_us;
    assert_eq!(predictions(&mut mesh, 1), [Prediction { queue_us: taken_us - 150_000, ..USUAL }, USUAL]);
}

#[test]
fn a_model_on_its_way_is_weighed_against_a_slower_run() {
    let chosen = |run_us: u32, link_bytes_per_s: u64| {
        let mut mesh = mesh();
        join(&mut mesh, 0, |heartbeat| heartbeat.costs[0].curve = vec![(1, run_us)]);
        join(&mut mesh, 1, |heartbeat| {
            heartbeat.held = vec![SECOND];
            heartbeat.link_bytes_per_s = link_bytes_per_s;
        });
        mesh.submit(0, 1, two_stages).expect("there is room")
    };
    // On the usual link, a model takes one second: the holder of the model may be slower by as much.
    assert_eq!(chosen(1_090_000, 1_000_000), worker(0));
    assert_eq!(chosen(1_110_000, 1_000_000), worker(1));
    // A link ten times as fast needs a tenth for the model, and saves nine tenths of the time for the inputs.
    assert_eq!(chosen(109_000, 10_000_000), worker(0));
    assert_eq!(chosen(121_000, 10_000_000), worker(1));
}

#[test]
fn what_a_worker_has_not_measured_is_taken_to_be_as_at_the_others() {
    let mut mesh = mesh();
    join(&mut mesh, 0, |heartbeat| heartbeat.costs[0].load_us = 700_000);
    join(&mut mesh, 1, |heartbeat| heartbeat.costs[0].curve = vec![(1, 300_000)]);
    join(&mut mesh, 2, |heartbeat| {
        heartbeat.link_bytes_per_s = 0;
        heartbeat.costs.remove(0);
    });
    mesh.submit(0, 1, two_stages);
    let [.., stranger] = predictions::<3>(&mut mesh, 0);
    assert_eq!(stranger, Prediction { load_us: 600_000 + 300_000, run_us: 200_000 + 50_000, ..USUAL });
    // A part that nobody has measured is not predicted.
    assert_eq!(
        mesh.submit(1, 1, |submit| (two_stages(submit), submit.spec.model.digest = Digest::from_bytes([8; 32])).0),
        Some(worker(1))
    );
    assert!(predictions::<2>(&mut mesh, 1).iter().all(|prediction| !prediction.measured));
    assert!(mesh.is_at_work(task(1)));
}

#[test]
fn a_slot_in_which_a_model_is_loaded_for_nobody_is_not_free() {
    let mut mesh = mesh();
    for number in [0, 1] {
        mesh.measured(number, [1, 0], 10_000);
        mesh.beat(number, |heartbeat| {
            heartbeat.held.push(SECOND);
            heartbeat.costs.push(ModelCost { model: SECOND, load_us: 3_000_000, ..cost(10_000) });
        });
    }
    let hurried = |submit: &mut Submit| {
        (submit.spec.model.digest, submit.spec.deadline_ms) = (SECOND, Some(200));
    };
    let ends = |mesh: &mut Mesh, outcome: Outcome| {
        let id = mesh.grants.last().expect("it was placed").id;
        mesh.close_as(id, outcome);
    };
    let expires = |mesh: &mut Mesh| {
        mesh.wait(200 * MS);
        ends(mesh, Outcome::failed(ErrorCode::Expired, "too late"));
    };
    assert_eq!(mesh.submit(0, 1, hurried), Some(worker(0)), "so that the model is loaded for those after it");
    expires(&mut mesh);
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(1)), "the other one would load for three seconds first");
    assert_eq!(mesh.submit(2, 1, |_| {}), Some(worker(1)), "and is still the better one with a short queue");
    ends(&mut mesh, DONE);
    mesh.leave(1);
    let queue_us = |mesh: &mut Mesh, number: u32| {
        assert_eq!(mesh.submit(number, 1, |_| {}), Some(worker(0)), "nothing else is there");
        let [prediction] = predictions(mesh, number);
        prediction.queue_us
    };
    let left_us = queue_us(&mut mesh, 3);
    assert!((2_700_000..2_900_000).contains(&left_us), "{left_us} µs are left of the load");
    ends(&mut mesh, DONE);
    // The worker is better informed.
    mesh.beat(0, |heartbeat| heartbeat.lanes[0].slots_used = 0);
    assert_eq!(queue_us(&mut mesh, 4), 0);
}
