//! Assembles the worker, runs it, and shuts it down.

use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use mesh_core::worker::{Config as MachineConfig, Event, Sample, Worker};
use mesh_transport::{Admit, Door, Inbox, Limits, Received};
use proto_msgs::{Arch, EngineKind, Register, TicketKey, limits::SLOTS_MAX, units::show_bytes};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::timeout,
};
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    args::EngineChoice,
    config::{Config, QUOTA_DEFAULT_BYTES},
    control::{BrokerAddress, Control, ControlError, EVENTS_MAX, ORDERS_MAX},
    data::{
        blobs::{BlobStore, Coming},
        keep::{Found, Keep},
        link_speed::LinkSpeed,
        payload::MemoryUse,
    },
    desk::Desk,
    engine::{Docker, DockerSettings, Engine, Process, find_runner},
    probe::{Look, Machine, Probe},
    runners::{
        pool::{AllEnded, Pool, RunnerDefaults},
        proven::Proven,
    },
    state::{StateDir, StateError},
    tools::Tools,
};

/// Threads that carry out orders: sockets, transfers and runners' answers. Blob threads hash and write large blobs, so
/// a second thread here would only be woken for every message.
const CARRYING_THREADS: usize = 1;

/// Threads for work that waits for disks and peers: a transfer of a large blob holds one for as long as its peer moves
/// on. One for the inputs and one for the result of each active attempt, and as many again for fetched results. A
/// client that takes nothing of its result gives the thread back after `desk::attempt::CREDIT_PATIENCE`.
const BLOCKING_THREADS_MAX: usize = 4 * SLOTS_MAX;

/// Time for runners to end and be cleaned up when the worker leaves.
const END_WAIT: Duration = Duration::from_secs(10);

/// An engine that answers at all does so within this time, also one that starts together with the machine. One that hangs
/// must not hold up a worker that can do without for longer.
const ENGINE_ANSWER_WAIT: Duration = Duration::from_secs(10);

/// Time for an engine to remove the containers of a killed worker; this worker may not even use that engine.
const LEFTOVERS_WAIT: Duration = Duration::from_secs(20);

/// Time for files that are still being written when the worker leaves.
const FILES_WAIT: Duration = Duration::from_secs(2);

/// Interval at which uses of models are noted on the disk: after a kill, the uses since then are forgotten.
const NOTE_EVERY: Duration = Duration::from_secs(60);

/// Least memory of a run whose task asks for none, however many slots there are.
const MEMORY_MIN_BYTES: u64 = 256 << 20;

/// Inputs and outputs may fill 1/8 of the machine's memory; the rest is for models.
const MEMORY_PART: u64 = 8;

/// Why a worker does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// A setting must be changed.
    #[error("{0}")]
    Config(String),
    /// Any other error.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// Runs the worker until it is told to leave.
pub(crate) fn run(config: Config) -> Result<(), StartError> {
    let state = StateDir::open(&config.state_dir).map_err(state_error)?;
    let mut probe = Probe::new(state.root().to_owned());
    let machine = probe.machine();
    warn_of_devices(&config, &machine);
    let runtime = carrying_runtime()?;
    let engine = runtime.block_on(choose_engine(&config, &state))?;

    let transport = mesh_transport::Context::new(config.security.clone()).map_err(config_error)?;
    let door = open_door(&config, &transport, &runtime)?;
    let endpoints = config.endpoints(door.as_ref().map(|(door, _)| door.endpoint()));
    let register = register(&config, &state, &machine, engine.as_ref(), &transport, endpoints);
    let ready = ready_line(&register);
    let machine_config = MachineConfig {
        run_limit: config.run_limit,
        drain_wait: config.drain_wait,
        result_kept: config.keep_results,
        rows_max: config.pack_max,
        ..MachineConfig::new(register)
    };

    let (to_machine, events) = mpsc::channel(EVENTS_MAX);
    let (to_desk, orders) = mpsc::channel(ORDERS_MAX);
    let (pool, all_ended, store) = stores(&config, &state, &machine, engine)?;
    let (keep, found) = Keep::open(state.attempts(), store.clone()).context("kept attempts")?;
    let restored = found.iter().map(Found::restored).collect();
    let tools = Arc::new(Tools {
        store,
        coming: Coming::default(),
        memory: MemoryUse::new(machine.memory_bytes / MEMORY_PART),
        pool,
        keep,
        link_speed: LinkSpeed::default(),
        look: Look::default(),
        transport: transport.clone(),
        proven: Proven::default(),
        machine: to_machine,
    });
    let desk = Desk::new(tools.clone(), orders, door, found);
    set_quota(&config, &tools.store);
    start_probe(probe, tools.clone(), config.heartbeat)?;
    let desk = runtime.spawn(desk.work());

    // The control loop has its own thread, so that nothing delays a heartbeat.
    let control = Builder::new_current_thread().enable_all().build().context("control loop")?;
    let ran = control.block_on(async {
        let address = BrokerAddress { transport, endpoint: config.broker.clone(), key: config.broker_key };
        let control = Control::new(Worker::new(machine_config), address, events, to_desk, ready);
        let control = control.map_err(|error| match error {
            ControlError::Address(error) => config_error(error),
            other => failed(other),
        })?;
        control.run(Event::Started { attempts: restored }).await.map_err(|error| ended_early(error, &state))
    });
    shut_down(runtime, desk, tools, all_ended);
    ran
}

/// Warns of a mapped GPU that is not there. No error: its driver may come later, or the host lacks the driver's tools.
fn warn_of_devices(config: &Config, machine: &Machine) {
    let is_missing = |device: &&i16| usize::try_from(**device).is_ok_and(|index| index >= machine.gpus.len());
    if let Some(device) = config.device_map.iter().find(is_missing) {
        warn!(device, found = machine.gpus.len(), "--device-map names a GPU that the driver does not tell of");
    }
}

fn carrying_runtime() -> Result<Runtime, StartError> {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(CARRYING_THREADS).max_blocking_threads(BLOCKING_THREADS_MAX);
    let runtime = builder.thread_name("mesh-carry").enable_all().build();
    Ok(runtime.context("cannot start threads")?)
}

/// The chosen engine, or the best available one. Containers of a killed worker are removed in either case, unless the
/// engine hangs, or a worker with the same id runs here: they may be its own.
async fn choose_engine(config: &Config, state: &StateDir) -> Result<Box<dyn Engine>, StartError> {
    let (host, must) = (config.docker_host.as_deref(), config.engine == EngineChoice::Docker);
    let hangs = !must && timeout(ENGINE_ANSWER_WAIT, Docker::answers(host)).await.is_err();
    let removing = Docker::remove_leftovers(host, state.worker);
    if !state.is_alone() {
        warn!(id = %state.worker, "another mesh-worker on this machine runs with a copy of the state folder");
    } else if hangs || timeout(LEFTOVERS_WAIT, removing).await.is_err() {
        warn!("the container engine hangs: containers of an earlier life may be left");
    }
    let docker = async || {
        let (host, image) = (config.docker_host.clone(), config.image.clone());
        let connecting = Docker::connect(DockerSettings { host, image, worker: state.worker });
        let wait = if must { Duration::MAX } else { ENGINE_ANSWER_WAIT };
        let connected = if hangs { None } else { timeout(wait, connecting).await.ok() };
        let waited_s = ENGINE_ANSWER_WAIT.as_secs();
        let Some(connected) = connected else {
            return Err(format!("the container engine did not answer in {waited_s} s"));
        };
        connected.map_err(|error| error.to_string())
    };
    let process = async || match find_runner(config.runner.as_deref()) {
        Some(runner) => Process::open(runner).await,
        None => Err(match &config.runner {
            Some(told) => {
                format!("--runner {}: there is no such program; give the path of mesh-runner", told.display())
            }
            None => "no mesh-runner beside this program or in PATH: name it with --runner".to_owned(),
        }),
    };
    match config.engine {
        EngineChoice::Docker => Ok(Box::new(docker().await.map_err(config_error)?)),
        EngineChoice::Process => Ok(Box::new(process().await.map_err(StartError::Config)?)),
        EngineChoice::Auto => match docker().await {
            Ok(docker) => {
                info!("engine: docker, because an engine answers and has the image");
                Ok(Box::new(docker))
            }
            Err(no_docker) => match process().await {
                Ok(process) => {
                    if hangs {
                        warn!("engine: process, because {no_docker}: restart this worker once it does");
                    } else {
                        info!("engine: process, because {no_docker}");
                    }
                    Ok(Box::new(process))
                }
                Err(no_process) => {
                    Err(StartError::Config(format!("nothing can run models: {no_docker}; {no_process}")))
                }
            },
        },
    }
}

fn open_door(
    config: &Config,
    transport: &mesh_transport::Context,
    runtime: &Runtime,
) -> Result<Option<(Door, Inbox<Received>)>, StartError> {
    let Some(bind) = &config.data_bind else { return Ok(None) };
    let _inside = runtime.enter();
    // Any client with a ticket may connect: tickets are bound to keys.
    let listener = transport.listen(bind, Admit::Anyone, Limits::DIRECT).map_err(config_error)?;
    Ok(Some(listener.spawn()))
}

fn register(
    config: &Config,
    state: &StateDir,
    machine: &Machine,
    engine: &dyn Engine,
    transport: &mesh_transport::Context,
    endpoints: Vec<String>,
) -> Register {
    // Two UUIDs: 2 × 122 bits from the system's random source.
    let mut ticket_key = [0; 32];
    ticket_key[..16].copy_from_slice(Uuid::new_v4().as_bytes());
    ticket_key[16..].copy_from_slice(Uuid::new_v4().as_bytes());
    Register {
        worker: state.worker,
        epoch: state.epoch,
        name: config.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        os: machine.os.clone(),
        arch: Arch::HERE,
        cores: machine.cores,
        memory_bytes: machine.memory_bytes,
        run_memory_bytes: run_memory_bytes(config, machine),
        engine: engine.kind(),
        formats: engine.formats().to_vec(),
        endpoints,
        key: transport.public_key(),
        ticket_key: TicketKey(ticket_key),
        slots: config.slots,
        device_map: config.device_map.clone(),
        device_width: config.device_width,
        labels: config.labels.clone(),
        gpus: machine.gpus.clone(),
        heartbeat_ms: u32::try_from(config.heartbeat.as_millis()).unwrap_or(u32::MAX),
    }
}

/// Memory of a run whose task asks for none: unless it was told, a slot's share.
fn run_memory_bytes(config: &Config, machine: &Machine) -> u64 {
    let slots = u64::from(config.slots[0]) + u64::from(config.slots[1]);
    config.memory_limit_bytes.unwrap_or_else(|| (machine.memory_bytes / slots.max(1)).max(MEMORY_MIN_BYTES))
}

fn ready_line(register: &Register) -> String {
    let place =
        if register.endpoints.is_empty() { "no address (dials)".to_owned() } else { register.endpoints.join(" ") };
    format!("ready: worker {} ({}) at {place}", register.name, register.worker)
}

/// Limits the blob store. Models of kept tasks are held by then: others make room.
fn set_quota(config: &Config, store: &BlobStore) {
    let quota_bytes = config.quota_bytes.unwrap_or_else(|| QUOTA_DEFAULT_BYTES.min(store.disk_bytes() / 2));
    store.set_quota(quota_bytes);
    info!(quota = %show_bytes(quota_bytes), models = store.held().len(), "blob store open");
}

fn stores(
    config: &Config,
    state: &StateDir,
    machine: &Machine,
    engine: Box<dyn Engine>,
) -> Result<(Arc<Pool>, AllEnded, BlobStore), StartError> {
    let blobs = state.blobs();
    fs::create_dir_all(&blobs).context("blob store")?;
    let store = BlobStore::open(&blobs, u64::MAX).context("blob store")?;

    let runners = match engine.kind() {
        EngineKind::Docker => state.runners_in_memory(),
        EngineKind::Process => state.runners(),
    };
    let runners = runners.map_err(state_error)?;
    let slots = u32::from(config.slots[0]) + u32::from(config.slots[1]);
    let defaults = RunnerDefaults {
        cpu_millis: (machine.cores * 1000 / slots).max(1000),
        memory_bytes: run_memory_bytes(config, machine),
        headroom: config.headroom.clone(),
    };
    let (pool, all_ended) = Pool::new(engine, store.clone(), runners, defaults, config.warm_max);
    Ok((pool, all_ended, store))
}

/// Measures slightly more often than heartbeats are sent, as long as the machine listens.
fn start_probe(mut probe: Probe, tools: Arc<Tools>, heartbeat: Duration) -> Result<(), StartError> {
    let every = heartbeat.mul_f64(0.9);
    let measure = move || {
        let mut noted = Instant::now();
        loop {
            let mut load = probe.sample();
            tools.pool.discount_idle(&mut load.gpus);
            let sample = Sample {
                load,
                held: tools.store.held(),
                warm: tools.pool.warm(),
                link_bytes_per_s: tools.link_speed.get(),
            };
            if tools.machine.blocking_send(Event::Sampled(sample)).is_err() {
                return;
            }
            if noted.elapsed() >= NOTE_EVERY {
                tools.store.note_uses();
                noted = Instant::now();
            }
            tools.look.wait(every);
        }
    };
    thread::Builder::new().name("mesh-probe".to_owned()).spawn(measure).context("cannot start threads")?;
    Ok(())
}

/// Ends the work first, then the runners, then the threads.
fn shut_down(runtime: Runtime, desk: tokio::task::JoinHandle<()>, tools: Arc<Tools>, mut all_ended: AllEnded) {
    runtime.block_on(async {
        // When the orders end, the desk ends, and with it the attempts and their tasks.
        if timeout(END_WAIT, desk).await.is_err() {
            warn!("orders are still being carried out");
        }
        tools.pool.close().await;
        if timeout(END_WAIT, all_ended.recv()).await.is_err() {
            warn!("some runners did not end in time; the next start removes what is left");
        }
        tools.pool.remove_folder();
    });
    runtime.shutdown_timeout(FILES_WAIT);
    info!("left");
}

fn ended_early(error: ControlError, state: &StateDir) -> StartError {
    match error {
        ControlError::Overtaken => {
            state.take_back_start();
            config_error(StateError::Copied { id: state.worker, root: state.root().to_owned() })
        }
        other => failed(other),
    }
}

fn state_error(error: StateError) -> StartError {
    match error {
        // No setting is wrong: it works again once there is space.
        StateError::Full { .. } => failed(error),
        _ => StartError::Config(error.to_string()),
    }
}

fn config_error(error: impl std::fmt::Display) -> StartError {
    StartError::Config(error.to_string())
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> StartError {
    StartError::Failed(anyhow!(error))
}
