//! The simulator: the real machines of all three roles under a seeded network, in one thread and virtual time.
//!
//! ```text
//!   seeds      plans from a seed: faults, then healing, then progress is demanded
//!   crowds     load from a seed: what the schedule promises is demanded in figures
//!   days       long runs of mixed traffic
//!   stories    hand-written scenarios in the domain's words
//!   sabotage   every rule broken in turn, and noticed (feature `sabotage`)
//!   scale      many workers
//! ```
//!
//! Begin with `stories`, then read `referee`, which states what must always hold, and `tables`: nothing grows.

mod batches;
mod books;
mod broker_shell;
mod client_shell;
mod crowds;
mod days;
mod deadlines;
mod detached;
mod ears;
mod expect;
mod faults;
mod job;
mod lanes;
mod loads;
mod mesh;
mod models;
mod net;
mod referee;
mod rng;
#[cfg(feature = "sabotage")]
mod sabotage;
mod scale;
mod scheduling;
mod seeds;
mod stories;
mod story;
mod streams;
mod tables;
mod worker_shell;
mod worker_work;
