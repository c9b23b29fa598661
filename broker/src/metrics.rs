//! Owns every number that the broker shows, and its name on `/metrics`. No other file of this crate spells such a name.
//!
//! Numbers of the machine, the socket and the store are read on request. Events of the run loop are counted as they
//! happen.

use std::time::Duration;

use mesh_core::broker::{Counters, Gauges};
use mesh_transport::Traffic;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use proto_msgs::{ClientToBroker, DecodeError, ErrorCode, Lane, WorkerToBroker};

use crate::store::StoreHealth;

/// Prefix of every name.
const PREFIX: &str = "mesh_broker";

/// Counted by the run loop. The label `event` is the message's name, or another kind of event.
const EVENTS: &str = "events";
const HANDLE_SECONDS: &str = "handle_seconds";
const UNDECODABLE_FRAMES: &str = "undecodable_frames";
const UNSENDABLE_MESSAGES: &str = "unsendable_messages";
const REVOKED_MESSAGES: &str = "revoked_key_messages";

/// The run loop's answer to a question.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The machine's current state.
    pub gauges: Gauges,
    /// Counts of the machine's events.
    pub counters: Counters,
    /// Numbers of the socket.
    pub traffic: Traffic,
    /// Numbers of the store.
    pub store: StoreHealth,
    /// Time since the start.
    pub uptime: Duration,
}

/// Counters of the run loop. Counting is cheap and comes from one thread.
#[derive(Clone, Debug)]
pub struct LoopMetrics {
    /// Counter of each kind of message.
    messages: Vec<(u16, Counter)>,
    /// Deadlines handled.
    pub deadlines: Counter,
    /// Events from the store.
    pub store_events: Counter,
    /// Time from an event to its last action.
    pub handle_seconds: Histogram,
    /// Messages that were not sent because they were longer than a peer takes.
    pub unsendable: Counter,
    /// Messages from connections whose key is no longer authorized.
    pub revoked: Counter,
    undecodable: Family<[(&'static str, &'static str); 1], Counter>,
}

impl LoopMetrics {
    /// New counters, registered in `registry`.
    pub fn new(registry: &mut Registry) -> Self {
        let events = Family::<[(&str, &str); 1], Counter>::default();
        let event = |name: &'static str| events.get_or_create_owned(&[("event", name)]);
        let kinds = ClientToBroker::KINDS.iter().chain(WorkerToBroker::KINDS);
        let metrics = Self {
            messages: kinds.map(|(kind, name)| (*kind, event(name))).collect(),
            deadlines: event("Deadline"),
            store_events: event("Store"),
            // 1 µs to 0.26 s.
            handle_seconds: Histogram::new(exponential_buckets(1e-6, 4.0, 10)),
            unsendable: Counter::default(),
            revoked: Counter::default(),
            undecodable: Family::default(),
        };
        registry.register(EVENTS, "Events handled, by kind", events);
        registry.register(
            HANDLE_SECONDS,
            "Time from an event to the last action it caused",
            metrics.handle_seconds.clone(),
        );
        registry.register(
            UNDECODABLE_FRAMES,
            "Frames received that are not messages, by reason",
            metrics.undecodable.clone(),
        );
        registry.register(
            UNSENDABLE_MESSAGES,
            "Messages not sent because they would have been too long",
            metrics.unsendable.clone(),
        );
        registry.register(
            REVOKED_MESSAGES,
            "Messages dropped because the sender's key is authorized no more",
            metrics.revoked.clone(),
        );
        metrics
    }

    /// Counts a message.
    pub fn message(&self, kind: u16) {
        if let Some((_, counter)) = self.messages.iter().find(|(known, _)| *known == kind) {
            counter.inc();
        }
    }

    /// Counts a frame that is not a message.
    pub fn undecodable(&self, error: &DecodeError) {
        let reason = match error {
            DecodeError::NotOurs => "not_ours",
            DecodeError::Version { .. } => "version",
            DecodeError::Unsupported { .. } => "unsupported",
            DecodeError::UnknownKind(_) => "unknown_kind",
            DecodeError::TooLong { .. } => "too_long",
            DecodeError::Garbled { .. } => "garbled",
        };
        self.undecodable.get_or_create(&[("reason", reason)]).inc();
    }
}

/// A registry whose names have the broker's prefix.
pub fn registry() -> Registry {
    Registry::with_prefix(PREFIX)
}

/// The page for Prometheus (OpenMetrics text): counters of the run loop, then the snapshot.
pub fn page(registry: &Registry, snapshot: Option<Snapshot>) -> String {
    let mut text = String::new();
    let mut asked = self::registry();
    if let Some(snapshot) = snapshot {
        asked.register_collector(Box::new(snapshot));
    }
    text::encode_registry(&mut text, registry)
        .and_then(|()| text::encode_registry(&mut text, &asked))
        .and_then(|()| text::encode_eof(&mut text))
        .expect("writing to a string cannot fail");
    text
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self { gauges, counters, traffic, store, uptime } = self;
        for (name, help, value) in [
            ("uptime_seconds", "Time since the start", uptime.as_secs_f64()),
            ("workers", "Workers alive", f64::from(gauges.workers)),
            ("slots", "Slots of workers alive", f64::from(gauges.slots)),
            ("slots_used", "Slots in use or promised", f64::from(gauges.slots_used)),
            ("tasks_queued", "Tasks waiting for a worker", f64::from(gauges.queued)),
            ("tasks_placed", "Tasks at a worker", f64::from(gauges.placed)),
            ("socket_waiting_messages", "Messages waiting for slow peers", traffic.waiting as f64),
            ("store_up", "1 while the store answers", f64::from(u8::from(store.away.is_none()))),
            ("store_pending_changes", "Changes not yet in the store", store.pending as f64),
            ("store_lag_seconds", "Age of the oldest change not yet in the store", store.lag.as_secs_f64()),
        ] {
            write(&mut encoder, name, help, MetricType::Gauge, &ConstGauge::new(value))?;
        }
        self.encode_scheduling(&mut encoder)?;
        for (name, help, value) in [
            ("tasks_submitted", "Tasks taken", counters.submitted),
            ("grants", "Grants given", counters.granted),
            ("tasks_done", "Tasks ended with a result", counters.done),
            ("tasks_failed", "Tasks ended without", counters.failed),
            ("tasks_cancelled", "Tasks cancelled", counters.cancelled),
            ("attempts_retried", "Attempts lost and asked for again", counters.retried),
            ("attempts_fenced", "Reports of attempts that are no longer the task's", counters.fenced),
            ("heartbeats", "Heartbeats", counters.heartbeats),
            (
                "workers_refused",
                "Registrations refused because as many workers are known as may be: start another cluster",
                counters.workers_refused,
            ),
            ("workers_lost", "Workers that fell silent", counters.workers_lost),
            ("pauses", "Times this process stood still: give its machine more processor time", counters.pauses),
            (
                "tasks_poisonous",
                "Tasks given up because worker after worker was lost with them: look at their models",
                counters.poisonous,
            ),
            ("predictions", "Predicted finishes that were compared with what came", counters.predictions),
            ("slo_violations", "Tasks that took longer than promised, from the grant on", counters.slo_violations),
            ("slo_trips", "Times a worker was left because it broke a promise too often", counters.slo_trips),
            ("trials", "Tasks given to a worker only to measure it again: many if it stays slow", counters.trials),
            ("preloads", "Tasks sent only so that their model is loaded for later ones", counters.preloads),
            ("candidates_looked", "Workers looked at in order to place tasks", counters.candidates_looked),
            ("waiting_looked", "Waiting tasks looked at in order to fill workers", counters.waiting_looked),
            ("forbidden_messages", "Messages from the wrong key or on the wrong task", counters.forbidden),
            ("socket_received_messages", "Messages received", traffic.received),
            ("socket_sent_messages", "Messages sent", traffic.sent),
            ("socket_dropped_full_messages", "Messages dropped because a peer's queue was full", traffic.dropped_full),
            ("socket_dropped_gone_messages", "Messages dropped because the peer was gone", traffic.dropped_gone),
            ("socket_malformed_messages", "Messages received that no peer of the mesh sends", traffic.malformed),
            ("store_written_changes", "Changes written to the store", store.written),
            ("store_batches", "Writes to the store", store.batches),
            ("store_failures", "Writes that failed and attempts to reach the store", store.failures),
        ] {
            write(&mut encoder, name, help, MetricType::Counter, &ConstCounter::new(value))?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// Numbers that have labels or may be unknown: lanes, refusals, predictions, service levels.
    fn encode_scheduling(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self { gauges, counters, .. } = self;
        let lanes = |values: [f64; 2]| Lane::ALL.map(|lane| (lane.name(), values[lane.index()]));
        let seconds = gauges.lane_queued_us.map(|us| Duration::from_micros(us).as_secs_f64());
        for (name, help, values) in [
            (
                "lane_slots",
                "Slots of each lane; idle batch slots are lent to realtime",
                gauges.lane_slots.map(f64::from),
            ),
            ("lane_tasks_placed", "Tasks at work or promised, by lane", gauges.lane_placed.map(f64::from)),
            (
                "lane_tasks_queued",
                "Tasks waiting for a worker; add workers if it keeps growing",
                gauges.lane_queued.map(f64::from),
            ),
            ("lane_queued_seconds", "Slot time that waiting tasks are predicted to need", seconds),
            (
                "lane_waiting_items",
                "Items at workers that wait for a slot",
                gauges.lane_waiting_items.map(|items| items as f64),
            ),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (lane, value) in lanes(values) {
                ConstGauge::new(value).encode(family.encode_family(&[("lane", lane)])?)?;
            }
        }
        let states = [("violating", gauges.slo_violating), ("probing", gauges.slo_probing)];
        let help = "Workers left for breaking a promised latency, and those being tried again, counted per stream";
        let mut family = encoder.encode_descriptor("slo_breakers", help, None, MetricType::Gauge)?;
        for (state, count) in states {
            ConstGauge::new(f64::from(count)).encode(family.encode_family(&[("state", state)])?)?;
        }
        let help = "Tasks refused, by code; BUSY means that a lane is full";
        let mut family = encoder.encode_descriptor("tasks_refused", help, None, MetricType::Counter)?;
        for (code, count) in [
            (ErrorCode::Busy.name(), counters.refused_busy),
            (ErrorCode::NoWorkerFits.name(), counters.refused_unfit),
            (ErrorCode::DeadlineUnmeetable.name(), counters.refused_deadline),
            (ErrorCode::StoreAway.name(), counters.refused_store),
        ] {
            ConstCounter::new(count).encode(family.encode_family(&[("code", code)])?)?;
        }
        if let Some(permille) = gauges.prediction_error_permille {
            let help = "Median of |predicted - actual| / actual over the last 512 predictions";
            write(
                encoder,
                "prediction_error_ratio",
                help,
                MetricType::Gauge,
                &ConstGauge::new(f64::from(permille) / 1000.0),
            )?;
        }
        Ok(())
    }
}

fn write(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: MetricType,
    metric: &impl EncodeMetric,
) -> Result<(), std::fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, None, kind)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_number_has_one_name_with_the_prefix() {
        let mut registry = registry();
        let metrics = LoopMetrics::new(&mut registry);
        metrics.message(ClientToBroker::KINDS[0].0);
        metrics.undecodable(&DecodeError::NotOurs);
        let gauges =
            Gauges { workers: 7, lane_queued: [3, 4], prediction_error_permille: Some(250), ..Gauges::default() };
        let counters = Counters {
            granted: 12,
            trials: 3,
            preloads: 4,
            refused_busy: 1,
            workers_refused: 2,
            ..Counters::default()
        };
        let page = page(&registry, Some(Snapshot { gauges, counters, ..Snapshot::default() }));
        let types: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let names: HashSet<&str> = types.iter().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(names.len(), types.len(), "a name twice: {page}");
        assert!(names.iter().all(|name| name.starts_with("mesh_broker_")), "{names:?}");
        assert!(page.contains("mesh_broker_workers 7.0\n"), "{page}");
        assert!(page.contains("mesh_broker_grants_total 12\n"), "{page}");
        assert!(page.contains("mesh_broker_trials_total 3\n"), "{page}");
        assert!(page.contains("mesh_broker_preloads_total 4\n"), "{page}");
        assert!(page.contains("mesh_broker_lane_tasks_queued{lane=\"batch\"} 4.0\n"), "{page}");
        assert!(page.contains("mesh_broker_tasks_refused_total{code=\"BUSY\"} 1\n"), "{page}");
        assert!(page.contains("mesh_broker_workers_refused_total 2\n"), "{page}");
        assert!(page.contains("mesh_broker_prediction_error_ratio 0.25\n"), "{page}");
        assert!(page.contains("mesh_broker_events_total{event=\"Submit\"} 1\n"), "{page}");
        assert!(page.contains("mesh_broker_undecodable_frames_total{reason=\"not_ours\"} 1\n"), "{page}");
        assert!(page.ends_with("# EOF\n"));
    }
}
