//! The broker's wall clock, as it was told last. Owns the conversion to this machine's clock, which may be wrong by hours:
//! a Raspberry Pi has none of its own.

use std::time::Duration;

use crate::MonoTime;

/// What the broker said its wall clock was, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct BrokerClock {
    pub(super) told_unix_ms: u64,
    pub(super) at: MonoTime,
}

impl BrokerClock {
    /// The broker's wall clock at this time.
    pub(super) fn unix_ms(self, now: MonoTime) -> u64 {
        self.told_unix_ms.saturating_add(now.since_us(self.at) / 1000)
    }

    /// This moment of the broker's clock by this machine's.
    pub(super) fn when(self, unix_ms: u64) -> MonoTime {
        let (ahead_ms, ago_ms) = (unix_ms.saturating_sub(self.told_unix_ms), self.told_unix_ms.saturating_sub(unix_ms));
        self.at + Duration::from_millis(ahead_ms) - Duration::from_millis(ago_ms)
    }
}
