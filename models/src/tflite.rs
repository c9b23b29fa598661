//! Reads TensorFlow Lite: a walk through the flatbuffer, model -> subgraph 0 -> tensors. Owns the few table slots that
//! it needs; never reads operators or weights.
//!
//! ```text
//!   root -> Model { 2: subgraphs } -> SubGraph { 0: tensors, 1: inputs, 2: outputs }
//!        -> Tensor { 0: shape, 1: type, 3: name, 4: quantization, 7: shape_signature, 8: has_rank }
//! ```

use std::io::{Read, Seek};

use proto_msgs::{DType, ModelFormat};

use crate::{
    NAME_LIMIT, Quantization, RANK_LIMIT, SignatureError, TENSOR_LIMIT, TensorSpec,
    source::{Fault, Source},
};

/// Position of a table and of its list of slots.
#[derive(Clone, Copy)]
struct Table {
    at: u64,
    vtable: u64,
    vtable_bytes: u64,
}

/// Position of a vector's elements, and the number that it claims to have.
#[derive(Clone, Copy)]
struct Vector {
    at: u64,
    count: u32,
}

type Tensors = (Vec<TensorSpec>, Vec<TensorSpec>);

/// Reads inputs and outputs of subgraph 0.
pub(crate) fn read<R: Read + Seek>(source: &mut Source<R>) -> Result<Tensors, SignatureError> {
    walk(&mut Walk { source }).map_err(|fault| fault.of(ModelFormat::TfLite))
}

fn walk<R: Read + Seek>(file: &mut Walk<'_, R>) -> Result<Tensors, Fault> {
    let root = file.follow(0)?;
    let model = file.table(root)?;
    let subgraphs = file.vector(model, 2)?.filter(|list| list.count > 0).ok_or(Fault::Damaged("it has no graph"))?;
    let subgraph = file.element_table(subgraphs, 0)?;
    let tensors = file.vector(subgraph, 0)?.ok_or(Fault::Damaged("its graph has no tensors"))?;
    let inputs = file.tensors(subgraph, 1, tensors)?;
    let outputs = file.tensors(subgraph, 2, tensors)?;
    Ok((inputs, outputs))
}

struct Walk<'a, R> {
    source: &'a mut Source<R>,
}

impl<R: Read + Seek> Walk<'_, R> {
    fn u32(&mut self, at: u64) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.source.array(at)?))
    }

    /// The position that the offset at `at` points to.
    fn follow(&mut self, at: u64) -> Result<u64, Fault> {
        Ok(at + u64::from(self.u32(at)?))
    }

    fn table(&mut self, at: u64) -> Result<Table, Fault> {
        let back = i32::from_le_bytes(self.source.array(at)?);
        let vtable = at.checked_add_signed(-i64::from(back)).ok_or(Fault::Damaged("a table has no layout"))?;
        let vtable_bytes = u64::from(u16::from_le_bytes(self.source.array(vtable)?));
        Ok(Table { at, vtable, vtable_bytes })
    }

    /// The position of a table's slot; `None` if the table does not have it.
    fn slot(&mut self, table: Table, index: u64) -> Result<Option<u64>, Fault> {
        let entry = 4 + 2 * index;
        if entry + 2 > table.vtable_bytes {
            return Ok(None);
        }
        let offset = u16::from_le_bytes(self.source.array(table.vtable + entry)?);
        Ok((offset != 0).then(|| table.at + u64::from(offset)))
    }

    fn vector(&mut self, table: Table, index: u64) -> Result<Option<Vector>, Fault> {
        let Some(slot) = self.slot(table, index)? else {
            return Ok(None);
        };
        let at = self.follow(slot)?;
        Ok(Some(Vector { at: at + 4, count: self.u32(at)? }))
    }

    fn element_table(&mut self, vector: Vector, index: u32) -> Result<Table, Fault> {
        let at = self.follow(vector.at + 4 * u64::from(index))?;
        self.table(at)
    }

    fn i32s(&mut self, vector: Vector, limit: (&'static str, usize)) -> Result<Vec<i32>, Fault> {
        if vector.count as usize > limit.1 {
            return Err(Fault::TooLarge(limit));
        }
        (0..u64::from(vector.count))
            .map(|index| Ok(i32::from_le_bytes(self.source.array(vector.at + 4 * index)?)))
            .collect()
    }

    /// The tensors that a slot of the subgraph lists by index. -1 stands for an optional tensor that is left out.
    fn tensors(&mut self, subgraph: Table, slot: u64, tensors: Vector) -> Result<Vec<TensorSpec>, Fault> {
        let Some(list) = self.vector(subgraph, slot)? else {
            return Ok(Vec::new());
        };
        let indices = self.i32s(list, TENSOR_LIMIT)?;
        let named = indices.into_iter().filter(|index| *index != -1);
        named
            .map(|index| {
                let index = u32::try_from(index).ok().filter(|index| *index < tensors.count);
                let index = index.ok_or(Fault::Damaged("an input or output names no tensor"))?;
                let table = self.element_table(tensors, index)?;
                self.tensor(table)
            })
            .collect()
    }

    fn tensor(&mut self, tensor: Table) -> Result<TensorSpec, Fault> {
        let type_number = match self.slot(tensor, 1)? {
            Some(at) => self.source.array::<1>(at)?[0],
            None => 0,
        };
        let name = match self.vector(tensor, 3)? {
            Some(text) if text.count as usize > NAME_LIMIT.1 => return Err(Fault::TooLarge(NAME_LIMIT)),
            Some(text) => String::from_utf8_lossy(&self.source.bytes(text.at, text.count as usize)?).into_owned(),
            None => String::new(),
        };
        let shape = self.shape(tensor)?;
        let quantization = self.quantization(tensor)?;
        Ok(TensorSpec { name, dtype: dtype(type_number), shape, quantization })
    }

    /// Shape of a tensor: `shape_signature` if there is one, since `shape` has 1 in place of an open dimension.
    fn shape(&mut self, tensor: Table) -> Result<Option<Vec<i64>>, Fault> {
        let signature = self.vector(tensor, 7)?.filter(|dimensions| dimensions.count > 0);
        let shape = match signature {
            Some(signature) => Some(signature),
            None => self.vector(tensor, 0)?,
        };
        let dimensions = shape.map(|shape| self.i32s(shape, RANK_LIMIT)).transpose()?.unwrap_or_default();
        let rank_known = match self.slot(tensor, 8)? {
            Some(at) => self.source.array::<1>(at)?[0] != 0,
            None => false,
        };
        // Older files do not have `has_rank`. In them, no dimensions means a scalar or an unknown shape.
        Ok((rank_known || !dimensions.is_empty()).then(|| dimensions.into_iter().map(i64::from).collect()))
    }

    /// Scale and zero point if one pair holds for the whole tensor.
    fn quantization(&mut self, tensor: Table) -> Result<Option<Quantization>, Fault> {
        let Some(slot) = self.slot(tensor, 4)? else {
            return Ok(None);
        };
        let at = self.follow(slot)?;
        let table = self.table(at)?;
        let (scales, zero_points) = (self.vector(table, 2)?, self.vector(table, 3)?);
        let Some(scales) = scales.filter(|scales| scales.count == 1) else {
            return Ok(None);
        };
        let scale = f32::from_le_bytes(self.source.array(scales.at)?);
        let zero_point = match zero_points.filter(|points| points.count == 1) {
            Some(points) => i64::from_le_bytes(self.source.array(points.at)?),
            None => 0,
        };
        Ok((scale.is_normal() && scale > 0.0).then_some(Quantization { scale, zero_point }))
    }
}

/// The element type for a `TensorType` of the schema. The mesh does not carry four-bit and complex numbers, resources
/// and variants.
fn dtype(number: u8) -> Option<DType> {
    Some(match number {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::I32,
        3 => DType::U8,
        4 => DType::I64,
        5 => DType::Bytes,
        6 => DType::Bool,
        7 => DType::I16,
        9 => DType::I8,
        10 => DType::F64,
        12 => DType::U64,
        15 => DType::U32,
        16 => DType::U16,
        18 => DType::BF16,
        _ => return None,
    })
}
