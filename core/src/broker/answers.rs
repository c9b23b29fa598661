//! Answers to questions: the tables as people and scripts see them. Changes nothing.

use proto_msgs::{
    Answer, AnswerBody, Ask, BrokerToClient, Candidate, ClusterView, DecisionView, Digest, ErrorCode, Failure,
    ModelView, Outcome, PeerId, PublicKey, Question, TaskStanding, TaskView, WhyView, WorkerId, codec::page,
};

use super::{
    Broker,
    placement::{
        decision::{Decision, Rated},
        obstacle, predict, reasons,
    },
    task::{State, Task},
    workers::worker::{ModelHere, Worker},
};
use crate::MonoTime;

impl Broker {
    pub(super) fn ask(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, ask: Ask) {
        let client = ask.client;
        let body = match ask.question {
            Question::Cluster => AnswerBody::Cluster(self.cluster_view()),
            Question::Workers { after } => {
                let rows = self.workers.after(after);
                AnswerBody::Workers(page(
                    rows.map(|worker| worker.view(now, self.slos.violation_permille(now, worker.id()))),
                ))
            }
            Question::Models { after } => AnswerBody::Models(page(self.models_after(after))),
            Question::Tasks { before } => {
                let rows = self.tasks.before(client, before);
                let rows = rows.filter(|task| self.owned(task.id(), client, key).is_some());
                AnswerBody::Tasks(page(rows.map(|task| self.task_view(now, task))))
            }
            Question::Task(id) => {
                let task = self.shown(id, client, key);
                task.map_or(AnswerBody::NotFound, |task| AnswerBody::Task(self.task_view(now, task)))
            }
            Question::Why(id) => {
                let task = self.shown(id, client, key);
                task.map_or(AnswerBody::NotFound, |task| AnswerBody::Why(self.why_view(now, task)))
            }
        };
        self.tell_client(Some(peer), BrokerToClient::Answer(Answer { request: ask.request, body }));
    }

    fn cluster_view(&self) -> ClusterView {
        let gauges = self.gauges();
        ClusterView {
            version: self.config.version.clone(),
            started_unix_ms: self.config.origin_unix_ms,
            store: self.config.store_name.clone(),
            store_ok: self.store_ok,
            encrypted: self.config.encrypted,
            workers: gauges.workers,
            prediction_error_permille: gauges.prediction_error_permille,
            policy: self.config.policy.name().to_owned(),
            slots: gauges.slots,
            slots_used: gauges.slots_used,
            queued: gauges.queued,
            placed: gauges.placed,
        }
    }

    /// Measured costs of models, in order of worker and model, after the given pair.
    fn models_after(&self, after: Option<(WorkerId, Digest)>) -> impl Iterator<Item = ModelView> {
        let first = after.and_then(|(worker, digest)| Some((self.workers.get(worker)?, digest)));
        let rest_of_first = first.into_iter().flat_map(|(worker, digest)| models_of(worker, Some(digest)));
        let others = self.workers.after(after.map(|(worker, _)| worker));
        rest_of_first.chain(others.flat_map(|worker| models_of(worker, None)))
    }

    fn task_view(&self, now: MonoTime, task: &Task) -> TaskView {
        let mut view = task.view(|rank| (self.queue.position(now, rank), self.waits_for(now, task).reason));
        // A broker that has started anew knows only the worker's id from its store.
        if let Some((worker, name)) = view.worker.as_mut().filter(|(_, name)| name.is_empty()) {
            *name = self.name_of(task, *worker);
        }
        view
    }

    fn why_view(&self, now: MonoTime, task: &Task) -> WhyView {
        let view = self.task_view(now, task);
        let summary = summary(task, &view);
        let rank = match task.state {
            State::Queued { .. } => task.rank.map(|rank| self.queue.view(&rank, &task.spec, &self.config.weights, now)),
            _ => None,
        };
        let took_ms =
            task.promise.took().map(|took| u32::try_from(took.as_micros().div_ceil(1000)).unwrap_or(u32::MAX));
        // The rest of the answer comes on top of the page.
        let candidates = page(reasons::candidates(task, self.scene(now)));
        WhyView {
            task: view,
            summary,
            history: task.track.history.clone(),
            models: self.costs_of(task, &candidates),
            candidates,
            decision: task.decision.as_ref().map(|decision| self.decision_view(task, decision)),
            rank,
            predicted_ms: task.promise.predicted_ms(),
            took_ms,
        }
    }

    /// Costs of the task's models at its last worker. Before the first worker: where the task could end soonest.
    fn costs_of(&self, task: &Task, candidates: &[Candidate]) -> Vec<ModelView> {
        let soonest = || {
            let able = candidates.iter().filter_map(|candidate| {
                let worker = self.workers.get(candidate.worker)?;
                let is_able = !task.is_ended() && obstacle::ever(task, worker).next().is_none();
                (is_able && candidate.prediction.measured).then_some((candidate.prediction.total_us(), worker))
            });
            able.min_by_key(|(total_us, _)| *total_us).map(|(_, worker)| worker)
        };
        let worker = match task.track.last_worker() {
            Some(worker) => self.workers.get(worker),
            None => soonest(),
        };
        let models = worker.into_iter().flat_map(|worker| predict::models(task).map(move |model| (worker, model)));
        models.filter_map(|(worker, (digest, _))| model_view(worker, worker.model(digest))).collect()
    }

    /// The worker's name, or its id if it is not known any more. A task remembers the name of its last worker.
    fn name_of(&self, task: &Task, worker: WorkerId) -> String {
        let known = self.workers.get(worker).map(|worker| &worker.register.name);
        let last = || task.track.last.as_ref().filter(|last| last.worker == worker).map(|last| &last.name);
        let name = known.or_else(last).filter(|name| !name.is_empty());
        name.map_or_else(|| worker.to_string(), Clone::clone)
    }

    /// A decision as it was made; only the names of workers are today's.
    fn decision_view(&self, task: &Task, decision: &Decision) -> DecisionView {
        let candidate = |rated: &Rated| Candidate {
            worker: rated.worker,
            name: self.name_of(task, rated.worker),
            against: rated.obstacle.iter().map(|obstacle| obstacle.text(&task.spec)).collect(),
            holds_model: rated.holds_model,
            packing: rated.packing,
            best_batch: rated.best_batch,
            busy_permille: rated.busy_permille,
            prediction: rated.prediction,
        };
        DecisionView {
            at_unix_ms: decision.at_unix_ms,
            policy: self.config.policy.name().to_owned(),
            chosen: decision.chosen,
            candidates: decision.rated.iter().map(candidate).collect(),
        }
    }
}

fn models_of(worker: &Worker, after: Option<Digest>) -> impl Iterator<Item = ModelView> {
    worker.models(after).filter_map(|here| model_view(worker, here))
}

fn model_view(worker: &Worker, here: ModelHere<'_>) -> Option<ModelView> {
    let cost = here.cost?.clone();
    Some(ModelView { worker: worker.id(), worker_name: worker.register.name.clone(), warm: here.warm, cost })
}

/// One sentence for people: why the task is in its state.
fn summary(task: &Task, view: &TaskView) -> String {
    let at = view.worker.as_ref().map_or("", |(_, name)| name.as_str());
    match &task.state {
        State::Storing => "the task is not in the store yet; it is placed as soon as it is".to_owned(),
        State::Queued { .. } => match &view.standing {
            TaskStanding::Queued { position, reason } => {
                format!("waiting in the {} lane: {reason}; {position} tasks are before it", task.lane())
            }
            _ => String::new(),
        },
        State::Granted { .. } => format!("{at} was named to the client, which has not arrived there yet"),
        State::Placed { .. } => format!("at work at {at} (attempt {})", task.track.attempt),
        State::Ended(end) => ended(&end.outcome, at),
    }
}

/// One sentence for people: how the task ended; `at` is its last worker.
fn ended(outcome: &Outcome, at: &str) -> String {
    use ErrorCode::{Busy, DeadlineUnmeetable, NoWorkerFits, StoreAway};
    let had_worker = !at.is_empty();
    match outcome {
        Outcome::Failed(Failure { code: code @ (Busy | DeadlineUnmeetable | NoWorkerFits | StoreAway), text })
            if !had_worker =>
        {
            format!("refused, {code}: {text}")
        }
        Outcome::Failed(Failure { code, text }) if !had_worker => {
            format!("ended before it was placed, {code}: {text}")
        }
        Outcome::Failed(Failure { code, text }) => format!("ended, {code}: {text}; its last worker was {at}"),
        Outcome::Cancelled if !had_worker => "cancelled before it was placed".to_owned(),
        Outcome::Cancelled => format!("cancelled; its last worker was {at}"),
        Outcome::Done { .. } => format!("ended; its last worker was {at}"),
    }
}
