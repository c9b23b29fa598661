//! The pool with real processes: small scripts in place of the runner show each way to fail, the real runner shows a run.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use proto_msgs::{Attempt, DType, ModelFormat, TaskId};

use super::*;
use crate::engine::Process;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct Home {
    dir: tempfile::TempDir,
    store: BlobStore,
    machine: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("runners")).expect("a folder");
        let store = BlobStore::open(&dir.path().join("blobs"), 1 << 30).expect("a store");
        let (machine, events) = mpsc::channel(64);
        Self { dir, store, machine, events }
    }

    /// A pool whose runners are this shell script.
    fn pool_of_script(&self, script: &str) -> (Pool, AllEnded) {
        let path = self.dir.path().join("runner.sh");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        self.pool(&path)
    }

    fn pool(&self, runner: &Path) -> (Pool, AllEnded) {
        let engine = Box::new(Process::new(runner.to_owned()));
        let defaults = RunnerDefaults { cpu_millis: 1000, memory_bytes: 512 << 20 };
        Pool::new(engine, self.store.clone(), self.dir.path().join("runners"), defaults, 2)
    }

    fn job(&self, model: &[u8], inputs: &[&[u8]]) -> Job {
        let mut file = self.store.spool(model.len() as u64).and_then(|file| file.create()).expect("room");
        file.write(model).expect("writing");
        let (file, digest) = file.finish();
        let declare = |bytes: &&[u8]| {
            let (digest, size_bytes) = (Digest::of(bytes), bytes.len() as u64);
            InputDecl { name: None, dtype: None, shape: None, digest, size_bytes }
        };
        Job {
            id: AttemptId { task: TaskId::from_bytes([1; 16]), attempt: Attempt(1) },
            model: ModelRef { digest, size_bytes: model.len() as u64, format: ModelFormat::Onnx },
            pin: self.store.adopt(file, digest).expect("adopted"),
            inputs: inputs.iter().map(declare).collect(),
            payloads: inputs.iter().map(|bytes| Payload::Memory(bytes.to_vec().into())).collect(),
            demands: Demands::default(),
            limit: PATIENCE,
            late: ErrorCode::RunTimeout,
        }
    }

    async fn failure_of(&self, script: &str) -> Failure {
        let (pool, _) = self.pool_of_script(script);
        pool.run(&self.job(b"model", &[]), &self.machine).await.expect_err("no model is ever loaded")
    }
}

#[tokio::test]
async fn a_runner_that_ends_while_loading_says_why() {
    let home = Home::new();
    for (script, code) in [
        ("exit 10", ErrorCode::ModelInvalid),
        ("exit 13", ErrorCode::EngineUnavailable),
        ("kill -SEGV $$", ErrorCode::ModelRejected),
        (r#"echo '{"code":"MODEL_UNSUPPORTED","text":"operator X"}' >&2; exit 11"#, ErrorCode::ModelUnsupported),
    ] {
        assert_eq!(home.failure_of(script).await.code, code, "{script}");
    }
}

#[tokio::test]
async fn a_program_that_is_not_there_is_the_workers_fault() {
    let home = Home::new();
    let (pool, _) = home.pool(Path::new("/nowhere/mesh-runner"));
    let failure = pool.run(&home.job(b"model", &[]), &home.machine).await.expect_err("no program");
    assert_eq!(failure.code, ErrorCode::EngineUnavailable);
    assert!(failure.text.contains("/nowhere/mesh-runner"), "{}", failure.text);
}

#[tokio::test]
async fn a_model_that_eats_memory_while_loading_is_rejected() {
    let home = Home::new();
    // Without a line's end in sight, tail keeps everything.
    let (pool, _) = home.pool_of_script("exec tail /dev/zero");
    let mut job = home.job(b"model", &[]);
    job.demands.memory_bytes = 64 << 20;
    let failure = pool.run(&job, &home.machine).await.expect_err("too much memory");
    assert_eq!(failure.code, ErrorCode::ModelRejected);
    assert!(failure.text.contains("64.0 MiB"), "{}", failure.text);
}

#[tokio::test]
async fn a_run_over_its_limit_takes_its_whole_process_group_with_it() {
    let home = Home::new();
    let pids = home.dir.path().join("pids");
    let (pool, mut all_ended) = home.pool_of_script(&format!("sleep 1000 & echo $! $$ > {}; wait", pids.display()));
    let job = Job { limit: Duration::from_millis(500), ..home.job(b"model", &[]) };
    let failure = pool.run(&job, &home.machine).await.expect_err("never ready");
    assert_eq!(failure.code, ErrorCode::RunTimeout);

    pool.close().await;
    timeout(PATIENCE, all_ended.recv()).await.expect("the runner is cleaned up");
    let pids = fs::read_to_string(pids).expect("the script began");
    let is_alive = |pid: &str| {
        // An orphan waits for init to reap it; it runs no more.
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    let deadline = Instant::now() + PATIENCE;
    while pids.split_whitespace().any(is_alive) {
        assert!(Instant::now() < deadline, "still alive: {pids}");
        sleep(READY_FIRST).await;
    }
    assert_eq!(fs::read_dir(home.dir.path().join("runners")).expect("the folder").count(), 0);
}

/// The real runner beside the test's own folder, if it was built and its library is there.
fn real_runner() -> Option<PathBuf> {
    let runner = std::env::current_exe().ok()?.parent()?.parent()?.join("mesh-runner");
    runner.is_file().then_some(runner)
}

#[tokio::test]
async fn a_real_model_runs_cold_then_warm_then_refuses_what_does_not_fit() {
    let Some(runner) = real_runner() else {
        return eprintln!("skipped: build mesh-runner first");
    };
    let mut home = Home::new();
    let (pool, _) = home.pool(&runner);
    let input: Vec<u8> = [1.0_f32, -2.0, 3.5, 0.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let expected: Vec<u8> = [-1.0_f32, 2.0, -3.5, -0.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let job = home.job(&negate(), &[&input]);
    let cold = match pool.run(&job, &home.machine).await {
        Err(failure) if failure.code == ErrorCode::EngineUnavailable => {
            return eprintln!("skipped: {}", failure.text);
        }
        ran => ran.expect("a negated vector"),
    };
    assert!(cold.load > Duration::ZERO);
    assert_eq!(pool.warm(), [job.model.digest]);
    let warm = pool.run(&job, &home.machine).await.expect("a negated vector");
    assert_eq!(warm.load, Duration::ZERO);
    for ran in [cold, warm] {
        let output = &ran.outputs[0];
        assert_eq!((output.name.as_str(), output.dtype, output.shape.as_slice()), ("y", DType::F32, [1, 4].as_slice()));
        assert!(matches!(&output.payload, Payload::Memory(bytes) if *bytes == expected));
        assert_eq!(output.digest, Digest::of(&expected));
    }
    let phases: Vec<_> = std::iter::from_fn(|| home.events.try_recv().ok()).collect();
    let reached = |phase| Event::Reached { id: job.id, phase };
    assert_eq!(phases, [reached(Phase::Loading), reached(Phase::Running), reached(Phase::Running)]);

    let misfit = home.job(&negate(), &[&input[1..]]);
    let failure = pool.run(&misfit, &home.machine).await.expect_err("15 bytes");
    assert_eq!(failure.code, ErrorCode::InputMismatch);
    assert_eq!(pool.warm(), [job.model.digest], "the runner is not to blame");
    let broken = home.job(b"no model at all", &[]);
    let failure = pool.run(&broken, &home.machine).await.expect_err("not a model");
    assert_eq!(failure.code, ErrorCode::ModelInvalid);
}

/// An ONNX file by hand: y = -x for four numbers.
fn negate() -> Vec<u8> {
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, content.len() as u8], content].concat()
    }
    let number = |number: u8, value: u8| vec![number << 3, value];
    let dims = [number(1, 1), number(1, 4)].map(|dim| field(1, &dim)).concat();
    let tensor = [number(1, 1), field(2, &dims)].concat();
    let value = |name: &str| [field(1, name.as_bytes()), field(2, &field(1, &tensor))].concat();
    let node = [field(1, b"x"), field(2, b"y"), field(4, b"Neg")].concat();
    let graph = [field(1, &node), field(2, b"g"), field(11, &value("x")), field(12, &value("y"))].concat();
    [number(1, 8), field(7, &graph), field(8, &number(2, 13))].concat()
}
