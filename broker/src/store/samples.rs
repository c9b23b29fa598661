//! Records for this crate's tests.

use std::time::Duration;

use mesh_core::broker::{TaskRecord, WorkerRecord};
use proto_msgs::{
    Arch, Attempt, ClientId, Demands, Digest, EngineKind, Epoch, Gpu, GpuLoad, Heartbeat, JobId, Lane, Load, ModelCost,
    ModelFormat, ModelRef, Packing, Register, TaskId, TaskSpec, WorkerId,
};

/// A detached task that waits.
pub(crate) fn task(number: u8) -> TaskRecord {
    let spec = TaskSpec {
        task: TaskId::from_bytes([number; 16]),
        client: ClientId::from_bytes([200; 16]),
        job: JobId::from_bytes([201; 16]),
        model_name: "mobilenet v1 \"quant\"".to_owned(),
        model: ModelRef { digest: Digest::of(b"model"), size_bytes: 4_276_352, format: ModelFormat::TfLite },
        input_bytes: 150_528,
        lane: Some(Lane::Realtime),
        demands: Demands { cpu_millis: 2_000, arch: Some(Arch::Arm64), ..Demands::default() },
        detached: true,
        ..mesh_samples::submit(0, 0).spec
    };
    let worker = Some((WorkerId::from_bytes([9; 16]), Epoch(3)));
    TaskRecord { spec, attempt: Attempt(1), worker, submitted_unix_ms: 1_795_000_000_000, ended: None }
}

/// A worker with two GPUs and one held model.
pub(crate) fn worker(number: u8) -> WorkerRecord {
    let id = WorkerId::from_bytes([number; 16]);
    let gpu = Gpu { name: "RTX A2000".to_owned(), memory_bytes: 6 << 30 };
    let register = Register {
        worker: id,
        name: format!("drawer-{number}"),
        os: "Debian GNU/Linux 12".to_owned(),
        arch: Arch::Arm64,
        engine: EngineKind::Docker,
        endpoints: vec!["tcp://10.0.0.7:40001".to_owned()],
        labels: vec![("room".to_owned(), "attic".to_owned())],
        gpus: vec![gpu.clone(), gpu],
        ..mesh_samples::register(u32::from(number))
    };
    let load = Load {
        cpu_permille: 250,
        temperature_milli_c: Some(61_500),
        gpus: vec![GpuLoad { memory_used_bytes: 1 << 30, busy_permille: 100 }; 2],
        ..Load::default()
    };
    let heartbeat = Heartbeat {
        load,
        held: vec![Digest::of(b"model")],
        costs: vec![ModelCost {
            model: Digest::of(b"model"),
            packing: Packing::On,
            best_batch: 8,
            next_batch: 16,
            curve: vec![(1, 10_000), (8, 45_000)],
            load_us: 20_000,
            dispatched: [0; 4],
        }],
        ..mesh_samples::heartbeat(&register, 7)
    };
    WorkerRecord {
        register,
        heartbeat: Some(heartbeat),
        tasks: [0, 1],
        gpu_memory_reserved_bytes: 4 << 30,
        violation_permille: None,
        seen_unix_ms: 1_795_000_000_000,
        expires_after: Duration::from_secs(3),
    }
}
