//! The direct blob stream: an attempt's blobs as chunks, under one window, in either direction.
//!
//! Owns chunking, the window, compression, hashing and verification. Never: what is in a blob, where verified files go.
//!
//! ```text
//!   sender   Outgoing(blobs, window) --- upload() ---> Outlet ...... peer's inbox ---> Intake (thread: Incoming per blob)
//!              ^ Feedback: credit, needs, link                                            | Arrival: credit, complete
//!              '------------------------ credits <-------------------------------------- '
//! ```
//!
//! The sender: make [`Outgoing`], run [`upload`] in a task, pass it a [`Feedback`] for each Credit and Accept and for a new
//! link. The receiver: make an [`Incoming`] per blob, hand them to [`Intake::start`], pass it each chunk, pass on
//! each credit it tells, wait for [`Arrival::Complete`]. Its thread does the hashing and writing, not the caller's task.

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use proto_msgs::{AttemptId, BlobIndex, Chunk, Digest};
use tokio::sync::mpsc;

use crate::Outlet;

/// Which side of the direct path is sending: decides the number of the chunk message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Model and inputs.
    Client,
    /// Outputs.
    Worker,
}

/// Whether chunks are compressed (zstd level 1).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Compression {
    /// If a probe of the blob's first MiB and the link's speed say that it pays.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Where a blob's bytes come from.
#[derive(Debug)]
pub struct Source {}

impl Source {
    /// A file. Its size and time are remembered: a change during the upload is an error.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn file(_path: &Path) -> Result<Self, UploadError> {
        unimplemented!()
    }

    /// Bytes in memory.
    pub fn memory(_bytes: Bytes) -> Self {
        unimplemented!()
    }

    /// Length of the blob.
    pub fn size_bytes(&self) -> u64 {
        unimplemented!()
    }

    /// BLAKE3 of it, read whole, in the calling thread and as many others as the machine has.
    ///
    /// # Errors
    /// If it cannot be read or changed meanwhile.
    pub fn digest(&self) -> Result<Digest, UploadError> {
        unimplemented!()
    }
}

/// Why blobs were not sent.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The file vanished or cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not the one that was announced any more.
    #[error("{} changed while it was being sent: submit it again once it is written completely", path.display())]
    Changed {
        /// Which file.
        path: PathBuf,
    },
    /// The peer acknowledged what was never sent, or asked for what there is not.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// Nobody gives feedback any more: the attempt was dropped.
    #[error("the upload was stopped")]
    Stopped,
}

/// What the sender of blobs hears.
#[derive(Clone, Debug)]
pub enum Feedback {
    /// The peer has this much of a blob.
    Credit {
        /// Which blob.
        blob: BlobIndex,
        /// Bytes from its beginning.
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

/// Blobs of one attempt on their way out.
#[derive(Debug)]
pub struct Outgoing {}

impl Outgoing {
    /// Blobs, in the order in which they will be sent; all from their beginning.
    pub fn new(_role: Role, _id: AttemptId, _blobs: Vec<(BlobIndex, Source)>, _window_bytes: u32) -> Self {
        unimplemented!()
    }

    /// Whether to compress; automatic unless told.
    pub fn compress(self, _compression: Compression) -> Self {
        unimplemented!()
    }

    /// Sends nothing before [`Feedback::Needs`] has come.
    pub fn wait_for_needs(self) -> Self {
        unimplemented!()
    }
}

/// How an upload went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Uploaded {
    /// Bytes of the blobs that the peer has acknowledged in this upload.
    pub blob_bytes: u64,
    /// Bytes of payload put on the wire, compressed and repeated ones included.
    pub wire_bytes: u64,
    /// Bytes of the blobs that were sent more than once.
    pub repeated_bytes: u64,
    /// What the link carried while it was busy; 0 if too little was sent to say.
    pub link_bytes_per_s: u64,
}

/// Sends the blobs until the peer has acknowledged every byte. Reads files in blocking threads. Ends early only with an
/// error; a lost link is waited for.
///
/// # Errors
/// See [`UploadError`].
pub async fn upload(
    _outgoing: Outgoing,
    _outlet: Outlet,
    _feedback: mpsc::Receiver<Feedback>,
) -> Result<Uploaded, UploadError> {
    unimplemented!()
}

/// One blob on its way in: decompressed, hashed while it is written.
#[derive(Debug)]
pub struct Incoming {}

/// Why a blob did not come in.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// The file system is full (or the quota is).
    #[error("no space left for {}", path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The bytes are not the announced ones.
    #[error("blob {blob} is damaged: announced as {announced}, arrived as {arrived}")]
    DigestMismatch {
        /// Which blob.
        blob: BlobIndex,
        /// What it should have been.
        announced: Digest,
        /// What it is.
        arrived: Digest,
    },
    /// The peer sent what it must not: a gap, more than announced, a bad frame, more than the window.
    #[error("the peer broke the protocol at blob {blob}: {reason}")]
    Protocol {
        /// Which blob.
        blob: BlobIndex,
        /// What it did.
        reason: String,
    },
}

impl Incoming {
    /// Into a new file at `path`. Room is reserved at once.
    ///
    /// # Errors
    /// If the file cannot be made, or there is no room for it.
    pub fn to_file(_path: &Path, _blob: BlobIndex, _size_bytes: u64, _digest: Digest) -> Result<Self, IncomingError> {
        unimplemented!()
    }

    /// Into memory, which grows with what arrives.
    pub fn to_memory(_blob: BlobIndex, _size_bytes: u64, _digest: Digest) -> Self {
        unimplemented!()
    }

    /// Flush the file to disk before it counts as complete (for files that must survive a power cut).
    pub fn sync(self) -> Self {
        unimplemented!()
    }
}

/// A verified blob.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Content {
    /// In this file.
    File(PathBuf),
    /// Here.
    Memory(Bytes),
}

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
pub struct Intake {}

impl Intake {
    /// Starts to take these blobs in. Empty blobs are complete at once.
    pub fn start(_blobs: Vec<Incoming>, _window_bytes: u32) -> (Self, mpsc::Receiver<Arrival>) {
        unimplemented!()
    }

    /// Hands over a chunk. Never blocks: at most a window of bytes waits for the thread.
    ///
    /// # Errors
    /// If the peer sent more than the window, or a chunk of a blob that is not expected.
    pub fn push(&self, _chunk: Chunk, _payload: Bytes) -> Result<(), IncomingError> {
        unimplemented!()
    }

    /// What is still needed and from where: the `needs` of an `Accept`. After a link broke, call it once all chunks of
    /// the old link were pushed.
    pub fn needs(&self) -> Vec<(BlobIndex, u64)> {
        unimplemented!()
    }
}
