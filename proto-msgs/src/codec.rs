//! Owns the way from messages to bytes and back. Only this file configures bincode for them (the MAC of a ticket is made
//! of bytes of its own): variable-length integers, little endian, a hard limit before anything is allocated.
//!
//! bincode is not self-describing and 2.0.1 is its last release. The answer to both: version and kind stand in a header
//! outside of the body, a released struct is never edited (a changed message gets a new kind), `tests/bytes.rs` pins
//! the bytes, and a second crate produces the same bytes, which is the way out.

use bincode::{Decode, Encode, config};
use bytes::Bytes;

use crate::{
    header::{HEADER_BYTES, Header, VERSION, VERSION_MIN},
    limits::{CHUNK_BYTES_MAX, CONTROL_BYTES_MAX, PAGE_BYTES_MAX, PAGE_ROWS_MAX},
};

/// Kind 0 in every version: the sender does not speak the peer's version. Its body is `min`, `max`, two little-endian
/// `u16`.
pub const KIND_UNSUPPORTED: u16 = 0;

/// One encoded message and, for a chunk, its raw payload behind it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// Header and encoded body.
    pub head: Bytes,
    /// Raw bytes that are never decoded; empty except for chunks.
    pub payload: Bytes,
}

impl Frame {
    /// A frame without payload.
    pub fn new(head: Vec<u8>) -> Self {
        Self { head: head.into(), payload: Bytes::new() }
    }

    /// Bytes of both parts.
    pub fn size_bytes(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// The answer to a peer whose version this program does not speak. Every future version will understand it.
    pub fn unsupported() -> Self {
        let header = Header { version: VERSION, kind: KIND_UNSUPPORTED, body_bytes: 4 };
        let mut head = header.to_bytes().to_vec();
        head.extend(VERSION_MIN.to_le_bytes());
        head.extend(VERSION.to_le_bytes());
        Self::new(head)
    }
}

/// Why a peer's bytes are not a message.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// Too short for a header, or another magic number: the peer is not a node of the mesh.
    #[error("not a message of the mesh")]
    NotOurs,
    /// The peer's version is not one that this program speaks.
    #[error(
        "peer speaks protocol version {theirs}, this program {VERSION_MIN} to {VERSION}: upgrade the older of the two"
    )]
    Version {
        /// The version in the peer's header.
        theirs: u16,
    },
    /// The peer says that it does not speak this program's version.
    #[error(
        "peer speaks protocol versions {min} to {max}, this program speaks {VERSION}: upgrade the older of the two"
    )]
    Unsupported {
        /// Oldest version the peer understands.
        min: u16,
        /// Newest version the peer understands.
        max: u16,
    },
    /// No message of this direction has this kind number.
    #[error("unknown message kind {0}")]
    UnknownKind(u16),
    /// The message is longer than any message may be.
    #[error("{got_bytes} bytes, the limit is {limit_bytes}")]
    TooLong {
        /// Bytes received.
        got_bytes: usize,
        /// Bytes allowed.
        limit_bytes: usize,
    },
    /// The body is cut, has bytes left over, or breaks a limit.
    #[error("message kind {kind} is garbled: {reason}")]
    Garbled {
        /// Kind in the header.
        kind: u16,
        /// What was wrong with the body.
        reason: String,
    },
}

/// Why a message is not encoded. Its receiver would drop it in silence, so the sender hears of it instead.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The message would be longer than any message may be.
    #[error("message kind {kind} would be longer than {CONTROL_BYTES_MAX} bytes")]
    TooLong {
        /// Kind of the message.
        kind: u16,
    },
    /// A field of the message breaks a limit.
    #[error("message kind {kind} breaks a limit: {reason}")]
    OverLimit {
        /// Kind of the message.
        kind: u16,
        /// The limit, and by how much it is broken.
        reason: String,
    },
}

/// As many rows as fit into one answer; at least one if there are any, so that the asker makes progress.
pub fn page<Row: Encode>(rows: impl Iterator<Item = Row>) -> Vec<Row> {
    page_of(rows, PAGE_ROWS_MAX)
}

/// As [`page`], with another limit of rows.
pub fn page_of<Row: Encode>(rows: impl Iterator<Item = Row>, rows_max: usize) -> Vec<Row> {
    let mut left_bytes = PAGE_BYTES_MAX;
    let mut page = Vec::new();
    for row in rows.take(rows_max) {
        let row_bytes = size_bytes(&row);
        if row_bytes > left_bytes && !page.is_empty() {
            break;
        }
        left_bytes = left_bytes.saturating_sub(row_bytes);
        page.push(row);
    }
    page
}

/// The encoded length of a value.
fn size_bytes(value: &impl Encode) -> usize {
    let mut size = bincode::enc::EncoderImpl::new(bincode::enc::write::SizeWriter::default(), config::standard());
    // A value that cannot be encoded counts as endless: it fits nowhere.
    value.encode(&mut size).map_or(usize::MAX, |()| size.into_writer().bytes_written)
}

fn config() -> impl config::Config {
    config::standard().with_limit::<CONTROL_BYTES_MAX>()
}

/// Encodes one body behind its header.
pub(crate) fn encode(kind: u16, body: &impl Encode) -> Result<Vec<u8>, EncodeError> {
    // A heartbeat of a small worker, the most frequent message, fits without growing.
    let mut bytes = Vec::with_capacity(256);
    bytes.resize(HEADER_BYTES, 0);
    bincode::encode_into_std_write(body, &mut bytes, config()).map_err(|_| EncodeError::TooLong { kind })?;
    if bytes.len() > CONTROL_BYTES_MAX {
        return Err(EncodeError::TooLong { kind });
    }
    let header = Header { version: VERSION, kind, body_bytes: (bytes.len() - HEADER_BYTES) as u32 };
    bytes[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    Ok(bytes)
}

/// Checks the header and returns kind and body.
pub(crate) fn open(frame: &Frame) -> Result<(u16, &[u8]), DecodeError> {
    let too_long = |got_bytes, limit_bytes| DecodeError::TooLong { got_bytes, limit_bytes };
    if frame.head.len() > CONTROL_BYTES_MAX {
        return Err(too_long(frame.head.len(), CONTROL_BYTES_MAX));
    }
    if frame.payload.len() > CHUNK_BYTES_MAX {
        return Err(too_long(frame.payload.len(), CHUNK_BYTES_MAX));
    }
    let (header, body) = Header::split(&frame.head).ok_or(DecodeError::NotOurs)?;
    if header.kind == KIND_UNSUPPORTED {
        let (min, max) = match body {
            [a, b, c, d] => (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])),
            _ => (0, 0),
        };
        return Err(DecodeError::Unsupported { min, max });
    }
    if !(VERSION_MIN..=VERSION).contains(&header.version) {
        return Err(DecodeError::Version { theirs: header.version });
    }
    if header.body_bytes as usize != body.len() {
        let reason = format!("{} bytes announced, {} received", header.body_bytes, body.len());
        return Err(DecodeError::Garbled { kind: header.kind, reason });
    }
    Ok((header.kind, body))
}

/// Decodes a body. Its bytes must be used up to the last one.
pub(crate) fn decode<T: Decode<()>>(kind: u16, body: &[u8]) -> Result<T, DecodeError> {
    let garbled = |reason| DecodeError::Garbled { kind, reason };
    let (value, used) = bincode::decode_from_slice(body, config()).map_err(|error| garbled(error.to_string()))?;
    if used != body.len() {
        return Err(garbled(format!("{} bytes to spare", body.len() - used)));
    }
    Ok(value)
}

/// Defines the messages of one direction: an enum whose variants carry one struct each and have a kind number that is
/// never reused.
macro_rules! messages {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $number:literal $variant:ident($body:ty);)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $name { $($(#[$vdoc])* $variant($body),)* }

        impl $name {
            /// Kind numbers and names of this direction's messages.
            pub const KINDS: &[(u16, &str)] = &[$(($number, stringify!($variant)),)*];

            /// The message's kind number.
            pub const fn kind(&self) -> u16 {
                match self { $(Self::$variant(_) => $number,)* }
            }

            /// The message's name, for logs and counters.
            pub const fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => stringify!($variant),)* }
            }

            /// The message as bytes.
            ///
            /// # Errors
            /// If the peer would refuse the message: it is too long, or a field breaks a limit.
            pub fn to_frame(&self) -> Result<$crate::Frame, $crate::EncodeError> {
                match self {
                    $(Self::$variant(body) => {
                        $crate::message::check::Check::check(body)
                            .map_err(|reason| $crate::EncodeError::OverLimit { kind: $number, reason })?;
                        $crate::codec::encode($number, body).map($crate::Frame::new)
                    })*
                }
            }

            /// Decodes one message.
            ///
            /// # Errors
            /// If the bytes are not exactly one message of this direction within every limit.
            pub fn from_frame(frame: &$crate::Frame) -> Result<Self, $crate::DecodeError> {
                let (kind, body) = $crate::codec::open(frame)?;
                match kind {
                    $($number => {
                        let body: $body = $crate::codec::decode(kind, body)?;
                        $crate::message::check::Check::check(&body)
                            .map_err(|reason| $crate::DecodeError::Garbled { kind, reason })?;
                        Ok(Self::$variant(body))
                    })*
                    _ => Err($crate::DecodeError::UnknownKind(kind)),
                }
            }
        }
    };
}
pub(crate) use messages;
