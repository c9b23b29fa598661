//! The state folder: its worker, its lock, and the count of lives.
//!
//! Owns `lock`, `worker-id`, `epoch`, the id's name on this machine, and the names of the subfolders. Never: what is
//! inside the subfolders.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::{SocketAddr, UnixListener},
        },
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt},
        statfs::{TMPFS_MAGIC, statfs},
    },
    unistd::geteuid,
};
use proto_msgs::{Epoch, WorkerId};
use tracing::warn;
use uuid::Uuid;

use crate::clear::clear;

/// Bits of an epoch below the count of starts: milliseconds until the year 2109, and four million starts above them.
const EPOCH_TIME_BITS: u32 = 42;

/// The largest number in these bits.
const EPOCH_TIME_MAX: u64 = (1 << EPOCH_TIME_BITS) - 1;

/// A file system in memory that every Linux has.
const SHARED_MEMORY: &str = "/dev/shm";

/// The locked state folder of a running worker. While this value lives, no second worker uses the folder.
#[derive(Debug)]
pub(crate) struct StateDir {
    root: PathBuf,
    /// The worker's id, which stays across restarts.
    pub(crate) worker: WorkerId,
    /// The epoch of this life: greater than at every earlier start.
    pub(crate) epoch: Epoch,
    /// Whether no other worker of this user runs here under the same id.
    is_alone: bool,
    /// Taken by the first process on this machine that runs under the worker's id. A copy of the folder has a lock file
    /// of its own; this name is one for all copies, and goes with its process however that ends. It protects within one
    /// network namespace: workers in containers with networks of their own do not see each other's.
    _name: Option<UnixListener>,
    /// Given back last, so that who gets the lock next finds the name free.
    _lock: Flock<File>,
}

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("another mesh-worker uses the state folder {0}: stop it, or give this one its own --state-dir")]
    InUse(PathBuf),
    #[error("{path} does not hold {what}: restore it, or delete it to let this worker begin anew under a new id")]
    Garbled { path: PathBuf, what: &'static str },
    #[error(
        "another mesh-worker runs with a copy of the state folder {} and is registered under the same id {id}: \
         delete {}/worker-id and start this one again, so that it gets an id of its own", .root.display(), .root.display()
    )]
    Copied { id: WorkerId, root: PathBuf },
    #[error(
        "the disk of the state folder is full: {path}: {error}: free some MiB there, or give another one with --state-dir"
    )]
    Full { path: PathBuf, error: io::Error },
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
        let (is_alone, name) = take_name(&format!("mesh-worker-{worker}"));
        Ok(Self { root, worker, epoch, is_alone, _name: name, _lock: lock })
    }

    /// Whether what is found under the worker's id on this machine was left by an earlier life. Else it may be in use: a
    /// process with a copy of this folder runs here, and the broker will tell one of the two to leave.
    pub(crate) fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Counts this start no more: another process with a copy of the folder stays, and must stay however often a
    /// supervisor starts this one again.
    pub(crate) fn take_back_start(&self) {
        let (path, before) = (self.root.join("epoch"), (self.epoch.0 >> EPOCH_TIME_BITS).saturating_sub(1));
        if let Err(error) = replace_file(&path, format!("{before}\n").as_bytes()) {
            warn!(path = %path.display(), %error, "this start still counts");
        }
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

    /// A new folder for the sockets of runners that are child processes. What an earlier life has left in memory goes.
    pub(crate) fn runners(&self) -> Result<PathBuf, StateError> {
        if self.is_alone() {
            let _ = clear(&self.place_in_memory()); // Usually there is none.
        }
        let path = self.root.join("runners");
        make_anew(&path).map_err(|error| io_error(&path, error))?;
        Ok(path)
    }

    fn place_in_memory(&self) -> PathBuf {
        Path::new(SHARED_MEMORY).join(format!("mesh-worker-{}", self.worker))
    }

    /// A new folder for the sockets of runners in containers. A container can write there: in memory that counts as the
    /// container's, on the disk it could fill the disk.
    pub(crate) fn runners_in_memory(&self) -> Result<PathBuf, StateError> {
        let path = self.place_in_memory();
        let is_memory = statfs(SHARED_MEMORY).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        let made = match (is_memory, self.is_alone()) {
            (true, true) => make_anew(&path),
            (true, false) => Err(io::Error::other("in use by another mesh-worker with the same id")),
            (false, _) => Err(io::Error::other("not a file system in memory")),
        };
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
    match clear(path) {
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

/// Takes a name on this machine. Tells whether no other worker of this user has it, and how it is held.
fn take_name(name: &str) -> (bool, Option<UnixListener>) {
    let error = match SocketAddr::from_abstract_name(name).and_then(|name| UnixListener::bind_addr(&name)) {
        Ok(listener) => return (true, Some(listener)),
        Err(error) => error,
    };
    if error.kind() != io::ErrorKind::AddrInUse {
        warn!(name, %error, "no name on this machine: a copy of the state folder would not be noticed");
        return (true, None);
    }
    match holder_of(name) {
        Ok(uid) if uid != geteuid().as_raw() => {
            warn!(name, uid, "another user holds this worker's name: a copy of the state folder would not be noticed");
            (true, None)
        }
        // Who cannot be asked counts as a worker: what is in use must not be taken away.
        Ok(_) | Err(_) => (false, None),
    }
}

/// The user whose process listens under a name on this machine. Never waits: nobody accepts connections there, and a
/// full queue of them refuses more.
fn holder_of(name: &str) -> nix::Result<libc::uid_t> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let asking = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(asking.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    Ok(socket::getsockopt(&asking, sockopt::PeerCredentials)?.uid())
}

fn read_or_make_id(path: &Path) -> Result<WorkerId, StateError> {
    if let Some(text) = read(path)? {
        return text.trim().parse().map_err(|_| StateError::Garbled { path: path.to_owned(), what: "a worker id" });
    }
    let id = WorkerId::from(Uuid::now_v7());
    replace_file(path, format!("{id}\n").as_bytes()).map_err(|error| io_error(path, error))?;
    Ok(id)
}

/// Counts this start. Two workers that start with copies of one folder have the same count: of them, the one that
/// started first has the greater epoch and stays.
fn next_epoch(path: &Path) -> Result<Epoch, StateError> {
    let last: u64 = match read(path)? {
        None => 0,
        Some(text) => {
            text.trim().parse().map_err(|_| StateError::Garbled { path: path.to_owned(), what: "a number" })?
        }
    };
    let count = last.saturating_add(1);
    replace_file(path, format!("{count}\n").as_bytes()).map_err(|error| io_error(path, error))?;
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unix_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX) & EPOCH_TIME_MAX;
    Ok(Epoch((count.min(u64::MAX >> EPOCH_TIME_BITS) << EPOCH_TIME_BITS) | (EPOCH_TIME_MAX - unix_ms)))
}

fn read(path: &Path) -> Result<Option<String>, StateError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path, error)),
    }
}

fn io_error(path: &Path, error: io::Error) -> StateError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StateError::Full { path, error },
        _ => StateError::Io { path, error },
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_restarted_worker_keeps_its_id_and_counts_its_lives() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let root = home.path().join("deep/worker");
        let first = StateDir::open(&root).expect("a new folder");
        let (worker, epoch) = (first.worker, first.epoch);
        drop(first);
        let second = StateDir::open(&root).expect("the same folder");
        assert_eq!(second.worker, worker);
        assert!(second.epoch > epoch, "{:?} after {epoch:?}", second.epoch);
        assert_eq!(fs::read_to_string(root.join("epoch")).expect("counted"), "2\n");
    }

    #[test]
    fn of_two_copies_with_equally_many_starts_the_first_that_runs_has_the_greater_epoch() {
        let [first, second] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
        let first = StateDir::open(first.path()).expect("a new folder").epoch;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(2) {}
        let second = StateDir::open(second.path()).expect("a new folder").epoch;
        assert!(first > second, "{first:?} and {second:?}");
    }

    #[test]
    fn two_workers_never_share_a_folder() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let _first = StateDir::open(home.path()).expect("a new folder");
        assert!(matches!(StateDir::open(home.path()), Err(StateError::InUse(_))));
    }

    #[test]
    fn a_worker_that_uses_containers_no_more_leaves_no_sockets_of_theirs() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let killed = StateDir::open(home.path()).expect("a new folder");
        let sockets = killed.runners_in_memory().expect("a folder");
        if sockets.starts_with(home.path()) {
            return crate::batch::tests::skip("there is no file system in memory");
        }
        fs::create_dir(sockets.join("1")).expect("it is ours");
        drop(killed);
        // A process that another test starts just now has copies of the lock and the name until it runs its program.
        let begun = Instant::now();
        let again = loop {
            match StateDir::open(home.path()) {
                Ok(again) if again.is_alone() => break again,
                _ => assert!(begun.elapsed() < Duration::from_secs(30), "nobody else runs"),
            }
        };
        again.runners().expect("a folder on the disk");
        assert!(!sockets.exists());
    }

    #[test]
    fn a_copy_takes_nothing_from_the_one_that_runs() {
        let [first, copy] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
        let running = StateDir::open(first.path()).expect("a new folder");
        fs::copy(first.path().join("worker-id"), copy.path().join("worker-id")).expect("copying");
        let sockets = running.runners_in_memory().expect("a folder");

        let second = StateDir::open(copy.path()).expect("its lock is another file");

        assert!(running.is_alone() && !second.is_alone());
        assert_ne!(second.runners_in_memory().expect("a folder of its own"), sockets);
        assert!(sockets.exists());
        drop((running, second));
        // A process that another test starts just now has copies of the lock and the name until it runs its program.
        let begun = Instant::now();
        while !StateDir::open(copy.path()).is_ok_and(|again| again.is_alone()) {
            assert!(begun.elapsed() < Duration::from_secs(30), "nobody else runs");
            std::thread::yield_now();
        }
        let _ = fs::remove_dir(sockets);
    }

    #[test]
    fn who_holds_a_name_is_told_however_often_it_is_asked() {
        let name = format!("mesh-worker-{}", Uuid::now_v7());
        assert!(holder_of(&name).is_err(), "nobody yet");
        let (is_alone, held) = take_name(&name);
        assert!(is_alone && held.is_some());
        assert_eq!(holder_of(&name), Ok(geteuid().as_raw()));
        // More often than connections wait in a queue.
        for _ in 0..5000 {
            assert!(matches!(take_name(&name), (false, None)));
        }
    }

    #[test]
    fn another_user_s_name_is_nobody_s_worker() {
        if !geteuid().is_root() {
            return crate::batch::tests::skip("becoming another user needs root");
        }
        let name = format!("mesh-worker-{}", Uuid::now_v7());
        let squatting = || {
            // SAFETY: the bare system call has no pointers, and changes the effective user of this thread alone.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1_i32, 65534_i32, -1_i32) };
            (changed, take_name(&name))
        };
        let squatted = std::thread::scope(|scope| scope.spawn(squatting).join()).expect("no panic");
        assert!(matches!(squatted, (0, (true, Some(_)))), "{squatted:?}");
        assert!(matches!(take_name(&name), (true, None)));
    }

    #[test]
    fn a_garbled_id_is_named_and_not_replaced() {
        let home = tempfile::tempdir().expect("a temporary folder");
        fs::write(home.path().join("worker-id"), "who am I").expect("writing");
        let error = StateDir::open(home.path()).expect_err("garbled");
        assert!(error.to_string().contains("worker-id"), "{error}");
    }
}
