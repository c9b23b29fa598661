//! The truth about deadlines: which ones the simulated mesh would surely have met, so that nobody may refuse them.

use std::collections::BTreeMap;

use proto_msgs::{Direction, Lane, TaskId};

use super::{
    job::{Behaviour, Job},
    mesh::{MS, Mesh, Micros, SECOND, micros},
    referee::Truth,
};

/// A deadline this many times as long as the worst time leaves the broker room for errors.
const MANY: u64 = 3;

/// Time after the last fault, and after any process began or went on, in which all have heard of all.
const HEARD_AFTER: Micros = 12 * SECOND;

/// Speed of the slowest link, bytes per second.
const SPEED_MIN: u64 = 2 << 20;

/// Longest delay of a message in a network that is judged: with longer ones the broker may take a worker for dead.
const DELAY_MAX: Micros = 100 * MS;

impl Mesh {
    /// Whether some worker would surely have met the task's deadline, even if all tasks that it could run went first.
    pub(super) fn would_surely_meet(&self, task: TaskId) -> bool {
        let truth = self.referee.task(task);
        let Some(deadline) = truth.job.deadline.map(micros) else { return false };
        let is_known = |started: Micros, frozen_until: Micros| started.max(frozen_until) + HEARD_AFTER < self.now;
        let (net, broker) = (&self.net, &self.broker.pulse);
        let is_quiet = self.referee.struck.is_none_or(|struck| struck + HEARD_AFTER < self.now);
        let is_calm = net.lost_permille == 0 && net.delay.1 <= DELAY_MAX && net.cut_off.is_empty();
        if !is_quiet || !is_calm || self.referee.has_slowed || !is_known(broker.started, broker.frozen_until) {
            return false;
        }
        let is_open = |other: &&Truth| other.ended.is_none() || other.job.detached;
        let open: Vec<&Truth> = self.referee.tasks.iter().filter(is_open).collect();
        let is_plain = |truth: &&&Truth| matches!(truth.job.behaviour, Behaviour::Works | Behaviour::LosesRow);
        if open.iter().filter(is_plain).count() < open.len() {
            return false;
        }
        let runs = self.longest_runs();
        self.workers.iter().enumerate().any(|(number, shell)| {
            let is_well = shell.machine.is_some() && is_known(shell.pulse.started, shell.pulse.frozen_until);
            let others = open.iter().filter(|other| self.may_run_at(number, other));
            let work: Micros = others.map(|other| self.worst(&other.job, &runs)).sum();
            let own = if truth.ended.is_none() { 0 } else { self.worst(&truth.job, &runs) };
            is_well && self.may_run_at(number, truth) && (work + own) * MANY < deadline
        })
    }

    fn may_run_at(&self, worker: usize, truth: &Truth) -> bool {
        let (place, job) = (&self.workers[worker].place, &truth.job);
        let has_slots = place.slots[1] > 0 || job.lane_in_force() == Lane::Realtime;
        let has_label = |key: &str, value: &str| place.labels.iter().any(|(has, is)| has == key && is == value);
        let has_labels = job.labels.iter().all(|rule| !rule.required || has_label(&rule.key, &rule.value));
        let is_reached = place.advertises && place.reachable && job.direction != Some(Direction::WorkerDials);
        has_slots && has_labels && is_reached && !self.net.apart.contains(&(worker, truth.process))
    }

    /// The longest time of an item of each model, in any task so far: what a model costs is learned from all of them.
    fn longest_runs(&self) -> BTreeMap<u8, Micros> {
        let mut runs = BTreeMap::new();
        for job in self.referee.tasks.iter().map(|truth| &truth.job) {
            for model in job.then.iter().chain([&job.model]) {
                let longest = runs.entry(*model).or_insert(0);
                *longest = job.run.max(*longest);
            }
        }
        runs
    }

    /// The time of the task alone, with all that may come to it.
    fn worst(&self, job: &Job, runs: &BTreeMap<u8, Micros>) -> Micros {
        let models = || job.then.iter().chain([&job.model]);
        let bytes = job.input_bytes + job.model_bytes * models().count() as u64;
        let items: Micros = models().map(|model| runs[model] * u64::from(job.items)).sum();
        let messages = 6 * self.net.delay.1 + 50 * MS;
        let loads = self.setup.load * models().count() as u64;
        bytes * SECOND / SPEED_MIN + loads + items + job.output + messages
    }
}
