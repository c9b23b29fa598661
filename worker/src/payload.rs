//! Bytes of one input or output: small ones in memory, large ones in a file.

use std::sync::Arc;

use bytes::Bytes;

use crate::blobs::Spooled;

/// Inputs and outputs up to this size stay in memory: a photo does, a film does not. One attempt holds a few of them, and
/// there are only as many attempts as slots and finished results.
pub(crate) const MEMORY_BYTES_MAX: u64 = 4 << 20;

/// Where the bytes are. Clones share them.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    /// Here.
    Memory(Bytes),
    /// In a file that is deleted with the last clone.
    File(Arc<Spooled>),
}

impl Payload {
    /// Their number.
    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(file) => file.size_bytes(),
        }
    }
}
