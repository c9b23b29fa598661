//! A listening socket, in its direct form (see `direct`) until it is handed to a task of its own.

use proto_msgs::{Frame, PeerId, PublicKey};
use tokio::task::coop::consume_budget;

use crate::{
    Admit, Context, Door, Inbox, Limits, SendError, Traffic, address,
    direct::Direct,
    outlet::{self, End},
    queue::Queue,
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

/// Something a peer sent.
#[derive(Clone, Debug)]
pub struct Received {
    /// The connection it came on.
    pub peer: PeerId,
    /// The key that the peer proved to hold; `None` in a mesh without keys.
    pub key: Option<PublicKey>,
    /// What it sent; not decoded yet.
    pub frame: Frame,
}

/// Why nobody can be listened to at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another program has it.
    #[error("{endpoint} is in use: stop the program that listens there, or choose another port")]
    InUse {
        /// The address.
        endpoint: String,
    },
    /// Not an address of this machine, or no address at all.
    #[error("cannot listen on {endpoint}: {reason}")]
    BadAddress {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The listener's entry with the door-keeper, taken out when the listener goes.
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

    /// The address bound, with the real port.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The next message. Also carries on with what waits for slow peers. Safe to drop (in a `select!`).
    pub async fn recv(&mut self) -> Received {
        loop {
            // Lets other tasks in now and then, however many messages there are.
            consume_budget().await;
            if let Some(received) = self.try_recv() {
                return received;
            }
            self.direct.flush();
            let is_blocked = self.direct.is_blocked();
            self.direct.socket.ready(true, is_blocked).await;
        }
    }

    /// The next message if it is here already: after [`Self::recv`], take up to some tens of these before anything else, then
    /// come back to `recv`, so that neither messages nor other work starve.
    pub fn try_recv(&mut self) -> Option<Received> {
        self.direct.take().map(|(peer, key, frame)| Received { peer, key, frame })
    }

    /// Sends without ever blocking; what a slow peer cannot take yet waits in that peer's own bounded queue.
    ///
    /// # Errors
    /// `Gone` if there is no such connection any more, `Full` if that queue is full. The message is dropped and counted.
    pub fn send(&mut self, peer: PeerId, frame: Frame) -> Result<(), SendError> {
        self.direct.send(peer, frame)
    }

    /// Counters.
    pub fn traffic(&self) -> Traffic {
        self.direct.traffic
    }

    /// Hands the socket to a task of its own. The inbox is bounded: while nobody reads it, peers are not read either.
    /// The socket closes when the inbox is dropped.
    pub fn spawn(self) -> (Door, Inbox<Received>) {
        let (endpoint, limits, traffic) = (self.endpoint.clone(), self.direct.limits, self.direct.traffic);
        let (shared, inbox) = outlet::spawn(self, limits, traffic);
        (Door::new(endpoint, shared), inbox)
    }

    /// Gives what is queued a moment to leave, then closes the socket.
    pub async fn close(mut self) {
        self.direct.close().await;
    }
}

impl End for Listener {
    type Item = Received;

    fn take(&mut self) -> Option<Received> {
        self.try_recv()
    }

    fn offer(&mut self, peer: &PeerId, frame: &Frame) -> Result<(), SendError> {
        self.direct.socket.offer(peer, frame)
    }

    async fn ready(&mut self, wanted: bool, blocked: bool) {
        self.direct.socket.ready(wanted, blocked).await;
    }

    /// Messages that waited in the direct form.
    fn leftovers(&mut self) -> Vec<(PeerId, Queue)> {
        self.direct.take_waiting()
    }

    fn malformed(&self) -> u64 {
        self.direct.traffic.malformed
    }

    fn close(self) {
        self.direct.socket.linger();
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
