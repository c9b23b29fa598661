//! Many workers: the broker still finds the right one, and what it does for one grant does not grow with their number.

use std::collections::BTreeSet;

use mesh_core::{
    MonoTime,
    broker::{Action, Broker, Config, Event},
};
use mesh_samples::{client_peer, task_id, worker_id, worker_peer};
use proto_msgs::{
    Arch, AttemptId, AttemptReport, AttemptState, BrokerToClient, ClientToBroker, Demands, Heartbeat, Register, Submit,
    WorkerId, WorkerToBroker,
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
    let running = |id: &AttemptId| AttemptReport { id: *id, state: AttemptState::Running, detached: false };
    let register = mesh_samples::register(number);
    let attempts = held.iter().map(running).collect();
    let heartbeat = Heartbeat { attempts, ..mesh_samples::heartbeat(&register, seq) };
    Event::WorkerSaid { peer: worker_peer(number), key: None, message: WorkerToBroker::Heartbeat(heartbeat) }
}

fn submit(number: u32) -> Event {
    let demands = Demands { arch: Some(Arch::Amd64), ..Demands::default() };
    let submit = Submit { demands, ..mesh_samples::submit(number, number) };
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
            // Its client hears one message, the store of one task at most: nothing is said to anybody else.
            assert!(actions.len() <= 2, "{} orders for one task", actions.len());
            grants.extend(grants_in(&actions));
        }
        assert!(grants.len() >= 16, "those next to hand are given at once");
        // The others had to look past too many workers of the wrong kind; one heartbeat of each settles it.
        for number in 0..workers {
            grants.extend(grants_in(&broker.handle(now, heartbeat(number, 2, &[]))));
        }
        let taken: BTreeSet<WorkerId> = grants.iter().map(|(_, worker)| *worker).collect();
        assert_eq!((grants.len(), taken.len()), (right_kind as usize, right_kind as usize));
        assert_eq!(broker.gauges().slots_used, right_kind);
        assert!(grants_in(&broker.handle(now, submit(right_kind))).is_empty());
        assert_eq!(broker.gauges().queued, 1);
        // One worker reports that it has its task, then that it has it no more.
        let (id, worker) = grants[0];
        let number = (0..workers).find(|number| worker_id(*number) == worker);
        let number = number.expect("grants name workers that registered");
        let _ = broker.handle(now, heartbeat(number, 3, &[id]));
        let next = grants_in(&broker.handle(now, heartbeat(number, 4, &[])));
        assert_eq!(next.first().map(|(_, worker)| *worker), Some(worker), "the waiting task goes where there is room");
    }
}

/// Workers and waiting tasks looked at so far.
fn looks(broker: &Broker) -> u64 {
    let counters = broker.counters();
    counters.candidates_looked + counters.waiting_looked
}

/// Looks for one grant: at an idle mesh, and at a full one in which ten thousand tasks wait and one worker gets room.
fn looks_per_grant(workers: u32) -> (u64, u64) {
    let mut broker = Broker::new(Config::default());
    let now = MonoTime::from_micros(1_000_000);
    for number in 0..workers {
        let _ = broker.handle(now, registered(number));
        let _ = broker.handle(now, heartbeat(number, 1, &[]));
    }
    let (before, few) = (looks(&broker), (workers / 4).min(100));
    let granted: usize = (0..few).map(|number| grants_in(&broker.handle(now, submit(number))).len()).sum();
    assert_eq!(granted, few as usize, "there is room for {few} of {workers}");
    let idle = (looks(&broker) - before) / u64::from(few);

    let foreign = |number: u32| AttemptId { task: task_id(u32::MAX - number), attempt: proto_msgs::Attempt(1) };
    for number in 0..workers {
        let _ = broker.handle(now, heartbeat(number, 2, &[foreign(number)]));
    }
    for number in 0..10_000 {
        let _ = broker.handle(now, submit(1_000_000 + number));
    }
    let waiting = broker.gauges().queued;
    assert!(waiting >= 9_000, "{waiting} tasks wait");
    let (before, mut granted) = (looks(&broker), 0);
    for number in 0..workers {
        if granted < 50 {
            granted += grants_in(&broker.handle(now, heartbeat(number, 3, &[]))).len();
        }
    }
    assert!(granted > 0, "no grant although all {workers} workers got room");
    (idle, (looks(&broker) - before) / granted as u64)
}

#[test]
fn the_work_for_one_decision_grows_neither_with_the_workers_nor_with_the_queue() {
    let sizes: &[u32] = if cfg!(debug_assertions) { &[10, 1_000] } else { &[10, 100, 1_000, 10_000, 100_000] };
    for workers in sizes {
        let (idle, full) = looks_per_grant(*workers);
        println!("{workers:>6} workers: {idle} looks for a grant at once, {full} for one of ten thousand that wait");
        // Sixty-four of those that have the model and as many of the least busy, whatever there are besides; and sixty-four
        // waiting tasks, of which a few are compared with what other workers could do for them.
        assert!(idle <= 128, "{idle} looks with {workers} workers");
        assert!(full <= 512, "{full} looks with {workers} workers and ten thousand tasks");
    }
}
