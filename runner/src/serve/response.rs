//! From the tensors of a run to the bytes of an answer. Owns that binary data goes to the socket without a copy.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::{
    Response, StatusCode,
    body::{Body, Bytes, Frame, SizeHint},
    header::{CONTENT_TYPE, HeaderValue},
};
use mesh_models::Signature;
use proto_msgs::{DType, ErrorCode, Failure};
use serde::Serialize;
use serde_json::Value;

use super::{
    oip::{BinaryData, ErrorBody, InferResponse, ResponseOutput, ResponseParameters},
    request::JSON_LENGTH,
};
use crate::{
    model_thread::Ran,
    tensor::{self, Tensor},
};

/// A body of several pieces, none of them copied.
#[derive(Debug, Default)]
pub(super) struct Pieces(VecDeque<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

/// The answer to an inference request.
///
/// # Errors
/// `BAD_REQUEST` if JSON cannot express an output.
pub(super) fn inference(
    model_name: &str,
    signature: &Signature,
    id: Option<String>,
    wanted: &[(usize, bool)],
    ran: &Ran,
) -> Result<Response<Pieces>, Failure> {
    let mut binary = Vec::new();
    let mut outputs = Vec::with_capacity(wanted.len());
    for &(index, as_binary) in wanted {
        let (spec, tensor) = (&signature.outputs[index], &ran.outputs[index]);
        let mut output = ResponseOutput {
            name: &spec.name,
            datatype: tensor.dtype.name(),
            shape: &tensor.shape,
            parameters: None,
            data: None,
        };
        if as_binary {
            output.parameters = Some(BinaryData { binary_data_size: tensor.data.len() });
            binary.push(tensor.data.clone());
        } else {
            output.data = Some(values(&spec.name, tensor)?);
        }
        outputs.push(output);
    }
    let has_binary = wanted.iter().any(|(_, binary)| *binary);
    let json = bytes(&InferResponse {
        model_name,
        model_version: "1",
        id,
        parameters: ResponseParameters { run_us: u64::try_from(ran.run_time.as_micros()).unwrap_or(u64::MAX) },
        outputs,
    });
    let json_length = json.len();
    let mut response = with_pieces(StatusCode::OK, std::iter::once(json).chain(binary));
    if has_binary {
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(JSON_LENGTH, HeaderValue::from(json_length));
    }
    Ok(response)
}

/// An answer in JSON.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response<Pieces> {
    with_pieces(status, [bytes(body)])
}

/// An answer with only a status.
pub(super) fn empty(status: StatusCode) -> Response<Pieces> {
    let mut response = Response::new(Pieces::default());
    *response.status_mut() = status;
    response
}

/// An answer with the failure's text and code.
pub(super) fn failure(failure: &Failure) -> Response<Pieces> {
    let status = match failure.code {
        ErrorCode::BadRequest | ErrorCode::InputMismatch => StatusCode::BAD_REQUEST,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::Busy => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    json(status, &ErrorBody { error: &failure.text, code: failure.code.name() })
}

fn with_pieces(status: StatusCode, pieces: impl IntoIterator<Item = Bytes>) -> Response<Pieces> {
    let pieces = pieces.into_iter().filter(|piece| !piece.is_empty());
    let mut response = Response::new(Pieces(pieces.collect()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn bytes(body: &impl Serialize) -> Bytes {
    serde_json::to_vec(body).expect("answers have only string keys").into()
}

/// A tensor's elements in JSON: one flat array, as the protocol requires.
fn values(name: &str, tensor: &Tensor) -> Result<Value, Failure> {
    macro_rules! numbers {
        ($type:ty) => {
            tensor.data.as_chunks().0.iter().map(|bytes| Value::from(<$type>::from_le_bytes(*bytes))).collect()
        };
    }
    let refused =
        |why: String| Failure::new(ErrorCode::BadRequest, format!("output '{name}': {why}; ask for binary data"));
    let values: Vec<Value> = match tensor.dtype {
        DType::Bool => tensor.data.iter().map(|byte| Value::from(*byte != 0)).collect(),
        DType::U8 => numbers!(u8),
        DType::U16 => numbers!(u16),
        DType::U32 => numbers!(u32),
        DType::U64 => numbers!(u64),
        DType::I8 => numbers!(i8),
        DType::I16 => numbers!(i16),
        DType::I32 => numbers!(i32),
        DType::I64 => numbers!(i64),
        DType::F32 => numbers!(f32),
        DType::F64 => numbers!(f64),
        DType::F16 | DType::BF16 => return Err(refused(format!("{} has no form in JSON", tensor.dtype))),
        DType::Bytes => {
            let strings = tensor::strings(&tensor.data).expect("engines give whole strings");
            strings.into_iter().map(|string| Value::from(String::from_utf8_lossy(string))).collect()
        }
    };
    if values.contains(&Value::Null) {
        return Err(refused("not all of it are finite numbers".to_owned()));
    }
    Ok(Value::Array(values))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn floats(numbers: &[f32]) -> Tensor {
        Tensor {
            dtype: DType::F32,
            shape: vec![numbers.len() as i64],
            data: numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>().into(),
        }
    }

    #[test]
    fn numbers_become_a_flat_array() {
        assert_eq!(values("x", &floats(&[1.0, -0.5])), Ok(json!([1.0, -0.5])));
    }

    #[test]
    fn what_json_cannot_say_is_not_said_wrongly() {
        for number in [f32::NAN, f32::INFINITY] {
            let failure = values("x", &floats(&[1.0, number])).unwrap_err();
            assert_eq!(failure.text, "output 'x': not all of it are finite numbers; ask for binary data");
        }
    }
}
