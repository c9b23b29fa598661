//! A broker and its workers as real processes. Their state folders are removed with the mesh.

use std::{
    ffi::OsString,
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    Answer, PATIENCE, Process, Proxy, Submission, docker, npy::Array, process::binary, redis::free_port, wait_until,
};

/// Options that differ from the plainest mesh.
#[derive(Clone, Debug, Default)]
pub struct MeshOptions {
    /// The broker's store; `None`: embedded.
    pub redis_url: Option<String>,
    /// Whether all nodes have keys: `broker.key`, `worker.key`, `client.key` in the mesh's folder.
    pub keys: bool,
    /// More arguments of the broker.
    pub broker_args: Vec<String>,
    /// The folder in which workers look first for libraries.
    pub worker_libraries: Option<PathBuf>,
}

/// One broker, and the means to start its workers and clients.
#[derive(Debug)]
pub struct Mesh {
    broker: Process,
    endpoint: String,
    admin: String,
    options: MeshOptions,
    // Dropped last: every process has ended when the folder is removed.
    folder: TempDir,
}

impl Mesh {
    /// A broker with the embedded store and no keys.
    pub fn start() -> Self {
        Self::with(MeshOptions::default())
    }

    /// A broker with these options.
    ///
    /// # Panics
    /// If the broker does not start listening.
    pub fn with(options: MeshOptions) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        if options.keys {
            write_keys(folder.path(), &["broker", "client", "worker"]);
        }
        // Not port 0: somebody might be given the same port while the broker is down.
        let (bind, admin) = (format!("tcp://127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let (broker, endpoint, admin) = start_broker(folder.path(), &options, &bind, &admin);
        Self { broker, endpoint, admin, options, folder }
    }

    /// The broker's endpoint, as ZeroMQ writes it.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The broker's process.
    pub fn broker(&mut self) -> &mut Process {
        &mut self.broker
    }

    /// The folder of all files: `broker`, `client`, a folder per worker, key files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Kills the broker with SIGKILL.
    pub fn kill_broker(&mut self) {
        self.broker.kill();
    }

    /// Starts the broker again at the same addresses with the same state folder.
    pub fn restart_broker(&mut self) {
        self.broker.kill();
        (self.broker, ..) = start_broker(self.folder.path(), &self.options, &self.endpoint, &self.admin);
    }

    /// A registered worker with one slot that runs models in child processes.
    pub fn worker(&self, name: &str) -> Worker {
        self.worker_with(name, &[])
    }

    /// A registered worker with more arguments, each of which replaces the default of the same name.
    pub fn worker_with(&self, name: &str, arguments: &[&str]) -> Worker {
        let mut worker = self.unregistered_worker(name, arguments);
        worker.wait_registered();
        worker
    }

    /// A worker with more arguments, without waiting for its registration.
    pub fn unregistered_worker(&self, name: &str, arguments: &[&str]) -> Worker {
        let state_dir = self.folder.path().join(name);
        let mut all: Vec<OsString> = vec!["--state-dir".into(), state_dir.clone().into(), "--name".into(), name.into()];
        for (flag, usual) in
            [("--broker", self.endpoint()), ("--heartbeat", "200ms"), ("--slots", "1"), ("--engine", "process")]
        {
            let says_lanes = flag == "--slots" && arguments.iter().any(|argument| argument.ends_with("-slots"));
            if !arguments.contains(&flag) && !says_lanes {
                all.extend([flag.into(), usual.into()]);
            }
        }
        if self.options.keys {
            all.extend(self.key_args("worker"));
        }
        all.extend(arguments.iter().map(Into::into));
        let libraries = self.options.worker_libraries.clone();
        let process = start_worker(name, &all, libraries.as_deref());
        Worker { process, name: name.to_owned(), arguments: all, libraries, state_dir }
    }

    fn key_args(&self, name: &str) -> Vec<OsString> {
        let file = |name: &str| self.folder.path().join(name).into();
        vec!["--key-file".into(), file(&format!("{name}.key")), "--broker-key".into(), file("broker.key.pub")]
    }

    /// A `mesh-client` command for this mesh with these arguments.
    pub fn client_command(&self, arguments: &[&str]) -> Command {
        self.client_command_of("client", arguments)
    }

    /// A `mesh-client` command of another user, whose identity is kept in a folder of that name.
    pub fn client_command_of(&self, user: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("mesh-client"));
        command.env("MESH_BROKER", &self.endpoint).arg("--state-dir").arg(self.folder.path().join(user));
        if self.options.keys {
            command.args(self.key_args("client"));
        }
        command.args(arguments);
        command
    }

    /// A `mesh-client` command that reaches the broker at another address, a proxy's.
    pub fn client_command_at(&self, endpoint: &str, arguments: &[&str]) -> Command {
        let mut command = self.client_command(arguments);
        command.env("MESH_BROKER", endpoint);
        command
    }

    /// Runs `mesh-client` to its end.
    pub fn client(&self, arguments: &[&str]) -> Answer {
        Submission::start(self.client_command(arguments)).wait()
    }

    /// This user's tasks, newest first, as `mesh-client tasks --json` shows them.
    ///
    /// # Panics
    /// If the client fails or prints no list.
    pub fn tasks_of(&self, user: &str) -> Vec<Value> {
        let command = self.client_command_of(user, &["tasks", "-n", "1000", "--json"]);
        let answer = Submission::start(command).wait().succeeded().json();
        answer["tasks"].as_array().expect("a list of tasks").clone()
    }

    /// Number of this user's tasks in a state: `queued`, `running`, `done`, …
    pub fn count_of(&self, user: &str, state: &str) -> usize {
        self.tasks_of(user).iter().filter(|task| task["state"] == state).count()
    }

    /// Runs `mesh-client … --json` to its end and returns its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn ask(&self, arguments: &[&str]) -> Value {
        self.client(&[arguments, &["--json"]].concat()).succeeded().json()
    }

    /// Starts `mesh-client` without waiting.
    pub fn client_in_background(&self, arguments: &[&str]) -> Submission {
        Submission::start(self.client_command(arguments))
    }

    /// Status and body of a page of the admin port; `None` without an answer.
    pub fn admin_page(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(&self.admin).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split_whitespace().nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// A number of the metrics page, summed over its labels; `None` if it is missing. The name is given without
    /// `mesh_broker_`.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let (_, page) = self.admin_page("/metrics")?;
        let values = page.lines().filter_map(|line| {
            let rest = line.strip_prefix("mesh_broker_")?.strip_prefix(name)?;
            rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok()).flatten()
        });
        let values: Vec<f64> = values.collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Writes a file into the folder and returns its path. A file with the same content is left alone: a client may be
    /// sending it, and would see a change.
    pub fn file(&self, name: &str, contents: &[u8]) -> String {
        let path = self.folder.path().join(name);
        if fs::read(&path).ok().as_deref() != Some(contents) {
            fs::write(&path, contents).expect("the folder is ours");
        }
        path.display().to_string()
    }

    /// Writes an array into the folder, as `.npy`, and returns its path.
    pub fn array(&self, name: &str, array: &Array) -> String {
        self.file(name, &array.to_bytes())
    }

    /// A proxy before a worker's door, and the worker's arguments for it.
    pub fn door(&self) -> (Proxy, [String; 4]) {
        let port = free_port();
        let proxy = Proxy::before(&format!("127.0.0.1:{port}"));
        let arguments =
            ["--data-bind".into(), format!("tcp://127.0.0.1:{port}"), "--advertise".into(), proxy.address()];
        (proxy, arguments)
    }

    /// A worker whose door is behind a proxy.
    pub fn worker_behind_proxy(&self, name: &str, arguments: &[&str]) -> (Proxy, Worker) {
        let (proxy, door) = self.door();
        let arguments: Vec<&str> = door.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
        let worker = self.worker_with(name, &arguments);
        (proxy, worker)
    }

    /// Waits until no slot is used or promised.
    pub fn wait_idle(&self) {
        wait_until("all slots to be free", PATIENCE, || self.metric("slots_used") == Some(0.0));
    }
}

fn start_broker(folder: &Path, options: &MeshOptions, bind: &str, admin: &str) -> (Process, String, String) {
    let mut command = Command::new(binary("mesh-broker"));
    command.args(["--bind", bind, "--admin", admin, "--state-dir"]).arg(folder.join("broker"));
    if let Some(url) = &options.redis_url {
        command.args(["--redis", url]);
    }
    if options.keys {
        command.arg("--key-file").arg(folder.join("broker.key"));
        command.arg("--authorized-keys").arg(folder.join("authorized_keys"));
    }
    command.args(&options.broker_args);
    let mut broker = Process::start("mesh-broker", command);
    let after = |line: &str, prefix: &str| Some(line.split_once(prefix)?.1.split_whitespace().next()?.to_owned());
    let endpoint = broker.wait_for_line("`listening on`", PATIENCE, |line| after(line, "listening on "));
    let admin = broker.wait_for_line("`admin on`", PATIENCE, |line| after(line, "admin on http://"));
    (broker, endpoint, admin.trim_end_matches('/').to_owned())
}

fn start_worker(name: &str, arguments: &[OsString], libraries: Option<&Path>) -> Process {
    let mut command = Command::new(binary("mesh-worker"));
    command.args(arguments).envs(libraries.map(|folder| ("LD_LIBRARY_PATH", folder)));
    Process::start(name, command)
}

/// Makes a key pair for each name and lists all public keys, as the broker needs them at its start.
fn write_keys(folder: &Path, names: &[&str]) {
    let mut list = String::new();
    for name in names {
        let file = folder.join(format!("{name}.key"));
        let made = Command::new(binary("mesh-client")).arg("keygen").arg(&file).output().expect("mesh-client is built");
        assert!(made.status.success(), "keygen: {}", String::from_utf8_lossy(&made.stderr));
        let public = fs::read_to_string(folder.join(format!("{name}.key.pub"))).expect("keygen wrote it");
        list += &format!("{} {name}\n", public.trim());
    }
    fs::write(folder.join("authorized_keys"), list).expect("the folder is ours");
}

/// The folder in memory for the sockets of a worker's containers.
fn sockets_of(worker_id: &str) -> PathBuf {
    Path::new("/dev/shm").join(format!("mesh-worker-{worker_id}"))
}

/// A worker's process.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    name: String,
    arguments: Vec<OsString>,
    libraries: Option<PathBuf>,
    state_dir: PathBuf,
}

impl Worker {
    /// The worker's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The worker's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The worker's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The worker's state folder.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Waits until the worker has printed that it is registered.
    pub fn wait_registered(&mut self) {
        self.process.wait_for_line("`ready: worker`", PATIENCE, |line| line.contains("ready: worker").then_some(()));
    }

    /// Kills the worker with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Restarts the worker with the same arguments and state folder, and waits for its registration.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = start_worker(&self.name, &self.arguments, self.libraries.as_deref());
        self.wait_registered();
    }

    /// Asks the worker to finish its runs and leave.
    pub fn drain(&self) {
        self.process.signal(Signal::SIGTERM);
    }

    /// The id that the worker keeps across restarts; `None` before its first start.
    pub fn id(&self) -> Option<String> {
        fs::read_to_string(self.state_dir.join("worker-id")).ok().map(|id| id.trim().to_owned())
    }

    /// All files of the worker: models, inputs, results, sockets of containers, and the program's own (ids, locks).
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.state_dir.clone()];
        folders.extend(self.id().map(|id| sockets_of(&id)));
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.process.kill();
        let may_have_containers = self.arguments.iter().any(|argument| argument == "docker" || argument == "auto");
        if let Some(id) = self.id().filter(|_| may_have_containers) {
            docker::remove_containers_of(&id);
            let _ = fs::remove_dir_all(sockets_of(&id));
        }
    }
}
