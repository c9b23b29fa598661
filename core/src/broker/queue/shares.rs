//! Fair shares inside one lane: start-time fair queueing over clients.
//!
//! Each task gets a start tag: the slot time at which it would begin if every client had its own server, as fast as its
//! share. The lane's virtual time is the largest tag dispatched; a client that comes late begins there.
//!
//! Owns the tags. Never orders tasks; that is `queue`.

use std::collections::{BTreeMap, BTreeSet};

use proto_msgs::ClientId;

use crate::Census;

/// Limit of clients whose lead is remembered. Only an attack makes more wait at once; those least ahead then count as
/// newcomers.
const CLIENTS_MAX: usize = 65_536;

/// The lead of one client.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    /// Slot time at which the client's last task would end.
    finish_us: u64,
    /// The part of it for tasks that have not gone to a worker yet.
    waiting_us: u64,
}

/// The tags of one lane.
#[derive(Debug, Default)]
pub(super) struct Shares {
    virtual_us: u64,
    /// Clients that are ahead of the virtual time; all others are equal.
    ahead: BTreeMap<ClientId, Ahead>,
    /// The clients of `ahead` in order of `finish_us`.
    order: BTreeSet<(u64, ClientId)>,
}

impl Shares {
    /// Gives a new task its start tag; the client's next task begins after this one.
    pub(super) fn begin(&mut self, client: ClientId, cost_us: u64, share_milli: u32) -> u64 {
        let start = self.lead(client).finish_us;
        self.begin_at(start, client, scaled(cost_us, share_milli));
        start
    }

    /// Gives a task another tag, of another cost, after a [restart](Self::restart). A task that the virtual time has
    /// passed keeps its tag: its client has not had its share.
    pub(super) fn begin_again(&mut self, old: u64, client: ClientId, cost_us: u64, share_milli: u32) -> u64 {
        let lead_us = self.lead(client).finish_us;
        let start = if lead_us > self.virtual_us { lead_us } else { old.min(self.virtual_us) };
        self.begin_at(start, client, scaled(cost_us, share_milli));
        start
    }

    fn begin_at(&mut self, start: u64, client: ClientId, cost_us: u64) {
        let waiting_us = self.lead(client).waiting_us;
        self.set(client, start.saturating_add(cost_us), waiting_us.saturating_add(cost_us));
        if self.order.len() > CLIENTS_MAX
            && let Some((finish, first)) = self.order.pop_first()
        {
            self.ahead.remove(&first);
            self.virtual_us = self.virtual_us.max(finish);
        }
    }

    /// Gives back the cost of a task that has a tag and will not run.
    pub(super) fn withdraw(&mut self, client: ClientId, cost_us: u64, share_milli: u32) {
        let cost_us = scaled(cost_us, share_milli);
        let Ahead { finish_us, waiting_us } = self.lead(client);
        self.set(client, finish_us.saturating_sub(cost_us), waiting_us.saturating_sub(cost_us));
    }

    /// Charges a task that goes to a worker. If it goes before earlier tasks of its client, the virtual time grows only
    /// as if one of those had gone: it must not jump over waiting tasks.
    pub(super) fn dispatched(&mut self, start: u64, client: ClientId, cost_us: u64, share_milli: u32) {
        let Ahead { finish_us: finish, waiting_us } = self.lead(client);
        self.set(client, finish, waiting_us.saturating_sub(scaled(cost_us, share_milli)));
        self.virtual_us = self.virtual_us.max(start.min(finish.saturating_sub(waiting_us)));
        while let Some((finish, client)) = self.order.first().copied().filter(|(finish, _)| *finish <= self.virtual_us)
        {
            self.order.remove(&(finish, client));
            self.ahead.remove(&client);
        }
    }

    /// No task waits: forgets all leads.
    pub(super) fn idle(&mut self) {
        if let Some((finish, _)) = self.order.last() {
            self.virtual_us = self.virtual_us.max(*finish);
        }
        self.order.clear();
        self.ahead.clear();
    }

    /// All tags are given anew: clients that are ahead begin where the others do.
    pub(super) fn restart(&mut self) {
        self.order.clear();
        self.ahead.clear();
    }

    /// The largest tag dispatched, or where the lane began anew.
    pub(super) fn virtual_us(&self) -> u64 {
        self.virtual_us
    }

    /// How far a tag is ahead of the virtual time, microseconds.
    pub(super) fn lead_us(&self, start: u64) -> u64 {
        start.saturating_sub(self.virtual_us)
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { virtual_us: _, ahead, order } = self;
        census.lasting("clients ahead of their share", ahead.len(), CLIENTS_MAX);
        census.lasting("clients in order of their lead", order.len(), ahead.len());
    }

    /// The client's lead; without one it begins at the virtual time.
    fn lead(&self, client: ClientId) -> Ahead {
        let Ahead { finish_us, waiting_us } = self.ahead.get(&client).copied().unwrap_or_default();
        Ahead { finish_us: finish_us.max(self.virtual_us), waiting_us }
    }

    fn set(&mut self, client: ClientId, finish_us: u64, waiting_us: u64) {
        let is_ahead = finish_us > self.virtual_us;
        let old = if is_ahead {
            self.ahead.insert(client, Ahead { finish_us, waiting_us })
        } else {
            self.ahead.remove(&client)
        };
        if let Some(old) = old {
            self.order.remove(&(old.finish_us, client));
        }
        if is_ahead {
            self.order.insert((finish_us, client));
        }
    }
}

fn scaled(cost_us: u64, share_milli: u32) -> u64 {
    cost_us.saturating_mul(1000) / u64::from(share_milli.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ClientId = ClientId::from_bytes([1; 16]);
    const B: ClientId = ClientId::from_bytes([2; 16]);

    #[test]
    fn tags_of_clients_interleave_whoever_came_first() {
        let mut shares = Shares::default();
        let first: Vec<u64> = (0..3).map(|_| shares.begin(A, 10, 1000)).collect();
        let second: Vec<u64> = (0..3).map(|_| shares.begin(B, 10, 1000)).collect();
        assert_eq!((first, second), (vec![0, 10, 20], vec![0, 10, 20]));
    }

    #[test]
    fn a_double_share_gets_tags_half_as_far_apart() {
        let mut shares = Shares::default();
        assert_eq!([shares.begin(A, 10, 2000), shares.begin(A, 10, 2000), shares.begin(A, 10, 2000)], [0, 5, 10]);
    }

    #[test]
    fn who_comes_late_or_was_idle_gets_no_credit() {
        let mut shares = Shares::default();
        let tags: Vec<u64> = (0..10).map(|_| shares.begin(A, 10, 1000)).collect();
        tags.iter().take(6).for_each(|tag| shares.dispatched(*tag, A, 10, 1000));
        assert_eq!(shares.begin(B, 10, 1000), 50);
        shares.idle();
        assert_eq!((shares.begin(A, 10, 1000), shares.begin(B, 10, 1000)), (100, 100));
    }

    #[test]
    fn a_task_that_goes_before_earlier_ones_of_its_client_does_not_make_newcomers_late() {
        let mut shares = Shares::default();
        let tags: Vec<u64> = (0..10).map(|_| shares.begin(A, 10, 1000)).collect();
        shares.dispatched(tags[9], A, 10, 1000);
        assert_eq!(shares.begin(B, 10, 1000), 0);
        tags[..5].iter().for_each(|tag| shares.dispatched(*tag, A, 10, 1000));
        assert_eq!(shares.begin(B, 10, 1000), 40, "as of five that have gone since the first");
    }

    #[test]
    fn tags_that_are_given_anew_keep_what_a_client_has_not_had() {
        let mut shares = Shares::default();
        let tags: Vec<u64> = (0..10).map(|_| shares.begin(A, 10, 1000)).collect();
        let old = [shares.begin(B, 10, 1000), shares.begin(B, 10, 1000)];
        tags.iter().take(6).for_each(|tag| shares.dispatched(*tag, A, 10, 1000));
        shares.restart();
        assert_eq!(old.map(|old| shares.begin_again(old, B, 100, 1000)), [0, 100], "the lane is at 50");
        assert_eq!([6, 7].map(|at| shares.begin_again(tags[at], A, 100, 1000)), [50, 150]);
    }

    #[test]
    fn what_never_ran_is_not_counted() {
        let mut shares = Shares::default();
        for _ in 0..10 {
            shares.begin(A, 10, 1000);
        }
        (0..10).for_each(|_| shares.withdraw(A, 10, 1000));
        assert_eq!(shares.begin(A, 10, 1000), 0);
    }

    #[test]
    fn a_flood_of_clients_leaves_a_bounded_table() {
        let mut shares = Shares::default();
        for number in 0..(CLIENTS_MAX as u32 + 1000) {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            shares.begin(ClientId::from_bytes(bytes), 10, 1000);
        }
        assert_eq!((shares.ahead.len(), shares.order.len()), (CLIENTS_MAX, CLIENTS_MAX));
    }
}
