//! A worker that is asked to dial a client and has no room dials all the same: the client opens, and hears why not.

use mesh_core::{
    MonoTime,
    worker::{Action, Config, Event, LinkId, Worker},
};
use mesh_samples::{TICKET_KEY, register, ticket_body};
use proto_msgs::{
    BrokerToWorker, Digest, ErrorCode, Introduce, Manifest, ModelFormat, ModelRef, Open, Purpose, Ticket, TicketBody,
    WorkerToClient,
};

/// More than a worker takes in at the same time.
const MANY: u32 = 300;

const NOW: MonoTime = MonoTime::from_micros(1);

fn introduce(worker: &mut Worker, body: TicketBody) -> Vec<Action> {
    let ticket = Ticket::sign(body, &TICKET_KEY);
    let introduce = Introduce { ticket, endpoints: vec!["tcp://client:1".into()], client_key: None };
    worker.handle(NOW, Event::BrokerSaid(BrokerToWorker::Introduce(introduce)))
}

/// Whether the client is dialled, and if so whether for an attempt that the worker has.
fn dials(actions: &[Action]) -> Option<bool> {
    actions.iter().find_map(|action| match action {
        Action::Dial { is_held, .. } => Some(*is_held),
        _ => None,
    })
}

/// What the client hears when it opens.
fn opened(worker: &mut Worker, body: TicketBody) -> Option<ErrorCode> {
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
    let manifest = Manifest { model, model_name: "m".into(), then: Vec::new(), items: 1, inputs: Vec::new() };
    let manifest = (body.purpose == Purpose::Run).then_some(manifest);
    let ticket = Ticket::sign(body, &TICKET_KEY);
    let open = Box::new(Open {
        ticket,
        manifest,
        model_held: false,
        window_bytes: 1,
        resume: false,
        outputs_here: Vec::new(),
    });
    let said = worker.handle(NOW, Event::Opened { link: LinkId(1), key: None, open });
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
