//! Models of stated cost: what the simulated runtime makes of rows, and how long that takes.
//!
//! A row is a number. What a model makes of it depends on the model and the row alone, so that a result says whose rows
//! went through which models in which order.

use proto_msgs::{ClientId, Digest, TaskId};

use super::mesh::Micros;

/// How a model takes many rows in one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Law {
    /// Right, and a call of many rows costs little more than one of a single row.
    Packs,
    /// Right, and no sooner than one after the other.
    NoGain,
    /// Wrong, and soon.
    Differs,
    /// The call fails.
    Unsupported,
}

/// Models go by their number: every law has as many as one likes.
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

/// Thousandths of a single row's time that a call costs however many rows it has, for models that pack: 64 rows take
/// 7.3 times as long as one, so each of them a ninth.
const FIXED_PERMILLE: u64 = 900;

/// Microseconds of one call with rows that take `singles` each alone: numbers of rows and the time of each.
pub(crate) fn call_us(law: Law, singles: &[(u32, Micros)]) -> Micros {
    let sum: Micros = singles.iter().map(|(rows, each)| u64::from(*rows) * each).sum();
    let longest = singles.iter().map(|(_, each)| *each).max().unwrap_or(0);
    match law {
        Law::NoGain | Law::Unsupported => sum,
        Law::Packs | Law::Differs => (longest * FIXED_PERMILLE + sum * (1000 - FIXED_PERMILLE)) / 1000,
    }
}

/// A row as it comes with the inputs.
pub(crate) fn input_row(input: Digest, row: u32) -> u64 {
    let seed = input.as_bytes().iter().fold(0_u64, |hash, byte| mix(hash ^ u64::from(*byte)));
    mix(seed ^ u64::from(row))
}

/// What a model makes of a row.
pub(crate) fn run_row(model: Digest, row: u64) -> u64 {
    mix(row ^ mix(u64::from(model.as_bytes()[0]) + 1))
}

/// What a model whose law is [`Law::Differs`] makes of a row in company.
pub(crate) fn spoil_row(row: u64) -> u64 {
    row ^ 1
}

/// The output that consists of these rows. What went to another client cannot look right either.
pub(crate) fn output_of(task: TaskId, client: ClientId, rows: impl Iterator<Item = u64>) -> Digest {
    let mut bytes = [0; 32];
    let hash = rows.fold(0, |hash: u64, row| mix(hash ^ row));
    bytes[..8].copy_from_slice(&hash.to_be_bytes());
    for (place, (task, client)) in bytes[16..].iter_mut().zip(task.as_bytes().iter().zip(client.as_bytes())) {
        *place = task.wrapping_mul(31) ^ client;
    }
    Digest::from_bytes(bytes)
}

/// The second half of splitmix64.
const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
