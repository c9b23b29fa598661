//! Many items in one submit: a folder, spread over the workers, each item with its own answer.

use std::{collections::BTreeSet, process::Command};

use mesh_tests::{Mesh, PATIENCE, Submission, npy::Array, onnx, wait_until};
use serde_json::Value;

/// Kind number of a chunk from client to worker.
const CHUNK_TO_WORKER: u16 = 401;

/// A folder with `count` inputs; item `i` holds the number `i`.
fn folder_of_items(mesh: &Mesh, count: u16) -> String {
    let folder = mesh.folder().join("items");
    std::fs::create_dir(&folder).expect("the folder is ours");
    for item in 0..count {
        Array::of_f32(&[2], &[f32::from(item), -1.0]).write(&folder.join(format!("item{item:03}.npy")));
    }
    folder.display().to_string()
}

#[test]
fn a_folder_is_spread_over_the_workers_and_each_item_gets_its_own_answer() {
    let mesh = Mesh::start();
    let _workers = [mesh.worker("w1"), mesh.worker("w2")];
    let (model, items) = (mesh.file("add_one.onnx", &onnx::add_one()), folder_of_items(&mesh, 40));
    let output = mesh.folder().join("out");

    let report = mesh.ask(&["submit", &model, &items, "--output", output.to_str().unwrap()]);

    for item in 0..40_u16 {
        let answer = Array::read(&output.join(format!("item{item:03}/y.npy"))).numbers();
        assert_eq!(answer, [f64::from(item) + 1.0, 0.0], "item {item}");
    }
    let rows = report["items"].as_array().expect("items");
    assert_eq!(rows.len(), 40);
    let workers: BTreeSet<String> = rows.iter().map(|row| row["worker"]["name"].to_string()).collect();
    assert_eq!(workers.len(), 2, "both workers had their share: {workers:?}");
    let shares = report["summary"]["workers"].as_array().expect("shares");
    let shares: Vec<f64> = shares.iter().filter_map(|share| share["items"].as_f64()).collect();
    assert_eq!((shares.len(), shares.iter().sum()), (2, 40.0), "{report}");
    let skew = shares[0].max(shares[1]) / shares[0].min(shares[1]);
    assert_eq!(report["summary"]["skew"].as_f64(), Some(skew), "{report}");
    assert!(output.join("result.json").is_file());
    let shares = report["summary"]["workers"].as_array().expect("a share per worker");
    assert_eq!(shares.iter().filter_map(|share| share["items"].as_u64()).sum::<u64>(), 40, "{shares:?}");
    let [total_ms, each_ms] = ["total_ms", "per_item_ms"].map(|name| report["summary"][name].as_f64().expect("a time"));
    assert!(total_ms > 0.0 && (total_ms / 40.0 - each_ms).abs() < 1e-3, "{total_ms} and {each_ms}");
    let tasks = report["summary"]["tasks"].as_f64();
    assert!(tasks < Some(40.0), "items of one shape share tasks: {tasks:?}");
    wait_until("the broker to know all ends", PATIENCE, || mesh.metric("tasks_done_total") == tasks);
}

#[test]
fn one_bad_item_fails_alone() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let (model, items) = (mesh.file("add_one.onnx", &onnx::add_one()), folder_of_items(&mesh, 3));
    Array::of_i64(&[1], &[7]).write(std::path::Path::new(&items).join("item001.npy").as_path());
    let output = mesh.folder().join("out");

    let answer = mesh.client(&["submit", &model, &items, "--output", output.to_str().unwrap()]);

    answer.failed_with(3, "item001");
    for item in ["item000", "item002"] {
        assert!(output.join(item).join("y.npy").is_file(), "{item} was done all the same");
    }
}

#[test]
fn an_item_is_told_as_soon_as_it_is_done_while_another_still_runs() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--slots", "2"]);
    let model = mesh.file("counting.onnx", &onnx::counting());
    let [soon, never] = [("soon.npy", 7), ("never.npy", i64::MAX)]
        .map(|(name, trips)| mesh.array(name, &Array::of_i64(&[1], &[trips])));

    let arguments = ["submit", "--json-lines", "--split", "1", "--lane", "realtime", &model, &never, &soon];
    let mut running = mesh.client_in_background(&arguments);

    let done = running.process().wait_for_line("what became of the first", PATIENCE, |line| {
        serde_json::from_str::<Value>(line).ok().filter(|row| row["item"] == "soon")
    });
    assert_eq!(done["state"], "done", "{done}");
    // The broker may not know yet that it is at work.
    wait_until("the other one to run on", PATIENCE, || mesh.count_of("client", "running") == 1);
    running.interrupt();
    let lines = running.wait().failed_with(130, "").stdout;
    assert_eq!(lines.lines().count(), 2, "each item has its line, and only one: {lines}");
}

#[test]
fn a_number_is_a_number_whether_its_item_shared_a_task_or_not() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("counting.onnx", &onnx::counting());
    let items = mesh.folder().join("items");
    std::fs::create_dir(&items).expect("the folder is ours");
    for item in 1..=3_u8 {
        Array::of_i64(&[1], &[item.into()]).write(&items.join(format!("item{item}.npy")));
    }
    for split in ["1", "3"] {
        let output = mesh.folder().join(format!("split{split}"));
        let arguments = ["submit", &model, items.to_str().unwrap(), "--split", split, "-o", output.to_str().unwrap()];
        let tasks = mesh.ask(&arguments)["summary"]["tasks"].clone();
        assert_eq!(tasks, if split == "1" { 3 } else { 1 }, "--split {split}");
        for item in 1..=3_u8 {
            let answer = Array::read(&output.join(format!("item{item}/y.npy")));
            assert_eq!((answer.shape.len(), answer.numbers()), (0, vec![f64::from(item)]), "--split {split}");
        }
    }
}

#[test]
fn the_tasks_of_one_submit_share_a_connection_to_each_worker() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let (model, items) = (mesh.file("add_one.onnx", &onnx::add_one()), folder_of_items(&mesh, 20));

    mesh.client(&["submit", &model, &items]).succeeded();

    assert_eq!(door.connections(), 1);
    // The model was sent once for all items.
    let model_bytes = onnx::add_one().len() as u64;
    assert_eq!(door.payload_bytes(401), model_bytes + 20 * 8);
}

#[test]
fn a_pattern_names_items_too_and_a_table_sums_up() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let (model, items) = (mesh.file("add_one.onnx", &onnx::add_one()), folder_of_items(&mesh, 12));

    let said = mesh.client(&["submit", &model, &format!("{items}/item00*.npy")]).succeeded();

    wait_until("the broker to know all ends", PATIENCE, || mesh.metric("tasks_done_total") == Some(10.0));
    let all = said.stdout + &said.stderr;
    let rows: Vec<Vec<&str>> = all.lines().map(|line| line.split_whitespace().collect()).collect();
    let heads = rows.iter().position(|row| row[..] == ["WORKER", "ITEMS", "RUN", "EACH"]).expect("a table of workers");
    let is_time = |word: &str| word.starts_with(|digit: char| digit.is_ascii_digit());
    let share = &rows[heads + 1];
    assert!(share[..2] == ["w1", "10"] && is_time(share[2]), "{all}");
    let sum = rows.iter().find(|row| row.starts_with(&["10", "items", "in", "10", "tasks", "in"])).expect("the sum");
    let each = sum.iter().position(|word| *word == "per").expect("a time per item");
    assert!(is_time(sum[6]) && is_time(sum[each - 2]) && sum.ends_with(&["0", "failed"]), "{all}");
}

#[test]
fn a_person_at_a_terminal_sees_a_bar_with_rate_and_time_left() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let (model, items) = (mesh.file("counting.onnx", &onnx::counting()), mesh.folder().join("items"));
    std::fs::create_dir(&items).expect("the folder is ours");
    for item in 0..20 {
        // 0.1 s per item, as long as the bar's redraw interval.
        Array::of_i64(&[1], &[100_000]).write(&items.join(format!("item{item:03}.npy")));
    }
    let submit = mesh.client_command(&["submit", &model, items.to_str().unwrap(), "--split", "1"]);
    let words = [submit.get_program()].into_iter().chain(submit.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.display())).collect();
    // The client runs on its own terminal, wide enough for the whole bar.
    let line = format!("stty cols 150; exec {}", words.join(" "));
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    terminal.env("MESH_BROKER", mesh.endpoint()).env("TERM", "xterm");

    let answer = Submission::start(terminal).wait().succeeded();

    let seen: Vec<&str> = answer.stdout.split(['\r', '\n']).collect();
    let done = |line: &&str| {
        let before = line.split_once("/20 ")?.0;
        before.rsplit(' ').next()?.parse::<u16>().ok()
    };
    let bars: Vec<u16> = seen.iter().filter_map(done).collect();
    assert!(bars.is_sorted() && bars.first() < bars.last() && bars.last() <= Some(&20), "{bars:?}: {seen:?}");
    let is_whole = |line: &&&str| line.contains("/20 ") && line.contains("/s") && line.contains(" left");
    assert!(seen.iter().any(|line| is_whole(&line)), "{seen:?}");
    assert!(answer.stdout.contains("w1"), "the table comes after it: {seen:?}");
}

#[test]
fn a_model_that_is_sent_for_longer_than_room_is_kept_is_sent_once_for_the_whole_job() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &["--slots", "4"]);
    // The model takes ten seconds on this link; the broker keeps a slot only six seconds for a task that is not opened.
    let model_bytes = 10 << 20;
    door.throttle(Some(1 << 20));
    let (model, items) = (mesh.file("heavy.onnx", &onnx::heavy(model_bytes, 1)), mesh.folder().join("items"));
    std::fs::create_dir(&items).expect("the folder is ours");
    for item in 0..4 {
        std::fs::write(items.join(format!("{item}.bin")), f32::to_le_bytes(1.0)).expect("the folder is ours");
    }

    let report = mesh.ask(&["submit", &model, items.to_str().unwrap(), "--split", "1"]);

    for row in report["items"].as_array().expect("items") {
        let why = mesh.ask(&["why", row["task"].as_str().unwrap()]);
        assert_eq!(row["attempts"].as_u64(), Some(1), "{row} {why}");
    }
    let sent_bytes = door.payload_bytes(CHUNK_TO_WORKER);
    assert!(sent_bytes < model_bytes as u64 * 3 / 2, "{sent_bytes} bytes for a model of {model_bytes}");
}
