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
use parking_lot::Mutex;
use proto_msgs::{BlobIndex, Credit, Digest, ErrorCode, Failure, ModelRef, WorkerToClient, limits::WINDOW_BYTES};
use tokio::{sync::mpsc, time::timeout};
use tracing::{debug, warn};

use crate::{
    batch::material::{Inputs, Order},
    data::{
        blobs::{Arriving, BlobStore, Claim, OTHERS_WAIT, Pin, Spooled, Wish},
        keep::Keep,
        payload::{MemoryShare, MemoryUse, Payload},
    },
    tools::{Tools, blocking},
};

/// Time to send a credit. After it the link counts as dead.
const CREDIT_WAIT: Duration = Duration::from_secs(5);

/// Interval of looks at the copies of a model that other clients send: one may have come, or turned out slow.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

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
    /// Prepares without the disk, if possible: the usual case of a held model and small inputs.
    pub(crate) fn prepare_quickly(&self, store: &BlobStore, memory: &MemoryUse) -> Option<Prepared> {
        let mut memory = memory.share();
        let is_small = self.manifest.inputs.iter().all(|input| memory.take(input.size_bytes));
        if !is_small || self.is_detached() {
            return None;
        }
        let held = |(_, model): (_, ModelRef)| {
            store.pin_at_once(model.digest).filter(|pin| pin.size_bytes() == model.size_bytes).map(Some)
        };
        let models = self.models().into_iter().map(held).collect::<Option<Vec<_>>>()?;
        let inputs = self.manifest.inputs.iter().zip(1..);
        let incoming = inputs.map(|(input, blob)| Incoming::to_memory(blob, input.size_bytes, input.digest)).collect();
        Some(Prepared { models, files: HashMap::new(), incoming, memory, arriving: Vec::new() })
    }

    /// Makes room for everything that is missing and that no other client sends. Where there is room for one copy of a
    /// model only, and that is another client's, waits for that one. It does not send the task elsewhere at once, as
    /// there may be no other worker, and a task has few attempts.
    pub(crate) async fn prepare(&self, tools: &Arc<Tools>) -> Result<Prepared, Failure> {
        let arriving = self.arriving(tools, false).await;
        let is_second = arriving.iter().any(|model| model.is_second);
        let lacks_room = |failure: &Failure| matches!(failure.code, ErrorCode::Busy | ErrorCode::DiskFull);
        let failure = match self.prepare_with(tools, arriving).await {
            Err(failure) if is_second && lacks_room(&failure) => failure,
            other => return other,
        };
        match timeout(OTHERS_WAIT, self.arriving(tools, true)).await {
            Ok(arriving) => self.prepare_with(tools, arriving).await,
            Err(_) => Err(failure),
        }
    }

    /// Makes room for everything that is missing. If nothing else helps, idle runners release their models; but not for
    /// a model that comes already, as all that is warm would be lost for it.
    async fn prepare_with(&self, tools: &Arc<Tools>, arriving: Vec<Arriving>) -> Result<Prepared, Failure> {
        let is_second = arriving.iter().any(|model| model.is_second);
        let prepared = match self.prepare_blocking(tools).await {
            Err(failure) if failure.code == ErrorCode::Busy && !is_second => {
                tools.pool.end_idle().await;
                self.prepare_blocking(tools).await
            }
            other => other,
        };
        prepared.map(|prepared| Prepared { arriving, ..prepared })
    }

    /// Waits for models that other clients will have sent soon; claims the others.
    async fn arriving(&self, tools: &Arc<Tools>, is_patient: bool) -> Vec<Arriving> {
        let mut missing: Vec<ModelRef> = self.models().into_iter().map(|(_, model)| model).collect();
        // All attempts claim in the same order, so that two attempts that each receive one model never wait for each
        // other.
        missing.sort_unstable_by_key(|model| model.digest);
        missing.dedup_by_key(|model| model.digest);
        let mut arriving = Vec::new();
        for ModelRef { digest: model, size_bytes, .. } in missing {
            let (since, client) = (Instant::now(), self.ticket.body.client);
            let mut is_waiting = false;
            while !holds(tools, model).await {
                let own = tools.link_speed.time_for(size_bytes);
                match tools.coming.claim(Instant::now(), Wish { model, size_bytes, client, own, since, is_patient }) {
                    Claim::Mine(mine) => {
                        debug!(model = %model.short(), is_second = mine.is_second, "this client brings the model");
                        arriving.push(mine);
                        break;
                    }
                    Claim::Theirs(mut theirs) => {
                        if !std::mem::replace(&mut is_waiting, true) {
                            debug!(model = %model.short(), "somebody else brings this model: waiting for it");
                        }
                        // Ended or not: the next look tells.
                        let _ = timeout(LOOK_AGAIN, theirs.changed()).await;
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

    /// Bytes that this task takes of the quota while it is kept.
    fn quota_bytes(&self) -> u64 {
        let mut models: Vec<_> = self.models().into_iter().map(|(_, model)| (model.digest, model.size_bytes)).collect();
        models.sort_unstable();
        models.dedup();
        let sizes = models.into_iter().map(|(_, size_bytes)| size_bytes);
        sizes.chain(self.manifest.inputs.iter().map(|input| input.size_bytes)).fold(0, u64::saturating_add)
    }

    fn make_room(&self, store: &BlobStore, memory: &MemoryUse) -> Result<Prepared, Failure> {
        let (models, files, incoming) = (Vec::new(), HashMap::new(), Vec::new());
        let mut prepared = Prepared { models, files, incoming, memory: memory.share(), arriving: Vec::new() };
        let models = self.models();
        // Of all that is or will be in the quota for this task.
        let mut needed_bytes = 0_u64;
        for (index, (blob, model)) in models.iter().enumerate() {
            let pin = store.pin(model.digest).filter(|pin| pin.size_bytes() == model.size_bytes);
            let comes_already = models[..index].iter().any(|(_, earlier)| earlier.digest == model.digest);
            if !comes_already {
                needed_bytes = needed_bytes.saturating_add(model.size_bytes);
            }
            if pin.is_none() && !comes_already {
                let file = store.spool(model.size_bytes).map_err(|error| error.before_run(needed_bytes))?;
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
                needed_bytes = needed_bytes.saturating_add(size_bytes);
                let file = store.spool(size_bytes).map_err(|error| error.before_run(needed_bytes))?;
                let incoming = Incoming::to_file(file.path(), blob, size_bytes, digest).map_err(failed)?;
                prepared.files.insert(blob, file);
                incoming
            };
            prepared.incoming.push(incoming);
        }
        Ok(prepared)
    }
}

/// Whether the store holds a model. Asked on a thread that may wait: whoever holds the index may wait for a disk.
async fn holds(tools: &Arc<Tools>, model: Digest) -> bool {
    let store = tools.store.clone();
    blocking(move || Ok(store.has(model))).await.unwrap_or(false)
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
                    self.note_arrived(blob, received_bytes);
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
        tools.link_speed.saw(self.order.ticket.body.client, self.announced_bytes, begun.elapsed());
        if !self.order.is_detached() {
            return self.into_inputs();
        }
        let (keep, order): (Keep, Order) = (tools.keep.clone(), self.order.clone());
        let Inputs { models, payloads, mut memory } = self.into_inputs()?;
        let save = move || {
            let kept = keep.save(order.id, &order.ticket, &order.manifest, payloads);
            kept.map_err(|error| error.before_run(order.quota_bytes()))
        };
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

    /// Notes how much of a model has arrived, for those that wait for it.
    fn note_arrived(&self, blob: BlobIndex, received_bytes: u64) {
        let Some(model) = self.model_of(blob) else { return };
        self.arriving.iter().filter(|arriving| arriving.model == model.digest).for_each(|arriving| {
            arriving.note(received_bytes);
        });
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
    outlet: Arc<Mutex<Outlet>>,
}

impl Way {
    pub(crate) fn new(outlet: Outlet) -> Self {
        Self { outlet: Arc::new(outlet.into()) }
    }

    /// Switches to the link over which the client came back.
    pub(crate) fn replace(&self, outlet: Outlet) {
        *self.outlet.lock() = outlet;
    }

    async fn acknowledge(&self, credit: Credit) {
        let outlet = self.outlet.lock().clone();
        match WorkerToClient::Credit(credit).to_frame() {
            // Link gone or stuck: the client reconnects and then hears how much has arrived.
            Ok(frame) => drop(timeout(CREDIT_WAIT, outlet.send(frame)).await),
            Err(error) => warn!(%error, "a credit cannot be encoded"),
        }
    }
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
