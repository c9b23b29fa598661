//! The worker's part of the census. Owns nothing.

use proto_msgs::limits::HELD_MAX;

use super::{
    Sample, Worker,
    clients::{ATTACHED_MAX, DETACHED_MAX},
};
use crate::Census;

impl Worker {
    /// Counts the entries of all tables.
    pub fn census(&self, census: &mut Census<'_>) {
        let Self {
            config: _,
            clock: _,
            attempts,
            sample,
            sampled: _,
            seq: _,
            next_heartbeat: _,
            last_heartbeat: _,
            next_register: _,
            next_progress: _,
            broker_clock: _,
            broker_heard: _,
            broker_rtt: _,
            next_news: _,
            drain_until: _,
            exited: _,
            slots,
            packer,
            costs,
            batches,
            culprits,
            wishes,
            turns: _,
            wake: _,
            actions,
        } = self;
        attempts.census(ATTACHED_MAX, DETACHED_MAX, census);
        let Sample { load: _, held, warm, link_bytes_per_s: _ } = sample;
        census.lasting("models held or warm", held.len().max(warm.len()), HELD_MAX);
        slots.census(census);
        let under_way = attempts.under_way();
        packer.census(under_way, census);
        costs.census(census);
        culprits.census(census);
        wishes.census(census);
        batches.census(slots.len(), under_way.1, packer.on_trial(), census);
        census.passing("actions", actions.len(), 0);
    }
}
