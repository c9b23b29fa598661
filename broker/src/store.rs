//! What outlives the broker: the Metric Table for others to read, and tasks that must survive a restart.
//!
//! Owns the way of changes to a store, and what happens when the store is away. Never: a decision. The machine goes on
//! without its store; it only hears [`Event::Stored`], [`Event::StoreAway`] and [`Event::StoreBack`].
//!
//! ```text
//!   run loop                          thread "store"
//!   save(change) -> [pending] -----> writer -----> Redis | embedded file
//!                   merged by key    one write at a time, retried until it succeeds
//!   Opened::events <---------------- Stored, StoreAway, StoreBack
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
    embedded::{EmbeddedStore, FREE_NEEDED_BYTES},
    pending::{Batch, Write},
    redis::{Redis, RedisAddress, RedisAddressError, RedisSettings},
    writer::{Handle, Opened, StoreHealth, open},
};

/// A place for records. One writer calls it, one call at a time.
pub trait Store {
    /// The store's name in health and views.
    const NAME: &'static str;

    /// Interval of [`Self::keep`] when nothing is written; `None` if never.
    const KEEP_EVERY: Option<Duration>;

    /// Whether the store shows workers and undurable tasks to others. If not, it gets durable tasks only.
    const SHOWS_ALL: bool;

    /// The tasks to remember. Called once, before any other call.
    fn restore(&mut self) -> impl Future<Output = Result<Vec<TaskRecord>, StoreError>>;

    /// Writes the whole batch. After an error any part of it may be written, and the batch comes again.
    fn write(&mut self, batch: &Batch) -> impl Future<Output = Result<(), StoreError>>;

    /// Checks that the store answers and still belongs to this broker.
    fn keep(&mut self) -> impl Future<Output = Result<Kept, StoreError>>;

    /// Gives the store up, so that the next broker need not wait for it.
    fn release(self) -> impl Future<Output = ()>;
}

/// The result of [`Store::keep`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kept {
    /// The store is unchanged.
    Same,
    /// The store may have lost its content: everything that lives must be written again.
    Emptied,
}

/// The kind of store, and its place.
#[derive(Clone, Debug)]
pub enum StoreSettings {
    /// A file of this broker alone, in this folder.
    Embedded(PathBuf),
    /// A Redis server, its sentinels, or a cluster.
    Redis(Box<RedisSettings>),
}

impl StoreSettings {
    /// The store's name in health and views.
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

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be used.
    #[error("state folder {folder} cannot be written: {source}; name another with --state-dir")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The disk of the folder is full.
    #[error(
        "the disk of state folder {folder} is full ({source}): free {} MiB there, or name another folder with --state-dir",
        FREE_NEEDED_BYTES >> 20
    )]
    Full {
        /// The folder.
        folder: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Another broker uses the folder.
    #[error("state folder {folder} is in use by another broker: give this one its own with --state-dir")]
    Locked {
        /// The folder.
        folder: PathBuf,
    },
    /// The file's content is not a broker's.
    #[error(
        "{file} is damaged ({reason}): move it away and start again; detached tasks in it are lost, attached ones come back from their clients"
    )]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The damage.
        reason: String,
    },
    /// Another broker uses the same cluster name.
    #[error(
        "cluster '{cluster}' at {server} already has a broker ({holder}): stop that one, or name another cluster with --cluster"
    )]
    Taken {
        /// The name of the cluster.
        cluster: String,
        /// The server.
        server: String,
        /// The other broker's description of itself.
        holder: String,
    },
    /// One of this broker's keys belongs to other software.
    #[error(
        "key {key} at {server} is a {found}, not the {wanted} this broker keeps there: delete it, or name another cluster with --cluster"
    )]
    Foreign {
        /// The key.
        key: String,
        /// The server.
        server: String,
        /// The type found.
        found: String,
        /// The type expected.
        wanted: &'static str,
    },
    /// The server refuses the login, or the user may not do what is needed.
    #[error(
        "{server} refuses this broker: {reason}; check user and password in --redis, and that the user may write keys mesh:*"
    )]
    Refused {
        /// The server.
        server: String,
        /// The server's answer.
        reason: String,
    },
    /// The server cannot show that it is the one that is meant.
    #[error("{server} cannot be trusted ({reason}): {fault}")]
    Certificate {
        /// The server.
        server: String,
        /// What is wrong, and the next step.
        fault: &'static str,
        /// The TLS library's words.
        reason: String,
    },
    /// The client library cannot use the settings.
    #[error("--redis {server} cannot be used: {reason}")]
    Unusable {
        /// The server.
        server: String,
        /// The library's reason.
        reason: String,
    },
    /// The store does not answer, or cannot write right now.
    #[error("{server} cannot be used right now: {reason}")]
    Away {
        /// The store.
        server: String,
        /// The error.
        reason: String,
    },
}

impl StoreError {
    /// Whether only a person can help, so that trying again at the start is useless.
    pub const fn is_configuration(&self) -> bool {
        !matches!(self, Self::Away { .. } | Self::Full { .. })
    }
}
