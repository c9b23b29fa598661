//! The place of the experiments: a broker, workers whose devices have stated costs, and clients each with its own
//! identity, all real; once with scheduling on and once with it off.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_bench::device::{Book, Cost, Usage};
use mesh_core::broker::Policy;
use mesh_sdk::{Listen, Model, Options};
use mesh_tests::{Mesh, MeshOptions, PATIENCE, Process, onnx, process::binary};

/// A worker's heartbeat interval: measured costs and violations reach the broker this often.
const HEARTBEAT: &str = "200ms";

/// Whether scheduling is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scheduling {
    /// The mesh as it is meant to be.
    On,
    /// One FIFO for all clients, workers in turn, one run per task.
    Off,
}

impl Scheduling {
    pub(super) const BOTH: [Self; 2] = [Self::On, Self::Off];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
        }
    }

    fn broker_args(self) -> Vec<String> {
        let off = ["--policy=round-robin", "--weight-wait=0", "--weight-data=0", "--weight-share=0"];
        match self {
            Self::On => Vec::new(),
            Self::Off => off.map(str::to_owned).to_vec(),
        }
    }
}

/// Layout of a field.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) scheduling: Scheduling,
    /// Number of workers; each has its own devices.
    pub(super) workers: usize,
    /// Slots of the realtime and of the batch lane, at each worker.
    pub(super) slots: [u16; 2],
    /// The runner of models.
    pub(super) runner: Runner,
}

/// The runner of models.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Runner {
    /// This many devices of stated cost, each with one batch at a time.
    Device(usize),
    /// `mesh-runner` on this machine's processor.
    Real,
}

/// A running mesh.
#[derive(Debug)]
pub(super) struct Field {
    workers: Vec<Place>,
    mesh: Mesh,
    layout: Layout,
}

#[derive(Debug)]
struct Place {
    name: String,
    device: PathBuf,
    _process: Process,
}

impl Field {
    /// Starts broker and workers and waits until they are registered.
    pub(super) fn start(layout: Layout) -> Result<Self> {
        Self::with_broker(layout, layout.scheduling.broker_args())
    }

    /// With this placement policy.
    pub(super) fn with_policy(layout: Layout, policy: Policy) -> Result<Self> {
        Self::with_broker(layout, vec!["--policy".to_owned(), policy.name().to_owned()])
    }

    fn with_broker(layout: Layout, broker_args: Vec<String>) -> Result<Self> {
        let mesh = Mesh::with(MeshOptions { broker_args, ..MeshOptions::default() });
        let mut field = Self { workers: Vec::new(), mesh, layout };
        for number in 1..=layout.workers {
            let place = field.place(&format!("w{number}"))?;
            field.workers.push(place);
        }
        Ok(field)
    }

    fn place(&self, name: &str) -> Result<Place> {
        let folder = self.mesh.folder().join(format!("{name}-files"));
        fs::create_dir(&folder)?;
        let device = folder.join("device");
        let [realtime, batch] = self.layout.slots;
        // With scheduling off, all slots belong to one lane.
        let (realtime, batch) = match self.layout.scheduling {
            Scheduling::On => (realtime, batch),
            Scheduling::Off => (0, realtime + batch),
        };
        let mut command = Command::new(binary("mesh-worker"));
        command.args(["--broker", self.mesh.endpoint(), "--name", name, "--heartbeat", HEARTBEAT]);
        command.arg("--state-dir").arg(self.mesh.folder().join(name)).args(["--engine", "process"]);
        command.args(["--realtime-slots", &realtime.to_string(), "--batch-slots", &batch.to_string()]);
        if self.layout.scheduling == Scheduling::Off {
            command.args(["--pack-max", "1"]);
        }
        if let Runner::Device(devices) = self.layout.runner {
            let ids: Vec<String> = (0..devices).map(|id| id.to_string()).collect();
            command.arg("--runner").arg(write_starter(&folder, &device)?);
            command.args(["--device-map", &ids.join(","), "--warm", "64"]);
            // With scheduling off, as many runs wait at the device as there are slots.
            let width = if self.layout.scheduling == Scheduling::Off { batch } else { 1 };
            command.args(["--device-width", &width.to_string()]);
        }
        let mut process = Process::start(name, command);
        process.wait_for_line("`ready: worker`", PATIENCE, |line| line.contains("ready: worker").then_some(()));
        Ok(Place { name: name.to_owned(), device, _process: process })
    }

    pub(super) fn scheduling(&self) -> Scheduling {
        self.layout.scheduling
    }

    /// Connects this many clients, each with its own identity.
    pub(super) async fn clients(&self, prefix: &str, count: usize) -> Result<Vec<mesh_sdk::Mesh>> {
        let mut clients = Vec::with_capacity(count);
        for number in 0..count {
            let mut options = Options::new(self.mesh.endpoint());
            options.state_dir = self.mesh.folder().join(format!("{prefix}{number}"));
            // Clients can dial the workers, so a listener per client would only cost threads.
            options.listen = Listen::Never;
            options.connect_within = PATIENCE;
            clients.push(mesh_sdk::Mesh::connect(options).await?);
        }
        Ok(clients)
    }

    /// Work of all devices with this name so far.
    pub(super) fn usage(&self, device: &str) -> Result<Usage> {
        let mut sum = Usage::default();
        for place in &self.workers {
            let usage = place.book(device)?.usage()?;
            sum.busy += usage.busy;
            sum.batches += usage.batches;
            sum.rows += usage.rows;
        }
        Ok(sum)
    }

    /// Rows that each worker's first device has run so far.
    pub(super) fn rows_by_worker(&self) -> Result<Vec<u64>> {
        self.workers.iter().map(|place| Ok(place.book("0")?.usage()?.rows)).collect()
    }

    /// Makes the first device of this worker take this many thousandths of its cost.
    pub(super) fn slow_down(&self, worker: usize, permille: u64) -> Result<()> {
        self.workers.get(worker).context("there is no such worker")?.book("0")?.slow_down(permille)
    }

    pub(super) fn worker_names(&self) -> Vec<&str> {
        self.workers.iter().map(|place| place.name.as_str()).collect()
    }

    /// Processor time of broker and workers so far, without their runners.
    pub(super) fn mesh_cpu(&mut self) -> Duration {
        let broker = self.mesh.broker().pid();
        let workers = self.workers.iter().map(|place| place._process.pid());
        workers.chain([broker]).map(crate::measure::cpu_time).sum()
    }
}

impl Place {
    fn book(&self, device: &str) -> Result<Book> {
        if device == "0" {
            return Book::open(&self.device);
        }
        let mut named = self.device.clone().into_os_string();
        named.push(format!(".{device}"));
        Book::open(Path::new(&named))
    }
}

/// Writes a script that starts the device's runner, since a worker passes a runner only the model's settings.
fn write_starter(folder: &Path, device: &Path) -> Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("mesh-device");
    ensure!(program.exists(), "{} is missing: cargo build --release", program.display());
    let path = folder.join("runner");
    let text = format!("#!/bin/sh\nexec '{}' --device '{}' \"$@\"\n", program.display(), device.display());
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// A model of stated cost.
pub(super) async fn model_of(cost: &Cost) -> Result<Model> {
    let name = format!("device-{}-{}-{}.onnx", cost.base_us, cost.row_us, cost.device);
    Ok(Model::from_bytes(name, cost.write_into(onnx::add_one())).await?)
}
