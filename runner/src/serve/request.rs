//! From the bytes of an inference request to the tensors of a run. Owns that nothing is allocated before it is known to
//! fit the model, and that binary data is copied once: from the socket's buffer to the place where the runtime reads
//! it.

use std::collections::BTreeMap;

use http_body_util::BodyExt;
use hyper::{
    HeaderMap,
    body::{Bytes, Incoming},
    header::CONTENT_LENGTH,
};
use mesh_models::Signature;
use proto_msgs::{DType, ErrorCode, Failure, limits};
use serde_json::Value;

use super::oip::{InferRequest, RequestInput};
use crate::{
    engine,
    model_thread::Sequence,
    tensor::{self, AlignedBytes, Tensor, element_count},
};

/// Bytes of JSON in a request. While it is read it takes some ten times as much; larger tensors travel as binary data.
const JSON_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Header with the length of the JSON before the binary data.
pub(super) const JSON_LENGTH: &str = "inference-header-content-length";

/// A request that fits the model.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) id: Option<String>,
    /// The inputs in the order of the signature.
    pub(super) inputs: Vec<Tensor>,
    pub(super) sequence: Sequence,
    /// The wanted outputs by index in the signature, and whether each is sent as binary data.
    pub(super) outputs: Vec<(usize, bool)>,
}

/// Reads a request.
///
/// # Errors
/// `BAD_REQUEST`, `TOO_LARGE` or `MODEL_INPUT_MISMATCH`. The body is then read to its end, up to the limit, so that a
/// client that is still writing comes to read the answer.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    signature: &Signature,
    body_bytes_max: u64,
) -> Result<Order, Failure> {
    let mut body = Body { body, rest: Bytes::new(), most_bytes: body_bytes_max, left_bytes: body_bytes_max };
    let order = match number(headers, CONTENT_LENGTH.as_str()) {
        Ok(Some(announced)) if announced > body_bytes_max => Err(too_large(body_bytes_max)),
        Ok(_) => read_order(headers, &mut body, signature).await,
        Err(failure) => Err(failure),
    };
    if order.is_err() {
        body.discard().await;
    }
    order
}

async fn read_order(headers: &HeaderMap, body: &mut Body, signature: &Signature) -> Result<Order, Failure> {
    let json = match number(headers, JSON_LENGTH)? {
        Some(bytes) if bytes > JSON_BYTES_MAX as u64 => return Err(too_large(JSON_BYTES_MAX as u64)),
        Some(bytes) => {
            let mut json = vec![0; bytes as usize];
            body.fill(&mut json).await?;
            json
        }
        None => body.rest_of(JSON_BYTES_MAX).await?,
    };
    let request: InferRequest =
        serde_json::from_slice(&json).map_err(|error| bad(format!("the request is not as expected: {error}")))?;
    let outputs = wanted(&request, signature)?;
    let sequence = Sequence {
        id: request.parameters.sequence_id.map(|id| id.to_string()).filter(|id| id != "0" && id != "\"\""),
        start: request.parameters.sequence_start,
    };
    let mut given = BTreeMap::new();
    for input in request.inputs {
        let index = place(&input, signature)?;
        let tensor = read_input(input, &signature.inputs[index], body).await?;
        if given.insert(index, tensor).is_some() {
            return Err(bad(format!("input '{}' is given twice", signature.inputs[index].name)));
        }
    }
    if let Some(index) = (0..signature.inputs.len()).find(|index| !given.contains_key(index)) {
        let spec = &signature.inputs[index];
        return Err(mismatch(format!("input '{}' is missing: expected {spec}", spec.name)));
    }
    body.ended().await?;
    Ok(Order { id: request.id, inputs: given.into_values().collect(), sequence, outputs })
}

fn place(input: &RequestInput, signature: &Signature) -> Result<usize, Failure> {
    let place = signature.inputs.iter().position(|spec| spec.name == input.name);
    place.ok_or_else(|| {
        let known: Vec<_> = signature.inputs.iter().map(|spec| format!("'{}'", spec.name)).collect();
        mismatch(format!("there is no input '{}': expected {}", input.name, known.join(", ")))
    })
}

async fn read_input(input: RequestInput, spec: &mesh_models::TensorSpec, body: &mut Body) -> Result<Tensor, Failure> {
    let dtype: DType = input
        .datatype
        .parse()
        .map_err(|error: proto_msgs::model::UnknownName| bad(format!("input '{}': {error}", input.name)))?;
    let data = match (input.parameters.binary_data_size, input.data) {
        (Some(bytes), None) => {
            if bytes > body.left_bytes.saturating_add(body.rest.len() as u64) {
                return Err(bad(format!("input '{}' has more bytes than the request", input.name)));
            }
            let bytes = usize::try_from(bytes).map_err(|_| too_large(body.most_bytes))?;
            engine::check(spec, dtype, &input.shape, Some(bytes))?;
            let mut data = AlignedBytes::zeroed(bytes);
            body.fill(data.as_mut()).await?;
            data
        }
        (None, Some(values)) => {
            engine::check(spec, dtype, &input.shape, None)?;
            let data = elements(&values, dtype).map_err(|why| bad(format!("input '{}': {why}", input.name)))?;
            AlignedBytes::copied(&data)
        }
        (Some(_), Some(_)) => return Err(bad(format!("input '{}' has its data twice", input.name))),
        (None, None) => return Err(bad(format!("input '{}' has no data", input.name))),
    };
    engine::check(spec, dtype, &input.shape, Some(data.as_ref().len()))?;
    if dtype == DType::Bytes {
        let strings = tensor::strings(data.as_ref()).map(|strings| strings.len());
        if strings != element_count(&input.shape) {
            let got = strings
                .map_or("strings that do not end where their lengths say".to_owned(), |n| format!("{n} strings"));
            return Err(mismatch(format!("input '{}': expected shape {:?}, got {got}", input.name, input.shape)));
        }
    }
    // To a runtime written in C++, any other value has no meaning.
    if dtype == DType::Bool
        && let Some(byte) = data.as_ref().iter().find(|byte| **byte > 1)
    {
        return Err(mismatch(format!("input '{}': expected BOOL, one byte of 0 or 1 each, got {byte}", input.name)));
    }
    Ok(Tensor { dtype, shape: input.shape, data: data.into() })
}

/// The outputs to send, and whether as binary data; all of them unless the request names some.
fn wanted(request: &InferRequest, signature: &Signature) -> Result<Vec<(usize, bool)>, Failure> {
    let binary = request.parameters.binary_data_output;
    if request.outputs.is_empty() {
        return Ok((0..signature.outputs.len()).map(|index| (index, binary)).collect());
    }
    if request.outputs.len() > limits::TENSORS_MAX {
        return Err(bad(format!("more than {} outputs are asked for", limits::TENSORS_MAX)));
    }
    let outputs = request.outputs.iter().map(|output| {
        let place = signature.outputs.iter().position(|spec| spec.name == output.name);
        let place = place.ok_or_else(|| {
            let known: Vec<_> = signature.outputs.iter().map(|spec| format!("'{}'", spec.name)).collect();
            bad(format!("there is no output '{}': the model has {}", output.name, known.join(", ")))
        })?;
        Ok((place, output.parameters.binary_data.unwrap_or(binary)))
    });
    outputs.collect()
}

/// The elements of JSON data, nested or flat, as the bytes of a tensor.
fn elements(values: &Value, dtype: DType) -> Result<Vec<u8>, String> {
    let mut data = Vec::new();
    // Row-major order is the order of reading, whatever the nesting.
    let mut open = vec![std::slice::from_ref(values).iter()];
    while let Some(row) = open.last_mut() {
        match row.next() {
            Some(Value::Array(inner)) => open.push(inner.iter()),
            Some(value) => push(&mut data, value, dtype).ok_or_else(|| not_an_element(value, dtype))?,
            None => {
                open.pop();
            }
        }
    }
    Ok(data)
}

fn push(data: &mut Vec<u8>, value: &Value, dtype: DType) -> Option<()> {
    macro_rules! integer {
        ($type:ty, $number:expr) => {
            data.extend_from_slice(&<$type>::try_from($number).ok()?.to_le_bytes())
        };
    }
    match dtype {
        DType::Bool => data.push(u8::from(value.as_bool()?)),
        DType::U8 => integer!(u8, value.as_u64()?),
        DType::U16 => integer!(u16, value.as_u64()?),
        DType::U32 => integer!(u32, value.as_u64()?),
        DType::U64 => integer!(u64, value.as_u64()?),
        DType::I8 => integer!(i8, value.as_i64()?),
        DType::I16 => integer!(i16, value.as_i64()?),
        DType::I32 => integer!(i32, value.as_i64()?),
        DType::I64 => integer!(i64, value.as_i64()?),
        DType::F32 => data.extend_from_slice(&(value.as_f64()? as f32).to_le_bytes()),
        DType::F64 => data.extend_from_slice(&value.as_f64()?.to_le_bytes()),
        DType::Bytes => tensor::push_string(data, value.as_str()?.as_bytes()),
        DType::F16 | DType::BF16 => return None,
    }
    Some(())
}

fn not_an_element(value: &Value, dtype: DType) -> String {
    if matches!(dtype, DType::F16 | DType::BF16) {
        return format!("{dtype} has no form in JSON: send it as binary data");
    }
    let mut value = value.to_string();
    value.truncate(value.floor_char_boundary(40));
    format!("{value} does not fit {dtype}")
}

/// A request's body, read piece by piece.
struct Body {
    body: Incoming,
    /// Bytes that have arrived and are not used yet.
    rest: Bytes,
    /// Bytes that the whole body may have.
    most_bytes: u64,
    /// Bytes that may still arrive.
    left_bytes: u64,
}

impl Body {
    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        if !self.rest.is_empty() {
            return Ok(Some(std::mem::take(&mut self.rest)));
        }
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| bad(format!("the request broke off: {error}")))?;
            let Ok(piece) = frame.into_data() else { continue };
            self.left_bytes =
                self.left_bytes.checked_sub(piece.len() as u64).ok_or_else(|| too_large(self.most_bytes))?;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// Fills all of `target`.
    async fn fill(&mut self, mut target: &mut [u8]) -> Result<(), Failure> {
        while !target.is_empty() {
            let short = || bad("the request ends before its data does".to_owned());
            let mut piece = self.next().await?.ok_or_else(short)?;
            let taken = piece.split_to(piece.len().min(target.len()));
            let (filled, open) = target.split_at_mut(taken.len());
            filled.copy_from_slice(&taken);
            target = open;
            self.rest = piece;
        }
        Ok(())
    }

    async fn rest_of(&mut self, bytes_max: usize) -> Result<Vec<u8>, Failure> {
        let mut all = Vec::new();
        while let Some(piece) = self.next().await? {
            if all.len() + piece.len() > bytes_max {
                return Err(too_large(bytes_max as u64));
            }
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    async fn ended(&mut self) -> Result<(), Failure> {
        match self.next().await? {
            Some(_) => Err(bad("the request has more data than its inputs say".to_owned())),
            None => Ok(()),
        }
    }

    async fn discard(&mut self) {
        while let Ok(Some(_)) = self.next().await {}
    }
}

fn number(headers: &HeaderMap, name: &str) -> Result<Option<u64>, Failure> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.map(Some).ok_or_else(|| bad(format!("the header {name} is not a number")))
}

fn bad(text: String) -> Failure {
    Failure::new(ErrorCode::BadRequest, text)
}

fn mismatch(text: String) -> Failure {
    Failure::new(ErrorCode::InputMismatch, text)
}

fn too_large(bytes_max: u64) -> Failure {
    Failure::new(ErrorCode::TooLarge, format!("the request is longer than {bytes_max} bytes"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_and_flat_data_are_the_same_tensor() {
        let bytes = [1_i32, 2, 3, 4].map(i32::to_le_bytes).concat();
        assert_eq!(elements(&json!([[1, 2], [3, 4]]), DType::I32), Ok(bytes.clone()));
        assert_eq!(elements(&json!([1, 2, 3, 4]), DType::I32), Ok(bytes));
        assert_eq!(elements(&json!([]), DType::I32), Ok(vec![]));
    }

    #[test]
    fn a_number_that_does_not_fit_its_type_is_refused() {
        assert_eq!(elements(&json!([255]), DType::U8), Ok(vec![255]));
        assert_eq!(elements(&json!([256]), DType::U8), Err("256 does not fit UINT8".to_owned()));
        assert_eq!(elements(&json!([1.5]), DType::I64), Err("1.5 does not fit INT64".to_owned()));
        assert_eq!(elements(&json!([-1]), DType::U64), Err("-1 does not fit UINT64".to_owned()));
        assert_eq!(elements(&json!(["x"]), DType::F32), Err("\"x\" does not fit FP32".to_owned()));
        assert!(elements(&json!([1.0]), DType::F16).unwrap_err().contains("binary data"));
    }
}
