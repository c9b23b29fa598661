//! Messages from clients. Nothing in them is trusted; everything unexpected has an answer.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_core::worker::{Event, LinkId};
use mesh_transport::blob::Feedback;
use proto_msgs::{
    AttemptId, Chunk, ClientToWorker, Credit, DecodeError, Frame, Open, WorkerToClient,
    limits::{ACTIVE_ATTEMPTS_MAX, WINDOW_BYTES},
};
use tracing::debug;

use super::{
    Desk,
    attempt::{Attempt, Chunks, note_sent},
};

/// Interval at which a client's chunks are reported to the machine as a sign of life, instead of with each chunk.
const ALIVE_EVERY: Duration = Duration::from_millis(500);

/// Attempts whose data may wait for the machine's check of their ticket, which takes microseconds: as many as it
/// accepts.
const EARLY_ATTEMPTS_MAX: usize = ACTIVE_ATTEMPTS_MAX;

/// Time after which the machine will no longer answer for a ticket: its refusal found no place in a queue.
const EARLY_LASTS: Duration = Duration::from_secs(10);

/// Early bytes of all attempts. Dropped chunks are asked for again.
const EARLY_BYTES_MAX: usize = 4 * WINDOW_BYTES as usize;

/// Bytes, over all attempts, that wait for room. An attempt may wait long for a model that another client sends; the
/// bytes of that model that its own client sent meanwhile are useless. Dropped chunks are asked for again.
const PREPARING_BYTES_MAX: usize = 4 * WINDOW_BYTES as usize;

/// Data that arrived right after an `Open`, before the machine accepted it. Kept per link, so a forged `Open` in
/// another client's name does that client no harm.
#[derive(Default)]
pub(super) struct Early {
    attempts: HashMap<(AttemptId, LinkId), Waiting>,
    bytes: usize,
}

struct Waiting {
    since: Instant,
    chunks: Chunks,
}

impl Early {
    fn expect(&mut self, now: Instant, id: AttemptId, link: LinkId) {
        self.forget(id, link);
        self.keep(|_, waiting| now < waiting.since + EARLY_LASTS);
        if self.attempts.len() < EARLY_ATTEMPTS_MAX {
            self.attempts.insert((id, link), Waiting { since: now, chunks: Chunks::default() });
        }
    }

    fn keep(&mut self, is_kept: impl Fn(AttemptId, &Waiting) -> bool) {
        self.attempts.retain(|(id, _), waiting| is_kept(*id, waiting));
        self.bytes = self.attempts.values().map(|waiting| waiting.chunks.size_bytes()).sum();
    }

    /// Keeps the chunk if its attempt was opened on this link; returns whether it was.
    fn push(&mut self, link: LinkId, chunk: Chunk, payload: &Bytes) -> bool {
        let Some(Waiting { chunks, .. }) = self.attempts.get_mut(&(chunk.id, link)) else { return false };
        let before_bytes = chunks.size_bytes();
        if self.bytes + payload.len() > EARLY_BYTES_MAX || chunks.push(chunk, payload.clone()).is_err() {
            chunks.cut();
        }
        self.bytes += chunks.size_bytes() - before_bytes;
        true
    }

    /// Takes the chunks of an attempt that was accepted.
    pub(super) fn take(&mut self, id: AttemptId, link: LinkId) -> Chunks {
        let chunks = self.attempts.remove(&(id, link)).map(|waiting| waiting.chunks).unwrap_or_default();
        self.bytes -= chunks.size_bytes();
        chunks
    }

    /// Drops the chunks of an attempt that was refused.
    pub(super) fn forget(&mut self, id: AttemptId, link: LinkId) {
        drop(self.take(id, link));
    }

    /// Drops the chunks of an attempt that is over, on all links.
    pub(super) fn forget_attempt(&mut self, id: AttemptId) {
        self.keep(|of, _| of != id);
    }
}

impl Desk {
    /// Handles one frame from a client.
    pub(super) async fn frame(&mut self, link: LinkId, frame: Frame) {
        match ClientToWorker::from_frame(&frame) {
            Ok(ClientToWorker::Open(open)) => self.open(link, open).await,
            Ok(ClientToWorker::Chunk(chunk)) => self.chunk(link, chunk, frame.payload).await,
            Ok(ClientToWorker::Credit(credit)) => self.credit(link, credit).await,
            Ok(ClientToWorker::Release(id)) => self.tell_machine(Event::Released { id, link }).await,
            Ok(ClientToWorker::Abort(id)) => self.tell_machine(Event::Aborted { id, link }).await,
            Ok(ClientToWorker::Alive(id)) => self.tell_machine(Event::ClientAlive { id, link }).await,
            Err(DecodeError::Version { theirs }) => {
                debug!(theirs, "a client of another version");
                self.unsupported(link);
            }
            // Not a warning: a stranger could fill the disk with warnings.
            Err(error) => debug!(%error, "a client sent what is no message: dropped"),
        }
    }

    async fn open(&mut self, link: LinkId, open: Open) {
        let id = open.ticket.body.attempt_id();
        if open.manifest.is_some() && !open.resume && !self.attempts.contains_key(&id) {
            self.early.expect(Instant::now(), id, link);
        }
        if let Some(attempt) = self.attempts.get_mut(&id) {
            attempt.note_arrived(link, open.outputs_here.clone());
        }
        let key = self.links.key(link);
        self.tell_machine(Event::Opened { link, key, open: Box::new(open) }).await;
    }

    async fn chunk(&mut self, link: LinkId, chunk: Chunk, payload: Bytes) {
        let id = chunk.id;
        let is_full = self.is_full_with(id, payload.len());
        match self.attempts.get_mut(&id) {
            Some(attempt) if attempt.link == link => {
                if is_full {
                    attempt.cut_early();
                }
                let pushed = attempt.push(chunk, payload);
                self.pushed(id, pushed);
                self.alive(id, link).await;
            }
            _ if self.early.push(link, chunk, &payload) => {}
            // The attempt is unknown, or the client reconnected in silence.
            _ => self.tell_client(link, &WorkerToClient::Reopen(id)),
        }
    }

    /// Whether the attempt waits for room, and `more_bytes` would exceed the limit over all attempts that wait.
    fn is_full_with(&self, id: AttemptId, more_bytes: usize) -> bool {
        self.attempts.get(&id).is_some_and(|attempt| attempt.early().is_some()) && {
            let waiting = self.attempts.values().filter_map(Attempt::early);
            waiting.map(Chunks::size_bytes).sum::<usize>() + more_bytes > PREPARING_BYTES_MAX
        }
    }

    async fn credit(&mut self, link: LinkId, credit: Credit) {
        let Credit { id, blob, received_bytes } = credit;
        let Some(attempt) = self.attempts.get_mut(&id).filter(|attempt| attempt.link == link) else { return };
        if attempt.upload.take_if(|upload| upload.has_stalled()).is_some() {
            // The client goes on after all: it opens again, and says how much it has.
            self.tell_client(link, &WorkerToClient::Reopen(id));
        } else if let Some(upload) = &mut attempt.upload
            && let Some(end) = upload.tell(Feedback::Credit { blob, received_bytes })
        {
            attempt.upload = None;
            let client = attempt.order.ticket.body.client;
            note_sent((id, client), end, &self.tools);
        }
        self.alive(id, link).await;
    }

    async fn alive(&mut self, id: AttemptId, link: LinkId) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        if attempt.alive_told.is_none_or(|told| told.elapsed() >= ALIVE_EVERY) {
            attempt.alive_told = Some(Instant::now());
            self.tell_machine(Event::ClientAlive { id, link }).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use proto_msgs::TaskId;

    use super::*;

    const LINK: LinkId = LinkId(1);

    fn id(number: u8) -> AttemptId {
        AttemptId { task: TaskId::from_bytes([number; 16]), attempt: proto_msgs::Attempt(1) }
    }

    fn now() -> Instant {
        Instant::now()
    }

    fn chunk(number: u8, offset: u64) -> Chunk {
        Chunk { id: id(number), blob: 1, offset, inflated_bytes: None }
    }

    #[test]
    fn data_right_behind_an_opening_waits_for_it() {
        let mut early = Early::default();
        let payload = Bytes::from_static(b"data");
        assert!(!early.push(LINK, chunk(1, 0), &payload), "nobody has opened");
        early.expect(now(), id(1), LINK);
        assert!(early.push(LINK, chunk(1, 0), &payload));
        assert!(!early.push(LinkId(2), chunk(1, 4), &payload), "opened on another link");
        assert_eq!(early.take(id(1), LINK).size_bytes(), 4);
        assert_eq!((early.bytes, early.take(id(1), LINK).size_bytes()), (0, 0));
    }

    #[test]
    fn openings_that_are_never_answered_for_make_way_after_a_while() {
        let mut early = Early::default();
        let (begun, payload) = (now(), Bytes::from_static(b"data"));
        for number in 0..EARLY_ATTEMPTS_MAX as u8 {
            early.expect(begun, id(number), LINK);
            early.push(LINK, chunk(number, 0), &payload);
        }
        early.expect(begun + EARLY_LASTS / 2, id(200), LINK);
        assert!(!early.push(LINK, chunk(200, 0), &payload), "all places are taken");
        early.expect(begun + EARLY_LASTS, id(201), LINK);
        assert!(early.push(LINK, chunk(201, 0), &payload));
        assert_eq!((early.attempts.len(), early.bytes), (1, 4));
    }

    #[test]
    fn openings_that_lead_to_nothing_cost_no_memory() {
        let mut early = Early::default();
        let window = Bytes::from(vec![0; WINDOW_BYTES as usize]);
        for number in 0..=u8::MAX {
            early.expect(now(), id(number), LINK);
            early.push(LINK, chunk(number, 0), &window);
        }
        assert_eq!((early.attempts.len(), early.bytes), (EARLY_ATTEMPTS_MAX, EARLY_BYTES_MAX));
        (0..=u8::MAX).for_each(|number| early.forget(id(number), LINK));
        assert_eq!((early.attempts.len(), early.bytes), (0, 0));
    }

    #[test]
    fn behind_dropped_data_nothing_is_kept() {
        let mut early = Early::default();
        (1..=6).for_each(|number| early.expect(now(), id(number), LINK));
        let window = Bytes::from(vec![0; WINDOW_BYTES as usize]);
        for number in 1..=3 {
            early.push(LINK, chunk(number, 0), &window);
        }
        early.push(LINK, chunk(4, 0), &window.slice(1..));
        early.push(LINK, chunk(5, 0), &window);
        early.push(LINK, chunk(5, window.len() as u64), &window.slice(..1));
        assert_eq!((early.bytes, early.take(id(5), LINK).size_bytes()), (EARLY_BYTES_MAX - 1, 0));
        early.push(LINK, chunk(6, 0), &window.slice(..1));
        assert_eq!(early.take(id(6), LINK).size_bytes(), 1, "there was room for one byte");
    }

    #[test]
    fn a_forged_opening_leaves_the_data_of_the_true_one_alone() {
        let (mut early, forger) = (Early::default(), LinkId(2));
        let payload = Bytes::from_static(b"data");
        early.expect(now(), id(1), LINK);
        early.push(LINK, chunk(1, 0), &payload);
        early.expect(now(), id(1), forger);
        early.forget(id(1), forger);
        assert!(!early.push(forger, chunk(1, 4), &payload), "refused");
        assert_eq!(early.take(id(1), LINK).size_bytes(), 4);
    }
}
