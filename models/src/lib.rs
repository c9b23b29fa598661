//! FORMATS: what a model file declares about itself, read without loading it.
//!
//! Owns the difference between TensorFlow Lite and ONNX files, and the place of inputs and outputs in them. Never: runs
//! a model, checks its operators, or trusts it: a file counts as hostile until its runner has loaded it. So every
//! position is checked before it is read, the file's claims allocate nothing, and there is no recursion.
//!
//! A file is read through [`Read`] and [`Seek`], a few kilobytes at a time: a model of many gigabytes costs no memory.

use std::{
    fmt,
    io::{self, Cursor, Read, Seek},
};

use proto_msgs::{DType, ModelFormat, limits};

mod onnx;
mod source;
mod tflite;

pub use onnx::onnx_dtype;
use source::Source;

/// Bytes from the start of a file that are always enough for [`detect`].
pub const HEAD_BYTES: usize = 4096;

/// Inputs and outputs of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Signature {
    /// Format of the file.
    pub format: ModelFormat,
    /// The inputs, in the model's order. Constants that older ONNX files list as inputs are left out.
    pub inputs: Vec<TensorSpec>,
    /// The outputs, in the model's order.
    pub outputs: Vec<TensorSpec>,
}

/// One input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Name in the model's graph.
    pub name: String,
    /// Element type; `None` for a type that the mesh cannot carry (complex numbers, sequences, maps).
    pub dtype: Option<DType>,
    /// Dimensions, -1 for an open one; `None` if the file does not even declare their number.
    pub shape: Option<Vec<i64>>,
    /// Relation of integers to real numbers in a quantised TensorFlow Lite model.
    pub quantization: Option<Quantization>,
}

/// `real = scale * (integer - zero_point)`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantization {
    /// The real number that one integer step stands for.
    pub scale: f32,
    /// The integer that stands for 0.
    pub zero_point: i64,
}

/// Why no signature could be read.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The file could not be read.
    #[error("cannot read the model: {0}")]
    Read(#[from] io::Error),
    /// The format is not known.
    #[error("neither a TensorFlow Lite nor an ONNX file")]
    UnknownFormat,
    /// The file begins like a model, but its parts do not fit together.
    #[error("the {format} file is damaged: {what}")]
    Damaged {
        /// The format that it begins like.
        format: ModelFormat,
        /// The first part that does not fit.
        what: &'static str,
    },
    /// The model has more inputs, outputs or dimensions, or longer names, than the mesh carries.
    #[error("the model has {what} beyond the limit of {limit}")]
    TooLarge {
        /// The thing that exceeds its limit.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

/// The format of a file that begins with `head`; `None` if it is neither TensorFlow Lite nor ONNX.
///
/// [`HEAD_BYTES`] bytes are enough. ONNX has no magic number: a file counts as ONNX if its first fields are those of an
/// ONNX model, so this is a guess that the runner confirms.
pub fn detect(head: &[u8]) -> Option<ModelFormat> {
    if head.get(4..8) == Some(b"TFL3") {
        Some(ModelFormat::TfLite)
    } else if onnx::looks_like(head) {
        Some(ModelFormat::Onnx)
    } else {
        None
    }
}

/// The signature of the model in `bytes`.
///
/// # Errors
/// If the bytes are not a model, are damaged, or have more tensors than the mesh carries.
pub fn signature(bytes: &[u8]) -> Result<Signature, SignatureError> {
    read_signature(Cursor::new(bytes))
}

/// The signature of the model in `file`. Only the needed parts are read.
///
/// # Errors
/// As for [`signature`], and if the file cannot be read.
pub fn read_signature(mut file: impl Read + Seek) -> Result<Signature, SignatureError> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    file.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    let mut source = Source::new(file)?;
    let format = detect(&head).ok_or(SignatureError::UnknownFormat)?;
    let (inputs, outputs) = match format {
        ModelFormat::TfLite => tflite::read(&mut source)?,
        ModelFormat::Onnx => onnx::read(&mut source)?,
    };
    Ok(Signature { format, inputs, outputs })
}

impl Signature {
    /// The input with this name.
    pub fn input(&self, name: &str) -> Option<&TensorSpec> {
        self.inputs.iter().find(|input| input.name == name)
    }
}

impl TensorSpec {
    /// Bytes of this tensor, capped at `u64::MAX`; `None` if a dimension is open or the size of an element is not
    /// fixed.
    pub fn size_bytes(&self) -> Option<u64> {
        let element_bytes = self.dtype?.size_bytes()? as u64;
        self.shape
            .as_ref()?
            .iter()
            .try_fold(element_bytes, |bytes, dimension| Some(bytes.saturating_mul(u64::try_from(*dimension).ok()?)))
    }
}

/// For example `FP32 [1,224,224,3]`, with `?` for an open dimension.
impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.dtype.map_or("?", DType::name))?;
        let Some(shape) = &self.shape else {
            return f.write_str(" [?…]");
        };
        let dimension = |d: &i64| if *d < 0 { "?".to_owned() } else { d.to_string() };
        write!(f, " [{}]", shape.iter().map(dimension).collect::<Vec<_>>().join(","))
    }
}

/// Limits of the mesh's messages, each with its name for errors.
const RANK_LIMIT: (&str, usize) = ("dimensions", limits::RANK_MAX);
const TENSOR_LIMIT: (&str, usize) = ("inputs or outputs", limits::TENSORS_MAX);
const NAME_LIMIT: (&str, usize) = ("name bytes", limits::NAME_BYTES_MAX);

#[cfg(test)]
mod tests;
