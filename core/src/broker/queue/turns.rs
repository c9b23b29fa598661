//! Whose turn it is: since when the waiting of a lane's tasks counts.
//!
//! ```text
//!            comes                       its turn
//!   task ───────────►  ahead of others ───────────►  due
//!           └──────────────────────────────────────►
//!             no other task of its client is due, or it begins where the lane is
//! ```
//!
//! A task's turn comes when the lane's virtual time reaches its start tag, or when no other task of its client is due, or
//! none has come due for a minute. So whoever submits much at once does not gain by the waiting that this causes, of each
//! client one task ages, and the others do not wait for ever for one that no worker can run.
//!
//! Owns which waiting tasks are due. Never their order; that is `queue`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proto_msgs::ClientId;

use super::line::Order;
use crate::{Census, MonoTime};

/// After this time the next task of a client is due, though others of it wait. Much less, and clients with much to do
/// would gain again where all wait for long; much more, and a task behind one that is stuck would wait as long.
const NEXT_AFTER: Duration = Duration::from_secs(60);

/// A waiting task whose turn may not have come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Turn {
    pub(super) client: ClientId,
    pub(super) start_tag_us: u64,
    /// Its order in the part of the lane that is ahead.
    pub(super) order: Order,
}

/// The waiting tasks of one client.
#[derive(Debug, Default)]
struct Own {
    /// The number of its due tasks, and when the last one came due.
    due: u32,
    last: MonoTime,
    /// Its tasks whose turn has not come: start tags and orders.
    ahead: BTreeSet<(u64, Order)>,
}

/// The turns of one lane.
#[derive(Debug, Default)]
pub(super) struct Turns {
    clients: BTreeMap<ClientId, Own>,
    /// Clients with due tasks, by when the last one came due.
    by_time: BTreeSet<(MonoTime, ClientId)>,
    /// Of each client, the first start tag of those whose turn has not come.
    heads: BTreeSet<(u64, ClientId)>,
    /// Clients whose last due task has just left.
    next: BTreeSet<ClientId>,
}

impl Turns {
    /// Whether a task that comes is due.
    pub(super) fn is_due(&self, turn: &Turn, virtual_us: u64) -> bool {
        turn.start_tag_us <= virtual_us || self.clients.get(&turn.client).is_none_or(|own| own.due == 0)
    }

    /// Adds a due task.
    pub(super) fn enter(&mut self, now: MonoTime, client: ClientId) {
        let own = self.clients.entry(client).or_default();
        self.by_time.remove(&(own.last, client));
        (own.due, own.last) = (own.due + 1, now);
        self.by_time.insert((now, client));
        self.next.remove(&client);
    }

    /// Adds a task whose turn has not come.
    pub(super) fn wait(&mut self, turn: Turn) {
        let Turn { client, start_tag_us, order } = turn;
        let own = self.clients.entry(client).or_default();
        let head = own.ahead.first().map(|(tag, _)| *tag);
        own.ahead.insert((start_tag_us, order));
        self.moved(client, head);
    }

    /// Removes a due task.
    pub(super) fn leave(&mut self, client: ClientId) {
        let Some(own) = self.clients.get_mut(&client).filter(|own| own.due > 0) else { return };
        own.due -= 1;
        if own.due == 0 {
            self.by_time.remove(&(own.last, client));
            if own.ahead.is_empty() {
                self.clients.remove(&client);
            } else {
                self.next.insert(client);
            }
        }
    }

    /// Removes a task whose turn has not come.
    pub(super) fn give_up(&mut self, turn: Turn) {
        let Turn { client, start_tag_us, order } = turn;
        let Some(own) = self.clients.get_mut(&client) else { return };
        let head = own.ahead.first().map(|(tag, _)| *tag);
        own.ahead.remove(&(start_tag_us, order));
        if own.due == 0 && own.ahead.is_empty() {
            self.clients.remove(&client);
        }
        self.moved(client, head);
    }

    /// The tasks ahead of a client have changed, of which the first had this tag.
    fn moved(&mut self, client: ClientId, old: Option<u64>) {
        let new = self.clients.get(&client).and_then(|own| own.ahead.first()).map(|(tag, _)| *tag);
        if new != old {
            old.map(|tag| self.heads.remove(&(tag, client)));
            new.map(|tag| self.heads.insert((tag, client)));
        }
    }

    /// Takes out a task whose turn has come. It must [enter](Self::enter).
    pub(super) fn next(&mut self, now: MonoTime, virtual_us: u64) -> Option<Turn> {
        while let Some(client) = self.next.pop_first().or_else(|| self.overdue(now)) {
            if let Some(turn) = self.take_first(client) {
                return Some(turn);
            }
        }
        let (_, client) = self.heads.first().copied().filter(|(tag, _)| *tag <= virtual_us)?;
        self.take_first(client)
    }

    /// A client of which no task has come due for long; it is asked again as much later.
    fn overdue(&mut self, now: MonoTime) -> Option<ClientId> {
        let (last, client) = self.by_time.first().copied().filter(|(last, _)| *last + NEXT_AFTER <= now)?;
        self.by_time.remove(&(last, client));
        self.by_time.insert((now, client));
        self.clients.get_mut(&client)?.last = now;
        Some(client)
    }

    fn take_first(&mut self, client: ClientId) -> Option<Turn> {
        let (start_tag_us, order) = *self.clients.get(&client)?.ahead.first()?;
        let turn = Turn { client, start_tag_us, order };
        self.give_up(turn);
        Some(turn)
    }

    /// Counts the turns; `waiting` is the number of waiting tasks.
    pub(super) fn census(&self, waiting: usize, census: &mut Census<'_>) {
        let Self { clients, by_time, heads, next } = self;
        census.passing("clients that wait", clients.len(), waiting);
        census.passing("tasks before their turn", clients.values().map(|own| own.ahead.len()).sum(), waiting);
        census.passing("clients by their last turn", by_time.len(), clients.len());
        census.passing("first tasks before their turn", heads.len(), clients.len());
        census.passing("clients whose turn is next", next.len(), clients.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ClientId = ClientId::from_bytes([1; 16]);
    const B: ClientId = ClientId::from_bytes([2; 16]);

    fn turn(client: ClientId, tag: u64) -> Turn {
        Turn { client, start_tag_us: tag, order: Order::new(0, tag) }
    }

    /// Adds tasks with these tags; returns those that are due at once.
    fn come(turns: &mut Turns, client: ClientId, tags: &[u64], virtual_us: u64) -> Vec<u64> {
        let mut due = Vec::new();
        for tag in tags {
            match turns.is_due(&turn(client, *tag), virtual_us) {
                true => {
                    turns.enter(MonoTime::ZERO, client);
                    due.push(*tag);
                }
                false => turns.wait(turn(client, *tag)),
            }
        }
        due
    }

    #[test]
    fn of_each_client_one_task_ages_until_the_lane_has_reached_the_next() {
        let mut turns = Turns::default();
        assert_eq!(come(&mut turns, A, &[10, 20, 30], 10), [10]);
        assert_eq!(come(&mut turns, B, &[15, 25], 10), [15], "nobody ages less than by one task");
        assert_eq!(turns.next(MonoTime::ZERO, 19), None);
        assert_eq!(turns.next(MonoTime::ZERO, 25), Some(turn(A, 20)), "the lane is there");
    }

    #[test]
    fn when_a_client_s_last_due_task_leaves_its_next_one_is_due() {
        let mut turns = Turns::default();
        come(&mut turns, A, &[10, 20, 30], 0);
        turns.leave(A);
        assert_eq!(turns.next(MonoTime::ZERO, 0), Some(turn(A, 20)));
        turns.enter(MonoTime::ZERO, A);
        assert_eq!(turns.next(MonoTime::ZERO, 0), None);
        turns.give_up(turn(A, 30));
        turns.leave(A);
        assert_eq!((turns.next(MonoTime::ZERO, 0), turns.clients.len(), turns.heads.len()), (None, 0, 0));
    }

    #[test]
    fn tasks_behind_one_that_is_stuck_are_due_one_by_one() {
        let (mut turns, minute) = (Turns::default(), MonoTime::ZERO + NEXT_AFTER);
        come(&mut turns, A, &[10, 20, 30], 0);
        assert_eq!(turns.next(minute - Duration::from_secs(1), 0), None);
        assert_eq!(turns.next(minute, 0), Some(turn(A, 20)));
        turns.enter(minute, A);
        assert_eq!(turns.next(minute, 0), None);
        assert_eq!(turns.next(minute + NEXT_AFTER, 0), Some(turn(A, 30)));
    }
}
