//! The exact texts for items and for a whole submit.

use std::fs;

use mesh_sdk::{DType, Digest, Dispatch, ModelFormat, ModelRef};

use super::*;
use crate::table::Columns;

fn done(item: &str, worker: &str, value: f64) -> Report {
    let output = Summary {
        name: "y".into(),
        dtype: DType::F32,
        shape: vec![1],
        size_bytes: 4,
        spread: Some((value, value, value)),
        not_finite: 0,
        top: Vec::new(),
        data: Some(vec![value.into()]),
        odd: Vec::new(),
        file: None,
    };
    let ms = Duration::from_millis;
    let timings =
        Timings { total: ms(34), queued: ms(1), sending: ms(3), loading: ms(20), running: ms(4), sent_bytes: 2052 };
    let worker = Some((WorkerId::from_bytes([1; 16]), worker.to_owned()));
    let run = RunNote { stage: 0, rows: (0, 1), batch_rows: 1, dispatch: Dispatch::Idle, run_us: 4_000 };
    let (lane, outputs) = (Some(Lane::Realtime), vec![output]);
    let end = Ok(Done {
        is_detached: false,
        worker,
        attempts: 1,
        timings,
        lane,
        task_items: 1,
        runs: vec![run],
        outputs,
        is_cut: false,
    });
    Report { item: item.into(), task: Some(TaskId::from_bytes([2; 16])), failed_at: None, end }
}

fn failed(item: &str) -> Report {
    let end = Err(Failed::new(exit::BAD_INPUT, "MODEL_INPUT_MISMATCH", "x has 3 bytes"));
    Report { item: item.into(), task: None, failed_at: None, end }
}

#[test]
fn a_failed_item_names_the_worker_that_had_it_last() {
    let at = WorkerId::from_bytes([3; 16]);
    let report = Report { failed_at: Some((at, "pi-4".into())), ..failed("a") };
    assert_eq!(report.to_json()["worker"], json!({ "id": at.to_string(), "name": "pi-4" }));
    assert_eq!(report.line()[2], "pi-4");
    assert_eq!(failed("a").to_json()["worker"], Value::Null, "it was never sent");
    let shares = job(vec![report, done("b", "pi-5", 0.5)]).summary_text();
    assert!(!shares.contains("pi-4"), "a failure is no share of the work: {shares}");
}

fn job(reports: Vec<Report>) -> Job {
    let model = ModelRef { digest: Digest::from_bytes([7; 32]), size_bytes: 2048, format: ModelFormat::Onnx };
    Job {
        job: None,
        model_name: "m.onnx".into(),
        model,
        took: Duration::from_millis(90),
        reports,
        idle: Vec::new(),
        kept: None,
    }
}

fn document(mut job: Job) -> Value {
    let mut text = Vec::new();
    job.write_json(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn one_item_shows_where_its_time_went_and_its_outputs() {
    let expected = "\
done on pi-4 in 34 ms (queued 1.0 ms, sending 3.0 ms, loading 20 ms, running 4.0 ms)
y  FP32 [1]  0.5
";
    assert_eq!(done("a", "pi-4", 0.5).to_text(), expected);
}

#[test]
fn a_fetched_task_has_its_own_times_and_not_those_of_the_fetch() {
    let mut fetched = done("a", "pi-4", 0.5);
    fetched.set_took(Duration::from_secs(10));
    assert!(fetched.to_text().starts_with("done on pi-4 in 10.00 s (loading 20 ms, running 4.0 ms)\n"));
    let timings =
        json!({ "total_ms": 10_000.0, "queued_ms": null, "sending_ms": null, "loading_ms": 20.0, "running_ms": 4.0 });
    assert_eq!(fetched.to_json()["timings"], timings);
}

#[test]
fn several_items_are_counted_by_worker_and_the_bad_one_is_listed() {
    let mut packed = done("c", "pi-4", 2.0);
    if let Ok(done) = &mut packed.end {
        (done.runs[0].batch_rows, done.runs[0].dispatch) = (8, Dispatch::Full);
    }
    let job = job(vec![done("a", "pi-4", 0.5), failed("b"), packed, done("d", "pi-5", 2.0)]);
    let expected = "\
ITEM   STATE    WORKER   LANE       BATCH    TIME    FIRST OUTPUT           TASK
a      done     pi-4     realtime   1 idle   34 ms   0.5                    02020202-0202-0202-0202-020202020202
b      failed   -        -          -        -       MODEL_INPUT_MISMATCH   -
c      done     pi-4     realtime   8 full   34 ms   2                      02020202-0202-0202-0202-020202020202
d      done     pi-5     realtime   1 idle   34 ms   2                      02020202-0202-0202-0202-020202020202

WORKER   ITEMS   RUN EACH
pi-4     2       2.2 ms
pi-5     1       4.0 ms
skew 2.00 (most items of a worker / fewest)

4 items in 1 tasks in 90 ms, 22 ms per item, 1 failed
";
    assert_eq!(job.to_text(Columns::All), expected);
    assert!(job.to_text(Columns::Main).starts_with("ITEM   STATE    WORKER   TIME    FIRST OUTPUT\n"));
    let unsent = self::job(vec![failed("a"), failed("b")]).summary_text();
    assert_eq!(unsent, "2 items in 0 tasks in 90 ms, 2 failed\n");
    assert_eq!(job.failures_text(), "mesh-client: b: MODEL_INPUT_MISMATCH: x has 3 bytes\n");
    assert_eq!(job.exit(), exit::BAD_INPUT);
}

#[test]
fn workers_that_could_have_had_items_and_got_none_are_counted() {
    let numbered = |number: u8| Report { task: Some(TaskId::from_bytes([number; 16])), ..done("a", "pi-4", 0.5) };
    let job_of = |tasks: u8| Job { idle: vec!["pi-5".into()], ..job((0..tasks).map(numbered).collect()) };
    let text = job_of(2).to_text(Columns::All);
    assert!(text.contains("\npi-5     0 "), "{text}");
    assert!(text.contains("skew: 1 of 2 workers got nothing\n"), "{text}");
    let summary = &document(job_of(2))["summary"];
    assert_eq!((&summary["skew"], &summary["workers"][1]["items"]), (&Value::Null, &json!(0)));
    assert!(!job_of(1).to_text(Columns::All).contains("pi-5"), "one task goes to one worker");
}

#[test]
fn a_failure_cannot_command_the_terminal() {
    let end = Err(Failed::new(exit::RUN_FAILED, "RUN_FAILED", "bad\x1b[31m\nmore"));
    let text = job(vec![Report { item: "a".into(), task: None, failed_at: None, end }]).failures_text();
    assert_eq!(text, "mesh-client: RUN_FAILED: bad\u{fffd}[31m\nmore\n");
    assert!(done("a", "ev\x1bil\n", 0.5).to_text().starts_with("done on ev\u{fffd}il\u{fffd} in "));
}

#[test]
fn the_document_has_the_promised_fields() {
    let document = document(job(vec![done("a", "pi-4", 0.5), failed("b")]));
    let expected = json!({
        "item": "a",
        "task": "02020202-0202-0202-0202-020202020202",
        "state": "done",
        "worker": { "id": "01010101-0101-0101-0101-010101010101", "name": "pi-4" },
        "attempts": 1,
        "lane": "realtime",
        "task_items": 1,
        "runs": [{ "stage": 0, "batch_rows": 1, "dispatch": "idle", "run_ms": 4.0 }],
        "timings":
            { "total_ms": 34.0, "queued_ms": 1.0, "sending_ms": 3.0, "loading_ms": 20.0, "running_ms": 4.0 },
        "sent_bytes": 2052,
        "outputs": [{
            "name": "y", "dtype": "FP32", "shape": [1], "size_bytes": 4, "min": 0.5, "max": 0.5, "mean": 0.5,
            "not_finite": 0, "data": [0.5], "omitted": null, "file": null,
        }],
        "error": null,
    });
    assert_eq!(document["items"][0], expected);
    let error = json!({ "code": "MODEL_INPUT_MISMATCH", "text": "x has 3 bytes", "exit": 3 });
    assert_eq!((&document["items"][1]["error"], &document["items"][1]["task"]), (&error, &Value::Null));
    let summary = json!({
        "items": 2, "tasks": 1, "done": 1, "failed": 1, "total_ms": 90.0, "per_item_ms": 45.0, "skew": null,
        "workers": [{ "name": "pi-4", "items": 1, "run_each_ms": 4.0 }],
    });
    assert_eq!(document["summary"], summary);
    assert_eq!(document["model"]["name"], "m.onnx");
}

#[test]
fn the_document_is_the_same_whether_its_parts_were_kept_or_are_made_at_the_end() {
    let reports = || vec![done("a", "pi-4", 0.5), failed("b")];
    let mut kept = Kept::new(2);
    reports().iter().enumerate().rev().for_each(|(index, report)| kept.keep(index, &report.to_json()).unwrap());
    let mut spare = reports();
    spare.iter_mut().for_each(Report::forget_outputs);
    let from_kept = Job { kept: Some(kept), ..job(spare) };
    assert_eq!(document(from_kept), document(job(reports())));
}

#[test]
fn several_items_have_a_document_together_and_one_has_its_own_alone() {
    let dir = tempfile::tempdir().unwrap();
    let read =
        |path: &str| -> Value { serde_json::from_str(&fs::read_to_string(dir.path().join(path)).unwrap()).unwrap() };
    failed("b").save(&dir.path().join("b")).unwrap();
    assert_eq!(read("b/result.json")["state"], "failed");
    job(vec![done("a", "pi-4", 0.5), failed("b")]).save(dir.path()).unwrap();
    assert_eq!(read("result.json")["summary"]["items"], 2);
    done("a", "pi-4", 0.5).save(dir.path()).unwrap();
    job(vec![done("a", "pi-4", 0.5)]).save(dir.path()).unwrap();
    assert_eq!(read("result.json")["state"], "done");
}

#[test]
fn a_new_result_does_not_stand_beside_the_outputs_of_an_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("out");
    let saved = |mut report: Report, files: &[&str]| {
        for file in files {
            fs::write(folder.join(file), "new").unwrap();
        }
        if let Ok(done) = &mut report.end {
            let output = done.outputs.remove(0);
            let named = |file: &&str| Summary { file: Some((*file).to_owned()), ..output.clone() };
            done.outputs = files.iter().map(named).collect();
        }
        report.save(&folder).unwrap();
        let mut left: Vec<String> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        left
    };
    fs::create_dir(&folder).unwrap();
    for theirs in ["mine.npy", "../y.npy"] {
        fs::write(folder.join(theirs), "the user's").unwrap();
    }
    assert_eq!(saved(done("a", "pi-4", 0.5), &["x.npy", "y.npy"]), ["mine.npy", "result.json", "x.npy", "y.npy"]);
    assert_eq!(saved(done("a", "pi-4", 0.5), &["y.npy"]), ["mine.npy", "result.json", "y.npy"], "another model");
    assert_eq!(saved(failed("a"), &[]), ["mine.npy", "result.json"]);
    // Whatever a result names, other folders' files and files that this program does not write are kept.
    fs::write(folder.join("notes.txt"), "the user's").unwrap();
    let forged = r#"{"outputs": [{"file": "notes.txt"}, {"file": "../y.npy"}, {"file": null}]}"#;
    fs::write(folder.join("result.json"), forged).unwrap();
    assert_eq!(saved(failed("a"), &[]), ["mine.npy", "notes.txt", "result.json"]);
    assert!(folder.join("../y.npy").exists());
}

#[test]
fn the_time_of_a_batch_is_shared_among_its_rows() {
    let Ok(mut done) = done("a", "pi-4", 0.5).end else { panic!("it was done") };
    done.runs[0].batch_rows = 4;
    done.runs.push(RunNote { stage: 1, batch_rows: 2, ..done.runs[0] });
    assert_eq!(done.running_alone(), Duration::from_millis(1 + 2));
    assert_eq!(done.batches(), "4 idle > 2 idle");
    done.runs = vec![RunNote { rows: (2, 4), batch_rows: 1, ..done.runs[0] }];
    assert_eq!(done.running_alone(), Duration::from_millis(2), "two rows one after the other");
    done.runs.clear();
    done.task_items = 8;
    assert_eq!(done.running_alone(), Duration::from_micros(500), "with no word of the runs, an equal part of all");
}

#[test]
fn a_detached_job_prints_each_task_once_and_no_run() {
    let accepted = |item: &str, task: u8| {
        let mut report = done(item, "pi-4", 0.5);
        report.task = Some(TaskId::from_bytes([task; 16]));
        if let Ok(done) = &mut report.end {
            (done.is_detached, done.outputs, done.runs) = (true, Vec::new(), Vec::new());
            (done.timings.loading, done.timings.running) = (Duration::ZERO, Duration::ZERO);
        }
        report
    };
    let job = job(vec![accepted("a", 1), accepted("b", 2), accepted("c", 2), failed("d")]);
    let ids = "01010101-0101-0101-0101-010101010101\n02020202-0202-0202-0202-020202020202\n";
    assert_eq!(job.ids_text(), ids);
    assert!(job.summary_text().contains("\npi-4     3       -\n"), "{}", job.summary_text());
    let document = document(job);
    assert_eq!(document["items"][0]["state"], "accepted");
    assert_eq!(document["items"][0]["timings"]["running_ms"], Value::Null);
    assert_eq!(document["summary"]["workers"][0]["run_each_ms"], Value::Null);
}
