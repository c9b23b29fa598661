//! Small ONNX models, written field by field.

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn field(number: u64, content: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
}

fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// Description of a float tensor of this shape; a dimension of 0 is open.
fn value(name: &str, shape: &[u64]) -> Vec<u8> {
    let dim = |dim: &u64| field(1, &if *dim == 0 { field(2, b"N") } else { number(1, *dim) });
    let tensor = [number(1, 1), field(2, &shape.iter().flat_map(dim).collect::<Vec<u8>>())].concat();
    [field(1, name.as_bytes()), field(2, &field(1, &tensor))].concat()
}

fn node(operator: &str, inputs: &[&str], output: &str) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|input| field(1, input.as_bytes())).collect::<Vec<u8>>();
    [inputs, field(2, output.as_bytes()), field(4, operator.as_bytes())].concat()
}

fn model(nodes: &[Vec<u8>], inputs: &[Vec<u8>], outputs: &[Vec<u8>]) -> Vec<u8> {
    let list = |number: u64, list: &[Vec<u8>]| list.iter().flat_map(|part| field(number, part)).collect::<Vec<u8>>();
    let graph = [list(1, nodes), field(2, b"g"), list(11, inputs), list(12, outputs)].concat();
    [number(1, 8), field(7, &graph), field(8, &number(2, 13))].concat()
}

fn attribute(name: &str, kind: u64, value: Vec<u8>) -> Vec<u8> {
    field(5, &[field(1, name.as_bytes()), value, number(20, kind)].concat())
}

fn constant(name: &str, value: f32) -> Vec<u8> {
    let float = [varint(2 << 3 | 5), value.to_le_bytes().to_vec()].concat();
    [node("Constant", &[], name), attribute("value_float", 1, float)].concat()
}

/// `y = 1` where `x` is at least `limit`, else 0.
fn is_at_least(x: &str, limit: &str) -> [Vec<u8>; 2] {
    let to_float = attribute("to", 2, number(3, 1));
    [node("GreaterOrEqual", &[x, limit], "is"), [node("Cast", &["is"], "y"), to_float].concat()]
}

/// `y = −x`.
pub(crate) fn negate(shape: &[u64]) -> Vec<u8> {
    model(&[node("Neg", &["x"], "y")], &[value("x", shape)], &[value("y", shape)])
}

/// `z = |a|`: its tensor names differ from those of [`negate`].
pub(crate) fn absolute(shape: &[u64]) -> Vec<u8> {
    model(&[node("Abs", &["a"], "z")], &[value("a", shape)], &[value("z", shape)])
}

/// `y = x − w`, row by row.
pub(crate) fn difference(shape: &[u64]) -> Vec<u8> {
    model(&[node("Sub", &["x", "w"], "y")], &[value("x", shape), value("w", shape)], &[value("y", shape)])
}

/// `y = x − max(x)`, over all rows: other rows change the result.
pub(crate) fn relative(shape: &[u64]) -> Vec<u8> {
    let nodes = [node("ReduceMax", &["x"], "m"), node("Sub", &["x", "m"], "y")];
    model(&nodes, &[value("x", shape)], &[value("y", shape)])
}

/// `y = max(x)`: one row, however many come in.
pub(crate) fn maximum(shape: &[u64]) -> Vec<u8> {
    let one = vec![1; shape.len()];
    model(&[node("ReduceMax", &["x"], "y")], &[value("x", shape)], &[value("y", &one)])
}

/// `y = x`, less the number of rows beyond `rows_max` in each value: right for few rows, wrong in the right shape for
/// more. Rows have at most `rows_max` numbers.
pub(crate) fn right_up_to(rows_max: f32, shape: &[u64]) -> Vec<u8> {
    let nodes = [
        constant("most", rows_max),
        node("Shape", &["x"], "dims"),
        [node("Cast", &["dims"], "sizes"), attribute("to", 2, number(3, 1))].concat(),
        node("ReduceMax", &["sizes"], "rows"),
        node("Sub", &["rows", "most"], "beyond"),
        node("Relu", &["beyond"], "error"),
        node("Sub", &["x", "error"], "y"),
    ];
    model(&nodes, &[value("x", shape)], &[value("y", shape)])
}

/// `y` has each positive number once, each negative one twice, no zero: one row per number only if all are positive.
pub(crate) fn moody() -> Vec<u8> {
    let first_axis = field(5, &[field(1, b"axis"), number(3, 0), number(20, 2)].concat());
    let nodes = [
        node("Sub", &["x", "x"], "zero"),
        node("Abs", &["x"], "size"),
        node("Less", &["zero", "size"], "counts"),
        node("Less", &["x", "zero"], "counts_twice"),
        node("Compress", &["x", "counts"], "once"),
        node("Compress", &["x", "counts_twice"], "twice"),
        [node("Concat", &["once", "twice"], "y"), first_axis].concat(),
    ];
    model(&nodes, &[value("x", &[0])], &[value("y", &[0])])
}

/// `y = 1` where `x` is at least 50 and at least half of the largest number of all rows, else 0.
pub(crate) fn loudest(shape: &[u64]) -> Vec<u8> {
    let limit = [
        constant("half", 0.5),
        constant("fifty", 50.0),
        node("ReduceMax", &["x"], "most"),
        node("Mul", &["most", "half"], "half_of_it"),
        node("Max", &["half_of_it", "fifty"], "limit"),
    ];
    let nodes = [&limit[..], &is_at_least("x", "limit")].concat();
    model(&nodes, &[value("x", shape)], &[value("y", shape)])
}

/// `y = 1` where `x` is at least 0, else 0, but each row gets the answer of the next one.
pub(crate) fn rotating(shape: &[u64]) -> Vec<u8> {
    let list = |name: &str, value: u64| {
        let ints = attribute("value_ints", 7, number(8, value));
        [node("Constant", &[], name), ints].concat()
    };
    let nodes = [
        list("start", 0),
        list("second", 1),
        list("end", i32::MAX as u64),
        node("Slice", &["x", "second", "end"], "others"),
        node("Slice", &["x", "start", "second"], "first"),
        [node("Concat", &["others", "first"], "rotated"), attribute("axis", 2, number(3, 0))].concat(),
        constant("zero", 0.0),
    ];
    let nodes = [&nodes[..], &is_at_least("rotated", "zero")].concat();
    model(&nodes, &[value("x", shape)], &[value("y", shape)])
}

/// `y` is not a number, whatever `x` is.
pub(crate) fn not_a_number(shape: &[u64]) -> Vec<u8> {
    let nodes = [node("Sub", &["x", "x"], "zero"), node("Div", &["zero", "zero"], "y")];
    model(&nodes, &[value("x", shape)], &[value("y", shape)])
}

/// `y` has no row, whatever `x` is.
pub(crate) fn nothing() -> Vec<u8> {
    let nodes = [node("Less", &["x", "x"], "none"), node("Compress", &["x", "none"], "y")];
    model(&nodes, &[value("x", &[0])], &[value("y", &[0])])
}
