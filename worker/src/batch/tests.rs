//! Batches in a real runner, with models whose results are known.

mod answers;
mod laws;
pub(crate) mod models;
mod proofs;

use std::{fs, path::PathBuf, sync::Barrier};

use mesh_core::worker::{Equality, headroom::Headroom};
use mesh_transport::{Context, Security};
use proto_msgs::{
    AttemptId, DType, Demands, Digest, InputDecl, Manifest, ModelFormat, ModelRef, Stage, Ticket, TicketBody, TicketKey,
};
use tokio::{runtime::Handle, sync::mpsc, task::spawn_blocking};

use super::{
    material::{Inputs, Order},
    *,
};
use crate::{
    batch::unfinished::Unfinished,
    data::{
        blobs::{BlobStore, Coming, Pin},
        keep::Keep,
        link_speed::LinkSpeed,
        payload::{MemoryUse, Output, Payload},
    },
    engine::Process,
    probe::Look,
    runners::pool::{Pool, RunnerDefaults},
};

/// Longer than any of these tests takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct Home {
    tools: Arc<Tools>,
    events: mpsc::Receiver<Event>,
    dir: tempfile::TempDir,
    unfinished: Arc<Unfinished>,
}

/// The real runner beside the test's folder, if it was built and its library exists.
pub(crate) fn real_runner() -> Option<PathBuf> {
    let runner = std::env::current_exe().ok()?.parent()?.parent()?.join("mesh-runner");
    if runner.is_file() {
        return Some(runner);
    }
    skip("mesh-runner was not built");
    None
}

/// Records for `./test` that a test cannot run here. In CI it must run: only users' machines may skip.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("MESH_REQUIRE_ALL").is_none(), "this test must run here, but {why}");
    eprintln!("SKIPPED: {why}");
    if let Some(list) = std::env::var_os("MESH_SKIPPED") {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let mut list = fs::OpenOptions::new().append(true).create(true).open(list).expect("./test made the file");
        std::io::Write::write_all(&mut list, format!("SKIPPED {name}: {why}\n").as_bytes()).expect("room for a line");
    }
}

impl Home {
    fn new() -> Option<Self> {
        let runner = real_runner()?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("runners")).expect("a folder");
        let store = BlobStore::open(&dir.path().join("blobs"), 1 << 30).expect("a store");
        let defaults = RunnerDefaults { cpu_millis: 1000, memory_bytes: 512 << 20, headroom: Headroom::default() };
        let engine = Box::new(Process::new(runner));
        let (pool, _) = Pool::new(engine, store.clone(), dir.path().join("runners"), defaults, 2);
        let (machine, events) = mpsc::channel(64);
        let tools = Tools {
            keep: Keep::open(dir.path().join("attempts"), store.clone()).expect("a folder").0,
            store,
            coming: Coming::default(),
            memory: MemoryUse::new(1 << 30),
            pool,
            link_speed: LinkSpeed::default(),
            look: Look::default(),
            transport: Context::new(Security::None).expect("a context"),
            proven: Proven::default(),
            machine,
        };
        Some(Self { tools: tools.into(), events, dir, unfinished: Arc::default() })
    }

    fn put(&self, model: &[u8]) -> Pin {
        let digest = Digest::of(model);
        if let Some(pin) = self.tools.store.pin(digest) {
            return pin;
        }
        let mut file = self.tools.store.spool(model.len() as u64).and_then(|file| file.create()).expect("room");
        file.write(model).expect("writing");
        self.tools.store.adopt(file.finish().0, digest).expect("adopted")
    }

    /// A task with these models as stages. Each input holds `items` items.
    fn task(&self, number: u8, models: &[Vec<u8>], items: u32, inputs: &[&[f32]]) -> Arc<Material> {
        let payloads = inputs.iter().map(|input| Payload::Memory(floats(input).into())).collect();
        self.task_of(number, models, items, payloads)
    }

    /// A task with these inputs.
    fn task_of(&self, number: u8, models: &[Vec<u8>], items: u32, payloads: Vec<Payload>) -> Arc<Material> {
        let declare = |payload: &Payload| {
            let digest = Digest::from_bytes([0; 32]);
            InputDecl { name: None, dtype: None, shape: None, digest, size_bytes: payload.size_bytes() }
        };
        let reference = |model: &Vec<u8>| {
            let (digest, size_bytes) = (Digest::of(model), model.len() as u64);
            ModelRef { digest, size_bytes, format: ModelFormat::Onnx }
        };
        let stage = |model: &Vec<u8>| Stage { name: "later".to_owned(), model: reference(model) };
        let manifest = Manifest {
            model: reference(&models[0]),
            model_name: "first".to_owned(),
            then: models[1..].iter().map(stage).collect(),
            items,
            inputs: payloads.iter().map(declare).collect(),
        };
        let (id, ticket) = ticket(number, items);
        let order = Order { id, manifest: manifest.into(), ticket: ticket.into() };
        let models = models.iter().map(|model| Some(self.put(model))).collect();
        let memory = self.tools.memory.share();
        Arc::new(Material::new(order, Inputs { models, payloads, memory }, &self.tools.memory))
    }

    /// Runs a batch. Whatever is answered is compared.
    async fn run(
        &self,
        kind: BatchKind,
        stage: u8,
        parts: &[(&Arc<Material>, Range<u32>)],
    ) -> Result<BatchTimes, Failure> {
        let rows = parts.iter().map(|(_, rows)| rows.len() as u32).sum();
        let comparing = watch::channel(Comparing::Goes { rows, limit: PATIENCE }).1;
        batch(kind, stage, parts, comparing).run(&self.tools).await
    }
}

fn batch(
    kind: BatchKind,
    stage: u8,
    parts: &[(&Arc<Material>, Range<u32>)],
    comparing: watch::Receiver<Comparing>,
) -> Batch {
    let part = |(material, rows): &(&Arc<Material>, Range<u32>)| {
        (Part { id: material.order.id, stage, rows: rows.clone() }, (*material).clone())
    };
    let parts = parts.iter().map(part).collect();
    let only_loads = Arc::default();
    Batch {
        batch: BatchId(1),
        parts,
        device: -1,
        kind,
        apart: false,
        limit: PATIENCE,
        only_loads,
        unfinished: Arc::default(),
        comparing,
    }
}

fn ticket(number: u8, items: u32) -> (AttemptId, Ticket) {
    let body = TicketBody { items, ..mesh_samples::ticket_body(u32::from(number), 2, 1) };
    (body.attempt_id(), Ticket::sign(body, &TicketKey([0; 32])))
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Shape of one item, and all values, of a task's only output.
fn result(material: &Material) -> (Vec<u64>, Vec<f32>) {
    let outputs: &[Output] = material.result().expect("all rows ran").as_ref().expect("they fit together");
    let bytes = outputs[0].payload.read().expect("readable");
    assert_eq!(outputs[0].digest, Digest::of(&bytes));
    (outputs[0].shape.clone(), bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

#[tokio::test]
async fn a_single_item_runs_as_it_was_given_cold_then_warm() {
    let Some(mut home) = Home::new() else { return };
    let model = models::negate(&[1, 4]);
    let first = home.task(1, std::slice::from_ref(&model), 1, &[&[1.0, -2.0, 3.5, 0.0]]);
    let times = home.run(BatchKind::Whole, 0, &[(&first, 0..1)]).await.expect("a negated vector");
    assert!(times.load_us > 0 && times.run_us > 0);
    assert_eq!(home.tools.pool.warm(), [Digest::of(&model)]);
    let second = home.task(2, std::slice::from_ref(&model), 1, &[&[1.0, -2.0, 3.5, 0.0]]);
    let times = home.run(BatchKind::Whole, 0, &[(&second, 0..1)]).await.expect("a negated vector");
    assert_eq!(times.load_us, 0);
    for material in [first, second] {
        assert_eq!(result(&material), (vec![1, 4], vec![-1.0, 2.0, -3.5, -0.0]));
    }
    let phases: Vec<_> = std::iter::from_fn(|| home.events.try_recv().ok()).collect();
    let reached = |phase| Event::BatchReached { batch: BatchId(1), phase };
    assert_eq!(phases, [reached(Phase::Loading), reached(Phase::Running), reached(Phase::Running)]);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_the_runner_is_not_to_blame() {
    let Some(home) = Home::new() else { return };
    let model = models::negate(&[1, 4]);
    let misfit = home.task(1, std::slice::from_ref(&model), 1, &[&[1.0, 2.0, 3.0]]);
    let failure = home.run(BatchKind::Whole, 0, &[(&misfit, 0..1)]).await.expect_err("12 bytes");
    assert_eq!(failure.code, ErrorCode::InputMismatch);
    let misfit = home.task(2, std::slice::from_ref(&model), 3, &[&[0.0; 9]]);
    let failure = home.run(BatchKind::Whole, 0, &[(&misfit, 0..3)]).await.expect_err("three times 12 bytes");
    assert_eq!(failure.code, ErrorCode::InputMismatch);
    assert!(failure.text.contains("3 items") && failure.text.contains("16 bytes"), "{}", failure.text);
    assert_eq!(home.tools.pool.warm(), [Digest::of(&model)]);
    let broken = home.task(3, &[b"no model at all".to_vec()], 1, &[&[0.0]]);
    let failure = home.run(BatchKind::Whole, 0, &[(&broken, 0..1)]).await.expect_err("not a model");
    assert_eq!(failure.code, ErrorCode::ModelInvalid);
}

#[tokio::test]
async fn items_of_a_model_that_takes_one_run_one_after_the_other() {
    let Some(home) = Home::new() else { return };
    let task = home.task(1, &[models::negate(&[1, 2])], 3, &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]);
    home.run(BatchKind::Whole, 0, &[(&task, 2..3)]).await.expect("the last row first");
    assert!(task.result().is_none(), "two rows are missing");
    home.run(BatchKind::Whole, 0, &[(&task, 0..2)]).await.expect("the others");
    assert_eq!(result(&task), (vec![1, 2], vec![-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_batches_that_end_together_one_has_all_rows_for_the_result() {
    let Some(home) = Home::new() else { return };
    let model = models::negate(&[1, 1]);
    let tensor = |value: f32| {
        let payload = Payload::Memory(floats(&[value]).into());
        vec![vec![Tensor { name: "y".to_owned(), dtype: DType::F32, shape: vec![1, 1], payload }]]
    };
    for round in 0..20_000 {
        let task = home.task(1, std::slice::from_ref(&model), 2, &[&[0.0, 0.0]]);
        let together = Arc::new(Barrier::new(2));
        let end = |item: u32| {
            let (task, store, together) = (task.clone(), home.tools.store.clone(), together.clone());
            let (outputs, runtime) = (tensor(item as f32), Handle::current());
            // Threads that may wait for each other, as those of the runtime may not.
            spawn_blocking(move || {
                task.store(0, item..item + 1, outputs);
                together.wait();
                runtime.block_on(task.join_if_complete(&store));
            })
        };
        for ended in [end(0), end(1)] {
            ended.await.expect("no panic");
        }
        assert_eq!(result(&task), (vec![1, 1], vec![0.0, 1.0]), "round {round}");
    }
}

#[tokio::test]
async fn rows_of_several_tasks_run_in_one_call_and_come_back_to_their_owners() {
    let Some(home) = Home::new() else { return };
    let model = models::difference(&[0, 2]);
    let one = home.task(1, std::slice::from_ref(&model), 2, &[&[1.0, 2.0, 3.0, 4.0], &[0.0, 0.0, 1.0, 1.0]]);
    let other = home.task(2, std::slice::from_ref(&model), 1, &[&[5.0, 6.0], &[10.0, 10.0]]);
    home.run(BatchKind::Packed, 0, &[(&other, 0..1), (&one, 0..2)]).await.expect("three rows");
    assert_eq!(result(&one), (vec![1, 2], vec![1.0, 2.0, 2.0, 3.0]));
    assert_eq!(result(&other), (vec![1, 2], vec![-5.0, -4.0]));
}

#[tokio::test]
async fn items_of_several_shapes_never_share_a_call() {
    let Some(home) = Home::new() else { return };
    let model = models::relative(&[0, 2]);
    let one = home.task(1, std::slice::from_ref(&model), 1, &[&[1.0, 2.0]]);
    // Two rows that form one item.
    let other = home.task(2, std::slice::from_ref(&model), 1, &[&[3.0, 4.0, 5.0, 6.0]]);
    home.run(BatchKind::Packed, 0, &[(&one, 0..1), (&other, 0..1)]).await.expect("two calls");
    assert_eq!(result(&one), (vec![1, 2], vec![-1.0, 0.0]));
    assert_eq!(result(&other), (vec![2, 2], vec![-3.0, -2.0, -1.0, 0.0]));
}

#[tokio::test]
async fn a_model_that_takes_one_row_is_never_given_more() {
    let Some(home) = Home::new() else { return };
    let task = home.task(1, &[models::negate(&[1, 2])], 2, &[&[1.0, 2.0, 3.0, 4.0]]);
    let failure = home.run(BatchKind::Packed, 0, &[(&task, 0..2)]).await.expect_err("fixed");
    assert_eq!(failure.code, ErrorCode::InputMismatch);
    assert!(failure.text.contains("first dimension"), "{}", failure.text);
}

#[tokio::test]
async fn another_number_of_rows_fails_the_batch_and_names_what_came() {
    let Some(home) = Home::new() else { return };
    let task = home.task(1, &[models::maximum(&[0, 2])], 4, &[&[0.0; 8]]);
    let failure = home.run(BatchKind::Packed, 0, &[(&task, 0..4)]).await.expect_err("one row for four");
    assert_eq!(failure.code, ErrorCode::RunProtocol);
    assert!(failure.text.contains("'y'") && failure.text.contains("[1, 1]"), "{}", failure.text);
    assert!(task.result().is_none());
}

#[tokio::test]
async fn a_model_that_gives_other_rows_than_its_probe_saw_fails_the_batch_and_goes_on() {
    let Some(home) = Home::new() else { return };
    let model = models::moody();
    let task = |number, rows: &[f32]| home.task(number, std::slice::from_ref(&model), rows.len() as u32, &[rows]);
    let probed = task(1, &[1.0, 2.0, 3.0]);
    let times = home.run(BatchKind::Probe, 0, &[(&probed, 0..3)]).await.expect("a row for each number");
    assert_eq!(times.equal, Some(Equality::Same));
    for (number, rows, shape) in [(2, [-1.0, -2.0], "[2]"), (3, [0.0, 0.0], "[0]")] {
        let mingled = task(number, &rows);
        let failure =
            home.run(BatchKind::Packed, 0, &[(&mingled, 0..2)]).await.expect_err("not one row for each number");
        assert_eq!(failure.code, ErrorCode::RunProtocol);
        let saw = format!("came with {shape} for each item, the probe saw [1]");
        assert!(failure.text.contains(&saw), "{}", failure.text);
        assert!(mingled.result().is_none(), "whose rows these are, nobody can tell");
    }
    assert_eq!(home.tools.pool.warm(), [Digest::of(&model)], "the runner is not to blame");
    let well = task(4, &[5.0, 6.0]);
    home.run(BatchKind::Packed, 0, &[(&well, 0..2)]).await.expect("a row for each number");
    assert_eq!(result(&well), (vec![1], vec![5.0, 6.0]));
}

#[tokio::test]
async fn a_probe_answers_with_single_runs_and_tells_whether_packing_is_safe() {
    let Some(home) = Home::new() else { return };
    let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0];
    let alike = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0];
    let zeros = [0.0; 6];
    for (number, model, rows, equal) in [
        (1, models::negate(&[0, 2]), rows, Equality::Same),
        (2, models::negate(&[0, 2]), alike, Equality::Same),
        (3, models::relative(&[0, 2]), rows, Equality::Differs),
        (4, models::maximum(&[0, 2]), rows, Equality::Differs),
        (5, models::negate(&[1, 2]), rows, Equality::Unsupported),
        (6, models::negate(&[0, 2]), zeros, Equality::Same),
        (8, models::relative(&[0, 2]), zeros, Equality::Differs),
        (7, models::relative(&[0, 2]), alike, Equality::Differs),
    ] {
        let task = home.task(number, &[model], 3, &[&rows]);
        let times = home.run(BatchKind::Probe, 0, &[(&task, 0..3)]).await.expect("single runs go well");
        assert_eq!(times.equal, Some(equal), "model {number}");
        assert!(times.single_us.is_some_and(|single_us| single_us > 0));
        assert_eq!(times.packed_us.is_some(), matches!(equal, Equality::Same | Equality::Differs));
        let (shape, values) = result(&task);
        assert_eq!(shape.iter().product::<u64>() * 3, values.len() as u64, "the shape of one item");
        let expected: Vec<f32> = match number {
            3 => vec![-1.0, 0.0, -1.0, 0.0, -2.0, 0.0],
            4 => vec![2.0, 4.0, 7.0],
            7 => vec![-1.0, 0.0, -1.0, 0.0, -1.0, 0.0],
            8 => zeros.to_vec(),
            _ => rows.iter().map(|x| -x).collect(),
        };
        assert_eq!(values, expected, "model {number}: answers are those of single runs");
    }
}

#[tokio::test]
async fn a_larger_batch_is_compared_and_its_wrong_rows_reach_nobody() {
    let Some(home) = Home::new() else { return };
    let model = models::right_up_to(8.0, &[0, 2]);
    let distinct: Vec<f32> = (0..32).map(|value| value as f32).collect();
    let equal_rows = [1.0, 2.0].repeat(16);
    let mut number = 0;
    for rows in [&distinct, &equal_rows] {
        for (items, equal) in [(8, Equality::Same), (9, Equality::Differs), (16, Equality::Differs)] {
            number += 2;
            let values = &rows[..2 * items as usize];
            let half = values.len() / 4 * 2;
            // Two tasks share the batch, the later rows first.
            let [one, other] = [(number, &values[..half]), (number + 1, &values[half..])].map(|(number, values)| {
                home.task(number, std::slice::from_ref(&model), values.len() as u32 / 2, &[values])
            });
            let parts = [(&other, 0..items - half as u32 / 2), (&one, 0..half as u32 / 2)];
            let times = home.run(BatchKind::Check, 0, &parts).await.expect("it answers");
            assert_eq!(times.equal, Some(equal), "{items} rows");
            assert_eq!([result(&one).1, result(&other).1].concat(), values, "{items} rows");
        }
    }
    let mingling = home.task(100, &[models::relative(&[0, 2])], 4, &[&[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]]);
    let times = home.run(BatchKind::Check, 0, &[(&mingling, 0..4)]).await.expect("it answers");
    assert_eq!(times.equal, Some(Equality::Differs), "equal rows do not hide that they mingle");
}

#[tokio::test]
async fn what_an_earlier_stage_made_runs_together_only_in_a_shape_that_was_probed() {
    let Some(home) = Home::new() else { return };
    // The second model mingles rows, and no probe has seen it.
    let stages = [models::negate(&[0, 2]), models::relative(&[0, 2])];
    let task = home.task(1, &stages, 2, &[&[1.0, 2.0, 3.0, 4.0]]);
    home.run(BatchKind::Packed, 0, &[(&task, 0..2)]).await.expect("first stage");
    home.run(BatchKind::Packed, 1, &[(&task, 0..2)]).await.expect("second stage");
    assert_eq!(result(&task), (vec![1, 2], vec![0.0, -1.0, 0.0, -1.0]));
}

#[tokio::test]
async fn outputs_of_one_stage_are_inputs_of_the_next_whatever_they_are_called() {
    let Some(home) = Home::new() else { return };
    let task =
        home.task(1, &[models::negate(&[0, 2]), models::absolute(&[0, 2])], 3, &[&[1.0, 2.0, -3.0, 4.0, 5.0, -6.0]]);
    home.run(BatchKind::Packed, 0, &[(&task, 0..3)]).await.expect("first stage");
    assert!(task.result().is_none(), "a stage is missing");
    home.run(BatchKind::Packed, 1, &[(&task, 1..3)]).await.expect("some rows");
    home.run(BatchKind::Whole, 1, &[(&task, 0..1)]).await.expect("the rest");
    assert_eq!(result(&task), (vec![1, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
}

#[tokio::test]
async fn a_stage_that_does_not_take_what_comes_is_named() {
    let Some(home) = Home::new() else { return };
    let task = home.task(1, &[models::negate(&[1, 2]), models::absolute(&[1, 3])], 1, &[&[1.0, 2.0]]);
    home.run(BatchKind::Whole, 0, &[(&task, 0..1)]).await.expect("first stage");
    let failure = home.run(BatchKind::Whole, 1, &[(&task, 0..1)]).await.expect_err("three numbers wanted");
    assert_eq!(failure.code, ErrorCode::InputMismatch);
    assert!(failure.text.contains("later") && failure.text.contains("[1, 3]"), "{}", failure.text);
}

#[tokio::test]
async fn a_killed_batch_ends_its_runner() {
    let Some(home) = Home::new() else { return };
    let model = models::negate(&[1, 4]);
    let task = home.task(1, std::slice::from_ref(&model), 1, &[&[0.0; 4]]);
    home.run(BatchKind::Whole, 0, &[(&task, 0..1)]).await.expect("warm now");
    let wanted = Wanted {
        attempt: task.order.id,
        model: task.model(0).expect("the first stage"),
        pin: home.put(&model),
        demands: Demands::default(),
        device: -1,
        apart: false,
    };
    let taken = home.tools.pool.take(&wanted, async || panic!("it is warm")).await.expect("idle");
    drop(taken);
    assert!(home.tools.pool.warm().is_empty());
}
