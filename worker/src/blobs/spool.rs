//! Files with room in the quota that are not (yet) models: what is on its way in, large inputs, large outputs.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    mem,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use proto_msgs::{Digest, ErrorCode, Failure};
use tokio::runtime::Handle;

use super::Room;
use crate::units::show_bytes;

/// Why bytes could not be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlobError {
    #[error(
        "{} do not fit the worker's quota of {} beside what is in use: raise its --quota, or submit elsewhere",
        show_bytes(*.size_bytes), show_bytes(*.quota_bytes)
    )]
    QuotaExceeded { size_bytes: u64, quota_bytes: u64 },
    #[error("{} do not fit on the worker's disk: {} can be used", show_bytes(*.size_bytes), show_bytes(*.free_bytes))]
    DiskFull { size_bytes: u64, free_bytes: u64 },
    #[error("the worker's disk: {0}")]
    Io(#[from] io::Error),
}

impl From<BlobError> for Failure {
    fn from(error: BlobError) -> Self {
        let code = match &error {
            BlobError::QuotaExceeded { .. } => ErrorCode::QuotaExceeded,
            // Any other trouble with the disk has the same remedy: another worker.
            BlobError::DiskFull { .. } | BlobError::Io(_) => ErrorCode::DiskFull,
        };
        Self::new(code, error.to_string())
    }
}

/// The name of a file with room in the quota; the file, if there is one, is deleted when this is dropped.
#[derive(Debug)]
pub(crate) struct Spooled {
    path: PathBuf,
    size_bytes: u64,
    /// Of its bytes, if it was written here.
    digest: Option<Digest>,
    /// Given back when the file is gone.
    room: Option<Room>,
}

/// A slow disk deletes so much in a moment; for more it may need seconds.
const QUICKLY_GONE_BYTES: u64 = 16 << 20;

impl Spooled {
    pub(super) fn new(path: PathBuf, room: Room) -> Self {
        Self { path, size_bytes: room.bytes, digest: None, room: Some(room) }
    }

    /// Where it is now.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its length once it is whole.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The digest of its bytes, if they were hashed while they were written.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Opens it for writing.
    pub(crate) fn create(self) -> Result<Writing, BlobError> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.path)?;
        Ok(Writing { file, hasher: blake3::Hasher::new(), spooled: self })
    }

    /// The file has got another name and owner: gives the room back and deletes nothing.
    pub(super) fn disown(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        let (path, room) = (mem::take(&mut self.path), self.room.take());
        let remove = move || {
            // Not there when it was never written, or when a folder above went as a whole; the next start sweeps the rest.
            let _ = fs::remove_file(path);
            drop(room);
        };
        match Handle::try_current() {
            // Whoever lets go of it may be the one thread that carries everybody's bytes.
            Ok(runtime) if self.size_bytes > QUICKLY_GONE_BYTES => drop(runtime.spawn_blocking(remove)),
            _ => remove(),
        }
    }
}

/// A file being written, hashed on the way.
#[derive(Debug)]
pub(crate) struct Writing {
    file: File,
    hasher: blake3::Hasher,
    spooled: Spooled,
}

impl Writing {
    /// Appends. The caller keeps to the size that room was made for.
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

    /// Ends the file.
    pub(crate) fn finish(mut self) -> (Spooled, Digest) {
        let digest = self.hasher.finalize().into();
        self.spooled.digest = Some(digest);
        (self.spooled, digest)
    }
}
