//! Owns the speed of a link, measured by acknowledgements.

use std::time::{Duration, Instant};

/// Fewer bytes say nothing about a link.
const BYTES_MIN: u64 = 1024 * 1024;

/// A measurement shorter than this is noise.
const TIME_MIN: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub(crate) struct LinkRate {
    /// Start of the measurement: the first chunk on this link.
    since: Option<Instant>,
    acked_bytes: u64,
    last: Option<f64>,
    /// Plain bytes sent, and their size on the wire below.
    plain_bytes: u64,
    wire_bytes: u64,
}

impl LinkRate {
    /// Starts with an earlier measurement, bytes per second; 0: there is none.
    pub(crate) fn presume(&mut self, bytes_per_s: u64) {
        self.last = (bytes_per_s > 0).then_some(bytes_per_s as f64);
    }

    pub(crate) fn sent(&mut self, plain_bytes: u64, wire_bytes: u64, now: Instant) {
        self.since.get_or_insert(now);
        self.plain_bytes += plain_bytes;
        self.wire_bytes += wire_bytes;
    }

    pub(crate) fn acked(&mut self, plain_bytes: u64, now: Instant) {
        let Some(since) = self.since else { return };
        self.acked_bytes += plain_bytes;
        let elapsed = now.saturating_duration_since(since);
        if self.acked_bytes >= BYTES_MIN && elapsed >= TIME_MIN {
            let shrunk = self.wire_bytes as f64 / self.plain_bytes.max(1) as f64;
            self.last = Some(self.acked_bytes as f64 * shrunk / elapsed.as_secs_f64());
        }
    }

    /// Notes a broken link: the measurement starts again, the last result stays.
    pub(crate) fn pause(&mut self) {
        *self = Self { last: self.last, ..Self::default() };
    }

    /// Bytes per second on the wire; `None` before the first measurement.
    pub(crate) fn bytes_per_s(&self) -> Option<f64> {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_what_was_acknowledged_by_the_time_it_took() {
        let (mut rate, start) = (LinkRate::default(), Instant::now());
        assert_eq!(rate.bytes_per_s(), None);
        rate.sent(4 << 20, 4 << 20, start);
        rate.acked(1 << 10, start + Duration::from_secs(1));
        assert_eq!(rate.bytes_per_s(), None, "too little to say");
        rate.acked((2 << 20) - (1 << 10), start + Duration::from_secs(2));
        assert_eq!(rate.bytes_per_s(), Some((1 << 20) as f64));
    }

    #[test]
    fn compressed_bytes_count_as_what_they_are_on_the_wire() {
        let (mut rate, start) = (LinkRate::default(), Instant::now());
        rate.sent(4 << 20, 2 << 20, start);
        rate.acked(4 << 20, start + Duration::from_secs(1));
        assert_eq!(rate.bytes_per_s(), Some((2 << 20) as f64));
    }
}
