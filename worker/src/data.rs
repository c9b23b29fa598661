//! The worker's data: models, and what goes into and comes out of them, in memory and on disk.
//!
//! Owns room: of the quota, and of memory. Never: links, runners.

pub(crate) mod blobs;
pub(crate) mod keep;
pub(crate) mod link_speed;
pub(crate) mod payload;
