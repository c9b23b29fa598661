//! `mesh-client bench` against a real mesh: closed and open loops, thresholds, the search, and files that agree with
//! each other. Tests only that the reports are true, not how fast anything is.

use std::{collections::BTreeMap, fs, time::Duration};

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, Slowed, proxy::Side, wait_until};
use serde_json::Value;

/// Flags for levels of a second or two instead of half a minute.
const SHORT: &str = "--warmup 200ms --window 400ms --windows-max 4";

/// The arguments of `bench` for this job with these flags.
fn bench<'a>(job: &'a Job, flags: &'a str) -> Vec<&'a str> {
    ["bench", &job.model, &job.input].into_iter().chain(flags.split_whitespace()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn levels(report: &Value) -> &[Value] {
    report["levels"].as_array().expect("levels")
}

/// Rows of a CSV file, each a map by heading.
fn read_csv(path: &str) -> Vec<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).expect("the file was written");
    let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let headings = lines.next().expect("a heading");
    lines.map(|cells| headings.iter().cloned().zip(cells).collect()).collect()
}

#[test]
fn a_closed_loop_is_measured_and_all_files_say_the_same() {
    let mesh = Mesh::start();
    let _workers = [mesh.worker("w1"), mesh.worker("w2")];
    // Long against what the tool needs between two requests.
    let job = Job::long(&mesh, 20);
    let (csv, svg) = (mesh.folder().join("levels.csv"), mesh.folder().join("plot.svg"));
    let (csv, svg) = (csv.to_str().unwrap(), svg.to_str().unwrap());

    let flags = format!("--concurrency 2:4:2 {SHORT} --csv {csv} --plot {svg}");
    let report = mesh.ask(&bench(&job, &flags));

    let rows = read_csv(csv);
    assert_eq!((levels(&report).len(), rows.len()), (2, 2));
    let mut answered = 0.0;
    for ((level, row), concurrency) in levels(&report).iter().zip(&rows).zip([2, 4]) {
        assert_eq!((level["concurrency"].as_u64(), &row["concurrency"]), (Some(concurrency), &concurrency.to_string()));
        assert_eq!((level["failed"].as_u64(), level["not_sent"].as_u64()), (Some(0), Some(0)), "{level}");
        let requests = number(&level["requests"]);
        assert!(requests > 0.0);
        assert_eq!(row["requests"], requests.to_string());
        let quantiles = ["p50", "p90", "p95", "p99", "p99.9", "max"];
        let latency = quantiles.map(|name| number(&level["latency_ms"][name]));
        assert!(latency.is_sorted() && latency[0] > 0.0, "{level}");
        for (name, ms) in quantiles.iter().zip(latency) {
            assert!((row[&format!("{name}_ms")].parse::<f64>().unwrap() - ms).abs() < 1e-3, "{name} in {row:?}");
        }
        let mean_ms = number(&level["latency_ms"]["mean"]);
        // A worker's run time cannot exceed the latency that its client saw.
        assert!(number(&level["parts_ms"]["running"]) < mean_ms);
        // Requests under way = requests per second × latency (Little's law).
        let under_way = number(&level["requests_per_s"]) * mean_ms / 1e3;
        assert!((under_way / concurrency as f64 - 1.0).abs() < 0.35, "{under_way} under way, not {concurrency}");
        let workers = level["workers"].as_array().expect("workers");
        assert_eq!(workers.iter().map(|worker| number(&worker["requests"])).sum::<f64>(), requests);
        answered += level["windows"].as_array().unwrap().iter().map(|window| number(&window["requests"])).sum::<f64>();
    }
    wait_until("the broker to know what is told", PATIENCE, || mesh.metric("tasks_done_total") >= Some(answered));
    let picture = fs::read_to_string(svg).expect("the picture was written");
    assert_eq!((picture.matches("<polyline").count(), picture.matches("<circle").count()), (3, 6));
}

#[test]
fn figures_that_cannot_be_written_are_still_printed() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 5);
    let svg = mesh.folder().join("plot.svg");
    let flags = format!("{SHORT} --csv /dev/full --plot {} --json", svg.display());

    let answer = mesh.client(&bench(&job, &flags)).failed_with(1, "cannot write /dev/full");

    assert!(number(&levels(&answer.json())[0]["requests"]) > 0.0);
    assert!(fs::read_to_string(svg).is_ok_and(|picture| picture.contains("<svg")), "the other file is written");
}

#[test]
fn a_deadline_is_for_requests_of_a_model_that_is_there() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    // To send it takes twice as long as the deadline, and a run a thousandth.
    door.throttle_from(Side::Dialler, 8 << 20);
    let job = Job::heavy(&mesh, 32, 7);
    mesh.client(&job.submit(&["--deadline", "2s"])).failed_with(7, "");
    // Another model of that size, of which nothing was sent yet.
    let job = Job::heavy(&mesh, 32, 8);

    let report = mesh.client(&bench(&job, &format!("--deadline 2s {SHORT} --json"))).json();

    assert!(number(&levels(&report)[0]["requests"]) > 0.0, "{report}");
}

#[test]
fn an_open_loop_holds_a_threshold_or_breaks_it() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 2);

    let kept = format!("--rate 20 --distribution poisson --latency-threshold 30s {SHORT}");
    let report = mesh.ask(&bench(&job, &kept));
    let level = &levels(&report)[0];
    assert_eq!((level["verdict"].as_str(), level["violation"].as_f64()), (Some("held"), Some(0.0)), "{level}");

    // No request is answered within a microsecond: the first level breaks the promise, and the others are skipped.
    let broken = format!("--rate 20:80:20 --latency-threshold 1us {SHORT} --json");
    let answer = mesh.client(&bench(&job, &broken)).failed_with(7, "broken");
    let report = answer.json();
    assert_eq!((levels(&report).len(), report["levels_left_out"].as_u64()), (1, Some(3)));
    assert_eq!(number(&levels(&report)[0]["violation"]), 1.0);
}

#[test]
fn what_cannot_be_sent_in_time_is_counted_not_forgotten() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 100);

    // 100 requests per second into a slot that does ten at best, with at most four under way.
    let flags = format!("--rate 100 --max-outstanding 4 --latency-threshold 30s {SHORT} --json");
    let report = mesh.client(&bench(&job, &flags)).failed_with(7, "NOT_SENT").json();

    let level = &levels(&report)[0];
    assert!(number(&level["not_sent"]) > number(&level["requests"]), "{level}");
    assert_eq!(level["errors"]["NOT_SENT"], level["not_sent"]);
    assert!(number(&level["violation"]) > 0.5, "a request that is not sent is no success");
}

/// Answers per second in a closed loop.
fn capacity(mesh: &Mesh, job: &Job) -> f64 {
    let report = mesh.ask(&bench(job, &format!("--concurrency 4 {SHORT}")));
    number(&levels(&report)[0]["requests_per_s"])
}

#[test]
fn the_highest_rate_that_holds_is_found() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 20);

    // The worker's capacity is measured before and after, since the load of this machine is unknown.
    let before = capacity(&mesh, &job);
    let promise = "--latency-threshold 2s --max-violation 20% --max-outstanding 16";
    let flags = format!("--find-max-rate 4:512:8 {promise} {SHORT}");
    let report = mesh.ask(&bench(&job, &flags));
    let after = capacity(&mesh, &job);

    let highest = &report["highest_rate"];
    let (held, broken) = (number(&highest["held"]), number(&highest["broken"]));
    assert!(held < broken && broken - held <= 8.1, "{highest}");
    // The machine may have been busy only then: an idle one does fifty per second.
    let most = 1.5 * before.max(after).max(50.0);
    assert!(held <= most, "{highest}, but a closed loop gets {before} and {after} answers a second");
    assert!(held >= before.min(after) / 6.0, "{highest}, but a closed loop gets {before} and {after} answers a second");
    let beyond = flags.replace("4:512:8", "512:512:512");
    let text = mesh.client(&bench(&job, &beyond)).failed_with(7, "no rate was found");
    assert!(text.stdout.contains("512/s"), "{}", text.stdout);
}

#[test]
fn a_schedule_is_followed_line_by_line() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 1);
    let times: String = (0..20).map(|request| format!("{}\n", request * 40)).collect();
    let schedule = mesh.file("times.txt", times.as_bytes());

    let report = mesh.ask(&bench(&job, &format!("--schedule {schedule} --window 200ms --clients 2")));

    let level = &levels(&report)[0];
    assert_eq!((level["settled"].as_str(), level["requests"].as_u64()), (Some("replayed"), Some(20)), "{level}");
    assert!(number(&level["measured_ms"]) >= 760.0, "the last line is not sent before its time: {level}");
    assert_eq!(level["clients"]["items"], serde_json::json!([10, 10]));
    assert_eq!(number(&level["clients"]["jain"]), 1.0);
}

#[test]
fn traffic_that_moves_to_another_worker_is_told() {
    let mesh = Mesh::start();
    let mut lost = mesh.worker("lost");
    let _kept = mesh.worker("kept");
    let job = Job::long(&mesh, 2);

    // Windows never agree to 0.01%, so the bench runs until it is stopped.
    let flags = "--concurrency 4 --warmup 0s --window 1s --windows-max 10000 --stability 0.01% --verbose";
    let mut running = mesh.client_in_background(&bench(&job, flags));
    wait_until("some windows", PATIENCE, || mesh.metric("tasks_done_total").is_some_and(|done| done > 500.0));
    lost.kill();
    running
        .process()
        .wait_for_line("the move", PATIENCE, |line| line.contains("traffic moved from lost").then_some(()));
    running.interrupt();

    let answer = running.wait().failed_with(130, "traffic moved from lost");
    assert!(answer.stdout.contains("to kept") && answer.stdout.contains("stopped"), "{}", answer.stdout);
}

#[test]
fn a_mesh_that_falls_silent_is_no_success() {
    let mesh = Mesh::start();
    let mut only = mesh.worker("only");
    let job = Job::small(&mesh);
    let flags = "--rate 20 --warmup 0s --window 400ms --windows-max 20 --stability 0.01%";
    let running = mesh.client_in_background(&bench(&job, flags));
    wait_until("some answers", PATIENCE, || mesh.metric("tasks_done_total").is_some_and(|done| done > 10.0));
    only.kill();
    let answer = running.wait().failed_with(6, "nothing was answered after");
    assert!(answer.stdout.contains("unanswered at the end"), "{}", answer.stdout);
}

#[test]
fn a_tool_that_stood_still_has_not_made_the_mesh_faster() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 1);

    // Three windows of 40 requests that do not agree to 0.01%: all of them count.
    let flags = "--rate 20 --warmup 0s --window 2s --windows-max 3 --stability 0.01% --json";
    let mut running = mesh.client_in_background(&bench(&job, flags));
    wait_until("some answers", PATIENCE, || mesh.metric("tasks_done_total") >= Some(5.0));
    running.process().stand_still(Duration::from_secs(1));
    let report = running.wait().succeeded().json();

    // 20 requests were due during the pause. Each latency counts from its due time, and each was sent late.
    let level = &levels(&report)[0];
    let latency = |quantile: &str| number(&level["latency_ms"][quantile]);
    assert!(latency("p99") >= 850.0 && latency("p90") >= 250.0, "{}", level["latency_ms"]);
    assert!(number(&level["delayed"]) >= 15.0, "{level}");
}

/// The part of a worker's answers that came too late, by window, as the tool reported it.
fn violations(level: &Value, worker: &str) -> Vec<f64> {
    let windows = level["windows"].as_array().expect("windows").iter();
    let parts = windows.flat_map(|window| window["workers"].as_array().expect("workers"));
    parts.filter(|part| part["name"] == worker).filter_map(|part| part["violation"].as_f64()).collect()
}

#[test]
fn a_switch_away_from_a_worker_that_breaks_the_promise_is_told_and_so_is_the_way_back() {
    let broker_args = vec!["--policy".into(), "round-robin".into()];
    let mesh = Mesh::with(MeshOptions { broker_args, ..MeshOptions::default() });
    // The slow worker is the last of the round: however busy it is, it has its turn after the other one.
    let (_fast, slow) = (mesh.worker_with("fast", &["--slots", "4"]), mesh.worker_with("slow", &["--slots", "8"]));
    let job = Job::long(&mesh, 2);

    // So little work, and so much time for it, that only the slowed worker can break the promise.
    let flags = "--rate 20 --slo 2s --max-violation 20% --warmup 0s --window 2s --windows-max 10000 --stability 0.01%";
    let mut running = mesh.client_in_background(&[bench(&job, flags), vec!["--json"]].concat());
    wait_until("some windows", PATIENCE, || mesh.metric("tasks_done_total") >= Some(100.0));
    let slowed = Slowed::begin(&slow);
    let told = |line: &str, from: &str, to: &str| {
        let sides = line.split_once("traffic moved from ").and_then(|(_, sides)| sides.split_once(" to "));
        sides.is_some_and(|(left, gained)| left.starts_with(from) && gained.starts_with(to)).then_some(())
    };
    running.process().wait_for_line("that it is left", PATIENCE, |line| told(line, "slow", "fast"));
    // A slow worker answers less by itself; only the promise makes the broker avoid it.
    wait_until("the broker to leave it", PATIENCE, || mesh.metric("slo_trips_total") >= Some(1.0));
    drop(slowed);
    // The worker is tried with one task in 16, in 8, in 4 before it has its full share again.
    wait_until("the broker to take it back", 2 * PATIENCE, || mesh.metric("slo_breakers") == Some(0.0));
    running.process().wait_for_line("the way back", 2 * PATIENCE, |line| told(line, "fast", "slow"));
    running.interrupt();

    let report = running.wait().failed_with(130, "").json();
    let level = &levels(&report)[0];
    assert!(violations(level, "slow").iter().any(|part| *part > 0.2), "{level}");
}

#[test]
fn mistakes_are_told_before_anything_is_measured() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    let wrong = mesh.file("wrong.bin", &[0; 5]);

    mesh.client(&["bench", &job.model, &wrong]).failed_with(3, "5 bytes");
    mesh.client(&bench(&job, "--find-max-rate 1:10")).failed_with(2, "add --latency-threshold");
    mesh.client(&bench(&job, "--csv /nowhere/levels.csv")).failed_with(2, "/nowhere/levels.csv");
    assert_eq!(mesh.metric("tasks_done_total"), Some(0.0), "nothing was sent");
}
