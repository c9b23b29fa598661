//! The usual ways to move a file: curl to nginx, socat, rsync to its daemon. Their servers run on free ports of the
//! loopback, set up as well as possible.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{PATIENCE, Process, redis::free_port, wait_until};

/// Bytes that socat moves at once; its default of 8 KiB costs half its speed.
const SOCAT_BLOCK_BYTES: &str = "1048576";

/// The servers, which write into one folder.
pub(super) struct Others {
    target: PathBuf,
    nginx: (Process, u16),
    rsync: (Process, u16),
}

impl Others {
    /// Starts the servers; all their files are in `folder`.
    pub(super) fn start(folder: &Path) -> Result<Self> {
        let there = folder.join("there");
        fs::create_dir(&there)?;
        Ok(Self { target: there.join("target"), nginx: start_nginx(folder)?, rsync: start_rsync(folder)? })
    }

    /// Path of the copy after any of the transfers.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// PUT, timed by curl itself on an existing connection: without the start of the program, without the handshake.
    pub(super) fn curl(&self, source: &Path) -> Result<Duration> {
        let url = |name: &str| format!("http://127.0.0.1:{}/{name}", self.nginx.1);
        let empty = source.with_extension("empty");
        fs::write(&empty, b"")?;
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--fail", "--header", "Expect:", "--write-out", "%{time_total}\n"]);
        command.arg("-T").arg(&empty).arg(url("empty")).arg("-T").arg(source).arg(url("target"));
        let printed = finish(&mut command)?;
        let seconds = printed.lines().last().and_then(|line| line.parse().ok()).context("curl prints the time")?;
        Ok(Duration::from_secs_f64(seconds))
    }

    /// Time from the start of the sender to the end of the receiver.
    pub(super) fn socat(&self, source: &Path) -> Result<Duration> {
        let port = free_port();
        let mut server = Command::new("socat");
        server.args(["-d", "-d", "-u", "-b", SOCAT_BLOCK_BYTES]);
        server.arg(format!("TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr"));
        server.arg(format!("OPEN:{},creat,trunc", self.target.display()));
        let mut server = Process::start("socat", server);
        server.wait_for_line("that it listens", PATIENCE, |line| line.contains("listening on").then_some(()));
        let start = Instant::now();
        let mut sender = Command::new("socat");
        sender.args(["-u", "-b", SOCAT_BLOCK_BYTES]).arg(format!("OPEN:{}", source.display()));
        finish(sender.arg(format!("TCP:127.0.0.1:{port}")))?;
        // The file is complete when the receiver has ended. It is polled without pause, because a look every 20 ms
        // would distort the figure.
        while server.try_wait().is_none() {
            ensure!(start.elapsed() < PATIENCE, "socat does not end");
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(start.elapsed())
    }

    /// Time from the start of the program to its end; rsync compares checksums at the end by itself.
    pub(super) fn rsync(&self, source: &Path) -> Result<Duration> {
        let url = format!("rsync://127.0.0.1:{}/there/target", self.rsync.1);
        let start = Instant::now();
        finish(Command::new("rsync").args(["--whole-file", "--inplace"]).arg(source).arg(url))?;
        Ok(start.elapsed())
    }
}

/// Output of the command, if it succeeded.
fn finish(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{command:?}: is it installed?"))?;
    ensure!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn start_nginx(folder: &Path) -> Result<(Process, u16)> {
    let (port, at) = (free_port(), folder.display());
    // The body goes to a temporary file beside its place, so that the end is a rename and no copy.
    let config = format!(
        "daemon off; master_process off; pid {at}/nginx.pid; error_log stderr;\n\
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
    let uid = nix::unistd::geteuid();
    fs::write(&file, format!("use chroot = no\n[there]\npath = {at}/there\nread only = no\nuid = {uid}\n"))?;
    let mut command = Command::new("rsync");
    command.args(["--daemon", "--no-detach", "--address=127.0.0.1", &format!("--port={port}"), "--config"]).arg(&file);
    listening(Process::start("rsync", command), port)
}

fn listening(process: Process, port: u16) -> Result<(Process, u16)> {
    wait_until("a server to listen", PATIENCE, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    Ok((process, port))
}
