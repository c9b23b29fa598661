//! A worker that keeps as many results as it may: clients that wait for results are still served, and the broker is
//! told.

use std::{collections::BTreeSet, time::Duration};

use mesh_core::{
    MonoTime,
    worker::{Action, Config, Event, LinkId, Restored, Sample, Worker},
};
use mesh_samples::{TICKET_KEY, opening, register, ticket_body};
use proto_msgs::{
    BrokerToWorker, Digest, ErrorCode, HeartbeatAck, Manifest, ModelFormat, ModelRef, Outcome, Register, Ticket,
    TicketBody, WorkerToBroker, WorkerToClient,
    limits::{HELD_MAX, TEXT_BYTES_MAX},
};

/// The most results of detached tasks that a worker keeps.
const KEPT: u32 = 8192;

const NOW: MonoTime = MonoTime::from_micros(1);

fn manifest() -> Manifest {
    let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
    Manifest { model, model_name: "m".into(), then: Vec::new(), items: 1, inputs: Vec::new() }
}

fn ticket(task: u32, detached: bool) -> Ticket {
    Ticket::sign(TicketBody { detached, ..ticket_body(task, 2, 1) }, &TICKET_KEY)
}

/// A restarted worker with `ends` ended detached tasks on its disk, and its first actions.
fn started(ends: u32, outcome: &Outcome) -> (Worker, Vec<Action>) {
    let kept = |task| Restored {
        ticket: ticket(task, true),
        manifest: Box::new(manifest()),
        runs: Vec::new(),
        outcome: Some(outcome.clone()),
        runs_begun: 1,
    };
    let mut worker = Worker::new(Config::new(register(1)));
    let said = worker.handle(NOW, Event::Started { attempts: (0..ends).map(kept).collect() });
    (worker, said)
}

/// A restarted worker with `results` results on its disk, and whether it reports that it keeps no more.
fn keeps(results: u32) -> (Worker, bool) {
    let (worker, said) = started(results, &Outcome::Done { run_us: 1, load_us: 0 });
    let is_full = said.iter().find_map(|action| match action {
        Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)) => Some(heartbeat.keeps_no_more),
        _ => None,
    });
    (worker, is_full.expect("a worker begins with a heartbeat"))
}

/// The refusal that a client gets when it opens an attempt.
fn opens(worker: &mut Worker, task: u32, detached: bool) -> Option<ErrorCode> {
    let (ticket, manifest) = (ticket(task, detached), Some(manifest()));
    let open = Box::new(opening(ticket, manifest));
    let said = worker.handle(NOW, Event::Opened { link: LinkId(1), key: None, open });
    said.into_iter().find_map(|action| match action {
        Action::TellClient { message: WorkerToClient::Refuse(refuse), .. } => Some(refuse.code),
        _ => None,
    })
}

#[test]
fn results_that_wait_to_be_fetched_keep_no_attached_task_out() {
    let (mut worker, is_full) = keeps(KEPT);
    assert!(is_full, "the broker is told");
    assert_eq!(opens(&mut worker, KEPT, false), None);
    assert_eq!(opens(&mut worker, KEPT + 1, true), Some(ErrorCode::Busy));

    let (mut worker, is_full) = keeps(KEPT - 1);
    assert!(!is_full);
    assert_eq!(opens(&mut worker, KEPT, true), None);
}

#[test]
fn the_end_of_a_detached_task_is_told_before_the_next_heartbeat_is_due() {
    let (mut worker, _) = keeps(1);
    let heartbeat = Config::new(register(1)).heartbeat;
    let _ = worker.handle(NOW, Event::Kept { id: ticket(0, true).body.attempt_id() });
    let at = worker.next_deadline().expect("it beats");
    assert!(at.since(NOW) < heartbeat / 2, "{:?}", at.since(NOW));
    let said = worker.handle(at, Event::Deadline);
    assert!(said.iter().any(|action| matches!(action, Action::TellBroker(WorkerToBroker::Heartbeat(_)))), "{said:?}");
}

#[test]
fn a_result_that_nobody_fetches_is_kept_for_its_time_and_no_longer() {
    let (mut worker, _) = keeps(1);
    let kept_for = Config::new(register(1)).result_kept;
    let body = ticket(0, true).body;
    let id = body.attempt_id();
    let Register { worker: name, epoch, .. } = register(1);
    let (forget, stop) = (vec![id], Vec::new());
    let ack = HeartbeatAck { worker: name, epoch, seq: 1, known: true, broker_unix_ms: 0, forget, stop };
    let _ = worker.handle(NOW, Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)));

    let mut freed_at = None;
    while let Some(now) = worker.next_deadline().filter(|now| freed_at.is_none() && now.since(NOW) < 2 * kept_for) {
        let freed = worker.handle(now, Event::Deadline).contains(&Action::Free { id });
        freed_at = freed.then_some(now);
    }
    let kept = freed_at.expect("it takes room for ever").since(NOW);
    assert!(kept >= kept_for && kept < kept_for + Duration::from_secs(1), "{kept:?}");
    assert_eq!(worker.attempts_held(), 0);
}

#[test]
fn a_worker_with_many_long_failures_is_heard_and_tells_all_of_them() {
    const FAILURES: u32 = 600;
    let (mut worker, first) = started(FAILURES, &Outcome::failed(ErrorCode::BadRequest, "x".repeat(TEXT_BYTES_MAX)));
    let models = vec![Digest::from_bytes([1; 32]); HELD_MAX];
    let sample = Sample { held: models.clone(), warm: models, ..Sample::default() };
    let mut said = [first, worker.handle(NOW, Event::Sampled(sample))].concat();
    let mut told = BTreeSet::new();
    for _ in 0..20 {
        for action in said {
            let Action::TellBroker(message) = action else { continue };
            assert!(message.to_frame().is_ok(), "the broker would take it for dead");
            if let WorkerToBroker::Heartbeat(heartbeat) = message {
                assert!(!heartbeat.names_all);
                told.extend(heartbeat.attempts.iter().map(|report| report.id));
            }
        }
        let now = worker.next_deadline().expect("a worker speaks");
        said = worker.handle(now, Event::Deadline);
    }
    assert_eq!(told.len(), FAILURES as usize);
}
