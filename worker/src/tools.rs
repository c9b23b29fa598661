//! The tools shared by all code that carries out orders.

use std::sync::Arc;

use mesh_core::worker::Event;
use proto_msgs::{ErrorCode, Failure};
use tokio::{sync::mpsc, task::spawn_blocking};

use crate::{
    data::{
        blobs::{BlobStore, Coming},
        keep::Keep,
        link_speed::LinkSpeed,
        payload::MemoryUse,
    },
    probe::Look,
    runners::{pool::Pool, proven::Proven},
};

/// Stores, pool, link speed and channels, shared by the desk and its tasks.
pub(crate) struct Tools {
    pub(crate) store: BlobStore,
    /// Models that attempts receive at present.
    pub(crate) coming: Coming,
    /// Memory that attempts use for payloads.
    pub(crate) memory: MemoryUse,
    pub(crate) pool: Arc<Pool>,
    pub(crate) keep: Keep,
    pub(crate) link_speed: LinkSpeed,
    /// Triggers a sample of the probe at once.
    pub(crate) look: Look,
    pub(crate) transport: mesh_transport::Context,
    /// Output shapes that batch probes saw.
    pub(crate) proven: Proven,
    /// Events for the machine.
    pub(crate) machine: mpsc::Sender<Event>,
}

/// Runs work that waits for the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let panicked = |error| {
        Failure::new(ErrorCode::WorkerLost, format!("the worker failed at the disk (a bug, see its log): {error}"))
    };
    spawn_blocking(work).await.map_err(panicked)?
}
