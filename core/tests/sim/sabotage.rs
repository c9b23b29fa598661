//! Proves that the referee notices: every rule of the machines is broken in turn, and some law must then be broken,
//! too.

use mesh_core::{Rule, Rules};

use super::{crowds, days, seeds};

/// Most seeds until a broken rule is noticed.
const SEEDS_MAX: u64 = 10_000;

/// Seeds tried before crowds are tried.
const SEEDS_MIN: u64 = 100;

/// Crowds tried for each rule: eight kinds, four times each.
const CROWDS_MAX: u64 = 32;

#[test]
fn every_broken_rule_is_noticed() {
    let mut unnoticed = Vec::new();
    for rule in Rule::ALL {
        let rules = Rules::without(*rule);
        let in_faults = |seed| Some((seed + 1, seeds::play_safely(seed, rules, false).violation?));
        let in_crowds = |seed| Some((seed + 1, crowds::play_safely(seed, rules, false).violation?));
        let found = (0..SEEDS_MIN)
            .find_map(in_faults)
            .or_else(|| (0..CROWDS_MAX).find_map(in_crowds))
            .or_else(|| (SEEDS_MIN..SEEDS_MAX).find_map(in_faults));
        match found {
            Some((seeds, violation)) => {
                println!("{:24} noticed by seed {seeds:>4}: {}", format!("{rule:?}"), violation.law);
            }
            None => unnoticed.push(rule),
        }
    }
    assert!(unnoticed.is_empty(), "broken and not noticed within {SEEDS_MAX} seeds: {unnoticed:?}");
}

#[test]
fn days_notice_that_nothing_ages_and_that_a_slow_worker_is_not_left_for_long() {
    let starved = days::mixed_traffic(2 * days::HOUR, Rules::without(Rule::AgeingRank)).referee.violation;
    assert_eq!(starved.map(|violation| violation.law), Some("nothing starves"));
    let restless = days::a_promise(1, Rules::without(Rule::SloHysteresis)).referee.violation;
    assert_eq!(restless.map(|violation| violation.law), Some("a slow worker is left and stays left"));
}

#[test]
fn a_seed_that_fails_is_told_with_the_command_that_plays_it_again() {
    let rules = Rules::without(Rule::TicketNamesEpoch);
    let first = (0..SEEDS_MAX).find(|seed| seeds::play_safely(*seed, rules, false).violation.is_some());
    let first = first.expect("this rule's absence is noticed");
    let played = seeds::play_all(first..first + 1, rules);

    let told = seeds::verdict(&played, rules).expect("it failed");

    let replay = told.split_once("replay: ").expect("the command").1;
    let number = |name: &str| {
        let value = replay.split_once(name).and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        value.unwrap_or_else(|| panic!("no {name} in {replay}"))
    };
    let from = number("MESH_SIM_FIRST=");
    let again = seeds::play_all(from..from + number("MESH_SIM_SEEDS="), rules);
    assert_eq!(again.failed, played.failed);
    assert_eq!(again.failed.keys().collect::<Vec<_>>(), [&first]);
    assert!(replay.contains("--test sim -- seeds::seeds"), "{replay}");
    let story = told.lines().skip(1).take_while(|line| !line.contains("replay: "));
    assert!(story.count() > 1, "what happened before is told: {told}");
}
