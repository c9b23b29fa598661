//! A stand-in for a GPU: one batch at a time, a fixed time per batch and per row, and an answer that can be checked
//! (each number plus one).
//!
//! Owns the cost of a device ([`Cost`], written into a valid ONNX file), its timetable ([`Book`], a file that all its
//! runners share), and a server with `mesh-runner`'s protocol ([`serve`]). Never: a real computation.

mod book;
mod cost;
mod serve;

pub use book::{Book, Usage};
pub use cost::Cost;
pub use serve::{Settings, serve};
