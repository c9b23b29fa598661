//! Many workers: the broker still finds the right one, and its work for one grant does not grow with their number.

use std::collections::BTreeSet;

use mesh_core::{
    MonoTime,
    broker::{Action, Broker, Config, Event},
};
use mesh_samples::{client_peer, task_id, worker_id, worker_peer};
use proto_msgs::{
    Arch, AttemptId, AttemptReport, AttemptState, BrokerToClient, ClientToBroker, Demands, Digest, Heartbeat,
    LabelRule, ModelCost, Packing, Register, Slo, WorkerId, WorkerToBroker,
};

fn registered(number: u32) -> Event {
    let register = Register {
        // Every second worker is of the wrong kind.
        arch: if number.is_multiple_of(2) { Arch::Amd64 } else { Arch::Arm64 },
        slots: [0, 1],
        ..mesh_samples::register(number)
    };
    Event::WorkerSaid { peer: worker_peer(number), key: None, message: WorkerToBroker::Register(register) }
}

fn heartbeat(number: u32, seq: u64, held: &[AttemptId]) -> Event {
    let running = |id: &AttemptId| AttemptReport { id: *id, state: AttemptState::Running };
    let register = mesh_samples::register(number);
    let attempts = held.iter().map(running).collect();
    let heartbeat = Heartbeat { attempts, ..mesh_samples::heartbeat(&register, seq) };
    Event::WorkerSaid { peer: worker_peer(number), key: None, message: WorkerToBroker::Heartbeat(heartbeat) }
}

fn submit(number: u32) -> Event {
    let demands = Demands { arch: Some(Arch::Amd64), ..Demands::default() };
    let mut submit = mesh_samples::submit(number, number);
    submit.spec.demands = demands;
    Event::ClientSaid { peer: client_peer(number), key: None, message: ClientToBroker::Submit(submit) }
}

fn grants_in(actions: &[Action]) -> Vec<(AttemptId, WorkerId)> {
    let grant = |action: &Action| match action {
        Action::TellClient { message: BrokerToClient::Grant(grant), .. } => Some((grant.id, grant.worker)),
        _ => None,
    };
    actions.iter().filter_map(grant).collect()
}

#[test]
fn ten_thousand_workers_are_filled_one_by_one_and_the_next_task_waits_for_the_first_free_one() {
    for workers in [1_000_u32, 10_000] {
        let mut broker = Broker::new(Config::default());
        let now = MonoTime::from_micros(1_000_000);
        for number in 0..workers {
            let _ = broker.handle(now, registered(number));
            let _ = broker.handle(now, heartbeat(number, 1, &[]));
        }
        assert_eq!(broker.gauges().workers, workers);
        let right_kind = workers / 2;
        let mut grants = Vec::new();
        for number in 0..right_kind {
            let actions = broker.handle(now, submit(number));
            // The client hears one message, and the store is told of one task at most; no other node hears anything.
            assert!(actions.len() <= 2, "{} orders for one task", actions.len());
            grants.extend(grants_in(&actions));
        }
        assert!(grants.len() >= 16, "those next to hand are given at once");
        // The other tasks passed over too many workers of the wrong kind; one heartbeat of each corrects it.
        for number in 0..workers {
            grants.extend(grants_in(&broker.handle(now, heartbeat(number, 2, &[]))));
        }
        let taken: BTreeSet<WorkerId> = grants.iter().map(|(_, worker)| *worker).collect();
        assert_eq!((grants.len(), taken.len()), (right_kind as usize, right_kind as usize));
        assert_eq!(broker.gauges().slots_used, right_kind);
        assert!(grants_in(&broker.handle(now, submit(right_kind))).is_empty());
        assert_eq!(broker.gauges().queued, 1);
        // One worker reports that it has its task, and later that it does not have it any more.
        let (id, worker) = grants[0];
        let number = (0..workers).find(|number| worker_id(*number) == worker);
        let number = number.expect("grants name workers that registered");
        let _ = broker.handle(now, heartbeat(number, 3, &[id]));
        let next = grants_in(&broker.handle(now, heartbeat(number, 4, &[])));
        assert_eq!(next.first().map(|(_, worker)| *worker), Some(worker), "the waiting task goes where there is room");
    }
}

/// What workers have measured and tasks want.
#[derive(Clone, Copy, Debug)]
enum Fleet {
    /// No worker has run anything, and tasks want only a processor.
    New,
    /// Each worker has two of 32 models, loaded and measured, and half of the workers have a label. A task wants one
    /// model; some also want the label, cores, a latency or a deadline.
    Practised,
}

const MODELS: u32 = 32;

fn model(number: u32) -> Digest {
    Digest::from_bytes([(number % MODELS) as u8; 32])
}

impl Fleet {
    fn registered(self, number: u32) -> Event {
        let Event::WorkerSaid { peer, key, message: WorkerToBroker::Register(mut register) } = registered(number)
        else {
            panic!("a worker introduces itself")
        };
        if let Self::Practised = self {
            let room = if number % 4 < 2 { "attic" } else { "cellar" };
            register.labels = vec![("room".to_owned(), room.to_owned())];
        }
        Event::WorkerSaid { peer, key, message: WorkerToBroker::Register(register) }
    }

    fn heartbeat(self, number: u32, seq: u64, held: &[AttemptId]) -> Event {
        let Event::WorkerSaid { peer, key, message: WorkerToBroker::Heartbeat(mut heartbeat) } =
            heartbeat(number, seq, held)
        else {
            panic!("a worker says how it is")
        };
        if let Self::Practised = self {
            // Out of step with the kinds of workers.
            let models = [model(number / 4), model(number / 4 + 7)];
            (heartbeat.held, heartbeat.warm) = (models.to_vec(), models.to_vec());
            (heartbeat.costs, heartbeat.link_bytes_per_s) =
                (models.map(|model| cost(model, number)).to_vec(), 100_000_000);
        }
        Event::WorkerSaid { peer, key, message: WorkerToBroker::Heartbeat(heartbeat) }
    }

    fn submit(self, number: u32) -> Event {
        let Event::ClientSaid { peer, key, message: ClientToBroker::Submit(mut submit) } = submit(number) else {
            panic!("a client submits")
        };
        if let Self::Practised = self {
            let room = |required| LabelRule { key: "room".to_owned(), value: "attic".to_owned(), required };
            submit.spec.model.digest = model(number / 3);
            submit.spec.labels =
                if number.is_multiple_of(5) { vec![room(number.is_multiple_of(10))] } else { Vec::new() };
            submit.spec.demands.cpu_millis = if number.is_multiple_of(7) { 1000 } else { 0 };
            submit.spec.slo = number.is_multiple_of(3).then_some(Slo { latency_ms: 1000, max_violation_permille: 50 });
            submit.spec.deadline_ms = number.is_multiple_of(11).then_some(86_400_000);
        }
        Event::ClientSaid { peer, key, message: ClientToBroker::Submit(submit) }
    }
}

fn cost(model: Digest, number: u32) -> ModelCost {
    let (curve, packing) = (vec![(1, 1_000_000 + number % 1000)], Packing::NoGain);
    ModelCost { model, packing, best_batch: 1, next_batch: 1, curve, load_us: 50_000, dispatched: [0; 4] }
}

/// Work done so far: workers and waiting tasks looked at, and table rows passed.
#[derive(Clone, Copy, Debug)]
struct Work {
    looks: u64,
    steps: u64,
}

impl Work {
    fn of(broker: &Broker) -> Self {
        let counters = broker.counters();
        Self { looks: counters.candidates_looked + counters.waiting_looked, steps: counters.walked }
    }

    /// The work done since `before`, divided by `parts`.
    fn since(self, before: Self, parts: usize) -> Self {
        let part = |now: u64, before: u64| (now - before) / parts as u64;
        Self { looks: part(self.looks, before.looks), steps: part(self.steps, before.steps) }
    }
}

/// The work for one grant, in an idle mesh and in a full one where ten thousand tasks wait and one worker gets room.
/// Also for one submit in the full mesh.
fn work_per_grant(fleet: Fleet, workers: u32) -> [Work; 3] {
    let mut broker = Broker::new(Config::default());
    let now = MonoTime::from_micros(1_000_000);
    for number in 0..workers {
        let _ = broker.handle(now, fleet.registered(number));
        let _ = broker.handle(now, fleet.heartbeat(number, 1, &[]));
    }
    let (before, few) = (Work::of(&broker), (workers / 4).min(100));
    let granted: usize = (0..few).map(|number| grants_in(&broker.handle(now, fleet.submit(number))).len()).sum();
    assert!(granted * 2 > few as usize, "{granted} of {few} are placed at once by {workers}");
    let idle = Work::of(&broker).since(before, granted);

    let foreign = |number: u32| AttemptId { task: task_id(u32::MAX - number), attempt: proto_msgs::Attempt(1) };
    for number in 0..workers {
        let _ = broker.handle(now, fleet.heartbeat(number, 2, &[foreign(number)]));
    }
    let before = Work::of(&broker);
    for number in 0..10_000 {
        let _ = broker.handle(now, fleet.submit(1_000_000 + number));
    }
    let submit = Work::of(&broker).since(before, 10_000);
    let waiting = broker.gauges().queued;
    assert!(waiting >= 9_000, "{waiting} tasks wait");
    let (before, mut granted) = (Work::of(&broker), 0);
    for number in 0..workers {
        if granted < 50 {
            granted += grants_in(&broker.handle(now, fleet.heartbeat(number, 3, &[]))).len();
        }
    }
    assert!(granted > 0, "no grant although all {workers} workers got room");
    [idle, Work::of(&broker).since(before, granted), submit]
}

#[test]
fn the_work_for_one_decision_grows_neither_with_the_workers_nor_with_the_queue() {
    let sizes: &[u32] = if cfg!(debug_assertions) { &[10, 1_000] } else { &[10, 100, 1_000, 10_000, 100_000] };
    for (fleet, workers) in
        [Fleet::New, Fleet::Practised].iter().flat_map(|fleet| sizes.iter().map(move |size| (fleet, size)))
    {
        let [idle, full, submit] = work_per_grant(*fleet, *workers);
        println!(
            "{fleet:?}, {workers} workers: {idle:?} for a grant at once, {full:?} for one of ten thousand that wait"
        );
        println!("    {submit:?} for a task that begins to wait");
        // 64 of the workers that have the model and 64 of the least busy, however many there are; and 64 waiting tasks,
        // a few of which are compared with what other workers could do for them.
        assert!(idle.looks <= 128 && submit.looks <= 128, "{idle:?} {submit:?} with {workers} workers");
        assert!(full.looks <= 512, "{full:?} with {workers} workers and ten thousand tasks");
        // Rows that are passed over cost little, but their number is bounded, too.
        assert!(idle.steps <= 256 && submit.steps <= 256, "{idle:?} {submit:?} with {workers} workers");
        assert!(full.steps <= 2048, "{full:?} with {workers} workers and ten thousand tasks");
    }
}

#[test]
fn what_waits_is_weighed_again_once_when_its_costs_become_known_and_not_with_each_submit() {
    let (waiting, newcomers) = (5_000, 200);
    let mut broker = Broker::new(Config::default());
    let now = MonoTime::from_micros(1_000_000);
    let foreign = AttemptId { task: task_id(u32::MAX), attempt: proto_msgs::Attempt(1) };
    let _ = broker.handle(now, Fleet::New.registered(0));
    let _ = broker.handle(now, Fleet::New.heartbeat(0, 1, &[foreign]));
    (0..waiting).for_each(|number| drop(broker.handle(now, Fleet::Practised.submit(number))));
    // Its models cost ten times the estimate for a model that no worker has run.
    let _ = broker.handle(now, Fleet::Practised.heartbeat(0, 2, &[foreign]));
    let before = Work::of(&broker);
    (0..newcomers).for_each(|number| drop(broker.handle(now, Fleet::Practised.submit(waiting + number))));
    let steps = Work::of(&broker).since(before, 1).steps;
    println!("{steps} rows gone through for {newcomers} submits beside {waiting} that wait");
    assert!(steps >= u64::from(waiting), "{steps}: they were not weighed again");
    assert!(steps < 2 * u64::from(waiting), "{steps}: they were weighed again more than once");
}
