//! Files with room in the quota that are not (yet) models: incoming blobs, large inputs, large outputs.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    mem,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use proto_msgs::{Digest, ErrorCode, Failure};
use tokio::runtime::Handle;

use super::{DISK_SPARE_BYTES, Room};
use proto_msgs::units::show_bytes;

/// Why the store could not keep bytes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlobError {
    /// They never will.
    #[error(
        "{} do not fit the worker's quota of {}: raise its --quota, or submit elsewhere",
        show_bytes(*.size_bytes), show_bytes(*.quota_bytes)
    )]
    QuotaExceeded { size_bytes: u64, quota_bytes: u64 },
    /// They will once others have ended.
    #[error(
        "{} do not fit the worker's quota of {} beside what is in use at present",
        show_bytes(*.size_bytes), show_bytes(*.quota_bytes)
    )]
    QuotaTaken { size_bytes: u64, quota_bytes: u64 },
    #[error(
        "{} do not fit on the worker's disk: {} can be used, besides {} that stay free: make room there, or move its \
         --state-dir",
        show_bytes(*.size_bytes), show_bytes(*.free_bytes), show_bytes(DISK_SPARE_BYTES)
    )]
    DiskFull { size_bytes: u64, free_bytes: u64 },
    #[error("the worker's disk: {0}")]
    Io(#[from] io::Error),
}

impl BlobError {
    /// The failure of a task that has not run yet and needs `needed_bytes` in all, this blob included: if there will be
    /// room, it can wait for that.
    pub(crate) fn before_run(self, needed_bytes: u64) -> Failure {
        match self {
            Self::QuotaTaken { quota_bytes, .. } if needed_bytes > quota_bytes => {
                Self::QuotaExceeded { size_bytes: needed_bytes, quota_bytes }.into()
            }
            Self::QuotaTaken { .. } => Failure::new(ErrorCode::Busy, self.to_string()),
            other => other.into(),
        }
    }
}

impl From<BlobError> for Failure {
    fn from(error: BlobError) -> Self {
        let code = match &error {
            BlobError::QuotaExceeded { .. } => ErrorCode::QuotaExceeded,
            // All disk errors have the same remedy: another worker.
            BlobError::QuotaTaken { .. } | BlobError::DiskFull { .. } | BlobError::Io(_) => ErrorCode::DiskFull,
        };
        Self::new(code, error.to_string())
    }
}

/// A path with room in the quota. Dropping it deletes the file, if there is one.
#[derive(Debug)]
pub(crate) struct Spooled {
    path: PathBuf,
    size_bytes: u64,
    /// Digest of the file's bytes, if the worker hashed them while writing.
    digest: Option<Digest>,
    /// The file's room, given back after the file is deleted.
    room: Option<Room>,
}

/// Bytes that even a slow disk deletes in a moment; more may take seconds.
const QUICKLY_GONE_BYTES: u64 = 16 << 20;

impl Spooled {
    pub(super) fn new(path: PathBuf, room: Room) -> Self {
        Self { path, size_bytes: room.bytes, digest: None, room: Some(room) }
    }

    /// Path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the complete file.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Digest of the file's bytes, if they were hashed while they were written.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Creates the file for writing.
    pub(crate) fn create(self) -> Result<Writing, BlobError> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.path)?;
        Ok(Writing { file, hasher: blake3::Hasher::new(), spooled: self })
    }

    /// Gives up a file that now has another name and owner, and hands out its room: deletes nothing, locks nothing.
    pub(super) fn disown(mut self) -> Room {
        self.path = PathBuf::new();
        self.room.take().expect("invariant: only dropping takes the room")
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        let (path, room) = (mem::take(&mut self.path), self.room.take());
        let remove = move || {
            // Fails if the file was never written or its folder is gone; the next start removes leftovers.
            let _ = fs::remove_file(path);
            drop(room);
        };
        match Handle::try_current() {
            // The caller may be the one thread that carries all transfers.
            Ok(runtime) if self.size_bytes > QUICKLY_GONE_BYTES => drop(runtime.spawn_blocking(remove)),
            _ => remove(),
        }
    }
}

/// A file that is being written and hashed.
#[derive(Debug)]
pub(crate) struct Writing {
    file: File,
    hasher: blake3::Hasher,
    spooled: Spooled,
}

impl Writing {
    /// Appends bytes. The caller stays within the reserved size.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.file.write_all(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                BlobError::DiskFull { size_bytes: self.spooled.size_bytes, free_bytes: 0 }
            }
            _ => BlobError::Io(error),
        })?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Ends the file and returns its digest.
    pub(crate) fn finish(mut self) -> (Spooled, Digest) {
        let digest = self.hasher.finalize().into();
        self.spooled.digest = Some(digest);
        (self.spooled, digest)
    }
}
