//! A worker without room still dials the client that it is asked to dial: the client opens, and hears why it is
//! refused.

use mesh_core::{
    MonoTime,
    worker::{Action, Config, Event, LinkId, Worker},
};
use mesh_samples::{TICKET_KEY, opening, register, ticket_body};
use proto_msgs::{
    BrokerToWorker, Digest, Epoch, ErrorCode, HeartbeatAck, Introduce, Manifest, ModelFormat, ModelRef, PublicKey,
    Purpose, Ticket, TicketBody, WorkerToClient,
};

/// More tasks than a worker admits at once.
const MANY: u32 = 300;

const NOW: MonoTime = MonoTime::from_micros(1);

fn introduce(worker: &mut Worker, body: TicketBody) -> Vec<Action> {
    let ticket = Ticket::sign(body, &TICKET_KEY);
    let introduce = Introduce { ticket, endpoints: vec!["tcp://client:1".into()], client_key: None };
    worker.handle(NOW, Event::BrokerSaid(BrokerToWorker::Introduce(introduce)))
}

/// Whether the client is dialled: `Some(is_held)` if it is.
fn dials(actions: &[Action]) -> Option<bool> {
    actions.iter().find_map(|action| match action {
        Action::Dial { is_held, .. } => Some(*is_held),
        _ => None,
    })
}

/// The refusal that the client gets when it opens.
fn opened(worker: &mut Worker, body: TicketBody) -> Option<ErrorCode> {
    shown(worker, Ticket::sign(body, &TICKET_KEY), None)
}

/// The refusal for an opening with this ticket, over a link with this key.
fn shown(worker: &mut Worker, ticket: Ticket, key: Option<PublicKey>) -> Option<ErrorCode> {
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
    let manifest = Manifest { model, model_name: "m".into(), then: Vec::new(), items: 1, inputs: Vec::new() };
    let manifest = (ticket.body.purpose == Purpose::Run).then_some(manifest);
    let open = Box::new(opening(ticket, manifest));
    let said = worker.handle(NOW, Event::Opened { link: LinkId(1), key, open });
    said.into_iter().find_map(|action| match action {
        Action::TellClient { message: WorkerToClient::Refuse(refuse), .. } => Some(refuse.code),
        _ => None,
    })
}

#[test]
fn a_client_that_there_is_no_room_for_hears_so_at_once() {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(NOW, Event::Started { attempts: Vec::new() });
    for task in 0..MANY {
        let held = worker.attempts_held();
        let is_held = dials(&introduce(&mut worker, ticket_body(task, 2, 1)));
        assert_eq!(is_held, Some(worker.attempts_held() > held), "task {task}");
    }
    let held = worker.attempts_held();
    assert!(held < MANY as usize, "{held} of {MANY} were let in");
    assert_eq!(opened(&mut worker, ticket_body(0, 2, 1)), None, "the first has its place");
    assert_eq!(opened(&mut worker, ticket_body(MANY - 1, 2, 1)), Some(ErrorCode::Busy));
    assert_eq!(worker.attempts_held(), held, "nothing is kept of those that have none");
    assert_eq!(dials(&introduce(&mut worker, ticket_body(0, 2, 1))), None, "once is enough");
}

#[test]
fn a_client_that_has_not_come_is_dialled_again_and_holds_one_place() {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(NOW, Event::Started { attempts: Vec::new() });
    for _ in 0..3 {
        assert_eq!(dials(&introduce(&mut worker, ticket_body(0, 2, 1))), Some(true), "a dial may have been dropped");
        assert_eq!(worker.attempts_held(), 1);
    }
}

#[test]
fn a_client_whose_result_is_gone_hears_so_at_once() {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(NOW, Event::Started { attempts: Vec::new() });
    let fetch = TicketBody { purpose: Purpose::Fetch, ..ticket_body(0, 2, 1) };
    assert_eq!(dials(&introduce(&mut worker, fetch.clone())), Some(false));
    assert_eq!(opened(&mut worker, fetch), Some(ErrorCode::ResultGone));
}

#[test]
fn nobody_is_dialled_for_a_stranger() {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(NOW, Event::Started { attempts: Vec::new() });
    let of_another_worker = ticket_body(0, 2, 7);
    assert_eq!(dials(&introduce(&mut worker, of_another_worker)), None);
}

#[test]
fn a_ticket_that_was_changed_belongs_to_another_or_is_too_old_opens_no_door() {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(NOW, Event::Started { attempts: Vec::new() });
    let ack = HeartbeatAck {
        worker: register(1).worker,
        epoch: register(1).epoch,
        seq: 1,
        known: true,
        broker_unix_ms: 60_000,
        forget: Vec::new(),
        stop: Vec::new(),
    };
    let _ = worker.handle(NOW, Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)));
    let (mine, thiefs) = (PublicKey([1; 32]), PublicKey([2; 32]));
    let body = TicketBody { client_key: Some(mine), expires_unix_ms: 60_000, ..ticket_body(0, 2, 1) };
    let good = Ticket::sign(body.clone(), &TICKET_KEY);

    let mut forged = good.clone();
    forged.mac[31] ^= 1;
    assert_eq!(shown(&mut worker, forged, Some(mine)), Some(ErrorCode::BadTicket));
    let mut for_more = good.clone();
    for_more.body.items = 2;
    assert_eq!(shown(&mut worker, for_more, Some(mine)), Some(ErrorCode::BadTicket));
    for bearer in [Some(thiefs), None] {
        assert_eq!(shown(&mut worker, good.clone(), bearer), Some(ErrorCode::BadTicket), "{bearer:?}");
    }
    let late = Ticket::sign(TicketBody { expires_unix_ms: 59_999, ..body.clone() }, &TICKET_KEY);
    assert_eq!(shown(&mut worker, late, Some(mine)), Some(ErrorCode::BadTicket));
    let of_an_earlier_life = Ticket::sign(TicketBody { epoch: Epoch(0), ..body }, &TICKET_KEY);
    assert_eq!(shown(&mut worker, of_an_earlier_life, Some(mine)), Some(ErrorCode::BadTicket));
    assert_eq!(worker.attempts_held(), 0, "nothing is kept of any of them");

    assert_eq!(shown(&mut worker, good, Some(mine)), None, "as it was given, it opens");
}
