//! Messages between client and worker on their direct link. One link carries any number of attempts; every message
//! names its own.
//!
//! ```text
//!   client                                     worker
//!     | Open(ticket, manifest)  ------------------> |   ticket checked, session made
//!     | Chunk Chunk Chunk … (≤ window)  ----------> |   hashed while written
//!     | <------------------ Accept(needs: offsets)  |   where a resumed transfer goes on; not if all came with Open
//!     | <------------------ Credit(blob, received)  |   opens the window again
//!     | <------------------ Progress                |   every second at the latest
//!     | Alive  -----------------------------------> |   every second at the latest
//!     | <------------------ Result(outputs)         |
//!     | <------------------ Chunk Chunk …           |
//!     | Credit(blob, received)  ------------------> |
//!     | Release  ---------------------------------> |   files are free; travels with the next message
//! ```

use bincode::{Decode, Encode};

use crate::{
    DType, Digest, ErrorCode, ModelRef, Outcome, Ticket,
    message::{AttemptId, RunNote, Stage},
};

/// The number of a blob in an attempt. The model is blob 0. Inputs (in a result: outputs) follow from 1 in the order of
/// the manifest. Models of later stages follow the inputs.
pub type BlobIndex = u16;

/// The first stage's model.
pub const MODEL_BLOB: BlobIndex = 0;

/// An input as the client declares it.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct InputDecl {
    /// Name of the model's input; `None`: by position.
    pub name: Option<String>,
    /// Element type if the client knows it (from `.npy`, for example). The worker compares it with the model's.
    pub dtype: Option<DType>,
    /// Shape if the client knows it.
    pub shape: Option<Vec<u64>>,
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// Length in bytes: little-endian elements in row-major order.
    pub size_bytes: u64,
}

/// Everything that an attempt needs to run.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Manifest {
    /// The model.
    pub model: ModelRef,
    /// The model's name for people.
    pub model_name: String,
    /// Later stages: models that the outputs pass through afterwards. Their blob numbers follow the inputs', and they
    /// are sent only when [`Accept`] asks for them.
    pub then: Vec<Stage>,
    /// Number of items in the inputs, one behind the other.
    pub items: u32,
    /// The inputs in the order of their blobs.
    pub inputs: Vec<InputDecl>,
}

/// Opens an attempt at its worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Open {
    /// The client's right to open the attempt.
    pub ticket: Ticket,
    /// What the client will send; `None` when it fetches a result.
    pub manifest: Option<Manifest>,
    /// Bytes of the result that may be under way unacknowledged.
    pub window_bytes: u32,
    /// The attempt was open before, so the client sends data only after [`Accept`]: the worker knows how much has
    /// arrived.
    pub resume: bool,
    /// The outputs that the client already has in part, in their order, when the link broke during the result; empty if
    /// it has none.
    pub outputs_here: Vec<OutputPart>,
}

/// How many bytes of an output have arrived.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct OutputPart {
    /// The output: BLAKE3 of all its bytes, as announced.
    pub digest: Digest,
    /// Bytes in place, from the output's beginning.
    pub received_bytes: u64,
}

/// A piece of a blob. The payload is the frame's second part.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Chunk {
    /// The attempt.
    pub id: AttemptId,
    /// Which blob.
    pub blob: BlobIndex,
    /// Offset of the (uncompressed) bytes in the blob.
    pub offset: u64,
    /// Length after decompression if the payload is a zstd frame; `None` if it is raw.
    pub inflated_bytes: Option<u32>,
}

/// How many bytes of a blob have arrived.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Credit {
    /// The attempt.
    pub id: AttemptId,
    /// Which blob.
    pub blob: BlobIndex,
    /// Bytes in place, from the blob's beginning.
    pub received_bytes: u64,
}

/// Lets an attempt in. The worker leaves it out if everything of an attached attempt came with its opening, and the
/// next message ([`Progress`] after receiving, or the result) says as much.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Accept {
    /// The attempt.
    pub id: AttemptId,
    /// Incomplete blobs, each with the first byte that is needed. Blobs that are not named need not be sent.
    pub needs: Vec<(BlobIndex, u64)>,
    /// Bytes that may be under way unacknowledged.
    pub window_bytes: u32,
}

/// Refuses an attempt, or ends one that was let in.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Refuse {
    /// The attempt.
    pub id: AttemptId,
    /// The reason as a code.
    pub code: ErrorCode,
    /// What was wrong and what to do.
    pub text: String,
}

/// What a worker is doing with an attempt.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Phase {
    /// It receives model and inputs.
    Receiving,
    /// The attempt waits for a slot.
    Waiting,
    /// The engine starts and loads the model.
    Loading,
    /// The model runs.
    Running,
}

/// An attempt's phase at its worker.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Progress {
    /// The attempt.
    pub id: AttemptId,
    /// The current phase.
    pub phase: Phase,
}

/// An output as the worker declares it.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct OutputDecl {
    /// Name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of one item's output. The outputs of several items stand one behind the other.
    pub shape: Vec<u64>,
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// Length of all items' outputs in bytes: little-endian elements in row-major order.
    pub size_bytes: u64,
}

/// The end of an attempt.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct RunResult {
    /// The attempt.
    pub id: AttemptId,
    /// How it ended.
    pub outcome: Outcome,
    /// The outputs in the model's order: blobs 1, 2, … of the chunks that follow. Empty unless the outcome is `Done`.
    pub outputs: Vec<OutputDecl>,
    /// The runs of this attempt in the order in which they ended; only the first ones if there were many.
    pub runs: Vec<RunNote>,
    /// Time from the arrival of model and inputs to the end, microseconds; 0 if they arrived in an earlier life of the
    /// worker.
    pub held_us: u64,
    /// Chunks begin at the offsets of [`Open::outputs_here`]; if false, every output begins at byte 0.
    pub goes_on: bool,
}
