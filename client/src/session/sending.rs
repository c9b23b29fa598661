//! Model and inputs on their way out. Owns the upload, what of it the worker has, and which models it is thought to have; never
//! when an attempt is opened.

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

/// News of an upload's progress is told at most this often.
pub const SENDING_EVERY: Duration = Duration::from_millis(100);

/// What an upload goes by.
pub(crate) struct Road<'a> {
    pub(crate) outlet: &'a Outlet,
    /// What the link has carried so far; 0 if unknown.
    pub(crate) bytes_per_s: u64,
    /// Where an end is reported that comes later.
    pub(crate) happened: &'a mpsc::Sender<Happened>,
}

/// The transfer of one attempt. Each call may be the upload's last, and gives its end then.
#[derive(Debug)]
pub(crate) struct Sending {
    id: AttemptId,
    window_bytes: u32,
    /// `None` for a result that is fetched.
    payload: Option<Arc<Payload>>,
    upload: Option<Upload>,
    /// Which upload of the attempt it is: news of an earlier one may still come.
    serial: u64,
    /// Models that are being sent, or will be if the worker asks for them: it has not said yet that it has them.
    models: BTreeSet<Digest>,
    /// Models that are sent only if the worker asks for them.
    held: BTreeSet<BlobIndex>,
    acknowledged: BTreeMap<BlobIndex, u64>,
    told_at: Option<Instant>,
    /// That the worker has everything has been told.
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

    /// The attempt's models and their blobs, the first one's first.
    pub(super) fn all_models(&self) -> impl Iterator<Item = (BlobIndex, Digest)> {
        let after_inputs = self.manifest().map_or(0, |manifest| manifest.inputs.len() as BlobIndex + 1);
        let first = self.manifest().map(|manifest| (MODEL_BLOB, manifest.model.digest));
        let stages = self.manifest().into_iter().flat_map(|manifest| &manifest.then).map(|stage| stage.model.digest);
        first.into_iter().chain((after_inputs..).zip(stages))
    }

    /// The models that it brings to the worker.
    pub(super) fn models(&self) -> &BTreeSet<Digest> {
        &self.models
    }

    /// The worker has its models. Gives those that it was not known to have.
    pub(super) fn delivered(&mut self) -> BTreeSet<Digest> {
        std::mem::take(&mut self.models)
    }

    /// Everything from its beginning. Models of later stages the worker has to ask for, and the first one if it holds that.
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

    /// The link is broken: the upload waits.
    pub(super) fn unlink(&mut self) {
        // Nothing is whole by this; a peer that floods is noticed by its silence.
        let _ = self.tell(Feedback::Unlinked);
    }

    /// There is another link: the upload goes on once the worker has said from where.
    pub(super) fn relink(&mut self, road: &Road<'_>) -> Option<UploadEnd> {
        self.tell(Feedback::Relinked(road.outlet.clone()))
    }

    /// The worker has said what it needs. Gives the models that it does not name, since it has them.
    pub(super) fn accepted(&mut self, accept: &Accept, road: &Road<'_>) -> (BTreeSet<Digest>, Option<UploadEnd>) {
        let needs = |blob: BlobIndex| accept.needs.iter().any(|(needed, _)| *needed == blob);
        self.held.retain(|blob| !needs(*blob));
        let needed = self.all_models().filter(|(blob, _)| needs(*blob)).map(|(_, model)| model).collect();
        let has = std::mem::replace(&mut self.models, needed).difference(&self.models).copied().collect();
        if self.upload.is_none() && !accept.needs.is_empty() {
            // It has lost what it had, or never had the model it was thought to hold.
            self.told_sent = false;
            if let Some(end) = self.start(road, Outgoing::wait_for_needs) {
                return (has, Some(end));
            }
        }
        let blobs = accept.needs.clone();
        (has, self.tell(Feedback::Needs { blobs, window_bytes: accept.window_bytes }))
    }

    /// The worker has everything, and has not said before what it needs.
    pub(super) fn needs_nothing(&mut self) -> Option<UploadEnd> {
        self.tell(Feedback::Needs { blobs: Vec::new(), window_bytes: self.window_bytes })
    }

    /// The worker has this much of a blob. Gives bytes acknowledged and bytes in all if it is time to tell the user.
    pub(super) fn credit(&mut self, credit: Credit) -> (Option<(u64, u64)>, Option<UploadEnd>) {
        let Credit { blob, received_bytes, .. } = credit;
        let end = self.tell(Feedback::Credit { blob, received_bytes });
        let known = self.acknowledged.entry(blob).or_default();
        *known = received_bytes.max(*known);
        (self.progress(), end)
    }

    fn progress(&mut self) -> Option<(u64, u64)> {
        // A model that is held counts as nothing, until the worker asks for it after all.
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

    /// Whether this upload is the one under way; if so, it has ended.
    pub(super) fn has_ended(&mut self, serial: u64) -> bool {
        self.upload.take_if(|upload| upload.serial == serial).is_some()
    }

    /// An upload has put so much on the wire.
    pub(super) fn carried(&mut self, wire_bytes: u64) {
        self.wire_bytes += wire_bytes;
    }

    /// True once, when nothing is left to be sent. Gives what was put on the wire for it.
    pub(super) fn newly_sent(&mut self) -> Option<u64> {
        let is_sent = self.upload.is_none() && self.payload.is_some();
        let newly = is_sent && !self.told_sent;
        self.told_sent |= is_sent;
        newly.then_some(self.wire_bytes)
    }

    /// All blobs of the attempt; which of them are sent is for `shape` and the worker's needs to say.
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
            // If the driver is gone nobody waits for it.
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
