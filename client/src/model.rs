//! A model as the user has it: name, digest, size and format. Owns that it is read and hashed once for any number of
//! tasks. Never: its signature.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use mesh_transport::blob::UploadError;
use proto_msgs::{ModelFormat, ModelRef, limits};

use crate::{
    input::{Blob, Data},
    task::blocking,
};

/// Why a file or some bytes cannot be used as a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The data is in no known format.
    #[error("{name} is not a model: neither a TensorFlow Lite (.tflite) nor an ONNX (.onnx) file")]
    UnknownFormat {
        /// The model's name.
        name: String,
    },
    /// The model is larger than the mesh accepts.
    #[error("{name} has {size_bytes} bytes, the limit for a model is {}", limits::MODEL_BYTES_MAX)]
    TooLarge {
        /// The model's name.
        name: String,
        /// The model's size in bytes.
        size_bytes: u64,
    },
    /// The file changed while it was read.
    #[error("{} changed while it was read: use it once it is written completely", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The program's runtime was shut down before the model was hashed.
    #[error("the program ended before the model was read")]
    Stopped,
}

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
    /// Opens the model in a file. Reads it once to hash it (about 5 GB/s per core), and does not keep it in memory.
    ///
    /// # Errors
    /// If the file cannot be read or is not a model.
    pub async fn from_file(path: impl Into<PathBuf>) -> Result<Self, ModelError> {
        let path = path.into();
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        blocking(move || Self::new(name, Data::File(path))).await.unwrap_or(Err(ModelError::Stopped))
    }

    /// Uses a model in memory.
    ///
    /// # Errors
    /// If the bytes are not a model.
    pub async fn from_bytes(name: impl Into<String>, bytes: impl Into<Bytes>) -> Result<Self, ModelError> {
        let (name, bytes) = (name.into(), bytes.into());
        blocking(move || Self::new(name, Data::Memory(bytes))).await.unwrap_or(Err(ModelError::Stopped))
    }

    pub(crate) fn new(mut name: String, data: Data) -> Result<Self, ModelError> {
        let format = detect(&data)?.ok_or_else(|| ModelError::UnknownFormat { name: name.clone() })?;
        let (blob, digest) = Blob::hash(data)?;
        if blob.size_bytes() > limits::MODEL_BYTES_MAX {
            return Err(ModelError::TooLarge { name, size_bytes: blob.size_bytes() });
        }
        name.truncate(name.floor_char_boundary(limits::NAME_BYTES_MAX));
        let reference = ModelRef { digest, size_bytes: blob.size_bytes(), format };
        Ok(Self { inner: Arc::new(ModelInner { name, reference, blob }) })
    }

    /// The model's name for people: the file's name.
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

impl From<UploadError> for ModelError {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Read { path, source } => Self::Read { path, source },
            UploadError::Changed { path } => Self::Changed { path },
            // Errors of a peer; hashing has no peer.
            UploadError::Protocol(_) | UploadError::Stopped => Self::Stopped,
        }
    }
}

fn detect(data: &Data) -> Result<Option<ModelFormat>, ModelError> {
    match data {
        Data::Memory(bytes) => Ok(mesh_models::detect(&bytes[..bytes.len().min(mesh_models::HEAD_BYTES)])),
        Data::File(path) => {
            let head = read_head(path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
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
    fn what_is_not_a_model_is_refused_by_name() {
        let error = Model::new("cat.jpg".into(), Data::Memory(b"\xff\xd8\xff".as_slice().into())).unwrap_err();
        assert!(error.to_string().starts_with("cat.jpg is not a model"), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_is_not_there_is_named() {
        let error = Model::from_file("/nowhere/model.onnx").await.unwrap_err();
        assert!(matches!(&error, ModelError::Read { path, .. } if path.ends_with("model.onnx")), "{error:?}");
    }
}
