//! NumPy's files: reads and writes `.npy`, reads `.npz`. Owns their headers and limits. Never: a tensor's use.
//!
//! Files are not trusted: headers are parsed piece by piece, a length counts only if the file is that long.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    path::Path,
};

use proto_msgs::{DType, limits};

use crate::tensor::{self, Tensor};

/// The first bytes of a `.npy` file.
pub(crate) const MAGIC: &[u8] = b"\x93NUMPY";

/// The first bytes of a `.npz` file: a ZIP archive with at least one member.
pub(crate) const ARCHIVE_MAGIC: &[u8] = b"PK\x03\x04";

/// Longest header. NumPy itself refuses longer ones in untrusted files.
const HEADER_BYTES_MAX: usize = 10_000;

/// Why a file contains no tensor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NpyError {
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("is not a .npy file")]
    NotNpy,
    #[error("has an invalid header: {0}")]
    Header(&'static str),
    #[error("holds elements of type '{0}', which the mesh does not carry")]
    Type(String),
    #[error("should hold {expected} bytes of data by its header, but holds {got}")]
    Length { expected: u64, got: u64 },
    #[error("is not a .npz archive: {0}")]
    Archive(#[from] zip::result::ZipError),
    #[error("holds {0}, which {1}")]
    Member(String, Box<Self>),
    #[error("holds {0} arrays, the limit is {max}", max = limits::TENSORS_MAX)]
    TooMany(usize),
}

/// Reads the tensor of a `.npy` file.
pub(crate) fn read(path: &Path) -> Result<Tensor, NpyError> {
    read_from(File::open(path)?)
}

/// Reads the tensors of a `.npz` file with their names, in the archive's order.
pub(crate) fn read_npz(path: &Path) -> Result<Vec<(String, Tensor)>, NpyError> {
    read_npz_from(io::BufReader::new(File::open(path)?))
}

/// [`read_npz`] of the archive's bytes.
pub(crate) fn read_npz_from(file: impl Read + Seek) -> Result<Vec<(String, Tensor)>, NpyError> {
    let mut archive = zip::ZipArchive::new(file)?;
    if archive.len() > limits::TENSORS_MAX {
        return Err(NpyError::TooMany(archive.len()));
    }
    let mut tensors = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let member = archive.by_index(index)?;
        let file_name = member.name().to_owned();
        let name = file_name.strip_suffix(".npy").unwrap_or(&file_name).to_owned();
        let tensor = read_from(member).map_err(|error| NpyError::Member(file_name, Box::new(error)))?;
        tensors.push((name, tensor));
    }
    Ok(tensors)
}

/// Reads the tensor of a `.npy` file from its bytes.
pub(crate) fn read_from(mut file: impl Read) -> Result<Tensor, NpyError> {
    let mut start = [0; 8];
    file.read_exact(&mut start).map_err(|_| NpyError::NotNpy)?;
    if !start.starts_with(MAGIC) {
        return Err(NpyError::NotNpy);
    }
    let mut length = [0; 4];
    let length_bytes = if start[6] == 1 { 2 } else { 4 };
    file.read_exact(&mut length[..length_bytes])?;
    let header_bytes = u32::from_le_bytes(length) as usize;
    if header_bytes > HEADER_BYTES_MAX {
        return Err(NpyError::Header("it is too long"));
    }
    let mut header = vec![0; header_bytes];
    file.read_exact(&mut header)?;
    let header = Header::parse(&String::from_utf8_lossy(&header))?;

    let element_bytes = header.element_bytes as u64;
    let expected = tensor::elements(&header.shape).and_then(|count| count.checked_mul(element_bytes));
    let expected =
        expected.filter(|bytes| *bytes <= limits::INPUT_BYTES_MAX).ok_or(NpyError::Header("it is too large"))?;
    let mut data = Vec::new();
    // The buffer grows with the bytes read; one byte more than expected shows that the file is too long.
    let got = file.take(expected + 1).read_to_end(&mut data)? as u64;
    if got != expected {
        return Err(NpyError::Length { expected, got });
    }
    header.tensor(data)
}

/// The content of a header.
#[derive(Debug, PartialEq)]
struct Header {
    kind: Kind,
    element_bytes: usize,
    is_big_endian: bool,
    is_fortran: bool,
    shape: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Number(DType),
    /// Fixed-width bytes.
    Ascii,
    /// Fixed-width UTF-32.
    Unicode,
}

impl Header {
    /// Parses a header such as `{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }`.
    fn parse(text: &str) -> Result<Self, NpyError> {
        let after = |key: &'static str| {
            let found = text.split_once(key).map(|(_, rest)| rest.trim_start_matches([' ', ':', '"', '\'']));
            found.ok_or(NpyError::Header("a field is missing"))
        };
        let descr = after("descr")?;
        let descr = descr.split(['\'', '"', ',']).next().unwrap_or_default();
        let is_fortran = after("fortran_order")?.starts_with("True");
        let shape = after("shape")?.trim_start_matches('(').split(')').next().unwrap_or_default();
        let dimensions = shape.split(',').map(str::trim).filter(|dimension| !dimension.is_empty());
        let shape: Vec<u64> = dimensions
            .map(|dimension| dimension.trim_end_matches('L').parse())
            .collect::<Result<_, _>>()
            .map_err(|_| NpyError::Header("its shape cannot be read"))?;
        if shape.len() > limits::RANK_MAX {
            return Err(NpyError::Header("it has too many dimensions"));
        }
        let (kind, element_bytes) = kind_of(descr).ok_or_else(|| NpyError::Type(descr.to_owned()))?;
        Ok(Self { kind, element_bytes, is_big_endian: descr.starts_with('>'), is_fortran, shape })
    }

    fn tensor(self, mut data: Vec<u8>) -> Result<Tensor, NpyError> {
        let Self { kind, element_bytes, is_big_endian, is_fortran, shape } = self;
        if is_fortran && shape.len() > 1 {
            data = row_major(&data, &shape, element_bytes);
        }
        let dtype = match kind {
            Kind::Number(dtype) => {
                if is_big_endian {
                    data.chunks_exact_mut(element_bytes).for_each(<[u8]>::reverse);
                }
                dtype
            }
            Kind::Ascii | Kind::Unicode => {
                data = strings(kind, element_bytes, is_big_endian, &data)?;
                DType::Bytes
            }
        };
        Ok(Tensor { dtype, shape, data: data.into() })
    }
}

fn kind_of(descr: &str) -> Option<(Kind, usize)> {
    let kind = descr.trim_start_matches(['<', '>', '|', '=']);
    let dtype = match kind {
        "b1" | "?" => DType::Bool,
        "u1" => DType::U8,
        "u2" => DType::U16,
        "u4" => DType::U32,
        "u8" => DType::U64,
        "i1" => DType::I8,
        "i2" => DType::I16,
        "i4" => DType::I32,
        "i8" => DType::I64,
        "f2" => DType::F16,
        "f4" => DType::F32,
        "f8" => DType::F64,
        _ => {
            let (letter, width) = kind.split_at_checked(1)?;
            // In NumPy's files even empty strings have a width of one.
            let width = width.parse::<usize>().ok().filter(|width| (1..=1 << 20).contains(width))?;
            return match letter {
                "S" => Some((Kind::Ascii, width)),
                "U" => Some((Kind::Unicode, 4 * width)),
                _ => None,
            };
        }
    };
    Some((Kind::Number(dtype), dtype.size_bytes()?))
}

/// Reorders column-major elements to row-major.
fn row_major(data: &[u8], shape: &[u64], element_bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0_u64; shape.len()];
    for _ in 0..data.len() / element_bytes {
        let column_major = index.iter().zip(shape).rev().fold(0, |at, (index, dimension)| at * dimension + index);
        let at = column_major as usize * element_bytes;
        out.extend(&data[at..at + element_bytes]);
        for (place, dimension) in index.iter_mut().zip(shape).rev() {
            *place += 1;
            if *place < *dimension {
                break;
            }
            *place = 0;
        }
    }
    out
}

fn strings(kind: Kind, element_bytes: usize, is_big_endian: bool, data: &[u8]) -> Result<Vec<u8>, NpyError> {
    let mut out = Vec::new();
    for element in data.chunks_exact(element_bytes) {
        if kind == Kind::Ascii {
            let end = element.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            tensor::push_string(&element[..end], &mut out);
            continue;
        }
        let code = |four: &[u8]| {
            let four = [four[0], four[1], four[2], four[3]];
            if is_big_endian { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) }
        };
        let text: Option<String> = element.chunks_exact(4).map(code).map(char::from_u32).collect();
        let text = text.ok_or(NpyError::Header("a string in it is not valid Unicode"))?;
        tensor::push_string(text.trim_end_matches('\0').as_bytes(), &mut out);
    }
    Ok(out)
}

/// Writes a tensor as `.npy` from a reader of its data. Brain floats, which NumPy does not know, become single
/// precision; strings become byte strings of one width.
///
/// # Errors
/// If reading or writing fails, or a string is cut off.
pub(crate) fn write(out: &mut impl Write, dtype: DType, shape: &[u64], mut data: impl Read) -> io::Result<()> {
    match dtype {
        DType::BF16 => {
            let mut bytes = Vec::new();
            data.read_to_end(&mut bytes)?;
            write_header(out, "<f4", shape)?;
            bytes.chunks_exact(2).try_for_each(|half| out.write_all(&[0, 0, half[0], half[1]]))
        }
        DType::Bytes => {
            let mut bytes = Vec::new();
            data.read_to_end(&mut bytes)?;
            let cut = || io::Error::new(io::ErrorKind::InvalidData, "a string in the output is cut");
            let strings = tensor::strings(&bytes).ok_or_else(cut)?;
            let width = strings.iter().map(|text| text.len()).max().unwrap_or(0).max(1);
            write_header(out, &format!("|S{width}"), shape)?;
            strings.iter().try_for_each(|text| {
                out.write_all(text)?;
                io::copy(&mut io::repeat(0).take((width - text.len()) as u64), out).map(drop)
            })
        }
        _ => {
            write_header(out, descr(dtype), shape)?;
            io::copy(&mut data, out).map(drop)
        }
    }
}

fn descr(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "|b1",
        DType::U8 => "|u1",
        DType::U16 => "<u2",
        DType::U32 => "<u4",
        DType::U64 => "<u8",
        DType::I8 => "|i1",
        DType::I16 => "<i2",
        DType::I32 => "<i4",
        DType::I64 => "<i8",
        DType::F16 => "<f2",
        DType::F32 | DType::BF16 => "<f4",
        DType::F64 => "<f8",
        DType::Bytes => "|S1",
    }
}

fn write_header(out: &mut impl Write, descr: &str, shape: &[u64]) -> io::Result<()> {
    let comma = if shape.len() == 1 { "," } else { "" };
    let shape = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}{comma}), }}");
    // The data begins at a multiple of 64 bytes, after a line end.
    let before = MAGIC.len() + 4;
    while !(before + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    out.write_all(MAGIC)?;
    out.write_all(&[1, 0])?;
    out.write_all(&(header.len() as u16).to_le_bytes())?;
    out.write_all(header.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let length = (header.len() as u16).to_le_bytes();
        [MAGIC, &[1, 0], &length, header.as_bytes(), data].concat()
    }

    fn of(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Result<Tensor, NpyError> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        read_from(file(&header, data).as_slice())
    }

    #[test]
    fn a_tensor_comes_back_as_it_was_written() {
        for (dtype, shape) in
            [(DType::F32, vec![2, 3]), (DType::I64, vec![3]), (DType::U8, vec![]), (DType::F16, vec![0])]
        {
            let count = tensor::elements(&shape).unwrap() as usize;
            let data: Vec<u8> = (0..count * dtype.size_bytes().unwrap()).map(|byte| byte as u8).collect();
            let mut written = Vec::new();
            write(&mut written, dtype, &shape, data.as_slice()).unwrap();
            assert_eq!((written.len() - data.len()) % 64, 0);
            let read = read_from(written.as_slice()).unwrap();
            assert_eq!(read, Tensor { dtype, shape, data: data.into() });
        }
    }

    #[test]
    fn the_header_is_the_one_that_numpy_writes() {
        let mut written = Vec::new();
        write(&mut written, DType::F32, &[2], [0; 8].as_slice()).unwrap();
        // numpy.save(numpy.zeros(2, "<f4")), byte for byte.
        let expected = [
            &b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"[..],
            &[b' '; 60],
            b"\n",
            &[0; 8],
        ]
        .concat();
        assert_eq!(String::from_utf8_lossy(&written), String::from_utf8_lossy(&expected));
    }

    #[test]
    fn column_major_and_big_endian_arrays_are_put_in_order() {
        // numpy.asfortranarray([[1, 2, 3], [4, 5, 6]])
        let tensor = of("|u1", "True", "(2, 3)", &[1, 4, 2, 5, 3, 6]).unwrap();
        assert_eq!(&tensor.data[..], [1, 2, 3, 4, 5, 6]);
        let tensor = of(">i2", "False", "(2,)", &[1, 0, 2, 0]).unwrap();
        assert_eq!((tensor.dtype, &tensor.data[..]), (DType::I16, &[0, 1, 0, 2][..]));
    }

    #[test]
    fn strings_of_either_width_become_bytes() {
        let mut expected = Vec::new();
        tensor::push_string(b"ab", &mut expected);
        tensor::push_string(b"", &mut expected);
        assert_eq!(&of("|S3", "False", "(2,)", b"ab\0\0\0\0").unwrap().data[..], expected);
        let unicode: Vec<u8> = [97, 98, 0, 0].iter().flat_map(|code: &u32| code.to_le_bytes()).collect();
        assert_eq!(&of("<U2", "False", "(2,)", &unicode).unwrap().data[..], expected);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let error = |result: Result<Tensor, NpyError>| result.unwrap_err().to_string();
        assert_eq!(error(read_from(&b"PK\x03\x04...."[..])), "is not a .npy file");
        assert_eq!(
            error(of("<c8", "False", "(1,)", &[0; 8])),
            "holds elements of type '<c8', which the mesh does not carry"
        );
        assert_eq!(
            error(of("|O", "False", "(1,)", &[0; 8])),
            "holds elements of type '|O', which the mesh does not carry"
        );
        let short = "should hold 8 bytes of data by its header, but holds 4";
        assert_eq!(error(of("<f4", "False", "(2,)", &[0; 4])), short);
        assert_eq!(
            error(of("<f4", "False", "(99999999999, 99999999999)", &[])),
            "has an invalid header: it is too large"
        );
    }

    #[test]
    fn spoilt_headers_never_panic() {
        let good = file("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }\n", &[0; 8]);
        for at in 0..good.len() {
            for value in [0, 1, b'\'', b'(', b'9', 255] {
                let mut spoilt = good.clone();
                spoilt[at] = value;
                let _ = read_from(spoilt.as_slice());
                let _ = read_from(&spoilt[..at]);
            }
        }
    }
}
