//! Placement: pure functions of a task and the Metric Table that pick the task's worker.
//!
//! A worker must fit ([`obstacle`]) and have room. The policy takes the best of these; under `predicted`, the emptier
//! of two that are nearly equal ([`beside`]). A worker that has failed the task or misses its service level is taken
//! only if there is no other. Under `predicted`, a task is held back from a worker with room if a full one would still
//! finish it clearly earlier. Now and then a worker whose figures are old is tried instead ([`trials`]).
//!
//! One look visits a bounded number of workers, however many there are: the indexes list the promising ones first. What
//! a look misses, the next heartbeat of a worker with room makes up for.

pub(crate) mod beside;
pub(crate) mod decision;
pub(crate) mod earliest;
pub(crate) mod given;
pub(crate) mod obstacle;
pub(crate) mod predict;
pub(crate) mod reasons;
pub(crate) mod savings;
pub(crate) mod scene;
mod score;
mod share;
mod shortlist;
mod sooner;
pub(crate) mod trials;

use std::time::Duration;

use proto_msgs::{Direction, Prediction, WorkerId, limits::DECISION_CANDIDATES_MAX};

use super::{
    config::Policy,
    slo::Stance,
    task::Task,
    workers::{
        KINDS_LOOK_MAX,
        worker::{ModelHere, Seat, Worker},
    },
};
use crate::MonoTime;
use decision::{Obstacle, Rated};
use earliest::Earliest;
use predict::{Guess, has_room, predict};
use savings::{Idle, Missed};
use scene::Scene;
use score::score;
use share::Fitting;
use shortlist::Shortlist;
use sooner::{Full, Offer, Sooner};

/// Workers looked at for one task: this many that have the model, and this many of the least busy. Among many, a better
/// one is rarely missed by much; a longer look would cost every task as much as it gains a few.
pub(super) const LOOK_MAX: usize = 32;

/// Other workers looked at before a waiting task is given to one with room.
const ELSEWHERE_LOOK_MAX: usize = 16;

/// The chosen worker.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) worker: WorkerId,
    pub(super) direction: Direction,
    pub(super) prediction: Prediction,
    pub(super) rated: Vec<Rated>,
    /// Set if the worker is only tried: the time that it was without such a task.
    pub(super) trial_after: Option<Duration>,
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
    /// Whether the worker gives a run less memory than others of the model needed.
    is_small: bool,
}

/// A look at workers for one task.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    task: &'a Task,
    scene: Scene<'a>,
    guess: Guess,
    /// Memory that was not enough for runs like this one.
    outgrown_bytes: u64,
    /// The turn of the task's stream.
    turn: u32,
    /// The workers rated.
    seen: Vec<Seat>,
    /// The permanent obstacle of each worker kind met so far, if any.
    kinds: Vec<(u32, Option<Obstacle>)>,
    /// Workers seen without room and not rated yet: they matter only beside one with room, or to those who ask why.
    full: Vec<&'a Worker>,
    best: Option<Best>,
    /// The longest predicted time of a trial, if the task may be one, microseconds.
    trial_us: Option<u64>,
    /// The worker whose figures are the oldest, and since when.
    trial: Option<(MonoTime, Best)>,
    /// Idle workers that only lack the loaded models.
    idle: Vec<Idle>,
    sooner: Sooner,
    fitting: Fitting,
    earliest: Earliest,
    shortlist: Shortlist<Key>,
}

/// Looks at all workers and rates them, with or without room.
pub(super) fn survey_all<'a>(task: &'a Task, scene: Scene<'a>) -> Survey<'a> {
    let mut survey = survey_room(task, scene);
    survey.rate_full();
    survey
}

/// Looks for the best place among all workers. If none of them has room, their ratings would decide nothing.
pub(super) fn survey_room<'a>(task: &'a Task, scene: Scene<'a>) -> Survey<'a> {
    let mut survey = Survey::new(task, scene);
    let workers = scene.workers;
    if scene.policy == Policy::RoundRobin {
        let around = workers.after(scene.last_chosen).chain(workers.after(None));
        around.take(LOOK_MAX.min(workers.len())).for_each(|worker| survey.look(worker));
        return survey;
    }
    let model = task.spec.model.digest;
    survey.seen.reserve(LOOK_MAX);
    workers.holders(model).take(LOOK_MAX).for_each(|worker| survey.look(worker));
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
    let holders = survey.seen.clone();
    for kind in kinds {
        let others = workers.with_room(kind, task.lane()).filter(|worker| !holders.contains(&worker.seat)).take(each);
        others.for_each(|worker| survey.look(worker));
    }
    survey
}

/// Looks like [`survey_all`]; if that finds no worker, looks at the first ones, since they show what is wrong.
pub(super) fn survey_some<'a>(task: &'a Task, scene: Scene<'a>) -> Survey<'a> {
    let mut survey = survey_all(task, scene);
    if survey.seen.is_empty() {
        scene.workers.after(None).take(DECISION_CANDIDATES_MAX).for_each(|worker| survey.look(worker));
        survey.rate_full();
    }
    survey
}

/// Rates one worker for a waiting task as if it had room; if `compare`, also looks what other workers could do.
pub(super) fn survey_here<'a>(task: &'a Task, scene: Scene<'a>, here: &Worker, compare: bool) -> Survey<'a> {
    let mut survey = Survey::new(task, scene);
    survey.see(here, true);
    if compare && survey.best.is_some() && scene.policy == Policy::Predicted {
        let holders = scene.workers.holders(task.spec.model.digest).filter(|worker| worker.seat != here.seat);
        survey.seen.reserve(ELSEWHERE_LOOK_MAX);
        // One of them may be worth waiting for, but the task cannot go there.
        holders.take(ELSEWHERE_LOOK_MAX).for_each(|worker| survey.see(worker, false));
    }
    survey
}

impl<'a> Survey<'a> {
    fn new(task: &'a Task, scene: Scene<'a>) -> Self {
        let is_predicted = scene.policy == Policy::Predicted;
        Self {
            task,
            scene,
            guess: Guess::new(task, scene.workers.fleet()),
            outgrown_bytes: outgrown_bytes(task, scene),
            turn: scene.slos.turn(&task.spec),
            seen: Vec::new(),
            kinds: Vec::new(),
            full: Vec::new(),
            best: None,
            trial_us: is_predicted.then(|| trials::longest_us(task, scene.now, scene.workers, scene.slos)).flatten(),
            trial: None,
            idle: Vec::new(),
            sooner: Sooner::default(),
            fitting: Fitting::default(),
            earliest: Earliest::default(),
            shortlist: Shortlist::new(),
        }
    }

    /// Number of looks taken, at workers and at worker kinds.
    pub(super) fn looked(&self) -> u64 {
        (self.seen.len() + self.kinds.len()) as u64
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

    fn look(&mut self, worker: &'a Worker) {
        let has_room = has_room(self.task, worker, self.scene.now);
        if has_room || self.best.is_some() {
            self.see(worker, has_room);
        } else {
            self.seen.push(worker.seat);
            self.ever(worker);
            self.full.push(worker);
        }
        if self.best.is_some() {
            self.rate_full();
        }
    }

    /// Rates the workers without room that were seen before there was a reason to.
    fn rate_full(&mut self) {
        std::mem::take(&mut self.full).into_iter().for_each(|worker| self.rate(worker, false));
    }

    fn see(&mut self, worker: &Worker, has_room: bool) {
        self.seen.push(worker.seat);
        self.rate(worker, has_room);
    }

    /// Looks at workers that were left out, too: those that neither have the model nor are idle, and those that a good
    /// one made superfluous. Among a few, all are looked at then.
    pub(super) fn widen(&mut self) {
        let (workers, known) = (self.scene.workers, self.seen.len());
        let around = workers.after(self.scene.last_chosen).chain(workers.after(None)).take(workers.len());
        for worker in around {
            if self.seen.len() >= known + LOOK_MAX {
                break;
            }
            if !self.seen.contains(&worker.seat) {
                self.look(worker);
            }
        }
        self.rate_full();
    }

    fn rate(&mut self, worker: &Worker, has_room: bool) {
        let (task, scene) = (self.task, self.scene);
        let busy_permille = worker.busy_permille();
        let here = worker.model(task.spec.model.digest);
        let (packing, best_batch) = here.packing();
        let is_small = self.outgrown_bytes > 0 && worker.register.run_memory_bytes <= self.outgrown_bytes;
        let goes_round = scene.policy == Policy::RoundRobin;
        let mut key = Key {
            is_obstructed: true,
            is_doubtful: is_small || task.doubts.doubt(worker.id()),
            stance: Stance::Ok,
            score: u64::MAX,
            // Who goes round goes on to the next one with room, whatever it has.
            lacks_model: !here.held && !goes_round,
            busy_permille: if goes_round { 0 } else { busy_permille },
            worker: worker.id(),
        };
        let (mut obstacle, mut prediction) = (self.ever(worker), Prediction::default());
        if obstacle.is_none() {
            obstacle = obstacle::for_now(task, worker, scene.now).next();
            if obstacle.is_some_and(|obstacle| obstacle != Obstacle::Draining) && task.spec.deadline_ms.is_some() {
                let prediction = predict(task, worker, here, &self.guess, scene.now);
                self.earliest.add(task, worker, &prediction, false, scene.now);
            }
        }
        if obstacle.is_none() {
            let stance = |stream| scene.slos.stance(scene.now, stream, worker.id(), self.turn);
            key.stance = task.promise.stream.map_or(Stance::Ok, stance);
            prediction = predict(task, worker, here, &self.guess, scene.now);
            key.score = score(task, worker, &scene, &prediction);
            self.fits(&key, worker, &prediction, has_room);
            if has_room {
                key.is_obstructed = false;
                obstacle = obstacle::drawback(task, worker, key.stance);
                let this = Best { key, seat: worker.seat, prediction, is_small };
                if self.best.is_none_or(|best| key < best.key) {
                    self.best = Some(this);
                }
                self.consider(worker, here, this);
            } else {
                let (lane, slots) = (task.lane(), worker.usable_slots(task.lane()));
                obstacle = Some(Obstacle::SlotsInUse { lane, slots });
            }
        }
        let (worker, holds_model) = (worker.id(), here.held);
        self.shortlist.add(key, || Rated {
            worker,
            obstacle,
            prediction,
            busy_permille,
            holds_model,
            packing,
            best_batch,
        });
    }

    /// Notes the worker if its figures are older than those of the others and the task may be a trial of them, and if it
    /// is idle and only lacks the loaded models.
    fn consider(&mut self, worker: &Worker, here: ModelHere<'_>, this: Best) {
        let Best { key, prediction, .. } = this;
        // A worker that lacks a preferred label stays behind, however well it is.
        let is_wanted = !key.is_doubtful && key.stance == Stance::Ok && key.score == prediction.total_us();
        if !is_wanted {
            return;
        }
        if let Some(longest_us) = self.trial_us
            && let Some(since) = trials::old_since(self.task, worker, here, &prediction, longest_us, self.scene.now)
            && self.trial.is_none_or(|(oldest, best)| (since, key) < (oldest, best.key))
        {
            self.trial = Some((since, this));
        }
        let lacks_models = prediction.load_us > 0 || key.lacks_model;
        if lacks_models && prediction.measured && savings::may_load(self.task, worker, self.scene.now) {
            let load_us = predict::opening_us(self.task, worker, &prediction, &self.guess);
            self.idle.push(Idle { seat: worker.seat, prediction, load_us });
        }
    }

    /// Counts a fitting worker, with or without room.
    fn fits(&mut self, key: &Key, worker: &Worker, prediction: &Prediction, has_room: bool) {
        let (seat, total_us, run_us) = (worker.seat, prediction.total_us(), prediction.run_us);
        let lane = self.task.lane();
        let is_foreseeable = !predict::is_unforeseeable(worker, lane, self.scene.now);
        let is_sound = prediction.measured && is_foreseeable && !key.is_doubtful && key.stance <= Stance::Ok;
        self.fitting.add(self.task, worker, prediction, is_sound);
        self.earliest.add(self.task, worker, prediction, has_room, self.scene.now);
        if !prediction.measured || key.is_doubtful {
            return;
        }
        if has_room && key.stance <= Stance::Ok {
            self.sooner.add_roomy(total_us);
        }
        // A worker is probed only if it has room.
        if !has_room && key.stance == Stance::Ok {
            self.sooner.add_full(Full { seat, total_us, run_us }, is_foreseeable);
        }
    }

    /// Whether a worker without room may be worth waiting for.
    pub(super) fn has_sooner(&self) -> bool {
        self.best.is_some() && self.sooner.full().is_some()
    }

    /// The worker without room that may be worth waiting for.
    pub(super) fn sooner(&self) -> Option<Seat> {
        self.sooner.full()
    }

    /// Whether the best worker has its share of what waits. `waits_us` is the slot time of all waiting tasks.
    pub(super) fn has_its_share(&self, waits_us: u64) -> bool {
        let best = self.best.filter(|_| self.scene.policy == Policy::Predicted);
        let worker = best.and_then(|best| self.scene.workers.at(best.seat));
        best.zip(worker).is_some_and(|(Best { prediction, .. }, worker)| {
            let holders = self.scene.workers.holders_len(self.task.spec.model.digest);
            self.fitting.has_its_share((self.task, worker, &prediction), waits_us, (self.seen.len(), holders))
        })
    }

    /// The worker kinds met that can never run the task, without those that only lack a way to its client.
    pub(super) fn unfit_kinds(&self) -> impl Iterator<Item = u32> {
        let unfit = |found: Option<Obstacle>| found.is_some_and(|obstacle| obstacle != Obstacle::NoWay);
        self.kinds.iter().filter(move |(_, found)| unfit(*found)).map(|(kind, _)| *kind)
    }

    /// Decides. `before_us` is the work that goes before this task at the worker that is worth waiting for.
    pub(super) fn decide(self, before_us: u64) -> Verdict {
        let Some(best) = self.best else { return Verdict::Wait };
        let held_back = self.held_back(&best, before_us);
        // What would be chosen anyway is no trial.
        let is_other = |(_, tried): &(MonoTime, Best)| held_back.is_some() || tried.seat != best.seat;
        let trial = self.trial.filter(|_| best.key.stance != Stance::Probe).filter(is_other);
        let (chosen, trial_after) = match (trial, held_back) {
            (Some((since, tried)), _) => (tried, Some(self.scene.now.since(since))),
            (None, Some(Full { seat, run_us, .. })) => return Verdict::HeldBack { elsewhere: seat, run_us },
            (None, None) => (best, None),
        };
        let Best { key, seat, prediction, .. } = chosen;
        let worker = self.scene.workers.at(seat);
        let Some(direction) = worker.and_then(|worker| self.task.way_to(worker)) else { return Verdict::Wait };
        let rated = self.into_rated();
        Verdict::Place(Choice { worker: key.worker, direction, prediction, rated, trial_after })
    }

    /// The worker without room for which the task is held back from the best one with room, if any.
    fn held_back(&self, best: &Best, before_us: u64) -> Option<Full> {
        let Best { key, seat, prediction, is_small } = best;
        let may_wait = self.scene.policy == Policy::Predicted && key.stance != Stance::Probe;
        let worker = self.scene.workers.at(*seat)?;
        let offer = Offer {
            total_us: prediction.total_us(),
            least_us: earliest::least_us(self.task, worker, prediction, self.scene.now),
            is_measured: prediction.measured,
            is_doubtful: key.is_doubtful,
            is_shunned: key.stance > Stance::Ok,
            is_small: *is_small,
        };
        if may_wait { self.sooner.held_back(self.task, offer, before_us, self.scene.now) } else { None }
    }

    /// What the task misses at an idle worker that lacks the loaded models, if its own worker has them. `before_us` as in
    /// [`Self::decide`].
    pub(super) fn missed(&self, before_us: u64) -> Option<Missed> {
        let is_predicted = !self.idle.is_empty() && self.scene.policy == Policy::Predicted;
        let best = self.best.filter(|best| is_predicted && !best.key.is_doubtful && best.key.stance == Stance::Ok)?;
        let (seat, total_us) = match self.held_back(&best, before_us) {
            Some(full) => (full.seat, full.total_us.saturating_add(before_us)),
            None => (best.seat, best.prediction.total_us()),
        };
        let worker = self.scene.workers.at(seat)?;
        // While a worker loads, its queue says nothing of the time after that.
        let is_loaded = predict::is_loaded(self.task, worker);
        let instead_us = total_us.saturating_sub(worker.handover.us());
        is_loaded.then(|| Missed::of(self.task, &self.idle, instead_us, self.scene.now)).flatten()
    }

    /// The best rated workers, best first.
    pub(super) fn into_rated(self) -> Vec<Rated> {
        self.shortlist.into_best_first()
    }

    /// Earliest predicted end of the task, microseconds from now; `None` if no worker fits. `items_before`: those of tasks
    /// of this sort that wait in front.
    pub(super) fn earliest_us(&self, items_before: u64) -> Option<u64> {
        let (workers, lane) = (self.scene.workers, self.task.lane());
        let fitting = self.kinds.iter().filter(|(_, found)| found.is_none());
        let slots = match workers.kinds_len() == self.kinds.len() {
            true => fitting.map(|(kind, _)| workers.kind_slots(*kind, lane)).sum(),
            // Some may fit that were not looked at.
            false => workers.totals().usable_slots(lane),
        };
        self.earliest.us(items_before, slots)
    }

    /// What is known of the task's earliest end.
    pub(super) fn earliest(&self) -> &Earliest {
        &self.earliest
    }
}

/// Memory that is known not to be enough for a run of the task; 0 if none is, or if the task says what it needs.
fn outgrown_bytes(task: &Task, scene: Scene<'_>) -> u64 {
    let asks = scene.policy != Policy::Predicted || task.spec.demands.memory_bytes > 0;
    if asks { 0 } else { scene.outgrown.bytes(scene.now, task.spec.client, task.spec.model.digest) }
}
