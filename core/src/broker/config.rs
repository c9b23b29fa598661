//! The broker's settings. Owns their types, defaults and names. Never: how they are given; that is the shell's.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use proto_msgs::{ClientId, Epoch, Lane, Submit, limits::PRIORITY_MAX};

use crate::{GRANT_WAIT, Rule, Rules};

/// How a worker is chosen among those with room.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Policy {
    /// The one that is predicted to finish first.
    #[default]
    Predicted,
    /// The one with the fewest tasks for its slots.
    LeastLoaded,
    /// The one heard last.
    LatestHeartbeat,
    /// One after the other.
    RoundRobin,
    /// Any; the task's id decides, so that the same events give the same choice.
    Random,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 5] =
        [Self::Predicted, Self::LeastLoaded, Self::LatestHeartbeat, Self::RoundRobin, Self::Random];

    /// The name as people write it.
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

/// What makes a waiting task go before another, in thousandths of a point.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Weights {
    /// For each step of user priority.
    pub priority_milli: u32,
    /// For each second it has waited: what makes sure that nothing waits for ever.
    pub wait_milli: u32,
    /// Taken off for each doubling of its inputs beyond 1 MiB.
    pub data_milli: u32,
    /// Taken off for each second of slot time that its client is ahead of the others.
    pub share_milli: u32,
}

impl Default for Weights {
    fn default() -> Self {
        // A second of waiting weighs as much as one step of priority, so 100 s bridge the widest gap. A client that is
        // 12 s of slot time ahead of the others loses the 50 points between the usual priority and the highest.
        Self { priority_milli: 1000, wait_milli: 1000, data_milli: 1000, share_milli: 4000 }
    }
}

/// What a client may take.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tenant {
    /// Higher priorities count as this one.
    pub priority_max: u8,
    /// Thousandths of the slot time that an ordinary client gets while both wait.
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
    /// This start of the broker.
    pub epoch: Epoch,
    /// Wall clock at [`MonoTime::ZERO`](crate::MonoTime::ZERO), milliseconds since 1970.
    pub origin_unix_ms: u64,
    /// Version of the program, for people.
    pub version: String,
    /// `redis` or `embedded`, for people.
    pub store_name: String,
    /// Connections are encrypted: a message counts only with the key it was registered with.
    pub encrypted: bool,
    /// Heartbeats a worker may miss. Three: one may be lost, one late.
    pub liveness_beats: u32,
    /// A grant that neither client nor worker has taken up in this time is taken back.
    pub grant_wait: Duration,
    /// A client that has been silent this long has left its attached tasks.
    pub client_silence: Duration,
    /// A detached task whose worker has been away this long has failed.
    pub detached_patience: Duration,
    /// Ended tasks are shown this long; results of detached tasks are found this long, if their workers keep them.
    pub ended_kept: Duration,
    /// Workers may fail a task this often.
    pub attempts_max: u32,
    /// Tasks waiting in each lane at the same time, over all clients.
    pub queue_max: usize,
    /// Unfinished tasks at the same time, over all clients.
    pub tasks_max: usize,
    /// Ended tasks remembered at the same time for people who ask; the oldest go first.
    pub ended_max: usize,
    /// Ended detached tasks remembered at the same time, whose results may still be fetched; the oldest go first.
    pub ended_for_later_max: usize,
    /// Workers known at the same time.
    pub workers_max: usize,
    /// How a worker is chosen.
    pub policy: Policy,
    /// Jobs of more items go to the batch lane unless they say otherwise.
    pub realtime_items_max: u32,
    /// What makes a waiting task go first.
    pub weights: Weights,
    /// What clients may take that are not in `tenants`.
    pub tenant_default: Tenant,
    /// What particular clients may take.
    pub tenants: BTreeMap<ClientId, Tenant>,
    /// The store shows workers: it wants their rows.
    pub shows_workers: bool,
    /// Rules in force.
    pub rules: Rules,
}

impl Config {
    /// What this client may take.
    pub fn tenant(&self, client: ClientId) -> Tenant {
        self.tenants.get(&client).copied().unwrap_or(self.tenant_default)
    }

    /// The weights, but for those of rules that a test has switched off.
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

    /// The lane of a task: its own wish, else by the size of its job.
    pub(super) fn lane(&self, submit: &Submit) -> Lane {
        let by_size = if submit.job_items > self.realtime_items_max { Lane::Batch } else { Lane::Realtime };
        submit.lane.unwrap_or(by_size)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            epoch: Epoch(1),
            origin_unix_ms: 0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_name: "embedded".to_owned(),
            encrypted: false,
            liveness_beats: 3,
            grant_wait: GRANT_WAIT,
            // Clients repeat themselves every two seconds: seven may be lost.
            client_silence: Duration::from_secs(15),
            detached_patience: Duration::from_secs(600),
            ended_kept: Duration::from_secs(3600),
            attempts_max: 3,
            queue_max: 100_000,
            tasks_max: 200_000,
            ended_max: 20_000,
            // A hundred megabytes; over the usual hour, 27 ends a second.
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
