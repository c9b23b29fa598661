//! Reads ONNX: a walk through the protobuf, model -> graph -> inputs, outputs, names of initialisers. Owns the few
//! field numbers that it needs; never reads nodes or weights.
//!
//! ```text
//!   ModelProto { 7: graph } -> GraphProto { 5: initializer, 11: input, 12: output, 15: sparse_initializer }
//!   ValueInfoProto { 1: name, 2: type } -> TypeProto { 1: tensor_type } -> { 1: elem_type, 2: shape } -> { 1: dim }
//! ```

use std::{
    collections::BTreeSet,
    io::{Read, Seek},
};

use proto_msgs::{DType, ModelFormat};

use crate::{
    NAME_LIMIT, RANK_LIMIT, SignatureError, TENSOR_LIMIT, TensorSpec,
    source::{Fault, Source},
};

/// Most initialisers that a graph may have. Older files list them among the inputs, too; the largest known models have
/// some ten thousand.
const INITIALIZERS_MAX: usize = 1 << 18;

/// Fields of `ModelProto` with their wire types (0 number, 2 bytes): numbers, strings, opset imports, the graph,
/// metadata, training info, functions, device configurations.
const MODEL_FIELDS: [(u64, u64); 12] =
    [(1, 0), (2, 2), (3, 2), (4, 2), (5, 0), (6, 2), (7, 2), (8, 2), (14, 2), (20, 2), (25, 2), (26, 2)];

/// Whether the first fields are those of a model and include a version or a graph.
pub(crate) fn looks_like(head: &[u8]) -> bool {
    let mut rest = head;
    let mut telling = false;
    while let Some((key, after_key)) = varint(rest) {
        let (number, wire_type) = (key >> 3, key & 7);
        if !MODEL_FIELDS.contains(&(number, wire_type)) {
            return false;
        }
        let Some((value, after_value)) = varint(after_key) else {
            break;
        };
        // A model always has a version, which is a small number, or a graph, which is not empty.
        telling |= (number == 1 && (1..1000).contains(&value)) || (number == 7 && value > 0);
        if wire_type == 0 {
            rest = after_value;
            continue;
        }
        match usize::try_from(value).ok().and_then(|bytes| after_value.get(bytes..)) {
            Some(after) => rest = after,
            None => break,
        }
    }
    telling
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * index as u32)?;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

type Tensors = (Vec<TensorSpec>, Vec<TensorSpec>);

/// Reads the inputs without initialisers, and the outputs.
pub(crate) fn read<R: Read + Seek>(source: &mut Source<R>) -> Result<Tensors, SignatureError> {
    let all = Span { at: 0, end: source.len };
    walk(&mut Walk { source }, all).map_err(|fault| fault.of(ModelFormat::Onnx))
}

fn walk<R: Read + Seek>(file: &mut Walk<'_, R>, mut model: Span) -> Result<Tensors, Fault> {
    let mut graph = None;
    while let Some(field) = file.next(&mut model)? {
        if let (7, Value::Bytes(span)) = field {
            graph = Some(span);
        }
    }
    let graph = graph.ok_or(Fault::Damaged("it has no graph"))?;
    // The graph is walked twice: initialisers must be known before the inputs, whatever their order in the file.
    let constants = file.initializers(graph)?;
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    let mut fields = graph;
    while let Some(field) = file.next(&mut fields)? {
        let (list, span) = match field {
            (11, Value::Bytes(span)) => (&mut inputs, span),
            (12, Value::Bytes(span)) => (&mut outputs, span),
            _ => continue,
        };
        let (name, kind) = file.value_info(span)?;
        if field.0 == 11 && constants.contains(&name) {
            continue;
        }
        if list.len() == TENSOR_LIMIT.1 {
            return Err(Fault::TooLarge(TENSOR_LIMIT));
        }
        list.push(file.spec(name, kind)?);
    }
    Ok((inputs, outputs))
}

/// A byte range of the file.
#[derive(Clone, Copy)]
struct Span {
    at: u64,
    end: u64,
}

#[derive(Clone, Copy)]
enum Value {
    Number(u64),
    Bytes(Span),
    Other,
}

struct Walk<'a, R> {
    source: &'a mut Source<R>,
}

impl<R: Read + Seek> Walk<'_, R> {
    /// The next field of a message; `message` shrinks by it.
    fn next(&mut self, message: &mut Span) -> Result<Option<(u64, Value)>, Fault> {
        if message.at == message.end {
            return Ok(None);
        }
        let key = self.varint(message)?;
        let fixed_bytes = match key & 7 {
            0 => {
                let number = self.varint(message)?;
                return Ok(Some((key >> 3, Value::Number(number))));
            }
            1 => 8,
            2 => self.varint(message)?,
            5 => 4,
            _ => return Err(Fault::Damaged("a field has an unknown type")),
        };
        let end = message.at.checked_add(fixed_bytes).filter(|end| *end <= message.end);
        let end = end.ok_or(Fault::Damaged("a field is longer than its message"))?;
        let span = Span { at: message.at, end };
        message.at = end;
        Ok(Some((key >> 3, if key & 7 == 2 { Value::Bytes(span) } else { Value::Other })))
    }

    fn varint(&mut self, message: &mut Span) -> Result<u64, Fault> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            if message.at >= message.end {
                return Err(Fault::Damaged("a message ends inside a number"));
            }
            let [byte] = self.source.array(message.at)?;
            message.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Fault::Damaged("a number is too long"))
    }

    fn text(&mut self, span: Span) -> Result<String, Fault> {
        let bytes = span.end - span.at;
        if bytes > NAME_LIMIT.1 as u64 {
            return Err(Fault::TooLarge(NAME_LIMIT));
        }
        Ok(String::from_utf8_lossy(&self.source.bytes(span.at, bytes as usize)?).into_owned())
    }

    /// The content of the first field with this number.
    fn part(&mut self, mut message: Span, number: u64) -> Result<Option<Span>, Fault> {
        while let Some(field) = self.next(&mut message)? {
            match field {
                (got, Value::Bytes(span)) if got == number => return Ok(Some(span)),
                _ => {}
            }
        }
        Ok(None)
    }

    fn initializers(&mut self, mut graph: Span) -> Result<BTreeSet<String>, Fault> {
        let mut names = BTreeSet::new();
        while let Some(field) = self.next(&mut graph)? {
            let tensor = match field {
                (5, Value::Bytes(span)) => Some(span),
                (15, Value::Bytes(span)) => self.part(span, 1)?,
                _ => None,
            };
            let Some(tensor) = tensor else { continue };
            // A name beyond the limit cannot belong to an input that the mesh carries.
            if let Some(name) = self.part(tensor, 8)?.filter(|name| name.end - name.at <= NAME_LIMIT.1 as u64) {
                if names.len() == INITIALIZERS_MAX {
                    return Err(Fault::TooLarge(("initialisers", INITIALIZERS_MAX)));
                }
                names.insert(self.text(name)?);
            }
        }
        Ok(names)
    }

    fn value_info(&mut self, message: Span) -> Result<(String, Option<Span>), Fault> {
        let name = match self.part(message, 1)? {
            Some(span) => self.text(span)?,
            None => String::new(),
        };
        let kind = self.part(message, 2)?;
        Ok((name, kind))
    }

    fn spec(&mut self, name: String, kind: Option<Span>) -> Result<TensorSpec, Fault> {
        let tensor = match kind {
            Some(kind) => self.part(kind, 1)?,
            None => None,
        };
        let mut spec = TensorSpec { name, dtype: None, shape: None, quantization: None };
        let Some(mut tensor) = tensor else { return Ok(spec) };
        while let Some(field) = self.next(&mut tensor)? {
            match field {
                (1, Value::Number(number)) => spec.dtype = onnx_dtype(number),
                (2, Value::Bytes(shape)) => spec.shape = Some(self.shape(shape)?),
                _ => {}
            }
        }
        Ok(spec)
    }

    fn shape(&mut self, mut shape: Span) -> Result<Vec<i64>, Fault> {
        let mut dimensions = Vec::new();
        while let Some(field) = self.next(&mut shape)? {
            let (1, Value::Bytes(mut dimension)) = field else {
                continue;
            };
            if dimensions.len() == RANK_LIMIT.1 {
                return Err(Fault::TooLarge(RANK_LIMIT));
            }
            let mut value = -1;
            while let Some(field) = self.next(&mut dimension)? {
                if let (1, Value::Number(number)) = field {
                    value = i64::try_from(number).unwrap_or(-1);
                }
            }
            dimensions.push(value);
        }
        Ok(dimensions)
    }
}

/// The element type for a number of `TensorProto.DataType`; `None` for types that the mesh does not carry: complex
/// numbers, and floats of 8 bits or fewer.
pub fn onnx_dtype(number: u64) -> Option<DType> {
    Some(match number {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        8 => DType::Bytes,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        _ => return None,
    })
}
