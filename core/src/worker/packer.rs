//! Waiting rows: a queue for each lane, model, stage, form of item and limits.
//!
//! ```text
//!   task ── rows 0..8 ──►  queue (realtime, encode)  ──►  rows of several tasks, one batch
//!                                                                │ its end
//!                          queue (realtime, decode)  ◄───────────┘ rows 0..8, of this task
//! ```
//!
//! Owns which rows wait and their order: by priority, then clients in turn, then within a client first come first
//! served. Never knows slots, devices or costs.

#[cfg(test)]
pub(super) mod tests;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use proto_msgs::{AttemptId, ClientId, DType, Demands, Digest, InputDecl, Lane, TicketBody, limits::STAGES_AFTER_MAX};

use super::{api::BatchId, linger::Linger};
use crate::{Census, MonoTime};

/// Most unused queues kept for what they know of their clients' habits; beyond that the stalest is dropped.
const IDLE_QUEUES_MAX: usize = 64;

/// Clients of one queue beyond which only those that wait in it are remembered: more than attempts at a worker.
const CLIENTS_MAX: usize = 256;

/// Limits of a run. A batch and a cost have one set of them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Limits {
    cpu_millis: u32,
    memory_bytes: u64,
    pub(super) gpu_memory_bytes: u64,
    /// The GPU whose memory is promised.
    pub(super) gpu: Option<u8>,
}

impl From<&TicketBody> for Limits {
    fn from(ticket: &TicketBody) -> Self {
        let Demands { cpu_millis, memory_bytes, gpu_memory_bytes, arch: _ } = ticket.demands;
        Self { cpu_millis, memory_bytes, gpu_memory_bytes, gpu: ticket.gpu }
    }
}

/// The form of one item of an input. Rows may share a batch only if their forms are equal.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Form {
    name: Option<String>,
    dtype: Option<u8>,
    /// The first dimension divided by the number of items, and the other dimensions.
    shape: Option<Vec<u64>>,
    item_bytes: u64,
}

impl Form {
    pub(super) fn of(input: &InputDecl, items: u32) -> Self {
        let items = u64::from(items.max(1));
        let shape = input.shape.clone().map(|mut shape| {
            if let Some(rows) = shape.first_mut() {
                *rows /= items;
            }
            shape
        });
        let dtype = input.dtype.map(|dtype: DType| dtype as u8);
        Self { name: input.name.clone(), dtype, shape, item_bytes: input.size_bytes / items }
    }
}

/// The properties that rows must share to run together.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Kind {
    pub(super) lane: Lane,
    /// The models passed so far, then the model that is next.
    pub(super) way: Vec<Digest>,
    pub(super) limits: Limits,
    pub(super) forms: Arc<[Form]>,
    /// For rows of clients whose rows ended a runner of the model: the others neither wait for them nor with them.
    pub(super) apart: bool,
}

/// The number of a queue. Numbers are never reused.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct QueueId(u64);

/// Consecutive waiting rows of one attempt.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) id: AttemptId,
    pub(super) client: ClientId,
    pub(super) priority: u8,
    pub(super) deadline: Option<MonoTime>,
    /// When its service level is missed.
    pub(super) slo_until: Option<MonoTime>,
    pub(super) rows: Range<u32>,
    pub(super) arrived: MonoTime,
    /// The queue of the next stage; `None` after the last one.
    pub(super) next: Option<QueueId>,
    pub(super) company: Company,
}

/// Which other rows a piece may run with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Company {
    /// With rows of other attempts.
    Any,
    /// With no other attempt.
    Alone,
    /// With no other attempt, because this batch of several attempts failed with these rows in it.
    AloneAfter(BatchId),
}

impl Piece {
    pub(super) fn len(&self) -> u32 {
        self.rows.end.saturating_sub(self.rows.start)
    }

    fn is_hurried(&self) -> bool {
        self.deadline.is_some() || self.slo_until.is_some()
    }

    pub(super) fn is_on_trial(&self) -> bool {
        matches!(self.company, Company::AloneAfter(_))
    }
}

/// A place in a queue; the smallest goes first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Rank {
    priority: Reverse<u8>,
    /// Rows that the client was given before.
    start_rows: u64,
    pub(super) arrival: u64,
}

/// Waiting rows that may run together.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) kind: Kind,
    pieces: BTreeMap<Rank, Piece>,
    by_arrival: BTreeMap<u64, Rank>,
    /// Rows in all pieces, and the number of pieces with a deadline or a service level.
    pub(super) rows: u32,
    hurried: u32,
    /// Start-time fair queueing in rows: the end of each client's last piece, and the start of the last piece taken.
    ends: BTreeMap<ClientId, u64>,
    virtual_rows: u64,
    /// Running batches of this queue.
    pub(super) running: u32,
    pub(super) linger: Linger,
    /// Attempts that pass through this queue.
    users: u32,
    used: MonoTime,
}

impl Queue {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            pieces: BTreeMap::new(),
            by_arrival: BTreeMap::new(),
            rows: 0,
            hurried: 0,
            ends: BTreeMap::new(),
            virtual_rows: 0,
            running: 0,
            linger: Linger::default(),
            users: 0,
            used: MonoTime::ZERO,
        }
    }

    /// The stage of its attempts that this queue is for.
    pub(super) fn stage(&self) -> u8 {
        u8::try_from(self.kind.way.len().saturating_sub(1)).unwrap_or(u8::MAX)
    }

    pub(super) fn model(&self) -> Digest {
        *self.kind.way.last().expect("a way has at least one model")
    }

    /// The pieces in the order in which they go. With `oldest` the piece that came first leads, whoever sent it.
    pub(super) fn in_order(&self, oldest: bool) -> impl Iterator<Item = (Rank, &Piece)> {
        let first = self.by_arrival.values().next().filter(|_| oldest).copied();
        let head = first.and_then(|rank| Some((rank, self.pieces.get(&rank)?)));
        let rest = self.pieces.iter().map(|(rank, piece)| (*rank, piece));
        head.into_iter().chain(rest.filter(move |(rank, _)| Some(*rank) != first))
    }

    pub(super) fn oldest(&self) -> Option<&Piece> {
        self.by_arrival.values().next().and_then(|rank| self.pieces.get(rank))
    }

    /// When the first result is due, by a deadline, or by a service level that a run of this length can still meet.
    pub(super) fn first_due(&self, now: MonoTime, run: Duration) -> Option<MonoTime> {
        if self.hurried == 0 {
            return None;
        }
        let slo = |piece: &Piece| piece.slo_until.filter(|until| now + run <= *until);
        self.pieces.values().flat_map(|piece| piece.deadline.into_iter().chain(slo(piece))).min()
    }

    /// Whether it matters to nobody which of the waiting rows run first, but that all clients have their turns.
    pub(super) fn is_calm(&self) -> bool {
        let [first, last] = [self.pieces.keys().next(), self.pieces.keys().next_back()];
        self.hurried == 0 && first.map(|rank| rank.priority) == last.map(|rank| rank.priority)
    }

    fn insert(&mut self, rank: Rank, piece: Piece) {
        self.rows += piece.len();
        self.hurried += u32::from(piece.is_hurried());
        self.by_arrival.insert(rank.arrival, rank);
        self.pieces.insert(rank, piece);
    }

    fn remove(&mut self, rank: Rank) -> Option<Piece> {
        let piece = self.pieces.remove(&rank)?;
        self.by_arrival.remove(&rank.arrival);
        self.rows -= piece.len();
        self.hurried -= u32::from(piece.is_hurried());
        Some(piece)
    }

    /// Takes up to `rows` rows of a piece. The rest keeps its turn, behind what other clients are due.
    pub(super) fn take(&mut self, rank: Rank, rows: u32) -> Option<Piece> {
        let mut piece = self.remove(rank)?;
        // Who comes later is not put behind those whose turn this was, if another's has been taken first.
        let waiting = self.pieces.keys().map(|other| other.start_rows).min().unwrap_or(u64::MAX);
        self.virtual_rows = self.virtual_rows.max(rank.start_rows.min(waiting));
        if rows < piece.len() {
            let middle = piece.rows.start + rows;
            let rest = Piece { rows: middle..piece.rows.end, ..piece.clone() };
            piece.rows.end = middle;
            let start_rows = rank.start_rows.saturating_add(u64::from(rows));
            self.insert(Rank { start_rows, ..rank }, rest);
        }
        self.rest();
        Some(piece)
    }

    /// Forgets who had how much once nobody waits.
    fn rest(&mut self) {
        if self.pieces.is_empty() {
            self.ends.clear();
            self.virtual_rows = 0;
        }
    }

    fn census(&self, census: &mut Census<'_>) {
        let Self {
            kind,
            pieces,
            by_arrival,
            rows,
            hurried,
            ends,
            virtual_rows: _,
            running: _,
            linger: _,
            users: _,
            used: _,
        } = self;
        census.lasting("models of a queue", kind.way.len(), 1 + STAGES_AFTER_MAX);
        census.passing("pieces of a queue", pieces.len(), *rows as usize);
        census.passing("pieces in a hurry", *hurried as usize, pieces.len());
        census.passing("pieces by arrival", by_arrival.len(), pieces.len());
        census.passing("clients of a queue", ends.len(), CLIENTS_MAX);
    }
}

/// All waiting rows of a worker.
#[derive(Debug, Default)]
pub(super) struct Packer {
    ids: BTreeMap<Kind, QueueId>,
    queues: BTreeMap<QueueId, Queue>,
    made: u64,
    arrivals: u64,
    /// When realtime rows last came, or a batch of them ended.
    realtime_seen: Option<MonoTime>,
}

impl Packer {
    /// Enters one more attempt into the queue of this kind, which is created if needed.
    pub(super) fn enter(&mut self, now: MonoTime, kind: Kind) -> QueueId {
        let id = *self.ids.entry(kind).or_insert_with_key(|kind| {
            self.made += 1;
            let id = QueueId(self.made);
            self.queues.insert(id, Queue::new(kind.clone()));
            id
        });
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.users += 1;
            queue.used = now;
        }
        id
    }

    /// Removes an ended attempt from its queues, with all rows that still wait.
    pub(super) fn leave(&mut self, id: AttemptId, way: &[QueueId]) {
        for number in way {
            let Some(queue) = self.queues.get_mut(number) else { continue };
            let its: Vec<Rank> =
                queue.pieces.iter().filter(|(_, piece)| piece.id == id).map(|(rank, _)| *rank).collect();
            for rank in its {
                queue.remove(rank);
            }
            queue.rest();
            queue.users = queue.users.saturating_sub(1);
        }
        self.drop_stalest();
    }

    /// Drops the stalest unused queues. An attempt may leave one for each of its stages.
    fn drop_stalest(&mut self) {
        let idle = || self.queues.iter().filter(|(_, queue)| queue.users == 0);
        let surplus = idle().count().saturating_sub(IDLE_QUEUES_MAX);
        if surplus == 0 {
            return;
        }
        let mut idle: Vec<(MonoTime, QueueId)> = idle().map(|(id, queue)| (queue.used, *id)).collect();
        idle.sort_unstable();
        for (_, stalest) in idle.drain(..surplus) {
            if let Some(queue) = self.queues.remove(&stalest) {
                self.ids.remove(&queue.kind);
            }
        }
    }

    /// Counts the queues, given how many are in use by attempts, and how many rows those have not run.
    pub(super) fn census(&self, (used, rows): (usize, usize), census: &mut Census<'_>) {
        let Self { ids, queues, made: _, arrivals: _, realtime_seen: _ } = self;
        census.lasting("queues", queues.len(), IDLE_QUEUES_MAX + used);
        census.lasting("queues by kind", ids.len(), queues.len());
        census.passing("places in queues", queues.values().map(|queue| queue.users as usize).sum(), used);
        census.passing("waiting rows", queues.values().map(|queue| queue.rows as usize).sum(), rows);
        queues.values().for_each(|queue| queue.census(census));
    }

    /// Waiting pieces that run alone after their batch failed.
    pub(super) fn on_trial(&self) -> usize {
        self.queues.values().flat_map(|queue| queue.pieces.values()).filter(|piece| piece.is_on_trial()).count()
    }

    pub(super) fn get(&self, id: QueueId) -> Option<&Queue> {
        self.queues.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: QueueId) -> Option<&mut Queue> {
        self.queues.get_mut(&id)
    }

    /// Whether realtime rows wait, run or did so within this time: more are to be expected.
    pub(super) fn is_realtime_near(&self, now: MonoTime, within: Duration) -> bool {
        let is_here = |queue: &Queue| queue.kind.lane == Lane::Realtime && (queue.rows > 0 || queue.running > 0);
        self.realtime_seen.is_some_and(|seen| now < seen + within) || self.queues.values().any(is_here)
    }

    /// A batch of this queue ended.
    pub(super) fn ended(&mut self, now: MonoTime, id: QueueId) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        queue.running = queue.running.saturating_sub(1);
        if queue.kind.lane == Lane::Realtime {
            self.realtime_seen = Some(now);
        }
    }

    /// Queues with waiting rows.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (QueueId, &Queue)> {
        self.queues.iter().filter(|(_, queue)| queue.rows > 0).map(|(id, queue)| (*id, queue))
    }

    /// Whether rows of the same lane wait or run in a stage before this one.
    pub(super) fn has_earlier_stage(&self, of: &Queue) -> bool {
        let is_earlier = |queue: &Queue| queue.kind.lane == of.kind.lane && queue.stage() < of.stage();
        self.queues.values().any(|queue| is_earlier(queue) && (queue.rows > 0 || queue.running > 0))
    }

    /// The number of waiting rows of a lane.
    pub(super) fn rows_of(&self, lane: Lane) -> u32 {
        self.waiting().filter(|(_, queue)| queue.kind.lane == lane).map(|(_, queue)| queue.rows).sum()
    }

    /// Puts rows back into the queue, ahead of all others of their priority.
    pub(super) fn push_back(&mut self, id: QueueId, piece: Piece) {
        self.arrivals += 1;
        if let Some(queue) = self.queues.get_mut(&id) {
            let rank = Rank { priority: Reverse(piece.priority), start_rows: 0, arrival: self.arrivals };
            queue.insert(rank, piece);
        }
    }

    /// Adds rows that wait from now on.
    pub(super) fn push(&mut self, now: MonoTime, id: QueueId, piece: Piece) {
        self.arrivals += 1;
        let arrival = self.arrivals;
        let Some(queue) = self.queues.get_mut(&id) else { return };
        if queue.kind.lane == Lane::Realtime {
            self.realtime_seen = Some(now);
        }
        queue.linger.arrived(now, piece.len(), queue.rows == 0 && queue.running == 0);
        queue.used = now;
        let end = queue.ends.entry(piece.client).or_default();
        let start_rows = queue.virtual_rows.max(*end);
        *end = start_rows.saturating_add(u64::from(piece.len()));
        if queue.ends.len() > CLIENTS_MAX {
            let mut waiting: BTreeSet<ClientId> = queue.pieces.values().map(|piece| piece.client).collect();
            waiting.insert(piece.client);
            queue.ends.retain(|client, _| waiting.contains(client));
        }
        let rank = Rank { priority: Reverse(piece.priority), start_rows, arrival };
        // Rows that a batch cut in two are one piece again at the next stage.
        let touches = |other: &Piece| other.id == piece.id && [other.company, piece.company] == [Company::Any; 2];
        let beside = |other: &Piece| other.rows.end == piece.rows.start || piece.rows.end == other.rows.start;
        let found = queue.pieces.iter().find(|(_, other)| touches(other) && beside(other)).map(|(rank, _)| *rank);
        match found.and_then(|rank| Some((rank, queue.remove(rank)?))) {
            Some((rank, mut other)) => {
                other.rows = other.rows.start.min(piece.rows.start)..other.rows.end.max(piece.rows.end);
                queue.insert(rank, other);
            }
            None => queue.insert(rank, piece),
        }
    }
}
