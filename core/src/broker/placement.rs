//! Where a task goes: pure functions of the task and the table.
//!
//! A worker must fit ([`against_now`] says what speaks against it). Of those that fit, one that has the model goes before one
//! that has not, one that has not failed the task before one that has, the less busy before the busier.

use proto_msgs::{Arch, Candidate, Demands, Direction, ErrorCode, Failure, Prediction, WorkerId};

use super::{
    tasks::Task,
    workers::{Worker, Workers},
};

/// Workers looked at for one task, with and without the model. The indexes give the best ones first, so a longer look
/// only matters when nearly every worker is unfit; the task then waits for the next heartbeat of one that fits.
const LOOK_MAX: usize = 64;

/// The choice for a task among all workers: a worker and who dials.
pub(super) fn choose(task: &Task, workers: &Workers) -> Option<(WorkerId, Direction)> {
    let fits = |worker: &&Worker| worker.has_free_slot() && against_now(task, worker).is_empty();
    let rank = |worker: &Worker| (is_doubtful(task, worker), worker.busy_permille(), worker.id());
    let holder = workers.holders(task.spec.model.digest).take(LOOK_MAX).filter(fits).min_by_key(|worker| rank(worker));
    // Least busy first, so the first that fits and has not failed the task is the best of them.
    let mut free = workers.free().take(LOOK_MAX).filter(fits);
    let worker = match holder.filter(|holder| !is_doubtful(task, holder)) {
        Some(holder) => holder,
        None => free.clone().find(|worker| !is_doubtful(task, worker)).or(holder).or_else(|| free.next())?,
    };
    Some((worker.id(), direction(task, worker)?))
}

/// The choice for a task that waits when something is heard of one worker: that worker, if it fits. The others have not
/// changed since the task was tried with them.
pub(super) fn choose_only(task: &Task, worker: &Worker) -> Option<(WorkerId, Direction)> {
    if !worker.has_free_slot() || !against_now(task, worker).is_empty() {
        return None;
    }
    Some((worker.id(), direction(task, worker)?))
}

/// Whether the worker has failed the task, or could not be reached for it in one direction.
fn is_doubtful(task: &Task, worker: &Worker) -> bool {
    let id = worker.id();
    task.avoid.contains(&id) || task.unreachable.iter().any(|(unreachable, _)| *unreachable == id)
}

/// Who dials: the wish if there is one, else the client wherever the worker has a door that is not known to be shut.
pub(super) fn direction(task: &Task, worker: &Worker) -> Option<Direction> {
    use Direction::{ClientDials, WorkerDials};
    let is_open = |direction: &Direction| match direction {
        ClientDials => !worker.register.endpoints.is_empty(),
        WorkerDials => !task.spec.endpoints.is_empty(),
    };
    let is_wanted = |direction: &Direction| task.spec.direction.is_none_or(|wish| wish == *direction);
    let is_shut = |direction: &Direction| task.unreachable.contains(&(worker.id(), *direction));
    let mut ways = [ClientDials, WorkerDials].into_iter().filter(|way| is_open(way) && is_wanted(way));
    ways.clone().find(|way| !is_shut(way)).or_else(|| ways.next())
}

/// What speaks against a worker for good: it could never run the task, however idle.
pub(super) fn against_ever(task: &Task, worker: &Worker) -> Vec<String> {
    let (demands, register) = (&task.spec.demands, &worker.register);
    let mut against = Vec::new();
    if !register.formats.contains(&task.spec.model.format) {
        against.push(format!("cannot run {} models", task.spec.model.format));
    }
    if demands.arch.is_some_and(|arch: Arch| arch != register.arch) {
        against.push(format!("is {}", register.arch));
    }
    let cores_millis = u64::from(register.cores) * 1000;
    if u64::from(demands.cpu_millis) > cores_millis {
        against.push(format!("has {} cores", register.cores));
    }
    if demands.memory_bytes > register.memory_bytes {
        against.push(format!("has {} MiB of memory", register.memory_bytes >> 20));
    }
    if demands.gpu_memory_bytes > register.gpus.iter().map(|gpu| gpu.memory_bytes).max().unwrap_or(0) {
        against.push("has no GPU with that much memory".to_owned());
    }
    if direction(task, worker).is_none() {
        against.push("cannot be connected in the wanted direction".to_owned());
    }
    against
}

/// What speaks against a worker at the moment.
pub(super) fn against_now(task: &Task, worker: &Worker) -> Vec<String> {
    let mut against = against_ever(task, worker);
    let Demands { cpu_millis, memory_bytes, .. } = task.spec.demands;
    let (cpu_reserved, memory_reserved) = worker.reserved();
    if worker.is_draining() {
        against.push("is draining".to_owned());
    } else if !worker.has_free_slot() {
        against.push(format!("all {} slots are in use", worker.slots()));
    }
    if cpu_millis > 0 && cpu_reserved + u64::from(cpu_millis) > u64::from(worker.register.cores) * 1000 {
        against.push("its cores are promised to others".to_owned());
    }
    if memory_bytes > 0 && memory_reserved.saturating_add(memory_bytes) > worker.register.memory_bytes {
        against.push("its memory is promised to others".to_owned());
    }
    against
}

/// The refusal if there are workers and none of them could ever run the task. With no worker at all the task waits.
pub(super) fn never_fits(task: &Task, workers: &Workers) -> Option<Failure> {
    let mut reasons = Vec::new();
    for worker in workers.all() {
        let against = against_ever(task, worker);
        if against.is_empty() {
            return None;
        }
        if reasons.len() < 8 {
            reasons.push(format!("{} {}", worker.register.name, against.join(", ")));
        }
    }
    let (first, count) = (reasons.first()?, workers.len());
    let text = if count == 1 { first.clone() } else { format!("none of {count} workers fits: {}", reasons.join("; ")) };
    Some(Failure::new(ErrorCode::NoWorkerFits, text))
}

/// What a waiting task waits for, in one sentence.
pub(super) fn waits_for(task: &Task, workers: &Workers) -> String {
    if workers.len() == 0 {
        return "no worker is registered".to_owned();
    }
    let busy = workers.all().take(LOOK_MAX).filter(|worker| against_ever(task, worker).is_empty()).count();
    match busy {
        0 => "no worker that fits is registered".to_owned(),
        1 => "the one worker that fits has no room".to_owned(),
        count => format!("{count} workers fit, none has room"),
    }
}

/// Every worker with what speaks for and against it.
pub(super) fn candidates(task: &Task, workers: &Workers) -> impl Iterator<Item = Candidate> {
    let row = |worker: &Worker| Candidate {
        worker: worker.id(),
        name: worker.register.name.clone(),
        against: against_now(task, worker),
        holds_model: worker.holds(task.spec.model.digest),
        busy_permille: worker.busy_permille(),
        prediction: Prediction::default(),
    };
    workers.all().map(row)
}
