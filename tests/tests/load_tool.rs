//! `mesh-client bench` against a real mesh: loops closed and open, thresholds, the search, and files that agree with each
//! other. How fast anything is is not tested here, only that what is told is what happened.

use std::{collections::BTreeMap, fs};

use mesh_tests::{Job, Mesh, PATIENCE, wait_until};
use serde_json::Value;

/// Levels that take a second or two instead of half a minute.
const SHORT: &str = "--warmup 200ms --window 400ms --windows-max 4";

/// `bench` of this job with these flags.
fn bench<'a>(job: &'a Job, flags: &'a str) -> Vec<&'a str> {
    ["bench", &job.model, &job.input].into_iter().chain(flags.split_whitespace()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn levels(report: &Value) -> &[Value] {
    report["levels"].as_array().expect("levels")
}

/// Rows of a CSV file by their headings.
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
    let job = Job::long(&mesh, 5);
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
        let latency = &level["latency_ms"];
        assert!(
            number(&latency["p50"]) <= number(&latency["p99"]) && number(&latency["p99"]) <= number(&latency["max"])
        );
        assert!((row["p99_ms"].parse::<f64>().unwrap() - number(&latency["p99"])).abs() < 1e-3);
        // What a worker ran cannot have taken longer than what its client saw.
        assert!(number(&level["parts_ms"]["running"]) < number(&latency["mean"]));
        // So many under way, each as long as its latency: that many per second (Little).
        let under_way = number(&level["requests_per_s"]) * number(&latency["mean"]) / 1e3;
        assert!((under_way / concurrency as f64 - 1.0).abs() < 0.35, "{under_way} under way, not {concurrency}");
        let workers = level["workers"].as_array().expect("workers");
        assert_eq!(workers.iter().map(|worker| number(&worker["requests"])).sum::<f64>(), requests);
        answered += level["windows"].as_array().unwrap().iter().map(|window| number(&window["requests"])).sum::<f64>();
    }
    assert!(mesh.metric("tasks_done_total").unwrap() >= answered, "nothing is told that the broker has not seen");
    let picture = fs::read_to_string(svg).expect("the picture was written");
    assert_eq!((picture.matches("<polyline").count(), picture.matches("<circle").count()), (3, 6));
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

    // No request is answered within a microsecond: the first level breaks it, and the others are not worth their time.
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

    // A hundred a second into one slot that does ten at best, and at most four under way.
    let flags = format!("--rate 100 --max-outstanding 4 --latency-threshold 30s {SHORT} --json");
    let report = mesh.client(&bench(&job, &flags)).failed_with(7, "NOT_SENT").json();

    let level = &levels(&report)[0];
    assert!(number(&level["not_sent"]) > number(&level["requests"]), "{level}");
    assert_eq!(level["errors"]["NOT_SENT"], level["not_sent"]);
    assert!(number(&level["violation"]) > 0.5, "a request that is not sent is no success");
}

#[test]
fn the_highest_rate_that_holds_is_found() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 20);

    // One slot does fifty a second at best. 512 a second is beyond any doubt, two a second are not.
    let flags = format!("--find-max-rate 2:512:64 --latency-threshold 2s --max-outstanding 32 {SHORT}");
    let report = mesh.ask(&bench(&job, &flags));

    let highest = &report["highest_rate"];
    let (held, broken) = (number(&highest["held"]), number(&highest["broken"]));
    assert!((2.0..256.0).contains(&held) && held < broken && broken <= 512.0, "{highest}");
    assert!(broken - held <= 64.1 || broken <= 64.0, "{highest}");
    let text = mesh.client(&bench(&job, &flags.replace("2:512:64", "512:512:512"))).failed_with(7, "no rate was found");
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

    // Never stable to a hundredth of a percent, so that it goes on until told to stop.
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
