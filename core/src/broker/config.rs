//! The broker's settings. Owns their types, defaults and names. Never: how they are given; that is the shell's.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use proto_msgs::{ClientId, Lane, TaskSpec, limits::PRIORITY_MAX};

use crate::{GRANT_WAIT, Rule, Rules};

/// The rule that picks a worker among those with room.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Policy {
    /// The worker that is predicted to finish first.
    #[default]
    Predicted,
    /// The worker with the fewest tasks per slot.
    LeastLoaded,
    /// The worker with the latest heartbeat.
    LatestHeartbeat,
    /// Each worker in turn.
    RoundRobin,
    /// Any worker. The task's id decides, so that the same events lead to the same choice.
    Random,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 5] =
        [Self::Predicted, Self::LeastLoaded, Self::LatestHeartbeat, Self::RoundRobin, Self::Random];

    /// The policy's name in options and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Predicted => "predicted",
            Self::LeastLoaded => "least-loaded",
            Self::LatestHeartbeat => "latest-heartbeat",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|policy| policy.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|policy| policy.name()).collect();
            format!("'{text}' is no policy: use one of {}", names.join(", "))
        })
    }
}

/// Weights of the terms of a waiting task's rank, in thousandths of a point. The highest rank goes first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Weights {
    /// Points per step of user priority.
    pub priority_milli: u32,
    /// Points per second of waiting; they make sure that no task waits for ever.
    pub wait_milli: u32,
    /// Points taken off for each doubling of the inputs beyond 1 MiB.
    pub data_milli: u32,
    /// Points taken off for each second of slot time that the client is ahead of the others.
    pub share_milli: u32,
}

impl Default for Weights {
    fn default() -> Self {
        // One second of waiting weighs as much as one step of priority, so 100 s bridge the widest gap. A client that
        // is 12 s of slot time ahead of the others loses the 50 points between the usual priority and the highest.
        Self { priority_milli: 1000, wait_milli: 1000, data_milli: 1000, share_milli: 4000 }
    }
}

/// Limits and share of a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tenant {
    /// Cap of the user priority; higher ones count as this one.
    pub priority_max: u8,
    /// Slot time relative to an ordinary client's while both have tasks waiting, in thousandths.
    pub share_milli: u32,
}

impl Default for Tenant {
    fn default() -> Self {
        Self { priority_max: PRIORITY_MAX, share_milli: 1000 }
    }
}

/// The broker's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Wall clock at [`MonoTime::ZERO`](crate::MonoTime::ZERO), milliseconds since 1970.
    pub origin_unix_ms: u64,
    /// Version of the program, shown to people.
    pub version: String,
    /// `redis` or `embedded`, shown to people.
    pub store_name: String,
    /// Connections are encrypted: a message counts only with the key that its sender registered.
    pub encrypted: bool,
    /// Heartbeats that a worker may miss. Three: one may be lost, one late.
    pub liveness_beats: u32,
    /// Time after which a grant is taken back if neither client nor worker has taken it up.
    pub grant_wait: Duration,
    /// Silence after which a task's client is granted nothing more until it speaks, and what it has not taken up goes to
    /// others. The task itself waits on.
    pub client_quiet: Duration,
    /// Silence after which a client counts as having left its attached tasks.
    pub client_silence: Duration,
    /// Absence of its worker after which a detached task has failed.
    pub detached_patience: Duration,
    /// How long ended tasks are shown, and results of detached tasks can be found if their workers keep them.
    pub ended_kept: Duration,
    /// Failed attempts after which a task is given up.
    pub attempts_max: u32,
    /// Limit of waiting tasks in each lane, over all clients.
    pub queue_max: usize,
    /// Limit of unfinished tasks, over all clients.
    pub tasks_max: usize,
    /// Limit of ended tasks kept for people who ask; the oldest go first.
    pub ended_max: usize,
    /// Limit of ended detached tasks kept because their results may still be fetched; the oldest go first.
    pub ended_for_later_max: usize,
    /// Limit of known workers.
    pub workers_max: usize,
    /// The rule that picks a worker.
    pub policy: Policy,
    /// Jobs with more items than this go to the batch lane unless they name a lane.
    pub realtime_items_max: u32,
    /// Weights of a waiting task's rank.
    pub weights: Weights,
    /// Limits of the clients that are not in `tenants`.
    pub tenant_default: Tenant,
    /// Limits of particular clients.
    pub tenants: BTreeMap<ClientId, Tenant>,
    /// The store shows workers, so it needs their rows.
    pub shows_workers: bool,
    /// The rules in force; tests switch some off.
    pub rules: Rules,
}

impl Config {
    /// Limits of this client.
    pub fn tenant(&self, client: ClientId) -> Tenant {
        self.tenants.get(&client).copied().unwrap_or(self.tenant_default)
    }

    /// The weights, without those whose rule a test has switched off.
    pub(super) fn weights_in_force(&self) -> Weights {
        let mut weights = self.weights;
        if !self.rules.holds(Rule::AgeingRank) {
            weights.wait_milli = 0;
        }
        if !self.rules.holds(Rule::FairShares) {
            weights.share_milli = 0;
        }
        weights
    }

    /// Whether a task's waiting counts only from its turn on. Without shares nobody is ahead of others.
    pub(super) fn ages_in_turn(&self) -> bool {
        self.rules.holds(Rule::AgeInTurn) && self.weights_in_force().share_milli > 0
    }

    /// Silence after which a task's client is granted nothing more; without its rule, as late as its tasks are given up.
    pub(super) fn quiet_in_force(&self) -> Duration {
        if self.rules.holds(Rule::GrantToThoseHeard) { self.client_quiet } else { self.client_silence }
    }

    /// The lane that a task names, otherwise the lane for the size of its job.
    pub(super) fn lane(&self, spec: &TaskSpec) -> Lane {
        let by_size = if spec.job_items > self.realtime_items_max { Lane::Batch } else { Lane::Realtime };
        spec.lane.unwrap_or(by_size)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            origin_unix_ms: 0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_name: "embedded".to_owned(),
            encrypted: false,
            liveness_beats: 3,
            grant_wait: GRANT_WAIT,
            // Clients repeat themselves every two seconds, and two seconds after a grant.
            client_quiet: Duration::from_secs(5),
            // Clients repeat themselves every two seconds: seven messages may be lost.
            client_silence: Duration::from_secs(15),
            detached_patience: Duration::from_secs(600),
            ended_kept: Duration::from_secs(3600),
            attempts_max: 3,
            queue_max: 100_000,
            tasks_max: 200_000,
            ended_max: 20_000,
            // A hundred megabytes. Over the usual hour this is 27 ended tasks per second.
            ended_for_later_max: 100_000,
            workers_max: 100_000,
            policy: Policy::default(),
            realtime_items_max: 64,
            weights: Weights::default(),
            tenant_default: Tenant::default(),
            tenants: BTreeMap::new(),
            shows_workers: true,
            rules: Rules::default(),
        }
    }
}
