//! A client whose rows crash the model: what its neighbours notice of it.

use std::{collections::BTreeMap, time::Duration};

use mesh_tests::{
    Job, Mesh, PATIENCE, Worker,
    process::{children_of, cpu_time},
    wait_for, wait_until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Processor time that an idle runner never needs meanwhile.
const COMPUTES: Duration = Duration::from_millis(200);

/// A row as it crashes the model, as far as anybody can see: the runner dies while it runs.
fn crashes(mesh: &Mesh, worker: &Worker, user: &str) {
    let begun = |pid: u32| cpu_time(pid).unwrap_or_default();
    let before: BTreeMap<u32, _> = children_of(worker.pid()).into_iter().map(|pid| (pid, begun(pid))).collect();
    let started = Job::endless(mesh).start_as(mesh, user, &[]);
    wait_until("the row to run", PATIENCE, || mesh.count_of(user, "running") == 1);
    let runner = wait_for("its runner to compute", PATIENCE, || {
        let computes = |pid: &u32| begun(*pid) > before.get(pid).copied().unwrap_or_default() + COMPUTES;
        children_of(worker.pid()).into_iter().find(computes)
    });
    kill(Pid::from_raw(runner as i32), Signal::SIGABRT).expect("it runs for ever");
    started.answer().failed_with(4, "RUN_CRASHED");
}

#[test]
fn who_crashes_the_model_again_and_again_costs_its_neighbours_their_runner_once() {
    let mesh = Mesh::start();
    let worker = mesh.worker("w1");
    let good = Job::long(&mesh, 1);
    good.run(&mesh);

    let mut loads = 0;
    for _ in 0..5 {
        crashes(&mesh, &worker, "culprit");
        let done = good.run(&mesh);
        assert_eq!(done.attempts(), 1, "{}", done.item);
        let loading_ms = done.item["timings"]["loading_ms"].as_f64();
        let loading_ms = loading_ms.unwrap_or_else(|| panic!("no loading_ms in {}", done.item));
        loads += u32::from(loading_ms > 0.0);
    }

    assert!(loads <= 1, "of five crashes, {loads} took the neighbours' runner");
}
