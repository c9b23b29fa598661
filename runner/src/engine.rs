//! Owns one model in one runtime: which runtime opens which file, and that a runtime is given only inputs that fit the
//! model.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_models::{Signature, SignatureError, TensorSpec};
use proto_msgs::{DType, ErrorCode, Failure, ModelFormat};

use crate::{
    libraries,
    tensor::{self, Tensor},
};

mod litert;
mod onnx;
mod precheck;

/// A runtime with a loaded model.
pub(crate) trait Engine: Send {
    /// Name and version of the runtime.
    fn runtime(&self) -> &str;

    /// Computes the outputs, in the order of the signature. `inputs` have that order, too, and fit the signature.
    ///
    /// # Errors
    /// `RUN_FAILED` with the runtime's text.
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Failure>;

    /// Clears the state that earlier runs left in the model, if it keeps any.
    ///
    /// # Errors
    /// `RUN_FAILED` with the runtime's text.
    fn reset(&mut self) -> Result<(), Failure>;
}

/// Options for opening a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadOptions {
    /// Required format of the file; `None`: decided by its content.
    pub(crate) format: Option<ModelFormat>,
    /// Threads that one run may use.
    pub(crate) threads: u16,
    /// Whether to try a GPU first.
    pub(crate) gpu: bool,
    /// Whether to refuse the model if the runtime cannot use a GPU.
    pub(crate) gpu_required: bool,
}

/// Opens the library for models of this format and returns its path.
///
/// # Errors
/// `ENGINE_UNAVAILABLE` if there is none, or it cannot be used.
pub(crate) fn open_library(format: ModelFormat) -> Result<PathBuf, Failure> {
    let library = libraries::find(format)?;
    match format {
        ModelFormat::TfLite => litert::open(&library)?,
        ModelFormat::Onnx => onnx::open(&library)?,
    }
    Ok(library)
}

/// A model that is ready to run.
pub(crate) struct Model {
    engine: Box<dyn Engine>,
    signature: Signature,
    load_time: Duration,
}

impl Model {
    /// Opens the model in `file`.
    ///
    /// # Errors
    /// `MODEL_INVALID`, `MODEL_UNSUPPORTED`, `ENGINE_UNAVAILABLE`, or `RUN_OOM` if the system refuses memory.
    pub(crate) fn load(file: &Path, options: LoadOptions) -> Result<Self, Failure> {
        let started = Instant::now();
        let bytes = std::fs::read(file).map_err(|error| {
            let is_too_large = error.kind() == std::io::ErrorKind::OutOfMemory;
            let code = if is_too_large { ErrorCode::RunOutOfMemory } else { ErrorCode::ModelInvalid };
            Failure::new(code, format!("cannot read the model {}: {error}", file.display()))
        })?;
        Self::from_bytes(bytes, options).map(|model| Self { load_time: started.elapsed(), ..model })
    }

    /// Opens the model in these bytes.
    ///
    /// # Errors
    /// As for [`Model::load`].
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
        let library = libraries::find(signature.format)?;
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

    /// Inputs and outputs of the model.
    pub(crate) fn signature(&self) -> &Signature {
        &self.signature
    }

    /// Time that opening took.
    pub(crate) fn load_time(&self) -> Duration {
        self.load_time
    }

    /// Runs the model on inputs in the order of its signature.
    ///
    /// # Errors
    /// `MODEL_INPUT_MISMATCH` if an input does not fit, even if only the run shows it; `RUN_FAILED` if the runtime
    /// fails.
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
        let outputs = self.engine.run(inputs).map_err(|failure| blamed(&self.signature, inputs, failure))?;
        check_rows(&self.signature, inputs, &outputs)?;
        Ok(outputs)
    }

    /// Clears the state that earlier runs left in the model.
    ///
    /// # Errors
    /// `RUN_FAILED` with the runtime's text.
    pub(crate) fn reset(&mut self) -> Result<(), Failure> {
        self.engine.reset()
    }
}

/// Checks that a tensor of this type, shape and number of bytes fits the input `spec`.
///
/// # Errors
/// `MODEL_INPUT_MISMATCH` with the expected and the given tensor.
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
        return mismatch(format!("{got}, which is not a shape"));
    };
    match (data_bytes, dtype.size_bytes()) {
        (Some(bytes), Some(element_bytes)) if elements.checked_mul(element_bytes) != Some(bytes) => {
            mismatch(format!("{got} with {bytes} bytes instead of {}", elements.saturating_mul(element_bytes)))
        }
        _ => Ok(()),
    }
}

/// Decides who is to blame for a failed run. If the file leaves dimensions open, only the runtime can find that an
/// input's are wrong, and it reports that from the middle of the graph. Then the input is to blame.
fn blamed(signature: &Signature, inputs: &[Tensor], failure: Failure) -> Failure {
    /// Words of both runtimes for tensors whose shapes do not fit each other.
    const OF_SHAPES: [&str; 7] = ["dimension", "shape", "dims", "rank", "broadcast", "channel", "failed to prepare"];
    let is_open = |spec: &TensorSpec| spec.shape.as_ref().is_none_or(|shape| shape.iter().any(|d| *d < 0));
    // The text before it contains the node's name, which the model chose.
    let said = failure.text.rsplit_once("Status Message: ").map_or(failure.text.as_str(), |(_, said)| said);
    let said = said.to_lowercase();
    let is_of_shapes = failure.code == ErrorCode::RunFailed && OF_SHAPES.iter().any(|word| said.contains(word));
    if !is_of_shapes || !signature.inputs.iter().any(is_open) {
        return failure;
    }
    let given = signature.inputs.iter().zip(inputs).map(|(spec, input)| {
        let got = TensorSpec { dtype: Some(input.dtype), shape: Some(input.shape.clone()), ..spec.clone() };
        format!("'{}' {got} where the file says {spec}", spec.name)
    });
    let given = given.collect::<Vec<_>>().join(", ");
    Failure::new(ErrorCode::InputMismatch, format!("the model cannot take {given}: {}", failure.text))
}

/// Checks that the outputs of several rows can be split by row. A model that fixes its batch size internally returns
/// the values of many rows in the shape of one, in an unknown order. Such an output neither has the declared shape
/// (apart from the rows), nor a multiple of the rows as first dimension. One of the two is enough to pass: some files
/// declare another shape than they return.
///
/// # Errors
/// `RUN_FAILED` with the declared and the actual shape.
fn check_rows(signature: &Signature, inputs: &[Tensor], outputs: &[Tensor]) -> Result<(), Failure> {
    let is_open = |spec: &TensorSpec| spec.shape.as_ref().is_some_and(|shape| shape.first().is_some_and(|d| *d < 0));
    let rows = |(spec, input): (&TensorSpec, &Tensor)| if is_open(spec) { input.shape.first().copied() } else { None };
    let Some(rows) = signature.inputs.iter().zip(inputs).filter_map(rows).max().filter(|rows| *rows > 1) else {
        return Ok(());
    };
    for (spec, output) in signature.outputs.iter().zip(outputs) {
        let Some((_, declared)) = spec.shape.as_ref().and_then(|shape| shape.split_first()) else { continue };
        // 0 means that the dimension is unknown before the run.
        let same = |(declared, got): (&i64, &i64)| *declared <= 0 || declared == got;
        let fits = output.shape.len() == declared.len() + 1 && declared.iter().zip(&output.shape[1..]).all(same);
        let shares = output.shape.first().is_some_and(|first| first % rows == 0);
        if !fits && !shares {
            let text = format!(
                "output '{}': the model declares {spec}, {:?} came for {rows} rows: it does not take them together, give it \
                 one at a time",
                spec.name, output.shape
            );
            return Err(Failure::new(ErrorCode::RunFailed, text));
        }
    }
    Ok(())
}

fn unreadable(error: SignatureError, claimed: Option<ModelFormat>) -> Failure {
    match (&error, claimed) {
        (SignatureError::UnknownFormat, Some(format)) => {
            Failure::new(ErrorCode::ModelInvalid, format!("the file is not in {format} format"))
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
    fn many_rows_in_the_shape_of_one_are_no_result() {
        let spec =
            |name: &str, shape: &[i64]| TensorSpec { name: name.to_owned(), shape: Some(shape.to_vec()), ..image() };
        let signature = Signature {
            format: ModelFormat::TfLite,
            inputs: vec![spec("image", &[-1, 2])],
            outputs: vec![spec("boxes", &[-1, 896, 1])],
        };
        let tensor = |shape: &[i64]| Tensor { dtype: DType::F32, shape: shape.to_vec(), data: Vec::new().into() };
        let check = |rows, came: &[i64]| check_rows(&signature, &[tensor(&[rows, 2])], &[tensor(came)]);
        assert_eq!(check(4, &[4, 896, 1]), Ok(()));
        assert_eq!(check(1, &[896]), Ok(()), "a single row is as it is");
        assert_eq!(check(2, &[2, 500, 1]), Ok(()), "declared otherwise, but rows");
        assert_eq!(check(4, &[1, 896, 1]), Ok(()), "declared so: the rows were no batch");
        let failure = check(4, &[1, 3584, 1]).unwrap_err();
        assert_eq!(failure.code, ErrorCode::RunFailed);
        assert!(failure.text.contains("[?,896,1]") && failure.text.contains("[1, 3584, 1]"), "{}", failure.text);
    }

    #[test]
    fn a_run_that_fails_for_a_shape_that_the_file_leaves_open_is_the_inputs_fault() {
        let told = |spec: &[i64], said: &str| {
            let spec = TensorSpec { shape: Some(spec.to_vec()), ..image() };
            let signature = Signature { format: ModelFormat::Onnx, inputs: vec![spec], outputs: Vec::new() };
            let input = Tensor { dtype: DType::F32, shape: vec![2, 5], data: Vec::new().into() };
            blamed(&signature, &[input], Failure::new(ErrorCode::RunFailed, said))
        };
        let said = "ONNX Runtime failed: running node. Name:'a' Status Message: MatMul dimension mismatch";
        let failure = told(&[-1, -1], said);
        assert_eq!(failure.code, ErrorCode::InputMismatch);
        let expected = "the model cannot take 'image' FP32 [2,5] where the file says FP32 [?,?]: ";
        assert_eq!(failure.text, format!("{expected}{said}"));
        assert_eq!(told(&[2, 5], said).code, ErrorCode::RunFailed, "the file says so: the model is at fault");
        let of_values = "Name:'shape_3/Gather' Status Message: indices element out of data bounds, idx=9";
        assert_eq!(told(&[-1, -1], of_values).code, ErrorCode::RunFailed, "no shape, but the name of a node");
        assert_eq!(told(&[-1, -1], "Node number 3 (CONV_2D) failed to prepare.").code, ErrorCode::InputMismatch);
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
        assert!(text(DType::F32, &[i64::MAX, 2, 2], 16).ends_with("which is not a shape"));
        assert!(text(DType::F32, &[-1, 2, 2], 16).ends_with("which is not a shape"));
    }
}
