//! Time for workers and clients. A deadline is a moment: neither a restarted broker nor a corrected wall clock moves
//! it.

use std::time::Duration;

use mesh_core::{
    MonoTime,
    client::{self, Client, News},
    worker::{Action, Config, Event, LinkId, Worker},
};
use mesh_samples::{TICKET_KEY, client_id, opening, register, submit, ticket_body};
use proto_msgs::{
    BrokerToWorker, ClientToBroker, Digest, ErrorCode, Heartbeat, HeartbeatAck, Manifest, ModelFormat, ModelRef,
    Outcome, TaskSpec, Ticket, TicketBody, WorkerToBroker,
};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Times over this span, in steps short enough that a machine does not think it stood still.
fn in_time(from: MonoTime, lasts: Duration) -> impl Iterator<Item = MonoTime> {
    let step = Duration::from_millis(50);
    (1..).map(move |steps| from + step * steps).take_while(move |now| now.since(from) <= lasts)
}

/// The broker answers the worker's first heartbeat, or tells its clock again.
fn broker_says(worker: &mut Worker, now: MonoTime, broker_unix_ms: u64) -> Vec<Action> {
    let (register, forget, stop) = (register(1), Vec::new(), Vec::new());
    let (epoch, seq) = (register.epoch, 1);
    let ack = HeartbeatAck { worker: register.worker, epoch, seq, known: true, broker_unix_ms, forget, stop };
    worker.handle(now, Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)))
}

fn has_expired(actions: &[Action]) -> bool {
    actions.iter().any(|action| {
        matches!(action, Action::SendResult { outcome: Outcome::Failed(failure), .. }
            if failure.code == ErrorCode::Expired)
    })
}

#[test]
fn a_broker_whose_clock_was_put_forward_expires_nothing_that_is_at_work() {
    let start = MonoTime::from_micros(1);
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(start, Event::Started { attempts: Vec::new() });
    let _ = broker_says(&mut worker, start, 1_000_000);
    let body = TicketBody { deadline_unix_ms: Some(1_060_000), ..ticket_body(1, 2, 1) };
    let id = body.attempt_id();
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
    let manifest = Manifest { model, model_name: "m".into(), then: Vec::new(), items: 1, inputs: Vec::new() };
    let (ticket, manifest) = (Ticket::sign(body, &TICKET_KEY), Some(manifest));
    let open = Box::new(opening(ticket, manifest));
    let _ = worker.handle(start, Event::Opened { link: LinkId(1), key: None, open });
    let _ = worker.handle(start, Event::Received { id });

    // The broker restarts on a machine whose clock has been corrected meanwhile.
    assert!(!has_expired(&broker_says(&mut worker, start, 9_000_000)));
    let expired = in_time(start, s(100))
        .find(|now| has_expired(&worker.handle(*now, Event::ClientAlive { id, link: LinkId(1) })));
    assert_eq!(expired, Some(start + s(60)));
}

/// The deadline that the broker is told.
fn told(actions: &[client::Action]) -> Option<u64> {
    actions.iter().find_map(|action| match action {
        client::Action::TellBroker(ClientToBroker::Submit(submit)) => submit.spec.deadline_ms,
        _ => None,
    })
}

/// The user submits a task with a deadline of ten seconds.
fn submits(client: &mut Client, now: MonoTime, number: u32) -> Vec<client::Action> {
    let spec = TaskSpec { deadline_ms: Some(10_000), ..submit(number, 1).spec };
    client.handle(now, client::Event::Submit(Box::new(spec)))
}

#[test]
fn a_client_says_what_is_left_of_a_deadline() {
    let start = MonoTime::from_micros(1);
    let mut client = Client::new(client::Config::new(client_id(1)));
    assert_eq!(told(&submits(&mut client, start, 1)), Some(10_000));
    let mut repeated = 0;
    for now in in_time(start, s(9)) {
        if let Some(left_ms) = told(&client.handle(now, client::Event::Deadline)) {
            assert_eq!(left_ms, 10_000 - now.since(start).as_millis() as u64);
            repeated += 1;
        }
    }
    assert!(repeated > 3, "{repeated} repetitions");
}

#[test]
fn a_broker_that_was_asked_nothing_for_an_hour_is_not_called_silent() {
    let is_called_silent = |actions: &[client::Action]| {
        actions.iter().any(|action| matches!(action, client::Action::Report { news: News::BrokerSilent, .. }))
    };
    let start = MonoTime::from_micros(1);
    let mut client = Client::new(client::Config::new(client_id(1)));
    let _ = submits(&mut client, start, 1);
    let _ = client.handle(start + s(1), client::Event::Cancel { task: submit(1, 1).spec.task });
    assert!(!is_called_silent(&submits(&mut client, start + s(3600), 2)));
    let later = in_time(start + s(3600), s(9)).map(|now| client.handle(now, client::Event::Deadline));
    assert_eq!(later.filter(|actions| is_called_silent(actions)).count(), 1, "now it is, and that is said once");
}

#[test]
fn a_worker_tells_how_long_the_broker_takes_to_answer() {
    let mut worker = Worker::new(Config::new(register(1)));
    let mut now = MonoTime::from_micros(1);
    let mut said = worker.handle(now, Event::Started { attempts: Vec::new() });
    let mut told_us = Vec::new();
    for answer_after_ms in [8, 16, 16] {
        let heartbeat = loop {
            if let Some(heartbeat) = said.iter().find_map(heartbeat_in) {
                break heartbeat.clone();
            }
            now = now + Duration::from_millis(1);
            said = worker.handle(now, Event::Deadline);
        };
        told_us.push(heartbeat.broker_rtt_us);
        now = now + Duration::from_millis(answer_after_ms);
        let (epoch, seq, forget, stop) = (heartbeat.epoch, heartbeat.seq, Vec::new(), Vec::new());
        let ack = HeartbeatAck { worker: heartbeat.worker, epoch, seq, known: true, broker_unix_ms: 0, forget, stop };
        said = worker.handle(now, Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack.clone())));
        // The network delivers the answer twice.
        now = now + Duration::from_millis(100);
        said.extend(worker.handle(now, Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack))));
    }
    assert_eq!(told_us, [0, 8000, 9000], "the first answer to each heartbeat moves it by an eighth");
}

fn heartbeat_in(action: &Action) -> Option<&Heartbeat> {
    match action {
        Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)) => Some(heartbeat),
        _ => None,
    }
}
