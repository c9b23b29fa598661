//! A worker that keeps as many results as it may: clients that wait for results are still served, and the broker is
//! told.

use std::{collections::BTreeSet, time::Duration};

use mesh_core::{
    MonoTime,
    worker::{Action, Config, Event, LinkId, Restored, Sample, Worker},
};
use mesh_samples::{TICKET_KEY, opening, register, ticket_body};
use proto_msgs::{
    AttemptId, AttemptState, BrokerToWorker, Digest, ErrorCode, Failure, HeartbeatAck, Manifest, ModelFormat, ModelRef,
    Outcome, Register, Ticket, TicketBody, WorkerToBroker, WorkerToClient,
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

fn beats(said: &[Action]) -> bool {
    said.iter().any(|action| matches!(action, Action::TellBroker(WorkerToBroker::Heartbeat(_))))
}

/// The broker's answer to a heartbeat of the first life: it knows that these attempts have ended.
fn acknowledged(forget: Vec<AttemptId>) -> Event {
    let Register { worker, epoch, .. } = register(1);
    let ack = HeartbeatAck { worker, epoch, seq: 1, known: true, broker_unix_ms: 0, forget, stop: Vec::new() };
    Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack))
}

#[test]
fn the_end_of_a_detached_task_is_told_at_once_and_those_behind_it_together() {
    let (mut worker, _) = keeps(2);
    let heartbeat = Config::new(register(1)).heartbeat;
    let kept = |task| Event::Kept { id: ticket(task, true).body.attempt_id(), failure: None };
    let calm = NOW + heartbeat / 2;
    assert!(beats(&worker.handle(calm, kept(0))), "nothing was said for long");
    assert!(!beats(&worker.handle(calm, kept(1))), "a flood of ends is no flood of heartbeats");
    let at = worker.next_deadline().expect("it beats");
    assert!(at.since(calm) < heartbeat / 16, "{:?}", at.since(calm));
    assert!(beats(&worker.handle(at, Event::Deadline)));
}

#[test]
fn a_detached_task_whose_result_cannot_be_joined_or_kept_is_not_reported_as_done() {
    let (mut worker, _) = keeps(1);
    let failure = Failure::new(ErrorCode::RunFailed, "the rows have different shapes");
    let id = ticket(0, true).body.attempt_id();
    let said =
        worker.handle(NOW + Config::new(register(1)).heartbeat, Event::Kept { id, failure: Some(failure.clone()) });
    let told = said.iter().find_map(|action| match action {
        Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)) => heartbeat.attempts.first(),
        _ => None,
    });
    assert_eq!(told.map(|told| told.state.clone()), Some(AttemptState::Finished(Outcome::Failed(failure))));
}

#[test]
fn a_draining_worker_leaves_when_the_broker_knows_the_ends_on_its_disk() {
    let (mut worker, _) = keeps(1);
    let _ = worker.handle(NOW, acknowledged(Vec::new()));
    let said = worker.handle(NOW, Event::DrainAsked);
    assert!(beats(&said) && !said.contains(&Action::Exit), "the broker thinks that the task runs: {said:?}");
    let said = worker.handle(NOW, acknowledged(vec![ticket(0, true).body.attempt_id()]));
    assert!(said.contains(&Action::Exit), "{said:?}");
}

#[test]
fn a_draining_worker_does_not_wait_for_a_silent_broker() {
    let (mut worker, _) = keeps(1);
    let silence = Config::new(register(1)).broker_silence;
    let _ = worker.handle(NOW, acknowledged(Vec::new()));
    let _ = worker.handle(NOW, Event::DrainAsked);
    let mut left = None;
    while let Some(now) = worker.next_deadline() {
        left = worker.handle(now, Event::Deadline).contains(&Action::Exit).then_some(now);
    }
    let waited = left.expect("it leaves").since(NOW);
    assert!(waited >= silence && waited < 2 * silence, "{waited:?}");
}

#[test]
fn a_result_that_nobody_fetches_is_kept_for_its_time_and_no_longer() {
    let (mut worker, _) = keeps(1);
    let kept_for = Config::new(register(1)).result_kept;
    let id = ticket(0, true).body.attempt_id();
    let _ = worker.handle(NOW, acknowledged(vec![id]));

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
