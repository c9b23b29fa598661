//! The tools shared by all code that carries out orders.

use std::time::{Duration, Instant};

use mesh_core::worker::Event;
use parking_lot::Mutex;
use proto_msgs::{ClientId, ErrorCode, Failure};
use tokio::{sync::mpsc, task::spawn_blocking};

use crate::{
    data::{
        blobs::{BlobStore, Coming},
        keep::Keep,
        payload::MemoryUse,
    },
    probe::Look,
    runners::{pool::Pool, proven::Proven},
};

/// Stores, pool, link speed and channels, shared by the desk and its tasks.
pub(crate) struct Tools {
    pub(crate) store: BlobStore,
    /// Models that attempts receive at present.
    pub(crate) coming: Coming,
    /// Memory that attempts use for payloads.
    pub(crate) memory: MemoryUse,
    pub(crate) pool: Pool,
    pub(crate) keep: Keep,
    pub(crate) link_speed: LinkSpeed,
    /// Triggers a sample of the probe at once.
    pub(crate) look: Look,
    pub(crate) transport: mesh_transport::Context,
    /// Output shapes that batch probes saw.
    pub(crate) proven: Proven,
    /// Events for the machine.
    pub(crate) machine: mpsc::Sender<Event>,
}

/// The speed of direct links, smoothed over the latest transfers of each client. A slow client's own line is not this
/// machine's: the fastest of the latest clients counts.
#[derive(Debug, Default)]
pub(crate) struct LinkSpeed {
    /// Client, bytes per second, and when that was seen; the latest client last.
    clients: Mutex<Vec<(ClientId, u64, Instant)>>,
}

impl LinkSpeed {
    /// Smallest transfer that counts: the speed of a smaller one shows the round trip, not the link.
    const BYTES_MIN: u64 = 1 << 20;

    /// Clients remembered; the one without a transfer for longest goes first.
    const CLIENTS_MAX: usize = 8;

    /// A client that had no transfer for this long before the latest one says nothing of the present.
    const GONE_AFTER: Duration = Duration::from_secs(60);

    /// Smoothed bytes per second; 0 before the first transfer.
    pub(crate) fn get(&self) -> u64 {
        let clients = self.clients.lock();
        let Some((.., latest)) = clients.last() else { return 0 };
        let present = clients.iter().filter(|(.., at)| latest.duration_since(*at) < Self::GONE_AFTER);
        present.map(|(_, bytes_per_s, _)| *bytes_per_s).max().unwrap_or(0)
    }

    /// Time that a transfer would take; none before the first one.
    pub(crate) fn time_for(&self, bytes: u64) -> Duration {
        let bytes_per_s = self.get();
        if bytes_per_s == 0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(bytes as f64 / bytes_per_s as f64).unwrap_or(Duration::MAX)
    }

    /// Adds a client's transfer that took this long.
    pub(crate) fn saw(&self, client: ClientId, bytes: u64, took: Duration) {
        if bytes < Self::BYTES_MIN {
            return;
        }
        self.told(client, bytes, (bytes as f64 / took.as_secs_f64().max(1e-6)) as u64);
    }

    /// Adds a client's transfer whose speed was measured elsewhere.
    pub(crate) fn told(&self, client: ClientId, bytes: u64, bytes_per_s: u64) {
        self.told_at(Instant::now(), client, bytes, bytes_per_s);
    }

    fn told_at(&self, at: Instant, client: ClientId, bytes: u64, bytes_per_s: u64) {
        if bytes < Self::BYTES_MIN || bytes_per_s == 0 {
            return;
        }
        let mut clients = self.clients.lock();
        let known = clients.iter().position(|(known, ..)| *known == client).map(|at| clients.remove(at).1);
        // The latest transfer counts a quarter: one that shared its link says little.
        let smoothed = known.map_or(bytes_per_s, |old| old - old / 4 + bytes_per_s / 4);
        if clients.len() == Self::CLIENTS_MAX {
            clients.remove(0);
        }
        clients.push((client, smoothed, at));
    }
}

/// Runs work that waits for the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let panicked = |error| {
        Failure::new(ErrorCode::WorkerLost, format!("the worker failed at the disk (a bug, see its log): {error}"))
    };
    spawn_blocking(work).await.map_err(panicked)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_transfers_say_nothing_and_large_ones_are_smoothed() {
        let (speed, client) = (LinkSpeed::default(), ClientId::from_bytes([1; 16]));
        speed.saw(client, 1000, Duration::from_secs(1));
        assert_eq!(speed.get(), 0);
        speed.saw(client, 100 << 20, Duration::from_secs(1));
        assert_eq!(speed.get(), 100 << 20);
        speed.saw(client, 200 << 20, Duration::from_secs(1));
        assert_eq!(speed.get(), 125 << 20);
    }

    #[test]
    fn a_slow_client_does_not_make_the_link_look_slow_to_others() {
        let (speed, second) = (LinkSpeed::default(), Duration::from_secs(1));
        speed.saw(ClientId::from_bytes([1; 16]), 100 << 20, second);
        (0..100).for_each(|_| speed.saw(ClientId::from_bytes([2; 16]), 1 << 20, second));
        assert_eq!(speed.get(), 100 << 20);
        // A fast client that has left says nothing any more.
        let later = Instant::now() + LinkSpeed::GONE_AFTER;
        speed.told_at(later, ClientId::from_bytes([2; 16]), 1 << 20, 1 << 20);
        assert_eq!(speed.get(), 1 << 20);
    }
}
