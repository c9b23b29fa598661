//! The twelve bytes before every message. Their layout is frozen for all versions, so that peers of different versions
//! can always tell each other what is wrong.
//!
//! ```text
//!   0      4         6       8          12
//!   | MESH | version | kind  | body_len |   little endian
//! ```

/// The protocol version of this program. It changes whenever a released message changes.
pub const VERSION: u16 = 2;

/// The oldest protocol version that this program understands.
pub const VERSION_MIN: u16 = 2;

/// Length of a header in bytes.
pub const HEADER_BYTES: usize = 12;

const MAGIC: [u8; 4] = *b"MESH";

/// The header of one message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// Protocol version of the sender.
    pub version: u16,
    /// Kind number of the message that follows.
    pub kind: u16,
    /// Length of the body that follows, in bytes.
    pub body_bytes: u32,
}

impl Header {
    /// The header as bytes.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes
    }

    /// Splits a message into header and body; `None` if it does not begin with a header of the mesh.
    pub fn split(message: &[u8]) -> Option<(Self, &[u8])> {
        let (head, body) = message.split_first_chunk::<HEADER_BYTES>()?;
        let header = Self {
            version: u16::from_le_bytes([head[4], head[5]]),
            kind: u16::from_le_bytes([head[6], head[7]]),
            body_bytes: u32::from_le_bytes([head[8], head[9], head[10], head[11]]),
        };
        (head[..4] == MAGIC).then_some((header, body))
    }
}
