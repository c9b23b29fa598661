//! Files of large outputs. Owns the files, and that none stays behind, even if a process was killed. Never: their
//! content.
//!
//! ```text
//!   state_dir/spool/lock         held while a folder is made or swept
//!   state_dir/spool/ID/lock      held as long as anything of ID lives: what is not held is swept by the next to come
//!   state_dir/spool/ID/ID        an output
//! ```

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;

use crate::ConnectError;

/// The folder with the large outputs of one connection.
#[derive(Debug)]
pub(crate) struct Spool {
    folder: Arc<Folder>,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Drop for Folder {
    fn drop(&mut self) {
        // If this fails, the next process to start sweeps the folder.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A place for one output. Dropping it removes the file, if there is one.
#[derive(Debug)]
pub(crate) struct Spooled {
    path: PathBuf,
    size_bytes: u64,
    _folder: Arc<Folder>,
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // The file may never have been written. If it cannot be removed, it goes with the folder.
        let _ = fs::remove_file(&self.path);
    }
}

impl Spooled {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The output's length once it is complete.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

impl Spool {
    /// Creates a folder within the state folder, and removes the folders that killed processes left.
    pub(crate) fn new(state_dir: &Path) -> Result<Self, ConnectError> {
        let spool = state_dir.join("spool");
        Self::within(&spool).map_err(|source| ConnectError::State { path: spool, source })
    }

    fn within(spool: &Path) -> io::Result<Self> {
        fs::create_dir_all(spool)?;
        // This lock keeps others from sweeping the folder between its creation and its locking.
        let _making = locked(&spool.join("lock"))?;
        for entry in fs::read_dir(spool)?.flatten() {
            sweep(&entry.path());
        }
        let path = spool.join(Uuid::new_v4().to_string());
        fs::create_dir(&path)?;
        let lock = locked(&path.join("lock"))?;
        Ok(Self { folder: Arc::new(Folder { path, _lock: lock }) })
    }

    /// Reserves a path for an output of this length.
    pub(crate) fn place(&self, size_bytes: u64) -> Spooled {
        let path = self.folder.path.join(Uuid::new_v4().to_string());
        Spooled { path, size_bytes, _folder: self.folder.clone() }
    }
}

fn locked(path: &Path) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    // On a file system without locks nothing is ever swept, which is the lesser evil.
    let _ = file.lock();
    Ok(file)
}

/// Removes a folder whose lock nobody holds. A plain file cannot contain a lock and is left alone.
fn sweep(folder: &Path) {
    let lock = File::options().write(true).create(true).truncate(false).open(folder.join("lock"));
    if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
        // If this fails, the next process to start tries again.
        let _ = fs::remove_dir_all(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_swept_and_what_another_holds_is_not() {
        let state = tempfile::tempdir().unwrap();
        let held = Spool::new(state.path()).unwrap().place(9);
        fs::write(held.path(), "an output").unwrap();
        let killed = state.path().join("spool/killed");
        fs::create_dir(&killed).unwrap();
        fs::write(killed.join("lock"), "").unwrap();
        fs::write(killed.join("output"), "nobody's").unwrap();

        let _next = Spool::new(state.path()).unwrap();

        assert!(!killed.exists() && held.path().exists());
    }

    #[test]
    fn the_folder_goes_with_the_last_output_in_it() {
        let state = tempfile::tempdir().unwrap();
        let spool = Spool::new(state.path()).unwrap();
        let folder = spool.folder.path.clone();
        let (first, last) = (spool.place(9), spool.place(9));
        fs::write(first.path(), "an output").unwrap();
        let path = first.path().to_owned();

        drop((spool, first));

        assert!(!path.exists() && folder.exists(), "one output is still wanted");
        drop(last);
        assert!(!folder.exists());
    }
}
