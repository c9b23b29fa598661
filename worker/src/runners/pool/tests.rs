//! The pool with real processes: shell scripts in place of the runner cause each failure. `batch/tests.rs` tests a real
//! runner with rows.

use std::{fs, future::ready, os::unix::fs::PermissionsExt, path::Path};

use proto_msgs::{Attempt, ModelFormat, TaskId};
use tokio::net::UnixListener;

use super::*;
use crate::{
    batch::tests::{models, real_runner},
    engine::{Process, SOCKET_NAME},
};

/// Longer than any of these tests takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct Home {
    dir: tempfile::TempDir,
    store: BlobStore,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("runners")).expect("a folder");
        let store = BlobStore::open(&dir.path().join("blobs"), 1 << 30).expect("a store");
        Self { dir, store }
    }

    /// A pool whose runners are this shell script.
    fn pool_of_script(&self, script: &str) -> (Arc<Pool>, AllEnded) {
        let path = self.dir.path().join("runner.sh");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        self.pool(&path)
    }

    fn pool(&self, runner: &Path) -> (Arc<Pool>, AllEnded) {
        let engine = Box::new(Process::new(runner.to_owned()));
        let defaults = RunnerDefaults { cpu_millis: 1000, memory_bytes: 512 << 20, headroom: Headroom::default() };
        Pool::new(engine, self.store.clone(), self.dir.path().join("runners"), defaults, 2)
    }

    fn wanted(&self) -> Wanted {
        self.wanted_of(b"model")
    }

    fn wanted_of(&self, model: &[u8]) -> Wanted {
        let mut file = self.store.spool(model.len() as u64).and_then(|file| file.create()).expect("room");
        file.write(model).expect("writing");
        let (file, digest) = file.finish();
        Wanted {
            attempt: AttemptId { task: TaskId::from_bytes([1; 16]), attempt: Attempt(1) },
            model: ModelRef { digest, size_bytes: model.len() as u64, format: ModelFormat::Onnx },
            pin: self.store.adopt(file, digest).expect("adopted"),
            demands: Demands::default(),
            device: -1,
            apart: false,
        }
    }

    async fn failure_of(&self, script: &str) -> Failure {
        let (pool, _) = self.pool_of_script(script);
        failure(&pool, &self.wanted()).await
    }
}

/// The failure of a runner that never has its model loaded.
async fn failure(pool: &Arc<Pool>, wanted: &Wanted) -> Failure {
    pool.take(wanted, async || ()).await.map(|_| ()).expect_err("no model is ever loaded")
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
    let failure = failure(&pool, &home.wanted()).await;
    assert_eq!(failure.code, ErrorCode::EngineUnavailable);
    assert!(failure.text.contains("/nowhere/mesh-runner"), "{}", failure.text);
}

#[tokio::test]
async fn a_model_that_loads_too_slowly_here_may_be_tried_elsewhere() {
    let home = Home::new();
    let (mut pool, _) = home.pool_of_script("exec sleep 1000");
    Arc::get_mut(&mut pool).expect("nobody else has it").load_wait = Duration::from_millis(200);
    let failure = failure(&pool, &home.wanted()).await;
    assert!(failure.code.is_retryable(), "{failure}");
    assert!(failure.text.contains("was not loaded within"), "{}", failure.text);
}

#[tokio::test]
async fn a_runner_that_hangs_up_while_loading_and_lives_on_is_not_waited_for() {
    let home = Home::new();
    let (pool, _) = home.pool_of_script("exec sleep 1000");
    let socket = home.dir.path().join("runners/0").join(SOCKET_NAME);
    let hang_up = async {
        let listener = loop {
            match UnixListener::bind(&socket) {
                Ok(listener) => break listener,
                // Its folder is made when the runner is started.
                Err(_) => sleep(READY_FIRST).await,
            }
        };
        loop {
            drop(listener.accept().await);
        }
    };
    let wanted = home.wanted();
    let failure = tokio::select! {
        failure = timeout(PATIENCE, failure(&pool, &wanted)) => failure.expect("it is given up"),
        () = hang_up => unreachable!("it listens for ever"),
    };
    assert_eq!(failure.code, ErrorCode::RunProtocol, "{failure}");
}

#[tokio::test]
async fn a_model_that_eats_memory_while_loading_is_stopped_and_may_get_more_elsewhere_unless_it_asked() {
    let home = Home::new();
    // Without a line's end, tail keeps everything in memory.
    let (pool, _) = home.pool_of_script("exec tail /dev/zero");
    let mut wanted = home.wanted();
    let given = failure(&pool, &wanted).await;
    assert_eq!(given.code, ErrorCode::WorkerOutgrown);
    assert!(given.text.contains("512.0 MiB"), "{}", given.text);
    wanted.demands.memory_bytes = 64 << 20;
    let asked = failure(&pool, &wanted).await;
    assert_eq!(asked.code, ErrorCode::RunOutOfMemory);
    assert!(asked.text.contains("64.0 MiB") && asked.text.contains("--memory"), "{}", asked.text);
}

#[tokio::test]
async fn a_model_whose_file_was_taken_away_is_forgotten_and_not_called_wrong() {
    let home = Home::new();
    let (pool, _) = home.pool_of_script("exit 10");
    let wanted = home.wanted();
    assert_eq!(failure(&pool, &wanted).await.code, ErrorCode::ModelInvalid, "there, and wrong");
    fs::remove_file(wanted.pin.path()).expect("a stray hand");
    assert_eq!(failure(&pool, &wanted).await.code, ErrorCode::WorkerLost, "not there");
    assert!(!home.store.has(wanted.model.digest), "it would be announced for ever");
}

#[tokio::test]
async fn only_as_many_idle_runners_end_as_a_new_one_needs_memory() {
    let Some(runner) = real_runner() else { return };
    let home = Home::new();
    let (pool, _) = home.pool(&runner);
    let wanted = [models::negate(&[1]), models::absolute(&[1])].map(|model| home.wanted_of(&model));
    for wanted in &wanted {
        pool.take(wanted, async || ()).await.expect("loaded").give_back();
    }
    assert_eq!(pool.warm().len(), 2);
    // Memory is free when a runner has ended, not when it is told to end.
    let ended = pool.idle()[0].runner.exit();
    let available_bytes = || ready(Some(if ended.borrow().is_some() { u64::MAX } else { 0 }));
    pool.end_idle_until(1, available_bytes, |_| true).await;
    assert_eq!(pool.warm(), [wanted[1].model.digest], "the longest unused one has gone");
}

#[tokio::test]
async fn rows_that_may_crash_their_runner_have_one_apart_that_pushes_no_other_out() {
    let Some(runner) = real_runner() else { return };
    let home = Home::new();
    let (pool, _) = home.pool(&runner);
    let [one, other] = [models::negate(&[1]), models::absolute(&[1])].map(|model| home.wanted_of(&model));
    let apart = |wanted: &Wanted| Wanted { apart: true, ..wanted.clone() };
    let is_started = async |wanted: &Wanted| {
        let taken = pool.take(wanted, async || ()).await.expect("loaded");
        let is_new = !taken.load.is_zero();
        taken.give_back();
        is_new
    };
    assert!(is_started(&one).await && is_started(&apart(&one)).await, "that of the others is not used");
    assert_eq!(pool.warm(), [one.model.digest]);
    assert!(!is_started(&one).await && !is_started(&apart(&one)).await, "both are kept");

    assert!(is_started(&other).await);
    assert!(!is_started(&one).await && !is_started(&other).await, "only two idle ones are kept: the others'");
    assert!(is_started(&apart(&one)).await);
    assert!(!is_started(&one).await && !is_started(&other).await);

    // More memory than any machine has: a second runner would push others out.
    let greedy = Wanted { demands: Demands { memory_bytes: 1 << 60, ..Demands::default() }, ..one };
    assert!(is_started(&greedy).await && !is_started(&apart(&greedy)).await);
}

#[tokio::test]
async fn a_batch_takes_a_runner_that_is_given_back_and_leaves_the_load_to_the_next() {
    let Some(runner) = real_runner() else { return };
    let home = Home::new();
    let [first, second, gate] = ["first", "second", "gate"].map(|name| home.dir.path().join(name));
    // The second runner loads its model only once the gate is there.
    let script = format!(
        "if [ -e {first} ]; then touch {second}; until [ -e {gate} ]; do sleep 0.01; done; fi\n\
         touch {first}; exec {runner} \"$@\"",
        first = first.display(),
        second = second.display(),
        gate = gate.display(),
        runner = runner.display()
    );
    let (pool, mut all_ended) = home.pool_of_script(&script);
    let wanted = home.wanted_of(&models::negate(&[1]));
    let only = pool.take(&wanted, async || ()).await.expect("loaded");
    let pid = only.instance.runner.pid();

    let given_back_late = async {
        while !second.exists() {
            sleep(READY_FIRST).await;
        }
        only.give_back();
    };
    let taking = async { tokio::join!(pool.take(&wanted, async || ()), given_back_late).0 };
    let next = timeout(PATIENCE, taking).await.expect("no wait for the gate").expect("the same");
    assert_eq!((next.instance.runner.pid(), next.load), (pid, Duration::ZERO));

    let opens = async || fs::write(&gate, "").expect("a file");
    let other = timeout(PATIENCE, pool.take(&wanted, opens)).await.expect("in time").expect("the one that loads");
    assert_ne!(other.instance.runner.pid(), pid);
    let folders = || fs::read_dir(home.dir.path().join("runners")).expect("the folder").count();
    assert_eq!(folders(), 2, "and no third one");

    // A load that goes on ends with the worker.
    fs::remove_file(&gate).expect("it is there");
    let given_back_late = async {
        while folders() < 3 {
            sleep(READY_FIRST).await;
        }
        next.give_back();
    };
    let taking = async { tokio::join!(pool.take(&wanted, async || ()), given_back_late).0 };
    drop((timeout(PATIENCE, taking).await.expect("in time").expect("given back"), other));
    pool.close().await;
    timeout(PATIENCE, all_ended.recv()).await.expect("all runners are cleaned up");
}

#[tokio::test]
async fn a_batch_that_is_dropped_takes_its_whole_process_group_with_it() {
    let home = Home::new();
    let pids = home.dir.path().join("pids");
    let (pool, mut all_ended) = home.pool_of_script(&format!("sleep 1000 & echo $! $$ > {}; wait", pids.display()));
    let wanted = home.wanted();
    let begun = async {
        loop {
            match fs::read_to_string(&pids) {
                Ok(both) if both.ends_with('\n') => return both,
                _ => sleep(READY_FIRST).await,
            }
        }
    };
    let pids = tokio::select! {
        _ = pool.take(&wanted, async || ()) => panic!("it is never ready"),
        pids = timeout(PATIENCE, begun) => pids.expect("the script began"),
    };

    pool.close().await;
    timeout(PATIENCE, all_ended.recv()).await.expect("the runner is cleaned up");
    let is_alive = |pid: &str| {
        // An orphan that waits for init to reap it no longer runs.
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    let deadline = Instant::now() + PATIENCE;
    while pids.split_whitespace().any(is_alive) {
        assert!(Instant::now() < deadline, "still alive: {pids}");
        sleep(READY_FIRST).await;
    }
    assert_eq!(fs::read_dir(home.dir.path().join("runners")).expect("the folder").count(), 0);
}
