//! The direct blob stream: the blobs of one attempt as chunks under one window, in either direction.
//!
//! Owns chunking, the window, compression, hashing and verification. Never: the meaning of a blob, the place of
//! verified files.
//!
//! ```text
//!   sender   Outgoing(blobs, window) --- Uploading ---> Outlet ...... peer's inbox ---> Intake (an Incoming per blob)
//!              ^ Feedback: credit, needs, link                                            | Arrival: credit, complete
//!              '------------------------ credits <-------------------------------------- '
//! ```
//!
//! The sender makes an [`Outgoing`], hands it to [`Uploading::start`], and passes on a [`Feedback`] for each Credit and
//! Accept and for a new link. The receiver makes an [`Incoming`] per blob, hands them to [`Intake::start`], passes on
//! each chunk, sends each credit that it is given, and waits for [`Arrival::Complete`]. Files and large blobs are read,
//! hashed and written by their own threads, small ones in memory by the callers.

mod compression;
mod digest;
mod incoming;
mod intake;
mod outgoing;
mod pace;
mod pool;
mod rate;
mod source;
mod upload;

pub use compression::{Compression, compression_pays};
pub use incoming::{Content, Incoming, IncomingError};
pub use intake::{Arrival, Intake};
pub use outgoing::{Outgoing, Role, Uploaded};
pub use source::{Source, UploadError};
pub use upload::{Feedback, UploadEnd, Uploading};
