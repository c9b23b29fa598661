//! The table of one worker's attempts.
//!
//! ```text
//!   Introduce ──► Dialling ──┐ the client opens
//!                            ▼
//!   Open ───────────────► Receiving ───► Ready ───► Running ───► Finished ───► (forgotten)
//!                               all is here  a slot    all rows are       taken by its client, or of no use to it,
//!                                            for a row through            and reported to the broker
//!   each before Finished ── client gone, stopped, expired ──► Finished
//! ```
//!
//! Owns the table. Never decides.
//!
//! A finished detached attempt that the broker knows of *rests*: its result waits to be fetched, perhaps for an hour,
//! and nothing else happens to it. Thousands may rest, so they are kept apart from the attempts that are checked after
//! every event.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use proto_msgs::{
    AttemptId, AttemptReport, AttemptState, Digest, ErrorCode, Manifest, Outcome, Phase, RunNote, TicketBody,
    codec::page_of,
    limits::{ACTIVE_ATTEMPTS_MAX, ATTEMPTS_MAX, RUN_NOTES_MAX, STAGES_AFTER_MAX, TENSORS_MAX, WINDOW_BYTES},
};

use super::{
    api::{Config, LinkId},
    packer::{Form, QueueId},
};
use crate::{Census, MonoTime, Rule};

/// How far an attempt has come.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// The client is being dialled and has not opened the attempt.
    Dialling { until: MonoTime },
    /// Model and inputs are arriving.
    Receiving,
    /// Everything has arrived, and no row has run.
    Ready,
    /// Some rows run or have run. The phase is that of the last batch with rows of the attempt.
    Running(Phase),
    /// The attempt has ended. `taken`: nobody needs the result any more. `reported`: the broker knows.
    Finished { outcome: Outcome, ended: MonoTime, taken: bool, reported: bool },
}

/// Models, items and progress of an attempt.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// The models of its stages.
    pub(super) models: Vec<Digest>,
    pub(super) items: u32,
    /// The form of one item, per input.
    pub(super) forms: Arc<[Form]>,
    /// An earlier life of the worker ended during a run of this attempt, so its rows run alone.
    pub(super) is_suspect: bool,
    /// When everything had arrived; `None` before that, and if an earlier life of the worker saw it.
    pub(super) here_since: Option<MonoTime>,
    /// The queues of its stages, once everything has arrived.
    pub(super) way: Vec<QueueId>,
    /// Rows that have passed the last stage.
    pub(super) rows_done: u32,
    /// The attempt's share of its batches' run time.
    pub(super) run_us: u64,
    pub(super) load_us: u64,
    pub(super) runs: Vec<RunNote>,
}

impl Work {
    pub(super) fn of(manifest: &Manifest) -> Self {
        let models = [manifest.model.digest].into_iter().chain(manifest.then.iter().map(|stage| stage.model.digest));
        let forms = manifest.inputs.iter().map(|input| Form::of(input, manifest.items)).collect();
        Self { models: models.collect(), items: manifest.items, forms, ..Self::default() }
    }

    fn census(&self, census: &mut Census<'_>) {
        let Self {
            models,
            items: _,
            forms,
            is_suspect: _,
            here_since: _,
            way,
            rows_done: _,
            run_us: _,
            load_us: _,
            runs,
        } = self;
        census.passing("models of an attempt", models.len(), 1 + STAGES_AFTER_MAX);
        census.passing("forms of an attempt", forms.len(), TENSORS_MAX);
        census.passing("queues of an attempt", way.len(), models.len());
        census.passing("runs of an attempt", runs.len(), RUN_NOTES_MAX);
    }
}

/// An attempt held by the worker.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) ticket: TicketBody,
    /// Models, items and progress; empty until the client opens the attempt.
    pub(super) work: Work,
    pub(super) state: State,
    /// When the result becomes worthless; `None` if the ticket sets no deadline or the broker's clock is unknown.
    pub(super) deadline: Option<MonoTime>,
    /// When its service level is missed, counted from when the worker first heard of it.
    pub(super) slo_until: Option<MonoTime>,
    /// The link to the client; `None` while there is none.
    pub(super) link: Option<LinkId>,
    /// When the client last spoke.
    pub(super) heard: MonoTime,
    /// Most result bytes in flight that the client allows.
    pub(super) window_bytes: u32,
    /// The client has not been told of the current phase.
    pub(super) has_news: bool,
    /// False while the attempt's end is on its way to disk: a death of this process would then undo it.
    pub(super) is_kept: bool,
    /// Heartbeats that reported the attempt's end.
    pub(super) told: u32,
}

impl Attempt {
    pub(super) fn new(ticket: TicketBody, state: State, now: MonoTime) -> Self {
        Self {
            slo_until: ticket.slo_ms.map(|ms| now + Duration::from_millis(ms.into())),
            ticket,
            work: Work::default(),
            state,
            deadline: None,
            link: None,
            heard: now,
            window_bytes: WINDOW_BYTES,
            has_news: false,
            is_kept: true,
            told: 0,
        }
    }

    /// Checks that a reopened attempt brings the same work as before: other attempts' rows may run beside its rows.
    pub(super) fn may_bring(&self, work: &Work) -> Result<(), (ErrorCode, String)> {
        let same = |of: &Work| (of.models.clone(), of.items, of.forms.clone());
        if self.work.models.is_empty() || same(&self.work) == same(work) {
            return Ok(());
        }
        Err((ErrorCode::BadRequest, "the attempt was opened with another model or other inputs".to_owned()))
    }

    pub(super) fn id(&self) -> AttemptId {
        self.ticket.attempt_id()
    }

    /// Whether everything has arrived and the attempt has not ended.
    pub(super) fn is_here(&self) -> bool {
        matches!(self.state, State::Ready | State::Running(_))
    }

    /// Time from the arrival of everything to the end, microseconds; 0 if unknown.
    pub(super) fn held_us(&self) -> u64 {
        let State::Finished { ended, .. } = self.state else { return 0 };
        self.work.here_since.map_or(0, |since| ended.since_us(since))
    }

    /// Whether the attempt has not ended yet.
    pub(super) fn is_active(&self) -> bool {
        !matches!(self.state, State::Finished { .. })
    }

    /// Whether nobody needs anything of the attempt any more.
    pub(super) fn is_taken(&self) -> bool {
        matches!(self.state, State::Finished { taken: true, .. })
    }

    /// Whether the broker knows that the attempt has ended.
    pub(super) fn is_reported(&self) -> bool {
        matches!(self.state, State::Finished { reported: true, .. })
    }

    /// Whether the attempt ends when its client goes: an attached one always, a detached one until everything has
    /// arrived.
    pub(super) fn needs_client(&self) -> bool {
        match self.state {
            State::Dialling { .. } => false,
            State::Receiving => true,
            State::Ready | State::Running(_) => !self.ticket.detached,
            State::Finished { taken, .. } => !self.ticket.detached && !taken,
        }
    }

    /// When the attempt is given up if nothing else happens: its client has not come, is gone, or leaves the result too
    /// long.
    pub(super) fn given_up_at(&self, config: &Config) -> Option<MonoTime> {
        let notices = self.needs_client() && config.rules.holds(Rule::NoticeGoneClients);
        let silent_at = notices.then_some(self.heard + config.client_silence);
        match self.state {
            State::Dialling { until } => Some(until),
            State::Finished { ended, taken: false, .. } => {
                let kept_until = ended + config.result_kept;
                Some(silent_at.map_or(kept_until, |at| at.min(kept_until)))
            }
            _ => silent_at,
        }
    }

    /// When the result becomes worthless, if the attempt waits or runs until then.
    pub(super) fn expires_at(&self) -> Option<MonoTime> {
        self.deadline.filter(|_| self.is_here())
    }

    /// When the attempt ended, if its result only waits to be fetched.
    fn rests_since(&self) -> Option<MonoTime> {
        match self.state {
            State::Finished { ended, taken: false, reported: true, .. } => {
                (self.ticket.detached && self.is_kept && self.link.is_none()).then_some(ended)
            }
            _ => None,
        }
    }

    /// When the attempt ended, if nobody needs its result any more.
    fn taken_at(&self) -> Option<(MonoTime, AttemptId)> {
        match self.state {
            State::Finished { ended, taken: true, .. } => Some((ended, self.id())),
            _ => None,
        }
    }

    fn report(&self) -> AttemptReport {
        let state = match &self.state {
            State::Dialling { .. } | State::Receiving => AttemptState::Receiving,
            State::Ready => AttemptState::Ready,
            State::Finished { outcome, .. } if self.is_kept => AttemptState::Finished(outcome.clone()),
            State::Running(_) | State::Finished { .. } => AttemptState::Running,
        };
        AttemptReport { id: self.id(), state }
    }
}

/// Most finished attempts that nobody needs and the broker has not acknowledged. Beyond that the oldest are dropped:
/// their clients have told the broker themselves.
const UNREPORTED_MAX: usize = 64;

/// All attempts of a worker.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    table: BTreeMap<AttemptId, Attempt>,
    /// Attempts that rest.
    resting: BTreeMap<AttemptId, Attempt>,
    /// Resting attempts by the time of their end.
    rest_since: BTreeSet<(MonoTime, AttemptId)>,
}

impl Attempts {
    pub(super) fn len(&self) -> usize {
        self.table.len() + self.resting.len()
    }

    /// Counts the attempts; the most there may be of each sort.
    pub(super) fn census(&self, attached_max: usize, detached_max: usize, census: &mut Census<'_>) {
        let Self { table, resting, rest_since } = self;
        census.passing("attached attempts", self.count(false), attached_max);
        census.passing("detached attempts", self.count(true), detached_max);
        census.passing("active attempts", self.active(), ACTIVE_ATTEMPTS_MAX);
        census.passing("ends to be reported", table.values().filter_map(Attempt::taken_at).count(), UNREPORTED_MAX);
        census.passing("resting attempts by time", rest_since.len(), resting.len());
        table.values().for_each(|attempt| attempt.work.census(census));
    }

    /// Queues that attempts pass through, and rows that have not passed the last of them.
    pub(super) fn under_way(&self) -> (usize, usize) {
        let here = self.table.values().filter(|attempt| attempt.is_here()).map(|attempt| &attempt.work);
        here.fold((0, 0), |(ways, rows), work| (ways + work.way.len(), rows + (work.items - work.rows_done) as usize))
    }

    /// The number of attached or of detached attempts, in any state.
    pub(super) fn count(&self, detached: bool) -> usize {
        let resting = if detached { self.resting.len() } else { 0 };
        self.table.values().filter(|attempt| attempt.ticket.detached == detached).count() + resting
    }

    /// The number of attempts that have not ended.
    pub(super) fn active(&self) -> usize {
        self.table.values().filter(|attempt| attempt.is_active()).count()
    }

    pub(super) fn get(&self, id: AttemptId) -> Option<&Attempt> {
        self.table.get(&id).or_else(|| self.resting.get(&id))
    }

    /// The attempt for changes. If it rested, it is checked after every event again.
    pub(super) fn get_mut(&mut self, id: AttemptId) -> Option<&mut Attempt> {
        if let Some(attempt) = self.resting.remove(&id) {
            attempt.rests_since().map(|since| self.rest_since.remove(&(since, id)));
            self.table.insert(id, attempt);
        }
        self.table.get_mut(&id)
    }

    /// Attempts that time alone may change: all that do not rest.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.table.values()
    }

    /// As [`Self::iter`], for changes.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Attempt> {
        self.table.values_mut()
    }

    pub(super) fn insert(&mut self, attempt: Attempt) {
        self.table.insert(attempt.id(), attempt);
    }

    /// When the first of the resting attempts ended.
    pub(super) fn first_rest(&self) -> Option<MonoTime> {
        self.rest_since.first().map(|(since, _)| *since)
    }

    /// Attempts that have rested at least this long.
    pub(super) fn rested(&self, now: MonoTime, rest: Duration) -> Vec<AttemptId> {
        self.rest_since.iter().take_while(|(since, _)| now >= *since + rest).map(|(_, id)| *id).collect()
    }

    /// After every event: drops attempts that nobody needs, and lets those rest that only wait to be fetched.
    pub(super) fn tidy(&mut self) {
        self.forget();
        for (id, attempt) in self.table.extract_if(.., |_, attempt| attempt.rests_since().is_some()) {
            self.rest_since.extend(attempt.rests_since().map(|since| (since, id)));
            self.resting.insert(id, attempt);
        }
    }

    /// Drops attempts that are taken and reported, and the oldest taken ones beyond the limit.
    fn forget(&mut self) {
        let is_done = |attempt: &Attempt| matches!(attempt.state, State::Finished { taken: true, reported: true, .. });
        self.table.retain(|_, attempt| !is_done(attempt));
        // This runs after every event, so the surplus is hardly ever more than one.
        let surplus = self.table.values().filter_map(Attempt::taken_at).count().saturating_sub(UNREPORTED_MAX);
        for _ in 0..surplus {
            if let Some((_, oldest)) = self.table.values().filter_map(Attempt::taken_at).min() {
                self.table.remove(&oldest);
            }
        }
    }

    /// The attempts that the heartbeat names, and whether these are all: active ones first, then ends that the broker
    /// has not acknowledged. If these are too many, or their texts too long, the ends reported least often go first:
    /// some may wait long for the broker's store.
    pub(super) fn reports(&mut self) -> (Vec<AttemptReport>, bool) {
        let is_going_on = |attempt: &&Attempt| attempt.is_active() || !attempt.is_kept;
        let active: Vec<AttemptReport> = self.table.values().filter(is_going_on).map(Attempt::report).collect();
        let unreported = |attempt: &&mut Attempt| {
            attempt.is_kept && matches!(attempt.state, State::Finished { reported: false, .. })
        };
        let mut over: Vec<&mut Attempt> = self.table.values_mut().filter(unreported).collect();
        over.sort_by_key(|attempt| attempt.told);
        let (active_len, all_len) = (active.len(), active.len() + over.len());
        let ends = over.iter().map(|attempt| attempt.report());
        let reports = page_of(active.into_iter().chain(ends), ATTEMPTS_MAX);
        for attempt in over.into_iter().take(reports.len().saturating_sub(active_len)) {
            attempt.told = attempt.told.saturating_add(1);
        }
        let are_all = reports.len() == all_len;
        (reports, are_all)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A finished attempt that the broker has not acknowledged.
    fn over(number: u32) -> Attempt {
        let outcome = Outcome::Done { run_us: 1, load_us: 0 };
        let state = State::Finished { outcome, ended: MonoTime::ZERO, taken: false, reported: false };
        Attempt::new(mesh_samples::ticket_body(number, 1, 1), state, MonoTime::ZERO)
    }

    #[test]
    fn a_result_that_only_waits_is_looked_at_no_more_until_somebody_asks_for_it() {
        let mut attempts = Attempts::default();
        let mut kept = over(1);
        kept.ticket.detached = true;
        let id = kept.id();
        attempts.insert(kept);
        attempts.tidy();
        assert_eq!(attempts.iter().count(), 1, "the broker has to be told");

        if let Some(State::Finished { reported, .. }) = attempts.get_mut(id).map(|attempt| &mut attempt.state) {
            *reported = true;
        }
        attempts.tidy();
        assert_eq!((attempts.iter().count(), attempts.len(), attempts.count(true)), (0, 1, 1));
        assert!(attempts.get(id).is_some());

        attempts.get_mut(id).expect("it is kept").link = Some(LinkId(1));
        attempts.tidy();
        assert_eq!((attempts.iter().count(), attempts.first_rest()), (1, None), "somebody fetches it");

        attempts.get_mut(id).expect("it is kept").link = None;
        attempts.tidy();
        assert_eq!((attempts.iter().count(), attempts.first_rest()), (0, Some(MonoTime::ZERO)));
        let hour = Duration::from_secs(3600);
        assert_eq!(attempts.rested(MonoTime::ZERO + hour, hour), [id]);
    }

    #[test]
    fn ends_that_wait_for_the_store_do_not_keep_new_ones_from_being_told() {
        let mut attempts = Attempts::default();
        (1..1000).for_each(|number| attempts.insert(over(number)));
        let told: BTreeSet<AttemptId> = (0..4).flat_map(|_| attempts.reports().0).map(|report| report.id).collect();
        assert_eq!(told.len(), 999);
        attempts.insert(over(1000));
        let (reports, are_all) = attempts.reports();
        assert!(!are_all && reports.iter().any(|report| report.id == over(1000).id()));
    }
}
