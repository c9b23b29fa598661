//! The client dies, in several ways. Everything of it is freed: slot, runner, files.

use std::time::{Duration, Instant};

use mesh_tests::{
    Job, Mesh, PATIENCE, Submission, Worker,
    npy::Array,
    onnx,
    process::{is_running, status_field},
    proxy::Side,
    wait_until,
};
use nix::sys::signal::Signal;
use proto_msgs::Phase;

/// The processes in which models run right now.
fn runners(worker: &mut Worker) -> Vec<u32> {
    let runners = worker.process().children();
    assert!(!runners.is_empty(), "a model runs");
    runners
}

/// Time until all is freed. The README says ten seconds; a busy machine may need a little longer.
const FREED_WITHIN: Duration = Duration::from_secs(15);

/// Waits until everything of the client at the worker is freed, within [`FREED_WITHIN`] after `killed`.
fn wait_freed(mesh: &Mesh, killed: Instant, is_freed: impl Fn() -> bool) {
    let left = || FREED_WITHIN.saturating_sub(killed.elapsed());
    wait_until("its room to be free", left(), is_freed);
    wait_until("its slot to be free", left(), || mesh.metric("slots_used") == Some(0.0));
}

/// Waits until the runners are gone: an endless run can be stopped only by ending its process.
fn wait_gone(runners: &[u32]) {
    wait_until("the runner to be stopped", PATIENCE, || !runners.iter().any(|pid| is_running(*pid)));
}

#[test]
fn killed_during_the_run() {
    let mesh = Mesh::start();
    let (door, mut worker) = mesh.worker_behind_proxy("w1", &[]);
    let mut started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
    let runners = runners(&mut worker);

    started.client.process().kill();

    wait_freed(&mesh, Instant::now(), || !runners.iter().any(|pid| is_running(*pid)));
    let next = Job::small(&mesh);
    next.run(&mesh);
}

#[test]
fn killed_during_the_transfer() {
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &[]);
    door.throttle(Some(10 << 20));
    let job = Job::heavy(&mesh, 32, 31);
    let mut started = job.start(&mesh, &[]);
    wait_until("a part of the model to arrive", PATIENCE, || door.bytes_from(Side::Dialler) > 4 << 20);

    started.client.process().kill();

    let stored = || worker.files().iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum::<u64>();
    wait_freed(&mesh, Instant::now(), || stored() < 1 << 20);
}

#[test]
fn killed_while_the_result_comes_back() {
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &[]);
    let memory_bytes = || status_field(worker.pid(), "VmRSS:").unwrap_or(0) * 1024;
    let before_bytes = memory_bytes();
    // The result takes 16 s on its way, and the input none.
    door.throttle_from(Side::Listener, 4 << 20);
    let job = Job::voluminous(&mesh, 64);
    let mut started = job.start(&mesh, &[]);
    wait_until("a part of the result to be sent", PATIENCE, || door.bytes_from(Side::Listener) > 4 << 20);

    started.client.process().kill();
    let killed = Instant::now();
    assert!(door.bytes_from(Side::Listener) < 32 << 20, "much of the result is still at the worker");

    wait_freed(&mesh, killed, || memory_bytes() < before_bytes + (32 << 20));
    Job::small(&mesh).run(&mesh);
}

#[test]
fn ctrl_c_cancels_the_task_at_the_worker() {
    let mesh = Mesh::start();
    let (door, mut worker) = mesh.worker_behind_proxy("w1", &[]);
    let started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
    let runners = runners(&mut worker);

    started.client.interrupt();

    assert_eq!(started.answer().code, 130);
    wait_gone(&runners);
    mesh.wait_idle();
    assert_eq!(mesh.metric("tasks_cancelled_total"), Some(1.0));
}

#[test]
fn sigterm_cancels_it_too() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let mut started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    started.client.process().signal(Signal::SIGTERM);

    assert_ne!(started.answer().code, 0);
    mesh.wait_idle();
}

/// A client with hundreds of short tasks, some of which are done, so that the broker knows how short they are.
fn busy(mesh: &Mesh) -> Submission {
    let model = mesh.file("counting.onnx", &onnx::counting());
    let items = mesh.folder().join("items");
    std::fs::create_dir(&items).expect("the folder is ours");
    (0..900).for_each(|item| Array::of_i64(&[1], &[1000]).write(&items.join(format!("{item:03}.npy"))));
    let items = items.display().to_string();
    let arguments = ["submit", "--json-lines", "--split", "1", "--lane", "realtime", &model, &items];
    let mut busy = Submission::start(mesh.client_command_of("busy", &arguments));
    busy.process().wait_for_line("the fiftieth", PATIENCE, |line| line.contains("\"049\"").then_some(()));
    busy
}

/// Another client's task is done soon after the busy one has got this signal.
fn lets_others_pass(signal: Signal) {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let mut busy = busy(&mesh);

    busy.process().signal(signal);
    let struck = Instant::now();

    assert!(mesh.count_of("busy", "queued") >= 16, "many wait for room");
    Job::small(&mesh).run(&mesh);
    // Five seconds of silence, and what two busy cores need. The client itself is given up after fifteen.
    assert!(struck.elapsed() < Duration::from_secs(10), "{:?}", struck.elapsed());
    busy.process().kill();
}

#[test]
fn killed_with_many_tasks_it_keeps_nobody_waiting() {
    lets_others_pass(Signal::SIGKILL);
}

#[test]
fn frozen_with_many_tasks_it_keeps_nobody_waiting() {
    lets_others_pass(Signal::SIGSTOP);
}
