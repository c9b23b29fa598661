//! How runners change hands: from a load, or from the batch before, to the next batch of their kind.
//!
//! ```text
//!   no idle one ─┬─ a load is under way that nobody waits for ──► waits ──► the runner; else, if it failed, again
//!                └─ else loads itself, and waits ─┬─ its load is over first ──► the new runner
//!                                                 └─ one is given back first ──► that one; the load goes on, for the next
//! ```
//!
//! Owns who waits for which kind, and loads that go on without their batch. Never starts a runner.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use proto_msgs::Failure;
use tokio::{sync::oneshot, time::timeout};
use tracing::warn;

use super::{Instance, Key, Pool, Wanted};

/// Interval after which a batch that waits for another's load looks whether that is still under way.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A batch's wait for a runner.
pub(super) struct Waits {
    returned: oneshot::Receiver<Instance>,
    /// A load is under way that no other batch waits for.
    is_coming: bool,
}

/// The other end of a batch's wait.
pub(super) struct Waiting {
    key: Key,
    sender: oneshot::Sender<Instance>,
    /// It waits for a load that goes on, and does not load itself.
    is_coming: bool,
}

/// A load that goes on for later batches.
struct Coming {
    pool: Arc<Pool>,
    key: Key,
}

impl Drop for Coming {
    fn drop(&mut self) {
        let mut coming = self.pool.coming.lock();
        if let Some(at) = coming.iter().position(|key| *key == self.key) {
            coming.swap_remove(at);
        }
    }
}

impl Instance {
    pub(super) fn is_alive(&self) -> bool {
        !self.runner.has_exited()
    }
}

impl Pool {
    /// An idle runner, else what receives the next one of its kind.
    pub(super) fn take_idle_or_wait(&self, key: Key) -> Result<Instance, Waits> {
        let (mut waiting, mut idle) = (self.waiting.lock(), self.idle());
        idle.retain(|instance| !instance.runner.has_exited());
        if let Some(index) = idle.iter().rposition(|instance| instance.key == key) {
            return Ok(idle.remove(index));
        }
        let (sender, returned) = oneshot::channel();
        waiting.retain(|waiting| !waiting.sender.is_closed());
        let coming = self.coming.lock().iter().filter(|coming| **coming == key).count();
        // So there are never more runners and loads of a kind than batches that have one or wait for one.
        let is_coming = coming > waiting.iter().filter(|waiting| waiting.key == key && waiting.is_coming).count();
        waiting.push(Waiting { key, sender, is_coming });
        Err(Waits { returned, is_coming })
    }

    /// The next runner of its kind, and the time of its load if it was started for this batch.
    pub(super) async fn next(
        self: &Arc<Self>,
        mut waits: Waits,
        key: Key,
        wanted: &Wanted,
    ) -> Result<(Instance, Duration), Failure> {
        while waits.is_coming {
            let came = timeout(LOOK_AGAIN, &mut waits.returned).await.ok().and_then(Result::ok);
            waits.returned.close();
            let came = came.or_else(|| waits.returned.try_recv().ok()).filter(Instance::is_alive);
            match came.map_or_else(|| self.take_idle_or_wait(key), Ok) {
                Ok(instance) => return Ok((instance, Duration::ZERO)),
                Err(again) => waits = again,
            }
        }
        // Perhaps one was given back while the machine was told of the load.
        match waits.returned.try_recv().ok().filter(Instance::is_alive) {
            Some(instance) => Ok((instance, Duration::ZERO)),
            None => self.load_or(waits.returned, key, wanted).await,
        }
    }

    /// A runner that is given back, or a new one and the time that its load took, whichever is there first: a quick
    /// batch does not wait for a load because a slot beside it has the only runner for a moment.
    async fn load_or(
        self: &Arc<Self>,
        mut returned: oneshot::Receiver<Instance>,
        key: Key,
        wanted: &Wanted,
    ) -> Result<(Instance, Duration), Failure> {
        let begun = Instant::now();
        let is_started = Arc::new(AtomicBool::new(false));
        let (pool, wanted, starts) = (self.clone(), wanted.clone(), is_started.clone());
        let mut load = Box::pin(async move { pool.load(key, &wanted, &starts).await });
        tokio::select! {
            biased;
            loaded = &mut load => {
                returned.close();
                if let Ok(too_late) = returned.try_recv() {
                    self.put_idle(too_late);
                }
                Ok((loaded?, begun.elapsed()))
            }
            Ok(instance) = &mut returned => {
                if !instance.is_alive() {
                    return Ok((load.await?, begun.elapsed()));
                }
                // Before that it only ends others' runners, to make room.
                if is_started.load(Ordering::Relaxed) {
                    self.finish_load(key, load);
                }
                Ok((instance, Duration::ZERO))
            }
        }
    }

    /// Lets a load go on for later batches, which wait for it and start none of their own.
    fn finish_load(self: &Arc<Self>, key: Key, load: impl Future<Output = Result<Instance, Failure>> + Send + 'static) {
        let mut loads = self.loads.lock();
        if self.alive.lock().is_none() {
            return;
        }
        self.coming.lock().push(key);
        let coming = Coming { pool: self.clone(), key };
        while loads.try_join_next().is_some() {}
        loads.spawn(async move {
            match load.await {
                Ok(instance) => coming.pool.put_idle(instance),
                Err(error) => warn!(%error, "a further runner of a loaded model does not start"),
            }
        });
    }

    /// Gives the runner to a batch that waits for one of its kind, else keeps it.
    pub(super) fn put_idle(&self, mut instance: Instance) {
        instance.runner.set_busy(false);
        let mut waiting = self.waiting.lock();
        if !instance.is_alive() || self.alive.lock().is_none() {
            return;
        }
        while let Some(at) = waiting.iter().position(|waiting| waiting.key == instance.key) {
            match waiting.remove(at).sender.send(instance) {
                Ok(()) => return,
                Err(unwanted) => instance = unwanted,
            }
        }
        let mut idle = self.idle();
        idle.push(instance);
        while idle.len() > self.warm_max {
            // One that serves only some clients goes before all others.
            let least = idle.iter().position(|instance| instance.key.apart).unwrap_or(0);
            idle.remove(least);
        }
    }
}
