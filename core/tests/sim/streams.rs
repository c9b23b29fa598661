//! Users who submit again and again: at a rate, or as fast as answers come.

use std::time::Duration;

use proto_msgs::TaskId;

use super::{
    job::Job,
    mesh::{Happening, Mesh, Micros, Node, micros},
};

/// When the next task of a stream is submitted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// This long after the last submit, give or take a half.
    Every(Duration),
    /// When one of N tasks in flight has ended.
    Closed(u32),
    /// All tasks at once.
    AtOnce,
}

/// Tasks submitted by one client process.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) client: Node,
    pub(crate) job: Job,
    pub(crate) pace: Pace,
    /// Number of tasks still to be submitted.
    pub(crate) left: u32,
    /// No task is submitted after this time.
    pub(crate) until: Micros,
    pub(crate) tasks: Vec<TaskId>,
}

impl Mesh {
    /// Begins a stream of `count` tasks and returns its number.
    pub(crate) fn stream(&mut self, client: Node, job: Job, pace: Pace, count: u32) -> usize {
        let stream = self.streams.len();
        self.streams.push(Stream { client, job, pace, left: count, until: Micros::MAX, tasks: Vec::new() });
        let at_first = match pace {
            Pace::Every(_) => 1,
            Pace::Closed(at_once) => at_once.min(count),
            Pace::AtOnce => count,
        };
        for _ in 0..at_first {
            self.after(0, Happening::Arrive { stream });
        }
        stream
    }

    /// Begins a stream that ends at a given time.
    pub(crate) fn stream_for(&mut self, client: Node, job: Job, pace: Pace, lasts: Duration) -> usize {
        let stream = self.stream(client, job, pace, u32::MAX);
        self.streams[stream].until = self.now + micros(lasts);
        stream
    }

    pub(super) fn arrive(&mut self, number: usize) {
        let stream = &self.streams[number];
        let Node::Client(client) = stream.client else { return };
        let is_alive = self.clients[client].machine.is_some();
        if stream.left == 0 || self.now >= stream.until || !is_alive {
            return;
        }
        let (job, pace, client) = (stream.job.clone(), stream.pace, stream.client);
        self.streams[number].left -= 1;
        if let Pace::Every(gap) = pace {
            let gap = micros(gap);
            let wait = self.rng.among(gap / 2..gap * 3 / 2 + 1);
            self.after(wait, Happening::Arrive { stream: number });
        }
        // The stream knows the task before the submit, which may be refused at once.
        let task = super::referee::task_id(self.referee.tasks.len());
        self.streams[number].tasks.push(task);
        self.submit_in(client, job, Some(number));
    }

    /// A task has ended: a stream that waited for it goes on.
    pub(super) fn stream_goes_on(&mut self, task: TaskId) {
        let Some(stream) = self.referee.task(task).stream else { return };
        if matches!(self.streams[stream].pace, Pace::Closed(_)) {
            self.after(0, Happening::Arrive { stream });
        }
    }

    /// Times of the stream's ended tasks, shortest first.
    pub(crate) fn latencies(&self, stream: usize) -> Vec<Duration> {
        self.latencies_of(&self.streams[stream].tasks)
    }

    pub(crate) fn latencies_of(&self, tasks: &[TaskId]) -> Vec<Duration> {
        let truths = tasks.iter().map(|task| self.referee.task(*task));
        let mut took: Vec<Duration> = truths
            .filter_map(|truth| Some(Duration::from_micros(truth.ended?.saturating_sub(truth.submitted))))
            .collect();
        took.sort_unstable();
        took
    }
}
