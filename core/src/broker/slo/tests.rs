//! Short stories of workers that break a promise. Time is a number.

use super::*;

const W: WorkerId = WorkerId::from_bytes([1; 16]);
const PROMISE: Slo = Slo { latency_ms: 50, max_violation_permille: 100 };
const S: StreamId = 1;
const C: ClientId = ClientId::from_bytes([1; 16]);

fn at(ms: u64) -> MonoTime {
    MonoTime::from_micros(ms * 1000)
}

fn many(slos: &mut Slos, from_ms: u64, count: u64, missed: bool) {
    (0..count).for_each(|number| slos.ended(at(from_ms + number), (C, S), W, PROMISE, missed));
}

/// A turn in which every worker on trial gets a task, and one in which none does.
const TURN: u32 = PROBE_EVERY - 1;
const OTHER: u32 = PROBE_EVERY;

#[test]
fn few_misses_and_empty_windows_are_no_verdict() {
    let mut slos = Slos::default();
    assert_eq!(slos.violation_permille(at(0), W), None);
    many(&mut slos, 0, u64::from(SAMPLES_MIN) - 1, true);
    assert_eq!(slos.stance(at(10), S, W, OTHER), Stance::Ok);
    // Seven more, but long after: the first ones no longer count.
    many(&mut slos, 70_000, u64::from(SAMPLES_MIN) - 1, true);
    assert_eq!(slos.stance(at(70_010), S, W, OTHER), Stance::Ok);
}

#[test]
fn a_slow_stream_is_judged_by_its_last_minute() {
    for every_ms in [700, 1_000, 5_000] {
        let mut slos = Slos::default();
        let late = (0..100).find(|number| {
            slos.ended(at(number * every_ms), (C, S), W, PROMISE, true);
            slos.stance(at(number * every_ms), S, W, OTHER) != Stance::Ok
        });
        assert_eq!(late, Some(u64::from(SAMPLES_MIN) - 1), "one task in {every_ms} ms");
    }
    let mut slos = Slos::default();
    (0..100).for_each(|number| slos.ended(at(number * 10_000), (C, S), W, PROMISE, true));
    assert_eq!(slos.stance(at(990_000), S, W, OTHER), Stance::Ok, "six in a minute are no rate");
    // A worker that is well again is not judged by what was before.
    let mut slos = Slos::default();
    many(&mut slos, 0, 8, true);
    (0..24).for_each(|number| slos.ended(at(6_000 + number), (C, S), W, PROMISE, false));
    slos.ended(at(12_000), (C, S), W, PROMISE, true);
    assert_eq!(slos.stance(at(12_000), S, W, OTHER), Stance::Ok);
}

#[test]
fn a_worker_is_left_tried_again_with_more_and_more_and_taken_back() {
    let mut slos = Slos::default();
    many(&mut slos, 0, 8, true);
    assert_eq!((slos.stance(at(20), S, W, TURN), slos.trips), (Stance::Shunned(1000), 1));
    assert_eq!(slos.violation_permille(at(20), W), Some(1000));
    // The cool-down is over: the worker is tried only in its turn, and that comes more and more often.
    for step in 0..3 {
        let now = 6_000 + step * 100;
        let turns = (0..16).filter(|turn| slos.stance(at(now), S, W, *turn) == Stance::Probe).count();
        assert_eq!(turns, [1, 2, 4][step as usize]);
        many(&mut slos, now, 7, false);
        assert_eq!(slos.stance(at(now + 50), S, W, OTHER), Stance::Shunned(1000));
        many(&mut slos, now + 50, 1, false);
    }
    assert_eq!(slos.stance(at(6_300), S, W, OTHER), Stance::Ok);
}

#[test]
fn a_worker_that_fails_its_trial_is_left_for_twice_as_long_and_that_costs_one_task() {
    let mut slos = Slos::default();
    many(&mut slos, 0, 8, true);
    let (mut now_ms, mut cool_ms) = (7, 5_000);
    for _ in 0..6 {
        assert_eq!(slos.stance(at(now_ms + cool_ms - 1), S, W, TURN), Stance::Shunned(1000), "{cool_ms}");
        assert_eq!(slos.stance(at(now_ms + cool_ms), S, W, TURN), Stance::Probe, "{cool_ms}");
        slos.ended(at(now_ms + cool_ms), (C, S), W, PROMISE, true);
        slos.breakers.values_mut().for_each(|breaker| breaker.missed_permille = 1000);
        (now_ms, cool_ms) = (now_ms + cool_ms, (cool_ms * 2).min(20_000));
    }
}

#[test]
fn a_worker_that_is_well_only_while_it_is_tried_is_left_for_longer_and_longer() {
    let mut slos = Slos::default();
    let (mut now_ms, mut left_ms) = (0, Vec::new());
    for _ in 0..4 {
        many(&mut slos, now_ms, 8, true);
        let back = (now_ms..).find(|ms| slos.stance(at(*ms), S, W, TURN) == Stance::Probe).expect("it is tried");
        left_ms.push((back - now_ms) / 1000);
        (0..24).for_each(|number| slos.ended(at(back + number), (C, S), W, PROMISE, false));
        now_ms = back + 100;
        assert_eq!(slos.stance(at(now_ms), S, W, OTHER), Stance::Ok);
    }
    assert_eq!(left_ms, [5, 10, 20, 20]);
}

#[test]
fn a_trial_that_proves_neither_begins_anew() {
    let promise = Slo { max_violation_permille: 500, ..PROMISE };
    let mut slos = Slos::default();
    many(&mut slos, 0, 8, true);
    let turns = |slos: &Slos| (0..16).filter(|turn| slos.stance(at(7_000), S, W, *turn) == Stance::Probe).count();
    // Three of eight: fewer than half, more than a quarter.
    (0..8).for_each(|number| slos.ended(at(6_000 + number), (C, S), W, promise, number < 3));
    assert_eq!((turns(&slos), slos.trips), (1, 1));
    (0..8).for_each(|number| slos.ended(at(6_200 + number), (C, S), W, promise, number < 1));
    assert_eq!(turns(&slos), 2);
}

#[test]
fn a_client_with_ever_new_streams_loses_its_own() {
    let key = |client: u8, latency_ms: u32| {
        let slo = Slo { latency_ms, max_violation_permille: 10 };
        (ClientId::from_bytes([client; 16]), Digest::from_bytes([1; 32]), slo)
    };
    let mut slos = Slos::default();
    let mine = slos.open(at(0), key(1, 10));
    for number in 0..10 * STREAMS_MAX as u32 {
        slos.open(at(1 + u64::from(number)), key(2, number));
    }
    assert_eq!(slos.open(at(100_000), key(1, 10)), mine);
    assert_eq!(slos.streams.len(), 1 + CLIENT_STREAMS_MAX);
}

#[test]
fn floods_of_streams_and_workers_leave_bounded_tables() {
    let mut slos = Slos::default();
    for number in 0..2 * BREAKERS_MAX as u32 {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        let client = ClientId::from_bytes([(number / CLIENT_BREAKERS_MAX) as u8; 16]);
        slos.ended(at(u64::from(number)), (client, number), WorkerId::from_bytes(bytes), PROMISE, true);
    }
    assert!(slos.breakers.len() <= BREAKERS_MAX);
    slos.forget(WorkerId::from_bytes([0; 16]));
}

#[test]
fn a_client_with_a_flood_of_streams_leaves_breakers_to_the_others() {
    let mut slos = Slos::default();
    for number in 0..2 * BREAKERS_MAX as u32 {
        slos.ended(at(u64::from(number) / 100), (C, 10 + number), W, PROMISE, false);
    }
    assert_eq!(slos.breakers.len(), CLIENT_BREAKERS_MAX as usize);
    let other = ClientId::from_bytes([9; 16]);
    (0..8).for_each(|number| slos.ended(at(400 + number), (other, S), W, PROMISE, true));
    assert!(slos.stance(at(410), S, W, OTHER) > Stance::Ok, "the other's promise is watched");
    // What is not used any more goes, and leaves room for its own client, too.
    slos.ended(at(400_000), (C, 1_000_000), W, PROMISE, false);
    assert_eq!((slos.breakers.len(), slos.of_client.len()), (1, 1));
}

#[test]
fn where_all_workers_are_avoided_the_one_that_misses_least_now_is_taken() {
    let other = WorkerId::from_bytes([2; 16]);
    let mut slos = Slos::default();
    many(&mut slos, 0, 8, true);
    (0..8).for_each(|number| slos.ended(at(number), (C, S), other, PROMISE, number >= 6));
    let order = |slos: &Slos| slos.stance(at(2_000), S, W, OTHER) > slos.stance(at(2_000), S, other, OTHER);
    assert!(order(&slos), "1000 of 1000 against 250");
    many(&mut slos, 100, 100, false);
    assert!(!order(&slos), "fewer than 100 of 1000 against 250");
}
