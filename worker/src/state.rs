//! The state folder: its worker, its lock, and the count of lives.
//!
//! Owns `lock`, `worker-id`, `epoch` and the names of the subfolders. Never: what is inside the subfolders.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::{TMPFS_MAGIC, statfs},
};
use proto_msgs::{Epoch, WorkerId};
use tracing::warn;
use uuid::Uuid;

/// A file system in memory that every Linux has.
const SHARED_MEMORY: &str = "/dev/shm";

/// The locked state folder of a running worker. While this value lives, no second worker uses the folder.
#[derive(Debug)]
pub(crate) struct StateDir {
    root: PathBuf,
    /// The worker's id, which stays across restarts.
    pub(crate) worker: WorkerId,
    /// The epoch of this life: one more than at the last start.
    pub(crate) epoch: Epoch,
    _lock: Flock<File>,
}

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("another mesh-worker uses the state folder {0}: stop it, or give this one its own --state-dir")]
    InUse(PathBuf),
    #[error("{path} does not hold {what}: restore it, or delete it to let this worker begin anew under a new id")]
    Garbled { path: PathBuf, what: &'static str },
    #[error("the state folder is not usable: {path}: {error}: give another one with --state-dir")]
    Io { path: PathBuf, error: io::Error },
}

impl StateDir {
    /// Opens the folder: creates it if needed, locks it, and counts this start.
    pub(crate) fn open(root: &Path) -> Result<Self, StateError> {
        make_private_dir(root)?;
        // Absolute, because runners start in other folders and engines resolve paths elsewhere.
        let root = root.canonicalize().map_err(|error| io_error(root, error))?;
        let lock = lock(&root)?;
        let worker = read_or_make_id(&root.join("worker-id"))?;
        let epoch = next_epoch(&root.join("epoch"))?;
        Ok(Self { root, worker, epoch, _lock: lock })
    }

    /// Path of the state folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the blob store.
    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// Folder of detached attempts.
    pub(crate) fn attempts(&self) -> PathBuf {
        self.root.join("attempts")
    }

    /// A new folder for the sockets of runners that are child processes.
    pub(crate) fn runners(&self) -> Result<PathBuf, StateError> {
        let path = self.root.join("runners");
        make_anew(&path).map_err(|error| io_error(&path, error))?;
        Ok(path)
    }

    /// A new folder for the sockets of runners in containers. A container can write there: in memory that counts as the
    /// container's, on the disk it could fill the disk.
    pub(crate) fn runners_in_memory(&self) -> Result<PathBuf, StateError> {
        let path = Path::new(SHARED_MEMORY).join(format!("mesh-worker-{}", self.worker));
        let is_memory = statfs(SHARED_MEMORY).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        let made = if is_memory { make_anew(&path) } else { Err(io::Error::other("not a file system in memory")) };
        match made {
            Ok(()) => Ok(path),
            Err(error) => {
                warn!(path = %path.display(), %error, "a hostile model in a container could fill this worker's disk");
                self.runners()
            }
        }
    }
}

/// Makes a folder that only this user can enter. Deletes the one of an earlier life.
fn make_anew(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::DirBuilder::new().mode(0o700).create(path),
    }
}

/// Creates a folder that only this user can enter, with its parents.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), StateError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| io_error(path, error))
}

/// Replaces a small file. After a power cut it has either the old or the new content.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Syncs a folder, so that renames and new files in it survive a power cut.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn lock(root: &Path) -> Result<Flock<File>, StateError> {
    let path = root.join("lock");
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| io_error(&path, error))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => StateError::InUse(root.to_owned()),
        other => io_error(&path, other.into()),
    })
}

fn read_or_make_id(path: &Path) -> Result<WorkerId, StateError> {
    if let Some(text) = read(path)? {
        return text.trim().parse().map_err(|_| StateError::Garbled { path: path.to_owned(), what: "a worker id" });
    }
    let id = WorkerId::from(Uuid::now_v7());
    replace_file(path, format!("{id}\n").as_bytes()).map_err(|error| io_error(path, error))?;
    Ok(id)
}

fn next_epoch(path: &Path) -> Result<Epoch, StateError> {
    let last: u64 = match read(path)? {
        None => 0,
        Some(text) => {
            text.trim().parse().map_err(|_| StateError::Garbled { path: path.to_owned(), what: "a number" })?
        }
    };
    let epoch = last.saturating_add(1);
    replace_file(path, format!("{epoch}\n").as_bytes()).map_err(|error| io_error(path, error))?;
    Ok(Epoch(epoch))
}

fn read(path: &Path) -> Result<Option<String>, StateError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path, error)),
    }
}

fn io_error(path: &Path, error: io::Error) -> StateError {
    StateError::Io { path: path.to_owned(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_worker_keeps_its_id_and_counts_its_lives() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let root = home.path().join("deep/worker");
        let first = StateDir::open(&root).expect("a new folder");
        let (worker, epoch) = (first.worker, first.epoch);
        drop(first);
        let second = StateDir::open(&root).expect("the same folder");
        assert_eq!((second.worker, second.epoch), (worker, Epoch(epoch.0 + 1)));
    }

    #[test]
    fn two_workers_never_share_a_folder() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let _first = StateDir::open(home.path()).expect("a new folder");
        assert!(matches!(StateDir::open(home.path()), Err(StateError::InUse(_))));
    }

    #[test]
    fn a_garbled_id_is_named_and_not_replaced() {
        let home = tempfile::tempdir().expect("a temporary folder");
        fs::write(home.path().join("worker-id"), "who am I").expect("writing");
        let error = StateDir::open(home.path()).expect_err("garbled");
        assert!(error.to_string().contains("worker-id"), "{error}");
    }
}
