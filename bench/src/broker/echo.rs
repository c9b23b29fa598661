//! The baseline for the broker: a libzmq ROUTER in a loop that answers each message with fixed bytes of the size of the
//! broker's answer. It looks only at the message's kind number.

use anyhow::{Context, Result};
use proto_msgs::{
    BrokerToClient, BrokerToWorker, ClientToBroker, Epoch, Header, HeartbeatAck, WorkerId, WorkerToBroker,
};

use super::driver::{example_grant, kind_of, set_task, task_of};

/// The same backlog as the broker's listener.
const BACKLOG: i32 = 1024;

/// Prints `listening on ENDPOINT` and serves until it is killed.
pub(crate) fn serve() -> Result<()> {
    let context = zmq::Context::new();
    let router = context.socket(zmq::ROUTER)?;
    router.set_backlog(BACKLOG)?;
    router.bind("tcp://127.0.0.1:*")?;
    let endpoint = router.get_last_endpoint()?.ok().context("libzmq names its endpoint")?;
    println!("listening on {endpoint}");

    let mut grant = BrokerToClient::Grant(example_grant()).to_frame()?.head.to_vec();
    let ack = BrokerToWorker::HeartbeatAck(example_ack()).to_frame()?.head.to_vec();
    let submit_kind = kind_of(ClientToBroker::KINDS, "Submit");
    let heartbeat_kind = kind_of(WorkerToBroker::KINDS, "Heartbeat");
    let (mut peer, mut message) = (zmq::Message::new(), zmq::Message::new());
    loop {
        router.recv(&mut peer, 0)?;
        router.recv(&mut message, 0)?;
        let kind = Header::split(&message).map(|(header, _)| header.kind);
        let answer = if kind == Some(submit_kind) {
            set_task(&mut grant, task_of(&message).context("a submit names its task")?);
            &grant
        } else if kind == Some(heartbeat_kind) {
            &ack
        } else {
            continue;
        };
        router.send(&*peer, zmq::SNDMORE)?;
        router.send(&answer[..], 0)?;
    }
}

fn example_ack() -> HeartbeatAck {
    HeartbeatAck {
        worker: WorkerId::from_bytes([2; 16]),
        epoch: Epoch(1),
        seq: 100,
        known: true,
        broker_unix_ms: 1_795_000_000_000,
        forget: Vec::new(),
        stop: Vec::new(),
    }
}
