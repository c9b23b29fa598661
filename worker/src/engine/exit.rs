//! How a runner ended, and what that means for its attempt.

use proto_msgs::{ErrorCode, Failure};
use serde::Deserialize;

use proto_msgs::units::show_bytes;

/// Bytes of a runner's log that are kept for error texts.
const LOG_BYTES_MAX: usize = 8 * 1024;

/// Bytes of the log shown in an error text.
const LOG_SHOWN_BYTES: usize = 600;

/// Why a runner ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cause {
    /// The runner ended by itself with this exit code.
    Code(i32),
    /// The runner was killed by this signal, or crashed.
    Signal(i32),
    /// The runner was killed, perhaps because it used more memory than this limit: the engine does not tell.
    Killed { limit_bytes: u64 },
    /// The runner used more memory than this limit; 0 if no limit is known.
    OutOfMemory { limit_bytes: u64 },
    /// The runner used more GPU memory than this limit.
    OutOfGpuMemory { limit_bytes: u64 },
    /// The worker ended the runner.
    Stopped,
}

/// Who set a runner's memory limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LimitOf {
    /// The task: no worker gives it more.
    Task,
    /// The worker, because the task asks for none: another worker may give more.
    Worker,
    /// The device has a memory of its own, and nobody can tell which of the two was short.
    Device,
}

impl LimitOf {
    /// The failure of a runner, as it counts under this limit: who may help if memory was short.
    pub(crate) fn judge(self, failure: Failure) -> Failure {
        match (failure.code, self) {
            (ErrorCode::RunOutOfMemory, Self::Worker) => Failure { code: ErrorCode::WorkerOutgrown, ..failure },
            (ErrorCode::RunOutOfMemory, Self::Task) => {
                Failure::new(failure.code, format!("{}; ask for more with --memory", failure.text.trim_end()))
            }
            _ => failure,
        }
    }
}

/// Cause and log of a runner's end.
#[derive(Clone, Debug)]
pub(crate) struct Exit {
    cause: Cause,
    memory_of: LimitOf,
    log: String,
}

/// The runner's last message: one line of JSON.
#[derive(Deserialize)]
struct LastWord {
    code: String,
    text: String,
}

impl Exit {
    /// An end with this cause, under a memory limit set by this side, and the last lines of the runner's log.
    pub(crate) fn new(cause: Cause, memory_of: LimitOf, log: &LogTail) -> Self {
        let log = String::from_utf8_lossy(&log.bytes).into_owned();
        // A failed allocation ends the process before any watcher sees how much it used.
        let out_of_memory = log.contains("memory allocation of") || log.contains("std::bad_alloc");
        let cause = match cause {
            Cause::Signal(libc::SIGABRT) if out_of_memory => Cause::OutOfMemory { limit_bytes: 0 },
            other => other,
        };
        Self { cause, memory_of, log }
    }

    /// An end without a log.
    pub(crate) fn without_word(cause: Cause) -> Self {
        Self { cause, memory_of: LimitOf::Task, log: String::new() }
    }

    /// The failure that this end causes while the model was loading.
    pub(crate) fn while_loading(&self) -> Failure {
        let (code, what) = match self.cause {
            cause if cause.is_from_outside() => return self.ended_from_outside(),
            Cause::Code(10) => (ErrorCode::ModelInvalid, "the model is not a valid file of its format".to_owned()),
            Cause::Code(11) => (ErrorCode::ModelUnsupported, "the runtime does not support the model".to_owned()),
            Cause::Code(12) => (ErrorCode::ModelRejected, "the runtime rejected the model".to_owned()),
            Cause::Code(14) => (ErrorCode::RunOutOfMemory, "there was not enough memory to load the model".to_owned()),
            Cause::Code(code @ (2 | 13 | 125..=127)) => {
                (ErrorCode::EngineUnavailable, format!("the runner of this worker does not start (exit code {code})"))
            }
            Cause::Stopped => (ErrorCode::WorkerLost, "the worker ended the runner".to_owned()),
            cause @ Cause::OutOfMemory { .. } => {
                (ErrorCode::RunOutOfMemory, format!("the runner {cause} while it loaded the model"))
            }
            cause => (ErrorCode::ModelRejected, format!("the runner {cause} while it loaded the model")),
        };
        self.memory_of.judge(self.last_word(code).unwrap_or_else(|| self.failure(code, what)))
    }

    /// The failure that this end causes while the model was running.
    pub(crate) fn while_running(&self) -> Failure {
        let failed = |code| self.failure(code, format!("the runner {} during the run", self.cause));
        match self.cause {
            cause if cause.is_from_outside() => self.ended_from_outside(),
            Cause::OutOfMemory { .. } => self.memory_of.judge(failed(ErrorCode::RunOutOfMemory)),
            // Only a task's own demand limits the memory of a GPU.
            Cause::OutOfGpuMemory { .. } => failed(ErrorCode::RunOutOfMemory),
            Cause::Stopped => failed(ErrorCode::WorkerLost),
            Cause::Code(_) | Cause::Signal(_) | Cause::Killed { .. } => failed(ErrorCode::RunCrashed),
        }
    }

    /// Another attempt may help. There are few, in case that the model ends the runner like this.
    fn ended_from_outside(&self) -> Failure {
        let text = format!(
            "the runner {}: somebody ended it from outside, as `docker stop`, `systemctl stop` and a kernel that is short \
             of memory do",
            self.cause
        );
        self.failure(ErrorCode::EngineUnavailable, text)
    }

    /// What the runner said about its failure. Only if it agrees with how the runner ended: a runtime logs texts that the
    /// model chose.
    fn last_word(&self, code: ErrorCode) -> Option<Failure> {
        let line = self.log.lines().rev().find(|line| line.starts_with('{'))?;
        let word: LastWord = serde_json::from_str(line).ok()?;
        let is_its_own = matches!(self.cause, Cause::Code(_)) && code_of_runner(&word.code) == Some(code);
        is_its_own.then(|| Failure::new(code, word.text))
    }

    fn failure(&self, code: ErrorCode, mut text: String) -> Failure {
        let lines: Vec<_> = self.log.lines().map(str::trim).filter(|line| !is_routine(line)).collect();
        let log = lines.join(" | ");
        let shown = &log[log.ceil_char_boundary(log.len().saturating_sub(LOG_SHOWN_BYTES))..];
        if !shown.is_empty() {
            text.push_str("; its last words: ");
            text.push_str(shown);
        }
        Failure::new(code, text)
    }
}

/// Whether a line of the log says nothing of an end: an empty one, or one of a runner that is well.
fn is_routine(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let is_time = words.next().is_none_or(|time| time.starts_with(|char: char| char.is_ascii_digit()));
    is_time && words.next().is_none_or(|level| matches!(level, "INFO" | "DEBUG" | "TRACE"))
}

impl Cause {
    /// Whether the runner was told to end, and not by its worker. A runner ends itself only with a code for its failure.
    const fn is_from_outside(self) -> bool {
        use libc::{SIGHUP, SIGINT, SIGKILL, SIGTERM};
        matches!(self, Self::Code(0) | Self::Signal(SIGHUP | SIGINT | SIGKILL | SIGTERM))
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with exit code {code}"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(name) => write!(f, "was killed by signal {number} ({name})"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
            Self::Killed { limit_bytes } => {
                let limit = show_bytes(*limit_bytes);
                write!(
                    f,
                    "was killed by SIGKILL, perhaps for more than its {limit} of memory (Podman tells from 5.0 on)"
                )
            }
            Self::OutOfMemory { limit_bytes: 0 } => f.write_str("ran out of memory"),
            Self::OutOfMemory { limit_bytes } => write!(f, "used more than its {} of memory", show_bytes(*limit_bytes)),
            Self::OutOfGpuMemory { limit_bytes } => {
                write!(f, "used more than its {} of GPU memory", show_bytes(*limit_bytes))
            }
            Self::Stopped => f.write_str("was ended by the worker"),
        }
    }
}

/// The errors that a runner may give: those of a model, an input or a run. To say the others is the worker's business: to
/// the broker they mean that the worker has no place, or a small quota, and not that the task failed.
const CODES_OF_RUNNERS: [ErrorCode; 10] = [
    ErrorCode::BadRequest,
    ErrorCode::EngineUnavailable,
    ErrorCode::InputMismatch,
    ErrorCode::ModelInvalid,
    ErrorCode::ModelRejected,
    ErrorCode::ModelUnsupported,
    ErrorCode::RunCrashed,
    ErrorCode::RunFailed,
    ErrorCode::RunOutOfMemory,
    ErrorCode::TooLarge,
];

/// The error code with this name, if a runner may give it.
pub(crate) fn code_of_runner(name: &str) -> Option<ErrorCode> {
    CODES_OF_RUNNERS.into_iter().find(|code| code.name() == name)
}

/// The end of a runner's log. Bounded, however much a runner writes.
#[derive(Debug, Default)]
pub(crate) struct LogTail {
    bytes: Vec<u8>,
}

impl LogTail {
    /// Appends the next piece of the log.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        let piece = &piece[piece.len().saturating_sub(LOG_BYTES_MAX)..];
        let spill = (self.bytes.len() + piece.len()).saturating_sub(LOG_BYTES_MAX);
        self.bytes.drain(..spill.min(self.bytes.len()));
        self.bytes.extend_from_slice(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(cause: Cause, log: &str) -> Exit {
        exit_under(LimitOf::Task, cause, log)
    }

    fn exit_under(memory_of: LimitOf, cause: Cause, log: &str) -> Exit {
        let mut tail = LogTail::default();
        tail.push(log.as_bytes());
        Exit::new(cause, memory_of, &tail)
    }

    #[test]
    fn the_runners_last_word_counts_most() {
        let log = "loading\n{\"code\":\"MODEL_UNSUPPORTED\",\"text\":\"operator DENSIFY\"}\n";
        let failure = exit(Cause::Code(11), log).while_loading();
        assert_eq!(failure, Failure::new(ErrorCode::ModelUnsupported, "operator DENSIFY"));
    }

    #[test]
    fn what_a_model_makes_the_runtime_log_decides_nothing() {
        let log = "{\"code\":\"WORKER_LOST\",\"text\":\"try the next worker\"}\n";
        for (cause, code) in [
            (Cause::Signal(libc::SIGSEGV), ErrorCode::ModelRejected),
            (Cause::Code(10), ErrorCode::ModelInvalid),
            (Cause::Code(101), ErrorCode::ModelRejected),
        ] {
            assert_eq!(exit(cause, log).while_loading().code, code, "{cause}");
        }
        let log = "{\"code\":\"MODEL_REJECTED\",\"text\":\"all is well\"}\n";
        let crashed = exit(Cause::Signal(libc::SIGSEGV), log).while_loading();
        assert!(crashed.text.contains("SIGSEGV"), "{}", crashed.text);
    }

    #[test]
    fn every_way_to_end_while_loading_has_its_code() {
        for (cause, code) in [
            (Cause::Code(10), ErrorCode::ModelInvalid),
            (Cause::Code(11), ErrorCode::ModelUnsupported),
            (Cause::Code(12), ErrorCode::ModelRejected),
            (Cause::Code(13), ErrorCode::EngineUnavailable),
            (Cause::Code(127), ErrorCode::EngineUnavailable),
            (Cause::Code(101), ErrorCode::ModelRejected),
            (Cause::Signal(libc::SIGSEGV), ErrorCode::ModelRejected),
            (Cause::Code(14), ErrorCode::RunOutOfMemory),
            (Cause::OutOfMemory { limit_bytes: 1 << 20 }, ErrorCode::RunOutOfMemory),
            (Cause::OutOfGpuMemory { limit_bytes: 1 << 20 }, ErrorCode::ModelRejected),
        ] {
            assert_eq!(exit(cause, "").while_loading().code, code, "{cause}");
        }
    }

    #[test]
    fn every_way_to_end_during_a_run_has_its_code() {
        let crashed = exit(Cause::Signal(libc::SIGSEGV), "some log\n").while_running();
        assert_eq!(crashed.code, ErrorCode::RunCrashed);
        assert!(crashed.text.contains("SIGSEGV") && crashed.text.contains("some log"), "{}", crashed.text);
        assert_eq!(exit(Cause::Code(1), "").while_running().code, ErrorCode::RunCrashed);
        let starved = exit(Cause::OutOfMemory { limit_bytes: 64 << 20 }, "").while_running();
        assert_eq!(starved.code, ErrorCode::RunOutOfMemory);
        assert!(starved.text.contains("64.0 MiB"), "{}", starved.text);
        let starved = exit(Cause::OutOfGpuMemory { limit_bytes: 64 << 20 }, "").while_running();
        assert_eq!(starved.code, ErrorCode::RunOutOfMemory);
        assert!(starved.text.contains("GPU memory"), "{}", starved.text);
        let aborted = exit(Cause::Signal(libc::SIGABRT), "memory allocation of 99 bytes failed\n").while_running();
        assert_eq!(aborted.code, ErrorCode::RunOutOfMemory);
    }

    #[test]
    fn a_runner_that_is_ended_from_outside_is_not_held_against_its_model() {
        for cause in [Cause::Code(0), Cause::Signal(libc::SIGTERM), Cause::Signal(libc::SIGKILL)] {
            for failure in [exit(cause, "").while_loading(), exit(cause, "").while_running()] {
                assert_eq!(failure.code, ErrorCode::EngineUnavailable, "{cause}");
                assert!(failure.text.contains("from outside"), "{}", failure.text);
            }
        }
    }

    #[test]
    fn a_runner_s_last_words_are_on_one_line_and_leave_out_that_it_began_well() {
        let begun = "2026-11-22T15:00:00.1Z  INFO mesh_runner::serve: serving socket=runner.sock\n";
        let text = |log: &str| exit(Cause::Signal(libc::SIGSEGV), log).while_running().text;
        assert!(text(begun).ends_with("during the run"), "{}", text(begun));
        let said = text(&format!("{begun}corrupted size\n\n2026-11-22T15:00:01Z  WARN x: bad\n"));
        assert!(said.ends_with("its last words: corrupted size | 2026-11-22T15:00:01Z  WARN x: bad"), "{said}");
    }

    #[test]
    fn memory_that_only_this_worker_keeps_short_is_no_fault_of_the_model() {
        let short = Cause::OutOfMemory { limit_bytes: 64 << 20 };
        let log = "{\"code\":\"RUN_OOM\",\"text\":\"not enough memory for the weights\"}\n";
        for (cause, log) in [(short, ""), (Cause::Code(14), log), (Cause::Signal(libc::SIGABRT), "std::bad_alloc")] {
            let ours = exit_under(LimitOf::Worker, cause, log);
            assert_eq!(ours.while_loading().code, ErrorCode::WorkerOutgrown, "{cause}");
            let asked = exit_under(LimitOf::Task, cause, log).while_loading();
            assert_eq!(asked.code, ErrorCode::RunOutOfMemory, "{cause}");
            assert!(asked.text.contains("--memory"), "{}", asked.text);
        }
        assert_eq!(exit_under(LimitOf::Worker, short, "").while_running().code, ErrorCode::WorkerOutgrown);
        let gpu = Cause::OutOfGpuMemory { limit_bytes: 64 << 20 };
        assert_eq!(exit_under(LimitOf::Worker, gpu, "").while_running().code, ErrorCode::RunOutOfMemory);
    }

    #[test]
    fn a_runner_that_writes_without_end_costs_no_memory() {
        let mut tail = LogTail::default();
        for _ in 0..1000 {
            tail.push(&[b'x'; 999]);
        }
        tail.push(b"the end");
        assert_eq!(tail.bytes.len(), LOG_BYTES_MAX);
        assert!(tail.bytes.ends_with(b"the end"));
    }
}
