//! Owns the buffers of chunks, lent to libzmq and returned after sending. Their number bounds a sender's memory, and a
//! few buffers used again and again stay in the processor's cache.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Buffers of one upload: enough to read the next chunk while others are queued, written and received.
const BUFFERS: usize = 12;

#[derive(Clone, Debug)]
pub(crate) struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    free: Mutex<Vec<Vec<u8>>>,
    returned: Notify,
}

/// A buffer on loan.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) bytes: Vec<u8>,
    pool: Arc<Shared>,
}

impl Pool {
    pub(crate) fn new() -> Self {
        let free = (0..BUFFERS).map(|_| Vec::new()).collect();
        Self(Arc::new(Shared { free: Mutex::new(free), returned: Notify::new() }))
    }

    /// A buffer, once one is free. It still contains the bytes of its last use.
    pub(crate) async fn take(&self) -> Buffer {
        loop {
            // Only one task waits here at a time, so an early notification is kept for it.
            let free = self.0.free.lock().pop();
            if let Some(bytes) = free {
                return Buffer { bytes, pool: Arc::clone(&self.0) };
            }
            self.0.returned.notified().await;
        }
    }
}

impl Buffer {
    /// The first `len` bytes, to be sent. The buffer returns to its pool afterwards.
    pub(crate) fn into_bytes(mut self, len: usize) -> Bytes {
        self.bytes.truncate(len);
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // The last used buffer is lent first: it is still in the cache.
        let bytes = std::mem::take(&mut self.bytes);
        self.pool.free.lock().push(bytes);
        self.pool.returned.notify_one();
    }
}
