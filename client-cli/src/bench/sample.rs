//! One request's data: when it should have been sent, when it was sent, how it ended. Owns the rule that latency counts
//! from the intended time. Never sums up.

/// A worker's number, in the order in which this run met the workers.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct WorkerNo(pub(crate) u32);

/// A client's number, from 0: a connection with its own identity.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct ClientNo(pub(crate) u16);

/// The code of a request that was not sent because too many were under way.
pub(crate) const NOT_SENT: &str = "NOT_SENT";

/// One request. Times count from the beginning of its level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sample {
    /// The time intended by the schedule; in a closed loop, the time of its turn.
    pub(crate) intended_us: u64,
    /// The time of sending; `None` if the request was not sent.
    pub(crate) sent_us: Option<u64>,
    pub(crate) ended_us: u64,
    pub(crate) items: u32,
    pub(crate) client: ClientNo,
    pub(crate) end: End,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    /// The request was answered.
    Done {
        /// `None` if the mesh did not name it.
        worker: Option<WorkerNo>,
        /// How the time was spent.
        parts: Parts,
    },
    /// The request failed, with the mesh's error code or [`NOT_SENT`].
    Failed(&'static str),
    /// The level ended before the request.
    Unanswered,
}

/// How the time of a request was spent, as the SDK and the worker report it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Parts {
    pub(crate) queued_us: u64,
    pub(crate) sending_us: u64,
    pub(crate) loading_us: u64,
    pub(crate) running_us: u64,
}

impl Sample {
    /// Latency from the intended time of sending: a tool that sends late has not made the mesh faster.
    pub(crate) fn latency_us(&self) -> u64 {
        self.ended_us.saturating_sub(self.intended_us)
    }

    /// The delay of sending; 0 if the request was not sent.
    pub(crate) fn delay_us(&self) -> u64 {
        self.sent_us.map_or(0, |sent_us| sent_us.saturating_sub(self.intended_us))
    }
}
