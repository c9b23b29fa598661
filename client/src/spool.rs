//! Where large outputs are while somebody wants them. Owns the files and that nothing stays behind, not even of a process that
//! was killed; never what is in them.
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

/// The folder of one connection.
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
        // What cannot be removed now is swept by the next to come.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A place for one output. The file, if there is one, is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Spooled {
    path: PathBuf,
    size_bytes: u64,
    _folder: Arc<Folder>,
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // It may never have been written; and the folder takes along what cannot be removed.
        let _ = fs::remove_file(&self.path);
    }
}

impl Spooled {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its length once it is whole.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

impl Spool {
    /// A new folder within the state folder, which is freed of what killed processes left.
    pub(crate) fn new(state_dir: &Path) -> Result<Self, ConnectError> {
        let spool = state_dir.join("spool");
        Self::within(&spool).map_err(|source| ConnectError::State { path: spool, source })
    }

    fn within(spool: &Path) -> io::Result<Self> {
        fs::create_dir_all(spool)?;
        // Nobody sweeps a folder between its making and its locking.
        let _making = locked(&spool.join("lock"))?;
        for entry in fs::read_dir(spool)?.flatten() {
            sweep(&entry.path());
        }
        let path = spool.join(Uuid::new_v4().to_string());
        fs::create_dir(&path)?;
        let lock = locked(&path.join("lock"))?;
        Ok(Self { folder: Arc::new(Folder { path, _lock: lock }) })
    }

    /// A place for an output of this length.
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

/// Removes a folder that nobody holds. What is no folder has no lock in it and is left alone.
fn sweep(folder: &Path) {
    let lock = File::options().write(true).create(true).truncate(false).open(folder.join("lock"));
    if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
        // Tried again by the next to come.
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
