//! GPU memory of runners and what is left beside it, through the vendor's management library, since no engine limits it.
//!
//! Without the library, or if it names processes by other numbers, nothing is watched; one warning says so.

use std::{
    sync::{Once, OnceLock},
    time::Duration,
};

use nvml_wrapper::{Nvml, enums::device::UsedGpuMemory};
use tokio::{task::spawn_blocking, time::sleep};
use tracing::warn;

/// Interval of checks: the library takes up to some milliseconds to answer.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Looks after which the driver must know a runner on a GPU: its model is loaded by then.
const UNNAMED_LOOKS: u32 = 120;

/// Result of one look at a process.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// The library does not answer.
    Nothing,
    /// The driver does not name the process.
    Unnamed,
    Uses {
        bytes: u64,
    },
}

/// Returns once the process uses more than `limit_bytes` of all GPUs together. Never for a limit of 0.
pub(super) async fn outgrown(pid: Option<u32>, limit_bytes: u64) {
    static SAID: Once = Once::new();
    let say = |why: &str| SAID.call_once(|| warn!("GPU memory is not watched: {why}"));
    match pid.filter(|_| limit_bytes > 0) {
        Some(pid) => watch(limit_bytes, LOOK_EVERY, move || look(pid), say).await,
        None => std::future::pending().await,
    }
}

/// Like [`outgrown`]; calls `say` with the reason if nothing can be watched.
async fn watch(
    limit_bytes: u64,
    every: Duration,
    look: impl Fn() -> Seen + Clone + Send + 'static,
    mut say: impl FnMut(&str),
) {
    let mut unnamed = 0;
    loop {
        sleep(every).await;
        match spawn_blocking(look.clone()).await.unwrap_or(Seen::Nothing) {
            Seen::Uses { bytes } if bytes > limit_bytes => return,
            Seen::Uses { .. } => unnamed = 0,
            Seen::Unnamed => {
                unnamed += 1;
                if unnamed == UNNAMED_LOOKS {
                    say(
                        "the driver does not name the runner's process; either it does not use the GPU, or it has another number there",
                    );
                }
            }
            Seen::Nothing => {
                say("the driver's management library does not answer");
                return std::future::pending().await;
            }
        }
    }
}

fn look(pid: u32) -> Seen {
    used_bytes(pid).map_or(Seen::Nothing, |used| used.map_or(Seen::Unnamed, |bytes| Seen::Uses { bytes }))
}

/// GPU memory of the process; `None` without an answer, `Some(None)` if the driver does not name the process.
fn used_bytes(pid: u32) -> Option<Option<u64>> {
    let used = (0..library()?.device_count().ok()?).filter_map(|gpu| used_on(gpu, pid));
    Some(used.reduce(u64::saturating_add))
}

/// Memory of one GPU that the process uses; `None` if the driver does not tell. Blocks while the driver does not answer.
pub(crate) fn used_on(gpu: u32, pid: u32) -> Option<u64> {
    let processes = library()?.device_by_index(gpu).and_then(|device| device.running_compute_processes()).ok()?;
    let used = processes.into_iter().filter(|process| process.pid == pid).filter_map(|process| {
        let UsedGpuMemory::Used(bytes) = process.used_gpu_memory else { return None };
        Some(bytes)
    });
    used.reduce(u64::saturating_add)
}

/// Memory of one GPU that nobody uses; `None` if the driver does not tell.
pub(crate) async fn free_bytes(gpu: u32) -> Option<u64> {
    let look = move || {
        let memory = library()?.device_by_index(gpu).and_then(|device| device.memory_info()).ok()?;
        Some(memory.total.saturating_sub(memory.used))
    };
    spawn_blocking(look).await.ok().flatten()
}

fn library() -> Option<&'static Nvml> {
    static LIBRARY: OnceLock<Option<Nvml>> = OnceLock::new();
    LIBRARY.get_or_init(|| Nvml::init().ok()).as_ref()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures_util::FutureExt;
    use tokio::time::timeout;

    use super::*;

    /// Longer than any of these tests takes on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Watches the `shown` looks, of which the last repeats for ever, against a limit of 100, until the watch ends or
    /// `is_enough` of the number of looks and of warnings. Returns whether the watch ended, the looks taken, and what was
    /// said.
    async fn watched(shown: &'static [Seen], is_enough: impl Fn(usize, usize) -> bool) -> (bool, usize, Vec<String>) {
        let (looks, said) = (Arc::new(Mutex::new(0)), Mutex::new(Vec::new()));
        let counted = looks.clone();
        let look = move || {
            let mut looks = counted.lock().expect("nobody panics");
            *looks += 1;
            shown[(*looks - 1).min(shown.len() - 1)]
        };
        let has_ended = {
            let say = |why: &str| said.lock().expect("nobody panics").push(why.to_owned());
            let mut watch = Box::pin(watch(100, Duration::from_micros(1), look, say));
            let (looks, said) =
                (|| *looks.lock().expect("nobody panics"), || said.lock().expect("nobody panics").len());
            timeout(PATIENCE, async {
                while !is_enough(looks(), said()) {
                    if (&mut watch).now_or_never().is_some() {
                        return true;
                    }
                    tokio::task::yield_now().await;
                }
                (&mut watch).now_or_never().is_some()
            })
            .await
            .expect("it looks again and again")
        };
        let looks = *looks.lock().expect("nobody panics");
        (has_ended, looks, said.into_inner().expect("nobody panics"))
    }

    const AT_LIMIT: Seen = Seen::Uses { bytes: 100 };

    #[tokio::test]
    async fn who_uses_more_than_its_limit_is_found_out_and_who_uses_as_much_is_not() {
        let (has_ended, looks, said) =
            watched(&[Seen::Unnamed, AT_LIMIT, Seen::Uses { bytes: 101 }], |looks, _| looks == 1000).await;
        assert_eq!((has_ended, looks, said), (true, 3, Vec::new()));
        let (has_ended, _, said) = watched(&[AT_LIMIT], |looks, _| looks >= 300).await;
        assert_eq!((has_ended, said), (false, Vec::new()));
    }

    #[tokio::test]
    async fn where_nobody_can_tell_it_is_said() {
        let (has_ended, looks, said) = watched(&[Seen::Nothing], |_, said| said == 1).await;
        assert_eq!((has_ended, looks), (false, 1));
        assert_eq!(said.len(), 1, "{said:?}");
    }

    #[tokio::test]
    async fn a_process_that_the_driver_never_names_is_said_once_to_be_unwatched() {
        let (has_ended, _, said) = watched(&[Seen::Unnamed], |looks, _| looks >= 3 * UNNAMED_LOOKS as usize).await;
        assert!(!has_ended && said.len() == 1 && said[0].contains("does not name"), "{said:?}");
    }
}
