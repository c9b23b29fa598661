//! Owns the comparison of two tensors within the tolerance of the ONNX project's tests.

use proto_msgs::DType;

use crate::tensor::Tensor;

/// |got - expected| <= `ABSOLUTE` + `RELATIVE` * |expected|, as in the project's own runner.
const RELATIVE: f64 = 1e-3;
const ABSOLUTE: f64 = 1e-7;

/// Whether a runtime may return `got` if a test expects `expected`.
///
/// # Errors
/// The first difference, in words.
pub(super) fn equal(got: &Tensor, expected: &Tensor) -> Result<(), String> {
    if (got.dtype, &got.shape) != (expected.dtype, &expected.shape) {
        return Err(format!("expected {} {:?}, got {} {:?}", expected.dtype, expected.shape, got.dtype, got.shape));
    }
    let (Some(got_numbers), Some(expected_numbers)) = (floats(got), floats(expected)) else {
        return if got.data == expected.data { Ok(()) } else { Err("the elements differ".to_owned()) };
    };
    for (index, (got, expected)) in got_numbers.into_iter().zip(expected_numbers).enumerate() {
        let close = (got - expected).abs() <= ABSOLUTE + RELATIVE * expected.abs();
        if !(close || got == expected || (got.is_nan() && expected.is_nan())) {
            return Err(format!("element {index}: expected {expected}, got {got}"));
        }
    }
    Ok(())
}

/// The elements of a tensor of floating-point numbers; `None` for other types, which must be equal.
fn floats(tensor: &Tensor) -> Option<Vec<f64>> {
    let words = |to_bits: fn([u8; 2]) -> f64| tensor.data.as_chunks().0.iter().map(|bytes| to_bits(*bytes)).collect();
    Some(match tensor.dtype {
        DType::F16 => words(|bytes| half(u16::from_le_bytes(bytes))),
        DType::BF16 => words(|bytes| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))),
        DType::F32 => tensor.data.as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect(),
        DType::F64 => tensor.data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        _ => return None,
    })
}

/// The value of an IEEE 754 half: 1 sign, 5 exponent, 10 fraction bits.
fn half(bits: u16) -> f64 {
    let fraction = f64::from(bits & 0x3ff);
    let magnitude = match bits >> 10 & 0x1f {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        exponent => (1024.0 + fraction) * 2_f64.powi(i32::from(exponent) - 25),
    };
    if bits >> 15 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(numbers: &[f32]) -> Tensor {
        Tensor {
            dtype: DType::F32,
            shape: vec![numbers.len() as i64],
            data: numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>().into(),
        }
    }

    #[test]
    fn the_tolerance_is_relative_and_nan_equals_nan() {
        assert_eq!(equal(&tensor(&[1000.5, f32::NAN]), &tensor(&[1000.0, f32::NAN])), Ok(()));
        assert!(equal(&tensor(&[1002.0]), &tensor(&[1000.0])).is_err());
        assert!(equal(&tensor(&[f32::NAN]), &tensor(&[1.0])).is_err());
        assert!(equal(&tensor(&[1.0]), &tensor(&[1.0, 1.0])).is_err(), "shapes differ");
        assert_eq!(equal(&tensor(&[f32::INFINITY]), &tensor(&[f32::INFINITY])), Ok(()));
    }

    #[test]
    fn halves_are_read_as_they_are() {
        for (bits, number) in [(0x3c00, 1.0), (0xc000, -2.0), (0x7bff, 65504.0), (0x0001, 2_f64.powi(-24))] {
            assert_eq!(half(bits), number);
        }
        assert!(half(0x7e00).is_nan());
        assert_eq!(half(0xfc00), f64::NEG_INFINITY);
    }
}
