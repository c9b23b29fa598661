//! A first start that does not come to its end: the next one works, whatever the first has left.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use crate::{PATIENCE, process::Broker};

/// First starts that are killed.
const KILLS: usize = 40;

/// Names and sizes of the files in a folder: what a start has done so far.
fn traces(folder: &Path) -> Vec<(OsString, u64)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| (entry.file_name(), entry.metadata().map_or(0, |meta| meta.len()))).collect()
}

fn is_made(traces: &[(OsString, u64)]) -> bool {
    traces.iter().any(|(name, bytes)| name == "broker.redb" && *bytes > 0)
}

/// Starts a broker with this state folder, and kills it once it has changed the folder so many times.
fn kill_first_start(state: &str, changes: usize) {
    let mut broker = Command::new(env!("CARGO_BIN_EXE_mesh-broker"))
        .args(["--bind", "tcp://127.0.0.1:0", "--admin", "none", "--log", "off", "--state-dir", state])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (began, mut seen, mut last) = (Instant::now(), 0, Vec::new());
    // Without a pause: the time between two changes is short. Some are over before they are seen.
    while seen < changes && !is_made(&last) && began.elapsed() < PATIENCE {
        let now = traces(Path::new(state));
        seen += usize::from(now != last);
        last = now;
    }
    broker.kill().unwrap();
    broker.wait().unwrap();
}

#[test]
fn a_broker_killed_in_its_first_start_starts_the_next_time() {
    let own = tempfile::tempdir().unwrap();
    for kill in 0..KILLS {
        let state = own.path().join(kill.to_string()).display().to_string();
        kill_first_start(&state, 1 + kill % 3);
        let left = traces(Path::new(&state));

        let mut next = Broker::start(&["--state-dir", &state]);

        assert_eq!(next.terminate(), Some(0), "after kill {kill}, which left {left:?}");
    }
}
