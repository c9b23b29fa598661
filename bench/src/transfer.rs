//! How fast bytes get from a client to a worker, RAM disk to RAM disk and verified, against the usual ways to move a file.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_sdk::{Input, Model, Options, Task};
use mesh_tests::{Mesh, PATIENCE, Process, onnx, process, redis::free_port, wait_until};
use serde_json::json;
use tempfile::TempDir;

use crate::report::{Section, median};

const MIB: u64 = 1 << 20;

pub(crate) fn run(smoke: bool) -> Result<Section> {
    let columns = &[
        "MiB",
        "mesh MB/s",
        "curl to nginx MB/s",
        "socat MB/s",
        "rsync MB/s",
        "mesh / best",
        "hash before ms",
        "client extra MiB",
        "worker extra MiB",
    ];
    let mut section = Section::new("transfer", "Transfer: client to worker against curl, socat and rsync", columns);
    let (sizes, rounds): (&[u64], usize) = if smoke { (&[1], 1) } else { (&[1, 100, 1024], 5) };
    for mib in sizes {
        let bench = Bench::start(mib * MIB)?;
        let mut mesh = bench.mesh()?;
        let mut seconds = [(); 4].map(|()| Vec::new());
        let (mut hashing, mut client_mib, mut worker_mib) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let ours = mesh.send(&bench.source)?;
            seconds[0].push(ours.sending.as_secs_f64());
            hashing.push(ours.hashing.as_secs_f64() * 1000.0);
            client_mib.push(ours.client_extra_mib);
            worker_mib.push(ours.worker_extra_mib);
            for (at, way) in [Bench::curl, Bench::socat, Bench::rsync].iter().enumerate() {
                seconds[at + 1].push(bench.timed(*way)?);
            }
        }
        let rate = |seconds: &mut Vec<f64>| (mib * MIB) as f64 / 1e6 / median(seconds);
        let rates = seconds.each_mut().map(rate);
        let best = rates[1..].iter().copied().fold(0.0, f64::max);
        let mut row = vec![json!(mib)];
        row.extend(rates.iter().map(|rate| json!(rate.round())));
        row.extend(
            [rates[0] / best, median(&mut hashing), median(&mut client_mib), median(&mut worker_mib)].map(|v| json!(v)),
        );
        section.row(row);
    }
    section
        .note(format!("Median of {rounds} rounds in turns, all files in /dev/shm, all connections over the loopback."));
    section.note(
        "The mesh's time is from the grant to the moment the worker had all bytes in place, their BLAKE3 checked. rsync checks, too; \
         curl and socat check nothing. The digest is made before the submit and shown apart.",
    );
    section.note(
        "What limits: one core on each side copies, through libzmq's I/O thread and the socket, and hashes while it writes. \
         For 1 MiB it is the handshake and the start of the other programs.",
    );
    Ok(section)
}

/// What one transfer through the mesh took.
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
    worker: mesh_tests::Worker,
    _mesh: Mesh,
    _folder: TempDir,
}

impl InMesh {
    fn send(&mut self, source: &Path) -> Result<Sent> {
        let worker = self.worker.process().pid();
        let before = [std::process::id(), worker].map(|pid| {
            // 5 sets the high-water mark of resident memory back to what is resident now.
            let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
            process::status_field(pid, "VmRSS:").unwrap_or(0)
        });
        let start = Instant::now();
        let client = &self.client;
        let (hashing, result) = self.runtime.block_on(async {
            let model = Model::from_bytes("maximum.onnx", onnx::maximum()).await?;
            let mut task = client.submit(Task::new(model).input(Input::file(source))).await?;
            let hashing = start.elapsed();
            anyhow::Ok((hashing, task.wait().await?))
        })?;
        ensure!(result.outputs.len() == 1, "one output");
        let extra =
            |pid, before: u64| process::status_field(pid, "VmHWM:").unwrap_or(0).saturating_sub(before) as f64 / 1024.0;
        Ok(Sent {
            sending: result.timings.sending,
            hashing,
            client_extra_mib: extra(std::process::id(), before[0]),
            worker_extra_mib: extra(worker, before[1]),
        })
    }
}

/// A source file in the RAM disk and the servers of the other programs.
struct Bench {
    source: PathBuf,
    folder: TempDir,
    nginx: (Process, u16),
    rsync: (Process, u16),
}

impl Bench {
    fn start(size_bytes: u64) -> Result<Self> {
        let folder = tempfile::tempdir_in("/dev/shm").context("a RAM disk at /dev/shm")?;
        let source = folder.path().join("source");
        // Floats that do not compress, all finite.
        let noise: Vec<u8> = onnx::heavy(size_bytes as usize + 4096, 1).split_off(2048);
        fs::write(&source, &noise[..size_bytes as usize])?;
        fs::create_dir(folder.path().join("there"))?;
        let nginx = start_nginx(folder.path())?;
        let rsync = start_rsync(folder.path())?;
        Ok(Self { source, folder, nginx, rsync })
    }

    fn mesh(&self) -> Result<InMesh> {
        let mesh = Mesh::start();
        let folder = tempfile::tempdir_in("/dev/shm")?;
        let state = folder.path().join("worker").display().to_string();
        let worker = mesh.worker_with("sink", &["--state-dir", &state, "--quota", "4GiB"]);
        let runtime = tokio::runtime::Runtime::new()?;
        let mut options = Options::new(mesh.endpoint());
        options.state_dir = folder.path().join("client");
        let client = runtime.block_on(mesh_sdk::Mesh::connect(options))?;
        Ok(InMesh { runtime, client, worker, _mesh: mesh, _folder: folder })
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("there/target")
    }

    /// Seconds until the whole file is there.
    fn timed(&self, way: fn(&Self) -> Result<Instant>) -> Result<f64> {
        let _ = fs::remove_file(self.target());
        let seconds = way(self)?.elapsed().as_secs_f64();
        ensure!(fs::metadata(self.target())?.len() == fs::metadata(&self.source)?.len(), "it did not arrive whole");
        Ok(seconds)
    }

    fn curl(&self) -> Result<Instant> {
        let url = format!("http://127.0.0.1:{}/target", self.nginx.1);
        let start = Instant::now();
        finish(Command::new("curl").args(["--silent", "--show-error", "--fail", "-T"]).arg(&self.source).arg(url))?;
        Ok(start)
    }

    fn socat(&self) -> Result<Instant> {
        let port = free_port();
        let mut server = Command::new("socat");
        server.args(["-d", "-d", "-u", "-b", "1048576", &format!("TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr")]);
        server.arg(format!("OPEN:{},creat,trunc", self.target().display()));
        let mut server = Process::start("socat", server);
        server.wait_for_line("that it listens", PATIENCE, |line| line.contains("listening on").then_some(()));
        let start = Instant::now();
        let from = format!("OPEN:{}", self.source.display());
        finish(Command::new("socat").args(["-u", "-b", "1048576", &from, &format!("TCP:127.0.0.1:{port}")]))?;
        server.wait(PATIENCE);
        Ok(start)
    }

    fn rsync(&self) -> Result<Instant> {
        let url = format!("rsync://127.0.0.1:{}/there/target", self.rsync.1);
        let start = Instant::now();
        finish(Command::new("rsync").args(["--whole-file", "--inplace"]).arg(&self.source).arg(url))?;
        Ok(start)
    }
}

fn finish(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("{command:?}: is it installed?"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

fn start_nginx(folder: &Path) -> Result<(Process, u16)> {
    let (port, at) = (free_port(), folder.display());
    let config = format!(
        "daemon off; master_process off; pid {at}/nginx.pid; error_log stderr; user root;\n\
         events {{}}\n\
         http {{ access_log off; client_max_body_size 0; client_body_temp_path {at}/there; client_body_buffer_size 1m;\n\
         proxy_temp_path {at}/p; fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         server {{ listen 127.0.0.1:{port}; root {at}/there; dav_methods PUT; }} }}\n"
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, config)?;
    let mut command = Command::new("/usr/sbin/nginx");
    command.arg("-c").arg(&file).args(["-e", "stderr"]);
    listening(Process::start("nginx", command), port)
}

fn start_rsync(folder: &Path) -> Result<(Process, u16)> {
    let (port, at) = (free_port(), folder.display());
    let file = folder.join("rsyncd.conf");
    fs::write(&file, format!("use chroot = no\n[there]\npath = {at}/there\nread only = no\nuid = {}\n", nix_uid()))?;
    let mut command = Command::new("rsync");
    command.args(["--daemon", "--no-detach", "--address=127.0.0.1", &format!("--port={port}"), "--config"]).arg(&file);
    listening(Process::start("rsync", command), port)
}

fn nix_uid() -> u32 {
    process::status_field(std::process::id(), "Uid:").unwrap_or(0) as u32
}

fn listening(process: Process, port: u16) -> Result<(Process, u16)> {
    wait_until("a server to listen", PATIENCE, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    Ok((process, port))
}
