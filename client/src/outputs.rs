//! Outputs of a task, in memory or in spooled files, whole or item by item. Never sends or receives.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    ops::{Deref, Range},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use proto_msgs::{DType, OutputDecl};

use crate::spool::Spooled;

/// The outputs of a task, in the model's order, verified against the worker's digests. Outputs of several items are
/// stacked along the first dimension.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    all: Vec<Output>,
    items: u32,
}

impl Outputs {
    pub(crate) fn new(all: Vec<Output>, items: u32) -> Self {
        Self { all, items }
    }

    /// Number of items in these outputs.
    pub fn items(&self) -> u32 {
        self.items
    }

    /// The outputs of one item, with the shapes they would have if it had run alone. Nothing is copied.
    ///
    /// # Errors
    /// If there is no such item, or an output is not as long as its shape says.
    pub fn item(&self, index: u32) -> io::Result<Vec<Output>> {
        if index >= self.items {
            let text = format!("there is no item {index}: the task has {}", self.items);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        self.all.iter().map(|output| output.item(index)).collect()
    }
}

impl Deref for Outputs {
    type Target = [Output];

    fn deref(&self) -> &[Output] {
        &self.all
    }
}

impl IntoIterator for Outputs {
    type Item = Output;
    type IntoIter = std::vec::IntoIter<Output>;

    fn into_iter(self) -> Self::IntoIter {
        self.all.into_iter()
    }
}

impl<'a> IntoIterator for &'a Outputs {
    type Item = &'a Output;
    type IntoIter = std::slice::Iter<'a, Output>;

    fn into_iter(self) -> Self::IntoIter {
        self.all.iter()
    }
}

/// One output of the model.
#[derive(Clone, Debug)]
pub struct Output {
    /// The output's name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of all items together.
    pub shape: Vec<u64>,
    item_shape: Vec<u64>,
    items: u32,
    data: OutputData,
}

#[derive(Clone, Debug)]
pub(crate) enum OutputData {
    Memory(Bytes),
    /// A range of bytes of the file.
    File(Arc<Spooled>, Range<u64>),
}

impl From<Spooled> for OutputData {
    fn from(file: Spooled) -> Self {
        let whole = 0..file.size_bytes();
        Self::File(Arc::new(file), whole)
    }
}

impl Output {
    pub(crate) fn new(decl: OutputDecl, items: u32, data: OutputData) -> Self {
        Self::of_items(decl.name, decl.dtype, decl.shape, items, data)
    }

    fn of_items(name: String, dtype: DType, item_shape: Vec<u64>, items: u32, data: OutputData) -> Self {
        let shape = match item_shape.split_first() {
            _ if items == 1 => item_shape.clone(),
            None => vec![items.into()],
            Some((rows, rest)) => [&[rows.saturating_mul(items.into())], rest].concat(),
        };
        Self { name, dtype, shape, item_shape, items, data }
    }

    /// Number of items in this output.
    pub(crate) fn items(&self) -> u32 {
        self.items
    }

    /// Length of the data in bytes.
    pub fn size_bytes(&self) -> u64 {
        match &self.data {
            OutputData::Memory(bytes) => bytes.len() as u64,
            OutputData::File(_, range) => range.end - range.start,
        }
    }

    /// The elements, little-endian and in row-major order. Reads the file if the output is large.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn bytes(&self) -> io::Result<Bytes> {
        match &self.data {
            OutputData::Memory(bytes) => Ok(bytes.clone()),
            OutputData::File(..) => {
                let mut bytes = Vec::with_capacity(usize::try_from(self.size_bytes()).unwrap_or(0));
                self.reader()?.read_to_end(&mut bytes)?;
                Ok(bytes.into())
            }
        }
    }

    /// The elements as a stream, for outputs too large for memory.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn reader(&self) -> io::Result<Box<dyn Read + Send>> {
        match &self.data {
            OutputData::Memory(bytes) => Ok(Box::new(io::Cursor::new(bytes.clone()))),
            OutputData::File(file, range) => {
                let mut opened = fs::File::open(file.path())?;
                opened.seek(SeekFrom::Start(range.start))?;
                Ok(Box::new(opened.take(range.end - range.start)))
            }
        }
    }

    /// The file of a large output, if it holds nothing else. It is removed with the output's last clone.
    pub fn path(&self) -> Option<&Path> {
        match &self.data {
            OutputData::File(file, range) if *range == (0..file.size_bytes()) => Some(file.path()),
            OutputData::File(..) | OutputData::Memory(_) => None,
        }
    }

    /// The part of one item.
    fn item(&self, index: u32) -> io::Result<Self> {
        let (items, shape) = (self.items, self.item_shape.clone());
        let undivided = || {
            let bytes = self.size_bytes();
            let told = format!("output '{}' of shape {:?} has {bytes} bytes", self.name, self.shape);
            let text = match items {
                1 => format!("{told}, not as many as its shape says: let another worker run the model"),
                _ => format!("{told}, which cannot be divided among {items} items"),
            };
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        // The length of strings is not in their shape.
        if items == 1 && self.dtype.size_bytes().is_none() {
            return Ok(self.clone());
        }
        let elements = shape.iter().try_fold(1_u64, |product, dimension| product.checked_mul(*dimension));
        let elements = elements.ok_or_else(undivided)?;
        let range = if let Some(element_bytes) = self.dtype.size_bytes() {
            let each = elements.checked_mul(element_bytes as u64).ok_or_else(undivided)?;
            if each.checked_mul(items.into()) != Some(self.size_bytes()) {
                return Err(undivided());
            }
            u64::from(index) * each..(u64::from(index) + 1) * each
        } else {
            self.strings(u64::from(index), elements)?
        };
        let data = match &self.data {
            OutputData::Memory(bytes) => {
                let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
                let (start, end) = range.filter(|(_, end)| *end <= bytes.len()).ok_or_else(undivided)?;
                OutputData::Memory(bytes.slice(start..end))
            }
            OutputData::File(file, whole) => {
                OutputData::File(file.clone(), whole.start + range.start..whole.start + range.end)
            }
        };
        Ok(Self::of_items(self.name.clone(), self.dtype, shape, 1, data))
    }

    /// The byte range of one item's `count` strings. Strings vary in length, so all before it are read.
    fn strings(&self, index: u64, count: u64) -> io::Result<Range<u64>> {
        let mut reader = io::BufReader::new(self.reader()?);
        let mut at = 0;
        let mut skip = |strings: u64| {
            for _ in 0..strings {
                let mut length = [0; 4];
                reader.read_exact(&mut length)?;
                let length = u64::from(u32::from_le_bytes(length));
                at += 4 + io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
            }
            Ok::<u64, io::Error>(at)
        };
        Ok(skip(index.saturating_mul(count))?..skip(count)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spool::Spool;

    fn outputs(dtype: DType, item_shape: &[u64], items: u32, bytes: &[u8]) -> Outputs {
        let data = OutputData::Memory(Bytes::copy_from_slice(bytes));
        Outputs::new(vec![Output::of_items("y".into(), dtype, item_shape.to_vec(), items, data)], items)
    }

    #[test]
    fn each_item_has_its_rows_and_nothing_else() {
        let outputs = outputs(DType::U8, &[2, 2], 2, &[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(outputs[0].shape, [4, 2], "one behind the other");
        let second = &outputs.item(1).unwrap()[0];
        assert_eq!(
            (second.shape.as_slice(), &second.bytes().unwrap()[..]),
            ([2, 2].as_slice(), [4, 5, 6, 7].as_slice())
        );
        let error = outputs.item(2).unwrap_err().to_string();
        assert_eq!(error, "there is no item 2: the task has 2");
    }

    #[test]
    fn one_item_alone_is_what_the_model_gave() {
        let only = &outputs(DType::U8, &[], 1, &[7]).item(0).unwrap()[0];
        assert_eq!((only.shape.len(), only.size_bytes()), (0, 1));
    }

    #[test]
    fn a_number_of_each_item_is_a_number_and_a_list_of_one_is_a_list() {
        let second = |item_shape: &[u64]| {
            let all = outputs(DType::U8, item_shape, 3, &[7, 8, 9]);
            assert_eq!(all[0].shape, [3]);
            let item = all.item(1).unwrap().remove(0);
            assert_eq!(item.bytes().unwrap()[..], [8]);
            item.shape
        };
        assert_eq!(second(&[]), Vec::<u64>::new());
        assert_eq!(second(&[1]), [1]);
    }

    #[test]
    fn outputs_of_another_length_than_their_shapes_are_not_divided() {
        let error = outputs(DType::U8, &[2], 2, &[0; 3]).item(0).unwrap_err().to_string();
        assert!(error.contains("cannot be divided among 2 items"), "{error}");
        let error = outputs(DType::U8, &[2], 1, &[0; 3]).item(0).unwrap_err().to_string();
        assert!(error.starts_with("output 'y' of shape [2] has 3 bytes, not as many as its shape says"), "{error}");
        assert!(outputs(DType::Bytes, &[2], 1, &[0; 3]).item(0).is_ok(), "strings have any length");
    }

    #[test]
    fn strings_are_divided_by_number_not_by_length() {
        let two = outputs(DType::Bytes, &[1], 2, b"\x03\0\0\0cat\x01\0\0\0x");
        let item = |index| two.item(index).unwrap()[0].bytes().unwrap();
        assert_eq!((&item(0)[..], &item(1)[..]), (&b"\x03\0\0\0cat"[..], &b"\x01\0\0\0x"[..]));
        assert!(outputs(DType::Bytes, &[1], 2, b"\xff\0\0\0cat").item(1).is_err(), "cut short");
    }

    #[test]
    fn a_large_output_is_read_from_its_file_and_removed_with_its_last_part() {
        let dir = tempfile::tempdir().unwrap();
        let file = Spool::new(dir.path()).unwrap().place(6);
        let path = file.path().to_owned();
        fs::write(&path, [1, 2, 3, 4, 5, 6]).unwrap();
        let whole = Output::of_items("y".into(), DType::U8, vec![1, 2], 3, file.into());
        assert_eq!(whole.path(), Some(path.as_path()));

        let last = Outputs::new(vec![whole], 3).item(2).unwrap().remove(0);

        assert_eq!((&last.bytes().unwrap()[..], last.path()), (&[5, 6][..], None));
        assert!(path.exists(), "a part of it is still wanted");
        drop(last);
        assert!(!path.exists());
    }
}
