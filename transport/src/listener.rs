//! Owns a listening socket in its direct form (see `direct`), until it is handed to its own task.

use proto_msgs::{Frame, PeerId, PublicKey};
use tokio::task::coop::consume_budget;

use crate::{
    Admit, Context, Door, Inbox, Limits, SendError, Traffic, address,
    direct::Direct,
    outlet::{self, End},
    raw::{self, Errno},
    socket::{self, Socket},
};

/// A bound ROUTER.
#[derive(Debug)]
pub struct Listener {
    direct: Direct,
    endpoint: String,
    _domain: Option<Domain>,
}

/// A message from a peer.
#[derive(Clone, Debug)]
pub struct Received {
    /// The connection on which it came.
    pub peer: PeerId,
    /// The key that the peer proved to hold; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// The message, not decoded yet.
    pub frame: Frame,
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another program listens there.
    #[error("{endpoint} is in use: stop the program that listens there, or choose another port")]
    InUse {
        /// The address.
        endpoint: String,
    },
    /// It is not an address of this machine, or not an address at all.
    #[error("cannot listen on {endpoint}: {reason}")]
    BadAddress {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The listener's entry with the door-keeper. Dropping it removes the entry.
#[derive(Debug)]
struct Domain {
    name: String,
    context: Context,
}

impl Drop for Domain {
    fn drop(&mut self) {
        if let Some((_, doorkeeper)) = self.context.protection() {
            doorkeeper.close(&self.name);
        }
    }
}

impl Listener {
    pub(crate) fn bind(context: &Context, endpoint: &str, admit: Admit, limits: Limits) -> Result<Self, ListenError> {
        let bad = |reason: String| ListenError::BadAddress { endpoint: endpoint.to_owned(), reason };
        let system = |error: zmq::Error| bad(error.to_string());
        if !address::can_be_bound(endpoint) {
            return Err(bad(address::FORM.into()));
        }
        let mut inner = context.inner().socket(zmq::ROUTER).map_err(system)?;
        socket::configure(&inner, &limits).map_err(system)?;
        socket::configure_listener(&inner).map_err(system)?;
        let domain = match context.protection() {
            None => None,
            Some((keys, doorkeeper)) => {
                let name = doorkeeper.open(admit);
                let domain = Domain { name, context: context.clone() };
                socket::protect_listener(&inner, keys, &domain.name).map_err(system)?;
                Some(domain)
            }
        };
        socket::bind(&mut inner, endpoint).map_err(|errno| listen_error(endpoint, errno))?;
        let real = inner.get_last_endpoint().map_err(system)?.unwrap_or_else(|_| endpoint.to_owned());
        let real = address::without_mapping(&real);
        let socket = Socket::new(inner).map_err(|error| bad(error.to_string()))?;
        Ok(Self { direct: Direct::new(socket, limits), endpoint: real, _domain: domain })
    }

    /// The bound address with the actual port.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The next message. Also sends what waits for slow peers. Cancel-safe: may be dropped in a `select!`.
    pub async fn recv(&mut self) -> Received {
        loop {
            // Yields to other tasks now and then, however many messages there are.
            consume_budget().await;
            if let Some(received) = self.try_recv() {
                return received;
            }
            self.direct.flush();
            let is_blocked = self.direct.is_blocked();
            self.direct.socket.ready(true, is_blocked).await;
        }
    }

    /// The next message if it has already arrived. After [`Self::recv`] take some tens of messages with this, then go
    /// back to `recv`, so that neither messages nor other work starve.
    pub fn try_recv(&mut self) -> Option<Received> {
        self.direct.take().map(|(peer, key, frame)| Received { peer, key, frame })
    }

    /// Sends without blocking. If the peer is slow, the message waits in that peer's own bounded queue.
    ///
    /// # Errors
    /// `Gone` if the connection no longer exists, `Full` if that queue is full. The message is dropped and counted.
    pub fn send(&mut self, peer: PeerId, frame: Frame) -> Result<(), SendError> {
        self.direct.send(peer, frame)
    }

    /// Counters of this socket.
    pub fn traffic(&self) -> Traffic {
        self.direct.traffic
    }

    /// Hands the socket to its own task. The inbox is bounded: if nobody reads it, peers are not read either. The
    /// socket closes when the inbox is dropped.
    pub fn spawn(self) -> (Door, Inbox<Received>) {
        let endpoint = self.endpoint.clone();
        let (shared, inbox) = outlet::spawn(self);
        (Door::new(endpoint, shared), inbox)
    }

    /// Waits a moment for queued messages to leave, then closes the socket.
    pub async fn close(mut self) {
        self.direct.close().await;
    }
}

impl End for Listener {
    type Item = Received;

    fn take(&mut self) -> Option<Received> {
        self.try_recv()
    }

    fn direct(&mut self) -> &mut Direct {
        &mut self.direct
    }

    async fn ready(&mut self, wanted: bool, blocked: bool) {
        self.direct.socket.ready(wanted, blocked).await;
    }
}

fn listen_error(endpoint: &str, errno: Errno) -> ListenError {
    let endpoint = endpoint.to_owned();
    match errno {
        libc::EADDRINUSE => ListenError::InUse { endpoint },
        libc::ENODEV | libc::EADDRNOTAVAIL => {
            ListenError::BadAddress { endpoint, reason: "no such address or interface on this machine".into() }
        }
        other => ListenError::BadAddress { endpoint, reason: raw::text_of(other) },
    }
}
