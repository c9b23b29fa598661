//! NumPy's `.npy` files, as far as the tests need them.

use std::{fs, path::Path};

/// The array of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Element type as NumPy spells it, without byte order: `f4`, `i8`, …
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements, little endian, row-major.
    pub bytes: Vec<u8>,
}

impl Array {
    /// An array of 32-bit floats.
    pub fn of_f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: "f4".into(), shape: shape.to_vec(), bytes }
    }

    /// An array of 64-bit integers.
    pub fn of_i64(shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: "i8".into(), shape: shape.to_vec(), bytes }
    }

    /// Reads a file.
    ///
    /// # Panics
    /// If it is not a file that NumPy would write on a little-endian machine.
    pub fn read(path: &Path) -> Self {
        let file = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(file.starts_with(b"\x93NUMPY\x01"), "{} is not a .npy file of version 1", path.display());
        let header_bytes = usize::from(u16::from_le_bytes([file[8], file[9]]));
        let header = String::from_utf8_lossy(&file[10..10 + header_bytes]).into_owned();
        let between = |from: &str, to: &str| {
            let rest = header.split_once(from).unwrap_or_else(|| panic!("{from} is missing in {header}")).1;
            rest.split_once(to).unwrap_or_else(|| panic!("{to} is missing in {header}")).0.to_owned()
        };
        let descr = between("'descr': '", "'");
        assert!(!descr.starts_with('>') && header.contains("'fortran_order': False"), "{header}");
        let shape = between("'shape': (", ")");
        let shape = shape.split(',').filter_map(|dim| dim.trim().parse().ok()).collect();
        Self { dtype: descr[1..].to_owned(), shape, bytes: file[10 + header_bytes..].to_vec() }
    }

    /// Writes a file.
    ///
    /// # Panics
    /// If the folder cannot be written.
    pub fn write(&self, path: &Path) {
        fs::write(path, self.to_bytes()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// The array as the content of a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let shape: String = self.shape.iter().map(|dim| format!("{dim}, ")).collect();
        let mut header =
            format!("{{'descr': '<{}', 'fortran_order': False, 'shape': ({}), }}", self.dtype, shape.trim_end());
        // Data begins at a multiple of 64, the header ends with a line break.
        let padding = 64 - (10 + header.len() + 1) % 64;
        header.extend(std::iter::repeat_n(' ', padding % 64));
        header.push('\n');
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend((header.len() as u16).to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(&self.bytes);
        file
    }

    /// The elements as 32-bit floats.
    ///
    /// # Panics
    /// If the elements have another type.
    pub fn f32s(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "f4");
        self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// The elements as numbers, whatever their type.
    ///
    /// # Panics
    /// If no test model has this type.
    pub fn numbers(&self) -> Vec<f64> {
        match self.dtype.as_str() {
            "f4" => self.f32s().into_iter().map(f64::from).collect(),
            "i8" => {
                self.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as f64).collect()
            }
            "i4" => self
                .bytes
                .chunks_exact(4)
                .map(|b| f64::from(i32::from_le_bytes(b.try_into().expect("4 bytes"))))
                .collect(),
            "i1" => self.bytes.iter().map(|b| f64::from(*b as i8)).collect(),
            "u1" | "b1" => self.bytes.iter().map(|b| f64::from(*b)).collect(),
            other => panic!("elements of type {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        for shape in [&[][..], &[3], &[1, 2, 3]] {
            let count = shape.iter().product();
            let array = Array::of_f32(shape, &vec![1.5; count]);
            let path = folder.path().join("a.npy");
            array.write(&path);
            assert_eq!(fs::metadata(&path).unwrap().len() as usize % 64, 4 * count % 64, "data is aligned");
            assert_eq!(Array::read(&path), array);
        }
    }
}
