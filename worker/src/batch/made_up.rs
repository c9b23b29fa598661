//! Made-up items, for comparisons of items that the model answers all alike: rows that changed places would not show
//! among equal ones, nor that a row looks at its neighbours.

use proto_msgs::{DType, ErrorCode, Failure};

use super::{
    Calls,
    sample::{Known, PROBE_BYTES_MAX, bytes_of, given},
};
use crate::{data::payload::Payload, runners::fit::Fitted, tools::blocking};

/// Most bytes of an item's inputs that are copied into memory to make a different item from them.
const OTHER_BYTES_MAX: u64 = 16 << 20;

/// Ways to make an item from another one. Each costs one single run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// Shifts the elements by one and halves them. A model that takes the original takes this too, be it pixels or
    /// words, and one that looks at all rows at once, for their maximum or their sum, shows it. If all elements are
    /// equal, as in a black picture, one is changed: a model may ignore a mere scale.
    Halved,
    /// So many times as much. Two steps of a ladder above a model's threshold show that it moves with the largest row.
    /// Floats only: words have a last number.
    Enlarged(u16),
    /// Its negative: of floats, bytes and truth values.
    Negated,
    /// Zero everywhere.
    Blank,
}

/// The changes, those first that show most: few rows go into one call.
pub(super) const CHANGES: [Change; 6] =
    [Change::Halved, Change::Enlarged(512), Change::Enlarged(64), Change::Negated, Change::Enlarged(8), Change::Blank];

/// `None` if the change suits none of the item's inputs, or the item is too large.
pub(super) async fn make(
    calls: &mut Calls<'_, '_>,
    fitted: &[Fitted],
    row: &Known,
    change: Change,
) -> Result<Option<Known>, Failure> {
    let mut given = given(fitted, &[row]);
    if bytes_of(&given, &[]) > OTHER_BYTES_MAX {
        return Ok(None);
    }
    let mut is_other = false;
    for input in &mut given {
        let bytes = read_all(input.pieces.clone()).await?;
        if let Some(bytes) = changed(input.dtype, bytes, change) {
            input.pieces = vec![Payload::Memory(bytes.into())];
            is_other = true;
        }
    }
    if !is_other {
        return Ok(None);
    }
    let inputs = given.iter().map(|input| input.pieces.clone()).collect();
    let outputs = calls.call(given, &mut 0).await?;
    let is_small = bytes_of(&[], std::slice::from_ref(&outputs)) <= PROBE_BYTES_MAX;
    Ok(is_small.then_some(Known { inputs, outputs }))
}

async fn read_all(pieces: Vec<Payload>) -> Result<Vec<u8>, Failure> {
    let lost = |error| Failure::new(ErrorCode::WorkerLost, format!("an item cannot be read again: {error}"));
    let read = move || pieces.iter().map(Payload::read).collect::<std::io::Result<Vec<_>>>();
    let pieces = blocking(move || read().map_err(lost)).await?;
    Ok(pieces.concat())
}

/// An item's bytes after this change; `None` if there is none for the type.
fn changed(dtype: DType, mut bytes: Vec<u8>, change: Change) -> Option<Vec<u8>> {
    macro_rules! each {
        ($type:ty, $change:expr) => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|chunk| {
                let change = $change;
                *chunk = change(<$type>::from_le_bytes(*chunk)).to_le_bytes();
            })
        };
    }
    match (change, dtype) {
        (_, DType::Bytes) => return None,
        (Change::Halved, _) => return halved(dtype, bytes),
        (Change::Blank, _) => bytes.fill(0),
        (Change::Enlarged(times), DType::F32) => each!(f32, |x: f32| x * f32::from(times)),
        (Change::Enlarged(times), DType::F64) => each!(f64, |x: f64| x * f64::from(times)),
        (Change::Negated, DType::F32) => each!(f32, |x: f32| -x),
        (Change::Negated, DType::F64) => each!(f64, |x: f64| -x),
        (Change::Negated, DType::F16 | DType::BF16) => each!(u16, |x: u16| x ^ 0x8000),
        (Change::Negated, DType::U8) => each!(u8, |x: u8| !x),
        (Change::Negated, DType::Bool) => each!(u8, |x: u8| u8::from(x == 0)),
        (Change::Enlarged(_) | Change::Negated, _) => return None,
    }
    Some(bytes)
}

/// [`Change::Halved`]; `None` without an element size.
fn halved(dtype: DType, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(changed(DType::F32, floats(given), Change::Halved), Some(floats(expected)), "{given:?}");
        }
        assert_eq!(changed(DType::F16, vec![0; 4], Change::Halved), Some(vec![0, 0x3c, 0, 0]));
        assert_eq!(changed(DType::Bool, vec![1, 1], Change::Halved), Some(vec![0, 1]));
        assert_eq!(changed(DType::I64, vec![0; 8], Change::Halved), Some(1_i64.to_le_bytes().to_vec()));
    }

    #[test]
    fn words_are_never_larger_than_a_model_knows() {
        let bytes = |values: [i32; 2]| values.map(i32::to_le_bytes).concat();
        for change in [Change::Enlarged(8), Change::Negated] {
            assert_eq!(changed(DType::I32, bytes([5, 7]), change), None, "{change:?}");
        }
        assert_eq!(changed(DType::I32, bytes([5, 7]), Change::Blank), Some(bytes([0, 0])));
        assert_eq!(changed(DType::U8, vec![0, 255, 3], Change::Negated), Some(vec![255, 0, 252]));
        assert_eq!(changed(DType::Bool, vec![0, 1], Change::Negated), Some(vec![1, 0]));
        assert_eq!(changed(DType::F16, vec![0, 0x3c], Change::Negated), Some(vec![0, 0xbc]));
    }
}
