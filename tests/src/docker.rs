//! The containers that workers start, as their engine and the kernel see them.
//!
//! The engine is Docker, or Podman if `$MESH_TEST_ENGINE` says so: then it listens on `$DOCKER_HOST`, which workers read,
//! too. `./test` runs the stories of containers with one and the other.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::{
    sys::signal::{Signal, kill as send_signal},
    unistd::Pid,
};
use serde_json::Value;

use super::{PATIENCE, Process, process::children_of, wait_until};

/// What workers start unless they are told otherwise.
const RUNNER_IMAGE: &str = "mesh-runner:latest";

/// Whether `test`, which needs containers, can run here. If not, that is noted; in CI it fails.
pub fn is_ready(test: &str) -> bool {
    let missing = missing();
    if let Some(missing) = &missing {
        super::skip(test, missing);
    }
    missing.is_none()
}

fn missing() -> Option<String> {
    let engine = if is_podman() { "podman" } else { "docker" };
    match command(&["image", "inspect", RUNNER_IMAGE]) {
        Err(error) => Some(format!("there is no {engine} command ({error})")),
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Some(format!("the image {RUNNER_IMAGE} is not there: run docker/build-image --engine {engine} ({said})"))
        }
        Ok(_) => None,
    }
}

/// Whether the engine is Podman.
pub fn is_podman() -> bool {
    std::env::var("MESH_TEST_ENGINE").is_ok_and(|engine| engine == "podman")
}

/// Where the engine listens, as a path.
pub fn socket() -> PathBuf {
    let host = std::env::var("DOCKER_HOST").unwrap_or_else(|_| "/var/run/docker.sock".to_owned());
    host.strip_prefix("unix://").unwrap_or(&host).into()
}

/// Whether the engine tells an end by the memory limit from one by a person. Podman does from 5.0 on.
pub fn tells_memory() -> bool {
    let major =
        || docker(&["version", "--format", "{{.Server.Version}}"]).split('.').next()?.trim().parse::<u32>().ok();
    !is_podman() || major().is_some_and(|major| major >= 5)
}

fn command(arguments: &[&str]) -> io::Result<Output> {
    let mut command = if is_podman() { Command::new("podman") } else { Command::new("docker") };
    if is_podman() {
        command.arg("--remote").arg("--url").arg(format!("unix://{}", socket().display()));
    }
    command.args(arguments).output()
}

fn docker(arguments: &[&str]) -> String {
    let output = command(arguments).expect("is_ready() was asked before");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Ids of all containers, running or not, with this label (`key` or `key=value`).
pub fn containers(label: &str) -> Vec<String> {
    let listed = docker(&["ps", "--all", "--quiet", "--no-trunc", "--filter", &format!("label={label}")]);
    listed.lines().map(str::to_owned).collect()
}

/// Removes the containers that a killed worker has left, since nobody else would.
pub fn remove_containers_of(worker_id: &str) {
    let left = containers(&format!("mesh.worker={worker_id}"));
    if !left.is_empty() {
        let ids: Vec<&str> = left.iter().map(String::as_str).collect();
        docker(&[&["rm", "--force"], &ids[..]].concat());
    }
}

/// Ends a container's process by SIGKILL, as the kernel might.
pub fn kill(container: &str) {
    docker(&["kill", container]);
}

/// The runner's image by its content.
pub fn runner_image() -> String {
    docker(&["image", "inspect", "--format", "{{.Id}}", RUNNER_IMAGE]).trim().to_owned()
}

/// An image with a shell script in place of the runner; removed when dropped.
#[derive(Debug)]
pub struct ScriptImage {
    /// The image's name.
    pub name: String,
}

impl ScriptImage {
    /// An image of the shell, the shared objects that it needs, and `script`. `folder` is for its files.
    ///
    /// # Panics
    /// If the engine does not take it.
    pub fn make(folder: &Path, name: &str, script: &str) -> Self {
        let (root, archive) = (folder.join(name), folder.join(format!("{name}.tar")));
        let place = |from: &str| {
            let to = root.join(from.trim_start_matches('/'));
            fs::create_dir_all(to.parent().expect("a file is in a folder")).expect("the folder is ours");
            fs::copy(from, to).expect("it was found by the loader");
        };
        place("/bin/sh");
        let needed = Command::new("ldd").arg("/bin/sh").output().expect("ldd comes with the C library").stdout;
        let needed = String::from_utf8_lossy(&needed).into_owned();
        needed.split_whitespace().filter(|word| word.starts_with('/')).for_each(place);
        fs::write(root.join("script"), script).expect("the folder is ours");
        let tar = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".").status();
        assert!(tar.is_ok_and(|status| status.success()), "no archive");
        let name = format!("mesh-tests-{name}-{}", std::process::id());
        let entry = "ENTRYPOINT [\"/bin/sh\", \"/script\"]";
        docker(&["import", "--change", entry, &archive.display().to_string(), &name]);
        Self { name }
    }
}

impl Drop for ScriptImage {
    fn drop(&mut self) {
        docker(&["image", "rm", "--force", &self.name]);
    }
}

/// A way to the engine that can be blocked, as if the engine were away while its containers live on.
#[derive(Debug)]
pub struct Way {
    socket: PathBuf,
    relay: Option<Process>,
}

impl Way {
    /// An open way; its socket is in `folder`.
    pub fn open(folder: &Path) -> Self {
        let mut way = Self { socket: folder.join("engine.sock"), relay: None };
        way.unblock();
        way
    }

    /// The way's address, for `--docker-host`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Cuts what is connected, and lets nobody connect.
    pub fn block(&mut self) {
        let Some(mut relay) = self.relay.take() else { return };
        // Frozen first, so that it has no more children while they are ended.
        relay.freeze();
        for child in children_of(relay.pid()) {
            let _ = send_signal(Pid::from_raw(child as i32), Signal::SIGKILL);
        }
        relay.kill();
        let _ = fs::remove_file(&self.socket);
    }

    /// Opens it again.
    pub fn unblock(&mut self) {
        let mut command = Command::new("socat");
        command.arg(format!("UNIX-LISTEN:{},fork", self.socket.display()));
        command.arg(format!("UNIX-CONNECT:{}", socket().display()));
        self.relay = Some(Process::start("socat", command));
        wait_until("the way to the engine", PATIENCE, || self.socket.exists());
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.block();
    }
}

/// What the engine tells of a container, in Docker's terms; `None` if it is gone.
pub fn inspect(container: &str) -> Option<Value> {
    let mut facts = serde_json::from_str::<Value>(&docker(&["inspect", container])).ok()?.get(0).cloned()?;
    if is_podman() {
        let pid = facts["State"]["Pid"].as_u64();
        let host = &mut facts["HostConfig"];
        for limit in host["Ulimits"].as_array_mut().into_iter().flatten() {
            let name = limit["Name"].as_str().map(|name| name.trim_start_matches("RLIMIT_").to_lowercase());
            limit["Name"] = name.into();
        }
        let log_size = host["LogConfig"]["Size"].clone();
        host["LogConfig"]["Config"] = serde_json::json!({ "max-size": log_size });
        // Podman obeys this wish, and tells of another one.
        let mounts = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok());
        if mounts.is_some_and(|mounts| !mounts.contains(" /dev/shm ")) {
            host["IpcMode"] = "none".into();
        }
    }
    Some(facts)
}

/// A container's first process as the kernel has it, whatever the engine says of it.
#[derive(Debug)]
pub struct Inside {
    pid: u64,
    container: String,
}

impl Inside {
    /// A running container, on this machine.
    ///
    /// # Panics
    /// If it does not run.
    pub fn of(container: &str) -> Self {
        let pid = inspect(container).and_then(|facts| facts["State"]["Pid"].as_u64());
        Self { pid: pid.filter(|pid| *pid > 0).expect("it runs"), container: container.to_owned() }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid)).expect("its process runs on this machine")
    }

    /// A line of the process's status.
    ///
    /// # Panics
    /// If there is no such line.
    pub fn status(&self, name: &str) -> String {
        let status = self.read("status");
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    }

    /// Bytes of memory that it may use.
    pub fn memory_bytes(&self) -> Option<u64> {
        let limit = |group: &Path| {
            let limit = fs::read_to_string(group.join("memory.max"));
            limit.or_else(|_| fs::read_to_string(group.join("memory.limit_in_bytes"))).ok()?.trim().parse().ok()
        };
        self.groups("memory").iter().filter_map(|group| limit(group)).min()
    }

    /// Processes and threads that it may have.
    pub fn processes(&self) -> Option<u64> {
        let limit = |group: &Path| fs::read_to_string(group.join("pids.max")).ok()?.trim().parse().ok();
        self.groups("pids").iter().filter_map(|group| limit(group)).min()
    }

    /// Cores that it may use.
    pub fn cores(&self) -> Option<f64> {
        let number = |group: &Path, file| fs::read_to_string(group.join(file)).ok()?.trim().parse::<f64>().ok();
        let limit = |group: &Path| {
            if let Ok(both) = fs::read_to_string(group.join("cpu.max")) {
                let (quota, period) = both.trim().split_once(' ')?;
                return Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?);
            }
            let quota = number(group, "cpu.cfs_quota_us").filter(|quota| *quota > 0.0)?;
            Some(quota / number(group, "cpu.cfs_period_us")?)
        };
        self.groups("cpu").iter().filter_map(|group| limit(group)).reduce(f64::min)
    }

    /// The container's control groups with this controller, of either version.
    fn groups(&self, controller: &str) -> Vec<PathBuf> {
        let listed = self.read("cgroup");
        let group_of = |line: &str, controllers: &str| {
            let mut parts = line.splitn(3, ':').skip(1);
            let is_it = parts.next()?.split(',').any(|one| one == controllers);
            is_it.then(|| parts.next().unwrap_or_default().trim_start_matches('/').to_owned())
        };
        let first = listed.lines().find_map(|line| group_of(line, controller));
        let root = Path::new("/sys/fs/cgroup");
        let own = match first {
            Some(group) => root.join(controller).join(group),
            None => root.join(listed.lines().find_map(|line| group_of(line, "")).expect("a group of either version")),
        };
        let is_ours = |group: &&Path| group.display().to_string().contains(&self.container);
        own.ancestors().take_while(is_ours).map(Path::to_owned).collect()
    }
}
