//! Crowds: many clients want much at once, and only the stated faults happen. On top of the referee's laws, figures
//! must meet what the schedule promises.

use std::time::Duration;

use mesh_core::{Rules, broker::Policy, client::End};
use proto_msgs::{ErrorCode, Lane, Outcome, TaskId};

use super::{
    faults::Fault,
    job::{Behaviour, Job},
    mesh::{Happening, MS, Mesh, Micros, Node, SECOND, Setup},
    models::PACKS,
    referee::Truth,
    rng::Rng,
    seeds::{Ran, guarded, number_from},
    story::Story,
    streams::Pace,
    worker_shell::Place,
};

/// The kinds of crowds. A seed draws one of them and its figures.
const CROWDS: [fn(&mut Mesh, &mut Rng); 8] = [
    equal_shares,
    a_low_priority,
    a_flood_of_batches,
    mixed_company,
    a_slow_worker,
    poison,
    two_stages,
    a_lossy_network,
];

/// Time from connecting to the first row: dialling, sending the inputs, loading the model.
const BEFORE_RUN: Micros = 600 * MS;

/// Plays one seed.
pub(crate) fn play(seed: u64, rules: Rules, story: Story) -> Ran {
    let mut plan = Rng::new(seed ^ 0xc0d);
    // Every second slow worker is one whose tasks others end sooner.
    let crowd = match seed % 16 {
        12 => a_worker_well_again,
        // Every second low priority is a stream beside an idle worker.
        9 => an_idle_worker,
        // Every second crowd of equal shares is one of clients that submit again and again.
        8 => a_flood_and_a_few,
        // And every second crowd of stages is one of loads.
        14 => a_slow_load,
        _ => CROWDS[seed as usize % CROWDS.len()],
    };
    let deadly_comparisons = seed.is_multiple_of(2).then_some(3);
    let setup = Setup { rules, through_bytes: seed.is_multiple_of(8), deadly_comparisons, ..Setup::new(seed) };
    let mut mesh = Mesh::new(setup, story);
    crowd(&mut mesh, &mut plan);
    if mesh.violation().is_none() {
        mesh.heal();
        mesh.settle(Duration::from_secs(300));
    }
    Ran::of(mesh)
}

pub(crate) fn play_safely(seed: u64, rules: Rules, told: bool) -> Ran {
    guarded(|| play(seed, rules, if told { Story::told() } else { Story::default() }))
}

fn workers(mesh: &mut Mesh, count: u64, place: &Place) -> Vec<Node> {
    let workers = (0..count).map(|_| mesh.add_worker(place.clone())).collect();
    mesh.run_for(Duration::from_secs(1));
    workers
}

/// Adds `count` users with one process each.
fn clients(mesh: &mut Mesh, count: u64) -> Vec<Node> {
    let client = |_| {
        let user = mesh.add_user();
        mesh.add_client(user, true)
    };
    (0..count).map(client).collect()
}

fn lasts(time: Micros) -> Duration {
    Duration::from_micros(time)
}

impl Mesh {
    fn streams_over(&self, streams: &[usize]) -> bool {
        streams.iter().all(|stream| {
            let stream = &self.streams[*stream];
            stream.left == 0 && stream.tasks.iter().all(|task| self.expect(*task).is_over())
        })
    }

    /// Plays on until all tasks of these streams have ended; if they do not end in time, that is a violation.
    fn play_out(&mut self, streams: &[usize], limit: Duration) {
        let is_over = self.run_until(limit, |mesh| mesh.streams_over(streams));
        if !is_over && self.violation().is_none() {
            let left = self.unsettled();
            self.referee.fail("all comes to an end", format!("{left:?} after {limit:?}"));
        }
    }

    fn tasks_of(&self, stream: usize) -> impl Iterator<Item = TaskId> {
        self.streams[stream].tasks.iter().copied()
    }

    /// Time until the rows of a task began to run, or until now.
    fn waited(&self, task: TaskId) -> Micros {
        let truth = self.referee.task(task);
        truth.began.or(truth.ended).unwrap_or(self.now).saturating_sub(truth.submitted)
    }

    /// Of the stream's tasks submitted in this span: the thousandths that ran at `worker`.
    pub(super) fn share_at(&self, worker: Node, stream: usize, span: std::ops::Range<Micros>) -> u64 {
        let truths = self.tasks_of(stream).map(|task| self.referee.task(task));
        let ran_at: Vec<usize> = truths
            .filter(|truth| span.contains(&truth.submitted))
            .filter_map(|truth| truth.runs.last().map(|(_, worker)| *worker))
            .collect();
        let here = ran_at.iter().filter(|ran_at| Node::Worker(**ran_at) == worker).count();
        here as u64 * 1000 / ran_at.len().max(1) as u64
    }
}

/// A model takes longer to load than its tasks may take: it is loaded all the same, and then they are in time.
fn a_slow_load(mesh: &mut Mesh, plan: &mut Rng) {
    mesh.setup.load = plan.among(600 * MS..3 * SECOND);
    let count = plan.among(1..4);
    workers(mesh, count, &plan.pick(&[Place::lanes(0, 1), Place::lanes(1, 1), Place::lanes(2, 2)]));
    let client = clients(mesh, 1)[0];
    mesh.run_for(Duration::from_secs(5));
    let deadline = Duration::from_millis(plan.among(150..400));
    let job = Job::runs(Duration::from_millis(10)).light().deadline(deadline);
    for round in 0..3 {
        let stream = mesh.stream(client, job.clone(), Pace::Every(Duration::from_millis(200)), 100);
        mesh.play_out(&[stream], Duration::from_secs(120));
        let truths = mesh.tasks_of(stream).map(|task| mesh.referee.task(task));
        let is_met = |truth: &&Truth| matches!(truth.ends[..], [(_, End { outcome: Outcome::Done { .. }, .. })]);
        let met = truths.skip(50).filter(is_met).count();
        if mesh.violation().is_none() && met < 45 {
            let detail = format!("round {round}: {met} of the last 50 tasks were in time, each has {deadline:?}");
            return mesh.referee.fail("a load is paid once", detail);
        }
        (0..mesh.workers.len()).for_each(|worker| mesh.cool(Node::Worker(worker)));
        mesh.run_for(Duration::from_secs(40));
    }
}

/// A model that one of two workers has loaded: short bursts load it nowhere else, and a stream reaches the other one.
fn an_idle_worker(mesh: &mut Mesh, plan: &mut Rng) {
    mesh.setup.load = plan.among(2 * SECOND..4 * SECOND);
    let nodes = workers(mesh, 2, &plan.pick(&[Place::lanes(0, 1), Place::lanes(1, 0)]));
    let client = clients(mesh, 1)[0];
    let job = Job::runs(Duration::from_millis(plan.among(60..110))).light().lane(Lane::Realtime);
    for count in [1, 8, 8, 8] {
        let burst = mesh.stream(client, job.clone(), Pace::AtOnce, count);
        mesh.play_out(&[burst], Duration::from_secs(60));
        mesh.level_links(MS);
        mesh.run_for(Duration::from_secs(70));
    }
    let loads: u32 = mesh.workers.iter().map(|worker| worker.loads).sum();
    if mesh.violation().is_none() && loads != 1 {
        mesh.referee.fail("a load pays off", format!("{loads} loads for bursts that are over sooner"));
    }
    let stream = mesh.stream_for(client, job, Pace::Closed(9), Duration::from_secs(30));
    mesh.run_for(Duration::from_secs(30));
    let shares = nodes.iter().map(|node| mesh.share_at(*node, stream, mesh.now - 15 * SECOND..mesh.now));
    let least = shares.min().unwrap_or(0);
    if mesh.violation().is_none() && least < 250 {
        mesh.referee.fail("a stream reaches an idle worker", format!("it runs {least} thousandths"));
    }
    mesh.streams[stream].left = 0;
    mesh.play_out(&[stream], Duration::from_secs(60));
}

/// One client comes early with many tasks, another later with few: from then on both get the same share.
fn equal_shares(mesh: &mut Mesh, plan: &mut Rng) {
    let count = plan.among(1..4);
    workers(mesh, count, &plan.pick(&[Place::lanes(0, 1), Place::lanes(1, 1), Place::lanes(0, 2)]));
    let people = clients(mesh, 2);
    let lane = plan.pick(&Lane::ALL);
    let run = lasts(plan.among(80 * MS..400 * MS));
    let job = Job::runs(run).light().lane(lane);
    let much = mesh.stream(people[0], job.clone(), Pace::AtOnce, 60 * count as u32 + 60);
    mesh.run_for(Duration::from_secs(2));
    let (from, little_count) = (mesh.now, 40);
    let little = mesh.stream(people[1], job, Pace::AtOnce, little_count);
    mesh.play_out(&[little], Duration::from_secs(120));
    let ended_since = |task: &TaskId| mesh.referee.task(*task).ended.is_some_and(|ended| ended >= from);
    let others = mesh.tasks_of(much).filter(ended_since).count() as u32;
    let all_ended = mesh.streams_over(&[much]);
    // Tasks placed before, and the granularity of both clients.
    let slack = 10 + 4 * count as u32;
    if others > little_count * 5 / 4 + slack || !all_ended && others + slack < little_count * 3 / 4 {
        let detail = format!("{little_count} tasks of one client ended beside {others} of the other");
        mesh.referee.fail("clients get equal shares", detail);
    }
    mesh.play_out(&[much], Duration::from_secs(120));
}

/// One client has very many tasks under way, another one a few that always wait: they get the same.
fn a_flood_and_a_few(mesh: &mut Mesh, plan: &mut Rng) {
    workers(mesh, 1, &plan.pick(&[Place::lanes(0, 1), Place::lanes(1, 1), Place::lanes(0, 2)]));
    let people = clients(mesh, 2);
    let job = Job::runs(lasts(plan.among(40 * MS..120 * MS))).light().lane(plan.pick(&Lane::ALL));
    let (many, few) = (plan.among(60..250) as u32, plan.among(8..16) as u32);
    let flood = mesh.stream_for(people[0], job.clone(), Pace::Closed(many), Duration::from_secs(27));
    mesh.run_for(Duration::from_secs(5));
    let beside = mesh.stream_for(people[1], job, Pace::Closed(few), Duration::from_secs(22));
    mesh.run_for(Duration::from_secs(2));
    let from = mesh.now;
    mesh.run_for(Duration::from_secs(20));
    let ended = [flood, beside].map(|stream| {
        let is_since = |task: &TaskId| mesh.referee.task(*task).ended.is_some_and(|ended| ended >= from);
        mesh.tasks_of(stream).filter(is_since).count()
    });
    if mesh.violation().is_none() && ended[1] * 11 < ended[0] * 9 {
        let detail = format!("{ended:?} tasks ended of clients with {many} and {few} under way");
        mesh.referee.fail("clients get equal shares", detail);
    }
    (mesh.streams[flood].left, mesh.streams[beside].left) = (0, 0);
    mesh.play_out(&[flood, beside], Duration::from_secs(120));
}

/// A low-priority client has time, and forty others always have more important tasks.
fn a_low_priority(mesh: &mut Mesh, plan: &mut Rng) {
    workers(mesh, 1, &Place::lanes(0, 1));
    let people = clients(mesh, 41);
    let run = lasts(plan.among(150 * MS..300 * MS));
    let important = Job::runs(run).light().lane(Lane::Realtime).priority(plan.among(90..101) as u8);
    let span = Duration::from_secs(150);
    let streams: Vec<usize> =
        people[1..].iter().map(|client| mesh.stream_for(*client, important.clone(), Pace::Closed(1), span)).collect();
    mesh.run_for(Duration::from_secs(5));
    let low = mesh.submit(people[0], Job::runs(run).light().lane(Lane::Realtime).priority(0));
    mesh.run_for(Duration::from_secs(130));
    // A hundred points of priority count a hundred seconds; the rest is for tasks that already run.
    if mesh.waited(low) > 115 * SECOND {
        mesh.referee
            .fail("nothing starves", format!("a task of low priority has waited {} s", mesh.waited(low) / SECOND));
    }
    mesh.run_for(Duration::from_secs(20));
    for stream in &streams {
        mesh.streams[*stream].left = 0;
    }
    mesh.play_out(&streams, Duration::from_secs(60));
}

/// The batch lane is flooded first. Then realtime clients come.
fn a_flood_of_batches(mesh: &mut Mesh, plan: &mut Rng) {
    let count = plan.among(1..3);
    let (realtime, batch, is_contended) =
        plan.pick(&[(1, 1, false), (2, 2, false), (1, 2, false), (0, 1, false), (1, 1, true), (1, 1, true)]);
    let place = Place::lanes(realtime, batch);
    workers(mesh, count, &if is_contended { place.devices(&[0]) } else { place });
    let people = clients(mesh, 3);
    let each = plan.among(10 * MS..60 * MS);
    let model = plan.pick(&[0, 0, PACKS]);
    let model = if is_contended { 0 } else { model };
    let job = |items: u32| Job::runs(lasts(each)).model(model, 4 << 10).light().items(items);
    let mut bulk = job(8);
    bulk.job_items = 1000;
    let floods = [0, 1].map(|person| mesh.stream(people[person], bulk.clone(), Pace::AtOnce, 60));
    mesh.run_for(Duration::from_secs(2));
    let at_once = (u64::from(realtime) * count).max(1) as u32;
    let asked = mesh.stream_for(people[2], job(1), Pace::Closed(at_once), Duration::from_secs(6));
    mesh.run_for(Duration::from_secs(6));
    let longest = mesh.tasks_of(asked).map(|task| mesh.waited(task)).max().unwrap_or(0);
    // One batch that runs already. On a device of both lanes one more, which is owed to the batch lane; where both
    // share one slot, also one that was on its way.
    let batches = if realtime == 0 { 3 } else { 1 + u64::from(is_contended) };
    let one_batch = each * 8;
    if longest > batches * one_batch + BEFORE_RUN {
        let detail = format!("{} ms with batches of {} ms", longest / MS, one_batch / MS);
        mesh.referee.fail("realtime waits for one batch", detail);
    }
    mesh.streams[asked].left = 0;
    mesh.play_out(&[asked, floods[0], floods[1]], Duration::from_secs(240));
}

/// Rows of many tasks run together, and some of these tasks fail.
fn mixed_company(mesh: &mut Mesh, plan: &mut Rng) {
    let count = plan.among(1..3);
    workers(mesh, count, &plan.pick(&[Place::lanes(1, 1), Place::lanes(0, 2), Place::lanes(1, 1).devices(&[0])]));
    let people = clients(mesh, 8);
    let each = lasts(plan.among(5 * MS..40 * MS));
    let lane = plan.pick(&Lane::ALL);
    let rotten = plan.pick(&[Behaviour::LosesRow, Behaviour::Fails(ErrorCode::RunFailed), Behaviour::FailsFirst(1)]);
    let streams: Vec<usize> = people
        .iter()
        .enumerate()
        .map(|(number, client)| {
            let items = plan.pick(&[1, 1, 2, 5, 8]);
            let mut job = Job::runs(each).model(PACKS, 4 << 10).light().lane(lane).items(items);
            if number == 0 {
                job.behaviour = rotten;
            }
            let pace = if number == 0 { Pace::Every(Duration::from_millis(400)) } else { Pace::Closed(3) };
            mesh.stream_for(*client, job, pace, Duration::from_secs(12))
        })
        .collect();
    mesh.run_for(Duration::from_secs(12));
    for stream in &streams {
        mesh.streams[*stream].left = 0;
    }
    mesh.play_out(&streams, Duration::from_secs(60));
}

/// A stream with a service level, and a worker that misses it for a while.
fn a_slow_worker(mesh: &mut Mesh, plan: &mut Rng) {
    mesh.restart_with_policy(Policy::RoundRobin);
    let nodes = workers(mesh, 2, &Place::lanes(2, 1));
    let people = clients(mesh, 1);
    let job = Job::runs(lasts(20 * MS)).light().lane(Lane::Realtime).slo(250, 50);
    let pace = Pace::Every(lasts(plan.among(50 * MS..80 * MS)));
    let stream = mesh.stream_for(people[0], job, pace, Duration::from_secs(190));
    mesh.run_for(Duration::from_secs(20));
    let onset = mesh.now;
    mesh.slow_down(nodes[0], plan.among(20_000..40_000));
    mesh.run_for(Duration::from_secs(70));
    let healed = mesh.now;
    mesh.slow_down(nodes[0], 1000);
    mesh.run_for(Duration::from_secs(100));
    // The scheduler tries now and then whether the worker is well again, with one task in sixteen.
    let while_slow = mesh.share_at(nodes[0], stream, onset + 15 * SECOND..healed);
    // Up to twenty seconds alone, then a trial of 24 tasks, at first one task in sixteen.
    let afterwards = mesh.share_at(nodes[0], stream, healed + 45 * SECOND..mesh.now);
    if while_slow > 100 {
        let detail = format!("{while_slow} thousandths ran at the slow worker");
        mesh.referee.fail("a slow worker is left and stays left", detail);
    }
    if afterwards < 250 {
        let detail = format!("{afterwards} thousandths run at the worker that is well again");
        mesh.referee.fail("a worker that is well again is used", detail);
    }
    mesh.streams[stream].left = 0;
    mesh.play_out(&[stream], Duration::from_secs(60));
}

/// A worker is slow for a while and gets no tasks, since others end them sooner. Only trials show that it is well again.
fn a_worker_well_again(mesh: &mut Mesh, plan: &mut Rng) {
    let nodes = workers(mesh, 2, &Place::lanes(2, 1));
    let people = clients(mesh, 3);
    let job = Job::runs(lasts(plan.among(10 * MS..30 * MS))).model(plan.pick(&[0, PACKS]), 4 << 10).light();
    let promised = plan.pick(&[job.clone(), job.clone().slo(80, 50)]);
    let hasty = job.clone().deadline(Duration::from_millis(400));
    let always = Duration::from_secs(120);
    let stream = mesh.stream_for(people[0], promised.clone(), Pace::Closed(3), always);
    let other = mesh.stream_for(people[1], promised, Pace::Closed(3), always);
    mesh.run_for(Duration::from_secs(2));
    mesh.level_links(MS);
    mesh.run_for(Duration::from_secs(8));
    let onset = mesh.now;
    mesh.slow_down(nodes[0], plan.among(15_000..30_000));
    mesh.run_for(Duration::from_secs(3));
    let hurry = mesh.stream_for(people[2], hasty, Pace::Every(lasts(250 * MS)), always);
    mesh.run_for(Duration::from_secs(plan.among(5..12)));
    let healed = mesh.now;
    mesh.slow_down(nodes[0], 1000);
    mesh.run_for(Duration::from_secs(25));
    // Each of the two may have settled at a worker of its own.
    let span = healed + 15 * SECOND..mesh.now;
    let shares = [stream, other].map(|stream| mesh.share_at(nodes[0], stream, span.clone()));
    let afterwards = shares.iter().sum::<u64>() / 2;
    let trials = mesh.broker.machine.as_ref().map_or(0, |broker| broker.counters().trials);
    // One in ten seconds for each worker.
    if trials > 2 * (mesh.now / (10 * SECOND)) {
        mesh.referee.fail("trials are few", format!("{trials} in {} s", mesh.now / SECOND));
    }
    if afterwards < 200 {
        let detail = format!("{afterwards} thousandths run at the worker that is well again");
        mesh.referee.fail("a worker that is well again is used", detail);
    }
    let is_done = |end: &End| matches!(end.outcome, Outcome::Done { .. });
    // Both may have settled at the other worker: then the first hasty task is no trial, for nobody knows of the change.
    let tells = |truth: &&Truth| truth.runs.last().is_some_and(|(_, at)| *at == 0) && truth.began >= Some(onset);
    let all = [stream, other, hurry].map(|stream| mesh.tasks_of(stream).collect::<Vec<_>>()).concat();
    let told = all.iter().map(|task| mesh.referee.task(*task)).filter(tells).filter_map(|truth| truth.ended).min();
    let known = told.map_or(Micros::MAX, |ended| ended + SECOND);
    let was_tried = |truth: &&Truth| truth.placements.iter().any(|(_, worker)| *worker == mesh.workers[0].id);
    let is_late = |truth: &&Truth| {
        let missed = truth.ended.is_some() && !truth.ends.iter().any(|(_, end)| is_done(end));
        missed && (known..healed).contains(&truth.submitted) && was_tried(truth)
    };
    let late = mesh.tasks_of(hurry).map(|task| mesh.referee.task(task)).filter(is_late).count();
    if late > 0 {
        mesh.referee.fail("trials make no task late", format!("{late} tasks missed their deadlines"));
    }
    let streams = [stream, other, hurry];
    streams.iter().for_each(|stream| mesh.streams[*stream].left = 0);
    mesh.play_out(&streams, Duration::from_secs(60));
}

/// A task that kills each worker that runs it, among harmless ones.
fn poison(mesh: &mut Mesh, plan: &mut Rng) {
    let count = plan.among(4..6);
    workers(mesh, count, &Place::lanes(0, 1));
    let people = clients(mesh, 2);
    mesh.referee.is_harmed = true;
    let stream = mesh.stream_for(
        people[1],
        Job::runs(lasts(100 * MS)).light(),
        Pace::Every(lasts(900 * MS)),
        Duration::from_secs(60),
    );
    let deadly = Job::runs(lasts(plan.among(800 * MS..2 * SECOND))).behaves(Behaviour::KillsWorker);
    let task = mesh.submit(people[0], deadly);
    let is_over = mesh.run_until(Duration::from_secs(150), |mesh| mesh.expect(task).is_over());
    if !is_over && mesh.violation().is_none() {
        mesh.referee.fail("poison stops", format!("{} workers went down with it", mesh.referee.task(task).kills));
    }
    mesh.run_for(Duration::from_secs(60));
    mesh.streams[stream].left = 0;
    mesh.play_out(&[stream], Duration::from_secs(60));
}

/// Rows of many clients go through one model and then another.
fn two_stages(mesh: &mut Mesh, plan: &mut Rng) {
    let count = plan.among(1..3);
    workers(mesh, count, &plan.pick(&[Place::lanes(1, 1), Place::lanes(2, 2), Place::lanes(1, 1).devices(&[0, 1])]));
    let people = clients(mesh, 3);
    let streams: Vec<usize> = people
        .iter()
        .map(|client| {
            let each = lasts(plan.among(5 * MS..50 * MS));
            let (first, second) = (plan.among(0..4) as u8, plan.among(4..8) as u8);
            let job = Job::runs(each).model(first, 4 << 10).light().then(second).items(plan.pick(&[1, 4, 9, 33]));
            let job = if plan.permille(300) { job.then(plan.among(8..12) as u8) } else { job };
            mesh.stream(*client, job, Pace::Closed(4), 24)
        })
        .collect();
    mesh.at(mesh.now + 3 * SECOND, Happening::Fault(Fault::Slow(0, 2500)));
    mesh.play_out(&streams, Duration::from_secs(240));
    if mesh.referee.rooms.overlaps() == 0 {
        mesh.referee.fail("stages overlap", "no later stage ran while rows waited for a first one".to_owned());
    }
}

/// One message in four is lost, and every detached task still ends.
fn a_lossy_network(mesh: &mut Mesh, plan: &mut Rng) {
    let count = plan.among(1..4);
    workers(mesh, count, &Place::slots(2));
    let people = clients(mesh, 2);
    mesh.net.lost_permille = 250;
    let jobs = [
        Job::runs(lasts(plan.among(50 * MS..2 * SECOND))).light().detached(),
        Job::runs(lasts(plan.among(50 * MS..2 * SECOND))).light().detached().items(5),
    ];
    let streams: Vec<usize> = people
        .iter()
        .zip(jobs)
        .map(|(client, job)| mesh.stream(*client, job, Pace::Every(Duration::from_secs(1)), 12))
        .collect();
    mesh.play_out(&streams, Duration::from_secs(200));
    mesh.run_for(Duration::from_secs(20));
    // All tasks were acknowledged, so every fetch finds a result.
    let tasks: Vec<TaskId> = streams.iter().flat_map(|stream| mesh.tasks_of(*stream).collect::<Vec<_>>()).collect();
    for task in tasks {
        let owner = mesh.referee.task(task).owner;
        let user = mesh.users.iter().position(|user| user.id == owner).unwrap_or(0);
        mesh.fetch(people[user], task);
    }
    mesh.run_for(Duration::from_secs(60));
}

#[test]
fn crowds() {
    let first = number_from("MESH_SIM_FIRST_CROWD", 0);
    let count = number_from("MESH_SIM_CROWDS", if cfg!(debug_assertions) { 16 } else { 240 });
    let began = std::time::Instant::now();
    let (mut steps, mut seconds) = (0, 0);
    for seed in first..first + count {
        let ran = play_safely(seed, Rules::default(), false);
        (steps, seconds) = (steps + ran.steps, seconds + ran.mesh_seconds);
        if let Some(violation) = ran.violation {
            let story = play_safely(seed, Rules::default(), true).story.last_lines();
            let replay = format!(
                "MESH_SIM_FIRST_CROWD={seed} MESH_SIM_CROWDS=1 cargo test --release -p mesh-core --test sim -- crowds::crowds --nocapture"
            );
            panic!(
                "crowd {seed} broke the law \"{}\": {}\n{story}\n  replay: {replay}\n",
                violation.law, violation.detail
            );
        }
    }
    println!("{count} crowds, {} mesh minutes, {steps} events in {:.1?}", seconds / 60, began.elapsed());
}
