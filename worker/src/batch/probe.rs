//! Whether a model's rows may run together: the same items one by one and in one call, compared.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use mesh_core::worker::{BatchTimes, Equality};
use proto_msgs::{Digest, ErrorCode, Failure};
use tokio::task::spawn_blocking;

use super::{Calls, Chunk, Outputs, groups, micros};
use crate::{alike::alike, oip::Tensor, payload::Payload};

/// Models and shapes of which is remembered what a probe showed; the rest is forgotten together, and only loses a check.
const PROVEN_MAX: usize = 256;

/// Runs a probe: single runs, whose outputs are the answers, then one packed call.
pub(super) async fn probe(
    mut calls: Calls<'_, '_>,
    chunks: &[Chunk],
    proven: &Proven,
) -> Result<(Vec<Outputs>, BatchTimes), Failure> {
    let outputs = calls.singly(chunks).await?;
    // The first one may still warm something up.
    let counted = if calls.took.len() > 1 { &calls.took[1..] } else { &calls.took[..] };
    let single_us = counted.iter().copied().map(micros).sum::<u64>() / counted.len().max(1) as u64;
    let mut times = BatchTimes { run_us: calls.sum_us(), single_us: Some(single_us), ..BatchTimes::default() };
    let singles: Outputs = outputs.iter().flatten().cloned().collect();
    let alike = groups(chunks);
    let [alike] = &alike[..] else {
        // Items of several shapes never go into one call.
        times.equal = Some(Equality::Inconclusive);
        return Ok((outputs, times));
    };
    let (before, mut kept_bytes) = (calls.took.len(), 0);
    let packed = calls.packed_call(alike, &mut kept_bytes).await;
    times.packed_us = calls.took.get(before).copied().map(micros);
    let equal = match packed {
        Ok(packed) => {
            let inputs = calls.batch.given(alike).into_iter().map(|input| input.pieces).collect();
            let model = calls.model();
            let equal = compare(inputs, singles, packed).await;
            if equal == Equality::Same {
                proven.remember(model, alike[0], &outputs);
            }
            equal
        }
        Err(failure) => match failure.code {
            ErrorCode::RunTimeout => Equality::Inconclusive,
            // Cut to items: the call itself went well.
            ErrorCode::RunProtocol if times.packed_us.is_some() => Equality::Differs,
            _ => Equality::Unsupported,
        },
    };
    times.equal = Some(equal);
    Ok((outputs, times))
}

/// `inputs`: the pieces of each, equally many bytes for each item.
async fn compare(inputs: Vec<Vec<Payload>>, singles: Outputs, packed: Outputs) -> Equality {
    let compare = move || -> std::io::Result<Equality> {
        let same = |a: &Tensor, b: &Tensor| -> std::io::Result<bool> {
            let declared = (&a.name, a.dtype, &a.shape) == (&b.name, b.dtype, &b.shape);
            Ok(declared && alike(a.dtype, &a.payload.read()?, &b.payload.read()?))
        };
        for (single, packed) in singles.iter().zip(&packed) {
            if single.len() != packed.len() {
                return Ok(Equality::Differs);
            }
            for (single, packed) in single.iter().zip(packed) {
                if !same(single, packed)? {
                    return Ok(Equality::Differs);
                }
            }
        }
        let distinct = are_distinct(&inputs, singles.len())?;
        Ok(if distinct { Equality::Same } else { Equality::Inconclusive })
    };
    // Files are read, and much is compared: not where others wait.
    spawn_blocking(compare).await.ok().and_then(Result::ok).unwrap_or(Equality::Inconclusive)
}

/// Whether at least two items have other inputs: if not, mixed-up rows would not show.
fn are_distinct(inputs: &[Vec<Payload>], items: usize) -> std::io::Result<bool> {
    for pieces in inputs {
        let mut bytes = Vec::new();
        for piece in pieces {
            bytes.extend_from_slice(&piece.read()?);
        }
        let item_bytes = (bytes.len() / items.max(1)).max(1);
        let mut each = bytes.chunks(item_bytes);
        let first = each.next();
        if each.any(|item| Some(item) != first) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How many rows one item gives, as probes showed. A model whose outputs depend on more than the number of rows may pass a
/// probe and still give others later.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    shapes: Mutex<HashMap<Shapes, Vec<Vec<u64>>>>,
}

/// A model and the shapes of an item's inputs.
type Shapes = (Digest, Vec<Vec<u64>>);

impl Proven {
    fn key(model: Digest, chunk: &Chunk) -> Shapes {
        (model, chunk.fitted.iter().map(|input| input.shape.clone()).collect())
    }

    fn remember(&self, model: Digest, chunk: &Chunk, outputs: &[Outputs]) {
        let Some(item) = outputs.iter().flatten().next() else { return };
        let mut shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        if shapes.len() == PROVEN_MAX {
            shapes.clear();
        }
        shapes.insert(Self::key(model, chunk), item.iter().map(|output| output.shape.clone()).collect());
    }

    /// Whether items came out in the shape that the probe saw, if there was one for inputs of this shape.
    pub(super) fn check(&self, model: Digest, chunk: &Chunk, items: &Outputs) -> Result<(), Failure> {
        let shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = shapes.get(&Self::key(model, chunk)) else { return Ok(()) };
        for item in items {
            for (output, known) in item.iter().zip(known) {
                if output.shape != *known {
                    let text = format!(
                        "output '{}' came with {:?} for each item, the probe saw {known:?}: not the rows of these items",
                        output.name, output.shape
                    );
                    return Err(Failure::new(ErrorCode::RunProtocol, text));
                }
            }
        }
        Ok(())
    }
}
