//! The memory that runners take: which idle ones end for a new one. Owns the estimates. Never starts a runner.

use std::future::ready;

use proto_msgs::GpuLoad;
use tokio::time::timeout;
use tracing::debug;

use super::{END_WAIT, Instance, Key, Pool, Wanted};
use crate::engine::{Device, gpu_memory};

impl Pool {
    /// Ends idle runners until the machine, and the GPU that the new runner computes on, have the memory that it
    /// probably needs.
    pub(super) async fn make_room(&self, key: Key, wanted: &Wanted) {
        let need_bytes = wanted.needs_bytes(wanted.demands.memory_bytes);
        self.end_idle_until(need_bytes, || ready(available_memory_bytes()), |_| true).await;
        if let Device::Gpu(gpu) = key.device {
            let need_bytes = wanted.needs_bytes(key.gpu_memory_bytes);
            let free_bytes = || gpu_memory::free_bytes(gpu.into());
            self.end_idle_until(need_bytes, free_bytes, |idle| idle.device == key.device).await;
        }
    }

    /// Whether the machine and the GPU have the memory for one more runner while all others live on.
    pub(super) async fn has_memory_for(&self, key: Key, wanted: &Wanted) -> bool {
        let suffices = |available: Option<u64>, asked_bytes| {
            available.is_none_or(|bytes| bytes >= wanted.needs_bytes(asked_bytes))
        };
        if !suffices(available_memory_bytes(), wanted.demands.memory_bytes) {
            return false;
        }
        match key.device {
            Device::Gpu(gpu) => suffices(gpu_memory::free_bytes(gpu.into()).await, key.gpu_memory_bytes),
            Device::Cpu | Device::AnyGpu => true,
        }
    }

    /// Ends idle runners of which it `helps`, longest unused first, until as much memory is available as is needed.
    /// Waits for each end before the next look: only then is its memory free.
    pub(super) async fn end_idle_until<Available: Future<Output = Option<u64>>>(
        &self,
        need_bytes: u64,
        available_bytes: impl Fn() -> Available,
        helps: impl Fn(&Key) -> bool,
    ) {
        while available_bytes().await.is_some_and(|available| available < need_bytes) {
            let Some(oldest) = self.take_oldest_idle(&helps) else { return };
            debug!(model = %oldest.key.model.short(), "an idle runner makes room");
            let mut end = oldest.runner.exit();
            drop(oldest);
            let _ = timeout(END_WAIT, end.wait_for(Option::is_some)).await;
        }
    }

    /// Takes the memory of idle runners off what is in use: they end for a task that needs it.
    pub(crate) fn discount_idle(&self, gpus: &mut [GpuLoad]) {
        let on_gpu = |instance: &Instance| match instance.key.device {
            Device::Gpu(gpu) => Some((gpu, instance.runner.pid()?)),
            Device::Cpu | Device::AnyGpu => None,
        };
        let on_gpus: Vec<_> = self.idle().iter().filter_map(on_gpu).collect();
        // Looked up without the lock: the driver may take milliseconds.
        for (gpu, pid) in on_gpus {
            if let Some(load) = gpus.get_mut(usize::from(gpu)) {
                let used_bytes = gpu_memory::used_on(gpu.into(), pid).unwrap_or(0);
                load.memory_used_bytes = load.memory_used_bytes.saturating_sub(used_bytes);
            }
        }
    }

    fn take_oldest_idle(&self, helps: impl Fn(&Key) -> bool) -> Option<Instance> {
        let mut idle = self.idle();
        let oldest = idle.iter().position(|instance| helps(&instance.key))?;
        Some(idle.remove(oldest))
    }
}

fn available_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
