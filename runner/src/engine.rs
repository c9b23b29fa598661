//! One model in one runtime. Owns which runtime opens which file, and that a runtime is only ever given inputs that fit
//! the model.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use mesh_models::{Signature, SignatureError, TensorSpec};
use proto_msgs::{DType, ErrorCode, Failure, ModelFormat};

use crate::{
    runtimes,
    tensor::{self, Tensor},
};

mod litert;
mod onnx;
mod precheck;

/// A runtime with a model in it.
pub(crate) trait Engine: Send {
    /// Name and version of the runtime.
    fn runtime(&self) -> &str;

    /// Computes the outputs, in the order of the signature. `inputs` are in that order too and fit the signature.
    ///
    /// # Errors
    /// `RUN_FAILED` with the runtime's words.
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Failure>;

    /// Forgets what earlier runs left in the model, if it keeps anything.
    ///
    /// # Errors
    /// `RUN_FAILED` with the runtime's words.
    fn reset(&mut self) -> Result<(), Failure>;
}

/// How a model is to be opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadOptions {
    /// What the file must be; `None` to go by its content.
    pub(crate) format: Option<ModelFormat>,
    /// Threads one run may use.
    pub(crate) threads: u16,
    /// Try a GPU first.
    pub(crate) gpu: bool,
}

/// A model ready to run.
pub(crate) struct Model {
    engine: Box<dyn Engine>,
    signature: Signature,
    load_time: Duration,
}

impl Model {
    /// Opens the model in `file`.
    ///
    /// # Errors
    /// `MODEL_INVALID`, `MODEL_UNSUPPORTED` or `ENGINE_UNAVAILABLE`.
    pub(crate) fn load(file: &Path, options: LoadOptions) -> Result<Self, Failure> {
        let started = Instant::now();
        let bytes = std::fs::read(file).map_err(|error| {
            Failure::new(ErrorCode::ModelInvalid, format!("cannot read the model {}: {error}", file.display()))
        })?;
        Self::from_bytes(bytes, options).map(|model| Self { load_time: started.elapsed(), ..model })
    }

    /// Opens the model that these bytes are.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub(crate) fn from_bytes(bytes: Vec<u8>, options: LoadOptions) -> Result<Self, Failure> {
        let started = Instant::now();
        let signature = mesh_models::signature(&bytes).map_err(|error| unreadable(error, options.format))?;
        if let Some(format) = options.format.filter(|format| *format != signature.format) {
            return Err(Failure::new(
                ErrorCode::ModelInvalid,
                format!("expected a {format} model, got a {} file", signature.format),
            ));
        }
        for tensor in signature.inputs.iter().chain(&signature.outputs) {
            if tensor.dtype.is_none() {
                return Err(Failure::new(
                    ErrorCode::ModelUnsupported,
                    format!("'{}' is of a type that the mesh cannot carry", tensor.name),
                ));
            }
        }
        let library = runtimes::find(signature.format)?;
        let engine: Box<dyn Engine> = match signature.format {
            ModelFormat::TfLite => Box::new(litert::LiteRt::load(&library, bytes, &signature, options)?),
            ModelFormat::Onnx => {
                precheck::onnx(&bytes)?;
                Box::new(onnx::OnnxRuntime::load(&library, &bytes, &signature, options)?)
            }
        };
        Ok(Self { engine, signature, load_time: started.elapsed() })
    }

    /// Name and version of the runtime that holds the model.
    pub(crate) fn runtime(&self) -> &str {
        self.engine.runtime()
    }

    /// What goes in and what comes out.
    pub(crate) fn signature(&self) -> &Signature {
        &self.signature
    }

    /// How long opening it took.
    pub(crate) fn load_time(&self) -> Duration {
        self.load_time
    }

    /// Runs the model on inputs in the order of its signature.
    ///
    /// # Errors
    /// `MODEL_INPUT_MISMATCH` if an input does not fit, `RUN_FAILED` if the runtime fails.
    pub(crate) fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Failure> {
        if inputs.len() != self.signature.inputs.len() {
            return Err(Failure::new(
                ErrorCode::InputMismatch,
                format!("expected {} inputs, got {}", self.signature.inputs.len(), inputs.len()),
            ));
        }
        for (spec, input) in self.signature.inputs.iter().zip(inputs) {
            check(spec, input.dtype, &input.shape, Some(input.data.len()))?;
        }
        self.engine.run(inputs)
    }

    /// Forgets what earlier runs left in the model.
    ///
    /// # Errors
    /// `RUN_FAILED` with the runtime's words.
    pub(crate) fn reset(&mut self) -> Result<(), Failure> {
        self.engine.reset()
    }
}

/// Whether a tensor of this type, shape and number of bytes may be given as the input `spec`.
///
/// # Errors
/// `MODEL_INPUT_MISMATCH` with what the model expects and what it got.
pub(crate) fn check(spec: &TensorSpec, dtype: DType, shape: &[i64], data_bytes: Option<usize>) -> Result<(), Failure> {
    let got = TensorSpec { dtype: Some(dtype), shape: Some(shape.to_vec()), ..spec.clone() };
    let mismatch = |got: String| {
        let text = format!("input '{}': expected {spec}, got {got}", spec.name);
        Err(Failure::new(ErrorCode::InputMismatch, text))
    };
    let fits = spec.shape.as_ref().is_none_or(|expected| {
        expected.len() == shape.len()
            && expected.iter().zip(shape).all(|(expected, got)| *expected < 0 || expected == got)
    });
    if spec.dtype != Some(dtype) || !fits {
        return mismatch(got.to_string());
    }
    let Some(elements) = tensor::element_count(shape) else {
        return mismatch(format!("{got}, which is no shape"));
    };
    match (data_bytes, dtype.size_bytes()) {
        (Some(bytes), Some(element_bytes)) if elements.checked_mul(element_bytes) != Some(bytes) => {
            mismatch(format!("{got} with {bytes} bytes instead of {}", elements.saturating_mul(element_bytes)))
        }
        _ => Ok(()),
    }
}

fn unreadable(error: SignatureError, claimed: Option<ModelFormat>) -> Failure {
    match (&error, claimed) {
        (SignatureError::UnknownFormat, Some(format)) => {
            Failure::new(ErrorCode::ModelInvalid, format!("this is no {format} file"))
        }
        (SignatureError::UnknownFormat | SignatureError::TooLarge { .. }, _) => {
            Failure::new(ErrorCode::ModelUnsupported, error.to_string())
        }
        (SignatureError::Read(_) | SignatureError::Damaged { .. }, _) => {
            Failure::new(ErrorCode::ModelInvalid, error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> TensorSpec {
        TensorSpec {
            name: "image".to_owned(),
            dtype: Some(DType::F32),
            shape: Some(vec![-1, 2, 2]),
            quantization: None,
        }
    }

    #[test]
    fn an_open_dimension_takes_any_number_of_rows() {
        assert_eq!(check(&image(), DType::F32, &[1, 2, 2], Some(16)), Ok(()));
        assert_eq!(check(&image(), DType::F32, &[3, 2, 2], Some(48)), Ok(()));
    }

    #[test]
    fn a_mismatch_says_what_was_expected_and_what_came() {
        let text = |dtype, shape: &[i64], bytes| check(&image(), dtype, shape, Some(bytes)).unwrap_err().text;
        assert_eq!(text(DType::U8, &[1, 2, 2], 4), "input 'image': expected FP32 [?,2,2], got UINT8 [1,2,2]");
        assert_eq!(text(DType::F32, &[1, 2, 3], 24), "input 'image': expected FP32 [?,2,2], got FP32 [1,2,3]");
        assert_eq!(
            text(DType::F32, &[1, 2, 2], 15),
            "input 'image': expected FP32 [?,2,2], got FP32 [1,2,2] with 15 bytes instead of 16"
        );
        assert!(text(DType::F32, &[i64::MAX, 2, 2], 16).ends_with("which is no shape"));
        assert!(text(DType::F32, &[-1, 2, 2], 16).ends_with("which is no shape"));
    }
}
