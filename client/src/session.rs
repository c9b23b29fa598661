//! One attempt at its worker. Owns how far the attempt is opened there, its upload (`sending`) and its outputs
//! (`taking`). Never decides whether the attempt is still wanted.
//!
//! ```text
//!              ┌──► Patient: a neighbour brings the model ──┐
//!   Waiting ───┴──────────── Open is said ──────────────────┴──► Opened ── Accept ──► Accepted
//!      ▲                                                           │                    │
//!      └──── another link, or the word to make one ──── Broken ◄───┴── the link breaks ─┘
//! ```

mod sending;
mod taking;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_transport::blob::{Arrival, IncomingError, UploadEnd, Uploaded};
use proto_msgs::{
    Accept, Chunk, ClientToWorker, Credit, Digest, Direction, Grant, MODEL_BLOB, Open, Purpose, RunResult, limits,
};
use tokio::sync::mpsc;

use self::{sending::Sending, taking::Taking};
use crate::{
    happened::{Happened, LinkId},
    spool::Spool,
    task::Payload,
};

pub use self::sending::SENDING_EVERY;
pub(crate) use self::{sending::Road, taking::Taken};

/// Longest wait for a model that another attempt is sending to the same worker; then the waiting attempt is opened
/// anyway. A ticket is valid for a minute, and an `Open` queued behind that much data arrives no sooner than the data.
const PATIENCE: Duration = Duration::from_secs(45);

/// [`PATIENCE`] if the worker dialled: it waits only a little longer than this for an `Open`.
const PATIENCE_DIALLED: Duration = Duration::from_secs(4);

/// One attempt at its worker.
#[derive(Debug)]
pub(crate) struct Session {
    grant: Box<Grant>,
    state: State,
    sending: Sending,
    taking: Option<Taking>,
    /// Results whose intake was started.
    results: u64,
}

/// How far an attempt is opened. The head of this file draws the states.
#[derive(Debug)]
enum State {
    /// Opened as soon as there is a link. `dial_in` numbers the wait for a worker that was told to dial in.
    Waiting { resume: Resume, dial_in: Option<u64> },
    /// There is a link, and another attempt on it is sending a model that this attempt also needs.
    Patient { since: Instant },
    /// Opened on this link. The worker has not yet said what it needs.
    Opened(LinkId),
    /// The worker has said what it needs, or that it has everything.
    Accepted(LinkId),
    /// There is no link, and nothing has asked for another one yet.
    Broken,
}

/// Whether an attempt is resumed, or opened for the first time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Resume {
    No,
    Yes,
}

impl Session {
    pub(crate) fn new(grant: Box<Grant>, payload: Option<Arc<Payload>>, resume: Resume) -> Self {
        let sending = Sending::new(grant.id, grant.window_bytes, payload);
        Self { grant, state: State::Waiting { resume, dial_in: None }, sending, taking: None, results: 0 }
    }

    pub(crate) fn grant(&self) -> &Grant {
        &self.grant
    }

    /// The link on which the attempt is open.
    pub(crate) fn link(&self) -> Option<LinkId> {
        match self.state {
            State::Opened(link) | State::Accepted(link) => Some(link),
            State::Waiting { .. } | State::Patient { .. } | State::Broken => None,
        }
    }

    /// Whether and how to open the attempt on the next link; `None`: not to be opened.
    pub(crate) fn to_open(&self) -> Option<Resume> {
        match self.state {
            State::Waiting { resume, .. } => Some(resume),
            State::Patient { .. } => Some(Resume::No),
            State::Opened(_) | State::Accepted(_) | State::Broken => None,
        }
    }

    /// Notes that the attempt waits for a worker that was told to dial in; `count` is the number of this wait.
    pub(crate) fn wait_for_dial_in(&mut self, count: u64) {
        if let State::Waiting { dial_in, .. } = &mut self.state {
            *dial_in = Some(count);
        }
    }

    /// Whether the attempt is still in the dial-in wait with this number.
    pub(crate) fn waits_for_dial_in(&self, count: u64) -> bool {
        matches!(self.state, State::Waiting { dial_in: Some(waits), .. } if waits == count)
    }

    pub(crate) fn is_patient(&self) -> bool {
        matches!(self.state, State::Patient { .. })
    }

    /// Starts or continues the wait for another attempt that sends a needed model, one that `is_coming`, so that it is
    /// not sent twice. True while waiting, at most [`PATIENCE`] or [`PATIENCE_DIALLED`].
    pub(crate) fn be_patient(&mut self, is_coming: impl Fn(Digest) -> bool) -> bool {
        let since = if let State::Patient { since } = self.state { since } else { Instant::now() };
        let model_held = self.grant.model_held;
        let mut needed = self.sending.all_models().filter(|(blob, _)| *blob != MODEL_BLOB || !model_held);
        let patience = match self.grant.direction {
            Direction::ClientDials => PATIENCE,
            Direction::WorkerDials => PATIENCE_DIALLED,
        };
        let waits = needed.any(|(_, model)| is_coming(model)) && since.elapsed() < patience;
        if waits {
            self.state = State::Patient { since };
        }
        waits
    }

    /// The models that this attempt sends to the worker.
    pub(crate) fn brings(&self) -> &BTreeSet<Digest> {
        self.sending.models()
    }

    /// Notes that the worker has everything, even without an `Accept`. Returns the models not yet known to be there.
    pub(crate) fn received(&mut self) -> (BTreeSet<Digest>, Option<UploadEnd>) {
        let end = match self.state {
            State::Opened(link) => {
                self.state = State::Accepted(link);
                self.sending.told_complete()
            }
            _ => None,
        };
        (self.sending.delivered(), end)
    }

    /// Notes that the worker has the model, even if the broker does not know it yet.
    pub(crate) fn note_held(&mut self, is_held: impl Fn(Digest) -> bool) {
        let is_held = self.sending.all_models().next().is_some_and(|(_, model)| is_held(model));
        self.grant.model_held |= is_held;
    }

    /// The attempt's first message on a link. A result that was arriving when the last link broke continues from there.
    pub(crate) fn open_message(&self, resume: Resume) -> ClientToWorker {
        ClientToWorker::Open(Open {
            ticket: self.grant.ticket.clone(),
            manifest: self.sending.manifest().cloned(),
            window_bytes: limits::WINDOW_BYTES,
            resume: resume == Resume::Yes,
            outputs_here: self.taking.as_ref().map_or_else(Vec::new, Taking::parts),
        })
    }

    /// Starts the upload after `Open` on this link: at once, or after a break once the worker has said from where.
    pub(crate) fn opened(&mut self, link: LinkId, resume: Resume, road: &Road<'_>) -> Option<UploadEnd> {
        self.state = State::Opened(link);
        match resume {
            Resume::No => self.sending.begin(road, self.grant.model_held),
            Resume::Yes => self.sending.relink(road),
        }
    }

    /// Handles what the worker needs. Returns the models that it does not name, because it has them.
    pub(crate) fn accepted(&mut self, accept: &Accept, road: &Road<'_>) -> (BTreeSet<Digest>, Option<UploadEnd>) {
        if let State::Opened(link) = self.state {
            self.state = State::Accepted(link);
        }
        self.sending.accepted(accept, road)
    }

    /// Handles a broken link: uploads pause.
    pub(crate) fn unlink(&mut self) {
        self.state = State::Broken;
        self.sending.unlink();
    }

    /// Prepares to open the attempt again on another link. Returns the link on which it was open.
    pub(crate) fn reopen(&mut self) -> Option<LinkId> {
        let broken = self.link();
        // An attempt that was never opened is not resumed.
        let resume = self.to_open().unwrap_or(Resume::Yes);
        self.unlink();
        self.state = State::Waiting { resume, dial_in: None };
        broken
    }

    /// Prepares to open the attempt again with this grant. Returns the link on which it was open.
    pub(crate) fn resume(&mut self, grant: Box<Grant>) -> Option<LinkId> {
        self.grant = grant;
        self.reopen()
    }

    /// Handles a credit. Returns acknowledged and total bytes if it is time to tell the user.
    pub(crate) fn credit(&mut self, credit: Credit) -> (Option<(u64, u64)>, Option<UploadEnd>) {
        self.sending.credit(credit)
    }

    /// Notes the end of the attempt's upload. False if another upload has begun since.
    pub(crate) fn end_upload(&mut self, serial: u64) -> bool {
        self.sending.end_upload(serial)
    }

    /// Counts the bytes of a completed upload.
    pub(crate) fn uploaded(&mut self, uploaded: &Uploaded) {
        self.sending.carried(uploaded.wire_bytes);
    }

    /// Returns the bytes put on the wire, once, when the worker has everything it needs.
    pub(crate) fn newly_sent(&mut self) -> Option<u64> {
        matches!(self.state, State::Accepted(_)).then(|| self.sending.newly_sent()).flatten()
    }

    /// Starts the intake of outputs, or continues it where the last link broke.
    pub(crate) fn take(
        &mut self,
        result: &RunResult,
        spool: &Spool,
        happened: &mpsc::Sender<Happened>,
    ) -> Result<Vec<Taken>, IncomingError> {
        if result.goes_on && self.taking.as_ref().is_some_and(|taking| taking.is_of(result)) {
            return Ok(self.arrived_at_once());
        }
        self.taking = None;
        if result.outputs.is_empty() {
            return Ok(vec![Taken::All(Vec::new())]);
        }
        self.results += 1;
        let items = self.grant.ticket.body.items;
        self.taking = Some(Taking::start(result, self.results, items, spool, happened)?);
        Ok(self.arrived_at_once())
    }

    /// Takes a chunk of an output, or drops it if no intake waits for it. Returns the events that are already known.
    pub(crate) fn chunk(&mut self, chunk: Chunk, payload: bytes::Bytes) -> Result<Vec<Taken>, IncomingError> {
        self.taking.as_ref().map_or(Ok(()), |taking| taking.push(chunk, payload))?;
        Ok(self.arrived_at_once())
    }

    fn arrived_at_once(&mut self) -> Vec<Taken> {
        let mut all = Vec::new();
        while let Some(arrival) = self.taking.as_mut().and_then(Taking::next_here) {
            all.push(self.taken(arrival));
        }
        // An attempt that ran for this client is released now, so credits would change nothing. A fetched result stays
        // at its worker, and the sender waits for the credits.
        let is_released = self.grant.ticket.body.purpose == Purpose::Run;
        match all.pop() {
            Some(whole @ Taken::All(_)) if is_released => vec![whole],
            last => all.into_iter().chain(last).collect(),
        }
    }

    /// Handles an event of the intake with this number.
    pub(crate) fn arrived(&mut self, serial: u64, arrival: Arrival) -> Taken {
        if self.taking.as_ref().is_some_and(|taking| taking.is(serial)) { self.taken(arrival) } else { Taken::More }
    }

    fn taken(&mut self, arrival: Arrival) -> Taken {
        let taken = self.taking.as_mut().map_or(Taken::More, |taking| taking.arrived(arrival));
        if matches!(taken, Taken::All(_) | Taken::Broken(_)) {
            self.taking = None;
        }
        taken
    }
}

#[cfg(test)]
mod tests;
