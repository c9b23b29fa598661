//! Sends a level's requests and hands their samples to its measurement. Owns clocks, connections and tasks. Never
//! decides: `measurement` says when a level is over, `schedule` when a request is due.
//!
//! ```text
//!   pacer thread --arrivals--> level --spawns--> request (submit, wait) --sample--> level --> Measurement
//!                                '<--------- in a closed loop: the next one ---------'
//! ```

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_sdk::{Mesh, Task, TaskError, TaskHandle, TaskResult, WorkerId};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep_until, timeout_at},
};

use super::{
    measurement::{Measured, Measurement, Rules, Until, Window},
    payload::Payloads,
    sample::{ClientNo, End, NOT_SENT, Parts, Sample, WorkerNo},
    schedule::{self, Arrival, Distribution},
    sweep::Load,
};
use crate::{
    exit::{self, Failed},
    stop::{Stop, stopped},
};

/// Time for requests under way to end by themselves after a level: cancelling a run costs its worker a loaded model.
const GRACE: Duration = Duration::from_secs(2);

/// Longest wait for the answers to the last lines of a schedule.
const REPLAY_GRACE: Duration = Duration::from_secs(60);

/// Time that a cancelled request gets to report its end.
const CANCEL_WAIT: Duration = Duration::from_secs(3);

/// Pause after a failed request in a closed loop: otherwise an immediate refusal would be repeated as fast as the
/// processor can.
const FAILED_PAUSE: Duration = Duration::from_millis(50);

/// Interval of rewriting the progress line.
const REDRAW: Duration = Duration::from_millis(250);

/// Due requests that may wait for the loop. If there are more, the pacer waits, but their due times do not change.
const ARRIVALS_MAX: usize = 4096;

/// Longest sleep of the pacer before it checks whether the loop is still there.
const PACER_NAP_MAX: Duration = Duration::from_millis(100);

/// The resources of all requests.
#[derive(Debug)]
pub(crate) struct Drive {
    /// One connection per client.
    pub(crate) meshes: Vec<Mesh>,
    /// A request without its inputs.
    pub(crate) template: Task,
    pub(crate) payloads: Payloads,
    /// Items per request, unless a schedule sets another number.
    pub(crate) items: u32,
    pub(crate) distribution: Distribution,
    pub(crate) seed: u64,
    pub(crate) outstanding_max: usize,
    pub(crate) replay: Vec<Arrival>,
    pub(crate) notes: Mutex<Notes>,
}

/// Workers and failures met so far.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    numbers: BTreeMap<WorkerId, WorkerNo>,
    /// Names of the workers by number.
    pub(crate) workers: Vec<String>,
    /// The first failure of each error code, in the order in which they came.
    pub(crate) failures: Vec<Failed>,
}

impl Notes {
    fn worker(&mut self, id: WorkerId, name: String) -> WorkerNo {
        let next = WorkerNo(self.workers.len() as u32);
        *self.numbers.entry(id).or_insert_with(|| {
            // Two workers may have the same name; people must be able to tell them apart.
            let is_taken = self.workers.contains(&name);
            self.workers.push(if is_taken { format!("{name} {id}") } else { name });
            next
        })
    }

    /// Returns the failure's code.
    fn failure(&mut self, failed: Failed) -> &'static str {
        let code = failed.code;
        if self.failures.iter().all(|known| known.code != code) {
            self.failures.push(failed);
        }
        code
    }
}

/// Events of a running level.
pub(crate) enum Seen<'a> {
    /// Progress of the level.
    Progress {
        /// The measurement so far.
        measurement: &'a Measurement,
        /// Requests under way.
        outstanding: usize,
        /// Elapsed part of the current window or warm-up, from 0.
        part: f64,
    },
    /// A window has ended.
    Window(&'a Window),
}

/// One request to send.
#[derive(Clone, Copy, Debug)]
struct Wish {
    number: u64,
    client: ClientNo,
    items: u32,
    /// Due time by the schedule; `None` in a closed loop: as soon as possible.
    intended_us: Option<u64>,
    pause: Duration,
}

impl Drive {
    pub(crate) fn notes(&self) -> MutexGuard<'_, Notes> {
        // The notes have no state that a panic could corrupt.
        self.notes.lock()
    }

    fn clients(&self) -> u64 {
        self.meshes.len() as u64
    }

    /// Sends one request per client: the first alone, since it brings the model, then all others at once. They have no
    /// deadline: it is for requests of a model that is there and loaded.
    ///
    /// # Errors
    /// If a request fails; returns the first failure.
    pub(crate) async fn prime(self: &Arc<Self>) -> Result<(), Failed> {
        self.submit(0, ClientNo(0), self.items).await?;
        let mut others = JoinSet::new();
        for client in 1..self.meshes.len() {
            let drive = self.clone();
            others.spawn(async move { drive.submit(0, ClientNo(client as u16), drive.items).await });
        }
        while let Some(ended) = others.join_next().await {
            ended.map_err(|error| Failed::new(exit::INTERNAL, "INTERNAL", error))??;
        }
        Ok(())
    }

    /// Sends a request outside of any level, and waits for its end.
    async fn submit(&self, number: u64, client: ClientNo, items: u32) -> Result<TaskResult, Failed> {
        let mut handle = self.begin(self.template.clone().deadline(None), number, client, items).await?;
        handle.wait().await.map_err(|error| Failed::of_task(&error))
    }

    async fn begin(&self, task: Task, number: u64, client: ClientNo, items: u32) -> Result<TaskHandle, Failed> {
        let failed = |error| Failed::new(exit::of_submit(&error), "BAD_INPUT", error);
        let inputs = self.payloads.of(number, items).map_err(failed)?;
        let task = task.inputs(inputs).items(items).job_items(items);
        self.meshes[usize::from(client.0)].submit(task).await.map_err(failed)
    }

    async fn request(self: Arc<Self>, wish: Wish, origin: Instant, mut closing: watch::Receiver<bool>) -> Sample {
        if !wish.pause.is_zero() {
            tokio::time::sleep(wish.pause).await;
        }
        let now_us = || origin.elapsed().as_micros() as u64;
        let (client, items) = (wish.client, wish.items);
        let intended_us = wish.intended_us.unwrap_or_else(now_us);
        let sample = |sent_us, end| Sample { intended_us, sent_us, ended_us: now_us(), items, client, end };
        if *closing.borrow() {
            return sample(None, End::Unanswered);
        }
        let begun = self.begin(self.template.clone(), wish.number, client, items).await;
        let sent_us = Some(now_us());
        let mut handle = match begun {
            Ok(handle) => handle,
            Err(failed) => return sample(sent_us, End::Failed(self.notes().failure(failed))),
        };
        let ended = tokio::select! {
            ended = handle.wait() => Some(ended),
            () = closed(&mut closing) => None,
        };
        let Some(ended) = ended else {
            handle.cancel().await;
            // The request does not judge the mesh's silence: the mesh drops tasks that are no longer asked for.
            let _ = tokio::time::timeout(CANCEL_WAIT, handle.wait()).await;
            return sample(sent_us, End::Unanswered);
        };
        let end = self.end(ended);
        sample(sent_us, end)
    }

    fn end(&self, ended: Result<TaskResult, TaskError>) -> End {
        match ended {
            Ok(TaskResult { worker, timings, .. }) => {
                let us = |time: Duration| time.as_micros() as u64;
                let parts = Parts {
                    queued_us: us(timings.queued),
                    sending_us: us(timings.sending),
                    loading_us: us(timings.loading),
                    running_us: us(timings.running),
                };
                End::Done { worker: worker.map(|(id, name)| self.notes().worker(id, name)), parts }
            }
            Err(error) => End::Failed(self.notes().failure(Failed::of_task(&error))),
        }
    }

    /// Due times of this load's requests; `None` in a closed loop.
    fn arrivals(&self, load: Load, origin: Instant) -> Option<mpsc::Receiver<Arrival>> {
        match load {
            Load::Closed { .. } => None,
            Load::Open { rate } => {
                Some(pace(schedule::at_rate(rate, self.distribution, self.items, self.seed), origin))
            }
            Load::Replay => Some(pace(self.replay.clone().into_iter(), origin)),
        }
    }
}

/// Waits until requests have to give up.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // An error means that the level is gone, which has the same effect.
    let _ = closing.wait_for(|is_closing| *is_closing).await;
}

/// Measures one level. Returns the stop signal if one ended it early.
pub(crate) async fn measure(
    drive: &Arc<Drive>,
    load: Load,
    rules: Rules,
    stop: &mut watch::Receiver<Option<Stop>>,
    mut see: impl FnMut(Seen<'_>),
) -> (Measured, Option<Stop>) {
    let mut level = Level::begin(drive, load, rules);
    let mut arrivals = drive.arrivals(load, level.origin);
    let mut redraw = tokio::time::interval(REDRAW);
    redraw.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut all_sent: Option<Instant> = None;
    let stopped_by = loop {
        let window_ends = level.origin + Duration::from_micros(level.measurement.ends_us());
        let answers_until = all_sent.map_or(window_ends, |sent| sent + REPLAY_GRACE);
        tokio::select! {
            biased;
            stop = stopped(stop) => break Some(stop),
            () = sleep_until(window_ends.into()) => {
                let now_us = level.now_us();
                if let Some(window) = level.measurement.end_window(now_us) {
                    see(Seen::Window(window));
                }
                if level.measurement.is_over() {
                    break None;
                }
            }
            () = sleep_until(answers_until.into()), if all_sent.is_some() => break None,
            _ = redraw.tick() => level.show(&mut see),
            Some(ended) = level.running.join_next() => level.ended(ended),
            arrival = next(&mut arrivals), if all_sent.is_none() => match arrival {
                Some(arrival) => level.arrived(arrival),
                None => all_sent = Some(Instant::now()),
            },
        }
        if all_sent.is_some() && level.running.is_empty() {
            break None;
        }
    };
    drop(arrivals);
    (level.close(stopped_by.is_some()).await, stopped_by)
}

/// The next due request; pending for ever if there is no schedule.
async fn next(arrivals: &mut Option<mpsc::Receiver<Arrival>>) -> Option<Arrival> {
    match arrivals {
        Some(arrivals) => arrivals.recv().await,
        None => std::future::pending().await,
    }
}

/// A running level.
struct Level {
    drive: Arc<Drive>,
    measurement: Measurement,
    rules: Rules,
    origin: Instant,
    running: JoinSet<Sample>,
    is_closed_loop: bool,
    number: u64,
    /// Becomes true when requests have to give up.
    closing: watch::Sender<bool>,
}

impl Level {
    fn begin(drive: &Arc<Drive>, load: Load, rules: Rules) -> Self {
        let concurrency = match load {
            Load::Closed { concurrency } => concurrency,
            Load::Open { .. } | Load::Replay => 0,
        };
        let mut level = Self {
            drive: drive.clone(),
            measurement: Measurement::new(rules),
            rules,
            origin: Instant::now(),
            running: JoinSet::new(),
            is_closed_loop: concurrency > 0,
            number: 0,
            closing: watch::Sender::new(false),
        };
        for slot in 0..u64::from(concurrency) {
            let client = ClientNo((slot % drive.clients()) as u16);
            level.spawn(client, drive.items, None, Duration::ZERO);
        }
        level
    }

    fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    fn spawn(&mut self, client: ClientNo, items: u32, intended_us: Option<u64>, pause: Duration) {
        let wish = Wish { number: self.number, client, items, intended_us, pause };
        self.number += 1;
        self.running.spawn(self.drive.clone().request(wish, self.origin, self.closing.subscribe()));
    }

    /// Sends a due request of an open loop.
    fn arrived(&mut self, arrival: Arrival) {
        let client = ClientNo((self.number % self.drive.clients()) as u16);
        if self.running.len() < self.drive.outstanding_max {
            self.spawn(client, arrival.items, Some(arrival.at_us), Duration::ZERO);
            return;
        }
        self.number += 1;
        let Arrival { at_us, items } = arrival;
        let end = End::Failed(NOT_SENT);
        self.measurement.add(&Sample { intended_us: at_us, sent_us: None, ended_us: at_us, items, client, end });
    }

    /// Handles the end of a request. In a closed loop sends the next one.
    fn ended(&mut self, ended: Result<Sample, tokio::task::JoinError>) {
        // A panic in a request is a bug and has been printed; the others continue.
        let Ok(sample) = ended else { return };
        self.measurement.add(&sample);
        if self.is_closed_loop {
            let pause = if matches!(sample.end, End::Done { .. }) { Duration::ZERO } else { FAILED_PAUSE };
            self.spawn(sample.client, sample.items, None, pause);
        }
    }

    fn show(&self, see: &mut impl FnMut(Seen<'_>)) {
        let part = self.measurement.part(self.now_us());
        see(Seen::Progress { measurement: &self.measurement, outstanding: self.running.len(), part });
    }

    /// Ends the level: sends nothing more. Requests under way may end, but count as unanswered.
    async fn close(mut self, is_early: bool) -> Measured {
        let now_us = self.now_us();
        let mut unanswered = Vec::new();
        let mut note = |ended: Result<Sample, tokio::task::JoinError>| {
            unanswered.extend(ended.ok().filter(|sample| sample.intended_us <= now_us));
        };
        // A replay has already waited for its answers.
        let grace = if self.rules.until == Until::Replayed { Duration::ZERO } else { GRACE };
        let patience = Instant::now() + grace;
        while let Ok(Some(ended)) = timeout_at(patience.into(), self.running.join_next()).await {
            note(ended);
        }
        // Without requests under way there is no receiver.
        let _ = self.closing.send(true);
        while let Some(ended) = self.running.join_next().await {
            note(ended);
        }
        self.measurement.finish(now_us, is_early, &unanswered)
    }
}

/// Sends each arrival when it is due. Uses its own thread: the runtime's timers have a resolution of milliseconds, and
/// are late when the runtime is busy.
fn pace(arrivals: impl Iterator<Item = Arrival> + Send + 'static, origin: Instant) -> mpsc::Receiver<Arrival> {
    let (due, receiver) = mpsc::channel(ARRIVALS_MAX);
    std::thread::spawn(move || {
        for arrival in arrivals {
            let at = origin + Duration::from_micros(arrival.at_us);
            while let Some(left) = at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                std::thread::sleep(left.min(PACER_NAP_MAX));
                if due.is_closed() {
                    return;
                }
            }
            if due.blocking_send(arrival).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use mesh_sdk::Model;

    use super::*;

    #[tokio::test]
    async fn the_pacer_gives_each_arrival_when_it_is_due() {
        let origin = Instant::now();
        let mut due = pace(schedule::at_rate(200.0, Distribution::Constant, 1, 1).take(4), origin);
        while let Some(arrival) = due.recv().await {
            assert!(origin.elapsed() >= Duration::from_micros(arrival.at_us), "{arrival:?} came too early");
        }
    }

    #[tokio::test]
    async fn requests_are_due_as_the_distribution_says() {
        let mut gaps = Vec::new();
        for distribution in [Distribution::Constant, Distribution::Poisson] {
            let drive = Drive {
                meshes: Vec::new(),
                template: Task::new(Model::from_bytes("m.tflite", b"\x1c\0\0\0TFL3".as_slice()).await.unwrap()),
                payloads: Payloads::new(Vec::new()),
                items: 1,
                distribution,
                seed: 1,
                outstanding_max: 1,
                replay: Vec::new(),
                notes: Default::default(),
            };
            let mut due = drive.arrivals(Load::Open { rate: 1000.0 }, Instant::now()).expect("an open loop");
            let mut at_us = Vec::new();
            for _ in 0..8 {
                at_us.push(due.recv().await.unwrap().at_us);
            }
            gaps.push(at_us.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>());
        }
        assert!(gaps[0].iter().all(|gap_us| *gap_us == 1000), "{gaps:?}");
        assert!(gaps[1].iter().any(|gap_us| gap_us.abs_diff(1000) > 500), "{gaps:?}");
    }

    #[test]
    fn the_first_failure_is_the_one_that_came_first() {
        let mut notes = Notes::default();
        for (code, text) in [("RUN_FAILED", "once"), ("BUSY", "full"), ("RUN_FAILED", "again")] {
            assert_eq!(notes.failure(Failed::new(exit::INTERNAL, code, text)), code);
        }
        let kept: Vec<&str> = notes.failures.iter().map(|failed| failed.text.as_str()).collect();
        assert_eq!(kept, ["once", "full"]);
    }

    #[test]
    fn workers_of_one_name_can_be_told_apart() {
        let mut notes = Notes::default();
        let ids = [1, 2].map(|byte| WorkerId::from_bytes([byte; 16]));
        let numbers = [0, 1, 0].map(|index| notes.worker(ids[index], "pi".to_owned()));
        assert_eq!(numbers, [WorkerNo(0), WorkerNo(1), WorkerNo(0)]);
        assert!(notes.workers[0] == "pi" && notes.workers[1].starts_with("pi 02"), "{:?}", notes.workers);
    }
}
