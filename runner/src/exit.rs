//! Exit statuses of `mesh-runner`, which a worker reads. Owns the numbers.

use proto_msgs::ErrorCode;

/// The exit status of a runner that ended as it was asked to.
pub(crate) const SUCCESS: u8 = 0;

/// The exit status for everything that has no code of its own.
pub(crate) const FAILURE: u8 = 1;

/// The exit status of a runner that ends because of a failure.
pub(crate) fn exit_status(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::ModelInvalid => 10,
        ErrorCode::ModelUnsupported => 11,
        ErrorCode::ModelRejected => 12,
        ErrorCode::EngineUnavailable => 13,
        ErrorCode::RunOutOfMemory => 14,
        _ => FAILURE,
    }
}
