//! Curves and verdicts, from measured and made-up times.

use super::{
    reviews::{GAIN_AFTER, GAIN_NOT_BEFORE, LARGEST_AFTER, LARGEST_FOR},
    *,
};

/// Realtime rows are near.
const NEAR: Cut = Cut { is_near: true, ..Cut::NONE };

/// A probe of `rows` rows shows that packing is right.
fn probe(cost: &mut Cost, rows: u32, time: impl Fn(u32) -> u64) {
    assert!(matches!(cost.plan(Cut::NONE), Plan::Probe { .. }));
    cost.probe_begins();
    assert_eq!(cost.plan(Cut::NONE), Plan::Single, "one probe at a time");
    let (single_us, packed_us) = (Some(time(1)), Some(time(rows)));
    let times = BatchTimes { single_us, packed_us, equal: Some(Equality::Same), ..BatchTimes::default() };
    cost.probe_answered(&times);
    cost.probe_ended(rows, Some(&times));
}

/// A model with these run times, just probed.
fn probed(rows: u32, time: impl Fn(u32) -> u64) -> Cost {
    let mut cost = Cost::new(64);
    probe(&mut cost, rows, time);
    cost
}

/// A batch of this length whose rows came out like those of single runs.
fn same(run_us: u64) -> BatchTimes {
    BatchTimes { run_us, equal: Some(Equality::Same), ..BatchTimes::default() }
}

fn size(cost: &Cost) -> u32 {
    match cost.plan(Cut::NONE) {
        Plan::Pack { size, .. } => size,
        Plan::Single | Plan::Probe { .. } => 1,
    }
}

#[test]
fn sizes_double_while_they_pay() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    for expected in [16, 32, 64, 64, 64] {
        assert_eq!(size(&cost), expected);
        assert_eq!(u32::from(cost.said(proto_msgs::Digest::from_bytes([0; 32])).next_batch), expected);
        cost.learn(expected, time(expected));
    }
    assert_eq!(cost.best(), 64);
    assert_eq!(cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, Packing::On);
}

#[test]
fn sizes_stop_where_an_item_gets_no_cheaper() {
    // Beyond 16 the device needs a second pass.
    let time = |rows: u32| 5000 * u64::from(rows.div_ceil(16)) + 100 * u64::from(rows) + u64::from(rows > 16) * 3000;
    let mut cost = probed(8, time);
    for _ in 0..10 {
        let rows = size(&cost);
        cost.learn(rows, time(rows));
    }
    assert_eq!((cost.best(), size(&cost)), (16, 16));
}

#[test]
fn of_sizes_that_differ_only_by_noise_the_smallest_is_the_best() {
    let best = |item_us: u64| {
        let time = |rows: u32| u64::from(rows) * [1000, 500, item_us][usize::from(rows > 1) + usize::from(rows > 8)];
        let mut cost = probed(8, time);
        (0..3).for_each(|_| cost.learn(16, time(16)));
        cost.best()
    };
    assert_eq!([499, 490].map(best), [8, 16]);
}

#[test]
fn a_batch_is_worth_it_only_where_it_saves_a_fifth() {
    let verdict = |permille: u64| {
        // A batch takes this share of its rows' single runs.
        let time = |rows: u32| 1000 * u64::from(rows) * if rows == 1 { 1000 } else { permille } / 1000;
        let mut cost = probed(4, time);
        (0..100).for_each(|_| cost.learn(size(&cost), time(size(&cost))));
        (cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, size(&cost) > 1)
    };
    assert_eq!(verdict(790), (Packing::On, true));
    assert_eq!(verdict(799), (Packing::On, true));
    assert_eq!(verdict(801), (Packing::NoGain, false));
    assert_eq!(verdict(810), (Packing::NoGain, false));
}

#[test]
fn no_gain_is_believed_only_of_what_is_warm() {
    let time = |rows| 1000 * u64::from(rows);
    let mut cost = probed(4, time);
    for _ in 0..2 {
        assert_eq!(size(&cost), 4);
        cost.learn(4, time(4));
    }
    assert_eq!(cost.plan(Cut::NONE), Plan::Single);
    assert_eq!(cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, Packing::NoGain);
}

#[test]
fn a_first_packed_run_that_compiles_does_not_spoil_the_verdict() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, |rows| if rows == 8 { 300_000 } else { time(rows) });
    assert_eq!(size(&cost), 8);
    cost.learn(8, time(8));
    assert_eq!(size(&cost), 16);
}

#[test]
fn the_batch_lane_is_cut_where_it_costs_nothing() {
    let time = |rows| 5000 + 5000 * u64::from(rows);
    let mut cost = probed(8, time);
    assert!(matches!(cost.plan(NEAR), Plan::Pack { size: 16, .. }), "a size is not cut before it was tried");
    for rows in [16, 32, 64] {
        (0..3).for_each(|_| cost.learn(rows, time(rows)));
    }
    assert_eq!(cost.plan(Cut::NONE), Plan::Pack { size: 64, floor: 2 });
    assert_eq!(cost.plan(NEAR), Plan::Pack { size: 32, floor: 2 });
}

#[test]
fn rows_too_few_for_a_size_that_was_never_tried_are_cut_only_if_somebody_asks() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let cost = probed(8, time);
    let size = |cut| match cost.plan(Cut { rows: 15, ..cut }) {
        Plan::Pack { size, .. } => size,
        plan => panic!("{plan:?}"),
    };
    assert_eq!([Cut::NONE, NEAR].map(size), [16, 16], "they show what 15 cost");
    assert_eq!(size(Cut { within_us: time(8), ..NEAR }), 8);
}

#[test]
fn a_probe_is_as_short_as_asked_for_but_compares_two_rows() {
    let mut cost = Cost::new(64);
    cost.learn(1, 10_000);
    let size = |within_us| match cost.plan(Cut { within_us, ..NEAR }) {
        Plan::Probe { size } => size,
        plan => panic!("{plan:?}"),
    };
    assert_eq!([u64::MAX, 32_000, 9000].map(size), [8, 3, 2]);
}

#[test]
fn a_batch_whose_rows_are_compared_leaves_time_for_their_single_runs() {
    let time = |rows| 5000 + 2000 * u64::from(rows);
    let mut cost = probed(8, time);
    for rows in [16, 32, 64] {
        (0..3).for_each(|_| cost.learn(rows, time(rows)));
    }
    let within = |cost: &Cost, within_us| match cost.plan(Cut { within_us, ..NEAR }) {
        Plan::Pack { size, .. } => size,
        plan => panic!("{plan:?}"),
    };
    // Three rows of 7 ms beside a size that has not been compared, and two beside one that has, now and then.
    assert_eq!([time(16), time(12) + 21_000].map(|us| within(&cost, us)), [8, 12]);
    cost.checked(64, &same(time(64)));
    assert_eq!(within(&cost, time(16)), 16);
    (1..SPOT_FIRST).for_each(|_| cost.packed_begins());
    assert_eq!([time(16), time(12) + 14_000].map(|us| within(&cost, us)), [8, 12]);
}

#[test]
fn a_batch_of_the_batch_lane_is_as_short_as_asked_for_unless_that_is_too_dear() {
    let time = |rows| 5000 + 5000 * u64::from(rows);
    let mut cost = probed(8, time);
    for rows in [16, 32, 64] {
        (0..3).for_each(|_| cost.checked(rows, &same(time(rows))));
    }
    let within = |within_us| match cost.plan(Cut { within_us, ..Cut::NONE }) {
        Plan::Pack { size, .. } => size,
        plan => panic!("{plan:?}"),
    };
    assert_eq!([u64::MAX, time(64), time(64) - 1].map(within), [64, 64, 48]);
    assert_eq!([60_000, 45_000, 44_999].map(within), [8, 8, 6]);
    assert_eq!([15_000, 14_999, 1].map(within), [2, 2, 2], "half as much again per item, not more");
    let near = cost.plan(Cut { within_us: time(64), ..NEAR });
    assert_eq!(near, cost.plan(NEAR), "who may wait long waits no longer than the others");
}

#[test]
fn a_model_that_gained_nothing_beside_other_work_is_tried_again_and_ever_more_rarely() {
    let beside_others = |rows: u32| 5000 * u64::from(rows);
    let mut cost = Cost::new(64);
    let find_no_gain = |cost: &mut Cost| {
        probe(cost, 4, beside_others);
        (0..2).for_each(|_| cost.learn(4, beside_others(4)));
        assert_eq!(cost.plan(Cut::NONE), Plan::Single);
    };
    for review in 0..3 {
        find_no_gain(&mut cost);
        let run = || (cost.dispatched(proto_msgs::Dispatch::Idle), cost.plan(Cut::NONE)).1;
        let batches = std::iter::repeat_with(run).take_while(|plan| *plan == Plan::Single).count() + 1;
        assert_eq!(batches, (GAIN_AFTER << review) as usize);
    }
    find_no_gain(&mut cost);
    // A single item takes less than half of its former time, so the verdict is out of date.
    cost.dispatched(proto_msgs::Dispatch::Idle);
    (0..3).for_each(|_| cost.learn(1, 2000));
    (0..GAIN_NOT_BEFORE).for_each(|_| cost.dispatched(proto_msgs::Dispatch::Idle));
    probe(&mut cost, 4, |rows| 5000 + 200 * u64::from(rows));
    assert_eq!(size(&cost), 8, "and now it gains");
}

/// A model of which sizes 48 and 64 are known, where 64 takes this long lately.
fn passed_over(lately_us: u64) -> Cost {
    let well = |rows: u32| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, well);
    for rows in [16, 32, 48, 64].repeat(5) {
        cost.learn(rows, well(rows));
    }
    assert_eq!((cost.best(), size(&cost)), (64, 64));
    (0..5).for_each(|_| cost.learn(64, lately_us));
    assert_eq!((cost.best(), size(&cost)), (48, 48), "a full batch looks dearer");
    cost
}

#[test]
fn a_full_batch_that_was_slow_for_a_while_runs_again_soon() {
    let well = |rows: u32| 5000 + 200 * u64::from(rows);
    let mut cost = passed_over(30_000);
    for _ in 1..LARGEST_AFTER {
        cost.dispatched(proto_msgs::Dispatch::Full);
        assert_eq!(size(&cost), 48);
        cost.learn(48, well(48));
    }
    cost.dispatched(proto_msgs::Dispatch::Full);
    assert_eq!(size(&cost), 64);
    assert_eq!(cost.plan(NEAR), passed_over(30_000).plan(NEAR), "realtime rows wait no longer for it");
    cost.learn(64, well(64));
    assert_eq!((cost.best(), size(&cost)), (64, 64));
}

#[test]
fn a_full_batch_that_stays_slow_runs_ever_more_rarely() {
    let mut cost = passed_over(30_000);
    let mut full_after = Vec::new();
    for batch in 1..=500 {
        cost.dispatched(proto_msgs::Dispatch::Full);
        let rows = size(&cost);
        full_after.extend((rows == 64).then_some(batch));
        cost.learn(rows, if rows == 64 { 30_000 } else { 5000 + 200 * u64::from(rows) });
    }
    assert_eq!(full_after, [16, 48, 112, 240, 496]);
}

#[test]
fn a_full_batch_that_never_comes_together_is_given_up_for_now_and_no_size_between_is_run() {
    let mut cost = passed_over(30_000);
    let mut tried_at = Vec::new();
    for batch in 1..=3 * LARGEST_AFTER {
        cost.dispatched(proto_msgs::Dispatch::Idle);
        let is_tried = size(&cost) == 64;
        tried_at.extend(is_tried.then_some(batch));
        assert_eq!(cost.together(56), if is_tried { 48 } else { 56 });
        cost.learn(48, 14_600);
    }
    let until = LARGEST_AFTER + LARGEST_FOR;
    assert_eq!(tried_at, (LARGEST_AFTER..=until).collect::<Vec<_>>());
}

#[test]
fn a_full_batch_is_not_waited_for_once_the_model_may_not_be_packed() {
    let mut cost = passed_over(30_000);
    (0..LARGEST_AFTER).for_each(|_| cost.dispatched(proto_msgs::Dispatch::Full));
    assert_eq!(size(&cost), 64);
    cost.spotted(48, &BatchTimes { equal: Some(Equality::Differs), ..BatchTimes::default() });
    cost.dispatched(proto_msgs::Dispatch::Full);
    assert_eq!(cost.size(), 1);
}

#[test]
fn a_probe_that_tells_nothing_is_repeated_later_and_ever_later() {
    let mut cost = Cost::new(64);
    for patience in [2, 4, 8] {
        cost.probe_begins();
        let times = BatchTimes { equal: Some(Equality::Inconclusive), ..BatchTimes::default() };
        cost.probe_ended(4, Some(&times));
        for _ in 0..patience {
            assert_eq!(cost.plan(Cut::NONE), Plan::Single);
            cost.dispatched(proto_msgs::Dispatch::Idle);
        }
        assert!(matches!(cost.plan(Cut::NONE), Plan::Probe { .. }));
    }
}

/// A packed batch of this many rows was compared with single runs.
fn check(cost: &mut Cost, rows: u32, us: u64, equal: Equality) {
    assert!(cost.is_unproven(rows) && rows <= size(cost));
    cost.checked(rows, &BatchTimes { run_us: us, equal: Some(equal), ..BatchTimes::default() });
}

#[test]
fn each_larger_size_is_compared_once_and_one_that_is_wrong_is_not_used() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    assert!(!cost.is_unproven(8) && cost.is_unproven(9));
    check(&mut cost, 16, time(16), Equality::Same);
    assert!(!cost.is_unproven(16));
    check(&mut cost, 20, 20 * time(1), Equality::Differs);
    for _ in 0..10 {
        assert_eq!(size(&cost), 16);
        cost.learn(16, time(16));
    }
    assert_eq!(cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing, Packing::On);
}

#[test]
fn a_comparison_that_tells_nothing_leaves_the_size_as_it_is_for_a_while() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    for patience in [2, 4, 8] {
        check(&mut cost, 16, 16 * time(1), Equality::Inconclusive);
        for _ in 0..patience {
            assert_eq!(size(&cost), 8);
            cost.dispatched(proto_msgs::Dispatch::Idle);
        }
        assert_eq!(size(&cost), 16);
    }
}

#[test]
fn a_model_whose_runs_are_too_long_to_compare_says_so_until_they_are_short() {
    let mut cost = Cost::new(64);
    let packing = |cost: &Cost| cost.said(proto_msgs::Digest::from_bytes([0; 32])).packing;
    assert_eq!(packing(&cost), Packing::Unknown);
    cost.learn(1, COMPARE_SINGLE_US + 1);
    assert_eq!((packing(&cost), cost.plan(NEAR)), (Packing::TooSlow, Plan::Single));
    (0..50).for_each(|_| cost.learn(1, 1_000_000));
    assert_eq!(packing(&cost), Packing::Unknown);
}

#[test]
fn what_differs_is_never_packed() {
    let mut cost = Cost::new(64);
    cost.probe_begins();
    let times = BatchTimes { equal: Some(Equality::Differs), packed_us: Some(1), ..BatchTimes::default() };
    cost.probe_ended(4, Some(&times));
    (0..2000).for_each(|_| cost.dispatched(proto_msgs::Dispatch::Idle));
    assert_eq!(cost.plan(Cut::NONE), Plan::Single);
}

#[test]
fn a_size_that_fails_is_not_tried_again() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    cost.learn(16, time(16));
    cost.too_large(32);
    cost.learn(16, time(16));
    assert_eq!(size(&cost), 16);
    cost.too_large(3);
    assert_eq!(cost.plan(Cut::NONE), Plan::Single);
}

#[test]
fn a_failure_from_outside_is_blamed_on_no_size_unless_it_comes_again_soon() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    cost.learn(16, time(16));
    cost.mishap(32, (10, 12));
    assert_eq!(size(&cost), 32, "somebody ended the runner");
    cost.mishap(3, (12, 20));
    assert_eq!(size(&cost), 32, "and another one at the same time");
    (0..1000).for_each(|_| cost.packed_begins());
    cost.mishap(32, (1013, 1013));
    assert_eq!(size(&cost), 32, "that was long ago");
    cost.doubted(32);
    cost.mishap(32, (1014, 1014));
    assert_eq!(size(&cost), 16, "a batch of that size fails time and again");
}

#[test]
fn rows_of_which_the_shell_knows_nothing_any_more_are_probed_again() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    (0..7).for_each(|_| cost.ran_apart());
    cost.learn(8, time(8));
    (0..7).for_each(|_| cost.ran_apart());
    assert!(matches!(cost.plan(Cut::NONE), Plan::Pack { .. }), "now and then a stage makes rows of a new shape");
    cost.ran_apart();
    cost.wait_batches = 0;
    assert!(matches!(cost.plan(Cut::NONE), Plan::Probe { .. }));
}

#[test]
fn rows_that_are_right_in_one_slot_and_wrong_in_the_other_are_packed_no_more() {
    let time = |rows| 5000 + 200 * u64::from(rows);
    let mut cost = probed(8, time);
    let checked = |equal| BatchTimes { run_us: time(16), equal: Some(equal), ..BatchTimes::default() };
    cost.checked(16, &checked(Equality::Same));
    cost.checked(16, &checked(Equality::Differs));
    assert_eq!(cost.plan(Cut::NONE), Plan::Single);
}

#[test]
fn one_run_shows_that_all_old_figures_were_from_worse_times() {
    let well = |rows: u32| 5000 + 1000 * u64::from(rows);
    let mut cost = probed(8, well);
    for _ in 0..20 {
        [1, 4, 16].into_iter().for_each(|rows| cost.learn(rows, well(rows)));
    }
    // Size 16 is last measured while the machine is well, the others while it is ten times as slow.
    for rows in [1, 4, 8].repeat(5) {
        cost.learn(rows, 10 * well(rows));
    }
    assert_eq!([1, 4, 8, 16].map(|rows| cost.batch_us(rows)), [60_000, 90_000, 130_000, 21_000]);
    let s = |seconds: u64| MonoTime::from_micros(seconds * 1_000_000);
    cost.ran(s(1), s(2));
    cost.ran(s(20), s(21));
    cost.learn(4, well(4));
    assert_eq!([1, 4, 8, 16].map(|rows| cost.batch_us(rows)), [9000, 9000, 13_000, 21_000]);
    // The next run comes soon: it moves the figure by an eighth.
    cost.ran(s(21), s(22));
    cost.learn(4, 17_000);
    assert_eq!(cost.batch_us(4), 10_000);
}
