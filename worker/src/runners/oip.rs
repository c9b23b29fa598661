//! The client of a runner: Open Inference Protocol v2 over HTTP/1.1 on a Unix socket, tensors as raw bytes both ways.
//!
//! A runner's answers are not trusted: every length is checked before anything is kept.

mod body;

use std::{fs::File, io, os::fd::AsRawFd};

use bytes::Bytes;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use hyper_util::rt::TokioIo;
use proto_msgs::{
    DType, ErrorCode, Failure,
    limits::{NAME_BYTES_MAX, OUTPUT_BYTES_MAX, RANK_MAX, TENSORS_MAX},
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use self::body::{BodyReader, RequestBody};
use super::fit::TensorMeta;
use crate::{
    data::{blobs::BlobStore, payload::Payload},
    engine::{SOCKET_NAME, SocketFolder, code_of_runner},
};

/// Name under which every runner serves its model.
const MODEL: &str = "model";

/// Header with the length of the JSON at the start of the body; tensors follow it.
const JSON_LENGTH_HEADER: &str = "inference-header-content-length";

/// Most bytes of JSON in an answer: names, types and shapes of the largest number of tensors.
const JSON_BYTES_MAX: u64 = 1 << 20;

/// A connection to one runner. One request at a time.
pub(crate) struct Session {
    sender: SendRequest<RequestBody>,
}

/// Why a request to a runner failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// The runner answered with an error, and was heard to the end.
    #[error(transparent)]
    Refused(Failure),
    /// The answer is invalid, or its outputs cannot be kept. The rest of it was not read: there can be no further call.
    #[error(transparent)]
    Unread(#[from] Failure),
    /// The connection ended, and so did the runner.
    #[error("connection to the runner: {0}")]
    Broken(#[from] hyper::Error),
}

/// One output of a call, for one item or several.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) payload: Payload,
}

impl Tensor {
    /// Copies the bytes out of the memory that they share with other outputs.
    pub(crate) fn detach(&mut self) {
        let payload = std::mem::replace(&mut self.payload, Payload::Memory(Bytes::new()));
        self.payload = payload.detached();
    }
}

/// One input of a request. Its pieces follow one another.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) pieces: Vec<Payload>,
}

impl Given {
    fn size_bytes(&self) -> u64 {
        self.pieces.iter().map(Payload::size_bytes).sum()
    }
}

#[derive(Deserialize)]
struct MetadataJson {
    inputs: Vec<TensorJson>,
}

#[derive(Deserialize)]
struct TensorJson {
    name: String,
    datatype: String,
    #[serde(default)]
    shape: Vec<i64>,
}

#[derive(Serialize)]
struct InferJson<'a> {
    inputs: Vec<InputJson<'a>>,
    parameters: BinaryOutput,
}

#[derive(Serialize)]
struct InputJson<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [u64],
    parameters: BinarySize,
}

#[derive(Deserialize, Serialize)]
struct BinarySize {
    binary_data_size: u64,
}

#[derive(Serialize)]
struct BinaryOutput {
    binary_data_output: bool,
}

#[derive(Deserialize)]
struct AnswerJson {
    outputs: Vec<OutputJson>,
}

#[derive(Deserialize)]
struct OutputJson {
    name: String,
    datatype: String,
    shape: Vec<u64>,
    parameters: BinarySize,
}

#[derive(Deserialize)]
struct ErrorJson {
    error: String,
    code: Option<String>,
}

impl Session {
    /// Connects to the socket in `folder`.
    pub(crate) async fn connect(folder: &SocketFolder) -> io::Result<Self> {
        // Through the opened folder: a socket's path must be shorter than the path of a state folder may be.
        let opened = File::open(folder.path())?;
        let path = format!("/proc/self/fd/{}/{SOCKET_NAME}", opened.as_raw_fd());
        let stream = UnixStream::connect(path).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // This task ends with the sender or the runner; the request in progress gets its error.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender })
    }

    /// Whether the model is loaded.
    pub(crate) async fn is_ready(&mut self) -> Result<bool, AskError> {
        let answer = self.ask(Method::GET, "/v2/health/ready", RequestBody::empty(), None).await?;
        let is_ready = answer.status() == StatusCode::OK;
        BodyReader::new(answer.into_body()).take(0).await?;
        Ok(is_ready)
    }

    /// Asks for the inputs of the model.
    pub(crate) async fn inputs(&mut self) -> Result<Vec<TensorMeta>, AskError> {
        let answer = self.ask(Method::GET, &format!("/v2/models/{MODEL}"), RequestBody::empty(), None).await?;
        let answer = successful(answer).await?;
        let length = content_length(&answer, JSON_BYTES_MAX)?;
        let json = BodyReader::new(answer.into_body()).take(length as usize).await?;
        let metadata: MetadataJson = parse(&json)?;
        let inputs =
            metadata.inputs.into_iter().take(TENSORS_MAX).map(|tensor| {
                Ok(TensorMeta { dtype: dtype(&tensor.datatype)?, name: tensor.name, shape: tensor.shape })
            });
        Ok(inputs.collect::<Result<_, Failure>>()?)
    }

    /// Runs the model once. Outputs that `stays` rejects go to files of `store` instead of memory.
    pub(crate) async fn infer(
        &mut self,
        inputs: Vec<Given>,
        store: &BlobStore,
        mut stays: impl FnMut(u64) -> bool,
    ) -> Result<Vec<Tensor>, AskError> {
        let (json, body) = infer_request(inputs);
        let path = format!("/v2/models/{MODEL}/infer");
        let answer = self.ask(Method::POST, &path, body, Some(json)).await?;
        let answer = successful(answer).await?;
        let total = content_length(&answer, OUTPUT_BYTES_MAX)?;
        let json_length = answer.headers().get(JSON_LENGTH_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        let json_length: u64 = json_length.ok_or_else(|| nonsense("no tensors in binary form"))?;
        if json_length > JSON_BYTES_MAX || json_length > total {
            return Err(nonsense("a header longer than the answer").into());
        }
        let mut reader = BodyReader::new(answer.into_body());
        let answer: AnswerJson = parse(&reader.take(json_length as usize).await?)?;
        check_outputs(&answer.outputs, total - json_length)?;
        let mut outputs = Vec::with_capacity(answer.outputs.len());
        for output in answer.outputs {
            let size_bytes = output.parameters.binary_data_size;
            let payload = if stays(size_bytes) {
                Payload::Memory(reader.take(size_bytes as usize).await?)
            } else {
                reader.spool(size_bytes, store).await?
            };
            let dtype = dtype(&output.datatype)?;
            outputs.push(Tensor { name: output.name, dtype, shape: output.shape, payload });
        }
        Ok(outputs)
    }

    async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: RequestBody,
        json_bytes: Option<usize>,
    ) -> Result<Response<Incoming>, AskError> {
        let mut request = Request::builder().method(method).uri(path).header("host", "runner");
        if let Some(length) = json_bytes {
            request = request.header(JSON_LENGTH_HEADER, length).header(CONTENT_TYPE, "application/octet-stream");
        }
        let request = request.body(body).expect("invariant: method, path and headers are fixed and valid");
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }
}

/// The length of the request's JSON, and the whole body.
fn infer_request(inputs: Vec<Given>) -> (usize, RequestBody) {
    let json = InferJson {
        inputs: inputs
            .iter()
            .map(|input| InputJson {
                name: &input.name,
                datatype: input.dtype.name(),
                shape: &input.shape,
                parameters: BinarySize { binary_data_size: input.size_bytes() },
            })
            .collect(),
        parameters: BinaryOutput { binary_data_output: true },
    };
    let json = serde_json::to_vec(&json).expect("invariant: names and numbers are always JSON");
    let length = json.len();
    let tensors = inputs.into_iter().flat_map(|input| input.pieces);
    (length, RequestBody::new(std::iter::once(Payload::Memory(Bytes::from(json))).chain(tensors)))
}

/// Checks that lengths and shapes agree, so that later code can rely on them.
fn check_outputs(outputs: &[OutputJson], total_bytes: u64) -> Result<(), Failure> {
    if outputs.len() > TENSORS_MAX {
        return Err(nonsense("more outputs than a model may have"));
    }
    let mut sum_bytes = 0_u64;
    for output in outputs {
        if output.name.len() > NAME_BYTES_MAX {
            let text =
                format!("the model names an output with {} bytes, the limit is {NAME_BYTES_MAX}", output.name.len());
            return Err(Failure::new(ErrorCode::ResultTooLarge, text));
        }
        let size_bytes = output.parameters.binary_data_size;
        sum_bytes = sum_bytes.saturating_add(size_bytes);
        let elements = output.shape.iter().try_fold(1_u64, |product, dim| product.checked_mul(*dim));
        let expected = dtype(&output.datatype)?.size_bytes().map(|each| elements?.checked_mul(each as u64));
        if output.shape.len() > RANK_MAX || expected.is_some_and(|expected| expected != Some(size_bytes)) {
            return Err(nonsense(&format!("output '{}' whose length is not that of its shape", output.name)));
        }
    }
    if sum_bytes == total_bytes { Ok(()) } else { Err(nonsense("outputs longer or shorter than the answer")) }
}

/// The answer if it is a success, else the runner's error.
async fn successful(answer: Response<Incoming>) -> Result<Response<Incoming>, AskError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let length = content_length(&answer, JSON_BYTES_MAX)?;
    let body = BodyReader::new(answer.into_body()).take(length as usize).await?;
    let said: ErrorJson = serde_json::from_slice(&body).map_err(|_| nonsense(&format!("status {status}")))?;
    let code = said.code.as_deref().and_then(code_of_runner).unwrap_or(ErrorCode::RunFailed);
    Err(AskError::Refused(Failure::new(code, said.error)))
}

fn content_length(answer: &Response<Incoming>, max: u64) -> Result<u64, Failure> {
    let length = answer.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match length {
        None => Err(nonsense("an answer without a length")),
        Some(length) if length > max => {
            Err(Failure::new(ErrorCode::ResultTooLarge, format!("the result has {length} bytes, the limit is {max}")))
        }
        Some(length) => Ok(length),
    }
}

fn dtype(text: &str) -> Result<DType, Failure> {
    text.parse().map_err(|error| nonsense(&format!("{error}")))
}

fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Failure> {
    serde_json::from_slice(json).map_err(|error| nonsense(&error.to_string()))
}

fn nonsense(what: &str) -> Failure {
    Failure::new(ErrorCode::RunProtocol, format!("the runner's answer is invalid: {what}"))
}
