//! Owns the outgoing blobs of one attempt: what may be sent next, under one window. No sockets, no waiting.

use std::time::{Duration, Instant};

use bytes::Bytes;
use proto_msgs::{
    AttemptId, BlobIndex, Chunk, ClientToWorker, Frame, WorkerToClient,
    limits::{CHUNK_BYTES_MAX, WINDOW_BYTES},
};

use super::{
    compression::{Compression, Compressor, PROBE_BYTES, compression_pays, is_worth_a_probe},
    pace::Pace,
    pool::Buffer,
    rate::LinkRate,
    source::{Source, UploadError},
};

/// Plain bytes of a chunk on a link of unknown or good speed.
const CHUNK_BYTES: usize = 256 * 1024;

/// Plain bytes of a chunk on the slowest link.
const CHUNK_BYTES_MIN: usize = 16 * 1024;

/// Link time of one chunk, so that signs of life behind it are not late.
const CHUNK_SECONDS: f64 = 0.1;

/// Total size up to which blobs in memory on both sides are sent, hashed and checked by their caller. At a gigabyte per
/// second that takes a millisecond at most, one chunk a quarter of that, and small blobs take less than waking a
/// thread.
pub(crate) const LIGHT_BYTES_MAX: u64 = 1024 * 1024;

/// The sending side of the direct link, which decides the kind number of the chunk message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// The client sends model and inputs.
    Client,
    /// The worker sends outputs.
    Worker,
}

/// Counters of one upload.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Uploaded {
    /// Bytes of the blobs that the peer acknowledged in this upload.
    pub blob_bytes: u64,
    /// Bytes of payload put on the wire, compressed and repeated ones included.
    pub wire_bytes: u64,
    /// Bytes of the blobs that were sent more than once.
    pub repeated_bytes: u64,
    /// Speed of the link while it was busy; 0 if too little was sent to measure it.
    pub link_bytes_per_s: u64,
}

/// The outgoing blobs of one attempt.
#[derive(Debug)]
pub struct Outgoing {
    role: Role,
    id: AttemptId,
    blobs: Vec<Blob>,
    window_bytes: u64,
    compression: Compression,
    compressor: Option<Compressor>,
    /// A message that goes before the first chunk.
    pub(crate) first: Option<Frame>,
    /// Longest time without a credit for an upload that holds a thread.
    pub(crate) patience: Duration,
    /// Nothing is sent until the peer has said what it needs.
    pub(crate) waits_for_needs: bool,
    rate: LinkRate,
    pace: Pace,
    report: Uploaded,
}

#[derive(Debug)]
struct Blob {
    index: BlobIndex,
    source: Source,
    size_bytes: u64,
    /// Offset of the next chunk.
    next: u64,
    /// Bytes that the peer has acknowledged.
    acked: u64,
    /// The end of all bytes ever sent.
    high: u64,
    /// The probe's verdict on compression; `None` before the probe.
    pays: Option<bool>,
}

/// The chunk that may be sent next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    /// Index in the list of blobs.
    place: usize,
    offset: u64,
    len: usize,
}

/// The next chunk as a message.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) frame: Frame,
    next: Next,
}

impl Outgoing {
    /// Outgoing blobs in the order in which they will be sent, all from their beginning.
    pub fn new(role: Role, id: AttemptId, blobs: Vec<(BlobIndex, Source)>, window_bytes: u32) -> Self {
        let blobs = blobs.into_iter().map(|(index, source)| {
            let size_bytes = source.size_bytes();
            Blob { index, source, size_bytes, next: 0, acked: 0, high: 0, pays: None }
        });
        Self {
            role,
            id,
            blobs: blobs.collect(),
            window_bytes: u64::from(window_bytes.clamp(1, WINDOW_BYTES)),
            compression: Compression::Auto,
            compressor: None,
            first: None,
            patience: Duration::MAX,
            waits_for_needs: false,
            rate: LinkRate::default(),
            pace: Pace::default(),
            report: Uploaded::default(),
        }
    }

    /// Sets the compression; the default is [`Compression::Auto`].
    pub fn compress(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Sets the link's speed as earlier uploads measured it, bytes per second; 0 if unknown.
    pub fn link(mut self, bytes_per_s: u64) -> Self {
        self.rate.presume(bytes_per_s);
        self.pace.presume(bytes_per_s);
        self
    }

    /// Marks a blob that the peer is thought to have: it is sent only if [`Needs`](super::Feedback::Needs) names it.
    pub fn held(mut self, blob: BlobIndex) -> Self {
        if let Some(blob) = self.blobs.iter_mut().find(|known| known.index == blob) {
            (blob.next, blob.acked) = (blob.size_bytes, blob.size_bytes);
        }
        self
    }

    /// Starts a blob at the bytes that the peer has from an earlier upload. The peer may turn out to have more.
    pub fn from(mut self, blob: BlobIndex, received_bytes: u64) -> Self {
        if let Some(blob) = self.blobs.iter_mut().find(|known| known.index == blob) {
            let received_bytes = received_bytes.min(blob.size_bytes);
            (blob.next, blob.acked, blob.high) = (received_bytes, received_bytes, blob.size_bytes);
        }
        self
    }

    /// Sends this message before all chunks. If the link breaks first, the message is dropped.
    pub fn behind(mut self, first: Frame) -> Self {
        self.first = Some(first);
        self
    }

    /// Gives up an upload that holds a thread once the peer has acknowledged nothing more for this time. The default is to
    /// wait for as long as it takes.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sends nothing before [`Needs`](super::Feedback::Needs) has come.
    pub fn wait_for_needs(mut self) -> Self {
        self.waits_for_needs = true;
        self
    }

    /// Whether the blobs to send are small and in memory, so that the caller can send them itself.
    pub(crate) fn is_light(&self) -> bool {
        let mut to_send = self.blobs.iter().filter(|blob| blob.next < blob.size_bytes);
        let bytes: u64 = to_send.clone().map(|blob| blob.size_bytes).sum();
        let is_plain = self.compression != Compression::Always;
        is_plain && bytes <= LIGHT_BYTES_MAX && to_send.all(|blob| blob.source.is_in_memory())
    }

    /// Whether the peer has acknowledged everything.
    pub(crate) fn is_done(&self) -> bool {
        self.first.is_none() && !self.waits_for_needs && self.blobs.iter().all(|blob| blob.acked == blob.size_bytes)
    }

    pub(crate) fn report(&self) -> Uploaded {
        Uploaded { link_bytes_per_s: self.rate.bytes_per_s().unwrap_or(0.0) as u64, ..self.report }
    }

    /// Notes a credit: the peer has these bytes of a blob.
    pub(crate) fn credit(&mut self, index: BlobIndex, received_bytes: u64, now: Instant) -> Result<(), UploadError> {
        let blob = self.blob(index)?;
        if received_bytes > blob.high.max(blob.next) {
            return Err(broken(format!("it acknowledges {received_bytes} bytes of blob {index}, which were not sent")));
        }
        let news = received_bytes.saturating_sub(blob.acked);
        blob.acked += news;
        // After a rewind the peer may turn out to have more than it said.
        blob.next = blob.next.max(blob.acked);
        self.report.blob_bytes += news;
        self.rate.acked(news, now);
        self.pace.acked(news, now);
        Ok(())
    }

    /// Notes what the peer needs. Before anything was sent on a link, sending starts at these offsets. Afterwards the
    /// peer may only drop or add blobs; bytes under way stay under way.
    pub(crate) fn needs(&mut self, needs: &[(BlobIndex, u64)], window_bytes: u32) -> Result<(), UploadError> {
        for (index, offset) in needs {
            if *offset > self.blob(*index)?.size_bytes {
                return Err(broken(format!("it needs blob {index} from byte {offset} on, which is beyond its end")));
            }
        }
        let begin = std::mem::take(&mut self.waits_for_needs);
        self.window_bytes = u64::from(window_bytes.clamp(1, WINDOW_BYTES));
        for blob in &mut self.blobs {
            let needed = needs.iter().find(|(index, _)| *index == blob.index);
            let from = needed.map_or(blob.size_bytes, |(_, offset)| *offset);
            let thought_held = blob.high == 0 && blob.next > 0;
            if begin || thought_held || needed.is_none() || from > blob.next {
                if (blob.next, blob.acked) != (from, from) {
                    self.pace.restart();
                }
                (blob.next, blob.acked) = (from, from);
            } else {
                blob.acked = blob.acked.max(from);
            }
        }
        Ok(())
    }

    /// Notes a broken link. The peer will say where to go on.
    pub(crate) fn link_broke(&mut self) {
        self.first = None;
        self.waits_for_needs = true;
        self.rate.pause();
        self.pace.restart();
    }

    /// The chunk that may be sent now; `None` if the peer's window or the link is full, or everything is sent.
    pub(crate) fn next(&self) -> Option<Next> {
        if self.waits_for_needs || self.first.is_some() {
            return None;
        }
        let (place, blob) = self.blobs.iter().enumerate().find(|(_, blob)| blob.next < blob.size_bytes)?;
        let under_way: u64 = self.blobs.iter().map(|blob| blob.next - blob.acked).sum();
        let on_the_link = self.pace.bytes_max();
        let room = self.window_bytes.min(on_the_link).saturating_sub(under_way);
        // Room for two chunks at least: one arrives while the other is acknowledged.
        let chunk_bytes = (self.chunk_bytes() as u64).min(on_the_link / 2);
        let wanted = chunk_bytes.min(blob.size_bytes - blob.next);
        // A small rest of the window is not worth a chunk, unless the whole window is small.
        let len = if room >= wanted || under_way == 0 { wanted.min(room) } else { return None };
        Some(Next { place, offset: blob.next, len: len as usize })
    }

    /// The next chunk's bytes if they are already in memory and are sent uncompressed.
    pub(crate) fn slice(&mut self, next: Next) -> Option<Bytes> {
        let blob = &self.blobs[next.place];
        let plain = blob.pays != Some(true) && self.compression != Compression::Always;
        if plain { blob.source.slice(next.offset, next.len) } else { None }
    }

    /// Decides whether the chunk's blob is compressed, once the link's speed is known.
    pub(crate) fn decide(&mut self, next: Next) -> Result<(), UploadError> {
        let blob = &mut self.blobs[next.place];
        let pays = match (self.compression, blob.pays, self.rate.bytes_per_s()) {
            (Compression::Always, None, _) => true,
            (Compression::Auto, None, Some(rate)) if blob.size_bytes >= PROBE_BYTES as u64 => {
                is_worth_a_probe(rate) && {
                    let mut sample = vec![0; PROBE_BYTES];
                    blob.source.read(&mut sample, 0)?;
                    let (ratio, speed) = compressor(&mut self.compressor)?.probe(&sample);
                    compression_pays(ratio, speed, rate)
                }
            }
            _ => return Ok(()),
        };
        blob.pays = Some(pays);
        Ok(())
    }

    /// Reads the next chunk into `buffer` (to compress it, into `plain` first).
    pub(crate) fn read(&mut self, next: Next, mut buffer: Buffer, plain: &mut Vec<u8>) -> Result<Ready, UploadError> {
        let blob = &self.blobs[next.place];
        if blob.pays == Some(true) {
            plain.resize(next.len, 0);
            blob.source.read(plain, next.offset)?;
            if compressor(&mut self.compressor)?.pack(plain, &mut buffer.bytes) {
                let len = buffer.bytes.len();
                return self.ready(next, buffer.into_bytes(len), Some(next.len as u32));
            }
            buffer.bytes.copy_from_slice(plain);
        } else {
            buffer.bytes.resize(next.len, 0);
            blob.source.read(&mut buffer.bytes, next.offset)?;
        }
        self.ready(next, buffer.into_bytes(next.len), None)
    }

    /// The chunk as a message.
    pub(crate) fn ready(&self, next: Next, payload: Bytes, inflated: Option<u32>) -> Result<Ready, UploadError> {
        let blob = self.blobs[next.place].index;
        let chunk = Chunk { id: self.id, blob, offset: next.offset, inflated_bytes: inflated };
        let frame = match self.role {
            Role::Client => ClientToWorker::Chunk(chunk).to_frame(),
            Role::Worker => WorkerToClient::Chunk(chunk).to_frame(),
        };
        let frame = frame.map_err(|error| broken(error.to_string()))?;
        Ok(Ready { frame: Frame { payload, ..frame }, next })
    }

    /// Notes that the chunk was sent.
    pub(crate) fn sent(&mut self, ready: &Ready, now: Instant) {
        let (next, wire_bytes) = (ready.next, ready.frame.payload.len() as u64);
        let blob = &mut self.blobs[next.place];
        let end = next.offset + next.len as u64;
        self.report.repeated_bytes += blob.high.min(end).saturating_sub(next.offset);
        self.report.wire_bytes += wire_bytes;
        self.rate.sent(next.len as u64, wire_bytes, now);
        self.pace.sent(next.len as u64, now);
        blob.next = end;
        blob.high = blob.high.max(end);
    }

    fn chunk_bytes(&self) -> usize {
        let fitting = self.rate.bytes_per_s().map_or(CHUNK_BYTES, |rate| (rate * CHUNK_SECONDS) as usize);
        const { assert!(CHUNK_BYTES <= CHUNK_BYTES_MAX) };
        fitting.clamp(CHUNK_BYTES_MIN, CHUNK_BYTES)
    }

    fn blob(&mut self, index: BlobIndex) -> Result<&mut Blob, UploadError> {
        let blob = self.blobs.iter_mut().find(|blob| blob.index == index);
        blob.ok_or_else(|| broken(format!("it names blob {index}, which does not exist")))
    }
}

fn compressor(made: &mut Option<Compressor>) -> Result<&mut Compressor, UploadError> {
    if made.is_none() {
        *made = Some(Compressor::new().map_err(|error| broken(format!("no compressor: {error}")))?);
    }
    Ok(made.as_mut().expect("just made"))
}

fn broken(reason: String) -> UploadError {
    UploadError::Protocol(reason)
}
