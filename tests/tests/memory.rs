//! Memory at both ends of a transfer: a few windows per transfer, however large the files are.

use std::time::Duration;

use mesh_tests::{Job, Mesh, jobs::Started, process::status_field, wait_for};
use proto_msgs::limits::WINDOW_BYTES;

const MIB: u64 = 1 << 20;

/// Allowed memory of either end beside one window per transfer.
const EXTRA_BYTES_MAX: u64 = 64 * MIB;

/// Peak memory of a process so far; `None` if it has ended.
fn peak_bytes(pid: u32) -> Option<u64> {
    Some(status_field(pid, "VmHWM:")? * 1024)
}

/// Waits for the right answer. Returns the client's peak memory meanwhile.
fn peak_until_done(mut started: Started, job: &Job) -> u64 {
    let mut peak = 0;
    wait_for("the client to end", Duration::from_secs(120), || {
        let process = started.client.process();
        peak = peak_bytes(process.pid()).unwrap_or(0).max(peak);
        process.try_wait()
    });
    started.done(job);
    peak
}

#[test]
fn a_large_model_takes_no_more_memory_than_a_small_one_and_a_few_windows() {
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &[]);
    let small = Job::small(&mesh);
    let of_client = peak_until_done(small.start(&mesh, &[]), &small);
    let of_worker = peak_bytes(worker.pid()).expect("it runs");
    let large = Job::heavy(&mesh, 256, 91);
    // Data that the link does not take yet must wait in the file.
    door.throttle(Some(64 * MIB));

    let peak = peak_until_done(large.start(&mesh, &[]), &large);

    let more = peak.saturating_sub(of_client);
    assert!(more <= EXTRA_BYTES_MAX, "the client took {} MiB more", more / MIB);
    let more = peak_bytes(worker.pid()).expect("it runs") - of_worker;
    assert!(more <= EXTRA_BYTES_MAX, "the worker took {} MiB more", more / MIB);
}

#[test]
fn a_worker_takes_no_more_memory_than_a_window_for_each_of_its_clients() {
    const CLIENTS: u16 = 6;
    let mesh = Mesh::start();
    let (door, worker) = mesh.worker_behind_proxy("w1", &["--slots", "6"]);
    Job::small(&mesh).run(&mesh);
    let before = peak_bytes(worker.pid()).expect("it runs");
    let jobs: Vec<Job> = (0..CLIENTS).map(|seed| Job::heavy(&mesh, 64, 92 + seed)).collect();
    door.throttle(Some(16 * MIB));

    let started: Vec<Started> = jobs.iter().map(|job| job.start(&mesh, &[])).collect();
    started.into_iter().zip(&jobs).for_each(|(started, job)| drop(started.done(job)));

    let more = peak_bytes(worker.pid()).expect("it runs") - before;
    let most = EXTRA_BYTES_MAX + u64::from(CLIENTS) * u64::from(WINDOW_BYTES);
    assert!(more <= most, "the worker took {} MiB more for {CLIENTS} clients", more / MIB);
}
