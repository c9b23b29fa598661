//! Shows that the referee sees: every rule of the machines is broken in turn, and some law must be found broken too.

use mesh_core::{Rule, Rules};

use super::seeds::play_safely;

/// A broken rule must be noticed within so many seeds.
const SEEDS_MAX: u64 = 10_000;

#[test]
fn every_broken_rule_is_noticed() {
    let mut unnoticed = Vec::new();
    for rule in Rule::ALL {
        let found = (0..SEEDS_MAX).find_map(|seed| {
            let violation = play_safely(seed, Rules::without(*rule), false).violation?;
            Some((seed + 1, violation))
        });
        match found {
            Some((seeds, violation)) => {
                println!("{:24} noticed after {seeds:>4} seeds: {}", format!("{rule:?}"), violation.law);
            }
            None => unnoticed.push(rule),
        }
    }
    assert!(unnoticed.is_empty(), "broken and not noticed within {SEEDS_MAX} seeds: {unnoticed:?}");
}
