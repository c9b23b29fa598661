//! ONNX models in ONNX Runtime, through the `ort` crate. Owns passing tensors in and out without a copy, and what the
//! runtime's errors mean for the model.

use std::{path::Path, ptr::NonNull, sync::OnceLock};

use bytes::Bytes;
use mesh_models::Signature;
use ort::{
    AsPointer,
    environment::Environment,
    ep::{self, ExecutionProvider},
    logging::LogLevel,
    memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType},
    session::{Session, SessionInputValue, builder::SessionBuilder},
    sys::ONNXTensorElementDataType as Element,
    value::{DynValue, TensorElementType, ValueType},
};
use proto_msgs::{DType, ErrorCode, Failure};

use super::{Engine, LoadOptions};
use crate::{
    libraries,
    tensor::{self, Tensor},
};

/// One model in its own session.
pub(super) struct OnnxRuntime {
    session: Session,
    /// Names of inputs and outputs in the order of the signature.
    inputs: Vec<String>,
    outputs: Vec<String>,
    runtime: String,
}

impl OnnxRuntime {
    /// Opens `library` and loads the model.
    ///
    /// # Errors
    /// `ENGINE_UNAVAILABLE` if the library cannot be used, `MODEL_UNSUPPORTED` for unknown operators and versions,
    /// `MODEL_INVALID` for every other refusal.
    pub(super) fn load(
        library: &Path,
        bytes: &[u8],
        signature: &Signature,
        options: LoadOptions,
    ) -> Result<Self, Failure> {
        let builder = builder(environment(library)?, options);
        let mut builder = builder.map_err(|error| libraries::unusable(library, error))?;
        let provider = match options.gpu.then(|| ep::CUDA::default().register(&mut builder)) {
            Some(Ok(())) => "CUDA",
            Some(Err(error)) if options.gpu_required => return Err(libraries::no_gpu(library, error)),
            _ => "CPU",
        };
        let session = builder.commit_from_memory(bytes).map_err(refused)?;
        let names = |specs: &[mesh_models::TensorSpec]| specs.iter().map(|spec| spec.name.clone()).collect();
        Ok(Self {
            session,
            inputs: names(&signature.inputs),
            outputs: names(&signature.outputs),
            runtime: format!("ONNX Runtime ({provider})"),
        })
    }
}

impl Engine for OnnxRuntime {
    fn runtime(&self) -> &str {
        &self.runtime
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Failure> {
        let failed = |error: ort::Error| {
            let code = if lacks_memory(&error) { ErrorCode::RunOutOfMemory } else { ErrorCode::RunFailed };
            Failure::new(code, format!("ONNX Runtime failed: {}", error.to_string().trim_end()))
        };
        let mut values = Vec::with_capacity(inputs.len());
        for (name, input) in self.inputs.iter().zip(inputs) {
            values.push((name.as_str(), SessionInputValue::from(value(name, input)?)));
        }
        let mut outputs = self.session.run(values).map_err(failed)?;
        let mut tensors = Vec::with_capacity(self.outputs.len());
        for name in &self.outputs {
            let output = outputs.remove(name).ok_or_else(|| missing(name))?;
            tensors.push(tensor(name, output)?);
        }
        Ok(tensors)
    }

    fn reset(&mut self) -> Result<(), Failure> {
        // ONNX has no variables: a model's state is among its inputs and outputs.
        Ok(())
    }
}

/// Opens the library.
///
/// # Errors
/// `ENGINE_UNAVAILABLE` if it cannot be used.
pub(super) fn open(library: &Path) -> Result<(), Failure> {
    environment(library).map(|_| ())
}

/// The runtime's environment, one per process.
fn environment(library: &Path) -> Result<&'static Environment, Failure> {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    let builder = ort::init_from(library).map_err(|error| libraries::unusable(library, error))?;
    let environment = builder.with_telemetry(false).build();
    let environment = environment.map_err(|error| libraries::unusable(library, error))?;
    environment.set_log_level(LogLevel::Fatal);
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

fn builder(environment: &Environment, options: LoadOptions) -> ort::Result<SessionBuilder> {
    let threads = usize::from(options.threads);
    let builder = Session::builder(environment)?
        .with_log_level(LogLevel::Fatal)?
        .with_intra_threads(threads)?
        .with_inter_threads(1)?
        // A runner that waits for its next request leaves the processor to other processes.
        .with_intra_op_spinning(false)?;
    Ok(builder)
}

/// The failure of a refused model. The runtime's codes do not distinguish an unknown operator from a broken graph, but
/// its texts do.
fn refused(error: ort::Error) -> Failure {
    const UNKNOWN: [&str; 6] = [
        "is not a registered function/op",
        "Could not find an implementation for",
        "No Op registered for",
        "Unsupported model IR version",
        "only *guarantees* support for models stamped with",
        "is till opset",
    ];
    let text = error.message();
    let code = if lacks_memory(&error) {
        ErrorCode::RunOutOfMemory
    } else if UNKNOWN.iter().any(|words| text.contains(words)) {
        ErrorCode::ModelUnsupported
    } else {
        ErrorCode::ModelInvalid
    };
    Failure::new(code, format!("ONNX Runtime refuses the model: {text}"))
}

/// Whether the system refused the runtime memory. The runtime has no code for that, but its texts name the exception of
/// its language, or its own.
fn lacks_memory(error: &ort::Error) -> bool {
    ["bad_alloc", "Failed to allocate memory"].iter().any(|words| error.message().contains(words))
}

/// The input as the runtime's tensor, without a copy. It must not outlive `input`.
fn value(name: &str, input: &Tensor) -> Result<DynValue, Failure> {
    let refused = |why: String| Failure::new(ErrorCode::InputMismatch, format!("input '{name}': {why}"));
    if input.dtype == DType::Bytes {
        return string_value(input).map_err(refused);
    }
    let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUInput)
        .map_err(|error| refused(error.to_string()))?;
    let mut value = std::ptr::null_mut();
    // SAFETY: the data has as many bytes as type and shape require (`check` in the parent module), is aligned, and
    // lives as long as `input`, which outlives the run. The runtime reads inputs and never writes them.
    let status = unsafe {
        (ort::api().CreateTensorWithDataAsOrtValue)(
            memory.ptr(),
            input.data.as_ptr().cast_mut().cast(),
            input.data.len(),
            input.shape.as_ptr(),
            input.shape.len(),
            element(input.dtype),
            &raw mut value,
        )
    };
    // SAFETY: the runtime has just returned the status.
    unsafe { ort::Error::result_from_status(status) }.map_err(|error| refused(error.to_string()))?;
    let value = NonNull::new(value).ok_or_else(|| refused("the runtime made no tensor of it".to_owned()))?;
    // SAFETY: the runtime made the value and hands it over. Its data belongs to `input`: the allocator is never asked
    // to free it.
    Ok(unsafe { DynValue::from_ptr(value, Some(&Allocator::default())) })
}

fn string_value(input: &Tensor) -> Result<DynValue, String> {
    let strings = tensor::strings(&input.data).ok_or("its strings do not end where their lengths say")?;
    let texts: Result<Vec<_>, _> = strings.into_iter().map(|text| String::from_utf8(text.to_vec())).collect();
    let texts = texts.map_err(|error| format!("the runtime takes only UTF-8: {error}"))?;
    if tensor::element_count(&input.shape) != Some(texts.len()) {
        return Err(format!("expected shape {:?}, got {} strings", input.shape, texts.len()));
    }
    let value = ort::value::Tensor::from_string_array((input.shape.clone(), texts.as_slice()));
    value.map(ort::value::Value::into_dyn).map_err(|error| error.to_string())
}

/// An output. The runtime owns its memory until the last of the bytes is dropped.
fn tensor(name: &str, value: DynValue) -> Result<Tensor, Failure> {
    let unsupported = |what: &dyn std::fmt::Debug| {
        let text = format!("output '{name}' is a {what:?}, which the mesh cannot carry");
        Failure::new(ErrorCode::RunFailed, text)
    };
    let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
        return Err(unsupported(value.dtype()));
    };
    let dtype = dtype(*ty).ok_or_else(|| unsupported(ty))?;
    let shape = shape.to_vec();
    if dtype == DType::Bytes {
        return Ok(Tensor { dtype, shape, data: string_data(&value).map_err(|error| unsupported(&error))? });
    }
    let len = tensor::element_count(&shape).ok_or_else(|| unsupported(&shape))?
        * dtype.size_bytes().expect("strings are handled above");
    let data = if len == 0 { Bytes::new() } else { Bytes::from_owner(Output { value, len }) };
    Ok(Tensor { dtype, shape, data })
}

fn string_data(value: &DynValue) -> ort::Result<Bytes> {
    let mut data = Vec::new();
    for text in value.try_extract_strings()?.1 {
        tensor::push_string(&mut data, text.as_bytes());
    }
    Ok(data.into())
}

/// A tensor of the runtime, as bytes.
struct Output {
    value: DynValue,
    len: usize,
}

impl AsRef<[u8]> for Output {
    fn as_ref(&self) -> &[u8] {
        let mut data = std::ptr::null_mut();
        // SAFETY: the value is a live tensor of numbers.
        let status = unsafe { (ort::api().GetTensorMutableData)(self.value.ptr().cast_mut(), &raw mut data) };
        // SAFETY: the runtime has just returned the status.
        unsafe { ort::Error::result_from_status(status) }.expect("a dense tensor has data");
        // SAFETY: the runtime holds at least `len` bytes, as type and shape require, and nobody writes them any more.
        unsafe { std::slice::from_raw_parts(data.cast_const().cast(), self.len) }
    }
}

fn missing(name: &str) -> Failure {
    Failure::new(ErrorCode::RunFailed, format!("ONNX Runtime gave no output '{name}'"))
}

fn element(dtype: DType) -> Element {
    match dtype {
        DType::Bool => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,
        DType::U8 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
        DType::U16 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16,
        DType::U32 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32,
        DType::U64 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64,
        DType::I8 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
        DType::I16 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,
        DType::I32 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
        DType::I64 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
        DType::F16 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        DType::F32 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
        DType::F64 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE,
        DType::BF16 => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        DType::Bytes => Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING,
    }
}

fn dtype(element: TensorElementType) -> Option<DType> {
    Some(match element {
        TensorElementType::Bool => DType::Bool,
        TensorElementType::Uint8 => DType::U8,
        TensorElementType::Uint16 => DType::U16,
        TensorElementType::Uint32 => DType::U32,
        TensorElementType::Uint64 => DType::U64,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Int16 => DType::I16,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Bfloat16 => DType::BF16,
        TensorElementType::String => DType::Bytes,
        _ => return None,
    })
}
