//! ONNX models made to order, written field by field: small ones with a known answer, heavy ones that take long to
//! send, and ones with a run of any length.

/// A protobuf message under construction.
#[derive(Clone, Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(mut self, field: u32, value: u64) -> Self {
        self.raw_varint(u64::from(field << 3));
        self.raw_varint(value);
        self
    }

    fn bytes(mut self, field: u32, value: &[u8]) -> Self {
        self.raw_varint(u64::from(field << 3 | 2));
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn text(self, field: u32, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    fn message(self, field: u32, value: Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// `TensorProto.DataType`.
const FLOAT: u64 = 1;
const INT64: u64 = 7;
const BOOL: u64 = 9;

/// A named input or output; a dimension of 0 is open.
fn value(name: &str, data_type: u64, shape: &[u64]) -> Message {
    let dims = shape.iter().fold(Message::default(), |dims, dim| {
        let dim = if *dim == 0 { Message::default().text(2, "N") } else { Message::default().varint(1, *dim) };
        dims.message(1, dim)
    });
    let tensor = Message::default().varint(1, data_type).message(2, dims);
    Message::default().text(1, name).message(2, Message::default().message(1, tensor))
}

fn tensor(name: &str, data_type: u64, shape: &[u64], raw: &[u8]) -> Message {
    let tensor = shape.iter().fold(Message::default(), |tensor, dim| tensor.varint(1, *dim));
    tensor.varint(2, data_type).text(8, name).bytes(9, raw)
}

fn node(operator: &str, inputs: &[&str], outputs: &[&str], attributes: &[Message]) -> Message {
    let node = inputs.iter().fold(Message::default(), |node, input| node.text(1, input));
    let node = outputs.iter().fold(node, |node, output| node.text(2, output));
    let node = node.text(3, &format!("{operator} to {}", outputs.join(","))).text(4, operator);
    attributes.iter().fold(node, |node, attribute| node.message(5, attribute.clone()))
}

fn graph(nodes: &[Message], constants: &[Message], inputs: &[Message], outputs: &[Message]) -> Message {
    let graph = nodes.iter().fold(Message::default(), |graph, node| graph.message(1, node.clone())).text(2, "made");
    let graph = constants.iter().fold(graph, |graph, constant| graph.message(5, constant.clone()));
    let graph = inputs.iter().fold(graph, |graph, input| graph.message(11, input.clone()));
    outputs.iter().fold(graph, |graph, output| graph.message(12, output.clone()))
}

fn model(graph: Message) -> Vec<u8> {
    let opset = Message::default().text(1, "").varint(2, 17);
    Message::default().varint(1, 8).text(2, "mesh-tests").message(7, graph).message(8, opset).0
}

fn one_f32(name: &str, value: f32) -> Message {
    tensor(name, FLOAT, &[], &value.to_le_bytes())
}

/// `y = x + 1`; `x`: FP32, any length.
pub fn add_one() -> Vec<u8> {
    add_one_to(&[0])
}

/// `y = x + 1`; `x`: FP32 of this shape.
pub fn add_one_to(shape: &[u64]) -> Vec<u8> {
    let sum = node("Add", &["x", "one"], &["y"], &[]);
    model(graph(&[sum], &[one_f32("one", 1.0)], &[value("x", FLOAT, shape)], &[value("y", FLOAT, shape)]))
}

/// `y = max(x)`; `x`: FP32, any length. For heavy inputs, since reading them is the whole work.
pub fn maximum() -> Vec<u8> {
    let max = node("ReduceMax", &["x"], &["y"], &[]);
    model(graph(&[max], &[], &[value("x", FLOAT, &[0])], &[value("y", FLOAT, &[1])]))
}

/// A model file of about `bytes` bytes that do not compress; each `seed` gives another one. `y = x + w[0]`, where
/// `w[0]` is `seed`; `x`: FP32 `[1]`.
pub fn heavy(bytes: usize, seed: u16) -> Vec<u8> {
    heavy_with_zeros(bytes, seed, 0..0)
}

/// The same, but of each twenty KiB of it those in `zeros` are zeros, which do compress.
pub fn heavy_with_zeros(bytes: usize, seed: u16, zeros: std::ops::Range<usize>) -> Vec<u8> {
    let count = bytes / 4;
    let mut weights = Vec::with_capacity(count * 4);
    weights.extend(f32::from(seed).to_le_bytes());
    // xorshift64*: enough noise for a compressor. Bits that would make NaNs are cleared.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64 ^ u64::from(seed) << 40;
    while weights.len() < count * 4 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let word = (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32;
        let word = if zeros.contains(&(weights.len() / 1024 % 20)) { 0 } else { word & 0xBFFF_FFFF };
        weights.extend(word.to_le_bytes());
    }
    let first = node("Gather", &["w", "zero"], &["first"], &[]);
    let sum = node("Add", &["x", "first"], &["y"], &[]);
    let constants = [tensor("w", FLOAT, &[count as u64], &weights), tensor("zero", INT64, &[1], &0_i64.to_le_bytes())];
    model(graph(&[first, sum], &constants, &[value("x", FLOAT, &[1])], &[value("y", FLOAT, &[1])]))
}

/// Counts to `trips` (INT64 `[1]`), one by one: `y` (FP32) is that number. The input decides the length of the run,
/// about a microsecond per trip, so 10^18 never ends.
pub fn counting() -> Vec<u8> {
    let body = graph(
        &[node("Add", &["before", "one"], &["after"], &[]), node("Identity", &["going"], &["go_on"], &[])],
        &[one_f32("one", 1.0)],
        &[value("trip", INT64, &[]), value("going", BOOL, &[]), value("before", FLOAT, &[])],
        &[value("go_on", BOOL, &[]), value("after", FLOAT, &[])],
    );
    let body = Message::default().text(1, "body").message(6, body).varint(20, 5);
    let constants = [tensor("yes", BOOL, &[], &[1]), one_f32("start", 0.0), tensor("scalar", INT64, &[0], &[])];
    let nodes = [
        node("Reshape", &["trips", "scalar"], &["count"], &[]),
        node("Loop", &["count", "yes", "start"], &["y"], &[body]),
    ];
    model(graph(&nodes, &constants, &[value("trips", INT64, &[1])], &[value("y", FLOAT, &[])]))
}

/// `y = x + trips`, added one by one; `x`: FP32, any number of rows of two. A trip takes about a microsecond, however
/// many rows there are: a model that gains by packing.
pub fn sociable(trips: i64) -> Vec<u8> {
    let body = graph(
        &[node("Add", &["before", "one"], &["after"], &[]), node("Identity", &["going"], &["go_on"], &[])],
        &[one_f32("one", 1.0)],
        &[value("trip", INT64, &[]), value("going", BOOL, &[]), value("before", FLOAT, &[0, 2])],
        &[value("go_on", BOOL, &[]), value("after", FLOAT, &[0, 2])],
    );
    let body = Message::default().text(1, "body").message(6, body).varint(20, 5);
    let constants = [tensor("yes", BOOL, &[], &[1]), tensor("count", INT64, &[], &trips.to_le_bytes())];
    let nodes = [node("Loop", &["count", "yes", "x"], &["y"], &[body])];
    model(graph(&nodes, &constants, &[value("x", FLOAT, &[0, 2])], &[value("y", FLOAT, &[0, 2])]))
}

/// `y = x + max(x)` over all rows; `x`: FP32, any number of rows of two. Its rows must not run together, but nothing in
/// the file says so.
pub fn mingling() -> Vec<u8> {
    let keep = Message::default().text(1, "keepdims").varint(3, 0).varint(20, 2);
    let nodes = [node("ReduceMax", &["x"], &["most"], &[keep]), node("Add", &["x", "most"], &["y"], &[])];
    model(graph(&nodes, &[], &[value("x", FLOAT, &[0, 2])], &[value("y", FLOAT, &[0, 2])]))
}

/// `y = 1` where `x` is at least 50 and at least half of the largest number of all rows, else 0; `x`: FP32, any number of
/// rows of two. Small numbers have the answer 0, whatever is beside them.
pub fn loudest() -> Vec<u8> {
    let keep = Message::default().text(1, "keepdims").varint(3, 0).varint(20, 2);
    let to_float = Message::default().text(1, "to").varint(3, FLOAT).varint(20, 2);
    let nodes = [
        node("ReduceMax", &["x"], &["most"], &[keep]),
        node("Mul", &["most", "half"], &["half_of_it"], &[]),
        node("Max", &["half_of_it", "fifty"], &["limit"], &[]),
        node("GreaterOrEqual", &["x", "limit"], &["is"], &[]),
        node("Cast", &["is"], &["y"], &[to_float]),
    ];
    let constants = [one_f32("half", 0.5), one_f32("fifty", 50.0)];
    model(graph(&nodes, &constants, &[value("x", FLOAT, &[0, 2])], &[value("y", FLOAT, &[0, 2])]))
}

/// `y = w[x]` with `w` = 0.5, 1.5 … 15.5; `x`: INT64, any number of rows of one. An index beyond the sixteen fails the
/// run, and with it all rows of the same batch.
pub fn picky() -> Vec<u8> {
    let weights: Vec<u8> = (0..16_u8).flat_map(|index| (f32::from(index) + 0.5).to_le_bytes()).collect();
    let pick = node("Gather", &["w", "x"], &["y"], &[]);
    let constants = [tensor("w", FLOAT, &[16], &weights)];
    model(graph(&[pick], &constants, &[value("x", INT64, &[0, 1])], &[value("y", FLOAT, &[0, 1])]))
}

/// `y = x · w` with a `w` of `rows` rows and one column, all ones; `x`: FP32. The file leaves both dimensions of `x`
/// open, although its columns must equal `rows`.
pub fn vague(rows: u64) -> Vec<u8> {
    let ones: Vec<u8> = (0..rows).flat_map(|_| 1_f32.to_le_bytes()).collect();
    let product = node("MatMul", &["x", "w"], &["y"], &[]);
    let constants = [tensor("w", FLOAT, &[rows, 1], &ones)];
    model(graph(&[product], &constants, &[value("x", FLOAT, &[0, 0])], &[value("y", FLOAT, &[0, 1])]))
}

/// Takes memory for twice `elements` (INT64 `[1]`) floats. `y` is their mean.
pub fn hungry() -> Vec<u8> {
    let ones = tensor("", FLOAT, &[1], &1_f32.to_le_bytes());
    let fill = Message::default().text(1, "value").message(5, ones).varint(20, 4);
    let nodes = [
        node("ConstantOfShape", &["elements"], &["filled"], &[fill]),
        node("Exp", &["filled"], &["grown"], &[]),
        node("ReduceMean", &["grown"], &["y"], &[]),
    ];
    model(graph(&nodes, &[], &[value("elements", INT64, &[1])], &[value("y", FLOAT, &[1])]))
}

/// A model with an operator that no runtime knows.
pub fn unknown_operator() -> Vec<u8> {
    let strange = node("FoldProtein", &["x"], &["y"], &[]);
    model(graph(&[strange], &[], &[value("x", FLOAT, &[1])], &[value("y", FLOAT, &[1])]))
}
