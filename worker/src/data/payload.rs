//! Bytes of one input or output: small ones in memory, large ones in a file.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use proto_msgs::{DType, Digest, OutputDecl};

use super::blobs::Spooled;

/// Most bytes of one attempt's inputs, or outputs, that stay in memory together: a photo does, a film does not.
pub(crate) const MEMORY_BYTES_MAX: u64 = 4 << 20;

/// Memory that the payloads of all attempts use together. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct MemoryUse {
    used_bytes: Arc<AtomicU64>,
    max_bytes: u64,
}

/// The part of [`MemoryUse`] that one attempt's inputs, or outputs, use. Given back when dropped.
#[derive(Debug)]
pub(crate) struct MemoryShare {
    of: MemoryUse,
    bytes: u64,
}

impl MemoryUse {
    /// A count of 0 with a limit of `max_bytes`.
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self { used_bytes: Arc::default(), max_bytes }
    }

    /// An empty share, for an attempt that keeps nothing yet.
    pub(crate) fn share(&self) -> MemoryShare {
        MemoryShare { of: self.clone(), bytes: 0 }
    }
}

impl MemoryShare {
    /// Whether `size_bytes` more may be kept in memory.
    pub(crate) fn has_room_for(&self, size_bytes: u64) -> bool {
        let all = self.of.used_bytes.load(Ordering::Relaxed);
        self.bytes.saturating_add(size_bytes) <= MEMORY_BYTES_MAX && all.saturating_add(size_bytes) <= self.of.max_bytes
    }

    /// Whether `size_bytes` more may be kept in memory; if so, counts them.
    pub(crate) fn take(&mut self, size_bytes: u64) -> bool {
        let has_room = self.has_room_for(size_bytes);
        if has_room {
            self.change(self.bytes + size_bytes);
        }
        has_room
    }

    /// Sets the share to `bytes`. Concurrent changes may exceed the limit slightly, for a short time.
    pub(crate) fn change(&mut self, bytes: u64) {
        self.of.used_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.of.used_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }

    /// Bytes of the share.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        self.change(0);
    }
}

/// The bytes of one input or output, in memory or in a file. Clones share them.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    /// The bytes are in memory.
    Memory(Bytes),
    /// The bytes are in a file.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Start of the bytes in the file: 0 except for slices.
        offset: u64,
        /// Number of bytes: the file's length except for slices.
        size_bytes: u64,
        /// Deletes the file with the last clone; `None` if the file belongs to a detached attempt.
        owner: Option<Arc<Spooled>>,
    },
}

impl Payload {
    /// The content of a file, which is deleted with the last clone.
    pub(crate) fn spooled(file: Spooled) -> Self {
        let (path, size_bytes) = (file.path().to_owned(), file.size_bytes());
        Self::File { path, offset: 0, size_bytes, owner: Some(Arc::new(file)) }
    }

    /// Number of bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { size_bytes, .. } => *size_bytes,
        }
    }

    pub(crate) fn is_file(&self) -> bool {
        matches!(self, Self::File { .. })
    }

    /// The bytes, if they are in memory.
    pub(crate) fn into_memory(self) -> Option<Bytes> {
        match self {
            Self::Memory(bytes) => Some(bytes),
            Self::File { .. } => None,
        }
    }

    /// The file, if it belongs to a detached attempt and goes with it.
    pub(crate) fn into_kept_file(self) -> Option<PathBuf> {
        match self {
            Self::File { path, owner: None, .. } => Some(path),
            Self::File { .. } | Self::Memory(_) => None,
        }
    }

    /// The owner that deletes the file, if there is one.
    pub(crate) fn owner(&self) -> Option<Arc<Spooled>> {
        match self {
            Self::Memory(_) => None,
            Self::File { owner, .. } => owner.clone(),
        }
    }

    /// A range of the bytes, without a copy. What lies beyond the end is left out.
    pub(crate) fn slice(&self, range: Range<u64>) -> Self {
        let end = range.end.min(self.size_bytes());
        let start = range.start.min(end);
        match self {
            Self::Memory(bytes) => Self::Memory(bytes.slice(start as usize..end as usize)),
            Self::File { path, offset, owner, .. } => {
                Self::File { path: path.clone(), offset: offset + start, size_bytes: end - start, owner: owner.clone() }
            }
        }
    }

    /// A copy of bytes in memory, so that they do not share memory with others; files stay as they are.
    pub(crate) fn detached(self) -> Self {
        match self {
            Self::Memory(bytes) => Self::Memory(Bytes::copy_from_slice(&bytes)),
            file => file,
        }
    }

    /// Reads all bytes. Blocks if they are in a file.
    pub(crate) fn read(&self) -> io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone()),
            Self::File { path, offset, size_bytes, .. } => {
                let mut bytes = vec![0; usize::try_from(*size_bytes).map_err(io::Error::other)?];
                File::open(path)?.read_exact_at(&mut bytes, *offset)?;
                Ok(bytes.into())
            }
        }
    }
}

/// One output of a task, over all items.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// Shape of one item's output.
    pub(crate) shape: Vec<u64>,
    pub(crate) digest: Digest,
    pub(crate) payload: Payload,
}

impl Output {
    /// The declaration of the output for the client.
    pub(crate) fn declaration(&self) -> OutputDecl {
        OutputDecl {
            name: self.name.clone(),
            dtype: self.dtype,
            shape: self.shape.clone(),
            digest: self.digest,
            size_bytes: self.payload.size_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_attempt_and_all_of_them_have_a_limit_and_give_back_what_they_had() {
        let all = MemoryUse::new(MEMORY_BYTES_MAX + 10);
        let (mut one, mut other) = (all.share(), all.share());
        assert!(!one.take(MEMORY_BYTES_MAX + 1) && one.take(MEMORY_BYTES_MAX) && !one.take(1));
        assert!(!other.take(11) && other.take(10));
        one.change(5);
        assert!(other.take(5));
        drop((one, other));
        assert_eq!(all.used_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_slice_of_a_file_is_read_as_a_slice_of_memory() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let path = home.path().join("file");
        std::fs::write(&path, b"0123456789").expect("writing");
        let file = Payload::File { path, offset: 0, size_bytes: 10, owner: None };
        let memory = Payload::Memory(Bytes::from_static(b"0123456789"));
        for payload in [file, memory] {
            let slice = payload.slice(2..8);
            assert_eq!(slice.slice(1..3).read().expect("the file"), "34");
            assert_eq!((slice.size_bytes(), slice.slice(4..99).size_bytes()), (6, 2));
        }
    }
}
