//! What a simulated user submits: an honest description of how the model will behave, which only the simulator knows.

use std::time::Duration;

use mesh_core::client::TaskSpec;
use proto_msgs::{
    Demands, Digest, Direction, ErrorCode, InputDecl, JobId, Manifest, ModelFormat, ModelRef, TaskId,
    limits::PRIORITY_DEFAULT,
};

use super::mesh::{Micros, micros};

/// How a model behaves once it runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Behaviour {
    /// Runs and gives a result.
    Works,
    /// Fails for good with this code.
    Fails(ErrorCode),
    /// Fails at the first so many attempts in a way that another worker may mend.
    FailsFirst(u32),
    /// Runs until it is stopped.
    NeverEnds,
    /// Takes the whole worker down with it.
    KillsWorker,
    /// A file vanishes while it is sent.
    FileVanishes,
    /// The disk of the first worker that takes it is full.
    DiskFullFirst,
}

/// A task in the making.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) behaviour: Behaviour,
    pub(crate) run: Micros,
    pub(crate) model: u8,
    pub(crate) model_bytes: u64,
    pub(crate) input_bytes: u64,
    /// How long the result is on its way.
    pub(crate) output: Micros,
    pub(crate) priority: u8,
    pub(crate) deadline: Option<Duration>,
    pub(crate) detached: bool,
    pub(crate) direction: Option<Direction>,
    pub(crate) demands: Demands,
}

impl Job {
    /// A small model that works and takes this long.
    pub(crate) fn runs(run: Duration) -> Self {
        Self {
            behaviour: Behaviour::Works,
            run: micros(run),
            model: 0,
            model_bytes: 1 << 20,
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

    fn model_ref(&self) -> ModelRef {
        let digest = Digest::from_bytes([self.model; 32]);
        ModelRef { digest, size_bytes: self.model_bytes, format: ModelFormat::TfLite }
    }

    pub(super) fn spec(&self, task: TaskId) -> TaskSpec {
        TaskSpec {
            task,
            job: JobId::from_bytes([1; 16]),
            model_name: format!("model{}", self.model),
            model: self.model_ref(),
            then: Vec::new(),
            items: 1,
            job_items: 1,
            lane: None,
            slo: None,
            labels: Vec::new(),
            input_bytes: self.input_bytes,
            priority: self.priority,
            deadline: self.deadline,
            demands: self.demands,
            detached: self.detached,
            direction: self.direction,
        }
    }

    pub(super) fn manifest(&self, task: TaskId) -> Manifest {
        let input =
            InputDecl { name: None, dtype: None, shape: None, digest: input_of(task), size_bytes: self.input_bytes };
        Manifest {
            model: self.model_ref(),
            model_name: format!("model{}", self.model),
            then: Vec::new(),
            items: 1,
            inputs: vec![input],
        }
    }
}

/// The input of a task: no two tasks have the same.
fn input_of(task: TaskId) -> Digest {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(task.as_bytes());
    Digest::from_bytes(bytes)
}

/// What a model makes of an input, as a worker works it out from what it was given. A result that went to the wrong
/// client or came from the wrong input cannot look right.
pub(super) fn output_of(task: TaskId, client: proto_msgs::ClientId, input: Digest) -> Digest {
    let (mut bytes, client) = (*input.as_bytes(), client.as_bytes());
    for (place, (task, client)) in bytes[16..].iter_mut().zip(task.as_bytes().iter().zip(client)) {
        *place = task.wrapping_mul(31) ^ client;
    }
    Digest::from_bytes(bytes)
}

/// What the owner of a task must get.
pub(super) fn right_output(task: TaskId, client: proto_msgs::ClientId) -> Digest {
    output_of(task, client, input_of(task))
}
