//! What a ticket allows at a worker's door: nobody else's attempt, and no more than it is for.

use mesh_core::{
    MonoTime,
    worker::{Action, Config, Event, LinkId, Worker},
};
use mesh_samples::{TICKET_KEY, client_id, opening, register, ticket_body};
use proto_msgs::{
    BrokerToWorker, Digest, ErrorCode, Introduce, Manifest, ModelFormat, ModelRef, Open, Ticket, TicketBody,
    WorkerToClient,
};

const NOW: MonoTime = MonoTime::from_micros(1);

fn started() -> Worker {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(NOW, Event::Started { attempts: Vec::new() });
    worker
}

fn manifest(items: u32, size_bytes: u64) -> Manifest {
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes, format: ModelFormat::Onnx };
    Manifest { model, model_name: "m".into(), then: Vec::new(), items, inputs: Vec::new() }
}

/// A client opens an attempt; why it is refused.
fn opened(worker: &mut Worker, body: TicketBody, manifest: Manifest, resume: bool) -> Option<ErrorCode> {
    let open = Box::new(Open { resume, ..opening(Ticket::sign(body, &TICKET_KEY), Some(manifest)) });
    let said = worker.handle(NOW, Event::Opened { link: LinkId(1), key: None, open });
    said.into_iter().find_map(|action| match action {
        Action::TellClient { message: WorkerToClient::Refuse(refuse), .. } => Some(refuse.code),
        _ => None,
    })
}

#[test]
fn an_attempt_is_opened_again_only_by_its_own_client() {
    let mut worker = started();
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), false), None);
    let others = TicketBody { client: client_id(3), ..ticket_body(1, 2, 1) };
    assert_eq!(opened(&mut worker, others, manifest(1, 1), true), Some(ErrorCode::BadTicket));
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), true), None);
}

#[test]
fn a_client_brings_as_many_bytes_and_items_as_its_ticket_is_for() {
    let body = TicketBody { bytes_max: 1000, items: 3, ..ticket_body(1, 2, 1) };
    let opens = |items, bytes| opened(&mut started(), body.clone(), manifest(items, bytes), false);
    assert_eq!(opens(3, 1000), None);
    assert_eq!(opens(3, 1001), Some(ErrorCode::TooLarge));
    assert_eq!(opens(2, 1000), Some(ErrorCode::BadRequest));
    assert_eq!(opens(4, 1000), Some(ErrorCode::BadRequest));
}

#[test]
fn an_attempt_that_the_worker_does_not_know_cannot_go_on() {
    let mut worker = started();
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), true), Some(ErrorCode::WorkerLost));
}

#[test]
fn an_attempt_whose_client_is_dialled_a_second_time_cannot_go_on_either() {
    let mut worker = started();
    let (ticket, endpoints) = (Ticket::sign(ticket_body(1, 2, 1), &TICKET_KEY), vec!["tcp://10.0.0.9:1".to_owned()]);
    let introduce = BrokerToWorker::Introduce(Introduce { ticket, endpoints, client_key: None });
    let _ = worker.handle(NOW, Event::BrokerSaid(introduce));
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), true), Some(ErrorCode::WorkerLost));
}

#[test]
fn a_sign_of_life_over_a_link_that_opened_nothing_is_answered_with_the_wish_to_open_again() {
    let mut worker = started();
    let id = ticket_body(1, 2, 1).attempt_id();
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), false), None);
    let mut answers = |link| worker.handle(NOW, Event::ClientAlive { id, link });
    assert_eq!(answers(LinkId(1)), []);
    let link = LinkId(2);
    assert_eq!(answers(link), [Action::TellClient { link, message: WorkerToClient::Reopen(id) }]);
}

#[test]
fn only_the_link_over_which_the_attempt_was_opened_last_ends_it() {
    let mut worker = started();
    let (id, [old, new, strange]) = (ticket_body(1, 2, 1).attempt_id(), [1, 3, 2].map(LinkId));
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), false), None);
    let open = Open { resume: true, ..opening(Ticket::sign(ticket_body(1, 2, 1), &TICKET_KEY), Some(manifest(1, 1))) };
    let _ = worker.handle(NOW, Event::Opened { link: new, key: None, open: Box::new(open) });
    for link in [strange, old] {
        let said = worker.handle(NOW, Event::Aborted { id, link });
        assert_eq!(said, [Action::TellClient { link, message: WorkerToClient::Reopen(id) }]);
    }
    assert!(worker.handle(NOW, Event::Aborted { id, link: new }).contains(&Action::Free { id }));
}

#[test]
fn nobody_ends_an_attempt_whose_client_is_still_being_dialled() {
    let mut worker = started();
    let (ticket, endpoints) = (Ticket::sign(ticket_body(1, 2, 1), &TICKET_KEY), vec!["tcp://10.0.0.9:1".to_owned()]);
    let introduce = BrokerToWorker::Introduce(Introduce { ticket, endpoints, client_key: None });
    let _ = worker.handle(NOW, Event::BrokerSaid(introduce));
    let (id, link) = (ticket_body(1, 2, 1).attempt_id(), LinkId(9));
    let said = worker.handle(NOW, Event::Aborted { id, link });
    assert_eq!(said, [Action::TellClient { link, message: WorkerToClient::Reopen(id) }]);
}

#[test]
fn a_client_that_comes_back_while_its_rows_run_is_followed_to_its_new_link() {
    let mut worker = started();
    let (id, link) = (ticket_body(1, 2, 1).attempt_id(), LinkId(2));
    assert_eq!(opened(&mut worker, ticket_body(1, 2, 1), manifest(1, 1), false), None);
    let _ = worker.handle(NOW, Event::Received { id });
    let open = Open { resume: true, ..opening(Ticket::sign(ticket_body(1, 2, 1), &TICKET_KEY), Some(manifest(1, 1))) };
    let said = worker.handle(NOW, Event::Opened { link, key: None, open: Box::new(open) });
    assert!(said.contains(&Action::Relink { id, link }), "{said:?}");
}
