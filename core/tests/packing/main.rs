//! One worker's machine between simulated clients and devices, in its own time: which rows run together, where and
//! when.

mod culprits;
mod devices;
mod laws;
mod pace;
mod promises;
mod referee;
mod stories;
mod task;
mod world;
