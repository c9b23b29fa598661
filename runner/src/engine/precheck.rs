//! Checks of an ONNX file before a runtime sees it. Owns cheap refusals of models that would make the runtime open a
//! file of this machine, or exhaust its stack or memory. The runtime judges everything else.

use proto_msgs::{ErrorCode, Failure};

use crate::protobuf::{Damaged, Field, Fields};

/// Longest nesting of graphs (`If`, `Loop`, `Scan`). Real models stay below four, and the runtime walks them by
/// recursion.
const DEPTH_MAX: usize = 16;

/// Most nodes in all graphs: ten times the largest known model, and a second of the runtime's time.
const NODES_MAX: usize = 200_000;

/// Checks the whole structure of a model, except its weights.
///
/// # Errors
/// `MODEL_INVALID` if it is damaged, `MODEL_UNSUPPORTED` with the part that the mesh does not carry.
pub(super) fn onnx(model: &[u8]) -> Result<(), Failure> {
    let mut walk = Walk { nodes: 0 };
    walk.model(model).map_err(|refusal| match refusal {
        Refusal::Damaged => Failure::new(ErrorCode::ModelInvalid, "the onnx file is damaged: its fields do not add up"),
        Refusal::Unsupported(what) => Failure::new(ErrorCode::ModelUnsupported, what),
    })
}

enum Refusal {
    Damaged,
    Unsupported(String),
}

impl From<Damaged> for Refusal {
    fn from(_: Damaged) -> Self {
        Self::Damaged
    }
}

struct Walk {
    nodes: usize,
}

impl Walk {
    fn model(&mut self, model: &[u8]) -> Result<(), Refusal> {
        for field in Fields::of(model) {
            match field? {
                Field::Bytes(7, graph) => self.graph(graph, 0)?,
                Field::Bytes(20, _) => {
                    let text = "the model carries training information: export it for inference";
                    return Err(Refusal::Unsupported(text.to_owned()));
                }
                Field::Bytes(25, function) => self.function(function)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn graph(&mut self, graph: &[u8], depth: usize) -> Result<(), Refusal> {
        if depth == DEPTH_MAX {
            return Err(Refusal::Unsupported(format!("the model nests more than {DEPTH_MAX} graphs")));
        }
        for field in Fields::of(graph) {
            match field? {
                Field::Bytes(1, node) => self.node(node, depth)?,
                Field::Bytes(5, tensor) => weights(tensor)?,
                Field::Bytes(15, sparse) => sparse_weights(sparse)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn function(&mut self, function: &[u8]) -> Result<(), Refusal> {
        for field in Fields::of(function) {
            match field? {
                Field::Bytes(7, node) => self.node(node, 0)?,
                Field::Bytes(11, attribute) => self.attribute(attribute, 0)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn node(&mut self, node: &[u8], depth: usize) -> Result<(), Refusal> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(Refusal::Unsupported(format!("the model has more than {NODES_MAX} nodes")));
        }
        for field in Fields::of(node) {
            if let Field::Bytes(5, attribute) = field? {
                self.attribute(attribute, depth)?;
            }
        }
        Ok(())
    }

    fn attribute(&mut self, attribute: &[u8], depth: usize) -> Result<(), Refusal> {
        for field in Fields::of(attribute) {
            match field? {
                Field::Bytes(5 | 10, tensor) => weights(tensor)?,
                Field::Bytes(6 | 11, graph) => self.graph(graph, depth + 1)?,
                Field::Bytes(22 | 23, sparse) => sparse_weights(sparse)?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn sparse_weights(sparse: &[u8]) -> Result<(), Refusal> {
    for field in Fields::of(sparse) {
        if let Field::Bytes(1 | 2, tensor) = field? {
            weights(tensor)?;
        }
    }
    Ok(())
}

/// Checks that weights are in the file: a path in a model would name a file of the machine that loads it.
fn weights(tensor: &[u8]) -> Result<(), Refusal> {
    for field in Fields::of(tensor) {
        if matches!(field?, Field::Bytes(13, _) | Field::Number(14, 1..)) {
            let text = "the model keeps weights in other files (external data): save it as one file";
            return Err(Refusal::Unsupported(text.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2];
        let mut len = content.len();
        while len >= 0x80 {
            field.push(len as u8 | 0x80);
            len >>= 7;
        }
        field.push(len as u8);
        field.extend_from_slice(content);
        field
    }

    fn refusal(model: &[u8]) -> (ErrorCode, String) {
        let failure = onnx(model).unwrap_err();
        (failure.code, failure.text)
    }

    #[test]
    fn weights_in_another_file_are_refused_wherever_they_hide() {
        let external = bytes_field(13, &bytes_field(1, b"location"));
        let in_graph = bytes_field(7, &bytes_field(5, &external));
        let in_attribute = bytes_field(7, &bytes_field(1, &bytes_field(5, &bytes_field(5, &external))));
        let in_branch = bytes_field(7, &bytes_field(1, &bytes_field(5, &bytes_field(6, &bytes_field(5, &external)))));
        let by_location = bytes_field(7, &bytes_field(5, &[14 << 3, 1]));
        for model in [in_graph, in_attribute, in_branch, by_location] {
            let (code, text) = refusal(&model);
            assert_eq!(code, ErrorCode::ModelUnsupported);
            assert!(text.contains("external data"), "{text}");
        }
        assert_eq!(onnx(&bytes_field(7, &bytes_field(5, &[14 << 3, 0]))), Ok(()), "data_location: default");
    }

    #[test]
    fn graphs_nested_without_end_are_refused() {
        let mut graph = Vec::new();
        for _ in 0..1000 {
            graph = bytes_field(1, &bytes_field(5, &bytes_field(6, &graph)));
        }
        assert_eq!(refusal(&bytes_field(7, &graph)).0, ErrorCode::ModelUnsupported);
    }

    #[test]
    fn a_cut_graph_is_damaged() {
        let model = bytes_field(7, &bytes_field(1, &bytes_field(5, b"\x0a\x01x")));
        assert_eq!(onnx(&model), Ok(()));
        assert_eq!(refusal(&model[..model.len() - 1]).0, ErrorCode::ModelInvalid);
    }
}
