//! The direct blob stream over real loopback sockets.

use std::{fs, io::Write, path::Path, time::Duration};

use bytes::Bytes;
use mesh_transport::{
    Heard, Received,
    blob::{Arrival, Compression, Feedback, Incoming, IncomingError, Intake, Outgoing, Role, Source, UploadError},
};
use proto_msgs::{BlobIndex, Chunk, Digest, Frame, PeerId, WorkerToClient, limits::CHUNK_BYTES_MAX};
use tokio::{
    sync::mpsc,
    time::{Interval, MissedTickBehavior, interval, timeout},
};

mod light;
mod pair;

use pair::*;

#[tokio::test]
async fn files_and_memory_arrive_whole_and_verified() {
    let (mut pair, folder) = (Pair::connected().await, Folder::new());
    let blobs: Vec<Vec<u8>> = vec![noise(5 * MIB + 17), Vec::new(), noise(1), noise(3 * MIB)];
    let mut sources = Vec::new();
    let mut incoming = Vec::new();
    for (index, bytes) in blobs.iter().enumerate() {
        let source = match index {
            3 => Source::memory(bytes.clone().into()),
            _ => Source::file(&folder.with_file(&format!("{index}"), bytes)).expect("readable"),
        };
        let digest = source.digest().expect("readable");
        assert_eq!(digest, Digest::of(bytes));
        let (blob, size) = (index as BlobIndex, bytes.len() as u64);
        incoming.push(match index {
            2 => Incoming::to_memory(blob, size, digest),
            _ => Incoming::to_file(&folder.path(&format!("in-{index}")), blob, size, digest).expect("room").sync(),
        });
        sources.push((blob, source));
    }
    let window = 1 << 20;
    let mut sender = Sender::start(Outgoing::new(Role::Client, attempt(), sources, window), &pair.outlet);
    let contents = receive(&mut pair.arriving, incoming, &mut sender, window).await.expect("no error");
    for (index, bytes) in blobs.iter().enumerate() {
        assert!(read(&contents[&(index as BlobIndex)]) == *bytes, "blob {index}");
    }
    let report = sender.result().await.expect("sent");
    let total: usize = blobs.iter().map(Vec::len).sum();
    assert_eq!((report.blob_bytes, report.repeated_bytes), (total as u64, 0));
}

#[tokio::test]
async fn outputs_flow_back_through_the_door() {
    let mut pair = Pair::connected().await;
    pair.outlet.send(Frame::new(b"hello".to_vec())).await.expect("room");
    let client = within("the client", pair.arriving.recv()).await.expect("open").peer;
    let bytes = noise(2 * MIB);
    let outgoing = Outgoing::new(Role::Worker, attempt(), vec![(1, Source::memory(bytes.clone().into()))], MIB as u32);
    let mut sender = Sender::start(outgoing, &pair.door.to(client));
    let mut output = Vec::new();
    while output.len() < bytes.len() {
        if let Some(Heard::Frame(frame)) = within("a chunk", pair.heard.recv()).await {
            assert!(matches!(WorkerToClient::from_frame(&frame), Ok(WorkerToClient::Chunk(Chunk { blob: 1, .. }))));
            output.extend_from_slice(&frame.payload);
            sender.credit(1, output.len() as u64);
        }
    }
    assert!(output == bytes);
    sender.result().await.expect("sent");
}

#[tokio::test]
async fn a_peer_that_acknowledges_nothing_gives_the_thread_back_and_a_slow_one_keeps_it() {
    let patience = Duration::from_secs(2);
    let (mut pair, bytes) = (Pair::connected().await, noise(3 * MIB));
    let source = || vec![(0, Source::memory(bytes.clone().into()))];
    let upload = |pair: &Pair| {
        let outgoing = Outgoing::new(Role::Client, attempt(), source(), 2 * MIB as u32).patience(patience);
        Sender::start(outgoing, &pair.outlet)
    };
    let mut slow = upload(&pair);
    let (mut arrived, mut beat) = (0, interval(patience / 6));
    while arrived < bytes.len() as u64 {
        arrived += within("a chunk", pair.arriving.recv()).await.expect("open").frame.payload.len() as u64;
        beat.tick().await;
        slow.credit(0, arrived);
    }
    assert!(!slow.uploading.has_stalled());
    slow.result().await.expect("it took longer than the patience, and moved all the time");

    let Sender { uploading, ended, .. } = upload(&pair);
    let end = within("its end", ended).await.expect("it says how it ended");
    assert!(matches!(end, Err(UploadError::Stopped)) && uploading.has_stalled(), "{end:?}");
}

#[tokio::test]
async fn an_upload_cut_anywhere_goes_on_where_it_was() {
    let (bytes, window) = (noise(12 * MIB + 5), 2 * MIB as u32);
    for cut_after in [0, 1, 5, 17, 40] {
        let (mut pair, folder) = (Pair::connected().await, Folder::new());
        let source = Source::file(&folder.with_file("model", &bytes)).expect("readable");
        let incoming = Incoming::to_file(&folder.path("in"), 0, bytes.len() as u64, Digest::of(&bytes)).expect("room");
        let mut sender = Sender::start(Outgoing::new(Role::Client, attempt(), vec![(0, source)], window), &pair.outlet);
        let (intake, mut arrivals) = Intake::start(vec![incoming], window);

        let (mut chunks, mut content, mut new_link) = (0, None, None);
        while content.is_none() {
            if chunks == cut_after && new_link.is_none() {
                new_link = Some(relink(&mut pair, &mut sender, &intake, window).await);
            }
            tokio::select! {
                received = pair.arriving.recv() => {
                    let Received { peer, frame, .. } = received.expect("the door is open");
                    if new_link.is_some_and(|new| new != peer) {
                        // What was still under way on the old link is lost.
                        continue;
                    }
                    intake.push(chunk_of(&frame), frame.payload).expect("in order");
                    chunks += 1;
                }
                arrival = within("an arrival", arrivals.recv()) => match arrival.expect("not over yet") {
                    Arrival::Credit { blob, received_bytes } => sender.credit(blob, received_bytes),
                    Arrival::Complete { content: whole, .. } => content = Some(whole),
                    Arrival::Failed(error) => panic!("{error}"),
                },
            }
        }
        assert!(new_link.is_some() && read(&content.expect("complete")) == bytes, "cut after {cut_after}");
        let report = sender.result().await.expect("sent");
        assert!(report.repeated_bytes <= u64::from(window), "{} bytes sent twice", report.repeated_bytes);
        assert_eq!(report.wire_bytes - report.repeated_bytes, bytes.len() as u64);
    }
}

#[tokio::test]
async fn on_a_slow_link_little_is_under_way_so_that_what_is_sent_behind_it_comes_soon() {
    // The link lets this much through with each tick.
    let (piece, bytes_per_s) = (16 * 1024, 2 * MIB);
    let mut link = interval(Duration::from_secs(1) * piece / bytes_per_s as u32);
    link.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let pass = async |link: &mut Interval, bytes: usize| {
        for _ in 0..bytes.div_ceil(piece as usize) {
            link.tick().await;
        }
    };
    let (window, size) = (16 * MIB as u32, 6 * MIB);
    let (mut pair, bytes) = (Pair::connected().await, noise(size));
    let outgoing = Outgoing::new(Role::Client, attempt(), vec![(0, Source::memory(bytes.into()))], window);
    let mut sender = Sender::start(outgoing, &pair.outlet);

    let (mut arrived, mut most_behind) = (0, 0);
    while arrived < size {
        let received = within("a chunk", pair.arriving.recv()).await.expect("the door is open");
        let chunk = received.frame.payload.len();
        pass(&mut link, chunk).await;
        arrived += chunk;
        sender.credit(0, arrived as u64);
        if arrived > size / 2 {
            pair.outlet.send(Frame::new(b"behind".to_vec())).await.expect("room");
            let mut behind = 0;
            while let frame = within("it", pair.arriving.recv()).await.expect("open").frame
                && frame.head != b"behind"[..]
            {
                // These bytes cross the link, too: the sender learns its speed from them.
                pass(&mut link, frame.payload.len()).await;
                behind += frame.payload.len();
            }
            arrived += behind;
            sender.credit(0, arrived as u64);
            most_behind = most_behind.max(behind);
        }
    }
    assert!(most_behind <= bytes_per_s, "{most_behind} bytes were sent before it, {bytes_per_s} pass in a second");
    sender.result().await.expect("sent");
}

/// Cuts the connection as a network would, makes a new one and says where to go on. Returns the new connection's name.
async fn relink(pair: &mut Pair, sender: &mut Sender, intake: &Intake, window: u32) -> PeerId {
    sender.tell(Feedback::Unlinked);
    (pair.outlet, pair.heard) = dial(&pair.context, &pair.door).await;
    pair.outlet.send(Frame::new(b"open again".to_vec())).await.expect("room");
    let peer = loop {
        let received = within("the new connection", pair.arriving.recv()).await.expect("the door is open");
        if received.frame.head == b"open again"[..] {
            break received.peer;
        }
    };
    let blobs = intake.needs();
    sender.tell(Feedback::Relinked(pair.outlet.clone()));
    sender.tell(Feedback::Needs { blobs, window_bytes: window });
    peer
}

#[tokio::test]
async fn a_damaged_byte_is_noticed_and_nothing_is_left_behind() {
    let (mut pair, folder) = (Pair::connected().await, Folder::new());
    let bytes = noise(MIB);
    let mut damaged = bytes.clone();
    damaged[700_000] ^= 1;
    let target = folder.path("in");
    let incoming = Incoming::to_file(&target, 0, MIB as u64, Digest::of(&bytes)).expect("room");
    let outgoing = Outgoing::new(Role::Client, attempt(), vec![(0, Source::memory(damaged.into()))], MIB as u32);
    let mut sender = Sender::start(outgoing, &pair.outlet);
    let error = receive(&mut pair.arriving, vec![incoming], &mut sender, MIB as u32).await.expect_err("damaged");
    assert!(matches!(error, IncomingError::DigestMismatch { blob: 0, .. }), "{error}");
    gone(&target).await;
}

/// Waits until the intake's thread has removed the incomplete file.
async fn gone(path: &Path) {
    within("the file to be removed", async {
        while path.exists() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_file_that_changes_under_way_stops_the_upload_by_name() {
    for shorter in [false, true] {
        let (mut pair, folder) = (Pair::connected().await, Folder::new());
        let path = folder.with_file("growing.bin", &noise(4 * MIB));
        let source = Source::file(&path).expect("readable");
        let mut sender =
            Sender::start(Outgoing::new(Role::Client, attempt(), vec![(1, source)], MIB as u32), &pair.outlet);
        let first = within("a chunk", pair.arriving.recv()).await.expect("the door is open").frame.payload.len();
        let file = fs::OpenOptions::new().append(true).open(&path).expect("writable");
        if shorter {
            file.set_len(100).expect("shortened");
        } else {
            (&file).write_all(b"more").expect("appended");
        }
        // The window may be full: this makes it look at the file once more.
        sender.credit(1, first as u64);
        match sender.result().await {
            Err(UploadError::Changed { path: named }) => assert_eq!(named, path),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn without_credit_no_more_than_the_window_is_sent() {
    let mut pair = Pair::connected().await;
    let window = 3 * MIB / 4;
    let source = Source::memory(noise(8 * MIB).into());
    let mut sender =
        Sender::start(Outgoing::new(Role::Client, attempt(), vec![(0, source)], window as u32), &pair.outlet);
    let (mut arrived, mut credited) = (0, 0);
    while arrived < 8 * MIB {
        // Once the window is full, silence shows that no more is sent. Before that, the sender may be slow.
        let is_full = window - (arrived - credited) < 256 * 1024;
        let wait = if is_full { Duration::from_millis(200) } else { PATIENCE };
        match timeout(wait, pair.arriving.recv()).await {
            Ok(received) => {
                arrived += received.expect("the door is open").frame.payload.len();
                assert!(arrived - credited <= window, "{arrived} bytes for {credited} of credit");
            }
            Err(_) => {
                assert!(is_full, "the window is not used: {arrived}, {credited}");
                credited = arrived;
                sender.credit(0, credited as u64);
            }
        }
    }
    sender.credit(0, arrived as u64);
    sender.result().await.expect("sent");
}

#[tokio::test]
async fn a_blob_that_the_peer_has_is_not_sent_and_one_it_lacks_is() {
    let mut pair = Pair::connected().await;
    let (model, input) = (noise(MIB), noise(100));
    let sources = || vec![(0, Source::memory(model.clone().into())), (1, Source::memory(input.clone().into()))];
    let incoming = |blob, bytes: &[u8]| Incoming::to_memory(blob, bytes.len() as u64, Digest::of(bytes));

    let mut sender = Sender::start(Outgoing::new(Role::Client, attempt(), sources(), MIB as u32).held(0), &pair.outlet);
    receive(&mut pair.arriving, vec![incoming(1, &input)], &mut sender, MIB as u32).await.expect("the input");
    assert_eq!(sender.result().await.expect("sent").wire_bytes, 100);

    // It was evicted meanwhile: the worker asks for it after all.
    let mut sender = Sender::start(Outgoing::new(Role::Client, attempt(), sources(), MIB as u32).held(0), &pair.outlet);
    let needs = Feedback::Needs { blobs: vec![(0, 0), (1, 0)], window_bytes: MIB as u32 };
    sender.tell(needs);
    let both = vec![incoming(0, &model), incoming(1, &input)];
    let contents = receive(&mut pair.arriving, both, &mut sender, MIB as u32).await.expect("both");
    assert!(read(&contents[&0]) == model);
    let report = sender.result().await.expect("sent");
    assert_eq!((report.wire_bytes, report.repeated_bytes), (MIB as u64 + 100, 0));
}

#[tokio::test]
async fn compressed_chunks_arrive_as_they_were() {
    let mut pair = Pair::connected().await;
    let text: Vec<u8> = (0..4 * MIB).map(|index| b"a model is a file of numbers "[index / 3 % 29]).collect();
    for (compression, link_bytes_per_s, fewer) in
        [(Compression::Always, 0, true), (Compression::Auto, 1_000_000, true), (Compression::Never, 1_000_000, false)]
    {
        let outgoing =
            Outgoing::new(Role::Client, attempt(), vec![(0, Source::memory(text.clone().into()))], MIB as u32)
                .compress(compression)
                .link(link_bytes_per_s);
        let mut sender = Sender::start(outgoing, &pair.outlet);
        let incoming = Incoming::to_memory(0, text.len() as u64, Digest::of(&text));
        let contents = receive(&mut pair.arriving, vec![incoming], &mut sender, MIB as u32).await.expect("no error");
        assert!(read(&contents[&0]) == text);
        let report = sender.result().await.expect("sent");
        assert_eq!(report.wire_bytes < report.blob_bytes / 2, fewer, "{compression:?}: {report:?}");
    }
}

/// An intake of one blob of this size that will never verify, for peers that break the protocol.
fn intake(size: u64, window: u32) -> (Intake, mpsc::Receiver<Arrival>) {
    Intake::start(vec![Incoming::to_memory(0, size, Digest::of(b"never"))], window)
}

fn chunk(offset: u64, inflated_bytes: Option<u32>) -> Chunk {
    Chunk { id: attempt(), blob: 0, offset, inflated_bytes }
}

async fn failure(mut arrivals: mpsc::Receiver<Arrival>) -> String {
    loop {
        match within("the failure", arrivals.recv()).await {
            Some(Arrival::Failed(error)) => return error.to_string(),
            Some(_) => {}
            None => panic!("ended without a failure"),
        }
    }
}

#[tokio::test]
async fn a_compression_bomb_is_refused() {
    let bomb = Bytes::from(zstd::bulk::compress(&vec![0; 64 * MIB], 1).expect("compressed"));
    let (too_much, _arrivals) = intake(1 << 40, u32::MAX);
    assert!(too_much.push(chunk(0, Some(CHUNK_BYTES_MAX as u32 + 1)), bomb.clone()).is_err());

    let (lied_to, arrivals) = intake(1 << 40, u32::MAX);
    lied_to.push(chunk(0, Some(CHUNK_BYTES_MAX as u32)), bomb).expect("looks well");
    assert!(failure(arrivals).await.contains("does not inflate"));

    let (lied_to, arrivals) = intake(1000, 1000);
    let short = zstd::bulk::compress(&[0; 10], 1).expect("compressed");
    lied_to.push(chunk(0, Some(1000)), short.into()).expect("looks well");
    assert!(failure(arrivals).await.contains("a chunk of 10 bytes"));
}

#[tokio::test]
async fn what_a_peer_must_not_send_is_refused_and_what_is_known_is_dropped() {
    let (taking, _arrivals) = intake(1000, 300);
    let bytes = |len: usize| Bytes::from(vec![0; len]);
    taking.push(chunk(0, None), bytes(100)).expect("the beginning");
    taking.push(chunk(0, None), bytes(100)).expect("known already");
    taking.push(chunk(50, None), bytes(100)).expect("half of it is known");
    within("150 bytes to be in place", async {
        while taking.needs() != [(0, 150)] {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let refused = |chunk, payload| taking.push(chunk, payload).expect_err("must be refused").to_string();
    assert!(refused(chunk(200, None), bytes(10)).contains("missing"));
    assert!(refused(chunk(150, None), bytes(851)).contains("announced"));
    assert!(refused(chunk(150, None), bytes(301)).contains("window"));
    assert!(refused(chunk(150, None), Bytes::new()).contains("empty"));
    assert!(refused(chunk(u64::MAX, None), bytes(10)).contains("announced"));
    taking.push(Chunk { blob: 9, ..chunk(0, None) }, bytes(10)).expect("a blob that nobody asked for is dropped");
}

#[tokio::test]
async fn opening_again_and_again_lets_one_window_wait_and_no_more() {
    // Nobody listens: the thread stops when it has told as much as may wait (64), and what is pushed stays queued.
    let (taking, _arrivals) = intake(1 << 30, 800);
    let mut next = 0;
    let refused = loop {
        assert!(next < 100_000, "nothing was refused");
        taking.needs();
        match taking.push(chunk(next, None), Bytes::from(vec![0; 100])) {
            Ok(()) => next += 100,
            Err(error) => break error.to_string(),
        }
    };
    assert!(refused.contains("window"), "{refused}");
    let [(0, from)] = taking.needs()[..] else { panic!("one blob is needed") };
    assert!(next - from <= 800, "{} bytes wait", next - from);
}

#[tokio::test]
async fn no_room_is_said_before_anything_is_sent() {
    let shared_memory = tempfile::tempdir_in("/dev/shm").expect("a RAM disk");
    let path = shared_memory.path().join("too-large");
    let refused = Incoming::to_file(&path, 0, 1 << 45, Digest::of(b"never"));
    match refused {
        Err(error @ IncomingError::DiskFull { .. }) => assert!(error.to_string().contains("too-large")),
        other => panic!("{other:?}"),
    }
    assert!(!path.exists());
}

#[tokio::test]
async fn a_peer_that_acknowledges_too_much_is_not_believed() {
    let pair = Pair::connected().await;
    let source = Source::memory(noise(100).into());
    let mut sender = Sender::start(Outgoing::new(Role::Client, attempt(), vec![(0, source)], 1000), &pair.outlet);
    sender.credit(0, 101);
    assert!(matches!(sender.result().await, Err(UploadError::Protocol(_))));
}
