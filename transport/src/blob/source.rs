//! Owns the origin of a blob's bytes: a file, read piece by piece, or memory.
//!
//! Files are read, not mapped: if somebody shortens a mapped file, the process dies.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use proto_msgs::Digest;

use super::digest;

/// The origin of a blob's bytes.
#[derive(Debug)]
pub struct Source(Kind);

#[derive(Debug)]
enum Kind {
    File { file: File, path: PathBuf, stamp: Stamp },
    Memory(Bytes),
}

/// Identifies one state of a file: size, and seconds and nanoseconds of the last change.
type Stamp = (u64, i64, i64);

/// Why blobs were not sent.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The file vanished or cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is no longer the one that was announced.
    #[error("{} changed while it was being sent: submit it again once it is written completely", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The peer acknowledged bytes that were never sent, or asked for bytes that do not exist.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// The upload was dropped, or its peer flooded it with feedback or acknowledged nothing for too long.
    #[error("the upload was stopped")]
    Stopped,
}

impl Source {
    /// A file as source. Its size and time are remembered: a change during the upload is an error.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn file(path: &Path) -> Result<Self, UploadError> {
        let read_error = |source| UploadError::Read { path: path.into(), source };
        let file = File::open(path).map_err(read_error)?;
        let metadata = file.metadata().map_err(read_error)?;
        if !metadata.is_file() {
            return Err(read_error(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        Ok(Self(Kind::File { file, path: path.into(), stamp: stamp_of(&metadata) }))
    }

    /// Bytes in memory.
    pub fn memory(bytes: Bytes) -> Self {
        Self(Kind::Memory(bytes))
    }

    pub(crate) fn is_in_memory(&self) -> bool {
        matches!(self.0, Kind::Memory(_))
    }

    /// Length of the blob.
    pub fn size_bytes(&self) -> u64 {
        match &self.0 {
            Kind::File { stamp, .. } => stamp.0,
            Kind::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// BLAKE3 of the whole blob, read by the calling thread and helpers, one thread per core at most.
    ///
    /// # Errors
    /// If the file cannot be read or changed meanwhile.
    pub fn digest(&self) -> Result<Digest, UploadError> {
        digest::digest(self.size_bytes(), |buffer, offset| self.read(buffer, offset))
    }

    /// These bytes without a copy; `None` if they are not in memory.
    pub(crate) fn slice(&self, offset: u64, len: usize) -> Option<Bytes> {
        match &self.0 {
            Kind::Memory(bytes) => Some(bytes.slice(offset as usize..offset as usize + len)),
            Kind::File { .. } => None,
        }
    }

    /// Fills `buffer` from `offset` on. The range must lie within the blob.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), UploadError> {
        match &self.0 {
            Kind::Memory(bytes) => {
                buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
                Ok(())
            }
            Kind::File { file, path, stamp } => {
                let read_error = |source| UploadError::Read { path: path.clone(), source };
                match file.read_exact_at(buffer, offset) {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Err(UploadError::Changed { path: path.clone() });
                    }
                    other => other.map_err(read_error)?,
                }
                // Checked after reading, so that a change before or during the reading is seen.
                if stamp_of(&file.metadata().map_err(read_error)?) != *stamp {
                    return Err(UploadError::Changed { path: path.clone() });
                }
                Ok(())
            }
        }
    }
}

fn stamp_of(file: &Metadata) -> Stamp {
    (file.len(), file.mtime(), file.mtime_nsec())
}
