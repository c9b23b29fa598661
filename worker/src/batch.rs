//! Runs one batch: finds its runner, packs rows, calls the model, cuts the outputs and gives them to their tasks.
//!
//! Never decides what is in a batch or whether its rows may run together: the machine does, with the results of probes.
//! A dropped batch ends its runner and keeps nothing.

mod alike;
mod made_up;
pub(crate) mod material;
mod probe;
mod rows;
mod sample;
pub(crate) mod unfinished;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_core::worker::{BatchId, BatchKind, BatchTimes, Event, Part};
use proto_msgs::{ErrorCode, Failure, Phase};
use tokio::{sync::watch, time::timeout};

use self::{
    material::Material,
    probe::Bounds,
    rows::{cut, packed_shape, takes_many},
    unfinished::Unfinished,
};
use crate::{
    data::blobs::BlobError,
    runners::{
        fit::{Fitted, TensorMeta},
        oip::{Given, Tensor},
        pool::{Taken, Wanted},
        proven::Proven,
    },
    tools::{Tools, blocking},
};

/// One batch: the order to run rows on a device.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) batch: BatchId,
    /// The parts with their attempts' material, in the order of their rows in a packed call.
    pub(crate) parts: Vec<(Part, Arc<Material>)>,
    pub(crate) device: i16,
    pub(crate) kind: BatchKind,
    /// Whether its rows may end their runner, so that others should not share it.
    pub(crate) apart: bool,
    /// Time limit of each call.
    pub(crate) limit: Duration,
    /// Set once nobody wants the rows any more: then the batch ends when its model is loaded.
    pub(crate) only_loads: Arc<AtomicBool>,
    /// Comparisons that were cut short, of all batches.
    pub(crate) unfinished: Arc<Unfinished>,
    /// The machine's order once a probe's rows are answered.
    pub(crate) comparing: watch::Receiver<Comparing>,
}

/// Whether a probe whose rows are answered goes on.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Comparing {
    /// The machine has not said yet.
    #[default]
    Undecided,
    /// So many rows are compared with a packed call, within this time.
    Goes { rows: u32, limit: Duration },
    /// No further call is made.
    Stops,
}

/// Items of one part with the same types and shapes.
#[derive(Debug)]
struct Chunk {
    /// Index of the part in its batch.
    part: usize,
    rows: Range<u32>,
    /// The inputs of one of these items.
    fitted: Vec<Fitted>,
}

impl Chunk {
    /// One item of the chunk.
    fn single(&self, item: u32) -> Self {
        Self { part: self.part, rows: item..item + 1, fitted: self.fitted.clone() }
    }
}

/// The outputs of each item of a part.
type Outputs = Vec<Vec<Tensor>>;

impl Batch {
    /// Runs the batch. On return, the outputs are in the material of each part.
    pub(crate) async fn run(&self, tools: &Arc<Tools>) -> Result<BatchTimes, Failure> {
        self.note_begun(tools).await?;
        let wanted = self.wanted(tools).await?;
        let begun = Instant::now();
        let reached = async |phase| {
            let _ = tools.machine.send(Event::BatchReached { batch: self.batch, phase }).await;
        };
        let taking = tools.pool.take(&wanted, async || reached(Phase::Loading).await);
        let mut runner = timeout(self.limit, taking).await.map_err(|_| late(self.limit))??;
        let load_us = micros(runner.load);
        if self.only_loads.load(Ordering::Relaxed) {
            runner.give_back();
            return Ok(BatchTimes { load_us, ..BatchTimes::default() });
        }
        reached(Phase::Running).await;
        let ran = self.run_in(&mut runner, tools, self.limit.saturating_sub(begun.elapsed())).await;
        runner.give_back();
        let (outputs, times) = ran?;
        self.keep(outputs, tools).await;
        Ok(BatchTimes { load_us, ..times })
    }

    /// Gives each part its outputs.
    async fn keep(&self, outputs: Vec<Outputs>, tools: &Tools) {
        for ((part, material), outputs) in self.parts.iter().zip(outputs) {
            material.store(part.stage, part.rows.clone(), outputs);
            material.join_if_complete(&tools.store).await;
        }
    }

    /// Makes the calls. Returns the outputs that the parts do not have yet.
    async fn run_in(
        &self,
        runner: &mut Taken<'_>,
        tools: &Tools,
        left: Duration,
    ) -> Result<(Vec<Outputs>, BatchTimes), Failure> {
        let chunks = self.chunks(runner.inputs())?;
        let mut calls = Calls { batch: self, runner, left, took: Vec::new(), apart_rows: 0, bounds: None };
        match self.kind {
            BatchKind::Packed => {
                let outputs = calls.packed(&chunks, &tools.proven).await?;
                Ok((
                    outputs,
                    BatchTimes { run_us: calls.sum_us(), apart_rows: calls.apart_rows, ..BatchTimes::default() },
                ))
            }
            BatchKind::Whole => {
                let outputs = calls.singly(&chunks).await?;
                Ok((outputs, BatchTimes { run_us: calls.sum_us(), ..BatchTimes::default() }))
            }
            BatchKind::Check | BatchKind::Spot => probe::check(calls, &chunks, tools).await,
            BatchKind::Probe => Ok((Vec::new(), probe::probe(calls, &chunks, tools).await?)),
        }
    }

    /// Records on disk, once per detached attempt, that a run begins.
    async fn note_begun(&self, tools: &Arc<Tools>) -> Result<(), Failure> {
        for (_, material) in &self.parts {
            if !material.order.is_detached() || !material.begins() {
                continue;
            }
            let (keep, id) = (tools.keep.clone(), material.order.id);
            blocking(move || keep.begin_run(id).map_err(|error| BlobError::Io(error).into())).await?;
        }
        Ok(())
    }

    /// The runner that the batch needs. All parts need the same one.
    async fn wanted(&self, tools: &Arc<Tools>) -> Result<Wanted, Failure> {
        let lost = || Failure::new(ErrorCode::WorkerLost, "the worker no longer has the model of this task");
        let (part, material) = self.parts.first().ok_or_else(lost)?;
        let model = material.model(part.stage).ok_or_else(lost)?;
        let is_its = |(part, material): &(Part, Arc<Material>)| {
            material.model(part.stage).is_some_and(|its| its.digest == model.digest)
        };
        if !self.parts.iter().all(is_its) {
            // The machine never mixes models in a batch; if it did, rows would leak into another task's model.
            return Err(Failure::new(ErrorCode::RunProtocol, "rows of different models cannot run together"));
        }
        let pin = if material.has_pin(part.stage) {
            material.pin(part.stage, &tools.store)
        } else {
            let (material, store, stage) = (material.clone(), tools.store.clone(), part.stage);
            blocking(move || Ok(material.pin(stage, &store))).await?
        };
        let ticket = &material.order.ticket.body;
        // The slot may sit on the processor although the task was promised memory of a GPU.
        let device = if self.device < 0 { ticket.gpu.map_or(self.device, i16::from) } else { self.device };
        let (pin, apart) = (pin.ok_or_else(lost)?, self.apart);
        Ok(Wanted { attempt: part.id, model, pin, demands: ticket.demands, device, apart })
    }

    /// The rows fitted to the model. A part's rows are alike at stage 0; those of later stages are checked one by one.
    fn chunks(&self, model: &[TensorMeta]) -> Result<Vec<Chunk>, Failure> {
        let mut chunks: Vec<Chunk> = Vec::new();
        for (index, (part, material)) in self.parts.iter().enumerate() {
            if part.stage == 0 {
                let fitted = material.fit(0, part.rows.start, model)?;
                chunks.push(Chunk { part: index, rows: part.rows.clone(), fitted });
                continue;
            }
            for item in part.rows.clone() {
                let fitted = material.fit(part.stage, item, model)?;
                match chunks.last_mut() {
                    Some(last) if last.part == index && last.fitted == fitted => last.rows.end = item + 1,
                    _ => chunks.push(Chunk { part: index, rows: item..item + 1, fitted }),
                }
            }
        }
        Ok(chunks)
    }

    fn is_first_stage(&self) -> bool {
        self.parts.iter().all(|(part, _)| part.stage == 0)
    }

    /// The inputs of one call with these items, which must all be alike.
    fn given(&self, chunks: &[&Chunk]) -> Vec<Given> {
        let Some(first) = chunks.first() else { return Vec::new() };
        let items = items(chunks);
        let given = |(place, input): (usize, &Fitted)| {
            let pieces = chunks.iter().flat_map(|chunk| {
                let (part, material) = &self.parts[chunk.part];
                material.pieces(part.stage, &chunk.rows, chunk.fitted[place].index)
            });
            let shape = if items == 1 { input.shape.clone() } else { packed_shape(&input.shape, u64::from(items)) };
            Given { name: input.name.clone(), dtype: input.dtype, shape, pieces: pieces.collect() }
        };
        first.fitted.iter().enumerate().map(given).collect()
    }

    /// Whether outputs of `size_bytes` may stay in memory. Each part counts for its share of them.
    fn has_memory_for(&self, size_bytes: u64) -> bool {
        let all: u64 = self.parts.iter().map(|(part, _)| part.rows.len() as u64).sum();
        self.parts.iter().all(|(part, material)| {
            material.has_memory_for(size_bytes.saturating_mul(part.rows.len() as u64) / all.max(1))
        })
    }
}

/// The calls of one batch.
struct Calls<'a, 'p> {
    batch: &'a Batch,
    runner: &'a mut Taken<'p>,
    /// Time left for the next call. The first call shares its time with loading.
    left: Duration,
    /// Duration of each call so far.
    took: Vec<Duration>,
    /// Rows of a packed batch that ran one by one.
    apart_rows: u32,
    /// The bounds of a comparison that no task waits for.
    bounds: Option<Bounds>,
}

impl Calls<'_, '_> {
    /// Makes one call. Adds the bytes that stay in memory to `kept_bytes`.
    async fn call(&mut self, given: Vec<Given>, kept_bytes: &mut u64) -> Result<Vec<Tensor>, Failure> {
        if let Some(bounds) = &self.bounds {
            bounds.allow(&given).await?;
        }
        let limit = self.batch.limit;
        let left = std::mem::replace(&mut self.left, limit);
        let begun = Instant::now();
        let stays = |size_bytes: u64| {
            let stays = self.batch.has_memory_for(kept_bytes.saturating_add(size_bytes));
            *kept_bytes += if stays { size_bytes } else { 0 };
            stays
        };
        let outputs = self.runner.call(given, (left, limit), stays).await?;
        self.took.push(begun.elapsed());
        Ok(outputs)
    }

    /// Fails if there is no time for a call that takes so long, because others wait for the slot.
    fn in_time(&self, call: Duration) -> Result<(), Failure> {
        self.bounds.as_ref().map_or(Ok(()), |bounds| bounds.in_time(call))
    }

    fn sum_us(&self) -> u64 {
        self.took.iter().copied().map(micros).sum()
    }

    /// Runs item after item, one call each.
    async fn singly(&mut self, chunks: &[Chunk]) -> Result<Vec<Outputs>, Failure> {
        let mut outputs: Vec<Outputs> = vec![Vec::new(); self.batch.parts.len()];
        let mut kept_bytes = 0;
        for chunk in chunks {
            outputs[chunk.part].extend(self.each_alone(&[chunk], &mut kept_bytes).await?);
        }
        Ok(outputs)
    }

    /// Runs all items in one call, or in one call per shape.
    async fn packed(&mut self, chunks: &[Chunk], proven: &Proven) -> Result<Vec<Outputs>, Failure> {
        let mut by_part: Vec<Vec<(u32, Vec<Tensor>)>> = vec![Vec::new(); self.batch.parts.len()];
        let mut kept_bytes = 0;
        for alike in groups(chunks) {
            // The machine has a verdict for what tasks bring. What an earlier stage made of it may have any shape.
            let is_known = self.batch.is_first_stage() || proven.knows(self.model(), &alike[0].fitted);
            let cut = if is_known {
                let cut = self.packed_call(&alike, &mut kept_bytes).await?;
                proven.check(self.model(), &alike[0].fitted, &cut)?;
                cut
            } else {
                self.apart_rows += items(&alike);
                self.each_alone(&alike, &mut kept_bytes).await?
            };
            hand_out(&alike, cut, &mut by_part);
        }
        Ok(by_part.into_iter().map(in_order).collect())
    }

    /// Runs items that are alike one after the other.
    async fn each_alone(&mut self, alike: &[&Chunk], kept_bytes: &mut u64) -> Result<Outputs, Failure> {
        let mut outputs = Outputs::new();
        for chunk in alike {
            for item in chunk.rows.clone() {
                outputs.push(self.call(self.batch.given(&[&chunk.single(item)]), kept_bytes).await?);
            }
        }
        Ok(outputs)
    }

    /// Makes one call with items that are alike, and cuts the outputs into items.
    async fn packed_call(&mut self, alike: &[&Chunk], kept_bytes: &mut u64) -> Result<Outputs, Failure> {
        self.cut_call((&alike[0].fitted, items(alike)), self.batch.given(alike), kept_bytes).await
    }

    /// [`Self::packed_call`] with other bytes: of so many items like this one.
    async fn cut_call(
        &mut self,
        (fitted, items): (&[Fitted], u32),
        given: Vec<Given>,
        kept_bytes: &mut u64,
    ) -> Result<Outputs, Failure> {
        if items > 1 {
            let one_at_a_time =
                |why: String| Failure::new(ErrorCode::InputMismatch, format!("{why}: one item at a time"));
            takes_many(self.runner.inputs(), fitted).map_err(one_at_a_time)?;
        }
        let outputs = self.call(given, kept_bytes).await?;
        cut(&outputs, items)
    }

    fn model(&self) -> proto_msgs::Digest {
        self.runner.model()
    }
}

/// Gives the outputs of items that ran in one call to the parts of the batch, with the number of each item.
fn hand_out(alike: &[&Chunk], outputs: Outputs, by_part: &mut [Vec<(u32, Vec<Tensor>)>]) {
    let owners = alike.iter().flat_map(|chunk| chunk.rows.clone().map(|item| (chunk.part, item)));
    let is_shared = by_part.len() > 1;
    for ((part, item), mut outputs) in owners.zip(outputs) {
        if is_shared {
            // A slow client of one row must not keep the rows of all others in memory.
            outputs.iter_mut().for_each(Tensor::detach);
        }
        by_part[part].push((item, outputs));
    }
}

/// A part's outputs in the order of its items.
fn in_order(mut items: Vec<(u32, Vec<Tensor>)>) -> Outputs {
    items.sort_unstable_by_key(|(item, _)| *item);
    items.into_iter().map(|(_, outputs)| outputs).collect()
}

fn items(chunks: &[&Chunk]) -> u32 {
    chunks.iter().map(|chunk| chunk.rows.len() as u32).sum()
}

/// Groups of chunks that may share a call: the same inputs, types and shapes.
fn groups(chunks: &[Chunk]) -> Vec<Vec<&Chunk>> {
    let alike = |a: &Chunk, b: &Chunk| {
        let same = |(a, b): (&Fitted, &Fitted)| (&a.name, a.dtype, &a.shape) == (&b.name, b.dtype, &b.shape);
        a.fitted.len() == b.fitted.len() && a.fitted.iter().zip(&b.fitted).all(same)
    };
    let mut groups: Vec<Vec<&Chunk>> = Vec::new();
    for chunk in chunks {
        match groups.iter_mut().find(|group| alike(group[0], chunk)) {
            Some(group) => group.push(chunk),
            None => groups.push(vec![chunk]),
        }
    }
    groups
}

fn late(limit: Duration) -> Failure {
    let text = format!("the model was not loaded within {limit:?} (the worker's --run-limit)");
    Failure::new(ErrorCode::RunTimeout, text)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
