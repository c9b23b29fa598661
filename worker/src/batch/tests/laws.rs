//! The way of the bytes, for random tasks, pieces and batches: from the inputs into calls and back to their owners.

use bytes::Bytes;
use proptest::{collection::vec, prelude::*, test_runner::RngSeed};

use super::*;

/// Bytes that lie in memory, or somewhere in a file.
fn payload(folder: &std::path::Path, bytes: Vec<u8>, in_file: bool) -> Payload {
    if !in_file {
        return Payload::Memory(Bytes::from(bytes));
    }
    let path = tempfile::NamedTempFile::new_in(folder).expect("a file").into_temp_path().keep().expect("it stays");
    let (offset, size_bytes) = (3, bytes.len() as u64);
    fs::write(&path, [b"abc", &bytes[..], b"yz"].concat()).expect("room");
    Payload::File { path, offset, size_bytes, owner: None }
}

/// A task: its number of items, the bytes of each, and whether its inputs lie in a file.
type Drawn = (u32, u64, bool);

fn value(task: usize, index: usize) -> u8 {
    (task * 101 + index * 7) as u8
}

fn material(folder: &std::path::Path, number: usize, (items, length, in_file): Drawn, stages: usize) -> Arc<Material> {
    let bytes: Vec<u8> = (0..items as usize * length as usize).map(|index| value(number, index)).collect();
    let model = ModelRef { digest: Digest::of(b"m"), size_bytes: 1, format: ModelFormat::Onnx };
    let (dtype, shape) = (Some(DType::U8), Some(vec![items.into(), length]));
    let input = InputDecl { name: None, dtype, shape, digest: Digest::of(&bytes), size_bytes: bytes.len() as u64 };
    let then = (1..stages).map(|_| Stage { name: "later".to_owned(), model }).collect();
    let manifest = Manifest { model, model_name: "m".to_owned(), then, items, inputs: vec![input] };
    let (id, ticket) = ticket(number as u8 + 1, items);
    let memory = MemoryUse::new(1 << 20);
    let payloads = vec![payload(folder, bytes, in_file)];
    let inputs = Inputs { models: vec![None; stages], payloads, memory: memory.share() };
    Arc::new(Material::new(Order { id, manifest: manifest.into(), ticket: ticket.into() }, inputs, &memory))
}

/// Runs a batch with a model that adds one to each byte, whose outputs lie in memory or in a file.
fn run(batch: &Batch, folder: &std::path::Path, in_file: bool) {
    let inputs = [TensorMeta { name: "x".to_owned(), dtype: DType::U8, shape: vec![-1, -1] }];
    let chunks = batch.chunks(&inputs).expect("it fits");
    let mut by_part = vec![Vec::new(); batch.parts.len()];
    for alike in groups(&chunks) {
        let [given] = &batch.given(&alike)[..] else { panic!("one input") };
        let pieces = given.pieces.iter().flat_map(|piece| piece.read().expect("readable").to_vec());
        let bytes: Vec<u8> = pieces.map(|byte| byte.wrapping_add(1)).collect();
        assert_eq!(given.shape.iter().product::<u64>(), bytes.len() as u64, "what is sent is what is declared");
        let (shape, payload) = (given.shape.clone(), payload(folder, bytes, in_file));
        let output = Tensor { name: "y".to_owned(), dtype: DType::U8, shape, payload };
        hand_out(&alike, cut(&[output], items(&alike)).expect("as many rows"), &mut by_part);
    }
    for ((part, material), outputs) in batch.parts.iter().zip(by_part) {
        material.store(part.stage, part.rows.clone(), in_order(outputs));
    }
}

/// A way to cut numbers and orders from random bytes.
struct Dice(Vec<u8>);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0.rotate_left(1);
        usize::from(self.0[0]) % end.max(1)
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_byte_goes_through_all_stages_and_back_to_its_place(
        tasks in vec((1..13_u32, 1..4_u64, any::<bool>()), 1..5),
        stages in 1..4_usize,
        dice in vec(any::<u8>(), 97),
    ) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = BlobStore::open(&folder.path().join("blobs"), 1 << 30).expect("a store");
        let mut dice = Dice(dice);
        let materials: Vec<Arc<Material>> =
            tasks.iter().enumerate().map(|(number, task)| material(folder.path(), number, *task, stages)).collect();
        for stage in 0..stages as u8 {
            let mut waiting: Vec<(usize, Range<u32>)> = Vec::new();
            for (number, (items, ..)) in tasks.iter().enumerate() {
                let mut start = 0;
                while start < *items {
                    let end = (start + 1 + dice.below(5) as u32).min(*items);
                    waiting.push((number, start..end));
                    start = end;
                }
            }
            while !waiting.is_empty() {
                let parts = (0..1 + dice.below(4)).filter_map(|_| {
                    let (number, rows) = (!waiting.is_empty()).then(|| waiting.swap_remove(dice.below(waiting.len())))?;
                    let material = materials[number].clone();
                    Some((Part { id: material.order.id, stage, rows }, material))
                });
                let (parts, kind) = (parts.collect(), BatchKind::Packed);
                let (only_loads, comparing) = (Arc::default(), watch::channel(Comparing::default()).1);
                let (batch, device) = (BatchId(1), -1);
                let batch = Batch { batch, parts, device, kind, apart: false, limit: PATIENCE, only_loads, unfinished: Arc::default(), comparing };
                run(&batch, folder.path(), dice.below(2) == 0);
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        for (number, ((items, length, _), material)) in tasks.iter().zip(&materials).enumerate() {
            runtime.block_on(material.join_if_complete(&store));
            let outputs = material.result().expect("all rows ran").as_ref().expect("they fit together");
            let got = outputs[0].payload.read().expect("readable");
            let wanted: Vec<u8> = (0..*items as usize * *length as usize)
                .map(|index| value(number, index).wrapping_add(stages as u8))
                .collect();
            prop_assert_eq!(&outputs[0].shape, &vec![1, *length]);
            prop_assert_eq!(outputs[0].digest, Digest::of(&wanted));
            prop_assert_eq!(got, wanted);
        }
    }
}
