//! What one request was: when it was meant to leave, when it left, how it ended. Owns the rule that latency counts from the
//! intended time; never sums anything up.

/// A worker in the order in which this run met them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct WorkerNo(pub(crate) u32);

/// A connection with an identity of its own, from 0.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct ClientNo(pub(crate) u16);

/// The code of a request that was not sent because too many were under way.
pub(crate) const NOT_SENT: &str = "NOT_SENT";

/// One request. Times count from the beginning of its level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sample {
    /// When the schedule wanted it sent; in a closed loop, when its turn came.
    pub(crate) intended_us: u64,
    /// When it was handed over; `None` if it was not.
    pub(crate) sent_us: Option<u64>,
    pub(crate) ended_us: u64,
    pub(crate) items: u32,
    pub(crate) client: ClientNo,
    pub(crate) end: End,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    /// Answered.
    Done {
        /// `None` if the mesh did not say.
        worker: Option<WorkerNo>,
        /// Where the time went.
        parts: Parts,
    },
    /// The code of the mesh, or [`NOT_SENT`].
    Failed(&'static str),
    /// The level was over first.
    Unanswered,
}

/// Where the time of a request went, as the SDK and the worker tell it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Parts {
    pub(crate) queued_us: u64,
    pub(crate) sending_us: u64,
    pub(crate) loading_us: u64,
    pub(crate) running_us: u64,
}

impl Sample {
    /// From the time at which it was meant to be sent: a tool that sends late has not made the mesh faster.
    pub(crate) fn latency_us(&self) -> u64 {
        self.ended_us.saturating_sub(self.intended_us)
    }

    /// How late it was sent; 0 if it was not.
    pub(crate) fn delay_us(&self) -> u64 {
        self.sent_us.map_or(0, |sent_us| sent_us.saturating_sub(self.intended_us))
    }
}
