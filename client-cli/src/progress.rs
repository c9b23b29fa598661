//! The display while a command waits: a spinner with phases for one item, a bar with rate and time left for many. Owns
//! standard error while it lives. On a pipe, or with `--json`, it shows only warnings; with `--quiet` only that a task
//! waits in vain.

use std::{
    collections::BTreeSet,
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use mesh_sdk::{News, Phase};

use crate::{
    streams,
    table::{printable, printable_lines},
    units,
};

/// Nothing is drawn earlier: most commands are done by then.
const DRAW_AFTER: Duration = Duration::from_millis(500);

/// Interval of redrawing the bar without news, so that its times advance.
const REDRAW: Duration = Duration::from_millis(120);

/// Without a terminal, a task that waits this long says why, once. The broker tells the reason every few seconds.
const TELL_WAITING_AFTER: Duration = Duration::from_secs(2);

#[derive(Debug)]
enum Shown {
    Nothing,
    /// A spinner with the phases of one item.
    One(ProgressBar),
    /// A bar with the number of completed items.
    Many(ProgressBar),
}

/// The display of one command.
#[derive(Debug)]
pub(crate) struct Progress {
    shown: Shown,
    is_quiet: bool,
    /// What Ctrl-C does.
    on_ctrl_c: &'static str,
    /// The hint with which the broker's silence has been reported; empty without one.
    told_silent: Option<&'static str>,
    /// Whether a full mesh has been reported.
    told_full: bool,
    waiting_since: Option<Instant>,
    /// Whether the reason of waiting has been reported.
    told_waiting: bool,
    /// Items that no connected worker could ever run.
    in_vain: BTreeSet<String>,
    worker: String,
    sending_since: Option<Instant>,
}

impl Progress {
    /// A display for this many items. Nothing is drawn unless standard error is a terminal.
    pub(crate) fn new(items: usize, is_quiet: bool, is_json: bool) -> Self {
        let is_seen = std::io::stderr().is_terminal() && !is_quiet && !is_json;
        let style = |template: &str| ProgressStyle::with_template(template).expect("invariant: the template is ours");
        let shown = match (is_seen, items) {
            (false, _) => Shown::Nothing,
            (true, 0 | 1) => Shown::One(ProgressBar::new_spinner().with_style(style("{spinner} {msg} ({elapsed})"))),
            (true, items) => {
                let bar = style("{bar:30} {pos}/{len}  {rate}  {left}{msg}");
                let bar = bar.with_key("rate", write_rate).with_key("left", write_left);
                Shown::Many(ProgressBar::new(items as u64).with_style(bar))
            }
        };
        match &shown {
            Shown::Nothing => {}
            Shown::One(bar) => draw_later(bar),
            Shown::Many(bar) => bar.enable_steady_tick(REDRAW),
        }
        Self {
            shown,
            is_quiet,
            on_ctrl_c: "Ctrl-C cancels",
            told_silent: None,
            told_full: false,
            waiting_since: None,
            told_waiting: false,
            in_vain: BTreeSet::new(),
            worker: String::new(),
            sending_since: None,
        }
    }

    /// Of a command that only waits: the task itself goes on if the user stops it.
    pub(crate) fn that_only_waits(self) -> Self {
        Self { on_ctrl_c: "Ctrl-C stops waiting", ..self }
    }

    /// Prints a line that stays above the bar; on a pipe, too.
    pub(crate) fn say(&self, line: &str) {
        if !self.is_quiet {
            self.warn(line);
        }
    }

    /// Prints such a line with `--quiet`, too.
    fn warn(&self, line: &str) {
        self.aside(|| streams::say(&format!("mesh-client: {}\n", printable_lines(line))));
    }

    /// Clears the bar while `write` writes to the terminal.
    pub(crate) fn aside(&self, write: impl FnOnce()) {
        match &self.shown {
            Shown::Nothing => write(),
            Shown::One(bar) | Shown::Many(bar) => bar.suspend(write),
        }
    }

    /// Reports that the mesh is full and will be tried again after `wait`.
    pub(crate) fn full(&mut self, why: &str, wait: Duration) {
        if !std::mem::replace(&mut self.told_full, true) {
            self.say(&format!("{why} (waiting for room; --no-wait fails instead)"));
        }
        self.phase(&format!("the mesh is full, trying again in {}", units::time(wait)));
    }

    pub(crate) fn phase(&self, text: &str) {
        if let Shown::One(bar) = &self.shown {
            bar.set_message(printable(text));
        }
    }

    /// Shows news of an item.
    pub(crate) fn news(&mut self, item: &str, news: News, broker: &str) {
        match &news {
            News::BrokerSilent { hint } if self.told_silent != Some(hint.unwrap_or_default()) => {
                self.told_silent = Some(hint.unwrap_or_default());
                let hint = hint.map_or_else(String::new, |hint| format!(" ({hint})"));
                self.say(&format!("the broker at {broker} does not answer{hint}; waiting for it ({})", self.on_ctrl_c));
            }
            News::Retrying { attempt, worker_name, why } => {
                self.say(&format!("{item}: attempt {attempt} on {worker_name} failed, trying another place: {why}"));
            }
            News::Queued { reason, no_worker_fits, .. } => {
                self.told_silent = None;
                if self.begins_to_wait_in_vain(item, *no_worker_fits) {
                    self.warn(&format!("{item}: {reason} ({})", self.on_ctrl_c));
                } else {
                    self.waiting(item, reason);
                }
            }
            News::Placed { .. } => {
                (self.told_silent, self.waiting_since) = (None, None);
                self.in_vain.remove(item);
            }
            _ => {}
        }
        let text = self.describe(news);
        self.phase(&text);
    }

    /// Whether the user is to be told that no connected worker could ever run the item. What is true of one item of a job
    /// is mostly true of all: it is said once, until it is true of none.
    fn begins_to_wait_in_vain(&mut self, item: &str, no_worker_fits: bool) -> bool {
        if !no_worker_fits {
            self.in_vain.remove(item);
            return false;
        }
        let is_first = self.in_vain.is_empty();
        self.in_vain.insert(item.to_owned());
        is_first
    }

    fn waiting(&mut self, item: &str, reason: &str) {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        let is_seen = !matches!(self.shown, Shown::Nothing);
        if !is_seen && since.elapsed() >= TELL_WAITING_AFTER && !std::mem::replace(&mut self.told_waiting, true) {
            self.say(&format!("{item}: waiting: {reason}"));
        }
    }

    fn describe(&mut self, news: News) -> String {
        match news {
            News::Queued { reason, no_worker_fits: true, .. } => format!("waiting: {reason}"),
            News::Queued { position, reason, starts_in, .. } => {
                let place = match position {
                    0 => "next in the queue".to_owned(),
                    position => format!("queued behind {position}"),
                };
                let start = starts_in.map(|time| format!(", starts in about {}", units::time(time)));
                format!("{place}{}: {reason}", start.unwrap_or_default())
            }
            News::Placed { worker_name, predicted, .. } => {
                self.worker = worker_name;
                self.sending_since = Some(Instant::now());
                let end = predicted.map(|time| format!(", done in about {}", units::time(time)));
                format!("{}: connecting{}", self.worker, end.unwrap_or_default())
            }
            News::Sending { sent_bytes, total_bytes } => {
                let seconds = self.sending_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
                let rate = if seconds > 0.0 { (sent_bytes as f64 / seconds) as u64 } else { 0 };
                let (sent, total) = (units::show_bytes(sent_bytes), units::show_bytes(total_bytes));
                format!("{}: sending {sent} of {total} ({}/s)", self.worker, units::show_bytes(rate))
            }
            News::Phase(Phase::Receiving) => format!("{}: sending", self.worker),
            News::Phase(Phase::Waiting) => format!("{}: waiting for its turn", self.worker),
            News::Phase(Phase::Loading) => format!("{}: loading the model", self.worker),
            News::Phase(Phase::Running) => format!("{}: running", self.worker),
            News::Retrying { .. } => "looking for another worker".to_owned(),
            News::BrokerSilent { .. } => "waiting for the broker".to_owned(),
        }
    }

    /// Counts an item that has ended.
    pub(crate) fn item_done(&self, failed: usize) {
        if let Shown::Many(bar) = &self.shown {
            bar.inc(1);
            if failed > 0 {
                bar.set_message(format!("{failed} failed"));
            }
        }
    }

    /// Removes the display from the terminal.
    pub(crate) fn finish(&self) {
        if let Shown::One(bar) | Shown::Many(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

/// Draws the bar if it is still needed then.
fn draw_later(bar: &ProgressBar) {
    bar.set_draw_target(ProgressDrawTarget::hidden());
    let bar = bar.downgrade();
    tokio::spawn(async move {
        tokio::time::sleep(DRAW_AFTER).await;
        if let Some(bar) = bar.upgrade().filter(|bar| !bar.is_finished()) {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(REDRAW);
        }
    });
}

/// Writes items per second with one decimal.
fn write_rate(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    // Writing to memory does not fail.
    let _ = write!(out, "{:.1}/s", state.per_sec());
}

/// Writes the time until all items have ended. Nothing is known of it before the first one has.
fn write_left(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    // Writing to memory does not fail.
    let _ = out.write_str(&left(state.pos(), state.eta()));
}

fn left(ended: u64, time: Duration) -> String {
    if ended == 0 { String::new() } else { format!("{:#} left  ", HumanDuration(time)) }
}

#[cfg(test)]
mod tests {
    use mesh_sdk::{Attempt, Lane, WorkerId};

    use super::*;

    #[test]
    fn every_phase_has_its_words() {
        let mut progress = Progress::new(1, true, false);
        let placed = News::Placed {
            attempt: Attempt(1),
            worker: WorkerId::from_bytes([1; 16]),
            worker_name: "pi-4".into(),
            model_held: false,
            lane: Lane::Realtime,
            predicted: Some(Duration::from_millis(120)),
        };
        let queued = |position, starts_in| News::Queued {
            position,
            reason: "all slots are busy".into(),
            no_worker_fits: false,
            starts_in,
        };
        assert_eq!(progress.describe(queued(2, None)), "queued behind 2: all slots are busy");
        let soon = Some(Duration::from_millis(1_500));
        assert_eq!(progress.describe(queued(0, soon)), "next in the queue, starts in about 1.50 s: all slots are busy");
        assert_eq!(progress.describe(placed), "pi-4: connecting, done in about 120 ms");
        progress.sending_since = None;
        let sending = News::Sending { sent_bytes: 512, total_bytes: 2048 };
        assert_eq!(progress.describe(sending), "pi-4: sending 512 B of 2.0 KiB (0 B/s)");
        assert_eq!(progress.describe(News::Phase(Phase::Loading)), "pi-4: loading the model");
        let (reason, no_worker_fits) = ("no connected worker can ever run it".into(), true);
        let in_vain = News::Queued { position: 3, reason, no_worker_fits, starts_in: None };
        assert_eq!(progress.describe(in_vain), "waiting: no connected worker can ever run it", "its place is no help");
    }

    #[test]
    fn the_time_left_is_told_once_an_item_has_ended() {
        assert_eq!(left(0, Duration::ZERO), "");
        assert_eq!(left(1, Duration::from_secs(30)), "30s left  ");
    }

    #[test]
    fn who_only_waits_is_told_that_the_task_itself_goes_on() {
        assert_eq!(Progress::new(1, true, false).on_ctrl_c, "Ctrl-C cancels");
        assert_eq!(Progress::new(1, true, false).that_only_waits().on_ctrl_c, "Ctrl-C stops waiting");
    }

    #[test]
    fn a_job_that_waits_in_vain_says_so_once_until_that_has_changed() {
        let mut progress = Progress::new(2, true, false);
        let said = [("a", false), ("a", true), ("a", true), ("b", true), ("a", false), ("b", true)]
            .map(|(item, in_vain)| progress.begins_to_wait_in_vain(item, in_vain));
        assert_eq!(said, [false, true, false, false, false, false]);
        assert!(!progress.begins_to_wait_in_vain("b", false));
        assert!(progress.begins_to_wait_in_vain("b", true), "the worker that fitted has left again");
    }
}
