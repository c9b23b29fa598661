//! How fast bytes get from a client to a worker, RAM disk to RAM disk and verified, against the usual ways to move a
//! file.

mod others;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_sdk::{Input, Model, Options, Task};
use mesh_tests::{Mesh, PATIENCE, Process, onnx, process::binary};
use serde_json::json;

use crate::{
    measure::memory_bytes,
    report::{Report, Table, median},
};
use others::Others;

const MIB: u64 = 1 << 20;

/// The ways in the order of the table; the mesh first.
const WAYS: [(&str, &str); 7] = [
    ("mesh", "BLAKE3"),
    ("mesh, digest made first", "BLAKE3"),
    ("curl to nginx", "no"),
    ("curl to nginx, then a digest", "BLAKE3"),
    ("socat", "no"),
    ("socat, then a digest", "BLAKE3"),
    ("rsync to its daemon", "xxHash"),
];

pub(crate) fn run(quick: bool) -> Result<Report> {
    let (sizes_mib, rounds): (&[u64], usize) = if quick { (&[1], 1) } else { (&[1, 100, 1024], 7) };
    let mut report = Report::new("transfer", "Transfer: client to worker against curl, socat and rsync");
    let mut times = Table::new("Every way", &["MiB", "way", "verified", "median ms", "best ms", "median MB/s"]);
    let mut ratios = Table::new(
        "The mesh against the best of the others, medians",
        &[
            "MiB",
            "ratio to the best verified",
            "ratio to the best at all",
            "with the digest made first",
            "client extra MiB",
            "worker extra MiB",
            "limited by",
        ],
    );
    for mib in sizes_mib {
        measure(mib * MIB, rounds)?.add_rows(*mib, &mut times, &mut ratios);
    }
    report.table(times);
    report.table(ratios);
    report.note(format!(
        "Medians of {rounds} rounds in turns, all files in /dev/shm, all connections over the loopback. Extra memory: peak \
         resident size above that before the transfer, the most of all rounds."
    ));
    report.note(
        "mesh: a real client (the SDK) submits the file as input to a real worker; from the grant to the moment the \
         worker has all of it in place, its digest checked. The digest that the client announces is made before the \
         submit; the second row includes it.",
    );
    report.note(
        "curl: its own clock on a connection that stands. socat and rsync: with the start of their programs. `then a \
         digest`: one thread hashes the copy afterwards.",
    );
    Ok(report)
}

#[derive(Default)]
struct Measured {
    /// Seconds of each way, in the order of [`WAYS`].
    seconds: [Vec<f64>; WAYS.len()],
    client_extra_mib: f64,
    worker_extra_mib: f64,
}

impl Measured {
    fn add_rows(&self, mib: u64, times: &mut Table, ratios: &mut Table) {
        let mut medians = Vec::new();
        for ((way, verified), seconds) in WAYS.iter().zip(&self.seconds) {
            let (middle, best) = (median(seconds.iter().copied()), seconds.iter().copied().fold(f64::MAX, f64::min));
            let rate = (mib * MIB) as f64 / 1e6 / middle;
            let figures = [json!(middle * 1e3), json!(best * 1e3), json!(rate.round())];
            times.row([&[json!(mib), json!(way), json!(verified)], &figures[..]].concat());
            medians.push(middle);
        }
        let best = |only_verified: bool| {
            let others = WAYS.iter().zip(&medians).skip(2);
            others.filter(|((_, how), _)| !only_verified || *how != "no").map(|(_, s)| *s).fold(f64::MAX, f64::min)
        };
        let limit = if mib < 10 {
            "hand-overs between threads and programs, not bytes"
        } else {
            "two cores: each byte is copied by kernel and libzmq on both sides, and hashed"
        };
        ratios.row(vec![
            json!(mib),
            json!(best(true) / medians[0]),
            json!(best(false) / medians[0]),
            json!(best(true) / medians[1]),
            json!(self.client_extra_mib),
            json!(self.worker_extra_mib),
            json!(limit),
        ]);
    }
}

fn measure(size_bytes: u64, rounds: usize) -> Result<Measured> {
    let folder = tempfile::tempdir_in("/dev/shm").context("a RAM disk at /dev/shm")?;
    let source = folder.path().join("source");
    write_noise(&source, size_bytes)?;
    let others = Others::start(folder.path())?;
    let mut mesh = InMesh::start(folder.path())?;
    // After this the connection is up and every program is in memory, so only the bytes are measured.
    mesh.send(&source)?;
    let mut measured = Measured::default();
    for _ in 0..rounds {
        let ours = mesh.send(&source)?;
        measured.client_extra_mib = ours.client_extra_mib.max(measured.client_extra_mib);
        measured.worker_extra_mib = ours.worker_extra_mib.max(measured.worker_extra_mib);
        let seconds = &mut measured.seconds;
        seconds[0].push(ours.sending.as_secs_f64());
        seconds[1].push((ours.hashing + ours.sending).as_secs_f64());
        for (at, way) in [(2, Others::curl as fn(&Others, &Path) -> _), (4, Others::socat), (6, Others::rsync)] {
            let _ = fs::remove_file(others.target());
            let took: Duration = way(&others, &source)?;
            seconds[at].push(took.as_secs_f64());
            let checked = time_to_hash(others.target())?;
            ensure!(fs::metadata(others.target())?.len() == size_bytes, "it did not arrive whole");
            if at != 6 {
                seconds[at + 1].push((took + checked).as_secs_f64());
            }
        }
    }
    Ok(measured)
}

/// Writes floats that do not compress, all finite.
fn write_noise(path: &Path, size_bytes: u64) -> Result<()> {
    // The noise is a model's weights; the file's own bytes at both ends of them are cut off.
    let noise = onnx::heavy(size_bytes as usize + 4096, 1);
    fs::write(path, &noise[2048..2048 + size_bytes as usize]).context("cannot write the source")
}

fn time_to_hash(path: &Path) -> Result<Duration> {
    let start = Instant::now();
    blake3::Hasher::new().update_reader(fs::File::open(path)?)?.finalize();
    Ok(start.elapsed())
}

/// Times of one transfer through the mesh.
struct Sent {
    sending: Duration,
    hashing: Duration,
    client_extra_mib: f64,
    worker_extra_mib: f64,
}

/// A mesh whose worker keeps its files in the RAM disk, and a client in this process.
struct InMesh {
    runtime: tokio::runtime::Runtime,
    client: mesh_sdk::Mesh,
    model: Model,
    worker: Process,
    _mesh: Mesh,
}

impl InMesh {
    fn start(folder: &Path) -> Result<Self> {
        let mesh = Mesh::start();
        let mut worker = Command::new(binary("mesh-worker"));
        worker.args(["--broker", mesh.endpoint(), "--engine", "process", "--quota", "4GiB", "--state-dir"]);
        worker.arg(folder.join("worker"));
        let mut worker = Process::start("mesh-worker", worker);
        worker.wait_for_line("that it is ready", PATIENCE, |line| line.contains("ready: worker").then_some(()));
        let runtime = tokio::runtime::Runtime::new()?;
        let mut options = Options::new(mesh.endpoint());
        options.state_dir = folder.join("client");
        let (client, model) = runtime.block_on(async {
            let client = mesh_sdk::Mesh::connect(options).await?;
            anyhow::Ok((client, Model::from_bytes("maximum.onnx", onnx::maximum()).await?))
        })?;
        Ok(Self { runtime, client, model, worker, _mesh: mesh })
    }

    fn send(&mut self, source: &Path) -> Result<Sent> {
        let programs = [std::process::id(), self.worker.pid()];
        let before = programs.map(|pid| {
            // 5 resets the peak of resident memory to the current value.
            let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
            memory_bytes(pid, "VmRSS")
        });
        let task = Task::new(self.model.clone()).input(Input::file(PathBuf::from(source)));
        let start = Instant::now();
        let (hashing, result) = self.runtime.block_on(async {
            let mut task = self.client.submit(task).await?;
            let hashing = start.elapsed();
            anyhow::Ok((hashing, task.wait().await?))
        })?;
        ensure!(result.outputs.len() == 1, "one output");
        let extra_mib = |at: usize| memory_bytes(programs[at], "VmHWM").saturating_sub(before[at]) as f64 / MIB as f64;
        let (client_extra_mib, worker_extra_mib) = (extra_mib(0), extra_mib(1));
        Ok(Sent { sending: result.timings.sending, hashing, client_extra_mib, worker_extra_mib })
    }
}
