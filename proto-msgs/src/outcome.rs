//! How a task or an attempt ends. One list of codes for the whole mesh: each says whose fault it was and whether
//! another worker may do better.

use std::fmt;

use bincode::{Decode, Encode};

macro_rules! error_codes {
    ($($(#[$doc:meta])* $number:literal $variant:ident $text:literal $retry:ident;)*) => {
        /// Why something failed. The number travels; scripts match on the name.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[repr(u16)]
        pub enum ErrorCode { $($(#[$doc])* $variant = $number,)* }

        impl ErrorCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name as people and scripts see it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// Whether the same task may succeed at another worker: the worker or the link was at fault.
            pub const fn is_retryable(self) -> bool {
                match self { $(Self::$variant => error_codes!(@$retry),)* }
            }

            const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
        }
    };
    (@again) => { true };
    (@final) => { false };
}

error_codes! {
    /// A request with a field out of range.
    1 BadRequest "BAD_REQUEST" final;
    /// A limit of queue, memory or clients is reached; try later.
    2 Busy "BUSY" again;
    /// There is no such task, or it belongs to another client.
    3 NotFound "NOT_FOUND" final;
    /// Another task already has this task id.
    4 Conflict "TASK_ID_CONFLICT" final;
    /// No worker can ever meet the demands.
    5 NoWorkerFits "NO_WORKER_FITS" final;
    /// The store that must remember a detached task does not answer.
    6 StoreAway "STORE_AWAY" again;
    /// The deadline passed.
    7 Expired "EXPIRED" final;
    /// The task failed at as many workers as it may try.
    8 AttemptsExhausted "ATTEMPTS_EXHAUSTED" final;
    /// The client of an attached task went away.
    9 ClientGone "CLIENT_GONE" final;
    /// The deadline would pass before any worker could finish.
    11 DeadlineUnmeetable "DEADLINE_UNMEETABLE" final;
    /// The task took several workers down with it.
    12 Poisonous "POISONOUS" final;
    /// The version, role or key is not allowed.
    10 Forbidden "FORBIDDEN" final;

    /// The ticket is forged, expired, or for another worker or client.
    20 BadTicket "BAD_TICKET" again;
    /// The worker is draining.
    21 Draining "DRAINING" again;
    /// No advertised address of the other side can be reached.
    22 Unreachable "UNREACHABLE" again;
    /// The link broke and did not come back, or the worker died.
    23 WorkerLost "WORKER_LOST" again;
    /// A chunk is out of order, beyond its blob's end, or badly compressed.
    24 BadChunk "BAD_CHUNK" again;
    /// The bytes that arrived have another digest than announced: the file changed during the upload.
    25 DigestMismatch "DIGEST_MISMATCH" final;
    /// The worker's disk is full.
    26 DiskFull "DISK_FULL" again;
    /// What the task brings never fits the worker's quota.
    27 QuotaExceeded "QUOTA_EXCEEDED" again;
    /// The client sent more bytes than the ticket allows.
    28 TooLarge "TOO_LARGE" final;

    /// The file is not a model of the format it claims.
    40 ModelInvalid "MODEL_INVALID" final;
    /// The runtime does not know an operator or the format.
    41 ModelUnsupported "MODEL_UNSUPPORTED" final;
    /// The runtime crashed while loading the model.
    42 ModelRejected "MODEL_REJECTED" final;
    /// An input's name, element type, shape or size does not match the model.
    43 InputMismatch "MODEL_INPUT_MISMATCH" final;
    /// The run took longer than allowed.
    44 RunTimeout "RUN_TIMEOUT" final;
    /// The runner died during the run.
    45 RunCrashed "RUN_CRASHED" final;
    /// The runner used more memory than its task asks for, or than any worker gives a task that asks for none.
    46 RunOutOfMemory "RUN_OOM" final;
    /// The runtime reported an error.
    47 RunFailed "RUN_FAILED" final;
    /// The runner's answer breaks its protocol.
    48 RunProtocol "RUN_PROTOCOL" again;
    /// The container engine, the image or the runtime library is missing or broken at this worker, cannot use its GPU, or
    /// takes too long to load the model.
    49 EngineUnavailable "ENGINE_UNAVAILABLE" again;
    /// The result is larger than allowed.
    50 ResultTooLarge "RESULT_TOO_LARGE" final;
    /// The result is no longer kept.
    51 ResultGone "RESULT_GONE" final;
    /// The client cannot keep the result: its own disk is full or cannot be written.
    52 ResultNotKept "RESULT_NOT_KEPT" final;

    /// The runner used more memory than this worker gives a task that asks for none: another worker may give more. If
    /// none does, the task ends with [`ErrorCode::RunOutOfMemory`].
    53 WorkerOutgrown "WORKER_OUTGROWN" again;

    /// A code that only a newer peer knows.
    99 Unknown "UNKNOWN" final;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Encode for ErrorCode {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        (*self as u16).encode(encoder)
    }
}

impl<C> Decode<C> for ErrorCode {
    fn decode<D: bincode::de::Decoder<Context = C>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        Ok(Self::from_number(u16::decode(decoder)?).unwrap_or(Self::Unknown))
    }
}

bincode::impl_borrow_decode!(ErrorCode);

/// A code and an explanation for a person.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Failure {
    /// The kind of failure.
    pub code: ErrorCode,
    /// What was wrong and what to do; at most [`TEXT_BYTES_MAX`](crate::limits::TEXT_BYTES_MAX) bytes.
    pub text: String,
}

impl Failure {
    /// Makes a failure; the text is cut to the length that a peer accepts.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(text.floor_char_boundary(crate::limits::TEXT_BYTES_MAX));
        Self { code, text }
    }
}

/// How an attempt ended at a worker, or how a task ended for good.
#[derive(Clone, Debug, Decode, Encode, Eq, PartialEq)]
pub enum Outcome {
    /// The model ran and there is a result.
    Done {
        /// Time in the model, microseconds.
        run_us: u64,
        /// Time to load the model, microseconds; 0 if it was warm.
        load_us: u64,
    },
    /// There is no result, for this reason.
    Failed(Failure),
    /// The client cancelled it.
    Cancelled,
}

impl Outcome {
    /// A failure.
    pub fn failed(code: ErrorCode, text: impl Into<String>) -> Self {
        Self::Failed(Failure::new(code, text))
    }

    /// Whether another attempt may do better.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.code.is_retryable())
    }
}
