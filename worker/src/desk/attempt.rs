//! One attempt's material, from its first byte to its last.
//!
//! ```text
//!   Preparing ──► Receiving ──► Here ──► Ended
//!     room is made   bytes come    batches     nothing but an earlier life's result, if anything
//!                                  run with it
//! ```

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_core::worker::LinkId;
use mesh_transport::{
    Outlet,
    blob::{Intake, Outgoing, Role, Source, UploadEnd, UploadError, Uploading},
};
use proto_msgs::{AttemptId, BlobIndex, Chunk, ClientId, ErrorCode, Failure, Frame, OutputPart, limits::WINDOW_BYTES};
use tokio::task::{AbortHandle, JoinHandle};
use tracing::debug;

use super::receive::{Way, failed};
use crate::{
    batch::material::{Inputs, Material, Order},
    data::{
        blobs::Pin,
        keep::Found,
        payload::{Output, Payload},
    },
    tools::Tools,
};

/// A result whose client acknowledges nothing of it for this time is not sent on until it does: it holds a thread of
/// those that all clients share. No disk pauses a living client for so long, and one that is stopped is silent long
/// before, so its upload ends then.
pub(crate) const CREDIT_PATIENCE: Duration = Duration::from_secs(60);

/// Chunks that arrived before there was a place for them: at most a window.
#[derive(Default)]
pub(super) struct Chunks {
    list: Vec<(Chunk, Bytes)>,
    bytes: usize,
    /// Whether chunks were dropped; later chunks are then dropped too.
    is_cut: bool,
}

impl Chunks {
    /// Most chunks kept: many more than a window of chunks of usual size. Bounds a flood of tiny ones.
    const COUNT_MAX: usize = 4096;

    pub(super) fn push(&mut self, chunk: Chunk, payload: Bytes) -> Result<(), Failure> {
        if self.is_cut {
            return Ok(());
        }
        if self.list.len() == Self::COUNT_MAX || self.bytes + payload.len() > WINDOW_BYTES as usize {
            return Err(Failure::new(ErrorCode::BadChunk, "more than a window of data before it was asked for"));
        }
        self.bytes += payload.len();
        self.list.push((chunk, payload));
        Ok(())
    }

    /// Drops all further chunks: there is no room. The client is asked for them again.
    pub(super) fn cut(&mut self) {
        self.is_cut = true;
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.bytes
    }
}

/// The desk's state of one attempt.
pub(super) struct Attempt {
    /// Unique number of this attempt in the worker's life.
    pub(super) number: u64,
    /// The link that the client uses at present.
    pub(super) link: LinkId,
    way: Option<Way>,
    pub(super) order: Order,
    pub(super) stage: Stage,
    /// Whether early chunks were dropped, so that chunks already under way follow a gap.
    has_gap: bool,
    /// The task that works on the attempt; aborted with the attempt.
    pub(super) task: Option<AbortHandle>,
    pub(super) upload: Option<Uploading>,
    /// The parts of the result that a client on this link claims to have; trusted once the result goes to that link.
    arrived: Option<(LinkId, Vec<OutputPart>)>,
    /// The task that writes the result to disk.
    pub(super) keeping: Option<JoinHandle<()>>,
    /// Time at which the machine was last told that the client lives.
    pub(super) alive_told: Option<Instant>,
    /// Models received in an earlier life, held so that they are not evicted before they are verified.
    _held: Vec<Pin>,
}

/// Progress of an attempt.
pub(super) enum Stage {
    Preparing(Chunks),
    Receiving(Intake),
    Here(Arc<Material>),
    Ended(Vec<Output>),
}

impl Attempt {
    pub(super) fn new(number: u64, link: LinkId, way: Way, order: Order) -> Self {
        Self::at(number, link, Some(way), order, Stage::Preparing(Chunks::default()), Vec::new())
    }

    fn at(number: u64, link: LinkId, way: Option<Way>, order: Order, stage: Stage, held: Vec<Pin>) -> Self {
        let (task, upload, keeping, alive_told) = (None, None, None, None);
        let (has_gap, arrived) = (false, None);
        Self { number, link, way, order, stage, has_gap, task, upload, arrived, keeping, alive_told, _held: held }
    }

    /// An attempt that was found on disk.
    pub(super) fn restored(number: u64, found: Found, tools: &Tools) -> Self {
        let order = Order { id: found.id, manifest: found.manifest.into(), ticket: found.ticket.into() };
        let mut held = Vec::new();
        let stage = match found.result {
            Some(result) => Stage::Ended(result.outputs),
            None => {
                held = order.models().iter().filter_map(|(_, model)| tools.store.hold(model.digest)).collect();
                let inputs = Inputs { models: Vec::new(), payloads: found.inputs, memory: tools.memory.share() };
                Stage::Here(Material::new(order.clone(), inputs, &tools.memory).into())
            }
        };
        // No link has the id 0.
        Self::at(number, LinkId(0), None, order, stage, held)
    }

    pub(super) fn is_detached(&self) -> bool {
        self.order.is_detached()
    }

    /// Moves the attempt to the link over which its client came back.
    pub(super) fn relink(&mut self, link: LinkId, outlet: Outlet) {
        self.link = link;
        match &self.way {
            Some(way) => way.replace(outlet),
            None => self.way = Some(Way::new(outlet)),
        }
    }

    /// Notes the parts of the result that a client on this link says it has.
    pub(super) fn note_arrived(&mut self, link: LinkId, outputs: Vec<OutputPart>) {
        self.arrived = (!outputs.is_empty()).then_some((link, outputs));
    }

    /// Takes the parts that the client on this link said it has. Only once: what is sent afterwards arrives, too.
    pub(super) fn arrived_over(&mut self, link: LinkId) -> Vec<OutputPart> {
        self.arrived.take_if(|(of, _)| *of == link).map_or_else(Vec::new, |(_, outputs)| outputs)
    }

    /// Blobs that the client must still send, and from which byte; `None` while unknown.
    pub(super) fn needs(&self) -> Option<Vec<(BlobIndex, u64)>> {
        match &self.stage {
            Stage::Preparing(_) => None,
            Stage::Receiving(intake) => Some(intake.needs()),
            Stage::Here(_) | Stage::Ended(_) => Some(Vec::new()),
        }
    }

    /// Accepts one chunk of the attempt's blobs.
    pub(super) fn push(&mut self, chunk: Chunk, payload: Bytes) -> Result<(), Failure> {
        match &mut self.stage {
            Stage::Preparing(early) => early.push(chunk, payload),
            Stage::Receiving(intake) if self.has_gap && !intake.has_reached(&chunk) => Ok(()),
            Stage::Receiving(intake) => intake.push(chunk, payload).map_err(failed),
            Stage::Here(_) | Stage::Ended(_) => Ok(()),
        }
    }

    /// Accepts early chunks, now that there is a place for them.
    pub(super) fn push_all(&mut self, chunks: Chunks) -> Result<(), Failure> {
        self.has_gap |= chunks.is_cut;
        chunks.list.into_iter().try_for_each(|(chunk, payload)| self.push(chunk, payload))
    }

    /// Early chunks, while the attempt waits for room.
    pub(super) fn early(&self) -> Option<&Chunks> {
        match &self.stage {
            Stage::Preparing(early) => Some(early),
            Stage::Receiving(_) | Stage::Here(_) | Stage::Ended(_) => None,
        }
    }

    /// Drops all further early chunks.
    pub(super) fn cut_early(&mut self) {
        if let Stage::Preparing(early) = &mut self.stage {
            early.cut();
        }
    }

    /// The complete result; empty while there is none.
    pub(super) fn result(&self) -> Result<&[Output], &Failure> {
        match &self.stage {
            Stage::Ended(outputs) => Ok(outputs),
            Stage::Here(material) => match material.result() {
                Some(Ok(outputs)) => Ok(outputs),
                Some(Err(failure)) => Err(failure),
                None => Ok(&[]),
            },
            Stage::Preparing(_) | Stage::Receiving(_) => Ok(&[]),
        }
    }

    /// Whether a batch with rows of this attempt has begun and more must run.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(&self.stage, Stage::Here(material) if material.is_under_way())
    }

    /// Stops the attempt's task and upload, and frees its material.
    pub(super) fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        self.upload = None;
        if !matches!(self.stage, Stage::Ended(_)) {
            self.stage = Stage::Ended(Vec::new());
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Sends the result and the parts of its outputs that have not `arrived`; `None` if nothing is left to do.
pub(super) fn send_result(
    (id, client): (AttemptId, ClientId),
    result: Frame,
    (outputs, arrived): (&[Output], &[OutputPart]),
    outlet: Outlet,
    window_bytes: u32,
    tools: &Arc<Tools>,
) -> Result<Option<Uploading>, Failure> {
    let lost =
        |error| Failure::new(ErrorCode::WorkerLost, format!("the worker lost the outputs of this task: {error}"));
    let outgoing = outgoing(id, outputs, window_bytes).map_err(lost)?.behind(result);
    let outgoing =
        arrived.iter().zip(1..).fold(outgoing, |outgoing, (part, blob)| outgoing.from(blob, part.received_bytes));
    let later = tools.clone();
    let (uploading, end) = Uploading::start(outgoing, outlet, async move |end| note_sent((id, client), end, &later));
    Ok(match end {
        Some(end) => {
            note_sent((id, client), end, tools);
            None
        }
        None => Some(uploading),
    })
}

/// Handles the end of an upload. The client has everything, or reconnects and says how much it has.
pub(super) fn note_sent((id, client): (AttemptId, ClientId), end: UploadEnd, tools: &Tools) {
    match end {
        Ok(sent) => tools.link_speed.told(client, sent.blob_bytes, sent.link_bytes_per_s),
        Err(error) => debug!(task = %id.task, %error, "result not sent"),
    }
}

fn outgoing(id: AttemptId, outputs: &[Output], window_bytes: u32) -> Result<Outgoing, UploadError> {
    let sources = outputs.iter().zip(1..).map(|(output, blob)| Ok((blob, source(&output.payload)?)));
    let outgoing = Outgoing::new(Role::Worker, id, sources.collect::<Result<_, UploadError>>()?, window_bytes);
    Ok(outgoing.patience(CREDIT_PATIENCE))
}

/// The source of one output. Results are whole files, never slices.
fn source(payload: &Payload) -> Result<Source, UploadError> {
    match payload {
        Payload::Memory(bytes) => Ok(Source::memory(bytes.clone())),
        Payload::File { path, .. } => Source::file(path),
    }
}
