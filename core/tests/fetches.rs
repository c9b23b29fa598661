//! A kept result is sent to whoever fetches it for as long as somebody listens, and no longer.

use std::time::Duration;

use mesh_core::{
    MonoTime,
    worker::{Action, Config, Event, LinkId, Restored, Worker},
};
use mesh_samples::{TICKET_KEY, register, ticket_body};
use proto_msgs::{AttemptId, Digest, Manifest, ModelFormat, ModelRef, Open, Outcome, Purpose, Ticket, TicketBody};

/// Longer than a client may say nothing.
const SILENCE: Duration = Duration::from_secs(6);

fn body() -> TicketBody {
    TicketBody { detached: true, ..ticket_body(1, 2, 1) }
}

/// A worker that found the end of a detached task on its disk.
fn worker_with_a_result() -> Worker {
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
    let manifest = Manifest { model, model_name: "m".into(), then: Vec::new(), items: 1, inputs: Vec::new() };
    let found = Restored {
        ticket: Ticket::sign(body(), &TICKET_KEY),
        manifest: Box::new(manifest),
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
    let open = Box::new(Open { ticket, manifest: None, model_held: false, window_bytes: 1, resume: false });
    worker.handle(now, Event::Opened { link: LinkId(1), key: None, open })
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

    now = now + SILENCE;
    let silenced = worker.handle(now, Event::Deadline);
    assert!(silenced.contains(&Action::Silence { id }), "{silenced:?}");
    now = now + SILENCE;
    assert!(!worker.handle(now, Event::Deadline).contains(&Action::Silence { id }), "once is enough");

    assert!(is_sent(&fetch(&mut worker, now)), "it is still kept");
}
