//! Owns the driving of an [`Outgoing`]: reads, sends, listens for feedback, until the peer has everything.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use proto_msgs::BlobIndex;
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, error::TrySendError},
    task::AbortHandle,
    time::timeout,
};

use super::{
    outgoing::{Next, Outgoing, Ready, Uploaded},
    pool::Pool,
    source::UploadError,
};
use crate::{Outlet, SendError};

/// Feedback that may wait for an upload's thread. A window is 64 to 1024 chunks, and each is acknowledged at most once,
/// so a peer that sends more floods.
const FEEDBACK_MAX: usize = 4096;

/// What the peer or the link reports to an upload.
#[derive(Clone, Debug)]
pub enum Feedback {
    /// The peer has these bytes of a blob.
    Credit {
        /// The blob.
        blob: BlobIndex,
        /// Bytes in place, from the blob's beginning.
        received_bytes: u64,
    },
    /// The peer's `Accept`: exactly these blobs are needed, each from this byte on.
    Needs {
        /// Blob and offset.
        blobs: Vec<(BlobIndex, u64)>,
        /// The peer's window.
        window_bytes: u32,
    },
    /// The link broke: nothing is sent until [`Feedback::Relinked`].
    Unlinked,
    /// There is a new link; `Needs` follows before anything is sent on it.
    Relinked(Outlet),
}

/// The end of an upload: the peer acknowledged every byte, or an error. A lost link is no end.
pub type UploadEnd = Result<Uploaded, UploadError>;

/// An upload under way. Dropping it stops the upload.
///
/// ```text
///   start ── little, in memory ──► Light ──► Ended
///   start ── files, or much ──► Thread ──► Ended
///   Light ── the peer's queue is full ──► Thread
/// ```
#[derive(Debug)]
pub struct Uploading(State);

#[derive(Debug)]
enum State {
    /// Small and in memory: sent by the caller that passes feedback on, because waking a thread costs more.
    Light(Box<Upload>, WhenEnded),
    /// Read, compressed and sent by a thread.
    Thread { feedback: mpsc::Sender<Feedback>, task: AbortHandle, stalled: Arc<AtomicBool> },
    /// The upload is over, or given up.
    Ended,
}

/// What to do when an upload in a thread ends.
struct WhenEnded(Box<dyn FnOnce(UploadEnd) -> Ending + Send + Sync>);

type Ending = Pin<Box<dyn Future<Output = ()> + Send>>;

impl fmt::Debug for WhenEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WhenEnded")
    }
}

impl Uploading {
    /// Starts to send. Returns `Some` if the upload has already ended. The end of an upload in a thread is handed to
    /// `ended`, any other end is returned by [`Self::tell`]. Must be called within a tokio runtime.
    pub fn start<F: Future<Output = ()> + Send + 'static>(
        outgoing: Outgoing,
        outlet: Outlet,
        ended: impl FnOnce(UploadEnd) -> F + Send + Sync + 'static,
    ) -> (Self, Option<UploadEnd>) {
        let upload = Box::new(Upload { outgoing, outlet: Some(outlet) });
        let ended = WhenEnded(Box::new(|end| Box::pin(ended(end))));
        let mut uploading = if upload.outgoing.is_light() {
            Self(State::Light(upload, ended))
        } else {
            Self(State::in_a_thread(upload, ended))
        };
        let end = uploading.advance();
        (uploading, end)
    }

    /// Passes feedback on. Returns `Some` if the upload ends. A peer that floods is given up; the link's silence will
    /// show it.
    pub fn tell(&mut self, told: Feedback) -> Option<UploadEnd> {
        match &mut self.0 {
            State::Light(upload, _) => match upload.note(told) {
                Ok(()) => self.advance(),
                Err(error) => self.end(Err(error)),
            },
            State::Thread { feedback, .. } => match feedback.try_send(told) {
                Err(TrySendError::Full(_)) => self.end(Err(UploadError::Stopped)),
                // A thread that has ended has reported its end.
                Ok(()) | Err(TrySendError::Closed(_)) => None,
            },
            State::Ended => None,
        }
    }

    /// Whether the upload was given up because the peer acknowledged nothing for too long: [`Outgoing::patience`].
    pub fn has_stalled(&self) -> bool {
        matches!(&self.0, State::Thread { stalled, .. } if stalled.load(Ordering::Relaxed))
    }

    fn advance(&mut self) -> Option<UploadEnd> {
        let State::Light(upload, _) = &mut self.0 else { return None };
        match upload.advance() {
            Ok(Advance::Waits) => None,
            Ok(Advance::Done) => {
                let report = upload.outgoing.report();
                self.end(Ok(report))
            }
            Ok(Advance::Blocked) => {
                if let State::Light(upload, ended) = std::mem::replace(&mut self.0, State::Ended) {
                    self.0 = State::in_a_thread(upload, ended);
                }
                None
            }
            Err(error) => self.end(Err(error)),
        }
    }

    fn end(&mut self, end: UploadEnd) -> Option<UploadEnd> {
        // This drops the upload, which stops it.
        *self = Self(State::Ended);
        Some(end)
    }
}

impl State {
    fn in_a_thread(upload: Box<Upload>, ended: WhenEnded) -> Self {
        let (feedback, inbox) = mpsc::channel(FEEDBACK_MAX);
        let (runtime, stalled) = (Handle::current(), Arc::new(AtomicBool::new(false)));
        let threaded = Threaded::new(*upload, inbox, stalled.clone());
        let task = tokio::spawn(async move {
            let thread = tokio::task::spawn_blocking(move || runtime.block_on(threaded.run()));
            (ended.0)(thread.await.unwrap_or(Err(UploadError::Stopped))).await;
        });
        Self::Thread { feedback, task: task.abort_handle(), stalled }
    }
}

impl Drop for Uploading {
    fn drop(&mut self) {
        if let State::Thread { task, .. } = &self.0 {
            task.abort();
        }
    }
}

/// Progress of a light upload.
enum Advance {
    /// The peer has everything.
    Done,
    /// The upload waits for the peer.
    Waits,
    /// The peer's queue is full.
    Blocked,
}

#[derive(Debug)]
struct Upload {
    outgoing: Outgoing,
    /// `None` while the link is broken.
    outlet: Option<Outlet>,
}

impl Upload {
    /// Sends what the window allows, all of it from memory, without waiting.
    fn advance(&mut self) -> Result<Advance, UploadError> {
        if let (Some(first), Some(outlet)) = (&self.outgoing.first, &self.outlet) {
            match outlet.try_send(first.clone()) {
                Ok(()) => self.outgoing.first = None,
                Err(SendError::Full) => return Ok(Advance::Blocked),
                Err(SendError::Gone) => self.unlink(),
            }
        }
        while let (Some(next), Some(outlet)) = (self.outgoing.next(), &self.outlet) {
            let Some(payload) = self.outgoing.slice(next) else { return Ok(Advance::Blocked) };
            let ready = self.outgoing.ready(next, payload, None)?;
            match outlet.try_send(ready.frame.clone()) {
                Ok(()) => self.outgoing.sent(&ready, Instant::now()),
                Err(SendError::Full) => return Ok(Advance::Blocked),
                Err(SendError::Gone) => self.unlink(),
            }
        }
        Ok(if self.outgoing.is_done() { Advance::Done } else { Advance::Waits })
    }

    fn note(&mut self, feedback: Feedback) -> Result<(), UploadError> {
        match feedback {
            Feedback::Credit { blob, received_bytes } => self.outgoing.credit(blob, received_bytes, Instant::now()),
            Feedback::Needs { blobs, window_bytes } => self.outgoing.needs(&blobs, window_bytes),
            Feedback::Unlinked => {
                self.unlink();
                Ok(())
            }
            Feedback::Relinked(outlet) => {
                self.unlink();
                self.outlet = Some(outlet);
                Ok(())
            }
        }
    }

    fn unlink(&mut self) {
        self.outlet = None;
        self.outgoing.link_broke();
    }
}

/// An upload with its own thread.
struct Threaded {
    upload: Upload,
    feedback: mpsc::Receiver<Feedback>,
    pool: Pool,
    /// The chunk before compression.
    plain: Vec<u8>,
    /// Set when the upload is given up because the peer acknowledges nothing.
    stalled: Arc<AtomicBool>,
}

impl Threaded {
    fn new(upload: Upload, feedback: mpsc::Receiver<Feedback>, stalled: Arc<AtomicBool>) -> Self {
        Self { upload, feedback, pool: Pool::new(), plain: Vec::new(), stalled }
    }

    async fn run(mut self) -> UploadEnd {
        let patience = self.upload.outgoing.patience;
        loop {
            let acked_bytes = self.acked_bytes();
            match timeout(patience, self.send_until_acked(acked_bytes)).await {
                Ok(Ok(true)) => return Ok(self.upload.outgoing.report()),
                Ok(Err(error)) => return Err(error),
                Err(_) if self.acked_bytes() == acked_bytes => {
                    self.stalled.store(true, Ordering::Relaxed);
                    return Err(UploadError::Stopped);
                }
                // A chunk that was on its way to the link is read again.
                Ok(Ok(false)) | Err(_) => {}
            }
        }
    }

    fn acked_bytes(&self) -> u64 {
        self.upload.outgoing.report().blob_bytes
    }

    /// Sends until the peer has acknowledged more than these bytes. Returns whether it has everything.
    async fn send_until_acked(&mut self, acked_bytes: u64) -> Result<bool, UploadError> {
        self.send_first().await?;
        loop {
            while let Ok(feedback) = self.feedback.try_recv() {
                self.upload.note(feedback)?;
            }
            if self.upload.outgoing.is_done() {
                return Ok(true);
            }
            if self.acked_bytes() > acked_bytes {
                return Ok(false);
            }
            match self.upload.outgoing.next() {
                Some(next) if self.upload.outlet.is_some() => {
                    if let Some(ready) = self.prepare(next).await? {
                        self.send(ready).await?;
                    }
                }
                _ => self.listen().await?,
            }
        }
    }

    /// Sends the message before all chunks. If the link breaks first, the message is dropped.
    async fn send_first(&mut self) -> Result<(), UploadError> {
        while let (Some(first), Some(outlet)) = (self.upload.outgoing.first.clone(), self.upload.outlet.clone()) {
            tokio::select! {
                biased;
                sent = outlet.send(first) => match sent {
                    Ok(()) => self.upload.outgoing.first = None,
                    Err(_) => self.upload.unlink(),
                },
                feedback = self.feedback.recv() => self.upload.note(feedback.ok_or(UploadError::Stopped)?)?,
            }
        }
        Ok(())
    }

    /// Reads the chunk; `None` if feedback came first.
    async fn prepare(&mut self, next: Next) -> Result<Option<Ready>, UploadError> {
        self.upload.outgoing.decide(next)?;
        if let Some(payload) = self.upload.outgoing.slice(next) {
            return self.upload.outgoing.ready(next, payload, None).map(Some);
        }
        let buffer = tokio::select! {
            biased;
            buffer = self.pool.take() => buffer,
            feedback = self.feedback.recv() => {
                self.upload.note(feedback.ok_or(UploadError::Stopped)?)?;
                return Ok(None);
            }
        };
        self.upload.outgoing.read(next, buffer, &mut self.plain).map(Some)
    }

    /// Sends a chunk. If the link breaks first, the chunk will be read again.
    async fn send(&mut self, ready: Ready) -> Result<(), UploadError> {
        while let Some(outlet) = self.upload.outlet.clone() {
            if self.upload.outgoing.waits_for_needs {
                return Ok(());
            }
            tokio::select! {
                biased;
                sent = outlet.send(ready.frame.clone()) => {
                    match sent {
                        Ok(()) => self.upload.outgoing.sent(&ready, Instant::now()),
                        Err(_) => self.upload.unlink(),
                    }
                    return Ok(());
                }
                feedback = self.feedback.recv() => self.upload.note(feedback.ok_or(UploadError::Stopped)?)?,
            }
        }
        Ok(())
    }

    async fn listen(&mut self) -> Result<(), UploadError> {
        let feedback = self.feedback.recv().await.ok_or(UploadError::Stopped)?;
        self.upload.note(feedback)
    }
}
