//! Outputs on their way in. Owns the intake, and the files of what is not whole yet; never what a broken one means.

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

/// What an arrival means for the attempt.
pub(crate) enum Taken {
    /// Send this.
    Credit(ClientToWorker),
    /// All outputs are here and right.
    All(Vec<Output>),
    /// They will not be.
    Broken(IncomingError),
    /// Nothing new.
    More,
}

/// The outputs of one result. A link may break meanwhile: what is here stays.
#[derive(Debug)]
pub(super) struct Taking {
    id: AttemptId,
    /// Which results of the attempt this is: news of an earlier one may still come.
    serial: u64,
    items: u32,
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

    /// The same outputs are announced again.
    pub(super) fn is_of(&self, result: &RunResult) -> bool {
        self.outputs == result.outputs
    }

    /// How much of each output is here.
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

    /// What the last chunk brought about, one by one, where that is known at once.
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
                // The map is in the order of the blobs, which is the order of the outputs.
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
