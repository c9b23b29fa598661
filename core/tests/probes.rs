//! Probes at one worker: their rows' answers leave at once, and the comparison that follows hurts nobody.

use std::time::Duration;

use mesh_core::{
    MonoTime,
    worker::{Action, BatchId, BatchKind, BatchTimes, Config, Equality, Event, LinkId, Worker},
};
use mesh_samples::{TICKET_KEY, opening, register, ticket_body};
use proto_msgs::{
    AttemptId, BrokerToWorker, Digest, ErrorCode, Failure, HeartbeatAck, Lane, Manifest, ModelFormat, ModelRef,
    Outcome, Packing, Phase, Ticket, TicketBody, WorkerToBroker,
};

/// A worker with slots of both lanes on one GPU that takes one batch at a time.
struct Place {
    worker: Worker,
    now: MonoTime,
    tasks: u32,
    /// What the worker has ordered, the latest last.
    orders: Vec<Action>,
}

impl Place {
    fn new() -> Self {
        let mut register = register(1);
        (register.slots, register.device_map) = ([1, 1], vec![0]);
        let worker = Worker::new(Config::new(register.clone()));
        let mut place = Self { worker, now: MonoTime::from_micros(1), tasks: 0, orders: Vec::new() };
        place.tell(Event::Started { attempts: Vec::new() });
        let (worker, epoch) = (register.worker, register.epoch);
        let (forget, stop) = (Vec::new(), Vec::new());
        let ack = HeartbeatAck { worker, epoch, seq: 1, known: true, broker_unix_ms: 1, forget, stop };
        place.tell(Event::BrokerSaid(BrokerToWorker::HeartbeatAck(ack)));
        place
    }

    fn tell(&mut self, event: Event) {
        let orders = self.worker.handle(self.now, event);
        self.orders.extend(orders);
    }

    fn wait(&mut self, ms: u64) {
        let until = self.now + Duration::from_millis(ms);
        while let Some(due) = self.worker.next_deadline().filter(|due| *due <= until) {
            self.now = due.max(self.now);
            self.tell(Event::Deadline);
        }
        self.now = until;
    }

    /// Sends a task of so many items, with everything that it needs.
    fn task(&mut self, lane: Lane, items: u32, deadline_ms: Option<u64>) -> AttemptId {
        self.tasks += 1;
        let deadline_unix_ms = deadline_ms.map(|ms| self.now.as_micros() / 1000 + ms);
        let body = TicketBody { lane, items, deadline_unix_ms, ..ticket_body(self.tasks, 2, 1) };
        let (id, link) = (body.attempt_id(), LinkId(self.tasks.into()));
        let model = ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1, format: ModelFormat::Onnx };
        let manifest = Manifest { model, model_name: "m".into(), then: Vec::new(), items, inputs: Vec::new() };
        let open = Box::new(opening(Ticket::sign(body, &TICKET_KEY), Some(manifest)));
        self.tell(Event::Opened { link, key: None, open });
        self.tell(Event::Received { id });
        id
    }

    /// The latest batch, and its kind.
    fn batch(&self) -> (BatchId, BatchKind) {
        let mut batches = self.orders.iter().rev().filter_map(|order| match order {
            Action::RunBatch { batch, kind, .. } => Some((*batch, *kind)),
            _ => None,
        });
        batches.next().expect("a batch runs")
    }

    /// A probe of the batch lane's rows begins, and its single runs of this time are over.
    fn answered_probe(&mut self, rows: u32, single_ms: u64) -> BatchId {
        self.task(Lane::Batch, rows, None);
        let (batch, kind) = self.batch();
        assert_eq!(kind, BatchKind::Probe);
        self.answer(batch, rows, single_ms);
        batch
    }

    fn answer(&mut self, batch: BatchId, rows: u32, single_ms: u64) {
        self.tell(Event::BatchReached { batch, phase: Phase::Running });
        self.wait(single_ms * u64::from(rows));
        let (run_us, single_us) = (single_ms * u64::from(rows) * 1000, Some(single_ms * 1000));
        let times = BatchTimes { run_us, single_us, ..BatchTimes::default() };
        self.tell(Event::BatchAnswered { batch, times });
    }

    fn ends(&mut self, batch: BatchId, ended: Result<Equality, ErrorCode>) {
        let times = |equal| BatchTimes { packed_us: Some(1), equal: Some(equal), ..BatchTimes::default() };
        let ended = ended.map(times).map_err(|code| Failure::new(code, "as the model does"));
        self.tell(Event::BatchEnded { batch, ended });
    }

    fn outcomes(&self, id: AttemptId) -> Vec<Outcome> {
        let outcome = |order: &Action| match order {
            Action::SendResult { id: of, outcome, .. } if *of == id => Some(outcome.clone()),
            _ => None,
        };
        self.orders.iter().filter_map(outcome).collect()
    }

    fn is_done(&self, id: AttemptId) -> bool {
        matches!(&self.outcomes(id)[..], [Outcome::Done { .. }])
    }

    fn has(&self, order: &Action) -> bool {
        self.orders.contains(order)
    }

    /// Rows and time limit of the comparison that was ordered.
    fn comparison(&self) -> Option<(u32, Duration)> {
        self.orders.iter().find_map(|order| match order {
            Action::Compare { rows, limit, .. } => Some((*rows, *limit)),
            _ => None,
        })
    }

    /// Slots in use and the verdict, as the next heartbeat tells them.
    fn told(&mut self) -> (u16, Packing) {
        self.wait(6000);
        let mut heartbeats = self.orders.iter().rev().filter_map(|order| match order {
            Action::TellBroker(WorkerToBroker::Heartbeat(heartbeat)) => Some(heartbeat),
            _ => None,
        });
        let latest = heartbeats.next().expect("they come all the time");
        (latest.lanes.iter().map(|lane| lane.slots_used).sum(), latest.costs[0].packing)
    }
}

#[test]
fn answers_leave_before_the_comparison_and_once() {
    let mut place = Place::new();
    let batch = place.answered_probe(4, 50);
    let task = ticket_body(1, 2, 1).attempt_id();
    assert!(place.is_done(task), "{:?}", place.orders);
    assert_eq!(place.comparison(), Some((4, Duration::from_secs(2))));
    assert_eq!(place.told(), (1, Packing::Unknown), "its slot is in use");
    place.tell(Event::BatchAnswered { batch, times: BatchTimes::default() });
    place.ends(batch, Ok(Equality::Same));
    assert!(place.is_done(task), "nothing is answered twice: {:?}", place.outcomes(task));
    assert_eq!(place.told(), (0, Packing::On));
}

#[test]
fn a_comparison_that_fails_fails_no_task_and_runs_no_row_again() {
    let mut place = Place::new();
    let batch = place.answered_probe(4, 50);
    let runs = |place: &Place| place.orders.iter().filter(|order| matches!(order, Action::RunBatch { .. })).count();
    let before = runs(&place);
    place.ends(batch, Err(ErrorCode::RunCrashed));
    assert!(place.is_done(ticket_body(1, 2, 1).attempt_id()));
    assert_eq!(runs(&place), before);
    assert_eq!(place.told(), (0, Packing::Unknown), "it tells nothing of the model");
    place.task(Lane::Batch, 4, None);
    assert_eq!(place.batch().1, BatchKind::Whole, "the next probe comes later");
}

#[test]
fn who_goes_after_the_answer_leaves_the_comparison_alone() {
    let mut place = Place::new();
    let batch = place.answered_probe(4, 50);
    let task = ticket_body(1, 2, 1).attempt_id();
    place.tell(Event::Released { id: task, link: LinkId(1) });
    place.tell(Event::Aborted { id: task, link: LinkId(1) });
    assert!(!place.has(&Action::KillBatch { batch }) && !place.has(&Action::StopComparing { batch }));
    place.ends(batch, Ok(Equality::Differs));
    assert_eq!(place.told(), (0, Packing::Differs));
}

#[test]
fn a_realtime_row_cuts_a_long_comparison_of_the_batch_lane_short() {
    let mut place = Place::new();
    let batch = place.answered_probe(4, 20);
    place.wait(10);
    let asked = place.task(Lane::Realtime, 1, None);
    assert!(!place.has(&Action::StopComparing { batch }), "a short one may end");
    place.wait(100);
    assert!(place.has(&Action::StopComparing { batch }), "it waits since a hundred milliseconds");
    place.ends(batch, Ok(Equality::Inconclusive));
    let (next, _) = place.batch();
    assert_ne!(next, batch, "the row has the device");
    place.tell(Event::BatchReached { batch: next, phase: Phase::Running });
    place.tell(Event::BatchEnded { batch: next, ended: Ok(BatchTimes { run_us: 50_000, ..BatchTimes::default() }) });
    assert!(place.is_done(asked));
    let stops = place.orders.iter().filter(|order| **order == Action::StopComparing { batch });
    assert_eq!(stops.count(), 1, "it is told once");
}

#[test]
fn a_realtime_row_waits_for_one_call_of_a_comparison_of_its_own_lane_and_the_next_probe_goes_on() {
    let mut place = Place::new();
    place.task(Lane::Realtime, 4, None);
    let (probe, _) = place.batch();
    place.answer(probe, 4, 100);
    assert!(place.comparison().is_some());
    let asked = place.task(Lane::Realtime, 1, None);
    assert!(!place.has(&Action::StopComparing { batch: probe }), "its call begins all the same");
    place.wait(100);
    assert!(place.has(&Action::StopComparing { batch: probe }), "and no other after it");
    place.ends(probe, Ok(Equality::Unfinished));
    let (next, kind) = place.batch();
    assert_eq!((kind, next == probe), (BatchKind::Whole, false));
    place.tell(Event::BatchEnded { batch: next, ended: Ok(BatchTimes { run_us: 50_000, ..BatchTimes::default() }) });
    assert!(place.is_done(asked));
    assert_eq!(place.told(), (0, Packing::Unknown));
    place.task(Lane::Realtime, 4, None);
    assert_eq!(place.batch().1, BatchKind::Probe, "soon, however often it was cut short");
}

#[test]
fn no_comparison_begins_that_would_make_a_waiting_row_miss_its_deadline() {
    for (deadline_ms, compares) in [(1500, false), (6000, true)] {
        let mut place = Place::new();
        place.task(Lane::Batch, 4, None);
        let (batch, _) = place.batch();
        let waiting = place.task(Lane::Batch, 1, Some(1200 + deadline_ms));
        place.answer(batch, 4, 300);
        assert_eq!(place.comparison().is_some(), compares, "{deadline_ms} ms are left");
        assert_eq!(place.has(&Action::StopComparing { batch }), !compares);
        if !compares {
            place.ends(batch, Ok(Equality::Inconclusive));
            let (next, _) = place.batch();
            place.wait(300);
            place.tell(Event::BatchEnded { batch: next, ended: Ok(BatchTimes::default()) });
            assert!(place.is_done(waiting));
        }
    }
}

#[test]
fn of_slow_models_few_rows_are_compared_and_of_very_slow_ones_none() {
    let comparison = |single_ms| {
        let mut place = Place::new();
        place.answered_probe(4, single_ms);
        place.comparison()
    };
    assert_eq!(comparison(1), Some((4, Duration::from_secs(2))));
    assert_eq!(comparison(400), Some((3, Duration::from_secs(2))));
    assert_eq!(comparison(1100), Some((2, Duration::from_millis(3300))));
    assert_eq!(comparison(4000), None);
}

#[test]
fn a_worker_that_drains_begins_no_comparison() {
    let mut place = Place::new();
    place.task(Lane::Batch, 4, None);
    let (batch, _) = place.batch();
    place.tell(Event::DrainAsked);
    place.answer(batch, 4, 50);
    assert!(place.is_done(ticket_body(1, 2, 1).attempt_id()));
    assert!(place.comparison().is_none());
}

#[test]
fn equal_rows_of_a_new_size_are_answered_and_a_realtime_row_cuts_short_what_is_made_up_beside_them() {
    let mut place = Place::new();
    let probe = place.answered_probe(4, 20);
    place.ends(probe, Ok(Equality::Same));
    let task = place.task(Lane::Batch, 8, None);
    let (check, kind) = place.batch();
    assert_eq!(kind, BatchKind::Check);
    place.answer(check, 8, 20);
    assert!(place.is_done(task), "{:?}", place.orders);
    let compared = |order: &Action| matches!(order, Action::Compare { batch, rows: 8, .. } if *batch == check);
    assert!(place.orders.iter().any(compared), "in calls of the same size");
    place.task(Lane::Realtime, 1, None);
    place.wait(100);
    assert!(place.has(&Action::StopComparing { batch: check }));
    place.ends(check, Ok(Equality::Unfinished));
    assert_eq!(place.told().1, Packing::On, "the smaller size is as good as before");
}

#[test]
fn a_comparison_of_a_check_is_as_long_as_its_calls_and_no_longer_than_any_other() {
    for (call_ms, deadline_ms, compares) in [(2400, None, true), (2400, Some(3000), false), (8000, None, false)] {
        let mut place = Place::new();
        let probe = place.answered_probe(4, 1);
        place.ends(probe, Ok(Equality::Same));
        place.task(Lane::Batch, 8, None);
        let (check, kind) = place.batch();
        assert_eq!(kind, BatchKind::Check);
        deadline_ms.map(|ms| place.task(Lane::Batch, 1, Some(ms)));
        let single_us = Some(call_ms * 1000 / 8);
        let times = BatchTimes { run_us: call_ms * 1000, single_us, ..BatchTimes::default() };
        place.tell(Event::BatchAnswered { batch: check, times });
        let goes_on = |order: &Action| matches!(order, Action::Compare { batch, .. } if *batch == check);
        assert_eq!(place.orders.iter().any(goes_on), compares, "calls of {call_ms} ms, {deadline_ms:?} ms are left");
        assert_eq!(place.has(&Action::StopComparing { batch: check }), !compares);
    }
}
