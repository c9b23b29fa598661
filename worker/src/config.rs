//! Turns the command line into checked settings. All mistakes are found here, before anything starts, and reported in
//! one line.

use std::{path::PathBuf, time::Duration};

use mesh_core::worker::headroom::Headroom;
use mesh_transport::{KeyPair, Security, address, keys::KeyError};
use proto_msgs::{
    PublicKey,
    limits::{
        DEVICE_MAP_MAX, ENDPOINTS_MAX, GPUS_MAX, HEARTBEAT_MS_MAX, ITEMS_MAX, LABELS_MAX, NAME_BYTES_MAX, SLOTS_MAX,
    },
    units::show_bytes,
};

use crate::args::{EngineChoice, RunArgs};

/// Shortest interval between heartbeats; a shorter one only makes heat.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

/// Longest interval between heartbeats that a broker accepts.
const HEARTBEAT_MAX: Duration = Duration::from_millis(HEARTBEAT_MS_MAX as u64);

/// Shortest limit of a call: less than any model takes, but enough to tell a limit from a slip.
const RUN_LIMIT_MIN: Duration = Duration::from_millis(1);

/// Smallest memory limit: a runner takes about as much for its runtime alone.
const MEMORY_LIMIT_MIN_BYTES: u64 = 64 << 20;

/// Smallest quota: room for a model of a few layers and its inputs.
const QUOTA_MIN_BYTES: u64 = 1 << 20;

/// Default quota for blobs on a large disk.
pub(crate) const QUOTA_DEFAULT_BYTES: u64 = 10 << 30;

/// The worker's settings, checked and complete.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) broker: String,
    pub(crate) broker_key: Option<PublicKey>,
    pub(crate) security: Security,
    pub(crate) state_dir: PathBuf,
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) heartbeat: Duration,
    /// Slots per lane, in the order of the lanes.
    pub(crate) slots: [u16; 2],
    pub(crate) device_map: Vec<i16>,
    pub(crate) device_width: u16,
    /// Most items in one packed batch.
    pub(crate) pack_max: u16,
    pub(crate) headroom: Headroom,
    pub(crate) engine: EngineChoice,
    pub(crate) docker_host: Option<String>,
    pub(crate) image: String,
    pub(crate) runner: Option<PathBuf>,
    pub(crate) warm_max: usize,
    pub(crate) quota_bytes: Option<u64>,
    pub(crate) memory_limit_bytes: Option<u64>,
    pub(crate) run_limit: Duration,
    pub(crate) drain_wait: Duration,
    pub(crate) keep_results: Duration,
    /// Endpoint to listen on; `None` to listen nowhere.
    pub(crate) data_bind: Option<String>,
    pub(crate) advertise: Vec<String>,
}

/// Why the settings are not usable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("--{flag} {value}: {reason}")]
    Flag { flag: &'static str, value: String, reason: String },
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("--broker-key and --key-file belong together: give both, or none for a mesh without keys")]
    HalfKeys,
    #[error("no home folder for the state: give --state-dir")]
    NoHome,
}

impl Config {
    /// Checks the given settings and fills in defaults.
    pub(crate) fn new(args: RunArgs) -> Result<Self, ConfigError> {
        let broker = address::completed(&args.broker);
        let (host, _) = address::parts(&broker)
            .filter(|_| address::can_be_dialled(&broker))
            .ok_or_else(|| wrong("broker", &args.broker, "write tcp://HOST:PORT, such as tcp://10.0.0.1:5555"))?;
        let is_local = matches!(host, "localhost" | "[::1]") || host.starts_with("127.");
        let any_port = if is_local { "tcp://127.0.0.1:0" } else { "tcp://0.0.0.0:0" };
        let slots = slots_of_lanes(&args)?;
        check_devices(&args)?;
        if args.pack_max == 0 || u32::from(args.pack_max) > ITEMS_MAX {
            return Err(wrong("pack-max", args.pack_max, format!("use 1 to {ITEMS_MAX}; 1 switches packing off")));
        }
        if !(HEARTBEAT_MIN..=HEARTBEAT_MAX).contains(&args.heartbeat) {
            let range = format!("use {} ms to {} s", HEARTBEAT_MIN.as_millis(), HEARTBEAT_MAX.as_secs());
            return Err(wrong("heartbeat", format!("{:?}", args.heartbeat), range));
        }
        check_limits(&args)?;
        check_advertised(&args.advertise)?;
        let name = args.name.unwrap_or_else(host_name);
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(wrong("name", name, format!("use 1 to {NAME_BYTES_MAX} bytes")));
        }
        let too_long = |text: &String| text.len() > NAME_BYTES_MAX;
        if args.labels.len() > LABELS_MAX || args.labels.iter().any(|(key, value)| too_long(key) || too_long(value)) {
            let range = format!("at most {LABELS_MAX} labels of at most {NAME_BYTES_MAX} bytes");
            return Err(wrong("label", args.labels.len(), range));
        }
        let (security, broker_key) = keys(args.key_file, args.broker_key)?;
        let data_bind = (!args.no_listen)
            .then(|| args.data_bind.map_or_else(|| any_port.to_owned(), |told| address::completed(&told)));
        if let Some(bind) = data_bind.as_ref().filter(|bind| !address::can_be_bound(bind)) {
            return Err(wrong("data-bind", bind, "write tcp://ADDRESS:PORT; port 0 takes a free one"));
        }
        Ok(Self {
            broker,
            broker_key,
            security,
            state_dir: args.state_dir.or_else(default_state_dir).ok_or(ConfigError::NoHome)?,
            name,
            labels: args.labels,
            heartbeat: args.heartbeat,
            slots,
            device_map: args.device_map,
            device_width: args.device_width,
            pack_max: args.pack_max,
            headroom: args.cpu_headroom,
            engine: args.engine,
            docker_host: args.docker_host,
            image: args.image,
            runner: args.runner,
            warm_max: args.warm.unwrap_or_else(|| usize::from(slots[0] + slots[1]).max(2)),
            quota_bytes: args.quota,
            memory_limit_bytes: args.memory_limit,
            run_limit: args.run_limit,
            drain_wait: args.drain_wait,
            keep_results: args.keep_results,
            data_bind,
            advertise: args.advertise,
        })
    }

    /// The endpoints announced to clients, given the endpoint that the door listens on.
    pub(crate) fn endpoints(&self, bound: Option<&str>) -> Vec<String> {
        let Some((_, port)) = bound.and_then(address::parts) else { return Vec::new() };
        // The host as it was given: the system's form of it may be hard to read for people.
        let Some((host, _)) = self.data_bind.as_deref().and_then(address::parts) else { return Vec::new() };
        if !self.advertise.is_empty() {
            return self.advertise.iter().filter_map(|told| address::advertised(told, port)).collect();
        }
        if !matches!(host, "0.0.0.0" | "[::]" | "*") {
            return vec![format!("tcp://{host}:{port}")];
        }
        // Clients most likely reach this machine by the address from which it reaches the broker.
        let own = address::own_towards(&self.broker);
        vec![own.map_or_else(|| format!("tcp://{}:{port}", self.name), |own| address::of_ip(own, port))]
    }
}

/// Slots per lane: half each, an odd one for the batch lane, whose idle slots both lanes may use.
fn slots_of_lanes(args: &RunArgs) -> Result<[u16; 2], ConfigError> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(SLOTS_MAX) as u16);
    let slots = args.slots.unwrap_or(cores);
    let realtime = args.realtime_slots.unwrap_or(slots / 2);
    let batch = args.batch_slots.unwrap_or(slots - slots / 2);
    let sum = usize::from(realtime) + usize::from(batch);
    if (1..=SLOTS_MAX).contains(&sum) {
        return Ok([realtime, batch]);
    }
    let flag = if args.realtime_slots.or(args.batch_slots).is_some() { "realtime-slots" } else { "slots" };
    Err(wrong(flag, sum, format!("use 1 to {SLOTS_MAX}, both lanes together")))
}

/// Refuses limits under which no model could ever run.
fn check_limits(args: &RunArgs) -> Result<(), ConfigError> {
    if args.run_limit < RUN_LIMIT_MIN {
        let range = format!("use {} ms or more, such as 5m", RUN_LIMIT_MIN.as_millis());
        return Err(wrong("run-limit", format!("{:?}", args.run_limit), range));
    }
    let sizes = [
        ("memory-limit", args.memory_limit, MEMORY_LIMIT_MIN_BYTES, "1GiB"),
        ("quota", args.quota, QUOTA_MIN_BYTES, "10GiB"),
    ];
    for (flag, given, min_bytes, usual) in sizes {
        if let Some(bytes) = given.filter(|bytes| *bytes < min_bytes) {
            let range = format!("use {} or more, such as {usual}", show_bytes(min_bytes));
            return Err(wrong(flag, show_bytes(bytes), range));
        }
    }
    Ok(())
}

/// Refuses addresses that no client could dial.
fn check_advertised(advertise: &[String]) -> Result<(), ConfigError> {
    if advertise.len() > ENDPOINTS_MAX {
        return Err(wrong("advertise", advertise.len(), format!("at most {ENDPOINTS_MAX} addresses")));
    }
    // Completed with the longest port.
    let fits = |told: &&String| address::advertised(told, "65535").is_some_and(|all| all.len() <= NAME_BYTES_MAX);
    match advertise.iter().find(|told| !fits(told)) {
        Some(told) => Err(wrong("advertise", format!("'{told}'"), address::ADVERTISED_FORM)),
        None => Ok(()),
    }
}

fn check_devices(args: &RunArgs) -> Result<(), ConfigError> {
    let map = &args.device_map;
    let shown = || map.iter().map(i16::to_string).collect::<Vec<_>>().join(",");
    if map.is_empty() || map.len() > DEVICE_MAP_MAX {
        return Err(wrong("device-map", shown(), format!("name 1 to {DEVICE_MAP_MAX} devices")));
    }
    if !map.iter().all(|device| (-1..GPUS_MAX as i16).contains(device)) {
        return Err(wrong("device-map", shown(), format!("use -1 for the processor, 0 to {} for GPUs", GPUS_MAX - 1)));
    }
    if args.device_width == 0 || usize::from(args.device_width) > SLOTS_MAX {
        return Err(wrong("device-width", args.device_width, format!("use 1 to {SLOTS_MAX}")));
    }
    Ok(())
}

fn keys(own: Option<PathBuf>, broker: Option<String>) -> Result<(Security, Option<PublicKey>), ConfigError> {
    match (own, broker) {
        (None, None) => Ok((Security::None, None)),
        (Some(own), Some(broker)) => {
            let pair = KeyPair::load(&own)?;
            Ok((Security::Keys(pair), Some(mesh_transport::keys::read_public(&broker)?)))
        }
        _ => Err(ConfigError::HalfKeys),
    }
}

fn default_state_dir() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("mesh/worker"))
}

fn host_name() -> String {
    sysinfo::System::host_name().unwrap_or_else(|_| "worker".to_owned())
}

fn wrong(flag: &'static str, value: impl ToString, reason: impl Into<String>) -> ConfigError {
    ConfigError::Flag { flag, value: value.to_string(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn config(args: &[&str]) -> Result<Config, ConfigError> {
        let cli = Cli::try_parse_from(["mesh-worker"].iter().chain(args)).expect("well-formed");
        Config::new(cli.run)
    }

    #[test]
    fn a_local_mesh_listens_on_loopback_and_another_on_all_addresses() {
        let local = config(&[]).expect("defaults");
        assert_eq!(local.data_bind.as_deref(), Some("tcp://127.0.0.1:0"));
        assert_eq!(local.endpoints(Some("tcp://[::ffff:127.0.0.1]:7000")), ["tcp://127.0.0.1:7000"]);
        let wide = config(&["--broker", "tcp://192.0.2.1:5555"]).expect("another machine");
        assert_eq!(wide.data_bind.as_deref(), Some("tcp://0.0.0.0:0"));
        assert!(wide.endpoints(Some("tcp://0.0.0.0:7000"))[0].ends_with(":7000"));
    }

    #[test]
    fn clients_are_told_what_is_advertised() {
        let config = config(&["--advertise", "edge7", "--advertise", "edge7:81"]).expect("addresses");
        assert_eq!(config.endpoints(Some("tcp://0.0.0.0:7000")), ["tcp://edge7:7000", "tcp://edge7:81"]);
    }

    #[test]
    fn the_scheme_of_an_address_may_be_left_away_as_for_clients() {
        let config = config(&["--broker", "192.0.2.1:5555", "--data-bind", "127.0.0.1:7000"]).expect("addresses");
        assert_eq!(config.broker, "tcp://192.0.2.1:5555");
        assert_eq!(config.data_bind.as_deref(), Some("tcp://127.0.0.1:7000"));
    }

    #[test]
    fn a_worker_behind_nat_has_no_address() {
        let config = config(&["--no-listen"]).expect("no door");
        assert_eq!(config.data_bind, None);
        assert!(config.endpoints(None).is_empty());
    }

    #[test]
    fn slots_are_halved_between_the_lanes_unless_they_are_told() {
        let slots = |args: &[&str]| config(args).expect("slots").slots;
        assert_eq!(slots(&["--slots", "1"]), [0, 1]);
        assert_eq!(slots(&["--slots", "5"]), [2, 3]);
        assert_eq!(slots(&["--realtime-slots", "4", "--batch-slots", "0"]), [4, 0]);
        let args = ["mesh-worker", "--slots", "2", "--batch-slots", "1"];
        assert!(Cli::try_parse_from(args).is_err(), "two ways to say it");
    }

    #[test]
    fn a_device_map_names_the_processor_and_gpus() {
        assert_eq!(config(&[]).expect("defaults").device_map, [-1]);
        assert_eq!(config(&["--device-map", "-1,0,1"]).expect("devices").device_map, [-1, 0, 1]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_flag() {
        for (args, flag) in [
            (["--broker", "cloud"], "--broker"),
            (["--advertise", "a:b:c"], "--advertise 'a:b:c': write HOST or HOST:PORT"),
            (["--slots", "0"], "--slots"),
            (["--device-map", "-2"], "--device-map"),
            (["--device-width", "0"], "--device-width"),
            (["--heartbeat", "1ms"], "--heartbeat"),
            (["--run-limit", "0s"], "--run-limit 0ns: use 1 ms or more"),
            (["--memory-limit", "0B"], "--memory-limit 0 B: use 64.0 MiB or more"),
            (["--quota", "0B"], "--quota 0 B: use 1.0 MiB or more"),
            (["--data-bind", "tcp://eth0"], "--data-bind"),
            (["--key-file", "/nowhere"], "--key-file"),
        ] {
            let error = config(&args).expect_err("bad").to_string();
            assert!(error.contains(flag), "{error}");
        }
    }
}
