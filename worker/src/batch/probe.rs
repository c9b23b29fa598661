//! Probes whether a model's rows may run together, and checks it for larger batches: compares the same items run one by
//! one and in one call.

use mesh_core::worker::{BatchTimes, CHECKED_ROWS, Equality};
use proto_msgs::{DType, ErrorCode, Failure};
use tokio::task::spawn_blocking;

use super::{
    Calls, Chunk, Outputs,
    alike::{alike, same_bytes},
    groups, micros,
};
use crate::{
    data::payload::Payload,
    runners::{
        oip::{Given, Tensor},
        proven::Proven,
    },
};

/// Most bytes of inputs and outputs that a probe compares. More would be read from a disk that others need, too, and a
/// runner holds it all in memory at once. Rows of this size gain little from a common call.
const PROBE_BYTES_MAX: u64 = 256 << 20;

/// Most bytes of an item's inputs that are copied into memory to make a different item from them.
const OTHER_BYTES_MAX: u64 = 16 << 20;

/// Runs a probe: single runs, whose outputs are the tasks' results, then one packed call.
pub(super) async fn probe(
    mut calls: Calls<'_, '_>,
    chunks: &[Chunk],
    proven: &Proven,
) -> Result<(Vec<Outputs>, BatchTimes), Failure> {
    let outputs = calls.singly(chunks).await?;
    // The first call may still warm something up.
    let counted = if calls.took.len() > 1 { &calls.took[1..] } else { &calls.took[..] };
    let single_us = counted.iter().copied().map(micros).sum::<u64>() / counted.len().max(1) as u64;
    let mut times = BatchTimes { run_us: calls.sum_us(), single_us: Some(single_us), ..BatchTimes::default() };
    let singles: Outputs = outputs.iter().flatten().cloned().collect();
    let alike = groups(chunks);
    let [alike] = &alike[..] else {
        // Items of different shapes never go into one call.
        times.equal = Some(Equality::Inconclusive);
        return Ok((outputs, times));
    };
    let (mut given, mut singles, mut kept_bytes) = (calls.batch.given(alike), singles, 0);
    if bytes_of(&given, &singles) > PROBE_BYTES_MAX {
        times.equal = Some(Equality::Inconclusive);
        return Ok((outputs, times));
    }
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
                let item = outputs.iter().flatten().next();
                item.into_iter().for_each(|item| proven.remember(calls.model(), &alike[0].fitted, item));
            }
            equal
        }
        Err(failure) => match failure.code {
            ErrorCode::RunTimeout => Equality::Inconclusive,
            // The call itself succeeded; its outputs could not be cut into items.
            ErrorCode::RunProtocol if times.packed_us.is_some() => Equality::Differs,
            _ => Equality::Unsupported,
        },
    };
    times.equal = Some(equal);
    Ok((outputs, times))
}

/// Runs all rows in one call, whose outputs are the tasks' results if some of the rows give the same by themselves.
/// Otherwise all rows run one by one.
pub(super) async fn check(
    mut calls: Calls<'_, '_>,
    chunks: &[Chunk],
    proven: &Proven,
) -> Result<(Vec<Outputs>, BatchTimes), Failure> {
    let outputs = calls.packed(chunks, proven).await?;
    let run_us = calls.sum_us();
    let equal = compare_some(&mut calls, chunks, &outputs).await?;
    let times = BatchTimes { run_us, equal: Some(equal), ..BatchTimes::default() };
    if equal == Equality::Same {
        return Ok((outputs, times));
    }
    drop(outputs);
    let before_us = calls.sum_us();
    let outputs = calls.singly(chunks).await?;
    Ok((outputs, BatchTimes { run_us: calls.sum_us().saturating_sub(before_us), ..times }))
}

/// Compares some rows of a packed call with single runs: the first, the middle and the last.
async fn compare_some(calls: &mut Calls<'_, '_>, chunks: &[Chunk], outputs: &[Outputs]) -> Result<Equality, Failure> {
    let alike = groups(chunks);
    let [alike] = &alike[..] else { return Ok(Equality::Inconclusive) };
    let rows: Vec<Chunk> = alike.iter().flat_map(|chunk| chunk.rows.clone().map(|item| chunk.single(item))).collect();
    // In the order of their parts, as the rows are.
    let packed: Vec<&Vec<Tensor>> = outputs.iter().flatten().collect();
    if packed.len() != rows.len() {
        return Ok(Equality::Differs);
    }
    let (last, steps) = (rows.len() - 1, CHECKED_ROWS as usize - 1);
    let mut places: Vec<usize> = (0..=steps).map(|step| last * step / steps).collect();
    places.dedup();
    let sample: Vec<&Chunk> = places.iter().map(|place| &rows[*place]).collect();
    let together: Outputs = places.iter().map(|place| packed[*place].clone()).collect();
    let alone = calls.each_alone(&sample, &mut 0).await?;
    let given = calls.batch.given(&sample);
    if bytes_of(&given, &alone) > PROBE_BYTES_MAX {
        return Ok(Equality::Inconclusive);
    }
    let equal = compare(alone.clone(), together).await;
    if equal != Equality::Same || are_distinct(&given, sample.len()).await {
        return Ok(equal);
    }
    // Rows that are all alike would hide that they changed places.
    let mut given = calls.batch.given(alike);
    let mut expected = vec![alone[0].clone(); rows.len()];
    if bytes_of(&given, &expected) > PROBE_BYTES_MAX {
        return Ok(Equality::Inconclusive);
    }
    let Some(other) = another(calls, alike[0], &alone[0]).await else { return Ok(Equality::Inconclusive) };
    other.take_every_second_place(&mut given, &mut expected);
    let Ok(together) = calls.cut_call(alike, given, &mut 0).await else { return Ok(Equality::Inconclusive) };
    Ok(compare(expected, together).await)
}

/// A made-up item, for a probe whose items are all equal: swapped rows would not show among equal ones.
struct Other {
    inputs: Vec<Payload>,
    outputs: Vec<Tensor>,
}

/// Makes a different item from the first one. `None` if the model fails on it, or gives the same outputs.
async fn another(calls: &mut Calls<'_, '_>, chunk: &Chunk, single: &[Tensor]) -> Option<Other> {
    let mut given = calls.batch.given(&[&chunk.single(chunk.rows.start)]);
    if bytes_of(&given, &[]) > OTHER_BYTES_MAX {
        return None;
    }
    let mut inputs = Vec::new();
    for input in &mut given {
        let pieces = std::mem::take(&mut input.pieces);
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

/// Shifts the elements by one and halves them. A model that takes the original takes this too, be it pixels or words,
/// and one that looks at all rows at once, for their maximum or their sum, shows it. If all elements are equal, as in a
/// black picture, one is changed: a model may ignore a mere scale. `None` without an element size.
fn altered(dtype: DType, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    macro_rules! halve {
        ($type:ty, $half:expr) => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|chunk| {
                let half: fn($type) -> $type = $half;
                *chunk = half(<$type>::from_le_bytes(*chunk)).to_le_bytes();
            })
        };
    }
    let element_bytes = dtype.size_bytes()?.min(bytes.len());
    let is_constant = bytes.chunks(element_bytes.max(1)).all(|element| *element == bytes[..element_bytes]);
    bytes.rotate_left(element_bytes);
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
    if is_constant {
        let is_zero = bytes.iter().all(|byte| *byte == 0);
        let (first, rest) = bytes.split_at_mut(element_bytes);
        match is_zero {
            true => first.copy_from_slice(&one(dtype).to_le_bytes()[..element_bytes]),
            false if !rest.is_empty() => first.fill(0),
            false => {}
        }
    }
    Some(bytes)
}

/// The bits of the number 1, at the low end.
fn one(dtype: DType) -> u64 {
    match dtype {
        DType::F32 => 1_f32.to_bits().into(),
        DType::F64 => 1_f64.to_bits(),
        DType::F16 => 0x3c00,
        DType::BF16 => 0x3f80,
        _ => 1,
    }
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

/// Compares the outputs of single and packed runs, item by item.
async fn compare(singles: Outputs, packed: Outputs) -> Equality {
    let same = |a: &Tensor, b: &Tensor| -> std::io::Result<bool> {
        let declared = (&a.name, a.dtype, &a.shape) == (&b.name, b.dtype, &b.shape);
        Ok(declared && alike(a.dtype, &a.payload, &b.payload)?)
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
    // On a blocking thread: files are read, and much is compared.
    spawn_blocking(compare).await.ok().and_then(Result::ok).unwrap_or(Equality::Inconclusive)
}

/// Bytes that a comparison reads: inputs and outputs together.
fn bytes_of(given: &[Given], outputs: &[Vec<Tensor>]) -> u64 {
    let inputs = given.iter().flat_map(|input| &input.pieces).map(Payload::size_bytes);
    inputs.chain(outputs.iter().flatten().map(|output| output.payload.size_bytes())).sum()
}

/// Whether at least two items have different inputs.
async fn are_distinct(given: &[Given], items: usize) -> bool {
    let inputs: Vec<Vec<Payload>> = given.iter().map(|input| input.pieces.clone()).collect();
    let look = move || -> std::io::Result<bool> {
        for pieces in inputs {
            let all_bytes = pieces.iter().map(Payload::size_bytes).sum::<u64>();
            let item_bytes = (all_bytes / items.max(1) as u64).max(1);
            // A piece holds whole items.
            let mut each = pieces.iter().flat_map(|piece| {
                let starts = (0..piece.size_bytes()).step_by(usize::try_from(item_bytes).unwrap_or(usize::MAX));
                starts.map(|start| piece.slice(start..start + item_bytes))
            });
            let Some(first) = each.next() else { continue };
            for item in each {
                if !same_bytes(&first, &item)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    };
    spawn_blocking(look).await.ok().and_then(Result::ok).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(pieces: &[&[u8]]) -> [Given; 1] {
        let pieces = pieces.iter().map(|bytes| Payload::Memory(bytes.to_vec().into())).collect();
        [Given { name: "x".to_owned(), dtype: DType::U8, shape: vec![4, 2], pieces }]
    }

    #[tokio::test]
    async fn items_are_looked_at_one_by_one_however_they_lie_in_pieces() {
        assert!(!are_distinct(&given(&[&[1, 2, 1, 2, 1, 2, 1, 2]]), 4).await);
        assert!(!are_distinct(&given(&[&[1, 2], &[1, 2, 1, 2], &[1, 2]]), 4).await);
        assert!(are_distinct(&given(&[&[1, 2, 1, 2, 1, 2, 1, 3]]), 4).await);
        assert!(are_distinct(&given(&[&[1, 2], &[1, 2, 1, 2], &[2, 1]]), 4).await);
        assert!(!are_distinct(&given(&[]), 4).await);
    }

    #[test]
    fn another_item_is_no_mere_scale_of_the_first_one() {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        for (given, expected) in [
            (&[2.0, 4.0][..], &[2.0, 1.0][..]),
            (&[0.0, 0.0], &[1.0, 0.0]),
            (&[4.0, 4.0, 4.0], &[0.0, 2.0, 2.0]),
            (&[4.0], &[2.0]),
            (&[0.0], &[1.0]),
            (&[], &[]),
        ] {
            assert_eq!(altered(DType::F32, floats(given)), Some(floats(expected)), "{given:?}");
        }
        assert_eq!(altered(DType::F16, vec![0; 4]), Some(vec![0, 0x3c, 0, 0]));
        assert_eq!(altered(DType::Bool, vec![1, 1]), Some(vec![0, 1]));
        assert_eq!(altered(DType::I64, vec![0; 8]), Some(1_i64.to_le_bytes().to_vec()));
    }

    #[test]
    fn what_is_too_much_to_compare_is_known_before_it_is_read() {
        let nowhere = std::path::PathBuf::from("/nowhere");
        let payload = Payload::File { path: nowhere, offset: 0, size_bytes: PROBE_BYTES_MAX, owner: None };
        let mut inputs = given(&[]);
        inputs[0].pieces = vec![payload.clone()];
        let output = Tensor { name: "y".to_owned(), dtype: DType::U8, shape: vec![1], payload };
        assert_eq!(bytes_of(&inputs, &[]), PROBE_BYTES_MAX);
        assert_eq!(bytes_of(&inputs, &[vec![output]]), 2 * PROBE_BYTES_MAX);
    }
}
