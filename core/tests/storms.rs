//! No peer gets messages faster than the clock asks for, whatever the other side answers.

use std::time::Duration;

use mesh_core::{
    MonoTime,
    broker::{self, Broker},
    worker::{self, Worker},
};
use proto_msgs::{BrokerToWorker, Epoch, HeartbeatAck, PeerId, Register, WorkerToBroker};

fn register(epoch: u64) -> Register {
    Register { epoch: Epoch(epoch), ..mesh_samples::register(7) }
}

#[test]
fn a_worker_that_no_broker_will_have_says_so_once_an_interval() {
    let mut worker = Worker::new(worker::Config::new(register(1)));
    let mut now = MonoTime::from_micros(1);
    let mut said = worker.handle(now, worker::Event::Started { attempts: Vec::new() });
    let mut heartbeats = 0;
    while now < MonoTime::ZERO + Duration::from_secs(10) {
        now = now + Duration::from_millis(1);
        let sent = said.iter().find_map(|action| match action {
            worker::Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)) => Some(heartbeat.clone()),
            _ => None,
        });
        said = match sent {
            Some(heartbeat) => {
                heartbeats += 1;
                let (worker_id, epoch, seq) = (heartbeat.worker, heartbeat.epoch, heartbeat.seq);
                let (forget, stop) = (Vec::new(), Vec::new());
                let ack = HeartbeatAck { worker: worker_id, epoch, seq, known: false, broker_unix_ms: 1, forget, stop };
                worker.handle(now, worker::Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)))
            }
            None => worker.handle(now, worker::Event::Deadline),
        };
    }
    assert!((10..=22).contains(&heartbeats), "{heartbeats} heartbeats in ten intervals");
}

#[test]
fn an_earlier_life_of_a_worker_gets_no_answer() {
    let mut broker = Broker::new(broker::Config::default());
    let peer = PeerId::from_slice(&[0, 1, 2, 3, 4]).expect("short");
    let mut says =
        |message| broker.handle(MonoTime::from_micros(1), broker::Event::WorkerSaid { peer, key: None, message });
    let _saved = says(WorkerToBroker::Register(register(2)));

    let mut old = Worker::new(worker::Config::new(register(1)));
    for action in old.handle(MonoTime::from_micros(1), worker::Event::Started { attempts: Vec::new() }) {
        if let worker::Action::TellBroker(message) = action {
            assert_eq!(says(message), Vec::new());
        }
    }
}
