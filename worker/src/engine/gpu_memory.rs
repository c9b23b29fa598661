//! Memory of GPUs that runners really use, as the vendor's management library tells: no engine limits it.
//!
//! Says nothing where the library is missing, or where it names processes by other numbers than ours.

use std::{sync::OnceLock, time::Duration};

use nvml_wrapper::{Nvml, enums::device::UsedGpuMemory};
use tokio::{task::spawn_blocking, time::sleep};

/// The library takes up to some milliseconds to answer.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Returns once the process uses more than `limit_bytes` of all GPUs together. Never for a limit of 0.
pub(super) async fn outgrown(pid: Option<u32>, limit_bytes: u64) {
    let Some(pid) = pid.filter(|_| limit_bytes > 0) else { return std::future::pending().await };
    loop {
        sleep(LOOK_EVERY).await;
        match spawn_blocking(move || used_bytes(pid)).await {
            Ok(Some(used_bytes)) if used_bytes > limit_bytes => return,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return std::future::pending().await,
        }
    }
}

/// `None` where nobody can tell.
fn used_bytes(pid: u32) -> Option<u64> {
    static LIBRARY: OnceLock<Option<Nvml>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| Nvml::init().ok()).as_ref()?;
    let mut used_bytes = 0;
    for index in 0..library.device_count().ok()? {
        let processes = library.device_by_index(index).and_then(|device| device.running_compute_processes());
        for process in processes.into_iter().flatten().filter(|process| process.pid == pid) {
            if let UsedGpuMemory::Used(bytes) = process.used_gpu_memory {
                used_bytes += bytes;
            }
        }
    }
    Some(used_bytes)
}
