//! The container engine's view of the containers that workers start.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

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
    match Command::new("docker").args(["image", "inspect", RUNNER_IMAGE]).output() {
        Err(error) => Some(format!("there is no docker command ({error})")),
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Some(format!("the image {RUNNER_IMAGE} is not there: run docker/build-image ({said})"))
        }
        Ok(_) => None,
    }
}

fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker").args(arguments).output().expect("is_ready() was asked before");
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

/// The output of `docker inspect` for a container; `None` if it is gone.
pub fn inspect(container: &str) -> Option<Value> {
    serde_json::from_str::<Value>(&docker(&["inspect", container])).ok()?.get(0).cloned()
}
