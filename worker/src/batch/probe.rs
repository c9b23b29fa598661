//! Whether a model's rows may run together: the same items one by one and in one call, compared.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use mesh_core::worker::{BatchTimes, Equality};
use proto_msgs::{DType, Digest, ErrorCode, Failure};
use tokio::task::spawn_blocking;

use super::{Calls, Chunk, Outputs, groups, micros};
use crate::{
    alike::alike,
    oip::{Given, Tensor},
    payload::Payload,
};

/// Models and shapes of which is remembered what a probe showed; the rest is forgotten together, and only loses a check.
const PROVEN_MAX: usize = 256;

/// An item larger than this is not copied for a comparison.
const OTHER_BYTES_MAX: u64 = 64 << 20;

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
    let (mut given, mut singles, mut kept_bytes) = (calls.batch.given(alike), singles, 0);
    if !are_distinct(&given, singles.len()).await {
        let Some(other) = another(&mut calls, alike[0], &singles[0]).await else {
            times.equal = Some(Equality::Inconclusive);
            return Ok((outputs, times));
        };
        other.take_every_second_place(&mut given, &mut singles);
    }
    let before = calls.took.len();
    let packed = calls.cut_call(alike, given, &mut kept_bytes).await;
    times.packed_us = calls.took.get(before).copied().map(micros);
    let equal = match packed {
        Ok(packed) => {
            let equal = compare(singles, packed).await;
            if equal == Equality::Same {
                proven.remember(calls.model(), alike[0], &outputs);
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

/// An item that nobody sent, for a probe whose items are all the same: mixed-up rows would not show among them.
struct Other {
    inputs: Vec<Payload>,
    outputs: Vec<Tensor>,
}

/// Makes another item of the first one. `None` if the model does not, or if it makes no difference.
async fn another(calls: &mut Calls<'_, '_>, chunk: &Chunk, single: &[Tensor]) -> Option<Other> {
    let first = Chunk { part: chunk.part, rows: chunk.rows.start..chunk.rows.start + 1, fitted: chunk.fitted.clone() };
    let mut given = calls.batch.given(&[&first]);
    let mut inputs = Vec::new();
    for input in &mut given {
        let pieces = std::mem::take(&mut input.pieces);
        if pieces.iter().map(Payload::size_bytes).sum::<u64>() > OTHER_BYTES_MAX {
            return None;
        }
        let mut bytes = Vec::new();
        for piece in spawn_blocking(move || pieces.iter().map(Payload::read).collect::<Vec<_>>()).await.ok()? {
            bytes.extend_from_slice(&piece.ok()?);
        }
        let payload = Payload::Memory(altered(input.dtype, bytes)?.into());
        input.pieces = vec![payload.clone()];
        inputs.push(payload);
    }
    let outputs = calls.call(given, &mut 0).await.ok()?;
    let differs = compare(vec![single.to_vec()], vec![outputs.clone()]).await == Equality::Differs;
    differs.then_some(Other { inputs, outputs })
}

/// Elements moved on by one and half as large: a model that takes the ones takes the others, be they pixels or words, and one
/// that looks at all rows at once, for their largest value or their sum, shows it.
fn altered(dtype: DType, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    macro_rules! halve {
        ($type:ty, $half:expr) => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|chunk| {
                let half: fn($type) -> $type = $half;
                *chunk = half(<$type>::from_le_bytes(*chunk)).to_le_bytes();
            })
        };
    }
    let moved_bytes = dtype.size_bytes()?.min(bytes.len());
    bytes.rotate_left(moved_bytes);
    match dtype {
        DType::F32 => halve!(f32, |x| x / 2.0),
        DType::F64 => halve!(f64, |x| x / 2.0),
        DType::U8 => halve!(u8, |x| x / 2),
        DType::I8 => halve!(i8, |x| x / 2),
        DType::U16 => halve!(u16, |x| x / 2),
        DType::I16 => halve!(i16, |x| x / 2),
        DType::U32 => halve!(u32, |x| x / 2),
        DType::I32 => halve!(i32, |x| x / 2),
        DType::U64 => halve!(u64, |x| x / 2),
        DType::I64 => halve!(i64, |x| x / 2),
        DType::Bool | DType::F16 | DType::BF16 | DType::Bytes => {}
    }
    Some(bytes)
}

impl Other {
    fn take_every_second_place(self, given: &mut [Given], singles: &mut Outputs) {
        for (input, other) in given.iter_mut().zip(&self.inputs) {
            let item_bytes = other.size_bytes();
            let whole = std::mem::take(&mut input.pieces);
            let first = whole[0].slice(0..item_bytes);
            input.pieces =
                (0..singles.len()).map(|item| if item % 2 == 0 { first.clone() } else { other.clone() }).collect();
        }
        for (item, outputs) in singles.iter_mut().enumerate() {
            if item % 2 == 1 {
                outputs.clone_from(&self.outputs);
            }
        }
    }
}

/// Item by item, output by output.
async fn compare(singles: Outputs, packed: Outputs) -> Equality {
    let same = |a: &Tensor, b: &Tensor| -> std::io::Result<bool> {
        let declared = (&a.name, a.dtype, &a.shape) == (&b.name, b.dtype, &b.shape);
        Ok(declared && alike(a.dtype, &a.payload.read()?, &b.payload.read()?))
    };
    let compare = move || -> std::io::Result<Equality> {
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
        Ok(Equality::Same)
    };
    // Files are read, and much is compared: not where others wait.
    spawn_blocking(compare).await.ok().and_then(Result::ok).unwrap_or(Equality::Inconclusive)
}

/// Whether at least two items have other inputs.
async fn are_distinct(given: &[Given], items: usize) -> bool {
    let inputs: Vec<Vec<Payload>> = given.iter().map(|input| input.pieces.clone()).collect();
    let look = move || -> std::io::Result<bool> {
        for pieces in inputs {
            let mut bytes = Vec::new();
            for piece in pieces {
                bytes.extend_from_slice(&piece.read()?);
            }
            let mut each = bytes.chunks((bytes.len() / items.max(1)).max(1));
            let first = each.next();
            if each.any(|item| Some(item) != first) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    spawn_blocking(look).await.ok().and_then(Result::ok).unwrap_or(false)
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
