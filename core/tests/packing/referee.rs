//! The laws that must always hold, checked at each batch. Never steers.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::worker::{BatchId, BatchKind, Equality, Part};
use proto_msgs::{AttemptId, ErrorCode, Heartbeat, Lane, Outcome};

use super::world::{Machine, Micros, Model, Running, Task, number_of};

/// Most rows in one batch.
const ROWS_MAX: u32 = 64;

/// Most rows one by one in one batch: 20 ms of the fastest model of these worlds.
const SINGLES_MAX: u32 = 200;

/// Longest wait while a slot is free, microseconds.
const WAIT_MAX: Micros = 100_000;

/// The batch lane is owed one part of device time for this many of the realtime lane while it waited: its share is a
/// tenth. It is never owed more than `OWED_MAX`, microseconds.
const REALTIME_PARTS: i64 = 9;
const OWED_MAX: i64 = 2_000_000;

/// For so long after a crash its client's rows of the model run apart, and for `REMEMBERED_MAX` at most, microseconds.
const REMEMBERED_MIN: Micros = 10_000_000;
const REMEMBERED_MAX: Micros = 600_000_000;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Row {
    /// The row waits since then.
    Waits(Micros),
    Runs,
    /// The row has passed this stage.
    Done,
}

/// Everything known of an attempt that has not ended.
struct Attempt {
    task: Task,
    /// By stage and item. A row that has not reached a stage is missing there.
    rows: Vec<BTreeMap<u32, Row>>,
}

pub(crate) struct Referee {
    machine: Machine,
    open: BTreeMap<AttemptId, Attempt>,
    over: BTreeSet<AttemptId>,
    /// Most device time that each device owes the batch lane; negative if realtime rows waited longer than was owed.
    owed: BTreeMap<i16, i64>,
    /// Most rows of one model that ever waited between two stages.
    pub(crate) most_between_stages: u32,
    /// Attempts whose batches were killed by the current event.
    killed: Vec<AttemptId>,
    ways: BTreeMap<AttemptId, Vec<usize>>,
    lanes: BTreeMap<AttemptId, Lane>,
    /// When a client's rows last crashed a model, with no others beside them.
    crashes: BTreeMap<(u8, usize), Micros>,
    /// When a slot last fell free on a device on which none was.
    opened: BTreeMap<i16, Micros>,
}

impl Referee {
    pub(crate) fn new(machine: Machine) -> Self {
        Self {
            machine,
            open: BTreeMap::new(),
            over: BTreeSet::new(),
            owed: BTreeMap::new(),
            most_between_stages: 0,
            killed: Vec::new(),
            ways: BTreeMap::new(),
            lanes: BTreeMap::new(),
            crashes: BTreeMap::new(),
            opened: BTreeMap::new(),
        }
    }

    pub(crate) fn model_of(&self, part: &Part) -> usize {
        self.ways[&part.id][usize::from(part.stage)]
    }

    pub(crate) fn lane_of(&self, part: &Part) -> Lane {
        self.lanes[&part.id]
    }

    /// A lane's slots on a device in which nothing runs. What realtime rows have been lent are batch slots.
    fn free_slots(&self, lane: Lane, device: i16, running: &BTreeMap<BatchId, Running>) -> usize {
        let of_lane = |number: &u16| if *number < self.machine.slots[0] { Lane::Realtime } else { Lane::Batch };
        let numbers = || (0..self.machine.slots.iter().sum()).filter(|number| self.device_of_slot(*number) == device);
        let own = |lane| numbers().filter(|number| of_lane(number) == lane).count();
        let here = || running.values().filter(|batch| batch.device == device);
        let runs = |lane| here().filter(|batch| self.lane_of(&batch.parts[0]) == lane).count();
        match lane {
            Lane::Realtime => own(lane).saturating_sub(runs(lane)),
            Lane::Batch => {
                let lent = runs(Lane::Realtime).saturating_sub(own(Lane::Realtime));
                own(lane).saturating_sub(runs(lane) + lent)
            }
        }
    }

    fn device_of_slot(&self, slot: u16) -> i16 {
        self.machine.device_map[usize::from(slot) % self.machine.device_map.len()]
    }

    pub(crate) fn arrived(&mut self, now: Micros, id: AttemptId, task: Task) {
        self.ways.insert(id, task.way.clone());
        self.lanes.insert(id, task.lane);
        let mut rows = vec![BTreeMap::new(); task.way.len()];
        rows[0] = (0..task.items).map(|row| (row, Row::Waits(now))).collect();
        self.open.insert(id, Attempt { task, rows });
    }

    pub(crate) fn begins(&mut self, now: Micros, batch: &Running, others: &BTreeMap<BatchId, Running>, model: Model) {
        self.is_in_a_free_slot(batch, others);
        self.is_of_one_kind(batch, model);
        self.keeps_culprits_apart(now, batch, others);
        self.keeps_realtime_waiting_for_one_batch(now, batch, others);
        for Part { id, stage, rows } in &batch.parts {
            let attempt = self.open.get_mut(id).unwrap_or_else(|| panic!("{id:?} is over and runs again"));
            let of_stage = &mut attempt.rows[usize::from(*stage)];
            for row in rows.clone() {
                let before = of_stage.insert(row, Row::Runs);
                assert!(matches!(before, Some(Row::Waits(_))), "row {row} of {id:?} in stage {stage}: {before:?}");
            }
        }
    }

    fn is_in_a_free_slot(&self, batch: &Running, others: &BTreeMap<BatchId, Running>) {
        let slot = batch.slot;
        assert!(slot.0 < self.machine.slots.iter().sum(), "there is no {slot:?}");
        assert!(others.values().all(|other| other.slot != slot), "{slot:?} is in use");
        assert_eq!(batch.device, self.device_of_slot(slot.0), "{slot:?} sits elsewhere");
        let beside = others.values().filter(|other| other.device == batch.device).count();
        let has_room = batch.device < 0 || beside < usize::from(self.machine.device_width);
        assert!(has_room, "{beside} batches run on {}", batch.device);
        let has_slot = |lane| self.free_slots(lane, batch.device, others) > 0;
        let is_home =
            has_slot(Lane::Batch) || self.lane_of(&batch.parts[0]) == Lane::Realtime && has_slot(Lane::Realtime);
        assert!(is_home, "{slot:?} is not its lane's");
    }

    fn is_of_one_kind(&self, batch: &Running, model: Model) {
        let (first, count, rows) = (&batch.parts[0], batch.parts.len(), batch.rows());
        assert!(batch.parts.iter().all(|part| part.rows.start < part.rows.end));
        let ids: BTreeSet<AttemptId> = batch.parts.iter().map(|part| part.id).collect();
        assert_eq!(ids.len(), count, "an attempt comes once in a batch");
        for part in &batch.parts {
            assert_eq!(part.stage, first.stage);
            assert_eq!(self.model_of(part), self.model_of(first));
            assert_eq!(self.lane_of(part), self.lane_of(first));
            assert_eq!(self.open[&part.id].task.length, self.open[&first.id].task.length);
        }
        match batch.kind {
            BatchKind::Whole => assert_eq!(count, 1),
            BatchKind::Packed | BatchKind::Spot => {
                assert!((2..=ROWS_MAX).contains(&rows), "{rows} rows");
                assert_eq!(model.many, Equality::Same, "packed without proof");
                assert!(rows <= model.right_to, "{rows} rows packed, and only {} are right", model.right_to);
            }
            BatchKind::Check => {
                assert!((2..=ROWS_MAX).contains(&rows), "{rows} rows");
                assert_eq!(model.many, Equality::Same, "packed without proof");
            }
            BatchKind::Probe => assert!((2..=8).contains(&rows), "{rows} rows in a probe"),
        }
    }

    /// Time since the client's rows crashed the model; `None` if that is long over.
    fn since_crash(&self, now: Micros, client: u8, model: usize) -> Option<Micros> {
        self.crashes.get(&(client, model)).map(|at| now - at).filter(|since| *since < REMEMBERED_MAX)
    }

    /// Rows of a client whose rows crashed the model lately run alone, in a runner apart, one batch at a time. Nobody
    /// else's do.
    fn keeps_culprits_apart(&self, now: Micros, batch: &Running, others: &BTreeMap<BatchId, Running>) {
        let since: Vec<Option<Micros>> = {
            let client = |part: &Part| self.open[&part.id].task.client;
            batch.parts.iter().map(|part| self.since_crash(now, client(part), self.model_of(part))).collect()
        };
        let is_apart = batch.parts.len() == 1 && batch.apart;
        assert!(since.iter().flatten().all(|since| *since >= REMEMBERED_MIN || is_apart), "{since:?}: {batch:?}");
        assert!(!batch.apart || since[0].is_some(), "apart, and nobody knows why: {batch:?}");
        let model = self.model_of(&batch.parts[0]);
        let beside = others.values().filter(|other| other.apart && self.model_of(&other.parts[0]) == model);
        assert!(!batch.apart || beside.count() == 0, "two batches of culprits at a time: {batch:?}");
    }

    /// A batch failed because of its rows.
    pub(crate) fn failed(&mut self, now: Micros, batch: &Running, code: ErrorCode) {
        if let [part] = &batch.parts[..]
            && (batch.kind, code) == (BatchKind::Whole, ErrorCode::RunCrashed)
            && let Some(attempt) = self.open.get(&part.id)
        {
            self.crashes.insert((attempt.task.client, self.model_of(part)), now);
        }
    }

    /// A batch of the batch lane may start ahead of waiting realtime rows only if the device owes it: realtime rows
    /// wait for the batch that runs when they come, and for what is owed.
    fn keeps_realtime_waiting_for_one_batch(&self, now: Micros, batch: &Running, others: &BTreeMap<BatchId, Running>) {
        let takes_its_place = self.free_slots(Lane::Realtime, batch.device, others) > 0;
        let is_contended = self.machine.slots[0] == 0 || batch.device >= 0 && takes_its_place;
        let waits = |(id, _): (AttemptId, Micros)| is_contended || self.has_no_other_slot(id, batch.device);
        if self.lane_of(&batch.parts[0]) == Lane::Batch
            && self.longest_waiting(now, Lane::Realtime, batch.device).is_some_and(waits)
        {
            let owed = self.owed.get(&batch.device).copied().unwrap_or(0);
            assert!(owed > 0, "{} µs of the batch lane begin before realtime rows, and nothing is owed", batch.took);
        }
    }

    /// Books device time that a lane used.
    pub(crate) fn spent(&mut self, now: Micros, batch: &Running, others: &BTreeMap<BatchId, Running>) {
        let here = others.values().filter(|other| other.device == batch.device).count();
        let slots =
            (0..self.machine.slots.iter().sum()).filter(|slot| self.device_of_slot(*slot) == batch.device).count();
        let width = if batch.device < 0 { slots } else { slots.min(usize::from(self.machine.device_width)) };
        if here + 1 >= width {
            self.opened.insert(batch.device, now);
        }

        let (lane, is_wanted) = (self.lane_of(&batch.parts[0]), self.waits(Lane::Batch, batch.device));
        let least = if self.waits(Lane::Realtime, batch.device) { -OWED_MAX } else { 0 };
        let took = batch.took as i64;
        let owed = self.owed.entry(batch.device).or_default();
        *owed = match lane {
            Lane::Realtime if is_wanted => (*owed + took / REALTIME_PARTS).min(OWED_MAX),
            Lane::Realtime => 0,
            Lane::Batch => (*owed - took).max(least),
        };
    }

    fn waits(&self, lane: Lane, device: i16) -> bool {
        let waits = |attempt: &Attempt| attempt.rows.iter().any(|rows| rows.values().any(is_waiting));
        let mut of_lane = self.open.values().filter(|attempt| attempt.task.lane == lane);
        of_lane.any(|attempt| self.may_run_on(&attempt.task, device) && waits(attempt))
    }

    /// The devices of the slots that are open to a lane: its own ones, and for realtime rows the lent ones, too.
    fn devices_of(&self, lane: Lane) -> impl Iterator<Item = i16> {
        let first = if lane == Lane::Batch { self.machine.slots[0] } else { 0 };
        (first..self.machine.slots.iter().sum()).map(|slot| self.device_of_slot(slot))
    }

    /// Whether a task may run there: on the GPU that it was promised, or anywhere if no slot of its lane sits on that.
    fn may_run_on(&self, task: &Task, device: i16) -> bool {
        let has = |gpu: i16| self.devices_of(task.lane).any(|other| other == gpu);
        task.gpu.map(i16::from).is_none_or(|gpu| device == gpu || !has(gpu))
    }

    /// Whether a realtime task was promised this device, on which only batch slots sit.
    fn has_no_other_slot(&self, id: AttemptId, device: i16) -> bool {
        let own = self.machine.slots[0];
        let is_promised = |attempt: &Attempt| attempt.task.gpu.map(i16::from) == Some(device);
        self.open.get(&id).is_some_and(is_promised) && (0..own).all(|slot| self.device_of_slot(slot) != device)
    }

    pub(crate) fn over(&mut self, now: Micros, batch: &Running, went_well: bool) {
        for Part { id, stage, rows } in &batch.parts {
            let Some(attempt) = self.open.get_mut(id) else { continue };
            let stage = usize::from(*stage);
            for row in rows.clone() {
                let after = if went_well { Row::Done } else { Row::Waits(now) };
                let before = attempt.rows[stage].insert(row, after);
                assert_eq!(before, Some(Row::Runs), "row {row} of {id:?}");
                if went_well && stage + 1 < attempt.rows.len() {
                    attempt.rows[stage + 1].insert(row, Row::Waits(now));
                }
            }
        }
    }

    pub(crate) fn killed(&mut self, batch: &Running) {
        // The upper bound: the batch did not run to its end. What the batch lane had too much is forgotten once one of
        // the lanes does not wait for the other.
        let lane = self.lane_of(&batch.parts[0]);
        let (grown, other) = match lane {
            Lane::Realtime => (batch.took as i64 / REALTIME_PARTS, Lane::Batch),
            Lane::Batch => (0, Lane::Realtime),
        };
        let least = if self.waits(other, batch.device) { -OWED_MAX } else { 0 };
        let owed = self.owed.entry(batch.device).or_default();
        *owed = (*owed + grown).max(least);
        self.killed.extend(batch.parts.iter().map(|part| part.id));
    }

    pub(crate) fn answered(&mut self, now: Micros, id: AttemptId, outcome: &Outcome) {
        let attempt = self.open.get(&id).expect("an answer is given once");
        if let Outcome::Done { .. } = outcome {
            for (stage, rows) in attempt.rows.iter().enumerate() {
                let done = rows.values().filter(|row| **row == Row::Done).count();
                assert_eq!(done, attempt.task.items as usize, "{id:?} at {now} in stage {stage}");
            }
        }
    }

    /// Only who crashed a model lately is turned away, and with nothing that has run.
    pub(crate) fn turned_away(&mut self, now: Micros, id: AttemptId) {
        if let Some(attempt) = self.open.get(&id) {
            let crashed =
                attempt.task.way.iter().any(|model| self.since_crash(now, attempt.task.client, *model).is_some());
            assert!(crashed, "{id:?} is refused");
            assert!(attempt.rows[0].values().all(is_waiting), "{id:?} is refused, and rows have run");
        }
        self.ended(id);
    }

    pub(crate) fn ended(&mut self, id: AttemptId) {
        self.open.remove(&id);
        self.over.insert(id);
    }

    pub(crate) fn heartbeat(&self, heartbeat: &Heartbeat) {
        let used: u16 = heartbeat.lanes.iter().map(|lane| lane.slots_used).sum();
        assert!(used <= self.machine.slots.iter().sum());
        assert!(heartbeat.costs.iter().all(|cost| u32::from(cost.best_batch) <= ROWS_MAX));
    }

    /// Checks the laws after each event.
    pub(crate) fn look(&mut self, now: Micros, running: &BTreeMap<BatchId, Running>) {
        for (lane, device) in Lane::ALL.into_iter().flat_map(|lane| self.idle_devices(lane, running)) {
            if let Some((id, since)) = self.longest_waiting(now, lane, device)
                && now > since.max(self.opened_for(id, device)) + WAIT_MAX
            {
                panic!("{id:?} waits since {since} at {now} and a slot on {device} is free");
            }
        }
        self.stages_are_bounded();
        let killed = std::mem::take(&mut self.killed);
        assert!(killed.iter().all(|id| self.over.contains(id)), "killed although wanted: {killed:?}");
    }

    /// When the rows of an attempt found a slot on the device. Those of a later stage count from their arrival.
    fn opened_for(&self, id: AttemptId, device: i16) -> Micros {
        if self.ways[&id].len() > 1 { 0 } else { self.opened.get(&device).copied().unwrap_or(0) }
    }

    /// The row of the last stage that waits longest for this device. Earlier stages may wait for later ones, and culprits
    /// for each other.
    fn longest_waiting(&self, now: Micros, lane: Lane, device: i16) -> Option<(AttemptId, Micros)> {
        let may_run = |attempt: &Attempt| attempt.task.lane == lane && self.may_run_on(&attempt.task, device);
        let of_lane = self.open.iter().filter(|(_, attempt)| may_run(attempt));
        let waits = of_lane.filter_map(|(id, attempt)| {
            if self.since_crash(now, attempt.task.client, *attempt.task.way.last()?).is_some() {
                return None;
            }
            let since = attempt.rows.last()?.values().filter_map(|row| match row {
                Row::Waits(since) => Some(*since),
                Row::Runs | Row::Done => None,
            });
            since.min().map(|since| (*id, since))
        });
        waits.min_by_key(|(_, since)| *since)
    }

    /// Devices with room where the lane has a free slot.
    fn idle_devices(&self, lane: Lane, running: &BTreeMap<BatchId, Running>) -> Vec<(Lane, i16)> {
        let has_room = |device: i16| {
            let busy = running.values().filter(|batch| batch.device == device).count();
            device < 0 || busy < usize::from(self.machine.device_width)
        };
        let devices: BTreeSet<i16> = self.machine.device_map.iter().copied().collect();
        let idle = |device: &i16| has_room(*device) && self.free_slots(lane, *device, running) > 0;
        devices.into_iter().filter(idle).map(|device| (lane, device)).collect()
    }

    /// Checks the rows between two models: at most two full batches, and the outputs of running batches.
    fn stages_are_bounded(&mut self) {
        let mut waiting: BTreeMap<(Lane, &[usize]), u32> = BTreeMap::new();
        for attempt in self.open.values() {
            for (stage, rows) in attempt.rows.iter().enumerate().skip(1) {
                let count = rows.values().filter(|row| is_waiting(row)).count() as u32;
                *waiting.entry((attempt.task.lane, &attempt.task.way[..=stage])).or_default() += count;
            }
        }
        let slots: u16 = self.machine.slots.iter().sum();
        let limit = (2 + u32::from(slots)) * ROWS_MAX.max(SINGLES_MAX);
        let most = waiting.values().copied().max().unwrap_or(0);
        assert!(most <= limit, "{most} wait between stages, {limit} may");
        self.most_between_stages = self.most_between_stages.max(most);
    }

    /// Admitted tasks that have not ended.
    pub(crate) fn left(&self) -> Vec<usize> {
        self.open.keys().copied().map(number_of).collect()
    }
}

fn is_waiting(row: &Row) -> bool {
    matches!(row, Row::Waits(_))
}
