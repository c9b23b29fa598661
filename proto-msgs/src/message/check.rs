//! Owns the limits inside a message that its length alone does not enforce. They are checked on both sides: a sender
//! hears at once what its receiver would drop in silence, and a receiver may rely on them after decoding.

use super::{
    Accept, Answer, Ask, AttemptId, AttemptState, CancelTask, Chunk, Close, Credit, Ended, Grant, Heartbeat,
    HeartbeatAck, Introduce, Leave, Locate, Noted, Open, Overtaken, Progress, Queued, Refuse, Register, RunResult,
    Stage, Standing, Submit,
};
use crate::limits::{
    ATTEMPTS_MAX, CHUNK_BYTES_MAX, COSTS_MAX, CURVE_POINTS_MAX, DEADLINE_MS_MAX, DEVICE_MAP_MAX, ENDPOINTS_MAX,
    GPUS_MAX, HEARTBEAT_MS_MAX, HELD_MAX, INPUT_BYTES_MAX, ITEMS_MAX, LABELS_MAX, MODEL_BYTES_MAX, NAME_BYTES_MAX,
    OUTPUT_BYTES_MAX, PRIORITY_MAX, RANK_MAX, RULES_MAX, RUN_NOTES_MAX, SLOTS_MAX, STAGES_AFTER_MAX, TENSORS_MAX,
    TEXT_BYTES_MAX,
};
use crate::{ModelFormat, Outcome};

/// A message that checks its own limits.
pub(crate) trait Check {
    /// `Err` names the limit that is broken.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

fn at_most<T: PartialOrd + std::fmt::Display>(what: &str, got: T, max: T) -> Result<(), String> {
    if got > max { Err(format!("{what} is {got}, the limit is {max}")) } else { Ok(()) }
}

fn name(what: &str, text: &str) -> Result<(), String> {
    at_most(what, text.len(), NAME_BYTES_MAX)
}

fn text(text: &str) -> Result<(), String> {
    at_most("text length", text.len(), TEXT_BYTES_MAX)
}

fn outcome(outcome: &Outcome) -> Result<(), String> {
    match outcome {
        Outcome::Failed(failure) => text(&failure.text),
        Outcome::Done { .. } | Outcome::Cancelled => Ok(()),
    }
}

fn items(items: u32) -> Result<(), String> {
    if items == 0 { Err("a task has no items".to_owned()) } else { at_most("number of items", items, ITEMS_MAX) }
}

fn stages(then: &[Stage]) -> Result<(), String> {
    at_most("number of further stages", then.len(), STAGES_AFTER_MAX)?;
    then.iter().try_for_each(|stage| {
        name("stage name length", &stage.name)?;
        at_most("model size", stage.model.size_bytes, MODEL_BYTES_MAX)
    })
}

fn endpoints(list: &[String]) -> Result<(), String> {
    at_most("number of endpoints", list.len(), ENDPOINTS_MAX)?;
    list.iter().try_for_each(|endpoint| name("endpoint length", endpoint))
}

impl Check for Submit {
    fn check(&self) -> Result<(), String> {
        let spec = &self.spec;
        name("model name length", &spec.model_name)?;
        at_most("model size", spec.model.size_bytes, MODEL_BYTES_MAX)?;
        at_most("input size", spec.input_bytes, INPUT_BYTES_MAX)?;
        at_most("priority", spec.priority, PRIORITY_MAX)?;
        items(spec.items)?;
        stages(&spec.then)?;
        if let Some(slo) = &spec.slo {
            at_most("violation rate", slo.max_violation_permille, 1000)?;
        }
        at_most("number of label rules", spec.labels.len(), RULES_MAX)?;
        for rule in &spec.labels {
            name("label length", &rule.key)?;
            name("label length", &rule.value)?;
        }
        at_most("deadline_ms", spec.deadline_ms.unwrap_or(0), DEADLINE_MS_MAX)?;
        if let Standing::Lost { outcome: lost, .. } = &self.standing {
            outcome(lost)?;
        }
        endpoints(&self.endpoints)
    }
}

impl Check for Register {
    fn check(&self) -> Result<(), String> {
        name("worker name length", &self.name)?;
        name("version length", &self.version)?;
        name("os length", &self.os)?;
        at_most("number of labels", self.labels.len(), LABELS_MAX)?;
        for (key, value) in &self.labels {
            name("label length", key)?;
            name("label length", value)?;
        }
        at_most("number of formats", self.formats.len(), ModelFormat::ALL.len())?;
        at_most("number of GPUs", self.gpus.len(), GPUS_MAX)?;
        self.gpus.iter().try_for_each(|gpu| name("GPU name length", &gpu.name))?;
        at_most("heartbeat_ms", self.heartbeat_ms, HEARTBEAT_MS_MAX)?;
        let slots = self.slots.iter().map(|slots| usize::from(*slots)).sum();
        at_most("slots", slots, SLOTS_MAX)?;
        at_most("device map", self.device_map.len(), DEVICE_MAP_MAX)?;
        at_most("device width", self.device_width, SLOTS_MAX as u16)?;
        endpoints(&self.endpoints)
    }
}

impl Check for Heartbeat {
    fn check(&self) -> Result<(), String> {
        at_most("number of attempts", self.attempts.len(), ATTEMPTS_MAX)?;
        at_most("number of held models", self.held.len(), HELD_MAX)?;
        at_most("number of warm models", self.warm.len(), HELD_MAX)?;
        at_most("number of GPUs", self.load.gpus.len(), GPUS_MAX)?;
        at_most("number of model costs", self.costs.len(), COSTS_MAX)?;
        for cost in &self.costs {
            at_most("points of a cost curve", cost.curve.len(), CURVE_POINTS_MAX)?;
        }
        self.attempts.iter().try_for_each(|attempt| match &attempt.state {
            AttemptState::Finished(end) => outcome(end),
            AttemptState::Receiving | AttemptState::Ready | AttemptState::Running => Ok(()),
        })
    }
}

impl Check for HeartbeatAck {
    fn check(&self) -> Result<(), String> {
        at_most("number of forgotten attempts", self.forget.len(), ATTEMPTS_MAX)?;
        at_most("number of stopped attempts", self.stop.len(), ATTEMPTS_MAX)
    }
}

impl Check for Grant {
    fn check(&self) -> Result<(), String> {
        endpoints(&self.endpoints)
    }
}

impl Check for Locate {
    fn check(&self) -> Result<(), String> {
        endpoints(&self.endpoints)
    }
}

impl Check for Introduce {
    fn check(&self) -> Result<(), String> {
        endpoints(&self.endpoints)
    }
}

impl Check for Open {
    fn check(&self) -> Result<(), String> {
        at_most("number of outputs that have arrived in part", self.outputs_here.len(), TENSORS_MAX)?;
        let Some(manifest) = &self.manifest else { return Ok(()) };
        name("model name length", &manifest.model_name)?;
        items(manifest.items)?;
        stages(&manifest.then)?;
        at_most("model size", manifest.model.size_bytes, MODEL_BYTES_MAX)?;
        at_most("number of inputs", manifest.inputs.len(), TENSORS_MAX)?;
        let mut total_bytes = 0_u64;
        for input in &manifest.inputs {
            name("input name length", input.name.as_deref().unwrap_or(""))?;
            at_most("rank", input.shape.as_ref().map_or(0, Vec::len), RANK_MAX)?;
            total_bytes = total_bytes.saturating_add(input.size_bytes);
        }
        at_most("input size", total_bytes, INPUT_BYTES_MAX)
    }
}

impl Check for RunResult {
    fn check(&self) -> Result<(), String> {
        outcome(&self.outcome)?;
        at_most("number of runs", self.runs.len(), RUN_NOTES_MAX)?;
        at_most("number of outputs", self.outputs.len(), TENSORS_MAX)?;
        let mut total_bytes = 0_u64;
        for output in &self.outputs {
            name("output name length", &output.name)?;
            at_most("rank", output.shape.len(), RANK_MAX)?;
            total_bytes = total_bytes.saturating_add(output.size_bytes);
        }
        at_most("output size", total_bytes, OUTPUT_BYTES_MAX)
    }
}

impl Check for Chunk {
    fn check(&self) -> Result<(), String> {
        at_most("chunk size", self.inflated_bytes.unwrap_or(0) as usize, CHUNK_BYTES_MAX)?;
        at_most("chunk offset", self.offset, MODEL_BYTES_MAX)
    }
}

impl Check for Accept {
    fn check(&self) -> Result<(), String> {
        at_most("number of needed blobs", self.needs.len(), TENSORS_MAX + 1 + STAGES_AFTER_MAX)
    }
}

impl Check for Close {
    fn check(&self) -> Result<(), String> {
        outcome(&self.outcome)
    }
}

impl Check for Ended {
    fn check(&self) -> Result<(), String> {
        outcome(&self.outcome)
    }
}

impl Check for Queued {
    fn check(&self) -> Result<(), String> {
        text(&self.reason)
    }
}

impl Check for Refuse {
    fn check(&self) -> Result<(), String> {
        text(&self.text)
    }
}

// These are bounded by their shape, or by the length of a control message and by their sender: the broker answers its
// clients.
impl Check for Answer {}
impl Check for Ask {}
impl Check for AttemptId {}
impl Check for CancelTask {}
impl Check for Credit {}
impl Check for Leave {}
impl Check for Overtaken {}
impl Check for Noted {}
impl Check for Progress {}
