//! A stand-in for a GPU: one batch at a time, so many microseconds a batch and so many a row, and an answer that can be
//! checked (each number plus one).
//!
//! Owns what a device costs ([`Cost`], written into a valid ONNX file), when it is free ([`Book`], a file that all runners
//! of it share), and a server that speaks what `mesh-runner` speaks ([`serve`]). Never: a computation worth its time.

mod book;
mod cost;
mod serve;

pub use book::{Book, Usage};
pub use cost::Cost;
pub use serve::{Settings, serve};
