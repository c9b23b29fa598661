//! Explains to people why a task has no worker, and what speaks for and against each worker.
//!
//! Owns those sentences and rows. Never decides.

use proto_msgs::{Candidate, ErrorCode, Failure};

use super::{
    decision::Obstacle,
    obstacle,
    placement::Scene,
    predict::{Guess, has_room, predict},
    slo::Stance,
    task::Task,
    worker::Worker,
    workers::Workers,
};

/// Worker kinds tried before it stays open whether a task can ever run. A fleet has a handful.
const NEVER_LOOK_MAX: usize = 1024;

/// Workers that one refusal names.
const REASONS_MAX: usize = 8;

/// The refusal if there are workers and none could ever run the task; without any worker the task waits. Also returns
/// the number of worker kinds looked at.
pub(super) fn never_fits(task: &Task, workers: &Workers) -> (Option<Failure>, u64) {
    let mut reasons = Vec::new();
    let mut looked = 0;
    for (_, worker) in workers.kinds().take(NEVER_LOOK_MAX) {
        looked += 1;
        if obstacle::ever(task, worker).next().is_none() {
            return (None, looked);
        }
        if reasons.len() < REASONS_MAX {
            let against: Vec<String> = obstacle::ever(task, worker).map(|obstacle| obstacle.text(&task.spec)).collect();
            reasons.push(format!("{} {}", worker.register.name, against.join(", ")));
        }
    }
    let count = workers.len();
    let text = match &reasons[..] {
        [] => return (None, looked),
        _ if workers.kinds_len() > NEVER_LOOK_MAX => return (None, looked),
        [only] if count == 1 => only.clone(),
        some => format!("none of {count} workers fits: {}", some.join("; ")),
    };
    (Some(Failure::new(ErrorCode::NoWorkerFits, text)), looked)
}

/// One sentence for people: what a waiting task waits for.
pub(super) fn waits_for(task: &Task, workers: &Workers) -> String {
    if workers.len() == 0 {
        return "no worker is registered".to_owned();
    }
    let kinds = workers.kinds().take(NEVER_LOOK_MAX);
    let fits = |worker: &Worker| obstacle::ever(task, worker).next().is_none();
    let fitting: usize = kinds.filter(|(_, worker)| fits(worker)).map(|(kind, _)| workers.kind_len(kind)).sum();
    let too_small =
        task.doubts.too_small.iter().filter_map(|id| workers.get(*id)).filter(|worker| fits(worker)).count();
    match fitting.saturating_sub(too_small) {
        0 if fitting > 0 => "what it brings is too large for the quotas of the workers that fit".to_owned(),
        0 => "no worker that fits is registered".to_owned(),
        1 => "the one worker that fits has no room".to_owned(),
        count => format!("{count} workers fit, none has room"),
    }
}

/// Every worker, with what speaks for and against it at present.
pub(super) fn candidates<'a>(task: &'a Task, scene: Scene<'a>) -> impl Iterator<Item = Candidate> + 'a {
    let guess = Guess::new(task, scene.workers.fleet());
    scene.workers.after(None).map(move |worker| {
        let mut against: Vec<String> =
            obstacle::now(task, worker, scene.now).map(|against| against.text(&task.spec)).collect();
        if worker.is_open() && !has_room(task, worker, scene.now) {
            let (lane, slots) = (task.lane(), worker.usable_slots(task.lane()));
            against.push(Obstacle::SlotsInUse { lane, slots }.text(&task.spec));
        }
        if let Some(stream) = task.promise.stream
            && let Stance::Shunned(permille) = scene.slos.stance(scene.now, stream, worker.id(), 0)
        {
            against.push(format!("missed the promised latency for {permille} of 1000 tasks"));
        }
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
