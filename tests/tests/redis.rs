//! Redis as the store: a copy for other readers and the memory for restarts, never the basis of decisions.

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, Redis, redis::NOTICE_LIMIT, wait_for, wait_until};

fn mesh_with(redis: &Redis) -> Mesh {
    Mesh::with(MeshOptions { redis_url: Some(redis.url()), ..MeshOptions::default() })
}

/// The first key that matches, as soon as there is one.
fn key(redis: &Redis, pattern: &str) -> String {
    let find = || redis.cli(&["--scan", "--pattern", pattern]).lines().next().map(str::to_owned);
    wait_for(&format!("a key like {pattern}"), PATIENCE, find)
}

/// A hash, read by `redis-cli HGETALL`: fields and values in turn.
fn fields(redis: &Redis, key: &str) -> Vec<(String, String)> {
    let text = redis.cli(&["HGETALL", key]);
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks_exact(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
}

#[test]
fn a_person_can_read_the_metric_table() {
    let redis = Redis::start();
    let mesh = mesh_with(&redis);
    let worker = mesh.worker("w1");

    let key = key(&redis, "mesh:{default}:worker:*");

    let row = fields(&redis, &key);
    let value = |name: &str| row.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    assert_eq!(value("name"), Some(worker.name()), "{row:?}");
    assert!(value("slots").is_some(), "{row:?}");
    assert!(row.iter().any(|(field, _)| field.ends_with("_bytes")), "units stand in the names: {row:?}");
    for (field, value) in &row {
        assert!(!value.chars().any(|c| c.is_control() || c == '\u{FFFD}'), "{field} is no text: {value:?}");
    }
    let expires_ms: i64 = redis.cli(&["PTTL", &key]).parse().expect("a number");
    assert!((1..=10_000).contains(&expires_ms), "the row goes with its worker, in {expires_ms} ms");
}

#[test]
fn the_metric_table_tells_what_the_machine_is_and_does() {
    let redis = Redis::start();
    let mesh = mesh_with(&redis);
    let _worker = mesh.worker("w1");
    let key = key(&redis, "mesh:{default}:worker:*");
    let number = |name: &str| {
        // The row may be gone for a moment if the machine stands still for longer than a row lasts.
        wait_for(name, PATIENCE, || redis.cli(&["HGET", &key, name]).parse::<i64>().ok())
    };
    let cores = std::thread::available_parallelism().expect("a machine has some").get();
    let mib = 1 << 20;
    wait_until("the first heartbeat's row", PATIENCE, || redis.cli(&["HEXISTS", &key, "heartbeat_seq"]) == "1");
    assert_eq!(number("cores"), cores as i64);
    let (free, all) = (number("memory_available_bytes"), number("memory_bytes"));
    assert!((16 * mib..all).contains(&free), "{free} of {all}");
    assert!(number("disk_free_bytes") > 16 * mib);
    assert_eq!((number("slots"), number("slots_used"), number("attempts")), (1, 0, 0));
    assert_eq!(number("held_models_count"), 0);
    wait_until("an answered heartbeat's time", PATIENCE, || (1..1_000_000).contains(&number("broker_rtt_us")));

    let started = Job::endless(&mesh).start(&mesh, &[]);
    // One core is busy all the time.
    let half_a_core = 500 / cores as i64;
    wait_until("the task to be told", PATIENCE, || (number("slots_used"), number("attempts")) == (1, 1));
    wait_until("the load to be told", PATIENCE, || number("cpu_permille") > half_a_core && number("load1_milli") > 0);
    wait_until("the model to be told", PATIENCE, || number("held_models_count") == 1);
    let seq = number("heartbeat_seq");
    wait_until("another heartbeat", PATIENCE, || number("heartbeat_seq") > seq);

    started.client.interrupt();
    started.answer();
    wait_until("the slot to be free", PATIENCE, || (number("slots_used"), number("attempts")) == (0, 0));
    assert_eq!(number("held_models_count"), 1, "what was sent once is kept");
}

#[test]
fn a_worker_s_row_goes_when_the_worker_dies() {
    let redis = Redis::start();
    let mesh = mesh_with(&redis);
    let mut worker = mesh.worker("w1");
    let key = key(&redis, "mesh:{default}:worker:*");

    worker.kill();

    wait_until("the row to go", PATIENCE, || redis.cli(&["EXISTS", &key]) == "0");
}

#[test]
fn the_broker_goes_on_deciding_without_it_says_so_and_catches_up() {
    let mut redis = Redis::start();
    let mut mesh = mesh_with(&redis);
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    job.run(&mesh);

    redis.kill();
    wait_until("the metrics to say so", NOTICE_LIMIT, || mesh.metric("store_up") == Some(0.0));
    job.run(&mesh);
    let (status, ready) = mesh.admin_page("/readyz").expect("the admin port answers");
    assert!(ready.contains("away: detached tasks are refused"), "health says what is wrong: {status} {ready}");
    let health = || mesh.admin_page("/healthz").expect("the admin port answers").1;
    assert!(health().contains("degraded") && health().contains("away_s"), "{}", health());
    let went = "decisions go on, detached tasks are refused";
    mesh.broker().wait_for_line("that it is away", PATIENCE, |line| line.contains(went).then_some(()));
    assert!(!mesh.broker().has_said("the store is back after"), "it is not");
    // A detached task must be stored, so it is refused now.
    mesh.client(&job.submit(&["--detach", "--no-wait"])).failed_with(5, "STORE_AWAY");

    redis.start_again();
    wait_until("the store to be back", NOTICE_LIMIT, || mesh.metric("store_up") == Some(1.0));
    wait_until("everything to be written", PATIENCE, || mesh.metric("store_pending_changes") == Some(0.0));
    let came = "the store is back after";
    mesh.broker().wait_for_line("that it is back", PATIENCE, |line| line.contains(came).then_some(()));
    let (_, health) = mesh.admin_page("/healthz").expect("the admin port answers");
    assert!(!health.contains("degraded"), "{health}");
    let row = fields(&redis, &key(&redis, "mesh:{default}:worker:*"));
    assert!(row.contains(&("name".to_owned(), "w1".to_owned())), "{row:?}");
    job.detach(&mesh);
}

/// Longer than every pause, reminder and lease of the store.
#[test]
fn two_minutes_without_it_are_said_again_and_cost_neither_memory_nor_tasks() {
    let mut redis = Redis::start();
    let mut mesh = mesh_with(&redis);
    let _workers = [mesh.worker("w1"), mesh.worker("w2")];
    let detached = Job::endless(&mesh).detach(&mesh);
    let job = Job::small(&mesh);
    job.run(&mesh);

    redis.kill();
    let killed = std::time::Instant::now();
    let mut most_pending = 0.0_f64;
    while killed.elapsed().as_secs() < 130 {
        job.run(&mesh);
        most_pending = most_pending.max(mesh.metric("store_pending_changes").expect("it is counted"));
    }
    assert!(most_pending < 20.0, "changes to the same rows are merged: {most_pending}");
    assert!(mesh.broker().has_said("the store has been away for 6"), "after a minute");
    assert!(mesh.broker().has_said("the store has been away for 12"), "and after another");
    assert_eq!(mesh.ask(&["workers"])["workers"].as_array().map(Vec::len), Some(2), "nobody was lost");

    redis.start_again();
    wait_until("the store to be back", NOTICE_LIMIT, || mesh.metric("store_up") == Some(1.0));
    wait_until("everything to be written", PATIENCE, || mesh.metric("store_pending_changes") == Some(0.0));
    for row in ["mesh:{default}:worker:*", &format!("mesh:{{default}}:task:{detached}")] {
        key(&redis, row);
    }
    mesh.restart_broker();
    mesh.client(&["cancel", &detached]).succeeded();
    job.detach(&mesh);
}

#[test]
fn a_detached_task_can_be_read_while_it_lives() {
    let redis = Redis::start();
    let mesh = mesh_with(&redis);
    let _worker = mesh.worker("w1");
    let task = Job::endless(&mesh).detach(&mesh);

    let row = fields(&redis, &key(&redis, &format!("mesh:{{default}}:task:{task}")));
    assert!(row.iter().any(|(field, value)| field == "model_name" && value == "counting.onnx"), "{row:?}");

    mesh.client(&["cancel", &task]).succeeded();
}
