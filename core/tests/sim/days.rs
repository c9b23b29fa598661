//! Days of mixed traffic with slow, throttled and dying workers: nothing starves, waiting tasks run when there is room,
//! and all end. Also hours of a promised latency while one worker after the other misses it.

use std::time::Duration;

use mesh_core::{Rules, broker::Policy};
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

const MINUTE: Micros = 60 * SECOND;
pub(crate) const HOUR: Micros = 60 * MINUTE;
const DAY: Micros = 24 * HOUR;

/// Longest wait of a realtime task, whatever dies: a worker is given up after 15 s of silence, and this may happen to a
/// task twice.
const REALTIME_WAIT_MAX: Micros = 45 * SECOND;

/// A hundred points of priority count a hundred seconds, the flood's ninety; the rest is for workers that are slow or
/// die. Without ageing the lowest priority waits for its share, which is small beside so many tasks.
const BATCH_WAIT_MAX: Micros = 500 * SECOND;

/// Longest wait behind a mountain, which is 40 minutes of work for all slots.
const MOUNTAIN_WAIT_MAX: Micros = 2 * HOUR;

/// The model of tasks that take seconds. Shares are shares of slot time, and the broker takes all items of a model to
/// cost the same: with a quick model's they would count for many times what they need.
const TAKES_LONG: u8 = 4;

/// Clients of the flood. Each submits its next task when the last one has ended.
const FLOOD_CLIENTS: usize = 120;

/// Length of the flood: long compared with the longest wait behind it.
const FLOOD_LASTS: Micros = 40 * MINUTE;

#[test]
fn days_of_mixed_traffic_with_dying_workers_starve_nobody() {
    let began = std::time::Instant::now();
    let lasts = if cfg!(debug_assertions) { 2 * HOUR } else { 2 * DAY };
    let mesh = mixed_traffic(lasts, Rules::default());
    assert!(mesh.violation().is_none(), "{:?}", mesh.violation());
    println!("{} h of the mesh, {} events in {:.1?}", lasts / HOUR, mesh.steps, began.elapsed());
}

#[test]
fn hours_of_a_promised_latency_leave_each_slow_worker_and_come_back_to_it() {
    let began = std::time::Instant::now();
    let episodes = if cfg!(debug_assertions) { 1 } else { 4 };
    let mesh = a_promise(episodes, Rules::default());
    assert!(mesh.violation().is_none(), "{:?}", mesh.violation());
    println!("{episodes} slow workers, {} events in {:.1?}", mesh.steps, began.elapsed());
}

/// Streams with the longest wait of their tasks.
type Streams = Vec<(usize, Micros)>;

/// Plays mixed traffic for this long. Errors are violations of the returned mesh.
pub(crate) fn mixed_traffic(lasts: Micros, rules: Rules) -> Mesh {
    let mut mesh = Mesh::new(Setup { through_bytes: false, rules, ..Setup::new(7) }, Story::default());
    // In the last setup both lanes share a device that takes one batch at a time.
    let places = [Place::lanes(1, 1), Place::lanes(1, 2), Place::lanes(0, 1), Place::lanes(2, 1).devices(&[0])];
    for place in places {
        // Heartbeats come every five seconds, because days are long.
        mesh.add_worker(Place { heartbeat: Duration::from_secs(5), ..place });
    }
    let mut streams = usual_traffic(&mut mesh, lasts);
    let crowd: Vec<Node> = (0..FLOOD_CLIENTS).map(|_| client(&mut mesh)).collect();
    for day in (0..lasts).step_by(DAY as usize) {
        streams.extend(flood(&mut mesh, day + HOUR, &crowd));
        streams.push(mountain(&mut mesh, day + 5 * HOUR, crowd[0]));
    }
    plan_faults(&mut mesh, lasts);
    mesh.referee.is_harmed = true;
    mesh.run_for(Duration::from_micros(lasts));
    for stream in &mut mesh.streams {
        stream.left = 0;
    }
    mesh.heal();
    mesh.settle(Duration::from_secs(3600));
    streams.into_iter().for_each(|(stream, longest)| judge(&mut mesh, stream, longest));
    mesh
}

/// Checks that all tasks of the stream are done, and that none waited too long.
fn judge(mesh: &mut Mesh, stream: usize, longest: Micros) {
    let took = mesh.latencies(stream);
    let last = took.last().copied().unwrap_or_default();
    let truths = mesh.streams[stream].tasks.iter().map(|task| mesh.referee.task(*task));
    let is_done = |(_, end): &(usize, mesh_core::client::End)| matches!(end.outcome, Outcome::Done { .. });
    let (done, all) = (truths.clone().filter(|truth| truth.ends.iter().any(is_done)).count(), truths.count());
    if stream < 8 {
        let middle = took.get(took.len() / 2).copied().unwrap_or_default();
        println!("stream {stream}: {done} of {all} done, median {middle:?}, longest {last:?}");
    }
    if last > Duration::from_micros(longest) {
        mesh.referee.fail("nothing starves", format!("a task of stream {stream} took {last:?}"));
    }
    if done * 1000 < all * 995 {
        mesh.referee.fail("tasks are done", format!("of stream {stream}, {done} of {all}"));
    }
}

fn client(mesh: &mut Mesh) -> Node {
    let user = mesh.add_user();
    mesh.add_client(user, true)
}

/// The constant traffic of day and night.
fn usual_traffic(mesh: &mut Mesh, lasts: Micros) -> Streams {
    let (s, ms) = (Duration::from_secs, Duration::from_millis);
    let usual = [
        (Job::runs(ms(300)).model(PACKS, 1 << 20), s(12), REALTIME_WAIT_MAX),
        (Job::runs(ms(50)), s(20), REALTIME_WAIT_MAX),
        (Job::runs(ms(500)).items(4).lane(Lane::Batch), s(60), BATCH_WAIT_MAX),
        (Job::runs(s(4)).model(TAKES_LONG, 1 << 20).priority(0).lane(Lane::Batch), s(150), BATCH_WAIT_MAX),
        (Job::runs(ms(200)).model(PACKS, 1 << 20).then(PACKS + 4).items(4), s(45), REALTIME_WAIT_MAX),
    ];
    let begin = |(job, gap, longest)| {
        let client = client(mesh);
        (mesh.stream_for(client, job, Pace::Every(gap), Duration::from_micros(lasts)), longest)
    };
    usual.into_iter().map(begin).collect()
}

/// A stream whose tasks all come at once, later.
fn later(mesh: &mut Mesh, at: Micros, client: Node, job: &Job, pace: Pace, at_once: u32) -> usize {
    let stream = mesh.stream(client, job.clone(), pace, 0);
    for _ in 0..at_once {
        mesh.at(at, Happening::Arrive { stream });
    }
    stream
}

/// Many users always have tasks more important than the lowest priority.
fn flood(mesh: &mut Mesh, at: Micros, crowd: &[Node]) -> Streams {
    let job = Job::runs(Duration::from_secs(4)).model(TAKES_LONG, 4 << 10).light().priority(90).lane(Lane::Batch);
    let begin = |client: &Node| {
        let stream = later(mesh, at, *client, &job, Pace::Closed(1), 1);
        (mesh.streams[stream].left, mesh.streams[stream].until) = (u32::MAX, at + FLOOD_LASTS);
        (stream, BATCH_WAIT_MAX)
    };
    crowd.iter().map(begin).collect()
}

/// One user submits all tasks at once.
fn mountain(mesh: &mut Mesh, at: Micros, client: Node) -> (usize, Micros) {
    let mut job = Job::runs(Duration::from_millis(500)).items(16).priority(80);
    job.job_items = 10_000;
    let stream = later(mesh, at, client, &job, Pace::AtOnce, 600);
    mesh.streams[stream].left = 600;
    (stream, MOUNTAIN_WAIT_MAX)
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

/// A stream with a service level beside other work. Every twenty minutes another worker is slow for seven of them, and
/// later yet another dies. Measured times alone would keep tasks away, so workers take turns and the promise decides.
pub(crate) fn a_promise(episodes: usize, rules: Rules) -> Mesh {
    let setup = Setup { through_bytes: false, rules, policy: Policy::RoundRobin, ..Setup::new(11) };
    let mut mesh = Mesh::new(setup, Story::default());
    let places = [Place::lanes(2, 1), Place::lanes(1, 2), Place::lanes(2, 1).devices(&[0])];
    let workers: Vec<Node> = places.into_iter().map(|place| mesh.add_worker(place)).collect();
    let ms = Duration::from_millis;
    let promised = Job::runs(ms(20)).light().lane(Lane::Realtime).slo(250, 50);
    let beside = Job::runs(ms(20)).model(PACKS, 4 << 10).light().items(4).lane(Lane::Batch);
    let (person, other) = (client(&mut mesh), client(&mut mesh));
    mesh.run_for(Duration::from_secs(1));
    let stream = mesh.stream(person, promised, Pace::Every(ms(120)), u32::MAX);
    let background = mesh.stream(other, beside, Pace::Every(ms(5000)), u32::MAX);
    let mut plan = Rng::new(20_27);
    for episode in 0..episodes {
        let (slow, dying) = (workers[episode % 3], workers[(episode + 1) % 3]);
        mesh.run_for(Duration::from_micros(3 * MINUTE));
        let onset = mesh.now;
        mesh.slow_down(slow, plan.among(20_000..40_000));
        mesh.run_for(Duration::from_micros(7 * MINUTE));
        let healed = mesh.now;
        mesh.slow_down(slow, 1000);
        mesh.run_for(Duration::from_micros(5 * MINUTE));
        // Up to twenty seconds alone, then a trial of 24 tasks, at first one task in sixteen.
        let while_slow = mesh.share_at(slow, stream, onset + 15 * SECOND..healed);
        let afterwards = mesh.share_at(slow, stream, healed + MINUTE..mesh.now);
        println!("of 1000, {while_slow} ran at the slow worker, {afterwards} when it was well again");
        if while_slow > 80 {
            mesh.referee.fail("a slow worker is left and stays left", format!("{while_slow} of 1000 ran there"));
        }
        if afterwards < 200 {
            mesh.referee.fail("a worker that is well again is used", format!("{afterwards} of 1000 run there"));
        }
        mesh.crash(dying);
        mesh.run_for(Duration::from_micros(MINUTE));
        mesh.restart(dying);
        mesh.run_for(Duration::from_micros(4 * MINUTE));
    }
    (mesh.streams[stream].left, mesh.streams[background].left) = (0, 0);
    mesh.settle(Duration::from_secs(600));
    mesh
}
