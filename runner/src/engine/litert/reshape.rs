//! Lets models with an open batch run. TensorFlow exports `Reshape` with an open dimension as `SHAPE -> STRIDED_SLICE
//! -> PACK -> RESHAPE`. The shape is computed during the run, so the output has no place before it, and LiteRT's
//! compiled models then return no output at all (zeros, and no error). The same file declares that shape as a constant
//! with one -1, which RESHAPE accepts as well.
//!
//! Owns that rewriting: a new front for the file, with a constant in place of the computed shape. The old file follows
//! unchanged, since flatbuffers only point forward.

use mesh_models::Signature;

/// `BuiltinOperator.RESHAPE` and `TensorType.INT32` of the schema.
const RESHAPE: i32 = 22;
const INT32: u8 = 2;

/// Alignment of the old file inside the new one: its weights must stay aligned.
const ALIGNMENT_BYTES: usize = 64;

/// The model with constant shapes. `None` if it has no open dimension, if nothing needs a change, or if it has parts
/// that are not supported here.
pub(super) fn with_constant_shapes(file: &[u8], signature: &Signature) -> Option<Vec<u8>> {
    let shapes = signature.inputs.iter().filter_map(|input| input.shape.as_ref());
    if shapes.flatten().all(|dimension| *dimension >= 0) {
        return None;
    }
    let old = Old(file);
    let model = old.table(old.follow(0)?)?;
    let graph = old.table(old.element(old.vector(model, 2)?, 0)?)?;
    let changes = changes(&old, model, graph)?;
    if changes.is_empty() { None } else { rewrite(&old, model, graph, &changes) }
}

/// A RESHAPE whose shape becomes a constant.
struct Change {
    /// Index in the graph's list of operators.
    operator: usize,
    /// Index in the file's list of operator codes.
    opcode: i32,
    /// The tensor to reshape.
    input: i32,
    /// Position of its list of outputs in the file.
    outputs: usize,
    shape: Vec<i32>,
}

fn changes(old: &Old<'_>, model: Table, graph: Table) -> Option<Vec<Change>> {
    let (opcodes, buffers) = (old.vector(model, 1)?, old.vector(model, 4)?);
    let (tensors, operators) = (old.vector(graph, 0)?, old.vector(graph, 3)?);
    // Weights behind the flatbuffer are located by their distance from its start, which the rewriting changes.
    for index in 0..buffers.count {
        let buffer = old.table(old.element(buffers, index)?)?;
        if old.slot(buffer, 1).is_some() {
            return None;
        }
    }
    let mut changes = Vec::new();
    for index in 0..operators.count {
        let operator = old.table(old.element(operators, index)?)?;
        let opcode = old.slot(operator, 0).map_or(Some(0), |at| old.i32(at))?;
        let code = old.table(old.element(opcodes, usize::try_from(opcode).ok()?)?)?;
        let number = old.slot(code, 3).map_or(Some(0), |at| old.i32(at))?;
        let old_number = old.slot(code, 0).map_or(Some(0), |at| old.byte(at))?;
        if number.max(i32::from(old_number)) != RESHAPE {
            continue;
        }
        let inputs = old.i32s(old.vector(operator, 1)?)?;
        let outputs = old.vector(operator, 2)?;
        let ([input, shape], [output]) = (&inputs[..], &old.i32s(outputs)?[..]) else { continue };
        if old.is_constant(tensors, buffers, *shape)? {
            continue;
        }
        let output = old.table(old.element(tensors, usize::try_from(*output).ok()?)?)?;
        let Some(said) = old.vector(output, 7) else { continue };
        let said = old.i32s(said)?;
        let open = said.iter().filter(|dimension| **dimension < 0).count();
        if said.is_empty() || open > 1 {
            // With two open dimensions the runtime could not tell which is which.
            continue;
        }
        changes.push(Change { operator: index, opcode, input: *input, outputs: old.target(operator, 2)?, shape: said });
    }
    Some(changes)
}

/// Writes the new file: model, first graph and their lists are new, and the lists' elements are the old ones except for
/// the changes.
fn rewrite(old: &Old<'_>, model: Table, graph: Table, changes: &[Change]) -> Option<Vec<u8>> {
    let listed = |table, slot| -> Option<Vec<Value>> {
        let list = old.vector(table, slot)?;
        (0..list.count).map(|index| old.element(list, index).map(Value::Old)).collect()
    };
    let (mut subgraphs, mut buffers) = (listed(model, 2)?, listed(model, 4)?);
    let (mut tensors, mut operators) = (listed(graph, 0)?, listed(graph, 3)?);
    let (first_tensor, first_buffer) = (tensors.len(), buffers.len());
    subgraphs[0] = Value::Later;
    for change in changes {
        operators[change.operator] = Value::Later;
        tensors.push(Value::Later);
        buffers.push(Value::Later);
    }

    let mut new = Front::default();
    new.bytes.extend_from_slice(b"\0\0\0\0TFL3");
    let version = old.slot(model, 0).map_or(Some(0), |at| old.i32(at))?;
    let mut fields =
        vec![(2, Value::Later), (4, Value::Later), (0, Value::Number(version)), (1, Value::Old(old.target(model, 1)?))];
    // Signatures name inputs and outputs, so they are kept. Metadata is for people and is dropped.
    fields.extend(old.target(model, 7).map(|signatures| (7, Value::Old(signatures))));
    let model = new.table(&fields);
    new.point(0, model.at);
    let subgraphs = new.vector(&subgraphs);
    new.point(model.values[0], subgraphs.at);
    let graph = new.table(&[
        (0, Value::Later),
        (3, Value::Later),
        (1, Value::Old(old.target(graph, 1)?)),
        (2, Value::Old(old.target(graph, 2)?)),
    ]);
    new.point(subgraphs.values[0], graph.at);
    let tensors = new.vector(&tensors);
    new.point(graph.values[0], tensors.at);
    let operators = new.vector(&operators);
    new.point(graph.values[1], operators.at);
    let buffers = new.vector(&buffers);
    new.point(model.values[1], buffers.at);

    for (index, change) in changes.iter().enumerate() {
        let (tensor_index, buffer_index) = (first_tensor + index, first_buffer + index);
        let operator =
            new.table(&[(1, Value::Later), (0, Value::Number(change.opcode)), (2, Value::Old(change.outputs))]);
        new.point(operators.values[change.operator], operator.at);
        let inputs = [change.input, i32::try_from(tensor_index).ok()?].map(Value::Number);
        let inputs = new.vector(&inputs);
        new.point(operator.values[0], inputs.at);

        let tensor = new.table(&[
            (0, Value::Later),
            (1, Value::Number(i32::from(INT32))),
            (2, Value::Number(i32::try_from(buffer_index).ok()?)),
        ]);
        new.point(tensors.values[tensor_index], tensor.at);
        let dimensions = new.vector(&[Value::Number(i32::try_from(change.shape.len()).ok()?)]);
        new.point(tensor.values[0], dimensions.at);

        let buffer = new.table(&[(0, Value::Later)]);
        new.point(buffers.values[buffer_index], buffer.at);
        let data = new.data(&change.shape);
        new.point(buffer.values[0], data);
    }
    new.before(old.0)
}

/// The existing file, read with every position checked.
struct Old<'a>(&'a [u8]);

/// Position of a table and of its list of slots.
#[derive(Clone, Copy)]
struct Table {
    at: usize,
    vtable: usize,
    vtable_bytes: usize,
}

/// Position of a list's elements, and their number.
#[derive(Clone, Copy)]
struct Vector {
    at: usize,
    count: usize,
}

impl Old<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }

    fn byte(&self, at: usize) -> Option<u8> {
        self.bytes::<1>(at).map(|[byte]| byte)
    }

    fn i32(&self, at: usize) -> Option<i32> {
        self.bytes(at).map(i32::from_le_bytes)
    }

    fn follow(&self, at: usize) -> Option<usize> {
        at.checked_add(u32::from_le_bytes(self.bytes(at)?) as usize)
    }

    fn table(&self, at: usize) -> Option<Table> {
        let vtable = at.checked_add_signed(isize::try_from(self.i32(at)?).ok()?.checked_neg()?)?;
        let vtable_bytes = u16::from_le_bytes(self.bytes(vtable)?) as usize;
        Some(Table { at, vtable, vtable_bytes })
    }

    /// The position of a slot's value; `None` if the table does not have the slot.
    fn slot(&self, table: Table, index: usize) -> Option<usize> {
        let entry = 4 + 2 * index;
        let in_table = (entry + 2 <= table.vtable_bytes).then(|| self.bytes(table.vtable + entry))??;
        let offset = u16::from_le_bytes(in_table) as usize;
        (offset != 0).then_some(table.at + offset)
    }

    /// The position that the offset in a slot points to.
    fn target(&self, table: Table, index: usize) -> Option<usize> {
        self.follow(self.slot(table, index)?)
    }

    fn vector(&self, table: Table, index: usize) -> Option<Vector> {
        let at = self.target(table, index)?;
        let count = u32::from_le_bytes(self.bytes(at)?) as usize;
        let at = at + 4;
        // An element has at least one byte.
        (self.0.len().checked_sub(at)? >= count).then_some(Vector { at, count })
    }

    /// The position of a table in a list.
    fn element(&self, vector: Vector, index: usize) -> Option<usize> {
        if index >= vector.count {
            return None;
        }
        self.follow(vector.at + 4 * index)
    }

    fn i32s(&self, vector: Vector) -> Option<Vec<i32>> {
        (0..vector.count).map(|index| self.i32(vector.at + 4 * index)).collect()
    }

    fn is_constant(&self, tensors: Vector, buffers: Vector, index: i32) -> Option<bool> {
        let tensor = self.table(self.element(tensors, usize::try_from(index).ok()?)?)?;
        let buffer = self.slot(tensor, 2).map_or(Some(0), |at| self.i32(at))?;
        let buffer = self.table(self.element(buffers, usize::try_from(buffer).ok()?)?)?;
        Some(self.vector(buffer, 0).is_some_and(|data| data.count > 0))
    }
}

/// The value of a field or an element.
#[derive(Clone, Copy)]
enum Value {
    Number(i32),
    /// An offset to this position in the old file.
    Old(usize),
    /// An offset that [`Front::point`] sets later.
    Later,
}

/// Position of a written table or list, and positions of its values in the given order.
struct Placed {
    at: usize,
    values: Vec<usize>,
}

/// The part of the new file that stands before the old one.
#[derive(Default)]
struct Front {
    bytes: Vec<u8>,
    /// Positions of offsets into the old file, each with its target there.
    to_old: Vec<(usize, usize)>,
}

impl Front {
    fn table(&mut self, fields: &[(usize, Value)]) -> Placed {
        let slots = fields.iter().map(|(slot, _)| slot + 1).max().unwrap_or(0);
        let mut vtable = vec![0_u16; 2 + slots];
        vtable[0] = 2 * vtable.len() as u16;
        vtable[1] = 4 + 4 * fields.len() as u16;
        for (place, (slot, _)) in fields.iter().enumerate() {
            vtable[2 + slot] = 4 + 4 * place as u16;
        }
        self.align(4, 2 * vtable.len());
        let vtable_at = self.bytes.len();
        self.bytes.extend(vtable.iter().flat_map(|word| word.to_le_bytes()));
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&((at - vtable_at) as i32).to_le_bytes());
        let values = fields.iter().map(|(_, value)| self.value(*value)).collect();
        Placed { at, values }
    }

    fn vector(&mut self, elements: &[Value]) -> Placed {
        self.align(4, 0);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&(elements.len() as u32).to_le_bytes());
        let values = elements.iter().map(|value| self.value(*value)).collect();
        Placed { at, values }
    }

    /// Writes the contents of a buffer, which the schema aligns to 16 bytes.
    fn data(&mut self, numbers: &[i32]) -> usize {
        self.align(16, 4);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&(4 * numbers.len() as u32).to_le_bytes());
        self.bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        at
    }

    fn value(&mut self, value: Value) -> usize {
        let at = self.bytes.len();
        let number = match value {
            Value::Number(number) => number,
            Value::Old(target) => {
                self.to_old.push((at, target));
                0
            }
            Value::Later => 0,
        };
        self.bytes.extend_from_slice(&number.to_le_bytes());
        at
    }

    /// Makes the offset at `from` point to `to`.
    fn point(&mut self, from: usize, to: usize) {
        self.bytes[from..from + 4].copy_from_slice(&((to - from) as u32).to_le_bytes());
    }

    /// Pads so that the position `ahead` bytes further is aligned.
    fn align(&mut self, alignment: usize, ahead: usize) {
        let len = (self.bytes.len() + ahead).next_multiple_of(alignment) - ahead;
        self.bytes.resize(len, 0);
    }

    /// Both parts as one file; `None` if it would be longer than offsets reach.
    fn before(mut self, old: &[u8]) -> Option<Vec<u8>> {
        self.align(ALIGNMENT_BYTES, 0);
        let start = self.bytes.len();
        i32::try_from(start.checked_add(old.len())?).ok()?;
        for (from, target) in std::mem::take(&mut self.to_old) {
            self.point(from, start + target);
        }
        self.bytes.extend_from_slice(old);
        Some(self.bytes)
    }
}
