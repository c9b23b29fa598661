//! GPUs as their management library tells of them: seen, promised, watched; and a library that fails half-way.

use mesh_tests::{
    Gpus, Job, Mesh, MeshOptions, PATIENCE, Worker,
    gpus::Shown,
    process::{children_of, is_running},
    wait_for, wait_until,
};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

const LARGE: Shown = Shown { name: "Large One", total_gib: 10, used_gib: 1, busy_percent: 0, faults: "" };
const SMALL: Shown = Shown { name: "Small", total_gib: 4, used_gib: 0, busy_percent: 0, faults: "" };

/// A mesh whose workers find this library.
fn mesh_with(gpus: &Gpus) -> Mesh {
    Mesh::with(MeshOptions { worker_libraries: Some(gpus.folder().to_owned()), ..MeshOptions::default() })
}

/// The GPUs of the only worker, as people see them.
fn seen(mesh: &Mesh) -> Value {
    mesh.ask(&["workers"])["workers"][0]["gpus"].clone()
}

fn used_gib(mesh: &Mesh) -> Vec<Option<u64>> {
    let gpus = seen(mesh);
    gpus.as_array().expect("a list").iter().map(|gpu| Some(gpu["memory_used_bytes"].as_u64()? / GIB)).collect()
}

/// Waits until the worker shows this memory in use.
fn wait_used(mesh: &Mesh, gib: &[u64]) {
    let wanted: Vec<Option<u64>> = gib.iter().copied().map(Some).collect();
    wait_until(&format!("{gib:?} GiB to be in use"), PATIENCE, || used_gib(mesh) == wanted);
}

#[test]
fn a_worker_shows_its_gpus_as_they_are_now() {
    let gpus = Gpus::new();
    gpus.show(&[Shown { busy_percent: 37, ..LARGE }, SMALL]);
    let mesh = mesh_with(&gpus);
    let _worker = mesh.worker("w1");
    let of = |name: &str, total_gib: u64, used_gib: u64, busy_permille: u16| {
        json!({
            "name": name,
            "memory_bytes": total_gib * GIB,
            "memory_used_bytes": used_gib * GIB,
            "memory_promised_bytes": 0,
            "busy_permille": busy_permille,
        })
    };
    let first = json!([of("Large One", 10, 1, 370), of("Small", 4, 0, 0)]);
    wait_until("both to be seen", PATIENCE, || seen(&mesh) == first);

    gpus.show(&[LARGE, Shown { used_gib: 3, busy_percent: 100, ..SMALL }]);

    let then = json!([of("Large One", 10, 1, 0), of("Small", 4, 3, 1000)]);
    wait_until("the change to be seen", PATIENCE, || seen(&mesh) == then);
}

#[test]
fn gpu_memory_is_promised_as_the_library_tells_of_it() {
    let gpus = Gpus::new();
    gpus.show(&[LARGE, SMALL]);
    let mesh = mesh_with(&gpus);
    let _worker = mesh.worker_with("w1", &["--device-map", "0,1", "--slots", "2", "--runner", &gpus.runner()]);
    let job = Job::small(&mesh);
    job.start(&mesh, &["--gpu-memory", "8GiB"]).done(&job);
    job.start(&mesh, &["--gpu-memory", "11GiB"]).answer().failed_with(5, "NO_WORKER_FITS");
    // A process outside of the mesh takes most of the large one, and leaves again.
    gpus.show(&[Shown { used_gib: 9, ..LARGE }, SMALL]);
    wait_used(&mesh, &[9, 0]);
    // Another model: the first one is loaded, and has its memory.
    let job = Job::long(&mesh, 1);
    let waits = job.start(&mesh, &["--gpu-memory", "8GiB"]);
    wait_until("it to wait", PATIENCE, || mesh.count_of("client", "queued") == 1);
    gpus.show(&[LARGE, SMALL]);
    waits.done(&job);
}

/// The libraries that docker/fetch-runtimes brings compute on the processor.
#[test]
fn a_demand_for_a_gpu_that_the_runtime_cannot_use_is_not_met_by_the_processor() {
    let gpus = Gpus::new();
    gpus.show(&[LARGE]);
    let mesh = mesh_with(&gpus);
    let _worker = mesh.worker_with("w1", &["--device-map", "0"]);
    let job = Job::small(&mesh);
    let answer = job.start(&mesh, &["--gpu-memory", "8GiB"]).answer();
    answer.failed_with(5, "cannot compute on a GPU").failed_with(5, "submit without --gpu-memory");
    // Without the demand the slot's GPU is a wish.
    job.run(&mesh);
}

/// The only runner of the worker.
fn runner_of(worker: &Worker) -> u32 {
    wait_for("a runner", PATIENCE, || children_of(worker.pid()).first().copied())
}

#[test]
fn a_run_that_takes_more_gpu_memory_than_it_was_promised_is_ended() {
    let gpus = Gpus::new();
    gpus.show(&[LARGE, SMALL]);
    let mesh = mesh_with(&gpus);
    let worker = mesh.worker_with("w1", &["--device-map", "0", "--runner", &gpus.runner()]);
    let started = Job::endless(&mesh).start(&mesh, &["--gpu-memory", "2GiB"]);
    wait_until("it to run", PATIENCE, || mesh.count_of("client", "running") == 1);

    gpus.show_using(&[LARGE, SMALL], &[(1, 1, 9), (0, runner_of(&worker), 3)]);

    started.answer().failed_with(4, "RUN_OOM").failed_with(4, "more than its 2.0 GiB of GPU memory");
    Job::small(&mesh).run(&mesh);
}

/// A worker with this library says `word`, and works; returns its mesh.
#[track_caller]
fn works_and_says(gpus: &Gpus, word: &str) -> (Mesh, Worker) {
    let mesh = mesh_with(gpus);
    let mut worker = mesh.worker("w1");
    worker.process().wait_for_line(word, PATIENCE, |line| (line.contains("WARN") && line.contains(word)).then_some(()));
    Job::small(&mesh).run(&mesh);
    (mesh, worker)
}

#[test]
fn a_library_that_fails_half_way_costs_gpus_and_no_worker() {
    // The driver is not loaded.
    let (mesh, _worker) = works_and_says(&Gpus::new(), "the GPU library does not start");
    assert_eq!(seen(&mesh), json!([]));

    // One of two GPUs is lost.
    let gpus = Gpus::new();
    gpus.show(&[Shown { faults: "h", ..LARGE }, SMALL]);
    let (mesh, _worker) = works_and_says(&gpus, "a GPU does not answer");
    let gpus = seen(&mesh);
    assert_eq!([&gpus[0]["memory_bytes"], &gpus[1]["name"]], [&json!(0), &json!("Small")], "each keeps its number");

    // An old driver lacks the call for memory: nothing can be promised.
    let gpus = Gpus::without_memory_call();
    gpus.show(&[LARGE]);
    let (mesh, _worker) = works_and_says(&gpus, "a GPU does not tell its memory");
    assert_eq!(seen(&mesh)[0]["memory_bytes"], 0);
    Job::small(&mesh).start(&mesh, &["--gpu-memory", "1GiB"]).answer().failed_with(5, "NO_WORKER_FITS");
}

#[test]
fn a_gpu_that_falls_silent_counts_as_full_until_it_answers_again() {
    let gpus = Gpus::new();
    gpus.show(&[LARGE]);
    let mesh = mesh_with(&gpus);
    let mut worker = mesh.worker_with("w1", &["--runner", &gpus.runner()]);
    wait_used(&mesh, &[1]);

    gpus.show(&[Shown { faults: "m", ..LARGE }]);

    wait_used(&mesh, &[10]);
    let log = worker.process();
    log.wait_for_line("the warning", PATIENCE, |line| line.contains("a GPU does not tell its use").then_some(()));
    let job = Job::small(&mesh);
    let waits = job.start(&mesh, &["--gpu-memory", "2GiB"]);
    wait_until("it to wait", PATIENCE, || mesh.count_of("client", "queued") == 1);
    gpus.show(&[LARGE]);
    waits.done(&job);
}

#[test]
fn an_idle_runner_makes_room_for_a_task_that_needs_the_memory_of_its_gpu() {
    let gpus = Gpus::new();
    gpus.show(&[Shown { used_gib: 10, ..LARGE }, SMALL]);
    let mesh = mesh_with(&gpus);
    let worker = mesh.worker_with("w1", &["--device-map", "0,1", "--slots", "2", "--runner", &gpus.runner()]);
    let run = |job: &Job, gpu_memory: &str| {
        let before = children_of(worker.pid());
        job.start(&mesh, &["--gpu-memory", gpu_memory]).done(job);
        children_of(worker.pid()).into_iter().find(|pid| !before.contains(pid)).expect("a new runner, kept warm")
    };
    let elsewhere = run(&Job::small(&mesh), "3GiB");
    gpus.show(&[LARGE, SMALL]);
    wait_used(&mesh, &[1, 0]);
    let idle = run(&Job::sociable(&mesh, 1, [1.0, 2.0]), "6GiB");
    assert_eq!([elsewhere, idle].map(visible_gpu), ["1", "0"], "each on the GPU that had room");

    gpus.show_using(
        &[Shown { used_gib: 7, ..LARGE }, Shown { used_gib: 3, ..SMALL }],
        &[(0, idle, 6), (1, elsewhere, 3)],
    );
    wait_used(&mesh, &[1, 0]);
    let newest = run(&Job::long(&mesh, 1), "6GiB");

    assert_eq!(visible_gpu(newest), "0");
    assert!(!is_running(idle) && is_running(elsewhere), "only who is in the way has gone");
}

/// The GPU that a runner sees, by the driver's index.
fn visible_gpu(runner: u32) -> String {
    let environment = std::fs::read_to_string(format!("/proc/{runner}/environ")).expect("it lives");
    let seen = environment.split('\0').find_map(|entry| entry.strip_prefix("CUDA_VISIBLE_DEVICES="));
    seen.expect("it was told").to_owned()
}
