//! Probes whether a model's rows may run together, and checks it for larger batches and now and then: compares the same
//! items run one by one and in one call.
//!
//! Only items that the model answers in different ways prove anything: among equal answers a row that changed places,
//! or that looked at its neighbours, would not show. If a batch brings none, some are made up.

use std::time::{Duration, Instant};

use mesh_core::worker::{BatchKind, BatchTimes, CHECKED_ROWS, Equality, Event};
use proto_msgs::{ErrorCode, Failure};
use tokio::{sync::watch, task::spawn_blocking, time::timeout};

use super::{
    Batch, Calls, Chunk, Comparing, Outputs, groups, items, micros,
    rows::takes_many,
    sample::{Known, PROBE_BYTES_MAX, Sample, are_there, bytes_of, compare, given, next_change, tell_apart},
    unfinished::Begun,
};
use crate::{
    data::payload::Payload,
    runners::oip::{Given, Tensor},
    tools::Tools,
};

/// The first packed call of a comparison: its rows, and its time in microseconds.
type Packed = Option<(u32, u64)>;

/// The bounds of a comparison while others wait for its slot.
pub(super) struct Bounds {
    order: watch::Receiver<Comparing>,
    until: Instant,
}

impl Bounds {
    /// Fails if there is no time for a call that takes so long.
    pub(super) fn in_time(&self, call: Duration) -> Result<(), Failure> {
        let goes_on = !matches!(*self.order.borrow(), Comparing::Stops) && Instant::now() + call <= self.until;
        let cut_short = || Failure::new(ErrorCode::RunTimeout, "the comparison was cut short");
        goes_on.then_some(()).ok_or_else(cut_short)
    }

    /// Whether one more call may begin: it is in time, and its inputs are still there. A runner that does not get all
    /// of a request ends.
    pub(super) async fn allow(&self, given: &[Given]) -> Result<(), Failure> {
        self.in_time(Duration::ZERO)?;
        let pieces = given.iter().flat_map(|input| &input.pieces).cloned().collect();
        let lost = || Failure::new(ErrorCode::WorkerLost, "the items of the comparison have gone with their tasks");
        if are_there(pieces).await { Ok(()) } else { Err(lost()) }
    }
}

/// Runs a probe: single runs, whose outputs are the tasks' results at once. Then, if the machine wants it, some packed
/// calls are compared with them, and no task waits for that.
pub(super) async fn probe(mut calls: Calls<'_, '_>, chunks: &[Chunk], tools: &Tools) -> Result<BatchTimes, Failure> {
    let outputs = calls.singly(chunks).await?;
    // The first call may still warm something up.
    let counted = if calls.took.len() > 1 { &calls.took[1..] } else { &calls.took[..] };
    let single = counted.iter().sum::<Duration>() / u32::try_from(counted.len().max(1)).unwrap_or(u32::MAX);
    let times = BatchTimes { run_us: calls.sum_us(), single_us: Some(micros(single)), ..BatchTimes::default() };
    // Before the tasks have the outputs: what an earlier stage made is freed then.
    let sample = Sample::of(calls.batch, chunks, &outputs);
    calls.batch.keep(outputs, tools).await;
    let Some(sample) = sample else {
        return Ok(BatchTimes { equal: Some(Equality::Inconclusive), ..times });
    };
    let load_us = micros(calls.runner.load);
    let answered = Event::BatchAnswered { batch: calls.batch.batch, times: BatchTimes { load_us, ..times } };
    // Closed only when the worker is leaving.
    let _ = tools.machine.send(answered).await;
    let Some((rows, limit)) = calls.told_to_compare().await else {
        return Ok(BatchTimes { equal: Some(Equality::Inconclusive), ..times });
    };
    let (mut packed, mut begun) = (None, None);
    let proving = sample.prove(&mut calls, rows as usize, single, (&mut packed, &mut begun));
    let equal = timeout(limit, proving).await.unwrap_or(Equality::Inconclusive);
    let equal = match begun {
        Some(begun) => calls.batch.unfinished.keep(calls.runner.key(), begun),
        None => equal,
    };
    if let Some(item) = sample.items.first().filter(|_| equal == Equality::Same) {
        tools.proven.remember(calls.model(), &sample.fitted, &item.outputs);
    }
    let (packed_rows, packed_us) = packed.unzip();
    Ok(BatchTimes { packed_rows, packed_us, equal: Some(equal), ..times })
}

impl Calls<'_, '_> {
    /// Waits until the machine says whether to compare, now that the rows are answered. Returns the rows of the packed
    /// call, and the longest time.
    async fn told_to_compare(&mut self) -> Option<(u32, Duration)> {
        let mut order = self.batch.comparing.clone();
        let ordered = order.wait_for(|order| *order != Comparing::Undecided).await.map(|order| *order);
        let Ok(Comparing::Goes { rows, limit }) = ordered else { return None };
        self.bounds = Some(Bounds { order, until: Instant::now() + limit });
        Some((rows, limit))
    }
}

impl Sample {
    /// `None` if the items have different shapes: these never go into one call.
    fn of(batch: &Batch, chunks: &[Chunk], outputs: &[Outputs]) -> Option<Self> {
        let groups = groups(chunks);
        let [alike] = &groups[..] else { return None };
        let (rows, outputs) = (rows_of(alike), outputs.iter().flatten().cloned());
        let items = rows.iter().zip(outputs).map(|(row, outputs)| known(batch, row, outputs)).collect();
        Some(Self { fitted: alike[0].fitted.clone(), items })
    }

    /// So many neighbours, among them two that the model answers in different ways, if there are any.
    async fn telling(&self, count: usize) -> Self {
        let outputs: Outputs = self.items.iter().map(|item| item.outputs.clone()).collect();
        let change = if count < outputs.len() { next_change(outputs, 1).await } else { None };
        let from = change.unwrap_or(0).saturating_sub(1).min(self.items.len().saturating_sub(count));
        let items = self.items.iter().skip(from).take(count).cloned().collect();
        Self { fitted: self.fitted.clone(), items }
    }

    /// Compares one call of some of the items with their single runs, and if those are all alike, with made-up items
    /// beside them.
    async fn prove(
        &self,
        calls: &mut Calls<'_, '_>,
        count: usize,
        single: Duration,
        (packed, unfinished): (&mut Packed, &mut Option<Begun>),
    ) -> Equality {
        if takes_many(calls.runner.inputs(), &self.fitted).is_err() {
            return Equality::Unsupported;
        }
        let some = self.telling(count).await;
        let singles: Outputs = some.items.iter().map(|item| item.outputs.clone()).collect();
        let given = given(&some.fitted, &some.items.iter().collect::<Vec<_>>());
        if singles.len() < 2 || bytes_of(&given, &singles) > PROBE_BYTES_MAX {
            return Equality::Inconclusive;
        }
        if tell_apart(singles).await {
            let (equal, took) = some.packed(calls).await;
            *packed = took.map(|took| (some.items.len() as u32, micros(took)));
            return equal;
        }
        let begun = unfinished.insert(calls.batch.unfinished.go_on(calls.runner.key(), some, count, None));
        let advanced = begun.advance(calls, single).await;
        *packed = begun.packed();
        match advanced {
            Err(failure) if failure.code == ErrorCode::RunTimeout => Equality::Unfinished,
            other => {
                *unfinished = None;
                other.unwrap_or(Equality::Inconclusive)
            }
        }
    }
}

/// Runs all rows in one call, whose outputs are the tasks' results if some of the rows give the same by themselves: for
/// a size that was never seen, or now and then for one that was right before. Otherwise all rows run one by one.
pub(super) async fn check(
    mut calls: Calls<'_, '_>,
    chunks: &[Chunk],
    tools: &Tools,
) -> Result<(Vec<Outputs>, BatchTimes), Failure> {
    let outputs = calls.packed(chunks, &tools.proven).await?;
    let kind = calls.batch.kind;
    let ran = BatchTimes { run_us: calls.sum_us(), apart_rows: calls.apart_rows, ..BatchTimes::default() };
    // What ran one by one is right, and tells nothing.
    if ran.apart_rows > 0 && groups(chunks).len() == 1 {
        return Ok((outputs, ran));
    }
    let equal = match kind {
        BatchKind::Spot => compare_two(&mut calls, chunks, &outputs).await?,
        _ if is_small(&outputs) && is_one_input(calls.batch, chunks).await => {
            match compare_one(&mut calls, chunks, &outputs).await? {
                Ok(sample) => return Ok((Vec::new(), answer_and_prove(calls, sample, outputs, tools).await)),
                Err(equal) => equal,
            }
        }
        _ => compare_some(&mut calls, chunks, &outputs).await?,
    };
    let times = BatchTimes { equal: Some(equal), ..ran };
    if kind.keeps_packed(times.equal) {
        return Ok((outputs, times));
    }
    drop(outputs);
    let before_us = calls.sum_us();
    let outputs = calls.singly(chunks).await?;
    Ok((outputs, BatchTimes { run_us: calls.sum_us().saturating_sub(before_us), ..times }))
}

/// Whether all outputs may be compared with each other.
fn is_small(outputs: &[Outputs]) -> bool {
    outputs.iter().map(|outputs| bytes_of(&[], outputs)).sum::<u64>() <= PROBE_BYTES_MAX
}

/// Whether all rows are the same, byte for byte: as a load tool sends them, or a camera that sees nothing. Not asked of
/// files, which would be read for it.
async fn is_one_input(batch: &Batch, chunks: &[Chunk]) -> bool {
    let inputs = rows_of(&chunks.iter().collect::<Vec<_>>()).into_iter().map(|row| {
        let pieces = batch.given(&[&row]).into_iter().flat_map(|input| input.pieces);
        pieces.map(Payload::into_memory).collect::<Option<Vec<_>>>()
    });
    let Some(inputs) = inputs.collect::<Option<Vec<_>>>() else { return false };
    spawn_blocking(move || inputs.windows(2).all(|pair| pair[0] == pair[1])).await.unwrap_or(false)
}

/// Compares a packed call of equal rows with one single run: what all of them should have given. If they have, the
/// outputs are right, and it is still open whether different rows would be, too: returns the row.
async fn compare_one(
    calls: &mut Calls<'_, '_>,
    chunks: &[Chunk],
    outputs: &[Outputs],
) -> Result<Result<Sample, Equality>, Failure> {
    let alike = groups(chunks);
    let [alike] = &alike[..] else { return Ok(Err(Equality::Inconclusive)) };
    let rows = rows_of(alike);
    let packed: Outputs = outputs.iter().flatten().cloned().collect();
    if packed.len() != rows.len() {
        return Ok(Err(Equality::Differs));
    }
    let alone = calls.each_alone(&[&rows[0]], &mut 0).await?;
    Ok(match (compare(vec![alone[0].clone(); packed.len()], packed).await, &alone[..]) {
        (Equality::Same, [alone]) => {
            let items = vec![known(calls.batch, &rows[0], alone.clone())];
            Ok(Sample { fitted: alike[0].fitted.clone(), items })
        }
        (equal, _) => Err(equal),
    })
}

/// Answers equal rows with the outputs of their packed call. Then, if the machine wants it, different rows are made up
/// and compared in calls of the same size, and no task waits for that.
async fn answer_and_prove(
    mut calls: Calls<'_, '_>,
    sample: Sample,
    outputs: Vec<Outputs>,
    tools: &Tools,
) -> BatchTimes {
    let rows = outputs.iter().map(Vec::len).sum();
    let [packed, .., single] = calls.took[..] else { return BatchTimes::default() };
    let times = BatchTimes { run_us: micros(packed), single_us: Some(micros(single)), ..BatchTimes::default() };
    calls.batch.keep(outputs, tools).await;
    let load_us = micros(calls.runner.load);
    let answer = BatchTimes { load_us, equal: Some(Equality::Same), ..times };
    // Closed only when the worker is leaving.
    let _ = tools.machine.send(Event::BatchAnswered { batch: calls.batch.batch, times: answer }).await;
    let Some((_, limit)) = calls.told_to_compare().await else {
        return BatchTimes { equal: Some(Equality::Inconclusive), ..times };
    };
    let (key, unfinished) = (calls.runner.key(), calls.batch.unfinished.clone());
    let mut begun = unfinished.go_on(key, sample, rows, Some((rows as u32, packed)));
    let equal = match timeout(limit, begun.advance(&mut calls, single)).await {
        Ok(Err(failure)) if failure.code != ErrorCode::RunTimeout => Equality::Inconclusive,
        Ok(Ok(equal)) => equal,
        Ok(Err(_)) | Err(_) => unfinished.keep(key, begun),
    };
    BatchTimes { equal: Some(equal), ..times }
}

/// Compares two neighbours of a packed call with single runs: where the outputs change from one row to the next, for
/// rows that all got the same answer are right even if they changed places. Any batch may be looked at elsewhere.
async fn compare_two(calls: &mut Calls<'_, '_>, chunks: &[Chunk], outputs: &[Outputs]) -> Result<Equality, Failure> {
    let rows = rows_of(&chunks.iter().collect::<Vec<_>>());
    let packed: Outputs = outputs.iter().flatten().cloned().collect();
    if packed.len() != rows.len() {
        return Ok(Equality::Differs);
    }
    if !is_small(outputs) {
        return Ok(Equality::Inconclusive);
    }
    // Fibonacci hashing: consecutive batches are looked at in places far apart.
    let from = (calls.batch.batch.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize % rows.len();
    let after = next_change(packed.clone(), from).await.unwrap_or(from);
    let pair = [after.checked_sub(1).unwrap_or(rows.len() - 1), after];
    let alone = calls.each_alone(&pair.map(|place| &rows[place]), &mut 0).await?;
    Ok(compare(alone, pair.map(|place| packed[place].clone()).to_vec()).await)
}

/// Compares some rows of a packed call with single runs: the first, the last, and one between that has other outputs
/// than the first, if there is one.
async fn compare_some(calls: &mut Calls<'_, '_>, chunks: &[Chunk], outputs: &[Outputs]) -> Result<Equality, Failure> {
    let alike = groups(chunks);
    let [alike] = &alike[..] else { return Ok(Equality::Inconclusive) };
    let rows = rows_of(alike);
    // In the order of their parts, as the rows are.
    let packed: Outputs = outputs.iter().flatten().cloned().collect();
    if packed.len() != rows.len() {
        return Ok(Equality::Differs);
    }
    let (last, steps) = (rows.len() - 1, CHECKED_ROWS as usize - 1);
    let mut places: Vec<usize> = (0..=steps).map(|step| last * step / steps).collect();
    if is_small(outputs)
        && let Some(other) = next_change(packed.clone(), last.min(1)).await
    {
        places[1] = other;
    }
    places.dedup();
    let sample: Vec<&Chunk> = places.iter().map(|place| &rows[*place]).collect();
    let together: Outputs = places.iter().map(|place| packed[*place].clone()).collect();
    let alone = calls.each_alone(&sample, &mut 0).await?;
    if bytes_of(&calls.batch.given(&sample), &alone) > PROBE_BYTES_MAX {
        return Ok(Equality::Inconclusive);
    }
    let equal = compare(alone.clone(), together).await;
    if equal != Equality::Same || tell_apart(alone.clone()).await {
        return Ok(equal);
    }
    let items_of_sample = sample.iter().zip(alone).map(|(row, outputs)| known(calls.batch, row, outputs)).collect();
    let sample = Sample { fitted: alike[0].fitted.clone(), items: items_of_sample };
    let begun = Begun::new(sample, items(alike) as usize);
    Ok(begun.beside_made_up(calls).await.unwrap_or(Equality::Inconclusive))
}

fn known(batch: &Batch, row: &Chunk, outputs: Vec<Tensor>) -> Known {
    let inputs = batch.given(&[row]).into_iter().map(|input| input.pieces).collect();
    Known { inputs, outputs }
}

/// The items of these chunks, one by one.
fn rows_of(chunks: &[&Chunk]) -> Vec<Chunk> {
    chunks.iter().flat_map(|chunk| chunk.rows.clone().map(|item| chunk.single(item))).collect()
}
