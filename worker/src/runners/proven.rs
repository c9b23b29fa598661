//! What probes have shown of a model: the output shapes that the same inputs must give again.

use std::collections::HashMap;

use parking_lot::{Mutex, MutexGuard};
use proto_msgs::{Digest, ErrorCode, Failure};

use super::{fit::Fitted, oip::Tensor};

/// Pairs of model and shapes whose probe results are kept. At the limit one is forgotten, which only loses a check.
const PROVEN_MAX: usize = 256;

/// Output shapes of one item, as probes saw them. A model whose outputs depend on more than the number of rows may pass
/// a probe and still give other shapes later.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    shapes: Mutex<HashMap<Shapes, Vec<Vec<u64>>>>,
}

/// A model's digest and the shapes of an item's inputs.
type Shapes = (Digest, Vec<Vec<u64>>);

impl Proven {
    /// A probe saw that the model gives this item for these inputs.
    pub(crate) fn remember(&self, model: Digest, inputs: &[Fitted], item: &[Tensor]) {
        let mut shapes = self.shapes();
        if shapes.len() == PROVEN_MAX
            && let Some(any) = shapes.keys().next().cloned()
        {
            shapes.remove(&any);
        }
        shapes.insert(key(model, inputs), item.iter().map(|output| output.shape.clone()).collect());
    }

    /// Whether a probe saw the model with inputs of these shapes.
    pub(crate) fn knows(&self, model: Digest, inputs: &[Fitted]) -> bool {
        self.shapes().contains_key(&key(model, inputs))
    }

    /// Fails if items have other output shapes than a probe saw for inputs of these shapes.
    pub(crate) fn check(&self, model: Digest, inputs: &[Fitted], items: &[Vec<Tensor>]) -> Result<(), Failure> {
        let shapes = self.shapes();
        let Some(known) = shapes.get(&key(model, inputs)) else { return Ok(()) };
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

    fn shapes(&self) -> MutexGuard<'_, HashMap<Shapes, Vec<Vec<u64>>>> {
        self.shapes.lock()
    }
}

fn key(model: Digest, inputs: &[Fitted]) -> Shapes {
    (model, inputs.iter().map(|input| input.shape.clone()).collect())
}
