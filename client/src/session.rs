//! One attempt's transfers: model and inputs out, outputs in. Owns the uploads, the intake and how far they are; never
//! decides whether the attempt is still wanted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_transport::{
    Outlet,
    blob::{
        Arrival, Content, Feedback, Incoming, IncomingError, Intake, Outgoing, Role, UploadEnd, UploadError, Uploading,
    },
};
use proto_msgs::{
    Accept, AttemptId, BlobIndex, Chunk, ClientToWorker, Credit, Digest, Grant, MODEL_BLOB, Open, OutputDecl, Purpose,
    RunResult, limits,
};
use tokio::{sync::mpsc, task::AbortHandle};

use crate::{
    driver::Happened,
    links::LinkId,
    outputs::{Output, OutputData},
    spool::{Spool, Spooled},
    task::Payload,
};

/// News of an upload's progress is told at most this often.
pub const SENDING_EVERY: Duration = Duration::from_millis(100);

/// Outputs up to this size stay in memory.
const OUTPUT_MEMORY_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// One attempt at its worker.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) grant: Box<Grant>,
    payload: Option<Arc<Payload>>,
    /// Where it is open.
    pub(crate) link: Option<LinkId>,
    /// It is to be opened as soon as there is a link, perhaps again.
    pub(crate) opening: Option<Resume>,
    /// Since when it waits for a neighbour that sends the same model.
    pub(crate) patient_since: Option<Instant>,
    /// Models that are being sent, or will be if the worker asks for them: it has not said yet that it has them.
    sends: BTreeSet<Digest>,
    /// Models that are sent only if the worker asks for them.
    held: BTreeSet<BlobIndex>,
    /// Which wait for the worker to dial in counts.
    pub(crate) wait: u64,
    upload: Option<Upload>,
    /// How an upload ended that ended with the last thing it was told.
    upload_end: Option<UploadEnd>,
    /// The worker has said what it needs.
    accepted: bool,
    told_sent: bool,
    acknowledged: BTreeMap<BlobIndex, u64>,
    told_at: Option<Instant>,
    pub(crate) sent_bytes: u64,
    intake: Option<Taking>,
    serials: u64,
}

/// Whether an attempt is opened for the first time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Resume {
    No,
    Yes,
}

/// What an upload needs of the driver.
pub(crate) struct Sending<'a> {
    /// Where its end is reported.
    pub(crate) happened: &'a mpsc::Sender<Happened>,
    /// What the worker's link has carried so far; 0 if unknown.
    pub(crate) link_bytes_per_s: u64,
}

#[derive(Debug)]
struct Upload {
    serial: u64,
    uploading: Uploading,
}

#[derive(Debug)]
struct Taking {
    serial: u64,
    intake: Intake,
    outputs: Vec<OutputDecl>,
    /// Files of those that are not whole: they go with the attempt, wherever the news is that they are whole.
    files: BTreeMap<BlobIndex, Spooled>,
    whole: BTreeMap<BlobIndex, Output>,
    arrivals: Arrivals,
}

/// How the intake's arrivals come to the driver.
#[derive(Debug)]
enum Arrivals {
    /// Each with the chunk that brought it about.
    Here(mpsc::Receiver<Arrival>),
    /// By a task that passes them on.
    Forwarded(AbortHandle),
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        if let Self::Forwarded(task) = self {
            task.abort();
        }
    }
}

/// What an arrival means for the attempt.
pub(crate) enum Taken {
    /// Send this.
    Credit(ClientToWorker),
    /// All outputs are here and right.
    All(Vec<Output>),
    /// They will not be.
    Broken(String),
    /// Nothing new.
    More,
}

impl Session {
    pub(crate) fn new(grant: Box<Grant>, payload: Option<Arc<Payload>>, opening: Resume) -> Self {
        Self {
            grant,
            payload,
            link: None,
            opening: Some(opening),
            patient_since: None,
            sends: BTreeSet::new(),
            held: BTreeSet::new(),
            wait: 0,
            upload: None,
            upload_end: None,
            accepted: false,
            told_sent: false,
            acknowledged: BTreeMap::new(),
            told_at: None,
            sent_bytes: 0,
            intake: None,
            serials: 0,
        }
    }

    fn id(&self) -> AttemptId {
        self.grant.id
    }

    fn next_serial(&mut self) -> u64 {
        self.serials += 1;
        self.serials
    }

    /// The link is broken: uploads wait.
    pub(crate) fn unlink(&mut self) {
        self.link = None;
        self.tell_upload(Feedback::Unlinked);
    }

    /// Its models and their blobs, the first one's first.
    fn models(&self) -> impl Iterator<Item = (BlobIndex, Digest)> {
        let manifest = self.payload.as_ref().map(|payload| &payload.manifest);
        let after_inputs = manifest.map_or(0, |manifest| manifest.inputs.len() as BlobIndex + 1);
        let first = manifest.map(|manifest| (MODEL_BLOB, manifest.model.digest));
        let stages = manifest.into_iter().flat_map(|manifest| &manifest.then).map(|stage| stage.model.digest);
        first.into_iter().chain((after_inputs..).zip(stages))
    }

    /// A model of it that the worker may have to be sent; `is_held` says which ones it was seen to have.
    pub(crate) fn wants_any(&self, is_held: impl Fn(Digest) -> bool, is_coming: impl Fn(Digest) -> bool) -> bool {
        let model_held = self.grant.model_held;
        let missing = self.models().filter(|(blob, model)| !(is_held(*model) || *blob == MODEL_BLOB && model_held));
        missing.into_iter().any(|(_, model)| is_coming(model))
    }

    /// It is the one that brings this model to the worker.
    pub(crate) fn is_sending(&self, model: Digest) -> bool {
        self.sends.contains(&model)
    }

    /// The worker has everything, whether or not it has said so with an `Accept`. Gives the models that it was not known to have.
    pub(crate) fn received(&mut self) -> BTreeSet<Digest> {
        if !std::mem::replace(&mut self.accepted, true) {
            let window_bytes = self.grant.window_bytes;
            self.tell_upload(Feedback::Needs { blobs: Vec::new(), window_bytes });
        }
        std::mem::take(&mut self.sends)
    }

    /// The worker may have the model though the broker does not know it yet.
    pub(crate) fn note_held(&mut self, is_held: impl Fn(Digest) -> bool) {
        let is_held = self.models().next().is_some_and(|(_, model)| is_held(model));
        self.grant.model_held |= is_held;
    }

    /// The first message of the attempt on a link.
    pub(crate) fn open_message(&self, resume: Resume) -> ClientToWorker {
        ClientToWorker::Open(Open {
            ticket: self.grant.ticket.clone(),
            manifest: self.payload.as_ref().map(|payload| payload.manifest.clone()),
            model_held: self.grant.model_held,
            window_bytes: limits::WINDOW_BYTES,
            resume: resume == Resume::Yes,
        })
    }

    /// `Open` has been sent on this link: the data follows, at once or, after a break, once the worker has said from where.
    pub(crate) fn opened(
        &mut self,
        link: LinkId,
        outlet: &Outlet,
        resume: Resume,
        sending: &Sending<'_>,
    ) -> Result<(), UploadError> {
        self.link = Some(link);
        self.opening = None;
        self.accepted = false;
        if resume == Resume::Yes {
            self.tell_upload(Feedback::Relinked(outlet.clone()));
            return Ok(());
        }
        self.upload = None;
        self.acknowledged.clear();
        let model_held = self.grant.model_held;
        // Models of later stages the worker has to ask for.
        self.held = self.models().map(|(blob, _)| blob).filter(|blob| *blob != MODEL_BLOB || model_held).collect();
        self.sends =
            self.models().filter(|(blob, _)| *blob != MODEL_BLOB || !model_held).map(|(_, model)| model).collect();
        let held = self.held.clone();
        self.start_upload(outlet, sending, |outgoing| held.into_iter().fold(outgoing, Outgoing::held))
    }

    /// All blobs of the attempt; which of them are sent is for `shape` and the worker's needs to say.
    fn start_upload(
        &mut self,
        outlet: &Outlet,
        sending: &Sending<'_>,
        shape: impl FnOnce(Outgoing) -> Outgoing,
    ) -> Result<(), UploadError> {
        let Some(payload) = &self.payload else { return Ok(()) };
        let blobs = payload.blobs.iter().zip(MODEL_BLOB..);
        let sources = blobs.map(|(blob, index)| Ok((index, blob.source()?))).collect::<Result<_, UploadError>>()?;
        let outgoing = Outgoing::new(Role::Client, self.id(), sources, self.grant.window_bytes);
        let outgoing = shape(outgoing.link(sending.link_bytes_per_s));
        let (id, serial, happened) = (self.id(), self.next_serial(), sending.happened.clone());
        let (uploading, end) = Uploading::start(outgoing, outlet.clone(), async move |result| {
            // If the driver is gone nobody waits for it.
            let _ = happened.send(Happened::UploadEnded { id, serial, result }).await;
        });
        self.upload = Some(Upload { serial, uploading });
        self.note_upload(end);
        Ok(())
    }

    fn tell_upload(&mut self, feedback: Feedback) {
        let end = self.upload.as_mut().and_then(|upload| upload.uploading.tell(feedback));
        self.note_upload(end);
    }

    fn note_upload(&mut self, end: Option<UploadEnd>) {
        if end.is_some() {
            (self.upload, self.upload_end) = (None, end);
        }
    }

    /// How an upload ended, once, if it has ended without a report of its own.
    pub(crate) fn take_upload_end(&mut self) -> Option<UploadEnd> {
        self.upload_end.take()
    }

    /// The worker has said what it needs. Gives the models that it does not name: it has them.
    pub(crate) fn accept(
        &mut self,
        accept: Accept,
        outlet: &Outlet,
        sending: &Sending<'_>,
    ) -> Result<BTreeSet<Digest>, UploadError> {
        self.accepted = true;
        let needs = |blob: BlobIndex| accept.needs.iter().any(|(needed, _)| *needed == blob);
        self.held.retain(|blob| !needs(*blob));
        let needed: BTreeSet<Digest> = self.models().filter(|(blob, _)| needs(*blob)).map(|(_, model)| model).collect();
        let has = std::mem::replace(&mut self.sends, needed).difference(&self.sends).copied().collect();
        if self.upload.is_none() && !accept.needs.is_empty() {
            // It has lost what it had, or never had the model it was thought to hold.
            self.told_sent = false;
            self.start_upload(outlet, sending, Outgoing::wait_for_needs)?;
        }
        self.tell_upload(Feedback::Needs { blobs: accept.needs, window_bytes: accept.window_bytes });
        Ok(has)
    }

    /// The worker has this much of a blob. Gives bytes acknowledged and bytes in all if it is time to tell the user.
    pub(crate) fn credit(&mut self, credit: Credit) -> Option<(u64, u64)> {
        let Credit { blob, received_bytes, .. } = credit;
        self.tell_upload(Feedback::Credit { blob, received_bytes });
        let known = self.acknowledged.entry(blob).or_default();
        *known = received_bytes.max(*known);
        // A model that is held counts as nothing, until the worker asks for it after all.
        let counts = |blob: BlobIndex| !self.held.contains(&blob) || self.acknowledged.contains_key(&blob);
        let payload = self.payload.as_ref()?;
        let sizes = payload.blobs.iter().zip(MODEL_BLOB..).filter(|(_, blob)| counts(*blob));
        let total: u64 = sizes.map(|(blob, _)| blob.size_bytes()).sum();
        let sent: u64 = self.acknowledged.values().sum();
        let now = Instant::now();
        let is_time = self.told_at.is_none_or(|told| now.duration_since(told) >= SENDING_EVERY) || sent >= total;
        if !is_time {
            return None;
        }
        self.told_at = Some(now);
        Some((sent.min(total), total))
    }

    /// Whether this upload was the attempt's; if so, it has ended.
    pub(crate) fn is_upload_ended(&mut self, serial: u64) -> bool {
        self.upload.take_if(|upload| upload.serial == serial).is_some()
    }

    /// True once, when the worker has everything it needs.
    pub(crate) fn is_newly_sent(&mut self) -> bool {
        let is_sent = self.accepted && self.upload.is_none() && self.payload.is_some();
        let newly = is_sent && !self.told_sent;
        self.told_sent |= is_sent;
        newly
    }

    /// Begins to take outputs in, from their beginnings.
    pub(crate) fn take(
        &mut self,
        result: &RunResult,
        spool: &Spool,
        happened: &mpsc::Sender<Happened>,
    ) -> Result<Vec<Taken>, IncomingError> {
        self.intake = None;
        if result.outputs.is_empty() {
            return Ok(vec![Taken::All(Vec::new())]);
        }
        let mut files = BTreeMap::new();
        let incoming = result.outputs.iter().zip(1..).map(|(output, blob)| {
            if output.size_bytes <= OUTPUT_MEMORY_BYTES_MAX {
                return Ok(Incoming::to_memory(blob, output.size_bytes, output.digest));
            }
            let file = files.entry(blob).insert_entry(spool.place(output.size_bytes));
            Incoming::to_file(file.get().path(), blob, output.size_bytes, output.digest)
        });
        let incoming = incoming.collect::<Result<Vec<_>, IncomingError>>()?;
        let (intake, arrivals) = Intake::start(incoming, limits::WINDOW_BYTES);
        let serial = self.next_serial();
        let arrivals = match intake.is_light() {
            true => Arrivals::Here(arrivals),
            false => Arrivals::Forwarded(forward(self.id(), serial, arrivals, happened.clone())),
        };
        let (outputs, whole) = (result.outputs.clone(), BTreeMap::new());
        self.intake = Some(Taking { serial, intake, outputs, files, whole, arrivals });
        Ok(self.arrived_at_once())
    }

    /// A chunk of an output; one that nobody waits for any more is dropped. Gives what is known of it at once.
    pub(crate) fn chunk(&mut self, chunk: Chunk, payload: bytes::Bytes) -> Result<Vec<Taken>, IncomingError> {
        self.intake.as_ref().map_or(Ok(()), |taking| taking.intake.push(chunk, payload))?;
        Ok(self.arrived_at_once())
    }

    fn arrived_at_once(&mut self) -> Vec<Taken> {
        let mut all = Vec::new();
        while let Some(taking) = &mut self.intake
            && let Arrivals::Here(arrivals) = &mut taking.arrivals
            && let Ok(arrival) = arrivals.try_recv()
        {
            let serial = taking.serial;
            all.push(self.arrived(serial, arrival));
        }
        // An attempt that ran for this client is released now, and credits would change nothing. One that was only fetched from
        // goes on holding its result, and whoever sends it waits for them.
        let is_released = self.grant.ticket.body.purpose == Purpose::Run;
        match all.pop() {
            Some(whole @ Taken::All(_)) if is_released => vec![whole],
            last => all.into_iter().chain(last).collect(),
        }
    }

    /// What the intake says.
    pub(crate) fn arrived(&mut self, serial: u64, arrival: Arrival) -> Taken {
        let (id, items) = (self.id(), self.grant.ticket.body.items);
        let Some(taking) = self.intake.as_mut().filter(|taking| taking.serial == serial) else { return Taken::More };
        match arrival {
            Arrival::Credit { blob, received_bytes } => {
                Taken::Credit(ClientToWorker::Credit(Credit { id, blob, received_bytes }))
            }
            Arrival::Failed(error) => {
                self.intake = None;
                Taken::Broken(error.to_string())
            }
            Arrival::Complete { blob, content } => {
                let data = match content {
                    Content::Memory(bytes) => Some(OutputData::Memory(bytes)),
                    Content::File(_) => taking.files.remove(&blob).map(OutputData::from),
                };
                if let Some((decl, data)) = taking.outputs.get(usize::from(blob).wrapping_sub(1)).zip(data) {
                    taking.whole.insert(blob, Output::new(decl.clone(), items, data));
                }
                if taking.whole.len() < taking.outputs.len() {
                    return Taken::More;
                }
                // The map is in the order of the blobs, which is the order of the outputs.
                let all = std::mem::take(&mut taking.whole).into_values().collect();
                self.intake = None;
                Taken::All(all)
            }
        }
    }
}

fn forward(
    id: AttemptId,
    serial: u64,
    mut arrivals: mpsc::Receiver<Arrival>,
    happened: mpsc::Sender<Happened>,
) -> AbortHandle {
    let forward = async move {
        while let Some(arrival) = arrivals.recv().await {
            if happened.send(Happened::Arrived { id, serial, arrival }).await.is_err() {
                return;
            }
        }
    };
    tokio::spawn(forward).abort_handle()
}

#[cfg(test)]
mod tests;
