//! BYTES: sockets, keys and the direct blob stream. The only crate that knows ZeroMQ.
//!
//! Owns connections, admission by key, queues per peer, flow control of blobs. Never: decisions, messages' meanings
//! (beyond chunks and credits), stores.
//!
//! ```text
//!   Context --listen--> Listener --spawn--> (Door, Inbox<Received>)     Door::to(peer) --> Outlet
//!      |                (direct form: the broker's loop)                                     |
//!      '-----dial-----> Dialer ----spawn--> (Outlet, Inbox<Heard>)                         blob::upload
//! ```
//!
//! A listener is a ROUTER, a dialer a DEALER. The direct forms belong to one task and cost no hop; the spawned forms
//! can be used from many tasks. An [`Outlet`] is one peer, whichever side dialled, so its users need not know who did.
//!
//! Where to begin: [`Context`], then [`Listener`], then [`blob`].

pub mod address;
pub mod blob;
mod context;
mod descriptors;
mod dialer;
mod direct;
mod doorkeeper;
mod heap;
pub mod keys;
mod listener;
mod monitor;
mod outlet;
mod queue;
mod raw;
mod socket;

pub use context::{Admit, Admitted, Context, ContextError, Limits, Security};
pub use descriptors::raise_open_files;
pub use dialer::{DialError, Dialer, Heard, dial_first};
pub use direct::Traffic;
pub use heap::keep_freed_messages;
pub use keys::KeyPair;
pub use listener::{ListenError, Listener, Received};
pub use outlet::{Door, Inbox, Outlet, SendError};
