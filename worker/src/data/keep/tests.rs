//! Tests of what the kept attempts keep, lose and leave alone over restarts.

use bytes::Bytes;
use proto_msgs::{Attempt, DType, Digest, Dispatch, InputDecl, ModelFormat, ModelRef, TaskId, TicketBody, TicketKey};

use super::*;

fn ticket() -> Ticket {
    let body =
        TicketBody { task: id().task, attempt: id().attempt, detached: true, ..mesh_samples::ticket_body(0, 2, 1) };
    Ticket::sign(body, &TicketKey([0; 32]))
}

fn id() -> AttemptId {
    AttemptId { task: TaskId::from_bytes([7; 16]), attempt: Attempt(2) }
}

fn manifest(inputs: &[&[u8]]) -> Manifest {
    let model = ModelRef { digest: Digest::of(b"model"), size_bytes: 5, format: ModelFormat::Onnx };
    let declare = |bytes: &&[u8]| {
        let (digest, size_bytes) = (Digest::of(bytes), bytes.len() as u64);
        InputDecl { name: None, dtype: None, shape: None, digest, size_bytes }
    };
    let inputs = inputs.iter().map(declare).collect();
    Manifest { model, model_name: "m".to_owned(), then: Vec::new(), items: 1, inputs }
}

fn bytes(payload: &Payload) -> Vec<u8> {
    match payload {
        Payload::Memory(bytes) => bytes.to_vec(),
        Payload::File { path, .. } => fs::read(path).expect("the file"),
    }
}

fn note() -> RunNote {
    RunNote { stage: 0, rows: (0, 1), batch_rows: 8, dispatch: Dispatch::Full, run_us: 1 }
}

const DONE: Outcome = Outcome::Done { run_us: 1, load_us: 2 };

fn output() -> Output {
    let (name, digest) = ("out".to_owned(), Digest::of(b"out"));
    Output { name, dtype: DType::U8, shape: vec![3], digest, payload: Payload::Memory(Bytes::from_static(b"out")) }
}

fn store(home: &tempfile::TempDir) -> BlobStore {
    BlobStore::open(&home.path().join("blobs"), 1 << 20).expect("a store")
}

fn open(home: &tempfile::TempDir) -> (Keep, Vec<Found>) {
    Keep::open(home.path().join("attempts"), store(home)).expect("a folder")
}

#[test]
fn a_detached_attempt_outlives_the_process_before_and_after_its_run() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, found) = open(&home);
    assert!(found.is_empty());
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");

    let (keep, found) = open(&home);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].id, &found[0].manifest), (id(), &manifest(&[b"input"])));
    let restored = found[0].restored();
    assert_eq!((restored.ticket, restored.outcome, restored.runs_begun), (ticket(), None, 0));
    assert_eq!(bytes(&found[0].inputs[0]), b"input");

    keep.begin_run(id()).expect("noted");
    keep.begin_run(id()).expect("noted");
    keep.give_up_run(id()).expect("noted");
    assert_eq!(open(&home).1[0].runs_begun, 1);

    assert_eq!(keep.finish(id(), DONE, &[note()], &[output()]), DONE);
    let (keep, found) = open(&home);
    let result = found[0].result.as_ref().expect("an end");
    assert_eq!((&result.outcome, bytes(&result.outputs[0].payload).as_slice()), (&DONE, b"out".as_slice()));
    assert_eq!(found[0].restored().runs, [note()]);

    keep.remove(id());
    assert!(open(&home).1.is_empty());
}

#[test]
fn what_is_saved_too_late_or_cannot_be_saved_leaves_nothing() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let missing = Payload::File { path: home.path().join("missing"), offset: 0, size_bytes: 5, owner: None };
    assert!(keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![missing]).is_err());
    assert_eq!(fs::read_dir(&keep.root).expect("the folder").count(), 0);

    keep.remove(id());
    let input = Payload::Memory(Bytes::from_static(b"input"));
    assert!(keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).is_err());
    assert!(open(&home).1.is_empty());
}

#[test]
fn an_output_that_an_earlier_life_left_is_replaced() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");
    fs::write(keep.folder(id()).join("output-1"), b"older").expect("a left-over");
    let path = home.path().join("spooled");
    fs::write(&path, b"out").expect("an output");
    let payload = Payload::File { path, offset: 0, size_bytes: 3, owner: None };
    assert_eq!(keep.finish(id(), DONE, &[], &[Output { payload, ..output() }]), DONE);
    let (_, found) = open(&home);
    assert_eq!(bytes(&found[0].result.as_ref().expect("an end").outputs[0].payload), b"out");
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_that_the_next_life_knows_too() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");
    // A folder instead of a file: nothing can be written there, as on a full disk.
    fs::create_dir(keep.folder(id()).join("output-2")).expect("a folder");
    let told = keep.finish(id(), DONE, &[note()], &[output(), output()]);
    let Outcome::Failed(failure) = &told else { panic!("its result is lost with the process: {told:?}") };
    assert_eq!(failure.code, ErrorCode::DiskFull);
    assert!(failure.text.contains("--state-dir") && failure.text.contains("submit it again"), "{}", failure.text);
    assert!(!keep.folder(id()).join("output-1").exists(), "it only takes room");

    let (_, found) = open(&home);
    assert_eq!(found[0].restored().outcome, Some(told));
}

#[test]
fn an_end_that_cannot_be_written_at_all_leaves_nothing_to_run_again() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");
    fs::create_dir(keep.folder(id()).join("result.new")).expect("a folder");
    assert_eq!(keep.finish(id(), Outcome::Cancelled, &[], &[]), Outcome::Cancelled);
    assert!(open(&home).1.is_empty());
}

#[test]
fn what_is_kept_counts_against_the_quota_until_it_is_removed() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let store = store(&home);
    let (keep, _) = Keep::open(home.path().join("attempts"), store.clone()).expect("a folder");
    let most = vec![7; 800 << 10];
    let input = Payload::Memory(most.clone().into());
    keep.save(id(), &ticket(), &manifest(&[&most]), vec![input]).expect("saved");
    assert!(store.room(300 << 10).is_err(), "most of a MiB is in use");

    let next_life = self::store(&home);
    let (keep, found) = Keep::open(home.path().join("attempts"), next_life.clone()).expect("a folder");
    assert_eq!(found.len(), 1);
    assert!(next_life.room(300 << 10).is_err(), "and still is");
    keep.remove(id());
    assert!(next_life.room(300 << 10).is_ok());
}

#[test]
fn what_was_not_whole_is_not_found() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");
    fs::write(keep.folder(id()).join("input-1"), b"inp").expect("cut");
    fs::create_dir(keep.root.join("half.new")).expect("a left-over");
    assert!(open(&home).1.is_empty());
    assert_eq!(fs::read_dir(keep.root).expect("the folder").count(), 0);
}

#[test]
fn what_cannot_be_read_just_now_is_left_for_the_next_start() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");
    fs::write(keep.root.join("notes.txt"), b"a stranger's").expect("a file");
    let (open_file, aside) = (keep.folder(id()).join("open"), home.path().join("open"));
    fs::rename(&open_file, &aside).expect("moved away");
    // A folder instead of a file: it opens but cannot be read, like a file on a bad disk.
    fs::create_dir(&open_file).expect("a folder");
    assert!(open(&home).1.is_empty());

    fs::remove_dir(&open_file).expect("removed");
    fs::rename(&aside, &open_file).expect("moved back");
    assert_eq!(open(&home).1.len(), 1);
    assert!(keep.root.join("notes.txt").exists());
}

#[test]
fn what_another_version_has_kept_is_there_when_that_version_is_back() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let (keep, _) = open(&home);
    let input = Payload::Memory(Bytes::from_static(b"input"));
    keep.save(id(), &ticket(), &manifest(&[b"input"]), vec![input]).expect("saved");
    let path = keep.folder(id()).join("open");
    let ours = fs::read(&path).expect("it was saved");
    let mut theirs = ours.clone();
    theirs[4..6].copy_from_slice(&999_u16.to_le_bytes());
    fs::write(&path, &theirs).expect("written");
    assert!(open(&home).1.is_empty());
    fs::write(&path, &ours).expect("it is still there");
    assert_eq!(open(&home).1.len(), 1);
}
