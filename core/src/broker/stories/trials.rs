//! Short stories of a worker that lost its tasks because it was slow, and of the trials that bring them back.

use proto_msgs::{ErrorCode, Slo, Submit};

use super::{
    MS, mesh,
    mesh::{MODEL, Mesh, cost, task, worker},
};

/// A mesh whose first worker was slow when it was last measured, and the second one takes 10 ms.
fn one_was_slow(run_us: u32) -> Mesh {
    let mut mesh = mesh();
    mesh.measured(0, [1, 1], run_us);
    mesh.measured(1, [1, 1], 10_000);
    mesh
}

/// Twenty tasks a second, from `from` on, each ended after 10 ms. Returns the times in milliseconds, counted from the
/// first, of those that went to the first worker.
fn at_the_first(mesh: &mut Mesh, from: u32, count: u32, change: impl Fn(&mut Submit)) -> Vec<u32> {
    let mut there = Vec::new();
    for number in from..from + count {
        let at = mesh.submit(number, 1, &change).expect("there is room");
        if at == worker(0) {
            there.push((number - from) * 50);
        }
        mesh.wait(10 * MS);
        let id = mesh.grants.last().expect("it was placed").id;
        mesh.close(id);
        mesh.wait(40 * MS);
    }
    there
}

#[test]
fn a_worker_that_is_well_again_is_tried_and_gets_the_tasks_that_it_ends_first() {
    let mut mesh = one_was_slow(100_000);
    assert_eq!(at_the_first(&mut mesh, 0, 300, |_| {}), [10_000]);
    assert_eq!(mesh.broker.counters().trials, 1);
    // The one task has shown that it is even better than the other.
    mesh.beat(0, |heartbeat| heartbeat.costs = vec![cost(8_000)]);
    assert_eq!(at_the_first(&mut mesh, 300, 100, |_| {}).len(), 100);
}

#[test]
fn a_worker_that_stays_slow_is_tried_ever_less() {
    let mut mesh = one_was_slow(100_000);
    let tried_s: Vec<u32> = at_the_first(&mut mesh, 0, 50_000, |_| {}).iter().map(|ms| ms / 1000).collect();
    assert_eq!(tried_s[..8], [10, 20, 30, 45, 67, 101, 151, 227]);
    assert!(tried_s.windows(2).all(|two| two[1] - two[0] <= 301), "it is never forgotten: {tried_s:?}");
    assert!(tried_s.len() <= 17, "{tried_s:?}");
}

#[test]
fn a_trial_takes_a_twentieth_of_the_time_at_most() {
    let mut mesh = one_was_slow(800_000);
    let tried = at_the_first(&mut mesh, 0, 800, |_| {});
    assert_eq!(tried, [16_000, 32_000]);
}

#[test]
fn however_many_were_slow_one_task_in_sixteen_is_a_trial() {
    let mut mesh = one_was_slow(10_000);
    (2..34).for_each(|number| mesh.measured(number, [1, 1], 100_000));
    mesh.wait(60_000 * MS);
    let before = mesh.grants.len();
    at_the_first(&mut mesh, 0, 160, |_| {});
    let slow = mesh.grants[before..].iter().filter(|grant| grant.worker != worker(0) && grant.worker != worker(1));
    let mut tried: Vec<_> = slow.map(|grant| grant.worker).collect();
    assert!((8..=10).contains(&tried.len()), "{tried:?}");
    tried.sort_unstable();
    tried.dedup();
    assert!(tried.len() >= 8, "each in its turn: {tried:?}");
}

/// Number of trials in half a minute of tasks like this one, when the first worker seems to take 100 ms.
fn trials_of(change: impl Fn(&mut Submit)) -> usize {
    at_the_first(&mut one_was_slow(100_000), 0, 600, change).len()
}

#[test]
fn no_trial_breaks_a_deadline_even_at_the_old_figures() {
    assert_eq!(trials_of(|submit| submit.spec.deadline_ms = Some(150)), 0);
    assert_eq!(trials_of(|submit| submit.spec.deadline_ms = Some(250)), 2);
    let both = |submit: &mut Submit| {
        submit.spec.deadline_ms = Some(150);
        submit.spec.slo = Some(Slo { latency_ms: 60, max_violation_permille: 1000 });
    };
    assert_eq!(trials_of(both), 0, "a promise that may be broken does not excuse it");
}

#[test]
fn a_promise_is_put_at_risk_with_a_tenth_of_the_tasks_that_may_break_it() {
    let promise = |latency_ms, max_violation_permille| {
        move |submit: &mut Submit| submit.spec.slo = Some(Slo { latency_ms, max_violation_permille })
    };
    assert_eq!(trials_of(promise(250, 0)), 2, "the promise is safe");
    assert_eq!(trials_of(promise(60, 0)), 0);
    assert_eq!(trials_of(promise(60, 50)), 2, "one in two hundred tasks may be risked");
    assert_eq!(trials_of(promise(60, 20)), 1, "one in five hundred");
    assert_eq!(trials_of(promise(60, 10)), 0, "one in a thousand");
}

#[test]
fn nobody_waits_for_seconds_for_a_trial_unless_there_is_no_hurry() {
    let trials = |change: fn(&mut Submit)| at_the_first(&mut one_was_slow(1_100_000), 0, 600, change).len();
    assert_eq!(trials(|_| {}), 0);
    assert_eq!(trials(|submit| submit.spec.job_items = 1000), 1);
}

#[test]
fn a_task_that_lost_a_worker_is_no_trial() {
    let mut mesh = one_was_slow(100_000);
    assert!(at_the_first(&mut mesh, 0, 190, |_| {}).is_empty());
    mesh.measured(2, [1, 1], 20_000);
    mesh.submit(190, 1, |_| {});
    mesh.wait(20_000 * MS);
    let lost = mesh.grants.last().cloned().expect("it was placed");
    mesh.lost(&lost, ErrorCode::WorkerLost);
    assert_eq!((lost.worker, mesh.grants.last().map(|grant| grant.worker)), (worker(1), Some(worker(2))));
    assert_eq!(mesh.broker.counters().trials, 0);
}

#[test]
fn a_task_that_would_wait_for_a_busy_worker_is_a_trial_of_the_idle_one() {
    let mut mesh = one_was_slow(300_000);
    at_the_first(&mut mesh, 0, 198, |_| {});
    // Asking for cores, none of these is sent ahead.
    let asks = |submit: &mut Submit| submit.spec.demands.cpu_millis = 1;
    let places = |mesh: &mut Mesh, numbers: [u32; 2]| numbers.map(|number| mesh.submit(number, 1, asks));
    assert_eq!(places(&mut mesh, [1000, 1001]), [Some(worker(1)); 2], "a trial is not due yet");
    mesh.wait(200 * MS);
    assert_eq!(places(&mut mesh, [1002, 1003]), [Some(worker(0)), None], "the last one waits for the quick worker");
}

#[test]
fn a_worker_that_is_busy_or_lacks_the_model_is_not_tried() {
    let mut mesh = one_was_slow(100_000);
    let other = |submit: &mut Submit| submit.spec.model.digest = proto_msgs::Digest::from_bytes([9; 32]);
    mesh.beat(1, |heartbeat| heartbeat.draining = true);
    assert_eq!(mesh.submit(10_000, 2, other), Some(worker(0)));
    mesh.beat(1, |heartbeat| heartbeat.draining = false);
    assert!(at_the_first(&mut mesh, 0, 600, |_| {}).is_empty());
    let mut mesh = one_was_slow(100_000);
    mesh.beat(0, |heartbeat| heartbeat.held.retain(|held| *held != MODEL));
    assert!(at_the_first(&mut mesh, 0, 600, |_| {}).is_empty());
}

#[test]
fn why_tells_that_a_task_is_a_trial() {
    let mut mesh = one_was_slow(100_000);
    assert_eq!(at_the_first(&mut mesh, 0, 201, |_| {}), [10_000]);
    let why = mesh.why(200, 1);
    let [line] = &why.history[..] else { panic!("{:?}", why.history) };
    let name = &why.task.worker.as_ref().expect("it was placed").1;
    assert!(line.starts_with(&format!("attempt 1 at {name} is a trial: it had no such task for 10 s")), "{line}");
    assert_eq!(mesh.why(199, 1).history, [""; 0]);
    assert!(!mesh.is_at_work(task(200)));
}

#[test]
fn a_hand_over_that_was_slow_is_forgotten_with_one_task_after_a_pause() {
    let mut mesh = one_was_slow(10_000);
    mesh.beat(1, |heartbeat| heartbeat.draining = true);
    for number in 0..20 {
        mesh.submit(number, 1, |_| {});
        mesh.wait(60 * MS);
        mesh.close(mesh.grants[number as usize].id);
    }
    mesh.beat(1, |heartbeat| heartbeat.draining = false);
    let there = at_the_first(&mut mesh, 100, 600, |_| {});
    assert_eq!(there[0], 9_950, "it is tried after ten seconds");
    assert!(there.len() > 300, "and then gets the tasks that it ends first: {}", there.len());
}
