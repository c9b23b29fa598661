//! Messages to bytes and back. The only place that configures bincode: variable-length integers, little endian, a hard
//! limit before anything is allocated.
//!
//! bincode is not self-describing and its 2.0.1 is the last release. Both are lived with here: version and kind stand in a
//! header outside of it, a released struct is never edited (a changed message gets a new kind), the bytes are pinned in
//! `tests/bytes.rs` and the same bytes come out of a second crate, which is the way out.

use bincode::{Decode, Encode, config};
use bytes::Bytes;

use crate::{
    header::{HEADER_BYTES, Header, VERSION, VERSION_MIN},
    limits::{CHUNK_BYTES_MAX, CONTROL_BYTES_MAX, PAGE_BYTES_MAX, PAGE_ROWS_MAX},
};

/// Kind 0 in every version: "I do not speak your version". Its body is `min`, `max`, two little-endian `u16`.
pub const KIND_UNSUPPORTED: u16 = 0;

/// What travels: one encoded message and, for a chunk, its raw payload behind it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// Header and body.
    pub head: Bytes,
    /// Raw bytes that are never decoded; empty but for chunks.
    pub payload: Bytes,
}

impl Frame {
    /// A message without payload.
    pub fn new(head: Vec<u8>) -> Self {
        Self { head: head.into(), payload: Bytes::new() }
    }

    /// Bytes of both parts.
    pub fn size_bytes(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// The answer to a peer whose version is not spoken here; understood by every version there will be.
    pub fn unsupported() -> Self {
        let header = Header { version: VERSION, kind: KIND_UNSUPPORTED, body_bytes: 4 };
        let mut head = header.to_bytes().to_vec();
        head.extend(VERSION_MIN.to_le_bytes());
        head.extend(VERSION.to_le_bytes());
        Self::new(head)
    }
}

/// Why bytes from a peer are not a message.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// Too short for a header, or another magic: not a node of the mesh.
    #[error("not a message of the mesh")]
    NotOurs,
    /// The peer speaks a version that is not spoken here.
    #[error(
        "peer speaks protocol version {theirs}, this program {VERSION_MIN} to {VERSION}: upgrade the older of the two"
    )]
    Version {
        /// The version in the peer's header.
        theirs: u16,
    },
    /// The peer says that it does not speak our version.
    #[error(
        "peer speaks protocol versions {min} to {max}, this program speaks {VERSION}: upgrade the older of the two"
    )]
    Unsupported {
        /// Oldest version the peer understands.
        min: u16,
        /// Newest version the peer understands.
        max: u16,
    },
    /// No message of this direction has this number.
    #[error("unknown message kind {0}")]
    UnknownKind(u16),
    /// Longer than any message may be.
    #[error("{got_bytes} bytes, the limit is {limit_bytes}")]
    TooLong {
        /// Bytes received.
        got_bytes: usize,
        /// Bytes allowed.
        limit_bytes: usize,
    },
    /// The body is cut, has bytes to spare, or breaks a limit.
    #[error("message kind {kind} is garbled: {reason}")]
    Garbled {
        /// Kind in the header.
        kind: u16,
        /// What was wrong with the body.
        reason: String,
    },
}

/// Why a message is not made into bytes: its peer would drop it without a word.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// Longer than any message may be.
    #[error("message kind {kind} would be longer than {CONTROL_BYTES_MAX} bytes")]
    TooLong {
        /// Kind of the message.
        kind: u16,
    },
    /// Something in it breaks a limit.
    #[error("message kind {kind} breaks a limit: {reason}")]
    OverLimit {
        /// Kind of the message.
        kind: u16,
        /// Which limit, and by how much.
        reason: String,
    },
}

/// As many rows as one answer holds: at least one if there are any, so that the asker gets on.
pub fn page<Row: Encode>(rows: impl Iterator<Item = Row>) -> Vec<Row> {
    let mut left_bytes = PAGE_BYTES_MAX;
    let mut page = Vec::new();
    for row in rows.take(PAGE_ROWS_MAX) {
        let row_bytes = size_bytes(&row);
        if row_bytes > left_bytes && !page.is_empty() {
            break;
        }
        left_bytes = left_bytes.saturating_sub(row_bytes);
        page.push(row);
    }
    page
}

/// Bytes that a value takes in a message.
fn size_bytes(value: &impl Encode) -> usize {
    let mut size = bincode::enc::EncoderImpl::new(bincode::enc::write::SizeWriter::default(), config::standard());
    // A value without an encoding is as good as endless: it fits nowhere.
    value.encode(&mut size).map_or(usize::MAX, |()| size.into_writer().bytes_written)
}

fn config() -> impl config::Config {
    config::standard().with_limit::<CONTROL_BYTES_MAX>()
}

/// Encodes one body behind its header.
pub(crate) fn encode(kind: u16, body: &impl Encode) -> Result<Vec<u8>, EncodeError> {
    // A heartbeat of a small worker, the message sent most, fits without growing.
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

/// Checks the header and gives kind and body.
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

/// Decodes a body that must be used up to its last byte.
pub(crate) fn decode<T: Decode<()>>(kind: u16, body: &[u8]) -> Result<T, DecodeError> {
    let garbled = |reason| DecodeError::Garbled { kind, reason };
    let (value, used) = bincode::decode_from_slice(body, config()).map_err(|error| garbled(error.to_string()))?;
    if used != body.len() {
        return Err(garbled(format!("{} bytes to spare", body.len() - used)));
    }
    Ok(value)
}

/// Defines one direction of talk: an enum whose variants carry one struct each and have a number that is never used twice.
macro_rules! messages {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $number:literal $variant:ident($body:ty);)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $name { $($(#[$vdoc])* $variant($body),)* }

        impl $name {
            /// The numbers of this direction's messages with their names.
            pub const KINDS: &[(u16, &str)] = &[$(($number, stringify!($variant)),)*];

            /// The message's number.
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
            /// If a peer would not take it: it is too long, or breaks a limit.
            pub fn to_frame(&self) -> Result<$crate::Frame, $crate::EncodeError> {
                match self {
                    $(Self::$variant(body) => {
                        $crate::message::check::Check::check(body)
                            .map_err(|reason| $crate::EncodeError::OverLimit { kind: $number, reason })?;
                        $crate::codec::encode($number, body).map($crate::Frame::new)
                    })*
                }
            }

            /// The message in these bytes.
            ///
            /// # Errors
            /// If they are not a whole message of this direction within every limit.
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
