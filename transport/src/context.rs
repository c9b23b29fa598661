//! What all sockets of a process share: the ZeroMQ context, the own keys, the door-keeper (ZAP).

use std::{
    collections::HashSet,
    fmt, io,
    sync::{Arc, PoisonError, RwLock},
};

use proto_msgs::PublicKey;

use crate::{DialError, Dialer, KeyPair, ListenError, Listener, doorkeeper::Doorkeeper, keys::KeyError};

/// How the node's connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all: plain TCP, peers have no keys.
    None,
    /// Encrypted and authenticated with these keys (CURVE).
    Keys(KeyPair),
}

/// The process' sockets. Cheap to clone. Dropping the last of clones and sockets waits (half a second at most) for what
/// closed sockets still have to send, so let it be dropped before the process ends.
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
    pub fn replace(&self, keys: HashSet<PublicKey>) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// This one, too.
    pub fn insert(&self, key: PublicKey) {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).insert(key);
    }

    /// This one no more.
    pub fn remove(&self, key: &PublicKey) {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Is it in?
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).contains(key)
    }
}

/// Bounds of a socket's queues.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A peer that sends a longer part is cut off.
    pub part_bytes_max: usize,
    /// Messages per peer in libzmq's queue, each way: what a peer may make a listener hold is this many of the longest.
    pub queue_frames: u16,
    /// Messages per peer that wait here when libzmq's queue is full; one more is refused.
    pub overflow_frames: usize,
    /// Bytes per peer that wait here when libzmq's queue is full; a message beyond is refused.
    pub overflow_bytes: usize,
    /// A dialer pings this often, milliseconds.
    pub ping_every_ms: u16,
    /// A connection on which nothing was heard for this long is closed, milliseconds.
    pub silence_ms_max: u16,
}

impl Limits {
    /// For the broker's connections: many small messages.
    pub const CONTROL: Self = Self {
        part_bytes_max: proto_msgs::limits::CONTROL_BYTES_MAX,
        queue_frames: 256,
        overflow_frames: 1024,
        overflow_bytes: 4 * 1024 * 1024,
        ping_every_ms: 1000,
        silence_ms_max: 3000,
    };

    /// For direct connections: chunks. Silence is longer than what a chunk of 256 KiB takes at 0.5 Mbit/s, because a ping
    /// waits behind the chunk under way.
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
    /// If there are keys and libzmq has no CURVE, or the system gives no resources.
    pub fn new(security: Security) -> Result<Self, ContextError> {
        let inner = zmq::Context::new();
        let doorkeeper = match &security {
            Security::None => None,
            Security::Keys(_) if zmq::has("curve") != Some(true) => return Err(KeyError::NoCurve.into()),
            Security::Keys(_) => Some(Arc::new(Doorkeeper::start(&inner)?)),
        };
        Ok(Self { doorkeeper, inner, security: Arc::new(security) })
    }

    /// The own public key; `None` without keys.
    pub fn public_key(&self) -> Option<PublicKey> {
        match &*self.security {
            Security::None => None,
            Security::Keys(keys) => Some(keys.public()),
        }
    }

    /// Listens on `endpoint` (`tcp://127.0.0.1:5555`; port `0` or `*`: any free one). Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be used.
    pub fn listen(&self, endpoint: &str, admit: Admit, limits: Limits) -> Result<Listener, ListenError> {
        Listener::bind(self, endpoint, admit, limits)
    }

    /// Begins to connect to `endpoint`, and goes on trying, and connects again whenever the connection is lost, until the
    /// dialer is dropped. Returns at once; frames sent before the connection stands wait for it. `their_key` is the
    /// listener's key where the mesh has keys. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the address is none, or a key is missing on one side only.
    pub fn dial(&self, endpoint: &str, their_key: Option<PublicKey>, limits: Limits) -> Result<Dialer, DialError> {
        Dialer::connect(self, endpoint, their_key, limits)
    }

    pub(crate) fn inner(&self) -> &zmq::Context {
        &self.inner
    }

    /// Own keys and door-keeper: both or neither.
    pub(crate) fn protection(&self) -> Option<(&KeyPair, &Doorkeeper)> {
        match (&*self.security, &self.doorkeeper) {
            (Security::Keys(keys), Some(doorkeeper)) => Some((keys, doorkeeper)),
            _ => None,
        }
    }
}
