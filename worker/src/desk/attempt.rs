//! One attempt's material, from its first byte to its last.
//!
//! ```text
//!   Preparing ──► Receiving ──► Here ──► Ended
//!     room is made   bytes come    batches     nothing but an earlier life's result, if anything
//!                                  run with it
//! ```

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use mesh_core::worker::LinkId;
use mesh_transport::{
    Outlet,
    blob::{Intake, Outgoing, Role, Source, UploadEnd, UploadError, Uploading},
};
use proto_msgs::{AttemptId, BlobIndex, Chunk, ErrorCode, Failure, Frame, OutputPart, limits::WINDOW_BYTES};
use tokio::task::{AbortHandle, JoinHandle};
use tracing::debug;

use crate::{
    blobs::Pin,
    keep::Found,
    material::Material,
    oip::Output,
    payload::Payload,
    receive::{Inputs, Order, Way, failed},
    tools::Tools,
};

/// Chunks that came before there was a place for them: at most a window.
#[derive(Default)]
pub(super) struct Chunks {
    list: Vec<(Chunk, Bytes)>,
    bytes: usize,
    /// Some were dropped, and so is all that comes behind them.
    is_cut: bool,
}

impl Chunks {
    /// Many more than a window of chunks of a usual size: no flood of tiny ones.
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

    /// There is no room for more. What is dropped is asked for again.
    pub(super) fn cut(&mut self) {
        self.is_cut = true;
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.bytes
    }
}

/// An attempt.
pub(super) struct Attempt {
    /// Not used twice.
    pub(super) number: u64,
    /// The link that the client uses now.
    pub(super) link: LinkId,
    way: Option<Way>,
    pub(super) order: Order,
    pub(super) stage: Stage,
    /// Early chunks were dropped: those behind them that were under way already have a gap before them.
    has_gap: bool,
    /// What is being done; ended with the attempt.
    pub(super) task: Option<AbortHandle>,
    pub(super) upload: Option<Uploading>,
    /// What a client that came over this link has of the result; believed once the machine sends it there.
    arrived: Option<(LinkId, Vec<OutputPart>)>,
    /// A result on its way to the disk.
    pub(super) keeping: Option<JoinHandle<()>>,
    /// When the machine was last told that the client lives.
    pub(super) alive_told: Option<Instant>,
    /// Models that must not go before they were looked at again: an earlier life received them.
    _held: Vec<Pin>,
}

/// How far it is.
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

    /// One that was found on the disk.
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
        // No link has the number 0.
        Self::at(number, LinkId(0), None, order, stage, held)
    }

    pub(super) fn is_detached(&self) -> bool {
        self.order.ticket.body.detached
    }

    /// The client has come over another link.
    pub(super) fn relink(&mut self, link: LinkId, outlet: Outlet) {
        self.link = link;
        match &self.way {
            Some(way) => way.replace(outlet),
            None => self.way = Some(Way::new(outlet)),
        }
    }

    /// A client has come over this link and says what it has of the result.
    pub(super) fn note_arrived(&mut self, link: LinkId, outputs: Vec<OutputPart>) {
        self.arrived = (!outputs.is_empty()).then_some((link, outputs));
    }

    /// What the client on this link said that it has; once: what is sent after that arrives, too.
    pub(super) fn arrived_over(&mut self, link: LinkId) -> Vec<OutputPart> {
        self.arrived.take_if(|(of, _)| *of == link).map_or_else(Vec::new, |(_, outputs)| outputs)
    }

    /// What the client must still send; `None` while that is not known.
    pub(super) fn needs(&self) -> Option<Vec<(BlobIndex, u64)>> {
        match &self.stage {
            Stage::Preparing(_) => None,
            Stage::Receiving(intake) => Some(intake.needs()),
            Stage::Here(_) | Stage::Ended(_) => Some(Vec::new()),
        }
    }

    /// Takes a chunk in.
    pub(super) fn push(&mut self, chunk: Chunk, payload: Bytes) -> Result<(), Failure> {
        match &mut self.stage {
            Stage::Preparing(early) => early.push(chunk, payload),
            Stage::Receiving(intake) if self.has_gap && !intake.has_reached(&chunk) => Ok(()),
            Stage::Receiving(intake) => intake.push(chunk, payload).map_err(failed),
            Stage::Here(_) | Stage::Ended(_) => Ok(()),
        }
    }

    /// Takes early chunks in, now that there is a place for them.
    pub(super) fn push_all(&mut self, chunks: Chunks) -> Result<(), Failure> {
        self.has_gap |= chunks.is_cut;
        chunks.list.into_iter().try_for_each(|(chunk, payload)| self.push(chunk, payload))
    }

    /// Early chunks that wait for their place, if it does.
    pub(super) fn early(&self) -> Option<&Chunks> {
        match &self.stage {
            Stage::Preparing(early) => Some(early),
            Stage::Receiving(_) | Stage::Here(_) | Stage::Ended(_) => None,
        }
    }

    /// There is no room for more early chunks.
    pub(super) fn cut_early(&mut self) {
        if let Stage::Preparing(early) = &mut self.stage {
            early.cut();
        }
    }

    /// The whole result, as far as there is one.
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

    /// A batch with rows of it was begun, and more must run.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(&self.stage, Stage::Here(material) if material.is_under_way())
    }

    /// Ends everything that is being done.
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

/// Sends the result and what has not `arrived` of its outputs; `None` if nothing is left to do.
pub(super) fn send_result(
    id: AttemptId,
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
    let (uploading, end) = Uploading::start(outgoing, outlet, async move |end| note_sent(id, end, &later));
    Ok(match end {
        Some(end) => {
            note_sent(id, end, tools);
            None
        }
        None => Some(uploading),
    })
}

/// An upload is over: the client has everything, or comes back over a new link and says how much it has.
pub(super) fn note_sent(id: AttemptId, end: UploadEnd, tools: &Tools) {
    match end {
        Ok(sent) => tools.link_speed.told(sent.blob_bytes, sent.link_bytes_per_s),
        Err(error) => debug!(task = %id.task, %error, "result not sent"),
    }
}

fn outgoing(id: AttemptId, outputs: &[Output], window_bytes: u32) -> Result<Outgoing, UploadError> {
    let sources = outputs.iter().zip(1..).map(|(output, blob)| Ok((blob, source(&output.payload)?)));
    Ok(Outgoing::new(Role::Worker, id, sources.collect::<Result<_, UploadError>>()?, window_bytes))
}

/// Results are whole files, never slices.
fn source(payload: &Payload) -> Result<Source, UploadError> {
    match payload {
        Payload::Memory(bytes) => Ok(Source::memory(bytes.clone())),
        Payload::File { path, .. } => Source::file(path),
    }
}
