//! What the broker shows to people: one sample of each view.

use super::*;

pub(super) fn model_view() -> ModelView {
    ModelView { worker: worker(), worker_name: "pi".into(), warm: true, cost: cost() }
}

pub(super) fn cluster_view() -> ClusterView {
    ClusterView {
        version: "0.1.0".into(),
        started_unix_ms: 1_795_000_000_000,
        store: "embedded".into(),
        store_ok: true,
        encrypted: false,
        workers: 3,
        prediction_error_permille: Some(120),
        policy: "predicted".into(),
        slots: 300,
        slots_used: 70_000,
        queued: 1,
        placed: 2,
    }
}

pub(super) fn worker_view() -> WorkerView {
    let said = register();
    WorkerView {
        worker: said.worker,
        epoch: said.epoch,
        name: said.name,
        version: said.version,
        os: said.os,
        arch: said.arch,
        cores: said.cores,
        memory_bytes: said.memory_bytes,
        engine: said.engine,
        formats: said.formats,
        endpoints: said.endpoints,
        labels: said.labels,
        gpus: said.gpus,
        slots: said.slots,
        slots_used: [1, 2],
        device_map: said.device_map,
        lanes: lanes(),
        promised: Promised { cpu_millis: 2000, memory_bytes: 1 << 30, gpu_memory_bytes: vec![4 << 30] },
        violation_permille: Some(31),
        draining: false,
        load: load(),
        held: vec![model().digest],
        link_bytes_per_s: 125_000_000,
        broker_rtt_us: 850,
        silent_ms: 400,
    }
}

pub(super) fn task_view() -> TaskView {
    TaskView {
        task: task(),
        job: JobId::from_bytes(*b"job............."),
        model_name: "face.tflite".into(),
        model: model(),
        input_bytes: 196_608,
        items: 8,
        priority: 50,
        lane: Lane::Realtime,
        detached: true,
        wishes: Wishes {
            demands: Demands {
                cpu_millis: 2000,
                memory_bytes: 1 << 30,
                gpu_memory_bytes: 4 << 30,
                arch: Some(Arch::Arm64),
            },
            labels: vec![LabelRule { key: "room".into(), value: "attic".into(), required: true }],
            slo: Some(Slo { latency_ms: 50, max_violation_permille: 50 }),
            deadline_ms: Some(500),
        },
        then: vec![Stage { name: "decode".into(), model: model() }],
        standing: TaskStanding::Queued { position: 1, reason: "no worker".into() },
        attempt: Attempt(1),
        worker: Some((worker(), "pi".into())),
        submitted_unix_ms: 1_795_000_000_000,
        ended_unix_ms: Some(1_795_000_001_000),
    }
}

pub(super) fn why_view() -> WhyView {
    let candidate = Candidate {
        worker: worker(),
        name: "pi".into(),
        against: vec!["1 of 1 slots in use".into()],
        holds_model: true,
        packing: Packing::On,
        best_batch: 300,
        busy_permille: 1000,
        prediction: Prediction {
            queue_us: 250,
            transfer_us: 251,
            load_us: 65_536,
            run_us: 1 << 33,
            handover_us: 1500,
            measured: true,
        },
    };
    let decision = DecisionView {
        at_unix_ms: 1_795_000_000_000,
        policy: "predicted".into(),
        chosen: Some(worker()),
        candidates: vec![candidate.clone()],
    };
    let rank = RankView { priority_milli: 50_000, waited_milli: 250, data_milli: -251, share_milli: -70_000 };
    WhyView {
        task: TaskView { standing: TaskStanding::Ended(failed()), ..task_view() },
        summary: "no slot is free".into(),
        history: vec!["attempt 1 at pi: WORKER_LOST".into()],
        candidates: vec![candidate],
        decision: Some(decision),
        models: vec![model_view()],
        rank: Some(rank),
        predicted_ms: Some(250),
        took_ms: Some(251),
    }
}
