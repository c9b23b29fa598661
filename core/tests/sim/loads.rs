//! Short stories of loads that no task would pay for alone: when they come all the same, and when they do not. The
//! referee watches these, too.

use std::time::Duration;

use proto_msgs::LabelRule;

use super::{
    job::Job,
    mesh::{MS, Mesh, Micros, Node, SECOND, Setup},
    stories::{C0, W0, W1, ms, s},
    story::Story,
    streams::Pace,
    worker_shell::Place,
};

/// Workers with this place, where each load takes this long, and one client `C0`.
fn mesh(load: Micros, workers: &[Place]) -> Mesh {
    let mut mesh = Mesh::new(Setup { load, ..Setup::new(1) }, Story::told());
    for place in workers {
        mesh.add_worker(place.clone());
    }
    let user = mesh.add_user();
    mesh.add_client(user, true);
    mesh.run_for(s(6));
    mesh
}

impl Mesh {
    fn loads(&self, worker: Node) -> u32 {
        let Node::Worker(worker) = worker else { panic!("workers load") };
        self.workers[worker].loads
    }

    /// Runs the job once, for its worker to load the model and to measure it.
    fn learns(&mut self, job: Job) -> Node {
        let task = self.submit(C0, job);
        self.until_over(task);
        self.run_for(s(3));
        self.expect(task).placed_at()
    }

    /// When the first of the stream's tasks began to run at the worker.
    fn first_at(&self, worker: Node, stream: usize) -> Option<Micros> {
        let truths = self.streams[stream].tasks.iter().map(|task| self.referee.task(*task));
        truths
            .filter(|truth| truth.runs.iter().any(|(_, at)| Node::Worker(*at) == worker))
            .filter_map(|t| t.began)
            .min()
    }
}

#[test]
fn a_stream_reaches_an_idle_worker_though_none_of_its_tasks_alone_would_pay_for_the_load() {
    let mut mesh = mesh(2 * SECOND, &[Place::lanes(1, 0), Place::lanes(1, 0)]);
    mesh.slow_down(W0, 2000);
    let job = Job::runs(ms(50)).light();
    assert_eq!(mesh.learns(job.clone()), W0);
    mesh.level_links(MS);
    let from = mesh.now;
    let stream = mesh.stream_for(C0, job, Pace::Closed(9), s(30));
    mesh.run_for(s(30));
    let first = mesh.first_at(W1, stream).map(|at| (at - from) / MS);
    let answers = mesh.latencies(stream).len();
    let longest = *mesh.latencies(stream).last().expect("there are some");
    assert!(first.is_some_and(|first| first < 6000), "{first:?} ms");
    assert!(answers > 600, "{answers} answers where one worker alone gives 300");
    assert!(longest < Duration::from_secs(4), "{longest:?}");
    mesh.end_well();
}

#[test]
fn a_burst_that_is_over_before_the_load_would_be_loads_nothing() {
    let mut mesh = mesh(3 * SECOND, &[Place::lanes(1, 0), Place::lanes(1, 0)]);
    let job = Job::runs(ms(100)).light();
    assert_eq!(mesh.learns(job.clone()), W0);
    mesh.level_links(MS);
    for _ in 0..20 {
        let burst = mesh.stream(C0, job.clone(), Pace::AtOnce, 10);
        mesh.until("all have their answers", s(20), |mesh| mesh.latencies(burst).len() == 10);
        mesh.run_for(s(120));
    }
    assert_eq!([W0, W1].map(|worker| mesh.loads(worker)), [1, 0]);
    mesh.end_well();
}

/// Two workers whose memory holds one model at a time, each with one model. Returns the jobs, too.
fn two_small_workers() -> (Mesh, [Job; 2]) {
    let labels = |room: &str| vec![("room".to_owned(), room.to_owned())];
    let small = |room: &str| Place { warm_max: 1, labels: labels(room), ..Place::lanes(1, 0) };
    let mut mesh = mesh(SECOND, &["north", "south"].map(small));
    let jobs = [0, 4].map(|model| Job::runs(ms(100)).light().model(model, 4 << 10));
    let at = |room: &str, job: &Job| {
        let rule = LabelRule { key: "room".to_owned(), value: room.to_owned(), required: true };
        Job { labels: vec![rule], ..job.clone() }
    };
    assert_eq!([mesh.learns(at("north", &jobs[0])), mesh.learns(at("south", &jobs[1]))], [W0, W1]);
    mesh.level_links(MS);
    (mesh, jobs)
}

#[test]
fn a_model_in_use_is_not_pushed_out_by_another_that_would_like_company() {
    let (mut mesh, [one, other]) = two_small_workers();
    let busy = mesh.stream_for(C0, one, Pace::Closed(3), s(600));
    let calm = mesh.stream_for(C0, other, Pace::Every(ms(250)), s(600));
    mesh.run_for(s(600));
    assert_eq!([W0, W1].map(|worker| mesh.loads(worker)), [1, 1]);
    let answers = [busy, calm].map(|stream| mesh.latencies(stream).len());
    assert!(answers[0] > 5000 && answers[1] > 2000, "{answers:?}");
    mesh.end_well();
}

#[test]
fn two_models_that_take_turns_on_two_small_workers_do_not_push_each_other_out_for_ever() {
    let (mut mesh, [one, other]) = two_small_workers();
    let busy = mesh.stream_for(C0, one, Pace::Closed(3), s(600));
    let rare = mesh.stream_for(C0, other, Pace::Every(s(90)), s(600));
    mesh.run_for(s(600));
    let preloads = mesh.broker.machine.as_ref().map_or(0, |broker| broker.counters().preloads);
    assert!((1..4).contains(&preloads), "{preloads} loads that no task would have paid for alone");
    // One worker alone gives ten answers a second.
    let (answers, longest) = (mesh.latencies(busy).len(), *mesh.latencies(rare).last().expect("there are some"));
    assert!(answers > 9000 && longest < s(3), "{answers} answers, the longest {longest:?}");
    mesh.end_well();
}
