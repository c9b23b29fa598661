//! Answers to questions: the tables as people and scripts see them. Changes nothing.

use proto_msgs::{
    Answer, AnswerBody, Ask, BrokerToClient, ClusterView, ErrorCode, PeerId, PublicKey, Question, TaskStanding,
    TaskView, WhyView, codec::page,
};

use super::{
    Broker, placement,
    tasks::{State, Task},
};
use crate::MonoTime;

impl Broker {
    pub(super) fn ask(&mut self, now: MonoTime, peer: PeerId, key: Option<PublicKey>, ask: Ask) {
        let client = ask.client;
        let body = match ask.question {
            Question::Cluster => AnswerBody::Cluster(self.cluster_view()),
            Question::Workers { after } => {
                AnswerBody::Workers(page(self.workers.after(after).map(|worker| worker.view(now))))
            }
            Question::Models { .. } => AnswerBody::Models(Vec::new()),
            Question::Tasks { before } => {
                let rows = self.tasks.before(before).filter(|task| self.owned(task.id(), client, key).is_some());
                AnswerBody::Tasks(page(rows.map(|task| self.task_view(task))))
            }
            Question::Task(id) => {
                self.owned(id, client, key).map_or(AnswerBody::NotFound, |task| AnswerBody::Task(self.task_view(task)))
            }
            Question::Why(id) => {
                self.owned(id, client, key).map_or(AnswerBody::NotFound, |task| AnswerBody::Why(self.why_view(task)))
            }
        };
        self.tell_client(Some(peer), BrokerToClient::Answer(Answer { request: ask.request, body }));
    }

    fn cluster_view(&self) -> ClusterView {
        let stats = self.stats();
        ClusterView {
            version: self.config.version.clone(),
            started_unix_ms: self.config.origin_unix_ms,
            store: self.config.store_name.clone(),
            store_ok: self.store_ok,
            encrypted: self.config.encrypted,
            workers: stats.workers,
            prediction_error_permille: None,
            policy: "least-loaded".to_owned(),
            slots: stats.slots,
            slots_used: stats.slots_used,
            queued: stats.queued,
            placed: stats.placed,
        }
    }

    fn task_view(&self, task: &Task) -> TaskView {
        task.view(|key| (self.queue.position(key), placement::waits_for(task, &self.workers)))
    }

    fn why_view(&self, task: &Task) -> WhyView {
        let view = self.task_view(task);
        let at = view.worker.as_ref().map_or("", |(_, name)| name.as_str());
        let summary = match &task.state {
            State::Storing => "the store does not have the task yet; it is placed as soon as it has".to_owned(),
            State::Queued(_) => match &view.standing {
                TaskStanding::Queued { position, reason } => {
                    format!("waiting: {reason}; {position} tasks are before it")
                }
                _ => String::new(),
            },
            State::Granted { .. } => format!("{at} was named to the client, which has not arrived there yet"),
            State::Placed { .. } => format!("at work at {at} (attempt {})", task.attempt),
            State::Ended { outcome: proto_msgs::Outcome::Failed(failure), .. }
                if failure.code == ErrorCode::NoWorkerFits =>
            {
                format!("refused: {}", failure.text)
            }
            State::Ended { .. } if at.is_empty() => "ended before it was placed".to_owned(),
            State::Ended { .. } => format!("ended; its last worker was {at}"),
        };
        let candidates = page(placement::candidates(task, &self.workers));
        WhyView {
            task: view,
            summary,
            history: task.history.clone(),
            candidates,
            decision: None,
            rank: None,
            predicted_ms: None,
            took_ms: None,
        }
    }
}
