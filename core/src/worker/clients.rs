//! Requests of clients and their admission: the client half of [`Worker::handle`].

use proto_msgs::{
    Accept, AttemptId, ErrorCode, Manifest, Open, Outcome, PublicKey, Purpose, Refuse, Ticket, TicketBody, TicketError,
    WorkerToClient,
    limits::{ACTIVE_ATTEMPTS_MAX, WINDOW_BYTES},
};

use super::{
    Action, LinkId, Worker,
    attempts::{Attempt, State, Work},
    broker_clock::BrokerClock,
    culprits::TURNED_AWAY,
};
use crate::{DEADLINE_PASSED, MonoTime, Rule};

/// Most attached attempts held at once, results that wait to be taken included. Beyond that new ones are refused.
pub(super) const ATTACHED_MAX: usize = 1024;

/// Most detached attempts held at once: two per second if results wait an hour. Each takes some KiB of memory and a
/// folder on disk. Attached and detached attempts do not keep each other out.
pub(super) const DETACHED_MAX: usize = 8192;

impl Worker {
    pub(super) fn check(
        &self,
        now: MonoTime,
        ticket: &Ticket,
        bearer: Option<PublicKey>,
        known: bool,
    ) -> Result<(), TicketError> {
        let register = &self.config.register;
        let epoch = if self.config.rules.holds(Rule::TicketNamesEpoch) { register.epoch } else { ticket.body.epoch };
        // An admitted attempt may come back over a new link, however long it has taken.
        let clock = self.broker_unix_ms(now).filter(|_| !known).unwrap_or(0);
        ticket.verify(&register.ticket_key, (register.worker, epoch), bearer, clock)
    }

    /// Why a new attempt is refused; `None` if it is admitted.
    pub(super) fn refusal(&self, ticket: &TicketBody, now: MonoTime) -> Option<(ErrorCode, &'static str)> {
        if self.drain_until.is_some() {
            return Some((ErrorCode::Draining, "the worker is shutting down"));
        }
        if self.attempts.active() >= ACTIVE_ATTEMPTS_MAX || self.is_full(ticket.detached) {
            return Some((ErrorCode::Busy, "the worker holds as many tasks as it may"));
        }
        let is_late = self.deadline_of(ticket).is_some_and(|deadline| now >= deadline);
        is_late.then_some((ErrorCode::Expired, DEADLINE_PASSED))
    }

    /// Whether the worker is full of attached or of detached attempts.
    pub(super) fn is_full(&self, detached: bool) -> bool {
        self.attempts.count(detached) >= if detached { DETACHED_MAX } else { ATTACHED_MAX }
    }

    /// Adds a new attempt. Its deadline is converted to this machine's clock now: the next broker's clock may differ.
    pub(super) fn admit(&mut self, attempt: Attempt) {
        let deadline = self.deadline_of(&attempt.ticket);
        self.attempts.insert(Attempt { deadline, ..attempt });
    }

    /// Stores the broker's clock. The first time, attempts from before this process started get their deadlines too.
    pub(super) fn clock_told(&mut self, told_unix_ms: u64, now: MonoTime) {
        let clock = BrokerClock { told_unix_ms, at: now };
        let is_first = self.broker_clock.replace(clock).is_none();
        for attempt in self.attempts.iter_mut().filter(|_| is_first) {
            attempt.deadline = attempt.ticket.deadline_unix_ms.map(|unix_ms| clock.when(unix_ms));
        }
    }

    /// The deadline by this machine's clock; `None` if there is none, or the broker has not told its clock.
    fn deadline_of(&self, ticket: &TicketBody) -> Option<MonoTime> {
        Some(self.broker_clock?.when(ticket.deadline_unix_ms?))
    }

    pub(super) fn opened(&mut self, now: MonoTime, link: LinkId, key: Option<PublicKey>, open: Open) {
        let id = open.ticket.body.attempt_id();
        let known = self.attempts.get(id).is_some();
        if let Err(error) = self.check(now, &open.ticket, key, known) {
            return self.refuse(link, id, ErrorCode::BadTicket, error.to_string());
        }
        if known {
            return self.opened_again(now, link, id, open);
        }
        let Some(manifest) = open.manifest.filter(|_| open.ticket.body.purpose == Purpose::Run) else {
            return self.refuse(link, id, ErrorCode::ResultGone, "the result is no longer kept here");
        };
        if open.resume {
            return self.refuse(link, id, ErrorCode::WorkerLost, "the worker no longer has this attempt");
        }
        if let Some((code, text)) = self.refusal(&open.ticket.body, now) {
            return self.refuse(link, id, code, text);
        }
        if let Err((code, text)) = is_as_allowed(&open.ticket.body, &manifest) {
            return self.refuse(link, id, code, text);
        }
        let mut attempt = Attempt::new(open.ticket.body.clone(), State::Receiving, now);
        (attempt.link, attempt.window_bytes) = (Some(link), open.window_bytes);
        attempt.work = Work::of(&manifest);
        if self.is_one_too_many(now, &attempt) {
            return self.refuse(link, id, ErrorCode::Busy, TURNED_AWAY);
        }
        self.admit(attempt);
        let (manifest, ticket) = (Box::new(manifest), Box::new(open.ticket));
        self.actions.push(Action::Receive { id, link, manifest, ticket });
    }

    /// A client opens an attempt that the worker knows: over a new link, after it was dialled, or to fetch a result.
    fn opened_again(&mut self, now: MonoTime, link: LinkId, id: AttemptId, open: Open) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        if attempt.ticket.client != open.ticket.body.client {
            return self.refuse(link, id, ErrorCode::BadTicket, "the attempt belongs to another client");
        }
        (attempt.heard, attempt.link, attempt.window_bytes) = (now, Some(link), open.window_bytes);
        let window_bytes = attempt.window_bytes;
        match &attempt.state {
            State::Dialling { .. } if open.resume => {
                // The opening resumes an earlier life of the attempt, which has ended: a late message had it dialled
                // again.
                self.refuse(link, id, ErrorCode::WorkerLost, "the worker no longer has this attempt");
                self.give_up(now, id, Outcome::Cancelled);
            }
            State::Dialling { .. } | State::Receiving => {
                if let Some(manifest) = open.manifest {
                    let work = Work::of(&manifest);
                    if let Err((code, text)) = attempt.may_bring(&work).and(is_as_allowed(&attempt.ticket, &manifest)) {
                        return self.refuse(link, id, code, text);
                    }
                    (attempt.state, attempt.work) = (State::Receiving, work);
                    if self.attempts.get(id).is_some_and(|attempt| self.is_one_too_many(now, attempt)) {
                        return self.turn_away(now, id);
                    }
                    let (manifest, ticket) = (Box::new(manifest), Box::new(open.ticket));
                    self.actions.push(Action::Receive { id, link, manifest, ticket });
                }
            }
            State::Ready | State::Running(_) => {
                self.actions.push(Action::Relink { id, link });
                let accept = Accept { id, needs: Vec::new(), window_bytes: WINDOW_BYTES };
                self.actions.push(Action::TellClient { link, message: WorkerToClient::Accept(accept) });
                // The phase is told at once.
                attempt.has_news = true;
                self.next_news = Some(now);
            }
            State::Finished { taken: true, .. } if open.ticket.body.purpose == Purpose::Fetch => {
                self.refuse(link, id, ErrorCode::ResultGone, "the result is no longer kept here");
            }
            State::Finished { taken: true, .. } => {
                self.refuse(link, id, ErrorCode::WorkerLost, "the attempt was stopped here");
            }
            State::Finished { outcome, .. } => {
                let (outcome, runs, held_us) = (outcome.clone(), attempt.work.runs.clone(), attempt.held_us());
                self.actions.push(Action::SendResult { id, link, outcome, runs, held_us, window_bytes });
            }
        }
    }

    pub(super) fn refuse(&mut self, link: LinkId, id: AttemptId, code: ErrorCode, text: impl Into<String>) {
        let refuse = Refuse { id, code, text: text.into() };
        self.actions.push(Action::TellClient { link, message: WorkerToClient::Refuse(refuse) });
    }

    pub(super) fn client_alive(&mut self, now: MonoTime, id: AttemptId, link: LinkId) {
        match self.attempts.get_mut(id) {
            Some(attempt) if attempt.link == Some(link) => attempt.heard = now,
            _ => self.actions.push(Action::TellClient { link, message: WorkerToClient::Reopen(id) }),
        }
    }

    /// The client has the result, or wants none. Only the link over which it opened the attempt last may say so: all
    /// others are a stranger's, or an old one's.
    pub(super) fn let_go(&mut self, now: MonoTime, id: AttemptId, link: LinkId) {
        match self.attempts.get(id) {
            Some(attempt) if attempt.link != Some(link) && !attempt.is_taken() => {
                self.actions.push(Action::TellClient { link, message: WorkerToClient::Reopen(id) });
            }
            _ => self.stop(now, id),
        }
    }

    /// Stops the attempt, because the client or the broker does not want it.
    pub(super) fn stop(&mut self, now: MonoTime, id: AttemptId) {
        match self.attempts.get(id) {
            Some(attempt) if attempt.is_active() => self.give_up(now, id, Outcome::Cancelled),
            Some(_) => self.taken(id),
            None => {}
        }
    }

    /// Marks the result as not needed any more, and frees its data.
    pub(super) fn taken(&mut self, id: AttemptId) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        (attempt.link, attempt.is_kept) = (None, true);
        if let State::Finished { taken, .. } = &mut attempt.state
            && !std::mem::replace(taken, true)
        {
            self.actions.push(Action::Free { id });
        }
    }

    /// Ends an active attempt without a result.
    pub(super) fn give_up(&mut self, now: MonoTime, id: AttemptId, outcome: Outcome) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        attempt.link = None;
        attempt.state = State::Finished { outcome, ended: now, taken: true, reported: false };
        self.withdraw(now, id);
        self.actions.push(Action::Kill { id });
        self.actions.push(Action::Free { id });
    }
}

/// Checks that the client brings what its ticket is for.
fn is_as_allowed(ticket: &TicketBody, manifest: &Manifest) -> Result<(), (ErrorCode, String)> {
    let models = manifest.then.iter().map(|stage| stage.model.size_bytes).chain([manifest.model.size_bytes]);
    let bytes = models.chain(manifest.inputs.iter().map(|input| input.size_bytes)).fold(0, u64::saturating_add);
    if bytes > ticket.bytes_max {
        let text = format!("{bytes} bytes announced, the ticket is for {}", ticket.bytes_max);
        return Err((ErrorCode::TooLarge, text));
    }
    if manifest.items != ticket.items {
        let text = format!("{} items announced, the ticket is for {}", manifest.items, ticket.items);
        return Err((ErrorCode::BadRequest, text));
    }
    Ok(())
}
