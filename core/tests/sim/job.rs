//! What a simulated user submits, with the model's true behaviour, which only the simulator knows.

use std::time::Duration;

use proto_msgs::{
    ClientId, Demands, Digest, Direction, ErrorCode, InputDecl, JobId, LabelRule, Lane, Manifest, ModelFormat,
    ModelRef, Slo, Stage, TaskId, TaskSpec, limits::PRIORITY_DEFAULT,
};

use super::{
    mesh::{Micros, User, micros},
    models,
};

/// How a model behaves once it runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Behaviour {
    /// Runs and returns a result.
    Works,
    /// Fails for good with this code, together with all rows in the same call.
    Fails(ErrorCode),
    /// The first N attempts fail in a way that another worker may cure.
    FailsFirst(u32),
    /// In a call with other rows, the output lacks one row.
    LosesRow,
    /// Runs until it is stopped.
    NeverEnds,
    /// Kills the whole worker.
    KillsWorker,
    /// A file vanishes while it is sent.
    FileVanishes,
    /// The client has no room for the result.
    FillsDisk,
    /// The disk of the first worker that gets the task is full.
    DiskFullFirst,
    /// The result of the detached task cannot be written to its worker's disk.
    ResultUnwritten,
}

/// A job with more items runs in the batch lane, unless it asks for another lane.
const REALTIME_ITEMS_MAX: u32 = 64;

/// A task as it will be submitted.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) behaviour: Behaviour,
    /// Time of one item alone, in each stage.
    pub(crate) run: Micros,
    pub(crate) model: u8,
    pub(crate) model_bytes: u64,
    /// Models of the later stages.
    pub(crate) then: Vec<u8>,
    pub(crate) items: u32,
    /// Items of the whole `submit`; at least those of this task.
    pub(crate) job_items: u32,
    pub(crate) lane: Option<Lane>,
    pub(crate) slo: Option<Slo>,
    pub(crate) labels: Vec<LabelRule>,
    pub(crate) input_bytes: u64,
    /// Transfer time of the result.
    pub(crate) output: Micros,
    pub(crate) priority: u8,
    pub(crate) deadline: Option<Duration>,
    pub(crate) detached: bool,
    pub(crate) direction: Option<Direction>,
    pub(crate) demands: Demands,
}

impl Job {
    /// A task with a small model that works and takes this long.
    pub(crate) fn runs(run: Duration) -> Self {
        Self {
            behaviour: Behaviour::Works,
            run: micros(run),
            model: 0,
            model_bytes: 1 << 20,
            then: Vec::new(),
            items: 1,
            job_items: 1,
            lane: None,
            slo: None,
            labels: Vec::new(),
            input_bytes: 64 << 10,
            output: 20_000,
            priority: PRIORITY_DEFAULT,
            deadline: None,
            detached: false,
            direction: None,
            demands: Demands::default(),
        }
    }

    pub(crate) fn behaves(self, behaviour: Behaviour) -> Self {
        Self { behaviour, ..self }
    }

    pub(crate) fn model(self, model: u8, model_bytes: u64) -> Self {
        Self { model, model_bytes, ..self }
    }

    /// Sets the number of items; the model runs once for each.
    pub(crate) fn items(self, items: u32) -> Self {
        Self { items, job_items: self.job_items.max(items), ..self }
    }

    pub(crate) fn then(self, model: u8) -> Self {
        let mut then = self.then;
        then.push(model);
        Self { then, ..self }
    }

    pub(crate) fn lane(self, lane: Lane) -> Self {
        Self { lane: Some(lane), ..self }
    }

    pub(crate) fn slo(self, latency_ms: u32, max_violation_permille: u16) -> Self {
        Self { slo: Some(Slo { latency_ms, max_violation_permille }), ..self }
    }

    pub(crate) fn priority(self, priority: u8) -> Self {
        Self { priority, ..self }
    }

    pub(crate) fn deadline(self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    pub(crate) fn detached(self) -> Self {
        Self { detached: true, ..self }
    }

    pub(crate) fn direction(self, direction: Direction) -> Self {
        Self { direction: Some(direction), ..self }
    }

    /// Sets input bytes that are too few to matter.
    pub(crate) fn light(self) -> Self {
        Self { model_bytes: 4 << 10, input_bytes: 1 << 10, output: 1_000, ..self }
    }

    /// The task's lane: as asked for, or by the number of items.
    pub(crate) fn lane_in_force(&self) -> Lane {
        let by_items = if self.job_items > REALTIME_ITEMS_MAX { Lane::Batch } else { Lane::Realtime };
        self.lane.unwrap_or(by_items)
    }

    pub(super) fn model_digest(&self) -> Digest {
        Digest::from_bytes([self.model; 32])
    }

    fn model_ref(&self, model: u8) -> ModelRef {
        let digest = Digest::from_bytes([model; 32]);
        ModelRef { digest, size_bytes: self.model_bytes, format: ModelFormat::TfLite }
    }

    fn stages(&self) -> Vec<Stage> {
        let stage = |model: &u8| Stage { name: format!("model{model}"), model: self.model_ref(*model) };
        self.then.iter().map(stage).collect()
    }

    pub(super) fn spec(&self, task: TaskId, user: &User) -> TaskSpec {
        TaskSpec {
            task,
            client: user.id,
            key: user.key,
            job: JobId::from_bytes([1; 16]),
            model_name: format!("model{}", self.model),
            model: self.model_ref(self.model),
            then: self.stages(),
            items: self.items,
            job_items: self.job_items,
            lane: self.lane,
            slo: self.slo,
            labels: self.labels.clone(),
            input_bytes: self.input_bytes,
            priority: self.priority,
            deadline_ms: self.deadline.map(|deadline| deadline.as_millis() as u64),
            demands: self.demands,
            detached: self.detached,
            direction: self.direction,
        }
    }

    pub(super) fn manifest(&self, task: TaskId) -> Manifest {
        let input =
            InputDecl { name: None, dtype: None, shape: None, digest: input_of(task), size_bytes: self.input_bytes };
        Manifest {
            model: self.model_ref(self.model),
            model_name: format!("model{}", self.model),
            then: self.stages(),
            items: self.items,
            inputs: vec![input],
        }
    }

    /// The output that the task's owner must get.
    pub(super) fn right_output(&self, task: TaskId, client: ClientId) -> Digest {
        let input = input_of(task);
        let models: Vec<Digest> =
            [&self.model].into_iter().chain(&self.then).map(|model| Digest::from_bytes([*model; 32])).collect();
        let rows = (0..self.items).map(|row| {
            let row = models::input_row(input, row);
            models.iter().fold(row, |row, model| models::run_row(*model, row))
        });
        models::output_of(task, client, rows)
    }
}

/// The input of a task. No two tasks have the same.
fn input_of(task: TaskId) -> Digest {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(task.as_bytes());
    Digest::from_bytes(bytes)
}
