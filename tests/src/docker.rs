//! The container engine's view of the containers that workers start.

use std::process::Command;

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

/// The output of `docker inspect` for a container; `None` if it is gone.
pub fn inspect(container: &str) -> Option<Value> {
    serde_json::from_str::<Value>(&docker(&["inspect", container])).ok()?.get(0).cloned()
}
