//! Probes whose rows are answered: how long their packed call is compared with the answers, and who it makes room for.
//!
//! ```text
//!   single runs ──► answers leave ──► Compare ──► one packed call, or some with made-up rows ──► the verdict
//!                                        │
//!                                        └── others need the slot: StopComparing ──► unfinished: the next probe goes on
//! ```
//!
//! Realtime rows wait for one call of it, or a tenth of a second. What was found out until then is kept by the shell.
//!
//! Owns the bounds of comparing. Never: which rows a probe runs (`curve`), or how outputs are compared (the shell).

use std::time::Duration;

use proto_msgs::Lane;

use super::{
    Action, BatchId, BatchKind, BatchTimes, Worker,
    batches::{Running, Step},
    curve::COMPARE_SINGLE_US,
    dispatch::{Order, presses_at},
    packer::Queue,
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
    rows: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// The shell waits for the order to compare.
    Waits,
    Goes,
    /// The call under way is the last one.
    Stops,
}

impl Comparing {
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

    fn of(now: MonoTime, running: &Running, times: &BatchTimes) -> Self {
        let single_us = times.single_us.unwrap_or(0);
        match running.order.kind {
            BatchKind::Check => Self::of_check(now, running.rows, single_us, times.run_us),
            _ => Self::of_probe(now, running.rows, single_us),
        }
    }

    /// Longest time: a check's calls may take longer than the single runs that bound a probe's.
    fn limit(&self) -> Duration {
        let calls_us = self.call_us.saturating_mul(PACKED_PARTS.1) / PACKED_PARTS.0;
        limit(self.single_us).max(Duration::from_micros(calls_us))
    }

    /// When it should be over at the latest.
    fn until(&self) -> MonoTime {
        let usual_us = self.single_us.saturating_mul(COMPARE_RUNS_USUAL.into());
        self.since + Duration::from_micros(usual_us.saturating_add(self.call_us)).min(self.limit())
    }

    /// Whether it takes longer than anybody's rows should wait for what is nobody's.
    fn is_too_long(&self) -> bool {
        self.single_us > COMPARE_SINGLE_US || self.limit() > COMPARE_LONGEST
    }

    /// Whether others may cut it short, or keep it from beginning.
    fn may_be_cut(&self, now: MonoTime) -> bool {
        now >= self.since + COMPARE_LEAST || Duration::from_micros(self.call_us) > COMPARE_LEAST
    }
}

/// Longest comparison of a model with single runs of this time.
fn limit(single_us: u64) -> Duration {
    COMPARE_MAX.max(Duration::from_micros(single_us.saturating_mul(COMPARE_RUNS_MAX.into())))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Worker {
    /// The rows of a probe have run by themselves: they go on as after any batch, and the probe keeps its slot.
    pub(super) fn answered(&mut self, now: MonoTime, batch: BatchId, times: &BatchTimes) {
        let Some(running) = self.batches.running.get(&batch) else { return };
        match running.step {
            _ if !matches!(running.order.kind, BatchKind::Probe | BatchKind::Check) => return,
            Step::Compares(_) => return,
            // The order to run no row came too late, and nobody wants the answers.
            Step::OnlyLoads => return self.kill(now, batch),
            Step::Loads | Step::Runs => {}
        }
        // It is not in the table while its attempts end: they leave batches that nobody else wants.
        let Some(mut running) = self.batches.running.remove(&batch) else { return };
        if let Some(cost) = self.costs.get_mut(&running.order.cost) {
            cost.ran(running.begun, now);
            cost.loaded(times.load_us);
            if running.order.kind == BatchKind::Probe {
                cost.probe_answered(times);
            }
        }
        for piece in running.wanted() {
            self.ran(now, &running, piece, times);
        }
        running.pieces.clear();
        running.step = Step::Compares(Comparing::of(now, &running, times));
        self.batches.running.insert(batch, running);
    }

    /// Takes in the end of a comparison. Nobody's rows depend on it.
    pub(super) fn compared(&mut self, now: MonoTime, order: &Order, comparing: Comparing, times: Option<BatchTimes>) {
        if let Some(cost) = self.costs.get_mut(&order.cost) {
            cost.compared(now, (order.kind, comparing.rows), times.as_ref());
        }
    }

    /// Lets comparisons begin, and cuts short those that others should not wait for. Rows that found a slot elsewhere do
    /// not wait.
    pub(super) fn steer_comparisons(&mut self, now: MonoTime) {
        let decide = |(batch, running): (&BatchId, &Running)| match running.step {
            Step::Compares(comparing) if comparing.state != State::Stops => {
                let is_new = comparing.state == State::Waits;
                let is_over = comparing.is_too_long()
                    || self.drain_until.is_some()
                    || comparing.may_be_cut(now) && self.is_in_the_way(running, comparing.until())
                    || !is_new && now >= comparing.since + COMPARE_LEAST && self.keeps_realtime_waiting(running);
                (is_over || is_new).then_some((*batch, if is_over { State::Stops } else { State::Goes }))
            }
            _ => None,
        };
        let decided: Vec<(BatchId, State)> = self.batches.running.iter().filter_map(decide).collect();
        for (batch, state) in decided {
            let Some(Step::Compares(comparing)) = self.batches.running.get_mut(&batch).map(|running| &mut running.step)
            else {
                continue;
            };
            comparing.state = state;
            let (rows, limit) = (comparing.rows, comparing.limit());
            self.actions.push(match state {
                State::Stops => Action::StopComparing { batch },
                State::Waits | State::Goes => Action::Compare { batch, rows, limit },
            });
        }
    }

    /// When waiting rows may cut a comparison short for the first time.
    pub(super) fn next_cut(&self, now: MonoTime) -> Option<MonoTime> {
        let cuts = self.batches.running.values().filter_map(|running| match running.step {
            Step::Compares(comparing) if comparing.state == State::Goes => Some(comparing.since + COMPARE_LEAST),
            _ => None,
        });
        cuts.filter(|at| *at > now).min()
    }

    /// Whether realtime rows wait for this slot, behind realtime rows. They wait for one call at least, else a busy
    /// worker would never find out; the next comparison goes on where this one was cut short.
    fn keeps_realtime_waiting(&self, running: &Running) -> bool {
        let is_realtime = |queue: &Queue| queue.kind.lane == Lane::Realtime;
        self.waits_for_it(running, Lane::Realtime) && self.packer.waiting().any(|(_, queue)| is_realtime(queue))
    }

    /// Whether a lane's rows can run in no other slot than this one.
    fn waits_for_it(&self, running: &Running, lane: Lane) -> bool {
        let (own, device) = (self.slots.lane(running.order.slot), self.slots.device(running.order.slot));
        let open: Vec<Lane> = self
            .slots
            .open()
            .into_iter()
            .filter(|slot| self.slots.device(*slot) == device)
            .map(|slot| self.slots.lane(slot))
            .collect();
        // A lane with an open slot waits for something else.
        match lane {
            Lane::Realtime => open.is_empty(),
            Lane::Batch => !open.contains(&Lane::Batch) && (own == Lane::Batch || self.slots.is_contended(device)),
        }
    }

    /// Whether rows that wait for this slot should not wait until then: realtime rows behind the batch lane, and rows
    /// that would miss their deadline.
    fn is_in_the_way(&self, running: &Running, until: MonoTime) -> bool {
        let device = self.slots.device(running.order.slot);
        let is_held_up = |lane: Lane| {
            let is_behind = lane == Lane::Realtime && running.order.lane == Lane::Batch;
            self.packer.waiting().filter(|(_, queue)| queue.kind.lane == lane).any(|(_, queue)| {
                let single_us = self.costs.get(&self.cost_key(queue, device)).map_or(0, |cost| cost.batch_us(1));
                is_behind || presses_at(queue, single_us).is_some_and(|at| at < until)
            })
        };
        Lane::ALL.into_iter().any(|lane| self.waits_for_it(running, lane) && is_held_up(lane))
    }
}
