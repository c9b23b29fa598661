//! Room in the quota, promised and given back. Owns the giving back, which never waits on a thread of the runtime.

use std::{mem, path::PathBuf, sync::Arc};

use tokio::runtime::Handle;

use super::{Index, Shared};

/// Room in the quota for bytes that are no blob; given back when dropped.
#[derive(Debug)]
pub(crate) struct Room {
    pub(super) shared: Arc<Shared>,
    pub(super) bytes: u64,
    /// The file that will hold the bytes, if the store named it.
    pub(super) file: Option<PathBuf>,
}

impl Room {
    /// Gives the room back to the index, which the caller has locked.
    pub(super) fn give_back(&mut self, index: &mut Index) {
        index.take_back(mem::take(&mut self.bytes), self.file.take());
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let (shared, bytes, file) = (self.shared.clone(), mem::take(&mut self.bytes), self.file.take());
        if bytes == 0 && file.is_none() {
            return;
        }
        // The caller may be the one thread that carries all transfers, and who holds the index may wait for a disk.
        match (self.shared.index.try_lock(), Handle::try_current()) {
            (Some(mut index), _) => index.take_back(bytes, file),
            (None, Ok(runtime)) => drop(runtime.spawn_blocking(move || shared.index().take_back(bytes, file))),
            (None, Err(_)) => shared.index().take_back(bytes, file),
        }
    }
}
