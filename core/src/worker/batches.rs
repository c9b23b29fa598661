//! Batches from start to end, and where their rows go next.
//!
//! ```text
//!            order                       ended well, or a probe's rows are answered
//!   queue ───────────► running batch ───────────────────► queue of the next stage ─► … ─► the attempt is done
//!     ▲                  │      │   └──► a probe keeps its slot and compares: `probes`
//!     │ packed: each part│      │ nobody wants it any more
//!     └── alone, once ───┤      └──► killed; if its deadline passed while the model was loaded, only that is finished
//!                        │ alone
//!                        └──► the attempt failed
//! ```
//!
//! Owns the running batches. `dispatch` decides which rows run where, `probes` how long answers are compared.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use proto_msgs::{
    AttemptId, Digest, ErrorCode, Failure, Lane, LaneLoad, Outcome, Phase, RunNote,
    limits::{ACTIVE_ATTEMPTS_MAX, RUN_NOTES_MAX},
};

use super::{
    Action, BatchId, BatchKind, BatchTimes, NEWS_AFTER, Part, Worker,
    api::Equality,
    attempts::{Attempt, State, Work},
    comparing::Comparing,
    costs::CostKey,
    culprits::ends_runner,
    curve::{PROBE_ROWS_MAX, Plan},
    cut::Cut,
    dispatch::Order,
    packer::{Company, Kind, Limits, Piece, Queue, QueueId},
};
use crate::{Census, DEADLINE_PASSED, MonoTime, Rule};

/// A client's deadline passes this much before the worker's at most, and so may its order to stop: it counts from its
/// submit, the broker from when that arrived.
const CLIENT_EARLY_MAX: Duration = Duration::from_secs(1);

/// How far a running batch has come.
///
/// ```text
///   Loads ──► Runs ──► over
///     │        └──► Compares ──► over      a probe: its rows are answered, and the attempts are no longer its own
///     └──► OnlyLoads ──► over
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// Its model is being loaded, as far as is known.
    Loads,
    /// Its model is being loaded, and nobody waits for its rows any more.
    OnlyLoads,
    Runs,
    /// Its rows are answered. It still has its slot, for a packed call that is compared with the answers.
    Compares(Comparing),
}

/// A running batch.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) order: Order,
    pub(super) step: Step,
    stage: u8,
    pub(super) rows: u32,
    pub(super) begun: MonoTime,
    /// The pieces that run, and whether each is still wanted. None once they are answered.
    pub(super) pieces: Vec<(Piece, bool)>,
}

/// A packed batch that failed. If all its parts run well alone, the batch was too large.
#[derive(Debug)]
pub(super) struct Trial {
    /// Rows of each attempt that have not run alone yet.
    members: BTreeMap<AttemptId, u32>,
    rows: u32,
    cost: CostKey,
    /// The failure says nothing of the rows: the runner was ended from outside, or the disk was full.
    is_mishap: bool,
}

/// Running batches, and trials of failed ones.
#[derive(Debug, Default)]
pub(super) struct Batches {
    made: u64,
    pub(super) running: BTreeMap<BatchId, Running>,
    trials: BTreeMap<BatchId, Trial>,
}

impl Batches {
    /// Counts the batches. `rows`: those that attempts have not run. `on_trial`: waiting pieces of failed batches.
    pub(super) fn census(&self, slots: usize, rows: usize, on_trial: usize, census: &mut Census<'_>) {
        let Self { made: _, running, trials } = self;
        census.passing("running batches", running.len(), slots);
        let pieces = || running.values().flat_map(|Running { pieces, .. }| pieces).filter(|(_, is_wanted)| *is_wanted);
        census.passing("running pieces", pieces().count(), rows);
        let on_trial = on_trial + pieces().filter(|(piece, _)| piece.is_on_trial()).count();
        census.passing("trials of failed batches", trials.len(), on_trial);
        let members = |Trial { members, .. }: &Trial| members.len();
        census.passing("attempts on trial", trials.values().map(members).max().unwrap_or(0), ACTIVE_ATTEMPTS_MAX);
    }
}

impl Running {
    pub(super) fn wanted(&self) -> Vec<Piece> {
        self.pieces.iter().filter(|(_, is_wanted)| *is_wanted).map(|(piece, _)| piece.clone()).collect()
    }
}

impl Worker {
    /// Starts batches as long as there are slots and rows.
    pub(super) fn pump(&mut self, now: MonoTime) {
        while let Some(order) = self.next_order(now) {
            self.start(now, order);
        }
        self.steer_comparisons(now);
        self.wake = self.next_wake(now);
    }

    /// Queues the rows of an attempt whose model and inputs have all arrived.
    pub(super) fn enqueue(&mut self, now: MonoTime, id: AttemptId) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        let (client, lane, work) = (attempt.ticket.client, attempt.ticket.lane, &mut attempt.work);
        // Without batch slots every attempt runs in the realtime lane.
        let lane = if self.slots.of_lane(Lane::Batch) == 0 { Lane::Realtime } else { lane };
        let limits = Limits::from(&attempt.ticket);
        let mut enter = |stages: usize| {
            let (way, forms) = (work.models.iter().take(stages).copied().collect::<Vec<_>>(), work.forms.clone());
            let apart = way.last().is_some_and(|model| self.culprits.has(now, *model, client));
            self.packer.enter(now, Kind { lane, way, limits, forms, apart })
        };
        let way: Vec<QueueId> = (1..=work.models.len()).map(&mut enter).collect();
        work.way = way;
        let rows = 0..work.items;
        self.ask(now, id);
        self.push(now, id, 0, rows);
    }

    fn push(&mut self, now: MonoTime, id: AttemptId, stage: usize, rows: Range<u32>) {
        let Some(attempt) = self.attempts.get(id) else { return };
        let (ticket, work) = (&attempt.ticket, &attempt.work);
        let Some(queue) = work.way.get(stage).copied() else { return };
        let piece = Piece {
            id,
            client: ticket.client,
            priority: ticket.priority,
            deadline: attempt.deadline,
            slo_until: attempt.slo_until,
            rows,
            arrived: now,
            next: work.way.get(stage + 1).copied(),
            company: if work.is_suspect { Company::Alone } else { Company::Any },
        };
        self.packer.push(now, queue, piece);
    }

    fn start(&mut self, now: MonoTime, order: Order) {
        self.batches.made += 1;
        let batch = BatchId(self.batches.made);
        let Some(queue) = self.packer.get_mut(order.queue) else { return };
        queue.linger.begins();
        queue.running += 1;
        let stage = queue.stage();
        let pieces: Vec<(Piece, bool)> =
            order.taken.iter().filter_map(|(rank, rows)| Some((queue.take(*rank, *rows)?, true))).collect();
        let rows = pieces.iter().map(|(piece, _)| piece.len()).sum();
        let cost = self.costs.touch(&order.cost, batch.0);
        cost.dispatched(order.dispatch);
        match order.kind {
            BatchKind::Probe => cost.probe_begins(),
            BatchKind::Packed | BatchKind::Spot => cost.packed_begins(),
            BatchKind::Whole | BatchKind::Check => {}
        }
        self.slots.occupy(order.slot, batch, order.lane, order.cost.limits.gpu_memory_bytes);
        self.turns[order.lane.index()] += 1;
        // No shorter limit near a deadline: a deadline that passes ends its attempt as expired, not as a model that
        // takes too long.
        let limit = self.config.run_limit;
        let part = |(piece, _): &(Piece, bool)| Part { id: piece.id, stage, rows: self.cut(piece) };
        let parts = pieces.iter().map(part).collect();
        let (slot, device, kind, apart) = (order.slot, self.slots.device(order.slot), order.kind, order.apart);
        let ids: Vec<AttemptId> = pieces.iter().map(|(piece, _)| piece.id).collect();
        self.batches.running.insert(batch, Running { order, step: Step::Loads, stage, rows, begun: now, pieces });
        self.actions.push(Action::RunBatch { batch, parts, slot, device, kind, apart, limit });
        for id in ids {
            if self.attempts.get(id).is_some_and(|attempt| attempt.state == State::Ready) {
                self.set_phase(now, id, Phase::Loading);
            }
        }
    }

    /// The rows of a piece. A test that breaks the rule gets wrong rows, to see them noticed.
    fn cut(&self, piece: &Piece) -> Range<u32> {
        let slip = u32::from(piece.rows.start > 0 && !self.config.rules.holds(Rule::RowsInOrder));
        piece.rows.start - slip..piece.rows.end - slip
    }

    fn set_phase(&mut self, now: MonoTime, id: AttemptId, phase: Phase) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        if matches!(attempt.state, State::Ready | State::Running(_)) && attempt.state != State::Running(phase) {
            attempt.state = State::Running(phase);
            attempt.has_news = true;
            self.next_news.get_or_insert(now + NEWS_AFTER);
        }
    }

    pub(super) fn reached(&mut self, now: MonoTime, batch: BatchId, phase: Phase) {
        let Some(running) = self.batches.running.get_mut(&batch) else { return };
        match running.step {
            // The rows began to run before the order not to had arrived.
            Step::OnlyLoads if phase == Phase::Running => return self.kill(now, batch),
            Step::Loads if phase == Phase::Running => running.step = Step::Runs,
            _ => {}
        }
        let wanted = running.pieces.iter().filter(|(_, is_wanted)| *is_wanted);
        let ids: Vec<AttemptId> = wanted.map(|(piece, _)| piece.id).collect();
        for id in ids {
            self.set_phase(now, id, phase);
        }
    }

    pub(super) fn batch_ended(&mut self, now: MonoTime, batch: BatchId, ended: Result<BatchTimes, Failure>) {
        let Some(running) = self.close(now, batch) else { return };
        match running.step {
            Step::OnlyLoads => return self.only_loaded(&running, ended.ok()),
            Step::Compares(comparing) => return self.compared(now, &running.order, comparing, ended.ok()),
            Step::Loads | Step::Runs => self.learn(now, &running, ended.as_ref().ok()),
        }
        let wanted = running.wanted();
        let isolates = self.config.rules.holds(Rule::IsolateFailedBatch);
        match ended {
            Ok(times) => wanted.into_iter().for_each(|piece| self.ran(now, &running, piece, &times)),
            Err(failure) if running.order.kind == BatchKind::Whole || !isolates => {
                self.blame(now, &running, failure.code);
                for piece in wanted {
                    self.finish(now, piece.id, Outcome::Failed(failure.clone()));
                }
            }
            Err(failure) => self.try_alone(batch, &running, wanted, is_mishap(failure.code)),
        }
    }

    /// Remembers whose rows ended a runner, if nobody else's ran beside them.
    fn blame(&mut self, now: MonoTime, running: &Running, code: ErrorCode) {
        if let [(piece, _)] = &running.pieces[..]
            && ends_runner(code)
        {
            let (model, client) = (running.order.cost.model, piece.client);
            self.culprits.crashed(now, model, client, now.since(running.begun));
            self.turn_away_surplus(now, model, client);
        }
    }

    /// Whether a batch of culprits' rows of this model runs.
    pub(super) fn runs_apart(&self, model: Digest) -> bool {
        self.batches.running.values().any(|running| running.order.apart && running.order.cost.model == model)
    }

    /// Whether the queue's model is being loaded here for nobody: rows that have come since wait for that runner.
    pub(super) fn only_loads(&self, queue: &Queue, device: i16) -> bool {
        let mut loads = self.batches.running.values().filter(|running| running.step == Step::OnlyLoads);
        loads.any(|running| !running.order.apart && running.order.cost == self.cost_key(queue, device))
    }

    /// Learns from a batch that ran no row.
    fn only_loaded(&mut self, running: &Running, times: Option<BatchTimes>) {
        let Some(cost) = self.costs.get_mut(&running.order.cost) else { return };
        cost.loaded(times.map_or(0, |times| times.load_us));
        if running.order.kind == BatchKind::Probe {
            cost.probe_ended(running.rows, None);
        }
    }

    /// Stops a batch whose rows nobody wants.
    pub(super) fn kill(&mut self, now: MonoTime, batch: BatchId) {
        if let Some(running) = self.close(now, batch) {
            self.learn(now, &running, None);
            self.actions.push(Action::KillBatch { batch });
        }
    }

    /// Removes a batch that ended in any way, and frees its slot.
    fn close(&mut self, now: MonoTime, batch: BatchId) -> Option<Running> {
        let running = self.batches.running.remove(&batch)?;
        let (lane, device) = (running.order.lane, self.slots.device(running.order.slot));
        self.slots.release(now, batch);
        self.packer.ended(now, running.order.queue);
        let took_us = now.since_us(running.begun);
        let waits = Lane::ALL.map(|lane| self.waits_for_device(lane, device));
        self.slots.spent(device, lane, took_us, waits);
        Some(running)
    }

    fn learn(&mut self, now: MonoTime, running: &Running, times: Option<&BatchTimes>) {
        let Some(cost) = self.costs.get_mut(&running.order.cost) else { return };
        if times.is_some() {
            cost.ran(running.begun, now);
        }
        if running.order.kind == BatchKind::Probe {
            times.into_iter().for_each(|times| cost.probe_answered(times));
            cost.probe_ended(running.rows, times);
        }
        let Some(times) = times else { return };
        cost.loaded(times.load_us);
        let is_apart = times.apart_rows > 0;
        if is_apart && times.apart_rows == running.rows {
            cost.ran_apart();
        }
        match running.order.kind {
            BatchKind::Whole => cost.learn(1, times.run_us / u64::from(running.rows.max(1))),
            // Some rows ran one by one: their time is not that of a packed call.
            BatchKind::Packed if is_apart => {}
            BatchKind::Spot if is_apart && times.equal != Some(Equality::Differs) => {}
            BatchKind::Check if is_apart && times.equal.is_none() => {}
            BatchKind::Packed => cost.learn(running.rows, times.run_us),
            BatchKind::Check => cost.checked(running.rows, times),
            BatchKind::Spot => cost.spotted(running.rows, times),
            BatchKind::Probe => {}
        }
        let (is_unknown, size) = (matches!(cost.plan(Cut::NONE), Plan::Probe { .. }), cost.size());
        let limit = if is_unknown { PROBE_ROWS_MAX } else { size };
        // Before a probe the hope is that a second row costs nothing.
        let batch_us = |rows| cost.batch_us(if is_unknown { 1 } else { rows });
        if limit > 1
            && let Some(queue) = self.packer.get_mut(running.order.queue)
        {
            queue.linger.batch_ended(now, running.rows, queue.rows, limit, batch_us);
        }
    }

    /// Credits a piece with a finished batch, and passes its rows on to the next stage.
    pub(super) fn ran(&mut self, now: MonoTime, running: &Running, piece: Piece, times: &BatchTimes) {
        self.acquit(&piece);
        let Some(attempt) = self.attempts.get_mut(piece.id) else { return };
        let (work, rows) = (&mut attempt.work, u64::from(piece.len()));
        let share_us = times.run_us.saturating_mul(rows) / u64::from(running.rows.max(1));
        work.run_us = work.run_us.saturating_add(share_us);
        // Of a load that had begun before, this batch has waited for the rest.
        let waited_us = now.since_us(running.begun).saturating_sub(times.run_us);
        work.load_us = work.load_us.saturating_add(times.load_us.min(waited_us));
        if work.runs.len() < RUN_NOTES_MAX {
            let is_packed = running.order.kind.keeps_packed(times.equal) && times.apart_rows == 0;
            // A row that ran by itself has its own time, not that of the whole batch.
            let run_us = if is_packed { times.run_us } else { share_us };
            work.runs.push(RunNote {
                stage: running.stage,
                rows: (piece.rows.start, piece.rows.end),
                batch_rows: if is_packed { running.rows } else { 1 },
                dispatch: running.order.dispatch,
                run_us: u32::try_from(run_us).unwrap_or(u32::MAX),
            });
        }
        let next = usize::from(running.stage) + 1;
        if next < work.way.len() {
            return self.push(now, piece.id, next, piece.rows);
        }
        work.rows_done += piece.len();
        if work.rows_done >= work.items {
            let Work { run_us, load_us, .. } = attempt.work;
            self.finish(now, piece.id, Outcome::Done { run_us, load_us });
        }
    }

    /// A packed batch failed: each part runs again by itself, which shows the culprit.
    fn try_alone(&mut self, batch: BatchId, running: &Running, wanted: Vec<Piece>, is_mishap: bool) {
        let rows_left: u32 = wanted.iter().map(Piece::len).sum();
        let is_packed = running.order.kind.is_packed();
        if is_packed && rows_left == running.rows {
            let members = wanted.iter().map(|piece| (piece.id, piece.len())).collect();
            let trial = Trial { members, rows: running.rows, cost: running.order.cost.clone(), is_mishap };
            self.batches.trials.insert(batch, trial);
            if let Some(cost) = self.costs.get_mut(&running.order.cost) {
                cost.doubted(running.rows);
            }
        }
        let company = if is_packed { Company::AloneAfter(batch) } else { Company::Alone };
        for piece in wanted {
            self.packer.push_back(running.order.queue, Piece { company, ..piece });
        }
    }

    /// Rows of a failed batch ran well alone. If all of its rows did, the batch was too large.
    fn acquit(&mut self, piece: &Piece) {
        let Company::AloneAfter(batch) = piece.company else { return };
        let Some(trial) = self.batches.trials.get_mut(&batch) else { return };
        if let Some(rows_left) = trial.members.get_mut(&piece.id) {
            *rows_left = rows_left.saturating_sub(piece.len());
        }
        if trial.members.values().all(|rows_left| *rows_left == 0)
            && let Some(trial) = self.batches.trials.remove(&batch)
            && let Some(cost) = self.costs.get_mut(&trial.cost)
        {
            match trial.is_mishap {
                true => cost.mishap(trial.rows, (batch.0, self.batches.made)),
                false => cost.too_large(trial.rows),
            }
        }
    }

    /// Drops all rows of an attempt, waiting or running. A batch that nobody wants any more is killed. If the attempt's
    /// deadline is to blame, a load that has begun is finished, for the tasks to come: with a deadline shorter than the
    /// load, the model would else never be loaded, and nobody would ever learn how long it takes. One load at a time is
    /// finished like this: its slot is taken from tasks that somebody waits for.
    pub(super) fn withdraw(&mut self, now: MonoTime, id: AttemptId) {
        let Some(attempt) = self.attempts.get_mut(id) else { return };
        let is_late = attempt.deadline.is_some_and(|deadline| now + CLIENT_EARLY_MAX >= deadline);
        let way = std::mem::take(&mut attempt.work.way);
        if self.config.rules.holds(Rule::ForgetRows) {
            self.packer.leave(id, &way);
        }
        // An attempt that failed alone, or is unwanted, leaves it open whether the batch was too large.
        let forgets = self.config.rules.holds(Rule::ForgetTrials);
        let is_open = |trial: &Trial| forgets && trial.members.get(&id).is_some_and(|rows_left| *rows_left > 0);
        for (_, trial) in self.batches.trials.extract_if(.., |_, trial| is_open(trial)) {
            if let Some(cost) = self.costs.get_mut(&trial.cost) {
                cost.cleared();
            }
        }
        let mut idle = Vec::new();
        let mut finishes_load = self.batches.running.values().any(|running| running.step == Step::OnlyLoads);
        for (batch, running) in &mut self.batches.running {
            let was_wanted = running.pieces.iter().any(|(_, is_wanted)| *is_wanted);
            running.pieces.iter_mut().filter(|(piece, _)| piece.id == id).for_each(|(_, is_wanted)| *is_wanted = false);
            if !was_wanted || running.pieces.iter().any(|(_, is_wanted)| *is_wanted) {
                continue;
            }
            let is_loading = is_late && running.step == Step::Loads && self.config.rules.holds(Rule::FinishLoads);
            if is_loading && !std::mem::replace(&mut finishes_load, true) {
                running.step = Step::OnlyLoads;
                self.actions.push(Action::OnlyLoad { batch: *batch });
            } else {
                idle.push(*batch);
            }
        }
        for batch in idle {
            self.kill(now, batch);
        }
    }

    /// Ends attempts whose deadline has passed, whether they wait or run.
    pub(super) fn expire(&mut self, now: MonoTime) {
        let is_late = |attempt: &&Attempt| attempt.expires_at().is_some_and(|at| now >= at);
        let late: Vec<(AttemptId, &str)> = self
            .attempts
            .iter()
            .filter(is_late)
            .map(|attempt| {
                (attempt.id(), if attempt.state == State::Ready { "had not begun" } else { "was cut short" })
            })
            .collect();
        for (id, how) in late {
            let text = format!("{DEADLINE_PASSED}: the run {how}");
            self.finish(now, id, Outcome::failed(ErrorCode::Expired, text));
        }
    }

    /// The load of each lane, for the heartbeat.
    pub(super) fn lane_loads(&self) -> [LaneLoad; 2] {
        Lane::ALL.map(|lane| {
            let used = self.batches.running.values().filter(|running| running.order.lane == lane).count();
            let slots_used = u16::try_from(used).unwrap_or(u16::MAX);
            LaneLoad { slots_used, waiting_items: self.packer.rows_of(lane) }
        })
    }
}

/// Whether a batch that failed like this may have been as good as any other.
const fn is_mishap(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::EngineUnavailable | ErrorCode::WorkerLost | ErrorCode::DiskFull)
}
