//! One comparison of packed calls with single runs, after its rows are answered: how long it may take, and whether others
//! may cut it short.
//!
//! ```text
//!   Waits ──► Goes ──► Stops        Waits: the shell waits for the order. Goes: calls are made and compared.
//!     └─────────────────▲           Stops: the call under way is the last one; what was found out is kept by the shell.
//! ```
//!
//! Owns the bounds. Never: who has to wait (`probes`), or how outputs are compared (the shell).

use std::time::Duration;

use super::{
    api::{BatchKind, BatchTimes},
    curve::COMPARE_SINGLE_US,
};
use crate::MonoTime;

/// Longest comparison: rows that come meanwhile wait for its slot, and no prediction knows of it.
const COMPARE_MAX: Duration = Duration::from_secs(2);

/// Single runs that a comparison may take instead, if they take longer: two rows in one call need two where nothing is
/// gained. The third is head-room, for a call that is cut off takes its runner with it.
const COMPARE_RUNS_MAX: u32 = 3;

/// The packed call gets this part (2/3) of the time, by the single runs: the head-room for larger batches.
const PACKED_PARTS: (u64, u64) = (2, 3);

/// Single runs that a comparison takes at most where nothing is gained: a packed call, six made-up rows, and packed calls
/// of all of them. A check's packed call may have more rows than all these.
const COMPARE_RUNS_USUAL: u32 = 24;

/// No comparison may take longer, whatever its calls take: the longest single runs that are compared have as much.
const COMPARE_LONGEST: Duration = Duration::from_micros(COMPARE_SINGLE_US * COMPARE_RUNS_MAX as u64);

/// Nobody cuts a comparison shorter than this: items wait as long for company. A comparison that every row could cut
/// would never end at a busy worker, and that is where packing helps most.
const COMPARE_LEAST: Duration = Duration::from_millis(100);

/// The comparison of a probe or check whose rows are answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Comparing {
    /// When the rows were answered.
    since: MonoTime,
    /// Mean of the single runs.
    single_us: u64,
    /// Time of one packed call; before the first one as if nothing was gained.
    call_us: u64,
    /// Rows in the packed call.
    pub(super) rows: u32,
    pub(super) state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum State {
    Waits,
    Goes,
    Stops,
}

impl Comparing {
    /// The comparison of a batch of so many rows that was answered now.
    pub(super) fn new(now: MonoTime, (kind, rows): (BatchKind, u32), times: &BatchTimes) -> Self {
        let single_us = times.single_us.unwrap_or(0);
        match kind {
            BatchKind::Check => Self::of_check(now, rows, single_us, times.run_us),
            _ => Self::of_probe(now, rows, single_us),
        }
    }

    /// A probe's, whose packed call is as large as there is time for.
    fn of_probe(now: MonoTime, rows: u32, single_us: u64) -> Self {
        let packed_us = micros(limit(single_us)) * PACKED_PARTS.0 / PACKED_PARTS.1;
        let rows_max = u32::try_from(packed_us / single_us.max(1)).unwrap_or(u32::MAX).max(2);
        let rows = rows.min(rows_max);
        let call_us = single_us.saturating_mul(rows.into());
        Self { since: now, single_us, call_us, rows, state: State::Waits }
    }

    /// A check's, which has made the first packed call. The others are of its size: a smaller one says nothing.
    fn of_check(now: MonoTime, rows: u32, single_us: u64, call_us: u64) -> Self {
        Self { since: now, single_us, call_us, rows, state: State::Waits }
    }

    /// Longest time: a check's calls may take longer than the single runs that bound a probe's.
    pub(super) fn limit(&self) -> Duration {
        let calls_us = self.call_us.saturating_mul(PACKED_PARTS.1) / PACKED_PARTS.0;
        limit(self.single_us).max(Duration::from_micros(calls_us))
    }

    /// When it should be over at the latest.
    pub(super) fn until(&self) -> MonoTime {
        let usual_us = self.single_us.saturating_mul(COMPARE_RUNS_USUAL.into());
        self.since + Duration::from_micros(usual_us.saturating_add(self.call_us)).min(self.limit())
    }

    /// Whether it takes longer than anybody's rows should wait for what is nobody's.
    pub(super) fn is_too_long(&self) -> bool {
        self.single_us > COMPARE_SINGLE_US || self.limit() > COMPARE_LONGEST
    }

    /// From when on anybody's rows may cut it short.
    pub(super) fn cut_from(&self) -> MonoTime {
        self.since + COMPARE_LEAST
    }

    /// Whether others may cut it short, or keep it from beginning.
    pub(super) fn may_be_cut(&self, now: MonoTime) -> bool {
        now >= self.cut_from() || Duration::from_micros(self.call_us) > COMPARE_LEAST
    }
}

/// Longest comparison of a model with single runs of this time.
fn limit(single_us: u64) -> Duration {
    COMPARE_MAX.max(Duration::from_micros(single_us.saturating_mul(COMPARE_RUNS_MAX.into())))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
