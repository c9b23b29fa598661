//! Results: what is sent with them, and that a kept result is sent only as long as its client listens.

use std::time::Duration;

use mesh_core::{
    MonoTime,
    worker::{Action, BatchTimes, Config, Event, LinkId, Restored, Worker},
};
use mesh_samples::{TICKET_KEY, opening, register, ticket_body};
use proto_msgs::{AttemptId, Digest, Manifest, ModelFormat, ModelRef, Open, Outcome, Purpose, Ticket, TicketBody};

/// Longer than a client may be silent.
const SILENCE: Duration = Duration::from_secs(6);

fn body() -> TicketBody {
    TicketBody { detached: true, ..ticket_body(1, 2, 1) }
}

fn manifest() -> Manifest {
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
    Manifest { model, model_name: "m".into(), then: Vec::new(), items: 1, inputs: Vec::new() }
}

/// A worker that found an ended detached task on its disk.
fn worker_with_a_result() -> Worker {
    let found = Restored {
        ticket: Ticket::sign(body(), &TICKET_KEY),
        manifest: Box::new(manifest()),
        runs: Vec::new(),
        outcome: Some(Outcome::Done { run_us: 1, load_us: 1 }),
        runs_begun: 1,
    };
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(MonoTime::ZERO, Event::Started { attempts: vec![found] });
    worker
}

fn fetch(worker: &mut Worker, now: MonoTime) -> Vec<Action> {
    let ticket = Ticket::sign(TicketBody { purpose: Purpose::Fetch, ..body() }, &TICKET_KEY);
    let open = Box::new(opening(ticket, None));
    worker.handle(now, Event::Opened { link: LinkId(1), key: None, open })
}

/// Lets time pass without any message.
fn silence(worker: &mut Worker, now: &mut MonoTime) -> Vec<Action> {
    let end = *now + SILENCE;
    let mut actions = Vec::new();
    while let Some(due) = worker.next_deadline().filter(|due| *due <= end) {
        *now = due.max(*now);
        actions.extend(worker.handle(*now, Event::Deadline));
    }
    *now = end;
    actions
}

fn is_sent(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::SendResult { .. }))
}

#[test]
fn a_client_that_falls_silent_in_the_middle_of_a_fetch_is_sent_no_more_until_it_comes_back() {
    let mut worker = worker_with_a_result();
    let id = AttemptId { task: body().task, attempt: body().attempt };
    let mut now = MonoTime::from_micros(1);
    assert!(is_sent(&fetch(&mut worker, now)));

    let silenced = silence(&mut worker, &mut now);
    assert!(silenced.contains(&Action::Silence { id }), "{silenced:?}");
    assert!(!silence(&mut worker, &mut now).contains(&Action::Silence { id }), "once is enough");

    assert!(is_sent(&fetch(&mut worker, now)), "it is still kept");
}

#[test]
fn a_result_says_how_long_the_worker_had_everything_so_that_its_client_knows_how_long_it_was_sending() {
    let mut worker = Worker::new(Config::new(register(1)));
    let _ = worker.handle(MonoTime::ZERO, Event::Started { attempts: Vec::new() });
    let body = ticket_body(1, 2, 1);
    let id = body.attempt_id();
    let (ticket, at) = (Ticket::sign(body, &TICKET_KEY), |ms: u64| MonoTime::from_micros(ms * 1000));
    let open = Open { ticket, manifest: Some(manifest()), window_bytes: 1, resume: false, outputs_here: Vec::new() };
    let _ = worker.handle(at(10), Event::Opened { link: LinkId(1), key: None, open: Box::new(open) });
    let runs = worker.handle(at(50), Event::Received { id });
    let batch = runs.iter().find_map(|action| match action {
        Action::RunBatch { batch, .. } => Some(*batch),
        _ => None,
    });
    let ended = Event::BatchEnded { batch: batch.expect("a slot is free"), ended: Ok(BatchTimes::default()) };
    let told = worker.handle(at(80), ended).into_iter().find_map(|action| match action {
        Action::SendResult { held_us, .. } => Some(held_us),
        _ => None,
    });
    assert_eq!(told, Some(30_000));
}
