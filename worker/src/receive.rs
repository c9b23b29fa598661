//! Receives the models and the inputs of one attempt.
//!
//! Room is made before the first byte. The worker does not ask for what it holds already. A detached attempt is on disk
//! before its last byte is acknowledged, because its client leaves then.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_transport::{
    Outlet,
    blob::{Arrival, Content, Incoming, IncomingError, Intake},
};
use proto_msgs::{
    AttemptId, BlobIndex, Credit, Digest, ErrorCode, Failure, Manifest, ModelRef, Ticket, WorkerToClient,
    limits::WINDOW_BYTES, message::MODEL_BLOB,
};
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{timeout, timeout_at},
};
use tracing::{debug, warn};

use crate::{
    blobs::{Arriving, BlobStore, Claim, Pin, Spooled},
    keep::Keep,
    payload::{MemoryShare, MemoryUse, Payload},
    tools::Tools,
};

/// Time to send a credit. After it the link counts as dead.
const CREDIT_WAIT: Duration = Duration::from_secs(5);

/// Time to wait for a model that another client sends; then this client sends it too. The other client lives, or its
/// attempt would have ended within seconds: it is slow, and a second copy on the same line would slow it further.
const OTHERS_WAIT: Duration = Duration::from_secs(600);

/// The attempt whose models and inputs are received.
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

/// An attempt for which there is room, so that its transfer can start.
pub(crate) struct Prepared {
    /// The model of each stage; `None` if it must still arrive.
    models: Vec<Option<Pin>>,
    /// Files that the blobs will be written to.
    files: HashMap<BlobIndex, Spooled>,
    incoming: Vec<Incoming>,
    memory: MemoryShare,
    /// Models that other attempts wait for.
    arriving: Vec<Arriving>,
}

impl Order {
    fn is_detached(&self) -> bool {
        self.ticket.body.detached
    }

    /// The models of all stages, with the numbers of their blobs.
    pub(crate) fn models(&self) -> Vec<(BlobIndex, ModelRef)> {
        let behind_inputs = (MODEL_BLOB + 1..).skip(self.manifest.inputs.len());
        let later = behind_inputs.zip(&self.manifest.then).map(|(blob, stage)| (blob, stage.model));
        std::iter::once((MODEL_BLOB, self.manifest.model)).chain(later).collect()
    }

    /// Prepares without the disk, if possible: the usual case of a held model and small inputs.
    pub(crate) fn prepare_quickly(&self, store: &BlobStore, memory: &MemoryUse) -> Option<Prepared> {
        let mut memory = memory.share();
        let is_small = self.manifest.inputs.iter().all(|input| memory.take(input.size_bytes));
        if !is_small || self.is_detached() {
            return None;
        }
        let held = |(_, model): (_, ModelRef)| {
            store.pin_verified(model.digest).filter(|pin| pin.size_bytes() == model.size_bytes).map(Some)
        };
        let models = self.models().into_iter().map(held).collect::<Option<Vec<_>>>()?;
        let inputs = self.manifest.inputs.iter().zip(1..);
        let incoming = inputs.map(|(input, blob)| Incoming::to_memory(blob, input.size_bytes, input.digest)).collect();
        Some(Prepared { models, files: HashMap::new(), incoming, memory, arriving: Vec::new() })
    }

    /// Makes room for everything that is missing and that no other client sends. If nothing else helps, idle runners
    /// release their models.
    pub(crate) async fn prepare(&self, tools: &Arc<Tools>) -> Result<Prepared, Failure> {
        let arriving = self.arriving(tools).await;
        let prepared = match self.prepare_blocking(tools).await {
            Err(failure) if failure.code == ErrorCode::QuotaExceeded => {
                tools.pool.end_idle().await;
                self.prepare_blocking(tools).await
            }
            other => other,
        };
        prepared.map(|prepared| Prepared { arriving, ..prepared })
    }

    /// Waits for models that other clients send; claims those that nobody sends.
    async fn arriving(&self, tools: &Arc<Tools>) -> Vec<Arriving> {
        let mut missing: Vec<Digest> = self.models().iter().map(|(_, model)| model.digest).collect();
        // All attempts claim in the same order, so that two attempts that each receive one model never wait for each
        // other.
        missing.sort_unstable();
        missing.dedup();
        let mut arriving = Vec::new();
        for model in missing {
            let deadline = Instant::now() + OTHERS_WAIT;
            while !tools.store.has(model) {
                match tools.coming.claim(model) {
                    Claim::Mine(mine) => {
                        arriving.push(mine);
                        break;
                    }
                    Claim::Theirs(mut theirs) => {
                        debug!(model = %model.short(), "somebody else brings this model: waiting for it");
                        if timeout_at(deadline.into(), theirs.changed()).await.is_err() {
                            break;
                        }
                    }
                }
            }
        }
        arriving
    }

    async fn prepare_blocking(&self, tools: &Arc<Tools>) -> Result<Prepared, Failure> {
        let (order, tools) = (self.clone(), tools.clone());
        blocking(move || order.make_room(&tools.store, &tools.memory)).await
    }

    fn make_room(&self, store: &BlobStore, memory: &MemoryUse) -> Result<Prepared, Failure> {
        let (models, files, incoming) = (Vec::new(), HashMap::new(), Vec::new());
        let mut prepared = Prepared { models, files, incoming, memory: memory.share(), arriving: Vec::new() };
        let models = self.models();
        for (index, (blob, model)) in models.iter().enumerate() {
            let pin = store.pin(model.digest).filter(|pin| pin.size_bytes() == model.size_bytes);
            let comes_already = models[..index].iter().any(|(_, earlier)| earlier.digest == model.digest);
            if pin.is_none() && !comes_already {
                let file = store.spool(model.size_bytes)?;
                let incoming = Incoming::to_file(file.path(), *blob, model.size_bytes, model.digest);
                prepared.incoming.push(incoming.map_err(failed)?.sync());
                prepared.files.insert(*blob, file);
            }
            prepared.models.push(pin);
        }
        for (input, blob) in self.manifest.inputs.iter().zip(1..) {
            let (size_bytes, digest) = (input.size_bytes, input.digest);
            let incoming = if prepared.memory.take(size_bytes) {
                Incoming::to_memory(blob, size_bytes, digest)
            } else {
                let file = store.spool(size_bytes)?;
                let incoming = Incoming::to_file(file.path(), blob, size_bytes, digest).map_err(failed)?;
                prepared.files.insert(blob, file);
                incoming
            };
            prepared.incoming.push(incoming);
        }
        Ok(prepared)
    }
}

/// A transfer under way, of one attempt.
pub(crate) struct Receiving {
    order: Order,
    models: Vec<Option<Pin>>,
    files: HashMap<BlobIndex, Spooled>,
    memory: MemoryShare,
    arriving: Vec<Arriving>,
    arrivals: mpsc::Receiver<Arrival>,
    /// The payload of each input.
    payloads: Vec<Option<Payload>>,
    /// Number of blobs that are not complete.
    missing: usize,
    announced_bytes: u64,
}

impl Prepared {
    /// Starts the transfer.
    pub(crate) fn start(self, order: Order) -> (Intake, Receiving) {
        let missing = self.incoming.len();
        let inputs_bytes: u64 = order.manifest.inputs.iter().map(|input| input.size_bytes).sum();
        let coming = order.models().into_iter().filter(|(blob, _)| self.files.contains_key(blob));
        let announced_bytes = inputs_bytes + coming.map(|(_, model)| model.size_bytes).sum::<u64>();
        let (intake, arrivals) = Intake::start(self.incoming, WINDOW_BYTES);
        let Self { models, files, memory, arriving, .. } = self;
        let payloads = vec![None; order.manifest.inputs.len()];
        (intake, Receiving { order, models, files, memory, arriving, arrivals, payloads, missing, announced_bytes })
    }
}

/// A transfer after the chunks that came with its `Open` were accepted.
pub(crate) enum Begun {
    /// The transfer is over.
    Ended(Result<Inputs, Failure>),
    /// More chunks must arrive.
    GoesOn(Receiving),
}

impl Receiving {
    /// Accepts what has arrived so far, without waiting. Not for detached attempts, which go to disk first.
    pub(crate) fn begin(mut self) -> Begun {
        while let Ok(arrival) = self.arrivals.try_recv() {
            match arrival {
                // `Accept`, which is sent later, says the same.
                Arrival::Credit { .. } => {}
                Arrival::Complete { blob, content } => {
                    if let Err(failure) = self.place(blob, content) {
                        return Begun::Ended(Err(failure));
                    }
                }
                Arrival::Failed(error) => return Begun::Ended(Err(failed(error))),
            }
        }
        if self.missing > 0 { Begun::GoesOn(self) } else { Begun::Ended(self.into_inputs()) }
    }

    /// Waits for all blobs. `way` leads to the client, and changes when the client reconnects.
    pub(crate) async fn finish(mut self, tools: &Arc<Tools>, way: &Way) -> Result<Inputs, Failure> {
        let begun = Instant::now();
        let mut held_back = Vec::new();
        while self.missing > 0 {
            match self.arrivals.recv().await {
                Some(Arrival::Credit { blob, received_bytes }) => {
                    let credit = Credit { id: self.order.id, blob, received_bytes };
                    if self.order.is_detached() && self.is_last(credit) {
                        held_back.push(credit);
                    } else {
                        way.acknowledge(credit).await;
                    }
                }
                Some(Arrival::Complete { blob, .. }) if self.input_of(blob).is_none() => {
                    self.adopt_model(blob, tools).await?;
                    self.missing -= 1;
                }
                Some(Arrival::Complete { blob, content }) => self.place(blob, content)?,
                Some(Arrival::Failed(error)) => return Err(failed(error)),
                None => return Err(Failure::new(ErrorCode::WorkerLost, "the transfer was stopped")),
            }
        }
        tools.link_speed.saw(self.announced_bytes, begun.elapsed());
        if !self.order.is_detached() {
            return self.into_inputs();
        }
        let (keep, order): (Keep, Order) = (tools.keep.clone(), self.order.clone());
        let Inputs { models, payloads, mut memory } = self.into_inputs()?;
        let save = move || keep.save(order.id, &order.ticket, &order.manifest, payloads).map_err(Failure::from);
        let payloads = blocking(save).await?;
        memory.change(0);
        // In its own task, so nobody waits for a stuck link: the client is no longer needed.
        let way = way.clone();
        tokio::spawn(async move {
            for credit in held_back {
                way.acknowledge(credit).await;
            }
        });
        Ok(Inputs { models, payloads, memory })
    }

    /// The index of the input in this blob; `None` for models.
    fn input_of(&self, blob: BlobIndex) -> Option<usize> {
        usize::from(blob).checked_sub(1).filter(|input| *input < self.payloads.len())
    }

    /// Stores a complete input.
    fn place(&mut self, blob: BlobIndex, content: Content) -> Result<(), Failure> {
        let payload = self.payload(blob, content)?;
        if let Some(place) = self.input_of(blob).and_then(|input| self.payloads.get_mut(input)) {
            *place = Some(payload);
            self.missing -= 1;
        }
        Ok(())
    }

    fn into_inputs(self) -> Result<Inputs, Failure> {
        let payloads = self.payloads.into_iter().collect::<Option<Vec<Payload>>>();
        let payloads = payloads.ok_or_else(|| Failure::new(ErrorCode::BadChunk, "an input is missing"))?;
        Ok(Inputs { models: self.models, payloads, memory: self.memory })
    }

    fn is_last(&self, credit: Credit) -> bool {
        let input = usize::from(credit.blob).checked_sub(1).and_then(|index| self.order.manifest.inputs.get(index));
        let size_bytes = match input {
            Some(input) => Some(input.size_bytes),
            None => self.model_of(credit.blob).map(|model| model.size_bytes),
        };
        size_bytes.is_some_and(|size_bytes| credit.received_bytes >= size_bytes)
    }

    fn model_of(&self, blob: BlobIndex) -> Option<ModelRef> {
        self.order.models().into_iter().find(|(of, _)| *of == blob).map(|(_, model)| model)
    }

    /// Moves a received model into the store, for every stage that uses it.
    async fn adopt_model(&mut self, blob: BlobIndex, tools: &Arc<Tools>) -> Result<(), Failure> {
        let twice = || Failure::new(ErrorCode::BadChunk, "a model came twice");
        let file = self.files.remove(&blob).ok_or_else(twice)?;
        let digest = self.model_of(blob).ok_or_else(twice)?.digest;
        debug!(model = %digest.short(), bytes = file.size_bytes(), "model received");
        let store = tools.store.clone();
        let pin = blocking(move || store.adopt(file, digest).map_err(Failure::from)).await?;
        for ((_, model), place) in self.order.models().into_iter().zip(&mut self.models) {
            if model.digest == digest {
                *place = Some(pin.clone());
            }
        }
        self.arriving.retain(|arriving| arriving.model != digest);
        tools.look.at_once();
        Ok(())
    }

    fn payload(&mut self, blob: BlobIndex, content: Content) -> Result<Payload, Failure> {
        match content {
            Content::Memory(bytes) => Ok(Payload::Memory(bytes)),
            Content::File(_) => match self.files.remove(&blob) {
                Some(file) => Ok(Payload::spooled(file)),
                None => Err(Failure::new(ErrorCode::BadChunk, "an input came twice")),
            },
        }
    }
}

/// The current outlet to an attempt's client. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    outlet: Arc<std::sync::Mutex<Outlet>>,
}

impl Way {
    pub(crate) fn new(outlet: Outlet) -> Self {
        Self { outlet: Arc::new(outlet.into()) }
    }

    /// Switches to the link over which the client came back.
    pub(crate) fn replace(&self, outlet: Outlet) {
        *self.outlet.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = outlet;
    }

    async fn acknowledge(&self, credit: Credit) {
        let outlet = self.outlet.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        match WorkerToClient::Credit(credit).to_frame() {
            // Link gone or stuck: the client reconnects and then hears how much has arrived.
            Ok(frame) => drop(timeout(CREDIT_WAIT, outlet.send(frame)).await),
            Err(error) => warn!(%error, "a credit cannot be encoded"),
        }
    }
}

/// Runs work that waits for the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let panicked =
        |error| Failure::new(ErrorCode::WorkerLost, format!("the worker failed while it received (a bug): {error}"));
    spawn_blocking(work).await.map_err(panicked)?
}

/// The failure that a transfer's error stands for.
pub(crate) fn failed(error: IncomingError) -> Failure {
    let code = match &error {
        IncomingError::DiskFull { .. } | IncomingError::Write { .. } => ErrorCode::DiskFull,
        IncomingError::DigestMismatch { .. } => ErrorCode::DigestMismatch,
        IncomingError::Protocol { .. } => ErrorCode::BadChunk,
    };
    Failure::new(code, error.to_string())
}
