//! Tensors written as JSON. Owns the accepted forms. Never: the type or shape that the model expects, except for the
//! element type of converted numbers.
//!
//! ```text
//!   [[1, 2], [3, 4]]                                              one tensor; its nesting is its shape
//!   {"shape": [2, 2], "dtype": "FP32", "data": [1, 2, 3, 4]}      one tensor; dtype may be left out
//!   {"x": [1, 2], "y": {"shape": [1], "data": [3]}}               several, by name
//!   {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]}    Open Inference Protocol v2
//! ```

use proto_msgs::{DType, limits};
use serde_json::{Map, Value};

use crate::tensor::{self, Number, Tensor};

/// Why a JSON text contains no tensors.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JsonError {
    #[error("is not valid JSON: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("holds no tensor: expected nested lists of numbers, or an object of them")]
    NoTensor,
    #[error("has lists of different lengths (or numbers beside lists) at depth {depth}")]
    Ragged { depth: usize },
    #[error("is nested deeper than {max} lists", max = limits::RANK_MAX)]
    TooDeep,
    #[error("holds {got} numbers for shape {shape:?}")]
    Count { got: u64, shape: Vec<u64> },
    #[error("has the shape {0}, which is not a list of whole numbers")]
    Shape(Value),
    #[error("{0}")]
    DType(#[from] proto_msgs::model::UnknownName),
    #[error("holds {value}{}, which is not a value of type {dtype}", place(at))]
    Element { value: String, dtype: DType, at: String },
    #[error("holds {value}{}, which does not fit type {dtype}", place(at))]
    Misfit { value: String, dtype: DType, at: String },
    #[error("holds {0} tensors, the limit is {max}", max = limits::TENSORS_MAX)]
    TooMany(usize),
}

impl JsonError {
    /// The same error about an element of what `outer` is the name or index of.
    fn within(mut self, outer: &str) -> Self {
        if let Self::Element { at, .. } | Self::Misfit { at, .. } = &mut self {
            at.insert_str(0, outer);
        }
        self
    }
}

/// Where an element is, such as ` at x[0][3]`; nothing for a tensor that is one value.
fn place(at: &str) -> String {
    if at.is_empty() { String::new() } else { format!(" at {at}") }
}

/// The tensors in a text, with their names if any; those of an object sorted by name. `wanted` is the model's element
/// type of an input by name or position, if known. The default is `FP32` for numbers, `BYTES` for strings.
pub(crate) fn read(
    text: &[u8],
    wanted: impl Fn(Option<&str>, usize) -> Option<DType>,
) -> Result<Vec<(Option<String>, Tensor)>, JsonError> {
    // Some editors begin a file with a mark of its encoding.
    let value: Value = serde_json::from_slice(text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text))?;
    let Value::Object(object) = value else { return Ok(vec![(None, one(&value, wanted(None, 0))?)]) };
    if object.contains_key("data") {
        return Ok(vec![(None, described(&object, wanted(None, 0))?)]);
    }
    let named: Vec<(String, Value)> = match object.get("inputs") {
        Some(Value::Array(inputs)) if inputs.iter().all(|input| input.get("name").is_some_and(Value::is_string)) => {
            let name = |input: &Value| input["name"].as_str().unwrap_or_default().to_owned();
            inputs.iter().map(|input| (name(input), input.clone())).collect()
        }
        _ => object.into_iter().collect(),
    };
    if named.is_empty() {
        return Err(JsonError::NoTensor);
    }
    if named.len() > limits::TENSORS_MAX {
        return Err(JsonError::TooMany(named.len()));
    }
    let tensors = named.into_iter().enumerate().map(|(place, (name, value))| {
        let dtype = wanted(Some(&name), place);
        let tensor = match &value {
            Value::Object(object) => described(object, dtype),
            value => one(value, dtype),
        };
        let tensor = tensor.map_err(|error| error.within(&name))?;
        Ok((Some(name), tensor))
    });
    tensors.collect()
}

/// A tensor of the form `{"shape": …, "dtype": …, "data": …}`.
fn described(object: &Map<String, Value>, wanted: Option<DType>) -> Result<Tensor, JsonError> {
    let data = object.get("data").ok_or(JsonError::NoTensor)?;
    let said = object.get("dtype").or_else(|| object.get("datatype")).and_then(Value::as_str);
    let dtype = said.map(str::parse::<DType>).transpose()?.or(wanted);
    let mut tensor = one(data, dtype)?;
    if let Some(said) = object.get("shape") {
        let shape: Option<Vec<u64>> =
            said.as_array().and_then(|dimensions| dimensions.iter().map(Value::as_u64).collect());
        let shape =
            shape.filter(|shape| shape.len() <= limits::RANK_MAX).ok_or_else(|| JsonError::Shape(said.clone()))?;
        let got = tensor::elements(&tensor.shape).unwrap_or(u64::MAX);
        if tensor::elements(&shape) != Some(got) {
            return Err(JsonError::Count { got, shape });
        }
        tensor.shape = shape;
    }
    Ok(tensor)
}

/// A tensor of nested lists, or of a single value.
fn one(value: &Value, wanted: Option<DType>) -> Result<Tensor, JsonError> {
    let mut shape = Vec::new();
    let mut level = value;
    while let Value::Array(items) = level {
        if shape.len() == limits::RANK_MAX {
            return Err(JsonError::TooDeep);
        }
        shape.push(items.len() as u64);
        match items.first() {
            Some(first) => level = first,
            None => break,
        }
    }
    let is_empty = shape.last() == Some(&0);
    let dtype = wanted.unwrap_or(match level {
        Value::String(_) => DType::Bytes,
        Value::Bool(_) => DType::Bool,
        _ => DType::F32,
    });
    if !is_empty && (level.is_object() || level.is_null()) {
        return Err(JsonError::NoTensor);
    }
    let mut data = Vec::new();
    flatten(value, &shape, 0, dtype, &mut data)?;
    Ok(Tensor { dtype, shape, data: data.into() })
}

/// Appends all elements to `out`. Recurses as deep as the shape's length, which is limited.
fn flatten(value: &Value, shape: &[u64], depth: usize, dtype: DType, out: &mut Vec<u8>) -> Result<(), JsonError> {
    match (value, shape.get(depth)) {
        (Value::Array(items), Some(length)) if items.len() as u64 == *length => {
            items.iter().enumerate().try_for_each(|(index, item)| {
                flatten(item, shape, depth + 1, dtype, out).map_err(|error| error.within(&format!("[{index}]")))
            })
        }
        (Value::Array(_), _) | (_, Some(_)) => Err(JsonError::Ragged { depth }),
        (element, None) => push(element, dtype, out),
    }
}

fn push(value: &Value, dtype: DType, out: &mut Vec<u8>) -> Result<(), JsonError> {
    let element = || JsonError::Element { value: value.to_string(), dtype, at: String::new() };
    let misfit = |_| JsonError::Misfit { value: value.to_string(), dtype, at: String::new() };
    match value {
        Value::String(text) if dtype == DType::Bytes => {
            tensor::push_string(text.as_bytes(), out);
            Ok(())
        }
        Value::Bool(bit) if dtype != DType::Bytes => Number::Int((*bit).into()).push(dtype, out).map_err(misfit),
        Value::Number(number) if dtype != DType::Bytes => {
            let int = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
            let number = int.map(Number::Int).or_else(|| number.as_f64().map(Number::Real));
            number.ok_or_else(element)?.push(dtype, out).map_err(misfit)
        }
        _ => Err(element()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(text: &str, dtype: Option<DType>) -> Result<Vec<(Option<String>, Tensor)>, JsonError> {
        read(text.as_bytes(), |_, _| dtype)
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn tensor(dtype: DType, shape: &[u64], data: &[u8]) -> Tensor {
        Tensor { dtype, shape: shape.to_vec(), data: data.to_vec().into() }
    }

    #[test]
    fn nesting_is_the_shape() {
        let read = read_as("[[1, 2.5, 3], [4, 5, 6]]", None).unwrap();
        assert_eq!(read, [(None, tensor(DType::F32, &[2, 3], &f32s(&[1.0, 2.5, 3.0, 4.0, 5.0, 6.0])))]);
        assert_eq!(read_as("7", Some(DType::I8)).unwrap(), [(None, tensor(DType::I8, &[], &[7]))]);
        assert_eq!(read_as("[[], []]", None).unwrap(), [(None, tensor(DType::F32, &[2, 0], &[]))]);
    }

    #[test]
    fn numbers_become_what_the_model_wants() {
        assert_eq!(read_as("[1, 255]", Some(DType::U8)).unwrap()[0].1.data[..], [1, 255]);
        let error = read_as("[1, 256]", Some(DType::U8)).unwrap_err().to_string();
        assert_eq!(error, "holds 256 at [1], which does not fit type UINT8");
        let exact = read_as("[9007199254740993]", Some(DType::I64)).unwrap();
        assert_eq!(exact[0].1.data[..], 9_007_199_254_740_993_i64.to_le_bytes());
    }

    #[test]
    fn every_form_with_names_is_understood() {
        let a = tensor(DType::I32, &[1, 2], &[1, 0, 0, 0, 2, 0, 0, 0]);
        let b = tensor(DType::Bytes, &[1], &[2, 0, 0, 0, b'h', b'i']);
        let expected = [(Some("a".to_owned()), a.clone()), (Some("b".to_owned()), b)];
        let by_name = r#"{"a": {"shape": [1, 2], "dtype": "INT32", "data": [1, 2]}, "b": ["hi"]}"#;
        assert_eq!(read_as(by_name, None).unwrap(), expected);
        let protocol = r#"{"inputs": [
            {"name": "a", "shape": [1, 2], "datatype": "INT32", "data": [1, 2]},
            {"name": "b", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]}"#;
        assert_eq!(read_as(protocol, None).unwrap(), expected);
        assert_eq!(read_as(r#"{"shape": [1, 2], "dtype": "INT32", "data": [[1, 2]]}"#, None).unwrap(), [(None, a)]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |text| read_as(text, None).unwrap_err().to_string();
        assert!(error("[1, 2").starts_with("is not valid JSON"));
        assert_eq!(error("[[1], [2, 3]]"), "has lists of different lengths (or numbers beside lists) at depth 1");
        assert_eq!(error("[1, [2]]"), "has lists of different lengths (or numbers beside lists) at depth 1");
        assert_eq!(error(r#"[1, "x"]"#), "holds \"x\" at [1], which is not a value of type FP32");
        assert_eq!(error("[[1, 2], [3, 1e39]]"), "holds 1e+39 at [1][1], which does not fit type FP32");
        let half = r#"{"y": {"dtype": "FP16", "data": [[65504, -70000]]}}"#;
        assert_eq!(error(half), "holds -70000 at y[0][1], which does not fit type FP16");
        assert_eq!(error(r#"{"dtype": "INT8", "data": 128}"#), "holds 128, which does not fit type INT8");
        assert!(error("[1e400]").starts_with("is not valid JSON: number out of range"), "{}", error("[1e400]"));
        assert_eq!(error(r#"{"shape": [3], "data": [1]}"#), "holds 1 numbers for shape [3]");
        assert_eq!(error(r#"{"dtype": "F32", "data": [1]}"#).split(':').next(), Some("unknown DType 'F32'"));
        assert_eq!(error("{}"), "holds no tensor: expected nested lists of numbers, or an object of them");
        assert_eq!(error("null"), "holds no tensor: expected nested lists of numbers, or an object of them");
        assert_eq!(error(&format!("{}1{}", "[".repeat(9), "]".repeat(9))), "is nested deeper than 8 lists");
    }
}
