//! Takes the blobs of one attempt in, on a thread of its own: the caller's task only checks and hands over.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use proto_msgs::{BlobIndex, Chunk, limits::CHUNK_BYTES_MAX};
use tokio::sync::mpsc;

use super::incoming::{Content, Incoming, IncomingError};

/// Credit is told when this part of the window has come in: often enough that the sender never waits for it.
const CREDITS_PER_WINDOW: u64 = 8;

/// Credit is told at least this often while something comes in: on a slow link the sender learns its speed by it.
const CREDIT_EVERY: Duration = Duration::from_millis(100);

/// Chunks that wait for the thread. Honest ones are larger than 4 KiB, so that this is more than a window of them.
const QUEUED_MAX: usize = 4096;

/// Things told that wait for the caller.
const ARRIVALS_MAX: usize = 64;

/// What the receiver of blobs is told.
#[derive(Debug)]
pub enum Arrival {
    /// Send this credit.
    Credit {
        /// Which blob.
        blob: BlobIndex,
        /// Bytes from its beginning that are in place.
        received_bytes: u64,
    },
    /// This blob is whole and verified. (Its last credit has been told.)
    Complete {
        /// Which blob.
        blob: BlobIndex,
        /// Where it is.
        content: Content,
    },
    /// It will not come in. Nothing more is told.
    Failed(IncomingError),
}

/// Takes blobs in, on a thread of its own. Dropping it stops the thread and removes files that are not complete.
#[derive(Debug)]
pub struct Intake {
    window_bytes: u64,
    progress: Arc<Mutex<HashMap<BlobIndex, Progress>>>,
    queued: Arc<AtomicUsize>,
    chunks: mpsc::UnboundedSender<Piece>,
}

/// How far a blob is.
#[derive(Clone, Copy, Debug)]
struct Progress {
    size_bytes: u64,
    /// Handed to the thread.
    pushed_bytes: u64,
    /// In place: the thread has written them.
    written_bytes: u64,
    /// Told to the peer, as credit or as need: it may send a window beyond.
    told_bytes: u64,
}

/// A chunk for the thread.
#[derive(Debug)]
struct Piece {
    chunk: Chunk,
    payload: Bytes,
    /// Bytes at its beginning that are here already.
    skip_bytes: usize,
}

impl Intake {
    /// Starts to take these blobs in. Empty blobs are complete at once. Must be called within a tokio runtime.
    pub fn start(blobs: Vec<Incoming>, window_bytes: u32) -> (Self, mpsc::Receiver<Arrival>) {
        let (chunks, pieces) = mpsc::unbounded_channel();
        let (told, arrivals) = mpsc::channel(ARRIVALS_MAX);
        let progress = blobs.iter().map(|incoming| {
            let size_bytes = incoming.size_bytes();
            (incoming.blob(), Progress { size_bytes, pushed_bytes: 0, written_bytes: 0, told_bytes: 0 })
        });
        let progress = Arc::new(Mutex::new(progress.collect()));
        let queued = Arc::new(AtomicUsize::new(0));
        let window_bytes = u64::from(window_bytes);
        let receiver = Receiver {
            blobs: blobs.into_iter().map(|incoming| (incoming.blob(), Open { incoming, credited_bytes: 0 })).collect(),
            credit_step_bytes: window_bytes / CREDITS_PER_WINDOW,
            credited_at: Instant::now(),
            progress: Arc::clone(&progress),
            queued: Arc::clone(&queued),
            told,
            inflated: Vec::new(),
        };
        tokio::task::spawn_blocking(move || receiver.run(pieces));
        (Self { window_bytes, progress, queued, chunks }, arrivals)
    }

    /// Hands over a chunk. Never blocks: at most a window of bytes waits for the thread. Bytes that are here already and
    /// blobs that nobody asked for are dropped: the peer may not know yet.
    ///
    /// # Errors
    /// If the peer left bytes out, sent more than announced, or more than the window.
    pub fn push(&self, chunk: Chunk, payload: Bytes) -> Result<(), IncomingError> {
        let broken = |reason: &str| IncomingError::Protocol { blob: chunk.blob, reason: reason.to_owned() };
        let len = chunk.inflated_bytes.map_or(payload.len(), |inflated| inflated as usize);
        if len == 0 || len > CHUNK_BYTES_MAX {
            return Err(broken("a chunk of no length or too great a one"));
        }
        let mut progress = lock(&self.progress);
        let under_way: u64 = progress.values().map(|blob| blob.pushed_bytes - blob.told_bytes).sum();
        let Some(blob) = progress.get_mut(&chunk.blob) else { return Ok(()) };
        let end = chunk.offset.checked_add(len as u64).filter(|end| *end <= blob.size_bytes);
        let end = end.ok_or_else(|| broken("more bytes than announced"))?;
        if end <= blob.pushed_bytes {
            return Ok(());
        }
        if chunk.offset > blob.pushed_bytes {
            return Err(broken("bytes are missing"));
        }
        if under_way + (end - blob.pushed_bytes) > self.window_bytes {
            return Err(broken("more bytes than the window"));
        }
        if self.queued.fetch_add(1, Ordering::Relaxed) >= QUEUED_MAX {
            return Err(broken("too many small chunks"));
        }
        let skip_bytes = (blob.pushed_bytes - chunk.offset) as usize;
        blob.pushed_bytes = end;
        // Fails only when the thread has ended with an error, which it has told.
        let _told_already = self.chunks.send(Piece { chunk, payload, skip_bytes });
        Ok(())
    }

    /// Whether everything before the chunk is here: [`Self::push`] takes no other.
    pub fn has_reached(&self, chunk: &Chunk) -> bool {
        lock(&self.progress).get(&chunk.blob).is_none_or(|blob| chunk.offset <= blob.pushed_bytes)
    }

    /// What is still needed and from where: the `needs` of an `Accept`. Bytes that wait for the thread are named again, and
    /// dropped when they come again: were they counted as here, each call would let one more window in behind them.
    pub fn needs(&self) -> Vec<(BlobIndex, u64)> {
        let mut progress = lock(&self.progress);
        let mut needs = Vec::new();
        for (blob, progress) in progress.iter_mut() {
            progress.told_bytes = progress.written_bytes;
            if progress.written_bytes < progress.size_bytes {
                needs.push((*blob, progress.written_bytes));
            }
        }
        needs.sort_unstable();
        needs
    }
}

/// The thread's side.
struct Receiver {
    blobs: HashMap<BlobIndex, Open>,
    credit_step_bytes: u64,
    credited_at: Instant,
    progress: Arc<Mutex<HashMap<BlobIndex, Progress>>>,
    queued: Arc<AtomicUsize>,
    told: mpsc::Sender<Arrival>,
    inflated: Vec<u8>,
}

/// A blob that is not complete.
struct Open {
    incoming: Incoming,
    credited_bytes: u64,
}

/// The caller listens no more.
struct Deaf;

impl Receiver {
    fn run(mut self, mut pieces: mpsc::UnboundedReceiver<Piece>) {
        let empty = self.blobs.iter().filter(|(_, open)| open.incoming.is_whole()).map(|(blob, _)| *blob);
        for blob in empty.collect::<Vec<_>>() {
            if self.complete(blob).is_err() {
                return;
            }
        }
        while let Some(piece) = pieces.blocking_recv() {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            let handled = match self.write(&piece) {
                Ok(()) => self.acknowledge(piece.chunk.blob),
                Err(error) => {
                    let _deaf_or_told = self.tell(Arrival::Failed(error));
                    return;
                }
            };
            if handled.is_err() {
                return;
            }
        }
    }

    fn write(&mut self, piece: &Piece) -> Result<(), IncomingError> {
        let Some(open) = self.blobs.get_mut(&piece.chunk.blob) else { return Ok(()) };
        let bytes = match piece.chunk.inflated_bytes {
            None => &piece.payload[..],
            Some(len) => {
                inflate(&piece.payload, len as usize, &mut self.inflated).map_err(|text| open.incoming.broken(text))?;
                &self.inflated
            }
        };
        open.incoming.write(&bytes[piece.skip_bytes..])?;
        if let Some(progress) = lock(&self.progress).get_mut(&piece.chunk.blob) {
            progress.written_bytes = open.incoming.written_bytes();
        }
        Ok(())
    }

    /// Tells what the chunk just written brought about.
    fn acknowledge(&mut self, blob: BlobIndex) -> Result<(), Deaf> {
        let Some(open) = self.blobs.get_mut(&blob) else { return Ok(()) };
        if open.incoming.is_whole() {
            return self.complete(blob);
        }
        let received_bytes = open.incoming.written_bytes();
        let enough = received_bytes - open.credited_bytes >= self.credit_step_bytes;
        if !enough && self.credited_at.elapsed() < CREDIT_EVERY {
            return Ok(());
        }
        open.credited_bytes = received_bytes;
        self.credit(blob, received_bytes)
    }

    fn credit(&mut self, blob: BlobIndex, received_bytes: u64) -> Result<(), Deaf> {
        if let Some(progress) = lock(&self.progress).get_mut(&blob) {
            progress.told_bytes = progress.told_bytes.max(received_bytes);
        }
        self.credited_at = Instant::now();
        self.tell(Arrival::Credit { blob, received_bytes })
    }

    fn complete(&mut self, blob: BlobIndex) -> Result<(), Deaf> {
        let Some(mut open) = self.blobs.remove(&blob) else { return Ok(()) };
        match open.incoming.finish() {
            Ok(content) => {
                self.credit(blob, open.incoming.size_bytes())?;
                self.tell(Arrival::Complete { blob, content })
            }
            Err(error) => {
                let _deaf_or_told = self.tell(Arrival::Failed(error));
                Err(Deaf)
            }
        }
    }

    fn tell(&self, arrival: Arrival) -> Result<(), Deaf> {
        self.told.blocking_send(arrival).map_err(|_| Deaf)
    }
}

/// The zstd frame `packed` into `plain`, which must come out `len` bytes long; never more is written.
fn inflate(packed: &[u8], len: usize, plain: &mut Vec<u8>) -> Result<(), String> {
    plain.resize(len, 0);
    match zstd::bulk::decompress_to_buffer(packed, plain.as_mut_slice()) {
        Ok(inflated) if inflated == len => Ok(()),
        Ok(inflated) => Err(format!("a chunk of {inflated} bytes announced as {len}")),
        Err(error) => Err(format!("a chunk that does not inflate to {len} bytes: {error}")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
