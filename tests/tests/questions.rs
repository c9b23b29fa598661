//! Questions that a user can ask, and the life of a detached task.

use std::process::Command;

use mesh_tests::{Job, Mesh, PATIENCE, npy::Array, onnx, process::binary, wait_until};
use serde_json::Value;

fn rows(answer: &Value, name: &str) -> Vec<Value> {
    let rows = if answer.is_array() { answer } else { &answer[name] };
    rows.as_array().unwrap_or_else(|| panic!("no rows in {answer}")).clone()
}

#[test]
fn workers_are_listed_with_what_they_are_and_hold() {
    let mesh = Mesh::start();
    let (_w1, _w2) = (mesh.worker_with("w1", &["--slots", "2", "--label", "site=roof"]), mesh.worker("w2"));
    Job::small(&mesh).run(&mesh);

    let workers = rows(&mesh.ask(&["workers"]), "workers");

    let names: Vec<&str> = workers.iter().filter_map(|worker| worker["name"].as_str()).collect();
    assert!(names.len() == 2 && names.contains(&"w1") && names.contains(&"w2"), "{names:?}");
    let w1 = workers.iter().find(|worker| worker["name"] == "w1").expect("listed");
    assert_eq!(w1["lanes"]["realtime"]["slots_total"], 1);
    assert_eq!(w1["lanes"]["batch"]["slots_total"], 1);
    let table = mesh.client(&["workers"]).succeeded().stdout;
    assert!(table.contains("w1") && table.contains("w2"), "{table}");
}

#[test]
fn a_detached_task_runs_without_its_client_and_keeps_its_result() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::long(&mesh, 1000);

    let task = job.detach(&mesh);

    // For scripts, standard output holds only the id.
    let output = mesh.folder().join("out");
    mesh.client(&["wait", &task, "--output", output.to_str().unwrap()]).succeeded();
    assert_eq!(Array::read(&output.join("y.npy")).numbers(), job.expected);
    // The result can be fetched again.
    let again = mesh.folder().join("again");
    mesh.client(&["result", &task, "--output", again.to_str().unwrap()]).succeeded();
    assert_eq!(Array::read(&again.join("y.npy")).numbers(), job.expected);
    let listed = rows(&mesh.ask(&["tasks"]), "tasks");
    assert!(listed.iter().any(|row| row["task"] == task.as_str()), "{listed:?}");
}

#[test]
fn without_json_the_id_of_a_detached_task_is_all_there_is_on_standard_output() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let said = mesh.client(&Job::small(&mesh).submit(&["--detach"])).succeeded().stdout;
    let task = said.trim();
    assert_eq!(task.len(), 36, "one id: {said:?}");
    mesh.client(&["wait", task]).succeeded();

    let model = mesh.file("add_one.onnx", &onnx::add_one());
    let inputs = ["a.npy", "b.npy"].map(|name| mesh.array(name, &Array::of_f32(&[2], &[0.0, 1.0])));
    let said = mesh.client(&["submit", "-d", &model, &inputs[0], &inputs[1]]).succeeded().stdout;
    let tasks: Vec<&str> = said.lines().collect();
    assert_eq!(tasks.iter().map(|task| task.len()).collect::<Vec<_>>(), [36, 36], "an id for each item: {said:?}");
    let results = mesh.client(&[&["wait"], &tasks[..]].concat()).succeeded().stdout;
    assert_eq!(results.matches("done on w1").count(), 2, "{results}");
}

#[test]
fn a_result_that_is_not_there_yet_is_said_to_be_so() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let task = Job::endless(&mesh).detach(&mesh);

    let status = mesh.client(&["status", &task]).succeeded().stdout;
    assert!(status.contains("w1"), "{status}");
    mesh.client(&["result", &task]).failed_with(11, "has not ended");
    mesh.client(&["wait", &task, "--timeout", "500ms"]).failed_with(7, "");

    mesh.client(&["cancel", &task]).succeeded();
    mesh.client(&["wait", &task]).failed_with(8, "");
    mesh.wait_idle();
}

#[test]
fn a_task_is_found_by_a_part_of_its_id_and_offered_by_the_shell() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    let tasks = [job.detach(&mesh), job.detach(&mesh)];
    // An id begins with the time of the submit. Its end is random.
    let [first, second] = tasks.each_ref().map(|task| &task[24..]);

    mesh.client(&["wait", first]).succeeded();
    assert_eq!(mesh.ask(&["status", second])["task"], tasks[1].as_str());
    mesh.client(&["why", second]).succeeded().failed_with(0, "w1");
    mesh.client(&["cancel", "-7"]).failed_with(2, "");
    let both = mesh.client(&["cancel", &tasks[0][..6]]).failed_with(2, "is in the ids of 2 tasks");
    assert!(both.stderr.contains(&tasks[0]) && both.stderr.contains(&tasks[1]), "{}", both.stderr);
    mesh.client(&["result", "ffffffffffff"]).failed_with(9, "'ffffffffffff'");

    let offered = |line: &str| {
        let script = "source <(mesh-client completions bash) && COMP_WORDS=($1) && COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) \
            && complete_with=$(complete -p mesh-client | sed 's/.*-F \\([^ ]*\\).*/\\1/') \
            && $complete_with mesh-client \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; \
            printf '%s\\n' \"${COMPREPLY[@]}\"";
        let programs = binary("mesh-client").parent().expect("a folder").to_path_buf();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").expect("a path"));
        let mut shell = Command::new("bash");
        shell.args(["-c", script, "-", line]).env("PATH", path).env("MESH_BROKER", mesh.endpoint());
        shell.env("MESH_CLIENT_STATE_DIR", mesh.folder().join("client"));
        let output = shell.output().expect("bash is there");
        let said = String::from_utf8(output.stdout).expect("text");
        said.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(offered(&format!("mesh-client result {}", &tasks[1][..30])), [tasks[1].clone()]);
    assert_eq!(offered("mesh-client result --outp"), ["--output"]);
    assert_eq!(offered("mesh-client resu"), ["result"]);
}

#[test]
fn a_detached_task_whose_worker_is_gone_is_said_to_wait_for_it() {
    let mesh = Mesh::start();
    let mut worker = mesh.worker("w1");
    let task = Job::endless(&mesh).detach(&mesh);
    assert_eq!(mesh.ask(&["status", &task])["worker_lost"], false);

    worker.kill();

    wait_until("the loss to be told", PATIENCE, || mesh.ask(&["status", &task])["worker_lost"] == true);
    let status = mesh.client(&["status", &task]).succeeded().stdout;
    assert!(
        status.contains("state     worker lost") && status.contains("it goes on there when that is back"),
        "{status}"
    );
    let table = mesh.client(&["tasks"]).succeeded().stdout;
    assert!(table.contains("worker lost (detached)"), "{table}");
    mesh.client(&["why", &task]).succeeded().failed_with(0, "its worker has its inputs");
    mesh.client(&["result", &task]).failed_with(11, "its inputs are at worker w1, which is not connected");

    worker.restart();
    assert_eq!(mesh.ask(&["status", &task])["worker_lost"], false);
}

#[test]
fn a_result_at_a_worker_that_is_away_is_said_to_be_there() {
    let mesh = Mesh::start();
    let mut worker = mesh.worker("w1");
    let task = Job::small(&mesh).detach(&mesh);
    mesh.client(&["wait", &task]).succeeded();

    worker.kill();

    wait_until("the loss to be told", PATIENCE, || mesh.ask(&["status", &task])["worker_lost"] == true);
    let status = mesh.client(&["status", &task]).succeeded().stdout;
    assert!(status.contains("state     done") && status.contains("it can be fetched once that is back"), "{status}");
    mesh.client(&["result", &task]).failed_with(11, "its result is at worker w1, which is not connected");

    worker.restart();
    mesh.client(&["result", &task]).succeeded();
}

#[test]
fn who_waits_without_a_terminal_is_told_why() {
    let mesh = Mesh::start();
    let job = Job::small(&mesh);
    let mut waiting = mesh.client_in_background(&job.submit(&[]));
    let told = |line: &str| line.contains("waiting: no worker").then_some(());
    waiting.process().wait_for_line("why it waits", PATIENCE, told);
    let _worker = mesh.worker("w1");
    waiting.wait().succeeded();
}

#[test]
fn why_explains_the_choice_and_the_waiting() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let running = Job::endless(&mesh).detach(&mesh);
    let why = mesh.client(&["why", &running]).succeeded().stdout;
    assert!(why.contains("w1"), "{why}");

    let job = Job::small(&mesh);
    let waiting = job.start(&mesh, &[]);
    let queued = || mesh.metric("tasks_queued") == Some(1.0);
    wait_until("a task to wait", PATIENCE, queued);
    let tasks = rows(&mesh.ask(&["tasks"]), "tasks");
    let id = tasks.iter().find(|row| row["task"] != running.as_str()).expect("two tasks")["task"].clone();
    let why = mesh.client(&["why", id.as_str().expect("an id")]).succeeded().stdout;
    assert!(why.contains("slot"), "the only slot is in use: {why}");

    mesh.client(&["cancel", &running]).succeeded();
    waiting.done(&job);
}

#[test]
fn the_error_of_predictions_is_told_and_small_where_equal_tasks_take_equally_long() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let error = || mesh.ask(&["status"])["prediction_error_permille"].as_u64();
    assert_eq!(error(), None, "nothing was predicted yet");
    let job = Job::long(&mesh, 100);
    let took = |done: mesh_tests::jobs::Done| done.item["timings"]["total_ms"].as_f64().expect("it is told");
    let times: Vec<f64> = (0..25).map(|_| took(job.run(&mesh))).collect();
    // The broker hears of a task's end from the worker, maybe later than the client.
    wait_until("all tasks to count", PATIENCE, || mesh.metric("tasks_done_total") == Some(25.0));
    let error = error().expect("most of them were predicted");
    assert_eq!(mesh.metric("prediction_error_ratio"), Some(error as f64 / 1000.0), "wherever one looks");
    // A prediction can only be as good as the machine is even.
    let median = |mut of: Vec<f64>| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    let usual = median(times.clone());
    let uneven = median(times.iter().map(|time| (time - usual).abs() / time.min(usual)).collect()) * 1000.0;
    let limit = 500.0 + 2.0 * uneven;
    assert!((error as f64) < limit, "off by {error} thousandths, and the tasks by {uneven}: {times:?}");
}

#[test]
fn why_explains_each_choice_with_figures_for_as_long_as_the_task_is_remembered() {
    let mesh = Mesh::start();
    let _workers = [mesh.worker("w1"), mesh.worker_with("w2", &["--label", "room=south"])];
    let job = Job::long(&mesh, 200);
    for _ in 0..3 {
        job.run(&mesh);
    }
    let last = |state: &str| {
        let tasks = mesh.tasks_of("client");
        let task = tasks.iter().find(|task| task["state"] == state).expect("there is one");
        task["task"].as_str().expect("an id").to_owned()
    };

    // Done: the ratings of workers, and the chosen one.
    let why = mesh.ask(&["why", &last("done")]);
    let rows = why["candidates"].as_array().expect("candidates");
    assert!(rows.iter().any(|row| row["worker"]["name"] == "w1"), "{why}");
    let runs = rows.iter().filter_map(|row| row["prediction"]["run_us"].as_u64());
    assert!(runs.max() > Some(50_000), "what was measured is what is predicted: {why}");
    let chosen = &why["decision"]["chosen"];
    let at = rows.iter().find(|row| row["worker"]["id"] == *chosen).expect("the one chosen is among them");
    let at = at["worker"]["name"].as_str().expect("a name");
    let text = mesh.client(&["why", &last("done")]).succeeded().stdout;
    assert!(text.starts_with(&format!("ended; its last worker was {at}\n")), "{text}");

    // Refused: why no worker fits.
    job.start(&mesh, &["--require", "room=east"]).answer().failed_with(5, "NO_WORKER_FITS");
    let why = mesh.ask(&["why", &last("failed")]);
    let summary = why["summary"].as_str().expect("a summary");
    assert!(summary.starts_with("refused, NO_WORKER_FITS: none of 2 workers fits: "), "{summary}");
    for row in why["candidates"].as_array().expect("candidates") {
        assert_eq!(row["against"], serde_json::json!(["has no label room=east"]), "{why}");
    }

    // Running: where it runs, and why not elsewhere.
    let endless = Job::endless(&mesh).start(&mesh, &["--require", "room=south"]);
    wait_until("it to run", PATIENCE, || mesh.count_of("client", "running") == 1);
    let why = mesh.client(&["why", &last("running")]).succeeded().stdout;
    assert!(why.contains("w2"), "{why}");
    drop(endless);
}

#[test]
fn other_users_tasks_do_not_exist() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let task = Job::small(&mesh).detach(&mesh);
    mesh.client(&["wait", &task]).succeeded();

    let stranger = mesh.folder().join("stranger");
    let as_stranger = |arguments: &[&str]| {
        let mut command = Command::new(binary("mesh-client"));
        command.env("MESH_BROKER", mesh.endpoint()).arg("--state-dir").arg(&stranger).args(arguments);
        mesh_tests::Submission::start(command).wait()
    };
    for question in ["status", "why", "result", "cancel"] {
        as_stranger(&[question, &task]).failed_with(9, "");
    }
    let listed = as_stranger(&["tasks", "--json"]).succeeded().json();
    assert!(rows(&listed, "tasks").is_empty(), "{listed}");
}

#[test]
fn what_is_not_there_is_exit_code_9() {
    let mesh = Mesh::start();
    mesh.client(&["status", "01890000-0000-7000-8000-000000000000"]).failed_with(9, "");
    mesh.client(&["status", "no id at all"]).failed_with(2, "");
}

#[test]
fn completions_and_help_are_there() {
    let mesh = Mesh::start();
    for shell in ["bash", "zsh", "fish"] {
        assert!(mesh.client(&["completions", shell]).succeeded().stdout.contains("mesh-client"));
    }
    let help = mesh.client(&["submit", "--help"]).succeeded().stdout;
    assert!(help.contains("--priority") && help.contains("Examples"), "{help}");
}
