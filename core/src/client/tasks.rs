//! The tasks of one client.
//!
//! ```text
//!             ┌────────────────── lost: the attempt came to nothing ◄─────────────────┐
//!             ▼                                                                       │
//!   Submit ► Asking ── Grant ──► Connecting ─ it speaks ► Up ◄── Accept ── Mending ───┤
//!             │                      │                    │ └─ link broke, silence ─►─┘
//!             │                      └── no way there ────┼──────────────────────────►┘
//!             └────────────────────────────► End ◄────────┘ result verified, failed for good, cancelled, expired
//! ```
//!
//! Owns the state and timers of one task, and what the broker hears of it. Never decides.

use std::time::Duration;

use proto_msgs::{
    Attempt, AttemptId, Direction, Epoch, Grant, Lane, Outcome, Phase, RunResult, Standing, Submit, TaskId, TaskSpec,
    WorkerId,
};

use super::api::Config;
use crate::MonoTime;

/// What the user wants with a task.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Wish {
    /// Run the task.
    Run(Box<TaskSpec>),
    /// Fetch the result of a detached task.
    Fetch,
}

/// A lost attempt: it ended without a result.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Lost {
    pub(super) attempt: Attempt,
    pub(super) worker: WorkerId,
    pub(super) outcome: Outcome,
}

/// The link to the worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Way {
    /// The first connection is being made.
    Connecting { until: MonoTime },
    /// The worker has spoken over the link.
    Up,
    /// The link broke or the worker fell silent, and the client reconnects.
    Mending { give_up: MonoTime, retry: MonoTime },
}

/// Whether a task has a worker.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// The task has no worker.
    Asking,
    /// The task has a worker.
    At(Box<At>),
}

/// The attempt that the client follows.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct At {
    pub(super) grant: Grant,
    pub(super) way: Way,
    /// When the worker last spoke.
    pub(super) heard: MonoTime,
    pub(super) phase: Option<Phase>,
    /// A detached task: the worker has everything, and the broker has been told.
    pub(super) all_sent: bool,
    /// The result whose outputs are arriving.
    pub(super) result: Option<Box<RunResult>>,
}

impl At {
    pub(super) fn id(&self) -> AttemptId {
        self.grant.id
    }
}

/// One task of the client.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: TaskId,
    pub(super) wish: Wish,
    pub(super) state: State,
    /// The last lost attempt. The broker hears of it until it names another worker.
    pub(super) lost: Option<Lost>,
    /// Lost attempts of a fetch in one life of its worker. No broker counts them.
    pub(super) fetches_failed: u32,
    /// The worker's life that a fetch was last sent to.
    pub(super) fetched_from: Option<Epoch>,
    /// The direction that a fetch last tried without success.
    pub(super) unreachable: Option<Direction>,
    /// The worker of the last attempt.
    pub(super) last: Option<(WorkerId, String)>,
    /// The lane of the last attempt.
    pub(super) lane: Option<Lane>,
    /// After this time the task may be submitted again, if the broker refused it for now.
    pub(super) retry_after_ms: Option<u32>,
    pub(super) deadline: Option<MonoTime>,
    /// When the broker is told the state again.
    pub(super) repeat_at: MonoTime,
    /// Times the broker was told the state since its last change.
    pub(super) repeats: u32,
}

impl Task {
    pub(super) fn new(id: TaskId, wish: Wish, now: MonoTime) -> Self {
        let deadline = match &wish {
            Wish::Run(spec) => spec.deadline_ms.map(|ms| now + Duration::from_millis(ms)),
            Wish::Fetch => None,
        };
        Self {
            id,
            wish,
            state: State::Asking,
            lost: None,
            fetches_failed: 0,
            fetched_from: None,
            unreachable: None,
            last: None,
            lane: None,
            retry_after_ms: None,
            deadline,
            repeat_at: now,
            repeats: 0,
        }
    }

    /// Whether this process leaves the result with the worker until somebody fetches it.
    pub(super) fn leaves_result(&self) -> bool {
        matches!(&self.wish, Wish::Run(spec) if spec.detached)
    }

    pub(super) fn at(&self) -> Option<&At> {
        match &self.state {
            State::At(at) => Some(at),
            State::Asking => None,
        }
    }

    /// Whether a grant is for an attempt that the task has, or has given up. A result has one attempt however often it is
    /// fetched, but tickets of its worker's earlier life are worth nothing.
    pub(super) fn is_past(&self, grant: &Grant) -> bool {
        let is_fetch = self.wish == Wish::Fetch;
        let age = |grant: &Grant| (grant.id.attempt, if is_fetch { grant.ticket.body.epoch } else { Epoch(0) });
        match (&self.state, &self.lost) {
            (State::At(at), _) => age(grant) <= age(&at.grant),
            (State::Asking, Some(lost)) => grant.id.attempt <= lost.attempt && !is_fetch,
            (State::Asking, None) => false,
        }
    }

    /// Counts a fetch's failures anew with each life of its worker: what failed in an earlier one says nothing.
    pub(super) fn fetches_from(&mut self, epoch: Epoch) {
        if self.fetched_from.replace(epoch) != Some(epoch) {
            self.fetches_failed = 0;
        }
    }

    pub(super) fn at_mut(&mut self) -> Option<&mut At> {
        match &mut self.state {
            State::At(at) => Some(at),
            State::Asking => None,
        }
    }

    /// The last attempt; 0 if there was none.
    pub(super) fn attempt(&self) -> Attempt {
        let lost = self.lost.as_ref().map(|lost| lost.attempt);
        self.at().map(|at| at.id().attempt).or(lost).unwrap_or_default()
    }

    /// When the client must look at the task, given the longest silence of a worker.
    pub(super) fn due(&self, worker_silence: Duration) -> MonoTime {
        let way = self.at().map(|at| match at.way {
            Way::Connecting { until } => until,
            Way::Up => at.heard + worker_silence,
            Way::Mending { give_up, retry } => give_up.min(retry),
        });
        [Some(self.repeat_at), self.deadline, way].into_iter().flatten().min().unwrap_or(self.repeat_at)
    }
}

/// The `Submit` that tells the broker the client's whole view of a task.
pub(super) fn submit(now: MonoTime, config: &Config, spec: &TaskSpec, task: &Task) -> Submit {
    let standing = match (&task.state, &task.lost) {
        (State::At(at), _) => Standing::Holding { attempt: at.id().attempt, worker: at.grant.worker },
        (State::Asking, Some(Lost { attempt, worker, outcome })) => {
            Standing::Lost { attempt: *attempt, worker: *worker, outcome: outcome.clone() }
        }
        (State::Asking, None) => Standing::Asking,
    };
    // The time left: for a restarted broker this message is the first one.
    let deadline_ms = task.deadline.map(|at| u64::try_from(at.since(now).as_millis()).unwrap_or(u64::MAX));
    Submit { spec: TaskSpec { deadline_ms, ..spec.clone() }, endpoints: config.endpoints.clone(), standing }
}
