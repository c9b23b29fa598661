//! Owns how much of an upload may be under way at a time, so that later messages on the same link are not late.
//!
//! A link holds everything that was sent and not yet acknowledged. On a fast link a whole window is gone at once. On a
//! slow one it is many seconds of queue, and the opening of another attempt, a cancel or a sign of life waits behind
//! it. So an upload keeps no more under way than its link delivers in two round trips and [`AHEAD`]: one round trip to
//! fill the link, one to find out whether it carries more. Chunks beyond that would only wait. The estimates are those
//! of BBR (Cardwell et al., ACM Queue 14(5), 2016): the best recent delivery rate, and the shortest round trip.
//!
//! Owns these two estimates. Never: what is sent, the peer's window.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Data that waits on the link beyond the round trips. Long enough that a slow sender never lets the link fall idle
/// (credits come every 100 ms at least), short compared to the seconds after which peers are given up.
const AHEAD: Duration = Duration::from_millis(250);

/// Limit before the link's speed is known: blobs in memory are sent at once.
const FIRST_BYTES: u64 = 1024 * 1024;

/// Smallest limit: one smallest chunk on its way, one behind it.
const BYTES_MIN: u64 = 32 * 1024;

/// A rate is believed for one to two of these periods: links change, but a pause of the receiver's disk is not a
/// change.
const MEMORY: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Chunks under way, oldest first.
    under_way: VecDeque<Mark>,
    sent_bytes: u64,
    delivered_bytes: u64,
    delivered_at: Option<Instant>,
    /// Speed measured by earlier uploads, bytes per second.
    presumed: Option<f64>,
    round_trip: Option<Duration>,
    rate: Option<BestLately>,
}

/// A chunk under way, and what had been delivered when it was sent.
#[derive(Clone, Copy, Debug)]
struct Mark {
    sent_at: Instant,
    /// All bytes sent, this chunk's included.
    end_bytes: u64,
    delivered_bytes: u64,
    delivered_at: Instant,
}

/// The greatest rate of the current period and of the one before, bytes per second.
#[derive(Clone, Copy, Debug)]
struct BestLately {
    now: f64,
    before: f64,
    since: Instant,
}

impl Pace {
    /// Starts with an earlier measurement, bytes per second; 0: there is none.
    pub(crate) fn presume(&mut self, bytes_per_s: u64) {
        self.presumed = (bytes_per_s > 0).then_some(bytes_per_s as f64);
    }

    /// Bytes that may be under way.
    pub(crate) fn bytes_max(&self) -> u64 {
        let measured = self.rate.map(|lately| lately.now.max(lately.before));
        let Some(rate) = measured.or(self.presumed) else { return FIRST_BYTES };
        let useful = rate * (2 * self.round_trip.unwrap_or_default() + AHEAD).as_secs_f64();
        (useful as u64).max(BYTES_MIN)
    }

    /// Notes that a chunk was sent.
    pub(crate) fn sent(&mut self, bytes: u64, now: Instant) {
        self.sent_bytes += bytes;
        // While nothing is under way nothing can be delivered, so that time does not count.
        let delivered_at = if self.under_way.is_empty() { now } else { self.delivered_at.unwrap_or(now) };
        let (end_bytes, delivered_bytes) = (self.sent_bytes, self.delivered_bytes);
        self.under_way.push_back(Mark { sent_at: now, end_bytes, delivered_bytes, delivered_at });
    }

    /// Notes that the peer acknowledged this many more bytes.
    pub(crate) fn acked(&mut self, bytes: u64, now: Instant) {
        self.delivered_bytes += bytes;
        let arrived = self.under_way.partition_point(|mark| mark.end_bytes <= self.delivered_bytes);
        let last = self.under_way.drain(..arrived).next_back();
        if let Some(last) = last {
            let round_trip = now.saturating_duration_since(last.sent_at);
            self.round_trip = Some(self.round_trip.map_or(round_trip, |least| least.min(round_trip)));
            let took = now.saturating_duration_since(last.delivered_at).max(Duration::from_micros(1));
            let delivered = self.delivered_bytes - last.delivered_bytes;
            self.note_rate(delivered as f64 / took.as_secs_f64(), now);
        }
        self.delivered_at = Some(now);
    }

    /// Forgets the chunks under way, which will not be acknowledged as sent: the link broke, or the peer needs
    /// something else.
    pub(crate) fn restart(&mut self) {
        self.under_way.clear();
        (self.sent_bytes, self.delivered_bytes, self.delivered_at) = (0, 0, None);
    }

    fn note_rate(&mut self, rate: f64, now: Instant) {
        let lately = self.rate.get_or_insert(BestLately { now: rate, before: 0.0, since: now });
        if now.saturating_duration_since(lately.since) > MEMORY {
            *lately = BestLately { now: rate, before: lately.now, since: now };
        }
        lately.now = lately.now.max(rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    /// Uses a link of this speed and round trip for this time, with as many chunks under way as allowed. Returns the
    /// bytes delivered.
    fn uploads(pace: &mut Pace, bytes_per_s: f64, round_trip: Duration, time: Duration) -> u64 {
        let (start, mut now) = (Instant::now(), Duration::ZERO);
        let (mut on_it, mut under_way, mut idle_from, mut delivered) = (VecDeque::new(), 0, Duration::ZERO, 0);
        while now < time {
            let chunk = (16 * KIB).min(pace.bytes_max());
            while under_way + chunk <= pace.bytes_max() {
                pace.sent(chunk, start + now);
                idle_from = idle_from.max(now) + Duration::from_secs_f64(chunk as f64 / bytes_per_s);
                on_it.push_back((idle_from + round_trip, chunk));
                under_way += chunk;
            }
            let (acked_at, bytes) = on_it.pop_front().expect("something is always under way");
            now = acked_at;
            (under_way, delivered) = (under_way - bytes, delivered + bytes);
            pace.acked(bytes, start + now);
        }
        delivered
    }

    #[test]
    fn a_slow_link_holds_a_third_of_a_second_and_is_never_idle() {
        let (mut pace, a_mib) = (Pace::default(), 1024.0 * 1024.0);
        let delivered = uploads(&mut pace, a_mib, Duration::from_millis(20), Duration::from_secs(20));
        assert!(delivered as f64 > 19.8 * a_mib, "{delivered} bytes in 20 s");
        assert!(pace.bytes_max() < 350 * KIB, "{} bytes under way", pace.bytes_max());
    }

    #[test]
    fn a_long_way_is_filled() {
        let (mut pace, ten_mib) = (Pace::default(), 10.0 * 1024.0 * 1024.0);
        let delivered = uploads(&mut pace, ten_mib, Duration::from_millis(600), Duration::from_secs(30));
        assert!(delivered as f64 > 27.0 * ten_mib, "{delivered} bytes in 30 s");
    }

    #[test]
    fn a_link_that_became_slow_is_believed_after_some_seconds() {
        let (mut pace, a_mib) = (Pace::default(), 1024.0 * 1024.0);
        let round_trip = Duration::from_millis(1);
        uploads(&mut pace, 100.0 * a_mib, round_trip, Duration::from_secs(1));
        assert!(pace.bytes_max() > 16 * 1024 * KIB, "{}", pace.bytes_max());
        pace.restart();
        uploads(&mut pace, a_mib, round_trip, Duration::from_secs(60));
        assert!(pace.bytes_max() < 350 * KIB, "{} bytes under way", pace.bytes_max());
    }

    #[test]
    fn what_is_known_of_a_link_holds_for_the_first_chunks() {
        let mut pace = Pace::default();
        assert_eq!(pace.bytes_max(), FIRST_BYTES);
        pace.presume(400 * KIB);
        assert_eq!(pace.bytes_max(), 100 * KIB);
    }
}
