//! The rules that keep the mesh right, each of which a test can switch off to see the simulator notice.
//!
//! Without the feature `sabotage` there is nothing to switch: [`Rules::holds`] is `true` at compile time.

/// A rule and what would happen without it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rule {
    /// The client takes a result only from the attempt it follows; else a zombie's result counts.
    FenceOldAttempts,
    /// A restarted broker believes a client that holds an attempt; else it places the task a second time.
    BelieveHoldingClients,
    /// The broker tells a worker which finished attempts it may forget; else the worker's list grows.
    ForgetFinished,
    /// The worker counts its own slots; else two brokers' lives can overfill it.
    WorkerCountsSlots,
    /// The broker reserves a slot with the grant, not with the first heartbeat that names the attempt.
    ReserveWithGrant,
    /// The client says everything again while it waits; else one lost message is for ever.
    ClientRepeats,
    /// A grant that nobody takes up gives its slot back.
    ExpireGrants,
    /// A worker stops attempts whose client has gone.
    NoticeGoneClients,
    /// The broker closes tasks whose client has gone.
    CloseAbandoned,
    /// A worker that is silent for three heartbeats is not used.
    NoticeDeadWorkers,
    /// A detached task is acknowledged only after the store has it.
    AcknowledgeAfterStore,
    /// A client hears that its detached task is safe only once the store has where it is; else a restart looks for it in vain.
    PlaceBeforeDurable,
    /// A worker may forget how a detached attempt ended only once the store has it; else a restart never hears of it.
    StoreBeforeForget,
    /// That a detached task is cancelled is answered only once the store has it; else a restart brings it back.
    StoreBeforeCancelled,
    /// A worker tells the end of a detached attempt only once its disk has it; else the worker's death undoes what was told.
    KeepBeforeReport,
    /// A ticket is honoured only by the life of the worker it was made for.
    TicketNamesEpoch,
    /// The broker answers only the owner of a task.
    AnswerOwnerOnly,
    /// A worker repeats a finished attempt until the broker has acknowledged it.
    RepeatFinished,
    /// The broker shares a lane out among the clients that wait in it; else who submits most gets most.
    FairShares,
    /// The longer a task has waited the sooner it goes; else a low priority waits for ever.
    AgeingRank,
    /// The broker lends idle batch slots to realtime and never the other way.
    LendOnlyToRealtime,
    /// A worker runs the batch lane in slots of its own; else a flood of it takes those that realtime needs.
    LaneSlots,
    /// What failed in company is run again alone; else one client's rows fail another's.
    IsolateFailedBatch,
    /// Rows are cut without gap and overlap, and each comes back to where it was cut.
    RowsInOrder,
    /// A worker that violated a service level is tried with a few tasks first before it gets all of them again.
    SloHysteresis,
    /// A task that took three workers down is given up.
    PoisonStops,
    /// A broker that has just started refuses nobody for what workers cannot do; else those who waited before are turned away
    /// because the one worker that they wait for is the last to come back.
    SettleFirst,
    /// While a process stands still so does its clock; else a broker that was stopped gives up everybody who has waited for it.
    PauseIsNoSilence,
}

impl Rule {
    /// Every rule.
    pub const ALL: &[Self] = &[
        Self::FenceOldAttempts,
        Self::BelieveHoldingClients,
        Self::ForgetFinished,
        Self::WorkerCountsSlots,
        Self::ReserveWithGrant,
        Self::ClientRepeats,
        Self::ExpireGrants,
        Self::NoticeGoneClients,
        Self::CloseAbandoned,
        Self::NoticeDeadWorkers,
        Self::AcknowledgeAfterStore,
        Self::PlaceBeforeDurable,
        Self::StoreBeforeForget,
        Self::StoreBeforeCancelled,
        Self::KeepBeforeReport,
        Self::TicketNamesEpoch,
        Self::AnswerOwnerOnly,
        Self::RepeatFinished,
        Self::FairShares,
        Self::AgeingRank,
        Self::LendOnlyToRealtime,
        Self::LaneSlots,
        Self::IsolateFailedBatch,
        Self::RowsInOrder,
        Self::SloHysteresis,
        Self::PoisonStops,
        Self::SettleFirst,
        Self::PauseIsNoSilence,
    ];
}

/// The rules in force: all of them, but for one in a test that wants to see its absence noticed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Rules {
    #[cfg(feature = "sabotage")]
    broken: Option<Rule>,
}

impl Rules {
    /// All rules but this one.
    #[cfg(feature = "sabotage")]
    pub const fn without(rule: Rule) -> Self {
        Self { broken: Some(rule) }
    }

    /// Whether the rule is in force.
    #[inline]
    pub fn holds(&self, rule: Rule) -> bool {
        #[cfg(feature = "sabotage")]
        return self.broken != Some(rule);
        #[cfg(not(feature = "sabotage"))]
        {
            let _ = rule;
            true
        }
    }
}
