//! Short stories about which task runs when, where and with which others. The referee watches these, too.

use std::time::Duration;

use proto_msgs::{ErrorCode, LabelRule, Lane, Packing, TaskId};

use super::{
    job::{Behaviour, Job},
    mesh::{MS, Mesh, Node, Setup},
    models::PACKS,
    stories::{C0, W0, W1, mesh, ms, s},
    story::Story,
    streams::Pace,
    worker_shell::Place,
};

fn more_clients(mesh: &mut Mesh, count: usize) -> Vec<Node> {
    let client = |_| {
        let user = mesh.add_user();
        mesh.add_client(user, true)
    };
    (0..count).map(client).collect()
}

fn packs(run: Duration) -> Job {
    Job::runs(run).model(PACKS, 4 << 10).light()
}

impl Mesh {
    #[track_caller]
    fn until_all_over(&mut self, tasks: &[TaskId]) {
        for task in tasks {
            self.until_over(*task);
        }
    }

    /// How a worker runs the model, according to its heartbeats.
    fn packing(&self, worker: usize, model: u8) -> Packing {
        let costs = self.referee.rooms.costs_of(worker);
        let cost = costs.iter().find(|cost| cost.model == Job::runs(ms(1)).model(model, 1).model_digest());
        cost.map_or(Packing::Unknown, |cost| cost.packing)
    }
}

#[test]
fn who_waits_for_an_answer_gets_it_while_a_flood_of_batches_runs() {
    let mut mesh = mesh(&[Place::lanes(1, 1)]);
    let asks = more_clients(&mut mesh, 1)[0];
    let flood = mesh.stream(C0, Job::runs(ms(500)).light().items(8).lane(Lane::Batch), Pace::AtOnce, 10);
    mesh.run_for(s(2));
    let answer = mesh.submit(asks, Job::runs(ms(100)).light());
    mesh.until("it is answered", s(2), |mesh| mesh.expect(answer).is_over());
    mesh.expect(answer).done();
    assert!(mesh.latencies(flood).len() < 3, "the flood still runs");
    mesh.end_well();
}

#[test]
fn the_batch_lane_leaves_realtime_slots_alone_and_lends_its_own() {
    let mut mesh = mesh(&[Place::lanes(2, 1)]);
    let batches: Vec<TaskId> = (0..4).map(|_| mesh.submit(C0, Job::runs(s(2)).light().lane(Lane::Batch))).collect();
    mesh.run_for(ms(1500));
    assert_eq!(batches.iter().filter(|task| mesh.is_running(**task)).count(), 1);
    mesh.until_all_over(&batches);
    let asked: Vec<TaskId> = (0..4).map(|_| mesh.submit(C0, Job::runs(s(2)).light())).collect();
    mesh.run_for(ms(1500));
    assert_eq!(asked.iter().filter(|task| mesh.is_running(**task)).count(), 3, "the idle batch slot is lent");
    mesh.end_well();
}

#[test]
fn a_worker_without_batch_slots_gets_no_batch_task() {
    let mut mesh = mesh(&[Place::lanes(2, 0)]);
    let task = mesh.submit(C0, Job::runs(ms(100)).lane(Lane::Batch));
    mesh.until_over(task);
    mesh.expect(task).failed(ErrorCode::NoWorkerFits);
    mesh.end_well();
}

#[test]
fn a_deadline_is_refused_at_once_when_it_cannot_be_met_and_never_by_guess() {
    let mut mesh = mesh(&[Place::lanes(0, 1)]);
    let unmeasured = mesh.submit(C0, Job::runs(s(1)).deadline(ms(2500)));
    mesh.until_over(unmeasured);
    mesh.expect(unmeasured).done();
    // Long after the broker started.
    mesh.run_for(s(5));
    let before: Vec<TaskId> = (0..8).map(|_| mesh.submit(C0, Job::runs(s(1)))).collect();
    mesh.run_for(ms(500));
    let hopeless = mesh.submit(C0, Job::runs(s(1)).deadline(s(3)));
    mesh.until("it is refused", ms(200), |mesh| mesh.expect(hopeless).is_over());
    mesh.expect(hopeless).failed(ErrorCode::DeadlineUnmeetable).ran_times(0);
    let patient = mesh.submit(C0, Job::runs(s(1)).deadline(s(30)));
    mesh.until_all_over(&before);
    mesh.until_over(patient);
    mesh.expect(patient).done();
    mesh.end_well();
}

#[test]
fn items_of_many_clients_run_together_and_each_gets_its_own() {
    let mut mesh = mesh(&[Place::lanes(0, 1)]);
    let people = more_clients(&mut mesh, 12);
    let streams: Vec<usize> =
        people.iter().map(|client| mesh.stream(*client, packs(ms(40)).items(2), Pace::Closed(2), 20)).collect();
    let last = |mesh: &Mesh| streams.iter().all(|stream| mesh.latencies(*stream).len() == 20);
    mesh.until("all have their answers", s(60), last);
    let shared = mesh.referee.rooms.batches_of_many();
    assert!(shared >= 10, "{shared} batches held rows of several tasks");
    assert_eq!(mesh.packing(0, PACKS), Packing::On);
    mesh.end_well();
}

#[test]
fn only_models_that_gain_by_it_and_stay_right_are_packed() {
    for (model, verdict) in [(4, Packing::NoGain), (6, Packing::Differs), (7, Packing::Unsupported)] {
        let mut mesh = mesh(&[Place::lanes(0, 1)]);
        let job = Job::runs(ms(40)).model(model, 4 << 10).light().items(4);
        let stream = mesh.stream(C0, job, Pace::Closed(4), 16);
        mesh.until("all have their answers", s(60), |mesh| mesh.latencies(stream).len() == 16);
        mesh.run_for(s(2));
        assert_eq!(mesh.packing(0, model), verdict);
        mesh.end_well();
    }
}

#[test]
fn what_is_rotten_spoils_nobody_elses_rows() {
    for rotten in [Behaviour::LosesRow, Behaviour::Fails(ErrorCode::RunFailed)] {
        let mut mesh = mesh(&[Place::lanes(0, 1)]);
        let people = more_clients(&mut mesh, 6);
        let warm_up = mesh.stream(C0, packs(ms(40)).items(4), Pace::Closed(4), 12);
        mesh.until("the model is known to pack", s(60), |mesh| mesh.latencies(warm_up).len() == 12);
        let others: Vec<usize> =
            people.iter().map(|client| mesh.stream(*client, packs(ms(40)), Pace::Closed(3), 12)).collect();
        let bad = mesh.stream(C0, packs(ms(40)).behaves(rotten), Pace::Closed(1), 6);
        let all = |mesh: &Mesh| others.iter().all(|stream| mesh.latencies(*stream).len() == 12);
        mesh.until("the others have their answers", s(60), all);
        mesh.until("and so have the rotten ones", s(60), |mesh| mesh.latencies(bad).len() == 6);
        for task in mesh.streams[bad].tasks.clone() {
            match rotten {
                Behaviour::LosesRow => mesh.expect(task).done(),
                _ => mesh.expect(task).failed(ErrorCode::RunFailed),
            };
        }
        // The referee has checked that the other results are right and in time.
        mesh.end_well();
    }
}

#[test]
fn one_of_a_batch_is_taken_back_and_the_others_do_not_notice() {
    let mut mesh = mesh(&[Place::lanes(0, 1)]);
    let warm_up = mesh.stream(C0, packs(ms(200)).items(4), Pace::Closed(4), 12);
    mesh.until("the model is known to pack", s(60), |mesh| mesh.latencies(warm_up).len() == 12);
    let people = more_clients(&mut mesh, 4);
    let tasks: Vec<TaskId> = people.iter().map(|client| mesh.submit(*client, packs(s(2)))).collect();
    mesh.until("several run together", s(10), |mesh| tasks.iter().filter(|task| mesh.is_running(**task)).count() > 1);
    let [one, other] = [0, 1].map(|nth| {
        tasks.iter().copied().filter(|task| mesh.is_running(*task)).nth(nth).expect("at least two run together")
    });
    mesh.cancel(one);
    mesh.expect(one).cancelled();
    mesh.until_over(other);
    mesh.expect(other).done().ran_times(1);
    mesh.end_well();
}

#[test]
fn a_batch_that_nobody_wants_any_more_is_killed() {
    let mut mesh = mesh(&[Place::lanes(0, 1)]);
    let task = mesh.submit(C0, Job::runs(s(3)).items(3).light());
    mesh.until("it runs", s(3), |mesh| mesh.is_running(task));
    mesh.cancel(task);
    mesh.until("its batch is killed", ms(200), |mesh| !mesh.is_running(task));
    mesh.end_well();
}

#[test]
fn two_stages_overlap_and_keep_their_order() {
    let mut mesh = mesh(&[Place::lanes(0, 2)]);
    let job = || Job::runs(ms(500)).light().lane(Lane::Batch).then(4);
    let first = mesh.submit(C0, job());
    mesh.until_over(first);
    let from = mesh.now;
    let tasks: Vec<TaskId> = (0..10).map(|_| mesh.submit(C0, job())).collect();
    mesh.until_all_over(&tasks);
    // One after the other the items are 10 s of work; side by side a little more than half of that.
    let took = mesh.now - from;
    assert!(took < 6500 * 1000, "{} ms", took / 1000);
    mesh.end_well();
}

#[test]
fn equal_workers_get_equal_parts() {
    for items in [100_u32, 500, 2000] {
        let mut mesh = mesh(&[(); 4].map(|()| Place::lanes(0, 1)));
        // As a client cuts for four slots: ten parts for each, of at most eight items.
        let each = items.div_ceil(4 * 10).min(8);
        let sizes: Vec<u32> = (0..items).step_by(each as usize).map(|first| each.min(items - first)).collect();
        let job = |size: u32| Job { job_items: items, ..Job::runs(ms(60)).light().items(size) };
        let tasks: Vec<TaskId> = sizes.iter().map(|size| mesh.submit(C0, job(*size))).collect();
        mesh.until_all_over(&tasks);
        let mut by_worker = [0; 4];
        for (task, size) in tasks.iter().zip(&sizes) {
            by_worker[mesh.referee.task(*task).runs[0].1] += size;
        }
        let (most, least) = (by_worker.iter().max().unwrap_or(&0), by_worker.iter().min().unwrap_or(&0));
        assert!(most * 100 <= least * 115, "{items} items: {by_worker:?}");
        mesh.end_well();
    }
}

/// Tasks of a job of `items` items, cut into parts of at most eight.
fn submit_cut(mesh: &mut Mesh, job: &Job, items: u32) -> Vec<TaskId> {
    let count = items.div_ceil(8);
    let sizes = (0..count).map(|nth| items * (nth + 1) / count - items * nth / count);
    let job = Job { job_items: items, ..job.clone() };
    sizes.map(|size| mesh.submit(C0, Job { items: size, ..job.clone() })).collect()
}

/// A model that packs, known at four workers with one device each.
fn four_that_pack(seed: u64, job: &Job) -> Mesh {
    let mut mesh = Mesh::new(Setup::new(seed), Story::default());
    for _ in 0..4 {
        mesh.add_worker(Place::lanes(1, 1).devices(&[0]));
    }
    let user = mesh.add_user();
    mesh.add_client(user, true);
    mesh.run_for(s(1));
    for _ in 0..3 {
        let warm_up = submit_cut(&mut mesh, job, 1024);
        mesh.until_all_over(&warm_up);
        mesh.run_for(s(2));
    }
    mesh.level_links(MS);
    mesh
}

#[test]
fn workers_that_pack_get_equal_parts_too() {
    for (seed, each_ms) in [(0, 20), (1, 20), (2, 20), (0, 60), (1, 60), (2, 60)] {
        let mut mesh = four_that_pack(seed, &packs(ms(each_ms)));
        for items in [500, 1000, 2000] {
            let tasks = submit_cut(&mut mesh, &packs(ms(each_ms)), items);
            mesh.until_all_over(&tasks);
            let mut by_worker = [0; 4];
            for task in &tasks {
                let truth = mesh.referee.task(*task);
                by_worker[truth.runs[0].1] += truth.job.items;
            }
            let (most, least) = (by_worker.iter().max().unwrap_or(&0), by_worker.iter().min().unwrap_or(&0));
            assert!(most * 100 <= least * 115, "seed {seed}, {items} items of {each_ms} ms: {by_worker:?}");
        }
        mesh.end_well();
    }
}

#[test]
fn a_required_label_binds_and_a_preferred_one_is_a_wish() {
    let label = |value: &str| vec![("room".to_owned(), value.to_owned())];
    let place = |value: &str| Place { labels: label(value), ..Place::lanes(0, 1) };
    let wish = |value: &str, required| LabelRule { key: "room".to_owned(), value: value.to_owned(), required };
    let job = |rule: LabelRule| Job { labels: vec![rule], ..Job::runs(ms(800)).light() };
    let mut mesh = mesh(&[place("north"), place("south")]);
    for (value, worker) in [("north", W0), ("south", W1)] {
        let tasks = [(); 2].map(|()| mesh.submit(C0, job(wish(value, true))));
        mesh.until_all_over(&tasks);
        for task in tasks {
            mesh.expect(task).done().ran_at(worker);
        }
    }
    // The broker counts the worker as free, too.
    mesh.run_for(s(1));
    let rather = mesh.submit(C0, job(wish("south", false)));
    mesh.until("it runs", s(2), |mesh| mesh.is_running(rather));
    mesh.expect(rather).ran_at(W1);
    let besides = mesh.submit(C0, job(wish("south", false)));
    mesh.until_over(besides);
    mesh.expect(besides).done().ran_at(W0);
    let nowhere = mesh.submit(C0, job(wish("east", true)));
    mesh.until_over(nowhere);
    mesh.expect(nowhere).failed(ErrorCode::NoWorkerFits);
    mesh.end_well();
}

#[test]
fn on_a_device_for_one_realtime_goes_first_and_the_batch_lane_is_not_forgotten() {
    let mut mesh = mesh(&[Place::lanes(1, 1).devices(&[0])]);
    let asks = more_clients(&mut mesh, 1)[0];
    let asked = mesh.stream_for(asks, Job::runs(ms(100)).light(), Pace::Closed(4), s(20));
    let flood = mesh.stream(C0, Job::runs(ms(100)).light().lane(Lane::Batch), Pace::AtOnce, 60);
    mesh.run_for(s(20));
    let (answers, batches) = (mesh.latencies(asked).len(), mesh.latencies(flood).len());
    assert!(batches >= 8, "{batches} batches beside {answers} answers");
    // Between an answer and the next task the device is free for a moment.
    assert!(2 * answers > 3 * batches, "{batches} batches beside {answers} answers");
    mesh.streams[asked].left = 0;
    mesh.end_well();
}

#[test]
fn items_that_do_not_gain_by_company_run_side_by_side_where_slots_are_free() {
    let mut mesh = mesh(&[Place::lanes(0, 3)]);
    let job = Job::runs(ms(300)).light().items(9).lane(Lane::Batch);
    let warm_up = mesh.stream(C0, job.clone(), Pace::Closed(1), 3);
    mesh.until("the model is known not to pack", s(30), |mesh| mesh.latencies(warm_up).len() == 3);
    let task = mesh.submit(C0, job);
    mesh.until_over(task);
    mesh.expect(task).done();
    // Nine items are 2.7 s of work; three slots need a third of that.
    let took = mesh.latencies_of(&[task])[0];
    assert!(took < ms(1700), "{took:?}");
    mesh.end_well();
}

#[test]
fn a_worker_that_was_slow_for_a_while_gets_its_part_of_a_stream_again_and_the_promise_is_kept() {
    let mut mesh = mesh(&[(); 2].map(|()| Place::lanes(2, 2).devices(&[0])));
    // Four items take 8 ms: one worker could do all of a hundred tasks a second, but not in time.
    let job = packs(ms(6)).items(4).slo(60, 50);
    // Without a promise: eight at once break it until the model packs, and who broke it before is left for longer.
    let warm_up = mesh.stream(C0, packs(ms(6)).items(4), Pace::Closed(8), 400);
    mesh.until("the model is known", s(60), |mesh| mesh.latencies(warm_up).len() == 400);
    mesh.level_links(MS);
    let stream = mesh.stream_for(C0, job, Pace::Every(ms(10)), s(50));
    mesh.run_for(s(6));
    mesh.slow_down(W0, 10_000);
    mesh.run_for(s(12));
    let healed = mesh.now;
    mesh.slow_down(W0, 1000);
    mesh.run_for(s(32));
    // It is tried after 10 s, which is too early, and then after 20 s.
    let afterwards = mesh.share_at(W0, stream, healed + 22_000 * MS..mesh.now);
    assert!(afterwards > 250, "{afterwards} of 1000 at the worker that is well again");
    mesh.end_well();
}

#[test]
fn a_deadline_shorter_than_the_load_is_met_once_the_model_is_loaded() {
    let mut mesh = Mesh::new(Setup { load: 1000 * MS, ..Setup::new(1) }, Story::told());
    mesh.add_worker(Place::lanes(1, 1));
    let user = mesh.add_user();
    mesh.add_client(user, true);
    mesh.run_for(s(6));
    let job = || Job::runs(ms(10)).light().deadline(ms(200));
    let in_time = |mesh: &mut Mesh, why: &str| {
        let stream = mesh.stream(C0, job(), Pace::Every(ms(100)), 60);
        mesh.until("all have ended", s(30), |mesh| mesh.latencies(stream).len() == 60);
        let tasks = mesh.streams[stream].tasks.clone();
        let late = tasks.iter().filter(|task| mesh.referee.task(**task).began.is_none()).count();
        assert!((1..30).contains(&late), "{why}: {late} of 60 did not run");
        for task in &tasks[30..] {
            mesh.expect(*task).done();
        }
    };
    in_time(&mut mesh, "nobody knows the model");
    mesh.cool(W0);
    mesh.run_for(s(2));
    in_time(&mut mesh, "it must be loaded again");
    mesh.end_well();
}

/// Places in the north and in the south, each with these slots.
fn north_and_south(realtime: u16, batch: u16) -> [Place; 2] {
    let labels = |room: &str| vec![("room".to_owned(), room.to_owned())];
    ["north", "south"].map(|room| Place { labels: labels(room), ..Place::lanes(realtime, batch) })
}

/// The job, to run only there.
fn at(room: &str, job: Job) -> Job {
    let rule = LabelRule { key: "room".to_owned(), value: room.to_owned(), required: true };
    Job { labels: vec![rule], ..job }
}

#[test]
fn nobody_waits_for_a_load_that_nobody_needs_while_another_worker_is_idle() {
    let mut mesh = Mesh::new(Setup { load: 5000 * MS, ..Setup::new(1) }, Story::told());
    for place in north_and_south(1, 0) {
        mesh.add_worker(place);
    }
    let user = mesh.add_user();
    mesh.add_client(user, true);
    mesh.run_for(s(6));
    let (quick, hurried) = (Job::runs(ms(50)).light(), Job::runs(ms(50)).light().model(1, 4 << 10));
    let ends = |mesh: &mut Mesh, job: Job| {
        let task = mesh.submit(C0, job);
        mesh.until_over(task);
        mesh.run_for(s(2));
        task
    };
    ends(&mut mesh, at("north", hurried.clone()));
    mesh.cool(W0);
    mesh.run_for(s(2));
    ends(&mut mesh, at("north", quick.clone()));
    ends(&mut mesh, at("south", quick.clone()));
    mesh.level_links(MS);
    let late = mesh.submit(C0, at("north", hurried.deadline(ms(200))));
    mesh.until_over(late);
    mesh.expect(late).failed(ErrorCode::Expired);
    let answers = mesh.stream(C0, quick, Pace::Closed(1), 4);
    mesh.until("all have their answers", s(10), |mesh| mesh.latencies(answers).len() == 4);
    let took = mesh.latencies(answers)[3];
    assert!(took < ms(500), "one waited for {took:?}\n{}", mesh.story.last_lines());
    mesh.end_well();
}

#[test]
fn what_others_wait_for_or_take_late_puts_no_deadline_off() {
    let mut mesh = mesh(&north_and_south(0, 1));
    let other = more_clients(&mut mesh, 1)[0];
    // In the south, one client has much to do and another is slow to take what it gets.
    mesh.run_for(s(15));
    let late = Job { output: 3000 * MS, ..Job::runs(ms(20)).light() };
    let taken_late = mesh.stream(other, at("north", late), Pace::Closed(1), 20);
    mesh.until("all is taken", s(100), |mesh| mesh.latencies(taken_late).len() == 20);
    mesh.stream(C0, at("south", Job::runs(ms(300)).light()), Pace::AtOnce, 100);
    let hurried = at("north", Job::runs(ms(20)).light().deadline(ms(400)));
    let hurried = mesh.stream(C0, hurried, Pace::Every(s(1)), 20);
    mesh.until("all have ended", s(100), |mesh| mesh.latencies(hurried).len() == 20);
    for task in mesh.streams[hurried].tasks.clone() {
        mesh.expect(task).done();
    }
    mesh.end_well();
}
