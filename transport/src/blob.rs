//! The direct blob stream: an attempt's blobs as chunks, under one window, in either direction.
//!
//! Owns chunking, the window, compression, hashing and verification. Never: what is in a blob, where verified files go.
//!
//! ```text
//!   sender   Outgoing(blobs, window) --- Uploading ---> Outlet ...... peer's inbox ---> Intake (an Incoming per blob)
//!              ^ Feedback: credit, needs, link                                            | Arrival: credit, complete
//!              '------------------------ credits <-------------------------------------- '
//! ```
//!
//! The sender: make [`Outgoing`], hand it to [`Uploading::start`], pass it a [`Feedback`] for each Credit and Accept and for a
//! new link. The receiver: make an [`Incoming`] per blob, hand them to [`Intake::start`], pass it each chunk, pass on
//! each credit it tells, wait for [`Arrival::Complete`]. Files and large blobs are read, hashed and written by threads of their
//! own, small ones in memory by the callers.

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
