//! Between client and worker, directly. One connection carries any number of attempts; every message names its own.
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

/// A blob: the model is blob 0, inputs (or outputs, the other way) follow from 1 in the order of the manifest, models of
/// later stages follow the inputs.
pub type BlobIndex = u16;

/// Blob 0.
pub const MODEL_BLOB: BlobIndex = 0;

/// One input as the client has it.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct InputDecl {
    /// Name of the model's input; `None`: by position.
    pub name: Option<String>,
    /// Element type if the client knows it (from `.npy`, say); the worker compares it with the model's.
    pub dtype: Option<DType>,
    /// Shape if the client knows it.
    pub shape: Option<Vec<u64>>,
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// Length, little-endian elements in row-major order.
    pub size_bytes: u64,
}

/// Everything an attempt consists of.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Manifest {
    /// The model.
    pub model: ModelRef,
    /// What a person calls the model.
    pub model_name: String,
    /// Models that the outputs pass through afterwards. Their blobs have the numbers behind the inputs' and are sent only when
    /// [`Accept`] asks for them.
    pub then: Vec<Stage>,
    /// How many items the inputs hold, one behind the other.
    pub items: u32,
    /// The inputs.
    pub inputs: Vec<InputDecl>,
}

/// Opening of an attempt at its worker.
#[derive(Clone, Debug, Decode, Encode, PartialEq)]
pub struct Open {
    /// The right to do so.
    pub ticket: Ticket,
    /// What will come; `None` when a result is fetched.
    pub manifest: Option<Manifest>,
    /// The client sends the model only if this is false; the worker asks for it if it does not have it after all.
    pub model_held: bool,
    /// Bytes of result that may be under way unacknowledged.
    pub window_bytes: u32,
    /// First bytes follow only after [`Accept`]: the attempt was open before and the worker knows how far it came.
    pub resume: bool,
    /// What the client has of the outputs of a result that was on its way when the link broke, in their order; empty if it has
    /// nothing.
    pub outputs_here: Vec<OutputPart>,
}

/// How much of an output has arrived.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct OutputPart {
    /// Which output: BLAKE3 of all its bytes, as it was announced.
    pub digest: Digest,
    /// Bytes from its beginning that are in place.
    pub received_bytes: u64,
}

/// A piece of a blob. The payload is the frame's second part.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Chunk {
    /// The attempt.
    pub id: AttemptId,
    /// Which blob.
    pub blob: BlobIndex,
    /// Where in the blob the (uncompressed) bytes begin.
    pub offset: u64,
    /// Length once uncompressed, if the payload is a zstd frame.
    pub inflated_bytes: Option<u32>,
}

/// How far a blob has arrived.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Credit {
    /// The attempt.
    pub id: AttemptId,
    /// Which blob.
    pub blob: BlobIndex,
    /// Bytes from its beginning that are in place.
    pub received_bytes: u64,
}

/// The attempt is let in. Not said where everything came with the opening of an attached attempt, and the next word
/// ([`Progress`] beyond receiving, or the result) says as much.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Accept {
    /// The attempt.
    pub id: AttemptId,
    /// Blobs that are not complete, and from which byte on they are needed. Blobs not named need not be sent.
    pub needs: Vec<(BlobIndex, u64)>,
    /// Bytes that may be under way unacknowledged.
    pub window_bytes: u32,
}

/// The attempt is not let in, or is thrown out.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Refuse {
    /// The attempt.
    pub id: AttemptId,
    /// Why.
    pub code: ErrorCode,
    /// What was wrong and what to do.
    pub text: String,
}

/// What a worker is doing with an attempt.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Phase {
    /// Taking model and inputs in.
    Receiving,
    /// Waiting for a place to run.
    Waiting,
    /// Starting the engine and loading the model.
    Loading,
    /// Running the model.
    Running,
}

/// Where an attempt stands.
#[derive(Clone, Copy, Debug, Decode, Encode, Eq, PartialEq)]
pub struct Progress {
    /// The attempt.
    pub id: AttemptId,
    /// What is being done.
    pub phase: Phase,
}

/// One output.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct OutputDecl {
    /// Name in the model.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of one item's. Those of several items stand one behind the other.
    pub shape: Vec<u64>,
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// Length of all items', little-endian elements in row-major order.
    pub size_bytes: u64,
}

/// The end of an attempt.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub struct RunResult {
    /// The attempt.
    pub id: AttemptId,
    /// How it ended.
    pub outcome: Outcome,
    /// The outputs, in the model's order; blobs 1, 2, … of the chunks that follow. Empty unless done.
    pub outputs: Vec<OutputDecl>,
    /// The runs it took, in the order in which they ended; the first ones if there were many.
    pub runs: Vec<RunNote>,
    /// Between the arrival of model and inputs and the end, microseconds; 0 if an earlier life of the worker saw the arrival.
    pub held_us: u64,
    /// Chunks begin where [`Open::outputs_here`] says; else every output comes from its beginning.
    pub goes_on: bool,
}
