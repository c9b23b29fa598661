//! Models of known cost: the output that the simulated runtime computes for rows, and its run time.
//!
//! A row is a number. A model's output for a row depends only on the model and the row, so a result shows whose rows
//! went through which models, and in which order.

use proto_msgs::{ClientId, Digest, TaskId};

use super::mesh::Micros;

/// How a model handles several rows in one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Law {
    /// The outputs are right, and a call of many rows costs little more than one of a single row.
    Packs,
    /// The outputs are right, but a call is no faster than its rows one after the other.
    NoGain,
    /// The outputs are wrong, and the call is fast.
    Differs,
    /// The call fails.
    Unsupported,
}

/// The law of a model follows from its number, so every law has as many models as a test wants.
pub(crate) const fn law_of(model: u8) -> Law {
    match model % 4 {
        0 => Law::NoGain,
        1 => Law::Packs,
        2 => Law::Differs,
        _ => Law::Unsupported,
    }
}

/// The number of a model that packs.
pub(crate) const PACKS: u8 = 1;

/// For models that pack: the fixed cost of a call, in thousandths of a single row's time. 64 rows take 7.3 times as
/// long as one row, so each takes a ninth.
const FIXED_PERMILLE: u64 = 900;

/// Microseconds of one call. `singles` holds the numbers of rows and the time of each row alone.
pub(crate) fn call_us(law: Law, singles: &[(u32, Micros)]) -> Micros {
    let sum: Micros = singles.iter().map(|(rows, each)| u64::from(*rows) * each).sum();
    let longest = singles.iter().map(|(_, each)| *each).max().unwrap_or(0);
    match law {
        Law::NoGain | Law::Unsupported => sum,
        Law::Packs | Law::Differs => (longest * FIXED_PERMILLE + sum * (1000 - FIXED_PERMILLE)) / 1000,
    }
}

/// A row as the inputs hold it.
pub(crate) fn input_row(input: Digest, row: u32) -> u64 {
    let seed = input.as_bytes().iter().fold(0_u64, |hash, byte| mix(hash ^ u64::from(*byte)));
    mix(seed ^ u64::from(row))
}

/// A model's output for a row.
pub(crate) fn run_row(model: Digest, row: u64) -> u64 {
    mix(row ^ mix(u64::from(model.as_bytes()[0]) + 1))
}

/// The output of a model with [`Law::Differs`] for a row in a call of several rows.
pub(crate) fn spoil_row(row: u64) -> u64 {
    row ^ 1
}

/// The output that consists of these rows. Rows of another client would give another digest.
pub(crate) fn output_of(task: TaskId, client: ClientId, rows: impl Iterator<Item = u64>) -> Digest {
    let mut bytes = [0; 32];
    let hash = rows.fold(0, |hash: u64, row| mix(hash ^ row));
    bytes[..8].copy_from_slice(&hash.to_be_bytes());
    for (place, (task, client)) in bytes[16..].iter_mut().zip(task.as_bytes().iter().zip(client.as_bytes())) {
        *place = task.wrapping_mul(31) ^ client;
    }
    Digest::from_bytes(bytes)
}

/// Second half of splitmix64.
const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
