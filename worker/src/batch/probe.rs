//! Probes whether a model's rows may run together, and checks it for larger batches and now and then: compares the same
//! items run one by one and in one call.
//!
//! Only items that the model answers in different ways prove anything: among equal answers a row that changed places,
//! or that looked at its neighbours, would not show. If a batch brings none, some are made up.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use mesh_core::worker::{BatchKind, BatchTimes, CHECKED_ROWS, Equality, Event};
use proto_msgs::{ErrorCode, Failure};
use tokio::{sync::watch, task::spawn_blocking, time::timeout};

use super::{
    Batch, Calls, Chunk, Comparing, Outputs,
    alike::alike,
    groups, items,
    made_up::{CHANGES, others},
    micros,
    rows::{packed_shape, takes_many},
};
use crate::{
    data::payload::Payload,
    runners::{
        fit::Fitted,
        oip::{Given, Tensor},
        proven::Proven,
    },
    tools::Tools,
};

/// Most bytes of inputs and outputs that a probe compares. More would be read from a disk that others need, too, and a
/// runner holds it all in memory at once. Rows of this size gain little from a common call.
pub(super) const PROBE_BYTES_MAX: u64 = 256 << 20;

/// An item, and what the model gives for it alone.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// The pieces of each input.
    pub(super) inputs: Vec<Vec<Payload>>,
    pub(super) outputs: Vec<Tensor>,
}

/// Items that are alike: all that a comparison needs, whatever becomes of their tasks meanwhile.
struct Sample {
    fitted: Vec<Fitted>,
    items: Vec<Known>,
}

/// The bounds of a comparison while others wait for its slot.
pub(super) struct Bounds {
    order: watch::Receiver<Comparing>,
    until: Instant,
}

impl Bounds {
    fn has_time_for(&self, time: Duration) -> bool {
        !matches!(*self.order.borrow(), Comparing::Stops) && Instant::now() + time <= self.until
    }

    /// Whether one more call may begin: it is in time, and its inputs are still there. A runner that does not get all
    /// of a request ends.
    pub(super) async fn allow(&self, given: &[Given]) -> Result<(), Failure> {
        if !self.has_time_for(Duration::ZERO) {
            return Err(Failure::new(ErrorCode::RunTimeout, "the comparison was cut short"));
        }
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
    let mut order = calls.batch.comparing.clone();
    let ordered = order.wait_for(|order| *order != Comparing::Undecided).await.map(|order| *order);
    let Ok(Comparing::Goes { rows, limit }) = ordered else {
        return Ok(BatchTimes { equal: Some(Equality::Inconclusive), ..times });
    };
    calls.bounds = Some(Bounds { order, until: Instant::now() + limit });
    let mut packed_us = None;
    let proving = sample.prove(&mut calls, rows as usize, single, &mut packed_us);
    let equal = timeout(limit, proving).await.unwrap_or(Equality::Inconclusive);
    if let Some(item) = sample.items.first().filter(|_| equal == Equality::Same) {
        tools.proven.remember(calls.model(), &sample.fitted, &item.outputs);
    }
    Ok(BatchTimes { packed_us, equal: Some(equal), ..times })
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
        packed_us: &mut Option<u64>,
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
        let tells = tell_apart(singles.clone()).await;
        let has_time = |calls: &Calls<'_, '_>, packed: Duration, calls_before: u32| {
            let made_up = CHANGES.len() as u32;
            let time = single * made_up + packed * (calls_before + made_up.div_ceil(singles.len() as u32 - 1));
            calls.bounds.as_ref().is_none_or(|bounds| bounds.has_time_for(time))
        };
        // No packed call is quicker than a single run.
        if !tells && !has_time(calls, single, 1) {
            return Equality::Inconclusive;
        }
        let begun = Instant::now();
        let before = calls.took.len();
        let packed = calls.cut_call((&some.fitted, singles.len() as u32), given, &mut 0).await;
        *packed_us = calls.took.get(before).copied().map(micros);
        let equal = match packed {
            Ok(packed) => compare(singles.clone(), packed).await,
            Err(failure) => some.judge(&failure, packed_us.is_some()).await,
        };
        if equal != Equality::Same || tells {
            return equal;
        }
        if !has_time(calls, begun.elapsed(), 0) {
            return Equality::Inconclusive;
        }
        some.beside_others(calls, singles.len()).await
    }

    /// What it says of the model that the packed call failed. `was_answered`: the call itself succeeded.
    async fn judge(&self, failure: &Failure, was_answered: bool) -> Equality {
        let inputs = self.items.iter().flat_map(|item| &item.inputs).flatten().cloned().collect();
        match failure.code {
            ErrorCode::RunTimeout => Equality::Inconclusive,
            // Its outputs could not be cut into items.
            ErrorCode::RunProtocol if was_answered => Equality::Differs,
            // A runner that did not get all of its inputs fails in any way.
            _ if !are_there(inputs).await => Equality::Inconclusive,
            _ => Equality::Unsupported,
        }
    }

    /// Compares calls of `count` items with single runs: a made-up item that tells rows apart, beside known ones and
    /// beside every other made-up one.
    async fn beside_others(&self, calls: &mut Calls<'_, '_>, count: usize) -> Equality {
        let Some(first) = self.items.first() else { return Equality::Inconclusive };
        let others = others(calls, &self.fitted, &self.items).await;
        let Some((telling, others)) = others.split_first() else { return Equality::Inconclusive };
        let beside: Vec<&Known> = std::iter::once(first).chain(others).collect();
        // In a small call the telling one would have few neighbours, and a row that looks at them might not show.
        for some in beside.chunks(count.saturating_sub(1).max(1)) {
            let together = std::iter::once(telling).chain(some.iter().copied()).chain(self.items.iter().cycle());
            match self.together_as_alone(calls, together.take(count).collect()).await {
                Equality::Same => {}
                other => return other,
            }
        }
        Equality::Same
    }

    /// Compares one call of these items with their single runs.
    async fn together_as_alone(&self, calls: &mut Calls<'_, '_>, in_turn: Vec<&Known>) -> Equality {
        let given = given(&self.fitted, &in_turn);
        let alone: Outputs = in_turn.iter().map(|known| known.outputs.clone()).collect();
        if bytes_of(&given, &alone) > PROBE_BYTES_MAX {
            return Equality::Inconclusive;
        }
        let before = calls.took.len();
        match calls.cut_call((&self.fitted, in_turn.len() as u32), given, &mut 0).await {
            Ok(together) => compare(alone, together).await,
            // The call succeeded, and its outputs are not those of these items.
            Err(failure) if failure.code == ErrorCode::RunProtocol && calls.took.len() > before => Equality::Differs,
            Err(_) => Equality::Inconclusive,
        }
    }
}

/// Runs all rows in one call, whose outputs are the tasks' results if some of the rows give the same by themselves: for
/// a size that was never seen, or now and then for one that was right before. Otherwise all rows run one by one.
pub(super) async fn check(
    mut calls: Calls<'_, '_>,
    chunks: &[Chunk],
    proven: &Proven,
) -> Result<(Vec<Outputs>, BatchTimes), Failure> {
    let outputs = calls.packed(chunks, proven).await?;
    let run_us = calls.sum_us();
    let kind = calls.batch.kind;
    let equal = match kind {
        BatchKind::Spot => compare_two(&mut calls, chunks, &outputs).await?,
        _ => compare_some(&mut calls, chunks, &outputs).await?,
    };
    let times = BatchTimes { run_us, equal: Some(equal), ..BatchTimes::default() };
    if kind.keeps_packed(times.equal) {
        return Ok((outputs, times));
    }
    drop(outputs);
    let before_us = calls.sum_us();
    let outputs = calls.singly(chunks).await?;
    Ok((outputs, BatchTimes { run_us: calls.sum_us().saturating_sub(before_us), ..times }))
}

/// Compares two neighbours of a packed call with single runs: where the outputs change from one row to the next, for
/// rows that all got the same answer are right even if they changed places. Any batch may be looked at elsewhere.
async fn compare_two(calls: &mut Calls<'_, '_>, chunks: &[Chunk], outputs: &[Outputs]) -> Result<Equality, Failure> {
    let rows = rows_of(&chunks.iter().collect::<Vec<_>>());
    let packed: Outputs = outputs.iter().flatten().cloned().collect();
    if packed.len() != rows.len() {
        return Ok(Equality::Differs);
    }
    if bytes_of(&[], &packed) > PROBE_BYTES_MAX {
        return Ok(Equality::Inconclusive);
    }
    // Fibonacci hashing: consecutive batches are looked at in places far apart.
    let from = (calls.batch.batch.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize % rows.len();
    let after = next_change(packed.clone(), from).await.unwrap_or(from);
    let pair = [after.checked_sub(1).unwrap_or(rows.len() - 1), after];
    let alone = calls.each_alone(&pair.map(|place| &rows[place]), &mut 0).await?;
    Ok(compare(alone, pair.map(|place| packed[place].clone()).to_vec()).await)
}

/// The first place from `from` on, in a circle, whose outputs differ from those before it.
async fn next_change(packed: Outputs, from: usize) -> Option<usize> {
    let find = move || {
        let changes = |place: &usize| {
            let before = place.checked_sub(1).unwrap_or(packed.len() - 1);
            compare_now(&packed[before..=before], &packed[*place..=*place]) == Equality::Differs
        };
        (from..packed.len()).chain(0..from).find(changes)
    };
    spawn_blocking(find).await.ok().flatten()
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
    if bytes_of(&[], &packed) <= PROBE_BYTES_MAX
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
    Ok(sample.beside_others(calls, items(alike) as usize).await)
}

/// One call of these items, one behind the other.
pub(super) fn given(fitted: &[Fitted], in_turn: &[&Known]) -> Vec<Given> {
    let items = in_turn.len() as u64;
    let given = |(place, input): (usize, &Fitted)| {
        let shape = if items == 1 { input.shape.clone() } else { packed_shape(&input.shape, items) };
        let pieces = in_turn.iter().flat_map(|known| known.inputs[place].clone()).collect();
        Given { name: input.name.clone(), dtype: input.dtype, shape, pieces }
    };
    fitted.iter().enumerate().map(given).collect()
}

/// Whether the files of these payloads exist. Only those of a detached task may go while somebody holds them.
async fn are_there(pieces: Vec<Payload>) -> bool {
    let mut files: Vec<PathBuf> = pieces.into_iter().filter_map(Payload::into_kept_file).collect();
    files.dedup();
    files.is_empty() || spawn_blocking(move || files.iter().all(|file| file.exists())).await.unwrap_or(false)
}

fn known(batch: &Batch, row: &Chunk, outputs: Vec<Tensor>) -> Known {
    let inputs = batch.given(&[row]).into_iter().map(|input| input.pieces).collect();
    Known { inputs, outputs }
}

/// The items of these chunks, one by one.
fn rows_of(chunks: &[&Chunk]) -> Vec<Chunk> {
    chunks.iter().flat_map(|chunk| chunk.rows.clone().map(|item| chunk.single(item))).collect()
}

/// Whether some of these outputs differ from the first by more than the tolerance. Without a number in them, or with
/// nothing but NaN, they do not.
pub(super) async fn tell_apart(outputs: Outputs) -> bool {
    let firsts = outputs.first().map(|first| vec![first.clone(); outputs.len()]).unwrap_or_default();
    compare(firsts, outputs).await == Equality::Differs
}

/// Compares the outputs of single and packed runs, item by item.
async fn compare(singles: Outputs, packed: Outputs) -> Equality {
    // On a blocking thread: files are read, and much is compared.
    spawn_blocking(move || compare_now(&singles, &packed)).await.unwrap_or(Equality::Inconclusive)
}

/// [`compare`]; blocks if outputs are in files.
fn compare_now(singles: &[Vec<Tensor>], packed: &[Vec<Tensor>]) -> Equality {
    let same = |a: &Tensor, b: &Tensor| -> std::io::Result<bool> {
        let declared = (&a.name, a.dtype, &a.shape) == (&b.name, b.dtype, &b.shape);
        Ok(declared && alike(a.dtype, &a.payload, &b.payload)?)
    };
    for (single, packed) in singles.iter().zip(packed) {
        if single.len() != packed.len() {
            return Equality::Differs;
        }
        for (single, packed) in single.iter().zip(packed) {
            match same(single, packed) {
                Ok(true) => {}
                Ok(false) => return Equality::Differs,
                Err(_) => return Equality::Inconclusive,
            }
        }
    }
    Equality::Same
}

/// Bytes that a comparison reads: inputs and outputs together.
pub(super) fn bytes_of(given: &[Given], outputs: &[Vec<Tensor>]) -> u64 {
    let inputs = given.iter().flat_map(|input| &input.pieces).map(Payload::size_bytes);
    inputs.chain(outputs.iter().flatten().map(|output| output.payload.size_bytes())).sum()
}

#[cfg(test)]
mod tests {
    use proto_msgs::DType;

    use super::*;

    fn numbers(values: &[f32]) -> Vec<Tensor> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = vec![1, values.len() as u64];
        vec![Tensor { name: "y".to_owned(), dtype: DType::F32, shape, payload: Payload::Memory(bytes.into()) }]
    }

    #[tokio::test]
    async fn what_says_nothing_tells_no_row_from_another() {
        let of = async |rows: &[&[f32]]| tell_apart(rows.iter().map(|row| numbers(row)).collect()).await;
        assert!(of(&[&[1.0, 2.0], &[1.0, 2.0], &[1.0, 3.0]]).await);
        assert!(of(&[&[1.0], &[f32::NAN]]).await);
        assert!(!of(&[&[1.0, 2.0], &[1.0, 2.000_001]]).await, "a swap would be taken for rounding");
        assert!(!of(&[&[f32::NAN], &[f32::NAN]]).await);
        assert!(!of(&[&[], &[]]).await);
        assert!(!of(&[&[1.0]]).await);
        assert!(!of(&[]).await);
    }

    #[tokio::test]
    async fn a_batch_is_looked_at_where_its_answers_change() {
        let packed: Outputs = [0.0, 0.0, 1.0, 1.0, 0.0].map(|value| numbers(&[value])).to_vec();
        for (from, expected) in [(0, 2), (2, 2), (3, 4), (4, 4)] {
            assert_eq!(next_change(packed.clone(), from).await, Some(expected), "from {from}");
        }
        assert_eq!(next_change(packed[..2].to_vec(), 1).await, None, "all are alike");
    }

    #[test]
    fn what_is_too_much_to_compare_is_known_before_it_is_read() {
        let nowhere = PathBuf::from("/nowhere");
        let payload = Payload::File { path: nowhere, offset: 0, size_bytes: PROBE_BYTES_MAX, owner: None };
        let pieces = vec![payload.clone()];
        let inputs = [Given { name: "x".to_owned(), dtype: DType::U8, shape: vec![4, 2], pieces }];
        let output = Tensor { name: "y".to_owned(), dtype: DType::U8, shape: vec![1], payload };
        assert_eq!(bytes_of(&inputs, &[]), PROBE_BYTES_MAX);
        assert_eq!(bytes_of(&inputs, &[vec![output]]), 2 * PROBE_BYTES_MAX);
    }
}
