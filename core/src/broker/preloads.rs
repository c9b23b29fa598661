//! Preloads: now and then a task that would come too late only because its model must be loaded is accepted all the
//! same, so that the model is loaded for those after it.
//!
//! Else a model that takes longer to load than its tasks may take would be refused for ever. The task's deadline will
//! probably pass; its worker finishes the load.
//!
//! Owns how often. Never chooses the worker.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::Digest;

use crate::{Census, MonoTime};

/// A model is loaded like this for at most one part in so many of the time: loads push other models out.
const TIME_PART: u32 = 10;

/// The shortest pause between two preloads of a model: its worker tells within two heartbeats that it is loaded.
const PAUSE_MIN: Duration = Duration::from_secs(2);

/// Limit of models whose pause is remembered. Beyond it, others wait until a pause is over.
const MODELS_MAX: usize = 256;

/// When a model may be preloaded again.
#[derive(Clone, Copy, Debug)]
struct Pause {
    /// When one task is sent to see whether the model is loaded; `None` if the worker tells, or if that was done.
    look_at: Option<MonoTime>,
    until: MonoTime,
}

/// When each model may be preloaded again.
#[derive(Debug, Default)]
pub(super) struct Preloads {
    pauses: BTreeMap<Digest, Pause>,
}

impl Preloads {
    /// Whether the model was preloaded a while ago.
    pub(super) fn is_pausing(&self, now: MonoTime, model: Digest) -> bool {
        self.pauses.get(&model).is_some_and(|pause| now < pause.until)
    }

    /// Whether the model may be preloaded now; if so, its pause begins. `is_told`: the worker tells when it is loaded. It
    /// does not if the model is loaded there already, for tasks with other demands: then the end of a task tells, so one
    /// more is sent after the load, and the pause is twice as long.
    pub(super) fn begin(&mut self, now: MonoTime, model: Digest, load_us: u64, is_told: bool) -> bool {
        if let Some(pause) = self.pauses.get_mut(&model).filter(|pause| now < pause.until) {
            return pause.look_at.take_if(|at| now >= *at).is_some();
        }
        if self.pauses.len() >= MODELS_MAX {
            self.pauses.retain(|_, pause| now < pause.until);
        }
        if self.pauses.len() >= MODELS_MAX {
            return false;
        }
        let load = Duration::from_micros(load_us);
        let (look_at, loads) = if is_told { (None, 1) } else { (Some(now + load + PAUSE_MIN), 2) };
        let until = now + load.saturating_mul(TIME_PART * loads).max(PAUSE_MIN);
        self.pauses.insert(model, Pause { look_at, until });
        true
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { pauses } = self;
        census.lasting("pauses of preloads", pauses.len(), MODELS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_preloaded_for_a_tenth_of_the_time_and_many_models_fill_no_memory() {
        let mut preloads = Preloads::default();
        let model = |number: u16| {
            let mut bytes = [0; 32];
            bytes[..2].copy_from_slice(&number.to_be_bytes());
            Digest::from_bytes(bytes)
        };
        let at = |ms: u64| MonoTime::from_micros(ms * 1000);
        let times = (0..100_000).filter(|ms| preloads.begin(at(*ms), model(0), 1_000_000, true)).count();
        assert_eq!(times, 10);
        let times = (0..100_000).filter(|ms| preloads.begin(at(*ms), model(1), 1_000_000, false)).count();
        assert_eq!(times, 10, "by twos");
        let at_once = (0..1000).filter(|number| preloads.begin(at(200_000), model(*number), 1_000_000, true)).count();
        assert_eq!((at_once, preloads.pauses.len()), (MODELS_MAX, MODELS_MAX));
        assert!(preloads.begin(at(300_000), model(999), 1_000_000, true));
    }
}
