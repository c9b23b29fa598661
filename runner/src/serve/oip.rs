//! The JSON of the Open Inference Protocol v2: fields of requests and answers. Owns their names and nothing else.

use mesh_models::{Quantization, Signature, TensorSpec};
use proto_msgs::{DType, ModelFormat};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The body of an inference request, or its JSON part.
#[derive(Debug, Deserialize)]
pub(super) struct InferRequest {
    pub(super) id: Option<String>,
    #[serde(default)]
    pub(super) parameters: RequestParameters,
    pub(super) inputs: Vec<RequestInput>,
    #[serde(default)]
    pub(super) outputs: Vec<RequestOutput>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RequestParameters {
    /// Whether outputs are sent as binary data unless they say otherwise.
    pub(super) binary_data_output: bool,
    /// Id of the sequence: its requests share the state of a model that keeps any.
    pub(super) sequence_id: Option<Value>,
    /// Whether the sequence begins with this request.
    pub(super) sequence_start: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct RequestInput {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    pub(super) datatype: String,
    #[serde(default)]
    pub(super) parameters: InputParameters,
    pub(super) data: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct InputParameters {
    /// Length of the data, which follows the JSON in the order of the inputs.
    pub(super) binary_data_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RequestOutput {
    pub(super) name: String,
    #[serde(default)]
    pub(super) parameters: OutputParameters,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct OutputParameters {
    pub(super) binary_data: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(super) struct ServerMetadata {
    pub(super) name: &'static str,
    pub(super) version: &'static str,
    pub(super) extensions: [&'static str; 2],
}

#[derive(Debug, Serialize)]
pub(crate) struct ModelMetadata<'a> {
    name: &'a str,
    versions: [&'static str; 1],
    platform: &'static str,
    inputs: Vec<TensorMetadata<'a>>,
    outputs: Vec<TensorMetadata<'a>>,
}

impl<'a> ModelMetadata<'a> {
    /// The protocol's metadata of a model with this signature.
    pub(crate) fn of(name: &'a str, signature: &'a Signature) -> Self {
        Self {
            name,
            versions: ["1"],
            platform: match signature.format {
                ModelFormat::TfLite => "tflite_litert",
                ModelFormat::Onnx => "onnxruntime_onnx",
            },
            inputs: signature.inputs.iter().map(TensorMetadata::from).collect(),
            outputs: signature.outputs.iter().map(TensorMetadata::from).collect(),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct TensorMetadata<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: Vec<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<QuantizationParameters>,
}

/// `real = scale * (integer - zero_point)`
#[derive(Debug, Serialize)]
struct QuantizationParameters {
    scale: f32,
    zero_point: i64,
}

impl<'a> From<&'a TensorSpec> for TensorMetadata<'a> {
    fn from(spec: &'a TensorSpec) -> Self {
        let quantization = |Quantization { scale, zero_point }| QuantizationParameters { scale, zero_point };
        Self {
            name: &spec.name,
            datatype: spec.dtype.map_or("", DType::name),
            shape: spec.shape.clone().unwrap_or_default(),
            parameters: spec.quantization.map(quantization),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct InferResponse<'a> {
    pub(super) model_name: &'a str,
    pub(super) model_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    pub(super) parameters: ResponseParameters,
    pub(super) outputs: Vec<ResponseOutput<'a>>,
}

#[derive(Debug, Serialize)]
pub(super) struct ResponseParameters {
    /// Time in the model.
    pub(super) run_us: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct ResponseOutput<'a> {
    pub(super) name: &'a str,
    pub(super) datatype: &'static str,
    pub(super) shape: &'a [i64],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) parameters: Option<BinaryData>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) data: Option<Value>,
}

#[derive(Debug, Serialize)]
pub(super) struct BinaryData {
    pub(super) binary_data_size: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct ErrorBody<'a> {
    pub(super) error: &'a str,
    pub(super) code: &'static str,
}
