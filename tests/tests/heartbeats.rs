//! Heartbeats are on time under any load. Alone in its file: the test needs the whole machine.

use std::time::Duration;

use mesh_tests::{Job, Mesh, PATIENCE, Proxy, proxy::Side, wait_until};

const HEARTBEAT: u16 = 201;

#[test]
fn no_three_heartbeats_are_missed_under_full_load() {
    let interval = Duration::from_millis(500);
    let mesh = Mesh::start();
    let to_broker = Proxy::before(mesh.endpoint());
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let slots = (cores + 2).to_string();
    let arguments = ["--heartbeat", "500ms", "--slots", &slots, "--broker", &to_broker.endpoint()];
    let (door, _worker) = mesh.worker_behind_proxy("w1", &arguments);

    // Every core runs a model while large models arrive, one after the other.
    let endless = Job::endless(&mesh);
    let running: Vec<_> = (0..cores).map(|_| endless.start_as(&mesh, "busy", &[])).collect();
    wait_until("every core to run a model", PATIENCE, || mesh.count_of("busy", "running") == cores);
    for seed in 71_u16.. {
        Job::heavy(&mesh, 48, seed).run(&mesh);
        if seed >= 74 && to_broker.count(HEARTBEAT) > 10 {
            break;
        }
    }

    assert_eq!(mesh.count_of("busy", "running"), cores, "the load was there all the time");
    running.into_iter().for_each(|started| {
        started.client.interrupt();
        started.answer();
    });
    assert!(door.bytes_from(Side::Dialler) > 190 << 20, "there was a load");
    let beats: Vec<_> =
        to_broker.seen().into_iter().filter(|seen| seen.message.kind == Some(HEARTBEAT)).map(|seen| seen.at).collect();
    let gaps = beats.windows(2).map(|pair| pair[1] - pair[0]);
    let longest = gaps.max().expect("there were heartbeats");
    assert!(longest < 3 * interval, "no heartbeat for {longest:?}");
    assert_eq!(mesh.metric("workers_lost_total"), Some(0.0));
}
