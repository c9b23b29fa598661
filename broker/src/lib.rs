//! SHELL: `mesh-broker`, the process around [`mesh_core::broker::Broker`].
//!
//! Owns configuration, the run loop, the store and the admin port. Never: a decision about workers or tasks.
//!
//! ```text
//!   thread "main"    transport -> Event -> Broker::handle -> Action -> transport | store      run.rs
//!   thread "store"   changes, merged -> Redis | embedded file                               store.rs
//!   thread "admin"   /healthz /readyz /metrics                                              admin.rs
//! ```

pub mod admin;
pub mod args;
mod authorized;
pub mod config;
pub mod metrics;
pub mod run;
pub mod store;
