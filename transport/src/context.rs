//! Owns what all sockets of a process share: the ZeroMQ context, the node's own keys, the door-keeper (ZAP).

use std::{collections::HashSet, fmt, io, sync::Arc};

use parking_lot::RwLock;
use proto_msgs::PublicKey;

use crate::{DialError, Dialer, KeyPair, ListenError, Listener, doorkeeper::Doorkeeper, keys::KeyError};

/// How the node's connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not protected: plain TCP, and peers have no keys.
    None,
    /// Encrypted and authenticated with these keys (CURVE).
    Keys(KeyPair),
}

/// The ZeroMQ context of a process. Cheap to clone. Dropping the last clone or socket waits up to half a second until
/// closed sockets have sent their messages, so drop it before the process ends.
#[derive(Clone)]
pub struct Context {
    // Dropped first: the door-keeper holds the context, too.
    doorkeeper: Option<Arc<Doorkeeper>>,
    inner: zmq::Context,
    security: Arc<Security>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("security", &self.security).finish_non_exhaustive()
    }
}

/// Why a context cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The operating system gave no resources.
    #[error("cannot start messaging: {0}")]
    System(#[from] io::Error),
}

/// Which peers may connect to a listener. Without keys every peer may.
#[derive(Clone, Debug)]
pub enum Admit {
    /// Every key. It comes with each message, and tickets are bound to it.
    Anyone,
    /// Only keys that are in this set when the peer connects.
    Listed(Admitted),
}

/// A set of keys that can change while listeners use it. Existing connections stay.
#[derive(Clone, Debug, Default)]
pub struct Admitted {
    keys: Arc<RwLock<HashSet<PublicKey>>>,
}

impl Admitted {
    /// Replaces the whole set.
    pub fn replace(&self, keys: HashSet<PublicKey>) {
        *self.keys.write() = keys;
    }

    /// Adds one key.
    pub fn insert(&self, key: PublicKey) {
        self.keys.write().insert(key);
    }

    /// Removes one key.
    pub fn remove(&self, key: &PublicKey) {
        self.keys.write().remove(key);
    }

    /// Whether the key is in the set.
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.keys.read().contains(key)
    }
}

/// Bounds of a socket's queues.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest part of a message. A peer that sends a longer one is cut off, and so is one that sends a third part.
    pub part_bytes_max: usize,
    /// Messages per peer in libzmq's queue, each way. A peer can make a listener hold this many of the longest
    /// messages, and one that is not finished.
    pub queue_frames: u16,
    /// Messages per peer that wait in this process when libzmq's queue is full. One more is refused.
    pub overflow_frames: usize,
    /// Bytes per peer that wait in this process when libzmq's queue is full. A message beyond is refused.
    pub overflow_bytes: usize,
    /// Interval of a dialer's pings, milliseconds.
    pub ping_every_ms: u16,
    /// Longest silence of a connection, milliseconds. After it the connection is closed.
    pub silence_ms_max: u16,
}

impl Limits {
    /// Limits of the broker's connections: many small messages.
    pub const CONTROL: Self = Self {
        part_bytes_max: proto_msgs::limits::CONTROL_BYTES_MAX,
        queue_frames: 256,
        overflow_frames: 1024,
        overflow_bytes: 4 * 1024 * 1024,
        ping_every_ms: 1000,
        silence_ms_max: 3000,
    };

    /// Limits of direct links: chunks. The longest silence exceeds the time of a 256 KiB chunk at 0.5 Mbit/s, because a
    /// ping waits behind the chunk under way.
    pub const DIRECT: Self = Self {
        part_bytes_max: proto_msgs::limits::FRAME_BYTES_MAX,
        queue_frames: 16,
        overflow_frames: 1024,
        overflow_bytes: 8 * 1024 * 1024,
        ping_every_ms: 1000,
        silence_ms_max: 5000,
    };
}

impl Context {
    /// Starts the I/O thread and, with keys, the door-keeper.
    ///
    /// # Errors
    /// If there are keys but libzmq has no CURVE, or the system gives no resources.
    pub fn new(security: Security) -> Result<Self, ContextError> {
        let inner = zmq::Context::new();
        let doorkeeper = match &security {
            Security::None => None,
            Security::Keys(_) if zmq::has("curve") != Some(true) => return Err(KeyError::NoCurve.into()),
            Security::Keys(_) => Some(Arc::new(Doorkeeper::start(&inner)?)),
        };
        Ok(Self { doorkeeper, inner, security: Arc::new(security) })
    }

    /// This node's public key; `None` without keys.
    pub fn public_key(&self) -> Option<PublicKey> {
        match &*self.security {
            Security::None => None,
            Security::Keys(keys) => Some(keys.public()),
        }
    }

    /// Listens on `endpoint` (`tcp://127.0.0.1:5555`; port `0` or `*` means any free one). Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be used.
    pub fn listen(&self, endpoint: &str, admit: Admit, limits: Limits) -> Result<Listener, ListenError> {
        Listener::bind(self, endpoint, admit, limits)
    }

    /// Starts to connect to `endpoint` and returns at once. Until the dialer is dropped it tries again, and connects
    /// again whenever the connection is lost. Frames sent before the connection is up wait for it. `their_key` is the
    /// listener's key in a mesh with keys. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the endpoint is not an address, or only one side has a key.
    pub fn dial(&self, endpoint: &str, their_key: Option<PublicKey>, limits: Limits) -> Result<Dialer, DialError> {
        Dialer::connect(self, endpoint, their_key, limits)
    }

    pub(crate) fn inner(&self) -> &zmq::Context {
        &self.inner
    }

    /// This node's keys and its door-keeper: both or neither.
    pub(crate) fn protection(&self) -> Option<(&KeyPair, &Doorkeeper)> {
        match (&*self.security, &self.doorkeeper) {
            (Security::Keys(keys), Some(doorkeeper)) => Some((keys, doorkeeper)),
            _ => None,
        }
    }
}
