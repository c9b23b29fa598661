//! Heartbeats come on time whatever else the worker has to do. Alone in its file: it wants the whole machine.

use std::time::Duration;

use mesh_tests::{Job, Mesh, Proxy, proxy::Side};

const HEARTBEAT: u16 = 201;

#[test]
fn no_three_heartbeats_are_missed_under_full_load() {
    let interval = Duration::from_millis(500);
    let mesh = Mesh::start();
    let to_broker = Proxy::before(mesh.endpoint());
    let arguments = ["--heartbeat", "500ms", "--slots", "4", "--broker", &to_broker.endpoint()];
    let (door, _worker) = mesh.worker_behind_proxy("w1", &arguments);

    // Every core runs a model while large ones come in, one after the other.
    let long: Vec<Job> = (0..2).map(|_| Job::long(&mesh, 6000)).collect();
    let running: Vec<_> = long.iter().map(|job| job.start(&mesh, &[])).collect();
    for seed in 71..75 {
        Job::heavy(&mesh, 48, seed).run(&mesh);
    }
    running.into_iter().zip(&long).for_each(|(started, job)| drop(started.done(job)));

    assert!(door.bytes_from(Side::Dialler) > 190 << 20, "there was a load");
    let beats: Vec<_> =
        to_broker.seen().into_iter().filter(|seen| seen.message.kind == Some(HEARTBEAT)).map(|seen| seen.at).collect();
    let gaps = beats.windows(2).map(|pair| pair[1] - pair[0]);
    let longest = gaps.max().expect("there were heartbeats");
    assert!(beats.len() > 10, "{} heartbeats", beats.len());
    assert!(longest < 3 * interval, "no heartbeat for {longest:?}");
    assert_eq!(mesh.metric("workers_lost_total"), Some(0.0));
}
