//! Time as the machines are told it, and as it passes for them.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

use crate::{Rule, Rules};

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

/// A machine that is turned later than this after it wanted to be was not busy: its process stood still.
const LATE_MAX: Duration = Duration::from_millis(100);

/// Time as it passes for one machine: it stands still while its process does.
///
/// Whoever was stopped for a while, or moved to another host, has heard nobody; but everybody spoke, and what they said waits
/// in the sockets. Without this it would all come too late: the first turn would find everybody silent for too long.
#[derive(Debug)]
pub(crate) struct Clock {
    rules: Rules,
    /// When the machine was last turned, as its shell tells the time.
    turned: MonoTime,
    /// What it has stood still in all.
    stood: Duration,
    /// It stood still before its last turn.
    has_stood: bool,
}

impl Clock {
    pub(crate) const fn new(rules: Rules) -> Self {
        Self { rules, turned: MonoTime::ZERO, stood: Duration::ZERO, has_stood: false }
    }

    /// Whether so much time has passed since the last turn that the process may have stood still.
    pub(crate) fn is_late(&self, now: MonoTime) -> bool {
        now.since(self.turned) >= LATE_MAX
    }

    /// The shell turns the machine, which wanted to be turned at `due`. Gives the machine's time, and whether it stood still.
    pub(crate) fn turn(&mut self, now: MonoTime, due: Option<MonoTime>) -> (MonoTime, bool) {
        let late = due.filter(|due| now.since(*due) >= LATE_MAX && self.rules.holds(Rule::PauseIsNoSilence));
        // It goes on where it was when it was last turned. Late twice in a row, it goes on at what was due: for a machine that is
        // always late no time would pass else.
        self.stood += late.map_or(Duration::ZERO, |due| now.since(if self.has_stood { due } else { self.turned }));
        (self.has_stood, self.turned) = (late.is_some(), self.turned.max(now));
        (now - self.stood, self.has_stood)
    }

    /// A time of the machine as its shell tells it.
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
