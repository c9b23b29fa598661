//! GPUs as the vendor's management library reports them; none without that library or its driver.

use nvml_wrapper::{Nvml, error::NvmlError};
use proto_msgs::{Gpu, GpuLoad, limits::GPUS_MAX};
use tracing::{debug, info, warn};

/// The GPUs of this machine, through the management library.
pub(super) struct Gpus {
    library: Option<Nvml>,
    /// All GPUs by the library's index, which runners know them by too. One that does not answer keeps its place.
    known: Vec<Known>,
}

struct Known {
    gpu: Gpu,
    /// Whether the last look failed; a failure is said once.
    is_silent: bool,
}

impl Gpus {
    /// Opens the library, if it exists, and finds its GPUs.
    pub(super) fn find() -> Self {
        let library = open();
        let count = library.as_ref().map_or(0, |library| {
            let counted = library.device_count();
            counted.inspect_err(|error| warn!(%error, "the driver does not count its GPUs: none is used")).unwrap_or(0)
        });
        let known = library.iter().flat_map(|library| (0..count).map(|index| Known::find(library, index)));
        let known: Vec<Known> = known.take(GPUS_MAX).collect();
        if count > 0 {
            info!(count, usable = known.iter().filter(|known| !known.is_silent).count(), "GPUs found");
        }
        Self { library, known }
    }

    pub(super) fn list(&self) -> Vec<Gpu> {
        self.known.iter().map(|known| known.gpu.clone()).collect()
    }

    /// Load of every GPU of [`Self::list`], in its order.
    pub(super) fn load(&mut self) -> Vec<GpuLoad> {
        let Some(library) = &self.library else { return Vec::new() };
        self.known.iter_mut().zip(0..).map(|(known, index)| known.load(library, index)).collect()
    }
}

impl Known {
    fn find(library: &Nvml, index: u32) -> Self {
        let device = library.device_by_index(index).inspect_err(|error| {
            warn!(index, %error, "a GPU does not answer: none of its memory is promised to tasks");
        });
        let memory = device.as_ref().ok().map(|device| {
            device.memory_info().inspect_err(|error| {
                warn!(index, %error, "a GPU does not tell its memory: none of it is promised to tasks");
            })
        });
        let memory_bytes = memory.and_then(Result::ok).map(|memory| memory.total);
        let name = device.and_then(|device| device.name()).unwrap_or_else(|_| "GPU".to_owned());
        let gpu = Gpu { name, memory_bytes: memory_bytes.unwrap_or(0) };
        Self { gpu, is_silent: memory_bytes.is_none() }
    }

    /// A GPU that does not tell how much memory is in use counts as full: nothing more is promised of it.
    fn load(&mut self, library: &Nvml, index: u32) -> GpuLoad {
        let device = library.device_by_index(index);
        let told = device.and_then(|device| Ok((device.memory_info()?.used, device.utilization_rates().ok())));
        let was_silent = std::mem::replace(&mut self.is_silent, told.is_err());
        if let Err(error) = &told
            && !was_silent
        {
            warn!(index, %error, "a GPU does not tell its use: it counts as full until it does");
        }
        let (memory_used_bytes, rates) = told.unwrap_or((self.gpu.memory_bytes, None));
        GpuLoad { memory_used_bytes, busy_permille: rates.map_or(0, |rates| rates.gpu.min(100) as u16 * 10) }
    }
}

/// The library; says why there is none, unless the machine simply lacks it.
fn open() -> Option<Nvml> {
    Nvml::init()
        .inspect_err(|error| match error {
            NvmlError::LibloadingError(_) => debug!(%error, "no GPU library"),
            _ => warn!(%error, "the GPU library does not start: no GPU is used"),
        })
        .ok()
}
