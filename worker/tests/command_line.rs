//! Messages and exit codes of the program when it cannot start.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

/// EX_CONFIG of sysexits.h.
const EXIT_CONFIG: i32 = 78;

fn worker(state: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-worker"));
    command.arg("--state-dir").arg(state).args(args).env_remove("DOCKER_HOST").env_remove("MESH_RUNNER");
    command.output().expect("the program runs")
}

fn refused(state: &Path, args: &[&str]) -> String {
    let output = worker(state, args);
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    assert_eq!(output.status.code(), Some(EXIT_CONFIG), "{said}");
    assert!(output.stdout.is_empty());
    said.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn what_is_wrong_in_the_settings_is_said_in_one_line() {
    let home = tempfile::tempdir().expect("a temporary folder");
    for (args, names) in [
        (["--broker", "somewhere"], "--broker"),
        (["--slots", "0"], "--slots"),
        (["--heartbeat", "1us"], "--heartbeat"),
        (["--runner", "/nowhere/mesh-runner"], "--runner /nowhere/mesh-runner: there is no such program"),
        (["--run-limit", "0s"], "--run-limit"),
        (["--memory-limit", "0B"], "--memory-limit"),
        (["--quota", "0B"], "--quota"),
        (["--advertise", "0.0.0.0"], "--advertise '0.0.0.0': write HOST or HOST:PORT"),
        (["--advertise", "http://x"], "--advertise 'http://x': write HOST or HOST:PORT"),
    ] {
        let args = [args.as_slice(), &["--engine", "process", "--log", "off"]].concat();
        let said = refused(home.path(), &args);
        assert!(said.contains(names), "{said}");
    }
}

#[test]
fn an_engine_that_is_not_there_is_named_with_the_remedy() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let said = refused(home.path(), &["--engine", "docker", "--docker-host", "unix:///nowhere.sock", "--log", "off"]);
    assert!(said.contains("--docker-host") && said.contains("--engine process"), "{said}");
}

#[test]
fn a_second_worker_does_not_take_the_firsts_state() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let mut first = Command::new(env!("CARGO_BIN_EXE_mesh-worker"))
        .arg("--state-dir")
        .arg(home.path())
        // No broker listens there: the worker waits for its broker.
        .args(["--engine", "process", "--runner", "/bin/true", "--broker", "tcp://127.0.0.1:1", "--log", "off"])
        .stdout(Stdio::null())
        .spawn()
        .expect("the program runs");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !home.path().join("runners").exists() {
        assert!(std::time::Instant::now() < deadline, "the first worker does not begin");
        std::thread::yield_now();
    }
    let said = refused(home.path(), &["--engine", "process", "--runner", "/bin/true", "--log", "off"]);
    first.kill().expect("it runs");
    first.wait().expect("it ends");
    assert!(said.contains("another mesh-worker"), "{said}");
}

#[test]
fn keys_are_made_once() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let keygen = || {
        let file = home.path().join("worker.key");
        Command::new(env!("CARGO_BIN_EXE_mesh-worker")).arg("keygen").arg(file).output().expect("the program runs")
    };
    let made = keygen();
    assert!(made.status.success() && made.stdout.trim_ascii_end().len() == 40, "{made:?}");
    assert_eq!(keygen().status.code(), Some(1), "never over a key that exists");
}

#[test]
fn a_key_is_made_though_nobody_reads_the_line() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let file = home.path().join("worker.key");
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-worker"));
    let status = command.arg("keygen").arg(&file).stdout(writer).status().expect("the program runs");
    assert!(status.success() && file.exists());
}
