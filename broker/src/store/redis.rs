//! The store in Redis: a table for people and other programs, and the memory for restarts.
//!
//! Owns the names of the keys and their content. The braces put all keys of a mesh into one slot of a Redis Cluster.
//!
//! ```text
//!   mesh:{NAME}:worker:<id>  hash, a worker's row; expires when the worker falls silent
//!   mesh:{NAME}:workers      sorted set of worker ids by last seen (milliseconds since 1970)
//!   mesh:{NAME}:task:<id>    hash, a task
//!   mesh:{NAME}:tasks        set of the task ids
//!   mesh:{NAME}:broker       text, who keeps this table; expires seconds after that broker has died
//! ```

mod address;
mod certificate;
mod lease;

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use mesh_core::broker::TaskRecord;
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult,
    aio::MultiplexedConnection, cluster_async::ClusterConnection,
};
use tracing::{debug, error, info, warn};

use self::address::Client;
pub use self::address::{RedisAddress, RedisAddressError};
use super::{
    Batch, Kept, Store, StoreError, Write,
    record::{self, RecordError},
};

/// Longest time to connect.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// Longest time until a pipeline is answered.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Time that a row outlives its worker, so that the broker, and not Redis' clock, decides when a worker is dead. Rows
/// expire only if their broker is gone.
const ROW_GRACE: Duration = Duration::from_secs(2);

/// Time that the index of workers outlives the last heartbeat; longer than any sensible heartbeat interval.
const INDEX_KEPT: Duration = Duration::from_secs(3600);

/// Time after which an untouched task belongs to no broker: longer than the longest deadline plus the time that results
/// are kept.
const TASK_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Tasks per pipeline when they are read at the start.
const RESTORE_PAGE: usize = 500;

/// Settings of the connection to Redis.
#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// Address of the server.
    pub address: RedisAddress,
    /// Certificate authority (PEM) in place of the system's.
    pub root_cert: Option<PathBuf>,
    /// Name of the mesh.
    pub cluster: String,
    /// This broker's description of itself in the lease; must differ between any two starts.
    pub holder: String,
}

/// The store in Redis.
pub struct Redis {
    settings: RedisSettings,
    client: Client,
    connection: Option<Connection>,
    /// Time at which the lease was last known to be this broker's.
    leased_at: Option<Instant>,
}

enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redis({:?})", self.settings)
    }
}

impl Redis {
    /// Connects to the server.
    ///
    /// # Errors
    /// If the settings are wrong, or the server does not answer.
    pub async fn open(settings: &RedisSettings) -> Result<Self, StoreError> {
        // Fails only if a provider is already installed, which is just as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let server = settings.address.shown().to_owned();
        let root_cert = match &settings.root_cert {
            None => None,
            Some(file) => Some(std::fs::read(file).map_err(|error| StoreError::Unusable {
                server: server.clone(),
                reason: format!("--redis-ca {}: {error}", file.display()),
            })?),
        };
        let client = settings.address.client(root_cert);
        let client = client.map_err(|error| StoreError::Unusable { server, reason: error.to_string() })?;
        let mut store = Self { settings: settings.clone(), client, connection: None, leased_at: None };
        store.ask::<()>(redis::pipe().cmd("PING").ignore()).await?;
        Ok(store)
    }

    fn key(&self, name: &str) -> String {
        format!("mesh:{{{}}}:{name}", self.settings.cluster)
    }

    fn id_key(&self, kind: &str, id: impl fmt::Display) -> String {
        format!("mesh:{{{}}}:{kind}:{id}", self.settings.cluster)
    }

    /// Sends a pipeline and reads its answers. After an error the next call reconnects, since the server may be another
    /// one.
    async fn ask<T: FromRedisValue>(&mut self, pipeline: &Pipeline) -> Result<T, StoreError> {
        let answer = self.try_ask(pipeline).await;
        answer.map_err(|error| {
            self.connection = None;
            self.explain(&error)
        })
    }

    async fn try_ask<T: FromRedisValue>(&mut self, pipeline: &Pipeline) -> RedisResult<T> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(connect(&mut self.client).await?),
        };
        match connection {
            Connection::One(connection) => pipeline.query_async(connection).await,
            Connection::Cluster(connection) => pipeline.query_async(connection).await,
        }
    }

    fn explain(&self, error: &RedisError) -> StoreError {
        let server = self.settings.address.shown().to_owned();
        let said = error.clone().into_server_errors();
        if let Some((_, said)) = said.as_deref().and_then(<[_]>::first) {
            let reason = format!("{} {}", said.code(), said.details().unwrap_or_default());
            let is_login = matches!(said.code(), "NOAUTH" | "NOPERM" | "WRONGPASS");
            return if is_login { StoreError::Refused { server, reason } } else { StoreError::Away { server, reason } };
        }
        let reason = error.to_string();
        if let Some(fault) = certificate::fault(&reason) {
            return StoreError::Certificate { server, fault, reason };
        }
        match error.kind() {
            ErrorKind::AuthenticationFailed => StoreError::Refused { server, reason },
            ErrorKind::InvalidClientConfig => StoreError::Unusable { server, reason },
            _ => StoreError::Away { server, reason },
        }
    }

    /// Fails if other software uses one of this broker's keys.
    async fn check_types(&mut self, keys: &[(String, &'static str)]) -> Result<(), StoreError> {
        let mut pipeline = Pipeline::new();
        for (key, _) in keys {
            pipeline.cmd("TYPE").arg(key);
        }
        let found: Vec<String> = self.ask(&pipeline).await?;
        let foreign = keys.iter().zip(found).find(|((_, wanted), found)| found != wanted && found != "none");
        match foreign {
            None => Ok(()),
            Some(((key, wanted), found)) => {
                let server = self.settings.address.shown().to_owned();
                Err(StoreError::Foreign { key: key.clone(), server, found, wanted })
            }
        }
    }

    /// Warns if the server would lose everything with its process.
    async fn look_at_persistence(&mut self) {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("CONFIG").arg("GET").arg("appendonly");
        match self.ask::<(HashMap<String, String>,)>(&pipeline).await {
            Ok((settings,)) if settings.get("appendonly").is_some_and(|value| value == "no") => warn!(
                "{} has no append-only file: detached tasks are lost if it is killed (redis-cli CONFIG SET appendonly yes)",
                self.settings.address.shown()
            ),
            Ok(_) => {}
            Err(error) => debug!("whether the server has an append-only file is not known: {error}"),
        }
    }

    /// Reads one page of tasks. It deletes those that need not be remembered, and those that only an older broker could
    /// read, since nobody would ever end them. Returns the number of the latter.
    async fn restore_page(&mut self, ids: &[String], records: &mut Vec<TaskRecord>) -> Result<usize, StoreError> {
        let mut read = Pipeline::new();
        let keys: Vec<_> = ids.iter().map(|id| (self.id_key("task", id), "hash")).collect();
        self.check_types(&keys).await?;
        for (key, _) in &keys {
            read.cmd("HGETALL").arg(key);
        }
        let rows: Vec<HashMap<String, String>> = self.ask(&read).await?;
        let (mut clean, mut outdated) = (Pipeline::new(), 0);
        for ((id, (key, _)), row) in ids.iter().zip(&keys).zip(rows) {
            let read = record::task_from_fields(&row);
            outdated += usize::from(matches!(read, Err(RecordError::Outdated(_))));
            match read {
                Ok((record, true)) => records.push(record),
                Err(reason @ (RecordError::Version(_) | RecordError::Field { .. })) if !row.is_empty() => error!(
                    "key {key} at {} holds a task that cannot be read: {reason}; it stays there and does not run \
                     (redis-cli DEL {key} gives it up)",
                    self.settings.address.shown(),
                ),
                _ => {
                    clean.cmd("SREM").arg(self.key("tasks")).arg(id).ignore();
                    clean.cmd("DEL").arg(key).ignore();
                }
            }
        }
        if !clean.is_empty() {
            self.ask::<()>(&clean).await?;
        }
        Ok(outdated)
    }

    fn put_worker(&self, pipeline: &mut Pipeline, record: &mesh_core::broker::WorkerRecord, whole: bool) {
        let key = self.id_key("worker", record.register.worker);
        let row = pipeline.cmd("HSET").arg(&key);
        let identity = if whole { record::worker_identity(record) } else { Vec::new() };
        for (name, value) in identity.into_iter().chain(record::worker_state(record)) {
            row.arg(name).arg(value);
        }
        row.ignore();
        pipeline.cmd("PEXPIRE").arg(key).arg(millis(record.expires_after + ROW_GRACE)).ignore();
    }

    fn put_task(&self, pipeline: &mut Pipeline, task: &TaskRecord, durable: bool) {
        let key = self.id_key("task", task.spec.task);
        let row = pipeline.cmd("HSET").arg(&key);
        for (name, value) in record::task_fields(task, durable) {
            row.arg(name).arg(value);
        }
        row.ignore();
        pipeline.cmd("PEXPIRE").arg(key).arg(millis(TASK_KEPT)).ignore();
    }

    fn pipeline(&self, batch: &Batch) -> Pipeline {
        let mut pipeline = Pipeline::with_capacity(batch.len() * 2 + 6);
        let (mut seen, mut unseen) = (Cmd::new(), Cmd::new());
        let (mut added, mut removed) = (Cmd::new(), Cmd::new());
        seen.arg("ZADD").arg(self.key("workers"));
        unseen.arg("ZREM").arg(self.key("workers"));
        added.arg("SADD").arg(self.key("tasks"));
        removed.arg("SREM").arg(self.key("tasks"));
        for write in batch {
            match write {
                Write::PutWorker { record, whole } => {
                    self.put_worker(&mut pipeline, record, *whole);
                    seen.arg(record.seen_unix_ms).arg(record.register.worker.to_string());
                }
                Write::DropWorker(worker) => {
                    pipeline.cmd("DEL").arg(self.id_key("worker", worker)).ignore();
                    unseen.arg(worker.to_string());
                }
                Write::PutTask { record, durable } => {
                    self.put_task(&mut pipeline, record, *durable);
                    added.arg(record.spec.task.to_string());
                }
                Write::DropTask(task) => {
                    pipeline.cmd("DEL").arg(self.id_key("task", task)).ignore();
                    removed.arg(task.to_string());
                }
            }
        }
        // Indexes last, so that an id that is listed has its row.
        for index in [seen, unseen, added, removed] {
            if index.args_iter().len() > 2 {
                pipeline.add_command(index).ignore();
            }
        }
        pipeline.cmd("PEXPIRE").arg(self.key("workers")).arg(millis(INDEX_KEPT)).ignore();
        pipeline.cmd("PEXPIRE").arg(self.key("tasks")).arg(millis(TASK_KEPT)).ignore();
        pipeline
    }

    /// If a write of this batch failed because a key has another type, the error names that key.
    async fn foreign_key(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let rows = batch.iter().filter_map(|write| match write {
            Write::PutWorker { record, .. } => Some((self.id_key("worker", record.register.worker), "hash")),
            Write::PutTask { record, .. } => Some((self.id_key("task", record.spec.task), "hash")),
            Write::DropWorker(_) | Write::DropTask(_) => None,
        });
        let keys: Vec<_> = rows.chain(self.fixed_keys()).collect();
        self.check_types(&keys).await
    }

    fn fixed_keys(&self) -> [(String, &'static str); 3] {
        [(self.key("broker"), "string"), (self.key("workers"), "zset"), (self.key("tasks"), "set")]
    }
}

impl Store for Redis {
    const NAME: &'static str = "redis";
    const KEEP_EVERY: Option<Duration> = Some(lease::KEEP_EVERY);
    const SHOWS_ALL: bool = true;

    async fn restore(&mut self) -> Result<Vec<TaskRecord>, StoreError> {
        let keys = self.fixed_keys();
        self.check_types(&keys).await?;
        self.take_lease().await?;
        self.look_at_persistence().await;
        // Workers that are alive are added again by their next heartbeats.
        let mut read = Pipeline::new();
        read.cmd("DEL").arg(self.key("workers")).ignore();
        read.cmd("SMEMBERS").arg(self.key("tasks"));
        let (ids,): (Vec<String>,) = self.ask(&read).await?;
        let (mut records, mut outdated) = (Vec::new(), 0);
        for page in ids.chunks(RESTORE_PAGE) {
            outdated += self.restore_page(page, &mut records).await?;
        }
        if outdated > 0 {
            info!("{outdated} tasks of an older version were dropped from {}", self.settings.address.shown());
        }
        info!(
            "{} remembers {} tasks of mesh '{}'",
            self.settings.address.shown(),
            records.len(),
            self.settings.cluster
        );
        Ok(records)
    }

    async fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        if self.leased_at.is_none_or(|at| at.elapsed() >= lease::LEASE_TTL) {
            let reason = "this broker was stopped for so long that its lease ran out".to_owned();
            return Err(StoreError::Away { server: self.settings.address.shown().to_owned(), reason });
        }
        let pipeline = self.pipeline(batch);
        match self.ask::<()>(&pipeline).await {
            Err(error) if is_wrong_type(&error) => {
                self.foreign_key(batch).await?;
                Err(error)
            }
            answer => answer,
        }
    }

    async fn keep(&mut self) -> Result<Kept, StoreError> {
        match self.keep_lease().await {
            Err(error) if is_wrong_type(&error) => {
                self.check_types(&self.fixed_keys()).await?;
                Err(error)
            }
            kept => kept,
        }
    }

    async fn release(mut self) {
        if let Err(error) = self.release_lease().await {
            debug!("the lease runs out by itself: {error}");
        }
    }
}

/// Whether other software uses a key of this broker. The server does not say which.
fn is_wrong_type(error: &StoreError) -> bool {
    matches!(error, StoreError::Away { reason, .. } if reason.starts_with("WRONGTYPE"))
}

async fn connect(client: &mut Client) -> RedisResult<Connection> {
    let config =
        AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_MAX)).set_response_timeout(Some(ANSWER_MAX));
    Ok(match client {
        Client::Server(client) => Connection::One(client.get_multiplexed_async_connection_with_config(&config).await?),
        Client::Sentinels(client) => Connection::One(client.get_async_connection_with_config(&config).await?),
        Client::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
    })
}

fn millis(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)
}
