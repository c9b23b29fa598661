//! The probe: measures processor, memory, network, temperature and GPUs of the machine.
//!
//! Runs on its own thread, because some sensors and drivers are slow. Never fails: a value that the system does not
//! provide stays zero or `None`. Never refreshes everything (`refresh_all` costs 8–16 ms, a sample here 0.2 ms).

mod gpu;

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use proto_msgs::{Gpu, Load};
use sysinfo::{Components, Networks, System};

use self::gpu::Gpus;

/// Files of a Raspberry Pi's vendor kernel with its throttle bits, in hexadecimal. The folder differs by model.
const THROTTLE_FILES: [&str; 2] = [
    "/sys/devices/platform/soc/soc:firmware/get_throttled",
    "/sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled",
];

/// Interval of sensor reads: values change slowly, and some sensors take milliseconds.
const SENSORS_EVERY: Duration = Duration::from_secs(5);

/// The sources of measurements, and the state between two samples.
pub(crate) struct Probe {
    state_dir: PathBuf,
    system: Option<System>,
    networks: Option<Networks>,
    sensors: Option<Components>,
    sensors_at: Option<Instant>,
    throttle_file: Option<PathBuf>,
    gpus: Gpus,
    last: Instant,
}

/// Properties of the machine that do not change while the worker runs.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// Processors that this process may use.
    pub(crate) cores: u32,
    /// Bytes of memory that this process may use: of the machine, or of its container.
    pub(crate) memory_bytes: u64,
    /// The machine's GPUs.
    pub(crate) gpus: Vec<Gpu>,
    /// Name of the operating system, for people.
    pub(crate) os: String,
}

impl Probe {
    /// Finds what can be measured. Disk space is that of `state_dir`'s file system.
    pub(crate) fn new(state_dir: PathBuf) -> Self {
        Self {
            state_dir,
            system: System::new().ok(),
            networks: Networks::new_with_refreshed_list().ok(),
            sensors: Components::new().ok(),
            sensors_at: None,
            throttle_file: THROTTLE_FILES.map(PathBuf::from).into_iter().find(|path| path.exists()),
            gpus: Gpus::find(),
            last: Instant::now(),
        }
    }

    /// Measures the properties that do not change.
    pub(crate) fn machine(&mut self) -> Machine {
        let (memory_bytes, _) = self.memory_total_and_free_bytes();
        Machine {
            cores: thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            memory_bytes,
            gpus: self.gpus.list(),
            os: System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_owned()),
        }
    }

    /// Measures the load. Rates cover the time since the last call.
    pub(crate) fn sample(&mut self) -> Load {
        let elapsed = self.last.elapsed();
        self.last = Instant::now();
        let (_, memory_available_bytes) = self.memory_total_and_free_bytes();
        let (received_bytes, sent_bytes) = self.network_bytes();
        Load {
            cpu_permille: self.cpu_permille(),
            load1_milli: System::load_average().map_or(0, |load| (load.one.max(0.0) * 1000.0) as u32),
            memory_available_bytes,
            disk_free_bytes: self.disk_free_bytes(),
            net_rx_bytes_per_s: per_second(received_bytes, elapsed),
            net_tx_bytes_per_s: per_second(sent_bytes, elapsed),
            temperature_milli_c: self.temperature_milli_c(),
            throttled_bits: self.throttled_bits(),
            gpus: self.gpus.load(),
        }
    }

    fn cpu_permille(&mut self) -> u16 {
        let Some(system) = &mut self.system else { return 0 };
        system.refresh_cpu_usage();
        let percent = system.global_cpu_usage();
        // Without /proc, the library divides zero by zero.
        if percent.is_finite() { (percent * 10.0).clamp(0.0, 1000.0) as u16 } else { 0 }
    }

    fn memory_total_and_free_bytes(&mut self) -> (u64, u64) {
        let Some(system) = &mut self.system else { return (0, 0) };
        system.refresh_memory();
        let (total, available) = (system.total_memory(), system.available_memory());
        match system.cgroup_limits() {
            // Inside a container, the container's limit counts, not the machine's size.
            Some(limits) if limits.total_memory > 0 && limits.total_memory < total => {
                (limits.total_memory, available.min(limits.free_memory))
            }
            _ => (total, available),
        }
    }

    fn network_bytes(&mut self) -> (u64, u64) {
        let Some(networks) = &mut self.networks else { return (0, 0) };
        networks.refresh(true);
        networks.values().fold((0, 0), |(received, sent), interface| {
            (received + interface.received(), sent + interface.transmitted())
        })
    }

    fn temperature_milli_c(&mut self) -> Option<i32> {
        let sensors = self.sensors.as_mut()?;
        if self.sensors_at.is_none_or(|at| at.elapsed() >= SENSORS_EVERY) {
            self.sensors_at = Some(Instant::now());
            sensors.refresh(true);
        }
        let hottest = sensors.iter().filter_map(|sensor| sensor.temperature()).fold(f32::NAN, f32::max);
        hottest.is_finite().then_some((hottest * 1000.0) as i32)
    }

    fn throttled_bits(&self) -> Option<u32> {
        parse_hex(&fs::read_to_string(self.throttle_file.as_ref()?).ok()?)
    }

    fn disk_free_bytes(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.state_dir)
            .map_or(0, |stat| stat.blocks_available().saturating_mul(stat.fragment_size()))
    }
}

/// Triggers the next sample at once: when a model has arrived, the broker should know before the next task.
#[derive(Debug, Default)]
pub(crate) struct Look {
    wanted: Mutex<bool>,
    now: Condvar,
}

impl Look {
    /// Ends the wait for the next sample.
    pub(crate) fn at_once(&self) {
        *self.wanted.lock() = true;
        self.now.notify_one();
    }

    /// Waits until a sample is wanted, at most for `time`.
    pub(crate) fn wait(&self, time: Duration) {
        let mut wanted = self.wanted.lock();
        let _ = self.now.wait_while_for(&mut wanted, |wanted| !*wanted, time);
        *wanted = false;
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> u64 {
    let micros = elapsed.as_micros().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

fn parse_hex(text: &str) -> Option<u32> {
    let text = text.trim();
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_describes_this_machine() {
        let mut probe = Probe::new(std::env::temp_dir());
        let machine = probe.machine();
        let load = probe.sample();
        assert!(machine.cores >= 1 && machine.memory_bytes > 0);
        assert!(load.memory_available_bytes > 0 && load.memory_available_bytes <= machine.memory_bytes);
        assert!(load.disk_free_bytes > 0 && load.cpu_permille <= 1000);
        assert_eq!(load.gpus.len(), machine.gpus.len());
    }

    #[test]
    fn a_raspberry_pi_that_is_throttled_says_so_in_every_sample() {
        let firmware = tempfile::NamedTempFile::new().expect("a file");
        let mut probe = Probe::new(std::env::temp_dir());
        probe.throttle_file = Some(firmware.path().to_owned());
        for (text, bits) in [("0x0\n", Some(0)), ("50005\n", Some(0x50005)), ("", None)] {
            fs::write(firmware.path(), text).expect("written");
            assert_eq!(probe.sample().throttled_bits, bits, "{text:?}");
        }
    }

    #[test]
    fn throttle_bits_are_hexadecimal() {
        assert_eq!(parse_hex("50005\n"), Some(0x50005));
        assert_eq!(parse_hex("0x4"), Some(4));
        assert_eq!(parse_hex("no"), None);
    }

    #[test]
    fn a_rate_over_no_time_is_no_panic() {
        assert_eq!(per_second(10, Duration::ZERO), 10_000_000);
        assert_eq!(per_second(3000, Duration::from_secs(2)), 1500);
    }
}
