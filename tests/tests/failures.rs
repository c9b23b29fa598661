//! Ordinary failures, each with its exit code and a text that names the cause.

use std::process::Command;

use mesh_tests::{
    Job, Mesh, PATIENCE, Process,
    npy::Array,
    onnx,
    process::{Stream, binary},
    proxy::Side,
    wait_until,
};
use nix::sys::signal::{Signal, kill};
use proto_msgs::Phase;

// Exit codes of mesh-client, as its help lists them.
const INTERNAL: i32 = 1;
const BAD_INPUT: i32 = 3;
const RUN_FAILED: i32 = 4;
const NO_PLACE: i32 = 5;
const UNREACHABLE: i32 = 6;
const EXPIRED: i32 = 7;

/// Checks that the worker runs tasks again after a failure.
fn still_works(mesh: &Mesh) {
    mesh.wait_idle();
    Job::small(mesh).run(mesh);
}

#[test]
fn a_file_that_is_no_model() {
    let mesh = Mesh::start();
    let (text, input) = (mesh.file("model.txt", b"not a model"), mesh.file("x.bin", &[0; 4]));
    mesh.client(&["submit", &text, &input]).failed_with(BAD_INPUT, "model.txt");
    mesh.client(&["submit", "/nowhere/model.onnx", &input]).failed_with(BAD_INPUT, "/nowhere/model.onnx");
}

#[test]
fn a_model_that_is_cut_off() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let whole = onnx::heavy(1 << 20, 1);
    let (model, input) = (mesh.file("cut.onnx", &whole[..whole.len() / 2]), mesh.file("x.bin", &[0; 4]));
    mesh.client(&["submit", &model, &input]).failed_with(BAD_INPUT, "MODEL_");
    still_works(&mesh);
}

#[test]
fn a_model_with_an_operator_that_nobody_knows() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let (model, input) = (mesh.file("strange.onnx", &onnx::unknown_operator()), mesh.file("x.bin", &[0; 4]));
    mesh.client(&["submit", &model, &input]).failed_with(BAD_INPUT, "FoldProtein");
    still_works(&mesh);
}

#[test]
fn an_input_of_the_wrong_size() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("heavy.onnx", &onnx::heavy(4096, 1));
    // The model's input is one float, four bytes.
    for wrong in [0, 3, 8] {
        let input = mesh.file("x.bin", &vec![0; wrong]);
        let answer = mesh.client(&["submit", &model, &input]).failed_with(BAD_INPUT, "x.bin");
        answer.failed_with(BAD_INPUT, &format!("has {wrong} bytes, but input 'x' of the model (FP32 [1]) takes 4"));
    }
    still_works(&mesh);
}

#[test]
fn an_input_of_the_wrong_type_or_name() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("heavy.onnx", &onnx::heavy(4096, 1));
    let integers = mesh.array("x.npy", &Array::of_i64(&[1], &[1]));
    mesh.client(&["submit", &model, &integers]).failed_with(BAD_INPUT, "FP32");
    let floats = mesh.array("f.npy", &Array::of_f32(&[1], &[1.0]));
    mesh.client(&["submit", &model, &format!("z={floats}")]).failed_with(BAD_INPUT, "z");
    still_works(&mesh);
}

#[test]
fn an_input_whose_shape_only_the_run_can_judge() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("vague.onnx", &onnx::vague(4));
    let right = mesh.array("right.npy", &Array::of_f32(&[1, 4], &[1.0, 2.0, 3.0, 4.0]));
    mesh.client(&["submit", &model, &right]).succeeded();
    let wrong = mesh.array("wrong.npy", &Array::of_f32(&[1, 5], &[1.0; 5]));
    let answer = mesh.client(&["submit", &model, &wrong]).failed_with(BAD_INPUT, "MODEL_INPUT_MISMATCH");
    answer.failed_with(BAD_INPUT, "'x' FP32 [1,5] where the file says FP32 [?,?]");
    still_works(&mesh);
}

#[test]
fn a_run_that_never_ends() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--run-limit", "2s"]);
    let answer = Job::endless(&mesh).start(&mesh, &[]).answer().failed_with(RUN_FAILED, "RUN_TIMEOUT");
    let answer = answer.failed_with(RUN_FAILED, "within 2s (the worker's --run-limit)");
    assert_eq!(answer.json()["items"][0]["worker"]["name"], "w1", "the one that had it last");
    still_works(&mesh);
}

#[test]
fn a_deadline_that_passes() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    Job::endless(&mesh).start(&mesh, &["--deadline", "1s"]).answer().failed_with(EXPIRED, "EXPIRED");
    still_works(&mesh);
}

#[test]
fn a_deadline_that_passes_while_there_is_no_worker() {
    let mesh = Mesh::start();
    Job::small(&mesh).start(&mesh, &["--deadline", "500ms"]).answer().failed_with(EXPIRED, "EXPIRED");
}

#[test]
fn a_model_that_crashes_its_runner() {
    let mesh = Mesh::start();
    let (door, mut worker) = mesh.worker_behind_proxy("w1", &[]);
    let started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    for runner in worker.process().children() {
        kill(nix::unistd::Pid::from_raw(runner as i32), Signal::SIGABRT).unwrap();
    }

    started.answer().failed_with(RUN_FAILED, "RUN_CRASHED");
    still_works(&mesh);
}

#[test]
fn a_model_that_crashes_its_runner_while_it_is_loaded() {
    use std::os::unix::fs::PermissionsExt;
    let mesh = Mesh::start();
    // No file is known that crashes the real runtimes, so a runner stands in that aborts by itself.
    let runner = mesh.file("falling-runner", b"#!/bin/sh\nkill -ABRT $$\n");
    std::fs::set_permissions(&runner, std::fs::Permissions::from_mode(0o755)).unwrap();
    let _worker = mesh.worker_with("w1", &["--runner", &runner]);
    Job::small(&mesh).start(&mesh, &[]).answer().failed_with(BAD_INPUT, "MODEL_REJECTED");
    mesh.wait_idle();
}

/// A model that uses at least `mib` MiB of memory in one piece, and an input for it.
fn hungry(mesh: &Mesh, mib: i64) -> [String; 2] {
    let elements = Array::of_i64(&[1], &[mib << 18]);
    [mesh.file("hungry.onnx", &onnx::hungry()), mesh.array(&format!("hungry{mib}.npy"), &elements)]
}

#[test]
fn a_model_that_takes_more_memory_than_it_may() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--memory-limit", "384MiB"]);
    // The system grants this memory; the worker stops the run when it sees the use.
    let [model, input] = hungry(&mesh, 512);
    let answer = mesh.client(&["submit", &model, &input]).failed_with(RUN_FAILED, "RUN_OOM");
    let answer = answer.failed_with(RUN_FAILED, "used more than its 384.0 MiB of memory during the run");
    answer.failed_with(RUN_FAILED, "ask for more with --memory");
    // The system refuses this memory at once.
    let [model, input] = hungry(&mesh, 4096);
    mesh.client(&["submit", &model, &input]).failed_with(RUN_FAILED, "RUN_OOM: ONNX Runtime failed");
    still_works(&mesh);
}

#[test]
fn a_model_that_needs_more_memory_than_a_small_worker_gives_runs_on_a_larger_one() {
    // The small worker sees that the run uses 512 MiB, and its system refuses 1500.
    for mib in [512, 1500] {
        let mesh = Mesh::start();
        let _small = mesh.worker_with("small", &["--memory-limit", "384MiB"]);
        let _large = mesh.worker_with("large", &["--memory-limit", "12GiB"]);
        let [model, input] = hungry(&mesh, mib);
        // Of two idle workers that never ran the model the older one is asked first.
        // The next tasks of the model need not find out again.
        for attempts in [2, 1, 1] {
            let answer = mesh.ask(&["submit", &model, &input]);
            let item = &answer["items"][0];
            let seen = (&item["worker"]["name"], &item["attempts"]);
            assert_eq!(seen, (&"large".into(), &attempts.into()), "{mib} MiB: {answer}");
        }
    }
}

#[test]
fn a_task_that_says_how_much_memory_it_may_use_is_not_handed_to_a_larger_worker() {
    let mesh = Mesh::start();
    let _workers = ["384MiB", "12GiB"].map(|limit| mesh.worker_with(limit, &["--memory-limit", limit]));
    let [model, input] = hungry(&mesh, 512);
    let answer = mesh.client(&["submit", &model, &input, "--memory", "256MiB"]).failed_with(RUN_FAILED, "RUN_OOM");
    answer.failed_with(RUN_FAILED, "ask for more with --memory");
}

#[test]
fn a_model_that_takes_more_memory_than_its_client_asked_for() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--memory-limit", "3GiB"]);
    let [model, input] = hungry(&mesh, 512);
    mesh.client(&["submit", &model, &input]).succeeded();
    let answer = mesh.client(&["submit", &model, &input, "--memory", "256MiB"]).failed_with(RUN_FAILED, "RUN_OOM");
    answer.failed_with(RUN_FAILED, "used more than its 256.0 MiB of memory during the run");
    still_works(&mesh);
}

#[test]
fn a_model_that_is_larger_than_the_quota() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--quota", "4MiB"]);
    Job::heavy(&mesh, 8, 51).start(&mesh, &[]).answer().failed_with(NO_PLACE, "--quota");
    still_works(&mesh);
}

#[test]
fn the_quota_is_kept_by_forgetting_what_was_not_used_for_long() {
    let mesh = Mesh::start();
    let worker = mesh.worker_with("w1", &["--quota", "20MiB"]);
    for seed in 52..57 {
        Job::heavy(&mesh, 8, seed).run(&mesh);
    }
    let bytes: u64 = worker.files().iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum();
    assert!(bytes < 21 << 20, "{bytes} bytes are kept under a quota of 20 MiB");
}

#[test]
fn a_worker_whose_models_are_removed_from_its_disk_goes_on() {
    let mesh = Mesh::start();
    let worker = mesh.worker("w1");
    let known = Job::heavy(&mesh, 1, 62);
    known.run(&mesh);
    for folder in ["blobs", "attempts", "runners"] {
        std::fs::remove_dir_all(worker.state_dir().join(folder)).expect("the folder is there");
    }
    Job::heavy(&mesh, 1, 63).run(&mesh);
    known.run(&mesh);
    mesh.client(&["result", &known.detach(&mesh)]).succeeded();
}

/// A small file system mounted over a folder of the mesh, while this value lives.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// Mounts it with `mib` MiB; `None`, with a note, if the test may not mount.
    fn mount(mesh: &Mesh, folder: &str, mib: usize) -> Option<Self> {
        let path = mesh.folder().join(folder);
        std::fs::create_dir(&path).expect("the folder is ours");
        let size = format!("size={mib}m");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path).status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Self(path));
        }
        mesh_tests::skip("a disk that is full", "mounting a small disk needs root");
        None
    }

    /// Uses up all free space, until the returned file is dropped.
    fn fill(&self) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new_in(&self.0).expect("room for a name");
        let full = std::io::copy(&mut std::io::repeat(0), &mut file).expect_err("a disk has an end");
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        file
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_is_full() {
    let mesh = Mesh::start();
    let Some(disk) = SmallDisk::mount(&mesh, "w1", 16) else { return };
    let worker = mesh.worker_with("w1", &["--quota", "1GiB"]);

    Job::heavy(&mesh, 32, 58).start(&mesh, &[]).answer().failed_with(NO_PLACE, "do not fit on the worker's disk");

    still_works(&mesh);
    drop((worker, disk));
}

#[test]
fn a_disk_that_fills_up_while_the_model_comes_in() {
    let mesh = Mesh::start();
    let Some(disk) = SmallDisk::mount(&mesh, "w1", 64) else { return };
    let (door, worker) = mesh.worker_behind_proxy("w1", &["--quota", "1GiB"]);
    door.throttle(Some(10 << 20));
    let started = Job::heavy(&mesh, 32, 62).start(&mesh, &[]);
    wait_until("a part of the model to arrive", PATIENCE, || door.bytes_from(Side::Dialler) > 4 << 20);

    let others = disk.fill();

    let answer = started.answer().failed_with(NO_PLACE, "attempt 1 on w1 failed, trying another place: no space left");
    answer.failed_with(NO_PLACE, "ATTEMPTS_EXHAUSTED");
    drop(others);
    still_works(&mesh);
    let kept: u64 = worker.files().iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum();
    assert!(kept < 1 << 20, "nothing of the half is kept");
    drop((worker, disk));
}

#[test]
fn a_result_that_does_not_fit_on_the_client_s_disk() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::voluminous(&mesh, 32);
    // The disk that keeps the result while it arrives is full.
    let Some(disk) = SmallDisk::mount(&mesh, "client", 8) else { return };
    let answer = job.start(&mesh, &[]).answer().failed_with(INTERNAL, "RESULT_NOT_KEPT");
    answer.failed_with(INTERNAL, "see to the state folder's disk and submit again");
    drop(disk);

    // The disk of the output folder is full.
    let Some(disk) = SmallDisk::mount(&mesh, "out", 8) else { return };
    let output = disk.0.display().to_string();
    mesh.client(&job.submit(&["--output", &output])).failed_with(INTERNAL, &output);
    let left: Vec<_> = std::fs::read_dir(&disk.0).unwrap().flatten().map(|file| file.path()).collect();
    assert!(!left.iter().any(|file| file.ends_with("y.npy")), "half an output looks like a whole one: {left:?}");
    mesh.wait_idle();
}

#[test]
fn a_full_disk_at_one_worker_is_not_the_end() {
    let mesh = Mesh::start();
    let Some(disk) = SmallDisk::mount(&mesh, "full", 16) else { return };
    let full = mesh.worker_with("full", &["--quota", "1GiB"]);
    let _roomy = mesh.worker("roomy");

    // If two workers are equally idle, the older one is chosen first.
    let done = Job::heavy(&mesh, 32, 59).run(&mesh);

    assert_eq!((done.worker(), done.attempts()), ("roomy", 2));
    drop((full, disk));
}

#[test]
fn a_file_that_changes_during_the_upload() {
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &[]);
    door.throttle(Some(16 << 20));
    let job = Job::heavy(&mesh, 64, 60);
    let started = job.start(&mesh, &[]);
    wait_until("a part of the model to arrive", PATIENCE, || door.bytes_from(Side::Dialler) > 4 << 20);

    std::fs::write(&job.model, onnx::heavy(64 << 20, 61)).unwrap();

    started.answer().failed_with(BAD_INPUT, "changed");
    mesh.wait_idle();
    let kept = || worker.files().iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum::<u64>();
    wait_until("nothing of the mixture to be kept", PATIENCE, || kept() < 1 << 20);
}

#[test]
fn a_broker_that_is_not_there() {
    let mesh = Mesh::start();
    let mut command = mesh.client_command(&["workers", "--broker-wait", "2s", "--timeout", "1h"]);
    command.env("MESH_BROKER", "tcp://127.0.0.1:1");
    let answer = mesh_tests::Submission::start(command).wait();
    answer.failed_with(UNREACHABLE, "127.0.0.1:1");
}

#[test]
fn a_broker_that_stands_still_is_waited_for() {
    let mut mesh = Mesh::start();
    mesh.broker().freeze();
    let within = |limit: &str| mesh.client(&["workers", "--timeout", limit]);
    // The second is longer than two handshakes.
    for limit in ["0s", "8s"] {
        within(limit).failed_with(UNREACHABLE, "it accepts connections but does not answer");
    }
    let mut waiting = mesh.client_in_background(&["workers", "--broker-wait", "60s"]);
    waiting.process().wait_for_line("`does not answer`", PATIENCE, |line| line.contains("not answer").then_some(()));
    mesh.broker().thaw();
    waiting.wait().succeeded();
}

#[test]
fn a_worker_that_cannot_be_reached_where_it_says() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--advertise", "127.0.0.1:1"]);
    let answer = Job::small(&mesh).start(&mesh, &["--direction", "client-dials"]).answer();
    answer.failed_with(UNREACHABLE, "127.0.0.1:1").failed_with(UNREACHABLE, ADVICE);
}

/// What a person may do where an address does not answer.
const ADVICE: &str = "check that the program runs there and that no firewall is between";

#[test]
fn a_worker_behind_an_address_that_takes_everything_and_says_nothing() {
    let mesh = Mesh::start();
    // Connections are accepted by the system, and nobody reads from them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let _worker = mesh.worker_with("w1", &["--advertise", &address]);
    let answer = Job::small(&mesh).start(&mesh, &["--direction", "client-dials"]).answer();
    answer.failed_with(UNREACHABLE, &address).failed_with(UNREACHABLE, "it accepts connections but does not answer");
}

#[test]
fn a_worker_that_cannot_be_reached_dials_by_itself_if_it_may() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--advertise", "127.0.0.1:1"]);
    Job::small(&mesh).run(&mesh);
}

#[test]
fn demands_that_no_worker_can_ever_meet() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    let other_arch = if cfg!(target_arch = "aarch64") { "amd64" } else { "arm64" };
    for (demand, value) in [("--arch", other_arch), ("--memory", "100TiB"), ("--cpu", "4000"), ("--gpu-memory", "4TiB")]
    {
        job.start(&mesh, &[demand, value]).answer().failed_with(NO_PLACE, "NO_WORKER_FITS");
    }
    still_works(&mesh);
}

#[test]
fn a_runtime_that_was_not_fetched() {
    let mesh = Mesh::start();
    let folder = mesh.folder().join("no-runtimes");
    let job = Job::small(&mesh);
    let model = &job.model;
    let mut command = Command::new(binary("mesh-runner"));
    command.args(["serve", "--model", model, "--socket"]).arg(mesh.folder().join("s.sock"));
    command.env("MESH_RUNTIME_DIR", &folder).env("XDG_DATA_HOME", &folder).env("HOME", &folder);
    let output = command.output().expect("mesh-runner is built");
    // On other machines a package may have installed the library where every runner finds it.
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(13), "{said}");
    assert!(said.contains("ENGINE_UNAVAILABLE") && said.contains("docker/fetch-runtimes"), "{said}");
}

/// A worker that finds its libraries in this folder alone.
fn worker_with_libraries_in(mesh: &Mesh, name: &str, folder: &std::path::Path) -> Process {
    let mut command = Command::new(binary("mesh-worker"));
    command.args(["--broker", mesh.endpoint(), "--heartbeat", "200ms", "--engine", "process", "--name", name]);
    command.arg("--state-dir").arg(mesh.folder().join(name));
    command.env("MESH_RUNTIME_DIR", folder).env("XDG_DATA_HOME", folder).env("HOME", folder);
    Process::start(name, command)
}

#[test]
fn a_worker_without_any_runtime_does_not_begin() {
    let mesh = Mesh::start();
    let folder = mesh.folder().join("no-runtimes");
    let mut worker = worker_with_libraries_in(&mesh, "bare", &folder);
    assert_eq!(worker.wait(PATIENCE).code(), Some(78));
    let said = worker.output(Stream::Err);
    assert!(said.contains("docker/fetch-runtimes") && said.contains(&folder.display().to_string()), "{said}");
}

#[test]
fn a_worker_without_the_library_of_a_format_gets_no_such_task() {
    let mesh = Mesh::start();
    let said = Command::new(binary("mesh-runner")).args(["runtimes", "--json"]).output().expect("mesh-runner is built");
    let found: serde_json::Value = serde_json::from_slice(&said.stdout).expect("a list of libraries");
    let folder = mesh.folder().join("half");
    std::fs::create_dir(&folder).expect("the folder is ours");
    let litert = found[0]["library"].as_str().expect("fetched");
    std::os::unix::fs::symlink(litert, folder.join("libLiteRt.so")).expect("the folder is ours");
    let mut half = worker_with_libraries_in(&mesh, "half", &folder);
    half.wait_for_line("`libonnxruntime.so`", PATIENCE, |line| line.contains("docker/fetch-runtimes").then_some(()));
    half.wait_for_line("`ready`", PATIENCE, |line| line.starts_with("ready: ").then_some(()));
    assert_eq!(mesh.ask(&["workers"])["workers"][0]["formats"], serde_json::json!(["tflite"]));

    let _whole = mesh.worker("whole");
    for _ in 0..5 {
        assert_eq!(Job::small(&mesh).run(&mesh).attempts(), 1);
    }
}

/// A restarted log service closes the pipe to which its programs write.
#[test]
fn a_worker_whose_log_nobody_takes_any_more_goes_on() {
    let mesh = Mesh::start();
    let mut command = Command::new("bash");
    command.args(["-c", "exec \"$@\" 2> >(:)", "-"]).arg(binary("mesh-worker"));
    command.args(["--broker", mesh.endpoint(), "--heartbeat", "200ms", "--engine", "process", "--log", "trace"]);
    command.arg("--state-dir").arg(mesh.folder().join("w1"));
    let mut worker = Process::start("w1", command);
    worker.wait_for_line("`ready`", PATIENCE, |line| line.starts_with("ready: ").then_some(()));
    still_works(&mesh);
}
