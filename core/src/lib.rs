//! DECISIONS: everything that broker, worker and client decide, as pure state machines.
//!
//! Owns what is decided and when. Never: a socket, a clock, a store, a thread, a random source. The same events at the
//! same times give the same actions. The simulator in `tests/` and every replay rely on that.
//!
//! # The contract, the same for [`broker::Broker`], [`worker::Worker`] and [`client::Client`]
//!
//! * `handle(now, event) -> Vec<Action>` is the only way in. It never blocks and never fails.
//! * `next_deadline()` says when to call `handle(now, Event::Deadline)` if nothing else happens before. A shell that
//!   calls much later stood still, and the machine does not count that time as silence of its peers.
//! * Events are facts, actions are orders. An action that takes time ends in an event, success or failure.
//! * Messages may be lost, doubled or late. An order to send is only a hint: the next heartbeat or `Submit` repeats
//!   everything.
//! * Whatever the network sends has a defined answer. A panic is a bug.
//!
//! Where to begin: [`broker`].

use std::time::Duration;

pub mod broker;
mod census;
pub mod client;
mod due;
pub mod rules;
pub mod time;
pub mod worker;

pub use census::{Census, Table};
pub use rules::{Rule, Rules};
use time::Clock;
pub use time::MonoTime;

/// How long a grant stands that nobody takes up, and a worker waits for a client that it dialled. Longer than a connection takes
/// on a bad link, shorter than anybody's patience with a lost slot.
const GRANT_WAIT: Duration = Duration::from_secs(6);

/// What a person reads of a task whose time ran out, whoever of the three noticed first.
const DEADLINE_PASSED: &str = "the deadline passed before there was a result";
