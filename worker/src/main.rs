mod blobs;
mod engine;
mod fit;
mod oip;
mod payload;
mod probe;
mod state;
mod units;
fn main() {}
