//! From the command line to settings that can be relied on. Everything that can be wrong is found here, before anything
//! is started, and said in one line.

use std::{
    net::{SocketAddr, ToSocketAddrs, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use mesh_transport::{KeyPair, Security, keys::KeyError};
use proto_msgs::{
    PublicKey,
    limits::{ATTEMPTS_MAX, ENDPOINTS_MAX, LABELS_MAX, NAME_BYTES_MAX},
};

use crate::args::{EngineChoice, RunArgs};

/// Heartbeats faster than this only make heat.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

/// Heartbeats slower than this make a dead worker go unnoticed for minutes.
const HEARTBEAT_MAX: Duration = Duration::from_secs(60);

/// Space for blobs if nobody says otherwise and the disk is large.
pub(crate) const QUOTA_DEFAULT_BYTES: u64 = 10 << 30;

/// Settings.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) broker: String,
    pub(crate) broker_key: Option<PublicKey>,
    pub(crate) security: Security,
    pub(crate) state_dir: PathBuf,
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) heartbeat: Duration,
    pub(crate) slots: u16,
    pub(crate) engine: EngineChoice,
    pub(crate) docker_host: Option<String>,
    pub(crate) image: String,
    pub(crate) runner: Option<PathBuf>,
    pub(crate) warm_max: usize,
    pub(crate) quota_bytes: Option<u64>,
    pub(crate) memory_limit_bytes: Option<u64>,
    pub(crate) run_limit: Duration,
    pub(crate) drain_wait: Duration,
    /// Where to listen; `None`: nowhere.
    pub(crate) data_bind: Option<String>,
    pub(crate) advertise: Vec<String>,
}

/// What is wrong with the settings.
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
    /// Checks what was given and fills in what was not.
    pub(crate) fn new(args: RunArgs) -> Result<Self, ConfigError> {
        let (host, _) = host_and_port(&args.broker)
            .ok_or_else(|| wrong("broker", &args.broker, "write tcp://HOST:PORT, such as tcp://10.0.0.1:5555"))?;
        let is_local = matches!(host, "localhost" | "[::1]") || host.starts_with("127.");
        let any_port = if is_local { "tcp://127.0.0.1:0" } else { "tcp://0.0.0.0:0" };
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u16);
        let slots = args.slots.unwrap_or(cores);
        if slots == 0 || usize::from(slots) > ATTEMPTS_MAX {
            return Err(wrong("slots", slots, format!("use 1 to {ATTEMPTS_MAX}")));
        }
        if !(HEARTBEAT_MIN..=HEARTBEAT_MAX).contains(&args.heartbeat) {
            let range = format!("use {} ms to {} s", HEARTBEAT_MIN.as_millis(), HEARTBEAT_MAX.as_secs());
            return Err(wrong("heartbeat", format!("{:?}", args.heartbeat), range));
        }
        if args.advertise.len() > ENDPOINTS_MAX {
            return Err(wrong("advertise", args.advertise.len(), format!("at most {ENDPOINTS_MAX} addresses")));
        }
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
        let data_bind = (!args.no_listen).then(|| args.data_bind.unwrap_or_else(|| any_port.to_owned()));
        if let Some(bind) = data_bind.as_ref().filter(|bind| host_and_port(bind).is_none()) {
            return Err(wrong("data-bind", bind, "write tcp://ADDRESS:PORT; port 0 takes a free one"));
        }
        Ok(Self {
            broker: args.broker,
            broker_key,
            security,
            state_dir: args.state_dir.or_else(default_state_dir).ok_or(ConfigError::NoHome)?,
            name,
            labels: args.labels,
            heartbeat: args.heartbeat,
            slots,
            engine: args.engine,
            docker_host: args.docker_host,
            image: args.image,
            runner: args.runner,
            warm_max: args.warm.unwrap_or_else(|| usize::from(slots).max(2)),
            quota_bytes: args.quota,
            memory_limit_bytes: args.memory_limit,
            run_limit: args.run_limit,
            drain_wait: args.drain_wait,
            data_bind,
            advertise: args.advertise,
        })
    }

    /// Where clients are told to connect, given where the door really listens.
    pub(crate) fn endpoints(&self, bound: Option<&str>) -> Vec<String> {
        let Some((_, port)) = bound.and_then(host_and_port) else { return Vec::new() };
        // The host as it was given: what the system makes of it may be written in a form that few understand.
        let Some((host, _)) = self.data_bind.as_deref().and_then(host_and_port) else { return Vec::new() };
        if !self.advertise.is_empty() {
            return self.advertise.iter().map(|address| advertised(address, port)).collect();
        }
        if !matches!(host, "0.0.0.0" | "[::]" | "*") {
            return vec![format!("tcp://{host}:{port}")];
        }
        // The address by which this machine reaches the broker is the one by which it is most likely reached.
        let own = local_address_towards(&self.broker).map_or_else(
            || self.name.clone(),
            |address| match address {
                SocketAddr::V4(address) => address.ip().to_string(),
                SocketAddr::V6(address) => format!("[{}]", address.ip()),
            },
        );
        vec![format!("tcp://{own}:{port}")]
    }
}

/// `HOST`, `HOST:PORT` or a whole endpoint, as an endpoint.
fn advertised(address: &str, bound_port: &str) -> String {
    let address = address.strip_prefix("tcp://").unwrap_or(address);
    let has_port = address
        .rsplit_once(':')
        .is_some_and(|(host, port)| port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')));
    if has_port { format!("tcp://{address}") } else { format!("tcp://{address}:{bound_port}") }
}

/// Host and port of `tcp://HOST:PORT`.
fn host_and_port(endpoint: &str) -> Option<(&str, &str)> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    let is_port = port == "*" || port.parse::<u16>().is_ok();
    (is_port && !host.is_empty()).then_some((host, port))
}

/// The own end of the route; nothing is sent.
fn local_address_towards(endpoint: &str) -> Option<SocketAddr> {
    let remote = endpoint.strip_prefix("tcp://")?.to_socket_addrs().ok()?.next()?;
    let any = if remote.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(remote).ok()?;
    socket.local_addr().ok()
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
    fn advertised_addresses_take_the_bound_port_unless_they_name_one() {
        let config = config(&["--advertise", "edge7", "--advertise", "edge7:81", "--advertise", "[2001:db8::1]"]);
        let endpoints = config.expect("addresses").endpoints(Some("tcp://0.0.0.0:7000"));
        assert_eq!(endpoints, ["tcp://edge7:7000", "tcp://edge7:81", "tcp://[2001:db8::1]:7000"]);
    }

    #[test]
    fn a_worker_behind_nat_has_no_address() {
        let config = config(&["--no-listen"]).expect("no door");
        assert_eq!(config.data_bind, None);
        assert!(config.endpoints(None).is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_flag() {
        for (args, flag) in [
            (["--broker", "cloud:5555"], "--broker"),
            (["--slots", "0"], "--slots"),
            (["--heartbeat", "1ms"], "--heartbeat"),
            (["--data-bind", "tcp://eth0"], "--data-bind"),
            (["--key-file", "/nowhere"], "--key-file"),
        ] {
            let error = config(&args).expect_err("bad").to_string();
            assert!(error.contains(flag), "{error}");
        }
    }
}
