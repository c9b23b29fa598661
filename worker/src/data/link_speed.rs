//! The speed of the lines between clients and this worker, as transfers show it. Owns the figures. Never measures itself.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto_msgs::ClientId;

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
