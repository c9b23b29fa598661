//! Runners, kept warm: the second run of a model needs no start and no loading.
//!
//! Owns which runner serves which batch. Never: how many batches run at the same time, which the machine decides. A
//! dropped batch ends its runner.
//!
//! ```text
//!   take: idle, else start and load ──► Taken: call, call, … ──► give_back: to who waits for a load, else idle again
//!           │                             └─ dropped, or out of order: the runner ends
//!           └── one that is given back meanwhile is taken; the load goes on, for the next
//! ```

mod hand_over;
mod memory;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_core::worker::headroom::Headroom;
use parking_lot::{Mutex, MutexGuard};
use proto_msgs::{AttemptId, Demands, Digest, ErrorCode, Failure, ModelRef, limits::HELD_MAX};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::info;

use hand_over::Waiting;

use super::{
    fit::TensorMeta,
    oip::{AskError, Given, Session, Tensor},
};
use crate::{
    data::blobs::{BlobStore, Pin},
    engine::{Device, Engine, LimitOf, Runner, RunnerSpec, SocketFolder},
};

/// Time limit for loading a model. The largest take minutes from a slow disk.
const LOAD_WAIT: Duration = Duration::from_secs(180);

/// First interval between looks at a starting runner; each further interval is longer.
const READY_FIRST: Duration = Duration::from_millis(2);

/// Longest interval between looks at a starting runner.
const READY_LAST: Duration = Duration::from_millis(50);

/// Time for a runner to end after its connection broke.
const END_WAIT: Duration = Duration::from_secs(2);

/// Resources of a runner where the task asks for none, and the head-room beyond what it asks for.
#[derive(Clone, Debug)]
pub(crate) struct RunnerDefaults {
    /// Thousandths of a core for a task that asks for none.
    pub(crate) cpu_millis: u32,
    /// Memory for a task that asks for none.
    pub(crate) memory_bytes: u64,
    /// Cores granted to a task that asks for cores.
    pub(crate) headroom: Headroom,
}

/// The runner that a batch needs.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The attempt for which the runner is started, if it is.
    pub(crate) attempt: AttemptId,
    pub(crate) model: ModelRef,
    pub(crate) pin: Pin,
    pub(crate) demands: Demands,
    /// −1 for the processor, else the index of a GPU.
    pub(crate) device: i16,
    /// Whether the batch may end its runner: it gets one that only such batches use, if nothing has to make room for it.
    pub(crate) apart: bool,
}

impl Wanted {
    /// Memory that the runner probably needs if the task asks for this much of it.
    fn needs_bytes(&self, asked_bytes: u64) -> u64 {
        // Weights, a copy of them in the runtime's own layout, and the runtime.
        let guess_bytes = self.model.size_bytes.saturating_mul(2).saturating_add(128 << 20);
        if asked_bytes > 0 { asked_bytes } else { guess_bytes }
    }
}

/// A runner in use by a batch. Dropping it ends the runner.
pub(crate) struct Taken<'a> {
    pool: &'a Pool,
    instance: Instance,
    /// Whether the runner is in a known state and may be used again.
    in_order: bool,
    /// Time that starting the runner and loading the model took; zero if it was warm.
    pub(crate) load: Duration,
}

/// All runners of this worker.
pub(crate) struct Pool {
    engine: Box<dyn Engine>,
    store: BlobStore,
    /// The folder of the runners' sockets.
    folder: PathBuf,
    next_folder: AtomicU64,
    defaults: RunnerDefaults,
    /// Most idle runners kept.
    warm_max: usize,
    /// [`LOAD_WAIT`], except in tests.
    load_wait: Duration,
    /// Idle runners, longest unused first.
    idle: Mutex<Vec<Instance>>,
    /// Batches that wait for a load, and would take a runner that is given back. Locked before `idle`.
    waiting: Mutex<Vec<Waiting>>,
    /// Loads whose batches took another runner, and the runners that they will give.
    loads: Mutex<JoinSet<()>>,
    coming: Mutex<Vec<Key>>,
    /// Models of all runners that are ready for any client, one entry per runner.
    loaded: Arc<Mutex<Vec<Digest>>>,
    /// Cloned into every runner's folder; see [`AllEnded`].
    alive: Mutex<Option<mpsc::Sender<()>>>,
}

/// A channel that closes once every runner has ended and is cleaned up.
pub(crate) type AllEnded = mpsc::Receiver<()>;

/// Properties in which two batches must agree to use the same runner.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Key {
    model: Digest,
    cpu_millis: u32,
    /// Thousandths of a core with head-room.
    granted_millis: u32,
    memory_bytes: u64,
    memory_of: LimitOf,
    device: Device,
    gpu_memory_bytes: u64,
    apart: bool,
}

/// A ready runner with its model loaded.
struct Instance {
    key: Key,
    runner: Runner,
    session: Session,
    inputs: Vec<TensorMeta>,
    /// `None` if the runner serves only some clients.
    _loaded: Option<Loaded>,
}

/// An entry in the list of loaded models; dropping it removes the entry.
struct Loaded {
    list: Arc<Mutex<Vec<Digest>>>,
    model: Digest,
}

impl Loaded {
    fn new(list: &Arc<Mutex<Vec<Digest>>>, model: Digest) -> Self {
        list.lock().push(model);
        Self { list: list.clone(), model }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let mut list = self.list.lock();
        if let Some(index) = list.iter().position(|model| *model == self.model) {
            list.swap_remove(index);
        }
    }
}

impl Pool {
    /// A pool without runners.
    pub(crate) fn new(
        engine: Box<dyn Engine>,
        store: BlobStore,
        folder: PathBuf,
        defaults: RunnerDefaults,
        warm_max: usize,
    ) -> (Arc<Self>, AllEnded) {
        let (alive, all_ended) = mpsc::channel(1);
        let pool = Self {
            engine,
            store,
            folder,
            next_folder: AtomicU64::new(0),
            defaults,
            warm_max,
            load_wait: LOAD_WAIT,
            idle: Mutex::default(),
            waiting: Mutex::default(),
            loads: Mutex::default(),
            coming: Mutex::default(),
            loaded: Arc::default(),
            alive: Mutex::new(Some(alive)),
        };
        (Arc::new(pool), all_ended)
    }

    /// Digests of the loaded models, each once, at most `HELD_MAX`.
    pub(crate) fn warm(&self) -> Vec<Digest> {
        // One that somebody ended is warm no more. Its files are removed when nobody waits for the others.
        let dead: Vec<Instance> = self.idle().extract_if(.., |instance| !instance.is_alive()).collect();
        drop(dead);
        let mut warm = self.loaded.lock().clone();
        warm.sort_unstable();
        warm.dedup();
        warm.truncate(HELD_MAX);
        warm
    }

    /// Ends all idle runners, so that their models can be evicted.
    pub(crate) async fn end_idle(&self) {
        let idle = std::mem::take(&mut *self.idle());
        let ends: Vec<_> = idle.iter().map(|instance| instance.runner.exit()).collect();
        drop(idle);
        for mut end in ends {
            let _ = timeout(END_WAIT, end.wait_for(Option::is_some)).await;
        }
    }

    /// Starts no more runners and ends the idle ones.
    pub(crate) async fn close(&self) {
        {
            let _nothing_is_put_back = self.waiting.lock();
            self.alive.lock().take();
        }
        drop(std::mem::take(&mut *self.loads.lock()));
        self.end_idle().await;
    }

    /// An idle runner with the wanted model, else a new one or one that is given back before that is ready; `loading` is
    /// called before a new one starts.
    pub(crate) async fn take(
        self: &Arc<Self>,
        wanted: &Wanted,
        loading: impl AsyncFnOnce(),
    ) -> Result<Taken<'_>, Failure> {
        let mut key = self.key(wanted);
        key.apart = key.apart && (self.has_idle(key) || self.has_memory_for(key, wanted).await);
        let (instance, load) = match self.take_idle_or_wait(key) {
            Ok(instance) => (instance, Duration::ZERO),
            Err(waits) => {
                loading().await;
                self.next(waits, key, wanted).await?
            }
        };
        instance.runner.set_busy(true);
        Ok(Taken { pool: self, instance, in_order: true, load })
    }

    /// Removes the folder of the runners' sockets if all runners have ended.
    pub(crate) fn remove_folder(&self) {
        let _ = std::fs::remove_dir(&self.folder);
    }

    fn key(&self, wanted: &Wanted) -> Key {
        let demands = &wanted.demands;
        let or = |wish: u64, default: u64| if wish == 0 { default } else { wish };
        let cpu_millis = or(demands.cpu_millis.into(), self.defaults.cpu_millis.into()) as u32;
        let device = match u16::try_from(wanted.device) {
            Ok(index) => Device::Gpu(index),
            // The device map names no GPU here, but the task asks for one.
            Err(_) if demands.gpu_memory_bytes > 0 => Device::AnyGpu,
            Err(_) => Device::Cpu,
        };
        Key {
            model: wanted.model.digest,
            cpu_millis,
            granted_millis: match demands.cpu_millis {
                0 => cpu_millis,
                asked => self.defaults.headroom.granted_millis(asked),
            },
            memory_bytes: or(demands.memory_bytes, self.defaults.memory_bytes),
            memory_of: match device {
                _ if demands.memory_bytes > 0 => LimitOf::Task,
                Device::Cpu => LimitOf::Worker,
                Device::Gpu(_) | Device::AnyGpu => LimitOf::Device,
            },
            device,
            gpu_memory_bytes: demands.gpu_memory_bytes,
            apart: wanted.apart,
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Instance>> {
        self.idle.lock()
    }

    fn has_idle(&self, key: Key) -> bool {
        self.idle().iter().any(|instance| instance.key == key && !instance.runner.has_exited())
    }

    /// Starts a runner, and sets `is_started` from then on.
    async fn load(&self, key: Key, wanted: &Wanted, is_started: &AtomicBool) -> Result<Instance, Failure> {
        self.make_room(key, wanted).await;
        if !self.store.still_has(key.model, &wanted.pin) {
            let text = "the worker's copy of the model has gone from its disk or was changed: it has to be sent again";
            return Err(Failure::new(ErrorCode::WorkerLost, text));
        }
        let number = self.next_folder.fetch_add(1, Ordering::Relaxed);
        let alive = self.alive.lock().clone();
        let alive = alive.ok_or_else(|| Failure::new(ErrorCode::Draining, "the worker is shutting down"))?;
        let folder = Arc::new(SocketFolder::create(&self.folder, number, alive)?);
        let spec = RunnerSpec {
            model: wanted.pin.clone(),
            format: wanted.model.format,
            threads: key.cpu_millis.div_ceil(1000).max(1),
            cpu_millis: key.granted_millis,
            memory_bytes: key.memory_bytes,
            memory_of: key.memory_of,
            device: key.device,
            gpu_memory_bytes: key.gpu_memory_bytes,
            first_attempt: wanted.attempt,
        };
        let begun = Instant::now();
        is_started.store(true, Ordering::Relaxed);
        let runner = self.engine.start(spec, folder).await?;
        let ready = tokio::select! {
            biased;
            exit = runner.exited() => return Err(exit.while_loading()),
            ready = timeout(self.load_wait, until_ready(runner.folder())) => ready,
        };
        let Ok(session) = ready else {
            // A slow disk or a machine short of memory takes that long, so another worker may do better.
            let text = format!("the model was not loaded within {} s at this worker", self.load_wait.as_secs());
            return Err(Failure::new(ErrorCode::EngineUnavailable, text));
        };
        let (session, inputs) = match session {
            Ok(ready) => ready,
            Err(AskError::Refused(failure) | AskError::Unread(failure)) => return Err(key.memory_of.judge(failure)),
            Err(AskError::Broken(error)) => {
                return Err(match timeout(END_WAIT, runner.exited()).await {
                    Ok(exit) => exit.while_loading(),
                    Err(_) => Failure::new(ErrorCode::RunProtocol, format!("the runner hung up: {error}")),
                });
            }
        };
        info!(model = %key.model.short(), ms = begun.elapsed().as_millis(), "model loaded");
        let _loaded = (!key.apart).then(|| Loaded::new(&self.loaded, key.model));
        Ok(Instance { key, runner, session, inputs, _loaded })
    }
}

impl Taken<'_> {
    /// Inputs that the model takes.
    pub(crate) fn inputs(&self) -> &[TensorMeta] {
        &self.instance.inputs
    }

    /// What tells this runner from those that are not like it.
    pub(crate) fn key(&self) -> Key {
        self.instance.key
    }

    /// Digest of the runner's model.
    pub(crate) fn model(&self) -> Digest {
        self.instance.key.model
    }

    /// Runs the model once, within what is `left` of the `limit` that loading shares with the first run. Outputs that
    /// `stays` rejects go to files instead of memory.
    pub(crate) async fn call(
        &mut self,
        inputs: Vec<Given>,
        (left, limit): (Duration, Duration),
        stays: impl FnMut(u64) -> bool,
    ) -> Result<Vec<Tensor>, Failure> {
        // Set before the run: dropping this call leaves the runner in an unknown state.
        self.in_order = false;
        let called = timeout(left, self.instance.session.infer(inputs, &self.pool.store, stays)).await;
        match called {
            Err(_) => {
                let text = format!("the run did not end within {limit:?} (the worker's --run-limit)");
                Err(Failure::new(ErrorCode::RunTimeout, text))
            }
            Ok(Ok(outputs)) => {
                self.in_order = true;
                Ok(outputs)
            }
            Ok(Err(AskError::Refused(failure))) => {
                self.in_order = true;
                Err(self.instance.key.memory_of.judge(failure))
            }
            Ok(Err(AskError::Unread(failure))) => Err(failure),
            Ok(Err(AskError::Broken(error))) => match timeout(END_WAIT, self.instance.runner.exited()).await {
                Ok(exit) => Err(exit.while_running()),
                Err(_) => Err(Failure::new(ErrorCode::RunProtocol, format!("the runner hung up: {error}"))),
            },
        }
    }

    /// Returns the runner to the idle ones if it is in order; else ends it.
    pub(crate) fn give_back(self) {
        if self.in_order {
            self.pool.put_idle(self.instance);
        }
    }
}

/// Waits for the runner's socket and its model, then asks for the model's inputs.
async fn until_ready(folder: &SocketFolder) -> Result<(Session, Vec<TensorMeta>), AskError> {
    let mut wait = READY_FIRST;
    let mut session = None;
    loop {
        let mut live = match session.take() {
            Some(live) => live,
            None => match Session::connect(folder).await {
                Ok(live) => live,
                Err(_) => {
                    sleep(wait).await;
                    wait = (wait * 2).min(READY_LAST);
                    continue;
                }
            },
        };
        if live.is_ready().await? {
            let inputs = live.inputs().await?;
            return Ok((live, inputs));
        }
        session = Some(live);
        sleep(wait).await;
        wait = (wait * 2).min(READY_LAST);
    }
}

#[cfg(test)]
mod tests;
