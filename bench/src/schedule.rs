//! The value of scheduling: users' experiments on a real mesh whose devices have stated costs, each with scheduling on
//! and, in the same run, off.
//!
//! Owns the experiments and the ideal value of each. Never: the device (`device.rs`), a threshold that fails.

pub(crate) mod bare;
mod closed;
mod decision;
mod fair;
mod field;
mod figures;
mod load;
mod mixed;
mod models;
mod policies;
mod promise;
mod realtime;
mod stages;
mod switch;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::report::Report;

/// The experiments with schedules.
#[derive(Args, Clone, Debug)]
pub(crate) struct Schedule {
    /// Experiments to run; default: all
    #[arg(value_enum)]
    experiments: Vec<Experiment>,
    #[command(flatten)]
    sizes: Sizes,
}

/// Other sizes than the usual ones, of the experiments whose sizes may be chosen.
#[derive(Args, Clone, Debug, Default)]
struct Sizes {
    /// Of fair, skew and stages: items of a job (100,4000); with fair, of each of the two.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    items: Vec<u32>,
    /// Of fair, skew and stages: items that share a task.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    split: Option<u32>,
    /// Of switch: tasks a second.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: Option<u32>,
}

impl Sizes {
    /// As they stood on the command line.
    fn arguments(&self) -> String {
        let items: Vec<String> = self.items.iter().map(u32::to_string).collect();
        let items = (!items.is_empty()).then(|| format!(" --items {}", items.join(",")));
        let split = self.split.map(|split| format!(" --split {split}"));
        let rate = self.rate.map(|rate| format!(" --rate {rate}"));
        [items, split, rate].into_iter().flatten().collect()
    }
}

/// One experiment.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Experiment {
    /// 16, 32, 64 and 128 clients with 8 items each, at the same moment.
    Realtime,
    /// Four bulk jobs of 1000 items, then 8, 24 and 48 clients with 8 items.
    Mixed,
    /// As `mixed`, behind four jobs of 128 items.
    MixedSmall,
    /// Closed loops of small and larger requests on a device whose time depends mostly on the number of batches.
    Gpu,
    /// Two equal clients at the same time.
    Fair,
    /// One job over four workers.
    Skew,
    /// Two models in a row, overlapping and not.
    Stages,
    /// A worker becomes slow under a stream with a service level.
    Switch,
    /// A stream of single items beside bulk, with a service level and without.
    Promise,
    /// Real models: one that batches well, one that only seems to, one that cannot.
    Models,
    /// Each placement policy, on workers that are not equally fast.
    Policies,
    /// The cost of one decision of the broker, in this process.
    Decision,
}

/// How long, how often and how much.
#[derive(Clone, Copy, Debug)]
struct Plan<'a> {
    quick: bool,
    sizes: &'a Sizes,
}

impl Plan<'_> {
    /// The number for a full run, or for a quick one that only shows that everything works.
    fn or<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Items of a job and of each of its tasks: those of the command line, else these.
    fn jobs(self, full: &[(u32, u32)], quick: (u32, u32)) -> Vec<(u32, u32)> {
        let split = |usual: u32| self.sizes.split.unwrap_or(usual);
        if !self.sizes.items.is_empty() {
            return self.sizes.items.iter().map(|items| (*items, split(load::SPLIT))).collect();
        }
        let mut usual = self.or(full, std::slice::from_ref(&quick)).to_vec();
        usual.iter_mut().for_each(|job| job.1 = split(job.1));
        usual.dedup();
        usual
    }
}

impl Schedule {
    /// Runs the chosen experiments and shows a report of each.
    pub(crate) fn run(&self, quick: bool, mut show: impl FnMut(&Report) -> Result<()>) -> Result<()> {
        let all = if self.experiments.is_empty() { Experiment::value_variants() } else { &self.experiments };
        if all.contains(&Experiment::Models) {
            // Before the hours of the others.
            models::are_fetched()?;
        }
        all.iter().try_for_each(|experiment| {
            let report = experiment.run(Plan { quick, sizes: &self.sizes })?;
            show(&report.called_with(self.sizes.arguments()))
        })
    }

    /// Whether the sizes are the usual ones, whose results stand in the repository.
    pub(crate) fn is_usual(&self) -> bool {
        self.sizes.arguments().is_empty()
    }
}

impl Experiment {
    fn run(self, plan: Plan<'_>) -> Result<Report> {
        match self {
            Self::Realtime => block_on(realtime::run(plan)),
            Self::Mixed => block_on(mixed::run(plan, mixed::LARGE)),
            Self::MixedSmall => block_on(mixed::run(plan, mixed::SMALL)),
            Self::Gpu => block_on(closed::run(plan)),
            Self::Fair => block_on(fair::run(plan)),
            Self::Skew => block_on(fair::skewed(plan)),
            Self::Stages => block_on(stages::run(plan)),
            Self::Switch => block_on(switch::run(plan)),
            Self::Promise => block_on(promise::run(plan)),
            Self::Models => block_on(models::run(plan)),
            Self::Policies => block_on(policies::run(plan)),
            Self::Decision => decision::run(plan),
        }
    }
}

/// Runs an experiment. All its clients live in this process; the mesh ends with the thread that starts it.
fn block_on<T>(experiment: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(experiment)
}
