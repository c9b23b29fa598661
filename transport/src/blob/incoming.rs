//! Owns one incoming blob: decompressed, hashed while it is written, verified.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use proto_msgs::{BlobIndex, Digest};

/// One incoming blob: decompressed, and hashed while it is written.
#[derive(Debug)]
pub struct Incoming {
    blob: BlobIndex,
    size_bytes: u64,
    announced: Digest,
    hasher: blake3::Hasher,
    written_bytes: u64,
    sink: Sink,
    sync: bool,
}

#[derive(Debug)]
enum Sink {
    /// Removed again unless the blob becomes complete.
    File {
        file: File,
        path: PathBuf,
    },
    Memory(Vec<u8>),
    /// Handed over.
    Done,
}

/// Why a blob did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// The file system or the quota is full.
    #[error("no space left for {}", path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The bytes have another digest than announced.
    #[error("blob {blob} is damaged: announced as {}, arrived as {}", announced.short(), arrived.short())]
    DigestMismatch {
        /// The blob.
        blob: BlobIndex,
        /// The announced digest.
        announced: Digest,
        /// The digest of the bytes that arrived.
        arrived: Digest,
    },
    /// The peer broke the protocol: a gap, more bytes than announced, a bad frame, or more than the window.
    #[error("the peer broke the protocol at blob {blob}: {reason}")]
    Protocol {
        /// The blob.
        blob: BlobIndex,
        /// What the peer did.
        reason: String,
    },
}

/// A verified blob.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Content {
    /// In the file that was asked for. The file belongs to the caller: it stays when this value is dropped.
    File(PathBuf),
    /// In memory.
    Memory(Bytes),
}

impl Incoming {
    /// An incoming blob that is written to a new file at `path`.
    ///
    /// # Errors
    /// If the file cannot be created, or there is no room for it.
    pub fn to_file(path: &Path, blob: BlobIndex, size_bytes: u64, digest: Digest) -> Result<Self, IncomingError> {
        let file =
            OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| write_error(path, error))?;
        let sink = Sink::File { file, path: path.into() };
        let incoming = Self::new(blob, size_bytes, digest, sink);
        incoming.reserve()?;
        Ok(incoming)
    }

    /// An incoming blob that is kept in memory, which grows with the bytes that arrive.
    pub fn to_memory(blob: BlobIndex, size_bytes: u64, digest: Digest) -> Self {
        Self::new(blob, size_bytes, digest, Sink::Memory(Vec::new()))
    }

    /// Makes [`Incoming`] flush the file to disk before it counts as complete (for files that must survive a power
    /// cut).
    pub fn sync(mut self) -> Self {
        self.sync = true;
        self
    }

    fn new(blob: BlobIndex, size_bytes: u64, announced: Digest, sink: Sink) -> Self {
        let hasher = blake3::Hasher::new();
        Self { blob, size_bytes, announced, hasher, written_bytes: 0, sink, sync: false }
    }

    pub(crate) fn blob(&self) -> BlobIndex {
        self.blob
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn goes_to_memory(&self) -> bool {
        matches!(self.sink, Sink::Memory(_))
    }

    /// Bytes in place, from the blob's beginning.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.written_bytes == self.size_bytes
    }

    /// Appends the next bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), IncomingError> {
        match &mut self.sink {
            Sink::File { file, path } => {
                file.write_all_at(bytes, self.written_bytes).map_err(|error| write_error(path, error))?;
            }
            Sink::Memory(memory) => memory.extend_from_slice(bytes),
            Sink::Done => return Err(self.broken("bytes after its end".into())),
        }
        // After the write, which has brought the bytes into the cache.
        self.hasher.update(bytes);
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Verifies the complete blob and hands it over.
    pub(crate) fn finish(&mut self) -> Result<Content, IncomingError> {
        let arrived = Digest::from(self.hasher.finalize());
        if arrived != self.announced {
            return Err(IncomingError::DigestMismatch { blob: self.blob, announced: self.announced, arrived });
        }
        if let (Sink::File { file, path }, true) = (&self.sink, self.sync) {
            file.sync_data().map_err(|error| write_error(path, error))?;
        }
        match std::mem::replace(&mut self.sink, Sink::Done) {
            Sink::File { path, .. } => Ok(Content::File(path)),
            Sink::Memory(memory) => Ok(Content::Memory(memory.into())),
            Sink::Done => Err(self.broken("complete twice".into())),
        }
    }

    /// The error for a peer that broke the protocol.
    pub(crate) fn broken(&self, reason: String) -> IncomingError {
        IncomingError::Protocol { blob: self.blob, reason }
    }

    /// Checks and reserves room for the whole blob: a refusal now is better than one after an hour.
    fn reserve(&self) -> Result<(), IncomingError> {
        let (Sink::File { file, path }, Ok(size @ 1..)) = (&self.sink, i64::try_from(self.size_bytes)) else {
            return Ok(());
        };
        if let Ok(system) = fstatvfs_of(file)
            && system.f_bavail.saturating_mul(system.f_frsize) < self.size_bytes
        {
            return Err(IncomingError::DiskFull { path: path.clone() });
        }
        if is_ram_disk(file) {
            // Reserving on a RAM disk would fill it with zeros.
            return Ok(());
        }
        // SAFETY: the descriptor is open.
        if unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, size) } == 0 {
            return Ok(());
        }
        match write_error(path, io::Error::last_os_error()) {
            full @ IncomingError::DiskFull { .. } => Err(full),
            // The file system cannot reserve. If it is full, a later write will fail.
            _ => Ok(()),
        }
    }
}

fn fstatvfs_of(file: &File) -> io::Result<libc::statvfs> {
    let mut system = std::mem::MaybeUninit::uninit();
    // SAFETY: the descriptor is open; on success the structure is filled.
    unsafe {
        match libc::fstatvfs(file.as_raw_fd(), system.as_mut_ptr()) {
            0 => Ok(system.assume_init()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn is_ram_disk(file: &File) -> bool {
    let mut system = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the descriptor is open; on success the structure is filled.
    unsafe {
        libc::fstatfs(file.as_raw_fd(), system.as_mut_ptr()) == 0 && system.assume_init().f_type == libc::TMPFS_MAGIC
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Sink::File { path, .. } = &self.sink {
            let _ = fs::remove_file(path); // If it fails, the next start sweeps the file.
        }
    }
}

fn write_error(path: &Path, error: io::Error) -> IncomingError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IncomingError::DiskFull { path: path.into() },
        _ => IncomingError::Write { path: path.into(), source: error },
    }
}
