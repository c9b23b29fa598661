//! What is printed, word by word.

use mesh_sdk::{Arch, Attempt, Digest, ErrorCode, JobId, ModelFormat, ModelRef, TaskId, WorkerId};
use proto_msgs::{Candidate, Epoch, Gpu, GpuLoad, Load};

use super::*;

fn worker() -> WorkerView {
    WorkerView {
        worker: WorkerId::from_bytes([1; 16]),
        epoch: Epoch(1),
        name: "pi-4".into(),
        version: "0.1.0".into(),
        os: "Debian 12".into(),
        arch: Arch::Arm64,
        cores: 4,
        memory_bytes: 4 << 30,
        engine: EngineKind::Process,
        formats: vec![ModelFormat::TfLite],
        endpoints: vec!["tcp://10.0.0.4:7000".into()],
        labels: vec![("room".into(), "attic".into())],
        gpus: Vec::new(),
        slots: [2, 2],
        slots_used: [1, 0],
        device_map: vec![-1],
        lanes: Default::default(),
        violation_permille: None,
        draining: false,
        load: Load {
            cpu_permille: 254,
            memory_available_bytes: 3 << 30,
            temperature_milli_c: Some(61_700),
            ..Load::default()
        },
        held: vec![Digest::from_bytes([7; 32])],
        link_bytes_per_s: 0,
        silent_ms: 400,
    }
}

fn task(standing: TaskStanding) -> TaskView {
    TaskView {
        task: TaskId::from_bytes([2; 16]),
        job: JobId::from_bytes([3; 16]),
        model_name: "face.tflite".into(),
        model: ModelRef { digest: Digest::from_bytes([7; 32]), size_bytes: 2048, format: ModelFormat::TfLite },
        input_bytes: 196_608,
        items: 1,
        lane: Lane::Realtime,
        priority: 50,
        detached: true,
        standing,
        attempt: Attempt(2),
        worker: Some((WorkerId::from_bytes([1; 16]), "pi-4".into())),
        submitted_unix_ms: 1_000,
        ended_unix_ms: Some(1_250),
    }
}

#[test]
fn workers_stand_in_a_table() {
    let big = WorkerView {
        name: "gpu-host".into(),
        arch: Arch::Amd64,
        engine: EngineKind::Docker,
        gpus: vec![Gpu { name: "H200".into(), memory_bytes: 139 << 30 }],
        slots_used: [2, 2],
        load: Load { gpus: vec![GpuLoad { memory_used_bytes: 1 << 30, busy_permille: 1 }], ..Load::default() },
        silent_ms: 1_900,
        ..worker()
    };
    let expected = "\
NAME       STATUS   ARCH    ENGINE    SLOTS       CPU        MEMORY FREE          GPU                      MODELS   TEMP    SEEN         ID
pi-4       ready    arm64   process   1/2 + 0/2   25% of 4   3.0 GiB of 4.0 GiB   -                        1        62 °C   400 ms ago   01010101-0101-0101-0101-010101010101
gpu-host   busy     amd64   docker    2/2 + 2/2   0% of 4    -                    H200 1.0 GiB/139.0 GiB   1        -       1.90 s ago   01010101-0101-0101-0101-010101010101
";
    assert_eq!(workers_text(&[worker(), big]), expected);
    assert_eq!(workers_text(&[]), "no worker is connected\n");
    let leaving = WorkerView { draining: true, ..worker() };
    assert_eq!(workers_json(&[leaving])["workers"][0]["status"], "draining");
}

#[test]
fn tasks_stand_in_a_table() {
    let queued = TaskView {
        standing: TaskStanding::Queued { position: 3, reason: "all slots are busy".into() },
        detached: false,
        worker: None,
        ended_unix_ms: None,
        ..task(TaskStanding::Granted)
    };
    let done = task(TaskStanding::Ended(Outcome::Done { run_us: 1, load_us: 2 }));
    let expected = "\
TASK                                   STATE             MODEL         WORKER   ATTEMPT   AGE      TOOK
02020202-0202-0202-0202-020202020202   queued            face.tflite   -        2         1m59s    -
02020202-0202-0202-0202-020202020202   done (detached)   face.tflite   pi-4     2         1m59s    250 ms
";
    let expected = expected.replace("AGE      TOOK", "AGE     TOOK").replace("1m59s    ", "1m59s   ");
    assert_eq!(tasks_text(&[queued, done], 120_000), expected);
}

#[test]
fn a_task_tells_where_it_stands() {
    let failed = task(TaskStanding::Ended(Outcome::failed(ErrorCode::RunTimeout, "ran longer than 5 min")));
    let expected = "\
task      02020202-0202-0202-0202-020202020202
state     failed
model     face.tflite (tflite, 2.0 KiB, 070707070707)
inputs    192.0 KiB
priority  50
detached  yes
worker    pi-4 (01010101-0101-0101-0101-010101010101), attempt 2
error     RUN_TIMEOUT: ran longer than 5 min
";
    assert_eq!(task_text(&failed), expected);
    let json = task_json(&failed);
    assert_eq!(json["error"]["code"], "RUN_TIMEOUT");
    assert_eq!(
        (&json["state"], &json["worker"]["name"], &json["position"]),
        (&"failed".into(), &"pi-4".into(), &Value::Null)
    );
}

#[test]
fn what_the_network_says_cannot_command_the_terminal() {
    let mut evil = task(TaskStanding::Ended(Outcome::failed(ErrorCode::RunFailed, "two\nlines\x1b[2J")));
    evil.worker = Some((WorkerId::from_bytes([1; 16]), "ev\x1b[31mil\nx".into()));
    evil.model_name = "m\u{9b}1m".into();
    let text = task_text(&evil);
    assert!(text.contains("\nworker    ev\u{fffd}[31mil\u{fffd}x (0101"), "{text}");
    assert!(text.ends_with("RUN_FAILED: two\nlines\u{fffd}[2J\n"), "{text}");
    assert!(!text.contains(['\x1b', '\u{9b}']), "{text}");
    assert_eq!(task_json(&evil)["worker"]["name"], "ev\x1b[31mil\nx");
}

#[test]
fn the_cluster_says_what_is_not_well() {
    let cluster = ClusterView {
        version: "0.1.0".into(),
        started_unix_ms: 0,
        store: "redis".into(),
        store_ok: false,
        encrypted: false,
        workers: 2,
        prediction_error_permille: None,
        policy: "predicted".into(),
        slots: 8,
        slots_used: 3,
        queued: 5,
        placed: 3,
    };
    let expected = "\
broker    tcp://cloud:5555 (version 0.1.0, up 1m01s)
store     redis (away: detached tasks are refused)
keys      none: connections are neither encrypted nor authenticated
workers   2
slots     3 of 8 in use
tasks     3 placed, 5 waiting
";
    assert_eq!(cluster_text(&cluster, "tcp://cloud:5555", 61_000), expected);
}

#[test]
fn why_names_what_speaks_against_each_worker() {
    let candidate = |name: &str, against: &[&str]| Candidate {
        worker: WorkerId::from_bytes([1; 16]),
        name: name.into(),
        against: against.iter().map(|reason| (*reason).to_owned()).collect(),
        holds_model: against.is_empty(),
        busy_permille: 250,
        prediction: Default::default(),
    };
    let why = WhyView {
        task: task(TaskStanding::Placed),
        summary: "pi-4 was the least busy of 2 workers that fit".into(),
        history: vec!["attempt 1 at pi-3: WORKER_LOST".into()],
        candidates: vec![candidate("pi-4", &[]), candidate("pi-3", &["needs arm64", "is draining"])],
        decision: None,
        rank: None,
        predicted_ms: None,
        took_ms: None,
    };
    let expected = "\
pi-4 was the least busy of 2 workers that fit

So far:
  attempt 1 at pi-3: WORKER_LOST

Workers now:
WORKER   BUSY   HAS MODEL   VERDICT
pi-4     25%    yes         fits
pi-3     25%    no          needs arm64; is draining
";
    assert_eq!(why_text(&why), expected);
}
