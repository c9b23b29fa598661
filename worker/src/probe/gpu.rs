//! GPUs as the vendor's management library sees them; none where that library or its driver is missing.

use nvml_wrapper::Nvml;
use proto_msgs::{Gpu, GpuLoad, limits::GPUS_MAX};
use tracing::{debug, info};

/// The GPUs of this machine.
pub(super) struct Gpus {
    library: Option<Nvml>,
    count: u32,
}

impl Gpus {
    /// Opens the library if it is there.
    pub(super) fn find() -> Self {
        let library = Nvml::init().inspect_err(|error| debug!(%error, "no GPU library")).ok();
        let count = library.as_ref().and_then(|library| library.device_count().ok()).unwrap_or(0);
        if count > 0 {
            info!(count, "GPUs found");
        }
        Self { library, count: count.min(GPUS_MAX as u32) }
    }

    pub(super) fn list(&self) -> Vec<Gpu> {
        self.each(|device| Gpu {
            name: device.name().unwrap_or_else(|_| "GPU".to_owned()),
            memory_bytes: device.memory_info().map_or(0, |memory| memory.total),
        })
    }

    /// As many as [`Self::list`] names, in its order: a GPU that stops answering shows zeros.
    pub(super) fn load(&self) -> Vec<GpuLoad> {
        self.each(|device| GpuLoad {
            memory_used_bytes: device.memory_info().map_or(0, |memory| memory.used),
            busy_permille: device.utilization_rates().map_or(0, |rates| rates.gpu.min(100) as u16 * 10),
        })
    }

    fn each<T>(&self, look: impl Fn(&nvml_wrapper::Device<'_>) -> T) -> Vec<T> {
        let Some(library) = &self.library else { return Vec::new() };
        (0..self.count).filter_map(|index| library.device_by_index(index).ok()).map(|device| look(&device)).collect()
    }
}
