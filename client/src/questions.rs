//! Questions to the broker, and cancellations of other processes' tasks. Both are repeated until they are answered or
//! their caller leaves, since any message may be lost. Owns which caller waits for which answer. Never sends.

use std::collections::BTreeMap;

use proto_msgs::{Answer, AnswerBody, Ask, CancelTask, ClientId, ClientToBroker, Ended, Outcome, Question, TaskId};
use tokio::sync::oneshot;

use crate::AskError;

/// The channel for an answer.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, AskError>>;

/// All unanswered questions and cancellations. Bounded by the callers, each of whom waits for one answer.
#[derive(Debug)]
pub(crate) struct Questions {
    client: ClientId,
    requests: u64,
    asked: BTreeMap<u64, (Question, Reply<AnswerBody>)>,
    cancelled: BTreeMap<TaskId, Vec<Reply<Outcome>>>,
    /// Questions up to this one stood at the last round already, so their answers are overdue.
    overdue_to: u64,
}

impl Questions {
    pub(crate) fn new(client: ClientId) -> Self {
        Self { client, requests: 0, asked: BTreeMap::new(), cancelled: BTreeMap::new(), overdue_to: 0 }
    }

    /// Registers a question. Returns its message.
    pub(crate) fn ask(&mut self, question: Question, reply: Reply<AnswerBody>) -> ClientToBroker {
        self.requests += 1;
        self.asked.insert(self.requests, (question.clone(), reply));
        ClientToBroker::Ask(Ask { request: self.requests, client: self.client, question })
    }

    /// Registers a cancellation. Returns its message.
    pub(crate) fn cancel(&mut self, task: TaskId, reply: Reply<Outcome>) -> ClientToBroker {
        self.cancelled.entry(task).or_default().push(reply);
        ClientToBroker::Cancel(CancelTask { task, client: self.client })
    }

    pub(crate) fn answered(&mut self, answer: Answer) {
        if let Some((_, reply)) = self.asked.remove(&answer.request) {
            // The caller may have given up.
            let _ = reply.send(Ok(answer.body));
        }
    }

    pub(crate) fn ended(&mut self, ended: &Ended) {
        for reply in self.cancelled.remove(&ended.task).into_iter().flatten() {
            let _ = reply.send(Ok(ended.outcome.clone()));
        }
    }

    /// Unanswered messages again, but no question that was asked after the last round: its answer may be on its way.
    /// Forgets those whose caller has left.
    pub(crate) fn repeat(&mut self) -> Vec<ClientToBroker> {
        self.asked.retain(|_, (_, reply)| !reply.is_closed());
        self.cancelled.retain(|_, replies| replies.iter().any(|reply| !reply.is_closed()));
        let ask = |(request, (question, _)): (&u64, &(Question, _))| {
            ClientToBroker::Ask(Ask { request: *request, client: self.client, question: question.clone() })
        };
        let cancel = |task: &TaskId| ClientToBroker::Cancel(CancelTask { task: *task, client: self.client });
        let overdue = self.asked.range(..=self.overdue_to).map(ask);
        let again = overdue.chain(self.cancelled.keys().map(cancel)).collect();
        self.overdue_to = self.requests;
        again
    }

    /// Fails everything: the broker speaks another protocol version, so no answer will come.
    pub(crate) fn fail(&mut self, why: &str) {
        for (_, reply) in std::mem::take(&mut self.asked).into_values() {
            let _ = reply.send(Err(AskError::Version(why.to_owned())));
        }
        for reply in std::mem::take(&mut self.cancelled).into_values().flatten() {
            let _ = reply.send(Err(AskError::Version(why.to_owned())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: ClientId = ClientId::from_bytes([1; 16]);
    const TASK: TaskId = TaskId::from_bytes([2; 16]);

    #[test]
    fn a_question_is_repeated_until_it_is_answered() {
        let mut questions = Questions::new(CLIENT);
        let (reply, mut answer) = oneshot::channel();
        let asked = questions.ask(Question::Cluster, reply);

        assert_eq!(questions.repeat(), [], "its answer may be on its way");
        assert_eq!(questions.repeat(), std::slice::from_ref(&asked));
        let ClientToBroker::Ask(ask) = asked else { panic!("a question asks") };
        questions.answered(Answer { request: ask.request + 1, body: AnswerBody::NotFound });
        assert!(answer.try_recv().is_err(), "another question's answer is not ours");
        questions.answered(Answer { request: ask.request, body: AnswerBody::NotFound });

        assert_eq!(answer.try_recv().unwrap(), Ok(AnswerBody::NotFound));
        assert_eq!(questions.repeat(), []);
    }

    #[test]
    fn a_question_whose_asker_gave_up_is_forgotten() {
        let mut questions = Questions::new(CLIENT);
        let (reply, answer) = oneshot::channel();
        let _ = questions.cancel(TASK, reply);
        drop(answer);

        assert_eq!(questions.repeat(), []);
    }

    #[test]
    fn everybody_who_cancelled_a_task_learns_its_end() {
        let mut questions = Questions::new(CLIENT);
        let mut answers: Vec<_> = (0..2)
            .map(|_| {
                let (reply, answer) = oneshot::channel();
                let _ = questions.cancel(TASK, reply);
                answer
            })
            .collect();

        questions.ended(&Ended { task: TASK, outcome: Outcome::Cancelled, retry_after_ms: None });

        for answer in &mut answers {
            assert_eq!(answer.try_recv().unwrap(), Ok(Outcome::Cancelled));
        }
    }
}
