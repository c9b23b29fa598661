//! One worker's machine with clients before it and devices behind it, in a time of its own: which rows run together, where
//! and when.

mod devices;
mod laws;
mod pace;
mod referee;
mod stories;
mod world;
