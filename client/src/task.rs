//! A task to submit. Owns its settings and the check for everything that the mesh would refuse. Never: connections.

use std::time::Duration;

use proto_msgs::{
    ClientId, Demands, Direction, InputDecl, JobId, LabelRule, Lane, Manifest, PublicKey, Slo, Stage, TaskId, TaskSpec,
    limits,
};
use uuid::Uuid;

use crate::{
    Input, Model, SubmitError,
    input::{Blob, at_most},
};

/// Inputs in memory up to this length are hashed at once: that is faster than a hand-over to another thread and back.
const QUICK_BYTES_MAX: usize = 64 * 1024;

/// A task to submit: a model, its inputs and the settings of the run.
#[derive(Clone, Debug)]
pub struct Task {
    pub(crate) model: Model,
    pub(crate) inputs: Vec<Input>,
    pub(crate) priority: u8,
    pub(crate) deadline: Option<Duration>,
    pub(crate) demands: Demands,
    pub(crate) detached: bool,
    pub(crate) job: JobId,
    pub(crate) items: u32,
    pub(crate) job_items: u32,
    pub(crate) lane: Option<Lane>,
    pub(crate) slo: Option<Slo>,
    pub(crate) labels: Vec<LabelRule>,
    then: Vec<(String, Model)>,
}

impl Task {
    /// A task for this model, still without inputs.
    pub fn new(model: Model) -> Self {
        Self {
            model,
            inputs: Vec::new(),
            priority: limits::PRIORITY_DEFAULT,
            deadline: None,
            demands: Demands::default(),
            detached: false,
            job: new_job(),
            items: 1,
            job_items: 0,
            lane: None,
            slo: None,
            labels: Vec::new(),
            then: Vec::new(),
        }
    }

    /// Adds an input.
    pub fn input(mut self, input: Input) -> Self {
        self.inputs.push(input);
        self
    }

    /// Adds inputs.
    pub fn inputs(mut self, inputs: impl IntoIterator<Item = Input>) -> Self {
        self.inputs.extend(inputs);
        self
    }

    /// Adds the inputs of several items, each item's in the model's order, stacked into one task with that number of
    /// items. Blocks while it reads files: in async code, call it in `spawn_blocking` if they are large.
    ///
    /// # Errors
    /// If items differ in the number, type or shape of their inputs, or a file cannot be read.
    pub fn stack(mut self, items: Vec<Vec<Input>>) -> Result<Self, SubmitError> {
        let count = u32::try_from(items.len()).unwrap_or(u32::MAX);
        let inputs = items.first().map_or(0, Vec::len);
        if items.iter().any(|item| item.len() != inputs) {
            return Err(SubmitError::Invalid("items with different numbers of inputs cannot share a task".to_owned()));
        }
        let mut items: Vec<_> = items.into_iter().map(Vec::into_iter).collect();
        for _ in 0..inputs {
            let of_each = items.iter_mut().filter_map(Iterator::next).collect();
            self.inputs.push(Input::join(of_each)?);
        }
        Ok(self.items(count))
    }

    /// Sets the priority: 0 (when there is room) to 100 (before all others). The default is 50.
    pub fn priority(mut self, priority: u8) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the deadline: the time after which the result is worthless.
    pub fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets what a worker must have and what the run may use.
    pub fn demands(mut self, demands: Demands) -> Self {
        self.demands = demands;
        self
    }

    /// Lets the task continue after this program ends, and keeps the result for [`Mesh::fetch`](crate::Mesh::fetch).
    /// [`TaskHandle::wait`](crate::TaskHandle::wait) then ends without outputs, as soon as the worker has everything.
    /// Before that, dropping the handle cancels the task.
    pub fn detached(mut self, detached: bool) -> Self {
        self.detached = detached;
        self
    }

    /// Sets the task's job. Tasks of one job are shown together.
    pub fn job(mut self, job: JobId) -> Self {
        self.job = job;
        self
    }

    /// Sets the number of items: complete sets of the model's inputs, stacked along the first dimension. The outputs
    /// are stacked the same way; [`Outputs::item`](crate::Outputs::item) takes them apart.
    pub fn items(mut self, items: u32) -> Self {
        self.items = items;
        self
    }

    /// Sets the number of items in the whole job, this task's included. The broker chooses the lane by it.
    pub fn job_items(mut self, job_items: u32) -> Self {
        self.job_items = job_items;
        self
    }

    /// Sets the lane whose slots the task may use. `None`: the number of the job's items decides.
    pub fn lane(mut self, lane: Option<Lane>) -> Self {
        self.lane = lane;
        self
    }

    /// Sets the service level of the task's stream. Workers that break it too often are passed over.
    pub fn slo(mut self, slo: Slo) -> Self {
        self.slo = Some(slo);
        self
    }

    /// Adds a rule for a label of the worker.
    pub fn label(mut self, rule: LabelRule) -> Self {
        self.labels.push(rule);
        self
    }

    /// Adds a stage: a model that takes the outputs of the model before it.
    pub fn then(mut self, name: impl Into<String>, model: Model) -> Self {
        self.then.push((name.into(), model));
        self
    }

    /// Whether preparing the task takes less time than handing it to another thread.
    pub(crate) fn is_quickly_prepared(&self) -> bool {
        let sizes: Option<Vec<usize>> = self.inputs.iter().map(Input::memory_bytes).collect();
        sizes.is_some_and(|sizes| sizes.into_iter().fold(0, usize::saturating_add) <= QUICK_BYTES_MAX)
    }

    /// Hashes the inputs and checks every limit. Blocks.
    pub(crate) fn prepare(
        self,
        task: TaskId,
        (client, key): (ClientId, Option<PublicKey>),
        direction: Option<Direction>,
    ) -> Result<(TaskSpec, Payload), SubmitError> {
        self.check()?;
        let deadline_ms = self.deadline_ms();
        let prepared: Vec<(InputDecl, Blob)> =
            self.inputs.into_iter().map(Input::prepare).collect::<Result<_, SubmitError>>()?;
        let (inputs, mut blobs): (Vec<InputDecl>, Vec<Blob>) = prepared.into_iter().unzip();
        let input_bytes = inputs.iter().map(|input| input.size_bytes).fold(0, u64::saturating_add);
        at_most("the inputs together", input_bytes, limits::INPUT_BYTES_MAX, "bytes")?;
        blobs.insert(0, self.model.blob().clone());
        blobs.extend(self.then.iter().map(|(_, model)| model.blob().clone()));
        let stage = |(name, model): (String, Model)| Stage { name, model: model.reference() };
        let then: Vec<Stage> = self.then.into_iter().map(stage).collect();
        let (model, model_name) = (self.model.reference(), self.model.name().to_owned());
        let spec = TaskSpec {
            task,
            client,
            key,
            job: self.job,
            model_name: model_name.clone(),
            model,
            then: then.clone(),
            input_bytes,
            items: self.items,
            job_items: self.job_items.max(self.items),
            lane: self.lane,
            slo: self.slo,
            labels: self.labels,
            priority: self.priority,
            deadline_ms,
            demands: self.demands,
            detached: self.detached,
            direction,
        };
        let manifest = Manifest { model, model_name, then, items: self.items, inputs };
        Ok((spec, Payload { manifest, blobs }))
    }

    /// The deadline in whole milliseconds, not less than was asked for: some of it may have passed since.
    fn deadline_ms(&self) -> Option<u64> {
        self.deadline.map(|deadline| u64::try_from(deadline.as_micros().div_ceil(1000)).unwrap_or(u64::MAX))
    }

    /// Checks the mesh's limits before anything is read.
    fn check(&self) -> Result<(), SubmitError> {
        if self.priority > limits::PRIORITY_MAX {
            let text = format!("priority {} is out of range: use 0 to {}", self.priority, limits::PRIORITY_MAX);
            return Err(SubmitError::Invalid(text));
        }
        at_most("the task", self.inputs.len() as u64, limits::TENSORS_MAX as u64, "inputs")?;
        at_most("the deadline", self.deadline_ms().unwrap_or(0), limits::DEADLINE_MS_MAX, "ms")?;
        if self.items == 0 {
            return Err(SubmitError::Invalid("a task of no items has nothing to run: give it at least one".to_owned()));
        }
        at_most("the task", self.items.into(), limits::ITEMS_MAX.into(), "items")?;
        at_most("the task", self.then.len() as u64, limits::STAGES_AFTER_MAX as u64, "models after the first")?;
        at_most("the task", self.labels.len() as u64, limits::RULES_MAX as u64, "wishes for labels")?;
        let names = self.then.iter().map(|(name, _)| name);
        let texts = names.chain(self.labels.iter().flat_map(|rule| [&rule.key, &rule.value]));
        for text in texts {
            at_most("a name", text.len() as u64, limits::NAME_BYTES_MAX as u64, "bytes")?;
        }
        Ok(())
    }
}

/// A fresh job id.
pub fn new_job() -> JobId {
    Uuid::now_v7().into()
}

/// The data that a task sends, once per attempt.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(crate) manifest: Manifest,
    /// The model, then the inputs, then the models of later stages.
    pub(crate) blobs: Vec<Blob>,
}

/// Runs file work on a blocking thread. `None` if the runtime is shutting down. A panic in it continues in the caller.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) => error.try_into_panic().map_or(None, |panic| std::panic::resume_unwind(panic)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Data;

    const MODEL: &[u8] = b"\x1c\0\0\0TFL3 and so on";
    const TASK: TaskId = TaskId::from_bytes([1; 16]);
    const OWNER: (ClientId, Option<PublicKey>) = (ClientId::from_bytes([2; 16]), None);

    #[test]
    fn what_is_beyond_a_limit_is_said_before_anything_is_sent() {
        let model = Model::new("m".into(), Data::Memory(MODEL.into())).unwrap();
        let many = (0..200).map(|_| Input::raw(vec![0]));

        let error = Task::new(model.clone()).inputs(many).prepare(TASK, OWNER, None).unwrap_err();
        assert_eq!(error.to_string(), "the task has 200 inputs, the limit is 128");
        let error = Task::new(model).priority(101).prepare(TASK, OWNER, None).unwrap_err();
        assert_eq!(error.to_string(), "priority 101 is out of range: use 0 to 100");
    }

    #[test]
    fn a_deadline_of_which_a_moment_has_passed_is_not_shortened_by_a_millisecond() {
        let model = Model::new("m".into(), Data::Memory(MODEL.into())).unwrap();
        for (left_us, told_ms) in [(500_000, 500), (499_400, 500), (0, 0)] {
            let task = Task::new(model.clone()).deadline(Some(Duration::from_micros(left_us)));
            let (spec, _) = task.input(Input::raw(vec![0])).prepare(TASK, OWNER, None).unwrap();
            assert_eq!(spec.deadline_ms, Some(told_ms));
        }
    }
}
