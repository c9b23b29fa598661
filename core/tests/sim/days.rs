//! Days of mixed traffic with slow, throttled and dying workers: nobody starves, and everything ends.

use std::time::Duration;

use proto_msgs::{Lane, Outcome};

use super::{
    faults::Fault,
    job::Job,
    mesh::{Happening, MS, Mesh, Micros, Node, SECOND, Setup},
    models::PACKS,
    rng::Rng,
    story::Story,
    streams::Pace,
    worker_shell::Place,
};

const HOUR: Micros = 3600 * SECOND;

/// In optimised builds; a tenth of a day in others.
const DAYS: u64 = 3;

/// Nobody who waits for his answer waits longer, whatever dies: a worker is given up after 15 s of silence, and that may
/// happen to a task twice.
const REALTIME_WAIT_MAX: Micros = 90 * SECOND;

/// A flood is 40 minutes of work for all slots; what comes behind it with the lowest priority waits for all of it.
const BATCH_WAIT_MAX: Micros = 2 * HOUR;

#[test]
fn days_of_mixed_traffic_with_dying_workers_starve_nobody() {
    let lasts = if cfg!(debug_assertions) { DAYS * 24 * HOUR / 30 } else { DAYS * 24 * HOUR };
    let began = std::time::Instant::now();
    let mut mesh = Mesh::new(Setup { through_bytes: false, ..Setup::new(7) }, Story::default());
    let slots = [(1, 1), (1, 2), (2, 1), (0, 1)];
    for (realtime, batch) in slots {
        // A heartbeat each five seconds: days are long.
        mesh.add_worker(Place { heartbeat: Duration::from_secs(5), ..Place::lanes(realtime, batch) });
    }
    let streams = traffic(&mut mesh, lasts);
    plan_faults(&mut mesh, lasts);
    mesh.referee.is_harmed = true;
    mesh.run_for(Duration::from_micros(lasts));
    mesh.heal();
    mesh.settle(Duration::from_secs(3600));
    assert!(mesh.violation().is_none(), "{:?}", mesh.violation());
    for (stream, longest) in streams {
        let took: Vec<Duration> = mesh.latencies(stream);
        let last = took.last().copied().unwrap_or_default();
        let truths = mesh.streams[stream].tasks.iter().map(|task| mesh.referee.task(*task));
        let done = truths
            .clone()
            .filter(|truth| truth.ends.iter().any(|(_, end)| matches!(end.outcome, Outcome::Done { .. })));
        let (done, all) = (done.count(), truths.count());
        println!("stream {stream}: {done} of {all} done, median {:?}, longest {last:?}", took[took.len() / 2]);
        assert!(last <= Duration::from_micros(longest), "a task of stream {stream} took {last:?}");
        assert!(done * 1000 >= all * 995, "of stream {stream}, {done} of {all} tasks are done");
    }
    println!("{} h of the mesh, {} events in {:.1?}", lasts / HOUR, mesh.steps, began.elapsed());
}

/// Streams and how long their tasks may take.
fn traffic(mesh: &mut Mesh, lasts: Micros) -> Vec<(usize, Micros)> {
    let span = Duration::from_micros(lasts);
    let mut client = || {
        let user = mesh.add_user();
        mesh.add_client(user, true)
    };
    let people = [client(), client(), client(), client(), client(), client()];
    let (s, ms) = (Duration::from_secs, Duration::from_millis);
    let usual = [
        (Job::runs(ms(300)).model(PACKS, 1 << 20), s(12), REALTIME_WAIT_MAX),
        (Job::runs(ms(50)).slo(500, 50), s(20), REALTIME_WAIT_MAX),
        (Job::runs(ms(500)).items(8).lane(Lane::Batch), s(60), BATCH_WAIT_MAX),
        (Job::runs(s(4)).priority(0).lane(Lane::Batch), s(150), BATCH_WAIT_MAX),
        (Job::runs(ms(200)).model(PACKS, 1 << 20).then(PACKS + 4).items(4), s(45), REALTIME_WAIT_MAX),
    ];
    let mut streams: Vec<(usize, Micros)> = usual
        .into_iter()
        .zip(people)
        .map(|((job, gap, longest), client)| (mesh.stream_for(client, job, Pace::Every(gap), span), longest))
        .collect();
    // Twice a day somebody comes with a mountain.
    let mut mountain = Job::runs(ms(500)).items(16).priority(80);
    mountain.job_items = 10_000;
    let mut at = 3 * HOUR;
    while at + HOUR < lasts {
        mesh.run_for(Duration::ZERO);
        let stream = mesh.stream(people[5], mountain.clone(), Pace::AtOnce, 0);
        mesh.streams[stream].left = 600;
        for _ in 0..600 {
            mesh.at(at, Happening::Arrive { stream });
        }
        streams.push((stream, BATCH_WAIT_MAX));
        at += 12 * HOUR;
    }
    streams
}

fn plan_faults(mesh: &mut Mesh, lasts: Micros) {
    let mut plan = Rng::new(20_26);
    let mut at = 600 * SECOND;
    while at < lasts {
        let worker = plan.index(4);
        let node = Node::Worker(worker);
        let while_it_lasts = plan.pick(&[5 * SECOND, 60 * SECOND, 600 * SECOND]);
        let (first, second) = match plan.among(0..10) {
            0..=2 => (Fault::Crash(node), Fault::Restart(node)),
            3..=5 => (Fault::Slow(worker, plan.pick(&[1500, 3000, 20_000])), Fault::Slow(worker, 1000)),
            6 => (Fault::Freeze(node, while_it_lasts.min(60 * SECOND)), Fault::Slow(worker, 1000)),
            7 => (Fault::CutOff(node), Fault::Rejoin(node)),
            8 => (Fault::Crash(Node::Broker), Fault::Restart(Node::Broker)),
            _ => (Fault::Drain(worker), Fault::BreakLink(at)),
        };
        let back = if matches!(first, Fault::Crash(Node::Broker)) { 10 * SECOND } else { while_it_lasts };
        mesh.at(at, Happening::Fault(first));
        mesh.at(at + back, Happening::Fault(second));
        at += plan.among(600 * SECOND..2400 * SECOND) + 100 * MS;
    }
}
