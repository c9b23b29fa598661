//! Heartbeats are on time under any load. Alone in its file: the test needs the whole machine.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use mesh_tests::{Job, Mesh, PATIENCE, Proxy, proxy::Side, wait_until};

const HEARTBEAT: u16 = 201;

/// The bystander wants to run this often.
const TICK: Duration = Duration::from_millis(50);

/// A thread that does nothing but wake up: how late it is shows what the machine does to a process that wants to be on
/// time, whoever has written it.
struct Bystander {
    ticks: Arc<Mutex<Vec<Instant>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bystander {
    fn start() -> Self {
        let (ticks, is_over) = (Arc::new(Mutex::new(vec![Instant::now()])), Arc::new(AtomicBool::new(false)));
        let (noted, over) = (Arc::clone(&ticks), Arc::clone(&is_over));
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::park_timeout(TICK);
                noted.lock().expect("nobody panics with it").push(Instant::now());
            }
        });
        Self { ticks, is_over, thread: Some(thread) }
    }

    /// By how much it was late between these times, in total.
    fn lateness(&self, from: Instant, to: Instant) -> Duration {
        let ticks = self.ticks.lock().expect("nobody panics with it");
        let late = |pair: &[Instant]| {
            let (slept_from, slept_to) = (pair[0].max(from), pair[1].min(to));
            slept_to.saturating_duration_since(slept_from).saturating_sub(TICK)
        };
        ticks.windows(2).map(late).sum()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

#[test]
fn no_three_heartbeats_are_missed_under_full_load() {
    let interval = Duration::from_millis(500);
    let mesh = Mesh::start();
    let to_broker = Proxy::before(mesh.endpoint());
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let slots = (cores + 2).to_string();
    let arguments = ["--heartbeat", "500ms", "--slots", &slots, "--broker", &to_broker.endpoint()];
    let (door, _worker) = mesh.worker_behind_proxy("w1", &arguments);
    let bystander = Bystander::start();

    // Every core runs a model while large models arrive, one after the other.
    let endless = Job::endless(&mesh);
    let running: Vec<_> = (0..cores).map(|_| endless.start_as(&mesh, "busy", &[])).collect();
    wait_until("every core to run a model", PATIENCE, || mesh.count_of("busy", "running") == cores);
    for seed in 71_u16.. {
        Job::heavy(&mesh, 48, seed).run(&mesh);
        if seed >= 74 && to_broker.count(HEARTBEAT) > 10 {
            break;
        }
    }

    assert_eq!(mesh.count_of("busy", "running"), cores, "the load was there all the time");
    running.into_iter().for_each(|started| {
        started.client.interrupt();
        started.answer();
    });
    assert!(door.bytes_from(Side::Dialler) > 190 << 20, "there was a load");
    let beats: Vec<_> =
        to_broker.seen().into_iter().filter(|seen| seen.message.kind == Some(HEARTBEAT)).map(|seen| seen.at).collect();
    // Not even this process, which only looks on, had a processor for all of a gap.
    let gaps = beats.windows(2).map(|pair| (pair[1] - pair[0]).saturating_sub(bystander.lateness(pair[0], pair[1])));
    let longest = gaps.max().expect("there were heartbeats");
    assert!(longest < 3 * interval, "no heartbeat for {longest:?}");
    assert_eq!(mesh.metric("workers_lost_total"), Some(0.0));
}
