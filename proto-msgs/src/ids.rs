//! Ids as types, so that two kinds of id cannot be mixed up. Fixed width on the wire, text wherever a person reads
//! them.
//!
//! ```compile_fail
//! # use proto_msgs::{ClientId, TaskId};
//! let task: TaskId = ClientId::from_bytes([0; 16]); // another kind of id
//! ```

use std::{cmp::Ordering, fmt, str::FromStr};

use bincode::{Decode, Encode};
use uuid::Uuid;

macro_rules! uuid_ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Decode, Encode, Eq, Hash, PartialEq)]
        pub struct $name([u8; 16]);

        // The order of the bytes, without a call per comparison: tables are searched by ids all the time.
        impl Ord for $name {
            #[inline]
            fn cmp(&self, other: &Self) -> Ordering {
                u128::from_be_bytes(self.0).cmp(&u128::from_be_bytes(other.0))
            }
        }

        impl PartialOrd for $name {
            #[inline]
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $name {
            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The 16 bytes as they travel.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid.into_bytes())
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                text.parse::<Uuid>().map(Self::from)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Uuid::from_bytes(self.0).fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    )*};
}

uuid_ids! {
    /// One task: a UUIDv7 made by the client. It is unique before any peer has answered, and sorts by time.
    TaskId;
    /// One job: the client's grouping of the tasks of one `submit`.
    JobId;
    /// One worker machine. Kept in the worker's state folder, so it stays across restarts.
    WorkerId;
    /// One user's identity. Kept in the client's state folder. Results go to this client only.
    ClientId;
}

/// One life of a process. A worker's epoch grows by one with each start; a broker's is its start time. Promises of an
/// earlier epoch no longer hold.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Epoch(pub u64);

/// One placement of a task: grows by one with each placement. It is also the fence: results of earlier attempts are
/// dropped.
#[derive(Clone, Copy, Debug, Decode, Default, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Attempt(pub u32);

impl Attempt {
    /// The attempt after this one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// BLAKE3 of a blob's bytes, and the blob's name everywhere.
#[derive(Clone, Copy, Decode, Encode, Eq, Hash, PartialEq)]
pub struct Digest([u8; 32]);

// The order of the bytes, compared in two steps at most, as for the ids above.
impl Ord for Digest {
    #[inline]
    fn cmp(&self, other: &Self) -> Ordering {
        let first = |digest: &Self| u128::from_be_bytes(*digest.0.first_chunk().expect("32 bytes begin with 16"));
        let last = |digest: &Self| u128::from_be_bytes(*digest.0.last_chunk().expect("32 bytes end with 16"));
        first(self).cmp(&first(other)).then_with(|| last(self).cmp(&last(other)))
    }
}

impl PartialOrd for Digest {
    #[inline]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Digest {
    /// The digest with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The 32 bytes as they travel.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 hexadecimal digits, enough for a table.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        blake3::Hash::from_bytes(self.0).to_hex().fmt(f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({}…)", self.short())
    }
}

impl FromStr for Digest {
    type Err = blake3::HexError;

    fn from_str(text: &str) -> Result<Self, blake3::HexError> {
        blake3::Hash::from_hex(text).map(Self::from)
    }
}

/// A CURVE public key (Curve25519): a node's name for encryption.
#[derive(Clone, Copy, Decode, Encode, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}…)", &blake3::Hash::from_bytes(self.0).to_hex()[..12])
    }
}

/// A connection as a ROUTER socket names it. It means nothing beyond that socket and that connection: it is never
/// stored and never shown to another node.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PeerId {
    len: u8,
    bytes: [u8; Self::BYTES_MAX],
}

impl PeerId {
    /// Longest name of a connection. A ROUTER makes names of 5 bytes; a peer that brings a longer name of its own gets
    /// no answer.
    pub const BYTES_MAX: usize = 15;

    /// The name in a routing frame; `None` if it is too long.
    pub fn from_slice(name: &[u8]) -> Option<Self> {
        let mut bytes = [0; Self::BYTES_MAX];
        bytes.get_mut(..name.len())?.copy_from_slice(name);
        Some(Self { len: name.len() as u8, bytes })
    }

    /// The name as a routing frame.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerId(")?;
        self.as_slice().iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}
