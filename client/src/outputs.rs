//! What the model gave: outputs in memory or in spooled files, whole or item by item. Owns the files and removes them;
//! never talks to anybody.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    ops::{Deref, Range},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use mesh_transport::blob::Content;
use proto_msgs::{DType, OutputDecl};

/// The outputs of a task, in the model's order, verified against the worker's digests. Those of several items stand one
/// behind the other along the first dimension.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    all: Vec<Output>,
    items: u32,
}

impl Outputs {
    pub(crate) fn new(all: Vec<Output>, items: u32) -> Self {
        Self { all, items }
    }

    /// How many items they are of.
    pub fn items(&self) -> u32 {
        self.items
    }

    /// The same outputs, told how many items they are of: the result of a fetched task does not say so,
    /// [`TaskView::items`](crate::TaskView::items) does.
    pub fn of_items(self, items: u32) -> Self {
        Self { items, ..self }
    }

    /// What the model gave for one of the items, as if that had been alone. Nothing is copied.
    ///
    /// # Errors
    /// If there is no such item, or an output cannot be divided among the items.
    pub fn item(&self, index: u32) -> io::Result<Vec<Output>> {
        if index >= self.items {
            let text = format!("there is no item {index}: the task has {}", self.items);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        self.all.iter().map(|output| output.item(index, self.items)).collect()
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

/// One output.
#[derive(Clone, Debug)]
pub struct Output {
    /// Name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<u64>,
    data: OutputData,
}

#[derive(Clone, Debug)]
enum OutputData {
    Memory(Bytes),
    /// These bytes of the file.
    File(Arc<Spooled>, Range<u64>),
}

/// A file that lives as long as the result it belongs to.
#[derive(Debug)]
struct Spooled {
    path: PathBuf,
    size_bytes: u64,
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // What cannot be removed now is removed when the folder is used again a day later.
        let _ = fs::remove_file(&self.path);
    }
}

impl Output {
    pub(crate) fn new(decl: OutputDecl, content: Content) -> Self {
        let data = match content {
            Content::Memory(bytes) => OutputData::Memory(bytes),
            Content::File(path) => {
                let size_bytes = decl.size_bytes;
                OutputData::File(Arc::new(Spooled { path, size_bytes }), 0..size_bytes)
            }
        };
        Self { name: decl.name, dtype: decl.dtype, shape: decl.shape, data }
    }

    /// Length of the data.
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
                let mut opened = fs::File::open(&file.path)?;
                opened.seek(SeekFrom::Start(range.start))?;
                Ok(Box::new(opened.take(range.end - range.start)))
            }
        }
    }

    /// The file that holds this output and nothing else, if it is large. It is removed with the last clone of this output.
    pub fn path(&self) -> Option<&Path> {
        match &self.data {
            OutputData::File(file, range) if *range == (0..file.size_bytes) => Some(&file.path),
            OutputData::File(..) | OutputData::Memory(_) => None,
        }
    }

    /// The part that belongs to one of `items` items.
    fn item(&self, index: u32, items: u32) -> io::Result<Self> {
        if items == 1 {
            return Ok(self.clone());
        }
        let undivided = || {
            let text =
                format!("output '{}' of shape {:?} cannot be divided among {items} items", self.name, self.shape);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let (first, rest) = self.shape.split_first().ok_or_else(undivided)?;
        if !first.is_multiple_of(items.into()) {
            return Err(undivided());
        }
        let shape = [&[first / u64::from(items)], rest].concat();
        let range = if self.dtype.size_bytes().is_some() {
            let each = self.size_bytes() / u64::from(items);
            u64::from(index) * each..(u64::from(index) + 1) * each
        } else {
            let strings = shape.iter().try_fold(1_u64, |product, dimension| product.checked_mul(*dimension));
            self.strings(u64::from(index), strings.ok_or_else(undivided)?)?
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
        Ok(Self { name: self.name.clone(), dtype: self.dtype, shape, data })
    }

    /// Where the strings of an item stand, each of which has `count`: they are as long as they are.
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

    fn output(dtype: DType, shape: &[u64], bytes: &[u8]) -> Output {
        let data = OutputData::Memory(Bytes::copy_from_slice(bytes));
        Output { name: "y".into(), dtype, shape: shape.to_vec(), data }
    }

    #[test]
    fn each_item_has_its_rows_and_nothing_else() {
        let outputs = Outputs::new(vec![output(DType::U8, &[4, 2], &[0, 1, 2, 3, 4, 5, 6, 7])], 2);
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
        let outputs = Outputs::new(vec![output(DType::U8, &[], &[7])], 1);
        let only = &outputs.item(0).unwrap()[0];
        assert_eq!((only.shape.len(), only.size_bytes()), (0, 1));
        assert!(
            outputs.clone().of_items(2).item(0).unwrap_err().to_string().contains("cannot be divided among 2 items")
        );
        assert!(Outputs::new(vec![output(DType::U8, &[3], &[0; 3])], 2).item(0).is_err(), "three rows of two items");
    }

    #[test]
    fn strings_are_divided_by_number_not_by_length() {
        let outputs = Outputs::new(vec![output(DType::Bytes, &[2], b"\x03\0\0\0cat\x01\0\0\0x")], 2);
        let item = |index| outputs.item(index).unwrap()[0].bytes().unwrap();
        assert_eq!((&item(0)[..], &item(1)[..]), (&b"\x03\0\0\0cat"[..], &b"\x01\0\0\0x"[..]));
        assert!(Outputs::new(vec![output(DType::Bytes, &[2], b"\xff\0\0\0cat")], 2).item(1).is_err(), "cut short");
    }

    #[test]
    fn a_large_output_is_read_from_its_file_and_removed_with_its_last_part() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spooled");
        fs::write(&path, [1, 2, 3, 4, 5, 6]).unwrap();
        let data = OutputData::File(Arc::new(Spooled { path: path.clone(), size_bytes: 6 }), 0..6);
        let whole = Output { name: "y".into(), dtype: DType::U8, shape: vec![3, 2], data };
        assert_eq!(whole.path(), Some(path.as_path()));

        let last = Outputs::new(vec![whole], 3).item(2).unwrap().remove(0);

        assert_eq!((&last.bytes().unwrap()[..], last.path()), (&[5, 6][..], None));
        assert!(path.exists(), "a part of it is still wanted");
        drop(last);
        assert!(!path.exists());
    }
}
