//! The attempts of one worker.
//!
//! ```text
//!   Introduce ──► Dialling ──┐ the client opens
//!                            ▼
//!   Open ───────────────► Receiving ───► Ready ───► Running ───► Finished ───► (forgotten)
//!                            │  all is here  a slot    the engine     │   taken by its client, or of no use to it,
//!                            │                         is done        │   and reported to the broker
//!                            └──────────── client gone, stopped ──────┘
//! ```
//!
//! Owns the table and what counts as a slot. Never decides.

use std::collections::BTreeMap;

use proto_msgs::{
    AttemptId, AttemptReport, AttemptState, Outcome, Phase, RunNote, TicketBody,
    limits::{ATTEMPTS_MAX, WINDOW_BYTES},
};

use super::api::{BatchId, LinkId};
use crate::MonoTime;

/// Where an attempt stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// The client was dialled and has not opened.
    Dialling { until: MonoTime },
    /// Model and inputs are on their way.
    Receiving,
    /// All is here, no slot is free: only after a restart with fewer slots than before.
    Ready,
    /// With the engine, in this batch.
    Running(BatchId, Phase),
    /// Over. `taken`: nobody needs the result any more. `reported`: the broker knows.
    Finished { outcome: Outcome, ended: MonoTime, taken: bool, reported: bool },
}

/// An attempt.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) ticket: TicketBody,
    /// Items it consists of; 0 until it is opened.
    pub(super) items: u32,
    pub(super) state: State,
    /// The runs it took.
    pub(super) runs: Vec<RunNote>,
    /// The way to its client; `None` while there is none.
    pub(super) link: Option<LinkId>,
    /// When the client last spoke.
    pub(super) heard: MonoTime,
    /// Result bytes the client lets be under way.
    pub(super) window_bytes: u32,
}

impl Attempt {
    pub(super) fn new(ticket: TicketBody, state: State, now: MonoTime) -> Self {
        Self { ticket, items: 0, state, runs: Vec::new(), link: None, heard: now, window_bytes: WINDOW_BYTES }
    }

    pub(super) fn id(&self) -> AttemptId {
        AttemptId { task: self.ticket.task, attempt: self.ticket.attempt }
    }

    /// Whether it occupies a slot.
    pub(super) fn is_active(&self) -> bool {
        !matches!(self.state, State::Finished { .. })
    }

    /// Whether it ends when its client goes: an attached one always, a detached one until everything is here.
    pub(super) fn needs_client(&self) -> bool {
        match self.state {
            State::Dialling { .. } => false,
            State::Receiving => true,
            State::Ready | State::Running(..) => !self.ticket.detached,
            State::Finished { taken, .. } => !self.ticket.detached && !taken,
        }
    }

    fn report(&self) -> AttemptReport {
        let state = match &self.state {
            State::Dialling { .. } | State::Receiving => AttemptState::Receiving,
            State::Ready => AttemptState::Ready,
            State::Running(..) => AttemptState::Running,
            State::Finished { outcome, .. } => AttemptState::Finished(outcome.clone()),
        };
        AttemptReport { id: self.id(), state, detached: self.ticket.detached }
    }
}

/// Finished attempts that nobody needs but the broker has not acknowledged: those beyond are dropped, oldest first. Their
/// clients have told the broker themselves.
const UNREPORTED_MAX: usize = 64;

/// All attempts of a worker.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    table: BTreeMap<AttemptId, Attempt>,
}

impl Attempts {
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Slots in use.
    pub(super) fn active(&self) -> usize {
        self.table.values().filter(|attempt| attempt.is_active()).count()
    }

    pub(super) fn running(&self) -> usize {
        self.table.values().filter(|attempt| matches!(attempt.state, State::Running(..))).count()
    }

    pub(super) fn get(&self, id: AttemptId) -> Option<&Attempt> {
        self.table.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: AttemptId) -> Option<&mut Attempt> {
        self.table.get_mut(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.table.values()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Attempt> {
        self.table.values_mut()
    }

    pub(super) fn insert(&mut self, attempt: Attempt) {
        self.table.insert(attempt.id(), attempt);
    }

    /// Drops what nobody needs: taken and reported attempts, and the oldest taken ones beyond the limit.
    pub(super) fn forget(&mut self) {
        let is_done = |attempt: &Attempt| matches!(attempt.state, State::Finished { taken: true, reported: true, .. });
        self.table.retain(|_, attempt| !is_done(attempt));
        let mut taken: Vec<(MonoTime, AttemptId)> = self
            .table
            .iter()
            .filter_map(|(id, attempt)| match attempt.state {
                State::Finished { ended, taken: true, .. } => Some((ended, *id)),
                _ => None,
            })
            .collect();
        taken.sort_unstable();
        let surplus = taken.len().saturating_sub(UNREPORTED_MAX);
        for (_, id) in taken.drain(..surplus) {
            self.table.remove(&id);
        }
    }

    /// What the heartbeat says: the active ones first, then those that the broker has not acknowledged.
    pub(super) fn reports(&self) -> Vec<AttemptReport> {
        let unreported = |attempt: &&Attempt| matches!(attempt.state, State::Finished { reported: false, .. });
        let active = self.table.values().filter(|attempt| attempt.is_active());
        active.chain(self.table.values().filter(unreported)).take(ATTEMPTS_MAX).map(Attempt::report).collect()
    }
}
