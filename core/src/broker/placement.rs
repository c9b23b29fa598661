//! Placement: pure functions of a task and the Metric Table that pick the task's worker.
//!
//! A worker must fit ([`obstacle`]) and have room. The policy takes the best of these. A worker that has failed the
//! task or misses its service level is taken only if there is no other. Under `predicted`, a task is held back from a
//! worker with room if a full one would still finish it clearly earlier.
//!
//! One look visits a bounded number of workers, however many there are: the indexes list the promising ones first. What
//! a look misses, the next heartbeat of a worker with room makes up for.

use proto_msgs::{Direction, Prediction, WorkerId, limits::DECISION_CANDIDATES_MAX};

use super::{
    config::Policy,
    decision::{Obstacle, Rated},
    obstacle::{self, direction},
    predict::{self, Guess, has_room, predict},
    slo::{Slos, Stance},
    tasks::Task,
    worker::{Seat, Worker},
    workers::{KINDS_LOOK_MAX, Workers},
};
use crate::MonoTime;

/// Workers looked at for one task: this many that have the model, and this many of the least busy. Among many, a better
/// one is rarely missed by much; a longer look would cost every task as much as it gains a few.
pub(super) const LOOK_MAX: usize = 32;

/// Other workers looked at before a waiting task is given to one with room.
const ELSEWHERE_LOOK_MAX: usize = 16;

/// Added to a worker's predicted time for each preferred label that it lacks, besides a tenth of that time,
/// microseconds.
const UNLIKED_US: u64 = 5_000;

/// A task is held back only if it would end elsewhere within this part of the time, percent: idle machines cost more
/// than a small gain brings.
const SOONER_PERCENT: u64 = 90;

/// The input of a placement decision.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scene<'a> {
    pub(super) now: MonoTime,
    pub(super) policy: Policy,
    pub(super) workers: &'a Workers,
    pub(super) slos: &'a Slos,
    /// The worker that got the last task, for `round-robin`.
    pub(super) last_chosen: Option<WorkerId>,
}

/// The chosen worker.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) worker: WorkerId,
    pub(super) direction: Direction,
    pub(super) prediction: Prediction,
    pub(super) rated: Vec<Rated>,
}

/// The result of a look.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The task goes to this worker.
    Place(Choice),
    /// No worker with room fits.
    Wait,
    /// Worker `elsewhere` has no room, but ends the task earlier; it runs it for `run_us`.
    HeldBack { elsewhere: Seat, run_us: u64 },
}

/// Sort key of a rated worker, smaller is better. The worker's id comes last, so that equal events give equal choices.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    is_obstructed: bool,
    is_doubtful: bool,
    stance: Stance,
    score: u64,
    lacks_model: bool,
    busy_permille: u16,
    worker: WorkerId,
}

/// The best worker with room.
#[derive(Clone, Copy, Debug)]
struct Best {
    key: Key,
    seat: Seat,
    prediction: Prediction,
}

/// Of the workers without room, the one that would end the task first.
#[derive(Clone, Copy, Debug)]
struct Sooner {
    seat: Seat,
    total_us: u64,
    run_us: u64,
}

/// Sums over the fitting workers, with or without room.
#[derive(Debug, Default)]
struct Fitting {
    /// Shortest predicted time among them, microseconds, and whether that worker has room.
    earliest: Option<(u64, bool)>,
    /// One of them has no measured cost for this task.
    is_unmeasured: bool,
    /// Slots of the task's lane.
    slots: u64,
    /// Time until each of these slots is free, summed up, microseconds.
    queues_us: u64,
}

impl Fitting {
    fn add(&mut self, slots: u16, prediction: &Prediction, has_room: bool) {
        let total_us = prediction.total_us();
        self.is_unmeasured |= !prediction.measured;
        self.slots += u64::from(slots);
        self.queues_us = self.queues_us.saturating_add(prediction.queue_us.saturating_mul(slots.into()));
        if self.earliest.is_none_or(|(us, _)| total_us < us) {
            self.earliest = Some((total_us, has_room));
        }
    }
}

/// The best few rated workers, for people who ask why.
#[derive(Debug)]
struct Shortlist {
    rated: Vec<(Key, Rated)>,
    /// Index of the worst of them.
    worst: usize,
}

impl Shortlist {
    fn new() -> Self {
        Self { rated: Vec::with_capacity(DECISION_CANDIDATES_MAX), worst: 0 }
    }

    fn add(&mut self, key: Key, rated: Rated) {
        if self.rated.len() < DECISION_CANDIDATES_MAX {
            self.rated.push((key, rated));
        } else if key < self.rated[self.worst].0 {
            self.rated[self.worst] = (key, rated);
        } else {
            return;
        }
        let worst = (0..self.rated.len()).max_by_key(|at| self.rated[*at].0);
        self.worst = worst.unwrap_or(0);
    }

    fn into_best_first(mut self) -> Vec<Rated> {
        self.rated.sort_unstable_by_key(|(key, _)| *key);
        self.rated.into_iter().map(|(_, rated)| rated).collect()
    }
}

/// A look at workers for one task.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    task: &'a Task,
    scene: Scene<'a>,
    guess: Guess,
    /// The turn of the task's stream.
    turn: u32,
    /// Number of workers rated.
    workers: u64,
    /// The permanent obstacle of each worker kind met so far, if any.
    kinds: Vec<(u32, Option<Obstacle>)>,
    best: Option<Best>,
    sooner: Option<Sooner>,
    fitting: Fitting,
    shortlist: Shortlist,
}

/// Looks for the best place among all workers.
pub(super) fn survey_all<'a>(task: &'a Task, scene: Scene<'a>) -> Survey<'a> {
    let mut survey = Survey::new(task, scene);
    let workers = scene.workers;
    if scene.policy == Policy::RoundRobin {
        let around = workers.after(scene.last_chosen).chain(workers.after(None));
        around.take(LOOK_MAX.min(workers.len())).for_each(|worker| survey.look(worker));
        return survey;
    }
    let model = task.spec.model.digest;
    let mut seen: Vec<Seat> = Vec::with_capacity(LOOK_MAX);
    for worker in workers.holders(model).take(LOOK_MAX) {
        seen.push(worker.seat);
        survey.look(worker);
    }
    if survey.is_content() {
        return survey;
    }
    let kinds: Vec<u32> = workers
        .kinds()
        .take(KINDS_LOOK_MAX)
        .filter(|(_, worker)| survey.ever(worker).is_none())
        .map(|(kind, _)| kind)
        .collect();
    let each = (LOOK_MAX / kinds.len().max(1)).max(1);
    for kind in kinds {
        let others = workers.with_room(kind, task.lane()).filter(|worker| !seen.contains(&worker.seat)).take(each);
        others.for_each(|worker| survey.look(worker));
    }
    survey
}

/// Looks like [`survey_all`]; if that finds no worker, looks at the first ones, since they show what is wrong.
pub(super) fn survey_some<'a>(task: &'a Task, scene: Scene<'a>) -> Survey<'a> {
    let mut survey = survey_all(task, scene);
    if survey.workers == 0 {
        scene.workers.after(None).take(DECISION_CANDIDATES_MAX).for_each(|worker| survey.look(worker));
    }
    survey
}

/// Rates one worker for a waiting task as if it had room; if `compare`, also looks what other workers could do.
pub(super) fn survey_here<'a>(task: &'a Task, scene: Scene<'a>, here: &Worker, compare: bool) -> Survey<'a> {
    let mut survey = Survey::new(task, scene);
    survey.rate(here, true);
    if compare && survey.best.is_some() && scene.policy == Policy::Predicted {
        let holders = scene.workers.holders(task.spec.model.digest).filter(|worker| worker.seat != here.seat);
        holders.take(ELSEWHERE_LOOK_MAX).for_each(|worker| survey.look_elsewhere(worker));
    }
    survey
}

impl<'a> Survey<'a> {
    fn new(task: &'a Task, scene: Scene<'a>) -> Self {
        Self {
            task,
            scene,
            guess: Guess::new(task, scene.workers.fleet()),
            turn: scene.slos.turn(&task.spec),
            workers: 0,
            kinds: Vec::new(),
            best: None,
            sooner: None,
            fitting: Fitting::default(),
            shortlist: Shortlist::new(),
        }
    }

    /// Number of looks taken, at workers and at worker kinds.
    pub(super) fn looked(&self) -> u64 {
        self.workers + self.kinds.len() as u64
    }

    /// The worker's permanent obstacle. Each kind is examined only once.
    fn ever(&mut self, worker: &Worker) -> Option<Obstacle> {
        if let Some((_, known)) = self.kinds.iter().find(|(kind, _)| *kind == worker.kind) {
            return *known;
        }
        let found = obstacle::ever(self.task, worker).next();
        self.kinds.push((worker.kind, found));
        found
    }

    /// Whether workers that lack the model need not be looked at: the best worker is ready, starts at once, and is as
    /// fast as an average worker that is ready.
    fn is_content(&self) -> bool {
        let is_plain = self.scene.policy == Policy::Predicted && self.task.spec.labels.is_empty();
        self.best.filter(|_| is_plain).is_some_and(|Best { key, prediction, .. }| {
            let Prediction { queue_us, load_us, handover_us, measured, .. } = prediction;
            let is_ready = measured && queue_us == 0 && load_us == 0 && !key.lacks_model;
            let us = prediction.total_us() - handover_us;
            is_ready && !key.is_doubtful && key.stance <= Stance::Ok && us <= self.guess.ready_us
        })
    }

    fn look(&mut self, worker: &Worker) {
        let has_room = has_room(self.task, worker);
        self.rate(worker, has_room);
    }

    /// Rates a worker other than the one being filled: it may be worth waiting for, but the task cannot go there.
    fn look_elsewhere(&mut self, worker: &Worker) {
        self.rate(worker, false);
    }

    fn rate(&mut self, worker: &Worker, has_room: bool) {
        self.workers += 1;
        let (task, scene) = (self.task, self.scene);
        let busy_permille = worker.busy_permille();
        let here = worker.model(task.spec.model.digest);
        let holds_model = here.held;
        let (packing, best_batch) = here.packing();
        let mut rated = Rated {
            worker: worker.id(),
            obstacle: None,
            prediction: Prediction::default(),
            busy_permille,
            holds_model,
            packing,
            best_batch,
        };
        let mut key = Key {
            is_obstructed: true,
            is_doubtful: is_doubtful(task, worker),
            stance: Stance::Ok,
            score: u64::MAX,
            lacks_model: !holds_model,
            busy_permille,
            worker: worker.id(),
        };
        rated.obstacle = self.ever(worker).or_else(|| obstacle::for_now(task, worker, scene.now).next());
        if rated.obstacle.is_none() {
            let stance = |stream| scene.slos.stance(scene.now, stream, worker.id(), self.turn);
            key.stance = task.stream.map_or(Stance::Ok, stance);
            rated.prediction = predict(task, worker, here, &self.guess, scene.now);
            key.score = score(task, worker, &scene, &rated.prediction);
            self.fits(&key, worker, &rated.prediction, has_room);
            if has_room {
                key.is_obstructed = false;
                if self.best.is_none_or(|best| key < best.key) {
                    self.best = Some(Best { key, seat: worker.seat, prediction: rated.prediction });
                }
            } else {
                let (lane, slots) = (task.lane(), worker.usable_slots(task.lane()));
                rated.obstacle = Some(Obstacle::SlotsInUse { lane, slots });
            }
        }
        self.shortlist.add(key, rated);
    }

    /// Counts a fitting worker, with or without room.
    fn fits(&mut self, key: &Key, worker: &Worker, prediction: &Prediction, has_room: bool) {
        let (seat, total_us, run_us) = (worker.seat, prediction.total_us(), prediction.run_us);
        self.fitting.add(predict::lane_slots(worker, self.task.lane()), prediction, has_room);
        let is_worth_waiting = !has_room && prediction.measured && !key.is_doubtful && key.stance <= Stance::Ok;
        if is_worth_waiting && self.sooner.is_none_or(|sooner| total_us < sooner.total_us) {
            self.sooner = Some(Sooner { seat, total_us, run_us });
        }
    }

    /// Whether a worker without room may be worth waiting for.
    pub(super) fn has_sooner(&self) -> bool {
        self.best.is_some() && self.sooner.is_some()
    }

    /// The worker without room that may be worth waiting for.
    pub(super) fn sooner(&self) -> Option<Seat> {
        self.sooner.map(|sooner| sooner.seat)
    }

    /// Whether the best worker is busy beyond the time at which all workers looked at would be done together.
    /// `waits_us` is the slot time of all waiting tasks. More work would only come from workers that fall idle before
    /// it. Half of the task may lie behind that time: rounded like this, no worker gets more than the others.
    pub(super) fn has_its_share(&self, waits_us: u64) -> bool {
        let Some(Best { prediction, .. }) = self.best.filter(|_| self.scene.policy == Policy::Predicted) else {
            return false;
        };
        let holders = self.scene.workers.holders_len(self.task.spec.model.digest).max(1) as u64;
        let waits_us = waits_us.saturating_mul(self.workers) / holders;
        let together_us = self.fitting.queues_us.saturating_add(waits_us) / self.fitting.slots.max(1);
        prediction.measured && prediction.queue_us.saturating_add(prediction.run_us / 2) > together_us
    }

    /// The worker kinds met that can never run the task, without those that only lack a way to its client.
    pub(super) fn unfit_kinds(&self) -> impl Iterator<Item = u32> {
        let unfit = |found: Option<Obstacle>| found.is_some_and(|obstacle| obstacle != Obstacle::NoWay);
        self.kinds.iter().filter(move |(_, found)| unfit(*found)).map(|(kind, _)| *kind)
    }

    /// Decides. `before_us` is the work that goes before this task at the worker that is worth waiting for.
    pub(super) fn decide(self, before_us: u64) -> Verdict {
        let Some(Best { key, seat, prediction }) = self.best else { return Verdict::Wait };
        let may_wait = self.scene.policy == Policy::Predicted && key.stance != Stance::Probe;
        if let Some(Sooner { seat: elsewhere, total_us, run_us }) = self.sooner.filter(|_| may_wait) {
            let sooner_us = total_us.saturating_add(before_us);
            let total_us = prediction.total_us();
            let is_sooner = prediction.measured && sooner_us < total_us / 100 * SOONER_PERCENT;
            let promised_us = self.task.spec.slo.map_or(0, |slo| u64::from(slo.latency_ms) * 1000);
            let is_better = key.stance > Stance::Ok && sooner_us <= promised_us;
            if is_better || (is_sooner && !key.is_doubtful) {
                return Verdict::HeldBack { elsewhere, run_us };
            }
        }
        let chosen = self.scene.workers.at(seat);
        let Some(direction) = chosen.and_then(|worker| direction(self.task, worker)) else { return Verdict::Wait };
        let rated = self.into_rated();
        Verdict::Place(Choice { worker: key.worker, direction, prediction, rated })
    }

    /// The best rated workers, best first.
    pub(super) fn into_rated(self) -> Vec<Rated> {
        self.shortlist.into_best_first()
    }

    /// Earliest predicted end of the task, microseconds from now; `None` if a worker has not measured it. `before_us`
    /// is added if the earliest worker has no room.
    pub(super) fn earliest_us(&self, before_us: u64) -> Option<u64> {
        let (us, has_room) = self.fitting.earliest.filter(|_| !self.fitting.is_unmeasured)?;
        Some(us.saturating_add(if has_room { 0 } else { before_us }))
    }
}

/// Whether the worker has failed the task, or could not be reached for it in one direction.
fn is_doubtful(task: &Task, worker: &Worker) -> bool {
    let id = worker.id();
    task.avoid.contains(&id) || task.unreachable.iter().any(|(unreachable, _)| *unreachable == id)
}

/// The policy's score; smaller is better.
fn score(task: &Task, worker: &Worker, scene: &Scene<'_>, prediction: &Prediction) -> u64 {
    match scene.policy {
        Policy::Predicted => {
            let total_us = prediction.total_us();
            let wishes = task.spec.labels.iter().filter(|rule| !rule.required);
            let unliked = wishes.filter(|rule| !obstacle::has_label(worker, &rule.key, &rule.value)).count() as u64;
            total_us.saturating_add(unliked.saturating_mul(total_us / 10 + UNLIKED_US))
        }
        Policy::LeastLoaded => u64::from(worker.busy_permille()),
        Policy::LatestHeartbeat => u64::MAX - worker.seen.as_micros(),
        // Equal scores: the id decides.
        Policy::RoundRobin => u64::from(Some(worker.id()) <= scene.last_chosen),
        Policy::Random => mixed(task.id().as_bytes(), worker.id().as_bytes()),
    }
}

/// A number that looks random but is always the same (FNV-1a, then the bits spread).
fn mixed(task: &[u8; 16], worker: &[u8; 16]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = task.iter().chain(worker).fold(0xcbf2_9ce4_8422_2325, step);
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
