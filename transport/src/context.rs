//! What all sockets of a process share: the ZeroMQ context, the own keys, the door-keeper (ZAP).

use std::{
    collections::HashSet,
    io,
    sync::{Arc, RwLock},
};

use proto_msgs::PublicKey;

use crate::{DialError, Dialer, KeyPair, ListenError, Listener, keys::KeyError};

/// How the node's connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all: plain TCP, peers have no keys.
    None,
    /// Encrypted and authenticated with these keys (CURVE).
    Keys(KeyPair),
}

/// The process' sockets. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {}

/// Why there can be no sockets.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// Keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The system gave no resources.
    #[error("cannot start messaging: {0}")]
    System(#[from] io::Error),
}

/// Who may connect to a listener. Without keys everybody may.
#[derive(Clone, Debug)]
pub enum Admit {
    /// Any key; it is told with every message, and tickets are bound to it.
    Anyone,
    /// Only keys in this set, as it is when they connect.
    Listed(Admitted),
}

/// A set of keys that can be changed while listeners use it. Connections that exist stay.
#[derive(Clone, Debug, Default)]
pub struct Admitted {
    keys: Arc<RwLock<HashSet<PublicKey>>>,
}

impl Admitted {
    /// Exactly these from now on.
    pub fn replace(&self, _keys: HashSet<PublicKey>) {
        unimplemented!()
    }

    /// This one, too.
    pub fn insert(&self, _key: PublicKey) {
        unimplemented!()
    }

    /// This one no more.
    pub fn remove(&self, _key: &PublicKey) {
        unimplemented!()
    }

    /// Is it in?
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.keys.read().is_ok_and(|keys| keys.contains(key))
    }
}

/// Bounds of a socket's queues.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A peer that sends a longer part is cut off.
    pub part_bytes_max: usize,
    /// Messages per peer in libzmq's queue, each way.
    pub queue_frames: u16,
    /// Messages per peer that wait here when libzmq's queue is full; one more is refused.
    pub overflow_frames: usize,
    /// Bytes per peer that wait here when libzmq's queue is full; a message beyond is refused.
    pub overflow_bytes: usize,
}

impl Limits {
    /// For the broker's connections: many small messages.
    pub const CONTROL: Self = Self {
        part_bytes_max: proto_msgs::limits::CONTROL_BYTES_MAX,
        queue_frames: 64,
        overflow_frames: 1024,
        overflow_bytes: 4 * 1024 * 1024,
    };

    /// For direct connections: chunks.
    pub const DIRECT: Self = Self {
        part_bytes_max: proto_msgs::limits::FRAME_BYTES_MAX,
        queue_frames: 16,
        overflow_frames: 1024,
        overflow_bytes: 8 * 1024 * 1024,
    };
}

impl Context {
    /// Starts the I/O thread and, with keys, the door-keeper.
    ///
    /// # Errors
    /// If there are keys and libzmq has no CURVE, or the system gives no resources.
    pub fn new(_security: Security) -> Result<Self, ContextError> {
        unimplemented!()
    }

    /// The own public key; `None` without keys.
    pub fn public_key(&self) -> Option<PublicKey> {
        unimplemented!()
    }

    /// Listens on `endpoint` (`tcp://127.0.0.1:5555`; port `0` or `*`: any free one). Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be used.
    pub fn listen(&self, _endpoint: &str, _admit: Admit, _limits: Limits) -> Result<Listener, ListenError> {
        unimplemented!()
    }

    /// Begins to connect to `endpoint`, and goes on trying, and connects again whenever the connection is lost, until the
    /// dialer is dropped. Returns at once; frames sent before the connection stands wait for it. `their_key` is the
    /// listener's key where the mesh has keys. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the address is none, or a key is missing on one side only.
    pub fn dial(&self, _endpoint: &str, _their_key: Option<PublicKey>, _limits: Limits) -> Result<Dialer, DialError> {
        unimplemented!()
    }
}
