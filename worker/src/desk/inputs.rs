//! How an attempt's model and inputs arrive: at once, after room was made, or over a new link if the last one broke.
//!
//! Owns the answers to `Open` ([`Accept`]) and the way to [`Event::Received`]. Never decides who is let in.

use std::sync::Arc;

use mesh_core::worker::{Event, LinkId};
use mesh_transport::blob::Intake;
use proto_msgs::{Accept, AttemptId, Failure, Manifest, Ticket, WorkerToClient, limits::WINDOW_BYTES};
use tokio::task::AbortHandle;

use super::{
    Desk, Note,
    attempt::{Attempt, Chunks, Stage},
    receive::{Begun, Prepared, Way},
};
use crate::{
    batch::material::{Inputs, Material, Order},
    tools::Tools,
};

impl Desk {
    pub(super) async fn receive(&mut self, id: AttemptId, link: LinkId, manifest: Manifest, ticket: Ticket) {
        let early = self.early.take(id, link);
        let Some(outlet) = self.links.outlet(link).cloned() else { return };
        if let Some(attempt) = self.attempts.get_mut(&id) {
            attempt.relink(link, outlet);
            let Some(needs) = attempt.needs() else { return };
            return self.accept(id, link, needs);
        }
        let order = Order { id, manifest: manifest.into(), ticket: ticket.into() };
        let (number, way) = (self.number(), Way::new(outlet));
        let attempt = Attempt::new(number, link, way.clone(), order.clone());
        match order.prepare_quickly(&self.tools.store, &self.tools.memory) {
            Some(prepared) => self.receive_at_once(attempt, prepared, way, early).await,
            None => self.receive_later(attempt, way, early),
        }
    }

    /// Starts a transfer that needs no disk. All bytes may have come with the `Open`.
    async fn receive_at_once(&mut self, mut attempt: Attempt, prepared: Prepared, way: Way, early: Chunks) {
        let (id, number, link) = (attempt.order.id, attempt.number, attempt.link);
        let (intake, receiving) = prepared.start(attempt.order.clone());
        attempt.stage = Stage::Receiving(intake);
        let pushed = attempt.push_all(early);
        let begun = receiving.begin();
        // What is complete by now is not named: its last credit is dropped.
        let needs = attempt.needs().unwrap_or_default();
        let ended = match (pushed, begun) {
            (Err(failure), _) => {
                attempt.stop();
                Some(Err(failure))
            }
            (Ok(()), Begun::Ended(inputs)) => Some(inputs),
            (Ok(()), Begun::GoesOn(receiving)) => {
                let receiving = async move |tools| receiving.finish(&tools, &way).await;
                attempt.task = Some(self.spawn_received(id, number, receiving));
                None
            }
        };
        self.attempts.insert(id, attempt);
        match ended {
            // The client has sent everything. The next message, most likely the result, tells it so.
            Some(inputs) => self.received(id, number, inputs).await,
            None => self.accept(id, link, needs),
        }
    }

    /// Makes room on the disk first. Chunks that arrive meanwhile wait.
    fn receive_later(&mut self, mut attempt: Attempt, way: Way, early: Chunks) {
        let (id, number, order, note) = (attempt.order.id, attempt.number, attempt.order.clone(), self.note.clone());
        attempt.stage = Stage::Preparing(early);
        attempt.task = Some(self.spawn_received(id, number, async move |tools| {
            let (intake, receiving) = order.prepare(&tools).await?.start(order);
            let _ = note.send(Note::Prepared { id, number, intake }).await;
            receiving.finish(&tools, &way).await
        }));
        self.attempts.insert(id, attempt);
    }

    /// Spawns the task that receives an attempt's inputs and reports them.
    fn spawn_received<F>(&self, id: AttemptId, number: u64, work: impl FnOnce(Arc<Tools>) -> F) -> AbortHandle
    where
        F: Future<Output = Result<Inputs, Failure>> + Send + 'static,
    {
        let (note, work) = (self.note.clone(), work(self.tools.clone()));
        let task = async move {
            let inputs = work.await;
            let _ = note.send(Note::Received { id, number, inputs }).await;
        };
        tokio::spawn(task).abort_handle()
    }

    fn accept(&self, id: AttemptId, link: LinkId, needs: Vec<(u16, u64)>) {
        let accept = Accept { id, needs, window_bytes: WINDOW_BYTES };
        self.tell_client(link, &WorkerToClient::Accept(accept));
    }

    /// Starts the transfer of an attempt for which there is now room.
    pub(super) fn prepared(&mut self, id: AttemptId, number: u64, intake: Intake) {
        let Some(attempt) = self.attempts.get_mut(&id).filter(|attempt| attempt.number == number) else { return };
        let Stage::Preparing(early) = &mut attempt.stage else { return };
        let early = std::mem::take(early);
        attempt.stage = Stage::Receiving(intake);
        let pushed = attempt.push_all(early);
        let (link, needs) = (attempt.link, attempt.needs().unwrap_or_default());
        self.pushed(id, pushed);
        self.accept(id, link, needs);
    }

    /// Notes that an attempt's inputs are complete, or will not come.
    pub(super) async fn received(&mut self, id: AttemptId, number: u64, inputs: Result<Inputs, Failure>) {
        let Some(attempt) = self.attempts.get_mut(&id).filter(|attempt| attempt.number == number) else { return };
        attempt.task = None;
        let event = match inputs {
            Ok(inputs) => {
                attempt.stage = Stage::Here(Material::new(attempt.order.clone(), inputs, &self.tools.memory).into());
                Event::Received { id }
            }
            Err(Failure { code, text }) => Event::ReceiveFailed { id, code, text },
        };
        self.tell_machine(event).await;
    }

    /// Ends the attempt if its chunk broke the rules.
    pub(super) fn pushed(&mut self, id: AttemptId, pushed: Result<(), Failure>) {
        let (Err(failure), Some(attempt)) = (pushed, self.attempts.get_mut(&id)) else { return };
        attempt.stop();
        let (note, number) = (self.note.clone(), attempt.number);
        tokio::spawn(async move {
            let _ = note.send(Note::Received { id, number, inputs: Err(failure) }).await;
        });
    }
}
