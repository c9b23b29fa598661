//! Incoming outputs. Owns the intake, and the files of incomplete outputs. Never: what a broken output means.

use std::collections::BTreeMap;

use mesh_transport::blob::{Arrival, Content, Incoming, IncomingError, Intake};
use proto_msgs::{AttemptId, BlobIndex, Chunk, ClientToWorker, Credit, OutputDecl, OutputPart, RunResult, limits};
use tokio::{sync::mpsc, task::AbortHandle};

use crate::{
    happened::Happened,
    outputs::{Output, OutputData},
    spool::{Spool, Spooled},
};

/// Outputs up to this size stay in memory.
pub(super) const MEMORY_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The effect of an arrival on the attempt.
pub(crate) enum Taken {
    /// Send this credit to the worker.
    Credit(ClientToWorker),
    /// All outputs have arrived and are verified.
    All(Vec<Output>),
    /// The outputs will not arrive.
    Broken(IncomingError),
    /// There is nothing to do.
    More,
}

/// The intake of one result's outputs. If a link breaks meanwhile, what has arrived stays.
#[derive(Debug)]
pub(super) struct Taking {
    id: AttemptId,
    /// The number of the attempt's result: events of an earlier one may still come.
    serial: u64,
    items: u32,
    intake: Intake,
    outputs: Vec<OutputDecl>,
    /// Files of incomplete outputs. They are removed with the attempt, wherever the event of their completion is.
    files: BTreeMap<BlobIndex, Spooled>,
    whole: BTreeMap<BlobIndex, Output>,
    arrivals: Arrivals,
}

/// How the intake's arrivals reach the driver.
#[derive(Debug)]
enum Arrivals {
    /// Read at once after the chunk that caused them.
    Here(mpsc::Receiver<Arrival>),
    /// Passed on by an async task.
    Forwarded(AbortHandle),
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        if let Self::Forwarded(task) = self {
            task.abort();
        }
    }
}

impl Taking {
    pub(super) fn start(
        result: &RunResult,
        serial: u64,
        items: u32,
        spool: &Spool,
        happened: &mpsc::Sender<Happened>,
    ) -> Result<Self, IncomingError> {
        let mut files = BTreeMap::new();
        let incoming = result.outputs.iter().zip(1..).map(|(output, blob)| {
            if output.size_bytes <= MEMORY_BYTES_MAX {
                return Ok(Incoming::to_memory(blob, output.size_bytes, output.digest));
            }
            let file = files.entry(blob).insert_entry(spool.place(output.size_bytes));
            Incoming::to_file(file.get().path(), blob, output.size_bytes, output.digest)
        });
        let incoming = incoming.collect::<Result<Vec<_>, IncomingError>>()?;
        let (intake, arrivals) = Intake::start(incoming, limits::WINDOW_BYTES);
        let arrivals = match intake.is_light() {
            true => Arrivals::Here(arrivals),
            false => Arrivals::Forwarded(forward(result.id, serial, arrivals, happened.clone())),
        };
        let (id, outputs, whole) = (result.id, result.outputs.clone(), BTreeMap::new());
        Ok(Self { id, serial, items, intake, outputs, files, whole, arrivals })
    }

    pub(super) fn is(&self, serial: u64) -> bool {
        self.serial == serial
    }

    /// Whether a result announces the same outputs.
    pub(super) fn is_of(&self, result: &RunResult) -> bool {
        self.outputs == result.outputs
    }

    /// How many bytes of each output have arrived.
    pub(super) fn parts(&self) -> Vec<OutputPart> {
        let needs: BTreeMap<BlobIndex, u64> = self.intake.needs().into_iter().collect();
        let part = |(output, blob): (&OutputDecl, BlobIndex)| {
            let received_bytes = needs.get(&blob).copied().unwrap_or(output.size_bytes);
            OutputPart { digest: output.digest, received_bytes }
        };
        self.outputs.iter().zip(1..).map(part).collect()
    }

    pub(super) fn push(&self, chunk: Chunk, payload: bytes::Bytes) -> Result<(), IncomingError> {
        self.intake.push(chunk, payload)
    }

    /// The next arrival that the last chunk caused, if it is known at once.
    pub(super) fn next_here(&mut self) -> Option<Arrival> {
        match &mut self.arrivals {
            Arrivals::Here(arrivals) => arrivals.try_recv().ok(),
            Arrivals::Forwarded(_) => None,
        }
    }

    pub(super) fn arrived(&mut self, arrival: Arrival) -> Taken {
        match arrival {
            Arrival::Credit { blob, received_bytes } => {
                Taken::Credit(ClientToWorker::Credit(Credit { id: self.id, blob, received_bytes }))
            }
            Arrival::Failed(error) => Taken::Broken(error),
            Arrival::Complete { blob, content } => {
                let data = match content {
                    Content::Memory(bytes) => Some(OutputData::Memory(bytes)),
                    Content::File(_) => self.files.remove(&blob).map(OutputData::from),
                };
                if let Some((decl, data)) = self.outputs.get(usize::from(blob).wrapping_sub(1)).zip(data) {
                    self.whole.insert(blob, Output::new(decl.clone(), self.items, data));
                }
                if self.whole.len() < self.outputs.len() {
                    return Taken::More;
                }
                // The map is in blob order, which is the outputs' order.
                Taken::All(std::mem::take(&mut self.whole).into_values().collect())
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
