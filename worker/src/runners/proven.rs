//! What probes have shown of a model: the output shapes that the same inputs must give again.

use std::collections::HashMap;

use parking_lot::Mutex;
use proto_msgs::{Digest, ErrorCode, Failure};

use super::{fit::Fitted, oip::Tensor};

/// Pairs of model and shapes whose probe results are kept. At the limit the one not asked for longest is forgotten:
/// later stages run its rows one by one until they are probed again.
const PROVEN_MAX: usize = 256;

/// Output shapes of one item, as probes saw them. A model whose outputs depend on more than the number of rows may pass
/// a probe and still give other shapes later.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    shapes: HashMap<Shapes, Seen>,
    /// Questions so far.
    asked: u64,
}

/// A model's digest and the shapes of an item's inputs.
type Shapes = (Digest, Vec<Vec<u64>>);

/// The shapes of an item's outputs, and the last question for them.
#[derive(Debug)]
struct Seen {
    outputs: Vec<Vec<u64>>,
    asked: u64,
}

impl Proven {
    /// A probe saw that the model gives this item for these inputs.
    pub(crate) fn remember(&self, model: Digest, inputs: &[Fitted], item: &[Tensor]) {
        let (mut table, key) = (self.table.lock(), key(model, inputs));
        table.asked += 1;
        if table.shapes.len() >= PROVEN_MAX
            && !table.shapes.contains_key(&key)
            && let Some(stalest) = table.shapes.iter().min_by_key(|(_, seen)| seen.asked).map(|(key, _)| key.clone())
        {
            table.shapes.remove(&stalest);
        }
        let seen = Seen { outputs: item.iter().map(|output| output.shape.clone()).collect(), asked: table.asked };
        table.shapes.insert(key, seen);
    }

    /// Whether a probe saw the model with inputs of these shapes.
    pub(crate) fn knows(&self, model: Digest, inputs: &[Fitted]) -> bool {
        let mut table = self.table.lock();
        let Table { shapes, asked } = &mut *table;
        *asked += 1;
        shapes.get_mut(&key(model, inputs)).map(|seen| seen.asked = *asked).is_some()
    }

    /// Fails if items have other output shapes than a probe saw for inputs of these shapes.
    pub(crate) fn check(&self, model: Digest, inputs: &[Fitted], items: &[Vec<Tensor>]) -> Result<(), Failure> {
        let table = self.table.lock();
        let Some(Seen { outputs: known, .. }) = table.shapes.get(&key(model, inputs)) else { return Ok(()) };
        for item in items {
            for (output, known) in item.iter().zip(known) {
                if output.shape != *known {
                    let text = format!(
                        "output '{}' came with {:?} for each item, the probe saw {known:?}: not the rows of these items",
                        output.name, output.shape
                    );
                    return Err(Failure::new(ErrorCode::RunProtocol, text));
                }
            }
        }
        Ok(())
    }
}

fn key(model: Digest, inputs: &[Fitted]) -> Shapes {
    (model, inputs.iter().map(|input| input.shape.clone()).collect())
}

#[cfg(test)]
mod tests {
    use proto_msgs::DType;

    use super::*;
    use crate::data::payload::Payload;

    #[test]
    fn shapes_that_are_asked_for_stay_when_many_others_come() {
        let (proven, model) = (Proven::default(), Digest::from_bytes([1; 32]));
        let inputs = |length: usize| {
            vec![Fitted { index: 0, name: "x".to_owned(), dtype: DType::F32, shape: vec![1, length as u64] }]
        };
        let item = [Tensor {
            name: "y".to_owned(),
            dtype: DType::F32,
            shape: vec![1],
            payload: Payload::Memory((&[0; 4][..]).into()),
        }];
        for length in 0..4 * PROVEN_MAX {
            proven.remember(model, &inputs(length), &item);
            proven.remember(model, &inputs(length), &item);
            assert!(proven.knows(model, &inputs(0)), "lost to length {length}");
        }
        assert_eq!(proven.table.lock().shapes.len(), PROVEN_MAX);
        assert!(!proven.knows(model, &inputs(1)));
    }
}
