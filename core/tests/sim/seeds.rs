//! Runs planned by a seed: a time of faults, then all heals, then everything must end.
//!
//! Each seed draws which kinds of faults it has at all: some runs see one kind often, others all kinds at once.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use mesh_core::Rules;
use proto_msgs::{Demands, Direction, ErrorCode, Lane};

use super::{
    faults::Fault,
    job::{Behaviour, Job},
    mesh::{Happening, MS, Mesh, Micros, Node, SECOND, Setup},
    net::Net,
    referee::Violation,
    rng::Rng,
    story::Story,
    worker_shell::Place,
};

/// How long faults happen; then all heals.
const FAULTS_LAST: Micros = 34 * SECOND;

/// Time that the mesh needs after healing to notice silent clients, old grants and dead workers.
const CALM_AFTER: Duration = Duration::from_secs(16);

/// How long results of detached tasks are kept and ended tasks remembered.
const KEPT: Duration = Duration::from_secs(60);

/// How long a worker is waited for. In half of the runs until all has healed: a task that was left as safe is lost only
/// with a machine. In the others the worker may come back too late.
const PATIENCE: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(20)];

/// All is quiet this long after healing: twice the time that anything is kept, and more.
const QUIET_AFTER: Duration = Duration::from_secs(160);

/// How a run ended.
pub(crate) struct Ran {
    pub(crate) violation: Option<Violation>,
    pub(crate) story: Story,
    pub(crate) steps: u64,
    pub(crate) mesh_seconds: u64,
}

/// Plays one seed.
pub(crate) fn play(seed: u64, rules: Rules, story: Story) -> Ran {
    let mut plan = Rng::new(seed ^ 0xfa017);
    let setup = Setup {
        rules,
        encrypted: plan.permille(300),
        // In one run of eight each machine's messages are checked against the limits of the wire, which slows nothing.
        through_bytes: seed.is_multiple_of(8),
        store_wait: plan.pick(&[(MS, 3 * MS), (2 * MS, 80 * MS), (200 * MS, 1500 * MS)]),
        patience: PATIENCE[seed as usize % 2],
        kept: KEPT,
        deadly_comparisons: Some(4),
        ..Setup::new(seed)
    };
    let mut mesh = Mesh::new(setup, story);
    mesh.referee.is_patient = mesh.setup.patience > Duration::from_micros(FAULTS_LAST);
    let stage = Stage::build(&mut mesh, &mut plan);
    stage.plan(&mut mesh, &mut plan);
    mesh.run_for(Duration::from_micros(FAULTS_LAST));
    mesh.heal();
    // Whatever stopped the other tasks, this one fits and can be reached.
    mesh.add_worker(Place::slots(2));
    mesh.run_for(CALM_AFTER);
    mesh.referee.is_calm = true;
    stage.fetch_all(&mut mesh);
    stage.submit_in_calm(&mut mesh, &mut plan);
    mesh.run_for(Duration::from_secs(12));
    mesh.settle(QUIET_AFTER);
    Ran::of(mesh)
}

impl Ran {
    /// The account of a finished run.
    pub(crate) fn of(mut mesh: Mesh) -> Self {
        Self {
            violation: mesh.referee.violation.take(),
            steps: mesh.steps,
            mesh_seconds: mesh.now / SECOND,
            story: mesh.story,
        }
    }
}

/// Adds the nodes of a run.
struct Stage {
    workers: Vec<Node>,
    clients: Vec<Node>,
    users: usize,
}

impl Stage {
    fn build(mesh: &mut Mesh, plan: &mut Rng) -> Self {
        let net = Net {
            lost_permille: plan.pick(&[0, 0, 20, 100, 300]),
            doubled_permille: plan.pick(&[0, 0, 50, 300]),
            delay: plan.pick(&[(MS, 3 * MS), (5 * MS, 60 * MS), (10 * MS, 600 * MS), (MS, 2500 * MS)]),
            ..Net::calm()
        };
        mesh.net = net;
        let has_nat = plan.permille(300);
        let workers = (0..plan.among(1..5)).map(|_| {
            let behind_nat = has_nat && plan.permille(500);
            let (realtime, batch) = plan.pick(&[(0, 1), (0, 1), (1, 1), (1, 2), (2, 1), (1, 0)]);
            let gpus = plan.pick(&[&[-1][..], &[-1], &[0], &[0, 1], &[-1, 0]]);
            let place = Place {
                // Behind NAT a worker may know it and not advertise, or advertise an address that nobody can reach.
                advertises: !behind_nat || plan.permille(500),
                reachable: !behind_nat,
                heartbeat: Duration::from_millis(plan.pick(&[500, 1000, 1000, 2000])),
                ..Place::lanes(realtime, batch).devices(gpus)
            };
            // An unreachable worker excuses as much as a fault.
            mesh.referee.is_harmed |= behind_nat;
            mesh.add_worker(place)
        });
        let workers = workers.collect();
        let users = plan.among(1..4) as usize;
        let mut clients = Vec::new();
        for _ in 0..users {
            let user = mesh.add_user();
            for _ in 0..plan.among(1..3) {
                clients.push(mesh.add_client(user, plan.permille(700)));
            }
        }
        Self { workers, clients, users }
    }

    fn plan(&self, mesh: &mut Mesh, plan: &mut Rng) {
        let detached_permille = plan.pick(&[0, 200, 500]);
        let odd_permille = plan.pick(&[0, 150, 400]);
        for _ in 0..plan.among(2..14) {
            let at = plan.among(0..FAULTS_LAST - 4 * SECOND);
            let client = plan.pick(&self.clients);
            let mut job = Box::new(job(plan, detached_permille, odd_permille));
            if !mesh.listens(client) {
                job.direction = None;
            }
            if job.detached && plan.permille(100) {
                // Often before its worker has heard of the task.
                mesh.at(at + plan.among(SECOND..4 * SECOND), Happening::Fault(Fault::Crash(client)));
            }
            mesh.at(at, Happening::Fault(Fault::Submit(client, job)));
        }
        let kinds: Vec<u64> = (0..16).filter(|_| plan.permille(350)).collect();
        if kinds.is_empty() {
            return;
        }
        for _ in 0..plan.among(1..16) {
            let at = plan.among(0..FAULTS_LAST);
            let kind = plan.pick(&kinds);
            self.plan_fault(mesh, plan, at, kind);
        }
        // A lossy network excuses as much as a fault.
        mesh.referee.is_harmed = true;
    }

    fn plan_fault(&self, mesh: &mut Mesh, plan: &mut Rng, at: Micros, kind: u64) {
        let (worker, client) = (plan.pick(&self.workers), plan.pick(&self.clients));
        let while_down = plan.pick(&[200 * MS, 2 * SECOND, 8 * SECOND, 20 * SECOND]);
        let (which, frozen) = (plan.next(), while_down.min(FAULTS_LAST - at));
        let (Node::Worker(worker_no), Node::Client(client_no)) = (worker, client) else { return };
        let (first, second) = match kind {
            0 => (Fault::Crash(worker), Some(Fault::Restart(worker))),
            1 => (Fault::Freeze(worker, frozen), None),
            2 => (Fault::Crash(Node::Broker), Some(Fault::Restart(Node::Broker))),
            3 => (Fault::Crash(client), None),
            4 => (Fault::Freeze(client, frozen), None),
            5 => (Fault::BreakLink(which), None),
            6 => (Fault::CutOff(worker), Some(Fault::Rejoin(worker))),
            7 => (Fault::CutOff(client), Some(Fault::Rejoin(client))),
            8 => (Fault::StoreAway(true), Some(Fault::StoreAway(false))),
            9 => (Fault::Cancel(which), Some(Fault::CancelElsewhere(which >> 8))),
            10 => (Fault::Drain(worker_no), Some(Fault::Restart(worker))),
            11 => (Fault::Lose(worker_no), None),
            12 => (Fault::Part(worker_no, client_no), Some(Fault::ForgetModels(worker_no))),
            13 => (Fault::Slow(worker_no, plan.pick(&[300, 1500, 5000, 50_000])), Some(Fault::Slow(worker_no, 1000))),
            14 => (Fault::Freeze(Node::Broker, frozen), None),
            _ => (
                Fault::Pry { client: client_no, which, how: which >> 16 },
                Some(Fault::Reconnect(plan.pick(&[worker, client]))),
            ),
        };
        mesh.at(at, Happening::Fault(first));
        if let Some(second) = second {
            mesh.at(at + while_down, Happening::Fault(second));
        }
    }

    /// A new process of each user asks for the promised results of detached tasks.
    fn fetch_all(&self, mesh: &mut Mesh) {
        let listens = mesh.workers.iter().any(|worker| !worker.place.reachable);
        let fetchers: Vec<Node> = (0..self.users).map(|user| mesh.add_client(user, listens)).collect();
        for number in 0..mesh.referee.tasks.len() {
            let truth = &mesh.referee.tasks[number];
            if truth.job.detached && truth.durable {
                let user = mesh.users.iter().position(|user| user.id == truth.owner).unwrap_or(0);
                mesh.fetch(fetchers[user], super::referee::task_id(number));
            }
        }
    }

    fn submit_in_calm(&self, mesh: &mut Mesh, plan: &mut Rng) {
        for _ in 0..plan.among(1..4) {
            let process = mesh.add_client(plan.index(self.users), true);
            let run = plan.among(10 * MS..2 * SECOND);
            mesh.submit(process, Job::runs(Duration::from_micros(run)));
        }
    }
}

fn job(plan: &mut Rng, detached_permille: u64, odd_permille: u64) -> Job {
    let run = plan.pick(&[20 * MS, 300 * MS, 2 * SECOND, 6 * SECOND]);
    let run = plan.among(run / 2..run * 2);
    let model = plan.among(0..4) as u8;
    let mut job = Job::runs(Duration::from_micros(run))
        .model(model, [100 << 10, 5 << 20, 30 << 20, 120 << 20][usize::from(model)]);
    if plan.permille(400) {
        let items = plan.pick(&[2, 3, 8, 20, 65]);
        job.run /= u64::from(items);
        job = job.items(items);
        job.job_items = plan.pick(&[items, items, 1000]);
    }
    if plan.permille(150) {
        job = job.then(plan.among(0..4) as u8);
    }
    if plan.permille(150) {
        job = job.lane(plan.pick(&Lane::ALL));
    }
    if plan.permille(150) {
        job = job.slo(plan.pick(&[50, 500, 5000]), plan.pick(&[0, 50, 200]));
    }
    job.output = plan.pick(&[5 * MS, 50 * MS, 2500 * MS]);
    job.detached = plan.permille(detached_permille);
    job.priority = plan.among(0..101) as u8;
    if plan.permille(150) {
        // Whole milliseconds, as messages carry them.
        job.deadline = Some(Duration::from_millis(plan.among(SECOND..20 * SECOND) / 1000));
    }
    if plan.permille(100) {
        job.demands = Demands { cpu_millis: 2000, memory_bytes: 1 << 30, ..Demands::default() };
    }
    if plan.permille(100) {
        job.direction = Some(plan.pick(&[Direction::ClientDials, Direction::WorkerDials]));
    }
    if plan.permille(odd_permille) {
        job.behaviour = plan.pick(&[
            Behaviour::Fails(ErrorCode::RunCrashed),
            Behaviour::Fails(ErrorCode::ModelRejected),
            Behaviour::FailsFirst(1),
            Behaviour::FailsFirst(99),
            Behaviour::LosesRow,
            Behaviour::LosesRow,
            Behaviour::NeverEnds,
            Behaviour::KillsWorker,
            Behaviour::FileVanishes,
            Behaviour::DiskFullFirst,
            Behaviour::ResultUnwritten,
        ]);
    }
    job
}

/// Plays a seed.
pub(crate) fn play_safely(seed: u64, rules: Rules, told: bool) -> Ran {
    guarded(|| play(seed, rules, if told { Story::told() } else { Story::default() }))
}

/// Plays a seed; a panic of a machine counts as a violation.
pub(crate) fn guarded(play: impl FnOnce() -> Ran) -> Ran {
    catch_unwind(AssertUnwindSafe(play)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
        let violation = Some(Violation { law: "no machine panics", detail: text });
        Ran { violation, story: Story::default(), steps: 0, mesh_seconds: 0 }
    })
}

pub(crate) fn number_from(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().map_or(otherwise, |text| text.parse().expect("a number of seeds"))
}

/// The outcome of many seeds.
#[derive(Default)]
pub(crate) struct Played {
    pub(crate) failed: std::collections::BTreeMap<u64, Violation>,
    steps: u64,
    mesh_seconds: u64,
    /// The shortest story without a violation.
    shortest_s: Option<u64>,
    /// Processor time of all threads: the run time on an otherwise idle machine, times its cores.
    cpu: Duration,
}

/// Plays these seeds on all cores, until twenty have failed.
pub(crate) fn play_all(seeds: std::ops::Range<u64>, rules: Rules) -> Played {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(seeds.start);
    let played = std::sync::Mutex::new(Played::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || played.lock().expect("no panic under the lock").failed.len() >= 20 {
                        break;
                    }
                    let ran = play_safely(seed, rules, false);
                    let mut played = played.lock().expect("no panic under the lock");
                    played.steps += ran.steps;
                    played.mesh_seconds += ran.mesh_seconds;
                    match ran.violation {
                        Some(violation) => drop(played.failed.insert(seed, violation)),
                        None => {
                            let shortest = played.shortest_s.unwrap_or(u64::MAX).min(ran.mesh_seconds);
                            played.shortest_s = Some(shortest);
                        }
                    }
                }
                played.lock().expect("no panic under the lock").cpu += thread_cpu_time();
            });
        }
    });
    played.into_inner().expect("no panic under the lock")
}

/// Processor time that this thread has used; `None` if the system does not tell.
fn thread_cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    // Fields 14 and 15, in ticks of 10 ms. Fields are counted after the name, which may hold blanks.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<u64>().ok()).map(|ticks| Duration::from_millis(ticks * 10)).sum()
}

/// The report about the first failed seed: its story, and the command that plays it again.
pub(crate) fn verdict(played: &Played, rules: Rules) -> Option<String> {
    let (seed, violation) = played.failed.first_key_value()?;
    let story = play_safely(*seed, rules, true).story.last_lines();
    let replay = format!(
        "MESH_SIM_FIRST={seed} MESH_SIM_SEEDS=1 cargo test --release -p mesh-core --test sim -- seeds::seeds --nocapture"
    );
    let law = violation.law;
    Some(format!("seed {seed} broke the law \"{law}\": {}\n{story}\n  replay: {replay}\n", violation.detail))
}

#[test]
fn seeds() {
    let first = number_from("MESH_SIM_FIRST", 0);
    let count = number_from("MESH_SIM_SEEDS", if cfg!(debug_assertions) { 200 } else { 10_000 });
    let began = std::time::Instant::now();
    let played = play_all(first..first + count, Rules::default());
    let took = began.elapsed().as_secs_f64();
    let (hours, steps) = (played.mesh_seconds / 3600, played.steps);
    println!("{count} seeds, {hours} mesh hours, {steps} events in {took:.1} s: {:.0} seeds/s", count as f64 / took);
    for (seed, violation) in &played.failed {
        println!("seed {seed}: {}: {}", violation.law, violation.detail);
    }
    if let Some(verdict) = verdict(&played, Rules::default()) {
        panic!("{verdict}");
    }
    assert!(played.shortest_s >= Some(60), "a story of {:?} s", played.shortest_s);
    if std::env::var_os("MESH_REQUIRE_ALL").is_some() {
        assert!(count >= 10_000, "only {count} seeds: unset MESH_SIM_SEEDS");
        // Not wall-clock time: the machine may have other work.
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as u32;
        assert!(played.cpu / cores < Duration::from_secs(120), "{:?} on each of {cores} cores", played.cpu / cores);
    }
}

#[test]
fn the_same_seed_gives_the_same_story() {
    for seed in 0..10 {
        let [first, second] = [(), ()].map(|()| play(seed, Rules::default(), Story::told()).story.hash());
        assert_eq!(first, second, "seed {seed} went two ways");
    }
    let [one, other] = [1, 2].map(|seed| play(seed, Rules::default(), Story::told()).story.hash());
    assert_ne!(one, other, "two seeds went the same way");
}
