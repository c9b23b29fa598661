//! Dials under way: which clients are dialled, and for which attempts.
//!
//! Owns the bounds of dialling. Never: sockets, which belong to the tasks that dial; links, which begin where a dial ends.

use proto_msgs::{AttemptId, PublicKey};
use tokio::task::AbortHandle;
use tracing::debug;

/// Clients dialled at a time. Each may have 8 addresses with three sockets each, for seconds if none answers: together a
/// tenth of the sockets that a process has. A client that answers takes milliseconds.
const DIALS_MAX: usize = 64;

/// Attempts that wait for one dial: more than one client process ever has at one worker.
const WAITING_MAX: usize = 256;

/// A client to be dialled.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Callee {
    pub(super) endpoints: Vec<String>,
    /// The key that it must hold.
    pub(super) key: Option<PublicKey>,
}

/// What a client is dialled for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) attempt: AttemptId,
    /// Whether the worker holds the attempt.
    pub(super) is_held: bool,
}

/// All dials under way.
#[derive(Default)]
pub(super) struct Dials {
    dials: Vec<Dial>,
    next: u64,
}

/// A dial. Dropping it stops it.
pub(super) struct Dial {
    number: u64,
    pub(super) callee: Callee,
    pub(super) calls: Vec<Call>,
    task: AbortHandle,
}

impl Drop for Dial {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Dials {
    /// Wants a client dialled for an attempt: replaces the attempt's dial to other addresses, and joins one to the same.
    /// `start` begins a new one, with its number. Beyond the limit nothing is dialled: whoever asked asks again.
    pub(super) fn want(&mut self, call: Call, callee: Callee, start: impl FnOnce(u64, &Callee) -> AbortHandle) {
        self.leave(call.attempt, |dial| dial.callee != callee);
        if let Some(dial) = self.dials.iter_mut().find(|dial| dial.callee == callee) {
            dial.calls.retain(|earlier| earlier.attempt != call.attempt);
            if dial.calls.len() < WAITING_MAX {
                dial.calls.push(call);
            }
            return;
        }
        if self.dials.len() == DIALS_MAX {
            debug!(task = %call.attempt.task, "as many clients are dialled as may be: this one at its next request");
            return;
        }
        self.next += 1;
        let (number, task) = (self.next, start(self.next, &callee));
        self.dials.push(Dial { number, callee, calls: vec![call], task });
    }

    /// Takes a dial that has ended; `None` if nobody wants it any more.
    pub(super) fn ended(&mut self, number: u64) -> Option<Dial> {
        let at = self.dials.iter().position(|dial| dial.number == number)?;
        Some(self.dials.swap_remove(at))
    }

    /// Forgets an attempt that is over. A dial that no other attempt wants stops.
    pub(super) fn forget_attempt(&mut self, id: AttemptId) {
        self.leave(id, |_| true);
    }

    fn leave(&mut self, id: AttemptId, is_meant: impl Fn(&Dial) -> bool) {
        self.dials
            .iter_mut()
            .filter(|dial| is_meant(dial))
            .for_each(|dial| dial.calls.retain(|call| call.attempt != id));
        self.dials.retain(|dial| !dial.calls.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, time::Duration};

    use proto_msgs::{Attempt, TaskId};
    use tokio::{task::yield_now, time::timeout};

    use super::*;

    fn id(number: u16) -> AttemptId {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        AttemptId { task: TaskId::from_bytes(bytes), attempt: Attempt(1) }
    }

    fn at(port: u16) -> Callee {
        Callee { endpoints: vec![format!("tcp://127.0.0.1:{port}")], key: None }
    }

    /// The number of the dial that this wish begins, if it begins one.
    fn wants(dials: &mut Dials, attempt: u16, callee: Callee) -> Option<u64> {
        let mut begun = None;
        dials.want(Call { attempt: id(attempt), is_held: true }, callee, |number, _| {
            begun = Some(number);
            tokio::spawn(pending::<()>()).abort_handle()
        });
        begun
    }

    #[tokio::test]
    async fn a_client_that_names_new_addresses_without_end_has_one_dial() {
        let mut dials = Dials::default();
        let first = wants(&mut dials, 1, at(1)).expect("it is dialled");
        let tasks: Vec<_> = (2..1000)
            .map(|port| {
                wants(&mut dials, 1, at(port)).expect("the newest addresses count");
                assert_eq!(dials.dials.len(), 1);
                dials.dials[0].task.clone()
            })
            .collect();
        assert!(dials.ended(first).is_none(), "nobody wants it any more");
        dials.forget_attempt(id(1));
        assert!(dials.dials.is_empty());
        let all_end = async {
            while !tasks.iter().all(AbortHandle::is_finished) {
                yield_now().await;
            }
        };
        timeout(Duration::from_secs(30), all_end).await.expect("each holds sockets");
    }

    #[tokio::test]
    async fn clients_without_number_that_do_not_answer_leave_sockets_for_others() {
        let mut dials = Dials::default();
        let begun = (0..10 * DIALS_MAX as u16).filter(|number| wants(&mut dials, *number, at(*number)).is_some());
        assert_eq!(begun.count(), DIALS_MAX);
        assert_eq!(wants(&mut dials, 5000, at(5000)), None, "not now");
        drop(dials.ended(1));
        assert!(wants(&mut dials, 5000, at(5000)).is_some());
    }

    #[tokio::test]
    async fn attempts_of_one_client_share_a_dial() {
        let mut dials = Dials::default();
        let number = wants(&mut dials, 0, at(1)).expect("it is dialled");
        let begun = (0..2 * WAITING_MAX as u16).filter(|attempt| wants(&mut dials, *attempt, at(1)).is_some());
        assert_eq!(begun.count(), 0);
        dials.forget_attempt(id(0));
        let dial = dials.ended(number).expect("others want it");
        assert_eq!(dial.calls.len(), WAITING_MAX - 1);
    }
}
