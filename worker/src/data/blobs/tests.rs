use std::time::Duration;

use proto_msgs::{ErrorCode, Failure};

use super::*;
use crate::batch::tests::skip;

const MIB: u64 = 1 << 20;

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary folder") }
    }

    fn store(&self, quota_bytes: u64) -> BlobStore {
        BlobStore::open(self.dir.path(), quota_bytes).expect("a store")
    }

    fn files(&self) -> usize {
        let folders = fs::read_dir(self.dir.path()).expect("the folder");
        folders.map(|folder| fs::read_dir(folder.expect("an entry").path()).expect("a folder").count()).sum()
    }
}

fn model(seed: u8, size_bytes: u64) -> Vec<u8> {
    vec![seed; size_bytes as usize]
}

fn put(store: &BlobStore, bytes: &[u8]) -> Result<Pin, BlobError> {
    let mut file = store.spool(bytes.len() as u64)?.create()?;
    bytes.chunks(1000).try_for_each(|piece| file.write(piece))?;
    let (file, digest) = file.finish();
    assert_eq!(digest, Digest::of(bytes));
    store.adopt(file, digest)
}

#[test]
fn a_model_is_held_under_its_digest_and_read_only() {
    let home = Home::new();
    let store = home.store(MIB);
    let pin = put(&store, &model(1, 5000)).expect("room");
    assert_eq!(fs::read(pin.path()).expect("the file"), model(1, 5000));
    assert_eq!(fs::metadata(pin.path()).expect("the file").permissions().mode() & 0o777, 0o444);
    assert_eq!(store.held(), [Digest::of(&model(1, 5000))]);
}

#[tokio::test]
async fn while_a_thread_works_on_the_disk_nobody_who_carries_transfers_waits_for_it() {
    let home = Home::new();
    let store = home.store(MIB);
    let held = put(&store, &model(1, 5000)).expect("room");
    let (room, digest) = (store.room(MIB / 2).expect("room"), Digest::of(&model(1, 5000)));
    {
        let _a_slow_disk = store.shared.index();
        assert!(store.pin_at_once(digest).is_none(), "it is looked up where one may wait");
        drop(room);
    }
    assert!(store.pin_at_once(digest).is_some_and(|pin| pin.path() == held.path()));
    let all_given_back = async {
        while store.shared.index().reserved_bytes > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all_given_back).await.expect("the room is free again");
}

#[test]
fn the_longest_unused_model_makes_room() {
    let home = Home::new();
    let store = home.store(3 * MIB);
    for seed in 1..=3 {
        put(&store, &model(seed, MIB)).expect("room");
    }
    assert!(store.pin(Digest::of(&model(1, MIB))).is_some());
    put(&store, &model(4, MIB)).expect("room after one went");
    assert_eq!(store.held(), [4, 1, 3].map(|seed| Digest::of(&model(seed, MIB))));
}

#[test]
fn a_model_in_use_is_never_evicted() {
    let home = Home::new();
    let store = home.store(2 * MIB);
    let used = put(&store, &model(1, MIB)).expect("room");
    let also_used = put(&store, &model(2, MIB)).expect("room");
    assert!(matches!(put(&store, &model(3, MIB)), Err(BlobError::QuotaTaken { .. })));
    drop(also_used);
    put(&store, &model(3, MIB)).expect("room after one was let go");
    assert!(used.path().exists());
}

#[test]
fn a_model_that_cannot_be_deleted_keeps_its_room() {
    let home = Home::new();
    let store = home.store(2 * MIB);
    drop(put(&store, &model(1, MIB)).expect("room"));
    let tmp = home.dir.path().join("tmp");
    fs::remove_dir(&tmp).expect("nothing is on its way");
    fs::write(&tmp, "in the way").expect("a file in its place");
    let refused = store.room(2 * MIB).expect_err("the model is still on the disk");
    assert_eq!(Failure::from(refused).code, ErrorCode::DiskFull);
    store.room(MIB).expect("beside the model");
    assert!(store.pin(Digest::of(&model(1, MIB))).is_some(), "it is as good as before");

    fs::remove_file(&tmp).and_then(|()| fs::create_dir(&tmp)).expect("the disk works again");
    store.room(2 * MIB).expect("instead of the model");
    assert!(store.held().is_empty());
}

#[test]
fn what_replaces_a_changed_file_counts_with_its_own_length() {
    let home = Home::new();
    let (bytes, digest) = (model(1, MIB), Digest::of(&model(1, MIB)));
    let path = put(&home.store(4 * MIB), &bytes).expect("room").path().to_owned();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    fs::write(&path, [bytes.clone(), bytes.clone()].concat()).expect("a longer file");
    let store = home.store(4 * MIB);
    // The new file is on its way, and the changed one cannot be moved away to be deleted.
    let mut file = store.spool(MIB).and_then(Spooled::create).expect("room");
    file.write(&bytes).expect("writing");
    let (file, _) = file.finish();
    let (tmp, aside) = (home.dir.path().join("tmp"), home.dir.path().join("aside"));
    fs::rename(&tmp, &aside).expect("moved aside");
    assert!(store.pin(digest).is_none() && store.has(digest), "it goes on counting");
    fs::rename(&aside, &tmp).expect("moved back");

    let pin = store.adopt(file, digest).expect("it replaces the changed file");

    assert_eq!(pin.size_bytes(), MIB);
    assert_eq!(store.pin(digest).expect("verified").size_bytes(), MIB);
    let _rest = store.room(3 * MIB).expect("exactly one MiB is used");
    assert!(store.room(1).is_err());
}

#[test]
fn what_is_announced_too_large_is_refused_before_a_byte_and_evicts_nothing() {
    let home = Home::new();
    let store = home.store(2 * MIB);
    put(&store, &model(1, MIB)).expect("room");
    let refused = store.spool(3 * MIB).expect_err("over quota");
    assert_eq!(Failure::from(refused).code, ErrorCode::QuotaExceeded);
    assert_eq!(store.held().len(), 1);
}

#[test]
fn a_store_whose_folder_goes_is_made_again_and_forgets_what_went_with_it() {
    let home = Home::new();
    let store = home.store(2 * MIB);
    let digest = put(&store, &model(1, MIB)).map(|_| Digest::of(&model(1, MIB))).expect("room");
    fs::remove_dir_all(home.dir.path()).expect("the folder is ours");

    put(&store, &model(2, 2 * MIB)).expect("all the room is free again");

    assert!(!store.has(digest) && store.pin(Digest::of(&model(2, 2 * MIB))).is_some());
}

#[test]
fn room_is_promised_once() {
    let home = Home::new();
    let store = home.store(2 * MIB);
    let first = store.spool(MIB + 1).expect("room");
    assert!(matches!(store.spool(MIB), Err(BlobError::QuotaTaken { .. })));
    drop(first);
    store.spool(MIB).expect("given back");
}

#[test]
fn who_needs_room_that_others_have_may_wait_and_who_needs_more_than_there_is_may_not() {
    let home = Home::new();
    let store = home.store(2 * MIB);
    let _others = store.spool(MIB + 1).expect("room");
    let code = |needed_bytes| store.spool(MIB).expect_err("taken").before_run(needed_bytes).code;
    assert_eq!([MIB, 2 * MIB, 2 * MIB + 1].map(code), [ErrorCode::Busy, ErrorCode::Busy, ErrorCode::QuotaExceeded]);
}

#[test]
fn the_store_survives_a_restart_and_sweeps_half_written_files() {
    let home = Home::new();
    let store = home.store(3 * MIB);
    for (seed, age_s) in [(1, 100), (2, 300), (3, 200)] {
        let pin = put(&store, &model(seed, MIB)).expect("room");
        let time = SystemTime::now() - Duration::from_secs(age_s);
        fs::set_permissions(pin.path(), fs::Permissions::from_mode(0o644)).expect("chmod");
        OpenOptions::new().write(true).open(pin.path()).and_then(|file| file.set_modified(time)).expect("utimes");
    }
    drop(store);
    fs::write(home.dir.path().join("tmp/99"), "half").expect("a left-over");
    let store = home.store(3 * MIB);
    assert_eq!(home.files(), 3);
    assert_eq!(store.held(), [1, 3, 2].map(|seed| Digest::of(&model(seed, MIB))));
}

#[test]
fn the_order_of_use_survives_a_restart() {
    let home = Home::new();
    let digests = [1, 2, 3].map(|seed| Digest::of(&model(seed, MIB)));
    let store = home.store(3 * MIB);
    (1..=3).for_each(|seed| drop(put(&store, &model(seed, MIB)).expect("room")));
    // Hashed at its first use after the start, and then used again, behind the second one.
    for used in [digests[0], digests[1], digests[0]] {
        store.pin(used).expect("it is held");
    }
    store.note_uses();
    assert_eq!(home.store(3 * MIB).held(), [digests[0], digests[1], digests[2]]);
}

#[test]
fn a_model_that_changed_on_the_disk_is_found_and_deleted() {
    let home = Home::new();
    let digest = Digest::of(&model(1, MIB));
    let path = put(&home.store(3 * MIB), &model(1, MIB)).expect("room").path().to_owned();
    let mut bytes = model(1, MIB);
    bytes[500] ^= 1;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    fs::write(&path, bytes).expect("a flipped bit");

    let store = home.store(3 * MIB);
    assert!(store.pin(digest).is_none());
    assert!(!path.exists() && store.held().is_empty());
    put(&store, &model(1, MIB)).expect("fetched again");
    assert!(store.pin(digest).is_some());
}

#[test]
fn a_link_is_not_a_model() {
    let home = Home::new();
    let path = put(&home.store(MIB), &model(1, 100)).expect("room").path().to_owned();
    let elsewhere = home.dir.path().join("elsewhere");
    fs::rename(&path, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("linked");
    assert!(home.store(MIB).pin(Digest::of(&model(1, 100))).is_none());
}

#[test]
fn a_file_that_is_given_up_leaves_nothing() {
    let home = Home::new();
    let store = home.store(MIB);
    let mut half = store.spool(MIB).and_then(Spooled::create).expect("room");
    half.write(b"half").expect("writing");
    drop(half);
    assert_eq!(home.files(), 0);
    store.spool(MIB).expect("its room is free again");
}

/// A mounted disk of 24 MiB; unmounted when dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(path: &'a Path) -> Option<Self> {
        run("mount", &["-t", "tmpfs", "-o", "size=24m", "tmpfs"], path).then_some(Self(path))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        run("umount", &[], self.0);
    }
}

fn run(program: &str, args: &[&str], path: &Path) -> bool {
    std::process::Command::new(program).args(args).arg(path).status().is_ok_and(|status| status.success())
}

/// This test needs the right to mount.
#[test]
fn a_full_disk_is_told_from_a_full_quota() {
    if !nix::unistd::geteuid().is_root() {
        return skip("mounting a small disk needs root");
    }
    let home = Home::new();
    let Some(_disk) = SmallDisk::mount(home.dir.path()) else { return skip("no small disk can be mounted") };
    let store = home.store(1 << 30);
    put(&store, &model(1, 2 * MIB)).expect("room");
    put(&store, &model(2, 2 * MIB)).expect("room beside");
    let refused = store.spool(23 * MIB).map(|_| ()).expect_err("no such disk");
    let held = store.held();
    drop(store);
    assert_eq!(Failure::from(refused).code, ErrorCode::DiskFull);
    assert_eq!(held.len(), 2, "what cannot fit throws nothing out");
}

/// This test needs the right to mount.
#[test]
fn room_on_the_disk_is_promised_once() {
    if !nix::unistd::geteuid().is_root() {
        return skip("mounting a small disk needs root");
    }
    let home = Home::new();
    let Some(_disk) = SmallDisk::mount(home.dir.path()) else { return skip("no small disk can be mounted") };
    let store = home.store(1 << 30);
    put(&store, &model(1, 8 * MIB)).expect("room");
    let mut first = store.spool(10 * MIB).and_then(Spooled::create).expect("room beside the model");
    first.write(&model(2, 4 * MIB)).expect("room");

    let mut second = store.spool(8 * MIB).and_then(Spooled::create).expect("room instead of the model");

    first.write(&model(2, 6 * MIB)).and_then(|()| second.write(&model(3, 8 * MIB))).expect("room as promised");
    assert!(store.held().is_empty(), "the model made room");
    assert!(matches!(store.spool(4 * MIB), Err(BlobError::DiskFull { .. })));
    drop(first);
    store.spool(4 * MIB).expect("the room of what is given up is free again");
}
