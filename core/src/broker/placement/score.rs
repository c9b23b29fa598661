//! The policies' scores of a worker for a task.
//!
//! Owns them. Never chooses; that is `placement`.

use proto_msgs::Prediction;

use super::{beside, obstacle, scene::Scene};
use crate::broker::{config::Policy, task::Task, workers::worker::Worker};

/// Added to a worker's predicted time for each preferred label that it lacks, besides a tenth of that time,
/// microseconds.
const UNLIKED_US: u64 = 5_000;

/// The policy's score; smaller is better.
pub(super) fn score(task: &Task, worker: &Worker, scene: &Scene<'_>, prediction: &Prediction) -> u64 {
    match scene.policy {
        Policy::Predicted => {
            let total_us = prediction.total_us();
            let wishes = task.spec.labels.iter().filter(|rule| !rule.required);
            let unliked = wishes.filter(|rule| !obstacle::has_label(worker, &rule.key, &rule.value)).count() as u64;
            let unliked_us = unliked.saturating_mul(total_us / 10 + UNLIKED_US);
            total_us.saturating_add(unliked_us).saturating_add(beside::loss_us(task, worker, prediction, scene.now))
        }
        Policy::LeastLoaded => u64::from(worker.busy_permille()),
        Policy::LatestHeartbeat => u64::MAX - worker.seen.as_micros(),
        // Equal scores: the id decides.
        Policy::RoundRobin => u64::from(Some(worker.id()) <= scene.last_chosen),
        Policy::Random => mixed(task.id().as_bytes(), worker.id().as_bytes()),
    }
}

/// A number that looks random but is always the same (FNV-1a, then the bits spread).
fn mixed(task: &[u8; 16], worker: &[u8; 16]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = task.iter().chain(worker).fold(0xcbf2_9ce4_8422_2325, step);
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
