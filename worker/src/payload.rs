//! Bytes of one input or output: small ones in memory, large ones in a file.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;

use crate::blobs::Spooled;

/// Inputs, or outputs, of one attempt stay in memory up to this size together: a photo does, a film does not. There are
/// only as many attempts as slots and finished results.
const MEMORY_BYTES_MAX: u64 = 4 << 20;

/// What one attempt may still keep in memory.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    left_bytes: u64,
}

impl Default for MemoryBudget {
    fn default() -> Self {
        Self { left_bytes: MEMORY_BYTES_MAX }
    }
}

impl MemoryBudget {
    /// Whether this much more may be kept in memory; if so, it is counted.
    pub(crate) fn take(&mut self, size_bytes: u64) -> bool {
        let left_bytes = self.left_bytes.checked_sub(size_bytes);
        self.left_bytes = left_bytes.unwrap_or(self.left_bytes);
        left_bytes.is_some()
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
        /// Its length.
        size_bytes: u64,
        /// Deletes the file with the last clone; `None` if it is kept for a detached attempt.
        owner: Option<Arc<Spooled>>,
    },
}

impl Payload {
    /// The file's, which is deleted with the last clone.
    pub(crate) fn spooled(file: Spooled) -> Self {
        Self::File { path: file.path().to_owned(), size_bytes: file.size_bytes(), owner: Some(Arc::new(file)) }
    }

    /// Their number.
    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { size_bytes, .. } => *size_bytes,
        }
    }
}
