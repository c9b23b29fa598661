//! Owns the intake of one attempt's blobs on its own thread: the caller's task only checks chunks and hands them over.
//! If the blobs are small and go to memory, the caller takes them in itself, since waking a thread costs more than
//! hashing them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use proto_msgs::{BlobIndex, Chunk, limits::CHUNK_BYTES_MAX};
use tokio::sync::mpsc;

use super::{
    incoming::{Content, Incoming, IncomingError},
    outgoing::LIGHT_BYTES_MAX,
};

/// Credits per window: often enough that the sender never waits for one.
const CREDITS_PER_WINDOW: u64 = 8;

/// A credit is due at least this often while data arrives, and when all arrived data is in place. The sender learns the
/// link's speed from credits, and keeps less than a window under way if that is enough.
const CREDIT_EVERY: Duration = Duration::from_millis(100);

/// Chunks that may wait for the thread. Honest chunks are larger than 4 KiB, so this is more than a window of them.
const QUEUED_MAX: usize = 4096;

/// Credits that may wait for the caller.
const ARRIVALS_MAX: usize = 64;

/// Arrivals at the end of a blob: its last credit, and its completion or failure.
const ENDS_OF_A_BLOB: usize = 2;

/// An event for the receiver of blobs.
#[derive(Debug)]
pub enum Arrival {
    /// Send this credit to the peer.
    Credit {
        /// The blob.
        blob: BlobIndex,
        /// Bytes in place, from the blob's beginning.
        received_bytes: u64,
    },
    /// This blob is complete and verified. Its last credit has been reported.
    Complete {
        /// The blob.
        blob: BlobIndex,
        /// Its content.
        content: Content,
    },
    /// A blob will not arrive. No further event follows.
    Failed(IncomingError),
}

/// Takes the blobs of one attempt in. Dropping it stops its thread, if it has one, and removes incomplete files.
#[derive(Debug)]
pub struct Intake {
    window_bytes: u64,
    progress: Arc<Mutex<HashMap<BlobIndex, Progress>>>,
    taker: Taker,
}

/// Who writes and hashes the chunks.
#[derive(Debug)]
enum Taker {
    /// The intake's own thread.
    Thread { queued: Arc<AtomicUsize>, chunks: mpsc::UnboundedSender<Piece> },
    /// The caller that hands a chunk over; `None` after an error.
    Caller(Mutex<Option<Here>>),
}

/// How much of a blob has arrived.
#[derive(Clone, Copy, Debug)]
struct Progress {
    size_bytes: u64,
    /// Bytes handed to the writer.
    pushed_bytes: u64,
    /// Bytes in place: the writer has written them.
    written_bytes: u64,
    /// Bytes reported to the peer as credit or as need. It may send a window beyond them.
    told_bytes: u64,
}

/// A chunk for the writer.
#[derive(Debug)]
struct Piece {
    chunk: Chunk,
    payload: Bytes,
    /// Bytes at its beginning that have already arrived.
    skip_bytes: usize,
}

impl Intake {
    /// Starts to take these blobs in. Empty blobs are complete at once. Must be called within a tokio runtime.
    pub fn start(blobs: Vec<Incoming>, window_bytes: u32) -> (Self, mpsc::Receiver<Arrival>) {
        let window_bytes = u64::from(window_bytes);
        let size_bytes: u64 = blobs.iter().map(Incoming::size_bytes).sum();
        let is_light = size_bytes <= LIGHT_BYTES_MAX.min(window_bytes) && blobs.iter().all(Incoming::goes_to_memory);
        // Room for the ends of all blobs, which must not be lost, and beside it for credits, which replace the credits
        // before them.
        let (told, arrivals) = mpsc::channel(ARRIVALS_MAX + ENDS_OF_A_BLOB * blobs.len());
        let progress = blobs.iter().map(|incoming| {
            let size_bytes = incoming.size_bytes();
            (incoming.blob(), Progress { size_bytes, pushed_bytes: 0, written_bytes: 0, told_bytes: 0 })
        });
        let progress = Arc::new(Mutex::new(progress.collect()));
        let blobs = blobs.into_iter().map(|incoming| (incoming.blob(), Open { incoming, credited_bytes: 0 })).collect();
        let writer = Writer {
            blobs,
            credit_step_bytes: window_bytes / CREDITS_PER_WINDOW,
            credited_at: Instant::now(),
            progress: Arc::clone(&progress),
            inflated: Vec::new(),
        };
        let taker = if is_light { Taker::caller(writer, told) } else { Taker::thread(writer, told) };
        (Self { window_bytes, progress, taker }, arrivals)
    }

    /// Hands a chunk over without waiting: at most a window of bytes waits for the thread. Bytes that have already
    /// arrived are dropped, and so are blobs that were not asked for: the peer may not know yet.
    ///
    /// # Errors
    /// If the peer left bytes out, or sent more than announced or more than the window.
    pub fn push(&self, chunk: Chunk, payload: Bytes) -> Result<(), IncomingError> {
        let blob = chunk.blob;
        let Some(piece) = self.admit(chunk, payload)? else { return Ok(()) };
        self.taker.take(piece).map_err(|reason| IncomingError::Protocol { blob, reason: reason.to_owned() })
    }

    /// The part of the chunk that must be written; `None` if nothing of it is new.
    fn admit(&self, chunk: Chunk, payload: Bytes) -> Result<Option<Piece>, IncomingError> {
        let broken = |reason: &str| IncomingError::Protocol { blob: chunk.blob, reason: reason.to_owned() };
        let len = chunk.inflated_bytes.map_or(payload.len(), |inflated| inflated as usize);
        if len == 0 || len > CHUNK_BYTES_MAX {
            return Err(broken("a chunk that is empty or longer than the limit"));
        }
        let mut progress = self.progress.lock();
        let under_way: u64 = progress.values().map(|blob| blob.pushed_bytes - blob.told_bytes).sum();
        let Some(blob) = progress.get_mut(&chunk.blob) else { return Ok(None) };
        let end = chunk.offset.checked_add(len as u64).filter(|end| *end <= blob.size_bytes);
        let end = end.ok_or_else(|| broken("more bytes than announced"))?;
        if end <= blob.pushed_bytes {
            return Ok(None);
        }
        if chunk.offset > blob.pushed_bytes {
            return Err(broken("bytes are missing"));
        }
        if under_way + (end - blob.pushed_bytes) > self.window_bytes {
            return Err(broken("more bytes than the window"));
        }
        let skip_bytes = (blob.pushed_bytes - chunk.offset) as usize;
        blob.pushed_bytes = end;
        Ok(Some(Piece { chunk, payload, skip_bytes }))
    }

    /// Whether the caller takes the blobs in itself, because they are small and go to memory. Then a chunk's events are
    /// reported before [`Self::push`] returns, and those of empty blobs before [`Self::start`] returns.
    pub fn is_light(&self) -> bool {
        matches!(self.taker, Taker::Caller(_))
    }

    /// Whether everything before the chunk has arrived. [`Self::push`] refuses other chunks.
    pub fn has_reached(&self, chunk: &Chunk) -> bool {
        self.progress.lock().get(&chunk.blob).is_none_or(|blob| chunk.offset <= blob.pushed_bytes)
    }

    /// The blobs that are still needed and their offsets, for the `needs` of an `Accept`. Bytes that still wait for the
    /// thread are named again, and dropped when they arrive again: counting them as arrived would let one more window
    /// in with each call.
    pub fn needs(&self) -> Vec<(BlobIndex, u64)> {
        let mut progress = self.progress.lock();
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

impl Taker {
    fn caller(writer: Writer, told: mpsc::Sender<Arrival>) -> Self {
        let mut here = Here { ends: ENDS_OF_A_BLOB * writer.blobs.len(), writer, told };
        let begun = here.writer.begin();
        let is_open = tell(begun, |arrival| here.tell(arrival));
        Self::Caller(Mutex::new(is_open.then_some(here)))
    }

    fn thread(mut writer: Writer, told: mpsc::Sender<Arrival>) -> Self {
        let (chunks, mut pieces) = mpsc::unbounded_channel::<Piece>();
        let queued = Arc::new(AtomicUsize::new(0));
        let waiting = Arc::clone(&queued);
        tokio::task::spawn_blocking(move || {
            let tell = |arrivals| tell(arrivals, |arrival| told.blocking_send(arrival).is_ok());
            let mut is_open = tell(writer.begin());
            while is_open && let Some(piece) = pieces.blocking_recv() {
                let is_last = waiting.fetch_sub(1, Ordering::Relaxed) == 1;
                is_open = tell(writer.take(&piece, is_last));
            }
        });
        Self::Thread { queued, chunks }
    }

    fn take(&self, piece: Piece) -> Result<(), &'static str> {
        match self {
            Self::Thread { queued, chunks } => {
                if queued.fetch_add(1, Ordering::Relaxed) >= QUEUED_MAX {
                    return Err("too many small chunks");
                }
                // Fails only when the thread has ended with an error, which it has reported.
                let _ = chunks.send(piece);
            }
            Self::Caller(open) => {
                let mut open = open.lock();
                let Some(here) = open.as_mut() else { return Ok(()) };
                let arrivals = here.writer.take(&piece, true);
                if !tell(arrivals, |arrival| here.tell(arrival)) {
                    *open = None;
                }
            }
        }
        Ok(())
    }
}

/// The writer that the caller runs itself.
#[derive(Debug)]
struct Here {
    writer: Writer,
    told: mpsc::Sender<Arrival>,
    /// Places in the channel that are reserved for the ends of blobs.
    ends: usize,
}

impl Here {
    /// Reports an arrival without waiting. A credit without room is dropped: the next one replaces it, and the last one
    /// always has room.
    fn tell(&self, arrival: Arrival) -> bool {
        let has_more = |blob| self.writer.blobs.contains_key(blob);
        let is_droppable = matches!(&arrival, Arrival::Credit { blob, .. } if has_more(blob));
        is_droppable && self.told.capacity() <= self.ends || self.told.try_send(arrival).is_ok()
    }
}

/// Reports the arrivals in turn. False if no more may be reported: a blob failed, or nobody listens.
fn tell(arrivals: Vec<Arrival>, mut send: impl FnMut(Arrival) -> bool) -> bool {
    arrivals.into_iter().all(|arrival| {
        let is_failure = matches!(arrival, Arrival::Failed(_));
        send(arrival) && !is_failure
    })
}

/// Writes and hashes the chunks of one attempt.
#[derive(Debug)]
struct Writer {
    /// Blobs that are not complete.
    blobs: HashMap<BlobIndex, Open>,
    credit_step_bytes: u64,
    credited_at: Instant,
    progress: Arc<Mutex<HashMap<BlobIndex, Progress>>>,
    inflated: Vec<u8>,
}

/// A blob that is not complete.
#[derive(Debug)]
struct Open {
    incoming: Incoming,
    credited_bytes: u64,
}

impl Writer {
    /// Arrivals before the first chunk: empty blobs are complete.
    fn begin(&mut self) -> Vec<Arrival> {
        let empty = self.blobs.iter().filter(|(_, open)| open.incoming.is_whole()).map(|(blob, _)| *blob);
        let empty: Vec<BlobIndex> = empty.collect();
        empty.into_iter().flat_map(|blob| self.complete(blob)).collect()
    }

    /// Writes a chunk and returns its arrivals; `is_last`: no other chunk waits.
    fn take(&mut self, piece: &Piece, is_last: bool) -> Vec<Arrival> {
        match self.write(piece) {
            Ok(()) => self.acknowledge(piece.chunk.blob, is_last),
            Err(error) => vec![Arrival::Failed(error)],
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
        if let Some(progress) = self.progress.lock().get_mut(&piece.chunk.blob) {
            progress.written_bytes = open.incoming.written_bytes();
        }
        Ok(())
    }

    /// The arrivals after a chunk of this blob was written.
    fn acknowledge(&mut self, blob: BlobIndex, is_last: bool) -> Vec<Arrival> {
        let Some(open) = self.blobs.get_mut(&blob) else { return Vec::new() };
        if open.incoming.is_whole() {
            return self.complete(blob);
        }
        let received_bytes = open.incoming.written_bytes();
        let enough = received_bytes - open.credited_bytes >= self.credit_step_bytes;
        if !enough && !is_last && self.credited_at.elapsed() < CREDIT_EVERY {
            return Vec::new();
        }
        open.credited_bytes = received_bytes;
        vec![self.credit(blob, received_bytes)]
    }

    fn credit(&mut self, blob: BlobIndex, received_bytes: u64) -> Arrival {
        if let Some(progress) = self.progress.lock().get_mut(&blob) {
            progress.told_bytes = progress.told_bytes.max(received_bytes);
        }
        self.credited_at = Instant::now();
        Arrival::Credit { blob, received_bytes }
    }

    fn complete(&mut self, blob: BlobIndex) -> Vec<Arrival> {
        let Some(mut open) = self.blobs.remove(&blob) else { return Vec::new() };
        match open.incoming.finish() {
            Ok(content) => {
                vec![self.credit(blob, open.incoming.size_bytes()), Arrival::Complete { blob, content }]
            }
            Err(error) => vec![Arrival::Failed(error)],
        }
    }
}

/// Decompresses the zstd frame `packed` into `plain`. The result must be `len` bytes long; more is never written.
fn inflate(packed: &[u8], len: usize, plain: &mut Vec<u8>) -> Result<(), String> {
    plain.resize(len, 0);
    match zstd::bulk::decompress_to_buffer(packed, plain.as_mut_slice()) {
        Ok(inflated) if inflated == len => Ok(()),
        Ok(inflated) => Err(format!("a chunk of {inflated} bytes announced as {len}")),
        Err(error) => Err(format!("a chunk that does not inflate to {len} bytes: {error}")),
    }
}
