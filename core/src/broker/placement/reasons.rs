//! Explains to people why a task has no worker, and what speaks for and against each worker.
//!
//! Owns those sentences and rows. Never decides.

use proto_msgs::{Candidate, ErrorCode, Failure, limits::TEXT_BYTES_MAX};

use super::{
    Scene,
    decision::Obstacle,
    obstacle,
    predict::{Guess, has_room, predict},
};
use crate::broker::{
    slo::Stance,
    task::Task,
    workers::{Workers, worker::Worker},
};

/// Worker kinds, or workers, tried before it stays open whether a task can ever run. A fleet has a handful of kinds.
pub(crate) const NEVER_LOOK_MAX: usize = 1024;

/// Different reasons that one text names, each with the first of its workers. The other workers are only counted.
const REASONS_MAX: usize = 8;

/// What a waiting task waits for.
pub(crate) struct Waits {
    /// One sentence for people.
    pub(crate) reason: String,
    /// Whether there are workers, and none of them could ever run the task.
    pub(crate) no_worker_fits: bool,
}

impl Waits {
    /// A wait that may end with the workers that are there.
    pub(crate) fn for_now(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), no_worker_fits: false }
    }

    /// A wait for other workers. The text is cut to the length that a peer accepts.
    fn in_vain(mut reason: String) -> Self {
        reason.truncate(reason.floor_char_boundary(TEXT_BYTES_MAX));
        Self { reason, no_worker_fits: true }
    }
}

/// The refusal if there are workers and none could ever run the task; without any worker the task waits. Also returns
/// the number of worker kinds looked at.
pub(crate) fn never_fits(task: &Task, workers: &Workers) -> (Option<Failure>, u64) {
    let (against, looked) = against_all(task, workers);
    let text = against.map(|against| match workers.len() {
        1 => against,
        count => format!("none of {count} workers fits: {against}"),
    });
    (text.map(|text| Failure::new(ErrorCode::NoWorkerFits, text)), looked)
}

/// A worker, what speaks for ever against it, and the number of workers of which the same is true.
type Alike<'a> = (&'a Worker, Vec<Obstacle>, usize);

/// What speaks for ever against each worker, those with the same reasons together; `None` if one could run the task, or
/// if there is none. Also returns the number of worker kinds looked at.
fn against_all(task: &Task, workers: &Workers) -> (Option<String>, u64) {
    let mut alike: Vec<Alike<'_>> = Vec::new();
    let (mut others, mut looked) = (0, 0);
    for (kind, worker) in workers.kinds().take(NEVER_LOOK_MAX) {
        looked += 1;
        let (against, count): (Vec<Obstacle>, _) = (obstacle::ever(task, worker).collect(), workers.kind_len(kind));
        if against.is_empty() {
            return (None, looked);
        }
        let has_room = alike.len() < REASONS_MAX;
        match alike.iter_mut().find(|(_, known, _)| *known == against) {
            Some((.., known)) => *known += count,
            None if has_room => alike.push((worker, against, count)),
            None => others += count,
        }
    }
    if alike.is_empty() || workers.kinds_len() > NEVER_LOOK_MAX {
        return (None, looked);
    }
    let text = |(worker, against, count): &Alike<'_>| {
        let against: Vec<String> = against.iter().map(|obstacle| obstacle.text(&task.spec)).collect();
        let more = if *count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
        format!("{}{more} {}", worker.register.name, against.join(", "))
    };
    let mut texts: Vec<String> = alike.iter().map(text).collect();
    if others > 0 {
        texts.push(format!("{others} more for other reasons"));
    }
    (Some(texts.join("; ")), looked)
}

/// What a waiting task waits for. `is_settled`: all workers had time to register, so that who is missing is away.
pub(crate) fn waits_for(task: &Task, workers: &Workers, is_settled: bool) -> Waits {
    if workers.len() == 0 {
        return Waits::for_now("no worker is registered");
    }
    let fits = |worker: &Worker| obstacle::ever(task, worker).next().is_none();
    if let Some(better) = task.held_for.and_then(|id| workers.get(id)).filter(|better| fits(better)) {
        let name = &better.register.name;
        return Waits::for_now(format!("{name} is busy, and still better for it than the workers with room"));
    }
    let kinds = workers.kinds().take(NEVER_LOOK_MAX);
    let fitting: usize = kinds.filter(|(_, worker)| fits(worker)).map(|(kind, _)| workers.kind_len(kind)).sum();
    let too_small =
        task.doubts.too_small.iter().filter_map(|id| workers.get(*id)).filter(|worker| fits(worker)).count();
    match fitting.saturating_sub(too_small) {
        0 if fitting > 0 => {
            Waits::in_vain("what it brings is too large for the quotas of the workers that fit".to_owned())
        }
        0 => match against_all(task, workers).0.filter(|_| is_settled) {
            Some(against) => {
                Waits::in_vain(format!("no connected worker can ever run it, so it waits for another: {against}"))
            }
            None => Waits::for_now("no worker that fits is registered"),
        },
        1 => Waits::for_now("the one worker that fits has no room"),
        count => Waits::for_now(format!("{count} workers fit, none has room")),
    }
}

/// Every worker, with what speaks for and against it at present.
pub(crate) fn candidates<'a>(task: &'a Task, scene: Scene<'a>) -> impl Iterator<Item = Candidate> + 'a {
    let guess = Guess::new(task, scene.workers.fleet());
    scene.workers.after(None).map(move |worker| {
        let mut against: Vec<String> =
            obstacle::now(task, worker, scene.now).map(|against| against.text(&task.spec)).collect();
        if worker.is_open() && !has_room(task, worker, scene.now) {
            let (lane, slots) = (task.lane(), worker.usable_slots(task.lane()));
            against.push(Obstacle::SlotsInUse { lane, slots }.text(&task.spec));
        }
        let stance = |stream| scene.slos.stance(scene.now, stream, worker.id(), 0);
        let stance = task.promise.stream.map_or(Stance::Ok, stance);
        against.extend(obstacle::drawback(task, worker, stance).map(|drawback| drawback.text(&task.spec)));
        let here = worker.model(task.spec.model.digest);
        let (packing, best_batch) = here.packing();
        Candidate {
            worker: worker.id(),
            name: worker.register.name.clone(),
            against,
            holds_model: here.held,
            packing,
            best_batch,
            busy_permille: worker.busy_permille(),
            prediction: predict(task, worker, here, &guess, scene.now),
        }
    })
}
