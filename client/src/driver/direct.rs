//! The driver's side towards workers: connections made by either side, attempts opened on them, transfers that end.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use mesh_core::client::Event;
use mesh_transport::{
    Heard, Received,
    blob::{UploadEnd, UploadError},
};
use proto_msgs::{
    AttemptId, ClientToWorker, Digest, Direction, ErrorCode, Frame, Grant, Outcome, Phase, WorkerId, WorkerToClient,
};

use super::{Driver, Happened};
use crate::{
    News,
    links::{LinkId, Way},
    session::{Resume, Sending, Session, Taken},
};

/// Attempts wait this long for a model that a neighbour is sending to the same worker; then each sends its own, so that the
/// broker, which hears nothing of them from the worker meanwhile, does not take their place away.
const PATIENCE: Duration = Duration::from_secs(6);

impl Driver {
    pub(super) fn connect(&mut self, grant: Box<Grant>, resume: Resume) {
        let (id, worker, direction) = (grant.id, grant.worker, grant.direction);
        let payload = self.live.get(&id.task).and_then(|live| live.payload.clone());
        let broken = match self.sessions.get_mut(&id) {
            Some(session) if resume == Resume::Yes => {
                session.grant = grant;
                session.opening = Some(resume);
                let broken = session.link;
                session.unlink();
                broken
            }
            _ => {
                self.sessions.insert(id, Session::new(grant, payload, resume));
                None
            }
        };
        // The attempt's own link is of no use any more, unless a neighbour on it has replaced it already.
        if let Some(link) = broken {
            self.links.drop_link(link);
        }
        match (self.links.way(worker, id), direction) {
            (Way::Up(link, _), _) => self.open(id, link),
            (Way::Coming, _) => {}
            (Way::None, Direction::ClientDials) => {
                let Some(session) = self.sessions.get(&id) else { return };
                self.links.dial(&session.grant, self.connect_wait);
            }
            (Way::None, Direction::WorkerDials) => self.wait_for_dial_in(id),
        }
    }

    fn wait_for_dial_in(&mut self, id: AttemptId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        self.waits += 1;
        session.wait = self.waits;
        self.links.expect(session.grant.worker_key);
        let (wait, within, happened) = (self.waits, self.connect_wait, self.happened.clone());
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            let _ = happened.send(Happened::DialInLate { id, wait }).await;
        });
    }

    /// The attempt's worker can be spoken to: say what is wanted, send what it needs.
    fn open(&mut self, id: AttemptId, link: LinkId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(resume) = session.opening else { return };
        let Way::Up(_, outlet) = self.links.way(session.grant.worker, id) else { return };
        if resume == Resume::No && self.waits_for_neighbour(id, link) {
            return;
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.note_held(|model| self.links.has_delivered(link, model));
        let message = session.open_message(resume);
        framed(&message, |frame| self.links.send(link, frame));
        let session = self.sessions.get_mut(&id).expect("invariant: nothing was removed since it was found");
        let sending = Sending { happened: &self.happened, link_bytes_per_s: self.links.bytes_per_s(link) };
        match session.opened(link, &outlet, resume, &sending) {
            Ok(()) => self.look_at_upload(id),
            Err(error) => self.send_failed(id, &error),
        }
    }

    /// Another attempt on this link is sending a model that this one needs: it need not go twice. Bounded by [`PATIENCE`].
    fn waits_for_neighbour(&mut self, id: AttemptId, link: LinkId) -> bool {
        let Some(session) = self.sessions.get(&id) else { return false };
        let is_coming = |model| self.sessions.values().any(|other| other.link == Some(link) && other.is_sending(model));
        let is_coming = session.wants_any(|model| self.links.has_delivered(link, model), is_coming);
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        let waits = is_coming && session.patient_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE;
        if !waits {
            session.patient_since = None;
        }
        waits
    }

    /// Attempts that waited for a neighbour's model look again: it is there, or will not come.
    pub(super) fn open_patient(&mut self) {
        let patient = self.sessions.iter().filter(|(_, session)| session.patient_since.is_some());
        let patient: Vec<(AttemptId, WorkerId)> = patient.map(|(id, session)| (*id, session.grant.worker)).collect();
        for (id, worker) in patient {
            if let Way::Up(link, _) = self.links.way(worker, id) {
                self.open(id, link);
            }
        }
    }

    /// Their worker lives, since the neighbour's transfer goes on; when that is over or takes too long, they look again.
    pub(super) fn keep_patient_alive(&mut self) {
        self.open_patient();
        let patient = self.sessions.iter().filter(|(_, session)| session.patient_since.is_some());
        let patient: Vec<AttemptId> = patient.map(|(id, _)| *id).collect();
        patient.into_iter().for_each(|id| self.step(Event::WorkerAlive { id }));
    }

    /// The worker has said that an attempt is beyond receiving: everything is there, its models for all.
    fn note_received(&mut self, id: AttemptId, link: LinkId) {
        let delivered = self.sessions.get_mut(&id).map(Session::received).unwrap_or_default();
        self.note_models(link, delivered);
        self.look_at_upload(id);
        self.check_sent(id);
    }

    fn note_models(&mut self, link: LinkId, models: BTreeSet<Digest>) {
        if !models.is_empty() {
            models.into_iter().for_each(|model| self.links.delivered(link, model));
            self.open_patient();
        }
    }

    pub(super) fn reported(&mut self, happened: Happened) {
        match happened {
            Happened::Dialled { link, result } => match self.links.dialled(link, result) {
                Some((waiting, Ok(()))) => waiting.into_iter().for_each(|id| self.open(id, link)),
                Some((waiting, Err(error))) => {
                    for id in waiting {
                        // An attempt that was given up meanwhile has no session.
                        if self.sessions.contains_key(&id) {
                            self.step(Event::ConnectFailed { id, text: error.to_string() });
                        }
                    }
                }
                None => {}
            },
            Happened::Heard { link, heard } => match heard {
                Heard::Frame(frame) => self.worker_said(link, frame),
                Heard::Lost => self.link_broken(link),
                Heard::Connected => {}
            },
            Happened::DialInLate { id, wait } => {
                let is_waiting =
                    self.sessions.get(&id).is_some_and(|session| session.wait == wait && session.opening.is_some());
                if is_waiting {
                    let text = format!(
                        "the worker did not connect to {} within {} s: check that it can reach this address",
                        self.endpoints.join(" or "),
                        self.connect_wait.as_secs()
                    );
                    self.step(Event::ConnectFailed { id, text });
                }
            }
            Happened::UploadEnded { id, serial, result } => self.upload_ended(id, serial, result),
            Happened::Arrived { id, serial, arrival } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    let taken = session.arrived(serial, arrival);
                    self.taken(id, vec![taken]);
                }
            }
        }
    }

    /// libzmq would make the connection again by itself, but to the worker it would be a stranger's: a new one is made.
    fn link_broken(&mut self, link: LinkId) {
        self.links.drop_link(link);
        let on_it = self.sessions.iter_mut().filter(|(_, session)| session.link == Some(link));
        let broken: Vec<AttemptId> = on_it
            .map(|(id, session)| {
                session.unlink();
                *id
            })
            .collect();
        for id in broken {
            self.step(Event::LinkBroken { id });
        }
    }

    pub(super) fn tell_worker(&mut self, id: AttemptId, message: &ClientToWorker) {
        if let Some(link) = self.sessions.get(&id).and_then(|session| session.link) {
            match message {
                // The result is here, and whether its worker forgets it now or a moment later is all one.
                ClientToWorker::Release(_) => framed(message, |frame| self.links.send_later(link, frame)),
                _ => framed(message, |frame| self.links.send(link, frame)),
            }
        }
    }

    /// Something came in at the listener.
    pub(super) fn dialler_said(&mut self, received: Received) {
        let Received { peer, key, frame } = received;
        if let Some(link) = self.links.of_peer(peer) {
            return self.worker_said(link, frame);
        }
        // A connection nobody knows: a worker that was told to dial in, or one whose connection broke and was made again.
        let id = match WorkerToClient::from_frame(&frame) {
            Ok(WorkerToClient::DialIn(id) | WorkerToClient::Reopen(id)) => id,
            Ok(WorkerToClient::Progress(progress)) => progress.id,
            _ => return,
        };
        let Some(session) = self.sessions.get(&id) else { return };
        if session.grant.direction != Direction::WorkerDials || session.grant.worker_key != key {
            tracing::warn!(?id, "a stranger named an attempt of this client: ignored");
            return;
        }
        let worker = session.grant.worker;
        let Some((link, _)) = self.links.dialled_in(worker, peer) else { return };
        for session in self.sessions.values_mut().filter(|session| session.grant.worker == worker) {
            if session.opening.is_none() {
                session.unlink();
                session.opening = Some(Resume::Yes);
            }
        }
        let of_worker = |(id, session): (&AttemptId, &Session)| (session.grant.worker == worker).then_some(*id);
        let waiting: Vec<AttemptId> = self.sessions.iter().filter_map(of_worker).collect();
        waiting.into_iter().for_each(|id| self.open(id, link));
    }

    /// A frame on a link that is known to be the worker's.
    fn worker_said(&mut self, link: LinkId, frame: Frame) {
        let message = match WorkerToClient::from_frame(&frame) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "message of a worker dropped");
                return;
            }
        };
        let id = attempt_of(&message);
        // A worker speaks of its own attempts, on the link on which they are open; anything else is late or forged.
        let Some(session) = self.sessions.get_mut(&id).filter(|session| session.link == Some(link)) else { return };
        match message {
            WorkerToClient::Chunk(chunk) => {
                let taken = session.chunk(chunk, frame.payload);
                self.step(Event::WorkerAlive { id });
                self.taken(id, taken.unwrap_or_else(|error| vec![Taken::Broken(error.to_string())]));
            }
            WorkerToClient::Credit(credit) => {
                if let Some((sent_bytes, total_bytes)) = session.credit(credit) {
                    self.tell_user(id.task, News::Sending { sent_bytes, total_bytes });
                }
                self.step(Event::WorkerAlive { id });
                self.look_at_upload(id);
            }
            // It has dialled in, and the attempt is open: nothing new.
            WorkerToClient::DialIn(_) => {}
            WorkerToClient::Accept(accept) => {
                let Way::Up(_, outlet) = self.links.way(session.grant.worker, id) else { return };
                let sending = Sending { happened: &self.happened, link_bytes_per_s: self.links.bytes_per_s(link) };
                let accepted = session.accept(accept.clone(), &outlet, &sending);
                self.step(Event::WorkerSaid(WorkerToClient::Accept(accept)));
                match accepted {
                    Ok(has) => {
                        self.note_models(link, has);
                        self.look_at_upload(id);
                        self.check_sent(id);
                    }
                    Err(error) => self.send_failed(id, &error),
                }
            }
            message => {
                let is_received = match &message {
                    WorkerToClient::Progress(progress) => progress.phase != Phase::Receiving,
                    WorkerToClient::Result(_) => true,
                    _ => false,
                };
                if is_received {
                    self.note_received(id, link);
                }
                self.step(Event::WorkerSaid(message));
            }
        }
    }

    fn upload_ended(&mut self, id: AttemptId, serial: u64, result: UploadEnd) {
        if self.sessions.get_mut(&id).is_some_and(|session| session.is_upload_ended(serial)) {
            self.sent(id, result);
        }
    }

    /// An upload may have ended with what it was just told.
    fn look_at_upload(&mut self, id: AttemptId) {
        if let Some(end) = self.sessions.get_mut(&id).and_then(Session::take_upload_end) {
            self.sent(id, end);
        }
    }

    fn sent(&mut self, id: AttemptId, result: UploadEnd) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        match result {
            Ok(uploaded) => {
                tracing::debug!(?id, ?uploaded, "sent");
                session.sent_bytes += uploaded.wire_bytes;
                if let Some(link) = session.link {
                    self.links.measured(link, uploaded.link_bytes_per_s);
                }
                self.check_sent(id);
            }
            Err(error) => self.send_failed(id, &error),
        }
    }

    fn check_sent(&mut self, id: AttemptId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if !session.is_newly_sent() {
            return;
        }
        if let Some(live) = self.live.get_mut(&id.task) {
            live.sent = Some(Instant::now());
            live.sent_bytes = session.sent_bytes;
        }
        self.step(Event::Sent { id });
    }

    fn send_failed(&mut self, id: AttemptId, error: &UploadError) {
        let code = match error {
            UploadError::Stopped => return,
            UploadError::Read { .. } => ErrorCode::BadRequest,
            UploadError::Changed { .. } => ErrorCode::DigestMismatch,
            UploadError::Protocol(_) => ErrorCode::BadChunk,
        };
        self.step(Event::SendFailed { id, outcome: Outcome::failed(code, error.to_string()) });
    }

    pub(super) fn taken(&mut self, id: AttemptId, taken: Vec<Taken>) {
        for taken in taken {
            match taken {
                Taken::More => {}
                Taken::Credit(message) => self.tell_worker(id, &message),
                Taken::Broken(text) => self.step(Event::ResultBroken { id, text }),
                Taken::All(outputs) => {
                    if let Some(live) = self.live.get_mut(&id.task) {
                        live.outputs = outputs;
                    }
                    self.step(Event::ResultVerified { id });
                }
            }
        }
    }
}

fn framed(message: &ClientToWorker, send: impl FnOnce(Frame)) {
    match message.to_frame() {
        Ok(frame) => send(frame),
        Err(error) => tracing::warn!(%error, message = message.name(), "message not sent"),
    }
}

fn attempt_of(message: &WorkerToClient) -> AttemptId {
    match message {
        WorkerToClient::DialIn(id) | WorkerToClient::Reopen(id) => *id,
        WorkerToClient::Accept(accept) => accept.id,
        WorkerToClient::Refuse(refuse) => refuse.id,
        WorkerToClient::Credit(credit) => credit.id,
        WorkerToClient::Progress(progress) => progress.id,
        WorkerToClient::Result(result) => result.id,
        WorkerToClient::Chunk(chunk) => chunk.id,
    }
}
