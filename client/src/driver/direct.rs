//! The driver's dealings with workers: connections made by either side, attempts opened on them, ends of transfers.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use mesh_core::client::Event;
use mesh_transport::{
    Heard, Received,
    blob::{IncomingError, UploadEnd, UploadError},
};
use proto_msgs::{
    AttemptId, ClientToWorker, DecodeError, Digest, Direction, ErrorCode, Frame, Grant, Outcome, Phase, TaskId,
    WorkerId, WorkerToClient,
};

use super::Driver;
use crate::{
    News,
    happened::{Happened, LinkId},
    links::Way,
    session::{Resume, Road, Session, Taken},
};

impl Driver {
    pub(super) fn connect(&mut self, grant: Box<Grant>, resume: Resume) {
        let (id, worker, direction) = (grant.id, grant.worker, grant.direction);
        let payload = self.live.get(&id.task).and_then(|live| live.payload.clone());
        let broken = match self.sessions.get_mut(&id) {
            Some(session) if resume == Resume::Yes => session.resume(grant),
            _ => {
                self.sessions.insert(id, Session::new(grant, payload, resume));
                None
            }
        };
        // The attempt's old link is useless now, unless another attempt on it has already replaced it.
        if let Some(link) = broken {
            self.links.drop_link(link);
        }
        match (self.links.way(worker, id), direction) {
            (Way::Up(link, _), _) => self.open(id, link),
            (Way::Coming, _) => {}
            (Way::None, Direction::ClientDials) => {
                let Some(session) = self.sessions.get(&id) else { return };
                self.links.dial(session.grant(), self.connect_wait);
            }
            (Way::None, Direction::WorkerDials) => self.wait_for_dial_in(id),
        }
    }

    fn wait_for_dial_in(&mut self, id: AttemptId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        self.waits += 1;
        session.wait_for_dial_in(self.waits);
        self.links.expect(session.grant().worker_key);
        let (wait, within, happened) = (self.waits, self.connect_wait, self.happened.clone());
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            let _ = happened.send(Happened::DialInLate { id, wait }).await;
        });
    }

    /// Opens an attempt on its worker's link: sends `Open` and starts the upload. If another attempt on the link is
    /// sending a model that this one needs, waits for it instead of sending the model twice.
    fn open(&mut self, id: AttemptId, link: LinkId) {
        let neighbours = self.sessions.values().filter(|other| other.link() == Some(link));
        let coming: BTreeSet<Digest> = neighbours.flat_map(Session::brings).copied().collect();
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(resume) = session.to_open() else { return };
        let Way::Up(_, outlet) = self.links.way(session.grant().worker, id) else { return };
        let is_coming = |model| coming.contains(&model) && !self.links.has_delivered(link, model);
        if resume == Resume::No && session.be_patient(is_coming) {
            return;
        }
        session.note_held(|model| self.links.has_delivered(link, model));
        framed(&session.open_message(resume), |frame| self.links.send(link, frame));
        let road = Road { outlet: &outlet, bytes_per_s: self.links.bytes_per_s(link), happened: &self.happened };
        let end = session.opened(link, resume, &road);
        self.upload_went_on(id, end);
    }

    fn patient(&self) -> Vec<(AttemptId, WorkerId)> {
        let patient = self.sessions.iter().filter(|(_, session)| session.is_patient());
        patient.map(|(id, session)| (*id, session.grant().worker)).collect()
    }

    /// Checks the attempts that wait for another attempt's model: it has arrived, or will not come.
    pub(super) fn open_patient(&mut self) {
        for (id, worker) in self.patient() {
            if let Way::Up(link, _) = self.links.way(worker, id) {
                self.open(id, link);
            }
        }
    }

    /// Checks the waiting attempts, and reports their worker alive as long as the link of the other attempt's transfer
    /// is up.
    pub(super) fn keep_patient_alive(&mut self) {
        self.open_patient();
        for (id, worker) in self.patient() {
            if let Way::Up(..) = self.links.way(worker, id) {
                self.step(Event::WorkerAlive { id });
            }
        }
    }

    /// Notes that an attempt is past receiving: the worker has all its blobs, and its models serve all attempts.
    fn note_received(&mut self, id: AttemptId, link: LinkId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let (delivered, end) = session.received();
        self.note_models(link, delivered);
        self.upload_went_on(id, end);
    }

    /// Corrects the time of arrival: how long the worker has had everything is more precise than when it said so.
    fn note_held(&mut self, task: TaskId, held_us: u64) {
        let sent = Instant::now().checked_sub(Duration::from_micros(held_us));
        if let (Some(live), Some(sent)) = (self.live.get_mut(&task), sent.filter(|_| held_us > 0)) {
            live.sent = live.placed.map(|placed| sent.max(placed));
        }
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
                Heard::Connected | Heard::Refused => {}
            },
            Happened::DialInLate { id, wait } => {
                if self.sessions.get(&id).is_some_and(|session| session.waits_for_dial_in(wait)) {
                    let text = format!(
                        "the worker did not connect to {} within {} s: check that it can reach this address",
                        self.endpoints.join(" or "),
                        self.connect_wait.as_secs()
                    );
                    self.step(Event::ConnectFailed { id, text });
                }
            }
            Happened::UploadEnded { id, serial, result } => {
                if self.sessions.get_mut(&id).is_some_and(|session| session.end_upload(serial)) {
                    self.upload_ended(id, result);
                }
            }
            Happened::Arrived { id, serial, arrival } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    let taken = session.arrived(serial, arrival);
                    self.taken(id, vec![taken]);
                }
            }
        }
    }

    /// Drops a broken link. libzmq would reconnect by itself, but as a stranger to the worker: a new link is made.
    fn link_broken(&mut self, link: LinkId) {
        self.links.drop_link(link);
        let on_it = self.sessions.iter_mut().filter(|(_, session)| session.link() == Some(link));
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
        if let Some(link) = self.sessions.get(&id).and_then(Session::link) {
            match message {
                // The result is here, so it does not matter if the worker forgets it a moment later.
                ClientToWorker::Release(_) => framed(message, |frame| self.links.send_later(link, frame)),
                _ => framed(message, |frame| self.links.send(link, frame)),
            }
        }
    }

    /// Handles a message that arrived at the listener.
    pub(super) fn dialler_said(&mut self, received: Received) {
        let Received { peer, key, frame } = received;
        if let Some(link) = self.links.of_peer(peer) {
            return self.worker_said(link, frame);
        }
        // An unknown connection: a worker that was told to dial in, or one that reconnected after a break.
        let id = match WorkerToClient::from_frame(&frame) {
            Ok(WorkerToClient::DialIn(id) | WorkerToClient::Reopen(id)) => id,
            Ok(WorkerToClient::Progress(progress)) => progress.id,
            _ => return,
        };
        let Some(session) = self.sessions.get(&id) else { return };
        let grant = session.grant();
        if grant.direction != Direction::WorkerDials || grant.worker_key != key {
            tracing::warn!(?id, "a stranger named an attempt of this client: ignored");
            return;
        }
        let worker = grant.worker;
        let Some((link, _)) = self.links.dialled_in(worker, peer) else { return };
        let of_worker = self.sessions.iter_mut().filter(|(_, session)| session.grant().worker == worker);
        let waiting: Vec<AttemptId> = of_worker
            .map(|(id, session)| {
                if session.to_open().is_none() {
                    session.reopen();
                }
                *id
            })
            .collect();
        waiting.into_iter().for_each(|id| self.open(id, link));
    }

    /// Handles a frame on a link that is known to be the worker's.
    fn worker_said(&mut self, link: LinkId, frame: Frame) {
        let message = match WorkerToClient::from_frame(&frame) {
            Ok(message) => message,
            Err(error @ (DecodeError::Version { .. } | DecodeError::Unsupported { .. })) => {
                return self.not_understood(link, &error);
            }
            Err(error) => {
                tracing::debug!(%error, "message of a worker dropped");
                return;
            }
        };
        let id = message.attempt();
        // A worker names only its own attempts, on the link on which they are open; anything else is late or forged.
        let Some(session) = self.sessions.get_mut(&id).filter(|session| session.link() == Some(link)) else { return };
        match message {
            WorkerToClient::Chunk(chunk) => {
                let taken = session.chunk(chunk, frame.payload);
                self.step(Event::WorkerAlive { id });
                self.taken(id, taken.unwrap_or_else(|error| vec![Taken::Broken(error)]));
            }
            WorkerToClient::Credit(credit) => {
                let (progress, end) = session.credit(credit);
                if let Some((sent_bytes, total_bytes)) = progress {
                    self.tell_user(id.task, News::Sending { sent_bytes, total_bytes });
                }
                self.step(Event::WorkerAlive { id });
                self.upload_went_on(id, end);
            }
            // The worker has dialled in and the attempt is open: nothing new.
            WorkerToClient::DialIn(_) => {}
            WorkerToClient::Accept(accept) => {
                let Way::Up(_, outlet) = self.links.way(session.grant().worker, id) else { return };
                let road =
                    Road { outlet: &outlet, bytes_per_s: self.links.bytes_per_s(link), happened: &self.happened };
                let (has, end) = session.accepted(&accept, &road);
                self.step(Event::WorkerSaid(WorkerToClient::Accept(accept)));
                self.note_models(link, has);
                self.upload_went_on(id, end);
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
                if let WorkerToClient::Result(result) = &message {
                    self.note_held(id.task, result.held_us);
                }
                self.step(Event::WorkerSaid(message));
            }
        }
    }

    /// Fails the link's attempts: the worker speaks another protocol version, another worker may not.
    fn not_understood(&mut self, link: LinkId, error: &DecodeError) {
        let on_it = self.sessions.iter().filter(|(_, session)| session.link() == Some(link));
        let failed: Vec<AttemptId> = on_it.map(|(id, _)| *id).collect();
        for id in failed {
            self.step(Event::ConnectFailed { id, text: format!("the worker is of another version: {error}") });
        }
    }

    /// Handles a message to an upload: it may have ended the upload, or completed what the worker needs.
    fn upload_went_on(&mut self, id: AttemptId, end: Option<UploadEnd>) {
        match end {
            Some(end) => self.upload_ended(id, end),
            None => self.check_sent(id),
        }
    }

    fn upload_ended(&mut self, id: AttemptId, end: UploadEnd) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        match end {
            Ok(uploaded) => {
                tracing::debug!(?id, ?uploaded, "sent");
                session.uploaded(&uploaded);
                if let Some(link) = session.link() {
                    self.links.measured(link, uploaded.link_bytes_per_s);
                }
                self.check_sent(id);
            }
            Err(error) => self.send_failed(id, &error),
        }
    }

    fn check_sent(&mut self, id: AttemptId) {
        let Some(sent_bytes) = self.sessions.get_mut(&id).and_then(Session::newly_sent) else { return };
        if let Some(live) = self.live.get_mut(&id.task) {
            live.sent = Some(Instant::now());
            live.sent_bytes = sent_bytes;
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
                Taken::Broken(error) => self.step(Event::ResultBroken { id, outcome: broken(&error) }),
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

/// The outcome when outputs did not arrive, by cause: the worker or the network, or this machine.
fn broken(error: &IncomingError) -> Outcome {
    match error {
        IncomingError::DiskFull { .. } | IncomingError::Write { .. } => {
            let text = format!("the result cannot be kept: {error}; see to the state folder's disk and submit again");
            Outcome::failed(ErrorCode::ResultNotKept, text)
        }
        IncomingError::DigestMismatch { .. } | IncomingError::Protocol { .. } => {
            Outcome::failed(ErrorCode::BadChunk, error.to_string())
        }
    }
}

fn framed(message: &ClientToWorker, send: impl FnOnce(Frame)) {
    match message.to_frame() {
        Ok(frame) => send(frame),
        Err(error) => tracing::warn!(%error, message = message.name(), "message not sent"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_worker_mends_what_arrived_damaged_and_not_a_full_disk_here() {
        let blob = 1;
        let damaged = IncomingError::DigestMismatch { blob, announced: Digest::of(b"a"), arrived: Digest::of(b"b") };
        assert!(broken(&damaged).is_retryable());
        let full = broken(&IncomingError::DiskFull { path: "spool/1".into() });
        let Outcome::Failed(failure) = &full else { panic!("{full:?}") };
        assert!(!full.is_retryable());
        assert_eq!(failure.code, ErrorCode::ResultNotKept);
        assert!(failure.text.contains("spool/1"), "{failure}");
    }
}
