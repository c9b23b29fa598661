//! Questions of a story about a task, in the story's words.

use proto_msgs::{ErrorCode, Outcome, TaskId};

use super::{
    mesh::{Mesh, Node, short},
    referee::Truth,
};

/// A task under question. Each question panics with the last lines of the story if the answer is unexpected.
pub(crate) struct Expect<'mesh> {
    pub(super) mesh: &'mesh Mesh,
    pub(super) task: TaskId,
}

impl Expect<'_> {
    fn truth(&self) -> &Truth {
        self.mesh.referee.task(self.task)
    }

    #[track_caller]
    fn that(self, good: bool, question: &str) -> Self {
        let truth = self.truth();
        assert!(
            good,
            "{} is not {question}: ends {:?}, placements {:?}, runs {:?}\n{}",
            short(self.task),
            truth.ends,
            truth.placements,
            truth.runs,
            self.mesh.story.last_lines()
        );
        self
    }

    fn last_outcome(&self) -> Option<&Outcome> {
        self.truth().ends.last().map(|(_, end)| &end.outcome)
    }

    /// The task ended with the right result, which the referee has checked.
    #[track_caller]
    pub(crate) fn done(self) -> Self {
        let good = matches!(self.last_outcome(), Some(Outcome::Done { .. }));
        self.that(good, "done")
    }

    #[track_caller]
    pub(crate) fn failed(self, code: ErrorCode) -> Self {
        let good = matches!(self.last_outcome(), Some(Outcome::Failed(failure)) if failure.code == code);
        self.that(good, &format!("failed with {code}"))
    }

    #[track_caller]
    pub(crate) fn cancelled(self) -> Self {
        let good = self.last_outcome() == Some(&Outcome::Cancelled);
        self.that(good, "cancelled")
    }

    #[track_caller]
    pub(crate) fn not_ended(self) -> Self {
        let good = self.truth().ends.is_empty();
        self.that(good, "still open")
    }

    /// The broker placed the task this many times.
    #[track_caller]
    pub(crate) fn placed_times(self, times: usize) -> Self {
        let good = self.truth().placements.len() == times;
        self.that(good, &format!("placed {times} times"))
    }

    /// The task began to run this many times, at any workers.
    #[track_caller]
    pub(crate) fn ran_times(self, times: usize) -> Self {
        let good = self.truth().runs.len() == times;
        self.that(good, &format!("run {times} times"))
    }

    /// The last run was at this worker.
    #[track_caller]
    pub(crate) fn ran_at(self, worker: Node) -> Self {
        let good = self.truth().runs.last().is_some_and(|(_, ran_at)| Node::Worker(*ran_at) == worker);
        self.that(good, &format!("run at {worker}"))
    }

    pub(crate) fn is_over(&self) -> bool {
        self.truth().open.is_empty()
    }

    pub(crate) fn placements(&self) -> usize {
        self.truth().placements.len()
    }

    /// The worker where the broker placed the task last.
    pub(crate) fn placed_at(&self) -> Node {
        let (_, worker) = self.truth().placements.last().expect("the task was placed");
        let number = self.mesh.workers.iter().position(|shell| shell.id == *worker);
        Node::Worker(number.expect("grants name workers of the mesh"))
    }

    pub(crate) fn runs(&self) -> usize {
        self.truth().runs.len()
    }
}
