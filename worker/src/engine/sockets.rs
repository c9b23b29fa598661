//! Finds the socket of a container engine. Owns the places where engines listen, and their order. Never speaks to one.

use std::{env, io, path::Path};

use nix::unistd::geteuid;
use tokio::net::UnixStream;

/// The socket that was named, else the first one of the usual ones at which an engine listens.
///
/// # Errors
/// If none was named and nobody listens at any; the text names each of them.
pub(crate) async fn find(named: Option<&str>) -> Result<String, String> {
    match named {
        Some(named) => Ok(path_of(named).to_owned()),
        None => first_listening(&usual(|name| env::var(name).ok().filter(|value| !value.is_empty()))).await,
    }
}

/// Where engines listen: what `CONTAINER_HOST` says, as for Podman's own programs, then Docker, then Podman.
fn usual(variable: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let told = variable("CONTAINER_HOST").filter(|host| host.starts_with("unix://") || host.starts_with('/'));
    let runtime_dir = variable("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{}", geteuid()));
    let of_user = ["docker.sock", "podman/podman.sock"].map(|name| format!("{runtime_dir}/{name}"));
    let [docker_of_user, podman_of_user] = of_user;
    let (docker, podman) = ("/var/run/docker.sock".to_owned(), "/run/podman/podman.sock".to_owned());
    let told = told.map(|host| path_of(&host).to_owned());
    told.into_iter().chain([docker, docker_of_user, podman_of_user, podman]).collect()
}

/// The first socket that somebody listens at. One that a dead engine left behind is there, and refuses.
async fn first_listening(sockets: &[String]) -> Result<String, String> {
    let mut tried = Vec::with_capacity(sockets.len());
    for socket in sockets {
        match UnixStream::connect(Path::new(socket)).await {
            Ok(_) => return Ok(socket.clone()),
            // It listens, and has no time: whoever asks it will find out.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(socket.clone()),
            Err(error) => tried.push(format!("{socket}: {error}")),
        }
    }
    Err(format!("tried {}", tried.join("; ")))
}

fn path_of(host: &str) -> &str {
    host.strip_prefix("unix://").unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_socket_that_a_dead_engine_left_behind_does_not_hide_one_that_answers() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let [absent, stale, live] = ["absent.sock", "stale.sock", "live.sock"].map(|name| home.path().join(name));
        drop(UnixListener::bind(&stale).expect("the folder is ours"));
        let sockets = [&absent, &stale, &live].map(|path| path.display().to_string());

        let none = first_listening(&sockets).await.expect_err("nobody listens yet");
        assert!(sockets.iter().all(|socket| none.contains(socket)), "{none}");
        assert!(none.contains("refused"), "{none}");

        let _engine = UnixListener::bind(&live).expect("the folder is ours");
        assert_eq!(first_listening(&sockets).await.as_ref(), Ok(&sockets[2]));
    }

    #[tokio::test]
    async fn a_socket_that_was_named_is_the_only_one() {
        assert_eq!(find(Some("unix:///nowhere/engine.sock")).await.as_deref(), Ok("/nowhere/engine.sock"));
    }

    #[test]
    fn what_the_environment_says_comes_before_the_usual_places() {
        let set = |name: &str| match name {
            "CONTAINER_HOST" => Some("unix:///srv/engine.sock".to_owned()),
            _ => Some("/run/user/7".to_owned()),
        };
        let usual_ones = [
            "/var/run/docker.sock",
            "/run/user/7/docker.sock",
            "/run/user/7/podman/podman.sock",
            "/run/podman/podman.sock",
        ];
        assert_eq!(usual(set)[0], "/srv/engine.sock");
        assert_eq!(usual(set)[1..], usual_ones);
        // A remote Podman has no access to this machine's models.
        let remote = |name: &str| set(name).map(|value| value.replace("unix://", "ssh://pi@attic"));
        assert_eq!(usual(remote), usual_ones);
    }
}
