//! The file of the embedded store on its way into the state folder: it gets its name once it is whole.
//!
//! Owns the lock of the folder, and the making of the file. A broker that is killed while it makes the file, or finds
//! the disk full, leaves nothing under the file's name. Never: what is in the file; a file that may hold tasks is not
//! replaced.

use std::{
    fs::{self, File, TryLockError},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

use redb::Database;
use tracing::warn;

use super::{Batch, StoreError, commit};

/// The file in the state folder.
pub(super) const FILE_NAME: &str = "broker.redb";

/// The file while it is made.
const UNFINISHED_NAME: &str = "broker.redb.new";

/// Locked as long as a broker uses the folder: two brokers must not make the file at the same time.
const LOCK_NAME: &str = "lock";

/// Free space with which a start succeeds: the new file and its first task.
pub const FREE_NEEDED_BYTES: u64 = 2 << 20;

/// Bytes at the begin of a file that redb writes last of all when it makes the file.
const MAGIC_BYTES: usize = 9;

/// The first page, in which redb keeps its header. Tasks come behind it.
const HEADER_PAGE_BYTES: usize = 4096;

/// Largest size of a file whose making was interrupted: redb makes files of little more than 1 MiB.
const UNFINISHED_BYTES_MAX: u64 = 16 << 20;

/// The locked state folder, and the path of the file in it.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    pub(super) file: PathBuf,
    _lock: File,
}

impl Place {
    /// Makes the folder if it is missing, and locks it.
    pub(super) fn take(folder: &Path) -> Result<Self, StoreError> {
        let failed = |error| refused(folder, error);
        fs::create_dir_all(folder).map_err(failed)?;
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK_NAME));
        let lock = lock.map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_owned(), file: folder.join(FILE_NAME), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(StoreError::Locked { folder: folder.to_owned() }),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// Opens the file, or makes it.
    pub(super) fn open(&self) -> Result<Database, StoreError> {
        if self.is_there().map_err(|error| refused(&self.folder, error))? {
            return Database::open(&self.file).map_err(|error| self.failed(error.into()));
        }
        let unfinished = self.folder.join(UNFINISHED_NAME);
        let made = self.make(&unfinished).map_err(|error| self.failed(error));
        if made.is_err() {
            let _ = fs::remove_file(unfinished); // So that a full disk gets its space back.
        }
        made
    }

    /// Whether there is a file with its name that redb has made to the end.
    fn is_there(&self) -> io::Result<bool> {
        match is_unfinished(&self.file) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Ok(true) => {
                warn!("{} was not made to the end, nothing is in it: it is made again", self.file.display());
                Ok(false)
            }
            found => found.map(|_| true),
        }
    }

    fn make(&self, unfinished: &Path) -> Result<Database, redb::Error> {
        match fs::remove_file(unfinished) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let database = Database::create(unfinished)?;
        // redb waits until this is on the disk.
        commit(&database, &Batch::new())?;
        fs::rename(unfinished, &self.file)?;
        File::open(&self.folder)?.sync_all()?;
        Ok(database)
    }

    fn failed(&self, error: redb::Error) -> StoreError {
        match error {
            redb::Error::DatabaseAlreadyOpen => StoreError::Locked { folder: self.folder.clone() },
            redb::Error::Io(error) if error.kind() != ErrorKind::InvalidData => refused(&self.folder, error),
            damage => StoreError::Damaged { file: self.file.clone(), reason: damage.to_string() },
        }
    }
}

fn refused(folder: &Path, source: io::Error) -> StoreError {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreError::Full { folder: folder.to_owned(), source },
        _ => StoreError::Folder { folder: folder.to_owned(), source },
    }
}

/// Whether the making of this file was interrupted. Earlier brokers made it under its own name: then it is empty, or it
/// lacks its first bytes and nothing follows its header.
fn is_unfinished(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() > UNFINISHED_BYTES_MAX {
        return Ok(false);
    }
    let mut page = vec![0; HEADER_PAGE_BYTES];
    let mut is_first = true;
    loop {
        let filled = fill(&mut file, &mut page)?;
        let looked_at = if is_first { filled.min(MAGIC_BYTES) } else { filled };
        if page[..looked_at].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        if filled < page.len() {
            return Ok(true);
        }
        is_first = false;
    }
}

/// Reads until the page is full or the file ends.
fn fill(file: &mut File, page: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < page.len() {
        match file.read(&mut page[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state folder with this file in it.
    fn folder_with(content: &[u8]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE_NAME), content).unwrap();
        folder
    }

    fn open(folder: &Path) -> Result<(), StoreError> {
        Place::take(folder)?.open().map(drop)
    }

    #[test]
    fn a_file_that_was_never_finished_is_made_again() {
        let mut headless = vec![0; 1 << 20];
        headless[MAGIC_BYTES..64].fill(3);
        for (content, what) in [(&[][..], "empty"), (&[0; 5], "short"), (&[0; 1 << 20], "blank"), (&headless, "half")] {
            let folder = folder_with(content);
            assert!(open(folder.path()).is_ok(), "{what}");
            assert!(open(folder.path()).is_ok(), "{what}, the second time");
        }
    }

    #[test]
    fn a_file_in_which_something_may_be_is_left_alone() {
        let mut full = vec![0; 1 << 20];
        full[HEADER_PAGE_BYTES] = 1;
        for content in [&full[..], b"redc", &[0xA5; 5000]] {
            let folder = folder_with(content);
            let error = open(folder.path()).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
            assert_eq!(fs::read(folder.path().join(FILE_NAME)).unwrap(), content);
        }
    }

    #[test]
    fn what_a_killed_broker_left_of_a_new_file_does_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(UNFINISHED_NAME), [0xA5; 5000]).unwrap();
        open(folder.path()).unwrap();
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, [FILE_NAME, LOCK_NAME]);
    }
}
