//! Runners in use: kept warm, asked over their sockets, given what fits their models.
//!
//! Never: how a runner starts and ends, which is `engine.rs`; what runs when, which is the machine's.

pub(crate) mod fit;
pub(crate) mod oip;
pub(crate) mod pool;
pub(crate) mod proven;
