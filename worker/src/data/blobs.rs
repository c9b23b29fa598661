//! The blob store: models in files named by the BLAKE3 of their bytes, within a quota.
//!
//! ```text
//!   blobs/ab/abcdef…   a whole model, mode 0444, name = digest
//!   blobs/tmp/17       a file on its way; deleted at the next start
//! ```
//!
//! A file gets its name only after its bytes were hashed and synced, so a named file was right once. It is hashed again
//! at its first use after a start: a file changed by a bad disk or by hand is deleted and fetched again, never run.
//! A folder that goes while the worker runs is made again. Blobs in use are pinned. Of the others the longest unused is
//! evicted first when room is needed.
//!
//! Never: the network, async. Callers that must not wait for a disk use a blocking thread.

mod coming;
mod room;
mod spool;

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    mem,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use parking_lot::{Mutex, MutexGuard};
use proto_msgs::{Digest, limits::HELD_MAX, units::show_bytes};
use tracing::{info, warn};

use crate::state::sync_dir;

pub(crate) use coming::{Arriving, Claim, Coming, OTHERS_WAIT, Wish};
pub(crate) use room::Room;
pub(crate) use spool::{BlobError, Spooled};

/// Disk space that stays free, so that epochs, outcomes and logs can still be written when models fill the disk.
const DISK_SPARE_BYTES: u64 = 4 << 20;

/// The blob store. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct BlobStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    quota_bytes: AtomicU64,
    index: Mutex<Index>,
    next_tmp: AtomicU64,
}

#[derive(Debug, Default)]
struct Index {
    blobs: HashMap<Digest, Blob>,
    /// Sum of the sizes of all blobs.
    used_bytes: u64,
    /// Bytes promised to files that are still being written, and to other [`Room`]s.
    reserved_bytes: u64,
    /// The files that are still being written, with their lengths once they are complete.
    coming: HashMap<PathBuf, u64>,
    /// Number of uses so far: the clock of [`Blob::last_use`].
    uses: u64,
    /// Number of uses that [`BlobStore::note_uses`] has written to the disk.
    noted_uses: u64,
}

impl Index {
    /// Takes back what was promised to a [`Room`] of this file.
    fn take_back(&mut self, bytes: u64, file: Option<PathBuf>) {
        self.reserved_bytes -= bytes;
        file.map(|file| self.coming.remove(&file));
    }

    /// Bytes that were promised to files and are not on the disk yet.
    fn unwritten_bytes(&self) -> u64 {
        let on_disk_bytes = |path: &PathBuf| fs::metadata(path).map_or(0, |meta| meta.blocks() * 512);
        self.coming.iter().map(|(path, bytes)| bytes.saturating_sub(on_disk_bytes(path))).sum()
    }
}

#[derive(Debug)]
struct Blob {
    size_bytes: u64,
    last_use: u64,
    /// Whether the blob was hashed since this process started.
    verified: bool,
    /// Every [`Pin`] holds a clone.
    pin: Arc<()>,
}

impl Blob {
    fn is_pinned(&self) -> bool {
        Arc::strong_count(&self.pin) > 1
    }
}

/// A pinned blob: it is not evicted while this lives.
#[derive(Clone, Debug)]
pub(crate) struct Pin {
    path: PathBuf,
    size_bytes: u64,
    _pin: Arc<()>,
}

impl Pin {
    /// Path of the blob's file, which is read-only.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the blob.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

impl BlobStore {
    /// Opens the store in `dir`: deletes half-written files and indexes the whole ones.
    pub(crate) fn open(dir: &Path, quota_bytes: u64) -> io::Result<Self> {
        let tmp = dir.join("tmp");
        match fs::remove_dir_all(&tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&tmp)?;
        let shared = Shared {
            dir: dir.to_owned(),
            quota_bytes: quota_bytes.into(),
            index: Mutex::new(scan(dir)?),
            next_tmp: AtomicU64::new(0),
        };
        let store = Self { shared: Arc::new(shared) };
        store.set_quota(quota_bytes);
        Ok(store)
    }

    /// Sets another quota, and evicts blobs beyond it.
    pub(crate) fn set_quota(&self, quota_bytes: u64) {
        self.shared.quota_bytes.store(quota_bytes, Ordering::Relaxed);
        let _trash = self.shared.evict_down_to(&mut self.shared.index(), quota_bytes);
    }

    /// What the store may at most have of its disk: what it has, and what is free.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.disk_free_bytes().saturating_add(self.shared.index().used_bytes)
    }

    /// Digests of the held models, most recently used first, at most as many as a heartbeat reports.
    pub(crate) fn held(&self) -> Vec<Digest> {
        let mut index = self.shared.index();
        // What went with its folder is not held. If the folder cannot be made again, the next task hears why.
        let _ = self.shared.restore_folders(&mut index);
        let mut held: Vec<_> = index.blobs.iter().map(|(digest, blob)| (blob.last_use, *digest)).collect();
        drop(index);
        held.sort_unstable_by(|a, b| b.cmp(a));
        held.truncate(HELD_MAX);
        held.into_iter().map(|(_, digest)| digest).collect()
    }

    /// Pins a blob that is held and was verified since this process started. Never waits: `None` also while another
    /// thread holds the index, perhaps for as long as a disk takes.
    pub(crate) fn pin_at_once(&self, digest: Digest) -> Option<Pin> {
        self.pin_verified(self.shared.index.try_lock()?, digest)
    }

    fn pin_verified(&self, mut index: MutexGuard<'_, Index>, digest: Digest) -> Option<Pin> {
        index.uses += 1;
        let uses = index.uses;
        let blob = index.blobs.get_mut(&digest).filter(|blob| blob.verified)?;
        blob.last_use = uses;
        Some(Pin { path: self.shared.path(digest), size_bytes: blob.size_bytes, _pin: blob.pin.clone() })
    }

    /// Pins a blob against eviction without a look at its bytes: they are verified at its use.
    pub(crate) fn hold(&self, digest: Digest) -> Option<Pin> {
        let index = self.shared.index();
        let blob = index.blobs.get(&digest)?;
        Some(Pin { path: self.shared.path(digest), size_bytes: blob.size_bytes, _pin: blob.pin.clone() })
    }

    /// Pins a blob that is held with the right bytes. Reads the whole file at its first use after a start.
    pub(crate) fn pin(&self, digest: Digest) -> Option<Pin> {
        if let Some(pin) = self.pin_verified(self.shared.index(), digest) {
            return Some(pin);
        }
        let path = self.shared.path(digest);
        let pin = {
            let index = self.shared.index();
            let blob = index.blobs.get(&digest)?;
            Pin { path: path.clone(), size_bytes: blob.size_bytes, _pin: blob.pin.clone() }
        };
        match verify(&path, digest, pin.size_bytes) {
            Ok(()) => {
                let mut index = self.shared.index();
                index.uses += 1;
                let uses = index.uses;
                if let Some(blob) = index.blobs.get_mut(&digest) {
                    (blob.verified, blob.last_use) = (true, uses);
                }
                Some(pin)
            }
            Err(reason) => {
                warn!(model = %digest.short(), reason, "a held model is no longer what it was: deleted, to be fetched again");
                let _trash = self.shared.forget(&mut self.shared.index(), digest);
                None
            }
        }
    }

    /// Writes the order of use since the last call into the files' times, for the eviction order of the next life.
    pub(crate) fn note_uses(&self) {
        let mut used = {
            let mut index = self.shared.index();
            let is_new = |(_, blob): &(&Digest, &Blob)| blob.last_use > index.noted_uses;
            let used = index.blobs.iter().filter(is_new).map(|(digest, blob)| (blob.last_use, *digest));
            let used = used.collect::<Vec<_>>();
            index.noted_uses = index.uses;
            used
        };
        used.sort_unstable();
        for (_, digest) in used {
            // Fails if the blob was evicted meanwhile.
            let _ = open_no_link(&self.shared.path(digest)).and_then(|file| file.set_modified(SystemTime::now()));
        }
    }

    /// Whether the store holds a blob, verified or not.
    pub(crate) fn has(&self, digest: Digest) -> bool {
        self.shared.index().blobs.contains_key(&digest)
    }

    /// Whether a pinned blob's file still exists with its length; if not, the store forgets the blob.
    pub(crate) fn still_has(&self, digest: Digest, pin: &Pin) -> bool {
        let is_there = fs::symlink_metadata(&pin.path).is_ok_and(|meta| meta.is_file() && meta.len() == pin.size_bytes);
        if !is_there {
            warn!(model = %digest.short(), "a model's file is not what it was: it is fetched anew");
            let _trash = self.shared.forget(&mut self.shared.index(), digest);
        }
        is_there
    }

    /// Reserves room in the quota for `size_bytes` that are about to be written elsewhere.
    pub(crate) fn room(&self, size_bytes: u64) -> Result<Room, BlobError> {
        self.shared.reserve(size_bytes, None)
    }

    /// Counts bytes that are on disk already, even beyond the quota.
    pub(crate) fn occupy(&self, size_bytes: u64) -> Room {
        self.shared.index().reserved_bytes += size_bytes;
        Room { shared: self.shared.clone(), bytes: size_bytes, file: None }
    }

    /// Reserves room for `size_bytes`, and a name for the file that will hold them.
    pub(crate) fn spool(&self, size_bytes: u64) -> Result<Spooled, BlobError> {
        let path = self.shared.new_tmp();
        let room = self.shared.reserve(size_bytes, Some(path.clone()))?;
        Ok(Spooled::new(path, room))
    }

    /// Moves a file into the store. The caller has found it complete, synced, and of this digest.
    pub(crate) fn adopt(&self, file: Spooled, digest: Digest) -> Result<Pin, BlobError> {
        let path = self.shared.path(digest);
        let folder = path.parent().expect("invariant: a blob's path has a folder");
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o444))?;
        fs::create_dir_all(folder)?;
        let size_bytes = file.size_bytes();
        let (pin, _room) = {
            // One step for all others: an eviction comes before it, or finds the model pinned.
            let mut index = self.shared.index();
            fs::rename(file.path(), &path)?;
            let mut room = file.disown();
            room.give_back(&mut index);
            index.uses += 1;
            let uses = index.uses;
            // Two clients may have sent the same model at once: then the second file has replaced an equal one. What it
            // replaced may also be a changed file that could not be deleted, of another length.
            let new = || Blob { size_bytes: 0, last_use: uses, verified: true, pin: Arc::default() };
            let blob = index.blobs.entry(digest).or_insert_with(new);
            let replaced_bytes = mem::replace(&mut blob.size_bytes, size_bytes);
            (blob.last_use, blob.verified) = (uses, true);
            let pin = Pin { path: path.clone(), size_bytes, _pin: blob.pin.clone() };
            index.used_bytes = index.used_bytes + size_bytes - replaced_bytes;
            (pin, room)
        };
        sync_dir(folder)?;
        Ok(pin)
    }

    /// Free bytes in the store's file system.
    pub(crate) fn disk_free_bytes(&self) -> u64 {
        free_bytes(&self.shared.dir).unwrap_or(0)
    }
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock()
    }

    /// Path of a blob. Made from the digest's bytes, never from a name of a peer.
    fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.dir.join(&name[..2]).join(name)
    }

    /// Reserves room, for this file if the store names it. Evicts only if that is enough: a blob that cannot fit evicts
    /// nothing.
    fn reserve(self: &Arc<Self>, size_bytes: u64, file: Option<PathBuf>) -> Result<Room, BlobError> {
        let mut index = self.index();
        self.restore_folders(&mut index)?;
        let evictable_bytes: u64 = index.blobs.values().filter(|b| !b.is_pinned()).map(|b| b.size_bytes).sum();
        let used_bytes = index.used_bytes + index.reserved_bytes;
        let quota_bytes = self.quota_bytes.load(Ordering::Relaxed);
        let over_quota_bytes = used_bytes.saturating_add(size_bytes).saturating_sub(quota_bytes);
        if over_quota_bytes > evictable_bytes {
            let never = size_bytes > quota_bytes;
            return Err(if never {
                BlobError::QuotaExceeded { size_bytes, quota_bytes }
            } else {
                BlobError::QuotaTaken { size_bytes, quota_bytes }
            });
        }
        let free_bytes = free_bytes(&self.dir)?.saturating_sub(DISK_SPARE_BYTES + index.unwritten_bytes());
        let over_disk_bytes = size_bytes.saturating_sub(free_bytes);
        if over_disk_bytes > evictable_bytes {
            return Err(BlobError::DiskFull { size_bytes, free_bytes: free_bytes + evictable_bytes });
        }
        let used_max_bytes = index.used_bytes - over_quota_bytes.max(over_disk_bytes);
        let trash = self.evict_down_to(&mut index, used_max_bytes);
        if index.used_bytes > used_max_bytes {
            drop(index);
            drop(trash);
            return Err(BlobError::Io(io::Error::other("models that should make room cannot be deleted")));
        }
        index.reserved_bytes += size_bytes;
        index.coming.extend(file.clone().map(|file| (file, size_bytes)));
        drop(index);
        drop(trash);
        Ok(Room { shared: self.clone(), bytes: size_bytes, file })
    }

    /// Makes the folders again if somebody has removed them, and forgets the blobs that went with them.
    fn restore_folders(&self, index: &mut Index) -> io::Result<()> {
        let tmp = self.dir.join("tmp");
        if !is_gone(&tmp) {
            return Ok(());
        }
        fs::create_dir_all(&tmp).map_err(|error| {
            io::Error::new(error.kind(), format!("{} has gone and cannot be made again: {error}", tmp.display()))
        })?;
        let gone: Vec<_> = index.blobs.keys().copied().filter(|digest| is_gone(&self.path(*digest))).collect();
        warn!(folder = %self.dir.display(), models_lost = gone.len(), "the blob store had gone from the disk: made again");
        for digest in gone {
            index.used_bytes -= index.blobs.remove(&digest).map_or(0, |blob| blob.size_bytes);
        }
        Ok(())
    }

    /// Evicts until at most this much is used, or nothing more can be evicted.
    fn evict_down_to(&self, index: &mut Index, used_max_bytes: u64) -> Vec<Trash> {
        let mut trash = Vec::new();
        if index.used_bytes <= used_max_bytes {
            return trash;
        }
        let idle = index.blobs.iter().filter(|(_, blob)| !blob.is_pinned());
        let mut idle: Vec<_> = idle.map(|(digest, blob)| (blob.last_use, *digest, blob.size_bytes)).collect();
        idle.sort_unstable();
        for (_, digest, size_bytes) in idle {
            if index.used_bytes <= used_max_bytes {
                break;
            }
            info!(model = %digest.short(), size = %show_bytes(size_bytes), "a model makes room");
            trash.extend(self.forget(index, digest));
        }
        trash
    }

    /// Removes a blob and its name. Dropping the returned value deletes the file, which may be slow: do it after the
    /// index is unlocked. A blob whose file stays on the disk goes on counting, and is verified before its next use.
    fn forget(&self, index: &mut Index, digest: Digest) -> Option<Trash> {
        let blob = index.blobs.get_mut(&digest)?;
        let (path, trash) = (self.path(digest), self.new_tmp());
        let renamed = fs::rename(&path, &trash);
        if let Err(error) = &renamed {
            warn!(path = %path.display(), %error, "a model cannot be deleted");
            if !is_gone(&path) {
                blob.verified = false;
                return None;
            }
        }
        index.used_bytes -= blob.size_bytes;
        index.blobs.remove(&digest);
        renamed.is_ok().then_some(Trash(trash))
    }

    /// A path in `tmp` that no other file has.
    fn new_tmp(&self) -> PathBuf {
        let number = self.next_tmp.fetch_add(1, Ordering::Relaxed);
        self.dir.join("tmp").join(number.to_string())
    }
}

/// The file of a removed blob. Dropping it deletes the file.
struct Trash(PathBuf);

impl Drop for Trash {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            warn!(path = %self.0.display(), %error, "a model cannot be deleted");
        }
    }
}

/// Indexes the blobs of an earlier life. Anything else in the folder is left alone.
fn scan(dir: &Path) -> io::Result<Index> {
    let mut found: Vec<(SystemTime, Digest, u64)> = Vec::new();
    for folder in fs::read_dir(dir)? {
        let folder = folder?;
        if !folder.file_type()?.is_dir() || folder.file_name() == "tmp" {
            continue;
        }
        for entry in fs::read_dir(folder.path())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let meta = entry.metadata()?;
            match name.parse::<Digest>() {
                Ok(digest) if meta.is_file() && meta.nlink() == 1 && folder.file_name() == name[..2] => {
                    found.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), digest, meta.len()));
                }
                _ => warn!(path = %entry.path().display(), "not a blob: left alone"),
            }
        }
    }
    found.sort_unstable();
    let mut index = Index::default();
    for (_, digest, size_bytes) in found {
        index.uses += 1;
        index.used_bytes += size_bytes;
        let blob = Blob { size_bytes, last_use: index.uses, verified: false, pin: Arc::default() };
        index.blobs.insert(digest, blob);
    }
    index.noted_uses = index.uses;
    Ok(index)
}

/// Hashes a blob on disk.
fn verify(path: &Path, digest: Digest, size_bytes: u64) -> Result<(), String> {
    let mut file = open_no_link(path).map_err(|error| error.to_string())?;
    let meta = file.metadata().map_err(|error| error.to_string())?;
    if !meta.is_file() || meta.nlink() != 1 {
        return Err("not a plain file of its own".to_owned());
    }
    if meta.len() != size_bytes {
        return Err(format!("{} bytes, not {size_bytes}", meta.len()));
    }
    let mut hasher = blake3::Hasher::new();
    // The size of the second-level cache of small machines.
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer).map_err(|error| error.to_string())? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        };
    }
    if Digest::from(hasher.finalize()) != digest {
        return Err("its bytes have changed".to_owned());
    }
    Ok(())
}

/// Whether nothing has this name.
fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn open_no_link(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(path)
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(dir)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

#[cfg(test)]
mod tests;
