//! The store of a broker without Redis: one file in its state folder, for tasks that must survive a restart.
//!
//! Owns the file. A write that returned is on disk (redb syncs each commit). A write that hangs with its disk blocks
//! only itself. Never: the Metric Table, since workers register again within a heartbeat.

mod file;

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
    time::Duration,
};

use mesh_core::broker::TaskRecord;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::{error, info};

use super::{
    Batch, Kept, Store, StoreError, Write,
    record::{self, RecordError},
};
use file::Place;

pub use file::FREE_NEEDED_BYTES;

/// Task id -> the task's fields as a JSON object, the same fields as in Redis: one form to keep readable.
const TASKS: TableDefinition<'_, &str, &str> = TableDefinition::new("tasks");

/// The store of a broker without Redis: one redb file in its state folder.
#[derive(Debug)]
pub struct EmbeddedStore {
    place: Arc<Place>,
    /// `None` during a write, and after a failed one: then redb requires that its file is closed and opened again.
    database: Option<Database>,
    /// The write under way. Its caller may have stopped waiting; the disk has not.
    writing: Option<JoinHandle<Result<Database, StoreError>>>,
}

impl EmbeddedStore {
    /// Opens or creates the file in this folder. A missing folder is made.
    ///
    /// # Errors
    /// If the folder cannot be written, another broker uses it, its disk is full, or the file is damaged.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let place = Place::take(folder)?;
        let database = carefully(&place.file, || {
            let database = place.open()?;
            // Shows now, not at the first task, whether the file can be written.
            commit(&database, &Batch::new()).map_err(|error| away(&place.file, &error))?;
            Ok(database)
        })?;
        Ok(Self { place: Arc::new(place), database: Some(database), writing: None })
    }

    /// Reads all tasks. Records that only an older broker could read are deleted, since nobody would ever end them.
    fn read(&self) -> Result<Vec<TaskRecord>, redb::Error> {
        let Some(database) = &self.database else { return Ok(Vec::new()) };
        let (mut records, mut outdated) = (Vec::new(), Vec::new());
        let transaction = database.begin_read()?;
        let table = match transaction.open_table(TASKS) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            table => table?,
        };
        for row in table.iter()? {
            let (id, text) = row?;
            match parse(text.value()) {
                Ok(record) => records.push(record),
                Err(RecordError::Outdated(_)) => outdated.push(id.value().to_owned()),
                // One unreadable record must not keep the broker from working. It stays in the file.
                Err(reason) => error!("task {} in {} cannot be read: {reason}", id.value(), self.place.file.display()),
            }
        }
        if !outdated.is_empty() {
            let transaction = database.begin_write()?;
            let mut tasks = transaction.open_table(TASKS)?;
            for id in &outdated {
                tasks.remove(id.as_str())?;
            }
            drop(tasks);
            transaction.commit()?;
            info!("{} tasks of an older version were dropped from {}", outdated.len(), self.place.file.display());
        }
        Ok(records)
    }

    async fn commit(&mut self, batch: &Batch) -> Result<(), StoreError> {
        // The result of an earlier, abandoned write does not matter: its changes come again.
        let _ = self.written().await;
        let (database, place, batch) = (self.database.take(), Arc::clone(&self.place), batch.clone());
        self.writing = Some(spawn_blocking(move || {
            let database = database.map_or_else(|| place.open(), Ok)?;
            commit(&database, &batch).map_err(|error| away(&place.file, &error))?;
            Ok(database)
        }));
        self.written().await
    }

    /// Waits for the write under way, if there is one.
    async fn written(&mut self) -> Result<(), StoreError> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let outcome = writing.await;
        self.writing = None;
        match outcome {
            Ok(Ok(database)) => self.database = Some(database),
            Ok(Err(error)) => return Err(error),
            Err(panic) => return Err(away(&self.place.file, &panic)),
        }
        Ok(())
    }
}

/// Does what meets each page of the file for the first time. Where pages are damaged, redb may panic.
fn carefully<T>(file: &Path, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
        Err(StoreError::Damaged { file: file.to_owned(), reason: said.unwrap_or("a page is nonsense").to_owned() })
    })
}

fn away(file: &Path, reason: &dyn std::error::Error) -> StoreError {
    StoreError::Away { server: file.display().to_string(), reason: reason.to_string() }
}

fn commit(database: &Database, batch: &Batch) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(TASKS)?;
        for write in batch {
            match write {
                Write::PutTask { record, durable: true } => {
                    table.insert(record.spec.task.to_string().as_str(), to_text(record).as_str())?;
                }
                Write::DropTask(task) => drop(table.remove(task.to_string().as_str())?),
                Write::PutTask { .. } | Write::PutWorker { .. } | Write::DropWorker(_) => {}
            }
        }
    }
    Ok(transaction.commit()?)
}

impl Store for EmbeddedStore {
    const NAME: &'static str = "embedded";
    const KEEP_EVERY: Option<Duration> = None;
    const SHOWS_ALL: bool = false;

    async fn restore(&mut self) -> Result<Vec<TaskRecord>, StoreError> {
        let file = &self.place.file;
        let damaged = |error: redb::Error| StoreError::Damaged { file: file.clone(), reason: error.to_string() };
        carefully(file, || self.read().map_err(damaged))
    }

    async fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.commit(batch).await
    }

    async fn keep(&mut self) -> Result<Kept, StoreError> {
        self.commit(&Batch::new()).await.map(|()| Kept::Same)
    }

    async fn release(self) {}
}

fn to_text(record: &TaskRecord) -> String {
    let fields = record::task_fields(record, true).into_iter().map(|(name, value)| (name.to_owned(), value.into()));
    serde_json::Value::Object(fields.collect()).to_string()
}

fn parse(text: &str) -> Result<TaskRecord, RecordError> {
    // A text that is not a record lacks its first field.
    let fields: HashMap<String, String> = serde_json::from_str(text).unwrap_or_default();
    record::task_from_fields(&fields).map(|(record, _)| record)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Seek, SeekFrom, Write as _},
    };

    use tokio::time::timeout;

    use super::{file::FILE_NAME, *};
    use crate::store::samples::task;

    fn put(number: u8) -> Write {
        Write::PutTask { record: Arc::new(task(number)), durable: true }
    }

    async fn tasks(folder: &Path) -> Vec<TaskRecord> {
        EmbeddedStore::open(folder).unwrap().restore().await.unwrap()
    }

    /// A copy of the open file, as a killed broker leaves it.
    fn after_kill(folder: &Path) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        fs::copy(folder.join(FILE_NAME), copy.path().join(FILE_NAME)).unwrap();
        copy
    }

    #[tokio::test]
    async fn what_was_written_is_there_after_kill_9() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        store.write(&vec![put(1), put(2), put(3)]).await.unwrap();
        store.write(&vec![Write::DropTask(task(2).spec.task)]).await.unwrap();
        let left = after_kill(folder.path());
        assert_eq!(tasks(left.path()).await, [task(1), task(3)]);
    }

    #[tokio::test]
    async fn a_second_broker_is_told_that_the_folder_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let _first = EmbeddedStore::open(folder.path()).unwrap();
        let error = EmbeddedStore::open(folder.path()).unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
        assert!(error.is_configuration());
    }

    #[tokio::test]
    async fn a_damaged_file_is_named_and_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        store.write(&vec![put(1)]).await.unwrap();
        drop(store);
        let file = folder.path().join(FILE_NAME);
        let mut torn = fs::OpenOptions::new().write(true).open(&file).unwrap();
        torn.seek(SeekFrom::Start(0)).unwrap();
        torn.write_all(&[0xA5; 512]).unwrap();
        let before = fs::read(&file).unwrap();
        let error = EmbeddedStore::open(folder.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(FILE_NAME), "{error}");
        assert_eq!(fs::read(&file).unwrap(), before);
    }

    #[tokio::test]
    async fn a_damaged_page_anywhere_is_an_error_or_hurts_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        store.write(&(0..50).map(put).collect()).await.unwrap();
        drop(store);
        let whole = fs::read(folder.path().join(FILE_NAME)).unwrap();
        let mut damaged = 0;
        for page in 1..16 {
            let copy = tempfile::tempdir().unwrap();
            let mut spoilt = whole.clone();
            spoilt[page * 4096..page * 4096 + 256].fill(0xA5);
            fs::write(copy.path().join(FILE_NAME), spoilt).unwrap();
            let read = match EmbeddedStore::open(copy.path()) {
                Ok(mut store) => store.restore().await.map(drop),
                Err(error) => Err(error),
            };
            damaged += usize::from(matches!(read, Err(StoreError::Damaged { .. })));
            assert!(matches!(read, Ok(()) | Err(StoreError::Damaged { .. })), "page {page}: {read:?}");
        }
        assert!(damaged > 0, "no page of the tasks was hit");
    }

    #[tokio::test]
    async fn a_last_write_torn_by_a_power_cut_costs_nothing_that_was_confirmed() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        store.write(&vec![put(1)]).await.unwrap();
        let before = fs::read(folder.path().join(FILE_NAME)).unwrap();
        store.write(&vec![put(2)]).await.unwrap();
        let after = fs::read(folder.path().join(FILE_NAME)).unwrap();
        assert_eq!(before.len(), after.len(), "the file grows in large steps only");
        const PAGE: usize = 4096;
        let page = |bytes: &[u8], number: usize| bytes[number * PAGE..(number + 1) * PAGE].to_vec();
        let changed: Vec<usize> =
            (0..before.len() / PAGE).filter(|&number| page(&before, number) != page(&after, number)).collect();
        assert!((2..=8).contains(&changed.len()), "the second write changed pages {changed:?}");
        // Any subset of the second write's pages may have reached the disk.
        for reached in 0..1_u32 << changed.len() {
            let mut torn = before.clone();
            for (bit, &number) in changed.iter().enumerate() {
                if reached & 1 << bit != 0 {
                    torn[number * PAGE..(number + 1) * PAGE].copy_from_slice(&page(&after, number));
                }
            }
            let copy = tempfile::tempdir().unwrap();
            fs::write(copy.path().join(FILE_NAME), torn).unwrap();
            assert!(tasks(copy.path()).await.contains(&task(1)), "pages {reached:b} of {changed:?}");
        }
    }

    #[tokio::test]
    async fn after_a_failed_write_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        store.write(&vec![put(1)]).await.unwrap();
        // The state that a write to a full disk leaves.
        store.database = None;
        assert_eq!(store.keep().await.unwrap(), Kept::Same);
        store.write(&vec![put(2)]).await.unwrap();
        assert_eq!(store.restore().await.unwrap(), [task(1), task(2)]);
    }

    #[tokio::test]
    async fn a_disk_that_hangs_is_noticed_and_what_it_had_is_there_once_it_is_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        // Until this transaction ends, no other write can go on.
        let other = store.database.as_ref().unwrap().begin_write().unwrap();
        let patience = Duration::from_millis(100);
        assert!(timeout(patience, store.write(&vec![put(1)])).await.is_err(), "the caller gets on with its work");
        assert!(timeout(patience, store.keep()).await.is_err());
        drop(other);
        assert_eq!(store.keep().await.unwrap(), Kept::Same);
        store.write(&vec![put(2)]).await.unwrap();
        assert_eq!(store.restore().await.unwrap(), [task(1), task(2)]);
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_does_not_hide_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = EmbeddedStore::open(folder.path()).unwrap();
        store.write(&vec![put(1)]).await.unwrap();
        let transaction = store.database.as_ref().unwrap().begin_write().unwrap();
        for (id, text) in [("spoilt", r#"{"record_version":"2"}"#), ("older", r#"{"record_version":"1"}"#), ("no", "{")]
        {
            transaction.open_table(TASKS).unwrap().insert(id, text).unwrap();
        }
        transaction.commit().unwrap();
        assert_eq!(store.restore().await.unwrap(), [task(1)]);
        let reading = store.database.as_ref().unwrap().begin_read().unwrap();
        let left = |id: &str| reading.open_table(TASKS).unwrap().get(id).unwrap().is_some();
        assert_eq!(["spoilt", "older", "no"].map(left), [true, false, true], "nobody will ever end what is older");
    }
}
