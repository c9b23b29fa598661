//! The command line and the environment of `mesh-broker`. Owns names, defaults and help texts. Never: their effect.

use std::{convert::Infallible, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use mesh_core::broker::{Policy, Tenant};
use proto_msgs::{ClientId, limits::PRIORITY_MAX, units};

/// Examples under `--help`.
const EXAMPLES: &str = "\
Examples:
  mesh-broker
      Serve this machine only, tasks remembered in the state folder
  mesh-broker --bind tcp://0.0.0.0:5555 --key-file broker.key --authorized-keys nodes.txt
      Serve the network, encrypted, to the nodes listed in nodes.txt
  mesh-broker --redis redis://localhost/0 --cluster attic
      Show the Metric Table in Redis: redis-cli HGETALL 'mesh:{attic}:worker:<id>'
  mesh-broker --tenant 018f3c5e-0000-7000-8000-00000000000a=100:2.5 --tenant-default 60
      One client may use priorities up to 100 and gets 2.5 shares; all others are capped at 60 and get one
  mesh-broker --realtime-items-max 8 --weight-wait 5
      Jobs of more than 8 items go to the batch lane; a second of waiting counts as five steps of priority
  mesh-broker keygen broker.key
      Make broker.key (keep it) and broker.key.pub (give it to workers and clients)

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 wrong usage, 78 wrong configuration (the message says what to write).";

/// The broker of the mesh: knows which workers are alive and have room, decides which one runs a task.
#[derive(Debug, Parser)]
#[command(name = "mesh-broker", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// A command other than serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Flags of the server.
    #[command(flatten)]
    pub serve: Serve,
}

/// Commands other than serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a key pair: FILE (secret) and FILE.pub
    Keygen {
        /// Where to write the secret key; must not exist
        file: PathBuf,
    },
    /// Print a completion script for this shell
    #[command(hide = true)]
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: Shell,
    },
}

/// Flags of the broker itself.
#[derive(Args, Debug)]
pub struct Serve {
    /// Where workers and clients connect; port 0 takes a free one and prints it
    #[arg(long, env = "MESH_BIND", value_name = "ENDPOINT", default_value = "tcp://127.0.0.1:5555", value_parser = parse_bind)]
    pub bind: String,

    /// Where /healthz, /readyz and /metrics are served (HTTP, no login: keep it inside), or `none`
    #[arg(long, env = "MESH_ADMIN", value_name = "ADDRESS", default_value = "127.0.0.1:9090")]
    pub admin: String,

    /// Folder for what must survive a restart (not used with --redis) [default: ~/.local/state/mesh/broker]
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Name of the mesh; one broker at a time serves it
    #[arg(long, env = "MESH_CLUSTER", value_name = "NAME", default_value = "default")]
    pub cluster: String,

    /// Log filter, as in RUST_LOG: `warn`, `info`, `mesh_broker=debug`
    #[arg(long, env = "RUST_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,

    /// How log lines look
    #[arg(long, env = "MESH_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// Keys.
    #[command(flatten)]
    pub keys: Keys,

    /// Redis.
    #[command(flatten)]
    pub redis: RedisFlags,

    /// Order and placement of tasks.
    #[command(flatten)]
    pub scheduling: Scheduling,

    /// Limits and times.
    #[command(flatten)]
    pub tuning: Tuning,
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object per line.
    Json,
}

/// Keys and admission.
#[derive(Args, Debug)]
#[command(next_help_heading = "Keys")]
pub struct Keys {
    /// The broker's secret key; all connections are encrypted
    #[arg(long, env = "MESH_KEY_FILE", value_name = "FILE", requires = "authorized_keys")]
    pub key_file: Option<PathBuf>,

    /// Public keys of the nodes that may connect, one per line; read again when changed
    #[arg(long, env = "MESH_AUTHORIZED_KEYS", value_name = "FILE", requires = "key_file")]
    pub authorized_keys: Option<PathBuf>,
}

/// Redis as the store, in place of the embedded one.
#[derive(Args, Debug)]
#[command(next_help_heading = "Redis")]
pub struct RedisFlags {
    /// Keep tasks and the Metric Table in Redis: redis://, rediss://, redis+sentinel://, redis+cluster://
    /// (a password is safer in the environment than on the command line)
    #[arg(long, env = "MESH_REDIS", value_name = "URL", hide_env_values = true)]
    pub redis: Option<String>,

    /// Certificate authority (PEM) of rediss:// servers, in place of the system's
    #[arg(long, env = "MESH_REDIS_CA", value_name = "FILE")]
    pub redis_ca: Option<PathBuf>,

    /// Wait this long at the start for a Redis that does not answer
    #[arg(long, env = "MESH_STORE_WAIT", value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub store_wait: Duration,
}

/// Order and placement of tasks.
#[derive(Args, Debug)]
#[command(next_help_heading = "Scheduling")]
pub struct Scheduling {
    /// How a worker is chosen: predicted (earliest predicted finish), least-loaded, latest-heartbeat, round-robin or
    /// random
    #[arg(long, env = "MESH_POLICY", value_name = "POLICY", default_value_t)]
    pub policy: Policy,

    /// Jobs of more items than this go to the batch lane, unless they name a lane
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    pub realtime_items_max: u32,

    /// Points that one step of user priority (0 to 100) is worth; waiting tasks with more points go first
    #[arg(long, value_name = "POINTS", default_value = "1", value_parser = thousandths)]
    pub weight_priority: Thousandths,

    /// Points that a task gains with each second of waiting, not counting what it waits for tasks of its own client; with
    /// 0 a task may wait for ever
    #[arg(long, value_name = "POINTS", default_value = "1", value_parser = thousandths)]
    pub weight_wait: Thousandths,

    /// Points that a task loses with each doubling of its inputs beyond 1 MiB
    #[arg(long, value_name = "POINTS", default_value = "1", value_parser = thousandths)]
    pub weight_data: Thousandths,

    /// Points that a task loses with each second of slot time that its client is ahead of the others
    #[arg(long, value_name = "POINTS", default_value = "4", value_parser = thousandths)]
    pub weight_share: Thousandths,

    /// Limits of one client: its highest priority and, after a colon, its share (the default is 1); may be repeated
    #[arg(long, value_name = "CLIENT_ID=MAX_PRIORITY[:SHARE]", value_parser = tenant)]
    pub tenant: Vec<(ClientId, Tenant)>,

    /// Limits of clients that no --tenant names
    #[arg(long, value_name = "MAX_PRIORITY[:SHARE]", default_value = "100:1", value_parser = allowance)]
    pub tenant_default: Tenant,
}

/// A number with up to three decimals, in thousandths.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Thousandths(pub u32);

/// Limits and times.
#[derive(Args, Debug)]
#[command(next_help_heading = "Limits and times")]
pub struct Tuning {
    /// Heartbeats that a worker may miss before it counts as dead
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub heartbeat_liveness: u32,

    /// A client silent for this long has left its attached tasks
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = duration)]
    pub client_silence: Duration,

    /// A grant that its client does not take up within this time is withdrawn
    #[arg(long, value_name = "TIME", default_value = "6s", value_parser = duration)]
    pub grant_wait: Duration,

    /// A detached task fails when its worker has been away for this long
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub detached_patience: Duration,

    /// Ended tasks (the latest 20,000) and results of detached ones (100,000) can be found for this long; workers keep
    /// results for their --keep-results
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub keep_ended: Duration,

    /// Attempts of a task that may fail before it is given up; a worker that failed it is asked again after all others
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub attempts_max: u32,

    /// Tasks that may wait in each lane; more are refused and told when to come again
    #[arg(long, value_name = "COUNT", default_value_t = 100_000)]
    pub queue_max: usize,

    /// Unfinished tasks; more are refused
    #[arg(long, value_name = "COUNT", default_value_t = 200_000)]
    pub tasks_max: usize,

    /// Workers; more are refused
    #[arg(long, value_name = "COUNT", default_value_t = 100_000)]
    pub workers_max: usize,
}

/// Parses a time of at least a millisecond: the machine counts in milliseconds.
fn duration(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        short if short < Duration::from_millis(1) => Err(format!("'{text}' is too short: write 1ms or more")),
        duration => Ok(duration),
    }
}

/// Parses `2`, `0.5` or `12.125`, up to a million.
fn thousandths(text: &str) -> Result<Thousandths, String> {
    const WHOLE_MAX: u32 = 1_000_000;
    let wrong = || "write a number from 0 to 1000000 with at most three decimals, like 2 or 0.5".to_owned();
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(decimals) || decimals.len() > 3 {
        return Err(wrong());
    }
    let whole: u32 = whole.parse().map_err(|_| wrong())?;
    let milli: u32 = format!("{decimals:0<3}").parse().map_err(|_| wrong())?;
    if whole > WHOLE_MAX || (whole == WHOLE_MAX && milli > 0) {
        return Err(wrong());
    }
    Ok(Thousandths(whole * 1000 + milli))
}

/// Parses `60` or `60:2.5`.
fn allowance(text: &str) -> Result<Tenant, String> {
    let (priority, share) = text.split_once(':').unwrap_or((text, "1"));
    let priority_max = priority.parse().ok().filter(|priority| *priority <= PRIORITY_MAX);
    let priority_max =
        priority_max.ok_or_else(|| format!("write a priority from 0 to {PRIORITY_MAX}, like 60 or 60:2.5"))?;
    match thousandths(share)? {
        Thousandths(0) => Err("a share of nothing would let the client wait for ever: write at least 0.001".to_owned()),
        Thousandths(share_milli) => Ok(Tenant { priority_max, share_milli }),
    }
}

/// Parses `CLIENT_ID=60:2.5`.
fn tenant(text: &str) -> Result<(ClientId, Tenant), String> {
    let wrong = "write CLIENT_ID=MAX_PRIORITY or CLIENT_ID=MAX_PRIORITY:SHARE";
    let (client, rest) = text.split_once('=').ok_or(wrong)?;
    let client = client.parse().map_err(|_| format!("'{client}' is not a client id; {wrong}"))?;
    Ok((client, allowance(rest)?))
}

/// An endpoint; `tcp://` may be left away, as for clients and workers.
fn parse_bind(text: &str) -> Result<String, Infallible> {
    Ok(mesh_transport::address::completed(text))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn times_have_a_unit_and_a_bound() {
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        for wrong in ["5", "0s", "999us", "400d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn defaults_are_the_machines_own() {
        let tuning = Arguments::parse_from(["mesh-broker"]).serve.tuning;
        let machine = mesh_core::broker::Config::default();
        assert_eq!(tuning.heartbeat_liveness, machine.liveness_beats);
        assert_eq!(tuning.client_silence, machine.client_silence);
        assert_eq!(tuning.grant_wait, machine.grant_wait);
        assert_eq!(tuning.detached_patience, machine.detached_patience);
        assert_eq!(tuning.keep_ended, machine.ended_kept);
        assert_eq!(tuning.attempts_max, machine.attempts_max);
        assert_eq!(tuning.queue_max, machine.queue_max);
        assert_eq!(tuning.tasks_max, machine.tasks_max);
        assert_eq!(tuning.workers_max, machine.workers_max);
        let scheduling = Arguments::parse_from(["mesh-broker"]).serve.scheduling;
        assert_eq!(scheduling.policy, machine.policy);
        assert_eq!(scheduling.realtime_items_max, machine.realtime_items_max);
        assert_eq!(scheduling.weight_priority.0, machine.weights.priority_milli);
        assert_eq!(scheduling.weight_wait.0, machine.weights.wait_milli);
        assert_eq!(scheduling.weight_data.0, machine.weights.data_milli);
        assert_eq!(scheduling.weight_share.0, machine.weights.share_milli);
        assert_eq!(scheduling.tenant_default, machine.tenant_default);
    }

    #[test]
    fn weights_and_shares_are_numbers_with_decimals() {
        assert_eq!(thousandths("2"), Ok(Thousandths(2000)));
        assert_eq!(thousandths("0.5"), Ok(Thousandths(500)));
        assert_eq!(thousandths("1000000"), Ok(Thousandths(1_000_000_000)));
        for wrong in ["", ".", "-1", "+1", "1e3", "0.0001", "1000000.001", "99999999999", "1.", "NaN"] {
            assert!(thousandths(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_tenant_is_an_id_a_cap_and_perhaps_a_share() {
        let id = "018f3c5e-0000-7000-8000-00000000000a";
        let parsed = tenant(&format!("{id}=60:2.5"));
        assert_eq!(parsed, Ok((id.parse().unwrap(), Tenant { priority_max: 60, share_milli: 2500 })));
        assert_eq!(allowance("0"), Ok(Tenant { priority_max: 0, share_milli: 1000 }));
        for wrong in ["", "60", "me=60", &format!("{id}=101"), &format!("{id}=60:0"), &format!("{id}=60:x")] {
            assert!(tenant(wrong).is_err(), "{wrong}");
        }
    }
}
