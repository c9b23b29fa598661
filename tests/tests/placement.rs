//! The placement of tasks: required and preferred labels, named policies, workers that break a promise, and a task that
//! takes several workers down.

use std::collections::BTreeMap;

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, Slowed, Worker, process, wait_until};
use serde_json::Value;

fn with_policy(policy: &str) -> Mesh {
    let broker_args = vec!["--policy".into(), policy.into()];
    Mesh::with(MeshOptions { broker_args, ..MeshOptions::default() })
}

#[test]
fn a_required_label_binds_and_a_preferred_one_is_a_wish() {
    let mesh = Mesh::start();
    let _workers = [("north", "room=north"), ("south", "room=south")]
        .map(|(name, label)| mesh.worker_with(name, &["--label", label]));
    let job = Job::small(&mesh);
    for room in ["north", "south", "north"] {
        let require = format!("room={room}");
        assert_eq!(job.start(&mesh, &["--require", &require]).done(&job).worker(), room);
    }
    // Among workers with about equal predictions the preference decides. Heartbeats report the model's cost.
    for room in ["north", "south", "north"] {
        let prefer = format!("room={room}");
        wait_until(&format!("{room} to be chosen three times in a row"), PATIENCE, || {
            (0..3).all(|_| job.start(&mesh, &["--prefer", &prefer]).done(&job).worker() == room)
        });
    }
    // A task with a preference goes elsewhere rather than wait; one with a requirement waits.
    let _busy = Job::endless(&mesh).start(&mesh, &["--require", "room=north"]);
    wait_until("north to be busy", PATIENCE, || mesh.count_of("client", "running") == 1);
    assert_eq!(job.start(&mesh, &["--prefer", "room=north"]).done(&job).worker(), "south");
    let waits = job.start(&mesh, &["--require", "room=north"]);
    wait_until("it to wait", PATIENCE, || mesh.count_of("client", "queued") == 1);
    drop(waits);
    job.start(&mesh, &["--require", "room=east"]).answer().failed_with(5, "NO_WORKER_FITS");
}

#[test]
fn who_waits_for_a_worker_that_is_gone_is_told_so_also_with_quiet() {
    let mesh = Mesh::start();
    let mut north = mesh.worker_with("north", &["--label", "room=north"]);
    let _south = mesh.worker("south");
    // A younger broker refuses what nobody fits.
    wait_until("all workers to have had time to come", PATIENCE, || {
        mesh.metric("uptime_seconds").is_some_and(|seconds| seconds > 5.0)
    });
    let busy = Job::endless(&mesh).start(&mesh, &["--require", "room=north"]);
    wait_until("north to be busy", PATIENCE, || mesh.count_of("client", "running") == 1);
    let job = Job::small(&mesh);
    let mut waits = job.start(&mesh, &["--require", "room=north", "--quiet"]);
    wait_until("it to wait", PATIENCE, || mesh.count_of("client", "queued") == 1);

    north.kill();

    let told = ["no connected worker can ever run it", "south has no label room=north"];
    waits.client.process().wait_for_line("that it waits in vain", PATIENCE, |line| {
        told.iter().all(|words| line.contains(words)).then_some(())
    });
    let reason = |task: &Value| task["reason"].as_str().is_some_and(|reason| reason.contains(told[0]));
    assert!(mesh.tasks_of("client").iter().any(reason), "`tasks`, `status` and `why` say it, too");
    busy.client.interrupt();
    busy.answer();
    north.restart();
    assert_eq!(waits.done(&job).worker(), "north");
}

/// The workers of `count` small tasks, run one after the other.
fn places(mesh: &Mesh, count: usize) -> Vec<String> {
    let job = Job::small(mesh);
    (0..count).map(|_| job.run(mesh).worker().to_owned()).collect()
}

#[test]
fn each_policy_chooses_as_its_name_says() {
    // Round-robin: each worker has its turn.
    let mesh = with_policy("round-robin");
    let _workers = [mesh.worker("w1"), mesh.worker("w2"), mesh.worker("w3")];
    let mut turns = BTreeMap::<String, usize>::new();
    places(&mesh, 9).into_iter().for_each(|name| *turns.entry(name).or_default() += 1);
    assert_eq!(turns.into_values().collect::<Vec<_>>(), [3, 3, 3]);

    // Least-loaded: never the worker that is running a task.
    let mesh = with_policy("least-loaded");
    let _workers = [mesh.worker_with("w1", &["--slots", "2"]), mesh.worker_with("w2", &["--slots", "2"])];
    let endless = Job::endless(&mesh).start(&mesh, &[]);
    wait_until("it to run", PATIENCE, || mesh.count_of("client", "running") == 1);
    let busy = mesh.tasks_of("client")[0]["worker"]["name"].as_str().expect("a worker").to_owned();
    assert!(places(&mesh, 4).iter().all(|place| *place != busy), "{busy} is at work");
    drop(endless);

    // With any policy tasks are done.
    for policy in ["predicted", "latest-heartbeat", "random"] {
        let mesh = with_policy(policy);
        let _workers = [mesh.worker("w1"), mesh.worker("w2")];
        places(&mesh, 3);
        assert_eq!(mesh.ask(&["status"])["policy"], policy);
    }
}

#[test]
fn a_policy_that_nobody_knows_is_refused_at_the_start() {
    let mut command = std::process::Command::new(process::binary("mesh-broker"));
    command.args(["--bind", "tcp://127.0.0.1:0", "--policy", "cleverest"]);
    let output = command.output().expect("mesh-broker is built");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("round-robin"), "{said}");
}

#[test]
fn who_breaks_a_promise_is_left_for_those_who_keep_it() {
    let mesh = with_policy("round-robin");
    // The slow worker is the last of the round: however busy it is, it has its turn after the other one.
    let (_fast, slow) = (mesh.worker_with("fast", &["--slots", "4"]), mesh.worker_with("slow", &["--slots", "8"]));
    let job = Job::long(&mesh, 2);
    // Both workers have the model, and both keep the promise.
    wait_until("both to have been used", PATIENCE, || {
        job.run(&mesh);
        let workers = mesh.ask(&["workers"]);
        let held = |worker: &Value| worker["held_models"].as_array().is_some_and(|held| !held.is_empty());
        workers["workers"].as_array().is_some_and(|workers| workers.iter().all(held))
    });
    let folder = mesh.folder().join("items");
    std::fs::create_dir(&folder).expect("the folder is ours");
    for item in 0..48_u16 {
        std::fs::copy(&job.input, folder.join(format!("{item:03}.npy"))).expect("the folder is ours");
    }
    let slowed = Slowed::begin(&slow);

    // Number of items that run at the slow worker if so many are sent at a time.
    let at_slow = |parallel: &str| {
        let line = ["submit", &job.model, folder.to_str().unwrap(), "--split", "1", "--parallel", parallel];
        let promise = ["--slo", "2s", "--max-violation", "20%", "--lane", "realtime"];
        let report = mesh.ask(&[&line[..], &promise].concat());
        let rows = report["items"].as_array().expect("items").clone();
        assert_eq!(rows.len(), 48);
        rows.iter().filter(|row| row["worker"]["name"] == "slow").count()
    };
    // All slots of the slow worker are used, and every task there is late.
    let before = at_slow("12");
    assert!(before >= 8, "{before} of 48 ran at the slow worker before it was judged");
    wait_until("the broker to leave it", PATIENCE, || mesh.metric("slo_trips_total") >= Some(1.0));
    // Fewer at a time than the fast worker has slots: none must go elsewhere, but one in 16 goes there as a probe.
    let after = at_slow("2");
    drop(slowed);
    assert!(after <= 4, "{after} of 48 ran at the slow worker after it was left; in turns it would be 24");
}

#[test]
fn a_task_that_takes_three_workers_down_is_given_up() {
    let mesh = Mesh::start();
    let mut workers: Vec<Worker> = ["w1", "w2", "w3", "w4"].map(|name| mesh.worker(name)).into();
    let started = Job::endless(&mesh).start(&mesh, &[]);
    for victim in 0..3 {
        wait_until(&format!("it to run for the {victim}. time"), PATIENCE, || {
            workers.iter().any(|worker| !process::children_of(worker.pid()).is_empty())
        });
        let runs_it =
            workers.iter_mut().find(|worker| !process::children_of(worker.pid()).is_empty()).expect("just seen");
        runs_it.kill();
    }

    let answer = started.answer().failed_with(4, "POISONOUS");

    let why = answer.stdout + &answer.stderr;
    assert!(why.contains("three") || why.contains('3'), "{why}");
    // The last worker is still alive.
    Job::small(&mesh).run(&mesh);
}
