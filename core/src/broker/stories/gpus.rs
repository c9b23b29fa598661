//! Short stories of tasks that are promised memory of a GPU.

use proto_msgs::{
    Attempt, AttemptId, AttemptReport, AttemptState, Digest, ErrorCode, Gpu, GpuLoad, Lane, Standing, Submit,
};

use super::{
    mesh,
    mesh::{MODEL, Mesh, task, worker},
};

const GIB: u64 = 1 << 30;

fn with_gpus(sizes_gib: &[u64]) -> Mesh {
    let mut mesh = mesh();
    let gpu = |gib: &u64| Gpu { name: "G".to_owned(), memory_bytes: gib * GIB };
    mesh.register(0, [0, 8], |register| register.gpus = sizes_gib.iter().map(gpu).collect());
    mesh
}

fn wants(gib: u64) -> impl Fn(&mut Submit) {
    move |submit| submit.spec.demands.gpu_memory_bytes = gib * GIB
}

/// Sends a heartbeat with this memory in use on each GPU and these running attempts.
fn beat(mesh: &mut Mesh, used_gib: &[u64], running: &[AttemptId]) {
    let load = |gib: &u64| GpuLoad { memory_used_bytes: gib * GIB, busy_permille: 0 };
    let report = |id: &AttemptId| AttemptReport { id: *id, state: AttemptState::Running };
    mesh.beat(0, |heartbeat| {
        heartbeat.load.gpus = used_gib.iter().map(load).collect();
        heartbeat.attempts = running.iter().map(report).collect();
    });
}

#[test]
fn gpu_memory_is_what_is_neither_promised_nor_in_use() {
    let mut mesh = with_gpus(&[10]);
    assert!(mesh.submit(0, 1, wants(6)).is_some());
    assert!(mesh.submit(1, 1, wants(6)).is_none());
    assert!(mesh.submit(2, 1, wants(4)).is_some());
    mesh.close(mesh.grants[0].id);
    mesh.close(mesh.grants[1].id);
    assert_eq!(mesh.grants[2].id.task, task(1));
    mesh.close(mesh.grants[2].id);
    // A process outside of the mesh uses most of the memory.
    beat(&mut mesh, &[7], &[]);
    assert!(mesh.submit(3, 1, wants(4)).is_none());
    mesh.submit(4, 1, wants(11));
    assert_eq!(mesh.code(4), Some(ErrorCode::NoWorkerFits));
}

#[test]
fn each_gpu_of_a_worker_has_its_own_memory() {
    let mut mesh = with_gpus(&[10, 10, 4]);
    assert!(mesh.submit(0, 1, wants(6)).is_some());
    assert!(mesh.submit(1, 1, wants(6)).is_some(), "the second one is empty");
    assert!(mesh.submit(2, 1, wants(6)).is_none(), "no GPU has six left, though all together have twelve");
    assert!(mesh.submit(3, 1, wants(4)).is_some());
    assert!(mesh.submit(4, 1, wants(4)).is_some());
    assert!(mesh.submit(5, 1, wants(4)).is_some(), "the third and what is left of the others");
    assert!(mesh.submit(6, 1, wants(1)).is_none());
    mesh.close(mesh.grants[1].id);
    assert_eq!(mesh.grants.last().expect("some").id.task, task(2));
}

#[test]
fn the_ticket_names_the_gpu_whose_memory_is_promised() {
    let mut mesh = with_gpus(&[4, 10, 10]);
    for number in 0..4 {
        mesh.submit(number, 1, wants(4));
    }
    mesh.submit(4, 1, |_| ());
    let named: Vec<Option<u8>> = mesh.grants.iter().map(|grant| grant.ticket.body.gpu).collect();
    assert_eq!(
        named,
        [Some(1), Some(2), Some(1), Some(2), None],
        "the roomiest each time, and none for who asks for none"
    );
    // Said again, it is the same one.
    mesh.submit(0, 1, wants(4));
    assert_eq!(mesh.grants.last().expect("some").ticket.body.gpu, Some(1));
}

#[test]
fn a_task_keeps_its_gpu_when_its_client_takes_it_up() {
    let mut mesh = with_gpus(&[10, 10]);
    mesh.submit(0, 1, wants(6));
    mesh.says(task(0), Standing::Holding { attempt: Attempt(1), worker: worker(0) });
    mesh.submit(1, 1, wants(8));
    let named: Vec<Option<u8>> = mesh.grants.iter().map(|grant| grant.ticket.body.gpu).collect();
    assert_eq!(named, [Some(0), Some(1)]);
}

#[test]
fn a_lane_is_promised_gpus_on_which_its_slots_sit_and_lent_ones_last() {
    let gpus = [10, 12, 20].map(|gib| Gpu { name: "G".to_owned(), memory_bytes: gib * GIB }).to_vec();
    let promised = |lane: Lane, count: u32| {
        let mut mesh = mesh();
        mesh.register(0, [1, 2], |register| (register.gpus, register.device_map) = (gpus.clone(), vec![0, 1, -1]));
        for number in 0..count {
            mesh.submit(number, 1, |submit| {
                submit.spec.demands.gpu_memory_bytes = 8 * GIB;
                submit.spec.lane = Some(lane);
            });
        }
        mesh.grants.iter().filter_map(|grant| grant.ticket.body.gpu).collect::<Vec<_>>()
    };
    assert_eq!(promised(Lane::Realtime, 3), [0, 1], "its own, then the lent one; nothing sits on the largest");
    assert_eq!(promised(Lane::Batch, 2), [1]);
}

#[test]
fn what_others_use_and_what_was_promised_and_has_not_begun_is_gone_together() {
    let mut mesh = with_gpus(&[10]);
    beat(&mut mesh, &[5], &[]);
    assert!(mesh.submit(0, 1, wants(4)).is_some());
    assert!(mesh.submit(1, 1, wants(4)).is_none(), "five are used by others and four promised");
    // The task runs, and its memory shows as used: nothing is counted twice.
    let first = mesh.grants[0].id;
    beat(&mut mesh, &[9], &[first]);
    assert_eq!(mesh.grants.len(), 1);
    mesh.cancel(1, 1);
    assert!(mesh.submit(2, 1, wants(1)).is_some());
    assert!(mesh.submit(3, 1, wants(1)).is_none());
}

#[test]
fn who_runs_may_grow_to_what_it_was_promised() {
    let mut mesh = with_gpus(&[10]);
    assert!(mesh.submit(0, 1, wants(8)).is_some());
    let first = mesh.grants[0].id;
    beat(&mut mesh, &[1], &[first]);
    assert!(mesh.submit(1, 1, wants(4)).is_none());
    mesh.cancel(1, 1);
    assert!(mesh.submit(2, 1, wants(2)).is_some());
}

#[test]
fn only_gpus_of_the_device_map_are_promised() {
    let mut mesh = mesh();
    let gpus = [20, 10].map(|gib| Gpu { name: "G".to_owned(), memory_bytes: gib * GIB }).to_vec();
    mesh.register(0, [0, 4], |register| (register.gpus, register.device_map) = (gpus, vec![1]));
    mesh.submit(0, 1, wants(11));
    assert_eq!(mesh.code(0), Some(ErrorCode::NoWorkerFits));
    assert!(mesh.submit(1, 1, wants(6)).is_some());
    assert!(mesh.submit(2, 1, wants(6)).is_none());
}

#[test]
fn a_model_that_is_loaded_and_idle_has_the_memory_that_its_next_task_wants() {
    let mut mesh = with_gpus(&[5, 10]);
    mesh.beat(0, |heartbeat| (heartbeat.held, heartbeat.warm) = (vec![MODEL], vec![MODEL]));
    beat(&mut mesh, &[0, 6], &[]);
    assert_eq!(mesh.submit(0, 1, wants(6)), Some(worker(0)));
    assert_eq!(mesh.grants[0].ticket.body.gpu, Some(1), "the other one is too small, however empty");
    assert!(mesh.submit(1, 1, wants(6)).is_none(), "a second one needs memory of its own");
}

#[test]
fn memory_that_was_promised_to_others_is_not_there_for_a_model_that_is_loaded() {
    let mut mesh = with_gpus(&[16]);
    mesh.beat(0, |heartbeat| (heartbeat.held, heartbeat.warm) = (vec![MODEL], vec![MODEL]));
    let of_another_model = |submit: &mut Submit| submit.spec.model.digest = Digest::from_bytes([9; 32]);
    assert!(mesh.submit(0, 1, |submit| (of_another_model(submit), wants(12)(submit)).0).is_some());
    assert!(mesh.submit(1, 1, wants(12)).is_none(), "it was loaded for less");
    mesh.close(mesh.grants[0].id);
    assert_eq!(mesh.grants[1].id.task, task(1));
}

#[test]
fn who_gets_no_gpu_hears_what_there_is_and_for_whom() {
    let mut mesh = mesh();
    mesh.register(0, [0, 1], |_| {});
    mesh.register(1, [0, 1], |register| register.gpus = vec![Gpu { name: "G".to_owned(), memory_bytes: 4 * GIB }]);
    mesh.register(2, [1, 1], |register| {
        register.gpus = [16, 4].map(|gib| Gpu { name: "G".to_owned(), memory_bytes: gib * GIB }).into();
        register.device_map = vec![0, 1];
    });
    mesh.submit(0, 1, |submit| {
        submit.spec.lane = Some(Lane::Batch);
        submit.spec.demands.gpu_memory_bytes = 8 * GIB;
    });
    let against = mesh.why(0, 1).candidates.into_iter().map(|candidate| candidate.against.join("; "));
    assert_eq!(
        against.collect::<Vec<_>>(),
        [
            "has no GPU for it",
            "has 4096 MiB of memory on its largest GPU for it",
            "has a GPU with that much memory for the realtime lane only"
        ]
    );
}
