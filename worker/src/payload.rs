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

use crate::blobs::Spooled;

/// Inputs, or outputs, of one attempt stay in memory up to this size together: a photo does, a film does not.
pub(crate) const MEMORY_BYTES_MAX: u64 = 4 << 20;

/// What all attempts together keep in memory. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct MemoryUse {
    used_bytes: Arc<AtomicU64>,
    max_bytes: u64,
}

/// What the inputs, or the outputs, of one attempt have of it. Given back when dropped.
#[derive(Debug)]
pub(crate) struct MemoryShare {
    of: MemoryUse,
    bytes: u64,
}

impl MemoryUse {
    /// Nothing is kept yet.
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self { used_bytes: Arc::default(), max_bytes }
    }

    /// For an attempt that keeps nothing yet.
    pub(crate) fn share(&self) -> MemoryShare {
        MemoryShare { of: self.clone(), bytes: 0 }
    }
}

impl MemoryShare {
    /// Whether so much more may be kept in memory.
    pub(crate) fn has_room_for(&self, size_bytes: u64) -> bool {
        let all = self.of.used_bytes.load(Ordering::Relaxed);
        self.bytes.saturating_add(size_bytes) <= MEMORY_BYTES_MAX && all.saturating_add(size_bytes) <= self.of.max_bytes
    }

    /// Whether so much more may be kept in memory; if so, it is counted.
    pub(crate) fn take(&mut self, size_bytes: u64) -> bool {
        let has_room = self.has_room_for(size_bytes);
        if has_room {
            self.change(self.bytes + size_bytes);
        }
        has_room
    }

    /// From now on it is so much. Rounds of the limit by what runs at the same time are small and pass.
    pub(crate) fn change(&mut self, bytes: u64) {
        self.of.used_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.of.used_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }

    /// How much it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        self.change(0);
    }
}

/// Where the bytes are. Clones share them.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    /// Here.
    Memory(Bytes),
    /// In this file.
    File {
        /// Where.
        path: PathBuf,
        /// Where in the file they begin: 0 but for slices.
        offset: u64,
        /// Their number: the file's length but for slices.
        size_bytes: u64,
        /// Deletes the file with the last clone; `None` if it is kept for a detached attempt.
        owner: Option<Arc<Spooled>>,
    },
}

impl Payload {
    /// The file's, which is deleted with the last clone.
    pub(crate) fn spooled(file: Spooled) -> Self {
        let (path, size_bytes) = (file.path().to_owned(), file.size_bytes());
        Self::File { path, offset: 0, size_bytes, owner: Some(Arc::new(file)) }
    }

    /// Their number.
    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { size_bytes, .. } => *size_bytes,
        }
    }

    /// The file's owner, if they are in one that goes with its last owner.
    pub(crate) fn owner(&self) -> Option<Arc<Spooled>> {
        match self {
            Self::Memory(_) => None,
            Self::File { owner, .. } => owner.clone(),
        }
    }

    /// Some of the bytes, without copying them. What lies beyond the end is left out.
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

    /// The same bytes in memory of their own, if they are in memory that others may hold on to.
    pub(crate) fn detached(self) -> Self {
        match self {
            Self::Memory(bytes) => Self::Memory(Bytes::copy_from_slice(&bytes)),
            file => file,
        }
    }

    /// All of them. Blocks if they are in a file.
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
