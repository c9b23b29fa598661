//! Owns how many files and connections this process may have open: each peer is one.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit of open files as far as an unprivileged process may, and returns it. Systems start services and
/// shells with 1,024, for programs that use `select`; this one does not.
///
/// Beyond the limit, peers wait unseen in the kernel's queue, and libzmq tries again without a pause.
///
/// # Errors
/// If the system gives no answer. The limit is then what it was.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}
