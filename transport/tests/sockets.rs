//! Listeners and dialers over real loopback sockets.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_transport::{
    Admit, Admitted, Context, DialError, Dialer, Heard, Inbox, KeyPair, Limits, ListenError, Listener, Security,
    SendError, dial_first, raise_open_files,
};
use proto_msgs::{Frame, PublicKey};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

fn open_context() -> Context {
    Context::new(Security::None).expect("a context")
}

fn context_with_keys() -> (Context, PublicKey) {
    let keys = KeyPair::generate().expect("curve");
    let public = keys.public();
    (Context::new(Security::Keys(keys)).expect("a context"), public)
}

fn listen(context: &Context, admit: Admit) -> Listener {
    context.listen("tcp://127.0.0.1:0", admit, Limits::CONTROL).expect("a free port")
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

fn frame(text: impl AsRef<[u8]>) -> Frame {
    Frame::new(text.as_ref().to_vec())
}

async fn next_frame(dialer: &mut Dialer) -> Frame {
    loop {
        if let Heard::Frame(frame) = within("a frame", dialer.recv()).await {
            return frame;
        }
    }
}

async fn next_frame_in(inbox: &mut Inbox<Heard>) -> Frame {
    loop {
        match within("a frame", inbox.recv()).await {
            Some(Heard::Frame(frame)) => return frame,
            Some(_) => {}
            None => panic!("the inbox ended"),
        }
    }
}

#[tokio::test]
async fn a_message_and_its_answer_arrive_with_their_payloads() {
    let context = open_context();
    let mut listener = listen(&context, Admit::Anyone);
    assert!(!listener.endpoint().ends_with(":0"), "the real port: {}", listener.endpoint());
    let mut dialer = context.dial(listener.endpoint(), None, Limits::CONTROL).expect("dialled");

    let asked = Frame { head: "head".into(), payload: Bytes::from(vec![7; 300_000]) };
    dialer.send(asked.clone()).expect("room");
    let received = within("the question", async {
        tokio::select! { received = listener.recv() => received, _ = async { loop { dialer.recv().await; } } => unreachable!() }
    })
    .await;
    assert_eq!((received.frame, received.key), (asked.clone(), None));

    listener.send(received.peer, asked.clone()).expect("room");
    assert_eq!(next_frame(&mut dialer).await, asked);
}

/// Listens where a listener has just closed.
async fn listen_again(context: &Context, endpoint: &str, admit: Admit) -> Listener {
    within("the port to be free", async {
        loop {
            match context.listen(endpoint, admit.clone(), Limits::CONTROL) {
                Ok(listener) => return listener,
                Err(ListenError::InUse { .. }) => tokio::task::yield_now().await,
                Err(other) => panic!("{other}"),
            }
        }
    })
    .await
}

#[tokio::test]
async fn the_dialer_tells_connected_and_lost_and_mends_the_link() {
    let context = open_context();
    let mut listener = listen(&context, Admit::Anyone);
    let endpoint = listener.endpoint().to_owned();
    let mut dialer = context.dial(&endpoint, None, Limits::CONTROL).expect("dialled");
    dialer.connected(PATIENCE).await.expect("connected");
    assert!(matches!(within("news", dialer.recv()).await, Heard::Connected));
    dialer.send(frame("before")).expect("room");
    let old_peer = within("a message", listener.recv()).await.peer;

    listener.close().await;
    assert!(matches!(within("news", dialer.recv()).await, Heard::Lost));

    let mut listener = listen_again(&context, &endpoint, Admit::Anyone).await;
    assert!(matches!(within("news", dialer.recv()).await, Heard::Connected));
    dialer.send(frame("after")).expect("room");
    let received = within("a message", listener.recv()).await;
    assert_eq!(&received.frame.head[..], b"after");
    assert_ne!(received.peer, old_peer);
    assert_eq!(listener.send(old_peer, frame("too late")), Err(SendError::Gone));
    assert_eq!(listener.traffic().dropped_gone, 1);
}

#[tokio::test]
async fn with_keys_the_listed_one_is_let_in_and_known_and_others_are_refused() {
    let (server, server_key) = context_with_keys();
    let (friend, friend_key) = context_with_keys();
    let (stranger, stranger_key) = context_with_keys();
    let admitted = Admitted::default();
    admitted.insert(friend_key);
    let mut listener = listen(&server, Admit::Listed(admitted.clone()));
    let endpoint = listener.endpoint().to_owned();

    let mut dialer = friend.dial(&endpoint, Some(server_key), Limits::CONTROL).expect("dialled");
    dialer.connected(PATIENCE).await.expect("admitted");
    dialer.send(frame("hello")).expect("room");
    let received = within("a message", listener.recv()).await;
    assert_eq!((received.key, &received.frame.head[..]), (Some(friend_key), &b"hello"[..]));

    let mut dialer = stranger.dial(&endpoint, Some(server_key), Limits::CONTROL).expect("dialled");
    let began = Instant::now();
    let refused = dialer.connected(PATIENCE).await.expect_err("not listed");
    assert!(matches!(refused, DialError::KeyRefused { .. }), "{refused}");
    assert!(refused.to_string().contains(&endpoint));
    assert!(began.elapsed() < PATIENCE / 2, "at once, not after {:?}", began.elapsed());

    // Another set holds from the next attempt on.
    admitted.replace(HashSet::from([stranger_key]));
    let mut dialer = stranger.dial(&endpoint, Some(server_key), Limits::CONTROL).expect("dialled");
    dialer.connected(PATIENCE).await.expect("admitted now");
}

#[tokio::test]
async fn whose_key_was_taken_off_the_list_is_told_so_when_the_link_is_mended() {
    let ((server, server_key), (friend, friend_key)) = (context_with_keys(), context_with_keys());
    let admitted = Admitted::default();
    admitted.insert(friend_key);
    let listener = listen(&server, Admit::Listed(admitted.clone()));
    let endpoint = listener.endpoint().to_owned();
    let mut dialer = friend.dial(&endpoint, Some(server_key), Limits::CONTROL).expect("dialled");
    dialer.connected(PATIENCE).await.expect("admitted");
    assert!(matches!(within("news", dialer.recv()).await, Heard::Connected));

    admitted.replace(HashSet::new());
    listener.close().await;
    assert!(matches!(within("the loss", dialer.recv()).await, Heard::Lost));
    let _listener = listen_again(&server, &endpoint, Admit::Listed(admitted)).await;
    assert!(matches!(within("the refusal", dialer.recv()).await, Heard::Refused));
}

#[tokio::test]
async fn dials_given_up_at_any_moment_leave_the_others_alone() {
    let ((context, key), (other, _)) = (context_with_keys(), context_with_keys());
    let listener = listen(&context, Admit::Listed(Admitted::default()));
    let open = listen(&context, Admit::Anyone);
    for wait_us in 0..300 {
        // Dropped while libzmq's thread may just be telling of an event.
        let mut refused = other.dial(listener.endpoint(), Some(key), Limits::CONTROL).expect("an address");
        let _ = timeout(Duration::from_micros(wait_us * 10), refused.connected(PATIENCE)).await; // It is given up.
        drop(refused);
    }
    let mut dialer = other.dial(open.endpoint(), Some(key), Limits::CONTROL).expect("an address");
    dialer.connected(PATIENCE).await.expect("the context still works");
}

#[tokio::test]
async fn anyone_with_a_key_is_let_in_and_known_where_that_is_the_rule() {
    let (server, server_key) = context_with_keys();
    let (guest, guest_key) = context_with_keys();
    let mut listener = listen(&server, Admit::Anyone);
    let mut dialer = guest.dial(listener.endpoint(), Some(server_key), Limits::CONTROL).expect("dialled");
    dialer.connected(PATIENCE).await.expect("admitted");
    dialer.send(frame("hello")).expect("room");
    assert_eq!(within("a message", listener.recv()).await.key, Some(guest_key));
}

#[tokio::test]
async fn each_listener_has_its_own_rule() {
    let (server, server_key) = context_with_keys();
    let (guest, _) = context_with_keys();
    let open = listen(&server, Admit::Anyone);
    let closed = listen(&server, Admit::Listed(Admitted::default()));
    let mut refused = guest.dial(closed.endpoint(), Some(server_key), Limits::CONTROL).expect("dialled");
    assert!(matches!(refused.connected(PATIENCE).await, Err(DialError::KeyRefused { .. })));
    let mut let_in = guest.dial(open.endpoint(), Some(server_key), Limits::CONTROL).expect("dialled");
    let_in.connected(PATIENCE).await.expect("admitted");
}

#[tokio::test]
async fn a_peer_that_holds_another_key_than_expected_is_not_talked_to() {
    let (server, _) = context_with_keys();
    let (client, _) = context_with_keys();
    let (_, other_key) = context_with_keys();
    let listener = listen(&server, Admit::Anyone);
    let mut dialer = client.dial(listener.endpoint(), Some(other_key), Limits::CONTROL).expect("dialled");
    let refused = dialer.connected(PATIENCE).await.expect_err("another key");
    assert!(matches!(refused, DialError::KeyRefused { .. }), "{refused}");
}

#[tokio::test]
async fn with_and_without_keys_do_not_mix() {
    let (server, server_key) = context_with_keys();
    let plain = open_context();
    let listener = listen(&server, Admit::Anyone);
    let mut dialer = plain.dial(listener.endpoint(), None, Limits::CONTROL).expect("dialled");
    let refused = dialer.connected(PATIENCE).await.expect_err("no keys");
    assert!(matches!(refused, DialError::NotMesh { .. }), "{refused}");

    let plain_listener = listen(&plain, Admit::Anyone);
    let mut dialer = server.dial(plain_listener.endpoint(), Some(server_key), Limits::CONTROL).expect("dialled");
    let refused = dialer.connected(PATIENCE).await.expect_err("keys on one side");
    assert!(matches!(refused, DialError::NotMesh { .. } | DialError::KeyRefused { .. }), "{refused}");

    assert!(matches!(
        plain.dial("tcp://127.0.0.1:1", Some(server_key), Limits::CONTROL),
        Err(DialError::KeyMissing { .. })
    ));
    assert!(matches!(server.dial("tcp://127.0.0.1:1", None, Limits::CONTROL), Err(DialError::KeyMissing { .. })));
}

#[tokio::test]
async fn an_address_where_nobody_is_gives_an_error_that_names_it() {
    let context = open_context();
    let nobody = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        format!("tcp://{}", free.local_addr().expect("bound"))
    };
    let mut dialer = context.dial(&nobody, None, Limits::CONTROL).expect("dialled");
    let error = dialer.connected(Duration::from_millis(300)).await.expect_err("nobody there");
    assert!(matches!(error, DialError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&nobody) && text.contains("refused"), "{text}");
}

#[tokio::test]
async fn a_program_that_is_no_mesh_node_is_told_from_one() {
    let context = open_context();
    let web_server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("tcp://{}", web_server.local_addr().expect("bound"));
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = web_server.accept().await.expect("a connection");
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let mut dialer = context.dial(&address, None, Limits::CONTROL).expect("dialled");
    let error = dialer.connected(PATIENCE).await.expect_err("a web server");
    assert!(matches!(error, DialError::NotMesh { .. }), "{error}");
    serving.abort();
}

#[tokio::test]
async fn a_peer_that_stands_still_is_waited_for_and_not_called_a_stranger() {
    let context = open_context();
    // As with a paused process: its system accepts connections, and nothing is said on them.
    let paused = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let endpoint = format!("tcp://{}", paused.local_addr().expect("bound"));
    for within in [Duration::ZERO, Duration::from_millis(300)] {
        let mut dialer = context.dial(&endpoint, None, Limits::CONTROL).expect("dialled");
        let error = dialer.connected(within).await.expect_err("nobody answers");
        assert!(matches!(error, DialError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains("accepts connections but does not answer"), "{error}");
    }

    // It goes on after more handshakes than a refusal has. The earlier dials tried again, too: this is another peer.
    let paused = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let endpoint = format!("tcp://{}", paused.local_addr().expect("bound"));
    let mut dialer = context.dial(&endpoint, None, Limits::CONTROL).expect("dialled");
    let listening = async {
        let mut opened = Vec::new();
        for _ in 0..3 {
            opened.push(within("a connection", paused.accept()).await.expect("a connection"));
        }
        drop((opened, paused));
        context.listen(&endpoint, Admit::Anyone, Limits::CONTROL).expect("the same port")
    };
    let waited = async { tokio::join!(listening, dialer.connected(3 * PATIENCE)) };
    let (_listener, connected) = waited.await;
    connected.expect("the peer goes on");
}

#[tokio::test]
async fn the_first_address_that_answers_is_taken() {
    let context = open_context();
    let mut listener = listen(&context, Admit::Anyone);
    let nobody = "tcp://127.0.0.1:1".to_owned();
    let endpoints = [nobody.clone(), listener.endpoint().to_owned()];
    let mut dialer = dial_first(&context, &endpoints, None, Limits::DIRECT, PATIENCE).await.expect("the second");
    assert_eq!(dialer.endpoint(), endpoints[1]);
    dialer.send(frame("hello")).expect("room");
    assert_eq!(&within("a message", listener.recv()).await.frame.head[..], b"hello");

    let error =
        dial_first(&context, std::slice::from_ref(&nobody), None, Limits::DIRECT, Duration::from_millis(300)).await;
    assert!(error.expect_err("nobody").to_string().contains(&nobody));
}

#[tokio::test]
async fn a_port_in_use_is_said_to_be() {
    let context = open_context();
    let listener = listen(&context, Admit::Anyone);
    let again = context.listen(listener.endpoint(), Admit::Anyone, Limits::CONTROL);
    assert!(matches!(again, Err(ListenError::InUse { .. })), "{again:?}");
    for nonsense in ["tcp://", "127.0.0.1:1", "tcp://203.0.113.1:1", "ipc:///tmp/x"] {
        let bound = context.listen(nonsense, Admit::Anyone, Limits::CONTROL);
        assert!(matches!(bound, Err(ListenError::BadAddress { .. })), "{nonsense}: {bound:?}");
    }
}

#[tokio::test]
async fn a_process_dials_more_peers_than_libzmq_has_sockets_for_by_default() {
    raise_open_files().expect("a limit");
    let context = open_context();
    let listener = listen(&context, Admit::Anyone);
    let dialled: Vec<_> =
        (0..400).map(|_| context.dial(listener.endpoint(), None, Limits::DIRECT).expect("a socket")).collect();
    assert_eq!(dialled.len(), 400);
}

#[tokio::test]
async fn a_slow_peer_costs_the_others_nothing() {
    let context = open_context();
    let limits = Limits { queue_frames: 2, overflow_frames: 8, ..Limits::CONTROL };
    let mut listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, limits).expect("a free port");
    let mut slow = context.dial(listener.endpoint(), None, limits).expect("dialled");
    let mut quick = context.dial(listener.endpoint(), None, limits).expect("dialled");
    slow.connected(PATIENCE).await.expect("connected");
    slow.send(frame("slow")).expect("room");
    let slow_peer = within("the slow one", listener.recv()).await.peer;
    quick.connected(PATIENCE).await.expect("connected");
    quick.send(frame("quick")).expect("room");
    let quick_peer = within("the quick one", listener.recv()).await.peer;

    // The slow one reads nothing: its socket buffers fill, then libzmq's queue, then ours.
    let big = Frame { head: vec![0; 100_000].into(), payload: Bytes::new() };
    let mut taken = 0;
    while listener.send(slow_peer, big.clone()).is_ok() {
        taken += 1;
        assert!(taken < 10_000, "a queue without bound");
    }
    assert_eq!(listener.traffic().waiting, 8);
    assert_eq!(listener.send(slow_peer, big.clone()), Err(SendError::Full));
    assert!(listener.traffic().dropped_full >= 2);
    for number in 0..100 {
        listener.send(quick_peer, frame(format!("{number}"))).expect("the quick one has room");
        assert_eq!(&next_frame(&mut quick).await.head[..], format!("{number}").as_bytes());
    }

    // Once it reads, it gets everything that was taken for it, in spite of the wait.
    let reading = tokio::spawn(async move {
        for _ in 0..taken {
            assert_eq!(next_frame(&mut slow).await.head.len(), 100_000);
        }
    });
    tokio::select! {
        done = within("all messages", reading) => done.expect("all of them"),
        _ = async { loop { listener.recv().await; } } => unreachable!(),
    }
}

#[tokio::test]
async fn what_waits_for_a_slow_peer_goes_with_the_socket_to_its_own_task() {
    let context = open_context();
    let limits = Limits { queue_frames: 2, overflow_frames: 8, ..Limits::CONTROL };
    let mut listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, limits).expect("a free port");
    let mut slow = context.dial(listener.endpoint(), None, limits).expect("dialled");
    slow.connected(PATIENCE).await.expect("connected");
    slow.send(frame("slow")).expect("room");
    let peer = within("the slow one", listener.recv()).await.peer;
    let big = Frame { head: vec![0; 100_000].into(), payload: Bytes::new() };
    let mut taken = 0;
    while listener.send(peer, big.clone()).is_ok() {
        taken += 1;
    }
    assert_eq!(listener.traffic().waiting, 8);

    let (door, _inbox) = listener.spawn();
    for _ in 0..taken {
        assert_eq!(next_frame(&mut slow).await.head.len(), 100_000);
    }
    door.to(peer).send(frame("last")).await.expect("the peer stays");
    assert_eq!(&next_frame(&mut slow).await.head[..], b"last");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_queues_stall_nobody_and_keep_the_order() {
    const DEALERS: u64 = 8;
    const MESSAGES: u64 = 3_000;
    let context = open_context();
    let limits = Limits { queue_frames: 4, ..Limits::CONTROL };
    let listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, limits).expect("a free port");
    let (door, mut inbox) = listener.spawn();
    let endpoint = door.endpoint().to_owned();
    let echo = tokio::spawn(async move {
        while let Some(received) = inbox.recv().await {
            door.to(received.peer).send(received.frame).await.expect("the peer stays");
        }
    });
    let mut dealers = Vec::new();
    for dealer in 0..DEALERS {
        let (outlet, mut inbox) = context.dial(&endpoint, None, limits).expect("dialled").spawn();
        dealers.push(tokio::spawn(async move {
            let sending = outlet.clone();
            tokio::spawn(async move {
                for message in 0..MESSAGES {
                    sending.send(frame((dealer << 32 | message).to_le_bytes())).await.expect("the peer stays");
                }
            });
            for message in 0..MESSAGES {
                let echoed = next_frame_in(&mut inbox).await;
                assert_eq!(echoed.head[..], (dealer << 32 | message).to_le_bytes());
            }
        }));
    }
    for dealer in dealers {
        within("every echo", dealer).await.expect("in order");
    }
    echo.abort();
}

#[tokio::test]
async fn what_was_sent_before_a_proper_close_arrives() {
    let context = open_context();
    let (_door, mut inbox) = listen(&context, Admit::Anyone).spawn();
    let (outlet, _answers) = {
        let mut dialer = context.dial(_door.endpoint(), None, Limits::DIRECT).expect("dialled");
        dialer.connected(PATIENCE).await.expect("connected");
        dialer.spawn()
    };
    for number in 0..20_u8 {
        outlet.send(Frame { head: vec![number].into(), payload: vec![0; 200_000].into() }).await.expect("room");
    }
    outlet.close().await;
    assert_eq!(outlet.try_send(frame("too late")), Err(SendError::Gone));
    for number in 0..20_u8 {
        let received = within("a message", inbox.recv()).await.expect("the door is open");
        assert_eq!(received.frame.head[..], [number]);
    }
}

#[tokio::test]
async fn a_dropped_inbox_closes_the_socket() {
    let context = open_context();
    let (door, inbox) = listen(&context, Admit::Anyone).spawn();
    let outlet = door.to(proto_msgs::PeerId::from_slice(b"\0abcd").expect("a name"));
    drop(inbox);
    within("the end", door.close()).await;
    assert_eq!(outlet.try_send(frame("x")), Err(SendError::Gone));
    assert_eq!(within("the refusal", outlet.send(frame("x"))).await, Err(SendError::Gone));
}
