//! The exact texts of the views.

use mesh_sdk::{
    Arch, Attempt, Demands, Digest, ErrorCode, JobId, LabelRule, Lane, ModelCost, ModelFormat, ModelRef, ModelView,
    Packing, Prediction, RankView, Slo, TaskId, WhyView, WorkerId, WorkerView,
};
use proto_msgs::{Candidate, DecisionView, EngineKind, Epoch, Gpu, GpuLoad, LaneLoad, Load, Promised};

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
        lanes: [LaneLoad { slots_used: 1, waiting_items: 3 }, LaneLoad { slots_used: 0, waiting_items: 16 }],
        promised: Promised::default(),
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
        broker_rtt_us: 0,
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
        wishes: Wishes::default(),
        then: Vec::new(),
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
        lanes: [LaneLoad { slots_used: 2, waiting_items: 0 }; 2],
        labels: Vec::new(),
        promised: Promised { cpu_millis: 1500, memory_bytes: 1 << 30, gpu_memory_bytes: vec![4 << 30] },
        violation_permille: Some(25),
        load: Load { gpus: vec![GpuLoad { memory_used_bytes: 1 << 30, busy_permille: 1 }], ..Load::default() },
        silent_ms: 1_900,
        ..worker()
    };
    let expected = "\
NAME       STATUS   ARCH    ENGINE    REALTIME   BATCH   WAITING   LATE   CPU        MEMORY FREE          GPU                      PROMISED                          MODELS   TEMP    LABELS       SEEN         ID
pi-4       ready    arm64   process   1/2        0/2     19        -      25% of 4   3.0 GiB of 4.0 GiB   -                        -                                 1        62 °C   room=attic   400 ms ago   01010101-0101-0101-0101-010101010101
gpu-host   busy     amd64   docker    2/2        2/2     0         2.5%   0% of 4    -                    H200 1.0 GiB/139.0 GiB   1.5 cores, 1.0 GiB, GPU 4.0 GiB   1        -       -            1.90 s ago   01010101-0101-0101-0101-010101010101
";
    assert_eq!(workers_text(&[worker(), big], Columns::All), expected);
    assert_eq!(workers_text(&[], Columns::All), "no worker is connected\n");
    let leaving = WorkerView { draining: true, ..worker() };
    let json = &workers_json(&[leaving])["workers"][0];
    assert_eq!(json["status"], "draining");
    // Realtime tasks in the batch lane's slots leave none.
    for (slots, slots_used, is) in [([0, 1], [1, 0], "busy"), ([2, 2], [4, 0], "busy"), ([2, 2], [2, 0], "ready")] {
        let worker = WorkerView { slots, slots_used, ..worker() };
        assert_eq!(workers_json(&[worker])["workers"][0]["status"], is, "{slots_used:?} of {slots:?}");
    }
    let realtime = json!({ "slots_total": 2, "slots_busy": 1, "tasks": 1, "waiting_items": 3 });
    let batch = json!({ "slots_total": 2, "slots_busy": 0, "tasks": 0, "waiting_items": 16 });
    assert_eq!(json["lanes"], json!({ "realtime": realtime, "batch": batch }));
}

#[test]
fn tasks_stand_in_a_table() {
    let queued = TaskView {
        standing: TaskStanding::Queued { position: 3, reason: "all slots are busy".into() },
        detached: false,
        items: 8,
        lane: Lane::Batch,
        worker: None,
        ended_unix_ms: None,
        ..task(TaskStanding::Granted)
    };
    let done = task(TaskStanding::Ended(Outcome::Done { run_us: 1, load_us: 2 }));
    let expected = "\
TASK                                   STATE             MODEL         ITEMS   LANE       WORKER   ATTEMPT   AGE     TOOK
02020202-0202-0202-0202-020202020202   queued            face.tflite   8       batch      -        2         1m59s   -
02020202-0202-0202-0202-020202020202   done (detached)   face.tflite   1       realtime   pi-4     2         1m59s   250 ms
";
    assert_eq!(tasks_text(&[queued, done], &BTreeSet::new(), 120_000, Columns::All), expected);
}

#[test]
fn a_task_tells_where_it_stands() {
    let failed = task(TaskStanding::Ended(Outcome::failed(ErrorCode::RunTimeout, "ran longer than 5 min")));
    let expected = "\
task      02020202-0202-0202-0202-020202020202
state     failed
model     face.tflite (tflite, 2.0 KiB, 070707070707)
inputs    192.0 KiB
lane      realtime
priority  50
detached  yes
worker    pi-4 (01010101-0101-0101-0101-010101010101), attempt 2
error     RUN_TIMEOUT: ran longer than 5 min
";
    assert_eq!(task_text(&failed, false), expected);
    let several = TaskView { items: 8, lane: Lane::Batch, ..failed.clone() };
    assert!(task_text(&several, false).contains("inputs    192.0 KiB of 8 items\nlane      batch\n"));
    let json = task_json(&failed, false);
    assert_eq!(json["error"]["code"], "RUN_TIMEOUT");
    assert_eq!(
        (&json["state"], &json["worker"]["name"], &json["position"]),
        (&"failed".into(), &"pi-4".into(), &Value::Null)
    );
}

#[test]
fn a_task_shows_what_it_asks_for_as_its_flags() {
    let gpu = LabelRule { key: "gpu".into(), value: "h100".into(), required: true };
    let attic = LabelRule { key: "room".into(), value: "at\x1btic".into(), required: false };
    let wishes = Wishes {
        demands: Demands { cpu_millis: 1500, gpu_memory_bytes: 4 << 30, arch: Some(Arch::Arm64), ..Demands::default() },
        labels: vec![gpu, attic],
        slo: Some(Slo { latency_ms: 50, max_violation_permille: 50 }),
        deadline_ms: Some(500),
    };
    let asking = TaskView { wishes, ..task(TaskStanding::Placed) };
    let flags = "--cpu 1.5 --gpu-memory 4.0GiB --arch arm64 --deadline 500ms --slo 50ms --max-violation 5% \
                 --require gpu=h100 --prefer room=at\u{fffd}tic";
    assert_eq!(wishes_text(&asking).as_deref(), Some(flags));
    assert!(task_text(&asking, false).contains(&format!("\nasks for  {flags}\n")));
    let json = task_json(&asking, false);
    assert_eq!((&json["wishes"]["slo"]["latency_ms"], &json["wishes"]["memory_bytes"]), (&50.into(), &0.into()));
    assert_eq!(wishes_text(&task(TaskStanding::Placed)), None);
}

#[test]
fn what_the_network_says_cannot_command_the_terminal() {
    let mut evil = task(TaskStanding::Ended(Outcome::failed(ErrorCode::RunFailed, "two\nlines\x1b[2J")));
    evil.worker = Some((WorkerId::from_bytes([1; 16]), "ev\x1b[31mil\nx".into()));
    evil.model_name = "m\u{9b}1m".into();
    let text = task_text(&evil, false);
    assert!(text.contains("\nworker    ev\u{fffd}[31mil\u{fffd}x (0101"), "{text}");
    assert!(text.ends_with("RUN_FAILED: two\nlines\u{fffd}[2J\n"), "{text}");
    assert!(!text.contains(['\x1b', '\u{9b}']), "{text}");
    assert_eq!(task_json(&evil, false)["worker"]["name"], "ev\x1b[31mil\nx");
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
        prediction_error_permille: Some(125),
        policy: "predicted".into(),
        slots: 8,
        slots_used: 3,
        queued: 5,
        placed: 3,
    };
    let expected = "\
broker    tcp://cloud:5555 (version 0.1.0, up 1m01s)
store     redis (away: detached tasks are refused; the broker's log and /healthz say why)
keys      none: connections are neither encrypted nor authenticated
policy    predicted, median error of its predictions 12.5%
workers   2
slots     3 of 8 in use
tasks     3 placed, 5 waiting
";
    assert_eq!(cluster_text(&cluster, "tcp://cloud:5555", 61_000), expected);
}

fn candidate(name: &str, id: u8, against: &[&str]) -> Candidate {
    let prediction = Prediction {
        queue_us: 0,
        transfer_us: 1_200,
        load_us: 20_000,
        run_us: 4_000,
        handover_us: 1_500,
        measured: true,
    };
    Candidate {
        worker: WorkerId::from_bytes([id; 16]),
        name: name.into(),
        against: against.iter().map(|reason| (*reason).to_owned()).collect(),
        holds_model: against.is_empty(),
        packing: if against.is_empty() { Packing::On } else { Packing::Unknown },
        best_batch: if against.is_empty() { 8 } else { 1 },
        busy_permille: 250,
        prediction: if against.is_empty() { prediction } else { Prediction::default() },
    }
}

fn why(standing: TaskStanding) -> WhyView {
    WhyView {
        task: task(standing),
        summary: "at work at pi-4 (attempt 2)".into(),
        history: vec!["attempt 1 at pi-3: WORKER_LOST".into()],
        candidates: vec![candidate("pi-4", 1, &[]), candidate("pi-3", 3, &["needs arm64", "is draining"])],
        decision: None,
        models: Vec::new(),
        rank: None,
        predicted_ms: None,
        took_ms: None,
    }
}

#[test]
fn why_names_what_speaks_against_each_worker() {
    let expected = "\
at work at pi-4 (attempt 2)

So far:
  attempt 1 at pi-3: WORKER_LOST

Workers now:
WORKER   BUSY   HAS MODEL   PACKING      QUEUE   TRANSFER   LOAD    RUN      REST     TOTAL   VERDICT
pi-4     25%    yes         on, best 8   0 µs    1.2 ms     20 ms   4.0 ms   1.5 ms   27 ms   fits
pi-3     25%    no          not tried    0 µs    0 µs       ?       ?        0 µs     ?       needs arm64; is draining
";
    assert_eq!(why_text(&why(TaskStanding::Placed), false, 0, Columns::All), expected);
}

#[test]
fn why_tells_how_the_choice_was_made_and_whether_it_was_right() {
    let decision = DecisionView {
        at_unix_ms: 1_000,
        policy: "predicted".into(),
        chosen: Some(WorkerId::from_bytes([1; 16])),
        candidates: vec![candidate("pi-4", 1, &[]), candidate("pi-5", 5, &[])],
    };
    let done = why(TaskStanding::Ended(Outcome::Done { run_us: 1, load_us: 2 }));
    let done = WhyView {
        summary: "ended; its last worker was pi-4".into(),
        history: Vec::new(),
        candidates: Vec::new(),
        decision: Some(decision),
        models: vec![model_view(Packing::On, 8, &[(1, 5_000), (8, 8_000)])],
        predicted_ms: Some(25),
        took_ms: Some(31),
        ..done
    };
    let expected = "\
ended; its last worker was pi-4
predicted 25 ms, took 31 ms

Workers as they were rated by 'predicted' 3.00 s ago:
WORKER   BUSY   HAS MODEL   PACKING      QUEUE   TRANSFER   LOAD    RUN      REST     TOTAL   VERDICT
pi-4     25%    yes         on, best 8   0 µs    1.2 ms     20 ms   4.0 ms   1.5 ms   27 ms   chosen
pi-5     25%    yes         on, best 8   0 µs    1.2 ms     20 ms   4.0 ms   1.5 ms   27 ms   fits

What it costs at pi-4 now:
MODEL         WORKER   WARM   PACKING   BEST BATCH   1 ITEM   BATCH    PER ITEM   LOAD    BATCHES           CURVE
face.tflite   pi-4     yes    on        8            5.0 ms   8.0 ms   1.0 ms     20 ms   12 full, 3 idle   1:5.0ms 8:8.0ms
";
    assert_eq!(why_text(&done, false, 4_000, Columns::All), expected);
    let json = why_json(&done, false);
    assert_eq!(json["decision"]["candidates"][0]["prediction"]["total_us"], 26_700);
    assert_eq!((&json["predicted_ms"], &json["took_ms"]), (&25.into(), &31.into()));
    let chosen = &json["decision"]["candidates"][0];
    assert_eq!((&chosen["packing"], &chosen["best_batch"]), (&"on".into(), &8.into()));
    let cost = &json["models"][0];
    assert_eq!((&cost["worker"]["name"], &cost["packing"]), (&"pi-4".into(), &"on".into()));
    assert_eq!(cost["curve"][1], json!({ "rows": 8, "run_us": 8_000 }));
}

#[test]
fn why_tells_that_a_worker_with_a_smaller_total_is_busier() {
    let mut busier = candidate("pi-5", 5, &[]);
    (busier.busy_permille, busier.prediction.run_us) = (500, 3_000);
    let decision = DecisionView {
        at_unix_ms: 1_000,
        policy: "predicted".into(),
        chosen: Some(WorkerId::from_bytes([1; 16])),
        candidates: vec![candidate("pi-4", 1, &[]), busier],
    };
    let placed = WhyView { decision: Some(decision), ..why(TaskStanding::Placed) };
    let text = why_text(&placed, false, 4_000, Columns::All);
    let verdict = |name: &str| text.lines().find(|line| line.starts_with(name)).expect("a row").to_owned();
    assert!(verdict("pi-4").ends_with("27 ms   chosen"), "{text}");
    assert!(verdict("pi-5").ends_with("26 ms   fits, but is busier"), "{text}");
}

#[test]
fn why_tells_what_a_waiting_task_owes_its_place_to() {
    let rank = RankView { priority_milli: 50_000, waited_milli: 3_250, data_milli: -400, share_milli: -12_000 };
    let queued = TaskStanding::Queued { position: 3, reason: "all slots are busy".into() };
    let waiting = WhyView { rank: Some(rank), ..why(queued) };
    let line = "its turn: 40.85 points = 50.00 priority +3.25 waited -0.40 data -12.00 share\n";
    assert!(
        why_text(&waiting, false, 0, Columns::All).contains(line),
        "{}",
        why_text(&waiting, false, 0, Columns::All)
    );
    assert_eq!(why_json(&waiting, false)["rank"]["share_milli"], -12_000);
}

fn model_view(packing: Packing, best_batch: u16, curve: &[(u16, u32)]) -> ModelView {
    ModelView {
        worker: WorkerId::from_bytes([1; 16]),
        worker_name: "pi-4".into(),
        warm: packing == Packing::On,
        cost: ModelCost {
            model: Digest::from_bytes([7; 32]),
            packing,
            best_batch,
            next_batch: best_batch,
            curve: curve.to_vec(),
            load_us: 20_000,
            dispatched: [12, 0, 0, 3],
        },
    }
}

#[test]
fn models_show_the_verdict_and_the_curve() {
    let digest = Digest::from_bytes([7; 32]);
    let models = [model_view(Packing::On, 8, &[(1, 5_000), (8, 8_000)]), model_view(Packing::Differs, 1, &[])];
    let names = Names::from([(digest, "face.tflite".to_owned())]);
    let expected = "\
MODEL         WORKER   WARM   PACKING               BEST BATCH   1 ITEM   BATCH    PER ITEM   LOAD    BATCHES           CURVE
face.tflite   pi-4     yes    on                    8            5.0 ms   8.0 ms   1.0 ms     20 ms   12 full, 3 idle   1:5.0ms 8:8.0ms
face.tflite   pi-4     no     off: results differ   1            -        -        -          20 ms   12 full, 3 idle
";
    assert_eq!(models_text(&models, &names, Columns::All), expected);
    assert!(
        models_text(&models, &Names::new(), Columns::All).contains("\n070707070707 "),
        "a model that nobody here has named"
    );
    let json = &models_json(&models, &names)["models"][0];
    assert_eq!((&json["packing"], &json["best_batch"], &json["per_item_us"]), (&"on".into(), &8.into(), &1_000.into()));
    assert_eq!(json["curve"][1], json!({ "rows": 8, "run_us": 8_000 }));
    assert_eq!(json["dispatched"], json!({ "full": 12, "waited": 0, "deadline": 0, "idle": 3 }));
    assert_eq!(models_text(&[], &names, Columns::All), "no worker has run a model yet\n");
}
