//! The scene of a placement decision. Owns nothing: it shows what a decision may look at.

use proto_msgs::WorkerId;

use crate::{
    MonoTime,
    broker::{config::Policy, outgrown::Outgrown, slo::Slos, workers::Workers},
};

/// The input of a placement decision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scene<'a> {
    pub(crate) now: MonoTime,
    pub(crate) policy: Policy,
    pub(crate) workers: &'a Workers,
    pub(crate) slos: &'a Slos,
    pub(crate) outgrown: &'a Outgrown,
    /// The worker that got the last task, for `round-robin`.
    pub(crate) last_chosen: Option<WorkerId>,
}
