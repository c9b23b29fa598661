//! Compares the outputs of two runs, for probes that decide whether rows of several tasks may run together.
//!
//! Integers must be equal. Floats may differ by what another order of a runtime's additions causes: the difference
//! depends on the largest value of the tensor, not on each value.

use std::{io, ops::Range};

use proto_msgs::DType;

use crate::data::payload::Payload;

/// Allowed share of the largest value: ten times what was seen between runtimes, a tenth of what a wrong row causes.
///
/// Not more, although it keeps some models apart without need: magika.onnx in ONNX Runtime 1.31 changes a row by up to
/// 3e-4 in a packed call, whatever the other rows, because another kernel runs it. Two files of one kind give rows that
/// differ by 6e-5 (median of 239 pairs), so a limit that forgave the one could not see the other swap places.
const F32_RELATIVE: f64 = 2e-5;

/// Allowed share of the largest value for half precision, which has three digits.
const F16_RELATIVE: f64 = 2e-3;

/// Allowed share of the largest value for brain floats, which have two digits.
const BF16_RELATIVE: f64 = 2e-2;

/// Allowed absolute difference, for tensors whose values are all close to zero.
const ABSOLUTE: f64 = 1e-6;

/// Bytes of each tensor in memory at a time: tensors may be larger. A multiple of every element's size.
const BLOCK_BYTES: u64 = 1 << 20;

/// Whether two tensors of this type are equal except for rounding. Blocks if they are in files.
pub(crate) fn alike(dtype: DType, reference: &Payload, other: &Payload) -> io::Result<bool> {
    if reference.size_bytes() != other.size_bytes() {
        return Ok(false);
    }
    if same_bytes(reference, other)? {
        return Ok(true);
    }
    match dtype {
        DType::F32 => close::<4>(reference, other, F32_RELATIVE, |bytes| f32::from_le_bytes(bytes).into()),
        DType::F64 => close::<8>(reference, other, F32_RELATIVE, f64::from_le_bytes),
        DType::F16 => close::<2>(reference, other, F16_RELATIVE, |bytes| half(u16::from_le_bytes(bytes))),
        DType::BF16 => close::<2>(reference, other, BF16_RELATIVE, |bytes| {
            f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16).into()
        }),
        _ => Ok(false),
    }
}

/// Whether two payloads have the same bytes. Blocks if they are in files.
pub(crate) fn same_bytes(one: &Payload, other: &Payload) -> io::Result<bool> {
    if one.size_bytes() != other.size_bytes() {
        return Ok(false);
    }
    for block in blocks(one) {
        if one.slice(block.clone()).read()? != other.slice(block).read()? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn blocks(payload: &Payload) -> impl Iterator<Item = Range<u64>> + use<> {
    (0..payload.size_bytes()).step_by(BLOCK_BYTES as usize).map(|start| start..start + BLOCK_BYTES)
}

/// Whether floats of equally large tensors are close. Reads `reference` twice: what is allowed depends on all of it.
fn close<const N: usize>(
    reference: &Payload,
    other: &Payload,
    relative: f64,
    value: impl Fn([u8; N]) -> f64,
) -> io::Result<bool> {
    let mut largest = 0.0_f64;
    for block in blocks(reference) {
        let values = reference.slice(block).read()?;
        let sizes = values.as_chunks::<N>().0.iter().map(|chunk| value(*chunk).abs());
        largest = sizes.filter(|size| size.is_finite()).fold(largest, f64::max);
    }
    let allowed = relative * largest + ABSOLUTE;
    for block in blocks(reference) {
        let (reference, other) = (reference.slice(block.clone()).read()?, other.slice(block).read()?);
        let mut pairs = reference.as_chunks::<N>().0.iter().zip(other.as_chunks::<N>().0);
        let all_close = pairs.all(|(a, b)| {
            let (a, b) = (value(*a), value(*b));
            a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= allowed
        });
        if !all_close {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The value of an IEEE 754 half-precision float.
fn half(bits: u16) -> f64 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
    sign * match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * 2_f64.powi(exponent - 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alike(dtype: DType, reference: &[u8], other: &[u8]) -> bool {
        let memory = |bytes: &[u8]| Payload::Memory(bytes.to_vec().into());
        super::alike(dtype, &memory(reference), &memory(other)).expect("memory")
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn rounding_is_forgiven_in_proportion_to_the_largest_value() {
        let one = floats(&[100.0, 0.001, f32::NAN]);
        assert!(alike(DType::F32, &one, &floats(&[100.001, 0.0015, f32::NAN])));
        assert!(!alike(DType::F32, &one, &floats(&[100.01, 0.001, f32::NAN])));
        assert!(!alike(DType::F32, &one, &floats(&[100.0, 0.001, 0.0])));
        assert!(!alike(DType::F32, &one, &floats(&[100.0, 0.001])));
        assert!(!alike(DType::F32, &floats(&[f32::INFINITY]), &floats(&[1.0])));
    }

    #[test]
    fn rows_of_one_kind_are_told_apart() {
        // Differences between two files of one kind, and between single and packed runs of one file, with magika.onnx.
        let (one, other, in_company) = ([0.999_90, 0.000_02], [0.999_84, 0.000_08], [0.999_62, 0.000_10]);
        for different in [other, in_company] {
            assert!(!alike(DType::F32, &floats(&one), &floats(&different)), "{different:?}");
        }
    }

    #[test]
    fn what_is_larger_than_a_block_is_compared_to_its_end() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let file = |name: &str, last: &[f32]| {
            let mut values = vec![0.001; BLOCK_BYTES as usize / 4];
            values.extend_from_slice(last);
            let (path, bytes) = (home.path().join(name), floats(&values));
            std::fs::write(&path, &bytes).expect("writing");
            Payload::File { path, offset: 0, size_bytes: bytes.len() as u64, owner: None }
        };
        let reference = file("reference", &[100.0, 2.0]);
        for (name, last, expected) in [("same", 2.0, true), ("rounded", 2.0005, true), ("other", 2.01, false)] {
            let other = file(name, &[100.0, last]);
            assert_eq!(super::alike(DType::F32, &reference, &other).expect("readable"), expected, "{name}");
            assert_eq!(same_bytes(&reference, &other).expect("readable"), name == "same");
        }
    }

    #[test]
    fn integers_are_the_same_or_not() {
        assert!(alike(DType::I32, &[1, 0, 0, 0], &[1, 0, 0, 0]));
        assert!(!alike(DType::I32, &[1, 0, 0, 0], &[2, 0, 0, 0]));
        assert!(!alike(DType::Bool, &[1], &[0]));
    }

    #[test]
    fn short_floats_are_read_as_what_they_are() {
        assert_eq!([0x3c00, 0xc000, 0x0001, 0x7bff].map(half), [1.0, -2.0, 2_f64.powi(-24), 65504.0]);
        assert!(half(0x7e00).is_nan() && half(0xfc00) == f64::NEG_INFINITY);
        assert!(alike(DType::F16, &0x3c00_u16.to_le_bytes(), &0x3c01_u16.to_le_bytes()));
        assert!(!alike(DType::F16, &0x3c00_u16.to_le_bytes(), &0x4000_u16.to_le_bytes()));
        assert!(alike(DType::BF16, &0x3f80_u16.to_le_bytes(), &0x3f81_u16.to_le_bytes()));
        assert!(!alike(DType::BF16, &0x3f80_u16.to_le_bytes(), &0xbf80_u16.to_le_bytes()));
    }
}
