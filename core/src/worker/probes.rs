//! Probes, and checks of equal rows, once their rows are answered: packed calls are compared with single runs, and make
//! room for others.
//!
//! ```text
//!   single runs ──► answers leave ──► Compare ──► one packed call, or some with made-up rows ──► the verdict
//!                                        │
//!                                        └── others need the slot: StopComparing ──► unfinished: the next probe goes on, or later
//! ```
//!
//! Realtime rows wait for one call of it, or a tenth of a second.
//!
//! Owns who has to wait for a comparison. Never: how long it may take (`comparing`), or which rows a probe runs (`curve`).

use proto_msgs::Lane;

use super::{
    Action, BatchId, BatchKind, BatchTimes, Worker,
    batches::{Running, Step},
    comparing::{Comparing, State},
    dispatch::{Order, presses_at},
    packer::Queue,
};
use crate::MonoTime;

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
        running.step = Step::Compares(Comparing::new(now, (running.order.kind, running.rows), times));
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
                    || comparing.may_be_cut(now) && self.is_in_the_way(now, running, comparing.until())
                    || !is_new && now >= comparing.cut_from() && self.keeps_realtime_waiting(running);
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
            Step::Compares(comparing) if comparing.state == State::Goes => Some(comparing.cut_from()),
            _ => None,
        });
        cuts.filter(|at| *at > now).min()
    }

    /// Whether realtime rows wait for this slot, behind realtime rows. They wait for one call at least, else a busy
    /// worker would never find out; the next comparison goes on where this one was cut short.
    fn keeps_realtime_waiting(&self, running: &Running) -> bool {
        let device = self.slots.device(running.order.slot);
        self.waits_for_it(running, Lane::Realtime) && self.waits_for_device(Lane::Realtime, device)
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
    /// that would miss their deadline or service level.
    fn is_in_the_way(&self, now: MonoTime, running: &Running, until: MonoTime) -> bool {
        let device = self.slots.device(running.order.slot);
        let is_held_up = |lane: Lane| {
            let is_behind = lane == Lane::Realtime && running.order.lane == Lane::Batch;
            let may_run = |queue: &Queue| queue.kind.lane == lane && self.may_run_on(queue, device);
            self.packer.waiting().filter(|(_, queue)| may_run(queue)).any(|(_, queue)| {
                let single_us = self.costs.get(&self.cost_key(queue, device)).batch_us(1);
                is_behind || presses_at(now, queue, single_us).is_some_and(|at| at < until)
            })
        };
        Lane::ALL.into_iter().any(|lane| self.waits_for_it(running, lane) && is_held_up(lane))
    }
}
