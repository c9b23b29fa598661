//! Owns records as named text fields: the same form for `redis-cli HGETALL` and for the embedded store.
//!
//! Every number carries its unit in the field's name. An unknown field has an empty value, so that a newer heartbeat
//! always overwrites an older one. Owns the names, and parsing for tasks. Never: secrets (a worker's ticket key stays
//! out), keys of the store, the times of writes.

use std::{collections::HashMap, fmt::Display, str::FromStr};

use mesh_core::broker::{TaskRecord, WorkerRecord};
use proto_msgs::{
    Arch, Attempt, AttemptState, Demands, Digest, EngineKind, Epoch, ErrorCode, Failure, Lane, LaneLoad, ModelCost,
    ModelRef, Outcome, PublicKey, TaskSpec, WorkerId,
};

use super::lists;

/// Version of a record. It changes whenever a task of an older version could be misread.
pub const RECORD_VERSION: u32 = 2;

/// Models in a row: the most recently used ones that the worker holds. People read a row, and 16 digests are already a
/// kilobyte in every heartbeat.
pub const ROW_MODELS_MAX: usize = 16;

/// Names and values of a record, in display order.
pub type Fields = Vec<(&'static str, String)>;

/// Why fields are not a task record.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RecordError {
    /// An older broker wrote it. Its client and its worker speak an older protocol, so nobody could end the task.
    #[error("it has version {0}, this broker reads {RECORD_VERSION}")]
    Outdated(u32),
    /// A newer broker wrote it.
    #[error("it has version {0}, this broker reads {RECORD_VERSION}: start the broker that wrote it")]
    Version(String),
    /// A field is missing or has the wrong type.
    #[error("field {field} is {got:?}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value; empty if missing.
        got: String,
    },
}

/// The fields that do not change during one life of a worker.
pub fn worker_identity(record: &WorkerRecord) -> Fields {
    let register = &record.register;
    let engine = match register.engine {
        EngineKind::Docker => "docker",
        EngineKind::Process => "process",
    };
    let labels = register.labels.iter().map(|(key, value)| format!("{key}={value}"));
    vec![
        ("name", register.name.clone()),
        ("worker", register.worker.to_string()),
        ("epoch", register.epoch.0.to_string()),
        ("version", register.version.clone()),
        ("os", register.os.clone()),
        ("arch", register.arch.to_string()),
        ("engine", engine.to_owned()),
        ("formats", joined(&register.formats)),
        ("endpoints", joined(&register.endpoints)),
        ("public_key_hex", register.key.map(|key| hex(&key.0)).unwrap_or_default()),
        ("labels", joined(labels)),
        ("cores", register.cores.to_string()),
        ("memory_bytes", register.memory_bytes.to_string()),
        ("run_memory_bytes", register.run_memory_bytes.to_string()),
        ("gpu_names", register.gpus.iter().map(|gpu| gpu.name.as_str()).collect::<Vec<_>>().join(", ")),
        ("gpu_memory_bytes", joined(register.gpus.iter().map(|gpu| gpu.memory_bytes))),
        ("slots", register.slots.iter().map(|slots| u32::from(*slots)).sum::<u32>().to_string()),
        ("slots_realtime", register.slots[Lane::Realtime.index()].to_string()),
        ("slots_batch", register.slots[Lane::Batch.index()].to_string()),
        ("device_map", joined(&register.device_map)),
        ("heartbeat_ms", register.heartbeat_ms.to_string()),
    ]
}

/// The fields that change with every heartbeat. Lists of GPUs are in the order of `gpu_names`.
pub fn worker_state(record: &WorkerRecord) -> Fields {
    let sum = |lanes: [u16; 2]| lanes.into_iter().map(u32::from).sum::<u32>();
    let mut fields = vec![
        ("seen_unix_ms", record.seen_unix_ms.to_string()),
        ("slots_used", sum(record.tasks).min(sum(record.register.slots)).to_string()),
        ("tasks_realtime", record.tasks[Lane::Realtime.index()].to_string()),
        ("tasks_batch", record.tasks[Lane::Batch.index()].to_string()),
        ("gpu_memory_reserved_bytes", record.gpu_memory_reserved_bytes.to_string()),
        ("violation_permille", optional(record.violation_permille)),
        ("expires_after_ms", record.expires_after.as_millis().to_string()),
    ];
    let Some(heartbeat) = &record.heartbeat else { return fields };
    let load = &heartbeat.load;
    let running = heartbeat.attempts.iter().filter(|report| !matches!(report.state, AttemptState::Finished(_))).count();
    fields.extend([
        ("heartbeat_seq", heartbeat.seq.to_string()),
        ("draining", yes_no(heartbeat.draining)),
        ("attempts", running.to_string()),
        ("cpu_permille", load.cpu_permille.to_string()),
        ("load1_milli", load.load1_milli.to_string()),
        ("memory_available_bytes", load.memory_available_bytes.to_string()),
        ("disk_free_bytes", load.disk_free_bytes.to_string()),
        ("net_rx_bytes_per_s", load.net_rx_bytes_per_s.to_string()),
        ("net_tx_bytes_per_s", load.net_tx_bytes_per_s.to_string()),
        ("link_bytes_per_s", heartbeat.link_bytes_per_s.to_string()),
        ("broker_rtt_us", heartbeat.broker_rtt_us.to_string()),
        ("temperature_milli_c", optional(load.temperature_milli_c)),
        ("throttled_bits", optional(load.throttled_bits)),
        ("gpu_memory_used_bytes", joined(load.gpus.iter().map(|gpu| gpu.memory_used_bytes))),
        ("gpu_busy_permille", joined(load.gpus.iter().map(|gpu| gpu.busy_permille))),
        ("held_models_count", heartbeat.held.len().to_string()),
        ("held_models", joined(heartbeat.held.iter().take(ROW_MODELS_MAX))),
        ("warm_models", joined(heartbeat.warm.iter().take(ROW_MODELS_MAX))),
    ]);
    fields.extend(lanes(&heartbeat.lanes));
    fields.extend(costs(&heartbeat.costs));
    fields
}

fn lanes(lanes: &[LaneLoad; 2]) -> Fields {
    let [realtime, batch] = lanes;
    vec![
        ("realtime_slots_used", realtime.slots_used.to_string()),
        ("realtime_waiting_items", realtime.waiting_items.to_string()),
        ("batch_slots_used", batch.slots_used.to_string()),
        ("batch_waiting_items", batch.waiting_items.to_string()),
    ]
}

/// The cost of models; lists are in the order of `measured_models`.
fn costs(costs: &[ModelCost]) -> Fields {
    let shown = || costs.iter().take(ROW_MODELS_MAX);
    let best = |cost: &ModelCost| cost.best_batch.max(1);
    vec![
        ("measured_models", joined(shown().map(|cost| cost.model))),
        ("run_us", joined(shown().map(|cost| cost.batch_us(1)))),
        ("load_us", joined(shown().map(|cost| cost.load_us))),
        ("packing", joined(shown().map(|cost| cost.packing.name()))),
        ("best_batch_items", joined(shown().map(best))),
        ("best_batch_us", joined(shown().map(|cost| cost.batch_us(u32::from(best(cost)))))),
    ]
}

/// All fields of a task. [`task_from_fields`] turns them into the same task.
pub fn task_fields(record: &TaskRecord, durable: bool) -> Fields {
    let (outcome, code, text, run_us, load_us) = match record.ended.as_ref().map(|(outcome, _)| outcome) {
        None => ("", "", "", None, None),
        Some(Outcome::Done { run_us, load_us }) => ("done", "", "", Some(*run_us), Some(*load_us)),
        Some(Outcome::Failed(failure)) => ("failed", failure.code.name(), failure.text.as_str(), None, None),
        Some(Outcome::Cancelled) => ("cancelled", "", "", None, None),
    };
    vec![
        ("record_version", RECORD_VERSION.to_string()),
        ("task", record.spec.task.to_string()),
        ("client", record.spec.client.to_string()),
        ("client_key_hex", record.spec.key.map(|key| hex(&key.0)).unwrap_or_default()),
        ("job", record.spec.job.to_string()),
        ("durable", yes_no(durable)),
        ("detached", yes_no(record.spec.detached)),
        ("model_name", record.spec.model_name.clone()),
        ("model_digest", record.spec.model.digest.to_string()),
        ("model_bytes", record.spec.model.size_bytes.to_string()),
        ("model_format", record.spec.model.format.to_string()),
        ("then", lists::stages_text(&record.spec.then)),
        ("input_bytes", record.spec.input_bytes.to_string()),
        ("items", record.spec.items.to_string()),
        ("lane", optional(record.spec.lane)),
        ("slo", lists::slo_text(record.spec.slo)),
        ("labels", lists::labels_text(&record.spec.labels)),
        ("priority", record.spec.priority.to_string()),
        ("cpu_millis", record.spec.demands.cpu_millis.to_string()),
        ("memory_bytes", record.spec.demands.memory_bytes.to_string()),
        ("gpu_memory_bytes", record.spec.demands.gpu_memory_bytes.to_string()),
        ("arch", optional(record.spec.demands.arch)),
        ("direction", optional(record.spec.direction)),
        ("attempt", record.attempt.to_string()),
        ("worker", optional(record.worker.map(|(worker, _)| worker))),
        ("worker_epoch", optional(record.worker.map(|(_, epoch)| epoch.0))),
        ("submitted_unix_ms", record.submitted_unix_ms.to_string()),
        ("deadline_unix_ms", optional(record.deadline_unix_ms())),
        ("outcome", outcome.to_owned()),
        ("outcome_code", code.to_owned()),
        ("outcome_text", text.to_owned()),
        ("run_us", optional(run_us)),
        ("load_us", optional(load_us)),
        ("ended_unix_ms", optional(record.ended.as_ref().map(|(_, unix_ms)| *unix_ms))),
    ]
}

/// Parses a task, and whether it is remembered across restarts.
///
/// # Errors
/// If another version of the broker wrote it, or a field is missing or has the wrong type.
pub fn task_from_fields(fields: &HashMap<String, String>) -> Result<(TaskRecord, bool), RecordError> {
    let row = Row(fields);
    match row.text("record_version").parse() {
        Ok(RECORD_VERSION) => {}
        Ok(older) if older < RECORD_VERSION => return Err(RecordError::Outdated(older)),
        _ => return Err(RecordError::Version(row.text("record_version").to_owned())),
    }
    let worker = match (row.maybe::<WorkerId>("worker")?, row.maybe("worker_epoch")?) {
        (Some(worker), Some(epoch)) => Some((worker, Epoch(epoch))),
        _ => None,
    };
    let (items, submitted_unix_ms) = (row.need("items")?, row.need("submitted_unix_ms")?);
    let deadline_unix_ms: Option<u64> = row.maybe("deadline_unix_ms")?;
    let spec = TaskSpec {
        task: row.need("task")?,
        client: row.need("client")?,
        key: row.key("client_key_hex")?,
        job: row.need("job")?,
        model_name: row.text("model_name").to_owned(),
        model: ModelRef {
            digest: row.need::<Digest>("model_digest")?,
            size_bytes: row.need("model_bytes")?,
            format: row.need("model_format")?,
        },
        then: row.list("then", lists::stages)?,
        input_bytes: row.need("input_bytes")?,
        items,
        job_items: items, // It decided the lane, which is known.
        lane: row.maybe("lane")?,
        slo: row.list("slo", lists::slo)?,
        labels: row.list("labels", lists::labels)?,
        priority: row.need("priority")?,
        deadline_ms: deadline_unix_ms.map(|at| at.saturating_sub(submitted_unix_ms)),
        demands: Demands {
            cpu_millis: row.need("cpu_millis")?,
            memory_bytes: row.need("memory_bytes")?,
            gpu_memory_bytes: row.need("gpu_memory_bytes")?,
            arch: row.maybe::<Arch>("arch")?,
        },
        direction: row.maybe("direction")?,
        detached: row.flag("detached")?,
    };
    let attempt = Attempt(row.need("attempt")?);
    let record = TaskRecord { spec, attempt, worker, submitted_unix_ms, ended: row.ended()? };
    Ok((record, row.flag("durable")?))
}

/// Fields that are parsed back to values.
struct Row<'a>(&'a HashMap<String, String>);

impl Row<'_> {
    fn text(&self, field: &'static str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }

    fn need<T: FromStr>(&self, field: &'static str) -> Result<T, RecordError> {
        let text = self.text(field);
        text.parse().map_err(|_| RecordError::Field { field, got: text.to_owned() })
    }

    fn maybe<T: FromStr>(&self, field: &'static str) -> Result<Option<T>, RecordError> {
        if self.text(field).is_empty() { Ok(None) } else { self.need(field).map(Some) }
    }

    fn list<T>(&self, field: &'static str, read: impl FnOnce(&str) -> Option<T>) -> Result<T, RecordError> {
        let text = self.text(field);
        read(text).ok_or_else(|| RecordError::Field { field, got: text.to_owned() })
    }

    fn flag(&self, field: &'static str) -> Result<bool, RecordError> {
        match self.text(field) {
            "yes" => Ok(true),
            "no" => Ok(false),
            other => Err(RecordError::Field { field, got: other.to_owned() }),
        }
    }

    fn key(&self, field: &'static str) -> Result<Option<PublicKey>, RecordError> {
        match self.text(field) {
            "" => Ok(None),
            text => match unhex(text) {
                Some(bytes) => Ok(Some(PublicKey(bytes))),
                None => Err(RecordError::Field { field, got: text.to_owned() }),
            },
        }
    }

    fn ended(&self) -> Result<Option<(Outcome, u64)>, RecordError> {
        let outcome = match self.text("outcome") {
            "" => return Ok(None),
            "done" => Outcome::Done { run_us: self.need("run_us")?, load_us: self.need("load_us")? },
            "failed" => {
                let name = self.text("outcome_code");
                let code = ErrorCode::ALL.iter().copied().find(|code| code.name() == name);
                let text = self.text("outcome_text").to_owned();
                Outcome::Failed(Failure { code: code.unwrap_or(ErrorCode::Unknown), text })
            }
            "cancelled" => Outcome::Cancelled,
            other => return Err(RecordError::Field { field: "outcome", got: other.to_owned() }),
        };
        Ok(Some((outcome, self.need("ended_unix_ms")?)))
    }
}

fn joined(values: impl IntoIterator<Item = impl Display>) -> String {
    let mut text = String::new();
    for value in values {
        if !text.is_empty() {
            text.push(' ');
        }
        text += &value.to_string();
    }
    text
}

fn optional(value: Option<impl Display>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 2 * bytes.len() || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto_msgs::{ClientId, Direction, JobId, LabelRule, ModelFormat, Slo, Stage, TaskId};

    use super::*;

    fn outcomes() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            (any::<u64>(), any::<u64>()).prop_map(|(run_us, load_us)| Outcome::Done { run_us, load_us }),
            (prop::sample::select(ErrorCode::ALL), ".*")
                .prop_map(|(code, text)| Outcome::Failed(Failure { code, text })),
            Just(Outcome::Cancelled),
        ]
    }

    prop_compose! {
        fn models()(
            digest in any::<[u8; 32]>(),
            size_bytes in any::<u64>(),
            format in prop::sample::select(ModelFormat::ALL),
        ) -> ModelRef {
            ModelRef { digest: Digest::from_bytes(digest), size_bytes, format }
        }
    }

    prop_compose! {
        fn wishes()(
            then in prop::collection::vec((".*", models()), 0..3),
            items in any::<u32>(),
            lane in prop::sample::select(&Lane::ALL),
            slo in any::<Option<(u32, u16)>>(),
            labels in prop::collection::vec((".*", ".*", any::<bool>()), 0..4),
        ) -> (Vec<Stage>, u32, Lane, Option<Slo>, Vec<LabelRule>) {
            let then = then.into_iter().map(|(name, model)| Stage { name, model }).collect();
            let slo = slo.map(|(latency_ms, max_violation_permille)| Slo { latency_ms, max_violation_permille });
            let rule = |(key, value, required)| LabelRule { key, value, required };
            (then, items, lane, slo, labels.into_iter().map(rule).collect())
        }
    }

    prop_compose! {
        fn records()(
            ids in any::<([u8; 16], [u8; 16], [u8; 16])>(),
            key in any::<Option<[u8; 32]>>(),
            model_name in ".*",
            model in models(),
            (then, items, lane, slo, labels) in wishes(),
            numbers in any::<(u64, u8, u32, u64, u64, u64)>(),
            arch in prop::option::of(prop::sample::select(Arch::ALL)),
            direction in prop::option::of(prop::sample::select(Direction::ALL)),
            detached in any::<bool>(),
            attempt in any::<u32>(),
            worker in any::<Option<([u8; 16], u64)>>(),
            deadline_ms in any::<Option<u32>>(),
            ended in prop::option::of((outcomes(), any::<u64>())),
        ) -> TaskRecord {
            let (input_bytes, priority, cpu_millis, memory_bytes, gpu_memory_bytes, submitted_unix_ms) = numbers;
            let spec = TaskSpec {
                task: TaskId::from_bytes(ids.0),
                client: ClientId::from_bytes(ids.1),
                key: key.map(PublicKey),
                job: JobId::from_bytes(ids.2),
                model_name,
                model,
                then,
                input_bytes,
                items,
                job_items: items,
                lane: Some(lane),
                slo,
                labels,
                priority,
                deadline_ms: deadline_ms.map(u64::from),
                demands: Demands { cpu_millis, memory_bytes, gpu_memory_bytes, arch },
                direction,
                detached,
            };
            let worker = worker.map(|(id, epoch)| (WorkerId::from_bytes(id), Epoch(epoch)));
            TaskRecord { spec, attempt: Attempt(attempt), worker, submitted_unix_ms: submitted_unix_ms >> 1, ended }
        }
    }

    fn as_map(fields: &Fields) -> HashMap<String, String> {
        fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
    }

    proptest! {
        #[test]
        fn a_task_comes_back_as_it_was_written(record in records(), durable in any::<bool>()) {
            let fields = as_map(&task_fields(&record, durable));
            prop_assert_eq!(task_from_fields(&fields), Ok((record, durable)));
        }

        #[test]
        fn a_task_with_any_field_lost_or_spoilt_is_an_error_or_a_task_that_can_be_kept(
            record in records(),
            which in any::<usize>(),
            junk in proptest::option::of(".*"),
        ) {
            let all = task_fields(&record, true);
            let (mut fields, name) = (as_map(&all), all[which % all.len()].0);
            match junk {
                Some(junk) => drop(fields.insert(name.to_owned(), junk)),
                None => drop(fields.remove(name)),
            }
            if let Ok((read, durable)) = task_from_fields(&fields) {
                prop_assert_eq!(task_from_fields(&as_map(&task_fields(&read, durable))), Ok((read, durable)));
            }
        }
    }

    #[test]
    fn a_task_of_another_broker_is_not_misread() {
        let of_version = |version: &str| HashMap::from([("record_version".to_owned(), version.to_owned())]);
        assert_eq!(task_from_fields(&of_version("3")), Err(RecordError::Version("3".to_owned())));
        assert_eq!(task_from_fields(&of_version("1")), Err(RecordError::Outdated(1)));
        assert_eq!(task_from_fields(&HashMap::new()), Err(RecordError::Version(String::new())));
    }
}
