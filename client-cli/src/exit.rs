//! Failures as scripts see them: exit code, code and text. Owns the mapping from every error; the numbers are a promise.

use mesh_sdk::{AskError, ConnectError, ErrorCode, ModelError, SubmitError, TaskError};
use serde_json::{Value, json};

/// Success.
pub(crate) const OK: u8 = 0;
/// Another error: a file cannot be written, or a bug.
pub(crate) const INTERNAL: u8 = 1;
/// The command line is invalid, or key or state files cannot be used.
pub(crate) const USAGE: u8 = 2;
/// Model or input is bad: not a model, refused by its runtime, of the wrong size or type, changed during the upload.
pub(crate) const BAD_INPUT: u8 = 3;
/// The run failed: crash, out of memory, time limit, an error of the runtime, or the task took several workers down.
pub(crate) const RUN_FAILED: u8 = 4;
/// No place: no worker fits, all attempts failed, queue full, store away.
pub(crate) const NO_PLACE: u8 = 5;
/// Broker or worker cannot be reached.
pub(crate) const UNREACHABLE: u8 = 6;
/// The deadline passed or cannot be met, or `--timeout`.
pub(crate) const EXPIRED: u8 = 7;
/// The task was cancelled.
pub(crate) const CANCELLED: u8 = 8;
/// No such task, or its result is no longer kept.
pub(crate) const NOT_FOUND: u8 = 9;
/// Another protocol version, or a key that is not allowed.
pub(crate) const REFUSED: u8 = 10;
/// The task has not ended, and the command does not wait for it.
pub(crate) const NOT_READY: u8 = 11;
/// Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;
/// SIGTERM.
pub(crate) const TERMINATED: u8 = 143;

/// The table as `--help` shows it.
pub(crate) const HELP: &str = "\
Exit codes:
  0    done
  1    something unexpected: a file cannot be written, or a bug
  2    wrong usage; key or state files, or --output, cannot be used
  3    bad model or input: wrong format, size or type; changed during the upload
  4    the run failed: crash, out of memory, time limit, error of the runtime; or it
       took three workers down and was given up (POISONOUS)
  5    no place: no worker fits, attempts exhausted, queue full, store away
  6    broker or worker cannot be reached
  7    the deadline passed or cannot be met (EXPIRED, DEADLINE_UNMEETABLE), or --timeout
  8    cancelled
  9    no such task, or its result is no longer kept
  10   another protocol version, or a key that is not allowed
  11   not done yet (`result`; `wait` waits for it)
  130  interrupted by Ctrl-C; 143 by SIGTERM
With several items or tasks: 0 if all are done, else the code of the first that failed.";

/// Why a command or one of its items failed: the exit code, and what `--json` and the terminal say.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) exit: u8,
    /// Error code of the mesh, or a code of the same kind.
    pub(crate) code: &'static str,
    pub(crate) text: String,
    /// When it may be tried again, if the mesh is only full; milliseconds.
    pub(crate) retry_after_ms: Option<u64>,
}

impl Failed {
    pub(crate) fn new(exit: u8, code: &'static str, text: impl ToString) -> Self {
        Self { exit, code, text: text.to_string().trim_end().to_owned(), retry_after_ms: None }
    }

    pub(crate) fn of_task(error: &TaskError) -> Self {
        let code = match error {
            TaskError::Failed(failure) | TaskError::Busy { failure, .. } => failure.code.name(),
            TaskError::Cancelled => "CANCELLED",
            TaskError::Version(_) => ErrorCode::Forbidden.name(),
            TaskError::Closed => "CLOSED",
        };
        let text = match error {
            TaskError::Failed(failure) | TaskError::Busy { failure, .. } => failure.text.clone(),
            other => other.to_string(),
        };
        let retry_after_ms = match error {
            TaskError::Busy { retry_after, .. } => u64::try_from(retry_after.as_millis()).ok(),
            _ => None,
        };
        Self { exit: of_task(error), code, text, retry_after_ms }
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut error = json!({ "code": self.code, "text": self.text, "exit": self.exit });
        if let Some(ms) = self.retry_after_ms {
            error["retry_after_ms"] = ms.into();
        }
        error
    }

    /// The document that `--json` prints if there is nothing else to show.
    pub(crate) fn document(&self) -> Value {
        json!({ "error": self.to_json() })
    }
}

/// The exit code of several, one after the other: that of the first failure.
pub(crate) fn first(earlier: u8, later: u8) -> u8 {
    if earlier == OK { later } else { earlier }
}

/// The exit code for a code of the mesh.
pub(crate) fn of_code(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::BadRequest
        | ErrorCode::Conflict
        | ErrorCode::DigestMismatch
        | ErrorCode::TooLarge
        | ErrorCode::ModelInvalid
        | ErrorCode::ModelUnsupported
        | ErrorCode::ModelRejected
        | ErrorCode::InputMismatch => BAD_INPUT,
        ErrorCode::RunTimeout
        | ErrorCode::RunCrashed
        | ErrorCode::RunOutOfMemory
        | ErrorCode::WorkerOutgrown
        | ErrorCode::RunFailed
        | ErrorCode::RunProtocol
        | ErrorCode::EngineUnavailable
        | ErrorCode::ResultTooLarge
        | ErrorCode::Poisonous => RUN_FAILED,
        ErrorCode::Busy
        | ErrorCode::NoWorkerFits
        | ErrorCode::StoreAway
        | ErrorCode::AttemptsExhausted
        | ErrorCode::Draining
        | ErrorCode::DiskFull
        | ErrorCode::QuotaExceeded => NO_PLACE,
        ErrorCode::Unreachable | ErrorCode::WorkerLost | ErrorCode::ClientGone | ErrorCode::BadChunk => UNREACHABLE,
        ErrorCode::Expired | ErrorCode::DeadlineUnmeetable => EXPIRED,
        ErrorCode::NotFound | ErrorCode::ResultGone => NOT_FOUND,
        ErrorCode::Forbidden | ErrorCode::BadTicket => REFUSED,
        ErrorCode::ResultNotKept | ErrorCode::Unknown => INTERNAL,
    }
}

pub(crate) fn of_task(error: &TaskError) -> u8 {
    match error {
        TaskError::Failed(failure) | TaskError::Busy { failure, .. } => of_code(failure.code),
        TaskError::Cancelled => CANCELLED,
        TaskError::Version(_) => REFUSED,
        TaskError::Closed => INTERNAL,
    }
}

pub(crate) fn of_submit(error: &SubmitError) -> u8 {
    match error {
        SubmitError::Read { .. } | SubmitError::Invalid(_) => BAD_INPUT,
        SubmitError::Closed => INTERNAL,
    }
}

pub(crate) fn of_model(error: &ModelError) -> u8 {
    match error {
        ModelError::Read { .. }
        | ModelError::UnknownFormat { .. }
        | ModelError::TooLarge { .. }
        | ModelError::Changed { .. } => BAD_INPUT,
        ModelError::Stopped => INTERNAL,
    }
}

pub(crate) fn of_ask(error: &AskError) -> u8 {
    match error {
        AskError::Silent { .. } => UNREACHABLE,
        AskError::NotFound(_) => NOT_FOUND,
        AskError::Refused(_) | AskError::Version(_) => REFUSED,
        AskError::Closed => INTERNAL,
    }
}

pub(crate) fn of_connect(error: &ConnectError) -> u8 {
    use mesh_transport::DialError;
    match error {
        ConnectError::Broker(DialError::KeyRefused { .. } | DialError::NotMesh { .. }) => REFUSED,
        ConnectError::Broker(DialError::BadAddress { .. } | DialError::KeyMissing { .. } | DialError::NoAddress) => {
            USAGE
        }
        ConnectError::Broker(_) => UNREACHABLE,
        ConnectError::Keys(_)
        | ConnectError::HalfKeyed(_)
        | ConnectError::Listen(_)
        | ConnectError::State { .. }
        | ConnectError::NoHome
        | ConnectError::Invalid(_) => USAGE,
        ConnectError::System(_) => INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_mesh_has_a_documented_exit_code() {
        for code in ErrorCode::ALL {
            let exit = of_code(*code);
            assert_ne!(exit, OK, "{code}");
            assert!(HELP.contains(&format!("\n  {exit:<4} ")), "{code}: {exit} is not in the help");
        }
    }

    #[test]
    fn the_promised_numbers() {
        assert_eq!(of_code(ErrorCode::InputMismatch), 3);
        assert_eq!(of_code(ErrorCode::RunTimeout), 4);
        assert_eq!(of_code(ErrorCode::NoWorkerFits), 5);
        assert_eq!(of_code(ErrorCode::Unreachable), 6);
        assert_eq!((of_code(ErrorCode::Expired), of_code(ErrorCode::DeadlineUnmeetable)), (7, 7));
        assert_eq!(of_code(ErrorCode::Poisonous), 4);
        assert_eq!(of_task(&TaskError::Cancelled), 8);
        assert_eq!(of_code(ErrorCode::ResultGone), 9);
        assert_eq!(of_code(ErrorCode::Forbidden), 10);
        assert_eq!(of_code(ErrorCode::ResultNotKept), 1, "a file cannot be written");
    }
}
