//! Bodies of requests and answers: tensors pass through without being joined in memory, large ones from and to files.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use proto_msgs::{ErrorCode, Failure};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{AskError, nonsense};
use crate::data::{blobs::BlobStore, payload::Payload};

/// Bytes read from a file at once.
const PIECE_BYTES: usize = 256 * 1024;

/// Pieces queued between a file and the connection: enough to keep both busy.
const PIECES_UNDER_WAY: usize = 4;

/// A request body that consists of parts.
#[derive(Debug, Default)]
pub(super) struct RequestBody {
    parts: VecDeque<Payload>,
    /// Pieces of the file that is being read.
    reading: Option<mpsc::Receiver<io::Result<Bytes>>>,
    left_bytes: u64,
}

impl RequestBody {
    /// An empty body.
    pub(super) fn empty() -> Self {
        Self::default()
    }

    /// A body of these parts, in order.
    pub(super) fn new(parts: impl Iterator<Item = Payload>) -> Self {
        let parts: VecDeque<_> = parts.filter(|part| part.size_bytes() > 0).collect();
        let left_bytes = parts.iter().map(Payload::size_bytes).sum();
        Self { parts, reading: None, left_bytes }
    }

    fn emit(&mut self, bytes: Bytes) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.left_bytes = self.left_bytes.saturating_sub(bytes.len() as u64);
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        loop {
            if let Some(reading) = &mut self.reading {
                match ready!(reading.poll_recv(cx)) {
                    Some(Ok(piece)) => return self.emit(piece),
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => self.reading = None,
                }
            }
            match self.parts.pop_front() {
                None => return Poll::Ready(None),
                Some(Payload::Memory(bytes)) => return self.emit(bytes),
                Some(Payload::File { path, offset, size_bytes, owner }) => {
                    let (pieces, reading) = mpsc::channel(PIECES_UNDER_WAY);
                    spawn_blocking(move || {
                        read_file(&path, offset, size_bytes, &pieces);
                        drop(owner);
                    });
                    self.reading = Some(reading);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left_bytes == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left_bytes)
    }
}

fn read_file(path: &Path, offset: u64, size_bytes: u64, pieces: &mpsc::Sender<io::Result<Bytes>>) {
    let read_all = || -> io::Result<()> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut file = file.take(size_bytes);
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            let read = file.read(&mut piece)?;
            piece.truncate(read);
            if read == 0 || pieces.blocking_send(Ok(piece.into())).is_err() {
                return Ok(());
            }
        }
    };
    if let Err(error) = read_all() {
        let _ = pieces.blocking_send(Err(error));
    }
}

/// Reads an answer's body in pieces.
pub(super) struct BodyReader {
    body: Incoming,
    /// Bytes that have arrived and were not taken yet.
    ahead: Bytes,
}

impl BodyReader {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body, ahead: Bytes::new() }
    }

    /// Takes the next `count` bytes. Copies them only if they arrived in several pieces.
    pub(super) async fn take(&mut self, count: usize) -> Result<Bytes, AskError> {
        if self.ahead.is_empty() {
            self.ahead = self.next_piece(count).await?;
        }
        if self.ahead.len() >= count {
            return Ok(self.ahead.split_to(count));
        }
        let mut taken = BytesMut::with_capacity(count);
        loop {
            let wanted = self.ahead.len().min(count - taken.len());
            taken.extend_from_slice(&self.ahead.split_to(wanted));
            if taken.len() == count {
                return Ok(taken.freeze());
            }
            self.ahead = self.next_piece(count).await?;
        }
    }

    /// Writes the next `count` bytes into a file.
    pub(super) async fn spool(&mut self, count: u64, store: &BlobStore) -> Result<Payload, AskError> {
        let (pieces, mut to_write) = mpsc::channel::<Bytes>(PIECES_UNDER_WAY);
        let store = store.clone();
        let writing = spawn_blocking(move || -> Result<_, Failure> {
            let mut file = store.spool(count)?.create()?;
            while let Some(piece) = to_write.blocking_recv() {
                file.write(&piece)?;
            }
            Ok(file.finish().0)
        });
        let mut left = count;
        while left > 0 {
            if self.ahead.is_empty() {
                self.ahead = self.next_piece(1).await?;
            }
            let piece = self.ahead.split_to(self.ahead.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
            left -= piece.len() as u64;
            if pieces.send(piece).await.is_err() {
                break; // The writer has failed and says why below.
            }
        }
        drop(pieces);
        let written = writing.await.map_err(|error| Failure::new(ErrorCode::DiskFull, error.to_string()))?;
        Ok(Payload::spooled(written?))
    }

    /// Waits for the next piece that is not empty; returns nothing if nothing is wanted.
    async fn next_piece(&mut self, wanted: usize) -> Result<Bytes, AskError> {
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        loop {
            match self.body.frame().await {
                None => return Err(nonsense("an answer that ends too early").into()),
                Some(frame) => match frame?.into_data() {
                    Ok(piece) if !piece.is_empty() => return Ok(piece),
                    _ => {}
                },
            }
        }
    }
}
