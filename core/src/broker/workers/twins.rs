//! Two processes with one worker's id: copies of one state folder, as on a cloned card.
//!
//! Owns who of them is told. The one of the later life is the worker; the other is told to leave. A restarted worker is
//! never taken for two: nobody hears its earlier life again.

use std::collections::BTreeMap;

use proto_msgs::{BrokerToWorker, Epoch, Overtaken, PeerId, WorkerId};

use crate::{
    Census, MonoTime,
    broker::{Action, Broker},
};

/// When an earlier life of each worker was last heard.
#[derive(Debug, Default)]
pub(crate) struct Twins {
    heard: BTreeMap<WorkerId, MonoTime>,
}

impl Twins {
    pub(crate) fn forget(&mut self, id: WorkerId) {
        self.heard.remove(&id);
    }

    pub(crate) fn census(&self, workers: usize, census: &mut Census<'_>) {
        let Self { heard } = self;
        census.lasting("workers of which an earlier life has spoken", heard.len(), workers);
    }
}

impl Broker {
    /// A message came from a life of the worker that is not the last one. If the last one has spoken since such a
    /// message came before, both are alive. One message alone may be late.
    pub(crate) fn earlier_life_said(&mut self, now: MonoTime, peer: PeerId, id: WorkerId, epoch: Epoch) {
        self.counters.fenced += 1;
        let Some(worker) = self.workers.get(id) else { return };
        let before = self.twins.heard.insert(id, now);
        if before.is_some_and(|before| worker.seen > before) {
            let message = BrokerToWorker::Overtaken(Overtaken { worker: id, epoch });
            self.actions.push(Action::TellWorker { peer, message });
        }
    }
}
