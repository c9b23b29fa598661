//! The bare thing that the broker is compared with: a libzmq ROUTER in a loop that answers each message with fixed bytes of
//! the size that the broker's answer would have.

use anyhow::{Context, Result};
use proto_msgs::{
    Attempt, AttemptId, BrokerToClient, BrokerToWorker, ClientId, Demands, Direction, Epoch, Grant, HeartbeatAck,
    Purpose, TaskId, Ticket, TicketBody, TicketKey, WorkerId, header::Header, limits::WINDOW_BYTES,
};

const SUBMIT: u16 = 1;
const HEARTBEAT: u16 = 201;

/// Prints `listening on ENDPOINT` and serves until it is killed.
pub(crate) fn serve() -> Result<()> {
    let context = zmq::Context::new();
    let router = context.socket(zmq::ROUTER)?;
    router.set_backlog(4096)?;
    router.bind("tcp://127.0.0.1:*")?;
    let endpoint = router.get_last_endpoint()?.ok().context("libzmq names its endpoint")?;
    println!("listening on {endpoint}");
    let (grant, ack) = answers()?;
    loop {
        let peer = router.recv_msg(0)?;
        let message = router.recv_msg(0)?;
        let answer = match Header::split(&message).map(|(header, _)| header.kind) {
            Some(SUBMIT) => &grant,
            Some(HEARTBEAT) => &ack,
            _ => continue,
        };
        router.send(peer, zmq::SNDMORE)?;
        router.send(&answer[..], 0)?;
    }
}

/// A grant and an acknowledgement as the broker sends them.
fn answers() -> Result<(Vec<u8>, Vec<u8>)> {
    let task = TaskId::from_bytes([1; 16]);
    let worker = WorkerId::from_bytes([2; 16]);
    let body = TicketBody {
        purpose: Purpose::Run,
        task,
        attempt: Attempt(1),
        worker,
        epoch: Epoch(1),
        client: ClientId::from_bytes([3; 16]),
        client_key: None,
        bytes_max: 300_000,
        priority: 50,
        detached: false,
        demands: Demands::default(),
        deadline_unix_ms: None,
        expires_unix_ms: 1_795_000_000_000,
    };
    let grant = Grant {
        id: AttemptId { task, attempt: Attempt(1) },
        worker,
        worker_name: "bench-1000".into(),
        worker_key: None,
        endpoints: vec!["tcp://127.0.0.1:9".into()],
        direction: Direction::ClientDials,
        window_bytes: WINDOW_BYTES,
        model_held: false,
        ticket: Ticket::sign(body, &TicketKey([7; 32])),
    };
    let ack = HeartbeatAck {
        worker,
        epoch: Epoch(1),
        seq: 100,
        known: true,
        broker_unix_ms: 1_795_000_000_000,
        forget: Vec::new(),
        stop: Vec::new(),
    };
    let grant = BrokerToClient::Grant(grant).to_frame()?;
    let ack = BrokerToWorker::HeartbeatAck(ack).to_frame()?;
    Ok((grant.head.to_vec(), ack.head.to_vec()))
}
