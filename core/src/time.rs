//! Time as the machines are told it.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// Microseconds since an origin that the shell chose at its start. Never goes back, knows no time zone.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MonoTime {
    micros: u64,
}

impl MonoTime {
    /// The origin.
    pub const ZERO: Self = Self { micros: 0 };

    /// That many microseconds after the origin.
    pub const fn from_micros(micros: u64) -> Self {
        Self { micros }
    }

    /// Microseconds since the origin.
    pub const fn as_micros(self) -> u64 {
        self.micros
    }

    /// Whole milliseconds since the origin.
    pub const fn as_millis(self) -> u64 {
        self.micros / 1000
    }

    /// Time since `earlier`; zero if that lies ahead.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.micros.saturating_sub(earlier.micros))
    }
}

impl Add<Duration> for MonoTime {
    type Output = Self;

    fn add(self, wait: Duration) -> Self {
        Self { micros: self.micros.saturating_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)) }
    }
}

impl Sub<Duration> for MonoTime {
    type Output = Self;

    fn sub(self, back: Duration) -> Self {
        Self { micros: self.micros.saturating_sub(u64::try_from(back.as_micros()).unwrap_or(u64::MAX)) }
    }
}
