//! Inputs as the user has them, in memory or in files. Owns their digests, the check that a file has not changed since
//! it was hashed, the stacking of items, and why a task cannot be submitted. Never: what the model expects.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use mesh_transport::blob::{Source, UploadError};
use proto_msgs::{DType, Digest, InputDecl, limits};

/// Why a task cannot be submitted at all.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A part of the task exceeds a limit.
    #[error("{0}")]
    Invalid(String),
    /// The connection to the mesh was closed.
    #[error("the connection to the mesh was closed")]
    Closed,
}

/// One input of a task.
#[derive(Clone, Debug)]
pub struct Input {
    name: Option<String>,
    dtype: Option<DType>,
    shape: Option<Vec<u64>>,
    data: Data,
}

#[derive(Clone, Debug)]
pub(crate) enum Data {
    Memory(Bytes),
    File(PathBuf),
}

impl Input {
    /// Raw little-endian elements in row-major order, as the model expects them.
    pub fn raw(bytes: impl Into<Bytes>) -> Self {
        Self { name: None, dtype: None, shape: None, data: Data::Memory(bytes.into()) }
    }

    /// A file of raw little-endian elements in row-major order. Hashed at submission, read again when sent.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { name: None, dtype: None, shape: None, data: Data::File(path.into()) }
    }

    /// A tensor. The worker compares its type and shape with the model's.
    pub fn tensor(dtype: DType, shape: impl Into<Vec<u64>>, bytes: impl Into<Bytes>) -> Self {
        Self::raw(bytes).shaped(dtype, shape)
    }

    /// Sets type and shape of the bytes, where the model leaves them open.
    pub fn shaped(mut self, dtype: DType, shape: impl Into<Vec<u64>>) -> Self {
        self.dtype = Some(dtype);
        self.shape = Some(shape.into());
        self
    }

    /// Sets the name of the model's input. Inputs without a name are assigned by position.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Length of the data in bytes, if it is in memory.
    pub(crate) fn memory_bytes(&self) -> Option<usize> {
        match &self.data {
            Data::Memory(bytes) => Some(bytes.len()),
            Data::File(_) => None,
        }
    }

    /// Length of the data in bytes, now.
    ///
    /// # Errors
    /// If the file's size cannot be read.
    pub fn size_bytes(&self) -> io::Result<u64> {
        match &self.data {
            Data::Memory(bytes) => Ok(bytes.len() as u64),
            Data::File(path) => Ok(fs::metadata(path)?.len()),
        }
    }

    /// Whether two inputs can be stacked: the same input of the model, of one known type and shape. Strings cannot,
    /// since the end of an item's strings would be unknown.
    pub fn joins(&self, other: &Self) -> bool {
        let has_rows = self.shape.as_ref().is_some_and(|shape| !shape.is_empty());
        let has_size = self.dtype.is_some_and(|dtype| dtype.size_bytes().is_some());
        has_rows && has_size && (&self.name, self.dtype, &self.shape) == (&other.name, other.dtype, &other.shape)
    }

    /// Stacks the same input of several items along the first dimension, for [`Task::items`]. Blocks while it reads
    /// files: in async code, call it in `spawn_blocking` if they are large.
    ///
    /// # Errors
    /// If the items do not [join](Self::joins), or a file cannot be read or is not as long as its shape says.
    ///
    /// [`Task::items`]: crate::Task::items
    pub fn join(items: Vec<Self>) -> Result<Self, SubmitError> {
        let count = items.len() as u64;
        let Some(first) =
            items.first().cloned().filter(|first| count == 1 || items.iter().all(|item| first.joins(item)))
        else {
            let told = items.iter().take(2).map(Self::to_string).collect::<Vec<_>>().join(" and ");
            let text = format!("inputs that do not have one known type and shape cannot share a task: {told}");
            return Err(SubmitError::Invalid(text));
        };
        if count == 1 {
            return Ok(first);
        }
        let each = first.data_bytes().map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let mut joined = Vec::with_capacity(each.saturating_mul(items.len()));
        for item in &items {
            let before = joined.len();
            item.data.append_to(&mut joined)?;
            // Each item is checked: one too long and one too short would shift all rows between them.
            if joined.len() - before != each {
                let text = format!("{item}: {} bytes are not what its shape says", joined.len() - before);
                return Err(SubmitError::Invalid(text));
            }
        }
        let shape = first.shape.map(|mut shape| {
            shape[0] = shape[0].saturating_mul(count);
            shape
        });
        Ok(Self { shape, data: Data::Memory(joined.into()), ..first })
    }

    /// Returns one of the [joined](Self::join) items, without a copy.
    ///
    /// # Errors
    /// If the input does not consist of `items` items in memory, or there is no such item.
    pub fn part(&self, index: u32, items: u32) -> Result<Self, SubmitError> {
        let (index, items) = (index as usize, items as usize);
        match (&self.data, &self.shape) {
            _ if (index, items) == (0, 1) => Ok(self.clone()),
            (Data::Memory(bytes), Some(shape))
                if index < items
                    && bytes.len().is_multiple_of(items)
                    && shape.first().is_some_and(|rows| rows.is_multiple_of(items as u64)) =>
            {
                let each = bytes.len() / items;
                let mut shape = shape.clone();
                shape[0] /= items as u64;
                let data = Data::Memory(bytes.slice(index * each..(index + 1) * each));
                Ok(Self { shape: Some(shape), data, ..self.clone() })
            }
            _ => Err(SubmitError::Invalid(format!("{self} is not made of {items} items with an item {index}"))),
        }
    }

    /// The length in bytes according to type and shape; `None` if one of them is unknown.
    fn data_bytes(&self) -> Option<u64> {
        let element_bytes = self.dtype?.size_bytes()? as u64;
        self.shape.as_ref()?.iter().try_fold(element_bytes, |bytes, dimension| bytes.checked_mul(*dimension))
    }

    pub(crate) fn prepare(self) -> Result<(InputDecl, Blob), SubmitError> {
        let Self { name, dtype, shape, data } = self;
        at_most("an input name", name.as_ref().map_or(0, String::len) as u64, limits::NAME_BYTES_MAX as u64, "bytes")?;
        at_most("an input", shape.as_ref().map_or(0, Vec::len) as u64, limits::RANK_MAX as u64, "dimensions")?;
        let (blob, digest) = Blob::hash(data).map_err(unreadable)?;
        Ok((InputDecl { name, dtype, shape, digest, size_bytes: blob.size_bytes }, blob))
    }
}

/// `x: FP32 [1, 3]`, as far as name, type and shape are known.
impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, "{name}: ")?;
        }
        match (self.dtype, &self.shape, &self.data) {
            (Some(dtype), Some(shape), _) => write!(f, "{dtype} {shape:?}"),
            (_, _, Data::Memory(bytes)) => write!(f, "{} bytes", bytes.len()),
            (_, _, Data::File(path)) => path.display().fmt(f),
        }
    }
}

impl Data {
    fn append_to(&self, all: &mut Vec<u8>) -> Result<(), SubmitError> {
        match self {
            Self::Memory(bytes) => all.extend_from_slice(bytes),
            Self::File(path) => {
                let read = File::open(path).and_then(|mut file| file.read_to_end(all));
                read.map_err(|source| SubmitError::Read { path: path.clone(), source })?;
            }
        }
        Ok(())
    }
}

pub(crate) fn at_most(what: &str, got: u64, max: u64, unit: &str) -> Result<(), SubmitError> {
    if got <= max {
        return Ok(());
    }
    Err(SubmitError::Invalid(format!("{what} has {got} {unit}, the limit is {max}")))
}

fn unreadable(error: UploadError) -> SubmitError {
    match error {
        UploadError::Read { path, source } => SubmitError::Read { path, source },
        other => SubmitError::Invalid(other.to_string()),
    }
}

/// Bytes that were hashed, and how to notice a changed file.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    data: Data,
    stamp: Option<Stamp>,
    size_bytes: u64,
}

/// File attributes that change with its content.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stamp {
    inode: u64,
    size_bytes: u64,
    modified_ns: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Result<Self, UploadError> {
        let meta = fs::metadata(path).map_err(|source| UploadError::Read { path: path.to_owned(), source })?;
        Ok(Self { inode: meta.ino(), size_bytes: meta.len(), modified_ns: (meta.mtime(), meta.mtime_nsec()) })
    }
}

/// Files up to this size are read once and kept until their task ends: opening, reading and checking them for changes a
/// second time costs more.
const KEPT_BYTES_MAX: u64 = 1 << 20;

impl Blob {
    pub(crate) fn hash(data: Data) -> Result<(Self, Digest), UploadError> {
        let stamp = match &data {
            Data::Memory(_) => None,
            Data::File(path) => Some(Stamp::of(path)?),
        };
        let source = open(&data)?;
        if let Data::File(path) = &data
            && source.size_bytes() <= KEPT_BYTES_MAX
        {
            let (bytes, size_bytes) = (read(path, KEPT_BYTES_MAX)?, source.size_bytes());
            if bytes.len() as u64 != size_bytes {
                return Err(UploadError::Changed { path: path.clone() });
            }
            let digest = Digest::of(&bytes);
            return Ok((Self { data: Data::Memory(bytes), stamp: None, size_bytes }, digest));
        }
        let digest = source.digest()?;
        let blob = Self { data, stamp, size_bytes: source.size_bytes() };
        // This check also notices a file that changed between the stamp and the end of the hashing.
        blob.source()?;
        Ok((blob, digest))
    }

    /// Length in bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// If the file is gone, or has changed since it was hashed.
    pub(crate) fn source(&self) -> Result<Source, UploadError> {
        if let (Some(stamp), Data::File(path)) = (self.stamp, &self.data)
            && Stamp::of(path)? != stamp
        {
            return Err(UploadError::Changed { path: path.clone() });
        }
        open(&self.data)
    }
}

/// The first `bytes_max` bytes of a file.
fn read(path: &Path, bytes_max: u64) -> Result<Bytes, UploadError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(bytes_max).read_to_end(&mut bytes));
    match read {
        Ok(_) => Ok(bytes.into()),
        Err(source) => Err(UploadError::Read { path: path.to_owned(), source }),
    }
}

fn open(data: &Data) -> Result<Source, UploadError> {
    match data {
        Data::Memory(bytes) => Ok(Source::memory(bytes.clone())),
        Data::File(path) => Source::file(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_stand_one_behind_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("second.bin");
        fs::write(&path, [3, 4]).unwrap();
        let first = Input::tensor(DType::U8, [1, 2], vec![1, 2]).named("x");
        let second = Input::file(&path).shaped(DType::U8, [1, 2]).named("x");

        let joined = Input::join(vec![first.clone(), second]).unwrap();

        assert_eq!(joined.to_string(), "x: UINT8 [2, 2]");
        assert!(matches!(&joined.data, Data::Memory(bytes) if bytes[..] == [1, 2, 3, 4]));
        let last = joined.part(1, 2).unwrap();
        assert!(last.joins(&first) && matches!(&last.data, Data::Memory(bytes) if bytes[..] == [3, 4]));
        assert!(joined.part(2, 2).is_err() && joined.part(0, 3).is_err(), "there are two");
        fs::write(&path, [3]).unwrap();
        let short = Input::file(&path).shaped(DType::U8, [1, 2]).named("x");
        let error = Input::join(vec![first.clone(), short]).unwrap_err().to_string();
        assert!(error.ends_with(": 1 bytes are not what its shape says"), "{error}");
        let long = Input::tensor(DType::U8, [1, 2], vec![1, 2, 3]).named("x");
        let short = Input::tensor(DType::U8, [1, 2], vec![1]).named("x");
        assert!(Input::join(vec![first.clone(), long, short]).is_err(), "together they are as long as they should be");
        assert_eq!(Input::join(vec![first]).unwrap().to_string(), "x: UINT8 [1, 2]", "one is as it is");
    }

    #[test]
    fn what_has_no_common_shape_does_not_share_a_task() {
        let bytes = Input::tensor(DType::U8, [1, 2], vec![1, 2]);
        for other in [
            Input::tensor(DType::U8, [2, 1], vec![1, 2]),
            Input::tensor(DType::I8, [1, 2], vec![1, 2]),
            Input::tensor(DType::U8, [1, 2], vec![1, 2]).named("y"),
            Input::raw(vec![1, 2]),
        ] {
            assert!(!bytes.joins(&other) && !other.joins(&bytes), "{other}");
        }
        let strings = Input::tensor(DType::Bytes, [1], b"\x01\0\0\0a".to_vec());
        assert!(!strings.joins(&strings.clone()));
        let scalar = Input::tensor(DType::U8, [], vec![1]);
        let error = Input::join(vec![scalar.clone(), scalar]).unwrap_err().to_string();
        assert!(error.ends_with("cannot share a task: UINT8 [] and UINT8 []"), "{error}");
    }

    #[test]
    fn a_large_file_that_changed_since_it_was_hashed_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("input.bin");
        let before = vec![1; KEPT_BYTES_MAX as usize + 1];
        fs::write(&path, &before).unwrap();
        let (blob, digest) = Blob::hash(Data::File(path.clone())).unwrap();
        assert_eq!(digest, Digest::of(&before));
        assert!(blob.source().is_ok());

        fs::write(&path, b"afterwards").unwrap();

        let error = blob.source().unwrap_err();
        assert!(matches!(&error, UploadError::Changed { path: named } if *named == path), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(matches!(blob.source(), Err(UploadError::Read { .. })));
    }

    #[test]
    fn a_small_file_is_sent_as_it_was_when_it_was_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("input.bin");
        fs::write(&path, b"before").unwrap();
        let (blob, digest) = Blob::hash(Data::File(path.clone())).unwrap();
        fs::write(&path, b"afterwards").unwrap();
        assert_eq!(blob.source().unwrap().digest().unwrap(), digest);
        fs::remove_file(&path).unwrap();
        assert!(matches!(Blob::hash(Data::File(path)), Err(UploadError::Read { .. })));
    }
}
