//! Models in containers: limited, hardened, and removed in time.

use std::collections::BTreeSet;

use mesh_tests::{
    Job, Mesh, PATIENCE, Worker,
    docker::{self, Inside},
    wait_for, wait_until,
};
use proto_msgs::Phase;
use serde_json::Value;

/// The worker's own containers, found by the worker's id among those of other tests.
fn containers_of(worker: &Worker) -> Vec<String> {
    docker::containers(&format!("mesh.worker={}", worker.id().expect("it has started")))
}

#[test]
fn a_run_in_a_container_is_limited_and_hardened() {
    if !docker::is_ready("a_run_in_a_container_is_limited_and_hardened") {
        return;
    }
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &["--engine", "docker", "--memory-limit", "600MiB"]);
    let started = Job::endless(&mesh).start(&mesh, &["--cpu", "1"]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));

    let container = wait_for("its container", PATIENCE, || containers_of(&worker).into_iter().next());
    let facts = docker::inspect(&container).expect("it runs");
    let host = &facts["HostConfig"];
    assert_eq!(host["NetworkMode"], "none");
    assert_eq!(host["ReadonlyRootfs"], true);
    assert!(host["CapAdd"].as_array().is_none_or(Vec::is_empty), "{}", host["CapAdd"]);
    assert!(host["SecurityOpt"].to_string().contains("no-new-privileges"), "{}", host["SecurityOpt"]);
    assert_eq!(host["Memory"], 600_u64 << 20);
    assert_eq!(host["Privileged"], false);
    assert!(
        facts["Config"]["User"].as_str().is_some_and(|user| user.starts_with("65534")),
        "{}",
        facts["Config"]["User"]
    );
    let mounts = facts["Mounts"].as_array().cloned().unwrap_or_default();
    let writable: Vec<&Value> = mounts.iter().filter(|mount| mount["RW"] == true).collect();
    assert!(writable.iter().all(|mount| mount["Destination"] == "/mesh"), "only its socket's folder: {writable:?}");

    is_hardened(&facts);
    is_confined(&Inside::of(&container));

    started.client.interrupt();
    started.answer();
    wait_until("the container to go", PATIENCE, || docker::inspect(&container).is_none());
}

/// Checks that what was asked of the engine applies: a container of 600 MiB and a core, without any rights.
#[track_caller]
fn is_confined(inside: &Inside) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&inside.status(set), 16), Ok(0), "{set}");
    }
    assert_eq!(inside.status("NoNewPrivs"), "1");
    assert_eq!(inside.memory_bytes(), Some(600 << 20));
    assert!(inside.processes().is_some_and(|limit| (1..=512).contains(&limit)), "{:?}", inside.processes());
    assert!(inside.cores().is_some_and(|cores| (0.9..=1.5).contains(&cores)), "{:?}", inside.cores());
}

/// Checks what no task can change: what a container sees, may leave behind, and may take from the host.
#[track_caller]
fn is_hardened(facts: &Value) {
    let host = &facts["HostConfig"];
    assert_eq!(host["MemorySwap"], host["Memory"], "no swap");
    assert_eq!(host["IpcMode"], "none");
    assert_eq!(host["OomScoreAdj"], 500, "it goes before its worker does");
    let limits: BTreeSet<(String, i64, i64)> = host["Ulimits"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|limit| {
            let number = |name: &str| limit[name].as_i64().expect("a number");
            (limit["Name"].as_str().expect("a name").to_owned(), number("Soft"), number("Hard"))
        })
        .collect();
    for (name, most) in [("nofile", 1024), ("core", 0), ("fsize", 64 << 20)] {
        let is_kept = |(is, soft, hard): &(String, i64, i64)| is == name && soft <= hard && *hard <= most;
        assert!(limits.iter().any(is_kept), "{name}: {limits:?}");
    }
    let tmp = host["Tmpfs"]["/tmp"].as_str().expect("a /tmp of its own");
    for option in ["noexec", "nosuid", "nodev", "size="] {
        assert!(tmp.contains(option), "{tmp}");
    }
    let log = &host["LogConfig"];
    let is_ours = log["Type"] == "local" || log["Type"] == "k8s-file";
    assert!(is_ours && log["Config"]["max-size"].is_string(), "a log that ends: {log}");
    assert_eq!(facts["Image"], docker::runner_image(), "named by its content");
    let sees = |mount: &Value| (mount["Destination"].as_str().map(str::to_owned), mount["RW"].as_bool());
    let mut mounts: Vec<_> = facts["Mounts"].as_array().expect("a list").iter().map(sees).collect();
    mounts.sort();
    let named = |path: &str, is_writable| (Some(path.to_owned()), Some(is_writable));
    assert_eq!(mounts, [named("/mesh", true), named("/model", false)]);
}

#[test]
fn a_container_whose_run_takes_too_long_is_ended() {
    if !docker::is_ready("a_container_whose_run_takes_too_long_is_ended") {
        return;
    }
    let mesh = Mesh::start();
    // The limit also applies to loading, which takes long in a container on a busy machine.
    let (door, worker) = mesh.worker_behind_proxy("w1", &["--engine", "docker", "--run-limit", "15s"]);
    let started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
    let container = wait_for("its container", PATIENCE, || containers_of(&worker).into_iter().next());

    started.answer().failed_with(4, "RUN_TIMEOUT").failed_with(4, "the run did not end within");

    wait_until("the container to go", PATIENCE, || docker::inspect(&container).is_none());
    mesh.wait_idle();
    Job::small(&mesh).run(&mesh);
}

#[test]
fn a_task_whose_container_somebody_ends_runs_in_another() {
    if !docker::is_ready("a_task_whose_container_somebody_ends_runs_in_another") {
        return;
    }
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &["--engine", "docker"]);
    let started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
    let container = wait_for("its container", PATIENCE, || containers_of(&worker).into_iter().next());

    docker::kill(&container);

    if !docker::tells_memory() {
        // It may be the model that took too much memory, so nobody else tries it.
        started.answer().failed_with(4, "RUN_CRASHED").failed_with(4, "SIGKILL");
        wait_until("the container to go", PATIENCE, || containers_of(&worker).is_empty());
        Job::small(&mesh).run(&mesh);
        return;
    }
    wait_until("another container", PATIENCE, || containers_of(&worker).iter().any(|other| *other != container));
    wait_until("the first one to go", PATIENCE, || docker::inspect(&container).is_none());
    started.client.interrupt();
    mesh.wait_idle();
    Job::small(&mesh).run(&mesh);
}

#[test]
fn a_container_goes_with_the_client_that_is_killed() {
    if !docker::is_ready("a_container_goes_with_the_client_that_is_killed") {
        return;
    }
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &["--engine", "docker"]);
    let mut started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
    let container = wait_for("its container", PATIENCE, || containers_of(&worker).into_iter().next());

    started.client.process().kill();

    wait_until("the container to go", PATIENCE, || docker::inspect(&container).is_none());
    mesh.wait_idle();
    Job::small(&mesh).run(&mesh);
}

#[test]
fn the_processor_grant_follows_the_head_room_curve() {
    if !docker::is_ready("the_processor_grant_follows_the_head_room_curve") {
        return;
    }
    let mesh = Mesh::start();
    let cores: f64 = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    // With the first curve, 2 cores are granted as 2.2, 5 as 5.3, and fewer in proportion.
    let cases =
        [("2:2.2,5:5.3", "1", 1.1_f64), ("2:2.2,5:5.3", "0.5", 0.55), ("1:1.5", "1", 1.5), ("2:2.2,5:5.3", "2", 2.2)];
    for (number, (curve, asked, granted)) in cases.into_iter().enumerate() {
        if asked.parse::<f64>().is_ok_and(|asked| asked > cores) {
            continue;
        }
        let name = format!("w{number}");
        let (door, mut worker) = mesh.worker_behind_proxy(&name, &["--engine", "docker", "--cpu-headroom", curve]);
        let started = Job::endless(&mesh).start(&mesh, &["--cpu", asked]);
        wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
        let container = wait_for("its container", PATIENCE, || containers_of(&worker).into_iter().next());
        let limit = Inside::of(&container).cores();
        assert!(
            limit.is_some_and(|limit| (limit - granted).abs() < 0.005),
            "{asked} of {cores} cores asked, {granted} expected by {curve}, {limit:?} granted"
        );
        started.client.interrupt();
        started.answer();
        mesh.wait_idle();
        worker.drain();
        worker.process().wait(PATIENCE);
    }
}

#[test]
fn a_cancel_from_elsewhere_reaches_the_running_container() {
    if !docker::is_ready("a_cancel_from_elsewhere_reaches_the_running_container") {
        return;
    }
    let mesh = Mesh::start();
    let worker = mesh.worker_with("w1", &["--engine", "docker"]);
    let task = Job::endless(&mesh).detach(&mesh);
    let container = wait_for("its container", PATIENCE, || containers_of(&worker).into_iter().next());

    mesh.client(&["cancel", &task]).succeeded();

    wait_until("the container to go", PATIENCE, || docker::inspect(&container).is_none());
    Job::small(&mesh).run(&mesh);
}

#[test]
fn the_answer_is_the_same_in_a_container_and_the_second_run_is_warm() {
    if !docker::is_ready("the_answer_is_the_same_in_a_container_and_the_second_run_is_warm") {
        return;
    }
    let mesh = Mesh::start();
    let worker = mesh.worker_with("w1", &["--engine", "docker"]);
    let job = Job::small(&mesh);
    job.run(&mesh);
    let first = containers_of(&worker);
    job.run(&mesh);
    assert_eq!(containers_of(&worker), first, "the loaded model was used again");
}

#[test]
fn containers_of_a_killed_worker_are_removed_at_its_next_start() {
    if !docker::is_ready("containers_of_a_killed_worker_are_removed_at_its_next_start") {
        return;
    }
    let mesh = Mesh::start();
    let (door, mut worker) = mesh.worker_behind_proxy("w1", &["--engine", "docker"]);
    let mut started = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("the model to run", PATIENCE, || door.worker_reached(Phase::Running));
    let orphans = containers_of(&worker);
    assert!(!orphans.is_empty(), "a container runs");

    worker.kill();
    started.client.process().kill();
    assert!(docker::inspect(&orphans[0]).is_some(), "nobody was there to remove it");
    worker.restart();

    wait_until("the orphans to go", PATIENCE, || orphans.iter().all(|container| docker::inspect(container).is_none()));
}

#[test]
fn a_container_is_removed_once_its_engine_answers_again() {
    if !docker::is_ready("a_container_is_removed_once_its_engine_answers_again") {
        return;
    }
    let mesh = Mesh::start();
    let mut way = docker::Way::open(mesh.folder());
    let mut worker = mesh.worker_with("w1", &["--engine", "docker", "--docker-host", &way.host()]);
    Job::small(&mesh).run(&mesh);
    let left = containers_of(&worker);
    assert!(!left.is_empty(), "it is kept warm");

    way.block();
    wait_until("the worker to miss its engine", PATIENCE, || worker.process().has_said("cannot be removed"));
    assert!(left.iter().all(|container| docker::inspect(container).is_some()), "nobody could remove it");
    way.unblock();

    wait_until("the container to go", PATIENCE, || left.iter().all(|container| docker::inspect(container).is_none()));
    Job::small(&mesh).run(&mesh);
}

#[test]
fn auto_finds_podman_where_there_is_no_docker() {
    if !docker::is_podman() || !docker::is_ready("auto_finds_podman_where_there_is_no_docker") {
        return;
    }
    let mesh = Mesh::start();
    let usual = mesh.folder().join("podman");
    std::fs::create_dir(&usual).expect("the folder is ours");
    std::os::unix::fs::symlink(docker::socket(), usual.join("podman.sock")).expect("the folder is ours");

    // It sees an empty /run, so that Docker's socket is not there, and is told nothing.
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount -t tmpfs none /run && exec \"$@\"", "sh"]);
    command.arg(mesh_tests::process::binary("mesh-worker")).args(["--broker", mesh.endpoint(), "--state-dir"]);
    command.arg(mesh.folder().join("w1")).env("XDG_RUNTIME_DIR", mesh.folder()).env_remove("DOCKER_HOST");
    let mut worker = mesh_tests::Process::start("w1", command);

    worker.wait_for_line("`ready`", PATIENCE, |line| line.contains("ready: worker").then_some(()));
    assert!(worker.has_said("flavour=Podman"));
    assert_eq!(mesh.ask(&["workers"])["workers"][0]["engine"], "docker");
}

#[test]
fn a_copy_of_a_running_worker_s_state_folder_leaves_its_containers_alone() {
    if !docker::is_ready("a_copy_of_a_running_worker_s_state_folder_leaves_its_containers_alone") {
        return;
    }
    let mesh = Mesh::start();
    let worker = mesh.worker_with("w1", &["--engine", "docker"]);
    let job = Job::small(&mesh);
    job.run(&mesh);
    let warm = containers_of(&worker);
    let copy = mesh.folder().join("copy");
    std::fs::create_dir(&copy).expect("the folder is ours");
    std::fs::copy(worker.state_dir().join("worker-id"), copy.join("worker-id")).expect("the worker has an id");

    let mut copy = mesh.unregistered_worker("copy", &["--engine", "docker"]);

    assert_eq!(copy.process().wait(PATIENCE).code(), Some(78), "it was told to leave");
    job.run(&mesh);
    assert_eq!(containers_of(&worker), warm, "the first one still uses what it had loaded");
}

#[test]
fn containers_go_with_their_worker() {
    if !docker::is_ready("containers_go_with_their_worker") {
        return;
    }
    let mesh = Mesh::start();
    let mut worker = mesh.worker_with("w1", &["--engine", "docker"]);
    Job::small(&mesh).run(&mesh);
    let warm = containers_of(&worker);
    assert!(!warm.is_empty(), "it is kept warm");

    worker.drain();

    assert_eq!(worker.process().wait(PATIENCE).code(), Some(0));
    assert!(warm.iter().all(|container| docker::inspect(container).is_none()), "the worker left containers behind");
}

#[test]
fn a_container_that_takes_too_much_memory_is_ended() {
    if !docker::is_ready("a_container_that_takes_too_much_memory_is_ended") {
        return;
    }
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--engine", "docker", "--memory-limit", "512MiB"]);
    let model = mesh.file("hungry.onnx", &mesh_tests::onnx::hungry());
    let input = mesh.array("elements.npy", &mesh_tests::npy::Array::of_i64(&[1], &[1 << 30]));
    let answer = mesh.client(&["submit", &model, &input]);
    if docker::tells_memory() {
        answer.failed_with(4, "RUN_OOM");
    } else {
        answer.failed_with(4, "RUN_CRASHED").failed_with(4, "perhaps for more than its 512.0 MiB of memory");
    }
    Job::small(&mesh).run(&mesh);
}

#[test]
fn auto_takes_containers_where_it_can() {
    if !docker::is_ready("auto_takes_containers_where_it_can") {
        return;
    }
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--engine", "auto"]);
    assert_eq!(mesh.ask(&["workers"])["workers"][0]["engine"], "docker");
}

#[test]
fn auto_takes_child_processes_where_it_must() {
    let mesh = Mesh::start();
    let nowhere = format!("unix://{}", mesh.folder().join("no.sock").display());
    let _worker = mesh.worker_with("w1", &["--engine", "auto", "--docker-host", &nowhere]);
    assert_eq!(mesh.ask(&["workers"])["workers"][0]["engine"], "process");
    Job::small(&mesh).run(&mesh);
}

#[test]
fn an_engine_that_hangs_does_not_keep_auto_from_child_processes() {
    let mesh = Mesh::start();
    let socket = mesh.folder().join("hangs.sock");
    // Connections are accepted by the system, and nobody answers.
    let _hangs = std::os::unix::net::UnixListener::bind(&socket).expect("the folder is ours");
    let began = std::time::Instant::now();

    let mut worker =
        mesh.worker_with("w1", &["--engine", "auto", "--docker-host", &format!("unix://{}", socket.display())]);

    // The engine is given ten seconds to answer; most of a minute would be one wait for each of its questions.
    assert!(began.elapsed() < PATIENCE / 2, "ready after {:?}", began.elapsed());
    assert!(worker.process().has_said("the container engine hangs"));
    assert_eq!(mesh.ask(&["workers"])["workers"][0]["engine"], "process");
}

/// A worker that was told an image which the engine does not have.
#[test]
fn without_the_image_auto_takes_child_processes_and_docker_names_the_command_that_builds_it() {
    if !docker::is_ready("without_the_image_auto_takes_child_processes_and_docker_names_the_command_that_builds_it") {
        return;
    }
    let mesh = Mesh::start();
    let image = ["--image", "nobody-built-this:latest"];
    let _worker = mesh.worker_with("w1", &[&["--engine", "auto"], &image[..]].concat());
    assert_eq!(mesh.ask(&["workers"])["workers"][0]["engine"], "process");

    let mut strict = mesh.unregistered_worker("w2", &[&["--engine", "docker"], &image[..]].concat());
    strict.process().wait_for_line("the command", PATIENCE, |line| line.contains("docker/build-image").then_some(()));
    assert_eq!(strict.process().wait(PATIENCE).code(), Some(78));
}

#[test]
fn a_model_that_crashes_its_container_while_it_is_loaded_is_rejected() {
    if !docker::is_ready("a_model_that_crashes_its_container_while_it_is_loaded_is_rejected") {
        return;
    }
    let mesh = Mesh::start();
    // No file is known that crashes the real runtimes, so a script stands in. The first process of a container cannot
    // kill itself, so it ends as the engine reports a SIGSEGV.
    let script = "echo the graph is twisted >&2; exit 139";
    let image = docker::ScriptImage::make(mesh.folder(), "falling", script);
    let worker = mesh.worker_with("w1", &["--engine", "docker", "--image", &image.name]);
    let answer = Job::small(&mesh).start(&mesh, &[]).answer().failed_with(3, "MODEL_REJECTED");
    answer.failed_with(3, "SIGSEGV").failed_with(3, "the graph is twisted");
    mesh.wait_idle();
    wait_until("the container to go", PATIENCE, || containers_of(&worker).is_empty());
}

/// A model that gained control of its runner can write files beside its socket. They are memory of its container.
#[test]
fn a_container_that_writes_files_without_end_fills_its_own_memory_and_not_the_disk() {
    if !docker::is_ready("a_container_that_writes_files_without_end_fills_its_own_memory_and_not_the_disk") {
        return;
    }
    let mesh = Mesh::start();
    // An end all the same: 512 files of one megabyte.
    let script = "i=0; while [ $i -lt 512 ]; do printf %01048576d 0 >/mesh/$i || exit 9; i=$((i+1)); done; exit 8";
    let image = docker::ScriptImage::make(mesh.folder(), "writing", script);
    let worker = mesh.worker_with("w1", &["--engine", "docker", "--image", &image.name, "--memory-limit", "256MiB"]);
    let answer = Job::small(&mesh).start(&mesh, &[]).answer();
    if docker::tells_memory() {
        answer.failed_with(4, "RUN_OOM").failed_with(4, "used more than its 256.0 MiB of memory");
    } else {
        answer.failed_with(3, "MODEL_REJECTED").failed_with(3, "perhaps for more than its 256.0 MiB of memory");
    }
    mesh.wait_idle();
    let kept = || worker.files().iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum::<u64>();
    wait_until("the files to go with their container", PATIENCE, || kept() < 1 << 20);
}
