//! Items of a comparison, what the model gives for each alone, and calls of several of them.
//!
//! Owns such calls and what they say: same, or not. Never decides which items are compared, or when.

use std::{path::PathBuf, time::Duration};

use mesh_core::worker::Equality;
use proto_msgs::{ErrorCode, Failure};
use tokio::task::spawn_blocking;

use super::{Calls, Outputs, alike::alike, rows::packed_shape};
use crate::{
    data::payload::Payload,
    runners::{
        fit::Fitted,
        oip::{Given, Tensor},
    },
};

/// Most bytes of inputs and outputs that a probe compares. More would be read from a disk that others need, too, and a
/// runner holds it all in memory at once. Rows of this size gain little from a common call.
pub(super) const PROBE_BYTES_MAX: u64 = 256 << 20;

/// An item, and what the model gives for it alone.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// The pieces of each input.
    pub(super) inputs: Vec<Vec<Payload>>,
    pub(super) outputs: Vec<Tensor>,
}

/// Items that are alike: all that a comparison needs, whatever becomes of their tasks meanwhile.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) fitted: Vec<Fitted>,
    pub(super) items: Vec<Known>,
}

impl Sample {
    /// Whether a comparison of one may go on with the other: the same shapes, and both made by a probe, or both of the
    /// single item of a check.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let is_single = |sample: &Self| sample.items.len() == 1;
        self.fitted == other.fitted && is_single(self) == is_single(other)
    }

    /// Compares one call of all items with their single runs. Also returns the time of the call, if it succeeded.
    pub(super) async fn packed(&self, calls: &mut Calls<'_, '_>) -> (Equality, Option<Duration>) {
        let singles: Outputs = self.items.iter().map(|item| item.outputs.clone()).collect();
        let given = given(&self.fitted, &self.items.iter().collect::<Vec<_>>());
        let before = calls.took.len();
        let packed = calls.cut_call((&self.fitted, singles.len() as u32), given, &mut 0).await;
        let took = calls.took.get(before).copied();
        let equal = match packed {
            Ok(packed) => compare(singles, packed).await,
            Err(failure) => self.judge(&failure, took.is_some()).await,
        };
        (equal, took)
    }

    /// What it says of the model that the packed call failed. `was_answered`: the call itself succeeded.
    async fn judge(&self, failure: &Failure, was_answered: bool) -> Equality {
        let inputs = self.items.iter().flat_map(|item| &item.inputs).flatten().cloned().collect();
        match failure.code {
            // Nor does it say anything that the runner was ended from outside, or that the disk is full now.
            ErrorCode::RunTimeout | ErrorCode::EngineUnavailable | ErrorCode::WorkerLost | ErrorCode::DiskFull => {
                Equality::Inconclusive
            }
            // Its outputs could not be cut into items.
            ErrorCode::RunProtocol if was_answered => Equality::Differs,
            // A runner that did not get all of its inputs fails in any way.
            _ if !are_there(inputs).await => Equality::Inconclusive,
            _ => Equality::Unsupported,
        }
    }

    /// Compares one call of these items with their single runs.
    pub(super) async fn together_as_alone(
        &self,
        calls: &mut Calls<'_, '_>,
        in_turn: Vec<&Known>,
    ) -> Result<Equality, Failure> {
        let given = given(&self.fitted, &in_turn);
        let alone: Outputs = in_turn.iter().map(|known| known.outputs.clone()).collect();
        if bytes_of(&given, &alone) > PROBE_BYTES_MAX {
            return Ok(Equality::Inconclusive);
        }
        let before = calls.took.len();
        match calls.cut_call((&self.fitted, in_turn.len() as u32), given, &mut 0).await {
            Ok(together) => Ok(compare(alone, together).await),
            // The call succeeded, and its outputs are not those of these items.
            Err(failure) if failure.code == ErrorCode::RunProtocol && calls.took.len() > before => {
                Ok(Equality::Differs)
            }
            Err(failure) => Err(failure),
        }
    }
}

/// One call of these items, one behind the other.
pub(super) fn given(fitted: &[Fitted], in_turn: &[&Known]) -> Vec<Given> {
    let items = in_turn.len() as u64;
    let given = |(place, input): (usize, &Fitted)| {
        let shape = if items == 1 { input.shape.clone() } else { packed_shape(&input.shape, items) };
        let pieces = in_turn.iter().flat_map(|known| known.inputs[place].clone()).collect();
        Given { name: input.name.clone(), dtype: input.dtype, shape, pieces }
    };
    fitted.iter().enumerate().map(given).collect()
}

/// Whether the files of these payloads exist. Only those of a detached task may go while somebody holds them.
pub(super) async fn are_there(pieces: Vec<Payload>) -> bool {
    let mut files: Vec<PathBuf> = pieces.into_iter().filter_map(Payload::into_kept_file).collect();
    files.dedup();
    files.is_empty() || spawn_blocking(move || files.iter().all(|file| file.exists())).await.unwrap_or(false)
}

/// Whether some of these outputs differ from the first by more than the tolerance. Without a number in them, or with
/// nothing but NaN, they do not.
pub(super) async fn tell_apart(outputs: Outputs) -> bool {
    let firsts = outputs.first().map(|first| vec![first.clone(); outputs.len()]).unwrap_or_default();
    compare(firsts, outputs).await == Equality::Differs
}

/// Compares the outputs of single and packed runs, item by item.
pub(super) async fn compare(singles: Outputs, packed: Outputs) -> Equality {
    // On a blocking thread: files are read, and much is compared.
    spawn_blocking(move || compare_now(&singles, &packed)).await.unwrap_or(Equality::Inconclusive)
}

/// [`compare`]; blocks if outputs are in files.
fn compare_now(singles: &[Vec<Tensor>], packed: &[Vec<Tensor>]) -> Equality {
    let same = |a: &Tensor, b: &Tensor| -> std::io::Result<bool> {
        let declared = (&a.name, a.dtype, &a.shape) == (&b.name, b.dtype, &b.shape);
        Ok(declared && alike(a.dtype, &a.payload, &b.payload)?)
    };
    for (single, packed) in singles.iter().zip(packed) {
        if single.len() != packed.len() {
            return Equality::Differs;
        }
        for (single, packed) in single.iter().zip(packed) {
            match same(single, packed) {
                Ok(true) => {}
                Ok(false) => return Equality::Differs,
                Err(_) => return Equality::Inconclusive,
            }
        }
    }
    Equality::Same
}

/// Bytes that a comparison reads: inputs and outputs together.
pub(super) fn bytes_of(given: &[Given], outputs: &[Vec<Tensor>]) -> u64 {
    let inputs = given.iter().flat_map(|input| &input.pieces).map(Payload::size_bytes);
    inputs.chain(outputs.iter().flatten().map(|output| output.payload.size_bytes())).sum()
}

/// The first place from `from` on, in a circle, whose outputs differ from those before it.
pub(super) async fn next_change(packed: Outputs, from: usize) -> Option<usize> {
    let find = move || {
        let changes = |place: &usize| {
            let before = place.checked_sub(1).unwrap_or(packed.len() - 1);
            compare_now(&packed[before..=before], &packed[*place..=*place]) == Equality::Differs
        };
        (from..packed.len()).chain(0..from).find(changes)
    };
    spawn_blocking(find).await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use proto_msgs::DType;

    use super::*;

    fn numbers(values: &[f32]) -> Vec<Tensor> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = vec![1, values.len() as u64];
        vec![Tensor { name: "y".to_owned(), dtype: DType::F32, shape, payload: Payload::Memory(bytes.into()) }]
    }

    #[tokio::test]
    async fn what_says_nothing_tells_no_row_from_another() {
        let of = async |rows: &[&[f32]]| tell_apart(rows.iter().map(|row| numbers(row)).collect()).await;
        assert!(of(&[&[1.0, 2.0], &[1.0, 2.0], &[1.0, 3.0]]).await);
        assert!(of(&[&[1.0], &[f32::NAN]]).await);
        assert!(!of(&[&[1.0, 2.0], &[1.0, 2.000_001]]).await, "a swap would be taken for rounding");
        assert!(!of(&[&[f32::NAN], &[f32::NAN]]).await);
        assert!(!of(&[&[], &[]]).await);
        assert!(!of(&[&[1.0]]).await);
        assert!(!of(&[]).await);
    }

    #[tokio::test]
    async fn a_batch_is_looked_at_where_its_answers_change() {
        let packed: Outputs = [0.0, 0.0, 1.0, 1.0, 0.0].map(|value| numbers(&[value])).to_vec();
        for (from, expected) in [(0, 2), (2, 2), (3, 4), (4, 4)] {
            assert_eq!(next_change(packed.clone(), from).await, Some(expected), "from {from}");
        }
        assert_eq!(next_change(packed[..2].to_vec(), 1).await, None, "all are alike");
    }

    #[test]
    fn what_is_too_much_to_compare_is_known_before_it_is_read() {
        let nowhere = PathBuf::from("/nowhere");
        let payload = Payload::File { path: nowhere, offset: 0, size_bytes: PROBE_BYTES_MAX, owner: None };
        let pieces = vec![payload.clone()];
        let inputs = [Given { name: "x".to_owned(), dtype: DType::U8, shape: vec![4, 2], pieces }];
        let output = Tensor { name: "y".to_owned(), dtype: DType::U8, shape: vec![1], payload };
        assert_eq!(bytes_of(&inputs, &[]), PROBE_BYTES_MAX);
        assert_eq!(bytes_of(&inputs, &[vec![output]]), 2 * PROBE_BYTES_MAX);
    }
}
