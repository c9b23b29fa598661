//! GPUs as the vendor's management library reports them; none without that library or its driver.

use nvml_wrapper::{Device, Nvml};
use proto_msgs::{Gpu, GpuLoad, limits::GPUS_MAX};
use tracing::{debug, info};

/// The GPUs of this machine, through the management library.
pub(super) struct Gpus {
    library: Option<Nvml>,
    /// The library's indexes of the GPUs that answered at the start, in the order of the worker's own GPU indexes.
    indices: Vec<u32>,
}

impl Gpus {
    /// Opens the library, if it exists, and finds the GPUs that answer.
    pub(super) fn find() -> Self {
        let library = Nvml::init().inspect_err(|error| debug!(%error, "no GPU library")).ok();
        let count = library.as_ref().and_then(|library| library.device_count().ok()).unwrap_or(0);
        let answers = |index: &u32| library.as_ref().is_some_and(|library| library.device_by_index(*index).is_ok());
        let indices: Vec<u32> = (0..count).filter(answers).take(GPUS_MAX).collect();
        if count > 0 {
            info!(count, usable = indices.len(), "GPUs found");
        }
        Self { library, indices }
    }

    pub(super) fn list(&self) -> Vec<Gpu> {
        self.each(|device| Gpu {
            name: device.and_then(|device| device.name().ok()).unwrap_or_else(|| "GPU".to_owned()),
            memory_bytes: device.and_then(|device| device.memory_info().ok()).map_or(0, |memory| memory.total),
        })
    }

    /// Load of every GPU of [`Self::list`], in its order. A GPU that no longer answers shows zeros.
    pub(super) fn load(&self) -> Vec<GpuLoad> {
        self.each(|device| GpuLoad {
            memory_used_bytes: device.and_then(|device| device.memory_info().ok()).map_or(0, |memory| memory.used),
            busy_permille: device
                .and_then(|device| device.utilization_rates().ok())
                .map_or(0, |rates| rates.gpu.min(100) as u16 * 10),
        })
    }

    /// One value per GPU, whether it answers or not.
    fn each<T>(&self, look: impl Fn(Option<&Device<'_>>) -> T) -> Vec<T> {
        let Some(library) = &self.library else { return Vec::new() };
        self.indices.iter().map(|index| look(library.device_by_index(*index).ok().as_ref())).collect()
    }
}
