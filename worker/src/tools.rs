//! The tools shared by all code that carries out orders.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use mesh_core::worker::Event;
use tokio::sync::mpsc;

use crate::{
    batch::Proven,
    blobs::{BlobStore, Coming},
    keep::Keep,
    payload::MemoryUse,
    pool::Pool,
    probe::Look,
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

/// The speed of direct links, smoothed over the latest transfers.
#[derive(Debug, Default)]
pub(crate) struct LinkSpeed {
    bytes_per_s: AtomicU64,
}

impl LinkSpeed {
    /// Smallest transfer that counts: the speed of a smaller one shows the round trip, not the link.
    const BYTES_MIN: u64 = 1 << 20;

    /// Smoothed bytes per second; 0 before the first transfer.
    pub(crate) fn get(&self) -> u64 {
        self.bytes_per_s.load(Ordering::Relaxed)
    }

    /// Adds a transfer that took this long.
    pub(crate) fn saw(&self, bytes: u64, took: Duration) {
        if bytes < Self::BYTES_MIN {
            return;
        }
        self.told(bytes, (bytes as f64 / took.as_secs_f64().max(1e-6)) as u64);
    }

    /// Adds a transfer whose speed was measured elsewhere.
    pub(crate) fn told(&self, bytes: u64, now: u64) {
        if bytes < Self::BYTES_MIN || now == 0 {
            return;
        }
        let old = self.get();
        // The latest transfer counts a quarter: one that shared its link says little.
        let smoothed = if old == 0 { now } else { old - old / 4 + now / 4 };
        self.bytes_per_s.store(smoothed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_transfers_say_nothing_and_large_ones_are_smoothed() {
        let speed = LinkSpeed::default();
        speed.saw(1000, Duration::from_secs(1));
        assert_eq!(speed.get(), 0);
        speed.saw(100 << 20, Duration::from_secs(1));
        assert_eq!(speed.get(), 100 << 20);
        speed.saw(200 << 20, Duration::from_secs(1));
        assert_eq!(speed.get(), 125 << 20);
    }
}
