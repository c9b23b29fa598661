//! Owns users' jobs: many items of one model, cut into tasks; all answers are awaited and checked.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use mesh_sdk::{DType, ErrorCode, Input, Lane, Mesh, Model, Slo, Task, TaskError, TaskResult, new_job};
use tokio::{
    task::{JoinError, JoinSet},
    time::timeout,
};

use super::{
    field::{Field, Scheduling},
    figures::cut,
};

/// Items per task, as clients cut jobs.
pub(super) const SPLIT: u32 = 8;

/// Rows of a run that a device of stated cost takes at most.
const DEVICE_ROWS_MAX: u32 = 64;

/// One user's job.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) model: Model,
    pub(super) rows: Rows,
    /// A second model that takes the first one's outputs.
    pub(super) then: Option<Model>,
    pub(super) items: u32,
    pub(super) split: u32,
    pub(super) promise: Option<Promise>,
    pub(super) scheduling: Scheduling,
}

/// Until when each task of a job wants its answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Promise {
    Slo(Slo),
    /// Counted from the submission. An answer that is refused or too late is none.
    Deadline(Duration),
}

impl Promise {
    fn ask(self, task: Task) -> Task {
        match self {
            Self::Slo(slo) => task.slo(slo),
            Self::Deadline(after) => task.deadline(Some(after)),
        }
    }

    /// Whether a task ended because its deadline could not be kept.
    fn is_missed(error: &TaskError) -> bool {
        matches!(error.code(), Some(ErrorCode::DeadlineUnmeetable | ErrorCode::Expired))
    }
}

/// Inputs of a job's items, and the outputs that must come back.
#[derive(Clone, Debug)]
pub(super) enum Rows {
    /// FP32 numbers, counted up; each model of stated cost adds one.
    Counted,
    /// Given inputs, used again and again.
    Given {
        /// What an item is.
        dtype: DType,
        shape: &'static [u64],
        /// Bytes of each item.
        inputs: Arc<Vec<Vec<u8>>>,
        /// FP32 outputs of each item, by output; empty if they are not known.
        outputs: Arc<Vec<Vec<Bytes>>>,
    },
}

/// Longest wait for an answer: far more than any task of an experiment takes.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Largest difference of an FP32 row from that of a single run: with many rows, runtimes add in another order.
const TOLERANCE: f32 = 1e-3;

/// An answered task of a job.
#[derive(Clone, Debug)]
pub(super) struct Answered {
    pub(super) items: u32,
    /// Time at which it was meant to be sent.
    pub(super) began: Instant,
    pub(super) ended: Instant,
    /// The worker's name.
    pub(super) worker: String,
}

impl Answered {
    pub(super) fn took(&self) -> Duration {
        self.ended - self.began
    }
}

impl Job {
    /// A job of items for a model of stated cost, cut as usual.
    pub(super) fn new(field: &Field, model: &Model, items: u32) -> Self {
        let (model, scheduling, rows) = (model.clone(), field.scheduling(), Rows::Counted);
        Self { model, rows, then: None, items, split: SPLIT, promise: None, scheduling }
    }

    /// Whether tasks of `split` items can run. With scheduling off each is one run, and a device takes at most 64 rows.
    pub(super) fn fits(scheduling: Scheduling, split: u32) -> bool {
        scheduling == Scheduling::On || split <= DEVICE_ROWS_MAX
    }

    /// Submits the whole job and waits for all answers, which are returned in the order of their arrival; without those
    /// whose deadline could not be kept.
    pub(super) async fn run(&self, client: &Mesh, began: Instant) -> Result<Vec<Answered>> {
        let (id, mut tasks, mut first) = (new_job(), JoinSet::new(), 0);
        for items in cut(self.items, self.split) {
            let task = self.task(first, items).job(id);
            let (client, job, at) = (client.clone(), self.clone(), first);
            tasks.spawn(async move {
                let result = timeout(ANSWER_WITHIN, client.submit(task).await?.wait()).await.context("no answer")?;
                if result.as_ref().is_err_and(Promise::is_missed) {
                    return Ok(None);
                }
                let (ended, result) = (Instant::now(), result?);
                job.check(at, items, &result)?;
                let worker = result.worker.map_or_else(String::new, |(_, name)| name);
                anyhow::Ok(Some(Answered { items, began, ended, worker }))
            });
            first += items;
        }
        let mut answers = Vec::new();
        while let Some(answered) = tasks.join_next().await {
            answers.extend(settled(answered));
        }
        Ok(answers)
    }

    /// The outputs of a job with one item.
    pub(super) async fn outputs_of_one(&self, client: &Mesh) -> Result<Vec<Bytes>> {
        let result = client.submit(self.task(0, 1)).await?.wait().await?;
        Ok(result.outputs.iter().map(mesh_sdk::Output::bytes).collect::<Result<_, _>>()?)
    }

    fn task(&self, first: u32, items: u32) -> Task {
        let rows = first..first + items;
        let input = match &self.rows {
            Rows::Counted => Input::raw(rows.flat_map(|row| (row as f32).to_le_bytes()).collect::<Vec<u8>>()),
            Rows::Given { dtype, shape, inputs, .. } => {
                let bytes: Vec<u8> = rows.flat_map(|row| &inputs[row as usize % inputs.len()]).copied().collect();
                Input::tensor(*dtype, [&[u64::from(items)], *shape].concat(), bytes)
            }
        };
        let task = Task::new(self.model.clone()).input(input);
        let task = match self.scheduling {
            Scheduling::On => {
                let task = task.items(items).job_items(self.items);
                self.promise.into_iter().fold(task, |task, promise| promise.ask(task))
            }
            // As if there were no items: one run per task, and only one lane.
            Scheduling::Off => task.lane(Some(Lane::Batch)),
        };
        self.then.iter().fold(task, |task, model| task.then("second", model.clone()))
    }

    fn check(&self, first: u32, items: u32, result: &TaskResult) -> Result<()> {
        match &self.rows {
            Rows::Counted => {
                let more = 1 + u32::from(self.then.is_some());
                let output = result.outputs.first().context("no output")?.bytes()?;
                let expected = (first + more..first + more + items).flat_map(|row| (row as f32).to_le_bytes());
                ensure!(output.iter().copied().eq(expected), "rows {first}.. came back wrong");
            }
            Rows::Given { outputs, .. } => {
                for (place, output) in result.outputs.iter().enumerate() {
                    let bytes = output.bytes()?;
                    for (row, got) in (first..).zip(bytes.chunks(bytes.len() / items as usize)) {
                        let expected = &outputs[row as usize % outputs.len()][place];
                        ensure!(is_close(got, expected), "row {row} of {} is not that of a single run", output.name);
                    }
                }
            }
        }
        Ok(())
    }
}

fn is_close(got: &[u8], expected: &[u8]) -> bool {
    let floats = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
    let (got, expected) = (floats(got), floats(expected));
    got.len() == expected.len()
        && got
            .iter()
            .zip(&expected)
            .all(|(got, expected)| (got - expected).abs() <= TOLERANCE * expected.abs().max(1.0))
}

/// Runs this job once for every client, all at the same moment.
pub(super) async fn burst(clients: &[Mesh], job: &Job) -> Result<Vec<Answered>> {
    let began = Instant::now();
    let mut jobs = JoinSet::new();
    for client in clients {
        let (client, job) = (client.clone(), job.clone());
        jobs.spawn(async move { job.run(&client, began).await });
    }
    let mut answers = Vec::new();
    while let Some(answered) = jobs.join_next().await {
        answers.extend(settled(answered));
    }
    Ok(answers)
}

/// The result of closed loops.
#[derive(Debug)]
pub(super) struct Looped {
    /// Answers that came within the time.
    pub(super) answers: Vec<Answered>,
    /// Number of tasks that were still under way at the end, and below the time until all of them had come.
    pub(super) later: usize,
    pub(super) all: Duration,
}

/// Runs this job again and again for every client until the time has passed.
pub(super) async fn closed_loop(clients: &[Mesh], job: &Job, run_for: Duration) -> Result<Looped> {
    let began = Instant::now();
    let until = began + run_for;
    let mut loops = JoinSet::new();
    for client in clients {
        let (client, job) = (client.clone(), job.clone());
        loops.spawn(async move {
            let mut answers = Vec::new();
            while Instant::now() < until {
                answers.extend(job.run(&client, Instant::now()).await?);
            }
            anyhow::Ok(answers)
        });
    }
    let mut answers = Vec::new();
    while let Some(answered) = loops.join_next().await {
        answers.extend(settled(answered));
    }
    let count = answers.len();
    answers.retain(|answer: &Answered| answer.ended <= until);
    Ok(Looped { later: count - answers.len(), answers, all: began.elapsed() })
}

/// Tasks at these times after the beginning, whatever becomes of the ones before.
pub(super) async fn stream(
    client: &Mesh,
    job: &Job,
    began: Instant,
    dues: impl Iterator<Item = Duration>,
) -> Result<Vec<Answered>> {
    let mut under_way = JoinSet::new();
    for after in dues {
        tokio::time::sleep_until((began + after).into()).await;
        let (client, job) = (client.clone(), job.clone());
        under_way.spawn(async move { job.run(&client, began + after).await });
    }
    let mut answers = Vec::new();
    while let Some(answered) = under_way.join_next().await {
        answers.extend(settled(answered));
    }
    Ok(answers)
}

/// The result of a task or a client of the bench.
///
/// # Panics
/// If it failed. Then the last lines of broker and workers are shown.
fn settled<T>(joined: Result<Result<T>, JoinError>) -> T {
    joined.expect("invariant: clients do not panic").unwrap_or_else(|error| panic!("an experiment failed: {error:#}"))
}

/// Lets the workers measure the model in both lanes, and start the runners that they need to be warm.
pub(super) async fn warm_up(field: &Field, model: &Model, then: Option<&Model>, items: u32) -> Result<()> {
    let clients = field.clients("warm", 4).await?;
    let mut small = Job::new(field, model, SPLIT);
    small.then = then.cloned();
    let large = Job { items, ..small.clone() };
    for _ in 0..2 {
        burst(&clients[..1], &large).await?;
        burst(&clients, &small).await?;
    }
    for client in clients {
        client.close().await;
    }
    Ok(())
}

/// Number of items in these answers.
pub(super) fn items_in(answers: &[Answered]) -> u64 {
    answers.iter().map(|answer| u64::from(answer.items)).sum()
}

/// Time from the first send to the last answer.
pub(super) fn span(answers: &[Answered]) -> Duration {
    let began = answers.iter().map(|answer| answer.began).min();
    let ended = answers.iter().map(|answer| answer.ended).max();
    began.zip(ended).map_or(Duration::ZERO, |(began, ended)| ended - began)
}
