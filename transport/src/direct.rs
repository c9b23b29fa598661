//! Owns a socket in its direct form: used by one task, no hop, no lock.
//!
//! Owns the bounded queues of slow peers and the counters. Never: who the peers are, changes of connections.

use std::{
    collections::HashMap,
    mem,
    time::{Duration, Instant},
};

use proto_msgs::{Frame, PeerId, PublicKey};
use tokio::time::timeout;

use crate::{
    Limits, SendError,
    queue::Queue,
    socket::{Socket, Taken},
};

/// How long a closing socket waits for slow peers to take their queued messages.
pub(crate) const CLOSE_WAIT: Duration = Duration::from_millis(500);

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
    /// Messages received that had no peer name. (A peer that sends too many parts is cut off.)
    pub malformed: u64,
    /// Gauge: messages that wait in this process for slow peers.
    pub waiting: u64,
}

#[derive(Debug)]
pub(crate) struct Direct {
    pub(crate) socket: Socket,
    pub(crate) limits: Limits,
    pub(crate) traffic: Traffic,
    /// Peers whose libzmq queue is full, with the messages that wait for them.
    slow: HashMap<PeerId, Queue>,
}

impl Direct {
    pub(crate) fn new(socket: Socket, limits: Limits) -> Self {
        Self { socket, limits, traffic: Traffic::default(), slow: HashMap::new() }
    }

    /// The next message if it has already arrived, with its peer and the key that the peer proved to hold.
    pub(crate) fn take(&mut self) -> Option<(PeerId, Option<PublicKey>, Frame)> {
        loop {
            match self.socket.take()? {
                Taken::Frame { peer, key, frame } => {
                    self.traffic.received += 1;
                    return Some((peer, key, frame));
                }
                Taken::Malformed => self.traffic.malformed += 1,
            }
        }
    }

    /// Sends without blocking. If the peer is slow, the message waits in that peer's own bounded queue.
    pub(crate) fn send(&mut self, peer: PeerId, frame: Frame) -> Result<(), SendError> {
        // Usually no peer is slow, and a look-up would cost as much as the rest.
        let is_slow = !self.slow.is_empty() && self.slow.contains_key(&peer);
        let offered = if is_slow { Err(SendError::Full) } else { self.socket.offer(&peer, &frame) };
        let sent = match offered {
            Err(SendError::Full) => {
                let queued = self.slow.entry(peer).or_default().push(frame, &self.limits);
                queued.map(|()| self.traffic.waiting += 1)
            }
            offered => offered.map(|()| self.traffic.sent += 1),
        };
        match sent {
            Err(SendError::Full) => self.traffic.dropped_full += 1,
            Err(SendError::Gone) => self.traffic.dropped_gone += 1,
            Ok(()) => {}
        }
        sent
    }

    /// Whether messages wait for some slow peer.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.slow.is_empty()
    }

    /// Tries again to send the waiting messages.
    pub(crate) fn flush(&mut self) {
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

    /// The waiting messages, handed to another form of the socket.
    pub(crate) fn take_waiting(&mut self) -> Vec<(PeerId, Queue)> {
        mem::take(&mut self.slow).into_iter().collect()
    }

    /// Waits a moment for the waiting messages to leave, then closes the socket. A slow peer loses the rest.
    pub(crate) async fn close(&mut self) {
        let until = Instant::now() + CLOSE_WAIT;
        while self.is_blocked() {
            self.flush();
            let left = until.saturating_duration_since(Instant::now());
            if timeout(left, self.socket.ready(false, true)).await.is_err() {
                break;
            }
        }
        self.socket.linger();
    }
}
