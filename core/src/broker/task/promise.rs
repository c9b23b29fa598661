//! What a task's current attempt promises, and how long it really takes.

use std::time::Duration;

use proto_msgs::Prediction;

use crate::{MonoTime, broker::slo::StreamId};

/// The promise of a task's current attempt.
#[derive(Debug, Default)]
pub(crate) struct Promise {
    /// The task's stream; `None` if it has no service level.
    pub(crate) stream: Option<StreamId>,
    /// Predicted time of the current attempt.
    pub(crate) predicted: Option<Prediction>,
    pub(crate) watch: Watch,
}

/// The watch that measures the current attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Watch {
    /// There is nothing to measure: no grant yet, or an earlier broker's.
    #[default]
    Off,
    /// The attempt was granted at `since`. `late_at`: when it breaks its service level; `None` once it has, or without
    /// one.
    Runs { since: MonoTime, late_at: Option<MonoTime> },
    /// The attempt ended with a result after this time.
    Stopped(Duration),
}

impl Promise {
    /// When the attempt breaks its service level; `None` if that is not watched, or has happened.
    pub(super) fn late_at(&self) -> Option<MonoTime> {
        if let Watch::Runs { late_at, .. } = self.watch { late_at } else { None }
    }

    /// An attempt is granted. `slo_ms`: its service level.
    pub(crate) fn begin(&mut self, now: MonoTime, predicted: Prediction, slo_ms: Option<u32>) {
        self.predicted = Some(predicted);
        // A result in the last moment still keeps the service level.
        let late_at = slo_ms.map(|ms| now + Duration::from_millis(ms.into()) + Duration::from_micros(1));
        self.watch = Watch::Runs { since: now, late_at };
    }

    /// Measures no longer: how long the attempt takes says nothing of its worker.
    pub(crate) fn drop_watch(&mut self) {
        if let Watch::Runs { .. } = self.watch {
            self.watch = Watch::Off;
        }
    }

    /// The attempt's service level has been counted, or is not to be.
    pub(crate) fn counts_no_more(&mut self) {
        if let Watch::Runs { late_at, .. } = &mut self.watch {
            *late_at = None;
        }
    }

    /// Until when the model of the attempt is being loaded, by prediction, if it is now.
    pub(crate) fn loads_until(&self, now: MonoTime) -> Option<MonoTime> {
        let (Watch::Runs { since, .. }, Some(predicted)) = (self.watch, self.predicted) else { return None };
        let begins = since + Duration::from_micros(predicted.queue_us.saturating_add(predicted.transfer_us));
        let until = since + Duration::from_micros(predicted.total_us().saturating_sub(predicted.run_us));
        (predicted.load_us > 0 && begins <= now && now < until).then_some(until)
    }

    /// Actual time of the attempt that ended with a result.
    pub(crate) fn took(&self) -> Option<Duration> {
        if let Watch::Stopped(took) = self.watch { Some(took) } else { None }
    }

    /// Predicted time from placement to end; `None` if nobody has run the model before.
    pub(crate) fn predicted_ms(&self) -> Option<u32> {
        let predicted = self.predicted.filter(|predicted| predicted.measured)?;
        Some(u32::try_from(predicted.total_us().div_ceil(1000)).unwrap_or(u32::MAX))
    }
}
