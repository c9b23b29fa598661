//! DECISIONS: everything that broker, worker and client decide, as pure state machines.
//!
//! Owns what is decided and when. Never: a socket, a clock, a store, a thread, a random source. The same events at the
//! same times give the same actions, which is what the simulator in `tests/` and every replay rest on.
//!
//! # The contract, the same for [`broker::Broker`], [`worker::Worker`] and [`client::Client`]
//!
//! * `handle(now, event) -> Vec<Action>` is the only way in. It never blocks and never fails.
//! * `next_deadline()` says when to call `handle(now, Event::Deadline)` if nothing else happens before. Whoever comes much later
//!   stood still: that time counts as nobody's silence.
//! * Events are things that happened, actions are orders. An action that takes time ends in an event, success or failure.
//! * Messages may be lost, doubled, late: an order to send is only ever a hint, the next heartbeat or the next `Submit`
//!   says everything again.
//! * Whatever the network says has a defined answer. A panic is a bug.
//!
//! Where to begin: [`broker`].

pub mod broker;
pub mod client;
mod due;
pub mod rules;
pub mod time;
pub mod worker;

pub use rules::{Rule, Rules};
use time::Clock;
pub use time::MonoTime;

/// What a person reads of a task whose time ran out, whoever of the three noticed first.
const DEADLINE_PASSED: &str = "the deadline passed before there was a result";
