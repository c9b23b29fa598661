//! `.npy` files, so that the runner's outputs can be compared with another runtime's. Owns version 1 and 2 headers of
//! dense little-endian arrays of numbers; never strings, objects or Fortran order.

use anyhow::{Context, Result, bail, ensure};
use proto_msgs::DType;

use crate::tensor::{AlignedBytes, Tensor, element_count};

const MAGIC: &[u8] = b"\x93NUMPY";

/// numpy's names of the element types that it shares with the mesh.
const TYPES: [(&str, DType); 12] = [
    ("|b1", DType::Bool),
    ("|u1", DType::U8),
    ("<u2", DType::U16),
    ("<u4", DType::U32),
    ("<u8", DType::U64),
    ("|i1", DType::I8),
    ("<i2", DType::I16),
    ("<i4", DType::I32),
    ("<i8", DType::I64),
    ("<f2", DType::F16),
    ("<f4", DType::F32),
    ("<f8", DType::F64),
];

/// Parses an array from a file.
pub(crate) fn parse(file: &[u8]) -> Result<Tensor> {
    let rest = file.strip_prefix(MAGIC).context("not a .npy file")?;
    let (version, rest) = rest.split_first_chunk::<2>().context("the header is cut off")?;
    let (len, rest) = match version[0] {
        1 => {
            let (len, rest) = rest.split_first_chunk::<2>().context("the header is cut off")?;
            (u32::from(u16::from_le_bytes(*len)), rest)
        }
        2 => {
            let (len, rest) = rest.split_first_chunk::<4>().context("the header is cut off")?;
            (u32::from_le_bytes(*len), rest)
        }
        other => bail!("version {other} of .npy is not known"),
    };
    let (header, data) = rest.split_at_checked(len as usize).context("the header is cut off")?;
    let header = std::str::from_utf8(header).context("the header is not text")?;

    let kind = quoted(header, "'descr':").context("the header names no type")?;
    let dtype = TYPES.iter().find(|(name, _)| *name == kind);
    let (_, dtype) = *dtype.with_context(|| format!("a tensor cannot have type {kind}"))?;
    let order = header.split_once("'fortran_order':").map(|(_, rest)| rest.trim_start());
    ensure!(order.is_some_and(|order| order.starts_with("False")), "only C order is read");
    let shape = shape(header).context("the header has no shape")?;

    let count = element_count(&shape).context("the shape is too large")?;
    let bytes = dtype.size_bytes().and_then(|element| element.checked_mul(count));
    ensure!(bytes == Some(data.len()), "{} bytes of data do not fit shape {shape:?}", data.len());
    Ok(Tensor { dtype, shape, data: AlignedBytes::copied(data).into() })
}

/// The array as a file; `None` for types that numpy does not have.
pub(crate) fn format(tensor: &Tensor) -> Option<Vec<u8>> {
    let (kind, _) = TYPES.iter().find(|(_, dtype)| *dtype == tensor.dtype)?;
    let dimensions: String = tensor.shape.iter().map(|dimension| format!("{dimension}, ")).collect();
    let mut header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({dimensions}), }}");
    // The data begins at a multiple of 64, after a line feed.
    while !(MAGIC.len() + 4 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let len = u16::try_from(header.len()).expect("eight dimensions make a short header");
    let mut file = Vec::with_capacity(MAGIC.len() + 4 + header.len() + tensor.data.len());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&[1, 0]);
    file.extend_from_slice(&len.to_le_bytes());
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&tensor.data);
    Some(file)
}

fn quoted<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    header.split_once(key)?.1.split('\'').nth(1)
}

fn shape(header: &str) -> Option<Vec<i64>> {
    let (_, rest) = header.split_once("'shape':")?;
    let (_, rest) = rest.split_once('(')?;
    let (dimensions, _) = rest.split_once(')')?;
    let dimensions = dimensions.split(',').map(str::trim).filter(|dimension| !dimension.is_empty());
    dimensions.map(|dimension| dimension.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for shape in [vec![], vec![4], vec![2, 2]] {
            let bytes = 4 * element_count(&shape).unwrap();
            let tensor = Tensor { dtype: DType::I32, shape, data: (0..bytes as u8).collect::<Vec<_>>().into() };
            let file = format(&tensor).unwrap();
            assert_eq!((file.len() - bytes) % 64, 0);
            let read = parse(&file).unwrap();
            assert_eq!((read.dtype, &read.shape, &read.data), (tensor.dtype, &tensor.shape, &tensor.data));
        }
    }

    #[test]
    fn a_cut_file_is_refused() {
        let file = format(&Tensor { dtype: DType::F32, shape: vec![2], data: vec![0; 8].into() });
        let file = file.unwrap();
        for cut in [0, 5, 7, 9, 40, file.len() - 1] {
            assert!(parse(&file[..cut]).is_err(), "cut after {cut} bytes");
        }
    }
}
