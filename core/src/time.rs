//! Time: as the shell tells it to the state machines, and as it passes for them.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

use crate::{Rule, Rules};

/// Microseconds since an origin that the shell chose at its start. It never goes back and knows no time zone.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MonoTime {
    micros: u64,
}

impl MonoTime {
    /// The origin of time.
    pub const ZERO: Self = Self { micros: 0 };

    /// The time this many microseconds after the origin.
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

    /// Time since `earlier`; zero if `earlier` lies ahead.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.since_us(earlier))
    }

    /// As [`Self::since`], in microseconds.
    pub const fn since_us(self, earlier: Self) -> u64 {
        self.micros.saturating_sub(earlier.micros)
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

/// A state machine that is called later than this after its deadline was not busy: its process stood still.
const LATE_MAX: Duration = Duration::from_millis(100);

/// Time as it passes for one state machine: it stands still while the process does.
///
/// A process that was stopped for a while, or moved to another host, has heard nobody. But its peers spoke, and their
/// messages wait in the sockets. Without this clock they would all come too late: the first call would find every peer
/// silent for too long.
#[derive(Debug)]
pub(crate) struct Clock {
    rules: Rules,
    /// Time of the last call, as the shell tells it.
    turned: MonoTime,
    /// Total time for which the process stood still.
    stood: Duration,
    /// The process stood still before the last call.
    has_stood: bool,
}

impl Clock {
    pub(crate) const fn new(rules: Rules) -> Self {
        Self { rules, turned: MonoTime::ZERO, stood: Duration::ZERO, has_stood: false }
    }

    /// Whether so much time has passed since the last call that the process may have stood still.
    pub(crate) fn is_late(&self, now: MonoTime) -> bool {
        now.since(self.turned) >= LATE_MAX
    }

    /// Starts a call of the machine, whose deadline was `due`. Returns the machine's time, and whether the process
    /// stood still.
    pub(crate) fn turn(&mut self, now: MonoTime, due: Option<MonoTime>) -> (MonoTime, bool) {
        let late = due.filter(|due| now.since(*due) >= LATE_MAX && self.rules.holds(Rule::PauseIsNoSilence));
        // The machine goes on at the time of its last call. If it is late twice in a row, it goes on at its deadline:
        // otherwise no time would pass for a machine that is always late.
        self.stood += late.map_or(Duration::ZERO, |due| now.since(if self.has_stood { due } else { self.turned }));
        (self.has_stood, self.turned) = (late.is_some(), self.turned.max(now));
        (now - self.stood, self.has_stood)
    }

    /// Converts a time of the machine to the shell's time.
    pub(crate) fn outside(&self, at: MonoTime) -> MonoTime {
        at + self.stood
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> MonoTime {
        MonoTime::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn time_stands_still_with_the_process_and_not_while_there_is_nothing_to_do() {
        let mut clock = Clock::new(Rules::default());
        assert_eq!(clock.turn(s(10), None), (s(10), false), "nobody wanted to be woken");
        assert_eq!(clock.turn(s(20), Some(s(20))), (s(20), false), "woken in time");
        assert_eq!(clock.turn(s(35), Some(s(23))), (s(20), true), "stopped in between");
        assert_eq!(clock.outside(s(23)), s(38), "what it waited for is as far away as before");
        assert_eq!(clock.turn(s(36), Some(s(38))), (s(21), false));
    }

    #[test]
    fn time_passes_for_a_machine_that_is_always_late() {
        let mut clock = Clock::new(Rules::default());
        assert_eq!(clock.turn(s(10), Some(s(5))), (s(0), true));
        assert_eq!(clock.turn(s(20), Some(s(15))), (s(5), true), "what was due then is done now");
    }
}
