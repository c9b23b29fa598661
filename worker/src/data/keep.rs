//! Detached attempts on disk: their inputs, and later their results. They outlive the worker's process.
//!
//! ```text
//!   attempts/<task>-<attempt>/open      the message that opened it (ticket and manifest), as it came over the wire
//!                             input-1   … in the order of the manifest
//!                             runs      how many runs were begun
//!                             result    how it ended, as it goes over the wire
//!                             output-1  …
//!   attempts/<task>-<attempt>.new       not whole yet: deleted at the next start
//! ```
//!
//! A folder gets its final name once everything in it is on disk. All functions block.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::worker::Restored;
use parking_lot::{Mutex, MutexGuard, RwLock};
use proto_msgs::{
    AttemptId, ClientToWorker, DecodeError, ErrorCode, Frame, Manifest, Open, Outcome, OutputDecl, RunNote, RunResult,
    Ticket, WorkerToClient,
};
use tracing::{error, warn};

use super::{
    blobs::{BlobError, BlobStore, Room, Spooled},
    payload::{Output, Payload},
};
use crate::state::{replace_file, sync_dir};

/// Removed attempts that are remembered: more than may still wait to be saved, each of which waits for a thread.
const REMOVED_MAX: usize = 1024;

/// The folder of all detached attempts. Its content counts against the quota.
#[derive(Clone, Debug)]
pub(crate) struct Keep {
    root: PathBuf,
    store: BlobStore,
    rooms: Arc<Mutex<HashMap<AttemptId, Vec<Held>>>>,
    /// Attempts removed last: one that is saved only afterwards would stay, and the next life would run it. Locked for
    /// writing while an attempt is removed, and for reading while one is written.
    removed: Arc<RwLock<VecDeque<AttemptId>>>,
}

/// Room in the quota for a kept attempt.
#[derive(Debug)]
enum Held {
    Room {
        _room: Room,
    },
    /// A file that already had room before it got its second name in the attempt's folder.
    File {
        _owner: Arc<Spooled>,
    },
}

/// A detached attempt that was found after a restart.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) id: AttemptId,
    pub(crate) ticket: Ticket,
    pub(crate) manifest: Manifest,
    pub(crate) inputs: Vec<Payload>,
    /// Number of runs that began.
    pub(crate) runs_begun: u32,
    /// The attempt's end, if it has ended.
    pub(crate) result: Option<KeptResult>,
}

/// Outcome and outputs of a kept attempt.
#[derive(Debug)]
pub(crate) struct KeptResult {
    pub(crate) outcome: Outcome,
    pub(crate) outputs: Vec<Output>,
    pub(crate) runs: Vec<RunNote>,
}

impl Found {
    /// Bytes of the attempt's inputs and outputs.
    fn size_bytes(&self) -> u64 {
        let outputs = self.result.iter().flat_map(|result| &result.outputs).map(|output| &output.payload);
        self.inputs.iter().chain(outputs).map(Payload::size_bytes).sum()
    }

    /// The attempt as the machine restores it.
    pub(crate) fn restored(&self) -> Restored {
        let (ticket, manifest) = (self.ticket.clone(), Box::new(self.manifest.clone()));
        let outcome = self.result.as_ref().map(|result| result.outcome.clone());
        let runs = self.result.as_ref().map(|result| result.runs.clone()).unwrap_or_default();
        Restored { ticket, manifest, runs, outcome, runs_begun: self.runs_begun }
    }
}

/// Why a folder yields no attempt.
#[derive(Debug)]
enum Unread {
    /// The attempt is incomplete for good.
    Useless(String),
    /// The disk does not deliver it now, or it is no folder of this worker.
    Perhaps(io::Error),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        // A missing file of an attempt is missing for good.
        if error.kind() == io::ErrorKind::NotFound { Self::Useless(error.to_string()) } else { Self::Perhaps(error) }
    }
}

impl From<DecodeError> for Unread {
    fn from(error: DecodeError) -> Self {
        match error {
            // The version that wrote it may be installed again.
            DecodeError::Version { .. } | DecodeError::Unsupported { .. } | DecodeError::UnknownKind(_) => {
                Self::Perhaps(io::Error::other(error))
            }
            DecodeError::NotOurs | DecodeError::TooLong { .. } | DecodeError::Garbled { .. } => {
                Self::Useless(error.to_string())
            }
        }
    }
}

impl From<String> for Unread {
    fn from(reason: String) -> Self {
        Self::Useless(reason)
    }
}

impl Keep {
    /// Opens the folder and finds the attempts of earlier lives.
    pub(crate) fn open(root: PathBuf, store: BlobStore) -> io::Result<(Self, Vec<Found>)> {
        fs::create_dir_all(&root)?;
        let keep = Self { root, store, rooms: Arc::default(), removed: Arc::default() };
        let mut found = Vec::new();
        for entry in fs::read_dir(&keep.root)? {
            let path = entry?.path();
            match read_attempt(&path) {
                Ok(attempt) => {
                    let _room = keep.store.occupy(attempt.size_bytes());
                    keep.rooms().entry(attempt.id).or_default().push(Held::Room { _room });
                    found.push(attempt);
                }
                Err(Unread::Useless(reason)) => {
                    if path.extension().is_none() {
                        warn!(path = %path.display(), %reason, "a kept attempt is not usable: deleted");
                    }
                    if let Err(error) = fs::remove_dir_all(&path) {
                        warn!(path = %path.display(), %error, "it cannot be deleted");
                    }
                }
                Err(Unread::Perhaps(error)) => {
                    warn!(path = %path.display(), %error, "a kept attempt cannot be read: left alone until the next start");
                }
            }
        }
        Ok((keep, found))
    }

    fn rooms(&self) -> MutexGuard<'_, HashMap<AttemptId, Vec<Held>>> {
        self.rooms.lock()
    }

    /// Saves an attempt with all its inputs. After the return it survives a power cut.
    pub(crate) fn save(
        &self,
        id: AttemptId,
        ticket: &Ticket,
        manifest: &Manifest,
        inputs: Vec<Payload>,
    ) -> Result<Vec<Payload>, BlobError> {
        let removed = self.removed.read();
        if removed.contains(&id) {
            return Err(io::Error::other("the attempt was given up").into());
        }
        let _room = self.store.room(in_memory_bytes(&inputs))?;
        let folder = self.folder(id);
        let new = folder.with_extension("new");
        // The folder of all may have been removed while the worker runs.
        fs::create_dir_all(&new)?;
        if let Err(error) = self.write(&new, &folder, ticket, manifest, &inputs) {
            // An incomplete attempt would only take room.
            let _ = fs::remove_dir_all(&new);
            return Err(error.into());
        }
        let owners = inputs.iter().filter_map(Payload::owner).map(|_owner| Held::File { _owner });
        self.rooms().insert(id, owners.chain([Held::Room { _room }]).collect());
        let sizes = inputs.iter().map(Payload::size_bytes).enumerate();
        Ok(sizes.map(|(index, size_bytes)| kept(&folder, "input", index, size_bytes)).collect())
    }

    fn write(
        &self,
        new: &Path,
        folder: &Path,
        ticket: &Ticket,
        manifest: &Manifest,
        inputs: &[Payload],
    ) -> io::Result<()> {
        for (index, input) in inputs.iter().enumerate() {
            place(input, &new.join(file_name("input", index)))?;
        }
        let manifest = Some(manifest.clone());
        let open = Open { ticket: ticket.clone(), manifest, window_bytes: 0, resume: false, outputs_here: Vec::new() };
        let open = ClientToWorker::Open(open).to_frame().map_err(io::Error::other)?;
        replace_file(&new.join("open"), &open.head)?;
        fs::rename(new, folder)?;
        sync_dir(&self.root)
    }

    /// Counts a run that begins, so that the next life knows of it if this run kills the worker.
    pub(crate) fn begin_run(&self, id: AttemptId) -> io::Result<()> {
        self.count_run(id, |begun| begun.saturating_add(1))
    }

    /// Takes back [`Self::begin_run`]: the worker leaves in good order, and the run is not to blame.
    pub(crate) fn give_up_run(&self, id: AttemptId) -> io::Result<()> {
        self.count_run(id, |begun| begun.saturating_sub(1))
    }

    fn count_run(&self, id: AttemptId, count: impl Fn(u32) -> u32) -> io::Result<()> {
        let folder = self.folder(id);
        replace_file(&folder.join("runs"), count(read_runs(&folder)).to_string().as_bytes())
    }

    /// Saves the end of a kept attempt, and returns the end that counts from now on: a result that cannot be written is
    /// lost with this process, so its attempt fails. Where not even that can be written, the attempt is removed, because
    /// it must not run again after it was reported as over.
    pub(crate) fn finish(&self, id: AttemptId, outcome: Outcome, runs: &[RunNote], outputs: &[Output]) -> Outcome {
        let Err(error) = self.write_end(id, &outcome, runs, outputs) else { return outcome };
        error!(task = %id.task, %error, "the end of a task cannot be kept on disk");
        let outcome = match outcome {
            Outcome::Done { .. } => not_kept(&error),
            other => other,
        };
        let folder = self.folder(id);
        for index in 0..outputs.len() {
            // What was written of the outputs may take the room that the failure needs.
            let _ = fs::remove_file(folder.join(file_name("output", index)));
        }
        if let Err(error) = self.write_end(id, &outcome, runs, &[]) {
            error!(task = %id.task, %error, "nor can it be noted that the task failed: its data is deleted");
            self.remove(id);
        }
        outcome
    }

    fn write_end(&self, id: AttemptId, outcome: &Outcome, runs: &[RunNote], outputs: &[Output]) -> io::Result<()> {
        let _not_removed_meanwhile = self.removed.read();
        let folder = self.folder(id);
        // Taken even beyond the quota: else the run was in vain. Outputs in files hold their own room during this life.
        let _room = self.store.occupy(outputs.iter().map(|output| in_memory_bytes([&output.payload])).sum());
        for (index, output) in outputs.iter().enumerate() {
            place(&output.payload, &folder.join(file_name("output", index)))?;
        }
        let (outcome, runs) = (outcome.clone(), runs.to_vec());
        let outputs = outputs.iter().map(Output::declaration).collect();
        let result = RunResult { id, outcome, outputs, runs, held_us: 0, goes_on: false };
        let result = WorkerToClient::Result(result).to_frame().map_err(io::Error::other)?;
        replace_file(&folder.join("result"), &result.head)?;
        self.rooms().entry(id).or_default().push(Held::Room { _room });
        Ok(())
    }

    /// Removes an attempt, kept or not.
    pub(crate) fn remove(&self, id: AttemptId) {
        let mut removed = self.removed.write();
        if removed.len() == REMOVED_MAX {
            removed.pop_front();
        }
        removed.push_back(id);
        self.rooms().remove(&id);
        let folder = self.folder(id);
        for path in [folder.with_extension("new"), folder] {
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(path = %path.display(), %error, "a kept attempt cannot be deleted");
                }
                _ => {}
            }
        }
    }

    fn folder(&self, id: AttemptId) -> PathBuf {
        self.root.join(format!("{}-{}", id.task, id.attempt))
    }
}

/// The end of an attempt that ran well, and whose result cannot be written.
fn not_kept(error: &io::Error) -> Outcome {
    let text = format!(
        "the task ran, but its result cannot be kept on the worker's disk ({error}): free space under the worker's \
         --state-dir, and submit it again"
    );
    Outcome::failed(ErrorCode::DiskFull, text)
}

fn in_memory_bytes<'a>(payloads: impl IntoIterator<Item = &'a Payload>) -> u64 {
    let in_memory = payloads.into_iter().filter(|payload| matches!(payload, Payload::Memory(_)));
    in_memory.map(Payload::size_bytes).sum()
}

fn file_name(what: &str, index: usize) -> String {
    format!("{what}-{}", index + 1)
}

fn kept(folder: &Path, what: &str, index: usize, size_bytes: u64) -> Payload {
    Payload::File { path: folder.join(file_name(what, index)), offset: 0, size_bytes, owner: None }
}

/// Hard-links a file, or writes bytes. Replaces the leftovers of a life that ended between an output and the result.
fn place(payload: &Payload, path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    match payload {
        Payload::Memory(bytes) => fs::write(path, bytes)?,
        Payload::File { path: from, .. } => fs::hard_link(from, path)?,
    }
    fs::File::open(path)?.sync_all()
}

fn read_attempt(folder: &Path) -> Result<Found, Unread> {
    let head = fs::read(folder.join("open"))?;
    let open = match ClientToWorker::from_frame(&Frame::new(head)) {
        Ok(ClientToWorker::Open(open)) => open,
        Ok(other) => return Err(format!("{} where Open should be", other.name()).into()),
        Err(error) => return Err(error.into()),
    };
    let manifest = open.manifest.ok_or_else(|| "no manifest".to_owned())?;
    let id = open.ticket.body.attempt_id();
    if folder.file_name().is_none_or(|name| name != format!("{}-{}", id.task, id.attempt).as_str()) {
        return Err("the folder of another attempt".to_owned().into());
    }
    let sizes: Vec<u64> = manifest.inputs.iter().map(|input| input.size_bytes).collect();
    let inputs = files(folder, "input", &sizes)?;
    let result = match fs::read(folder.join("result")) {
        Ok(head) => Some(read_result(folder, head)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Found { id, ticket: open.ticket, manifest, inputs, runs_begun: read_runs(folder), result })
}

fn read_runs(folder: &Path) -> u32 {
    fs::read_to_string(folder.join("runs")).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn read_result(folder: &Path, head: Vec<u8>) -> Result<KeptResult, Unread> {
    let result = match WorkerToClient::from_frame(&Frame::new(head)) {
        Ok(WorkerToClient::Result(result)) => result,
        Ok(other) => return Err(format!("{} where Result should be", other.name()).into()),
        Err(error) => return Err(error.into()),
    };
    let sizes: Vec<u64> = result.outputs.iter().map(|output| output.size_bytes).collect();
    let payloads = files(folder, "output", &sizes)?;
    let outputs = result.outputs.into_iter().zip(payloads).map(|(declaration, payload)| {
        let OutputDecl { name, dtype, shape, digest, .. } = declaration;
        Output { name, dtype, shape, digest, payload }
    });
    Ok(KeptResult { outcome: result.outcome, outputs: outputs.collect(), runs: result.runs })
}

/// The files of an attempt, if all exist with the right length.
fn files(folder: &Path, what: &str, sizes: &[u64]) -> Result<Vec<Payload>, Unread> {
    let check = |(index, size_bytes): (usize, &u64)| {
        let length_bytes = fs::metadata(folder.join(file_name(what, index)))?.len();
        if length_bytes == *size_bytes {
            Ok(kept(folder, what, index, *size_bytes))
        } else {
            Err(format!("{what} {index} is cut").into())
        }
    };
    sizes.iter().enumerate().map(check).collect()
}

#[cfg(test)]
mod tests;
