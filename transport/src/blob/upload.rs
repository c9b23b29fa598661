//! Drives [`Outgoing`]: reads, sends, listens for feedback, until the peer has everything.

use std::time::Instant;

use proto_msgs::BlobIndex;
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    outgoing::{Next, Outgoing, Ready, Uploaded},
    pool::Pool,
    source::UploadError,
};
use crate::Outlet;

/// What the sender of blobs hears.
#[derive(Clone, Debug)]
pub enum Feedback {
    /// The peer has this much of a blob.
    Credit {
        /// Which blob.
        blob: BlobIndex,
        /// Bytes from its beginning that are in place.
        received_bytes: u64,
    },
    /// `Accept`: exactly these blobs are needed, each from this byte on.
    Needs {
        /// Blob and offset.
        blobs: Vec<(BlobIndex, u64)>,
        /// The peer's window.
        window_bytes: u32,
    },
    /// The link broke: send nothing until [`Feedback::Relinked`].
    Unlinked,
    /// A new link; `Needs` follows before anything is sent on it.
    Relinked(Outlet),
}

/// Sends the blobs until the peer has acknowledged every byte. Reads files in a blocking thread of its own. Ends early
/// only with an error; a lost link is waited for.
///
/// # Errors
/// See [`UploadError`].
pub async fn upload(
    outgoing: Outgoing,
    outlet: Outlet,
    feedback: mpsc::Receiver<Feedback>,
) -> Result<Uploaded, UploadError> {
    let upload = Upload { outgoing, outlet: Some(outlet), feedback, pool: Pool::new(), plain: Vec::new() };
    let runtime = Handle::current();
    let thread = tokio::task::spawn_blocking(move || runtime.block_on(upload.run()));
    thread.await.unwrap_or(Err(UploadError::Stopped))
}

struct Upload {
    outgoing: Outgoing,
    /// `None` while the link is broken.
    outlet: Option<Outlet>,
    feedback: mpsc::Receiver<Feedback>,
    pool: Pool,
    /// The chunk before it is compressed.
    plain: Vec<u8>,
}

impl Upload {
    async fn run(mut self) -> Result<Uploaded, UploadError> {
        loop {
            while let Ok(feedback) = self.feedback.try_recv() {
                self.note(feedback)?;
            }
            if self.outgoing.is_done() {
                return Ok(self.outgoing.report());
            }
            match self.outgoing.next() {
                Some(next) if self.outlet.is_some() => {
                    if let Some(ready) = self.prepare(next).await? {
                        self.send(ready).await?;
                    }
                }
                _ => {
                    let feedback = self.feedback.recv().await.ok_or(UploadError::Stopped)?;
                    self.note(feedback)?;
                }
            }
        }
    }

    /// The chunk, read; `None` if feedback came first.
    async fn prepare(&mut self, next: Next) -> Result<Option<Ready>, UploadError> {
        self.outgoing.decide(next)?;
        if let Some(payload) = self.outgoing.slice(next) {
            return self.outgoing.ready(next, payload, None).map(Some);
        }
        let buffer = tokio::select! {
            biased;
            buffer = self.pool.take() => buffer,
            feedback = self.feedback.recv() => {
                self.note(feedback.ok_or(UploadError::Stopped)?)?;
                return Ok(None);
            }
        };
        self.outgoing.read(next, buffer, &mut self.plain).map(Some)
    }

    /// Sends a chunk, unless the link breaks first; then it will be read again.
    async fn send(&mut self, ready: Ready) -> Result<(), UploadError> {
        while let Some(outlet) = self.outlet.clone() {
            if self.outgoing.waits_for_needs {
                return Ok(());
            }
            tokio::select! {
                biased;
                sent = outlet.send(ready.frame.clone()) => {
                    match sent {
                        Ok(()) => self.outgoing.sent(&ready, Instant::now()),
                        Err(_) => self.unlink(),
                    }
                    return Ok(());
                }
                feedback = self.feedback.recv() => self.note(feedback.ok_or(UploadError::Stopped)?)?,
            }
        }
        Ok(())
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
