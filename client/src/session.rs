//! One attempt's transfers: model and inputs out, outputs in. Owns the uploads, the intake and how far they are; never
//! decides whether the attempt is still wanted.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_transport::{
    Outlet,
    blob::{Arrival, Content, Feedback, Incoming, IncomingError, Intake, Outgoing, Role, UploadError, upload},
};
use proto_msgs::{
    Accept, AttemptId, BlobIndex, Chunk, ClientToWorker, Credit, Grant, Open, OutputDecl, RunResult, limits,
};
use tokio::{sync::mpsc, task::AbortHandle};
use uuid::Uuid;

use crate::{driver::Happened, links::LinkId, result::Output, task::Payload};

/// News of an upload's progress is told at most this often.
pub const SENDING_EVERY: Duration = Duration::from_millis(100);

/// Outputs up to this size stay in memory.
const OUTPUT_MEMORY_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Credits that may wait for an upload: sixteen chunks make a window, and each is acknowledged once. More than this is a
/// worker that floods.
const FEEDBACK_MAX: usize = 4096;

/// One attempt at its worker.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) grant: Box<Grant>,
    payload: Option<Arc<Payload>>,
    /// Where it is open.
    pub(crate) link: Option<LinkId>,
    /// It is to be opened as soon as there is a link, perhaps again.
    pub(crate) opening: Option<Resume>,
    /// Which wait for the worker to dial in counts.
    pub(crate) wait: u64,
    uploads: Vec<Upload>,
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

#[derive(Debug)]
struct Upload {
    serial: u64,
    blobs: Vec<BlobIndex>,
    feedback: mpsc::Sender<Feedback>,
    task: AbortHandle,
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
struct Taking {
    serial: u64,
    intake: Intake,
    outputs: Vec<OutputDecl>,
    contents: BTreeMap<BlobIndex, Content>,
    forward: AbortHandle,
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.forward.abort();
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
            wait: 0,
            uploads: Vec::new(),
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
        self.tell_uploads(|_| Feedback::Unlinked);
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
        happened: &mpsc::Sender<Happened>,
    ) -> Result<(), UploadError> {
        self.link = Some(link);
        self.opening = None;
        self.accepted = false;
        if resume == Resume::Yes {
            self.tell_uploads(|_| Feedback::Relinked(outlet.clone()));
            return Ok(());
        }
        self.uploads.clear();
        self.acknowledged.clear();
        let Some(payload) = &self.payload else { return Ok(()) };
        let all = 0..payload.blobs.len() as BlobIndex;
        if !self.grant.model_held {
            return self.start_upload(all.collect(), self.grant.window_bytes, outlet, false, happened);
        }
        // The worker may have dropped the model since it last said that it has it, and then asks for it while the inputs
        // are under way. Two uploads of half a window each never have more than a window under way; inputs that need the
        // whole of it wait for the worker's word instead, which is nothing beside their own time.
        if payload.input_bytes > u64::from(self.grant.window_bytes / 2) {
            return self.start_upload(all.collect(), self.grant.window_bytes, outlet, true, happened);
        }
        if payload.blobs.len() > 1 {
            self.start_upload(all.skip(1).collect(), self.grant.window_bytes / 2, outlet, false, happened)?;
        }
        Ok(())
    }

    fn start_upload(
        &mut self,
        blobs: Vec<BlobIndex>,
        window_bytes: u32,
        outlet: &Outlet,
        wait_for_needs: bool,
        happened: &mpsc::Sender<Happened>,
    ) -> Result<(), UploadError> {
        let Some(payload) = &self.payload else { return Ok(()) };
        let sources = blobs.iter().filter_map(|blob| Some((*blob, payload.blobs.get(usize::from(*blob))?)));
        let sources = sources.map(|(blob, bytes)| Ok((blob, bytes.source()?))).collect::<Result<_, UploadError>>()?;
        let mut outgoing = Outgoing::new(Role::Client, self.id(), sources, window_bytes);
        if wait_for_needs {
            outgoing = outgoing.wait_for_needs();
        }
        let (feedback, inbox) = mpsc::channel(FEEDBACK_MAX);
        let (id, serial, outlet, happened) = (self.id(), self.next_serial(), outlet.clone(), happened.clone());
        let task = tokio::spawn(async move {
            let result = upload(outgoing, outlet, inbox).await;
            let _ = happened.send(Happened::UploadEnded { id, serial, result }).await;
        });
        self.uploads.push(Upload { serial, blobs, feedback, task: task.abort_handle() });
        Ok(())
    }

    /// Passes feedback on; an upload that is flooded with it is given up, which the worker's silence will show.
    fn tell_uploads(&mut self, feedback: impl Fn(&[BlobIndex]) -> Feedback) {
        self.uploads.retain(|upload| match upload.feedback.try_send(feedback(&upload.blobs)) {
            // A closed one has ended; its end is on the way.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => true,
            Err(mpsc::error::TrySendError::Full(_)) => false,
        });
    }

    /// The worker has said what it needs.
    pub(crate) fn accept(
        &mut self,
        accept: &Accept,
        outlet: &Outlet,
        happened: &mpsc::Sender<Happened>,
    ) -> Result<(), UploadError> {
        self.accepted = true;
        let needs_of = |blobs: &[BlobIndex]| {
            accept.needs.iter().filter(|(blob, _)| blobs.contains(blob)).copied().collect::<Vec<_>>()
        };
        self.tell_uploads(|blobs| Feedback::Needs { blobs: needs_of(blobs), window_bytes: accept.window_bytes });
        let under_way: Vec<BlobIndex> = self.uploads.iter().flat_map(|upload| upload.blobs.clone()).collect();
        let known = self.payload.as_ref().map_or(0, |payload| payload.blobs.len());
        let missing: Vec<BlobIndex> = accept
            .needs
            .iter()
            .map(|(blob, _)| *blob)
            .filter(|blob| !under_way.contains(blob) && usize::from(*blob) < known)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.told_sent = false;
        let window_bytes = if self.uploads.is_empty() { accept.window_bytes } else { accept.window_bytes / 2 };
        let needs = needs_of(&missing);
        self.start_upload(missing, window_bytes, outlet, true, happened)?;
        if let Some(upload) = self.uploads.last() {
            // A new channel has room.
            let _ = upload.feedback.try_send(Feedback::Needs { blobs: needs, window_bytes });
        }
        Ok(())
    }

    /// The worker has this much of a blob. Gives bytes acknowledged and bytes in all if it is time to tell the user.
    pub(crate) fn credit(&mut self, credit: Credit) -> Option<(u64, u64)> {
        let feedback = Feedback::Credit { blob: credit.blob, received_bytes: credit.received_bytes };
        let owner = self.uploads.iter().find(|upload| upload.blobs.contains(&credit.blob))?;
        // Lost only if the worker floods: then its upload stalls and is given up.
        let _ = owner.feedback.try_send(feedback);
        let sending: Vec<BlobIndex> = self.uploads.iter().flat_map(|upload| upload.blobs.clone()).collect();
        let known = self.acknowledged.entry(credit.blob).or_default();
        *known = credit.received_bytes.max(*known);
        let payload = self.payload.as_ref()?;
        let total: u64 =
            sending.iter().filter_map(|blob| payload.blobs.get(usize::from(*blob))).map(|blob| blob.size_bytes()).sum();
        let sent: u64 = sending.iter().filter_map(|blob| self.acknowledged.get(blob)).sum();
        let now = Instant::now();
        let is_time = self.told_at.is_none_or(|told| now.duration_since(told) >= SENDING_EVERY) || sent >= total;
        if !is_time {
            return None;
        }
        self.told_at = Some(now);
        Some((sent.min(total), total))
    }

    /// An upload has ended well, by its own word.
    pub(crate) fn upload_ended(&mut self, serial: u64, wire_bytes: u64) {
        let before = self.uploads.len();
        self.uploads.retain(|upload| upload.serial != serial);
        if self.uploads.len() < before {
            self.sent_bytes += wire_bytes;
        }
    }

    pub(crate) fn has_upload(&self, serial: u64) -> bool {
        self.uploads.iter().any(|upload| upload.serial == serial)
    }

    /// True once, when the worker has everything it needs.
    pub(crate) fn is_newly_sent(&mut self) -> bool {
        let is_sent = self.accepted && self.uploads.is_empty() && self.payload.is_some();
        let newly = is_sent && !self.told_sent;
        self.told_sent |= is_sent;
        newly
    }

    /// Begins to take outputs in, from their beginnings.
    pub(crate) fn take(
        &mut self,
        result: &RunResult,
        spool: &Path,
        happened: &mpsc::Sender<Happened>,
    ) -> Result<Taken, IncomingError> {
        self.intake = None;
        if result.outputs.is_empty() {
            return Ok(Taken::All(Vec::new()));
        }
        let incoming = result.outputs.iter().zip(1..).map(|(output, blob)| {
            if output.size_bytes <= OUTPUT_MEMORY_BYTES_MAX {
                return Ok(Incoming::to_memory(blob, output.size_bytes, output.digest));
            }
            Incoming::to_file(&spool.join(Uuid::new_v4().to_string()), blob, output.size_bytes, output.digest)
        });
        let incoming = incoming.collect::<Result<Vec<_>, IncomingError>>()?;
        let (intake, mut arrivals) = Intake::start(incoming, limits::WINDOW_BYTES);
        let (id, serial, happened) = (self.id(), self.next_serial(), happened.clone());
        let forward = tokio::spawn(async move {
            while let Some(arrival) = arrivals.recv().await {
                if happened.send(Happened::Arrived { id, serial, arrival }).await.is_err() {
                    return;
                }
            }
        });
        let (outputs, contents) = (result.outputs.clone(), BTreeMap::new());
        self.intake = Some(Taking { serial, intake, outputs, contents, forward: forward.abort_handle() });
        Ok(Taken::More)
    }

    /// A chunk of an output; one that nobody waits for any more is dropped.
    pub(crate) fn chunk(&mut self, chunk: Chunk, payload: bytes::Bytes) -> Result<(), IncomingError> {
        self.intake.as_ref().map_or(Ok(()), |taking| taking.intake.push(chunk, payload))
    }

    /// What the intake says.
    pub(crate) fn arrived(&mut self, serial: u64, arrival: Arrival) -> Taken {
        let id = self.id();
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
                taking.contents.insert(blob, content);
                if taking.contents.len() < taking.outputs.len() {
                    return Taken::More;
                }
                let outputs = std::mem::take(&mut taking.outputs);
                let contents = std::mem::take(&mut taking.contents);
                self.intake = None;
                // The map is in the order of the blobs, which is the order of the outputs.
                let all = outputs.into_iter().zip(contents.into_values());
                Taken::All(all.map(|(decl, content)| Output::new(decl, content)).collect())
            }
        }
    }
}
