//! Owns `mesh-runner runtimes`: opens every library and tells what was found.

use std::path::PathBuf;

use proto_msgs::{Failure, ModelFormat};
use serde_json::{Value, json};

use crate::{cli::Runtimes, engine, exit, libraries::passed_over};

/// Opens every library, tells what was found, and returns the exit status: failure if any cannot be used.
pub(crate) fn runtimes(arguments: &Runtimes) -> u8 {
    let found: Vec<_> = ModelFormat::ALL.iter().copied().map(|format| (format, engine::open_library(format))).collect();
    if arguments.json {
        let lines: Vec<Value> = found.iter().map(|(format, library)| json_of(*format, library)).collect();
        println!("{}", Value::from(lines));
    } else {
        for (format, library) in &found {
            match library {
                Ok(path) => println!("{format}: {}", path.display()),
                Err(failure) => println!("{format}: {}", failure.text),
            }
            library.iter().filter_map(|path| passed_over(path)).for_each(|remark| println!("{format}: {remark}"));
        }
    }
    let failure = found.iter().find_map(|(_, library)| library.as_ref().err());
    failure.map_or(exit::SUCCESS, |failure| exit::exit_status(failure.code))
}

fn json_of(format: ModelFormat, library: &Result<PathBuf, Failure>) -> Value {
    match library {
        Ok(path) => {
            json!({ "format": format.name(), "library": path.display().to_string(), "remark": passed_over(path) })
        }
        Err(failure) => json!({ "format": format.name(), "failure": failure.text }),
    }
}
