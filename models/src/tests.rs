//! Models written by hand, byte by byte, and then damaged.

use proptest::prelude::*;

use super::*;

/// A flatbuffer under construction: tables are written front to back, each before the parts that it points to.
#[derive(Default)]
struct Flat(Vec<u8>);

impl Flat {
    /// Writes a table with four bytes per slot. Returns its position and the positions of the slots, to be filled
    /// later.
    fn table(&mut self, slots: &[u16]) -> (u32, Vec<usize>) {
        let count = slots.iter().max().map_or(0, |max| max + 1);
        let vtable = self.0.len();
        self.0.extend((4 + 2 * count).to_le_bytes());
        self.0.extend((4 + 4 * slots.len() as u16).to_le_bytes());
        for slot in 0..count {
            let place = slots.iter().position(|used| *used == slot);
            self.0.extend(place.map_or(0, |place| 4 + 4 * place as u16).to_le_bytes());
        }
        let at = self.0.len();
        self.0.extend(((at - vtable) as i32).to_le_bytes());
        self.0.extend(vec![0; 4 * slots.len()]);
        (at as u32, (0..slots.len()).map(|place| at + 4 + 4 * place).collect())
    }

    fn point(&mut self, from: usize, to: u32) {
        self.0[from..from + 4].copy_from_slice(&(to - from as u32).to_le_bytes());
    }

    fn vector(&mut self, from: usize, count: usize, bytes: &[u8]) -> usize {
        let at = self.0.len();
        self.point(from, at as u32);
        self.0.extend((count as u32).to_le_bytes());
        self.0.extend(bytes);
        at + 4
    }

    fn i32s(&mut self, from: usize, values: &[i32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.vector(from, values.len(), &bytes);
    }
}

/// One quantised input with an open first dimension, one scalar output.
fn tflite() -> Vec<u8> {
    let mut flat = Flat(vec![0; 8]);
    flat.0[4..].copy_from_slice(b"TFL3");
    let (model, model_slots) = flat.table(&[2]);
    flat.point(0, model);
    let subgraphs = flat.vector(model_slots[0], 1, &[0; 4]);
    let (subgraph, slots) = flat.table(&[0, 1, 2]);
    flat.point(subgraphs, subgraph);
    let tensors = flat.vector(slots[0], 2, &[0; 8]);
    flat.i32s(slots[1], &[1, -1]);
    flat.i32s(slots[2], &[0]);

    let (output, slots) = flat.table(&[1, 3, 8]);
    flat.point(tensors, output);
    flat.vector(slots[1], 5, b"score");
    flat.0[slots[2]] = 1;

    let (input, slots) = flat.table(&[0, 1, 3, 4, 7]);
    flat.point(tensors + 4, input);
    flat.i32s(slots[0], &[1, 4, 4, 3]);
    flat.0[slots[1]] = 9;
    flat.vector(slots[2], 5, b"image");
    let (quantization, scale_slots) = flat.table(&[2, 3]);
    flat.point(slots[3], quantization);
    flat.vector(scale_slots[0], 1, &0.5_f32.to_le_bytes());
    flat.vector(scale_slots[1], 1, &(-3_i64).to_le_bytes());
    flat.i32s(slots[4], &[-1, 4, 4, 3]);
    flat.0
}

/// A protobuf field of bytes; all bodies here are shorter than 128.
fn field(number: u8, body: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(body.len()).expect("short")][..], body].concat()
}

fn onnx_value(name: &str, element: u8, dimensions: &[&[u8]]) -> Vec<u8> {
    let shape: Vec<u8> = dimensions.iter().flat_map(|dimension| field(1, dimension)).collect();
    let tensor = [vec![8, element], field(2, &shape)].concat();
    [field(1, name.as_bytes()), field(2, &field(1, &tensor))].concat()
}

/// Input `x` with a named first dimension, weight `w` listed as an input, output `y`.
fn onnx() -> Vec<u8> {
    let graph = [
        field(11, &onnx_value("w", 1, &[&[8, 2]])),
        field(5, &[vec![8, 2, 16, 1], field(8, b"w")].concat()),
        field(11, &onnx_value("x", 7, &[&field(2, b"N"), &[8, 10]])),
        field(12, &onnx_value("y", 1, &[])),
    ];
    [vec![8, 9], field(2, b"by hand"), field(7, &graph.concat())].concat()
}

#[test]
fn a_tflite_model_names_its_tensors() {
    let signature = signature(&tflite()).unwrap();

    assert_eq!(signature.format, ModelFormat::TfLite);
    let quantization = Some(Quantization { scale: 0.5, zero_point: -3 });
    let shape = Some(vec![-1, 4, 4, 3]);
    assert_eq!(signature.inputs, [TensorSpec { name: "image".into(), dtype: Some(DType::I8), shape, quantization }]);
    let score = TensorSpec { name: "score".into(), dtype: Some(DType::F32), shape: Some(vec![]), quantization: None };
    assert_eq!(signature.outputs, [score]);
    assert_eq!(signature.inputs[0].to_string(), "INT8 [?,4,4,3]");
    assert_eq!((signature.inputs[0].size_bytes(), signature.outputs[0].size_bytes()), (None, Some(4)));
}

#[test]
fn an_onnx_model_names_its_tensors_but_not_its_weights() {
    let signature = signature(&onnx()).unwrap();

    assert_eq!(signature.format, ModelFormat::Onnx);
    let names: Vec<&str> = signature.inputs.iter().map(|input| input.name.as_str()).collect();
    assert_eq!(names, ["x"]);
    assert_eq!(signature.inputs[0].to_string(), "INT64 [?,10]");
    assert_eq!(signature.outputs[0].to_string(), "FP32 []");
}

#[test]
fn what_is_no_model_is_not_taken_for_one() {
    for head in [&b""[..], b"hello, world", b"\x08", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", &[0; 64], b"\x08\x00\x08\x00"]
    {
        assert_eq!(detect(head), None, "{head:?}");
        assert!(matches!(signature(head), Err(SignatureError::UnknownFormat)));
    }
    assert_eq!(detect(&tflite()[..8]), Some(ModelFormat::TfLite));
    assert_eq!(detect(&onnx()[..20]), Some(ModelFormat::Onnx));
}

#[test]
fn a_count_that_the_file_only_claims_is_refused() {
    let mut bytes = tflite();
    let inputs = bytes.windows(12).position(|window| window == [2, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255]).unwrap();
    bytes[inputs..inputs + 4].copy_from_slice(&u32::MAX.to_le_bytes());

    let error = signature(&bytes).unwrap_err();

    assert_eq!(error.to_string(), "the model has inputs or outputs beyond the limit of 128");
}

#[test]
fn a_model_cut_anywhere_is_an_error_or_still_whole() {
    for whole in [tflite(), onnx()] {
        for end in 0..whole.len() {
            // The point is that nothing panics. A cut file may by chance still contain everything that is read.
            let _ = signature(&whole[..end]);
        }
        assert!(signature(&whole[..whole.len() / 2]).is_err());
    }
}

proptest! {
    #[test]
    fn spoilt_models_never_panic(
        is_onnx in any::<bool>(),
        spoils in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = if is_onnx { onnx() } else { tflite() };
        for (at, value) in spoils {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = signature(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        let _ = signature(&bytes);
    }

    #[test]
    fn noise_behind_a_good_start_never_panics(noise in prop::collection::vec(any::<u8>(), 0..512), is_onnx in any::<bool>()) {
        let start: &[u8] = if is_onnx { &[8, 9] } else { b"\x08\0\0\0TFL3" };
        let _ = signature(&[start, &noise].concat());
    }
}
