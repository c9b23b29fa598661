//! Peers of other versions, strangers and attackers get a clear answer or none. Honest nodes are not affected.

use std::io::{Read, Write};

use bytes::Bytes;
use mesh_tests::{Job, Mesh, PATIENCE, wait_until, zmtp::Peer};
use proto_msgs::{
    Ask, BrokerToClient, ClientId, ClientToBroker, DecodeError, Frame, Question, ToBroker, VERSION, VERSION_MIN,
    WorkerToClient,
};

fn question(version: u16) -> Frame {
    let ask = Ask { request: 1, client: ClientId::from_bytes([9; 16]), question: Question::Cluster };
    let mut head = ClientToBroker::Ask(ask).to_frame().expect("short").head.to_vec();
    head[4..6].copy_from_slice(&version.to_le_bytes());
    Frame::new(head)
}

#[test]
fn the_broker_tells_older_and_newer_peers_what_it_speaks() {
    let mesh = Mesh::start();
    let mut peer = Peer::connect(mesh.endpoint()).unwrap();
    for theirs in [VERSION - 1, VERSION + 1, u16::MAX] {
        peer.send(&question(theirs)).unwrap();
        let answer = peer.recv(PATIENCE).unwrap().expect("an answer");
        assert_eq!(
            ToBroker::from_frame(&answer),
            Err(DecodeError::Unsupported { min: VERSION_MIN, max: VERSION }),
            "to version {theirs}"
        );
    }
    // The connection still serves a supported version.
    peer.send(&question(VERSION)).unwrap();
    let answer = peer.recv(PATIENCE).unwrap().expect("an answer");
    assert!(matches!(BrokerToClient::from_frame(&answer), Ok(BrokerToClient::Answer(_))));
}

#[test]
fn a_worker_s_door_tells_them_too() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let mut peer = Peer::connect(&door.address()).unwrap();
    let mut head = question(VERSION + 1).head.to_vec();
    head[6..8].copy_from_slice(&400_u16.to_le_bytes());
    peer.send(&Frame::new(head)).unwrap();
    let answer = peer.recv(PATIENCE).unwrap().expect("an answer");
    assert_eq!(WorkerToClient::from_frame(&answer), Err(DecodeError::Unsupported { min: VERSION_MIN, max: VERSION }));
}

#[test]
fn a_client_says_that_the_broker_is_of_another_version() {
    let mesh = Mesh::start();
    // A future broker: it answers every message with "I speak 7 to 9".
    let context = fake_broker(7, 9);
    let mut command = mesh.client_command(&["workers"]);
    command.env("MESH_BROKER", &context);
    mesh_tests::Submission::start(command).wait().failed_with(10, "version");
}

#[test]
fn a_worker_says_that_the_broker_is_of_another_version() {
    let mesh = Mesh::start();
    let mut worker = mesh.unregistered_worker("w1", &["--broker", &fake_broker(7, 9)]);
    worker.process().wait_for_line("which versions there are", PATIENCE, |line| {
        line.contains("speaks protocol versions 7 to 9").then_some(())
    });
    assert!(worker.process().try_wait().is_none(), "it waits for a broker that it understands");
}

#[test]
fn a_client_says_that_a_worker_is_of_another_version() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--advertise", &fake_broker(7, 9)]);
    let answer = Job::small(&mesh).start(&mesh, &["--direction", "client-dials"]).answer();
    let answer = answer.failed_with(6, "speaks protocol versions 7 to 9");
    answer.failed_with(6, "upgrade the older of the two");
}

/// A listener with just enough ZMTP to answer each message with a refusal.
fn fake_broker(min: u16, max: u16) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("tcp://{}", listener.local_addr().expect("just bound"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut hello = vec![0_u8; 64];
            hello[0] = 0xFF;
            hello[9] = 0x7F;
            hello[10..12].copy_from_slice(&[3, 1]);
            hello[12..16].copy_from_slice(b"NULL");
            hello.extend(b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06ROUTER");
            let _ = stream.write_all(&hello);
            let mut refusal = Frame::unsupported().head.to_vec();
            refusal[12..14].copy_from_slice(&min.to_le_bytes());
            refusal[14..16].copy_from_slice(&max.to_le_bytes());
            let mut reader = mesh_tests::zmtp::Reader::default();
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                for _ in reader.feed(&piece[..length]) {
                    let _ = stream.write_all(&[&[0, refusal.len() as u8], &refusal[..]].concat());
                }
            }
        }
    });
    endpoint
}

/// Sends one message with more and more parts until the peer ends the connection.
fn send_without_end(address: &str) {
    let mut endless = Peer::connect(address).expect("it listens");
    let part = [&[3][..], &(256_u64 << 10).to_be_bytes(), &[7; 256 << 10]].concat();
    // Some parts are read before the limit is reached, and the system takes some more of them for the connection.
    let ended = (0..256).any(|_| endless.send_raw(&part).is_err());
    assert!(ended, "{address} reads 64 MiB of a message without an end");
}

#[test]
fn a_worker_s_door_ends_a_message_without_end() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    // Its own address: who stands between would have to end the connection, too.
    let workers = mesh.ask(&["workers"]);
    send_without_end(workers["workers"][0]["endpoints"][0].as_str().expect("an address"));
    Job::small(&mesh).run(&mesh);
}

#[test]
fn strangers_and_vandals_are_counted_and_honest_nodes_are_served() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let mut peer = Peer::connect(mesh.endpoint()).unwrap();

    peer.send(&Frame::new(b"GET / HTTP/1.1".to_vec())).unwrap();
    let mut garbled = question(VERSION).head.to_vec();
    garbled.truncate(20);
    peer.send(&Frame::new(garbled)).unwrap();
    let head = question(VERSION).head;
    peer.send(&Frame { head, payload: Bytes::from(vec![0; 300 * 1024]) }).unwrap();
    peer.send(&Frame::new(vec![0; 600 * 1024])).unwrap();
    // A peer without ZeroMQ, and a part with an announced length of 8 EiB.
    let mut raw = std::net::TcpStream::connect(mesh.endpoint().trim_start_matches("tcp://")).unwrap();
    raw.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut liar = Peer::connect(mesh.endpoint()).unwrap();
    liar.send_raw(&[2, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]).unwrap();
    send_without_end(mesh.endpoint());

    wait_until("the frames to be counted", PATIENCE, || mesh.metric("undecodable_frames_total") >= Some(2.0));
    let job = Job::small(&mesh);
    job.run(&mesh);
}
