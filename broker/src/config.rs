//! Owns the settings made from the flags, and every check that is possible before anything is opened. Each error names
//! the flag and what to write instead.

use std::{
    collections::BTreeMap,
    env, fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_core::broker;
use mesh_transport::{
    Security,
    keys::{AuthorizedKeys, KeyError, KeyPair},
};
use proto_msgs::{ClientId, Epoch};

use crate::{
    args::Serve,
    store::{RedisAddressError, RedisSettings, StoreSettings},
};

/// Longest name of a mesh; it is part of every key in Redis.
const CLUSTER_BYTES_MAX: usize = 64;

/// Checked settings of the broker.
#[derive(Debug)]
pub struct Config {
    /// Address for workers and clients.
    pub bind: String,
    /// Address of the admin port; `None` without one.
    pub admin: Option<SocketAddr>,
    /// The store of tasks.
    pub store: StoreSettings,
    /// Longest wait at the start for a store that does not answer.
    pub store_wait: Duration,
    /// The broker's own keys.
    pub security: Security,
    /// Keys that may connect; `None` in a mesh without keys.
    pub authorized: Option<AuthorizedKeys>,
    /// The machine's settings.
    pub machine: broker::Config,
}

/// Why flags or files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The value of `--admin` is not an address.
    #[error("--admin {0} is not an address: write IP:PORT, like 127.0.0.1:9090, or none")]
    Admin(String),
    /// The value of `--cluster` is not a name.
    #[error("--cluster '{0}': write up to {CLUSTER_BYTES_MAX} letters, digits, dots, dashes and underscores")]
    Cluster(String),
    /// There is no folder for the state.
    #[error("there is no home folder for the state: name a folder with --state-dir")]
    NoHome,
    /// A key cannot be used.
    #[error("{flag}: {source}")]
    Key {
        /// The flag that names the key.
        flag: &'static str,
        /// What is wrong with it.
        source: KeyError,
    },
    /// The value of `--redis` is not an address.
    #[error("--redis: {0}")]
    Redis(#[from] RedisAddressError),
    /// Two `--tenant` flags name the same client.
    #[error("--tenant names {0} twice: leave one of them out")]
    TenantTwice(ClientId),
    /// A limit of 0, with which the broker serves nobody.
    #[error("{flag} 0 would refuse every {what}: write 1 or more")]
    Zero {
        /// The flag.
        flag: &'static str,
        /// What there would be none of.
        what: &'static str,
    },
    /// The flag would have no effect.
    #[error("--redis-ca is for rediss:// servers: name one with --redis")]
    CaWithoutRedis,
}

impl Config {
    /// Checks the flags and reads the key files.
    ///
    /// # Errors
    /// The first flag or file that cannot be used.
    pub fn new(flags: &Serve) -> Result<Self, ConfigError> {
        let bad_admin = || ConfigError::Admin(flags.admin.clone());
        let admin = (flags.admin != "none").then(|| flags.admin.parse().map_err(|_| bad_admin())).transpose()?;
        let key_error = |flag| move |source| ConfigError::Key { flag, source };
        let keys = flags.keys.key_file.as_deref().map(KeyPair::load).transpose().map_err(key_error("--key-file"))?;
        let authorized = flags.keys.authorized_keys.as_deref().map(AuthorizedKeys::load).transpose();
        let authorized = authorized.map_err(key_error("--authorized-keys"))?;
        for (flag, limit, what) in [
            ("--queue-max", flags.tuning.queue_max, "task"),
            ("--tasks-max", flags.tuning.tasks_max, "task"),
            ("--workers-max", flags.tuning.workers_max, "worker"),
        ] {
            if limit == 0 {
                return Err(ConfigError::Zero { flag, what });
            }
        }
        let epoch = Epoch(unix_ms());
        let store = store_settings(flags, epoch)?;
        let (tuning, scheduling) = (&flags.tuning, &flags.scheduling);
        let machine = broker::Config {
            // Set again when the clock of the run loop starts.
            origin_unix_ms: epoch.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_name: store.name().to_owned(),
            encrypted: keys.is_some(),
            liveness_beats: tuning.heartbeat_liveness,
            grant_wait: tuning.grant_wait,
            client_silence: tuning.client_silence,
            detached_patience: tuning.detached_patience,
            ended_kept: tuning.keep_ended,
            attempts_max: tuning.attempts_max,
            queue_max: tuning.queue_max,
            tasks_max: tuning.tasks_max,
            workers_max: tuning.workers_max,
            policy: scheduling.policy,
            realtime_items_max: scheduling.realtime_items_max,
            weights: broker::Weights {
                priority_milli: scheduling.weight_priority.0,
                wait_milli: scheduling.weight_wait.0,
                data_milli: scheduling.weight_data.0,
                share_milli: scheduling.weight_share.0,
            },
            tenants: tenants(&scheduling.tenant)?,
            tenant_default: scheduling.tenant_default,
            shows_workers: store.shows_workers(),
            ..broker::Config::default()
        };
        Ok(Self {
            bind: flags.bind.clone(),
            admin,
            store,
            store_wait: flags.redis.store_wait,
            security: keys.map_or(Security::None, Security::Keys),
            authorized,
            machine,
        })
    }

    /// Whether any peer outside this machine may connect without a key.
    pub fn is_open_to_the_network(&self) -> bool {
        matches!(self.security, Security::None) && !is_loopback(&self.bind)
    }
}

/// Limits of each named client. A client that is named twice is an error.
fn tenants(named: &[(ClientId, broker::Tenant)]) -> Result<BTreeMap<ClientId, broker::Tenant>, ConfigError> {
    let mut tenants = BTreeMap::new();
    for (client, tenant) in named {
        if tenants.insert(*client, *tenant).is_some() {
            return Err(ConfigError::TenantTwice(*client));
        }
    }
    Ok(tenants)
}

fn store_settings(flags: &Serve, epoch: Epoch) -> Result<StoreSettings, ConfigError> {
    let cluster = flags.cluster.clone();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if cluster.is_empty() || cluster.len() > CLUSTER_BYTES_MAX || !cluster.bytes().all(is_name) {
        return Err(ConfigError::Cluster(cluster));
    }
    let Some(url) = &flags.redis.redis else {
        if flags.redis.redis_ca.is_some() {
            return Err(ConfigError::CaWithoutRedis);
        }
        let folder = flags.state_dir.clone().or_else(default_state_dir).ok_or(ConfigError::NoHome)?;
        return Ok(StoreSettings::Embedded(folder));
    };
    let holder = format!("mesh-broker {} at {}, process {}, epoch {}", flags.bind, host_name(), process::id(), epoch.0);
    Ok(StoreSettings::Redis(Box::new(RedisSettings {
        address: url.parse()?,
        root_cert: flags.redis.redis_ca.clone(),
        cluster,
        holder,
    })))
}

fn default_state_dir() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("mesh/broker"))
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "an unnamed host".to_owned() } else { name.trim().to_owned() }
}

fn is_loopback(endpoint: &str) -> bool {
    let place = endpoint.strip_prefix("tcp://").unwrap_or(endpoint);
    let host = place.rsplit_once(':').map_or(place, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host == "lo" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The wall clock, milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Arguments;

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let arguments = Arguments::parse_from(["mesh-broker"].iter().chain(flags));
        Config::new(&arguments.serve)
    }

    #[test]
    fn every_complaint_names_the_flag_and_what_to_write() {
        for (flags, parts) in [
            (&["--admin", "9090"][..], ["--admin 9090", "127.0.0.1:9090"]),
            (&["--cluster", "my mesh"], ["--cluster 'my mesh'", "letters"]),
            (&["--redis", "localhost"], ["--redis", "redis://"]),
            (&["--redis-ca", "ca.pem"], ["--redis-ca", "--redis"]),
            (
                &[
                    "--tenant=018f3c5e-0000-7000-8000-00000000000a=60",
                    "--tenant=018f3c5e-0000-7000-8000-00000000000a=70:2",
                ],
                ["--tenant", "twice"],
            ),
            (&["--queue-max", "0"], ["--queue-max 0 would refuse every task", "write 1 or more"]),
            (&["--tasks-max", "0"], ["--tasks-max 0 would refuse every task", "write 1 or more"]),
            (&["--workers-max", "0"], ["--workers-max 0 would refuse every worker", "write 1 or more"]),
            (&["--key-file", "/nowhere/key", "--authorized-keys", "/nowhere/list"], ["--key-file", "/nowhere/key"]),
        ] {
            let complaint = config(flags).unwrap_err().to_string();
            assert!(parts.iter().all(|part| complaint.contains(part)), "{complaint}");
            assert!(!complaint.contains('\n'));
        }
    }

    #[test]
    fn every_flag_of_the_schedule_reaches_the_machine_in_its_own_place() {
        let flags = [
            "--weight-priority=1.5",
            "--weight-wait=2.25",
            "--weight-data=0.125",
            "--weight-share=3",
            "--tenant=018f3c5e-0000-7000-8000-00000000000a=60:2.5",
            "--tenant-default=80:0.5",
            "--policy=round-robin",
            "--realtime-items-max=8",
            "--queue-max=11",
            "--state-dir=/x",
        ];
        let machine = config(&flags).unwrap().machine;
        let weights = broker::Weights { priority_milli: 1500, wait_milli: 2250, data_milli: 125, share_milli: 3000 };
        assert_eq!(machine.weights, weights);
        let named = "018f3c5e-0000-7000-8000-00000000000a".parse().unwrap();
        assert_eq!(machine.tenant(named), broker::Tenant { priority_max: 60, share_milli: 2500 });
        let other = ClientId::from_bytes([1; 16]);
        assert_eq!(machine.tenant(other), broker::Tenant { priority_max: 80, share_milli: 500 });
        assert_eq!((machine.policy, machine.realtime_items_max), (broker::Policy::RoundRobin, 8));
        assert_eq!(machine.queue_max, 11);
    }

    #[test]
    fn only_an_address_of_this_machine_is_closed_without_keys() {
        for (bind, open) in [
            ("tcp://127.0.0.1:5555", false),
            ("tcp://localhost:0", false),
            ("tcp://[::1]:5555", false),
            ("tcp://0.0.0.0:5555", true),
            ("tcp://*:5555", true),
            ("tcp://10.0.0.1:5555", true),
            ("127.0.0.1:5555", false),
            ("tcp://eth0:5555", true),
        ] {
            assert_eq!(
                config(&["--bind", bind, "--state-dir", "/x"]).unwrap().is_open_to_the_network(),
                open,
                "{bind}"
            );
        }
    }
}
