//! A model as the user has it: its name, digest, size and format. Owns that it is read and hashed once, however many tasks
//! want it; never its signature.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use proto_msgs::{ModelFormat, ModelRef, limits};

use crate::{
    SubmitError,
    input::{Blob, Data},
    task::{at_most, blocking},
};

/// A model that is ready to be submitted, any number of times: its file has been hashed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Model {
    inner: Arc<ModelInner>,
}

#[derive(Debug)]
struct ModelInner {
    name: String,
    reference: ModelRef,
    blob: Blob,
}

impl Model {
    /// The model in a file. Reads it once to hash it (about 5 GB/s a core); it is not kept in memory.
    ///
    /// # Errors
    /// If it cannot be read or is no model.
    pub async fn from_file(path: impl Into<PathBuf>) -> Result<Self, SubmitError> {
        let path = path.into();
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        blocking(move || Self::new(name, Data::File(path))).await
    }

    /// A model in memory.
    ///
    /// # Errors
    /// If it is no model.
    pub async fn from_bytes(name: impl Into<String>, bytes: impl Into<Bytes>) -> Result<Self, SubmitError> {
        let (name, bytes) = (name.into(), bytes.into());
        blocking(move || Self::new(name, Data::Memory(bytes))).await
    }

    pub(crate) fn new(mut name: String, data: Data) -> Result<Self, SubmitError> {
        let format = detect(&data)?.ok_or_else(|| SubmitError::UnknownFormat { name: name.clone() })?;
        let (blob, digest) = Blob::hash(data)?;
        at_most("the model", blob.size_bytes(), limits::MODEL_BYTES_MAX, "bytes")?;
        name.truncate(name.floor_char_boundary(limits::NAME_BYTES_MAX));
        let reference = ModelRef { digest, size_bytes: blob.size_bytes(), format };
        Ok(Self { inner: Arc::new(ModelInner { name, reference, blob }) })
    }

    /// What a person calls it: the file's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn blob(&self) -> &Blob {
        &self.inner.blob
    }

    /// Digest, size and format.
    pub fn reference(&self) -> ModelRef {
        self.inner.reference
    }
}

fn detect(data: &Data) -> Result<Option<ModelFormat>, SubmitError> {
    match data {
        Data::Memory(bytes) => Ok(mesh_models::detect(&bytes[..bytes.len().min(mesh_models::HEAD_BYTES)])),
        Data::File(path) => {
            let head = read_head(path).map_err(|source| SubmitError::Read { path: path.clone(), source })?;
            Ok(mesh_models::detect(&head))
        }
    }
}

fn read_head(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(mesh_models::HEAD_BYTES);
    fs::File::open(path)?.take(mesh_models::HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_model_is_refused_by_name() {
        let error = Model::new("cat.jpg".into(), Data::Memory(b"\xff\xd8\xff".as_slice().into())).unwrap_err();
        assert!(error.to_string().starts_with("cat.jpg is no model"), "{error}");
    }
}
