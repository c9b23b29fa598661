//! Owns the wire as it is: every message pinned byte for byte, and proof that hostile bytes do no harm.
//!
//! `bytes/golden.txt` holds one line per sample. A line that changes means that released peers no longer understand
//! each other: give the changed message a new number instead (CONTRIBUTING.md, "A new message").

#[path = "bytes/samples.rs"]
mod samples;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use proptest::prelude::*;
use proto_msgs::{
    Attempt, ClientId, ClientToBroker, ClientToWorker, Close, DecodeError, EncodeError, ErrorCode, Failure, Frame,
    Header, ModelFormat, Outcome, Register, TaskId, ToBroker, VERSION, VERSION_MIN, WorkerToBroker,
    header::HEADER_BYTES, limits,
};
use samples::{Any, all_kinds, register, samples, ticket};

const GOLDEN: &str = include_str!("bytes/golden.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A frame with this body under a header of the right length.
fn with_body(kind: u16, body: &[u8]) -> Frame {
    let header = Header { version: VERSION, kind, body_bytes: body.len() as u32 };
    Frame::new([&header.to_bytes()[..], body].concat())
}

fn with_version(frame: &Frame, version: u16) -> Frame {
    let mut head = frame.head.to_vec();
    head[4..6].copy_from_slice(&version.to_le_bytes());
    Frame::new(head)
}

#[test]
fn every_kind_is_pinned_and_no_number_is_used_twice() {
    let kinds = all_kinds();
    let numbers: BTreeSet<u16> = kinds.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers.len(), kinds.len(), "a number is used twice: {kinds:?}");
    let sampled: BTreeSet<u16> = samples().iter().map(Any::kind).collect();
    assert_eq!(sampled, numbers, "a kind has no sample");
}

/// With `PIN=1` in the environment the test writes the file anew: for a new message, before its first release.
#[test]
fn the_bytes_are_the_pinned_ones() {
    let line = |sample: &Any| format!("{} {} {}\n", sample.kind(), sample.name(), hex(&sample.to_frame().head));
    let now: String = samples().iter().map(line).collect();
    if std::env::var_os("PIN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bytes/golden.txt");
        std::fs::write(path, &now).expect("golden.txt can be written");
        return;
    }
    for (now, pinned) in now.lines().zip(GOLDEN.lines()) {
        assert_eq!(now, pinned, "the wire changed");
    }
    assert_eq!(now.lines().count(), GOLDEN.lines().count(), "samples and golden.txt differ in number");
}

#[test]
fn every_message_comes_back_as_it_was() {
    for sample in samples() {
        assert_eq!(Any::from_frame(sample.kind(), &sample.to_frame()).as_ref(), Ok(&sample));
    }
}

#[test]
fn a_message_of_another_direction_is_an_unknown_kind() {
    for sample in samples() {
        let frame = sample.to_frame();
        let other_direction = (sample.kind() + 100) % 600;
        assert_eq!(Any::from_frame(other_direction, &frame), Err(DecodeError::UnknownKind(sample.kind())));
    }
}

#[test]
fn a_message_cut_anywhere_is_refused() {
    for sample in samples() {
        let frame = sample.to_frame();
        for length in 0..frame.head.len() {
            let cut = Frame { head: frame.head.slice(..length), payload: Bytes::new() };
            assert!(Any::from_frame(sample.kind(), &cut).is_err(), "{} cut to {length} bytes", sample.name());
            if length >= HEADER_BYTES {
                let relabelled = with_body(sample.kind(), &frame.head[HEADER_BYTES..length]);
                assert!(Any::from_frame(sample.kind(), &relabelled).is_err(), "{} cut to {length}", sample.name());
            }
        }
    }
}

#[test]
fn a_message_with_bytes_to_spare_is_refused() {
    for sample in samples() {
        let longer = [&sample.to_frame().head[HEADER_BYTES..], &[0]].concat();
        let answer = Any::from_frame(sample.kind(), &with_body(sample.kind(), &longer));
        assert!(matches!(answer, Err(DecodeError::Garbled { .. })), "{}: {answer:?}", sample.name());
    }
}

/// A flipped byte may make another valid message, but never a panic. What is decoded can be encoded again.
#[test]
fn a_flipped_byte_never_panics() {
    for sample in samples() {
        let frame = sample.to_frame();
        for at in 0..frame.head.len() {
            for mask in [0x01, 0x80, 0xFF] {
                let mut head = frame.head.to_vec();
                head[at] ^= mask;
                if let Ok(message) = Any::from_frame(sample.kind(), &Frame::new(head)) {
                    assert_eq!(Any::from_frame(message.kind(), &message.to_frame()).as_ref(), Ok(&message));
                }
            }
        }
    }
}

/// Records the largest single allocation, to show that an announced length is not believed.
struct Counting;

static LARGEST_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST_BYTES.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps alloc's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps dealloc's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Puts a length of 2^40 wherever a length may stand: no single allocation exceeds the largest message.
#[test]
fn an_announced_length_is_checked_before_it_is_allocated() {
    let huge = [&[253_u8][..], &(1_u64 << 40).to_le_bytes()].concat();
    for sample in samples() {
        let body = sample.to_frame().head.slice(HEADER_BYTES..);
        for at in 0..body.len() {
            let hostile = [&body[..at], &huge, &body[at + 1..]].concat();
            if let Ok(message) = Any::from_frame(sample.kind(), &with_body(sample.kind(), &hostile)) {
                assert!(message.to_frame().size_bytes() <= limits::CONTROL_BYTES_MAX);
            }
        }
    }
    let largest_bytes = LARGEST_BYTES.load(Ordering::Relaxed);
    // Twice, because a growing list doubles. The other tests of this file stay far below.
    assert!(largest_bytes <= 2 * limits::FRAME_BYTES_MAX, "{largest_bytes} bytes were allocated at once");
}

#[test]
fn what_is_longer_than_any_message_is_not_looked_at() {
    let head = Bytes::from(vec![0; limits::CONTROL_BYTES_MAX + 1]);
    let answer = ClientToWorker::from_frame(&Frame { head, payload: Bytes::new() });
    assert!(matches!(answer, Err(DecodeError::TooLong { .. })), "{answer:?}");

    let chunk = samples().into_iter().find(|sample| sample.kind() == 401).expect("chunks are sampled");
    let payload = Bytes::from(vec![0; limits::CHUNK_BYTES_MAX + 1]);
    let answer = ClientToWorker::from_frame(&Frame { payload, ..chunk.to_frame() });
    assert!(matches!(answer, Err(DecodeError::TooLong { .. })), "{answer:?}");
}

#[test]
fn an_older_and_a_newer_peer_are_told_what_is_spoken_here() {
    for sample in samples() {
        for theirs in [VERSION_MIN - 1, VERSION + 1, u16::MAX] {
            let answer = Any::from_frame(sample.kind(), &with_version(&sample.to_frame(), theirs));
            assert_eq!(answer, Err(DecodeError::Version { theirs }));
        }
    }
    let refusal = Frame::unsupported();
    let understood = DecodeError::Unsupported { min: VERSION_MIN, max: VERSION };
    assert_eq!(ToBroker::from_frame(&refusal), Err(understood.clone()));
    // A peer of any version must understand the refusal, so it is read whatever version its header names.
    assert_eq!(ToBroker::from_frame(&with_version(&refusal, VERSION + 7)), Err(understood));
    assert_eq!(hex(&refusal.head), "4d455348020000000400000002000200", "frozen for ever");
}

#[test]
fn strangers_are_told_apart_from_garbled_peers() {
    for stranger in [&b""[..], b"MESH", b"GET / HTTP/1.1\r\n\r\n", &[0xFF; 64]] {
        assert_eq!(ToBroker::from_frame(&Frame::new(stranger.to_vec())), Err(DecodeError::NotOurs));
    }
}

/// A second implementation of the encoding writes and reads the same bytes, so the wire does not depend on one crate.
mod oracle {
    use wincode::{SchemaRead, SchemaWrite, config::Configuration};

    use super::*;

    #[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
    enum Arch {
        Amd64,
        Arm64,
    }

    #[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
    enum EngineKind {
        Docker,
        Process,
    }

    #[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
    enum ModelFormat {
        TfLite,
        Onnx,
    }

    #[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
    struct Gpu {
        name: String,
        memory_bytes: u64,
    }

    /// `proto_msgs::Register`, written down a second time.
    #[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
    struct Register {
        worker: [u8; 16],
        epoch: u64,
        name: String,
        version: String,
        os: String,
        arch: Arch,
        cores: u32,
        memory_bytes: u64,
        run_memory_bytes: u64,
        engine: EngineKind,
        formats: Vec<ModelFormat>,
        endpoints: Vec<String>,
        key: Option<[u8; 32]>,
        ticket_key: [u8; 32],
        slots: [u16; 2],
        device_map: Vec<i16>,
        device_width: u16,
        labels: Vec<(String, String)>,
        gpus: Vec<Gpu>,
        heartbeat_ms: u32,
    }

    fn second_writing() -> Register {
        let said = register();
        Register {
            worker: *said.worker.as_bytes(),
            epoch: said.epoch.0,
            name: said.name,
            version: said.version,
            os: said.os,
            arch: Arch::Arm64,
            cores: said.cores,
            memory_bytes: said.memory_bytes,
            run_memory_bytes: said.run_memory_bytes,
            engine: EngineKind::Process,
            formats: vec![ModelFormat::TfLite, ModelFormat::Onnx],
            endpoints: said.endpoints,
            key: said.key.map(|key| key.0),
            ticket_key: said.ticket_key.0,
            slots: said.slots,
            device_map: said.device_map,
            device_width: said.device_width,
            labels: said.labels,
            gpus: said.gpus.into_iter().map(|gpu| Gpu { name: gpu.name, memory_bytes: gpu.memory_bytes }).collect(),
            heartbeat_ms: said.heartbeat_ms,
        }
    }

    #[test]
    fn another_crate_writes_and_reads_the_same_bytes() {
        let config = Configuration::default().with_varint_encoding();
        let frame = WorkerToBroker::Register(register()).to_frame().expect("short");
        let written = wincode::config::serialize(&second_writing(), config).expect("can be written");
        assert_eq!(hex(&written), hex(&frame.head[HEADER_BYTES..]));
        let read: Register = wincode::config::deserialize(&written, config).expect("can be read");
        assert_eq!(read, second_writing());
    }
}

proptest! {
    #[test]
    fn random_bodies_never_panic(kind in 0..600_u16, body in prop::collection::vec(any::<u8>(), 0..512)) {
        if let Ok(message) = Any::from_frame(kind, &with_body(kind, &body)) {
            prop_assert_eq!(Any::from_frame(kind, &message.to_frame()), Ok(message));
        }
    }

    #[test]
    fn random_frames_never_panic(head in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = ToBroker::from_frame(&Frame::new(head));
    }

    #[test]
    fn a_changed_ticket_is_forged(at in 0..200_usize, mask in 1..=255_u8) {
        let sound = ticket();
        let key = proto_msgs::TicketKey([0x5E; 32]);
        let mut bytes = bincode::encode_to_vec(&sound, bincode::config::standard()).expect("encodes");
        let at = at % bytes.len();
        bytes[at] ^= mask;
        let changed = bincode::decode_from_slice::<proto_msgs::Ticket, _>(&bytes, bincode::config::standard());
        if let Ok((changed, _)) = changed && changed != sound {
            let who = (changed.body.worker, changed.body.epoch);
            let verdict = changed.verify(&key, who, changed.body.client_key, 0);
            prop_assert_eq!(verdict, Err(proto_msgs::TicketError::Forged));
        }
    }
}

/// The sender hears of it at once: its receiver would drop the message in silence, and the sender would wait for an
/// answer.
#[test]
fn a_text_longer_than_a_person_reads_is_refused_at_both_doors() {
    let text = "x".repeat(limits::TEXT_BYTES_MAX + 1);
    let outcome = Outcome::Failed(Failure { code: ErrorCode::RunFailed, text });
    let (task, client) = (TaskId::from_bytes([1; 16]), ClientId::from_bytes([2; 16]));
    let close = Close { task, client, attempt: Attempt(1), outcome };
    let body = bincode::encode_to_vec(&close, bincode::config::standard()).expect("encodes");
    let close = ClientToBroker::Close(close);
    assert!(matches!(close.to_frame(), Err(EncodeError::OverLimit { .. })));
    let frame = with_body(close.kind(), &body);
    assert!(matches!(ClientToBroker::from_frame(&frame), Err(DecodeError::Garbled { .. })));
}

#[test]
fn a_worker_that_says_more_of_itself_than_a_row_may_hold_is_refused() {
    let is_taken = |change: fn(&mut Register)| {
        let mut said = register();
        change(&mut said);
        let body = bincode::encode_to_vec(&said, bincode::config::standard()).expect("encodes");
        let frame = with_body(WorkerToBroker::Register(said).kind(), &body);
        WorkerToBroker::from_frame(&frame).is_ok()
    };
    assert!(is_taken(|said| said.heartbeat_ms = limits::HEARTBEAT_MS_MAX));
    assert!(!is_taken(|said| said.heartbeat_ms = u32::MAX), "it would never count as dead");
    assert!(!is_taken(|said| said.formats = vec![ModelFormat::Onnx; 10_000]));
    assert!(!is_taken(|said| said.gpus[0].name = "x".repeat(limits::NAME_BYTES_MAX + 1)));
}

#[test]
fn a_page_is_never_longer_than_a_message() {
    let rows = std::iter::repeat_n("x".repeat(limits::TEXT_BYTES_MAX), 1000);
    let page = proto_msgs::codec::page(rows);
    assert!(!page.is_empty() && page.len() < limits::PAGE_ROWS_MAX, "{} rows", page.len());
    assert_eq!(proto_msgs::codec::page(["x".repeat(limits::PAGE_BYTES_MAX + 1)].into_iter()).len(), 1);
}
