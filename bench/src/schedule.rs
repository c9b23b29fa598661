//! What scheduling is worth: users' experiments on a real mesh whose devices have stated costs, each with scheduling on and,
//! in the same run, off.
//!
//! Owns the experiments and the ideal that each is held against. Never: the device (`device.rs`), a threshold that fails.

mod closed;
mod decision;
mod fair;
mod field;
mod figures;
mod load;
mod mixed;
mod models;
mod realtime;
mod stages;
mod switch;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::report::Report;

/// The experiments with schedules.
#[derive(Args, Clone, Debug)]
pub(crate) struct Schedule {
    /// Which of them; all if none is named.
    #[arg(value_enum)]
    experiments: Vec<Experiment>,
}

/// One experiment.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Experiment {
    /// 16, 32, 64 and 128 clients with 8 items each at the same moment.
    Realtime,
    /// Four bulk jobs of 1000 items, then 8, 24 and 48 clients with 8.
    Mixed,
    /// The same behind four jobs of 128.
    MixedSmall,
    /// Closed loops of small and larger requests on a device to which batches are all.
    Gpu,
    /// Two equal clients at the same time.
    Fair,
    /// One job over four workers.
    Skew,
    /// Two models one behind the other, overlapping and not.
    Stages,
    /// A worker becomes slow under a stream with a promised latency.
    Switch,
    /// A real model that batches well, and one that cannot.
    Models,
    /// What one decision of the broker costs, in this process.
    Decision,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
struct Plan {
    quick: bool,
}

impl Plan {
    /// The number for a full run, or for one that only shows that everything works.
    fn or<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

impl Schedule {
    /// A report for each.
    pub(crate) fn run(&self, quick: bool, mut show: impl FnMut(&Report) -> Result<()>) -> Result<()> {
        let all = if self.experiments.is_empty() { Experiment::value_variants() } else { &self.experiments };
        all.iter().try_for_each(|experiment| show(&experiment.run(Plan { quick })?))
    }
}

impl Experiment {
    fn run(self, plan: Plan) -> Result<Report> {
        match self {
            Self::Realtime => block_on(realtime::run(plan)),
            Self::Mixed => block_on(mixed::run(plan, mixed::LARGE)),
            Self::MixedSmall => block_on(mixed::run(plan, mixed::SMALL)),
            Self::Gpu => block_on(closed::run(plan)),
            Self::Fair => block_on(fair::run(plan)),
            Self::Skew => block_on(fair::skewed(plan)),
            Self::Stages => block_on(stages::run(plan)),
            Self::Switch => block_on(switch::run(plan)),
            Self::Models => block_on(models::run(plan)),
            Self::Decision => decision::run(plan),
        }
    }
}

/// All clients of an experiment live in this process. Its own thread starts the mesh, which ends with that thread.
fn block_on<T>(experiment: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(experiment)
}
