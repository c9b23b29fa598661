//! Short stories of rows that wait. Whoever takes them says how many.

use proto_msgs::{Attempt, TaskId};

use super::*;

fn limits(cpu_millis: u32) -> Limits {
    let demands = Demands { cpu_millis, ..Demands::default() };
    Limits::from(&TicketBody { demands, ..mesh_samples::ticket_body(1, 1, 1) })
}

pub(in crate::worker) fn queue(packer: &mut Packer) -> QueueId {
    let kind = Kind {
        lane: Lane::Realtime,
        way: vec![Digest::from_bytes([1; 32])],
        limits: limits(0),
        forms: Arc::default(),
        apart: false,
    };
    packer.enter(MonoTime::ZERO, kind)
}

pub(in crate::worker) fn piece(task: u8, client: u8, priority: u8, rows: Range<u32>) -> Piece {
    Piece {
        id: AttemptId { task: TaskId::from_bytes([task; 16]), attempt: Attempt(1) },
        client: ClientId::from_bytes([client; 16]),
        priority,
        deadline: None,
        slo_until: None,
        rows,
        arrived: MonoTime::ZERO,
        next: None,
        company: Company::Any,
    }
}

fn take_all(packer: &mut Packer, id: QueueId, rows: u32) -> Vec<(u8, Range<u32>)> {
    let queue = packer.get_mut(id).expect("it was made");
    let mut taken = Vec::new();
    let first = |queue: &Queue| queue.in_order(false).next().map(|(rank, _)| rank);
    while let Some(rank) = first(queue) {
        let piece = queue.take(rank, rows).expect("it waits");
        taken.push((piece.id.task.as_bytes()[0], piece.rows));
    }
    assert_eq!(queue.rows, 0);
    taken
}

#[test]
fn the_important_go_first_and_equals_in_the_order_of_their_arrival() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    for (task, priority) in [(1, 50), (2, 50), (3, 90)] {
        packer.push(MonoTime::ZERO, id, piece(task, task, priority, 0..1));
    }
    assert_eq!(take_all(&mut packer, id, 8), [(3, 0..1), (1, 0..1), (2, 0..1)]);
}

#[test]
fn two_clients_take_turns_however_much_the_first_brought() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    packer.push(MonoTime::ZERO, id, piece(1, 1, 50, 0..32));
    packer.push(MonoTime::ZERO, id, piece(2, 2, 50, 0..16));
    let taken = take_all(&mut packer, id, 8);
    assert_eq!(taken, [(1, 0..8), (2, 0..8), (1, 8..16), (2, 8..16), (1, 16..24), (1, 24..32)]);
}

#[test]
fn what_somebody_had_while_nobody_else_waited_is_not_held_against_them() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    packer.push(MonoTime::ZERO, id, piece(1, 1, 50, 0..32));
    take_all(&mut packer, id, 8);
    packer.push(MonoTime::ZERO, id, piece(2, 1, 50, 0..8));
    packer.push(MonoTime::ZERO, id, piece(3, 2, 50, 0..8));
    assert_eq!(take_all(&mut packer, id, 8), [(2, 0..8), (3, 0..8)]);
}

#[test]
fn the_oldest_can_be_asked_for_whatever_its_priority() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    packer.push(MonoTime::ZERO, id, piece(1, 1, 10, 0..1));
    packer.push(MonoTime::ZERO, id, piece(2, 2, 90, 0..1));
    let order: Vec<u8> =
        packer.get(id).expect("it is there").in_order(true).map(|(_, piece)| piece.id.task.as_bytes()[0]).collect();
    assert_eq!(order, [1, 2]);
}

#[test]
fn rows_that_a_batch_cut_are_one_piece_again() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    packer.push(MonoTime::ZERO, id, piece(1, 1, 50, 8..16));
    packer.push(MonoTime::ZERO, id, piece(1, 1, 50, 0..8));
    assert_eq!(take_all(&mut packer, id, 64), [(1, 0..16)]);
}

#[test]
fn queues_that_nobody_uses_are_few() {
    let mut packer = Packer::default();
    let attempt = piece(1, 1, 50, 0..1).id;
    for number in 0..200 {
        let limits = limits(number);
        let kind = Kind {
            lane: Lane::Batch,
            way: vec![Digest::from_bytes([1; 32])],
            limits,
            forms: Arc::default(),
            apart: false,
        };
        let id = packer.enter(MonoTime::from_micros(u64::from(number)), kind);
        packer.leave(attempt, &[id]);
    }
    assert_eq!(packer.queues.len(), IDLE_QUEUES_MAX);
    assert_eq!(packer.ids.len(), IDLE_QUEUES_MAX);
}

#[test]
fn long_ways_that_never_come_again_leave_few_queues() {
    let mut packer = Packer::default();
    let attempt = piece(1, 1, 50, 0..1).id;
    for number in 0..100_u8 {
        let limits = limits(number.into());
        let stage = |stages: u8| {
            let way = (0..stages).map(|stage| Digest::from_bytes([stage; 32])).collect();
            packer.enter(MonoTime::ZERO, Kind { lane: Lane::Batch, way, limits, forms: Arc::default(), apart: false })
        };
        let way: Vec<QueueId> = (1..=8).map(stage).collect();
        packer.leave(attempt, &way);
    }
    assert_eq!((packer.queues.len(), packer.ids.len()), (IDLE_QUEUES_MAX, IDLE_QUEUES_MAX));
}

#[test]
fn clients_that_come_and_go_are_forgotten_though_somebody_always_waits() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    packer.push(MonoTime::ZERO, id, piece(1, 1, 0, 0..1));
    for number in 0..10_000_u32 {
        let mut client = [0; 16];
        client[..4].copy_from_slice(&number.to_be_bytes());
        packer.push(MonoTime::ZERO, id, Piece { client: ClientId::from_bytes(client), ..piece(2, 2, 90, 0..1) });
        let queue = packer.get_mut(id).expect("it was made");
        let first = queue.in_order(false).next().map(|(rank, _)| rank).expect("somebody waits");
        queue.take(first, 1).expect("it waits");
    }
    let remembered = packer.get(id).expect("it was made").ends.len();
    assert!(remembered <= CLIENTS_MAX, "{remembered}");
}

#[test]
fn who_comes_new_waits_for_one_piece_of_each_client_also_if_one_has_had_all_of_his() {
    let mut packer = Packer::default();
    let id = queue(&mut packer);
    for (task, client) in (0..).zip([1, 2, 3].repeat(3)) {
        packer.push(MonoTime::ZERO, id, piece(task, client, 50, 0..2));
    }
    let queue = packer.get_mut(id).expect("it was made");
    let of_the_first = |(_, piece): &(Rank, &Piece)| piece.client == ClientId::from_bytes([1; 16]);
    let its: Vec<Rank> = queue.in_order(false).filter(of_the_first).map(|(rank, _)| rank).collect();
    assert_eq!(its.into_iter().filter_map(|rank| queue.take(rank, 2)).count(), 3);
    packer.push(MonoTime::ZERO, id, piece(100, 4, 50, 0..2));
    let order: Vec<u8> = take_all(&mut packer, id, 2).into_iter().map(|(task, _)| task).collect();
    assert_eq!(order, [1, 2, 100, 4, 5, 7, 8]);
}
