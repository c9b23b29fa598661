//! What outlives the broker: the Metric Table for others to read, and tasks that must survive a restart.
//!
//! Owns how changes get to a store and what happens when it is away. Never: a decision. The machine goes on without its
//! store; it only hears [`Event::Stored`], [`Event::StoreAway`] and [`Event::StoreBack`].
//!
//! ```text
//!   run loop                          thread "store"
//!   save(change) -> [pending] -----> writer -----> Redis | embedded file
//!                   merged by key    one write at a time, retried until it succeeds
//!   next_event() <------------------ Stored, StoreAway, StoreBack
//! ```

mod embedded;
mod lists;
mod pending;
pub mod record;
mod redis;
#[cfg(test)]
pub(crate) mod samples;
mod writer;

use std::{future::Future, path::PathBuf, time::Duration};

#[cfg(doc)]
use mesh_core::broker::Event;
use mesh_core::broker::TaskRecord;

pub use self::{
    embedded::{EmbeddedStore, FILE_NAME},
    pending::{Batch, Write},
    redis::{Redis, RedisAddress, RedisAddressError, RedisSettings},
    writer::{Handle, Opened, StoreHealth, open},
};

/// A place where records are kept. Called by one writer, one call at a time.
pub trait Store {
    /// What it is called in health and views.
    const NAME: &'static str;

    /// How often [`Self::keep`] is to be called when nothing is written; `None` if never.
    const KEEP_EVERY: Option<Duration>;

    /// Whether it shows workers and undurable tasks to others. If not, it is only told of durable tasks.
    const SHOWS_ALL: bool;

    /// Tasks that were to be remembered. Called once, first.
    fn restore(&mut self) -> impl Future<Output = Result<Vec<TaskRecord>, StoreError>>;

    /// Writes all of it. After an error any part of it may be written; it comes again.
    fn write(&mut self, batch: &Batch) -> impl Future<Output = Result<(), StoreError>>;

    /// Makes sure that the store answers and is still this broker's.
    fn keep(&mut self) -> impl Future<Output = Result<Kept, StoreError>>;

    /// Gives the store up, so that the next broker need not wait for it.
    fn release(self) -> impl Future<Output = ()>;
}

/// What [`Store::keep`] found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kept {
    /// All as before.
    Same,
    /// The store may have lost what was in it: write everything that lives again.
    Emptied,
}

/// Which store, and where.
#[derive(Clone, Debug)]
pub enum StoreSettings {
    /// A file of the broker's own, in this folder.
    Embedded(PathBuf),
    /// A Redis server, its sentinels, or a cluster.
    Redis(Box<RedisSettings>),
}

impl StoreSettings {
    /// What the store is called.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embedded(_) => EmbeddedStore::NAME,
            Self::Redis(_) => Redis::NAME,
        }
    }

    /// Whether the store shows workers.
    pub const fn shows_workers(&self) -> bool {
        match self {
            Self::Embedded(_) => EmbeddedStore::SHOWS_ALL,
            Self::Redis(_) => Redis::SHOWS_ALL,
        }
    }
}

/// Why a store does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be used.
    #[error("state folder {folder} cannot be written: {source}; name another with --state-dir")]
    Folder {
        /// Which.
        folder: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Another broker has the file open.
    #[error("state folder {folder} is in use by another broker: give this one its own with --state-dir")]
    Locked {
        /// Which.
        folder: PathBuf,
    },
    /// The file is not what a broker wrote.
    #[error(
        "{file} is damaged ({reason}): move it away and start again; detached tasks in it are lost, attached ones come back from their clients"
    )]
    Damaged {
        /// Which.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another broker works under the same cluster name.
    #[error(
        "cluster '{cluster}' at {server} already has a broker ({holder}): stop that one, or name another cluster with --cluster"
    )]
    Taken {
        /// Which.
        cluster: String,
        /// Where.
        server: String,
        /// What the other broker says of itself.
        holder: String,
    },
    /// A key of ours is something else's.
    #[error(
        "key {key} at {server} is a {found}, not the {wanted} this broker keeps there: delete it, or name another cluster with --cluster"
    )]
    Foreign {
        /// Which.
        key: String,
        /// Where.
        server: String,
        /// What is there.
        found: String,
        /// What should be.
        wanted: &'static str,
    },
    /// The server does not let this user in or do what is needed.
    #[error(
        "{server} refuses this broker: {reason}; check user and password in --redis, and that the user may write keys mesh:*"
    )]
    Refused {
        /// Where.
        server: String,
        /// What it says.
        reason: String,
    },
    /// The settings make no sense to the client library.
    #[error("--redis {server} cannot be used: {reason}")]
    Unusable {
        /// Where.
        server: String,
        /// What is wrong.
        reason: String,
    },
    /// It does not answer, or cannot write right now.
    #[error("{server} cannot be used right now: {reason}")]
    Away {
        /// Where.
        server: String,
        /// What happened.
        reason: String,
    },
}

impl StoreError {
    /// Whether only a person can help: trying again at the start makes no sense.
    pub const fn is_configuration(&self) -> bool {
        !matches!(self, Self::Away { .. })
    }
}
