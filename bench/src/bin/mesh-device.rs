//! PROGRAM: a runner whose runs take a stated time. `mesh-worker --runner` starts it in place of `mesh-runner`, with
//! the same arguments behind `--device FILE`. Never: a real model.

use std::process::ExitCode;

use mesh_bench::device::{Settings, serve};

fn main() -> ExitCode {
    match Settings::from_args(std::env::args().skip(1)).and_then(|settings| serve(&settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-device: {error:#}");
            ExitCode::FAILURE
        }
    }
}
