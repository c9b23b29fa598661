//! The cost of a decision of the broker: its machine runs in this process, without sockets, with up to a hundred
//! thousand workers.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_core::{
    MonoTime,
    broker::{Action, Broker, Config, Counters, Event},
};
use mesh_samples::{client_id, client_peer, task_number, worker_peer};
use proto_msgs::{
    AttemptId, BrokerToClient, ClientToBroker, Close, Digest, Heartbeat, ModelCost, ModelFormat, ModelRef, Outcome,
    Packing, Register, Submit, WorkerToBroker,
};
use serde_json::json;

use super::Plan;
use crate::report::{Report, Table};

/// Users that submit in turn.
const CLIENTS: u32 = 100;
/// Models in use. Each worker has loaded and measured two of them.
const MODELS: u32 = 32;
/// Time between two events, on the machine's own clock.
const STEP: Duration = Duration::from_micros(50);
/// Longer than any run on that clock.
const LONG: Duration = Duration::from_secs(3600);

pub(super) fn run(plan: Plan<'_>) -> Result<Report> {
    let mut report = Report::new("schedule-decision", "What one decision of the broker costs");
    let columns = &[
        "workers",
        "waiting",
        "submit p50 µs",
        "p99",
        "close and fill p50 µs",
        "p99",
        "mean without the slowest 1 % µs",
        "plain mean µs",
        "to 10 workers",
        "workers looked at",
        "tasks looked at",
        "heartbeat mean µs",
    ];
    let mut table = Table::new("Broker::handle in this process, one thread", columns);
    let cycles = plan.or(20_000, 200);
    for waiting in plan.or(&[0_u32, 10_000][..], &[0, 100]) {
        let mut at_ten = f64::NAN;
        for workers in plan.or(&[10_u32, 100, 1_000, 10_000, 100_000][..], &[10, 100]) {
            let mut bench = Bench::new(*workers, *waiting)?;
            let mut measured = bench.cycles(cycles)?;
            // Computed before the times are sorted.
            let (mean, plain_mean) = (measured.decision_us(99), measured.decision_us(100));
            if *workers == 10 {
                at_ten = mean;
            }
            table.row(vec![
                json!(workers),
                json!(waiting),
                json!(micros_at(&mut measured.submits, 0.5)),
                json!(micros_at(&mut measured.submits, 0.99)),
                json!(micros_at(&mut measured.closes, 0.5)),
                json!(micros_at(&mut measured.closes, 0.99)),
                json!(mean),
                json!(plain_mean),
                json!(mean / at_ten),
                json!(measured.candidates_per_grant()),
                json!(measured.waiting_per_grant()),
                json!(bench.heartbeat_us()),
            ]);
        }
    }
    report.table(table);
    report.note(format!(
        "{cycles} cycles each: a task is closed and, if tasks wait, one of them is placed; then another is submitted, and \
         placed at once if none wait. Every cycle places one task; the means are of the whole cycle, both events with \
         their bookkeeping and the signing of the ticket. In the slowest hundredth others had the processor: `to 10 workers` \
         compares the means without it."
    ));
    report.note(format!(
        "{CLIENTS} clients, {MODELS} models of which each worker has two loaded and measured, one slot each, runs of a \
         second. The machine's own clock moves {} µs an event.",
        STEP.as_micros()
    ));
    report.note("`looked at`: what the machine counted for each grant; tests hold these numbers, not the times.");
    Ok(report)
}

/// A broker in the middle of its work.
struct Bench {
    broker: Broker,
    now: MonoTime,
    workers: u32,
    submitted: u32,
    /// Granted and not yet closed attempts, the oldest first.
    at_work: VecDeque<AttemptId>,
}

/// Figures of a number of cycles.
struct Measured {
    submits: Vec<Duration>,
    closes: Vec<Duration>,
    before: Counters,
    after: Counters,
}

impl Measured {
    /// Mean of this part of the whole cycles, the fastest, percent. In the slowest ones the machine ran other processes.
    fn decision_us(&self, percent: usize) -> f64 {
        let mut cycles: Vec<Duration> =
            self.submits.iter().zip(&self.closes).map(|(one, other)| *one + *other).collect();
        cycles.sort_unstable();
        cycles.truncate((cycles.len() * percent).div_ceil(100));
        cycles.iter().sum::<Duration>().as_secs_f64() * 1e6 / cycles.len() as f64
    }

    fn candidates_per_grant(&self) -> f64 {
        self.per_grant(self.after.candidates_looked - self.before.candidates_looked)
    }

    fn waiting_per_grant(&self) -> f64 {
        self.per_grant(self.after.waiting_looked - self.before.waiting_looked)
    }

    fn per_grant(&self, looks: u64) -> f64 {
        looks as f64 / (self.after.granted - self.before.granted).max(1) as f64
    }
}

impl Bench {
    /// All workers busy and `waiting` tasks in the queue; if `waiting` is 0, half of the workers idle.
    fn new(workers: u32, waiting: u32) -> Result<Self> {
        // The clients repeat nothing, and among many workers it takes seconds of the machine's clock to fill all.
        let config = Config { grant_wait: LONG, client_quiet: LONG, client_silence: LONG, ..Config::default() };
        let (broker, now) = (Broker::new(config), MonoTime::from_micros(1_000_000));
        let mut bench = Self { broker, now, workers, submitted: 0, at_work: VecDeque::new() };
        for number in 0..workers {
            let _ = bench.broker.handle(now, from_worker(number, WorkerToBroker::Register(register(number))));
            let _ = bench.broker.handle(now, from_worker(number, WorkerToBroker::Heartbeat(heartbeat(number, 1))));
        }
        let submits = if waiting == 0 { workers / 2 } else { workers + waiting };
        for _ in 0..submits {
            bench.submit();
        }
        let queued = bench.broker.gauges().queued;
        ensure!(queued == waiting, "{waiting} tasks should wait, not {queued}");
        Ok(bench)
    }

    fn submit(&mut self) -> Duration {
        let event = from_client(self.submitted, ClientToBroker::Submit(submit(self.submitted)));
        self.submitted += 1;
        self.handle(event)
    }

    fn close_oldest(&mut self) -> Result<Duration> {
        let id = self.at_work.pop_front().context("no task is at work")?;
        let number = task_number(id.task);
        let outcome = Outcome::Done { run_us: 1_000_000, load_us: 0 };
        let close = Close { task: id.task, client: client_id(client_of(number)), attempt: id.attempt, outcome };
        Ok(self.handle(from_client(number, ClientToBroker::Close(close))))
    }

    /// Handles an event, measures its time, and notes the grants in the answer.
    fn handle(&mut self, event: Event) -> Duration {
        self.now = self.now + STEP;
        let began = Instant::now();
        let actions = self.broker.handle(self.now, event);
        let took = began.elapsed();
        self.at_work.extend(actions.iter().filter_map(|action| match action {
            Action::TellClient { message: BrokerToClient::Grant(grant), .. } => Some(grant.id),
            _ => None,
        }));
        took
    }

    fn cycles(&mut self, cycles: usize) -> Result<Measured> {
        let before = self.broker.counters();
        let (mut submits, mut closes) = (Vec::with_capacity(cycles), Vec::with_capacity(cycles));
        for _ in 0..cycles {
            closes.push(self.close_oldest()?);
            submits.push(self.submit());
        }
        let after = self.broker.counters();
        let granted = (after.granted - before.granted) as usize;
        ensure!(granted >= cycles * 9 / 10, "{granted} grants in {cycles} cycles: something else was measured");
        Ok(Measured { submits, closes, before, after })
    }

    fn heartbeat_us(&mut self) -> f64 {
        let beats = self.workers.min(1000);
        let all: Duration = (0..beats)
            .map(|number| self.handle(from_worker(number, WorkerToBroker::Heartbeat(heartbeat(number, 2)))))
            .sum();
        all.as_secs_f64() * 1e6 / f64::from(beats)
    }
}

fn micros_at(times: &mut [Duration], share: f64) -> f64 {
    crate::report::percentile_ms(times, share) * 1000.0
}

/// The client of a task: clients submit in turn.
fn client_of(task: u32) -> u32 {
    task % CLIENTS
}

fn model(number: u32) -> Digest {
    Digest::of(&(number % MODELS).to_le_bytes())
}

fn from_client(task: u32, message: ClientToBroker) -> Event {
    Event::ClientSaid { peer: client_peer(client_of(task)), key: None, message }
}

fn from_worker(number: u32, message: WorkerToBroker) -> Event {
    Event::WorkerSaid { peer: worker_peer(number), key: None, message }
}

fn submit(number: u32) -> Submit {
    let mut submit = mesh_samples::submit(number, client_of(number));
    // Not in step with the clients.
    submit.spec.model = ModelRef { digest: model(number / 3), size_bytes: 1 << 20, format: ModelFormat::Onnx };
    (submit.spec.input_bytes, submit.spec.items, submit.spec.job_items) = (4096, 8, 8);
    submit
}

fn register(number: u32) -> Register {
    Register { slots: [1, 0], heartbeat_ms: 60_000, ..mesh_samples::register(number) }
}

fn heartbeat(number: u32, seq: u64) -> Heartbeat {
    let models = [model(number), model(number + 7)];
    let cost = |model: Digest| ModelCost {
        model,
        packing: Packing::NoGain,
        best_batch: 1,
        next_batch: 1,
        curve: vec![(1, 100_000 + number % 1000)],
        load_us: 50_000,
        dispatched: [0; 4],
    };
    Heartbeat {
        held: models.to_vec(),
        warm: models.to_vec(),
        link_bytes_per_s: 100_000_000,
        costs: models.map(cost).to_vec(),
        ..mesh_samples::heartbeat(&register(number), seq)
    }
}
