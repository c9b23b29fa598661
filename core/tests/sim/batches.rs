//! Batches at a simulated worker: the rows of its attempts go through models of known cost.

use mesh_core::worker::{BatchId, BatchKind, BatchTimes, CHECKED_ROWS, Equality, Event, Part, SPOT_ROWS, SlotId};
use proto_msgs::{AttemptId, Digest, ErrorCode, Failure, Phase};

use super::{
    job::{Behaviour, Job},
    mesh::{Happening, MS, Mesh, Micros, Node, SECOND, short_id},
    models::{self, Law, law_of},
    referee::Referee,
    story::tell,
    worker_shell::{Session, Stage},
};

/// The outputs of an attempt's rows so far, by stage and row.
pub(super) type Rows = Vec<Vec<Option<u64>>>;

/// A running batch.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) parts: Vec<Part>,
    pub(super) slot: SlotId,
    pub(super) device: i16,
    pub(super) kind: BatchKind,
    /// Time to load the model, 0 if it is warm.
    pub(super) load: Micros,
    pub(super) is_loaded: bool,
    /// Nobody wants its rows any more: it ends once its model is loaded.
    pub(super) only_loads: bool,
    /// Its rows are with their attempts: what still runs is for the verdict on the model.
    pub(super) is_answered: bool,
    /// The rows that are compared; `None` if none are, or no more.
    compared: Option<u32>,
}

/// How far a batch comes at once.
#[derive(Clone, Copy, Debug)]
pub(super) enum BatchStep {
    Loaded,
    Over,
    Compared,
}

/// One in so many comparisons takes long.
const LONG_COMPARISONS: u64 = 7;

fn is_long(worker: usize, comparison: BatchId) -> bool {
    (comparison.0 + worker as u64).is_multiple_of(LONG_COMPARISONS)
}

impl Batch {
    pub(super) fn new(parts: Vec<Part>, slot: SlotId, device: i16, kind: BatchKind) -> Self {
        let (is_loaded, only_loads, is_answered) = (false, false, false);
        Self { parts, slot, device, kind, load: 0, is_loaded, only_loads, is_answered, compared: None }
    }

    /// Number of rows of all parts.
    pub(super) fn rows(&self) -> u32 {
        self.parts.iter().map(|part| part.rows.end.saturating_sub(part.rows.start)).sum()
    }
}

/// The number of a stage's model.
pub(super) fn model_of(job: &Job, stage: u8) -> u8 {
    match stage {
        0 => job.model,
        later => job.then.get(usize::from(later) - 1).copied().unwrap_or(job.model),
    }
}

impl Referee {
    /// The model that a batch runs.
    fn model_of(&self, batch: &Batch) -> Digest {
        let model = batch.parts.first().map_or(0, |part| model_of(self.job(part.id.task), part.stage));
        Digest::from_bytes([model; 32])
    }
}

impl Mesh {
    pub(super) fn run_batch(&mut self, worker: usize, id: BatchId, mut batch: Batch, limit: Micros) {
        tell!(self, "W{worker} runs {id:?} {:?} in {:?} {}", batch.kind, batch.slot, brief(&batch.parts));
        self.referee.batch_begins(self.now, worker, &self.workers[worker], id, &batch);
        let shell = &mut self.workers[worker];
        let life = shell.life;
        let jobs = batch.parts.iter().map(|part| (self.referee.job(part.id.task), part));
        let singles: Vec<(u32, Micros)> = jobs
            .clone()
            .map(|(job, part)| {
                let ends = job.behaviour != Behaviour::NeverEnds || !is_last(job, part.stage);
                let each = if ends { job.run.saturating_mul(shell.slowness_permille) / 1000 } else { SECOND << 20 };
                (part.rows.end.saturating_sub(part.rows.start), each)
            })
            .collect();
        let model = jobs.clone().next().map_or(0, |(job, part)| model_of(job, part.stage));
        let digest = Digest::from_bytes([model; 32]);
        batch.load = if shell.warm.contains(&digest) { 0 } else { self.setup.load };
        for part in &batch.parts {
            if let Some(kept) = shell.disk.detached.get_mut(&part.id)
                && std::mem::replace(&mut kept.begun_in, life) != life
            {
                kept.runs_begun += 1;
            }
        }
        let load = batch.load;
        let takes = load + time_within(batch.kind, law_of(model), &singles, limit);
        shell.batches.insert(id, batch);
        let half = load + MS.min(takes - load) / 2;
        self.after(half, Happening::Batch { worker, life, batch: id, step: BatchStep::Loaded });
        self.after(takes, Happening::Batch { worker, life, batch: id, step: BatchStep::Over });
    }

    pub(super) fn kill_batch(&mut self, worker: usize, id: BatchId) {
        tell!(self, "W{worker} kills {id:?}");
        self.referee.worker_acted(self.now, worker, &self.workers[worker]);
        let Some(batch) = self.workers[worker].batches.remove(&id) else {
            return self.referee.fail("only what runs is killed", format!("W{worker} kills {id:?}"));
        };
        self.end_runner(worker, &batch);
    }

    /// The runner of a batch ends with it.
    fn end_runner(&mut self, worker: usize, batch: &Batch) {
        let model = self.referee.model_of(batch);
        let shell = &mut self.workers[worker];
        let is_used = shell.batches.values().any(|other| other.is_loaded && self.referee.model_of(other) == model);
        if batch.is_loaded && !is_used {
            shell.warm.retain(|warm| *warm != model);
        }
    }

    pub(super) fn only_load(&mut self, worker: usize, id: BatchId) {
        tell!(self, "W{worker} only loads {id:?}");
        match self.workers[worker].batches.get_mut(&id) {
            Some(batch) => batch.only_loads = true,
            None => self.referee.fail("only what runs is killed", format!("W{worker} only loads {id:?}")),
        }
    }

    /// The model of a batch is loaded, and its rows begin to run if anybody wants them.
    fn batch_loaded(&mut self, worker: usize, id: BatchId) {
        self.referee.worker_acted(self.now, worker, &self.workers[worker]);
        let Some(batch) = self.workers[worker].batches.get_mut(&id) else { return };
        batch.is_loaded = true;
        let (load, only_loads) = (batch.load, batch.only_loads);
        let model = self.referee.model_of(&self.workers[worker].batches[&id]);
        let shell = &mut self.workers[worker];
        shell.warm.retain(|warm| *warm != model);
        shell.warm.insert(0, model);
        shell.warm.truncate(shell.place.warm_max);
        shell.loads += u32::from(load > 0);
        if !only_loads {
            return self.worker_handle(worker, Event::BatchReached { batch: id, phase: Phase::Running });
        }
        shell.batches.remove(&id);
        tell!(self, "W{worker} has loaded for {id:?}");
        let ended = Ok(BatchTimes { load_us: load, ..BatchTimes::default() });
        self.worker_handle(worker, Event::BatchEnded { batch: id, ended });
    }

    /// The packed call of a probe begins.
    pub(super) fn compare(&mut self, worker: usize, id: BatchId, rows: u32, limit: Micros) {
        let shell = &self.workers[worker];
        let (life, slowness) = (shell.life, shell.slowness_permille);
        let Some(batch) =
            shell.batches.get(&id).filter(|batch| batch.is_answered && (2..=batch.rows()).contains(&rows))
        else {
            return self.referee.fail("what is answered is compared", format!("W{worker} {rows} rows of {id:?}"));
        };
        let (job, stage) = (self.referee.job(batch.parts[0].id.task), batch.parts[0].stage);
        let packed = models::call_us(law_of(model_of(job, stage)), &[(rows, job.run * slowness / 1000)]);
        // Rows here all get other answers, so one call does. Now and then a disk is slow.
        let calls = if is_long(worker, id) { 10 } else { 1 };
        if let Some(batch) = self.workers[worker].batches.get_mut(&id) {
            batch.compared = Some(rows);
        }
        let step = BatchStep::Compared;
        self.after((packed * calls).clamp(1, limit), Happening::Batch { worker, life, batch: id, step });
    }

    /// A probe ends once the call that runs is over, and without a verdict if that was not the last one.
    pub(super) fn stop_comparing(&mut self, worker: usize, id: BatchId) {
        tell!(self, "W{worker} stops comparing {id:?}");
        let life = self.workers[worker].life;
        let Some(batch) = self.workers[worker].batches.get_mut(&id).filter(|batch| batch.is_answered) else {
            return self.referee.fail("what is answered is compared", format!("W{worker} stops {id:?}"));
        };
        let has_begun = batch.compared.is_some();
        if is_long(worker, id) {
            batch.compared = None;
        }
        if !has_begun {
            self.after(MS, Happening::Batch { worker, life, batch: id, step: BatchStep::Compared });
        }
    }

    /// The comparison of a probe is over, or it took its runner with it.
    fn batch_compared(&mut self, worker: usize, id: BatchId) {
        self.referee.worker_acted(self.now, worker, &self.workers[worker]);
        let Some(batch) = self.workers[worker].batches.remove(&id) else { return };
        let jobs = batch.parts.iter().map(|part| (self.referee.job(part.id.task), part));
        let each =
            jobs.clone().map(|(job, _)| job.run).max().unwrap_or(0) * self.workers[worker].slowness_permille / 1000;
        let law = jobs.clone().next().map_or(Law::NoGain, |(job, part)| law_of(model_of(job, part.stage)));
        let loses_row =
            jobs.clone().any(|(job, part)| is_last(job, part.stage) && job.behaviour == Behaviour::LosesRow);
        let equal = match (batch.compared, law) {
            (None, _) => Equality::Unfinished,
            (_, Law::Unsupported) => Equality::Unsupported,
            (_, Law::Differs) => Equality::Differs,
            _ if loses_row => Equality::Differs,
            (_, Law::Packs | Law::NoGain) => Equality::Same,
        };
        let packed_us = batch.compared.filter(|_| equal != Equality::Unsupported);
        let packed_us = packed_us.map(|rows| models::call_us(law, &[(rows, each)]));
        let is_deadly = self.setup.deadly_comparisons.is_some_and(|each| (id.0 + worker as u64).is_multiple_of(each));
        let ended = if is_deadly && batch.compared.is_some() {
            self.end_runner(worker, &batch);
            Err(Failure::new(ErrorCode::RunCrashed, "too many rows at once"))
        } else {
            Ok(BatchTimes { packed_us, equal: Some(equal), ..BatchTimes::default() })
        };
        tell!(self, "W{worker} has compared {id:?}: {ended:?}");
        self.worker_handle(worker, Event::BatchEnded { batch: id, ended });
    }

    pub(super) fn batch_step(&mut self, worker: usize, life: u32, id: BatchId, step: BatchStep) {
        let shell = &self.workers[worker];
        if shell.life != life || shell.machine.is_none() || !shell.batches.contains_key(&id) {
            return;
        }
        match step {
            BatchStep::Loaded => self.batch_loaded(worker, id),
            BatchStep::Over => self.batch_over(worker, id),
            BatchStep::Compared => self.batch_compared(worker, id),
        }
    }

    fn batch_over(&mut self, worker: usize, id: BatchId) {
        self.referee.worker_acted(self.now, worker, &self.workers[worker]);
        let Some(batch) = self.workers[worker].batches.remove(&id) else { return };
        if batch.only_loads {
            return; // It ended with the load.
        }
        let kills = |part: &Part| {
            let job = self.referee.job(part.id.task);
            job.behaviour == Behaviour::KillsWorker && is_last(job, part.stage)
        };
        if let Some(part) = batch.parts.iter().find(|part| kills(part)) {
            let task = part.id.task;
            self.referee.killed(worker, task);
            self.crash(Node::Worker(worker));
            return self.after(2 * SECOND, Happening::Start(Node::Worker(worker)));
        }
        let ended = self.end_of(worker, &batch);
        if ended.is_ok() {
            for part in &batch.parts {
                self.keep_rows(worker, &batch, part);
            }
        }
        let crashes = |failure: &Failure| failure.code != ErrorCode::RunFailed && batch.kind == BatchKind::Whole;
        if ended.as_ref().is_err_and(crashes) {
            self.referee.crashed(worker, &batch);
        }
        tell!(self, "W{worker} has run {id:?}: {ended:?}");
        if let (BatchKind::Probe, Ok(times)) = (batch.kind, &ended) {
            let times = *times;
            self.workers[worker].batches.insert(id, Batch { is_answered: true, ..batch });
            return self.worker_handle(worker, Event::BatchAnswered { batch: id, times });
        }
        self.worker_handle(worker, Event::BatchEnded { batch: id, ended });
    }

    /// How the batch ended, as the runtime reports it.
    fn end_of(&self, worker: usize, batch: &Batch) -> Result<BatchTimes, Failure> {
        let jobs = || batch.parts.iter().map(|part| (self.referee.job(part.id.task), part));
        let ends = || jobs().filter(|(job, part)| is_last(job, part.stage));
        for (job, part) in ends() {
            match job.behaviour {
                Behaviour::NeverEnds => return Err(Failure::new(ErrorCode::RunTimeout, "stopped at its limit")),
                Behaviour::Fails(code) => return Err(Failure::new(code, "as the model does")),
                Behaviour::FailsFirst(attempts) if part.id.attempt.0 <= attempts => {
                    return Err(Failure::new(ErrorCode::RunProtocol, "nonsense"));
                }
                _ => {}
            }
        }
        let law = jobs().next().map_or(Law::NoGain, |(job, part)| law_of(model_of(job, part.stage)));
        let loses_row = ends().any(|(job, _)| job.behaviour == Behaviour::LosesRow);
        let has_company = batch.rows() > 1;
        let slowness = self.workers[worker].slowness_permille;
        let singles: Vec<(u32, Micros)> = jobs()
            .map(|(job, part)| (part.rows.end.saturating_sub(part.rows.start), job.run * slowness / 1000))
            .collect();
        let one_by_one: Micros = singles.iter().map(|(rows, each)| u64::from(*rows) * each).sum();
        let packed_us = models::call_us(law, &singles);
        let times = BatchTimes { run_us: one_by_one, load_us: batch.load, ..BatchTimes::default() };
        match batch.kind {
            BatchKind::Whole => Ok(times),
            kind if kind.is_packed() && has_company && law == Law::Unsupported => {
                Err(Failure::new(ErrorCode::RunFailed, "got 2 rows for dimension 0, expected 1"))
            }
            kind if kind.is_packed() && has_company && loses_row => {
                Err(Failure::new(ErrorCode::RunProtocol, "one row less came out than went in"))
            }
            BatchKind::Packed => Ok(BatchTimes { run_us: packed_us, ..times }),
            BatchKind::Check | BatchKind::Spot => {
                Ok(BatchTimes { run_us: packed_us, equal: Some(Equality::Same), ..times })
            }
            BatchKind::Probe => {
                Ok(BatchTimes { single_us: Some(one_by_one / u64::from(batch.rows().max(1))), ..times })
            }
        }
    }

    /// Keeps the outputs of a part with its attempt, if the attempt still exists.
    fn keep_rows(&mut self, worker: usize, batch: &Batch, part: &Part) {
        let job = self.referee.job(part.id.task);
        let (model, stages) = (model_of(job, part.stage), job.then.len() + 1);
        let spoils = batch.kind.is_packed() && batch.rows() > 1 && law_of(model) == Law::Differs;
        let Some(session) = self.workers[worker].sessions.get_mut(&part.id) else { return };
        if session.stage == Stage::Over {
            return;
        }
        session.rows.resize_with(stages, || vec![None; session.manifest.items as usize]);
        for row in part.rows.clone() {
            let given = row_before(session, part.stage, row);
            let place = session.rows.get_mut(usize::from(part.stage)).and_then(|rows| rows.get_mut(row as usize));
            let (Some(given), Some(place)) = (given, place) else {
                let detail = format!("W{worker} ran row {row} of {} at stage {}", short_id(part.id), part.stage);
                return self.referee.fail("a stage gets what the one before it gave", detail);
            };
            let made = models::run_row(Digest::from_bytes([model; 32]), given);
            if place.replace(if spoils { models::spoil_row(made) } else { made }).is_some() {
                let detail = format!("W{worker} ran row {row} of {} at stage {} again", short_id(part.id), part.stage);
                return self.referee.fail("every row runs once", detail);
            }
        }
    }
}

/// A row's value before it goes through a stage.
fn row_before(session: &Session, stage: u8, row: u32) -> Option<u64> {
    match stage {
        0 => Some(models::input_row(session.manifest.inputs.first()?.digest, row)),
        later => *session.rows.get(usize::from(later) - 1)?.get(row as usize)?,
    }
}

/// Whether this is the task's last stage, where its behaviour shows.
fn is_last(job: &Job, stage: u8) -> bool {
    usize::from(stage) == job.then.len()
}

/// Run time of a batch, whose calls are each cut at `limit`.
fn time_within(kind: BatchKind, law: Law, singles: &[(u32, Micros)], limit: Micros) -> Micros {
    let packed = models::call_us(law, singles).min(limit);
    let mut one_by_one: Micros = 0;
    for (rows, each) in singles {
        if *each > limit {
            one_by_one += limit;
            break;
        }
        one_by_one += u64::from(*rows) * each;
    }
    match kind {
        BatchKind::Whole => one_by_one,
        BatchKind::Packed => packed,
        BatchKind::Check | BatchKind::Spot => {
            let rows = singles.iter().map(|(rows, _)| u64::from(*rows)).sum::<u64>().max(1);
            let compared = if kind == BatchKind::Check { CHECKED_ROWS } else { SPOT_ROWS };
            packed + one_by_one / rows * rows.min(compared.into())
        }
        BatchKind::Probe => one_by_one,
    }
}

/// Parts in the words of the story.
pub(super) fn brief(parts: &[Part]) -> String {
    let part = |part: &Part| format!("{}/{} {}..{}", short_id(part.id), part.stage, part.rows.start, part.rows.end);
    parts.iter().map(part).collect::<Vec<_>>().join(", ")
}

/// The owners of a batch's rows.
pub(super) fn has(batch: &Batch, id: AttemptId) -> bool {
    !batch.is_answered && batch.parts.iter().any(|part| part.id == id)
}
