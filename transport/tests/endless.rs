//! Peers whose messages have more parts than a message of the mesh: they are cut off before they cost memory, in both
//! directions, with and without keys. Honest peers on the same socket go on.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use bytes::Bytes;
use mesh_transport::{Admit, Context, Dialer, Heard, KeyPair, Limits, Listener, Security};
use proto_msgs::Frame;
use tokio::{sync::oneshot, time::timeout};

const PATIENCE: Duration = Duration::from_secs(30);

/// What a peer may have sent before it notices its end: some parts, and what both systems buffer for a connection.
const SENT_BYTES_MAX: usize = 64 << 20;

/// ZMTP's flags of a part.
const MORE: u8 = 1;
const LONG: u8 = 2;

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

/// Does this on a thread that nobody waits for longer than [`PATIENCE`]. The runtime would not end before a thread of
/// its own does, and so a failed test might never end.
fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
    let (done, result) = oneshot::channel();
    std::thread::spawn(move || done.send(work()));
    result
}

fn part(flags: u8, body: &[u8]) -> Vec<u8> {
    [&[flags | LONG][..], &(body.len() as u64).to_be_bytes(), body].concat()
}

/// ZMTP's greeting and handshake without keys, as a peer with this type of socket.
fn hello(socket_type: &str) -> Vec<u8> {
    let mut hello = vec![0; 64];
    hello[0] = 0xFF;
    hello[9] = 0x7F;
    hello[10..12].copy_from_slice(&[3, 1]);
    hello[12..16].copy_from_slice(b"NULL");
    let ready = [b"\x05READY\x0bSocket-Type\0\0\0\x06", socket_type.as_bytes()].concat();
    hello.extend([4, ready.len() as u8]);
    hello.extend(ready);
    hello
}

/// Shakes hands as a peer with this type of socket.
fn shake_hands(mut stream: TcpStream, socket_type: &str) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&hello(socket_type))?;
    stream.read_exact(&mut [0; 64])?;
    Ok(stream)
}

/// Sends one message without end. Gives the bytes that left until the other side ended the connection, or
/// [`SENT_BYTES_MAX`] if it did not.
fn flood(mut stream: TcpStream, endless: &[u8]) -> usize {
    let mut sent = 0;
    while sent < SENT_BYTES_MAX {
        match stream.write(endless) {
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("neither read nor ended: {sent} bytes"),
            Err(_) => return sent,
        }
    }
    sent
}

/// Large parts, and as many empty ones as fit into some bytes: each costs libzmq more than its two bytes.
fn endless_messages() -> [Vec<u8>; 2] {
    [part(MORE, &vec![7; 256 * 1024]), [MORE, 0].repeat(32 * 1024)]
}

/// A message with the longest parts that a peer may send.
fn longest(limits: &Limits) -> Frame {
    let bytes = Bytes::from(vec![9; limits.part_bytes_max]);
    Frame { head: bytes.clone(), payload: bytes }
}

/// Passes the longest message in both directions.
async fn pass_the_longest(dialer: &mut Dialer, listener: &mut Listener, limits: &Limits) {
    let sent = longest(limits);
    dialer.send(sent.clone()).expect("room");
    let received = within("the longest message", listener.recv()).await;
    assert!(received.frame == sent, "the message arrives as it was sent");
    listener.send(received.peer, received.frame).expect("room");
    loop {
        if let Heard::Frame(frame) = within("the answer", dialer.recv()).await {
            assert!(frame == sent, "the answer arrives as it was sent");
            return;
        }
    }
}

#[tokio::test]
async fn a_peer_whose_message_never_ends_is_cut_off_and_the_others_are_served() {
    let context = Context::new(Security::None).expect("a context");
    for limits in [Limits::CONTROL, Limits::DIRECT] {
        let mut listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, limits).expect("a free port");
        let mut honest = context.dial(listener.endpoint(), None, limits).expect("dialled");
        honest.connected(PATIENCE).await.expect("connected");
        for endless in endless_messages() {
            let address = listener.endpoint().trim_start_matches("tcp://").to_owned();
            let flooding = aside(move || {
                let stream = shake_hands(TcpStream::connect(address)?, "DEALER")?;
                io::Result::Ok(flood(stream, &endless))
            });
            pass_the_longest(&mut honest, &mut listener, &limits).await;
            let sent = within("the end of the flood", flooding).await.expect("no panic").expect("a ZMTP peer");
            assert!(sent < SENT_BYTES_MAX, "the message was read on for {sent} bytes");
            pass_the_longest(&mut honest, &mut listener, &limits).await;
        }
        assert_eq!(listener.traffic().malformed, 0, "no part of an unfinished message is seen");
    }
}

#[tokio::test]
async fn a_listener_whose_message_never_ends_is_left() {
    let context = Context::new(Security::None).expect("a context");
    for endless in endless_messages() {
        let hostile = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let endpoint = format!("tcp://{}", hostile.local_addr().expect("just bound"));
        let mut dialer = context.dial(&endpoint, None, Limits::DIRECT).expect("dialled");
        let shaking = aside(move || shake_hands(hostile.accept()?.0, "ROUTER"));
        assert!(matches!(within("the connection", dialer.recv()).await, Heard::Connected));
        let stream = within("the handshake", shaking).await.expect("no panic").expect("a ZMTP peer");
        let flooding = aside(move || flood(stream, &endless));
        assert!(matches!(within("its end", dialer.recv()).await, Heard::Lost));
        let sent = within("the end of the flood", flooding).await.expect("no panic");
        assert!(sent < SENT_BYTES_MAX, "the message was read on for {sent} bytes");
    }
}

#[tokio::test]
async fn a_message_that_broke_off_does_not_count_on_the_next_connection() {
    let context = Context::new(Security::None).expect("a context");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("tcp://{}", listener.local_addr().expect("just bound"));
    let mut dialer = context.dial(&endpoint, None, Limits::DIRECT).expect("dialled");
    let sending = aside(move || -> io::Result<TcpStream> {
        let mut first = shake_hands(listener.accept()?.0, "ROUTER")?;
        first.write_all(&part(MORE, b"the first of two parts"))?;
        drop(first);
        let mut second = shake_hands(listener.accept()?.0, "ROUTER")?;
        second.write_all(&[part(MORE, b"head"), part(0, b"payload")].concat())?;
        Ok(second)
    });
    let frame = within("the message", async {
        loop {
            if let Heard::Frame(frame) = dialer.recv().await {
                return frame;
            }
        }
    });
    assert_eq!(frame.await, Frame { head: "head".into(), payload: "payload".into() });
    within("the sender", sending).await.expect("no panic").expect("a ZMTP peer");
}

#[tokio::test]
async fn a_peer_with_a_key_may_not_send_more_parts_either() {
    let pair = KeyPair::generate().expect("curve");
    let our_key = pair.public();
    let context = Context::new(Security::Keys(pair)).expect("a context");
    let mut listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::DIRECT).expect("a free port");

    let stranger = zmq::Context::new().socket(zmq::DEALER).expect("a socket");
    let theirs = zmq::CurveKeyPair::new().expect("curve");
    stranger.set_curve_serverkey(&our_key.0).expect("a key");
    stranger.set_curve_publickey(&theirs.public_key).expect("a key");
    stranger.set_curve_secretkey(&theirs.secret_key).expect("a key");
    stranger.set_linger(0).expect("set");
    stranger.connect(listener.endpoint()).expect("an address");

    stranger.send_multipart(["head", "payload"], 0).expect("sent");
    let first = within("a message of two parts", listener.recv()).await;
    assert_eq!(first.key.map(|key| key.0.to_vec()), Some(theirs.public_key.to_vec()));
    stranger.send_multipart(["head", "payload", "more"], 0).expect("sent");
    // What follows on the same connection is lost with it, so it is repeated until the next connection is up.
    let again = within("a message on the next connection", async {
        loop {
            stranger.send_multipart(["after", "it"], 0).expect("sent");
            if let Ok(received) = timeout(Duration::from_millis(50), listener.recv()).await {
                return received;
            }
        }
    });
    assert_ne!(again.await.peer, first.peer, "the connection was ended");
    assert_eq!(listener.traffic().malformed, 0);
}
