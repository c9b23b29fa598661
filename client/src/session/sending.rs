//! Model and inputs on their way to the worker. Owns the upload, how much of it the worker has, and which models the
//! worker is thought to have. Never: when an attempt is opened.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_transport::{
    Outlet,
    blob::{Feedback, Outgoing, Role, UploadEnd, UploadError, Uploading},
};
use proto_msgs::{Accept, AttemptId, BlobIndex, Credit, Digest, MODEL_BLOB, Manifest};
use tokio::sync::mpsc;

use crate::{happened::Happened, task::Payload};

/// Shortest interval between two reports of an upload's progress.
pub const SENDING_EVERY: Duration = Duration::from_millis(100);

/// The link that an upload uses.
pub(crate) struct Road<'a> {
    pub(crate) outlet: &'a Outlet,
    /// The link's measured speed; 0 if unknown.
    pub(crate) bytes_per_s: u64,
    /// The channel for an end that comes later.
    pub(crate) happened: &'a mpsc::Sender<Happened>,
}

/// The upload of one attempt. Each call may end the upload; then it returns the end.
#[derive(Debug)]
pub(crate) struct Sending {
    id: AttemptId,
    window_bytes: u32,
    /// `None` if a result is fetched.
    payload: Option<Arc<Payload>>,
    upload: Option<Upload>,
    /// The number of the attempt's upload: events of an earlier one may still come.
    serial: u64,
    /// Models that are being sent, or will be if the worker asks for them: it has not yet said that it has them.
    models: BTreeSet<Digest>,
    /// Blobs of models that are sent only if the worker asks for them.
    held: BTreeSet<BlobIndex>,
    acknowledged: BTreeMap<BlobIndex, u64>,
    told_at: Option<Instant>,
    /// Whether [`Self::newly_sent`] has reported that the worker has everything.
    told_sent: bool,
    wire_bytes: u64,
}

#[derive(Debug)]
struct Upload {
    serial: u64,
    uploading: Uploading,
}

impl Sending {
    pub(super) fn new(id: AttemptId, window_bytes: u32, payload: Option<Arc<Payload>>) -> Self {
        Self {
            id,
            window_bytes,
            payload,
            upload: None,
            serial: 0,
            models: BTreeSet::new(),
            held: BTreeSet::new(),
            acknowledged: BTreeMap::new(),
            told_at: None,
            told_sent: false,
            wire_bytes: 0,
        }
    }

    pub(super) fn manifest(&self) -> Option<&Manifest> {
        self.payload.as_ref().map(|payload| &payload.manifest)
    }

    /// The attempt's models with their blob indexes, the first stage's model first.
    pub(super) fn all_models(&self) -> impl Iterator<Item = (BlobIndex, Digest)> {
        let after_inputs = self.manifest().map_or(0, |manifest| manifest.inputs.len() as BlobIndex + 1);
        let first = self.manifest().map(|manifest| (MODEL_BLOB, manifest.model.digest));
        let stages = self.manifest().into_iter().flat_map(|manifest| &manifest.then).map(|stage| stage.model.digest);
        first.into_iter().chain((after_inputs..).zip(stages))
    }

    /// The models that this attempt sends to the worker.
    pub(super) fn models(&self) -> &BTreeSet<Digest> {
        &self.models
    }

    /// Notes that the worker has the models. Returns those that it was not yet known to have.
    pub(super) fn delivered(&mut self) -> BTreeSet<Digest> {
        std::mem::take(&mut self.models)
    }

    /// Starts the upload from the beginning. Later stages' models and held ones only if the worker asks.
    pub(super) fn begin(&mut self, road: &Road<'_>, model_held: bool) -> Option<UploadEnd> {
        self.upload = None;
        self.acknowledged.clear();
        let is_held = |blob: BlobIndex| blob != MODEL_BLOB || model_held;
        self.held = self.all_models().map(|(blob, _)| blob).filter(|blob| is_held(*blob)).collect();
        self.models =
            self.all_models().filter(|(blob, _)| !(*blob == MODEL_BLOB && model_held)).map(|(_, m)| m).collect();
        let held = self.held.clone();
        self.start(road, |outgoing| held.into_iter().fold(outgoing, Outgoing::held))
    }

    /// Handles a broken link: the upload pauses.
    pub(super) fn unlink(&mut self) {
        // This cannot complete an upload, and a peer that floods is noticed by its silence.
        let _ = self.tell(Feedback::Unlinked);
    }

    /// Moves the upload to another link. It continues once the worker has said from where.
    pub(super) fn relink(&mut self, road: &Road<'_>) -> Option<UploadEnd> {
        self.tell(Feedback::Relinked(road.outlet.clone()))
    }

    /// Handles what the worker needs. Returns the models that it does not name, because it has them.
    pub(super) fn accepted(&mut self, accept: &Accept, road: &Road<'_>) -> (BTreeSet<Digest>, Option<UploadEnd>) {
        let needs = |blob: BlobIndex| accept.needs.iter().any(|(needed, _)| *needed == blob);
        self.held.retain(|blob| !needs(*blob));
        let needed = self.all_models().filter(|(blob, _)| needs(*blob)).map(|(_, model)| model).collect();
        let has = std::mem::replace(&mut self.models, needed).difference(&self.models).copied().collect();
        if self.upload.is_none() && !accept.needs.is_empty() {
            // The worker has lost its data, or never had the model that it was thought to hold.
            self.told_sent = false;
            if let Some(end) = self.start(road, Outgoing::wait_for_needs) {
                return (has, Some(end));
            }
        }
        let blobs = accept.needs.clone();
        (has, self.tell(Feedback::Needs { blobs, window_bytes: accept.window_bytes }))
    }

    /// Handles that the worker has everything although it has not said what it needs.
    pub(super) fn told_complete(&mut self) -> Option<UploadEnd> {
        self.tell(Feedback::Needs { blobs: Vec::new(), window_bytes: self.window_bytes })
    }

    /// Handles a credit. Returns acknowledged and total bytes if it is time to tell the user.
    pub(super) fn credit(&mut self, credit: Credit) -> (Option<(u64, u64)>, Option<UploadEnd>) {
        let Credit { blob, received_bytes, .. } = credit;
        let end = self.tell(Feedback::Credit { blob, received_bytes });
        // A worker may say anything: only what this task sends counts.
        if let Some(sent) = self.payload.as_ref().and_then(|payload| payload.blobs.get(usize::from(blob))) {
            let known = self.acknowledged.entry(blob).or_default();
            *known = received_bytes.min(sent.size_bytes()).max(*known);
        }
        (self.progress(), end)
    }

    fn progress(&mut self) -> Option<(u64, u64)> {
        // A held model does not count until the worker asks for it after all.
        let counts = |blob: BlobIndex| !self.held.contains(&blob) || self.acknowledged.contains_key(&blob);
        let payload = self.payload.as_ref()?;
        let sizes = payload.blobs.iter().zip(MODEL_BLOB..).filter(|(_, blob)| counts(*blob));
        let total: u64 = sizes.map(|(blob, _)| blob.size_bytes()).sum();
        let sent: u64 = self.acknowledged.values().sum();
        let now = Instant::now();
        let is_time = self.told_at.is_none_or(|told| now.duration_since(told) >= SENDING_EVERY) || sent >= total;
        is_time.then(|| {
            self.told_at = Some(now);
            (sent.min(total), total)
        })
    }

    /// Notes the end of this upload. False if it is not the one under way.
    pub(super) fn end_upload(&mut self, serial: u64) -> bool {
        self.upload.take_if(|upload| upload.serial == serial).is_some()
    }

    /// Adds to the bytes that uploads have put on the wire.
    pub(super) fn carried(&mut self, wire_bytes: u64) {
        self.wire_bytes += wire_bytes;
    }

    /// Returns the bytes put on the wire, once, when nothing is left to send.
    pub(super) fn newly_sent(&mut self) -> Option<u64> {
        let is_sent = self.upload.is_none() && self.payload.is_some();
        let newly = is_sent && !self.told_sent;
        self.told_sent |= is_sent;
        newly.then_some(self.wire_bytes)
    }

    /// Starts an upload of all blobs of the attempt. `shape` and the worker's needs choose which are sent.
    fn start(&mut self, road: &Road<'_>, shape: impl FnOnce(Outgoing) -> Outgoing) -> Option<UploadEnd> {
        let payload = self.payload.as_ref()?;
        let blobs = payload.blobs.iter().zip(MODEL_BLOB..);
        let sources = blobs.map(|(blob, index)| Ok((index, blob.source()?))).collect::<Result<_, UploadError>>();
        let outgoing = match sources {
            Ok(sources) => Outgoing::new(Role::Client, self.id, sources, self.window_bytes),
            Err(error) => return Some(Err(error)),
        };
        self.serial += 1;
        let (id, serial, happened) = (self.id, self.serial, road.happened.clone());
        let outgoing = shape(outgoing.link(road.bytes_per_s));
        let (uploading, end) = Uploading::start(outgoing, road.outlet.clone(), async move |result| {
            // If the driver is gone, the end does not matter.
            let _ = happened.send(Happened::UploadEnded { id, serial, result }).await;
        });
        self.upload = end.is_none().then_some(Upload { serial, uploading });
        end
    }

    fn tell(&mut self, feedback: Feedback) -> Option<UploadEnd> {
        let end = self.upload.as_mut()?.uploading.tell(feedback)?;
        self.upload = None;
        Some(end)
    }
}
