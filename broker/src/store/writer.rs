//! The store's thread: it merges changes for a tick, writes them in one go, and tries again for as long as it takes.
//!
//! Owns the store's thread and the queue in front of it. Never blocks the run loop: [`Handle::save`] merges under a
//! lock that is held only for moments.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_core::broker::{Change, Event, TaskRecord};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{sleep, sleep_until, timeout},
};
use tracing::{error, info, warn};

use super::{Batch, EmbeddedStore, Kept, Redis, Store, StoreError, StoreSettings, Write, pending::Pending};

/// Time that changes gather before they are written. Heartbeats come every second: a reader sees them at most 5 % late,
/// and 10,000 workers make batches of 500.
const TICK: Duration = Duration::from_millis(50);

/// Changes in one write. A pipeline of this size takes Redis tens of milliseconds, well within the answer timeout.
const BATCH_WRITES_MAX: usize = 2_000;

/// Longest time of a write before the store counts as away. Longer than a disk's hiccup, shorter than the patience of a
/// client that waits for its detached task to be accepted.
const WRITE_MAX: Duration = Duration::from_secs(5);

/// Pauses between attempts while the store is away: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(2);

/// Interval of reminders in the log while the store is away.
const REMIND_EVERY: Duration = Duration::from_secs(60);

/// Time for unwritten changes at the end.
const FLUSH_MAX: Duration = Duration::from_secs(5);

/// Events that may wait for the run loop. If the queue is full, the writer waits; the loop never waits for the writer.
const EVENTS_MAX: usize = 4_096;

/// The run loop's handle of the store.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// An opened store.
#[derive(Debug)]
pub struct Opened {
    /// Takes changes.
    pub handle: Handle,
    /// Tasks from before the restart.
    pub restored: Vec<TaskRecord>,
    /// [`Event::Stored`], [`Event::StoreAway`] and [`Event::StoreBack`].
    pub events: mpsc::Receiver<Event>,
}

/// The state of the store.
#[derive(Clone, Debug, Default)]
pub struct StoreHealth {
    /// Since when the store has been away, and its last error; `None` while it answers.
    pub away: Option<(Instant, String)>,
    /// Number of unwritten changes.
    pub pending: usize,
    /// Age of the oldest unwritten change.
    pub lag: Duration,
    /// Number of changes written.
    pub written: u64,
    /// Number of writes.
    pub batches: u64,
    /// Number of failed writes and failed attempts to reach the store.
    pub failures: u64,
}

#[derive(Debug)]
struct Shared {
    pending: Mutex<Pending>,
    /// Whether workers and undurable tasks are written, too.
    shows_all: bool,
    /// Notified when there is something to write.
    some: Notify,
    /// Notified when there is something urgent to write, or at the end.
    urgent: Notify,
    closing: AtomicBool,
    closed: Notify,
    away: Mutex<Option<(Instant, String)>>,
    written: AtomicU64,
    batches: AtomicU64,
    failures: AtomicU64,
}

/// Opens the store on its own thread and reads the tasks it remembers. Waits for a store that does not answer.
///
/// # Errors
/// If the settings are wrong, or the store did not answer within `wait`.
pub async fn open(settings: StoreSettings, wait: Duration) -> Result<Opened, StoreError> {
    let (tell, opened) = oneshot::channel();
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime for one thread needs a few file descriptors");
        runtime.block_on(async {
            match settings {
                StoreSettings::Embedded(folder) => serve(async || EmbeddedStore::open(&folder), wait, tell).await,
                StoreSettings::Redis(settings) => serve(async || Redis::open(&settings).await, wait, tell).await,
            }
        });
    };
    thread::Builder::new().name("store".to_owned()).spawn(work).expect("a process may have a second thread");
    opened.await.expect("the store's thread answers before it ends")
}

/// The store's thread from start to end.
async fn serve<S: Store>(
    connect: impl AsyncFn() -> Result<S, StoreError>,
    wait: Duration,
    tell: oneshot::Sender<Result<Opened, StoreError>>,
) {
    let (store, restored) = match connect_and_restore(connect, wait).await {
        Ok(ready) => ready,
        Err(error) => return drop(tell.send(Err(error))),
    };
    let mut pending = Pending::default();
    pending.restored(&restored);
    let shared = Arc::new(Shared {
        pending: Mutex::new(pending),
        shows_all: S::SHOWS_ALL,
        some: Notify::new(),
        urgent: Notify::new(),
        closing: AtomicBool::new(false),
        closed: Notify::new(),
        away: Mutex::new(None),
        written: AtomicU64::new(0),
        batches: AtomicU64::new(0),
        failures: AtomicU64::new(0),
    });
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let opened = Opened { handle: Handle { shared: Arc::clone(&shared) }, restored, events: inbox };
    if tell.send(Ok(opened)).is_ok() {
        let keep_at = S::KEEP_EVERY.map(|every| Instant::now() + every);
        Writer { store, shared, events, away: None, tick_at: None, keep_at }.run().await;
    }
}

async fn connect_and_restore<S: Store>(
    connect: impl AsyncFn() -> Result<S, StoreError>,
    wait: Duration,
) -> Result<(S, Vec<TaskRecord>), StoreError> {
    let until = Instant::now() + wait;
    let mut pause = RETRY_FIRST;
    loop {
        let attempt = async {
            let mut store = connect().await?;
            let restored = store.restore().await?;
            Ok::<_, StoreError>((store, restored))
        };
        match attempt.await {
            Err(error) if !error.is_configuration() && Instant::now() < until => {
                if pause == RETRY_FIRST {
                    warn!("waiting up to {} s for the store: {error}", wait.as_secs());
                }
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_LAST);
            }
            outcome => return outcome,
        }
    }
}

impl Handle {
    /// Adds a change. Returns at once.
    pub fn save(&self, change: Change) {
        let shared = &self.shared;
        let of_interest = match &change {
            Change::PutTask { durable, .. } => *durable || shared.shows_all,
            Change::DropTask(_) => true,
            Change::PutWorker(_) | Change::DropWorker(_) => shared.shows_all,
        };
        if !of_interest {
            return;
        }
        let (some, urgent) = {
            let mut pending = shared.pending();
            let before = (pending.is_settled(), pending.has_urgent());
            pending.save(change, Instant::now());
            (before.0 && !pending.is_settled(), !before.1 && pending.has_urgent())
        };
        if some {
            shared.some.notify_one();
        }
        if urgent {
            shared.urgent.notify_one();
        }
    }

    /// The current state of the store.
    pub fn health(&self) -> StoreHealth {
        let (pending, behind_since) = {
            let pending = self.shared.pending();
            (pending.len(), pending.behind_since())
        };
        StoreHealth {
            away: self.shared.away.lock().clone(),
            pending,
            lag: behind_since.map(|since| since.elapsed()).unwrap_or_default(),
            written: self.shared.written.load(Ordering::Relaxed),
            batches: self.shared.batches.load(Ordering::Relaxed),
            failures: self.shared.failures.load(Ordering::Relaxed),
        }
    }

    /// Writes what is not written yet and gives the store up. Takes some seconds at most.
    pub async fn close(self) {
        let closed = self.shared.closed.notified();
        self.shared.closing.store(true, Ordering::Release);
        self.shared.urgent.notify_one();
        if timeout(FLUSH_MAX + WRITE_MAX, closed).await.is_err() {
            warn!("the store did not close in time");
        }
    }
}

impl Shared {
    /// A panic elsewhere leaves the map intact: no change to it is ever half done.
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock()
    }
}

/// State while the store is away.
struct Away {
    since: Instant,
    pause: Duration,
    remind_at: Instant,
}

struct Writer<S> {
    store: S,
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
    away: Option<Away>,
    /// When the gathered changes are written.
    tick_at: Option<Instant>,
    /// When [`Store::keep`] is called next; while the store is away, when it is tried again.
    keep_at: Option<Instant>,
}

/// The reason why the writer woke.
enum Wake {
    Keep,
    Urgent,
    Tick,
    Changed,
}

/// The result of a write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wrote {
    /// Everything that waited was written.
    All,
    /// One full batch was written.
    Part,
    /// The write failed: the store is away.
    Nothing,
}

impl<S: Store> Writer<S> {
    async fn run(mut self) {
        while !self.shared.closing.load(Ordering::Acquire) {
            match self.wake().await {
                Wake::Keep => self.keep().await,
                // While the store is away only its return matters: changes gather meanwhile.
                _ if self.away.is_some() => self.tick_at = None,
                Wake::Changed => self.tick_at = Some(self.tick_at.unwrap_or_else(|| Instant::now() + TICK)),
                Wake::Urgent => {
                    if self.write(false).await == Wrote::Part {
                        self.shared.urgent.notify_one();
                    }
                }
                Wake::Tick => {
                    let wrote = self.write(true).await;
                    self.tick_at = (wrote == Wrote::Part).then(Instant::now);
                }
            }
        }
        self.close().await;
    }

    /// Waits for something to do. Upkeep goes first: however much there is to write, the lease must be kept.
    async fn wake(&self) -> Wake {
        tokio::select! {
            biased;
            () = at(self.keep_at) => Wake::Keep,
            () = self.shared.urgent.notified() => Wake::Urgent,
            () = at(self.tick_at) => Wake::Tick,
            () = self.shared.some.notified() => Wake::Changed,
        }
    }

    async fn close(mut self) {
        let flushed = async { while self.away.is_none() && self.write(true).await == Wrote::Part {} };
        if timeout(FLUSH_MAX, flushed).await.is_err() {
            warn!("the store took too long: the last changes are not in it");
        }
        let unwritten = self.shared.pending().len();
        if unwritten > 0 {
            error!("{unwritten} changes could not be written to the store before the end");
        }
        self.store.release().await;
        self.shared.closed.notify_one();
    }

    /// Writes one batch: of everything that waits if `all`, else of urgent changes only.
    async fn write(&mut self, all: bool) -> Wrote {
        let taken_at = Instant::now();
        let batch = self.shared.pending().take(BATCH_WRITES_MAX, all);
        if batch.is_empty() {
            return Wrote::All;
        }
        match limited(self.store.write(&batch)).await {
            Ok(()) => {
                self.written(&batch, taken_at).await;
                if batch.len() < BATCH_WRITES_MAX { Wrote::All } else { Wrote::Part }
            }
            Err(error) => {
                self.shared.pending().put_back(batch);
                self.failed(&error).await;
                Wrote::Nothing
            }
        }
    }

    async fn written(&mut self, batch: &Batch, taken_at: Instant) {
        self.shared.pending().written(taken_at);
        self.shared.batches.fetch_add(1, Ordering::Relaxed);
        self.shared.written.fetch_add(batch.len() as u64, Ordering::Relaxed);
        for write in batch {
            if let Write::PutTask { record, durable: true } = write {
                self.tell(Event::Stored { task: record.spec.task, footing: record.footing() }).await;
            }
        }
    }

    /// Checks that the store answers and is this broker's, and catches up if it was away.
    async fn keep(&mut self) {
        self.keep_at = S::KEEP_EVERY.map(|every| Instant::now() + every);
        match (limited(self.store.keep()).await, &self.away) {
            (Err(error), _) => self.failed(&error).await,
            (Ok(Kept::Same), None) => {}
            (Ok(Kept::Emptied), None) => {
                self.shared.pending().write_all_again();
                self.tick_at = Some(Instant::now());
            }
            (Ok(_), Some(away)) => {
                let since = away.since;
                if self.catch_up().await {
                    info!("the store is back after {:.1} s and has everything again", since.elapsed().as_secs_f64());
                    self.away = None;
                    self.set_health(None);
                    self.tell(Event::StoreBack).await;
                }
            }
        }
    }

    /// Writes everything that lives, tasks first; `false` if the store went away again.
    async fn catch_up(&mut self) -> bool {
        let writes = {
            let mut pending = self.shared.pending();
            pending.write_all_again();
            pending.len() / BATCH_WRITES_MAX + 1
        };
        // Bounded, because heartbeats of very many workers may come as fast as they are written.
        for _ in 0..writes {
            match self.write(true).await {
                Wrote::All => break,
                Wrote::Nothing => return false,
                Wrote::Part => {}
            }
            // Upkeep between batches, so that a long catch-up does not cost the lease.
            if let Err(error) = limited(self.store.keep()).await {
                self.failed(&error).await;
                return false;
            }
        }
        self.tick_at = Some(Instant::now());
        true
    }

    async fn failed(&mut self, error: &StoreError) {
        self.shared.failures.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let is_news = self.away.is_none();
        if is_news {
            let until = if error.is_configuration() { "that is mended" } else { "it is back" };
            error!("{error}; decisions go on, detached tasks are refused until {until}");
        }
        let away = self.away.get_or_insert(Away { since: now, pause: RETRY_FIRST, remind_at: now + REMIND_EVERY });
        if now >= away.remind_at {
            away.remind_at = now + REMIND_EVERY;
            warn!("the store has been away for {} s: {error}", away.since.elapsed().as_secs());
        }
        self.keep_at = Some(now + away.pause);
        away.pause = (away.pause * 2).min(RETRY_LAST);
        let since = away.since;
        self.set_health(Some((since, error.to_string())));
        if is_news {
            self.tell(Event::StoreAway).await;
        }
    }

    fn set_health(&self, away: Option<(Instant, String)>) {
        *self.shared.away.lock() = away;
    }

    async fn tell(&self, event: Event) {
        // The receiver is gone only at the end of the process.
        let _ = self.events.send(event).await;
    }
}

/// Sleeps until then, or for ever.
async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}

/// Runs a store operation with a time limit: a store that hangs counts as away.
async fn limited<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(WRITE_MAX, work).await.unwrap_or_else(|_| {
        let reason = format!("no answer within {} s", WRITE_MAX.as_secs());
        Err(StoreError::Away { server: "the store".to_owned(), reason })
    })
}
