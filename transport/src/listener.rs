//! A listening socket in its direct form: owned by one task, no hop, no lock.

use std::collections::HashMap;

use proto_msgs::{Frame, PeerId, PublicKey};
use tokio::{
    task::coop::consume_budget,
    time::{Duration, timeout},
};

use crate::{
    Admit, Context, Door, Inbox, Limits, SendError, address,
    outlet::{self, End},
    queue::Queue,
    raw::{self, Errno},
    socket::{self, Socket, Taken},
};

/// How long a socket that is closed waits for slow peers to take what is queued.
pub(crate) const CLOSE_WAIT: Duration = Duration::from_millis(500);

/// A bound ROUTER.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    endpoint: String,
    limits: Limits,
    /// Peers that libzmq takes no more messages for at the moment.
    slow: HashMap<PeerId, Queue>,
    traffic: Traffic,
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

/// Counters of a socket since its start.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    /// Messages received.
    pub received: u64,
    /// Messages handed to libzmq.
    pub sent: u64,
    /// Messages dropped because a peer's queue was full.
    pub dropped_full: u64,
    /// Messages dropped because the peer was gone.
    pub dropped_gone: u64,
    /// Messages received that had no peer name, or too many parts.
    pub malformed: u64,
    /// Gauge: messages waiting here for slow peers.
    pub waiting: u64,
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
        Ok(Self { socket, endpoint: real, limits, slow: HashMap::new(), traffic: Traffic::default(), _domain: domain })
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
            self.flush();
            self.socket.ready(true, !self.slow.is_empty()).await;
        }
    }

    /// The next message if it is here already: after [`Self::recv`], take up to some tens of these before anything else, then
    /// come back to `recv`, so that neither messages nor other work starve.
    pub fn try_recv(&mut self) -> Option<Received> {
        loop {
            match self.socket.take()? {
                Taken::Frame { peer, key, frame } => {
                    self.traffic.received += 1;
                    return Some(Received { peer, key, frame });
                }
                Taken::Malformed => self.traffic.malformed += 1,
            }
        }
    }

    /// Sends without ever blocking; what a slow peer cannot take yet waits in that peer's own bounded queue.
    ///
    /// # Errors
    /// `Gone` if there is no such connection any more, `Full` if that queue is full. The message is dropped and counted.
    pub fn send(&mut self, peer: PeerId, frame: Frame) -> Result<(), SendError> {
        // Usually nobody is slow; looking that up would cost as much as the rest.
        let queue = if self.slow.is_empty() { None } else { self.slow.get_mut(&peer) };
        let sent = match queue {
            Some(queue) => queue.push(frame, &self.limits).map(|()| self.traffic.waiting += 1),
            None => match self.socket.offer(&peer, &frame) {
                Ok(()) => {
                    self.traffic.sent += 1;
                    Ok(())
                }
                Err(SendError::Full) => {
                    let queue = self.slow.entry(peer).or_default();
                    queue.push(frame, &self.limits).map(|()| self.traffic.waiting += 1)
                }
                Err(SendError::Gone) => Err(SendError::Gone),
            },
        };
        match sent {
            Err(SendError::Full) => self.traffic.dropped_full += 1,
            Err(SendError::Gone) => self.traffic.dropped_gone += 1,
            Ok(()) => {}
        }
        sent
    }

    /// Counters.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Hands the socket to a task of its own. The inbox is bounded: while nobody reads it, peers are not read either.
    /// The socket closes when the inbox is dropped.
    pub fn spawn(self) -> (Door, Inbox<Received>) {
        let (endpoint, limits, traffic) = (self.endpoint.clone(), self.limits, self.traffic);
        let (shared, inbox) = outlet::spawn(self, limits, traffic);
        (Door::new(endpoint, shared), inbox)
    }

    /// Gives what is queued a moment to leave, then closes the socket.
    pub async fn close(mut self) {
        let flushed = async {
            while !self.slow.is_empty() {
                self.flush();
                self.socket.ready(false, true).await;
            }
        };
        let _slow_peers_lose_the_rest = timeout(CLOSE_WAIT, flushed).await;
        self.socket.linger();
    }

    /// Tries again to send what waits.
    fn flush(&mut self) {
        let Self { socket, slow, traffic, .. } = self;
        slow.retain(|peer, queue| {
            let sent = queue.drain(usize::MAX, |frame| socket.offer(peer, frame));
            match sent {
                Ok(sent) => {
                    traffic.sent += sent as u64;
                    traffic.waiting -= sent as u64;
                }
                Err(_) => {
                    traffic.dropped_gone += queue.len() as u64;
                    traffic.waiting -= queue.len() as u64;
                }
            }
            sent.is_ok() && !queue.is_empty()
        });
    }
}

impl End for Listener {
    type Item = Received;

    fn take(&mut self) -> Option<Received> {
        self.try_recv()
    }

    fn offer(&mut self, peer: &PeerId, frame: &Frame) -> Result<(), SendError> {
        self.socket.offer(peer, frame)
    }

    async fn ready(&mut self, wanted: bool, blocked: bool) {
        self.socket.ready(wanted, blocked).await;
    }

    /// Messages that waited in the direct form.
    fn leftovers(&mut self) -> Vec<(PeerId, Queue)> {
        self.slow.drain().collect()
    }

    fn malformed(&self) -> u64 {
        self.traffic.malformed
    }

    fn close(self) {
        self.socket.linger();
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
