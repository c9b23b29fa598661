//! Short stories of tasks that run beside others: a free slot is not a free GPU or core.

use super::{
    MS, mesh,
    mesh::{Mesh, task, worker},
};

/// Two workers with two slots in each lane that share a GPU, and these run times of an item.
fn with_one_gpu_each(runs_us: [u32; 2]) -> Mesh {
    let mut mesh = mesh();
    for (number, run_us) in (0..).zip(runs_us) {
        mesh.measured(number, [2, 2], run_us);
        mesh.register(number, [2, 2], |register| register.device_map = vec![0]);
    }
    mesh
}

/// Two workers of one core with two slots in each lane, and these run times of an item.
fn with_one_core_each(runs_us: [u32; 2]) -> Mesh {
    let mut mesh = mesh();
    for (number, run_us) in (0..).zip(runs_us) {
        mesh.measured(number, [2, 2], run_us);
        mesh.register(number, [2, 2], |register| register.cores = 1);
    }
    mesh
}

/// The workers of the next tasks that come while none ends.
fn places(mesh: &mut Mesh, count: u32) -> Vec<Option<proto_msgs::WorkerId>> {
    (0..count).map(|number| mesh.submit(number, 1, |_| {})).collect()
}

#[test]
fn of_two_workers_that_are_nearly_equal_the_one_with_an_idle_gpu_is_chosen() {
    let mut mesh = with_one_gpu_each([20_000, 22_000]);
    let expected = [0, 1, 0, 1, 0].map(|number| Some(worker(number)));
    assert_eq!(places(&mut mesh, 5), expected);
    mesh.close(mesh.grants[1].id);
    mesh.close(mesh.grants[3].id);
    assert_eq!(mesh.submit(5, 1, |_| {}), Some(worker(1)), "it is idle again");
}

#[test]
fn a_free_slot_of_a_worker_that_is_twice_as_fast_is_better_than_an_idle_slow_worker() {
    assert_eq!(places(&mut with_one_core_each([20_000, 40_000]), 4), [Some(worker(0)); 4]);
}

#[test]
fn tasks_that_take_turns_on_a_gpu_go_where_they_end_first() {
    let expected = [0, 1, 0, 0].map(|number| Some(worker(number)));
    assert_eq!(places(&mut with_one_gpu_each([20_000, 40_000]), 4), expected, "40 ms at either, then 60 and 80");
    assert_eq!(places(&mut with_one_gpu_each([20_000, 100_000]), 4), [Some(worker(0)); 4]);
}

#[test]
fn while_each_task_has_a_core_only_a_nearly_equal_worker_is_better_for_being_idle() {
    let second_of = |runs_us: [u32; 2]| {
        let mut mesh = mesh();
        (0..).zip(runs_us).for_each(|(number, run_us)| mesh.measured(number, [2, 2], run_us));
        places(&mut mesh, 2)[1]
    };
    assert_eq!(second_of([20_000, 21_000]), Some(worker(1)));
    assert_eq!(second_of([20_000, 24_000]), Some(worker(0)));
}

#[test]
fn more_tasks_than_cores_take_turns() {
    let mut mesh = mesh();
    for (number, run_us) in [(0, 20_000), (1, 28_000)] {
        mesh.measured(number, [2, 2], run_us);
        mesh.register(number, [2, 2], |register| register.cores = 2);
    }
    let expected = [0, 0, 1].map(|number| Some(worker(number)));
    assert_eq!(places(&mut mesh, 3), expected);
}

#[test]
fn a_task_that_would_be_late_at_the_idle_worker_goes_to_the_busy_one() {
    let mut mesh = with_one_core_each([20_000, 24_000]);
    assert_eq!(places(&mut mesh, 1), [Some(worker(0))]);
    let within = |ms| move |submit: &mut proto_msgs::Submit| submit.spec.deadline_ms = Some(ms);
    assert_eq!(mesh.submit(1, 1, within(22)), Some(worker(0)), "and is not refused");
    assert_eq!(mesh.submit(2, 1, within(100)), Some(worker(1)));
    mesh.wait(MS);
}

#[test]
fn a_task_waits_for_its_turn_where_slots_share_a_gpu_and_the_prediction_says_so() {
    let mut mesh = with_one_gpu_each([200_000, 340_000]);
    assert_eq!(mesh.submit(0, 1, |submit| submit.spec.items = 20), Some(worker(0)));
    assert_eq!(mesh.submit(1, 1, |_| {}), Some(worker(1)), "behind four seconds nobody is done in 0.2");

    let mut mesh = mesh_of_one(|register| (register.device_map, register.device_width) = (vec![0], 1));
    assert!(mesh.ends.contains_key(&task(1)), "one second is not enough behind four");
    for idle in [
        mesh_of_one(|register| (register.device_map, register.device_width) = (vec![0], 2)),
        mesh_of_one(|register| register.device_map = vec![-1]),
    ] {
        assert!(idle.ends.is_empty(), "they run side by side");
    }
    mesh.wait(3600 * MS);
    assert_eq!(mesh.submit(2, 1, |submit| submit.spec.deadline_ms = Some(1000)), Some(worker(0)), "the four are over");
}

/// One worker with a task of four seconds, and one of 0.2 s that may take a second.
fn mesh_of_one(place: impl FnOnce(&mut proto_msgs::Register)) -> Mesh {
    let mut mesh = mesh();
    mesh.measured(0, [2, 2], 200_000);
    mesh.register(0, [2, 2], place);
    mesh.submit(0, 1, |submit| submit.spec.items = 20);
    mesh.submit(1, 1, |submit| submit.spec.deadline_ms = Some(1000));
    mesh
}
