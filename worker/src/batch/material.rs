//! The material of one attempt: inputs, models, and for each stage the outputs of each item.
//!
//! Owns this data between batches. The desk and the batches with rows of the attempt share it; the last to drop it
//! frees it. Never: when something runs.
//!
//! ```text
//!   inputs --stage 0--> outputs of each item --stage 1--> outputs of each item … --> joined: the result
//! ```

use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use proto_msgs::{
    AttemptId, BlobIndex, Digest, ErrorCode, Failure, InputDecl, Manifest, ModelRef, Ticket, message::MODEL_BLOB,
};
use tokio::task::spawn_blocking;

use super::rows::{bytes_of_items, common_shape, fit_items};
use crate::{
    data::{
        blobs::{BlobError, BlobStore, Pin},
        payload::{MEMORY_BYTES_MAX, MemoryShare, MemoryUse, Output, Payload},
    },
    runners::{
        fit::{Fitted, TensorMeta, fit},
        oip::Tensor,
    },
};

/// Results up to this size are joined where they are asked for; larger ones on a blocking thread.
const JOIN_AT_ONCE_BYTES_MAX: u64 = 256 * 1024;

/// What was ordered: an attempt, as its client and its ticket describe it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) id: AttemptId,
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) ticket: Arc<Ticket>,
}

/// Complete models and inputs of one attempt.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// The model of each stage; `None` if it must be looked up again, after a restart.
    pub(crate) models: Vec<Option<Pin>>,
    pub(crate) payloads: Vec<Payload>,
    /// The share of memory that the inputs use.
    pub(crate) memory: MemoryShare,
}

/// Inputs, models and outputs of one attempt.
#[derive(Debug)]
pub(crate) struct Material {
    pub(crate) order: Order,
    inputs: Vec<Payload>,
    _inputs_memory: MemoryShare,
    /// The model of each stage; `None` if it must be looked up again, after a restart.
    models: Mutex<Vec<Option<Pin>>>,
    made: Mutex<Made>,
    /// The joined rows of the last stage, once all exist.
    result: OnceLock<Result<Vec<Output>, Failure>>,
    /// Whether a batch with rows of the attempt began in this life.
    begun: AtomicBool,
}

/// Outputs of the runs so far.
#[derive(Debug)]
struct Made {
    /// Outputs by stage and item. Dropped once the item has passed the next stage.
    stages: Vec<Vec<Option<Vec<Tensor>>>>,
    memory: MemoryShare,
}

impl Order {
    pub(crate) fn is_detached(&self) -> bool {
        self.ticket.body.detached
    }

    /// The models of all stages, with the numbers of their blobs.
    pub(crate) fn models(&self) -> Vec<(BlobIndex, ModelRef)> {
        let behind_inputs = (MODEL_BLOB + 1..).skip(self.manifest.inputs.len());
        let later = behind_inputs.zip(&self.manifest.then).map(|(blob, stage)| (blob, stage.model));
        std::iter::once((MODEL_BLOB, self.manifest.model)).chain(later).collect()
    }
}

impl Material {
    /// The material of an attempt whose inputs have arrived.
    pub(crate) fn new(order: Order, inputs: Inputs, memory: &MemoryUse) -> Self {
        let stages = order.manifest.then.len() + 1;
        let items = order.manifest.items as usize;
        Self {
            order,
            inputs: inputs.payloads,
            _inputs_memory: inputs.memory,
            models: Mutex::new(inputs.models),
            made: Mutex::new(Made { stages: vec![vec![None; items]; stages], memory: memory.share() }),
            result: OnceLock::new(),
            begun: AtomicBool::new(false),
        }
    }

    /// The model of a stage.
    pub(crate) fn model(&self, stage: u8) -> Option<ModelRef> {
        match usize::from(stage).checked_sub(1) {
            None => Some(self.order.manifest.model),
            Some(index) => self.order.manifest.then.get(index).map(|stage| stage.model),
        }
    }

    /// The file of a stage's model, if still held. Blocks at the first use after a restart.
    pub(crate) fn pin(&self, stage: u8, store: &BlobStore) -> Option<Pin> {
        let digest = self.model(stage)?.digest;
        let held = self.models.lock().get(usize::from(stage)).cloned().flatten();
        held.or_else(|| store.pin(digest))
    }

    /// Whether a stage's model is pinned, so that no disk is read.
    pub(crate) fn has_pin(&self, stage: u8) -> bool {
        self.models.lock().get(usize::from(stage)).is_some_and(Option::is_some)
    }

    /// Marks that a run begins; true only the first time.
    pub(crate) fn begins(&self) -> bool {
        !self.begun.swap(true, Ordering::Relaxed)
    }

    /// Whether a run began and there is no result yet.
    pub(crate) fn is_under_way(&self) -> bool {
        self.begun.load(Ordering::Relaxed) && self.result.get().is_none()
    }

    /// Fits one item to the stage's model. At stage 0 all items fit if one does; later stages may differ by item.
    pub(crate) fn fit(&self, stage: u8, item: u32, model: &[TensorMeta]) -> Result<Vec<Fitted>, Failure> {
        if stage == 0 {
            return fit_items(model, &self.order.manifest.inputs, self.order.manifest.items);
        }
        let outputs = self.made_before(stage, item);
        // By name if the outputs have all names that the model needs, else by place.
        let by_name = model.iter().all(|meta| outputs.iter().any(|output| output.name == meta.name));
        let declare = |output: &Tensor| InputDecl {
            name: by_name.then(|| output.name.clone()),
            dtype: Some(output.dtype),
            shape: Some(output.shape.clone()),
            digest: Digest::from_bytes([0; 32]),
            size_bytes: output.payload.size_bytes(),
        };
        let wanted = |output: &&Tensor| !by_name || model.iter().any(|meta| meta.name == output.name);
        let declared: Vec<InputDecl> = outputs.iter().filter(wanted).map(declare).collect();
        let kept: Vec<usize> = (0..outputs.len()).filter(|index| wanted(&&outputs[*index])).collect();
        let mut fitted = fit(model, &declared).map_err(|failure| {
            let name = usize::from(stage).checked_sub(1).and_then(|index| self.order.manifest.then.get(index));
            let name = name.map_or("", |stage| &stage.name);
            Failure::new(
                failure.code,
                format!("stage {stage} ({name}) does not take what comes before it: {}", failure.text),
            )
        })?;
        for input in &mut fitted {
            input.index = kept[input.index];
        }
        Ok(fitted)
    }

    /// One input of the items `rows`, in pieces.
    pub(crate) fn pieces(&self, stage: u8, rows: &Range<u32>, input: usize) -> Vec<Payload> {
        if stage == 0 {
            let items = self.order.manifest.items;
            let slice = |payload: &Payload| match items {
                1 => payload.clone(),
                _ => payload.slice(bytes_of_items(payload.size_bytes(), items, rows)),
            };
            return self.inputs.get(input).map(slice).into_iter().collect();
        }
        let made = self.made.lock();
        let outputs = made.stages.get(usize::from(stage) - 1);
        let items = rows.clone().filter_map(|item| outputs?.get(item as usize)?.as_ref()?.get(input));
        items.map(|output| output.payload.clone()).collect()
    }

    fn made_before(&self, stage: u8, item: u32) -> Vec<Tensor> {
        let made = self.made.lock();
        let outputs = made.stages.get(usize::from(stage).wrapping_sub(1)).and_then(|items| items.get(item as usize));
        outputs.cloned().flatten().unwrap_or_default()
    }

    /// Whether outputs of `size_bytes` may stay in memory beside the present ones.
    pub(crate) fn has_memory_for(&self, size_bytes: u64) -> bool {
        self.made.lock().memory.has_room_for(size_bytes)
    }

    /// Keeps the outputs of these items, and frees the outputs they were made from.
    pub(crate) fn store(&self, stage: u8, rows: Range<u32>, outputs: Vec<Vec<Tensor>>) {
        let mut made = self.made.lock();
        let stage = usize::from(stage);
        let mut bytes = made.memory.bytes();
        for (item, outputs) in rows.zip(outputs) {
            let item = item as usize;
            bytes += memory_bytes(&outputs);
            if let Some(place) = made.stages.get_mut(stage).and_then(|items| items.get_mut(item)) {
                *place = Some(outputs);
            }
            let before = stage.checked_sub(1).and_then(|before| made.stages[before].get_mut(item)?.take());
            bytes = bytes.saturating_sub(before.map_or(0, |outputs| memory_bytes(&outputs)));
        }
        made.memory.change(bytes);
    }

    /// Joins the result if all rows have passed the last stage. The batch with the last rows does this before it ends,
    /// so that the result exists when the machine asks for it.
    pub(crate) async fn join_if_complete(self: &Arc<Self>, store: &BlobStore) {
        let Some(items) = self.take_complete() else { return };
        let size_bytes = items.iter().flatten().map(|output| output.payload.size_bytes()).sum::<u64>();
        let (material, store) = (self.clone(), store.clone());
        let join = move || {
            let _ = material.result.set(join(&items, &store));
        };
        if size_bytes <= JOIN_AT_ONCE_BYTES_MAX {
            join();
        } else {
            let _ = spawn_blocking(join).await;
        }
    }

    /// Takes the outputs of all items once all exist. Only one of several batches gets them: the check and the taking
    /// are one step, and what remains does not look complete.
    fn take_complete(&self) -> Option<Vec<Vec<Tensor>>> {
        let mut made = self.made.lock();
        let last = made.stages.last_mut().filter(|items| !items.is_empty() && items.iter().all(Option::is_some))?;
        Some(std::mem::take(last).into_iter().flatten().collect())
    }

    /// The joined result, if all rows exist.
    pub(crate) fn result(&self) -> Option<&Result<Vec<Output>, Failure>> {
        self.result.get()
    }
}

fn memory_bytes(outputs: &[Tensor]) -> u64 {
    let in_memory = outputs.iter().filter(|output| matches!(output.payload, Payload::Memory(_)));
    in_memory.map(|output| output.payload.size_bytes()).sum()
}

/// Joins the outputs of all items in order. No items are an error: nobody may take them for an empty result.
fn join(items: &[Vec<Tensor>], store: &BlobStore) -> Result<Vec<Output>, Failure> {
    let lost = || Failure::new(ErrorCode::WorkerLost, "the worker lost the outputs of this task");
    let count = items.first().ok_or_else(lost)?.len();
    let outputs = (0..count).map(|index| {
        let tensors: Vec<&Tensor> = items.iter().filter_map(|item| item.get(index)).collect();
        let shape = common_shape(tensors.iter().copied())?;
        let pieces: Vec<Payload> = tensors.iter().map(|tensor| tensor.payload.clone()).collect();
        let (payload, digest) = joined(&pieces, store)?;
        Ok(Output { name: tensors[0].name.clone(), dtype: tensors[0].dtype, shape, digest, payload })
    });
    outputs.collect()
}

/// Joins pieces: a single piece as it is, else a copy in memory or, if large, in a file.
fn joined(pieces: &[Payload], store: &BlobStore) -> Result<(Payload, Digest), Failure> {
    let io = |error| Failure::from(BlobError::Io(error));
    let size_bytes = pieces.iter().map(Payload::size_bytes).sum::<u64>();
    if let [Payload::Memory(bytes)] = pieces {
        return Ok((Payload::Memory(bytes.clone()), Digest::of(bytes)));
    }
    if let [whole @ Payload::File { offset: 0, size_bytes, owner: Some(owner), .. }] = pieces
        && let Some(digest) = owner.digest().filter(|_| *size_bytes == owner.size_bytes())
    {
        return Ok((whole.clone(), digest));
    }
    if size_bytes <= MEMORY_BYTES_MAX && pieces.iter().all(|piece| matches!(piece, Payload::Memory(_))) {
        let mut bytes = Vec::with_capacity(size_bytes as usize);
        for piece in pieces {
            bytes.extend_from_slice(&piece.read().map_err(io)?);
        }
        let digest = Digest::of(&bytes);
        return Ok((Payload::Memory(bytes.into()), digest));
    }
    let mut file = store.spool(size_bytes)?.create()?;
    for piece in pieces {
        // Block by block: a file may be too large for memory.
        for start in (0..piece.size_bytes()).step_by(JOIN_AT_ONCE_BYTES_MAX as usize) {
            file.write(&piece.slice(start..start + JOIN_AT_ONCE_BYTES_MAX).read().map_err(io)?)?;
        }
    }
    let (file, digest) = file.finish();
    Ok((Payload::spooled(file), digest))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn no_items_are_no_result() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let store = BlobStore::open(home.path(), 1 << 30).expect("a store");
        assert_eq!(join(&[], &store).expect_err("nothing to join").code, ErrorCode::WorkerLost);
        assert!(join(&[Vec::new()], &store).expect("an item without outputs").is_empty());
    }

    #[test]
    fn pieces_in_memory_and_in_files_become_one_with_its_digest() {
        let home = tempfile::tempdir().expect("a temporary folder");
        let store = BlobStore::open(home.path(), 1 << 30).expect("a store");
        let memory = |bytes: &'static [u8]| Payload::Memory(Bytes::from_static(bytes));
        let mut file = store.spool(6).and_then(|file| file.create()).expect("room");
        file.write(b"filed!").expect("writing");
        let file = Payload::spooled(file.finish().0);
        for (pieces, whole) in [
            (vec![memory(b"one")], "one"),
            (vec![memory(b"one"), memory(b"two")], "onetwo"),
            (vec![file.clone()], "filed!"),
            (vec![file.slice(3..6), memory(b"two"), file.slice(0..3)], "ed!twofil"),
        ] {
            let (payload, digest) = joined(&pieces, &store).expect("room");
            assert_eq!(payload.read().expect("readable"), whole);
            assert_eq!(digest, Digest::of(whole.as_bytes()));
        }
    }
}
