//! The rules that keep the mesh right. A test can switch off each of them to show that the simulator notices.
//!
//! Without the feature `sabotage` there is nothing to switch: [`Rules::holds`] is `true` at compile time.

/// A rule, and the damage without it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rule {
    /// The client takes a result only from the attempt that it follows; else a zombie's result counts.
    FenceOldAttempts,
    /// A restarted broker believes a client that holds an attempt; else it places the task a second time.
    BelieveHoldingClients,
    /// The broker tells a worker which finished attempts it may forget; else the worker's list grows for ever.
    ForgetFinished,
    /// The worker counts its own slots; else two lives of the broker can overfill it.
    WorkerCountsSlots,
    /// The broker reserves a slot with the grant, not with the first heartbeat that names the attempt.
    ReserveWithGrant,
    /// The client repeats everything while it waits; else one lost message stops its task for ever.
    ClientRepeats,
    /// A grant that its client does not take up gives its slot back.
    ExpireGrants,
    /// A client that is silent is granted nothing more; else one that was killed with many tasks keeps a worker's room
    /// from all others.
    GrantToThoseHeard,
    /// A worker stops attempts whose client has gone.
    NoticeGoneClients,
    /// The broker closes tasks whose client has gone.
    CloseAbandoned,
    /// The broker does not use a worker that has missed three heartbeats.
    NoticeDeadWorkers,
    /// A detached task is acknowledged only after the store has it.
    AcknowledgeAfterStore,
    /// A client hears that its detached task is safe only once the store has the task's worker; else a restarted broker
    /// looks for the task in vain.
    PlaceBeforeDurable,
    /// A worker may forget the end of a detached attempt only once the store has it; else a restarted broker never
    /// hears of it.
    StoreBeforeForget,
    /// The broker confirms the cancel of a detached task only once the store has it; else a restart brings the task
    /// back.
    StoreBeforeCancelled,
    /// A worker reports the end of a detached attempt only once its disk has it; else the worker's death undoes the
    /// report.
    KeepBeforeReport,
    /// Only the life of a worker that a ticket names honours it.
    TicketNamesEpoch,
    /// The broker answers only the owner of a task.
    AnswerOwnerOnly,
    /// A worker repeats a finished attempt until the broker has acknowledged it.
    RepeatFinished,
    /// The broker shares a lane among the clients that wait in it; else the client that submits most gets most.
    FairShares,
    /// A task's rank rises while it waits; else a low priority waits for ever.
    AgeingRank,
    /// Waiting counts once it is the task's turn; else a client gains by the waiting that its own flood causes.
    AgeInTurn,
    /// The broker lends idle batch slots to realtime and never the other way.
    LendOnlyToRealtime,
    /// A worker runs the batch lane in its own slots; else a flood of it takes the slots that realtime needs.
    LaneSlots,
    /// Rows of a failed batch are run again alone; else one client's rows fail another's.
    IsolateFailedBatch,
    /// A load that has begun is finished although its task's deadline has passed; else a model that takes longer to load
    /// than its tasks may take is loaded again and again, and never runs.
    FinishLoads,
    /// Rows are cut without gap and overlap, and each returns to the place where it was cut.
    RowsInOrder,
    /// A later stage begins before the earlier one has done all rows; else two devices take turns.
    StagesOverlap,
    /// A worker that violated a service level gets a few probes before it gets all tasks again.
    SloHysteresis,
    /// A worker with old figures is tried with few tasks, and with none that it would make late; else a slow worker gets
    /// a task whenever it is idle.
    TrialsAreBounded,
    /// A model is loaded at an idle worker only once its tasks have missed as much without; else a short burst loads it
    /// everywhere.
    LoadsPayOff,
    /// A task that took three workers down is given up.
    PoisonStops,
    /// A restarted broker at first refuses no task because no worker can run it; else waiting tasks are refused because
    /// their only worker comes back last.
    SettleFirst,
    /// While a process stands still, so does its clock; else a stopped broker gives up all tasks that waited for it.
    PauseIsNoSilence,
    /// The broker forgets a task in all its tables.
    ForgetEverywhere,
    /// The broker's verdicts on a worker go with that life of the worker.
    ForgetLostWorkers,
    /// The waiting rows of an attempt go with the attempt.
    ForgetRows,
    /// A worker forgets the trial of a failed batch if an attempt in it ends otherwise.
    ForgetTrials,
    /// A client plans no look at a task that has ended.
    ForgetLooks,
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
        Self::GrantToThoseHeard,
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
        Self::AgeInTurn,
        Self::LendOnlyToRealtime,
        Self::LaneSlots,
        Self::IsolateFailedBatch,
        Self::FinishLoads,
        Self::RowsInOrder,
        Self::StagesOverlap,
        Self::SloHysteresis,
        Self::TrialsAreBounded,
        Self::LoadsPayOff,
        Self::PoisonStops,
        Self::SettleFirst,
        Self::PauseIsNoSilence,
        Self::ForgetEverywhere,
        Self::ForgetLostWorkers,
        Self::ForgetRows,
        Self::ForgetTrials,
        Self::ForgetLooks,
    ];
}

/// The rules in force: all of them, except one in a test that shows its absence.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Rules {
    #[cfg(feature = "sabotage")]
    broken: Option<Rule>,
}

impl Rules {
    /// All rules except this one.
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
