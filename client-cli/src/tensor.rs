//! A tensor in memory, and the conversion of numbers to and from it. Owns the bytes of each element type. Never: files,
//! shapes of models.

use bytes::Bytes;
use proto_msgs::DType;

/// Elements in row-major order, little-endian.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) data: Bytes,
}

/// A number from JSON or a pixel. Integers stay exact beyond 2^53.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Number {
    Int(i128),
    Real(f64),
}

/// A number that an element type cannot hold.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{number} does not fit {dtype}")]
pub(crate) struct Misfit {
    number: String,
    dtype: DType,
}

/// Number of elements of a shape; `None` if it is too large to address.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1_u64, |product, dimension| product.checked_mul(*dimension))
}

impl Number {
    fn real(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Real(value) => value,
        }
    }

    /// The number as an integer, if it is one.
    fn int(self) -> Option<i128> {
        match self {
            Self::Int(value) => Some(value),
            // Beyond this limit an `f64` is no exact integer for the user either.
            Self::Real(value) => (value.fract() == 0.0 && value.abs() < 1e18).then_some(value as i128),
        }
    }

    /// Appends the number as an element of this type.
    ///
    /// # Errors
    /// If the type cannot hold it: out of range, also if it would become infinite, or a fraction for an integer type.
    pub(crate) fn push(self, dtype: DType, out: &mut Vec<u8>) -> Result<(), Misfit> {
        let misfit = || Misfit { number: self.to_string(), dtype };
        macro_rules! integer {
            ($type:ty) => {
                out.extend(<$type>::try_from(self.int().ok_or_else(misfit)?).map_err(|_| misfit())?.to_le_bytes())
            };
        }
        let real = self.real();
        let in_range =
            |nearest: f32| if nearest.is_infinite() && real.is_finite() { Err(misfit()) } else { Ok(nearest) };
        match dtype {
            DType::F64 => out.extend(real.to_le_bytes()),
            DType::F32 => out.extend(in_range(real as f32)?.to_le_bytes()),
            DType::F16 => {
                let half = f16_from_f32(real as f32);
                in_range(f32_from_f16(half))?;
                out.extend(half.to_le_bytes());
            }
            DType::BF16 => {
                let half = bf16_from_f32(real as f32);
                in_range(f32_from_bf16(half))?;
                out.extend(half.to_le_bytes());
            }
            DType::Bool => match self.int() {
                Some(bit @ (0 | 1)) => out.push(bit as u8),
                _ => return Err(misfit()),
            },
            DType::U8 => integer!(u8),
            DType::U16 => integer!(u16),
            DType::U32 => integer!(u32),
            DType::U64 => integer!(u64),
            DType::I8 => integer!(i8),
            DType::I16 => integer!(i16),
            DType::I32 => integer!(i32),
            DType::I64 => integer!(i64),
            DType::Bytes => return Err(misfit()),
        }
        Ok(())
    }

    /// Appends the nearest element of this type: rounded, and clamped to its range.
    pub(crate) fn push_nearest(self, dtype: DType, out: &mut Vec<u8>) {
        let (low, high) = range(dtype);
        let number = match self {
            Self::Real(value) if low != f64::NEG_INFINITY => Self::Int(value.round().clamp(low, high) as i128),
            number => number,
        };
        if number.push(dtype, out).is_ok() {
            return;
        }
        let edge = match number.real() {
            // Out of the range of a real type, which has infinities.
            real if low == f64::NEG_INFINITY => Self::Real(f64::INFINITY.copysign(real)),
            real if real.is_nan() => Self::Int(0),
            real => Self::Int(real.clamp(low, high) as i128),
        };
        let pushed = edge.push(dtype, out);
        debug_assert!(pushed.is_ok() || dtype == DType::Bytes, "an edge of the range is inside");
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            // The largest ones would have hundreds of digits.
            Self::Real(value) if value.abs() >= 1e18 => write!(f, "{value:e}"),
            Self::Real(value) => value.fmt(f),
        }
    }
}

/// Smallest and largest value of an integer type; infinite for other types.
fn range(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::Bool => (0.0, 1.0),
        DType::U8 => (0.0, f64::from(u8::MAX)),
        DType::U16 => (0.0, f64::from(u16::MAX)),
        DType::U32 => (0.0, f64::from(u32::MAX)),
        // The largest `f64` below the limit, so that the conversion stays in range.
        DType::U64 => (0.0, 18_446_744_073_709_549_568.0),
        DType::I8 => (f64::from(i8::MIN), f64::from(i8::MAX)),
        DType::I16 => (f64::from(i16::MIN), f64::from(i16::MAX)),
        DType::I32 => (f64::from(i32::MIN), f64::from(i32::MAX)),
        DType::I64 => (-9_223_372_036_854_775_808.0, 9_223_372_036_854_774_784.0),
        DType::F16 | DType::F32 | DType::F64 | DType::BF16 | DType::Bytes => (f64::NEG_INFINITY, f64::INFINITY),
    }
}

/// The elements of these bytes as numbers. Empty for strings; an incomplete last element is skipped.
pub(crate) fn numbers(dtype: DType, data: &[u8]) -> impl Iterator<Item = Number> + '_ {
    let size_bytes = dtype.size_bytes().unwrap_or(usize::MAX);
    data.chunks_exact(size_bytes).map(move |element| number(dtype, element))
}

fn number(dtype: DType, element: &[u8]) -> Number {
    // `chunks_exact` returns slices of exactly the type's size.
    fn array<const N: usize>(element: &[u8]) -> [u8; N] {
        element.try_into().expect("invariant: an element has its type's size")
    }
    match dtype {
        DType::Bool | DType::U8 => Number::Int(element[0].into()),
        DType::U16 => Number::Int(u16::from_le_bytes(array(element)).into()),
        DType::U32 => Number::Int(u32::from_le_bytes(array(element)).into()),
        DType::U64 => Number::Int(u64::from_le_bytes(array(element)).into()),
        DType::I8 => Number::Int(i8::from_le_bytes(array(element)).into()),
        DType::I16 => Number::Int(i16::from_le_bytes(array(element)).into()),
        DType::I32 => Number::Int(i32::from_le_bytes(array(element)).into()),
        DType::I64 => Number::Int(i64::from_le_bytes(array(element)).into()),
        DType::F16 => Number::Real(f32_from_f16(u16::from_le_bytes(array(element))).into()),
        DType::BF16 => Number::Real(f32_from_bf16(u16::from_le_bytes(array(element))).into()),
        DType::F32 => Number::Real(f32::from_le_bytes(array(element)).into()),
        DType::F64 => Number::Real(f64::from_le_bytes(array(element))),
        DType::Bytes => Number::Int(0),
    }
}

/// A value as the shortest exact JSON number: `0.1`, not the `f64` nearest to that `f32`.
pub(crate) fn to_json(number: Number, dtype: DType) -> serde_json::Value {
    match number {
        Number::Int(value) if dtype == DType::Bool => (value != 0).into(),
        Number::Int(value) => i64::try_from(value).map_or_else(|_| (value as u64).into(), Into::into),
        Number::Real(value) if dtype == DType::F64 => value.into(),
        // JSON has no infinity: `null`, as is usual.
        Number::Real(value) => (value as f32).to_string().parse::<f64>().map_or(serde_json::Value::Null, Into::into),
    }
}

/// An infinity, or what is not a number, as people write it.
pub(crate) fn name_of_odd(value: f64) -> &'static str {
    match value {
        f64::INFINITY => "inf",
        f64::NEG_INFINITY => "-inf",
        _ => "NaN",
    }
}

/// The strings of a `BYTES` tensor; `None` if the data is cut off.
pub(crate) fn strings(mut data: &[u8]) -> Option<Vec<&[u8]>> {
    let mut all = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        all.push(rest.get(..length)?);
        data = &rest[length..];
    }
    data.is_empty().then_some(all)
}

/// Appends a string as an element of a `BYTES` tensor.
pub(crate) fn push_string(text: &[u8], out: &mut Vec<u8>) {
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text);
}

/// Converts half precision to single precision, exactly.
fn f32_from_f16(half: u16) -> f32 {
    let sign = if half & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (i32::from(half >> 10 & 0x1f), f32::from(half & 0x3ff));
    match exponent {
        0 => sign * fraction * 2_f32.powi(-24),
        0x1f if fraction == 0.0 => sign * f32::INFINITY,
        0x1f => f32::NAN,
        _ => sign * (1.0 + fraction / 1024.0) * 2_f32.powi(exponent - 15),
    }
}

/// Converts single precision to half precision: to nearest, ties to even.
fn f16_from_f32(value: f32) -> u16 {
    let sign = ((value.to_bits() >> 16) & 0x8000) as u16;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7e00;
    }
    // Infinite from halfway between the largest half and the next power of two.
    if magnitude >= 65520.0 {
        return sign | 0x7c00;
    }
    // The step between halves near the value; below 2^-14 it stays constant.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-14);
    // Exact: a number far from `f32`'s own limits is divided by a power of two.
    let steps = (f64::from(magnitude) / 2_f64.powi(exponent - 10)).round_ties_even() as u16;
    // 1024 steps are the implied one of the next exponent, so the addition carries by itself.
    sign | (((exponent + 14) as u16) << 10).wrapping_add(steps)
}

/// Converts brain float to single precision, exactly.
fn f32_from_bf16(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// Converts single precision to brain float: to nearest, ties to even.
fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(number: Number, dtype: DType) -> Result<Vec<u8>, Misfit> {
        let mut out = Vec::new();
        number.push(dtype, &mut out).map(|()| out)
    }

    #[test]
    fn every_half_survives_the_way_there_and_back() {
        for half in 0..=u16::MAX {
            let single = f32_from_f16(half);
            if single.is_nan() {
                assert!(f32_from_f16(f16_from_f32(single)).is_nan());
            } else {
                assert_eq!(f16_from_f32(single), half, "{single}");
            }
        }
    }

    #[test]
    fn halves_and_brain_floats_are_rounded_to_the_nearest_even() {
        // Expected values from numpy.float16 and from the first 16 bits of an f32.
        let halves = [(1.0, 0x3c00), (0.1, 0x2e66), (65504.0, 0x7bff), (65519.9, 0x7bff), (65520.0, 0x7c00), (6e-8, 1)];
        for (value, half) in halves {
            assert_eq!(f16_from_f32(value), half, "{value}");
        }
        assert_eq!(f16_from_f32(2049.0), f16_from_f32(2048.0), "a tie goes to the even one");
        assert_eq!(f16_from_f32(2051.0), f16_from_f32(2052.0), "a tie goes to the even one");
        assert_eq!((bf16_from_f32(1.0), bf16_from_f32(-2.5)), (0x3f80, 0xc020));
        assert_eq!(bf16_from_f32(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bf16_from_f32(f32::from_bits(0x3f81_8000)), 0x3f82);
    }

    #[test]
    fn a_number_that_does_not_fit_is_refused_by_name() {
        assert_eq!(bytes_of(Number::Int(255), DType::U8).unwrap(), [255]);
        assert_eq!(bytes_of(Number::Real(3.0), DType::I32).unwrap(), [3, 0, 0, 0]);
        let error = |number, dtype| bytes_of(number, dtype).unwrap_err().to_string();
        assert_eq!(error(Number::Int(256), DType::U8), "256 does not fit UINT8");
        assert_eq!(error(Number::Real(0.5), DType::I64), "0.5 does not fit INT64");
        assert_eq!(error(Number::Int(2), DType::Bool), "2 does not fit BOOL");
        // The largest numbers, and the first that would be rounded to infinity.
        assert_eq!(bytes_of(Number::Real(3.4028235e38), DType::F32).unwrap(), f32::MAX.to_le_bytes());
        assert_eq!(error(Number::Real(-1e39), DType::F32), "-1e39 does not fit FP32");
        assert_eq!(bytes_of(Number::Int(65_519), DType::F16).unwrap(), 0x7bff_u16.to_le_bytes());
        assert_eq!(error(Number::Int(65_520), DType::F16), "65520 does not fit FP16");
        assert_eq!(error(Number::Real(3.4e38), DType::BF16), "3.4e38 does not fit BF16");
        assert_eq!(bytes_of(Number::Real(f64::INFINITY), DType::F32).unwrap(), f32::INFINITY.to_le_bytes());
    }

    #[test]
    fn the_nearest_element_is_rounded_and_cut() {
        let nearest = |value, dtype| {
            let mut out = Vec::new();
            Number::Real(value).push_nearest(dtype, &mut out);
            numbers(dtype, &out).next().unwrap()
        };
        assert_eq!(nearest(300.2, DType::U8), Number::Int(255));
        assert_eq!(nearest(-3.6, DType::I8), Number::Int(-4));
        assert_eq!(nearest(1e30, DType::U64), Number::Int(18_446_744_073_709_549_568));
        assert_eq!(nearest(f64::NAN, DType::I16), Number::Int(0));
        assert_eq!(nearest(0.25, DType::F32), Number::Real(0.25));
        assert_eq!(nearest(-1e39, DType::F32), Number::Real(f64::NEG_INFINITY));
        assert_eq!(nearest(7e4, DType::F16), Number::Real(f64::INFINITY));
    }

    #[test]
    fn strings_come_back_and_cut_ones_do_not() {
        let mut data = Vec::new();
        push_string(b"one", &mut data);
        push_string(b"", &mut data);
        assert_eq!(strings(&data).unwrap(), [&b"one"[..], b""]);
        assert_eq!(strings(&data[..5]), None);
    }

    #[test]
    fn json_says_a_single_as_people_write_it() {
        assert_eq!(to_json(Number::Real(f64::from(0.1_f32)), DType::F32).to_string(), "0.1");
        assert_eq!(to_json(Number::Int(i128::from(u64::MAX)), DType::U64).to_string(), "18446744073709551615");
        assert_eq!(to_json(Number::Real(f64::INFINITY), DType::F32).to_string(), "null");
    }
}
