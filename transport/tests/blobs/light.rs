//! Small blobs are sent and taken in without a thread.

use tokio::sync::oneshot;

use super::*;

#[tokio::test]
async fn an_upload_that_nobody_follows_stops() {
    let pair = Pair::connected().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("blob");
    fs::write(&path, noise(100)).expect("written");
    let source = Source::file(&path).expect("readable");
    let sender = Sender::start(Outgoing::new(Role::Client, attempt(), vec![(0, source)], 1000), &pair.outlet);
    let Sender { uploading, ended, .. } = sender;
    drop(uploading);
    assert!(within("the end of its task", ended).await.is_err(), "nothing is said of it any more");
}

#[tokio::test]
async fn little_is_sent_behind_its_announcement_before_anybody_waits() {
    let mut pair = Pair::connected().await;
    let outgoing = || {
        let source = Source::memory(noise(1000).into());
        Outgoing::new(Role::Client, attempt(), vec![(1, source)], MIB as u32)
    };
    let mut sender = Sender::start(outgoing().behind(Frame::new(b"first".to_vec())), &pair.outlet);
    assert!(sender.end.is_none(), "nobody has acknowledged it");
    let first = within("the announcement", pair.arriving.recv()).await.expect("open").frame;
    assert_eq!(first.head, b"first"[..]);
    let chunk = within("the chunk", pair.arriving.recv()).await.expect("open").frame;
    assert_eq!(chunk_of(&chunk).offset, 0);
    sender.credit(1, 1000);
    assert_eq!(sender.end.expect("the last credit ends it").expect("sent").blob_bytes, 1000);
}

#[tokio::test]
async fn a_file_that_the_peer_has_holds_nothing_up_and_is_sent_if_it_lacks_it_after_all() {
    let mut pair = Pair::connected().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model");
    fs::write(&path, noise(5000)).expect("written");
    let sources = vec![(0, Source::file(&path).expect("readable")), (1, Source::memory(noise(1000).into()))];
    let mut sender = Sender::start(Outgoing::new(Role::Client, attempt(), sources, MIB as u32).held(0), &pair.outlet);
    let chunk = within("the input", pair.arriving.recv()).await.expect("open").frame;
    assert_eq!(chunk_of(&chunk).blob, 1);
    sender.tell(Feedback::Needs { blobs: vec![(0, 0)], window_bytes: MIB as u32 });
    assert!(sender.end.is_none(), "it lacks the model");
    let chunk = within("the model", pair.arriving.recv()).await.expect("open").frame;
    assert_eq!((chunk_of(&chunk).blob, chunk.payload.len()), (0, 5000));
    sender.credit(0, 5000);
    sender.result().await.expect("sent");
}

#[tokio::test]
async fn little_waits_in_a_thread_for_a_peer_whose_queue_is_full() {
    let mut pair = Pair::connected().await;
    let fillers = fill(&pair);
    let source = Source::memory(noise(1000).into());
    let outgoing = Outgoing::new(Role::Client, attempt(), vec![(1, source)], MIB as u32);
    let mut sender = Sender::start(outgoing.behind(filler()), &pair.outlet);
    for _ in 0..=fillers {
        let frame = within("a filler", pair.arriving.recv()).await.expect("open").frame;
        assert_eq!(frame.head, b"filler"[..]);
    }
    let chunk = within("the chunk", pair.arriving.recv()).await.expect("open").frame;
    assert_eq!(chunk_of(&chunk).blob, 1);
    sender.credit(1, 1000);
    sender.result().await.expect("sent");
}

#[tokio::test]
async fn who_reads_nothing_keeps_no_thread_of_an_upload_that_was_given_up() {
    /// Bytes that tell when the last who needed them has let them go.
    struct Needed {
        bytes: Vec<u8>,
        _until: oneshot::Sender<()>,
    }
    impl AsRef<[u8]> for Needed {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    let pair = Pair::connected().await;
    fill(&pair);
    let (until, let_go) = oneshot::channel();
    let source = Source::memory(Bytes::from_owner(Needed { bytes: noise(1000), _until: until }));
    let outgoing = Outgoing::new(Role::Client, attempt(), vec![(1, source)], MIB as u32);
    drop(Sender::start(outgoing.behind(filler()), &pair.outlet));
    assert!(within("the end of its thread", let_go).await.is_err(), "nothing is said of it any more");
}

fn filler() -> Frame {
    Frame { payload: noise(MIB).into(), ..Frame::new(b"filler".to_vec()) }
}

/// Fills the queue of the worker, who reads nothing. Returns the number of messages in it.
fn fill(pair: &Pair) -> usize {
    let mut fillers = 0;
    while pair.outlet.try_send(filler()).is_ok() {
        fillers += 1;
    }
    fillers
}
